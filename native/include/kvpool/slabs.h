// Which slab belongs to which namespace, and which of its slots are free.
//
// Invariant, per slab: used + free list + never used == num_slots. Slot numbers are fixed: slab i owns the numbers
// from i * slots_per_slab on, however many of them its slot size leaves usable.
#pragma once

#include <optional>
#include <vector>

#include "kvpool/lazy_array.h"
#include "kvpool/mapping.h"

namespace kvpool {

class SlabAllocator {
  public:
    // PoolFormatError when the slab table of the file cannot be true.
    explicit SlabAllocator(const PoolFile& file);

    // A free slot of the namespace; kNoSlot when all its slabs are full.
    uint32_t take(uint32_t name_space);
    void give(uint32_t slot);
    // Marks a slot of a recovered slab as used. To be called before any `take`.
    void adopt(uint32_t slot);

    // A populated slab that belongs to nobody goes to the namespace; false when there is none.
    bool assign_any(uint32_t name_space, uint32_t slot_bytes);
    // A slab without used slots becomes nobody's.
    void unassign(uint32_t slab);

    const std::vector<uint32_t>& slabs_of(uint32_t name_space) const { return namespaces_[name_space].slabs; }
    uint32_t used(uint32_t slab) const { return slabs_[slab].used; }
    uint64_t used_slots(uint32_t name_space) const;
    uint64_t num_slots(uint32_t name_space) const { return namespaces_[name_space].num_slots; }
    uint32_t unassigned_populated() const;
    // Calls fn(slot) for every slot that the slab could hold.
    template <class Fn>
    void for_each_slot(uint32_t slab, Fn fn) const {
        uint32_t first = static_cast<uint32_t>(slab * file_.geometry().slots_per_slab);
        uint32_t count = file_.slabs()[slab].num_slots.load(std::memory_order_relaxed);
        for (uint32_t i = 0; i < count; ++i) fn(first + i);
    }
    void check_integrity() const;

  private:
    struct Slab {
        uint32_t used = 0;
        uint32_t fresh = 0;      // places from here on were never used since the slab was assigned
        uint32_t free_head = 0;  // slot + 1
        uint32_t free_count = 0;
        bool listed = false;  // in its namespace's `with_room`
    };
    struct Namespace {
        std::vector<uint32_t> slabs;
        std::vector<uint32_t> with_room;
        uint64_t num_slots = 0;
    };
    bool plausible(uint32_t slab) const;
    uint32_t num_slots_of(uint32_t slot_bytes) const;  // in one slab
    void list(uint32_t slab);
    void join(uint32_t slab, uint32_t name_space);

    const PoolFile& file_;
    std::vector<Slab> slabs_;
    std::vector<Namespace> namespaces_;
    LazyArray<uint32_t> next_free_;  // slot + 1
    uint32_t next_unassigned_ = 0;   // hint: slabs below are assigned or not populated
};

}  // namespace kvpool
