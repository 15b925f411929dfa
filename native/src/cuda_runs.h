// The driver's way: one copy for each run of bytes that is contiguous on both sides.
//
// Runs end with their block: behind its bytes in the pool lies a trailer. Within a block, regions that follow each
// other in KV memory are one run.
#pragma once

#include <vector>

#include "cuda_driver.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

std::vector<Region> merge_regions(const std::vector<Region>& regions);

class Runs {
  public:
    Runs(const Driver& driver, std::vector<Region> merged) : driver_(driver), regions_(std::move(merged)) {}

    // For registered memory, all runs in one call where the driver has it.
    void enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const;
    // For any memory; may return late.
    void enqueue_each(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const;

  private:
    void enqueue_batch(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const;
    template <class Visit>
    void for_each_run(const std::vector<BlockShard>& blocks, Visit visit) const;  // visit(kv, in pool, bytes)

    const Driver& driver_;
    std::vector<Region> regions_;
};

}  // namespace kvpool::cuda
