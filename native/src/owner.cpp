#include "kvpool/owner.h"

#include <algorithm>
#include <numeric>

#include "kvpool/checksum.h"
#include "kvpool/leases.h"

namespace kvpool {
namespace {

constexpr size_t kFewExpiries = 1024;

}  // namespace

std::unique_ptr<PoolOwner> PoolOwner::create(const std::string& path, uint64_t size, uint64_t min_slot_bytes,
                                             unsigned mode, const std::string& policy) {
    Geometry geometry = Geometry::plan(size, min_slot_bytes);
    return std::unique_ptr<PoolOwner>(new PoolOwner(PoolFile::create(path, geometry, mode), policy));
}

PoolOwner::PoolOwner(PoolFile file, const std::string& policy)
    : file_(std::move(file)),
      policy_name_(policy),
      clients_(file_),
      index_(file_),
      slabs_(file_),
      chains_(file_.geometry().num_slots()),
      copies_(file_.geometry().num_slots()),
      policies_(kMaxNamespaces),
      counts_(kMaxNamespaces),
      idle_since_s_(kMaxNamespaces),
      search_again_s_(kMaxNamespaces),
      guard_(file_.geometry().num_slots()) {
    make_policy(policy_name_, 1);  // an unknown name fails here, not at the first store
}

// namespaces and clients ------------------------------------------------------------------------------------------

uint32_t PoolOwner::add_namespace(const uint8_t* digest, uint32_t slot_bytes, const std::string& description) {
    NamespaceEntry* table = file_.namespaces();
    for (uint32_t i = 0; i < kMaxNamespaces; ++i) {
        if (table[i].active.load() == 0 || std::memcmp(table[i].digest, digest, sizeof(table[i].digest)) != 0) continue;
        if (table[i].slot_bytes.load() == slot_bytes) return i;
        throw std::invalid_argument("slot_bytes = " + std::to_string(slot_bytes) + ": this namespace has " +
                                    std::to_string(table[i].slot_bytes.load()));
    }
    if (slot_bytes == 0 || slot_bytes > file_.geometry().slab_bytes) {
        throw std::invalid_argument("slot_bytes = " + std::to_string(slot_bytes) + ": a slab has " +
                                    std::to_string(file_.geometry().slab_bytes) + " bytes; use a larger pool");
    }
    uint32_t place = unused_namespace();
    NamespaceEntry& entry = table[place];
    std::memcpy(entry.digest, digest, sizeof(entry.digest));
    size_t length = std::min(description.size(), kDescriptionBytes - 1);
    std::memcpy(entry.description, description.data(), length);
    entry.description[length] = 0;
    entry.slot_bytes.store(slot_bytes);
    entry.active.store(1, std::memory_order_release);
    policies_[place] = make_policy(policy_name_, file_.geometry().num_slots());
    return place;
}

uint32_t PoolOwner::unused_namespace() {
    for (bool retired : {false, true}) {
        for (uint32_t i = 0; i < kMaxNamespaces; ++i) {
            // Others may have taken all the slabs of a namespace whose engines have gone.
            if (retired) retire(i);
            if (!known(i)) return i;
        }
    }
    std::vector<uint32_t> places(kMaxNamespaces);
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(), [&](auto a, auto b) { return idle_since_s_[a] < idle_since_s_[b]; });
    for (uint32_t place : places) {  // the longest idle first: a full table must not shut new engines out for ever
        if (has_clients(place)) continue;
        clear(place, false);
        if (!known(place)) return place;
    }
    throw std::invalid_argument("namespace: the pool has 64 with engines or pinned blocks already; clear it");
}

bool PoolOwner::has_clients(uint32_t name_space) const {
    std::vector<uint32_t> all = clients_.all();
    return std::any_of(all.begin(), all.end(), [&](uint32_t c) { return clients_.name_space(c) == name_space; });
}

void PoolOwner::expect_known(uint32_t name_space) const {
    if (!known(name_space)) throw std::invalid_argument("namespace " + std::to_string(name_space) + ": unknown");
}

uint32_t PoolOwner::add_client(const std::string& client_id, const std::string& lock_path, int pid,
                               uint32_t name_space) {
    expect_known(name_space);
    auto client = clients_.add(client_id, lock_path, pid, name_space);
    if (!client) throw std::runtime_error("the pool has " + std::to_string(kMaxClients) + " clients already");
    return *client;
}

