#include "cuda_calibration.h"

#include <time.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_gather.h"
#include "cuda_handles.h"
#include "cuda_runs.h"

namespace kvpool::cuda {
namespace {

constexpr uint64_t kScratchBytes = 32 << 20;  // 0.6 ms at the link's speed
constexpr uint64_t kGap = 256;                // between regions, so that they stay apart
constexpr int kRounds = 3;
// The driver's copies leave the device's processors to the model, so they win while they are nearly as fast and cost
// this process little: 1 ms of processor time a GiB.
constexpr double kNearlyAsFast = 1.05;
constexpr double kCpuSecondsPerByte = 1e-3 / (1 << 30);

struct Cost {
    double seconds = 1e9;
    double cpu_seconds = 1e9;
};

double read_clock(clockid_t clock) {
    timespec now{};
    clock_gettime(clock, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Blocks with the fragments of a layout, in memory of our own.
class Scratch {
  public:
    Scratch(const Driver& driver, const std::vector<Region>& like) : driver_(driver) {
        uint64_t left = kScratchBytes;
        for (const Region& region : like) {
            uint64_t bytes = std::min(region.bytes, left);
            if (bytes > 0) regions.push_back({nullptr, bytes, bytes});
            left -= bytes;
        }
        block_bytes_ = kScratchBytes - left;
        num_blocks_ = kScratchBytes / block_bytes_;
        driver_.mem_alloc(&device_, kScratchBytes + regions.size() * kGap);
        try {
            driver_.mem_host_alloc(&host_, kScratchBytes, kHostPortable | kHostDeviceMap);
            driver_.mem_host_get_device_pointer(&mapped_, host_, 0);
        } catch (...) {
            free();
            throw;
        }
        lay_out();
    }
    ~Scratch() { free(); }
    Scratch(const Scratch&) = delete;

    std::vector<Region> regions;
    std::vector<BlockShard> blocks;
    std::vector<CUdeviceptr> shards;
    uint64_t bytes() const { return num_blocks_ * block_bytes_; }

  private:
    void lay_out() {
        auto* at = reinterpret_cast<uint8_t*>(device_);
        for (Region& region : regions) {
            region.base = at;
            at += num_blocks_ * region.bytes + kGap;
        }
        for (uint64_t block = 0; block < num_blocks_; ++block) {
            blocks.push_back({static_cast<uint8_t*>(host_) + block * block_bytes_, static_cast<uint32_t>(block)});
            shards.push_back(mapped_ + block * block_bytes_);
        }
    }
    void free() {
        driver_.mem_free.quietly(device_);
        if (host_ != nullptr) driver_.mem_free_host.quietly(host_);
    }

    const Driver& driver_;
    uint64_t block_bytes_ = 0, num_blocks_ = 0;
    CUdeviceptr device_ = 0, mapped_ = 0;
    void* host_ = nullptr;
};

template <class Enqueue>
Cost measure(const Driver& driver, const Stream& stream, Enqueue enqueue) {
    Cost best;
    for (int round = 0; round <= kRounds; ++round) {  // the first one warms up
        double begin = read_clock(CLOCK_MONOTONIC), cpu_begin = read_clock(CLOCK_THREAD_CPUTIME_ID);
        enqueue(stream.get());
        double cpu_end = read_clock(CLOCK_THREAD_CPUTIME_ID);
        driver.stream_synchronize(stream.get());
        best.seconds = std::min(best.seconds, read_clock(CLOCK_MONOTONIC) - begin);
        best.cpu_seconds = std::min(best.cpu_seconds, cpu_end - cpu_begin);
    }
    return best;
}

Ways try_out(const Driver& driver, const std::vector<Region>& merged) {
    Scratch scratch(driver, merged);
    Stream stream(driver, 0);
    Gather gather(driver, scratch.regions);
    Runs runs(driver, scratch.regions);
    auto better = [&](Direction direction) {
        Cost by_driver = measure(driver, stream, [&](CUstream s) { runs.enqueue(direction, scratch.blocks, s); });
        Cost by_kernel =
            measure(driver, stream, [&](CUstream s) { gather.enqueue(direction, scratch.blocks, scratch.shards, s); });
        bool fast = by_driver.seconds <= by_kernel.seconds * kNearlyAsFast;
        bool cheap = by_driver.cpu_seconds <= kCpuSecondsPerByte * static_cast<double>(scratch.bytes());
        return fast && cheap ? CudaWay::kDriver : CudaWay::kKernel;
    };
    return {better(Direction::kLoad), better(Direction::kStore)};
}

}  // namespace

Ways calibrate(const Driver& driver, const std::string& device_name, const std::vector<Region>& merged) {
    static std::mutex mutex;
    static std::map<std::pair<std::string, std::vector<uint64_t>>, Ways> known;
    std::pair<std::string, std::vector<uint64_t>> key{device_name, {}};
    for (const Region& region : merged) key.second.push_back(region.bytes);
    std::lock_guard lock(mutex);
    auto found = known.find(key);
    if (found == known.end()) found = known.emplace(key, try_out(driver, merged)).first;
    return found->second;
}

}  // namespace kvpool::cuda
