// ARC: N. Megiddo, D. Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. T1 holds blocks seen
// once, T2 those seen again; the ghosts of both move the target size of T1. Two liberties: the ghosts are approximate
// (ghosts.h), and the victim is chosen before the incoming block is known, so "x in B2" does not tip REPLACE.
#include <algorithm>

#include "eviction_policies.h"
#include "kvpool/ghosts.h"
#include "kvpool/slot_list.h"

namespace kvpool {
namespace {

class Arc final : public EvictionPolicy {
  public:
    explicit Arc(size_t num_slots) : nodes_(num_slots) {}

    void set_capacity(uint64_t capacity) override {
        capacity_ = capacity;
        target_ = std::min(target_, capacity);
        ghosts_once_.set_capacity(capacity);
        ghosts_often_.set_capacity(capacity);
    }
    bool insert(uint32_t slot, uint64_t key_hash) override {
        once_.retry();
        often_.retry();
        nodes_[slot].key_hash = key_hash;
        uint64_t b1 = std::max<uint64_t>(ghosts_once_.size(), 1), b2 = std::max<uint64_t>(ghosts_often_.size(), 1);
        if (ghosts_once_.take(key_hash)) {
            target_ = std::min(capacity_, target_ + std::max<uint64_t>(b2 / b1, 1));
            often_.push_newest(slot);
        } else if (ghosts_often_.take(key_hash)) {
            target_ -= std::min(target_, std::max<uint64_t>(b1 / b2, 1));
            often_.push_newest(slot);
        } else {
            once_.push_newest(slot);
            return false;
        }
        return true;
    }
    void hit(uint32_t slot) override {
        list_of(slot).remove(slot);
        often_.push_newest(slot);
    }
    uint32_t coldest() override {
        bool from_once = once_.size() > target_;
        if (once_.stuck()) from_once = false;
        if (often_.stuck()) from_once = once_.size() > 0;
        return from_once ? once_.oldest() : often_.oldest();
    }
    void spare(uint32_t slot) override { list_of(slot).spare(slot); }
    void evicted(uint32_t slot) override {
        (once_.has(slot) ? ghosts_once_ : ghosts_often_).add(nodes_[slot].key_hash);
        list_of(slot).remove(slot);
    }
    void erase(uint32_t slot) override { list_of(slot).remove(slot); }
    bool contains(uint32_t slot) const override { return nodes_[slot].list != 0; }
    uint64_t size() const override { return once_.size() + often_.size(); }
    void check_integrity() const override {
        once_.check_integrity();
        often_.check_integrity();
        ensure(target_ <= capacity_, "ARC: target above capacity");
    }

  private:
    SlotList& list_of(uint32_t slot) { return once_.has(slot) ? once_ : often_; }

    LazyArray<SlotNode> nodes_;
    SlotList once_{nodes_, 1}, often_{nodes_, 2};
    Ghosts ghosts_once_, ghosts_often_;
    uint64_t capacity_ = 0;
    uint64_t target_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_arc(size_t num_slots) {
    return std::make_unique<Arc>(num_slots);
}

}  // namespace kvpool