std::vector<std::string> PoolOwner::reap_clients(uint32_t now_s, uint32_t grace_s) {
    std::vector<std::string> reaped;
    for (uint32_t client : clients_.dead(now_s, grace_s)) {
        reaped.push_back(clients_.id(client));
        idle_since_s_[clients_.name_space(client)] = now_s;
        keep_writing(client, {});
        clients_.remove(client);
        ++counters_.reaped_clients;
    }
    if (!reaped.empty()) bury_doomed();
    return reaped;
}

// slots -----------------------------------------------------------------------------------------------------------

bool PoolOwner::is(SlotRef ref, SlotState wanted) const {
    if (ref.none() || ref.slot >= file_.geometry().num_slots()) return false;
    // References come from outside: the headers of a slab that is nobody's may not even have pages.
    return file_.slabs()[file_.slab_of(ref.slot)].owner.load(std::memory_order_relaxed) != 0 &&
           header(ref.slot).word.load(std::memory_order_acquire) == SlotWord::make(ref.generation, wanted);
}

uint32_t PoolOwner::namespace_of(uint32_t slot) const {
    return file_.slabs()[file_.slab_of(slot)].owner.load(std::memory_order_relaxed) - 1;
}

uint32_t PoolOwner::checksum_of(uint32_t slot) const {
    const SlotHeader& h = header(slot);
    struct {
        BlockKey key;
        uint32_t generation, length, expiry_s, parent_tag, flags;
    } covered{h.load_key(),        SlotWord::generation(h.word.load()),
              h.length.load(),     h.expiry_s.load(),
              h.parent_tag.load(), h.flags.load()};
    return crc32c(&covered, offsetof(decltype(covered), flags) + sizeof(covered.flags), slot);
}

void PoolOwner::start_writing(uint32_t slot, uint32_t client, const BlockKey& key, uint32_t parent_tag,
                              const StoreOptions& options) {
    SlotHeader& h = header(slot);
    uint32_t generation = SlotWord::generation(h.word.load(std::memory_order_relaxed)) + 1;
    if (generation == 0) generation = 1;
    // The word comes last: whoever dies before it leaves a FREE slot, and nothing in that is believed.
    h.store_key(key);
    h.length.store(file_.slabs()[file_.slab_of(slot)].slot_bytes.load(), std::memory_order_release);
    h.expiry_s.store(options.expiry_s, std::memory_order_release);
    h.parent_tag.store(parent_tag, std::memory_order_release);
    h.flags.store(options.pin ? kFlagPinned : 0, std::memory_order_release);
    h.owner.store(static_cast<uint16_t>(client), std::memory_order_release);
    h.word.store(SlotWord::make(generation, SlotState::kWriting), std::memory_order_seq_cst);
    index_.insert(key, slot);
    ++counts_of(slot).writing;
}

void PoolOwner::make_ready(uint32_t slot) {
    header(slot).checksum.store(checksum_of(slot), std::memory_order_release);
    set_state(slot, SlotState::kReady);
    NamespaceCounts& counts = counts_of(slot);
    --counts.writing;
    ++counts.ready;
    enter_policy(slot);
    if (journal_on_) journal_[namespace_of(slot)].ready.push_back(header(slot).load_key());
}

void PoolOwner::enter_policy(uint32_t slot) {
    SlotHeader& h = header(slot);
    uint32_t expiry_s = h.expiry_s.load();
    if (expiry_s != 0) note_expiry(slot, expiry_s);
    if (pinned(slot)) {
        ++counts_of(slot).pinned;
    } else if (policy_of(slot).insert(slot, h.load_key().hash())) {
        // It was evicted not long ago and had to come again: no longer one to be taken first.
        counters_.kept_copies += copies_.is_copy(slot);
        copies_.unmark(slot);
    }
    review_copy(slot);
}

void PoolOwner::note_expiry(uint32_t slot, uint32_t expiry_s) {
    // Evicted blocks leave their notes behind; a day of them would be gigabytes.
    if (expiries_.size() >= expiries_limit_) {
        auto gone = [this](const Expiry& e) { return !is(e.ref, SlotState::kReady); };
        expiries_.erase(std::remove_if(expiries_.begin(), expiries_.end(), gone), expiries_.end());
        std::make_heap(expiries_.begin(), expiries_.end(), std::greater<>());
        expiries_limit_ = std::max(2 * expiries_.size(), kFewExpiries);
    }
    expiries_.push_back({expiry_s, {slot, SlotWord::generation(header(slot).word.load())}});
    std::push_heap(expiries_.begin(), expiries_.end(), std::greater<>());
}

void PoolOwner::link(uint32_t child, uint32_t parent) {
    // Keys of another namespace are none of ours, whatever a client says.
    if (chains_.parent(child) != kNoSlot || namespace_of(child) != namespace_of(parent)) return;
    chains_.link(child, parent);
    review_copy(parent);
}

