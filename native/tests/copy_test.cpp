#include "kvpool/copy.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "copy_fixtures.h"

using namespace kvpool;

namespace {

// Eight blocks of a worker in a pool, written by an engine with that checksum setting.
struct Stored {
    static constexpr uint64_t kOffset = 256;  // another rank's shard lies before ours
    Slots slots{8};
    Memory memory{20};
    std::unique_ptr<CopyEngine> engine;

    explicit Stored(uint32_t checksum, uint32_t reader_checksum) {
        memory.fill(1);
        CopyEngine writer(slots.file, cpu_backend(memory.regions, 2), kOffset, checksum);
        CHECK(all(run(writer, Direction::kStore, slots.blocks()), CopyStatus::kOk));
        slots.set_all(SlotState::kReady);
        engine = std::make_unique<CopyEngine>(slots.file, cpu_backend(memory.regions, 2), kOffset, reader_checksum);
    }
    explicit Stored(uint32_t checksum) : Stored(checksum, checksum) {}
    std::vector<CopyStatus> load() { return run(*engine, Direction::kLoad, slots.blocks(12)); }
    uint8_t* shard(uint32_t slot) { return slots.file->payload(slot) + kOffset; }
    uint64_t payload_bytes() const { return memory.block(0).size(); }
};

}  // namespace

TEST(shards_have_room_for_bytes_and_trailer) {
    CHECK_EQ(CopyEngine::shard_bytes({{nullptr, 0, 248}}), 256u);
    CHECK_EQ(CopyEngine::shard_bytes({{nullptr, 0, 249}}), 512u);
    CHECK_EQ(CopyEngine::shard_bytes({{nullptr, 0, 4096}, {nullptr, 0, 4096}}), 8448u);
}

TEST(scattered_regions_come_back_as_they_were) {
    for (uint32_t checksum : {0u, 1u, 16u}) {
        Stored stored(checksum);
        CHECK(all(stored.load(), CopyStatus::kOk));
        for (uint32_t i = 0; i < 8; ++i) {
            CHECK(stored.memory.block(12 + i) == stored.memory.block(i));
        }
    }
}

TEST(nothing_is_written_beside_the_blocks) {
    Stored stored(1);
    Memory untouched = Memory(20);
    untouched.fill(1);
    CHECK(all(stored.load(), CopyStatus::kOk));
    for (uint32_t block = 8; block < 12; ++block) {
        CHECK(stored.memory.block(block) == untouched.block(block));
    }
    for (size_t r = 0; r < stored.memory.regions.size(); ++r) {
        uint64_t stride = untouched.regions[r].stride, bytes = untouched.regions[r].bytes;
        for (size_t at = 0; at < untouched.arrays[r].size(); ++at) {
            if (at % stride < bytes) continue;
            CHECK_EQ(stored.memory.arrays[r][at], untouched.arrays[r][at]);
        }
    }
    for (uint32_t slot = 0; slot < 8; ++slot) {
        for (uint64_t i = 0; i < Stored::kOffset; ++i) CHECK_EQ(stored.shard(slot)[i - 256], 0);
        uint64_t end = stored.payload_bytes() + sizeof(ShardTrailer);
        for (uint64_t i = end; i < end + 1000; ++i) CHECK_EQ(stored.shard(slot)[i], 0);
    }
}

TEST(a_flipped_bit_is_found_where_all_are_checked) {
    Stored stored(1);
    for (uint32_t slot = 0; slot < 8; ++slot) {
        stored.shard(slot)[slot * stored.payload_bytes() / 8] ^= 4;
    }
    Bytes before = stored.memory.block(12);
    CHECK(all(stored.load(), CopyStatus::kChecksum));
    CHECK(stored.memory.block(12) == before);  // wrong bytes never arrive
}

TEST(samples_are_the_same_on_both_sides) {
    Stored stored(2);
    for (uint32_t slot = 0; slot < 8; ++slot) stored.shard(slot)[9] ^= 1;
    std::vector<CopyStatus> status = stored.load();
    for (uint32_t slot = 0; slot < 8; ++slot) {
        bool checked = key_of(slot).tag() % 2 == 0;
        CHECK(status[slot] == (checked ? CopyStatus::kChecksum : CopyStatus::kOk));
    }
}

TEST(an_overwritten_trailer_is_no_checksum) {
    Stored stored(1);
    for (uint32_t slot = 0; slot < 8; ++slot) {
        uint64_t junk = slot % 2 == 0 ? 0 : 0x1234567812345678;
        std::memcpy(stored.shard(slot) + stored.payload_bytes(), &junk, sizeof(junk));
    }
    CHECK(all(stored.load(), CopyStatus::kChecksum));
}

