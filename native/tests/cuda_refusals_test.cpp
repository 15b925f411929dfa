// What happens when a device refuses: for want of memory, for once, or for good.
#include "cuda_fixtures.h"

using namespace kvpool;

TEST(without_memory_for_a_buffer_the_drivers_way_is_left) {
    fake(k13)->fail("cuMemAlloc", kOutOfMemory, 2);
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuMemAlloc", 0, 0);
    uint64_t launches = device.cuda->calls("cuGraphLaunch");
    device.round_trip();
    CHECK_EQ(device.cuda->calls("cuGraphLaunch"), launches);
    CHECK_EQ(device.error(), "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY");
}

TEST(without_a_kernel_the_drivers_way_is_left) {
    FakeCuda* cuda = fake(k13);
    for (auto [symbol, suffix] :
         std::vector<std::pair<const char*, std::string>>{{"cuModuleLoadData", ""},
                                                          {"cuGraphCreate", ""},
                                                          {"cuGraphAddKernelNode", "_v2"},
                                                          {"cuGraphInstantiate", "WithFlags"},
                                                          {"cuGraphExecKernelNodeSetParams", "_v2"},
                                                          {"cuGraphLaunch", ""}}) {
        size_t alive = cuda->alive();
        cuda->fail(symbol, 1, 1);
        {
            Device device(CudaWay::kStaged);
            CHECK_EQ(device.engine->backend().describe(), "cuda Fake, loads by the driver, stores by the driver");
            CHECK_EQ(device.error(), symbol + suffix + ": CUDA_ERROR_INVALID_VALUE");
            device.round_trip();
        }
        CHECK_EQ(cuda->alive(), alive);
    }
}

TEST(a_refused_registration_is_noted_and_lived_with) {
    Device device(CudaWay::kStaged, k13, false);
    device.cuda->fail("cuMemHostRegister", kOutOfMemory, 1);
    populate(*device.slots.file);
    until([&] { return device.error() == "cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY"; });
    device.round_trip();
    CHECK_EQ(device.engine->backend().registered_bytes(), 0u);
    CHECK_EQ(device.engine->backend().describe(),
             "cuda Fake, loads staged, stores staged, slower where memory could not be registered");
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

TEST(a_refusal_fails_the_copy_and_not_the_next) {
    for (auto [symbol, suffix] : std::vector<std::pair<const char*, std::string>>{
             {"cuGraphExecKernelNodeSetParams", "_v2"}, {"cuGraphLaunch", ""}, {"cuEventRecord", ""}}) {
        Device device(CudaWay::kStaged);
        device.cuda->fail(symbol, kOutOfMemory, 1);
        CHECK(all(device.store(), CopyStatus::kFailed));
        CHECK_EQ(device.error(), symbol + suffix + ": CUDA_ERROR_OUT_OF_MEMORY");
        CHECK(!device.is_off());
        device.round_trip();
    }
}

TEST(refusals_in_a_row_switch_the_device_off) {
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuGraphLaunch", kOutOfMemory, 1'000);
    uint64_t before = device.cuda->calls("cuGraphLaunch");
    for (int i = 0; i < 5; ++i) CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK_EQ(device.cuda->calls("cuGraphLaunch"), before + 3);
    CHECK(device.is_off());
    CHECK_EQ(device.error(), "cuGraphLaunch: CUDA_ERROR_OUT_OF_MEMORY");
}

TEST(loads_that_succeed_do_not_hide_that_no_store_does) {
    Device device(CudaWay::kStaged);
    CHECK(all(device.store(), CopyStatus::kOk));
    for (int i = 0; i < 3; ++i) {
        CHECK(!device.is_off());
        device.slots.set_all(SlotState::kReady);
        CHECK(all(device.load(), CopyStatus::kOk));
        device.slots.set_all(SlotState::kWriting);
        device.cuda->fail("cuGraphLaunch", kOutOfMemory, 1);
        CHECK(all(device.store(), CopyStatus::kFailed));
    }
    CHECK(device.is_off());
}

TEST(an_error_that_ends_the_context_switches_it_off_at_once) {
    Device device(CudaWay::kStaged);
    device.cuda->fail("cuEventSynchronize", kIllegalAddress, 1);
    CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK(device.is_off());
    CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK_EQ(device.error(), "cuEventSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS");
}

TEST(a_failed_copy_is_over_when_it_is_reported) {
    Device device(CudaWay::kStaged);
    uint64_t before = device.cuda->calls("cuStreamSynchronize");
    device.cuda->fail("cuGraphLaunch", kOutOfMemory, 1);
    CHECK(all(device.store(), CopyStatus::kFailed));
    CHECK_EQ(device.cuda->calls("cuStreamSynchronize"), before + 1);
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
