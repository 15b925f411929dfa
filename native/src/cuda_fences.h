// Events that say where a compute stream was when a job was submitted. They are used again and again: making one takes
// longer than recording it.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda_handles.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

class FencePool {
  public:
    FencePool(const Driver& driver, const Context& context) : driver_(driver), context_(context) {}
    FencePool(const FencePool&) = delete;

    // The pool outlives what it returns. CudaError: `stream` cannot be recorded.
    Fence record(uint64_t stream);
    static CUevent event(const Fence& fence) { return static_cast<Event*>(fence.get())->get(); }
    void close();  // null from now on

  private:
    std::unique_ptr<Event> take();
    void give_back(Event* event);

    const Driver& driver_;
    const Context& context_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Event>> idle_;
    bool closed_ = false;
};

}  // namespace kvpool::cuda
