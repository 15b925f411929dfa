// What the next daemon makes of the file that an earlier one left.
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include <algorithm>

#include "fixtures.h"
#include "kvpool/leases.h"

using namespace kvpool;

namespace {

SlotHeader& header_of(Pool& pool, SlotRef ref) {
    return pool.owner->file().slots()[ref.slot];
}

void set_state(Pool& pool, SlotRef ref, SlotState state) {
    header_of(pool, ref).word.store(SlotWord::make(ref.generation, state));
}

}  // namespace

TEST(all_that_was_ready_is_ready) {
    for (const char* policy : {"lru", "arc", "s3fifo"}) {
        Pool pool(3, policy);
        uint32_t client = pool.add_client();
        std::vector<SlotRef> refs = pool.store(client, keys_of(0, 50));
        pool.store(client, keys_of(100, 5), nullptr, {0, true});
        std::string id(pool.owner->file().header().fixed.pool_id, 32);
        for (int i = 0; i < 3; ++i) pool.restart(0, policy);
        CHECK_EQ(pool.owner->file().header().epoch.load(), 4u);
        CHECK(id == std::string(pool.owner->file().header().fixed.pool_id, 32));
        std::vector<SlotRef> found = pool.match(keys_of(0, 50));
        CHECK_EQ(found.size(), 50u);
        for (size_t i = 0; i < 50; ++i) CHECK_EQ(found[i].pack(), refs[i].pack());
        CHECK_EQ(pool.stat("pinned"), 5u);
        CHECK_EQ(pool.stat("recovered"), 55u);
        pool.owner->check_integrity();
        // Chains are known again: tails go first.
        for (size_t left = 50; left > 0; --left) {
            CHECK_EQ(pool.match(keys_of(0, 50)).size(), left);
            CHECK_EQ(pool.owner->evict(pool.name_space, 1), 1u);
        }
    }
}

TEST(freed_slots_are_free_again_and_generations_go_on) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 32));
    pool.owner->drop({refs[3], refs[30]});
    pool.restart();
    CHECK_EQ(pool.owner->counts(pool.name_space).free, 2u);
    for (SlotRef ref : pool.store(client, keys_of(100, 2))) {
        CHECK(ref.slot == 3 || ref.slot == 30);
        CHECK_EQ(ref.generation, 2u);
    }
    pool.owner->check_integrity();
}

TEST(a_store_in_flight_is_completed_after_the_restart) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.prepare(client, keys_of(0, 4));
    pool.restart();
    CHECK_EQ(pool.stat("writing"), 4u);
    CHECK(!pool.has(key_of(0)));
    CHECK_EQ(pool.add_client(), client);
    CHECK_EQ(pool.owner->keep_writing(client, {refs[0], refs[1], refs[2]}), 1u);
    CHECK_EQ(pool.owner->complete_store(client, refs), 3u);
    CHECK_EQ(pool.match(keys_of(0, 4)).size(), 3u);
    pool.owner->check_integrity();
}

// Its owner died while there was no daemon; a DMA may have outlived it by a moment.
TEST(a_store_of_the_dead_is_freed_after_the_grace) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    pool.prepare(client, keys_of(0, 4));
    pool.locks.clear();
    pool.restart(100);
    CHECK_EQ(pool.stat("writing"), 4u);
    CHECK(pool.owner->reap_clients(101, 3).empty());
    CHECK(pool.owner->reap_clients(104, 3).empty());
    CHECK_EQ(pool.owner->reap_clients(105, 3).size(), 1u);
    CHECK_EQ(pool.stat("writing"), 0u);
    pool.owner->check_integrity();
}

TEST(a_store_of_nobody_is_freed_at_once) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.prepare(client, keys_of(0, 2));
    header_of(pool, refs[0]).owner.store(77);
    header_of(pool, refs[1]).owner.store(UINT16_MAX);
    pool.restart();
    CHECK_EQ(pool.stat("writing"), 0u);
    CHECK_EQ(pool.stat("discarded"), 2u);
    CHECK_EQ(pool.owner->counts(pool.name_space).free, 32u);
    pool.owner->check_integrity();
}

TEST(leases_go_on_without_a_daemon) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 32));
    PoolFile view = PoolFile::open(pool.folder.pool());
    LeaseTable leases(view, client);
    CHECK(leases.take(refs[0]));
    pool.owner.reset();
    CHECK(leases.take(refs[7]));
    CHECK_EQ(IndexReader(view).find_ready(key_of(9), 0)->slot, refs[9].slot);
    pool.owner = PoolOwner::attach(pool.folder.pool(), 0, "lru");
    CHECK_EQ(pool.owner->evict(pool.name_space, 100), 24u);
    CHECK_EQ(pool.match(keys_of(0, 32)).size(), 8u);
    leases.check_integrity();
}