TEST(engines_with_other_checksum_settings_share_blocks) {
    Stored without(0, 1);  // nothing to compare with, and marked so
    CHECK(all(without.load(), CopyStatus::kOk));
    Stored unasked(1, 0);
    CHECK(all(unasked.load(), CopyStatus::kOk));
}

// The bytes and checksum of an earlier occupant are whole, and still wrong.
TEST(a_shard_of_another_block_is_wrong) {
    Stored stored(1);
    for (SlotRef& ref : stored.slots.refs) {
        ref.generation += 1;
        stored.slots.file->slots()[ref.slot].store_key(key_of(ref.slot + 100));
    }
    stored.slots.set_all(SlotState::kReady);
    CHECK(all(stored.load(), CopyStatus::kChecksum));
}

// As when it has come from another host, byte by byte.
TEST(a_shard_of_the_same_block_is_right_in_any_slot) {
    Stored stored(1);
    for (SlotRef& ref : stored.slots.refs) ref.generation += 1;
    stored.slots.set_all(SlotState::kReady);
    CHECK(all(stored.load(), CopyStatus::kOk));
}

TEST(a_stale_reference_moves_no_byte) {
    Stored stored(1);
    Bytes before = stored.memory.block(12), in_slot(stored.shard(0), stored.shard(0) + 4096);
    auto refused = [&](Direction direction, SlotRef ref) {
        return all(run(*stored.engine, direction, {{ref, 12}}), CopyStatus::kStale);
    };
    SlotRef ref = stored.slots.refs[0];
    CHECK(refused(Direction::kLoad, {0, 0}));
    CHECK(refused(Direction::kLoad, {ref.slot, ref.generation + 1}));
    CHECK(refused(Direction::kLoad, {UINT32_MAX, 1}));
    CHECK(refused(Direction::kStore, ref));  // READY is not for writing
    for (SlotState state : {SlotState::kFree, SlotState::kWriting}) {
        stored.slots.set(ref, state);
        CHECK(refused(Direction::kLoad, ref));
    }
    stored.slots.set(ref, SlotState::kEvicting);
    CHECK(refused(Direction::kStore, ref));
    CHECK(stored.memory.block(12) == before);
    CHECK(std::equal(in_slot.begin(), in_slot.end(), stored.shard(0)));
    // A lease keeps the bytes of a block that was dropped.
    CHECK(all(run(*stored.engine, Direction::kLoad, {{ref, 12}}), CopyStatus::kOk));
}

TEST(a_shard_that_does_not_fit_its_slot_is_not_copied) {
    Slots slots(2);
    Memory memory(2);
    uint64_t shard = CopyEngine::shard_bytes(memory.regions);
    CopyEngine fits(slots.file, cpu_backend(memory.regions, 1), kSlotBytes - shard, 0);
    CHECK(all(run(fits, Direction::kStore, slots.blocks()), CopyStatus::kOk));
    CopyEngine beyond(slots.file, cpu_backend(memory.regions, 1), kSlotBytes - shard + 256, 0);
    CHECK(all(run(beyond, Direction::kStore, slots.blocks()), CopyStatus::kStale));
}

// The slot changes hands while its bytes are being copied. Whether it did is known by the clock only,
// so a few verdicts that came too late to see it are let pass.
TEST(a_block_that_changes_under_the_copy_is_stale) {
    using Clock = std::chrono::steady_clock;
    Slots slots(1);
    slots.file->slabs()[0].slot_bytes.store(2 * kMiB);
    slots.file->slots()[0].length.store(2 * kMiB);
    Memory memory(1, std::vector<uint64_t>(30, 64 << 10));
    CopyEngine engine(slots.file, cpu_backend(memory.regions, 1), 0, 0);
    int stale = 0, overlooked = 0;
    for (int round = 0; round < 60; ++round) {
        slots.set_all(SlotState::kReady);
        Clock::time_point submitted = Clock::now();
        engine.submit(Direction::kLoad, slots.blocks());
        while (Clock::now() - submitted < std::chrono::microseconds(5 * round)) {
        }
        slots.set({0, slots.refs[0].generation + 1}, SlotState::kWriting);
        auto changed = Clock::now() - submitted;
        FinishedCopy finished = wait(engine);
        bool good = finished.status[0] == CopyStatus::kOk;
        stale += !good;
        overlooked += good && std::chrono::nanoseconds(finished.nanoseconds) > changed;
    }
    CHECK(stale > 10);
    CHECK(overlooked < 5);
}

TEST(a_job_is_reported_once) {
    Stored stored(0);
    CHECK(all(stored.load(), CopyStatus::kOk));
    CHECK(stored.engine->poll().empty());
    uint64_t empty = stored.engine->submit(Direction::kLoad, {});
    std::vector<FinishedCopy> finished = stored.engine->poll();
    CHECK_EQ(finished.size(), 1u);
    CHECK_EQ(finished[0].job, empty);
    CHECK(finished[0].status.empty());
}