void PoolOwner::unlink(uint32_t slot) {
    uint32_t parent = chains_.parent(slot);
    chains_.unlink(slot);
    copies_.unmark(slot);
    if (parent != kNoSlot) review_copy(parent, true);
}

void PoolOwner::review_copy(uint32_t slot, bool next) {
    if (!copies_.is_copy(slot)) return;
    bool expendable = state(slot) == SlotState::kReady && copies_.used_once(slot) && !chains_.has_children(slot);
    copies_.offer(slot, namespace_of(slot), expendable, next);
}

void PoolOwner::free_slot(uint32_t slot) {
    set_state(slot, SlotState::kFree);
    slabs_.give(slot);
}

bool PoolOwner::remove_ready(uint32_t slot, bool evicted) {
    // Look before asking: while it is EVICTING, lookups of this block are misses.
    bool leased = is_leased(file_, slot);
    if (!leased) {
        set_state(slot, SlotState::kEvicting);
        leased = is_leased(file_, slot);
        if (leased) set_state(slot, SlotState::kReady);
    }
    if (leased) {
        ++counters_.lease_vetoes;
        return false;
    }
    withdraw(slot, evicted);
    free_slot(slot);
    return true;
}

void PoolOwner::forget(uint32_t slot) {
    set_state(slot, SlotState::kEvicting);
    withdraw(slot, false);
    free_or_doom(slot);
}

void PoolOwner::withdraw(uint32_t slot, bool evicted) {
    index_.erase(header(slot).load_key(), slot);
    unlink(slot);
    if (journal_on_) journal_[namespace_of(slot)].gone.push_back(header(slot).load_key());
    NamespaceCounts& counts = counts_of(slot);
    if (pinned(slot)) {
        --counts.pinned;
    } else if (evicted) {
        policy_of(slot).evicted(slot);
    } else {
        policy_of(slot).erase(slot);
    }
    --counts.ready;
}

void PoolOwner::free_or_doom(uint32_t slot) {
    set_state(slot, SlotState::kEvicting);
    if (!is_leased(file_, slot)) return free_slot(slot);
    ++counts_of(slot).doomed;
    doomed_.push_back(slot);
}

void PoolOwner::bury_doomed(size_t limit) {
    for (size_t n = std::min(limit, doomed_.size()); n > 0; --n) {
        uint32_t slot = doomed_.front();
        doomed_.pop_front();
        --counts_of(slot).doomed;
        free_or_doom(slot);
    }
}

// the verbs -------------------------------------------------------------------------------------------------------

void PoolOwner::guard(uint32_t slot) {
    guard_[slot] = guard_stamp_;
}

void PoolOwner::prepare_store(uint32_t client, const std::vector<BlockKey>& keys, const BlockKey* parent,
                              uint32_t now_s, const StoreOptions& options, uint64_t* refs) {
    if (client >= kMaxClients || !clients_.active(client)) throw std::invalid_argument("client: unknown");
    uint32_t name_space = clients_.name_space(client);
    uint16_t source = options.source && !options.pin ? copies_.number_of(*options.source) : 0;
    ++guard_stamp_;
    uint32_t above = parent != nullptr ? index_.find(*parent) : kNoSlot;
    uint32_t above_tag = parent != nullptr ? parent->tag() : 0;
    if (above != kNoSlot) guard(above);
    bool exhausted = false;
    for (size_t i = 0; i < keys.size(); ++i) {
        refs[i] = 0;
        uint32_t slot = index_.find(keys[i]);
        if (slot != kNoSlot) {
            ++counters_.duplicates;
        } else if (!exhausted && (slot = take_slot(name_space, keys.size() - i, now_s, exhausted)) != kNoSlot) {
            start_writing(slot, client, keys[i], above_tag, options);
            copies_.mark(slot, source);
            refs[i] = SlotRef{slot, SlotWord::generation(header(slot).word.load())}.pack();
        } else {
            // A chain with a hole is worth nothing behind it.
            exhausted = true;
            ++counters_.no_room;
        }
        if (slot != kNoSlot) {
            // Blocks that were there already, too: their parent may have been dropped and be stored again here.
            if (above != kNoSlot) link(slot, above);
            guard(slot);
        }
        above = slot;
        above_tag = keys[i].tag();
    }
}

size_t PoolOwner::complete_store(uint32_t client, const std::vector<SlotRef>& refs) {
    // From tail to head, so that the head is the newest and the tail goes first.
    size_t ready = 0;
    for (auto ref = refs.rbegin(); ref != refs.rend(); ++ref) {
        if (writes(client, *ref)) {
            make_ready(ref->slot);
            ++counters_.stored;
        }
        ready += is(*ref, SlotState::kReady);
    }
    return ready;
}

