#include "cuda_kernel_graph.h"

namespace kvpool::cuda {

KernelGraph::KernelGraph(const Driver& driver, const CUkernelNodeParams& first) : driver_(driver), graph_(driver) {
    driver_.graph_add_kernel_node(&node_, graph_.get(), nullptr, 0, &first);
    driver_.graph_instantiate(&exec_, graph_.get(), 0);  // 0: of its stream's priority
}

void KernelGraph::launch(const CUkernelNodeParams& kernel, CUstream stream) const {
    driver_.graph_exec_kernel_node_set_params(exec_, node_, &kernel);
    driver_.graph_launch(exec_, stream);
}

}  // namespace kvpool::cuda
