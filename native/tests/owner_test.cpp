// The daemon's verbs, one behaviour a test. `owner_random_test.cpp` mixes them.
#include "kvpool/owner.h"

#include <set>

#include "fixtures.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

size_t count_present(const Pool& pool, const std::vector<BlockKey>& keys) {
    size_t present = 0;
    for (const BlockKey& key : keys) present += pool.has(key);
    return present;
}

size_t count_granted(const std::vector<SlotRef>& refs) {
    size_t granted = 0;
    for (SlotRef ref : refs) granted += !ref.none();
    return granted;
}

// Stores `count` blocks one behind the other, in pieces; how many got a slot.
size_t store_in_pieces(Pool& pool, uint32_t client, const std::vector<BlockKey>& keys, size_t piece) {
    size_t stored = 0;
    for (size_t at = 0; at < keys.size(); at += piece) {
        size_t end = std::min(at + piece, keys.size());
        std::vector<BlockKey> part(keys.begin() + static_cast<long>(at), keys.begin() + static_cast<long>(end));
        stored += count_granted(pool.store(client, part, at > 0 ? &keys[at - 1] : nullptr));
    }
    return stored;
}

}  // namespace

TEST(a_block_is_visible_when_it_is_complete) {
    Pool pool(2);
    uint32_t client = pool.add_client();
    std::vector<BlockKey> keys = keys_of(0, 3);
    std::vector<SlotRef> refs = pool.prepare(client, keys);
    CHECK_EQ(count_granted(refs), 3u);
    CHECK_EQ(count_present(pool, keys), 0u);
    CHECK_EQ(pool.stat("writing"), 3u);
    CHECK_EQ(pool.owner->complete_store(client, {refs[0], refs[1]}), 2u);
    CHECK_EQ(pool.match(keys).size(), 2u);
    CHECK_EQ(pool.match(keys)[1].pack(), refs[1].pack());
    CHECK_EQ(pool.owner->complete_store(client, refs), 3u);
    CHECK_EQ(pool.owner->complete_store(client, refs), 3u);  // said twice
    CHECK_EQ(pool.stat("stored"), 3u);
    pool.owner->check_integrity();
}

TEST(only_the_owner_completes_or_aborts) {
    Pool pool(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b");
    std::vector<SlotRef> refs = pool.prepare(a, keys_of(0, 2));
    CHECK_EQ(pool.owner->complete_store(b, refs), 0u);
    CHECK_EQ(pool.owner->abort_store(b, refs), 0u);
    CHECK_EQ(pool.owner->abort_store(a, refs), 2u);
    CHECK_EQ(pool.owner->complete_store(a, refs), 0u);
    CHECK_EQ(pool.stat("writing"), 0u);
    pool.owner->check_integrity();
}

TEST(what_is_there_is_not_stored_again) {
    Pool pool(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b");
    pool.store(a, keys_of(0, 4));
    pool.prepare(a, keys_of(4, 2));
    CHECK_EQ(count_granted(pool.prepare(b, keys_of(0, 8))), 2u);
    CHECK_EQ(pool.stat("duplicates"), 6u);
    std::vector<BlockKey> twice = {key_of(50), key_of(50)};
    CHECK_EQ(count_granted(pool.prepare(a, twice)), 1u);
    pool.owner->check_integrity();
}

TEST(references_from_nowhere_change_nothing) {
    Pool pool(2);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 4));
    std::vector<SlotRef> junk = {{0, 0}, {UINT32_MAX, 1}, {63, 1}, {refs[0].slot, 77}, {40, 1}};
    CHECK_EQ(pool.owner->complete_store(client, junk), 0u);
    CHECK_EQ(pool.owner->abort_store(client, junk), 0u);
    CHECK_EQ(pool.owner->drop(junk), 0u);
    pool.owner->touch(junk);
    CHECK_EQ(pool.owner->keep_writing(client, junk), 0u);
    CHECK_EQ(pool.match(keys_of(0, 4)).size(), 4u);
    CHECK_THROWS(std::invalid_argument, pool.prepare(client + 1, keys_of(9, 1)));
    CHECK_THROWS(std::invalid_argument, pool.prepare(kMaxClients, keys_of(9, 1)));
    CHECK_THROWS(std::invalid_argument, pool.owner->evict(5, 1));
    CHECK_THROWS(std::invalid_argument, pool.owner->evict(kMaxNamespaces, 1));
    CHECK_THROWS(std::invalid_argument, pool.owner->counts(5));
    CHECK_THROWS(std::invalid_argument, pool.add_client("b", 5));
    pool.owner->check_integrity();
}

