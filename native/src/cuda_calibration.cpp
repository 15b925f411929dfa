#include "cuda_calibration.h"

#include <time.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_staging.h"
#include "kvpool/copy.h"

namespace kvpool::cuda {
namespace {

constexpr uint64_t kScratchBytes = 32 << 20;  // 0.6 ms at the link's speed
constexpr uint64_t kGap = 256;                // between regions, so that they stay apart
constexpr int kRounds = 3;
// The driver's way needs no memory and nothing of the device's processors, so it wins while it is nearly as fast and
// asking for the copies costs this process little: half of the 1 ms of processor time that a GiB may cost in all.
constexpr double kNearlyAsFast = 1.05;
constexpr double kCpuSecondsPerByte = 0.5e-3 / (1 << 30);

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
    Scratch(const Driver& driver, const std::vector<Region>& like)
        : driver_(driver), device_(driver, kScratchBytes + like.size() * kGap) {
        uint64_t left = kScratchBytes;
        for (const Region& region : like) {
            uint64_t bytes = std::min(region.bytes, left) / 16 * 16;
            if (bytes > 0) regions.push_back({nullptr, bytes, bytes});
            left -= bytes;
        }
        block_bytes = kScratchBytes - left;
        driver_.mem_host_alloc(&host_, kScratchBytes, kHostPortable);
        lay_out(kScratchBytes / block_bytes);
    }
    ~Scratch() { driver_.mem_free_host.quietly(host_); }
    Scratch(const Scratch&) = delete;

    std::vector<Region> regions;
    std::vector<BlockShard> blocks;
    uint64_t block_bytes = 0;

  private:
    void lay_out(uint64_t num_blocks) {
        auto* at = reinterpret_cast<uint8_t*>(device_.get());
        for (Region& region : regions) {
            region.base = at;
            at += num_blocks * region.bytes + kGap;
        }
        for (uint64_t block = 0; block < num_blocks; ++block) {
            blocks.push_back({static_cast<uint8_t*>(host_) + block * block_bytes, static_cast<uint32_t>(block)});
        }
    }

    const Driver& driver_;
    DeviceMemory device_;
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

struct Trial {
    Cost direct, staged;
    uint64_t bytes;

    CudaWay better() const {
        bool cheap = direct.cpu_seconds <= kCpuSecondsPerByte * static_cast<double>(bytes);
        bool fast = direct.seconds <= staged.seconds * kNearlyAsFast;
        return cheap && fast ? CudaWay::kDriver : CudaWay::kStaged;
    }
};

Ways try_out(const Driver& driver, const std::vector<Region>& merged) {
    Scratch scratch(driver, merged);
    Stream stream(driver, 0);
    Gather gather(driver, scratch.regions);
    Staging staging(driver, gather, scratch.block_bytes, CopyEngine::shard_bytes(scratch.regions), nullptr);
    auto trial = [&](Direction direction) {
        Cost direct = measure(driver, stream, [&](CUstream s) {
            enqueue(driver, direction, runs_of(scratch.regions, scratch.blocks), s);
        });
        Cost staged =
            measure(driver, stream, [&](CUstream s) { staging.enqueue(direction, scratch.blocks, s, enqueue); });
        return Trial{direct, staged, scratch.blocks.size() * scratch.block_bytes};
    };
    return {trial(Direction::kLoad).better(), trial(Direction::kStore).better()};
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
