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

template <class Visit>
void Runs::for_each_run(const std::vector<BlockShard>& blocks, Visit visit) const {
    for (const BlockShard& block : blocks) {
        uint8_t* in_pool = block.bytes;
        for (const Region& region : regions_) {
            visit(reinterpret_cast<CUdeviceptr>(region.base + block.block * region.stride), in_pool, region.bytes);
            in_pool += region.bytes;
        }
    }
}

void Runs::enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const {
    if (driver_.has_batch()) {
        enqueue_batch(direction, blocks, stream);
    } else {
        enqueue_each(direction, blocks, stream);
    }
}

void Runs::enqueue_each(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const {
    for_each_run(blocks, [&](CUdeviceptr kv, uint8_t* in_pool, uint64_t bytes) {
        if (direction == Direction::kStore) {
            driver_.memcpy_dtoh_async(in_pool, kv, bytes, stream);
        } else {
            driver_.memcpy_htod_async(kv, in_pool, bytes, stream);
        }
    });
}

void Runs::enqueue_batch(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const {
    size_t count = blocks.size() * regions_.size();
    std::vector<CUdeviceptr> kv, pool;
    std::vector<size_t> bytes;
    kv.reserve(count);
    pool.reserve(count);
    bytes.reserve(count);
    for_each_run(blocks, [&](CUdeviceptr in_kv, uint8_t* in_pool, uint64_t run_bytes) {
        kv.push_back(in_kv);
        pool.push_back(reinterpret_cast<CUdeviceptr>(in_pool));
        bytes.push_back(run_bytes);
    });
    bool store = direction == Direction::kStore;
    driver_.memcpy_batch_async((store ? pool : kv).data(), (store ? kv : pool).data(), bytes.data(), count, stream);
}

}  // namespace kvpool::cuda
