// The CUDA backend against fake_cuda.cpp: which way the bytes go, and what happens when the device refuses. What only a
// device can show (real ordering, speed) is in tests/gpu.
#include <dlfcn.h>

#include <atomic>

#include "copy_fixtures.h"
#include "fake_cuda.h"

using namespace kvpool;

namespace {

const std::string kOld = FAKE_CUDA_0, k12 = FAKE_CUDA_1, k13 = FAKE_CUDA_2;
constexpr int kOutOfMemory = 2, kIllegalAddress = 700;

FakeCuda* fake(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(handle != nullptr);
    return reinterpret_cast<decltype(&fake_cuda)>(dlsym(handle, "fake_cuda"))();
}

template <class Done>
void until(Done done) {
    for (int i = 0; i < 20'000 && !done(); ++i) std::this_thread::sleep_for(std::chrono::microseconds(500));
    CHECK(done());
}

void populate(const PoolFile& file, bool populated = true) {
    for (uint64_t slab = 0; slab < file.geometry().num_slabs; ++slab) file.slabs()[slab].populated.store(populated);
}

// Eight WRITING slots, KV memory whose sizes suit both ways, and an engine of a "device".
struct Device {
    static constexpr uint32_t kBlocks = 20;
    FakeCuda* cuda;
    Slots slots{8};
    Memory memory;
    std::unique_ptr<CopyEngine> engine;

    explicit Device(CudaWay way, const std::string& library = k13, bool populated = true,
                    const std::vector<uint64_t>& sizes = {4096, 1024, 20480, 48})
        : cuda(fake(library)), memory(kBlocks, sizes, 16) {
        memory.fill(1);
        populate(*slots.file, populated);
        engine = start(way, library);
        until([&] { return engine->backend().describe().find("not calibrated") == std::string::npos; });
        if (populated) until([&] { return engine->backend().registered_bytes() > 0; });
    }
    ~Device() {
        for (const char* symbol : {"cuLaunchKernel", "cuEventRecord", "cuMemHostRegister"}) cuda->fail(symbol, 0, 0);
    }
    std::unique_ptr<CopyEngine> start(CudaWay way, const std::string& library) const {
        return std::make_unique<CopyEngine>(slots.file, cuda_backend(slots.file, memory.regions, {0, way, library}),
                                            256, 1);
    }
    std::vector<CopyStatus> store() { return run(*engine, Direction::kStore, slots.blocks()); }
    std::vector<CopyStatus> load() { return run(*engine, Direction::kLoad, slots.blocks(10)); }
    void round_trip() {
        CHECK(all(store(), CopyStatus::kOk));
        slots.set_all(SlotState::kReady);
        CHECK(all(load(), CopyStatus::kOk));
        for (uint32_t i = 0; i < 8; ++i) CHECK(memory.block(10 + i) == memory.block(i));
    }
    std::string error() const { return engine->backend().error(); }
    bool is_off() const { return engine->backend().describe() == "cuda Fake, switched off"; }
};

}  // namespace

TEST(both_ways_move_the_right_bytes_with_drivers_of_any_age) {
    for (const std::string& library : {kOld, k12, k13}) {
        for (CudaWay way : {CudaWay::kDriver, CudaWay::kStaged, CudaWay::kCalibrated}) {
            Device device(way, library);
            uint64_t launches = device.cuda->calls("cuLaunchKernel"), single = device.cuda->calls("cuMemcpyDtoHAsync");
            device.round_trip();
            CHECK_EQ(device.error(), "");
            if (way == CudaWay::kStaged) CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches + 2);
            if (way == CudaWay::kDriver) CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches);
            if (library != kOld) CHECK_EQ(device.cuda->calls("cuMemcpyDtoHAsync"), single);
        }
    }
}

TEST(a_few_blocks_are_stored_by_the_driver) {
    Device device(CudaWay::kCalibrated);  // where asking for a copy costs as much as making it
    CHECK_EQ(device.engine->backend().describe(), "cuda Fake, loads staged, stores staged (few by the driver)");
    uint64_t launches = device.cuda->calls("cuLaunchKernel");
    CHECK(all(device.store(), CopyStatus::kOk));
    CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches);
    device.slots.set_all(SlotState::kReady);
    CHECK(all(device.load(), CopyStatus::kOk));
    CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches + 1);
    for (uint32_t i = 0; i < 8; ++i) CHECK(device.memory.block(10 + i) == device.memory.block(i));
}

