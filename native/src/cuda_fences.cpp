#include "cuda_fences.h"

#include <utility>

namespace kvpool::cuda {

Fence FencePool::record(uint64_t stream) {
    std::lock_guard lock(mutex_);
    if (closed_) return nullptr;
    Visit visit(driver_, context_);
    std::unique_ptr<Event> event = take();
    driver_.event_record(event->get(), reinterpret_cast<CUstream>(stream));
    return Fence(event.release(), [this](Event* used) { give_back(used); });
}

std::unique_ptr<Event> FencePool::take() {
    if (idle_.empty()) return std::make_unique<Event>(driver_);
    std::unique_ptr<Event> event = std::move(idle_.back());
    idle_.pop_back();
    return event;
}

void FencePool::give_back(Event* event) {
    std::unique_ptr<Event> owned(event);
    std::lock_guard lock(mutex_);
    if (!closed_) idle_.push_back(std::move(owned));
}

void FencePool::close() {
    std::lock_guard lock(mutex_);
    closed_ = true;
    idle_.clear();
}

}  // namespace kvpool::cuda
