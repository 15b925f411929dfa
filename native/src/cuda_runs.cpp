#include "cuda_runs.h"

namespace kvpool::cuda {

std::vector<Region> merge_regions(const std::vector<Region>& regions) {
    std::vector<Region> merged;
    for (const Region& region : regions) {
        if (!merged.empty()) {
            Region& last = merged.back();
            bool touches = last.base + last.bytes == region.base && last.stride == region.stride;
            if (touches && last.bytes + region.bytes <= last.stride) {
                last.bytes += region.bytes;
                continue;
            }
        }
        merged.push_back(region);
    }
    return merged;
}

std::vector<Run> runs_of(const std::vector<Region>& merged, const std::vector<BlockShard>& blocks) {
    std::vector<Run> runs;
    runs.reserve(merged.size() * blocks.size());
    for (const BlockShard& block : blocks) {
        uint8_t* in_pool = block.bytes;
        for (const Region& region : merged) {
            auto in_kv = reinterpret_cast<CUdeviceptr>(region.base + block.block * region.stride);
            runs.push_back({in_kv, in_pool, region.bytes});
            in_pool += region.bytes;
        }
    }
    return runs;
}

void enqueue(const Driver& driver, Direction direction, const std::vector<Run>& runs, CUstream stream) {
    if (!driver.has_batch()) return enqueue_each(driver, direction, runs, stream);
    std::vector<CUdeviceptr> device, pool;
    std::vector<size_t> bytes;
    device.reserve(runs.size());
    pool.reserve(runs.size());
    bytes.reserve(runs.size());
    for (const Run& run : runs) {
        device.push_back(run.device);
        pool.push_back(reinterpret_cast<CUdeviceptr>(run.pool));
        bytes.push_back(run.bytes);
    }
    bool store = direction == Direction::kStore;
    std::vector<CUdeviceptr>&to = store ? pool : device, &from = store ? device : pool;
    driver.memcpy_batch_async(to.data(), from.data(), bytes.data(), runs.size(), stream);
}

void enqueue_each(const Driver& driver, Direction direction, const std::vector<Run>& runs, CUstream stream) {
    for (const Run& run : runs) {
        if (direction == Direction::kStore) {
            driver.memcpy_dtoh_async(run.pool, run.device, run.bytes, stream);
        } else {
            driver.memcpy_htod_async(run.device, run.pool, run.bytes, stream);
        }
    }
}

}  // namespace kvpool::cuda
