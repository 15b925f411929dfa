#include "cuda_gather.h"

#include <algorithm>

#include "gather_ptx.h"

namespace kvpool::cuda {
namespace {

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

// A launch for `blocks`, which it refers to.
class Launch {
  public:
    Launch(CUdeviceptr pieces, unsigned num_pieces, GatherBlocks& blocks)
        : pieces_(pieces),
          num_pieces_(num_pieces),
          grid_(num_pieces * std::max(blocks.count, 1u)),
          arguments_{&pieces_, &num_pieces_, &blocks} {}
    Launch(const Launch&) = delete;

    CUkernelNodeParams of(CUfunction kernel) {
        return {kernel, grid_, 1, 1, kGatherThreads, 1, 1, 0, arguments_, nullptr, nullptr, nullptr};
    }

  private:
    CUdeviceptr pieces_;
    unsigned num_pieces_, grid_;
    void* arguments_[3];
};

}  // namespace

bool Gather::fits(const std::vector<Region>& regions) {
    return std::all_of(regions.begin(), regions.end(), [](const Region& region) {
        return (reinterpret_cast<uintptr_t>(region.base) | region.stride | region.bytes) % 16 == 0;
    });
}

Gather::Gather(const Driver& driver, const std::vector<Region>& regions)
    : driver_(driver),
      num_pieces_(static_cast<unsigned>(cut(regions).size())),
      pieces_(driver, num_pieces_ * sizeof(GatherPiece)) {
    driver_.module_load_data(&module_, kGatherPtx);
    try {
        driver_.module_get_function(&load_, module_, "kvpool_load");
        driver_.module_get_function(&store_, module_, "kvpool_store");
        upload(cut(regions));
    } catch (...) {
        driver_.module_unload.quietly(module_);
        throw;
    }
}

void Gather::upload(const std::vector<GatherPiece>& pieces) {
    Stream stream(driver_, 0);
    driver_.memcpy_htod_async(pieces_.get(), pieces.data(), pieces.size() * sizeof(GatherPiece), stream.get());
    driver_.stream_synchronize(stream.get());
}

KernelGraph Gather::kernel() const {
    GatherBlocks none{};
    return {driver_, Launch(pieces_.get(), num_pieces_, none).of(load_)};
}

// A kernel is loaded, and a graph uploaded, when it is launched first, which can wait for the whole device: now, not
// with the first copy.
void Gather::warm_up(const KernelGraph& kernel) const {
    Stream stream(driver_, 0);
    GatherBlocks none{};
    Launch launch(pieces_.get(), num_pieces_, none);
    for (CUfunction each : {load_, store_}) kernel.launch(launch.of(each), stream.get());
    driver_.stream_synchronize(stream.get());
}

void Gather::enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUdeviceptr staged, uint64_t stride,
                     const KernelGraph& kernel, CUstream stream) const {
    for (size_t first = 0; first < blocks.size(); first += kGatherBlocks) {
        GatherBlocks parameters{staged + first * stride, stride, 0, {}};
        parameters.count = static_cast<unsigned>(std::min<size_t>(blocks.size() - first, kGatherBlocks));
        for (unsigned i = 0; i < parameters.count; ++i) parameters.block[i] = blocks[first + i].block;
        Launch launch(pieces_.get(), num_pieces_, parameters);
        kernel.launch(launch.of(direction == Direction::kLoad ? load_ : store_), stream);
    }
}

}  // namespace kvpool::cuda
