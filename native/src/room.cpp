// Where free slots come from, in this order: a free slot of the namespace, a slab of nobody, a slab that another
// namespace must give up, the namespace's own copies of what other hosts have, its coldest blocks.
#include <algorithm>

#include "kvpool/leases.h"
#include "kvpool/owner.h"

namespace kvpool {
namespace {

constexpr uint32_t kIdleAfterS = 600;  // a namespace without engines for so long keeps nothing that others want
constexpr size_t kSlabsToTry = 8;      // bounds the search for a slab without leased or pinned blocks
constexpr size_t kPatience = 16384;    // blocks that cannot go, looked at in one call: then it is "no room"
constexpr size_t kCopiesToTry = 256;   // of them, looked at in one call: others can go
constexpr size_t kEvictAhead = 64;     // blocks evicted at a time when a batch asks for more
constexpr size_t kSmallPart = 1024;    // or that part of the namespace, if less: walks down long chains pay off then
constexpr size_t kBuryAtATime = 256;   // doomed blocks looked at before others have to go
constexpr uint32_t kSearchAgainS = 1;  // a search for a slab looks at up to 8 GiB of slots; seldom, if in vain

}  // namespace

uint32_t PoolOwner::take_slot(uint32_t name_space, size_t wanted, uint32_t now_s, bool& exhausted) {
    uint32_t slot = slabs_.take(name_space);
    if (slot != kNoSlot) return slot;
    if (make_room(name_space, wanted, now_s)) slot = slabs_.take(name_space);
    exhausted = slot == kNoSlot;
    return slot;
}

bool PoolOwner::make_room(uint32_t name_space, size_t wanted, uint32_t now_s) {
    bury_doomed(kBuryAtATime);
    if (slabs_.used_slots(name_space) < slabs_.num_slots(name_space)) return true;
    uint32_t slot_bytes = file_.namespaces()[name_space].slot_bytes.load();
    if (slabs_.assign_any(name_space, slot_bytes) || take_slab_from_others(name_space, now_s)) {
        refresh_capacity(name_space);
        return true;
    }
    size_t batch = std::max<size_t>(wanted, slabs_.num_slots(name_space) / kSmallPart);
    return evict_coldest(name_space, std::min(batch, kEvictAhead)) > 0;
}

size_t PoolOwner::evict(uint32_t name_space, size_t count) {
    expect_known(name_space);
    ++guard_stamp_;  // nothing is in the middle of being stored
    return evict_coldest(name_space, count);
}

size_t PoolOwner::evict_coldest(uint32_t name_space, size_t count) {
    size_t gone = evict_copies(name_space, count), patience = kPatience;
    while (gone < count && patience > 0) {
        uint32_t coldest = policies_[name_space]->coldest();
        if (coldest == kNoSlot) break;
        gone += evict_below(coldest, count - gone, patience);
    }
    counters_.evicted += gone;
    return gone;
}

size_t PoolOwner::evict_copies(uint32_t name_space, size_t count) {
    size_t gone = 0, patience = std::min<size_t>(copies_.offered(name_space), kCopiesToTry);
    while (gone < count && patience > 0) {
        uint32_t copy = copies_.coldest(name_space);
        if (copy == kNoSlot) break;
        if (!guarded(copy) && remove_ready(copy, true)) {
            ++gone;
        } else {
            copies_.spare(copy);
            --patience;
        }
    }
    counters_.evicted_copies += gone;
    return gone;
}

size_t PoolOwner::evict_below(uint32_t coldest, size_t count, size_t& patience) {
    // Leaves first: walk down once, then come up along the chain.
    size_t gone = 0;
    for (uint32_t leaf = chains_.leaf_below(coldest); gone < count;) {
        uint32_t parent = chains_.parent(leaf);
        bool free_to_go = state(leaf) == SlotState::kReady && !pinned(leaf) && !guarded(leaf);
        if (!free_to_go || !remove_ready(leaf, true)) {
            spare_path(leaf, coldest, patience);
            break;
        }
        ++gone;
        if (leaf == coldest) break;
        leaf = chains_.leaf_below(parent);
    }
    return gone;
}

void PoolOwner::spare_path(uint32_t leaf, uint32_t coldest, size_t& patience) {
    // A block that stays keeps all above it. Sparing `coldest` alone would bring each of the others
    // up as the next victim, and each would walk down the same way for nothing.
    for (uint32_t slot = leaf;; slot = chains_.parent(slot)) {
        EvictionPolicy& policy = policy_of(slot);
        if (policy.contains(slot)) policy.spare(slot);
        if (patience > 0) --patience;
        if (slot == coldest) return;
    }
}

bool PoolOwner::may_lose_slab(uint32_t donor, uint64_t fair_share, uint32_t now_s) const {
    uint64_t slabs = slabs_.slabs_of(donor).size();
    if (slabs == 0) return false;
    if (slabs > fair_share) return true;
    return !has_clients(donor) && now_s - idle_since_s_[donor] >= kIdleAfterS;
}

bool PoolOwner::take_slab_from_others(uint32_t name_space, uint32_t now_s) {
    if (now_s < search_again_s_[name_space]) return false;
    uint64_t sharers = 0;
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) sharers += ns == name_space || !slabs_.slabs_of(ns).empty();
    uint64_t fair_share = std::max<uint64_t>(file_.geometry().num_slabs / sharers, 1);
    bool poor = slabs_.slabs_of(name_space).size() < fair_share, searched = false;
    for (uint32_t donor = 0; donor < kMaxNamespaces; ++donor) {
        if (donor == name_space || !may_lose_slab(donor, poor ? fair_share : UINT64_MAX, now_s)) continue;
        searched = true;
        for (uint32_t slab : slabs_to_try(donor)) {
            if (!empty_slab(slab)) continue;
            slabs_.unassign(slab);
            refresh_capacity(donor);
            ++counters_.slabs_moved;
            return slabs_.assign_any(name_space, file_.namespaces()[name_space].slot_bytes.load());
        }
    }
    if (searched) search_again_s_[name_space] = now_s + kSearchAgainS;
    return false;
}

std::vector<uint32_t> PoolOwner::slabs_to_try(uint32_t donor) {
    // The emptiest, and some others: each time the next few, so that slabs with pinned blocks do not hide the rest.
    std::vector<uint32_t> slabs = slabs_.slabs_of(donor);
    auto emptier = [this](uint32_t a, uint32_t b) { return slabs_.used(a) < slabs_.used(b); };
    std::iter_swap(slabs.begin(), std::min_element(slabs.begin(), slabs.end(), emptier));
    if (slabs.size() <= kSlabsToTry) return slabs;
    size_t from = search_turn_++ * (kSlabsToTry - 1) % (slabs.size() - 1);
    std::rotate(slabs.begin() + 1, slabs.begin() + 1 + static_cast<ptrdiff_t>(from), slabs.end());
    slabs.resize(kSlabsToTry);
    return slabs;
}

bool PoolOwner::empty_slab(uint32_t slab) {
    // Look first, then act: half an emptied slab would help nobody.
    bool movable = true;
    slabs_.for_each_slot(slab, [&](uint32_t slot) {
        SlotState now = state(slot);
        if (now == SlotState::kReady) movable = movable && !pinned(slot) && !is_leased(file_, slot);
        if (now == SlotState::kWriting || now == SlotState::kEvicting) movable = false;
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