TEST(a_client_that_says_hello_gives_up_what_it_does_not_name) {
    Pool pool(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b");
    std::vector<SlotRef> refs = pool.prepare(a, keys_of(0, 5));
    pool.prepare(b, keys_of(10, 5));
    CHECK_EQ(pool.owner->keep_writing(a, {refs[1], refs[3]}), 3u);
    CHECK_EQ(pool.stat("writing"), 7u);
    CHECK_EQ(pool.owner->complete_store(a, refs), 2u);
    pool.owner->check_integrity();
}

TEST(room_is_made_of_the_coldest) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    for (uint64_t i = 0; i < 32; ++i) pool.store(client, keys_of(i, 1));
    pool.owner->touch(pool.match(keys_of(0, 1)));
    CHECK_EQ(count_granted(pool.store(client, keys_of(100, 2))), 2u);
    CHECK(pool.has(key_of(0)));
    CHECK(!pool.has(key_of(1)) && !pool.has(key_of(2)) && pool.has(key_of(3)));
    CHECK_EQ(pool.stat("evicted"), 2u);
    pool.owner->check_integrity();
}

TEST(no_room_is_an_answer) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    CHECK_EQ(count_granted(pool.prepare(client, keys_of(0, 40))), 32u);  // all WRITING: none can go
    std::vector<SlotRef> refs = pool.prepare(client, keys_of(38, 4));
    CHECK_EQ(count_granted(refs), 0u);
    CHECK_EQ(pool.stat("no_room"), 12u);
    pool.owner->check_integrity();
}

TEST(leased_and_pinned_blocks_stay) {
    for (const char* policy : {"lru", "arc", "s3fifo"}) {
        Pool pool(1, policy);
        uint32_t client = pool.add_client();
        LeaseTable leases(pool.owner->file(), client);
        for (uint64_t i = 0; i < 10; ++i) CHECK(leases.take(pool.store(client, keys_of(i, 1))[0]));
        pool.store(client, keys_of(10, 10), nullptr, {0, true});
        for (uint64_t i = 1000; i < 1300; ++i) pool.store(client, keys_of(i, 1));
        CHECK_EQ(count_present(pool, keys_of(0, 20)), 20u);
        CHECK_EQ(pool.stat("no_room"), 0u);
        CHECK_EQ(pool.owner->counts(pool.name_space).pinned, 10u);
        CHECK_EQ(pool.owner->evict(pool.name_space, 1000), 12u);
        pool.owner->check_integrity();
    }
}

TEST(eviction_by_hand_works_from_the_start) {
    Pool pool(1);
    pool.store(pool.add_client(), keys_of(0, 32));
    pool.restart();
    CHECK_EQ(pool.owner->evict(pool.name_space, 5), 5u);
    pool.owner->check_integrity();
}

TEST(a_chain_loses_its_tail_first) {
    for (const char* policy : {"lru", "arc", "s3fifo"}) {
        Pool pool(1, policy);
        uint32_t client = pool.add_client();
        std::vector<BlockKey> keys = keys_of(0, 24);
        // Stored in turns, so that the head is the coldest of all.
        CHECK_EQ(store_in_pieces(pool, client, keys, 3), 24u);
        for (size_t left = 24; left > 0; --left) {
            CHECK_EQ(pool.match(keys).size(), left);
            CHECK_EQ(count_present(pool, keys), left);
            CHECK_EQ(pool.owner->evict(pool.name_space, 1), 1u);
        }
        pool.owner->check_integrity();
    }
}

TEST(a_block_that_cannot_go_keeps_those_above_it) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<BlockKey> keys = keys_of(0, 8);
    std::vector<SlotRef> refs = pool.store(client, keys);
    LeaseTable leases(pool.owner->file(), client);
    CHECK(leases.take(refs[5]));
    CHECK_EQ(pool.owner->evict(pool.name_space, 100), 2u);
    CHECK_EQ(pool.match(keys).size(), 6u);
    pool.prepare(client, {key_of(100)}, &keys[5]);  // WRITING: keeps them, too
    leases.release(refs[5]);
    CHECK_EQ(pool.owner->evict(pool.name_space, 100), 0u);
    pool.owner->check_integrity();
}

