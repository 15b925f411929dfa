// Registers the pool's slabs with CUDA, so that a device reads and writes them without a detour.
//
// In chunks: a driver refuses ranges of hundreds of GiB, and may hold up other calls while it works on one (70 to 130
// ms a GiB). A chunk is registered when the daemon has made all of its pages; before that the pages would be ours to
// make and to pay for. Chunks are whole slabs, so no slot lies in two.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cuda_driver.h"
#include "kvpool/mapping.h"

namespace kvpool::cuda {

class PoolRegistration {
  public:
    PoolRegistration(const Driver& driver, std::shared_ptr<PoolFile> file);
    ~PoolRegistration() { close(); }
    PoolRegistration(const PoolRegistration&) = delete;

    // One thread calls these, with the context current; the others are for all.
    bool register_next();  // false: nothing is due now. CudaError: that chunk stays as it is for good
    bool is_complete() const;
    void close();  // all is unregistered

    bool covers(const uint8_t* bytes, uint64_t count) const;  // all of it is registered
    uint64_t registered_bytes() const { return registered_bytes_.load(std::memory_order_acquire); }
    bool is_refused() const { return refused_.load(std::memory_order_relaxed); }  // for a part of it

  private:
    struct Chunk {
        std::atomic<bool> registered{false};
        bool tried = false;
    };
    uint64_t first_slab(size_t chunk) const { return chunk * slabs_per_chunk_; }
    uint64_t end_slab(size_t chunk) const;
    uint8_t* begin(size_t chunk) const;
    uint64_t bytes_of(size_t chunk) const;
    bool exists(size_t chunk) const;

    const Driver& driver_;
    std::shared_ptr<PoolFile> file_;
    uint64_t slabs_per_chunk_;
    std::vector<Chunk> chunks_;
    std::atomic<uint64_t> registered_bytes_{0};
    std::atomic<bool> refused_{false};
};

}  // namespace kvpool::cuda
