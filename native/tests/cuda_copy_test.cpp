// Which way the bytes go to a device and back, in how many copies and batches, and what is registered with it.
#include "cuda_fixtures.h"

using namespace kvpool;

TEST(both_ways_move_the_right_bytes_with_drivers_of_any_age) {
    for (const std::string& library : {kOld, k12, k13}) {
        for (CudaWay way : {CudaWay::kDriver, CudaWay::kStaged, CudaWay::kCalibrated}) {
            Device device(way, library);
            uint64_t launches = device.cuda->calls("cuGraphLaunch"), single = device.cuda->calls("cuMemcpyDtoHAsync");
            device.round_trip();
            CHECK_EQ(device.error(), "");
            if (way == CudaWay::kStaged) CHECK_EQ(device.cuda->calls("cuGraphLaunch"), launches + 2);
            if (way == CudaWay::kDriver) CHECK_EQ(device.cuda->calls("cuGraphLaunch"), launches);
            if (library != kOld) CHECK_EQ(device.cuda->calls("cuMemcpyDtoHAsync"), single);
        }
    }
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
    uint64_t launches = device.cuda->calls("cuGraphLaunch");
    device.round_trip();
    CHECK_EQ(device.cuda->calls("cuGraphLaunch"), launches);
}

TEST(more_blocks_than_a_buffer_holds) {
    constexpr uint32_t kMany = 5'300;  // of 25 KiB, in two batches: each more than 64 MiB
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
    uint64_t before = cuda->batched(), launches = cuda->calls("cuGraphLaunch");
    CHECK(all(run(engine, Direction::kLoad, blocks), CopyStatus::kOk));
    CHECK_EQ(cuda->batched(), before + kMany);
    CHECK_EQ(cuda->calls("cuGraphLaunch"), launches + 2 * (6 + 1));  // of 512 blocks at most
    for (uint32_t i = 0; i < kMany; ++i) CHECK(memory.block(8 + i) == memory.block(i % 8));
}

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
    CHECK(batches(64) == Sizes{64});
    CHECK(batches(140) == (Sizes{70, 70}));
    CHECK(batches(1024) == (Sizes{512, 512}));
    CHECK(batches(1040) == (Sizes{130, 260, 260, 260, 130}));
    CHECK(batches(2048) == (Sizes{256, 512, 512, 512, 256}));
}

TEST(slabs_that_are_not_registered_are_copied_all_the_same) {
    for (CudaWay way : {CudaWay::kDriver, CudaWay::kStaged}) {
        Device device(way, k13, false);
        bool staged = way == CudaWay::kStaged;
        uint64_t launches = device.cuda->calls("cuGraphLaunch");
        uint64_t stores = device.cuda->calls("cuMemcpyDtoHAsync"), loads = device.cuda->calls("cuMemcpyHtoDAsync");
        device.round_trip();
        CHECK_EQ(device.cuda->calls("cuMemcpyDtoHAsync"), stores + 8 * 4);
        CHECK_EQ(device.cuda->calls("cuMemcpyHtoDAsync"), loads + (staged ? 8 : 8 * 4));
        CHECK_EQ(device.cuda->calls("cuGraphLaunch"), launches + (staged ? 1 : 0));
        CHECK_EQ(device.engine->backend().registered_bytes(), 0u);
        populate(*device.slots.file);
        until([&] { return device.engine->backend().registered_bytes() > 0; });
        device.slots.set_all(SlotState::kWriting);
        device.round_trip();
        CHECK_EQ(device.cuda->calls("cuMemcpyDtoHAsync"), stores + 8 * 4);
        CHECK_EQ(device.cuda->calls("cuGraphLaunch"), launches + (staged ? 3 : 0));
    }
}

TEST(blocks_are_copied_before_a_way_is_chosen) {
    Device device(CudaWay::kStaged, k13, false);
    CHECK(all(device.store(), CopyStatus::kOk));
    device.slots.set_all(SlotState::kReady);
    for (uint64_t seed = 2; seed < 30; ++seed) {
        Bytes stored = device.memory.block(7);
        device.memory.fill(seed);
        device.engine = device.start(CudaWay::kStaged, k13);
        CHECK(all(device.load(), CopyStatus::kOk));
        CHECK(device.memory.block(17) == stored);
        device.slots.set_all(SlotState::kWriting);
        CHECK(all(device.store(), CopyStatus::kOk));
        device.slots.set_all(SlotState::kReady);
    }
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
