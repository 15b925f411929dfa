// The daemon's side of a pool: the only writer of index, slot states and tables. One thread owns it; `populate` alone
// may run on others.
//
// Every slot of a namespace's slabs is in one of these states, and the counts add up:
//
//   free + writing + ready + doomed == slots        (doomed: forgotten, but a lease still holds the bytes)
//
//   prepare_store: FREE -> WRITING     in the index, invisible to readers
//   complete_store: WRITING -> READY   visible; in the eviction policy unless pinned
//   evict, clear: READY -> EVICTING -> FREE, or back to READY when it is leased
//   drop, expire: READY -> EVICTING -> FREE, or doomed (stays EVICTING) while it is leased
//   abort_store, dead owner: WRITING -> FREE
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvpool/chains.h"
#include "kvpool/clients.h"
#include "kvpool/copies.h"
#include "kvpool/eviction.h"
#include "kvpool/index.h"
#include "kvpool/mapping.h"
#include "kvpool/slabs.h"

namespace kvpool {

struct StoreOptions {
    uint32_t expiry_s = 0;  // 0 = never
    bool pin = false;
    std::optional<HostId> source = {};  // the host that they come from, and that has them too: they are copies
};

struct NamespaceCounts {
    uint64_t slabs = 0, slots = 0, free = 0, writing = 0, ready = 0, doomed = 0, pinned = 0;
};

struct Changes {
    std::vector<BlockKey> ready, gone;
};

class PoolOwner {
  public:
    static std::unique_ptr<PoolOwner> create(const std::string& path, uint64_t size, uint64_t min_slot_bytes,
                                             unsigned mode, const std::string& policy);
    // Recovers what an earlier daemon left, and raises the epoch.
    static std::unique_ptr<PoolOwner> attach(const std::string& path, uint32_t now_s, const std::string& policy);

    PoolFile& file() { return file_; }
    const PoolFile& file() const { return file_; }
    ClientTable& clients() { return clients_; }

    void advise_hugepages();
    void bind_numa(const std::vector<unsigned>& nodes);
    void populate(uint32_t slab);  // any thread
    uint32_t populated_slabs() const;

    // std::invalid_argument: another slot size for a known digest, a slot larger than a slab, or a full table.
    uint32_t add_namespace(const uint8_t* digest, uint32_t slot_bytes, const std::string& description);
    NamespaceCounts counts(uint32_t name_space) const;
    // Index, std::runtime_error when the table is full.
    uint32_t add_client(const std::string& client_id, const std::string& lock_path, int pid, uint32_t name_space);
    std::vector<std::string> reap_clients(uint32_t now_s, uint32_t grace_s);

    // refs[i] is a WRITING slot for keys[i], or 0: present already, or no room (then also for all that follow).
    void prepare_store(uint32_t client, const std::vector<BlockKey>& keys, const BlockKey* parent, uint32_t now_s,
                       const StoreOptions& options, uint64_t* refs);
    size_t complete_store(uint32_t client, const std::vector<SlotRef>& refs);
    size_t abort_store(uint32_t client, const std::vector<SlotRef>& refs);
    size_t keep_writing(uint32_t client, const std::vector<SlotRef>& refs);
    void touch(const std::vector<SlotRef>& chain);
    size_t drop(const std::vector<SlotRef>& refs);
    size_t clear(std::optional<uint32_t> name_space, bool pinned);
    size_t expire(uint32_t now_s);
    size_t evict(uint32_t name_space, size_t count);
    // That host has these blocks, too: READY ones that were made here become its copies, used once. How many did.
    size_t mark_copies(const std::vector<BlockKey>& keys, const HostId& source);
    // Hosts that blocks here are copies of; one that is not to be counted on any more is forgotten.
    bool is_copy(uint32_t slot) const { return copies_.is_copy(slot); }
    std::vector<HostId> copy_sources() const { return copies_.sources(); }
    void forget_source(const HostId& source) { copies_.forget(source); }

    // For the directory that tells other hosts what is here: which blocks became READY and which were forgotten since
    // the last call, by namespace. Nothing is noted before `keep_journal`.
    void keep_journal() { journal_on_ = true; }
    std::map<uint32_t, Changes> take_changes() { return std::exchange(journal_, {}); }
    // READY blocks among at most `limit` slots from number `from` on, of one slab and so of one namespace (kNoSlot:
    // nobody has the slab); `leaves`: those that no block follows, if their chain has not lost the block before them,
    // and these, too (nullopt: a head). `next` is where to go on; past the last slot that is num_slots().
    struct ReadyKeys {
        uint32_t name_space;
        std::vector<BlockKey> keys;
        uint32_t next;
        std::vector<std::optional<BlockKey>> parents;
    };
    ReadyKeys ready_keys(uint32_t from, uint32_t limit, bool leaves = false) const;

    // The chain that ends with `key`, head first. Empty: the block is not READY, or its chain has lost its head.
    std::vector<BlockKey> path_to(const BlockKey& key) const;

    std::map<std::string, uint64_t> stats() const;
    void check_integrity() const;

  private:
    PoolOwner(PoolFile file, const std::string& policy);
    void recover(uint32_t now_s);
    void recover_slot(uint32_t slot, uint32_t name_space);
    void recover_links();

