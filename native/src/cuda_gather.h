// The kernels of gather.cu: one launch moves many blocks between KV memory and a buffer of the same device, whatever
// their fragments. The processor's part is 4 bytes a block.
#pragma once

#include <vector>

#include "cuda_kernel_graph.h"
#include "gather_abi.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

class Gather {
  public:
    // Loads the module and uploads the regions; the device's context is current. CudaError: there are no kernels.
    Gather(const Driver& driver, const std::vector<Region>& regions);
    ~Gather() { driver_.module_unload.quietly(module_); }
    Gather(const Gather&) = delete;

    // 16-byte accesses are all the kernels have.
    static bool fits(const std::vector<Region>& regions);

    // What `enqueue` launches with: one for each stream.
    KernelGraph kernel() const;
    void warm_up(const KernelGraph& kernel) const;

    // Block i of `blocks` lies at `staged` + i * `stride`, in one run; the buffer is the source of a load.
    void enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUdeviceptr staged, uint64_t stride,
                 const KernelGraph& kernel, CUstream stream) const;

  private:
    void upload(const std::vector<GatherPiece>& pieces);

    const Driver& driver_;
    CUmodule module_ = nullptr;
    CUfunction load_ = nullptr, store_ = nullptr;
    unsigned num_pieces_;
    DeviceMemory pieces_;
};

}  // namespace kvpool::cuda
