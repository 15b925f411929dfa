// What a daemon makes of the file that an earlier one left, possibly in the middle of a change.
#include "kvpool/leases.h"
#include "kvpool/owner.h"

namespace kvpool {
namespace {

// How many slots ahead their index entries are fetched: a recovery is a million cache misses, one after the other or
// many at a time.
constexpr uint32_t kAhead = 16;

// Stays in the slab: the next one's headers may not have pages.
uint32_t slot_ahead(const PoolFile& file, uint32_t slot) {
    uint32_t place = static_cast<uint32_t>(slot % file.geometry().slots_per_slab);
    return place + kAhead < file.geometry().slots_per_slab ? slot + kAhead : slot;
}

std::string lock_path_of(const std::string& pool_path, const std::string& client_id) {
    return pool_path.substr(0, pool_path.rfind('/') + 1) + "clients/" + client_id + ".lock";
}

}  // namespace

std::unique_ptr<PoolOwner> PoolOwner::attach(const std::string& path, uint32_t now_s, const std::string& policy) {
    std::unique_ptr<PoolOwner> owner(new PoolOwner(PoolFile::open(path), policy));
    owner->recover(now_s);
    owner->file_.header().epoch.fetch_add(1);
    return owner;
}

void PoolOwner::recover(uint32_t now_s) {
    index_.clear();
    for (uint32_t client : clients_.all()) clients_.adopt(client, lock_path_of(file_.path(), clients_.id(client)));
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) {
        if (file_.namespaces()[ns].active.load() == 0) continue;
        idle_since_s_[ns] = now_s;
        policies_[ns] = make_policy(policy_name_, file_.geometry().num_slots());
        refresh_capacity(ns);
        for (uint32_t slab : slabs_.slabs_of(ns)) {
            slabs_.for_each_slot(slab, [&](uint32_t slot) {
                index_.expect(header(slot_ahead(file_, slot)).load_key().tag());
                recover_slot(slot, ns);
            });
        }
    }
    recover_links();
    expire(now_s);
}

void PoolOwner::recover_slot(uint32_t slot, uint32_t name_space) {
    SlotHeader& h = header(slot);
    uint64_t word = h.word.load();
    SlotState was = SlotWord::state(word);
    if (was == SlotState::kFree) return;
    slabs_.adopt(slot);
    bool alone = index_.find(h.load_key()) == kNoSlot;
    uint16_t owner = h.owner.load();
    if (was == SlotState::kWriting && alone && owner < kMaxClients && clients_.active(owner)) {
        // Should the owner be dead, reap_clients frees it when no DMA can be in flight any more.
        index_.insert(h.load_key(), slot);
        ++counts_[name_space].writing;
    } else if (was == SlotState::kReady && alone && h.checksum.load() == checksum_of(slot)) {
        index_.insert(h.load_key(), slot);
        ++counts_[name_space].ready;
        enter_policy(slot);
        ++counters_.recovered;
    } else {
        // EVICTING too: a victim that was not leased, or a block that had to go.
        free_or_doom(slot);
        ++counters_.discarded;
    }
}

void PoolOwner::recover_links() {
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) {
        for (uint32_t slab : slabs_.slabs_of(ns)) {
            slabs_.for_each_slot(slab, [&](uint32_t slot) {
                index_.expect(header(slot_ahead(file_, slot)).parent_tag.load());
                SlotState now = state(slot);
                uint32_t tag = header(slot).parent_tag.load();
                if ((now != SlotState::kReady && now != SlotState::kWriting) || tag == 0) return;
                uint32_t parent = index_.find_tag(tag);
                if (parent != kNoSlot) link(slot, parent);
            });
        }
    }
}

}  // namespace kvpool
