// The CUDA backend against fake_cuda.cpp: a "device", slots of a pool, and an engine between them. What only a real
// device can show (its ordering, its speed) is in tests/gpu.
#pragma once

#include <dlfcn.h>

#include "copy_fixtures.h"
#include "fake_cuda.h"

namespace kvpool {

inline const std::string kOld = FAKE_CUDA_0, k12 = FAKE_CUDA_1, k13 = FAKE_CUDA_2;
constexpr int kOutOfMemory = 2, kIllegalAddress = 700;

inline FakeCuda* fake(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(handle != nullptr);
    return reinterpret_cast<decltype(&fake_cuda)>(dlsym(handle, "fake_cuda"))();
}

inline void populate(const PoolFile& file, bool populated = true) {
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
        for (const char* symbol : {"cuGraphLaunch", "cuEventRecord", "cuMemHostRegister"}) cuda->fail(symbol, 0, 0);
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
    bool is_off() const {
        CHECK_EQ(engine->backend().is_off(), engine->backend().describe() == "cuda Fake, switched off");
        return engine->backend().is_off();
    }
};

}  // namespace kvpool
