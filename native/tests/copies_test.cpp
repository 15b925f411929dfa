// Copies of what other hosts have go first, but only as long as they are nothing more than that.
#include "kvpool/copies.h"

#include "fixtures.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

constexpr HostId kHost = {1}, kOther = {2};

StoreOptions from(const HostId& host) {
    StoreOptions options;
    options.source = host;
    return options;
}

// 32 slots, a third of them each: blocks of this host that are used again and again, copies, nothing.
struct Fixture {
    Pool pool;
    uint32_t engine;
    std::vector<BlockKey> own = keys_of(1, 10), copies = keys_of(100, 10);

    explicit Fixture(const std::string& policy = "arc") : pool(1, policy), engine(pool.add_client()) {
        store_own();
        pool.store(engine, copies, nullptr, from(kHost));
    }
    void store_own() {  // the oldest of all, and never used again: what any policy would take first
        pool.store(engine, own);
    }
    void use(const std::vector<BlockKey>& keys) { pool.owner->touch(pool.match(keys)); }
    size_t evict(size_t count) {
        size_t gone = pool.owner->evict(pool.name_space, count);
        pool.owner->check_integrity();
        return gone;
    }
    size_t left(const std::vector<BlockKey>& keys) const { return pool.match(keys).size(); }
};

const char* const kPolicies[] = {"lru", "arc", "s3fifo"};

}  // namespace

TEST(copies_that_were_used_once_go_first_and_tail_first) {
    for (const char* policy : kPolicies) {
        Fixture f(policy);
        f.use(f.copies);
        CHECK_EQ(f.evict(4), 4u);
        CHECK_EQ(f.left(f.copies), 6u);
        CHECK_EQ(f.left(f.own), 10u);
        CHECK_EQ(f.evict(8), 8u);
        CHECK_EQ(f.left(f.copies), 0u);
        CHECK_EQ(f.left(f.own), 8u);
        CHECK_EQ(f.pool.stat("evicted_copies"), 10u);
        CHECK_EQ(f.pool.stat("evicted"), 12u);
        CHECK_EQ(f.pool.stat("copies"), 0u);
    }
}

// Who asked for them has not read them yet: they are the newest blocks, as any.
TEST(copies_that_were_not_used_yet_wait_for_their_turn) {
    for (const char* policy : kPolicies) {
        Fixture f(policy);
        CHECK_EQ(f.evict(5), 5u);
        CHECK_EQ(f.left(f.copies), 10u);
        CHECK_EQ(f.left(f.own), 5u);
    }
}

TEST(a_second_use_makes_an_ordinary_block) {
    for (const char* policy : kPolicies) {
        Fixture f(policy);
        f.use(f.copies);
        f.use(keys_of(100, 4));
        CHECK_EQ(f.pool.stat("kept_copies"), 4u);
        CHECK_EQ(f.pool.stat("copies"), 6u);
        CHECK_EQ(f.evict(10), 10u);
        CHECK_EQ(f.left(f.copies), 4u);  // the head of the chain, in demand
        CHECK_EQ(f.left(f.own), 6u);
    }
}

// What comes back soon after it was evicted is in demand here, however often that host has it.
TEST(a_copy_that_has_to_come_again_is_an_ordinary_block) {
    for (const char* policy : {"arc", "s3fifo"}) {
        Fixture f(policy);
        f.use(f.copies);
        f.evict(10);
        f.pool.store(f.engine, f.copies, nullptr, from(kHost));
        CHECK_EQ(f.pool.stat("copies"), 0u);
        CHECK_EQ(f.pool.stat("kept_copies"), 10u);
        f.use(f.copies);
        f.evict(5);
        CHECK_EQ(f.pool.stat("evicted_copies"), 10u);
    }
}

TEST(a_copy_stays_for_what_follows_it_here) {
    Fixture f;
    f.use(f.copies);
    BlockKey last = f.copies.back();
    f.pool.store(f.engine, keys_of(500, 3), &last);
    CHECK_EQ(f.evict(10), 10u);
    CHECK_EQ(f.left(f.own), 0u);
    CHECK_EQ(f.left(f.copies), 10u);
    // That is gone as well: now they are copies and nothing else.
    f.pool.owner->drop(f.pool.match(keys_of(500, 3)));
    f.store_own();
    CHECK_EQ(f.evict(10), 10u);
    CHECK_EQ(f.left(f.own), 10u);
    CHECK_EQ(f.left(f.copies), 0u);
}

TEST(an_aborted_continuation_leaves_copies) {
    Fixture f;
    f.use(f.copies);
    BlockKey last = f.copies.back();
    f.pool.owner->abort_store(f.engine, f.pool.prepare(f.engine, keys_of(500, 3), &last));
    CHECK_EQ(f.evict(5), 5u);
    CHECK_EQ(f.left(f.copies), 5u);
}

