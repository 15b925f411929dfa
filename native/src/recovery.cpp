// What a daemon makes of the file that an earlier one left, possibly in the middle of a change.
#include "kvpool/leases.h"
#include "kvpool/owner.h"

namespace kvpool {
namespace {

// How many slots ahead their index entries are fetched: a recovery is a million cache misses, one after the other or
// many at a time.
constexpr uint32_t kAhead = 16;

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
                if (slot + kAhead < file_.geometry().num_slots()) index_.expect(header(slot + kAhead).load_key().tag());
                recover_slot(slot, ns);
            });
        }
    }
    recover_links();
    bury_doomed();
    expire(now_s);
}

void PoolOwner::recover_slot(uint32_t slot, uint32_t name_space) {
    SlotHeader& h = header(slot);
    uint64_t word = h.word.load();
    SlotState was = SlotWord::state(word);
    if (was == SlotState::kFree) return;
    slabs_.adopt(slot);
    bool whole = h.checksum.load() == checksum_of(slot) && index_.find(h.load_key()) == kNoSlot;
    if (was == SlotState::kWriting && clients_.active(h.owner.load()) && clients_.alive(h.owner.load())) {
        index_.insert(h.load_key(), slot);
        ++counts_[name_space].writing;
    } else if (was != SlotState::kWriting && whole) {
        // EVICTING too: the decision was not carried out, and a client may hold it.
        h.word.store(SlotWord::make(SlotWord::generation(word), SlotState::kReady));
        index_.insert(h.load_key(), slot);
        ++counts_[name_space].ready;
        enter_policy(slot);
        ++counters_.recovered;
    } else {
        h.flags.store(kFlagDoomed);
        h.owner.store(UINT16_MAX);
        ++counts_[name_space].doomed;
        doomed_.push_back(slot);
        ++counters_.discarded;
    }
}

void PoolOwner::recover_links() {
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) {
        for (uint32_t slab : slabs_.slabs_of(ns)) {
            slabs_.for_each_slot(slab, [&](uint32_t slot) {
                if (slot + kAhead < file_.geometry().num_slots()) index_.expect(header(slot + kAhead).parent_tag.load());
                bool kept = state(slot) != SlotState::kFree && !(header(slot).flags.load() & kFlagDoomed);
                uint32_t tag = header(slot).parent_tag.load();
                if (!kept || tag == 0) return;
                uint32_t parent = index_.find_tag(tag);
                if (parent != kNoSlot && namespace_of(parent) == ns) chains_.link(slot, parent);
            });
        }
    }
}

}  // namespace kvpool
