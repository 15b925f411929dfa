// Several namespaces in one pool: whose slabs are whose.
#include "fixtures.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

// Fills all that a namespace can get.
void fill(Pool& pool, uint32_t client, uint64_t first, size_t count) {
    for (uint64_t i = 0; i < count; ++i) pool.store(client, keys_of(first + i, 1));
    pool.owner->check_integrity();
}

uint64_t slabs_of(const Pool& pool, uint32_t ns) {
    return pool.owner->counts(ns).slabs;
}

}  // namespace

TEST(a_namespace_is_known_by_its_digest) {
    Pool pool(2);
    CHECK_EQ(pool.add_namespace(1), pool.name_space);
    CHECK(pool.add_namespace(2) != pool.name_space);
    CHECK_THROWS(std::invalid_argument, pool.add_namespace(1, kSlotBytes * 2));
    CHECK_THROWS(std::invalid_argument, pool.add_namespace(3, 0));
    CHECK_THROWS(std::invalid_argument, pool.add_namespace(3, kSlabBytes + 1));
    CHECK(pool.add_namespace(3, 2 * kMiB) > 0);
}

TEST(a_newcomer_gets_its_fair_share) {
    Pool pool(6);
    uint32_t second = pool.add_namespace(2, 2 * kSlotBytes);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", second);
    fill(pool, a, 0, 250);
    CHECK_EQ(slabs_of(pool, pool.name_space), 6u);
    fill(pool, b, 10'000, 100);
    CHECK_EQ(slabs_of(pool, second), 3u);
    CHECK_EQ(slabs_of(pool, pool.name_space), 3u);
    CHECK_EQ(pool.stat("slabs_moved"), 3u);
    CHECK_EQ(pool.owner->counts(second).ready, 48u);  // slots twice as large
    fill(pool, a, 20'000, 250);
    CHECK_EQ(slabs_of(pool, second), 3u);
    uint32_t third = pool.add_namespace(3);
    fill(pool, pool.add_client("c", third), 30'000, 100);
    for (uint32_t ns : {pool.name_space, second, third}) CHECK_EQ(slabs_of(pool, ns), 2u);
}

TEST(slabs_in_use_do_not_move) {
    Pool pool(2);
    uint32_t second = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", second);
    LeaseTable leases(pool.owner->file(), a);
    std::vector<SlotRef> first = pool.store(a, keys_of(0, 32)), rest = pool.store(a, keys_of(32, 32));
    CHECK(leases.take(first[5]) && leases.take(rest[5]));
    CHECK(pool.prepare(b, keys_of(100, 1))[0].none());
    CHECK_EQ(pool.match(keys_of(0, 64)).size(), 64u);  // nothing was lost for nothing
    leases.release(first[5]);
    // A search in vain is not repeated at once.
    CHECK(pool.prepare(b, keys_of(100, 1), nullptr, {}, 0)[0].none());
    CHECK(!pool.prepare(b, keys_of(100, 1), nullptr, {}, 1)[0].none());
    CHECK_EQ(slabs_of(pool, second), 1u);
    pool.owner->check_integrity();
}

TEST(pinned_and_unfinished_blocks_hold_their_slab) {
    Pool pool(2);
    uint32_t second = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", second);
    pool.store(a, keys_of(0, 1), nullptr, {0, true});
    pool.store(a, keys_of(1, 31));
    pool.prepare(a, keys_of(32, 1));
    pool.store(a, keys_of(33, 31));
    CHECK_EQ(slabs_of(pool, pool.name_space), 2u);
    CHECK(pool.prepare(b, keys_of(100, 1))[0].none());
    CHECK_EQ(pool.stat("evicted"), 0u);
}

TEST(slabs_that_cannot_move_do_not_hide_those_that_can) {
    Pool pool(24);
    uint32_t second = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", second);
    for (uint64_t slab = 0; slab < 24; ++slab) {
        pool.store(a, keys_of(slab * 100, 1), nullptr, {0, slab != 20});
        pool.store(a, keys_of(slab * 100 + 1, 31));
    }
    CHECK_EQ(slabs_of(pool, pool.name_space), 24u);
    for (uint32_t now_s = 0; now_s < 10; ++now_s) pool.prepare(b, keys_of(10'000, 1), nullptr, {}, now_s);
    CHECK_EQ(slabs_of(pool, second), 1u);
    CHECK_EQ(pool.stat("pinned"), 23u);
    pool.owner->check_integrity();
}

TEST(a_namespace_without_engines_gives_way_in_time) {
    Pool pool(4);
    uint32_t second = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", second);
    fill(pool, a, 0, 200);
    fill(pool, b, 1'000, 200);
    CHECK_EQ(slabs_of(pool, pool.name_space), 2u);
    pool.locks.erase(pool.locks.begin());  // engine a dies
    pool.owner->reap_clients(1'000, 0);
    CHECK_EQ(pool.owner->reap_clients(1'001, 0).size(), 1u);
    pool.prepare(b, keys_of(2'000, 64), nullptr, {}, 1'500);
    CHECK_EQ(slabs_of(pool, second), 2u);  // it may come back soon
    pool.prepare(b, keys_of(3'000, 64), nullptr, {}, 1'700);
    CHECK_EQ(slabs_of(pool, second), 4u);
    CHECK_EQ(slabs_of(pool, pool.name_space), 0u);
    pool.owner->check_integrity();
}

TEST(clear_gives_empty_slabs_back) {
    Pool pool(4);
    uint32_t second = pool.add_namespace(2);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", second);
    fill(pool, a, 0, 200);
    CHECK_EQ(pool.stat("unassigned_slabs"), 0u);
    pool.owner->clear(pool.name_space, true);
    CHECK_EQ(pool.stat("unassigned_slabs"), 4u);
    fill(pool, b, 1'000, 128);
    CHECK_EQ(pool.match(keys_of(1'000, 128)).size(), 128u);
    CHECK_EQ(pool.stat("slabs_moved"), 0u);
}

TEST(a_namespace_that_nobody_uses_ends_with_its_blocks) {
    Pool pool(2);
    uint32_t a = pool.add_client("a");
    pool.store(a, keys_of(0, 4));
    pool.owner->clear(std::nullopt, true);
    CHECK_EQ(pool.owner->file().namespaces()[pool.name_space].active.load(), 1u);  // has an engine
    pool.locks.clear();
    pool.owner->reap_clients(0, 0);
    pool.owner->reap_clients(1, 0);
    pool.owner->clear(std::nullopt, true);
    CHECK_EQ(pool.owner->file().namespaces()[pool.name_space].active.load(), 0u);
    CHECK_THROWS(std::invalid_argument, pool.owner->counts(pool.name_space));
    CHECK_EQ(pool.add_namespace(9), pool.name_space);
    pool.owner->check_integrity();
}

TEST(a_full_table_lets_the_unused_go) {
    Pool pool(2);
    uint32_t a = pool.add_client("a");
    for (uint8_t i = 2; i <= kMaxNamespaces; ++i) pool.add_namespace(i);
    // 63 of them have neither blocks nor engines.
    uint32_t next = pool.add_namespace(200);
    CHECK(next != pool.name_space);
    pool.add_client("b", next);
    pool.store(a, keys_of(0, 4));
    CHECK_EQ(pool.match(keys_of(0, 4)).size(), 4u);
    for (uint8_t i = 100; i < 162; ++i) {
        uint32_t ns = pool.add_namespace(i);
        pool.add_client("c" + std::to_string(i), ns);
    }
    CHECK_THROWS(std::invalid_argument, pool.add_namespace(250));
    pool.owner->check_integrity();
}

TEST(a_full_table_lets_the_longest_idle_go_with_its_blocks) {
    Pool pool(2 * kMaxNamespaces);
    std::vector<uint32_t> places{pool.name_space};
    for (uint8_t i = 2; i <= kMaxNamespaces; ++i) places.push_back(pool.add_namespace(i));
    for (size_t i = 0; i < places.size(); ++i) {
        uint32_t client = pool.add_client("c" + std::to_string(i), places[i]);
        StoreOptions options;
        options.pin = i == 0;
        pool.store(client, keys_of(10 * i, 2), nullptr, options);
    }
    pool.locks.clear();
    pool.owner->reap_clients(0, 0);
    pool.owner->reap_clients(1, 0);
    pool.add_client("back", places[1]);
    CHECK_EQ(pool.add_namespace(200), places[2]);  // the first has pinned blocks, the second an engine
    CHECK(pool.match(keys_of(20, 2)).empty());
    CHECK_EQ(pool.match(keys_of(0, 2)).size(), 2u);
    CHECK_EQ(pool.match(keys_of(10, 2)).size(), 2u);
    pool.owner->check_integrity();
}
