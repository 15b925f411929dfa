// What a pool says of itself, and how it checks itself.
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "kvpool/owner.h"

namespace kvpool {

NamespaceCounts PoolOwner::counts(uint32_t name_space) const {
    expect_known(name_space);
    NamespaceCounts counts = counts_[name_space];
    counts.slabs = slabs_.slabs_of(name_space).size();
    counts.slots = slabs_.num_slots(name_space);
    counts.free = counts.slots - slabs_.used_slots(name_space);
    return counts;
}

std::vector<BlockKey> PoolOwner::path_to(const BlockKey& key) const {
    std::vector<BlockKey> path;
    uint32_t head = kNoSlot;
    for (uint32_t slot = index_.find(key); slot != kNoSlot; slot = chains_.parent(slot)) {
        if (state(slot) != SlotState::kReady) return {};
        path.push_back(header(slot).load_key());
        head = slot;
    }
    if (head == kNoSlot || header(head).parent_tag.load() != 0) return {};
    std::reverse(path.begin(), path.end());
    return path;
}

PoolOwner::ReadyKeys PoolOwner::ready_keys(uint32_t from, uint32_t limit, bool leaves) const {
    if (from >= file_.geometry().num_slots() || limit == 0) throw std::invalid_argument("no such slots");
    uint32_t slab = file_.slab_of(from);
    const SlabEntry& entry = file_.slabs()[slab];
    uint32_t first = static_cast<uint32_t>(slab * file_.geometry().slots_per_slab);
    ReadyKeys found{kNoSlot, {}, static_cast<uint32_t>(first + file_.geometry().slots_per_slab), {}};
    uint32_t owner = entry.owner.load(std::memory_order_relaxed);
    if (owner == 0) return found;
    found.name_space = owner - 1;
    uint32_t end = first + entry.num_slots.load(std::memory_order_relaxed);
    if (from < end && limit < end - from) found.next = end = from + limit;
    for (uint32_t slot = from; slot < end; ++slot) {
        if (state(slot) != SlotState::kReady || (leaves && chains_.has_children(slot))) continue;
        if (leaves && header(slot).parent_tag.load() != 0) {
            uint32_t parent = chains_.parent(slot);
            if (parent == kNoSlot || state(parent) != SlotState::kReady) continue;
            found.parents.push_back(header(parent).load_key());
        } else if (leaves) {
            found.parents.push_back(std::nullopt);
        }
        found.keys.push_back(header(slot).load_key());
    }
    return found;
}

std::map<std::string, uint64_t> PoolOwner::stats() const {
    NamespaceCounts sum;
    for (const NamespaceCounts& c : counts_) {
        sum.writing += c.writing;
        sum.ready += c.ready;
        sum.doomed += c.doomed;
        sum.pinned += c.pinned;
    }
    const Counters& c = counters_;
    return {{"writing", sum.writing},
            {"ready", sum.ready},
            {"doomed", sum.doomed},
            {"pinned", sum.pinned},
            {"populated_slabs", populated_slabs()},
            {"unassigned_slabs", slabs_.unassigned_populated()},
            {"stored", c.stored},
            {"evicted", c.evicted},
            {"copies", copies_.size()},
            {"evicted_copies", c.evicted_copies},
            {"kept_copies", c.kept_copies},
            {"expired", c.expired},
            {"dropped", c.dropped},
            {"cleared", c.cleared},
            {"no_room", c.no_room},
            {"duplicates", c.duplicates},
            {"aborted", c.aborted},
            {"reaped_clients", c.reaped_clients},
            {"lease_vetoes", c.lease_vetoes},
            {"slabs_moved", c.slabs_moved},
            {"recovered", c.recovered},
            {"discarded", c.discarded}};
}

void PoolOwner::check_integrity() const {
    slabs_.check_integrity();
    size_t indexed = 0, marked = 0;
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) {
        NamespaceCounts seen;
        uint64_t in_policy = 0;
        for (uint32_t slab : slabs_.slabs_of(ns)) {
            slabs_.for_each_slot(slab, [&](uint32_t slot) {
                SlotState now = state(slot);
                check_copy(slot);
                marked += copies_.is_marked(slot);
                if (now == SlotState::kFree) return;
                if (now == SlotState::kEvicting) {
                    ++seen.doomed;
                    return;
                }
                ensure(index_.find(header(slot).load_key()) == slot, "a used slot is not in the index under its key");
                chains_.check_integrity(slot);
                ++(now == SlotState::kReady ? seen.ready : seen.writing);
                if (now != SlotState::kReady) return;
                ensure(header(slot).checksum.load() == checksum_of(slot), "header checksum of a READY slot");
                seen.pinned += pinned(slot);
                bool tracked = policies_[ns]->contains(slot);
                ensure(tracked != pinned(slot), "the policy knows the READY slots that are not pinned, and no others");
                in_policy += tracked;
            });
        }
        const NamespaceCounts& c = counts_[ns];
        ensure(seen.ready == c.ready && seen.writing == c.writing && seen.doomed == c.doomed, "counts of slots");
        ensure(seen.pinned == c.pinned, "count of pinned slots");
        ensure(c.ready + c.writing + c.doomed == slabs_.used_slots(ns), "ready + writing + doomed == used");
        indexed += c.ready + c.writing;
        if (policies_[ns] == nullptr) continue;
        policies_[ns]->check_integrity();
        ensure(policies_[ns]->size() == in_policy, "size of the policy");
    }
    ensure(index_.size() == indexed, "size of the index");
    copies_.check_integrity(marked);
}