TEST(nothing_is_written_beside_the_blocks) {
    for (CudaWay way : {CudaWay::kDriver, CudaWay::kStaged}) {
        Device device(way);
        Memory before(Device::kBlocks, {4096, 1024, 20480, 48}, 16);
        before.fill(1);
        device.round_trip();
        for (uint32_t block : {8u, 9u, 18u, 19u}) CHECK(device.memory.block(block) == before.block(block));
        for (size_t r = 0; r < before.regions.size(); ++r) {
            uint64_t stride = before.regions[r].stride, bytes = before.regions[r].bytes;
            for (size_t at = 0; at < before.arrays[r].size(); ++at) {
                if (at % stride >= bytes) CHECK_EQ(device.memory.arrays[r][at], before.arrays[r][at]);
            }
        }
        for (SlotRef ref : device.slots.refs) {
            const uint8_t* slot = device.slots.file->payload(ref.slot);
            uint64_t end = 256 + device.memory.block(0).size() + sizeof(ShardTrailer);
            for (uint64_t i = 0; i < 256; ++i) CHECK_EQ(slot[i], 0);
            for (uint64_t i = end; i < kSlotBytes; ++i) CHECK_EQ(slot[i], 0);
        }
    }
}

TEST(fragments_that_touch_in_both_memories_are_one_copy) {
    Slots slots(8);
    populate(*slots.file);
    Bytes kv(20 * 9216);
    for (size_t i = 0; i < kv.size(); ++i) kv[i] = static_cast<uint8_t>(i * 7 + i / 256);
    // Two that touch, a gap of 1 KiB, one more.
    std::vector<Region> regions = {
        {kv.data(), 9216, 2048}, {kv.data() + 2048, 9216, 4096}, {kv.data() + 7168, 9216, 2048}};
    FakeCuda* cuda = fake(k13);
    CopyEngine engine(slots.file, cuda_backend(slots.file, regions, {0, CudaWay::kDriver, k13}), 0, 1);
    until([&] { return engine.backend().registered_bytes() > 0; });
    uint64_t before = cuda->batched();
    CHECK(all(run(engine, Direction::kStore, slots.blocks()), CopyStatus::kOk));
    CHECK_EQ(cuda->batched(), before + 8 * 2);
    for (uint32_t i = 0; i < 8; ++i) {
        const uint8_t* slot = slots.file->payload(i);
        CHECK(std::equal(slot, slot + 6144, kv.data() + i * 9216));
        CHECK(std::equal(slot + 6144, slot + 8192, kv.data() + i * 9216 + 7168));
    }
}

TEST(odd_sizes_go_the_drivers_way) {
    Device device(CudaWay::kStaged, k13, true, {4096, 1000, 24});
    uint64_t launches = device.cuda->calls("cuLaunchKernel");
    device.round_trip();
    CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches);
}

TEST(more_blocks_than_a_buffer_holds) {
    constexpr uint32_t kMany = 1'500;  // of 25 KiB: more than 32 MiB
    Slots slots(8);
    Memory memory(8 + kMany, {4096, 1024, 20480, 48}, 16);
    memory.fill(1);
    populate(*slots.file);
    FakeCuda* cuda = fake(k13);
    CopyEngine engine(slots.file, cuda_backend(slots.file, memory.regions, {0, CudaWay::kStaged, k13}), 256, 1);
    until([&] { return engine.backend().registered_bytes() > 0; });
    CHECK(all(run(engine, Direction::kStore, slots.blocks()), CopyStatus::kOk));
    slots.set_all(SlotState::kReady);
    std::vector<CopyBlock> blocks;
    for (uint32_t i = 0; i < kMany; ++i) blocks.push_back({slots.refs[i % 8], 8 + i});
    uint64_t before = cuda->batched();
    CHECK(all(run(engine, Direction::kLoad, blocks), CopyStatus::kOk));
    CHECK_EQ(cuda->batched(), before + kMany);
    for (uint32_t i = 0; i < kMany; ++i) CHECK(memory.block(8 + i) == memory.block(i % 8));
}

