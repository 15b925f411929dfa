#include "cuda_gather.h"

#include <algorithm>

#include "cuda_handles.h"
#include "gather_ptx.h"

namespace kvpool::cuda {
namespace {

// Reading over PCIe needs many requests in flight, writing does not: with 8 programs a Triton kernel stored at the
// link's speed (51-52 GB/s on an H200) and loaded at 28-39. Fewer leave more of the device to the model.
constexpr unsigned kLoadGrid = 48, kStoreGrid = 16;

std::vector<GatherPiece> cut(const std::vector<Region>& regions) {
    std::vector<GatherPiece> pieces;
    uint64_t offset = 0;
    for (const Region& region : regions) {
        for (uint64_t at = 0; at < region.bytes; at += kGatherPieceBytes) {
            uint64_t bytes = std::min<uint64_t>(region.bytes - at, kGatherPieceBytes);
            pieces.push_back({reinterpret_cast<CUdeviceptr>(region.base) + at, region.stride, offset + at, bytes});
        }
        offset += region.bytes;
    }
    return pieces;
}

}  // namespace

bool Gather::fits(const std::vector<Region>& regions) {
    return std::all_of(regions.begin(), regions.end(), [](const Region& region) {
        return (reinterpret_cast<uintptr_t>(region.base) | region.stride | region.bytes) % 16 == 0;
    });
}

bool Gather::fits(const std::vector<CUdeviceptr>& shards) {
    return std::all_of(shards.begin(), shards.end(), [](CUdeviceptr shard) { return shard % 16 == 0; });
}

Gather::Gather(const Driver& driver, const std::vector<Region>& regions) : driver_(driver) {
    driver_.module_load_data(&module_, kGatherPtx);
    try {
        driver_.module_get_function(&load_, module_, "kvpool_load");
        driver_.module_get_function(&store_, module_, "kvpool_store");
        set_up(regions);
    } catch (...) {
        end();
        throw;
    }
}

void Gather::end() {
    driver_.mem_free.quietly(pieces_);
    driver_.module_unload.quietly(module_);
}

void Gather::set_up(const std::vector<Region>& regions) {
    std::vector<GatherPiece> pieces = cut(regions);
    num_pieces_ = static_cast<unsigned>(pieces.size());
    size_t bytes = pieces.size() * sizeof(GatherPiece);
    driver_.mem_alloc(&pieces_, bytes);
    Stream stream(driver_, 0);
    driver_.memcpy_htod_async(pieces_, pieces.data(), bytes, stream.get());
    // A kernel is loaded when it is launched first, which can wait for the whole device: now, not with the first copy.
    GatherBlocks none{};
    for (CUfunction kernel : {load_, store_}) launch(kernel, 1, 0, none, stream.get());
    driver_.stream_synchronize(stream.get());
}

void Gather::launch(CUfunction kernel, unsigned grid, unsigned num_blocks, GatherBlocks& blocks,
                    CUstream stream) const {
    CUdeviceptr pieces = pieces_;
    unsigned num_pieces = num_pieces_;
    void* arguments[] = {&pieces, &num_pieces, &num_blocks, &blocks};  // copied before the call returns
    driver_.launch_kernel(kernel, grid, 1, 1, kGatherThreads, 1, 1, 0, stream, arguments, nullptr);
}

void Gather::enqueue(Direction direction, const std::vector<BlockShard>& blocks, const std::vector<CUdeviceptr>& shards,
                     CUstream stream) const {
    bool load = direction == Direction::kLoad;
    for (size_t first = 0; first < blocks.size(); first += kGatherBlocks) {
        auto count = static_cast<unsigned>(std::min<size_t>(blocks.size() - first, kGatherBlocks));
        GatherBlocks parameters;
        for (unsigned i = 0; i < count; ++i) {
            parameters.shard[i] = shards[first + i];
            parameters.block[i] = blocks[first + i].block;
        }
        unsigned grid = std::min(load ? kLoadGrid : kStoreGrid, num_pieces_ * count);
        launch(load ? load_ : store_, grid, count, parameters, stream);
    }
}

}  // namespace kvpool::cuda