void PoolOwner::check_copy(uint32_t slot) const {
    SlotState now = state(slot);
    ensure(!copies_.is_marked(slot) || now == SlotState::kReady || now == SlotState::kWriting, "copy in a free slot");
    bool expendable = now == SlotState::kReady && copies_.used_once(slot) && !chains_.has_children(slot);
    // A forgotten source's are taken off the list when their turn comes.
    if (copies_.is_copy(slot)) ensure(copies_.is_offered(slot) == expendable, "copy that may go first");
    ensure(copies_.is_marked(slot) || !copies_.is_offered(slot), "offered, but no copy");
    ensure(!copies_.is_marked(slot) || !pinned(slot), "pinned copy");
}

// memory ----------------------------------------------------------------------------------------------------------

void PoolOwner::advise_hugepages() {
    const Geometry& g = file_.geometry();
    if (madvise(file_.base() + g.slabs_at, g.end - g.slabs_at, MADV_HUGEPAGE) != 0)
        throw_errno("madvise(MADV_HUGEPAGE)");
}

void PoolOwner::bind_numa(const std::vector<unsigned>& nodes) {
    unsigned long mask[16] = {};
    for (unsigned node : nodes) {
        if (node >= sizeof(mask) * 8) throw std::invalid_argument("numa: node " + std::to_string(node));
        mask[node / (8 * sizeof(long))] |= 1ul << (node % (8 * sizeof(long)));
    }
    const Geometry& g = file_.geometry();
    long mode = nodes.size() == 1 ? MPOL_BIND : MPOL_INTERLEAVE;
    long rc = syscall(SYS_mbind, file_.base() + g.slabs_at, g.end - g.slabs_at, mode, mask, sizeof(mask) * 8, 0);
    if (rc != 0) throw_errno("mbind");
}

void PoolOwner::populate(uint32_t slab) {
    const Geometry& g = file_.geometry();
    if (slab >= g.num_slabs) throw std::invalid_argument("slab " + std::to_string(slab));
    file_.populate(g.slots_at + slab * g.slots_per_slab * sizeof(SlotHeader), g.slots_per_slab * sizeof(SlotHeader));
    file_.populate(g.slab_at(slab), g.slab_bytes);
    file_.slabs()[slab].populated.store(1, std::memory_order_release);
}

uint32_t PoolOwner::populated_slabs() const {
    uint32_t count = 0;
    for (uint64_t slab = 0; slab < file_.geometry().num_slabs; ++slab) {
        count += file_.slabs()[slab].populated.load(std::memory_order_acquire) != 0;
    }
    return count;
}

}  // namespace kvpool
