// Block key -> slot, in shared memory: open addressing with linear probing and backward-shift deletion (no tombstones,
// Knuth 6.4 R). One writer, the daemon. Readers take no lock: an entry is a hint that they check against the slot
// header, so a torn or moving entry is a miss and never a false hit.
#pragma once

#include <optional>

#include "kvpool/mapping.h"

namespace kvpool {

// What a reader may do.
class IndexReader {
  public:
    explicit IndexReader(const PoolFile& file)
        : table_(file.index()),
          mask_(file.geometry().index_capacity - 1),
          slots_(file.slots()),
          num_slots_(file.geometry().num_slots()) {}

    // The READY block of that key, unless its time is over.
    std::optional<SlotRef> find_ready(const BlockKey& key, uint32_t now_s) const;
    // Longest run of leading READY blocks of `count` keys; refs[i] is written for each. Prefetches in groups, so
    // that the cache misses of different keys overlap (2,048 keys in a million: about 60 us instead of 400).
    size_t match_prefix(const uint8_t* keys, size_t count, uint32_t now_s, uint64_t* refs) const;

  protected:
    uint64_t home(uint32_t tag) const { return tag & mask_; }
    bool confirm(uint32_t slot, const BlockKey& key, uint32_t now_s, SlotRef& ref) const;

    IndexEntry* table_;
    uint64_t mask_;
    SlotHeader* slots_;
    uint64_t num_slots_;
};

// What the daemon may do besides.
class Index : public IndexReader {
  public:
    using IndexReader::IndexReader;

    void clear();
    void insert(const BlockKey& key, uint32_t slot);
    bool erase(const BlockKey& key, uint32_t slot);
    // The slot of that key in whatever state, kNoSlot for none. For the single writer only.
    uint32_t find(const BlockKey& key) const;
    // Says that the entry of that tag will be asked for soon.
    void expect(uint32_t tag) const { __builtin_prefetch(&table_[home(tag)]); }
    // Some slot whose key has that tag: enough to guess a parent after a restart.
    uint32_t find_tag(uint32_t tag) const;
    size_t size() const { return size_; }

  private:
    size_t size_ = 0;
};

}  // namespace kvpool