size_t PoolOwner::abort_store(uint32_t client, const std::vector<SlotRef>& refs) {
    size_t aborted = 0;
    for (SlotRef ref : refs) {
        if (!writes(client, ref)) continue;
        index_.erase(header(ref.slot).load_key(), ref.slot);
        unlink(ref.slot);
        --counts_of(ref.slot).writing;
        free_slot(ref.slot);
        ++aborted;
    }
    counters_.aborted += aborted;
    return aborted;
}

size_t PoolOwner::keep_writing(uint32_t client, const std::vector<SlotRef>& refs) {
    ++guard_stamp_;
    for (SlotRef ref : refs) {
        if (ref.slot < file_.geometry().num_slots()) guard(ref.slot);
    }
    std::vector<SlotRef> given_up;
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) {
        if (counts_[ns].writing == 0) continue;
        for (uint32_t slab : slabs_.slabs_of(ns)) {
            slabs_.for_each_slot(slab, [&](uint32_t slot) {
                SlotRef ref{slot, SlotWord::generation(header(slot).word.load(std::memory_order_relaxed))};
                if (writes(client, ref) && !guarded(slot)) given_up.push_back(ref);
            });
        }
    }
    return abort_store(client, given_up);
}

void PoolOwner::touch(const std::vector<SlotRef>& chain) {
    for (size_t i = chain.size(); i-- > 0;) {
        if (!is(chain[i], SlotState::kReady)) continue;
        uint32_t slot = chain[i].slot;
        if (!pinned(slot)) policy_of(slot).hit(slot);
        counters_.kept_copies += copies_.use(slot);
        review_copy(slot);
        // A block whose parent was dropped and stored again finds it here.
        if (i > 0 && is(chain[i - 1], SlotState::kReady)) link(slot, chain[i - 1].slot);
    }
}

size_t PoolOwner::mark_copies(const std::vector<BlockKey>& keys, const HostId& source) {
    uint16_t number = copies_.number_of(source);
    if (number == 0) return 0;
    size_t marked = 0;
    for (const BlockKey& key : keys) {
        uint32_t slot = index_.find(key);
        if (slot == kNoSlot || state(slot) != SlotState::kReady || pinned(slot) || copies_.is_copy(slot)) continue;
        copies_.unmark(slot);  // a source that was forgotten
        copies_.mark(slot, number);
        copies_.use(slot);  // by who made it: unlike a copy that was pulled for somebody, it may go at once
        review_copy(slot);
        ++marked;
    }
    return marked;
}

size_t PoolOwner::drop(const std::vector<SlotRef>& refs) {
    size_t dropped = 0;
    for (SlotRef ref : refs) {
        if (!is(ref, SlotState::kReady)) continue;
        forget(ref.slot);
        ++dropped;
    }
    counters_.dropped += dropped;
    return dropped;
}

size_t PoolOwner::clear(std::optional<uint32_t> name_space, bool with_pinned) {
    size_t cleared = 0;
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) {
        if (name_space && *name_space != ns) continue;
        for (uint32_t slab : slabs_.slabs_of(ns)) {
            slabs_.for_each_slot(slab, [&](uint32_t slot) {
                bool stays = state(slot) != SlotState::kReady || (pinned(slot) && !with_pinned);
                if (!stays) cleared += remove_ready(slot, false);
            });
        }
        retire(ns);
    }
    counters_.cleared += cleared;
    return cleared;
}

void PoolOwner::retire(uint32_t name_space) {
    if (policies_[name_space] == nullptr) return;
    for (uint32_t slab : std::vector<uint32_t>(slabs_.slabs_of(name_space))) {
        if (slabs_.used(slab) == 0) slabs_.unassign(slab);
    }
    if (!slabs_.slabs_of(name_space).empty() || has_clients(name_space)) return refresh_capacity(name_space);
    policies_[name_space] = nullptr;
    file_.namespaces()[name_space].active.store(0, std::memory_order_release);
}

size_t PoolOwner::expire(uint32_t now_s) {
    size_t expired = 0;
    while (!expiries_.empty() && expiries_.front().at_s <= now_s) {
        SlotRef ref = expiries_.front().ref;
        std::pop_heap(expiries_.begin(), expiries_.end(), std::greater<>());
        expiries_.pop_back();
        if (!is(ref, SlotState::kReady)) continue;
        forget(ref.slot);
        ++expired;
    }
    counters_.expired += expired;
    bury_doomed();
    return expired;
}

}  // namespace kvpool
