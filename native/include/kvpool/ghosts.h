// A memory of keys that were evicted lately, a table of key hashes with the time (in evictions)
// of each. It forgets by overwriting, which costs a policy a hint and never correctness.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvpool {

class Ghosts {
  public:
    // Remembers the last `capacity` keys, more or less.
    void set_capacity(uint64_t capacity) {
        capacity_ = std::max<uint64_t>(capacity, 1);
        uint64_t buckets = 16;
        while (buckets < capacity_) buckets *= 2;
        if (buckets * kWays != table_.size()) table_.assign(buckets * kWays, Entry{});
    }
    void add(uint64_t key_hash) {
        Entry* bucket = bucket_of(key_hash);
        Entry* place = std::min_element(bucket, bucket + kWays,
                                        [](const Entry& a, const Entry& b) { return a.time < b.time; });
        *place = {key_hash, ++now_};
        size_ = std::min(size_ + 1, capacity_);
    }
    // True when the key was there; it is not any more.
    bool take(uint64_t key_hash) {
        Entry* bucket = bucket_of(key_hash);
        for (Entry* entry = bucket; entry != bucket + kWays; ++entry) {
            if (entry->key_hash != key_hash || entry->time == 0) continue;
            bool recent = now_ - entry->time < capacity_;
            *entry = Entry{};
            if (size_ > 0) --size_;
            return recent;
        }
        return false;
    }
    uint64_t size() const { return size_; }

  private:
    static constexpr size_t kWays = 4;
    struct Entry {
        uint64_t key_hash = 0;
        uint64_t time = 0;
    };
    Entry* bucket_of(uint64_t key_hash) { return &table_[(key_hash >> 32) % (table_.size() / kWays) * kWays]; }

    std::vector<Entry> table_ = std::vector<Entry>(16 * kWays);
    uint64_t capacity_ = 1;
    uint64_t now_ = 0;
    uint64_t size_ = 0;
};

}  // namespace kvpool
