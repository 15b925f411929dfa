// Where free slots come from, in this order: a free slot of the namespace, a slab of nobody, a slab that another
// namespace must give up, the coldest blocks of the namespace itself.
#include <algorithm>

#include "kvpool/leases.h"
#include "kvpool/owner.h"

namespace kvpool {
namespace {

constexpr uint32_t kIdleAfterS = 600;    // a namespace without engines for so long keeps nothing that others want
constexpr size_t kSlabsToTry = 8;        // bounds the search for a slab without leased or pinned blocks
constexpr size_t kMaxFutileTries = 512;  // victims that could not go, per call: then it is "no room"
constexpr size_t kEvictAhead = 64;       // blocks evicted at a time when a batch asks for more

}  // namespace

uint32_t PoolOwner::take_slot(uint32_t name_space, size_t wanted, uint32_t now_s, bool& exhausted) {
    uint32_t slot = slabs_.take(name_space);
    if (slot != kNoSlot) return slot;
    if (make_room(name_space, wanted, now_s)) slot = slabs_.take(name_space);
    exhausted = slot == kNoSlot;
    return slot;
}

bool PoolOwner::make_room(uint32_t name_space, size_t wanted, uint32_t now_s) {
    bury_doomed();
    if (slabs_.used_slots(name_space) < slabs_.num_slots(name_space)) return true;
    uint32_t slot_bytes = file_.namespaces()[name_space].slot_bytes.load();
    if (slabs_.assign_any(name_space, slot_bytes) || take_slab_from_others(name_space, now_s)) {
        refresh_capacity(name_space);
        return true;
    }
    return evict(name_space, std::min(wanted, kEvictAhead)) > 0;
}

size_t PoolOwner::evict(uint32_t name_space, size_t count) {
    EvictionPolicy& policy = *policies_[name_space];
    size_t gone = 0, futile = 0;
    while (gone < count && futile < kMaxFutileTries) {
        uint32_t coldest = policy.coldest();
        if (coldest == kNoSlot) break;
        // Leaves first: walk down once, then come up along the chain.
        uint32_t leaf = chains_.leaf_below(coldest);
        for (;;) {
            uint32_t parent = chains_.parent(leaf);
            bool free_to_go = state(leaf) == SlotState::kReady && !pinned(leaf) && !guarded(leaf);
            if (!free_to_go || !remove_ready(leaf, true)) {
                policy.spare(coldest);
                ++futile;
                break;
            }
            ++gone;
            if (leaf == coldest || gone == count) break;
            leaf = chains_.leaf_below(parent);
        }
    }
    counters_.evicted += gone;
    return gone;
}

bool PoolOwner::may_lose_slab(uint32_t donor, uint64_t fair_share, uint32_t now_s) const {
    uint64_t slabs = slabs_.slabs_of(donor).size();
    if (slabs == 0) return false;
    if (slabs > fair_share) return true;
    for (uint32_t client : clients_.all()) {
        if (clients_.name_space(client) == donor) return false;
    }
    return now_s - idle_since_s_[donor] >= kIdleAfterS;
}

bool PoolOwner::take_slab_from_others(uint32_t name_space, uint32_t now_s) {
    uint64_t sharers = 0;
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) sharers += ns == name_space || !slabs_.slabs_of(ns).empty();
    uint64_t fair_share = std::max<uint64_t>(file_.geometry().num_slabs / sharers, 1);
    bool poor = slabs_.slabs_of(name_space).size() < fair_share;
    for (uint32_t donor = 0; donor < kMaxNamespaces; ++donor) {
        if (donor == name_space || !may_lose_slab(donor, poor ? fair_share : UINT64_MAX, now_s)) continue;
        std::vector<uint32_t> slabs = slabs_.slabs_of(donor);
        std::sort(slabs.begin(), slabs.end(), [&](uint32_t a, uint32_t b) { return slabs_.used(a) < slabs_.used(b); });
        slabs.resize(std::min(slabs.size(), kSlabsToTry));
        for (uint32_t slab : slabs) {
            if (!empty_slab(slab)) continue;
            slabs_.unassign(slab);
            refresh_capacity(donor);
            ++counters_.slabs_moved;
            return slabs_.assign_any(name_space, file_.namespaces()[name_space].slot_bytes.load());
        }
    }
    return false;
}

bool PoolOwner::empty_slab(uint32_t slab) {
    // Look first, then act: half an emptied slab would help nobody.
    bool movable = true;
    slabs_.for_each_slot(slab, [&](uint32_t slot) {
        SlotState now = state(slot);
        if (now == SlotState::kReady) movable = movable && !doomed(slot) && !pinned(slot) && !is_leased(file_, slot);
        if (now == SlotState::kWriting) movable = false;
    });
    if (!movable) return false;
    slabs_.for_each_slot(slab, [&](uint32_t slot) {
        if (state(slot) == SlotState::kReady) counters_.evicted += remove_ready(slot, true);
    });
    return slabs_.used(slab) == 0;  // a lease taken just now keeps the slab
}

void PoolOwner::refresh_capacity(uint32_t name_space) {
    policies_[name_space]->set_capacity(slabs_.num_slots(name_space));
}

}  // namespace kvpool