// The daemon died between its decision and the end of it.
TEST(a_block_on_its_way_out_is_out) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 4));
    PoolFile view = PoolFile::open(pool.folder.pool());
    LeaseTable leases(view, client);
    CHECK(leases.take(refs[3]));
    set_state(pool, refs[2], SlotState::kEvicting);
    set_state(pool, refs[3], SlotState::kEvicting);
    pool.restart();
    CHECK_EQ(pool.match(keys_of(0, 4)).size(), 2u);
    CHECK_EQ(pool.stat("doomed"), 1u);
    pool.owner->check_integrity();
    leases.release(refs[3]);
    pool.owner->expire(0);
    CHECK_EQ(pool.owner->counts(pool.name_space).free, 30u);
}

TEST(a_dropped_block_stays_dropped) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 1));
    PoolFile view = PoolFile::open(pool.folder.pool());
    LeaseTable leases(view, client);
    CHECK(leases.take(refs[0]));
    pool.owner->drop(refs);
    for (int i = 0; i < 2; ++i) {
        pool.restart();
        CHECK(!pool.has(key_of(0)));
        CHECK_EQ(pool.stat("doomed"), 1u);
    }
    leases.release(refs[0]);
    pool.restart();
    CHECK_EQ(pool.owner->counts(pool.name_space).free, 32u);
}

TEST(a_damaged_slot_header_is_no_block) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 8));
    PoolFile view = PoolFile::open(pool.folder.pool());
    LeaseTable leases(view, client);
    CHECK(leases.take(refs[0]));
    header_of(pool, refs[0]).key[2].fetch_xor(1);
    header_of(pool, refs[1]).key[3].fetch_xor(1ull << 63);
    header_of(pool, refs[2]).length.fetch_add(1);
    header_of(pool, refs[3]).expiry_s.store(UINT32_MAX);
    header_of(pool, refs[4]).parent_tag.fetch_xor(1);
    header_of(pool, refs[5]).checksum.fetch_xor(1);
    header_of(pool, refs[6]).flags.store(kFlagPinned);
    header_of(pool, refs[7]).word.fetch_add(1ull << 32);
    pool.restart();
    CHECK_EQ(pool.stat("recovered"), 0u);
    CHECK_EQ(pool.stat("discarded"), 8u);
    CHECK_EQ(pool.stat("doomed"), 1u);
    CHECK_EQ(pool.owner->counts(pool.name_space).free, 31u);
    pool.owner->check_integrity();
}

TEST(a_header_copied_to_another_slot_is_no_block) {
    Pool pool(1);
    std::vector<SlotRef> refs = pool.store(pool.add_client(), keys_of(0, 2));
    SlotHeader &a = header_of(pool, refs[0]), &b = header_of(pool, refs[1]);
    b.store_key(a.load_key());
    b.parent_tag.store(a.parent_tag.load());
    b.checksum.store(a.checksum.load());
    pool.restart();
    CHECK_EQ(pool.stat("recovered"), 1u);
    CHECK_EQ(pool.match(keys_of(0, 1))[0].slot, refs[0].slot);
    pool.owner->check_integrity();
}

TEST(blocks_expire_while_nobody_looks) {
    Pool pool(1);
    uint32_t client = pool.add_client();
    pool.store(client, keys_of(0, 3), nullptr, {100, false});
    pool.store(client, keys_of(10, 3), nullptr, {200, false});
    pool.restart(150);
    CHECK_EQ(pool.stat("ready"), 3u);
    CHECK_EQ(pool.owner->expire(200), 3u);
    pool.owner->check_integrity();
}

TEST(damaged_tables_are_refused) {
    Pool pool(2);
    uint32_t client = pool.add_client();
    pool.store(client, keys_of(0, 4));
    PoolFile view = PoolFile::open(pool.folder.pool());
    view.namespaces()[pool.name_space].active.store(0);
    CHECK_THROWS(PoolFormatError, pool.restart());
    view.namespaces()[pool.name_space].active.store(1);
    view.clients()[client].name_space.store(1'000'000);
    CHECK_THROWS(PoolFormatError, pool.restart());
    view.clients()[client].name_space.store(pool.name_space);
    pool.restart();
    CHECK_EQ(pool.match(keys_of(0, 4)).size(), 4u);
}

TEST(a_namespace_keeps_its_slabs_and_its_name) {
    Pool pool(4);
    uint32_t other = pool.add_namespace(2, 2 * kSlotBytes);
    uint32_t a = pool.add_client("a"), b = pool.add_client("b", other);
    pool.store(a, keys_of(0, 40));
    pool.store(b, keys_of(100, 20));
    pool.restart();
    CHECK_EQ(pool.add_namespace(2, 2 * kSlotBytes), other);
    CHECK_THROWS(std::invalid_argument, pool.add_namespace(2, kSlotBytes));
    CHECK_EQ(pool.match(keys_of(100, 20)).size(), 20u);
    CHECK_EQ(pool.owner->counts(other).slabs, 2u);
    pool.owner->check_integrity();
}

// A daemon that is killed at any moment, over and over.
// ---------------------------------------------

