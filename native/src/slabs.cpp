#include "kvpool/slabs.h"

#include <algorithm>

namespace kvpool {

SlabAllocator::SlabAllocator(const PoolFile& file)
    : file_(file),
      slabs_(file.geometry().num_slabs),
      namespaces_(kMaxNamespaces),
      next_free_(file.geometry().num_slots()) {
    for (uint32_t slab = 0; slab < slabs_.size(); ++slab) {
        uint32_t owner = file_.slabs()[slab].owner.load(std::memory_order_relaxed);
        if (owner == 0) continue;
        if (!plausible(slab)) {
            throw PoolFormatError("damaged slab table, slab " + std::to_string(slab));
        }
        join(slab, owner - 1);
    }
}

bool SlabAllocator::plausible(uint32_t slab) const {
    const SlabEntry& entry = file_.slabs()[slab];
    uint32_t owner = entry.owner.load(), slot_bytes = entry.slot_bytes.load();
    return owner <= kMaxNamespaces && file_.namespaces()[owner - 1].active.load() != 0 && slot_bytes > 0 &&
           entry.num_slots.load() == num_slots_of(slot_bytes);
}

uint32_t SlabAllocator::num_slots_of(uint32_t slot_bytes) const {
    const Geometry& g = file_.geometry();
    return static_cast<uint32_t>(std::min(g.slab_bytes / slot_bytes, g.slots_per_slab));
}

void SlabAllocator::join(uint32_t slab, uint32_t name_space) {
    Namespace& ns = namespaces_[name_space];
    ns.slabs.push_back(slab);
    ns.num_slots += file_.slabs()[slab].num_slots.load(std::memory_order_relaxed);
    slabs_[slab] = Slab{};
    list(slab);
}

void SlabAllocator::list(uint32_t slab) {
    if (slabs_[slab].listed) return;
    uint32_t owner = file_.slabs()[slab].owner.load(std::memory_order_relaxed);
    namespaces_[owner - 1].with_room.push_back(slab);
    slabs_[slab].listed = true;
}

uint32_t SlabAllocator::take(uint32_t name_space) {
    auto& with_room = namespaces_[name_space].with_room;
    while (!with_room.empty()) {
        uint32_t number = with_room.back();
        Slab& slab = slabs_[number];
        auto first = static_cast<uint32_t>(number * file_.geometry().slots_per_slab);
        if (slab.free_head != 0) {
            uint32_t slot = slab.free_head - 1;
            slab.free_head = next_free_[slot];
            --slab.free_count;
            ++slab.used;
            return slot;
        }
        if (slab.fresh < file_.slabs()[number].num_slots.load(std::memory_order_relaxed)) {
            ++slab.used;
            return first + slab.fresh++;
        }
        slab.listed = false;
        with_room.pop_back();
    }
    return kNoSlot;
}

void SlabAllocator::give(uint32_t slot) {
    uint32_t number = file_.slab_of(slot);
    Slab& slab = slabs_[number];
    next_free_[slot] = slab.free_head;
    slab.free_head = slot + 1;
    ++slab.free_count;
    --slab.used;
    list(number);
}

void SlabAllocator::adopt(uint32_t slot) {
    // Slots come in ascending order: those between the last adopted one and this are free.
    uint32_t number = file_.slab_of(slot);
    Slab& slab = slabs_[number];
    auto first = static_cast<uint32_t>(number * file_.geometry().slots_per_slab);
    for (; first + slab.fresh < slot; ++slab.fresh) {
        next_free_[first + slab.fresh] = slab.free_head;
        slab.free_head = first + slab.fresh + 1;
        ++slab.free_count;
    }
    ++slab.fresh;
    ++slab.used;
}

bool SlabAllocator::assign_any(uint32_t name_space, uint32_t slot_bytes) {
    SlabEntry* table = file_.slabs();
    for (uint32_t slab = next_unassigned_; slab < slabs_.size(); ++slab) {
        if (table[slab].owner.load(std::memory_order_relaxed) != 0) {
            if (slab == next_unassigned_) ++next_unassigned_;
            continue;
        }
        if (table[slab].populated.load(std::memory_order_acquire) == 0) continue;
        table[slab].slot_bytes.store(slot_bytes, std::memory_order_relaxed);
        table[slab].num_slots.store(num_slots_of(slot_bytes), std::memory_order_relaxed);
        table[slab].owner.store(name_space + 1, std::memory_order_release);
        join(slab, name_space);
        return true;
    }
    return false;
}

void SlabAllocator::unassign(uint32_t slab) {
    ensure(slabs_[slab].used == 0, "unassigned a slab in use");
    Namespace& ns = namespaces_[file_.slabs()[slab].owner.load(std::memory_order_relaxed) - 1];
    ns.slabs.erase(std::find(ns.slabs.begin(), ns.slabs.end(), slab));
    ns.with_room.erase(std::remove(ns.with_room.begin(), ns.with_room.end(), slab), ns.with_room.end());
    ns.num_slots -= file_.slabs()[slab].num_slots.load(std::memory_order_relaxed);
    slabs_[slab] = Slab{};
    file_.slabs()[slab].owner.store(0, std::memory_order_release);
    next_unassigned_ = std::min(next_unassigned_, slab);
}

uint64_t SlabAllocator::used_slots(uint32_t name_space) const {
    uint64_t used = 0;
    for (uint32_t slab : namespaces_[name_space].slabs) used += slabs_[slab].used;
    return used;
}

uint32_t SlabAllocator::unassigned_populated() const {
    uint32_t count = 0;
    for (uint32_t slab = 0; slab < slabs_.size(); ++slab) {
        const SlabEntry& entry = file_.slabs()[slab];
        count += entry.owner.load(std::memory_order_relaxed) == 0 && entry.populated.load() != 0;
    }
    return count;
}

void SlabAllocator::check_integrity() const {
    for (uint32_t number = 0; number < slabs_.size(); ++number) {
        const Slab& slab = slabs_[number];
        uint32_t num_slots = file_.slabs()[number].num_slots.load(std::memory_order_relaxed);
        uint32_t owner = file_.slabs()[number].owner.load(std::memory_order_relaxed);
        if (owner == 0) {
            ensure(slab.used == 0, "slots used in a slab of nobody");
            continue;
        }
        ensure(slab.used + slab.free_count == slab.fresh && slab.fresh <= num_slots, "slab: used + free == touched");
        uint32_t listed = 0;
        for (uint32_t at = slab.free_head; at != 0; at = next_free_[at - 1]) {
            ensure(file_.slab_of(at - 1) == number && ++listed <= slab.free_count, "slab: free list");
        }
        ensure(listed == slab.free_count, "slab: length of the free list");
        ensure(slab.listed || (slab.free_count == 0 && slab.fresh == num_slots), "slab with room is not listed");
    }
}

}  // namespace kvpool