    SlotHeader& header(uint32_t slot) const { return file_.slots()[slot]; }
    SlotState state(uint32_t slot) const { return SlotWord::state(header(slot).word.load(std::memory_order_acquire)); }
    bool is(SlotRef ref, SlotState state) const;
    void set_state(uint32_t slot, SlotState state) {
        uint32_t generation = SlotWord::generation(header(slot).word.load(std::memory_order_relaxed));
        header(slot).word.store(SlotWord::make(generation, state), std::memory_order_seq_cst);
    }
    bool writes(uint32_t client, SlotRef ref) const {
        return is(ref, SlotState::kWriting) && header(ref.slot).owner.load() == client;
    }
    bool known(uint32_t name_space) const { return name_space < kMaxNamespaces && policies_[name_space] != nullptr; }
    void expect_known(uint32_t name_space) const;  // std::invalid_argument
    uint32_t namespace_of(uint32_t slot) const;
    uint32_t checksum_of(uint32_t slot) const;
    NamespaceCounts& counts_of(uint32_t slot) { return counts_[namespace_of(slot)]; }
    EvictionPolicy& policy_of(uint32_t slot) { return *policies_[namespace_of(slot)]; }
    bool pinned(uint32_t slot) const { return header(slot).flags.load() & kFlagPinned; }

    void start_writing(uint32_t slot, uint32_t client, const BlockKey& key, uint32_t parent_tag,
                       const StoreOptions& options);
    void unlink(uint32_t slot);  // from its chain; it is no copy any more
    // To be called when its state, its use or its children have changed: a copy that was used and that nothing follows
    // may be evicted first.
    void review_copy(uint32_t slot, bool next = false);
    void check_copy(uint32_t slot) const;
    void make_ready(uint32_t slot);
    void enter_policy(uint32_t slot);
    void note_expiry(uint32_t slot, uint32_t expiry_s);
    void link(uint32_t child, uint32_t parent);  // unless it has one, or they differ in namespace
    void free_slot(uint32_t slot);
    // READY -> FREE unless leased (then READY still, false). `evicted`: for want of room, so the policy remembers it.
    bool remove_ready(uint32_t slot, bool evicted);
    void forget(uint32_t slot);                  // READY -> FREE, or doomed while leased
    void withdraw(uint32_t slot, bool evicted);  // from index, chains and policy
    void free_or_doom(uint32_t slot);            // for a slot that is in none of these
    void bury_doomed(size_t limit = SIZE_MAX);   // looks at so many
    uint32_t unused_namespace();
    bool has_clients(uint32_t name_space) const;
    void retire(uint32_t name_space);  // gives empty slabs back, and the namespace if nobody uses it
    void guard(uint32_t slot);
    bool guarded(uint32_t slot) const { return guard_[slot] == guard_stamp_; }

    // room.cpp: where free slots come from.
    uint32_t take_slot(uint32_t name_space, size_t wanted, uint32_t now_s, bool& exhausted);
    bool make_room(uint32_t name_space, size_t wanted, uint32_t now_s);
    size_t evict_coldest(uint32_t name_space, size_t count);
    size_t evict_copies(uint32_t name_space, size_t count);
    size_t evict_below(uint32_t coldest, size_t count, size_t& patience);
    void spare_path(uint32_t leaf, uint32_t coldest, size_t& patience);
    bool take_slab_from_others(uint32_t name_space, uint32_t now_s);
    std::vector<uint32_t> slabs_to_try(uint32_t donor);
    bool empty_slab(uint32_t slab);
    bool may_lose_slab(uint32_t donor, uint64_t fair_share, uint32_t now_s) const;
    void refresh_capacity(uint32_t name_space);

    PoolFile file_;
    std::string policy_name_;
    ClientTable clients_;
    Index index_;
    SlabAllocator slabs_;
    Chains chains_;
    Copies copies_;
    std::vector<std::unique_ptr<EvictionPolicy>> policies_;  // by namespace
    std::vector<NamespaceCounts> counts_;
    std::vector<uint32_t> idle_since_s_;    // when the last client of a namespace left
    std::vector<uint32_t> search_again_s_;  // no search for slabs of others before
    size_t search_turn_ = 0;
    LazyArray<uint32_t> guard_;  // stamped slots are not evicted during the current call
    uint32_t guard_stamp_ = 1;
    bool journal_on_ = false;
    std::map<uint32_t, Changes> journal_;  // by namespace
    std::deque<uint32_t> doomed_;
    struct Expiry {
        uint32_t at_s;
        SlotRef ref;
        bool operator>(const Expiry& other) const { return at_s > other.at_s; }
    };
    std::vector<Expiry> expiries_;  // a heap, the next one first; blocks that went before their time linger
    size_t expiries_limit_ = 0;     // sweep them out when the heap gets as large as this
    struct Counters {
        uint64_t stored = 0, evicted = 0, expired = 0, dropped = 0, cleared = 0, no_room = 0, duplicates = 0,
                 aborted = 0, reaped_clients = 0, lease_vetoes = 0, slabs_moved = 0, recovered = 0, discarded = 0,
                 evicted_copies = 0, kept_copies = 0;
    } counters_;
};

}  // namespace kvpool