// A session longer than the part of the room that ARC and S3-FIFO give to new blocks.
TEST(a_long_chain_finds_room_among_the_others) {
    for (const char* policy : {"lru", "arc", "s3fifo"}) {
        Pool pool(8, policy);
        uint32_t client = pool.add_client();
        std::vector<BlockKey> old = keys_of(1000, 256);
        for (const BlockKey& key : old) pool.store(client, {key});
        for (const BlockKey& key : old) pool.owner->touch(pool.match({key}));
        pool.owner->evict(pool.name_space, 1);
        std::vector<BlockKey> session = keys_of(0, 200);
        CHECK_EQ(store_in_pieces(pool, client, session, 5), 200u);
        CHECK_EQ(pool.match(session).size(), 200u);
        CHECK_EQ(pool.stat("no_room"), 0u);
        pool.owner->check_integrity();
    }
}

TEST(a_parent_of_another_namespace_is_none) {
    Pool pool(4);
    uint32_t other = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", other);
    BlockKey parent = key_of(1);
    pool.store(a, {parent});
    pool.store(b, keys_of(100, 3), &parent);
    CHECK_EQ(pool.owner->evict(pool.name_space, 10), 1u);
    CHECK_EQ(pool.match(keys_of(100, 3)).size(), 3u);
    pool.owner->check_integrity();
}

// The children of a block that went wrong find it again when it is stored or used again.
TEST(a_parent_that_comes_back_has_its_children) {
    for (bool by_touch : {false, true}) {
        Pool pool(1);
        uint32_t client = pool.add_client();
        std::vector<BlockKey> keys = keys_of(0, 4);
        std::vector<SlotRef> refs = pool.store(client, keys);
        CHECK_EQ(pool.owner->drop({refs[1]}), 1u);
        CHECK_EQ(pool.match(keys).size(), 1u);
        if (by_touch) {
            pool.store(client, {keys[1]}, &keys[0]);
            pool.owner->touch(pool.match(keys));
        } else {
            CHECK_EQ(count_granted(pool.store(client, keys)), 1u);
        }
        for (size_t left = 4; left > 0; --left) {
            CHECK_EQ(pool.match(keys).size(), left);
            CHECK_EQ(pool.owner->evict(pool.name_space, 1), 1u);
        }
    }
}

TEST(a_block_ends_with_its_time) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    pool.store(client, keys_of(0, 3), nullptr, {100, false});
    pool.store(client, keys_of(10, 3), nullptr, {200, true});
    pool.store(client, keys_of(20, 3));
    CHECK(pool.has(key_of(0), 99) && !pool.has(key_of(0), 100));
    CHECK_EQ(pool.owner->expire(99), 0u);
    CHECK_EQ(pool.owner->expire(100), 3u);
    CHECK_EQ(pool.stat("ready"), 6u);
    CHECK_EQ(pool.owner->expire(1000), 3u);
    CHECK_EQ(pool.stat("pinned"), 0u);
    CHECK_EQ(pool.match(keys_of(20, 3), 5000).size(), 3u);
    pool.owner->check_integrity();
}

