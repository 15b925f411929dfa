// S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. New blocks wait in a small queue
// (a tenth of the room); only those used again there, or remembered as a ghost, get into the main queue.
#include <algorithm>

#include "eviction_policies.h"
#include "kvpool/ghosts.h"
#include "kvpool/slot_list.h"

namespace kvpool {
namespace {

constexpr uint8_t kMaxFrequency = 3;
constexpr uint64_t kSmallShare = 10;  // a tenth

class S3Fifo final : public EvictionPolicy {
  public:
    explicit S3Fifo(size_t num_slots) : nodes_(num_slots) {}

    void set_capacity(uint64_t capacity) override {
        small_target_ = std::max<uint64_t>(capacity / kSmallShare, 1);
        ghosts_.set_capacity(capacity - capacity / kSmallShare);
    }
    bool insert(uint32_t slot, uint64_t key_hash) override {
        small_.retry();
        main_.retry();
        nodes_[slot].key_hash = key_hash;
        nodes_[slot].freq = 0;
        bool remembered = ghosts_.take(key_hash);
        (remembered ? main_ : small_).push_newest(slot);
        return remembered;
    }
    void hit(uint32_t slot) override { nodes_[slot].freq = std::min<uint8_t>(nodes_[slot].freq + 1, kMaxFrequency); }
    uint32_t coldest() override {
        while (size() > 0) {
            bool from_small = small_.size() >= small_target_;
            if (small_.stuck()) from_small = false;
            if (main_.stuck()) from_small = small_.size() > 0;
            uint32_t slot = from_small ? small_.oldest() : main_.oldest();
            SlotNode& node = nodes_[slot];
            if (node.freq == 0) return slot;
            if (from_small) {
                small_.remove(slot);
                main_.push_newest(slot);
                node.freq = 0;
            } else {
                --node.freq;
                main_.refresh(slot);
            }
        }
        return kNoSlot;
    }
    void spare(uint32_t slot) override { list_of(slot).spare(slot); }
    void evicted(uint32_t slot) override {
        if (small_.has(slot)) ghosts_.add(nodes_[slot].key_hash);
        list_of(slot).remove(slot);
    }
    void erase(uint32_t slot) override { list_of(slot).remove(slot); }
    bool contains(uint32_t slot) const override { return nodes_[slot].list != 0; }
    uint64_t size() const override { return small_.size() + main_.size(); }
    void check_integrity() const override {
        small_.check_integrity();
        main_.check_integrity();
    }

  private:
    SlotList& list_of(uint32_t slot) { return small_.has(slot) ? small_ : main_; }

    LazyArray<SlotNode> nodes_;
    SlotList small_{nodes_, 1}, main_{nodes_, 2};
    Ghosts ghosts_;
    uint64_t small_target_ = 1;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_s3fifo(size_t num_slots) {
    return std::make_unique<S3Fifo>(num_slots);
}

}  // namespace kvpool