TEST(leased_copies_stay) {
    Fixture f;
    f.use(f.copies);
    PoolFile view = PoolFile::open(f.pool.folder.pool());
    LeaseTable leases(view, f.engine);
    std::vector<SlotRef> refs = f.pool.match(f.copies);
    CHECK(leases.take(refs.back()));
    CHECK_EQ(f.evict(3), 3u);
    CHECK_EQ(f.left(f.copies), 10u);
    CHECK_EQ(f.left(f.own), 7u);
    leases.release(refs.back());
    CHECK_EQ(f.evict(3), 3u);
    CHECK_EQ(f.left(f.copies), 7u);
}

// The copy that a chain is continued from must not make room for it.
TEST(a_store_does_not_evict_what_it_continues) {
    Fixture f;
    f.use(f.copies);
    BlockKey last = f.copies.back();
    std::vector<SlotRef> refs = f.pool.store(f.engine, keys_of(500, 20), &last);
    CHECK_EQ(f.left(f.copies), 10u);
    CHECK(!refs.back().none());
    f.pool.owner->check_integrity();
}

TEST(a_source_that_is_gone_leaves_ordinary_blocks) {
    Fixture f;
    f.pool.store(f.engine, keys_of(200, 10), nullptr, from(kOther));
    f.use(f.copies);
    f.use(keys_of(200, 10));
    CHECK_EQ(f.pool.owner->copy_sources().size(), 2u);
    f.pool.owner->forget_source(kHost);
    f.pool.owner->check_integrity();
    CHECK(f.pool.owner->copy_sources() == std::vector<HostId>{kOther});
    CHECK_EQ(f.pool.stat("copies"), 10u);
    CHECK_EQ(f.evict(15), 15u);
    CHECK_EQ(f.left(keys_of(200, 10)), 0u);
    CHECK_EQ(f.left(f.copies), 10u);
    // It comes back, and with it new copies; those of before stay what they are.
    f.pool.store(f.engine, keys_of(300, 5), nullptr, from(kHost));
    f.use(keys_of(300, 5));
    CHECK_EQ(f.pool.stat("copies"), 5u);
    CHECK_EQ(f.evict(5), 5u);
    CHECK_EQ(f.left(f.copies), 10u);
    CHECK_EQ(f.left(keys_of(300, 5)), 0u);
}

// What was made here and has gone to another host is as good as used by who made it, and may go at once.
TEST(blocks_that_another_host_has_by_now_go_first) {
    for (const char* policy : kPolicies) {
        Fixture f(policy);
        std::vector<BlockKey> sent = keys_of(200, 10);
        f.pool.store(f.engine, sent);
        CHECK_EQ(f.pool.owner->mark_copies(sent, kOther), 10u);
        CHECK_EQ(f.pool.stat("copies"), 20u);
        CHECK_EQ(f.evict(4), 4u);
        CHECK_EQ(f.left(sent), 6u);
        f.use(keys_of(200, 2));
        CHECK_EQ(f.pool.stat("kept_copies"), 2u);
        CHECK_EQ(f.evict(6), 6u);
        CHECK_EQ(f.left(sent), 2u);
        CHECK_EQ(f.left(f.own), 8u);
    }
}

TEST(what_cannot_become_a_copy) {
    Fixture f;
    StoreOptions pinned;
    pinned.pin = true;
    f.pool.store(f.engine, keys_of(200, 3), nullptr, pinned);
    f.pool.prepare(f.engine, keys_of(300, 3));
    for (const auto& keys : {keys_of(200, 3), keys_of(300, 3), keys_of(400, 3), f.copies}) {
        CHECK_EQ(f.pool.owner->mark_copies(keys, kOther), 0u);
        f.pool.owner->check_integrity();
    }
    // Those of a source that was forgotten can.
    f.pool.owner->forget_source(kHost);
    CHECK_EQ(f.pool.owner->mark_copies(f.copies, kOther), 10u);
    f.pool.owner->check_integrity();
    CHECK_EQ(f.evict(10), 10u);
    CHECK_EQ(f.left(f.copies), 0u);
}

TEST(pinned_blocks_are_no_copies) {
    Fixture f;
    StoreOptions options = from(kHost);
    options.pin = true;
    f.pool.store(f.engine, keys_of(200, 5), nullptr, options);
    CHECK_EQ(f.pool.stat("copies"), 10u);
    f.pool.owner->check_integrity();
}

TEST(after_a_restart_there_are_no_copies) {
    Fixture f;
    f.use(f.copies);
    f.pool.restart();
    CHECK_EQ(f.pool.stat("copies"), 0u);
    CHECK_EQ(f.left(f.copies), 10u);
    f.pool.owner->check_integrity();
}

TEST(sources_are_numbered_anew_when_their_blocks_have_gone) {
    Copies copies(8);
    for (uint32_t i = 0; i < 100'000; ++i) {
        HostId id{};
        std::memcpy(id.data(), &i, sizeof(i));
        uint16_t number = copies.number_of(id);
        CHECK(number != 0);
        copies.mark(i % 8, number);
        if (i % 3 == 0) copies.forget(id);
        copies.check_integrity(1);
        copies.unmark(i % 8);
    }
    CHECK_EQ(copies.size(), 0u);
    CHECK(copies.sources().empty());
}
