// How bytes move between KV memory and pool slots; `CopyEngine` decides what moves and when.
//
// Contract: `copy` returns when the bytes are where they belong, or never will be: no write arrives later. It is called
// by the engine's threads, by each with its own number. `fence`, `has_passed` and `order_after_loads` are called by
// whoever submits jobs and never wait. After `close` nothing of the backend touches memory; it is called when no `copy`
// runs and none will.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvpool/mapping.h"

namespace kvpool {

enum class Direction { kStore, kLoad };

struct Region {
    uint8_t* base;
    uint64_t stride;  // from one block to the next
    uint64_t bytes;   // of one block
};

// A block in KV memory, and the place of its bytes in the pool.
struct BlockShard {
    uint8_t* bytes;
    uint32_t block;
};

// A point in the work of a compute stream: copies of the job that carries it come later. Null where copies need not
// wait.
using Fence = std::shared_ptr<void>;

// What copies have cost so far. Nanoseconds are processor time of the threads that made them.
struct CopyCosts {
    uint64_t batches = 0;   // each is waited for once
    uint64_t copies = 0;    // that the device was asked for
    uint64_t start_ns = 0;  // asking for them
    uint64_t wait_ns = 0;   // falling asleep and waking up
};

class CopyBackend {
  public:
    explicit CopyBackend(std::vector<Region> regions);
    virtual ~CopyBackend() = default;
    CopyBackend(const CopyBackend&) = delete;

    const std::vector<Region>& regions() const { return regions_; }
    uint64_t payload_bytes() const { return payload_bytes_; }  // of one block

    virtual unsigned threads() const = 0;
    virtual bool serves(unsigned thread, Direction direction) const = 0;
    // How many of a job's blocks `copy` is given at once, at most, from block `first` on.
    virtual size_t batch_blocks(size_t job_blocks, size_t first) const = 0;
    virtual Fence fence(uint64_t stream) = 0;
    virtual bool has_passed(const Fence&) { return true; }  // whether what was before it has ended
    // What `stream` is given from now on comes after all loads that are on the way. False: it does not.
    virtual bool order_after_loads(uint64_t stream) = 0;
    // False: the device refused, see `error`; what has arrived of the bytes is unknown. `on_the_way` is called when it
    // has been given all copies: only the loss of the device can keep the bytes from arriving then.
    virtual bool copy(unsigned thread, Direction direction, const std::vector<BlockShard>& shards, const Fence& fence,
                      const std::function<void()>& on_the_way) = 0;
    virtual void close() = 0;

    // For the log and for tests.
    virtual std::string describe() const = 0;
    virtual std::string error() const = 0;          // the last one; empty while all went well
    virtual bool is_off() const { return false; }   // no copy succeeds any more
    virtual uint64_t registered_bytes() const = 0;  // of the pool, known to the device
    virtual CopyCosts costs() const = 0;            // until `close`

  private:
    std::vector<Region> regions_;
    uint64_t payload_bytes_;
};

// By so many threads, a block at a time.
std::unique_ptr<CopyBackend> cpu_backend(std::vector<Region> regions, unsigned threads);

// How a GPU backend moves blocks.
enum class CudaWay {
    kCalibrated,  // whichever is better for the layout on that device, tried out at start
    kDriver,      // a copy by the driver for each fragment, in batches
    kStaged,      // a copy for each block, of a buffer in device memory where a kernel gathers and scatters
};

struct CudaOptions {
    int device = 0;
    CudaWay way = CudaWay::kCalibrated;
    std::string library = "libcuda.so.1";
};

// DMA by a CUDA device. std::system_error (ENODEV) when there is no such device or no driver; later errors are failed
// copies. Needs CUDA at run time only.
std::unique_ptr<CopyBackend> cuda_backend(std::shared_ptr<PoolFile> file, std::vector<Region> regions,
                                          const CudaOptions& options);

}  // namespace kvpool
