// A kernel that is launched as a CUDA graph of its own. Launched as it is, ten times on a stream beside the engine's,
// it would make each kernel of the engine's graphs begin about a microsecond later from then on, for good: decoding
// would be 2 % slower (docs/benchmarks.md). As a graph it does not.
#pragma once

#include "cuda_handles.h"

namespace kvpool::cuda {

class KernelGraph {
  public:
    // For any kernel of `first`'s module.
    KernelGraph(const Driver& driver, const CUkernelNodeParams& first);
    ~KernelGraph() { driver_.graph_exec_destroy.quietly(exec_); }
    KernelGraph(const KernelGraph&) = delete;

    // Launches of the same graph run one after the other. The parameters are copied before it returns.
    void launch(const CUkernelNodeParams& kernel, CUstream stream) const;

  private:
    const Driver& driver_;
    Graph graph_;  // owns the node
    CUgraphNode node_ = nullptr;
    CUgraphExec exec_ = nullptr;
};

}  // namespace kvpool::cuda