namespace {

// Loads into blocks that no other job writes.
struct Loads {
    static constexpr uint32_t kBlocks = 300;
    Slots slots{16};
    Memory memory{3 * kBlocks, std::vector<uint64_t>(4, 4096)};
    CopyEngine engine{slots.file, cpu_backend(memory.regions, 2), 0, 0};

    Loads() { slots.set_all(SlotState::kReady); }
    uint64_t submit(uint32_t job = 0) {
        std::vector<CopyBlock> blocks;
        for (uint32_t i = 0; i < kBlocks; ++i) {
            blocks.push_back({slots.refs[i % 16], job * kBlocks + i});
        }
        return engine.submit(Direction::kLoad, blocks);
    }
    // From here on the memory is ours: ThreadSanitizer objects if a worker still writes to it.
    void scribble() {
        for (Bytes& array : memory.arrays) std::memset(array.data(), 1, array.size());
    }
};

}  // namespace

namespace {

// One thread that copies nothing: it notes what it is given, and waits with the first block until `release`.
class Held final : public BlockByBlock {
  public:
    using BlockByBlock::BlockByBlock;
    void wait_for_first() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !given_.empty(); });
    }
    void release() {
        std::lock_guard lock(mutex_);
        released_ = true;
        changed_.notify_all();
    }
    std::vector<Direction> given() {
        std::lock_guard lock(mutex_);
        return given_;
    }

    unsigned threads() const override { return 1; }
    bool serves(unsigned, Direction) const override { return true; }
    bool copy(unsigned, Direction direction, const std::vector<BlockShard>&, const Fence&,
              const std::function<void()>& on_the_way) override {
        on_the_way();
        std::unique_lock lock(mutex_);
        given_.push_back(direction);
        changed_.notify_all();
        changed_.wait(lock, [&] { return released_; });
        return true;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Direction> given_;
    bool released_ = false;
};

}  // namespace

// A request waits for its load, and nobody for a store: of one under way the load waits for the present block only.
TEST(loads_go_before_stores) {
    Loads loads;
    SlotRef writing = loads.slots.refs[1];
    loads.slots.set(writing, SlotState::kWriting);
    auto backend = std::make_unique<Held>(loads.memory.regions);
    Held& held = *backend;
    CopyEngine engine(loads.slots.file, std::move(backend), 0, 0);
    uint64_t store = engine.submit(Direction::kStore, {{writing, 0}, {writing, 1}});
    held.wait_for_first();
    uint64_t load = engine.submit(Direction::kLoad, {{loads.slots.refs[0], 2}});
    held.release();
    CHECK(engine.wait(load, 60'000) && engine.wait(store, 60'000));
    using Directions = std::vector<Direction>;
    CHECK(held.given() == (Directions{Direction::kStore, Direction::kLoad, Direction::kStore}));
    for (const FinishedCopy& finished : engine.poll()) CHECK(all(finished.status, CopyStatus::kOk));
}

TEST(cancel_while_copying) {
    Loads loads;
    for (int round = 0; round < 40; ++round) {
        uint64_t job = loads.submit();
        std::this_thread::sleep_for(std::chrono::microseconds(20 * round));
        loads.engine.cancel(job);
        loads.scribble();
        FinishedCopy finished = wait(loads.engine);
        CHECK_EQ(finished.job, job);
        CHECK_EQ(finished.status.size(), Loads::kBlocks);
        // Blocks are taken in order.
        CHECK(std::is_sorted(finished.status.begin(), finished.status.end()));
        loads.engine.cancel(job);  // finished long ago: nothing happens
        loads.engine.cancel(job + 1000);
        CHECK(loads.engine.poll().empty());
    }
}

TEST(close_ends_jobs_and_reports_them) {
    Loads loads;
    std::vector<uint64_t> jobs;
    for (uint32_t i = 0; i < 3; ++i) jobs.push_back(loads.submit(i));
    loads.engine.close();
    CHECK_EQ(loads.slots.file.use_count(), 1);
    loads.scribble();
    std::vector<FinishedCopy> finished = loads.engine.poll();
    CHECK_EQ(finished.size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
        CHECK_EQ(finished[i].job, jobs[i]);
        CHECK(std::is_sorted(finished[i].status.begin(), finished[i].status.end()));
    }
    CHECK_THROWS(std::runtime_error, loads.submit());
    loads.engine.close();
    CHECK(loads.engine.poll().empty());
}

TEST(an_engine_without_regions_is_refused) {
    CHECK_THROWS(std::invalid_argument, cpu_backend({}, 1));
}