// Slots that one shard each fills, at both sides of a border between what was registered at once.
TEST(slots_that_follow_each_other_are_one_copy_unless_registered_apart) {
    constexpr uint64_t kBig = 1ull << 20;  // as many bytes as a block and its trailer are rounded up to
    Folder folder;
    auto file = std::make_shared<PoolFile>(
        PoolFile::create(folder.pool(), Geometry::derive(192 * kMiB, 64 * kMiB, kBig), 0600));
    populate(*file);
    constexpr uint32_t kFirst = 64 - 12, kCount = 24;
    std::vector<SlotRef> refs;
    for (uint32_t i = 0; i < kCount; ++i) {
        refs.push_back({kFirst + i, 10 + i});
        SlotHeader& slot = file->slots()[kFirst + i];
        slot.store_key(key_of(i));
        slot.length.store(kBig);
        slot.word.store(SlotWord::make(10 + i, SlotState::kWriting));
    }
    for (uint64_t slab : {0, 1}) file->slabs()[slab].slot_bytes.store(kBig);
    CHECK_EQ(file->payload(63) + kBig, file->payload(64));
    Memory memory(2 * kCount, {kBig / 2, kBig / 2 - 48}, 16);
    memory.fill(1);
    FakeCuda* cuda = fake(k13);
    CopyEngine engine(file, cuda_backend(file, memory.regions, {0, CudaWay::kStaged, k13}), 0, 1);
    until([&] { return engine.backend().registered_bytes() == 2 * 64 * kMiB; });
    auto copies = [&](Direction direction, const std::vector<CopyBlock>& blocks) {
        CopyCosts before = engine.backend().costs();
        uint64_t batched = cuda->batched();
        CHECK(all(run(engine, direction, blocks), CopyStatus::kOk));
        CopyCosts now = engine.backend().costs();
        CHECK_EQ(now.copies - before.copies, cuda->batched() - batched);
        CHECK_EQ(now.batches - before.batches, 1u);
        return now.copies - before.copies;
    };
    std::vector<CopyBlock> in_order, backwards;
    for (uint32_t i = 0; i < kCount; ++i) in_order.push_back({refs[i], i});
    for (uint32_t i = 0; i < kCount; ++i) backwards.push_back({refs[kCount - 1 - i], kCount + i});
    CHECK_EQ(copies(Direction::kStore, in_order), 4u);  // 8 MiB at most, of 12 on each side
    for (SlotRef ref : refs) file->slots()[ref.slot].word.store(SlotWord::make(ref.generation, SlotState::kReady));
    CHECK_EQ(copies(Direction::kLoad, backwards), kCount);
    for (uint32_t i = 0; i < kCount; ++i) CHECK(memory.block(i) == memory.block(2 * kCount - 1 - i));
    for (uint32_t i = 0; i < kCount; ++i) in_order[i].block += kCount;
    memory.fill(2);
    CHECK_EQ(copies(Direction::kLoad, in_order), 4u);
    Memory stored(2 * kCount, {kBig / 2, kBig / 2 - 48}, 16);
    stored.fill(1);
    for (uint32_t i = 0; i < kCount; ++i) CHECK(memory.block(kCount + i) == stored.block(i));
}

TEST(a_job_is_shared_out_evenly_in_batches_of_some_size) {
    Slots slots(8);
    populate(*slots.file);
    Memory memory(1, {1 << 20}, 0);
    auto backend = cuda_backend(slots.file, memory.regions, {0, CudaWay::kDriver, k13});
    auto batches = [&](size_t job_blocks) {
        std::vector<size_t> sizes;
        for (size_t first = 0; first < job_blocks; first += sizes.back()) {
            sizes.push_back(std::min(backend->batch_blocks(job_blocks, first), job_blocks - first));
        }
        return sizes;
    };
    using Sizes = std::vector<size_t>;
    CHECK(batches(1) == Sizes{1});
    CHECK(batches(64) == (Sizes{32, 32}));
    CHECK(batches(70) == (Sizes{35, 35}));
    CHECK(batches(1024) == (Sizes{512, 512}));
    CHECK(batches(1040) == (Sizes{130, 260, 260, 260, 130}));
    CHECK(batches(2048) == (Sizes{256, 512, 512, 512, 256}));
}

// The engine gave its memory to the KV cache.
TEST(without_memory_for_a_buffer_the_drivers_way_is_left) {
    fake(k13)->fail("cuMemAlloc", kOutOfMemory, 2);
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuMemAlloc", 0, 0);
    uint64_t launches = device.cuda->calls("cuLaunchKernel");
    device.round_trip();
    CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches);
    CHECK_EQ(device.error(), "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY");
}

TEST(without_a_kernel_the_drivers_way_is_left) {
    fake(k13)->fail("cuModuleLoadData", 1, 2);
    Device device(CudaWay::kStaged);
    device.round_trip();
    CHECK_EQ(device.error(), "cuModuleLoadData: CUDA_ERROR_INVALID_VALUE");
    fake(k13)->fail("cuModuleLoadData", 0, 0);
}

TEST(slabs_that_are_not_registered_are_copied_all_the_same) {
    for (CudaWay way : {CudaWay::kDriver, CudaWay::kStaged}) {
        Device device(way, k13, false);
        uint64_t launches = device.cuda->calls("cuLaunchKernel"), single = device.cuda->calls("cuMemcpyDtoHAsync");
        CHECK(all(device.store(), CopyStatus::kOk));
        CHECK_EQ(device.cuda->calls("cuMemcpyDtoHAsync"), single + 8 * 4);
        CHECK_EQ(device.engine->backend().registered_bytes(), 0u);
        populate(*device.slots.file);
        until([&] { return device.engine->backend().registered_bytes() > 0; });
        device.round_trip();
        CHECK_EQ(device.cuda->calls("cuLaunchKernel"), launches + (way == CudaWay::kStaged ? 2 : 0));
    }
}

