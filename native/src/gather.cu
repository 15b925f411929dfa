// Copies blocks between KV memory and a buffer beside it, where each is one run. scripts/ptx makes gather_ptx.h of this.
//
// One thread block copies one piece (16 KiB, or a fragment where that is shorter) and ends, after a few microseconds: so
// many short ones leave the device to a kernel of higher priority at once. Each thread has four independent 16-byte
// accesses under way.
#include "gather_abi.h"

enum { kUnroll = 4 };

static __device__ void copy_piece(uint4* __restrict__ to, const uint4* __restrict__ from, unsigned vectors) {
    for (unsigned start = threadIdx.x; start < vectors; start += kUnroll * kGatherThreads) {
        uint4 held[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            unsigned at = start + k * kGatherThreads;
            if (at < vectors) held[k] = __ldcs(from + at);
        }
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            unsigned at = start + k * kGatherThreads;
            if (at < vectors) __stcs(to + at, held[k]);
        }
    }
}

template <bool kLoad>
static __device__ void copy_one(const GatherPiece* pieces, unsigned num_pieces, const GatherBlocks& blocks) {
    unsigned number = blockIdx.x / num_pieces;
    if (number >= blocks.count) return;
    GatherPiece piece = pieces[blockIdx.x - number * num_pieces];
    uint4* kv = reinterpret_cast<uint4*>(piece.kv + blocks.block[number] * piece.stride);
    uint4* staged = reinterpret_cast<uint4*>(blocks.staged + number * blocks.staged_stride + piece.offset);
    copy_piece(kLoad ? kv : staged, kLoad ? staged : kv, static_cast<unsigned>(piece.bytes / sizeof(uint4)));
}

extern "C" __global__ void __launch_bounds__(kGatherThreads)
    kvpool_load(const GatherPiece* pieces, unsigned num_pieces, const __grid_constant__ GatherBlocks blocks) {
    copy_one<true>(pieces, num_pieces, blocks);
}

extern "C" __global__ void __launch_bounds__(kGatherThreads)
    kvpool_store(const GatherPiece* pieces, unsigned num_pieces, const __grid_constant__ GatherBlocks blocks) {
    copy_one<false>(pieces, num_pieces, blocks);
}
