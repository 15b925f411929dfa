// Least recently used: the yardstick.
#include "eviction_policies.h"
#include "kvpool/slot_list.h"

namespace kvpool {
namespace {

class Lru final : public EvictionPolicy {
  public:
    explicit Lru(size_t num_slots) : nodes_(num_slots) {}

    void set_capacity(uint64_t) override {}
    bool insert(uint32_t slot, uint64_t) override {
        list_.push_newest(slot);
        return false;
    }
    void hit(uint32_t slot) override { list_.refresh(slot); }
    uint32_t coldest() override { return list_.oldest(); }
    void spare(uint32_t slot) override { list_.refresh(slot); }
    void evicted(uint32_t slot) override { list_.remove(slot); }
    void erase(uint32_t slot) override { list_.remove(slot); }
    bool contains(uint32_t slot) const override { return list_.has(slot); }
    uint64_t size() const override { return list_.size(); }
    void check_integrity() const override { list_.check_integrity(); }

  private:
    LazyArray<SlotNode> nodes_;
    SlotList list_{nodes_, 1};
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(size_t num_slots) {
    return std::make_unique<Lru>(num_slots);
}

}  // namespace kvpool