TEST(a_refused_registration_is_noted_and_lived_with) {
    Device device(CudaWay::kStaged, k13, false);
    device.cuda->fail("cuMemHostRegister", kOutOfMemory, 1);
    populate(*device.slots.file);
    until([&] { return device.error() == "cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY"; });
    device.round_trip();
    CHECK_EQ(device.engine->backend().registered_bytes(), 0u);
}

TEST(engines_over_one_mapping_share_its_registration) {
    Device device(CudaWay::kStaged);
    size_t ranges = device.cuda->registered();
    std::unique_ptr<CopyEngine> second = device.start(CudaWay::kStaged, k13);
    until([&] { return second->backend().registered_bytes() > 0; });
    CHECK_EQ(device.cuda->registered(), ranges);
    second->close();
    CHECK_EQ(device.cuda->registered(), ranges);
    device.round_trip();
    device.engine->close();
    CHECK_EQ(device.cuda->registered(), ranges - 1);
}

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

TEST(an_order_that_the_device_refuses_is_said_so) {
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuStreamWaitEvent", kOutOfMemory, 1);
    CHECK(!device.engine->order_after_loads(device.cuda->slow_stream));
    CHECK(device.engine->order_after_loads(device.cuda->slow_stream));
    CHECK(device.error().find("cuStreamWaitEvent") == 0);
    device.cuda->fail("cuStreamWaitEvent", kIllegalAddress, 1);
    CHECK(!device.engine->order_after_loads(device.cuda->slow_stream));
    CHECK(device.is_off());
    CHECK(!device.engine->order_after_loads(device.cuda->slow_stream));
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

TEST(a_refusal_fails_the_copy_and_not_the_next) {
    for (const char* symbol : {"cuLaunchKernel", "cuEventRecord"}) {
        Device device(CudaWay::kStaged);
        device.cuda->fail(symbol, kOutOfMemory, 1);
        CHECK(all(device.store(), CopyStatus::kFailed));
        CHECK_EQ(device.error(), std::string(symbol) + ": CUDA_ERROR_OUT_OF_MEMORY");
        CHECK(!device.is_off());
        device.round_trip();
    }
}

TEST(refusals_in_a_row_switch_the_device_off) {
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuLaunchKernel", kOutOfMemory, 1'000);
    uint64_t before = device.cuda->calls("cuLaunchKernel");
    for (int i = 0; i < 5; ++i) CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK_EQ(device.cuda->calls("cuLaunchKernel"), before + 3);
    CHECK(device.is_off());
    CHECK_EQ(device.error(), "cuLaunchKernel: CUDA_ERROR_OUT_OF_MEMORY");
}

TEST(an_error_that_ends_the_context_switches_it_off_at_once) {
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuEventSynchronize", kIllegalAddress, 1);
    CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK(device.is_off());
    CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK_EQ(device.error(), "cuEventSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS");
}

// Nothing may arrive once a job was reported: what was enqueued before the error is waited for.
TEST(a_failed_copy_is_over_when_it_is_reported) {
    Device device(CudaWay::kStaged);
    uint64_t before = device.cuda->calls("cuStreamSynchronize");
    device.cuda->fail("cuLaunchKernel", kOutOfMemory, 1);
    CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK_EQ(device.cuda->calls("cuStreamSynchronize"), before + 1);
}

TEST(a_bad_block_beside_good_ones_is_left_out) {
    Device device(CudaWay::kStaged);
    device.slots.set(device.slots.refs[3], SlotState::kFree);
    std::vector<CopyStatus> status = device.store();
    for (size_t i = 0; i < 8; ++i) CHECK(status[i] == (i == 3 ? CopyStatus::kStale : CopyStatus::kOk));
    device.slots.set_all(SlotState::kReady);
    device.slots.file->payload(5)[300] ^= 1;
    Bytes before = device.memory.block(15);
    status = device.load();
    CHECK(status[5] == CopyStatus::kChecksum && status[4] == CopyStatus::kOk);
    CHECK(device.memory.block(15) == before);
}

// 512 MiB are a batch, and the first is half a one: the job is stopped behind the batches under way.
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
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
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

TEST(a_missing_driver_or_device_is_said_so) {
    Slots slots(1);
    Memory memory(1);
    auto start = [&](const CudaOptions& options) { return cuda_backend(slots.file, memory.regions, options); };
    CHECK_THROWS(std::system_error, start({0, CudaWay::kDriver, "libnone.so.1"}));
    CHECK_THROWS(std::system_error, start({7, CudaWay::kDriver, k13}));
    fake(k13)->fail("cuStreamCreateWithPriority", kOutOfMemory, 1);
    CHECK_THROWS(std::system_error, start({0, CudaWay::kDriver, k13}));
}
