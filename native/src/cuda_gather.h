// The kernel way: one launch moves many blocks, whatever their fragments, reading and writing registered host memory.
// The processor's part is 12 bytes a block.
#pragma once

#include <vector>

#include "cuda_driver.h"
#include "gather_abi.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

class Gather {
  public:
    // Loads the module and uploads the regions; the device's context is current. CudaError: there is no kernel way.
    Gather(const Driver& driver, const std::vector<Region>& regions);
    ~Gather() { end(); }
    Gather(const Gather&) = delete;

    // 16-byte accesses are all the kernels have.
    static bool fits(const std::vector<Region>& regions);
    static bool fits(const std::vector<CUdeviceptr>& shards);

    // `shards` are device addresses, one a block.
    void enqueue(Direction direction, const std::vector<BlockShard>& blocks, const std::vector<CUdeviceptr>& shards,
                 CUstream stream) const;

  private:
    void set_up(const std::vector<Region>& regions);
    void launch(CUfunction kernel, unsigned grid, unsigned num_blocks, GatherBlocks& blocks, CUstream stream) const;
    void end();

    const Driver& driver_;
    CUmodule module_ = nullptr;
    CUfunction load_ = nullptr, store_ = nullptr;
    CUdeviceptr pieces_ = 0;
    unsigned num_pieces_ = 0;
};

}  // namespace kvpool::cuda
