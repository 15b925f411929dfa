// The staged way, for blocks in many fragments: between the pool and a buffer in device memory a block is one run,
// which the driver copies at the link's speed; between that buffer and KV memory the kernels of gather.cu move it, at
// the speed of device memory. So the processors of the device are ours for some 20 us of the 600 us that a buffer
// takes.
#pragma once

#include <memory>
#include <vector>

#include "cuda_gather.h"
#include "cuda_runs.h"

namespace kvpool::cuda {

class Staging {
  public:
    // CudaError: no room for the buffer.
    Staging(const Driver& driver, const Gather& gather, uint64_t payload_bytes);

    // For registered memory. Calls for the same buffer are to use the same stream.
    void enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const;

  private:
    const Gather& gather_;
    uint64_t stride_;  // from one staged block to the next
    uint64_t room_;    // blocks
    DeviceMemory buffer_;
    Runs runs_;
};

}  // namespace kvpool::cuda
