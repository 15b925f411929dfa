// The staged way, for blocks in many fragments: between the pool and a buffer in device memory a block is one run,
// which the driver copies at the link's speed; between that buffer and KV memory the kernels of gather.cu move it, at
// the speed of device memory. So the processors of the device are ours for a thirtieth of the time that a buffer takes.
//
// Blocks lie in the buffer as far apart as shards do that alone fill their slots: where such slots follow each other,
// as those of a chain stored into an empty pool do, one copy moves several, and what lies between them (a trailer,
// which is written after the copy, and padding).
#pragma once

#include <memory>
#include <vector>

#include "cuda_gather.h"
#include "cuda_registration.h"
#include "cuda_runs.h"

namespace kvpool::cuda {

inline constexpr uint64_t kStagingBytes = 64 << 20;  // of blocks, in one buffer for each of the backend's threads

class Staging {
  public:
    // `stride`: `CopyEngine::shard_bytes`. `registration`: what one copy may not reach beyond; null: copies of a block
    // each. CudaError: no room for the buffer.
    Staging(const Driver& driver, const Gather& gather, uint64_t payload_bytes, uint64_t stride,
            const PoolRegistration* registration);

    // `enqueue_runs`: as the pool's memory wants it. Calls for the same buffer are to use the same stream. Returns the
    // number of copies.
    size_t enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream,
                   EnqueueRuns* enqueue_runs) const;

  private:
    std::vector<Run> runs(const std::vector<BlockShard>& blocks) const;
    bool continues(const Run& run, const BlockShard& next) const;

    const Driver& driver_;
    const Gather& gather_;
    KernelGraph kernel_;
    const PoolRegistration* registration_;
    uint64_t payload_bytes_, stride_;
    uint64_t room_;  // blocks
    DeviceMemory buffer_;
};

}  // namespace kvpool::cuda
