// Copies by the driver, of bytes that are contiguous on both sides.
#pragma once

#include <vector>

#include "cuda_driver.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

struct Run {
    CUdeviceptr device;
    uint8_t* pool;
    uint64_t bytes;
};

// Regions that follow each other in KV memory are one. A block's last run ends with it: behind its bytes in the pool
// lies a trailer.
std::vector<Region> merge_regions(const std::vector<Region>& regions);
std::vector<Run> runs_of(const std::vector<Region>& merged, const std::vector<BlockShard>& blocks);

using EnqueueRuns = void(const Driver& driver, Direction direction, const std::vector<Run>& runs, CUstream stream);
EnqueueRuns enqueue;       // for registered memory, all in one call where the driver has it
EnqueueRuns enqueue_each;  // for any memory, through pinned buffers of the driver's; may return late

}  // namespace kvpool::cuda
