// Things of the driver that end with their owner. Endings are quiet: the driver may be gone by then.
#pragma once

#include "cuda_driver.h"

namespace kvpool::cuda {

// The context that everything in this process shares, torch's too.
class Context {
  public:
    // std::system_error (ENODEV) when there is no such device.
    Context(const Driver& driver, int device);
    ~Context() { driver_.primary_ctx_release.quietly(device_); }
    Context(const Context&) = delete;

    CUcontext get() const { return context_; }
    const std::string& device_name() const { return device_name_; }
    // For threads of our own. A graph capture elsewhere must not forbid them anything, nor be spoilt by them.
    void enter_thread() const {
        int mode = kCaptureModeRelaxed;
        driver_.ctx_set_current(context_);
        driver_.thread_exchange_capture_mode(&mode);
    }

  private:
    const Driver& driver_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    std::string device_name_;
};

// The context is current while this lives: for threads that are not ours.
class Visit {
  public:
    Visit(const Driver& driver, const Context& context) : driver_(driver) { driver_.ctx_push_current(context.get()); }
    ~Visit() {
        CUcontext popped;
        driver_.ctx_pop_current.quietly(&popped);
    }
    Visit(const Visit&) = delete;

  private:
    const Driver& driver_;
};

// Does not wait for the legacy default stream, which torch uses.
class Stream {
  public:
    Stream(const Driver& driver, int priority) : driver_(driver) {
        driver_.stream_create(&stream_, kStreamNonBlocking, priority);
    }
    ~Stream() { driver_.stream_destroy.quietly(stream_); }
    Stream(const Stream&) = delete;
    CUstream get() const { return stream_; }

  private:
    const Driver& driver_;
    CUstream stream_ = nullptr;
};

class Graph {
  public:
    explicit Graph(const Driver& driver) : driver_(driver) { driver_.graph_create(&graph_, 0); }
    ~Graph() { driver_.graph_destroy.quietly(graph_); }
    Graph(const Graph&) = delete;
    CUgraph get() const { return graph_; }

  private:
    const Driver& driver_;
    CUgraph graph_ = nullptr;
};

class DeviceMemory {
  public:
    DeviceMemory(const Driver& driver, size_t bytes) : driver_(driver) { driver_.mem_alloc(&memory_, bytes); }
    ~DeviceMemory() { driver_.mem_free.quietly(memory_); }
    DeviceMemory(const DeviceMemory&) = delete;
    CUdeviceptr get() const { return memory_; }

  private:
    const Driver& driver_;
    CUdeviceptr memory_ = 0;
};

// A thread that waits for it sleeps.
class Event {
  public:
    explicit Event(const Driver& driver) : driver_(driver) {
        driver_.event_create(&event_, kEventBlockingSync | kEventDisableTiming);
    }
    ~Event() { driver_.event_destroy.quietly(event_); }
    Event(const Event&) = delete;
    CUevent get() const { return event_; }

  private:
    const Driver& driver_;
    CUevent event_ = nullptr;
};

}  // namespace kvpool::cuda
