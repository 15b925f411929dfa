// Which block goes next. Pure: no clock, no I/O, no knowledge of leases or chains; its caller asks for the coldest
// block, may find that it cannot go now (`spare`), and says what became of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kvpool/types.h"

namespace kvpool {

class EvictionPolicy {
  public:
    virtual ~EvictionPolicy() = default;

    // `capacity` counts blocks; policies that split their room (ARC, S3-FIFO) need it.
    virtual void set_capacity(uint64_t capacity) = 0;
    // True: a policy with a memory of the gone remembers it.
    virtual bool insert(uint32_t slot, uint64_t key_hash) = 0;
    virtual void hit(uint32_t slot) = 0;
    // The next victim, kNoSlot when empty. It stays in until `evicted` or `erase`.
    virtual uint32_t coldest() = 0;
    // The coldest block cannot go now: it counts as recent, but not as used.
    virtual void spare(uint32_t slot) = 0;
    // Gone for want of room: policies with a memory of the gone keep its key hash.
    virtual void evicted(uint32_t slot) = 0;
    // Gone for another reason (dropped, expired, cleared, pinned).
    virtual void erase(uint32_t slot) = 0;

    virtual bool contains(uint32_t slot) const = 0;
    virtual uint64_t size() const = 0;
    virtual void check_integrity() const = 0;
};

inline constexpr const char* kDefaultPolicy = "arc";  // the table in docs/eviction.md says why

// "lru", "arc" (Megiddo and Modha, FAST 2003) or "s3fifo" (Yang et al., SOSP 2023). std::invalid_argument otherwise.
std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, size_t num_slots);

}  // namespace kvpool