namespace {

// The daemon's process: takes the pool over and does all that it can, as fast as it can.
[[noreturn]] void work_until_killed(const std::string& path, uint32_t client, uint64_t seed, int ready) noexcept {
    Random random(seed);
    auto owner = PoolOwner::attach(path, 0, "arc");
    uint32_t name_space = owner->clients().name_space(client);
    PoolFile& file = owner->file();
    if (write(ready, "!", 1) != 1) _exit(1);
    std::vector<SlotRef> writing;
    for (uint32_t now_s = 1;; ++now_s) {
        uint64_t first = below(random, 12) * 100 + below(random, 20);
        std::vector<BlockKey> keys = keys_of(1'000 + first, 1 + below(random, 12));
        BlockKey parent = key_of(1'000 + first - 1);
        std::vector<uint64_t> packed(keys.size());
        StoreOptions options{below(random, 5) == 0 ? now_s + 3 : 0, false};
        owner->prepare_store(client, keys, &parent, now_s, options, packed.data());
        for (size_t i = 0; i < keys.size(); ++i) {
            SlotRef ref = SlotRef::unpack(packed[i]);
            if (ref.none()) continue;
            Pattern::write(file.payload(ref.slot), kSlotBytes, keys[i], ref.generation);
            writing.push_back(ref);
        }
        if (writing.size() > 8) {
            std::vector<SlotRef> some(writing.begin() + 4, writing.end());
            writing.resize(4);
            owner->complete_store(client, some);
            owner->touch(some);
            if (below(random, 3) == 0) owner->drop({some[below(random, some.size())]});
        }
        if (below(random, 4) == 0) owner->expire(now_s);
        if (below(random, 10) == 0) owner->evict(name_space, 5);
        if (below(random, 50) == 0) owner->clear(std::nullopt, false);
        if (below(random, 20) == 0) owner->keep_writing(client, writing);
    }
}

// Leases what it finds, sees that the bytes are right, and keeps some of the leases.
class Reader {
  public:
    Reader(const std::string& path, uint32_t client)
        : view_(PoolFile::open(path)), index_(view_), leases_(view_, client) {}

    void read(Random& random) {
        BlockKey key = key_of(1'000 + below(random, 12) * 100 + below(random, 32));
        std::optional<SlotRef> ref = index_.find_ready(key, 0);
        if (ref && leases_.take(*ref)) held_.push_back({*ref, key});
        if (held_.size() > 4) release(below(random, held_.size()));
    }
    void check() {
        for (const Held& held : held_) CHECK(fits(held));
        leases_.check_integrity();
    }
    void release_all() {
        while (!held_.empty()) release(0);
    }
    uint64_t reads() const { return reads_; }

  private:
    struct Held {
        SlotRef ref;
        BlockKey key;
    };
    bool fits(const Held& held) const {
        return Pattern::fits(view_.payload(held.ref.slot), kSlotBytes, held.key, held.ref.generation);
    }
    void release(size_t i) {
        CHECK(fits(held_[i]));
        leases_.release(held_[i].ref);
        held_.erase(held_.begin() + static_cast<long>(i));
        ++reads_;
    }
    PoolFile view_;
    IndexReader index_;
    LeaseTable leases_;
    std::vector<Held> held_;
    uint64_t reads_ = 0;
};

// Runs a daemon for a while, reading meanwhile, and kills it.
void run_and_kill(const Pool& pool, uint32_t client, Reader& reader, Random& random) {
    int ready[2];
    if (pipe(ready) != 0) throw_errno("pipe");
    pid_t pid = fork();
    if (pid == 0) work_until_killed(pool.folder.pool(), client, random(), ready[1]);
    close(ready[1]);
    char byte;
    CHECK(read(ready[0], &byte, 1) == 1);
    close(ready[0]);
    timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    long run_us = static_cast<long>(below(random, 15'000)), passed_us = 0;
    while (passed_us < run_us) {
        for (int i = 0; i < 20; ++i) reader.read(random);
        clock_gettime(CLOCK_MONOTONIC, &now);
        passed_us = (now.tv_sec - begin.tv_sec) * 1'000'000 + (now.tv_nsec - begin.tv_nsec) / 1'000;
    }
    kill(pid, SIGKILL);
    int status = 0;
    waitpid(pid, &status, 0);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);  // and not of an error of its own
}

}  // namespace

TEST(a_daemon_killed_at_any_moment) {
    Pool pool(2, "arc");
    uint32_t client = pool.add_client();
    std::vector<BlockKey> pinned = keys_of(0, 10);
    pool.store(client, pinned, nullptr, {0, true});
    pool.owner.reset();
    Reader reader(pool.folder.pool(), client);
    Random random(42);
    for (int round = 0; round < 80; ++round) {
        run_and_kill(pool, client, reader, random);
        reader.check();
        pool.owner = PoolOwner::attach(pool.folder.pool(), 0, "arc");
        pool.owner->check_integrity();
        CHECK_EQ(pool.match(pinned).size(), pinned.size());
        if (round % 4 == 0) {
            // Nothing leaks, whatever was under way.
            reader.release_all();
            pool.owner->keep_writing(client, {});
            pool.owner->clear(std::nullopt, false);
            pool.owner->expire(1);
            CHECK_EQ(pool.owner->counts(pool.name_space).free, pool.owner->counts(pool.name_space).slots - 10);
        }
        pool.owner.reset();
    }
    CHECK(reader.reads() > 100);
}
