// Whether loads get on: by batches of loads that end, whatever else does.
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "copy_fixtures.h"

using namespace kvpool;

namespace {

constexpr uint64_t kMs = 1'000'000;

// A thread for each direction; a load's only when the test lets one go.
class SlowLoads final : public BlockByBlock {
  public:
    using BlockByBlock::BlockByBlock;
    void let_go(int blocks) {
        std::lock_guard lock(mutex_);
        may_end_ += blocks;
        changed_.notify_all();
    }

    unsigned threads() const override { return 2; }
    bool serves(unsigned thread, Direction direction) const override {
        return (thread == 0) == (direction == Direction::kLoad);
    }
    bool copy(unsigned, Direction direction, const std::vector<BlockShard>&, const Fence&,
              const std::function<void()>&) override {
        if (direction == Direction::kStore) return true;
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return may_end_ > 0; });
        --may_end_;
        return true;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int may_end_ = 0;
};

// A load of three blocks, none of which has ended.
struct Loading {
    Slots slots{8};
    Memory memory{20};
    SlowLoads* backend = new SlowLoads(memory.regions);
    CopyEngine engine{slots.file, std::unique_ptr<CopyBackend>(backend), 0, 0};

    Loading() {
        for (uint32_t i : {0u, 1u, 2u}) slots.set(slots.refs[i], SlotState::kReady);
        engine.submit(Direction::kLoad, {{slots.refs[0], 10}, {slots.refs[1], 11}, {slots.refs[2], 12}});
    }
    ~Loading() { backend->let_go(1'000); }
    void stand_still(uint64_t ms) {
        until([&] { return engine.loads_stand_still_ns() >= ms * kMs; });
    }
};

}  // namespace

TEST(without_loads_nothing_stands_still) {
    Slots slots(8);
    Memory memory(20);
    CopyEngine engine(slots.file, cpu_backend(memory.regions, 1), 0, 0);
    CHECK_EQ(engine.loads_stand_still_ns(), 0u);
    CHECK(all(run(engine, Direction::kStore, slots.blocks()), CopyStatus::kOk));
    slots.set_all(SlotState::kReady);
    CHECK(all(run(engine, Direction::kLoad, slots.blocks(8)), CopyStatus::kOk));
    CHECK_EQ(engine.loads_stand_still_ns(), 0u);
}

TEST(a_load_gets_on_with_each_batch_that_ends) {
    Loading loading;
    for (int batch = 0; batch < 2; ++batch) {
        loading.stand_still(50);
        auto begun = std::chrono::steady_clock::now();
        loading.backend->let_go(1);
        until([&] {
            std::chrono::nanoseconds stands_still(loading.engine.loads_stand_still_ns());
            return stands_still <= std::chrono::steady_clock::now() - begun;
        });
        CHECK(loading.engine.poll().empty());  // the job goes on
    }
    loading.backend->let_go(1);
    CHECK(all(wait(loading.engine).status, CopyStatus::kOk));
    CHECK_EQ(loading.engine.loads_stand_still_ns(), 0u);
}

TEST(stores_that_end_are_no_progress_of_a_load) {
    Loading loading;
    loading.stand_still(50);
    for (uint32_t i = 3; i < 8; ++i) {
        uint64_t before = loading.engine.loads_stand_still_ns();
        CHECK(all(run(loading.engine, Direction::kStore, {{loading.slots.refs[i], i}}), CopyStatus::kOk));
        CHECK(loading.engine.loads_stand_still_ns() > before);
    }
}

TEST(a_load_that_comes_later_does_not_help_one_that_stands_still) {
    Loading loading;
    loading.stand_still(50);
    loading.engine.submit(Direction::kLoad, {{loading.slots.refs[0], 13}});
    CHECK(loading.engine.loads_stand_still_ns() >= 50 * kMs);
}
