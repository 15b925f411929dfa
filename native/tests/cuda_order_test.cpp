// Copies come after what was before them on the compute stream, and arrive, end and stop as told.
#include <atomic>

#include "cuda_fixtures.h"

using namespace kvpool;

TEST(a_store_reads_what_the_compute_stream_wrote_before_it) {
    for (bool populated : {true, false}) {
        Device device(CudaWay::kStaged, k13, populated);
        device.cuda->hold(true);
        device.engine->submit(Direction::kStore, device.slots.blocks(), device.cuda->slow_stream);
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(device.engine->poll().empty());
        device.memory.fill(2);  // as the compute stream does
        device.cuda->hold(false);
        CHECK(all(wait(*device.engine).status, CopyStatus::kOk));
        device.slots.set_all(SlotState::kReady);
        CHECK(all(device.load(), CopyStatus::kOk));
        Memory written(Device::kBlocks, {4096, 1024, 20480, 48}, 16);
        written.fill(2);
        for (uint32_t i = 0; i < 8; ++i) CHECK(device.memory.block(10 + i) == written.block(i));
    }
}

TEST(a_load_waits_for_earlier_readers_but_not_for_stores) {
    Device device(CudaWay::kStaged);
    CHECK(all(device.store(), CopyStatus::kOk));
    Bytes before = device.memory.block(19);
    device.cuda->hold(true);
    for (uint32_t i : {1u, 2u, 3u}) {
        device.engine->submit(Direction::kStore, {{device.slots.refs[i], i}}, device.cuda->slow_stream);
    }
    device.slots.set(device.slots.refs[0], SlotState::kReady);
    CHECK(all(run(*device.engine, Direction::kLoad, {{device.slots.refs[0], 18}}), CopyStatus::kOk));
    CHECK(device.memory.block(18) == device.memory.block(0));
    device.engine->submit(Direction::kLoad, {{device.slots.refs[0], 19}}, device.cuda->slow_stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(device.memory.block(19) == before);
    device.cuda->hold(false);
    size_t finished = 0;
    until([&] { return (finished += device.engine->poll().size()) == 4; });
    CHECK(device.memory.block(19) == device.memory.block(0));
}

TEST(a_load_arrives_before_it_has_ended) {
    Device device(CudaWay::kStaged);
    CHECK(all(device.store(), CopyStatus::kOk));
    device.slots.set_all(SlotState::kReady);
    CHECK(device.engine->arriving(10'000).empty());  // nothing to wait for
    device.cuda->hold_ends(true);
    uint64_t job = device.engine->submit(Direction::kLoad, device.slots.blocks(10));
    CHECK(device.engine->arriving(10'000) == std::vector<uint64_t>{job});
    uint64_t orders = device.cuda->calls("cuStreamWaitEvent");
    CHECK(device.engine->order_after_loads(device.cuda->slow_stream));
    CHECK_EQ(device.cuda->calls("cuStreamWaitEvent"), orders + 2);  // one for each thread that loads
    CHECK(!device.engine->wait(job, 20));
    CHECK(device.engine->poll().empty());
    device.cuda->hold_ends(false);
    CHECK(device.engine->wait(job, 10'000));
    CHECK(device.engine->arriving(10'000).empty());
    CHECK(all(wait(*device.engine).status, CopyStatus::kOk));
}

TEST(neither_stores_arrive_nor_loads_with_a_bad_block) {
    Device device(CudaWay::kStaged);
    for (Direction direction : {Direction::kStore, Direction::kLoad}) {
        device.cuda->hold_ends(true);
        uint64_t ends = device.cuda->calls("cuEventSynchronize");
        uint64_t job = device.engine->submit(direction, device.slots.blocks(direction == Direction::kLoad ? 10 : 0));
        until([&] { return device.cuda->calls("cuEventSynchronize") == ends + 1; });
        CHECK(device.engine->arriving().empty());
        device.cuda->hold_ends(false);
        CHECK(device.engine->wait(job, 10'000));
        wait(*device.engine);
        device.slots.set_all(SlotState::kReady);
        device.slots.file->payload(5)[300] ^= 1;
    }
}

TEST(a_load_that_may_not_begin_yet_does_not_stand_still) {
    Device device(CudaWay::kStaged);
    CHECK(all(device.store(), CopyStatus::kOk));
    device.slots.set_all(SlotState::kReady);
    device.cuda->hold(true);
    device.cuda->hold_ends(true);
    device.engine->submit(Direction::kLoad, device.slots.blocks(10), device.cuda->slow_stream);
    for (int i = 0; i < 5; ++i) {
        CHECK_EQ(device.engine->loads_stand_still_ns(), 0u);
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    auto freed = std::chrono::steady_clock::now();
    device.cuda->hold(false);
    until([&] { return device.engine->loads_stand_still_ns() >= 20'000'000; });
    std::chrono::nanoseconds stands_still(device.engine->loads_stand_still_ns());
    CHECK(stands_still <= std::chrono::steady_clock::now() - freed);
    device.cuda->hold_ends(false);
    CHECK(all(wait(*device.engine).status, CopyStatus::kOk));
}

TEST(cancel_waits_for_the_batches_under_way_only) {
    Device device(CudaWay::kStaged);
    CHECK(all(device.store(), CopyStatus::kOk));
    device.slots.set_all(SlotState::kReady);
    size_t batch = (512 << 20) / device.memory.block(0).size() / 2 * 2;
    std::vector<CopyBlock> blocks;
    for (uint32_t i = 0; i < 4 * batch; ++i) {  // no two batches write one block
        blocks.push_back({device.slots.refs[i % 8], static_cast<uint32_t>(4 * ((i + batch / 2) / batch) + i % 4)});
    }
    device.cuda->hold(true);
    uint64_t waits = device.cuda->calls("cuStreamWaitEvent");
    uint64_t job = device.engine->submit(Direction::kLoad, blocks, device.cuda->slow_stream);
    until([&] { return device.cuda->calls("cuStreamWaitEvent") == waits + 2; });
    std::atomic<bool> cancelled{false};
    std::thread canceller([&] {
        device.engine->cancel(job);
        cancelled = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(500));  // it must have begun
    CHECK(!cancelled);
    device.cuda->hold(false);
    canceller.join();
    device.memory.fill(3);  // ours again: a sanitizer objects if a copy is under way
    std::vector<CopyStatus> status = wait(*device.engine).status;
    CHECK(std::is_sorted(status.begin(), status.end()));
    CHECK_EQ(std::count(status.begin(), status.end(), CopyStatus::kOk), static_cast<ptrdiff_t>(batch / 2 + batch));
    CHECK(status.back() == CopyStatus::kCancelled);
}

TEST(close_gives_everything_back) {
    FakeCuda* cuda = fake(k13);
    size_t alive = cuda->alive(), registered = cuda->registered();
    for (CudaWay way : {CudaWay::kDriver, CudaWay::kStaged, CudaWay::kCalibrated}) {
        Device device(way);
        device.round_trip();
        device.engine->close();
        CHECK_EQ(device.engine->backend().registered_bytes(), 0u);
        CHECK_EQ(cuda->registered(), registered);
        CHECK_EQ(device.slots.file.use_count(), 1);
        device.engine->close();
        device.engine.reset();
        CHECK_EQ(cuda->alive(), alive);
    }
}

TEST(close_while_slabs_are_still_being_made) {
    Device device(CudaWay::kStaged, k13, false);
    device.engine->close();
    CHECK(device.engine->poll().empty());
}
