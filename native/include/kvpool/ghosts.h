// A memory of keys that were evicted lately, a table of key hashes with the time (in evictions)
// of each. It forgets by overwriting, which costs a policy a hint and never correctness.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvpool {

class Ghosts {
  public:
    // Remembers the last `capacity` keys, more or less. A larger table than before starts empty.
    void set_capacity(uint64_t capacity) {
        capacity_ = std::max<uint64_t>(capacity, 1);
        uint64_t buckets = 16;
        while (buckets * kWays < 4 * capacity_) buckets *= 2;
        if (buckets == buckets_) return;
        buckets_ = buckets;
        table_.clear();
        size_ = 0;
    }
    void add(uint64_t key_hash) {
        if (table_.empty()) table_.resize(buckets_ * kWays);  // not before there is something to remember
        Entry* bucket = bucket_of(key_hash);
        Entry* place =
            std::min_element(bucket, bucket + kWays, [](const Entry& a, const Entry& b) { return a.time < b.time; });
        if (++now_ == 0) now_ = 1;
        *place = {static_cast<uint32_t>(key_hash), now_};
        size_ = std::min(size_ + 1, capacity_);
    }
    // True when the key was there; it is not any more.
    bool take(uint64_t key_hash) {
        if (size_ == 0) return false;
        Entry* bucket = bucket_of(key_hash);
        for (Entry* entry = bucket; entry != bucket + kWays; ++entry) {
            if (entry->fingerprint != static_cast<uint32_t>(key_hash) || entry->time == 0) continue;
            bool recent = now_ - entry->time < capacity_;
            *entry = Entry{};
            --size_;
            return recent;
        }
        return false;
    }
    uint64_t size() const { return size_; }

  private:
    static constexpr size_t kWays = 4;
    struct Entry {
        uint32_t fingerprint = 0;
        uint32_t time = 0;  // 0 = empty
    };
    Entry* bucket_of(uint64_t key_hash) { return &table_[(key_hash >> 32) % buckets_ * kWays]; }

    std::vector<Entry> table_;
    uint64_t buckets_ = 16;
    uint64_t capacity_ = 1;
    uint32_t now_ = 0;
    uint64_t size_ = 0;
};

}  // namespace kvpool
