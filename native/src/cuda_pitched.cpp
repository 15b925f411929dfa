#include "cuda_pitched.h"

#include <algorithm>

namespace kvpool::cuda {
namespace {

constexpr uint64_t kMaxPitch = (1ull << 31) - 1;  // CU_DEVICE_ATTRIBUTE_MAX_PITCH of all devices so far
constexpr uint64_t kLeastWidth = 8 << 10;         // measured down to there: 50 to 52 of 55 GB/s
constexpr size_t kMostPlanes = 2;

// Whether `plane` has another fragment there now.
bool extend(Plane& plane, const Region& region, uint64_t in_slot) {
    auto base = reinterpret_cast<CUdeviceptr>(region.base);
    if (region.bytes != plane.width || region.stride != plane.block_stride) return false;
    if (plane.height == 1) {
        if (base < plane.base + plane.width || base - plane.base > kMaxPitch) return false;
        plane.pitch = base - plane.base;
        plane.pool_pitch = in_slot - plane.in_slot;
    }
    bool follows = base == plane.base + plane.height * plane.pitch;
    if (!follows || in_slot != plane.in_slot + plane.height * plane.pool_pitch) return false;
    ++plane.height;
    return true;
}

// Of every `step`-th region together.
std::vector<Plane> planes_by(size_t step, const std::vector<Region>& regions) {
    std::vector<uint64_t> in_slot{0};
    for (const Region& region : regions) in_slot.push_back(in_slot.back() + region.bytes);
    std::vector<Plane> planes;
    for (size_t first = 0; first < std::min(step, regions.size()); ++first) {
        for (size_t i = first; i < regions.size(); i += step) {
            const Region& region = regions[i];
            if (i != first && extend(planes.back(), region, in_slot[i])) continue;
            planes.push_back({reinterpret_cast<CUdeviceptr>(region.base), region.stride, in_slot[i], region.bytes,
                              region.bytes, region.bytes, 1});
        }
    }
    return planes;
}

CUmemcpy2D copy_of(Direction direction, const Plane& plane, const BlockShard& block) {
    CUmemcpy2DEnd kv{}, pool{};
    kv.memory_type = kMemoryDevice;
    kv.device = plane.base + block.block * plane.block_stride;
    kv.pitch = plane.pitch;
    pool.memory_type = kMemoryHost;
    pool.host = block.bytes + plane.in_slot;
    pool.pitch = plane.pool_pitch;
    bool store = direction == Direction::kStore;
    return {store ? kv : pool, store ? pool : kv, plane.width, plane.height};
}

}  // namespace

std::vector<Plane> planes_of(const std::vector<Region>& merged) {
    std::vector<Plane> together = planes_by(1, merged), by_kind = planes_by(2, merged);
    return by_kind.size() < together.size() ? by_kind : together;
}

bool suits_pitched(const std::vector<Plane>& planes) {
    auto wide = [](const Plane& plane) { return plane.width >= kLeastWidth; };
    return planes.size() <= kMostPlanes && std::all_of(planes.begin(), planes.end(), wide);
}

size_t enqueue(const Driver& driver, Direction direction, const std::vector<Plane>& planes,
               const std::vector<BlockShard>& blocks, CUstream stream) {
    for (const BlockShard& block : blocks) {
        for (const Plane& plane : planes) {
            CUmemcpy2D copy = copy_of(direction, plane, block);
            driver.memcpy_2d_async(&copy, stream);
        }
    }
    return blocks.size() * planes.size();
}

}  // namespace kvpool::cuda