TEST(a_slot_outlives_the_time_of_its_last_occupant) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    // Many more than the pool holds, so that notes of evicted blocks pile up and are swept out.
    for (uint64_t i = 0; i < 5'000; ++i) {
        pool.store(client, keys_of(i, 1), nullptr, {static_cast<uint32_t>(1000 + i), false});
    }
    CHECK_EQ(pool.stat("ready"), 32u);
    CHECK_EQ(pool.owner->expire(1000 + 4'967), 0u);
    CHECK_EQ(pool.owner->expire(1000 + 4'980), 13u);
    CHECK_EQ(pool.owner->expire(1000 + 5'000), 19u);
    pool.owner->check_integrity();
}

TEST(a_dropped_block_lingers_only_for_its_lease) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    SlotRef ref = pool.store(client, keys_of(0, 1))[0];
    LeaseTable leases(pool.owner->file(), client), others(pool.owner->file(), client + 1);
    CHECK(leases.take(ref));
    CHECK_EQ(pool.owner->drop({ref}), 1u);
    CHECK_EQ(pool.owner->drop({ref}), 0u);
    CHECK(!pool.has(key_of(0)));
    CHECK(!others.take(ref));  // found before, leased after: too late
    CHECK_EQ(pool.stat("doomed"), 1u);
    pool.owner->check_integrity();
    SlotRef again = pool.store(client, keys_of(0, 1))[0];
    CHECK(again.slot != ref.slot && pool.has(key_of(0)));
    CHECK_EQ(count_granted(pool.store(client, keys_of(100, 31))), 31u);  // 0 has to go for the last
    leases.release(ref);
    pool.owner->expire(0);
    CHECK_EQ(pool.stat("doomed"), 0u);
    CHECK_EQ(pool.owner->counts(pool.name_space).free, 1u);
    pool.owner->check_integrity();
}

TEST(a_dead_client_leaves_nothing_behind) {
    Pool pool(1);
    uint32_t client = pool.add_client("a");
    LeaseTable leases(pool.owner->file(), client);
    std::vector<SlotRef> ready = pool.store(client, keys_of(0, 4));
    for (SlotRef ref : ready) CHECK(leases.take(ref));
    pool.owner->drop({ready[0]});
    pool.prepare(client, keys_of(10, 4));
    pool.locks.clear();
    CHECK(pool.owner->reap_clients(0, 3).empty());
    CHECK_EQ(pool.stat("writing"), 4u);  // not before the grace is over
    CHECK(pool.owner->reap_clients(4, 3) == std::vector<std::string>{"a"});
    CHECK_EQ(pool.stat("writing") + pool.stat("doomed"), 0u);
    CHECK_EQ(pool.stat("ready"), 3u);
    CHECK_EQ(pool.owner->evict(pool.name_space, 10), 3u);
    CHECK_THROWS(std::invalid_argument, pool.prepare(client, keys_of(20, 1)));
    pool.owner->check_integrity();
}

TEST(clear_forgets_what_nobody_leases) {
    Pool pool(4);
    uint32_t other = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", other);
    std::vector<SlotRef> refs = pool.store(a, keys_of(0, 5));
    pool.store(a, keys_of(10, 5), nullptr, {0, true});
    pool.store(b, keys_of(20, 5));
    pool.prepare(a, keys_of(30, 5));
    LeaseTable leases(pool.owner->file(), a);
    CHECK(leases.take(refs[0]));
    CHECK_EQ(pool.owner->clear(pool.name_space, false), 4u);
    CHECK_EQ(pool.owner->clear(pool.name_space, true), 5u);
    CHECK(pool.has(key_of(0)) && pool.has(key_of(20)));
    CHECK_EQ(pool.stat("writing"), 5u);
    leases.release(refs[0]);
    CHECK_EQ(pool.owner->clear(std::nullopt, true), 6u);
    CHECK_EQ(pool.stat("ready"), 0u);
    pool.owner->check_integrity();
}

TEST(policies_are_checked_by_name) {
    Folder folder;
    CHECK_THROWS(std::invalid_argument, PoolOwner::create(folder.pool(), 8 * kMiB, 65536, 0600, "x"));
}

// A walk over all slots in slices finds each READY block once, whatever the slices' size.
TEST(path_to_a_block_begins_at_the_head_of_its_chain) {
    Pool pool(2);
    uint32_t client = pool.add_client();
    std::vector<BlockKey> keys = keys_of(1, 6);
    CHECK_EQ(store_in_pieces(pool, client, keys, 2), 6u);
    for (size_t end = 1; end <= keys.size(); ++end) {
        std::vector<BlockKey> path(keys.begin(), keys.begin() + static_cast<long>(end));
        CHECK(pool.owner->path_to(keys[end - 1]) == path);
    }
    CHECK(pool.owner->path_to(key_of(77)).empty());
    pool.owner->drop({pool.match(keys)[0]});
    CHECK(pool.owner->path_to(keys[5]).empty());
}

TEST(ready_keys_in_slices) {
    Pool pool(3);
    uint32_t engine = pool.add_client();
    pool.store(engine, keys_of(1, 80));  // of 96 slots: the last slab is not full
    uint32_t other = pool.add_client("other", pool.add_namespace(2, 3 * kSlotBytes));
    pool.prepare(other, keys_of(200, 1));  // WRITING, in a slab that had to be given up
    uint64_t ready = pool.stat("ready");
    uint32_t num_slots = static_cast<uint32_t>(pool.owner->file().geometry().num_slots());
    for (uint32_t limit : {1u, 7u, 31u, 32u, 1000u}) {
        std::set<uint64_t> seen;
        for (uint32_t at = 0; at < num_slots;) {
            PoolOwner::ReadyKeys found = pool.owner->ready_keys(at, limit);
            CHECK(found.next > at && found.keys.size() <= limit);
            for (const BlockKey& key : found.keys) {
                CHECK_EQ(found.name_space, pool.name_space);
                CHECK(pool.has(key) && seen.insert(key.hash()).second);
            }
            at = found.next;
        }
        CHECK_EQ(seen.size(), ready);
    }
    CHECK_THROWS(std::invalid_argument, pool.owner->ready_keys(num_slots, 1));
    CHECK_THROWS(std::invalid_argument, pool.owner->ready_keys(0, 0));
}
