// A worker's KV memory, slots of a pool without a daemon, and waiting for copies between them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "fixtures.h"
#include "kvpool/copy.h"

namespace kvpool {

using Bytes = std::vector<uint8_t>;

// A worker's KV memory: regions of odd sizes, with gaps between blocks.
struct Memory {
    std::vector<Bytes> arrays;
    std::vector<Region> regions;

    explicit Memory(size_t blocks, std::vector<uint64_t> sizes = {4096, 1000, 24, 8192}, uint64_t gap = 40) {
        for (uint64_t bytes : sizes) {
            uint64_t stride = bytes + gap;
            arrays.emplace_back(blocks * stride);
            regions.push_back({arrays.back().data(), stride, bytes});
        }
    }
    void fill(uint64_t seed) {
        Random random(seed);
        for (Bytes& array : arrays) {
            for (size_t at = 0; at < array.size(); at += sizeof(uint64_t)) {
                uint64_t bytes = random();
                std::memcpy(&array[at], &bytes, std::min(sizeof(bytes), array.size() - at));
            }
        }
    }
    Bytes block(uint32_t number) const {
        Bytes all;
        for (const Region& r : regions) {
            const uint8_t* from = r.base + number * r.stride;
            all.insert(all.end(), from, from + r.bytes);
        }
        return all;
    }
};

// A pool of WRITING or READY slots without a daemon: the copies look at slot headers only.
struct Slots {
    Folder folder;
    std::shared_ptr<PoolFile> file;
    std::vector<SlotRef> refs;

    explicit Slots(uint32_t count)
        : file(
              std::make_shared<PoolFile>(PoolFile::create(folder.pool(), Geometry::plan(8 * kMiB, kSlotBytes), 0600))) {
        file->slabs()[0].slot_bytes.store(kSlotBytes);
        file->slabs()[0].num_slots.store(32);
        for (uint32_t slot = 0; slot < count; ++slot) {
            refs.push_back({slot, 10 + slot});
            file->slots()[slot].store_key(key_of(slot));
            file->slots()[slot].length.store(kSlotBytes);
        }
        set_all(SlotState::kWriting);
    }
    void set(SlotRef ref, SlotState state) {
        file->slots()[ref.slot].word.store(SlotWord::make(ref.generation, state));
    }
    void set_all(SlotState state) {
        for (SlotRef ref : refs) set(ref, state);
    }
    std::vector<CopyBlock> blocks(uint32_t first_block = 0) const {
        std::vector<CopyBlock> blocks;
        for (SlotRef ref : refs) blocks.push_back({ref, first_block++});
        return blocks;
    }
};

template <class Done>
void until(Done done) {
    for (int i = 0; i < 20'000 && !done(); ++i) std::this_thread::sleep_for(std::chrono::microseconds(500));
    CHECK(done());
}

// For backends of tests, which say what copying a block is.
class BlockByBlock : public CopyBackend {
  public:
    using CopyBackend::CopyBackend;
    size_t batch_blocks(size_t, size_t) const override { return 1; }
    Fence fence(uint64_t) override { return nullptr; }
    bool order_after_loads(uint64_t) override { return false; }
    void close() override {}
    std::string describe() const override { return "test"; }
    std::string error() const override { return ""; }
    uint64_t registered_bytes() const override { return 0; }
    CopyCosts costs() const override { return {}; }
};

inline FinishedCopy wait(CopyEngine& engine) {
    while (true) {
        std::vector<FinishedCopy> finished = engine.poll();
        if (!finished.empty()) {
            CHECK_EQ(finished.size(), 1u);
            return finished[0];
        }
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

inline std::vector<CopyStatus> run(CopyEngine& engine, Direction direction, std::vector<CopyBlock> blocks) {
    uint64_t job = engine.submit(direction, std::move(blocks));
    FinishedCopy finished = wait(engine);
    CHECK_EQ(finished.job, job);
    return finished.status;
}

inline bool all(const std::vector<CopyStatus>& status, CopyStatus wanted) {
    return !status.empty() && std::all_of(status.begin(), status.end(), [&](CopyStatus s) { return s == wanted; });
}

}  // namespace kvpool
