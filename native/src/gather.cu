// Copies blocks between KV memory and registered host memory. scripts/ptx makes gather_ptx.h of this.
//
// One thread block copies one piece at a time (16 KiB, or a fragment where that is shorter), in steps of four
// independent 16-byte accesses a thread. PCIe hides a latency of about 1.5 us at 55 GB/s with 80 KB in flight; 48
// thread blocks keep up to 768 KiB there.
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
static __device__ void copy_blocks(const GatherPiece* pieces, unsigned num_pieces, unsigned num_blocks,
                                   const GatherBlocks& blocks) {
    unsigned total = num_pieces * num_blocks;
    for (unsigned work = blockIdx.x; work < total; work += gridDim.x) {
        unsigned number = work / num_pieces;
        GatherPiece piece = pieces[work - number * num_pieces];
        uint4* kv = reinterpret_cast<uint4*>(piece.kv + blocks.block[number] * piece.stride);
        uint4* shard = reinterpret_cast<uint4*>(blocks.shard[number] + piece.offset);
        copy_piece(kLoad ? kv : shard, kLoad ? shard : kv, static_cast<unsigned>(piece.bytes / sizeof(uint4)));
    }
}

extern "C" __global__ void __launch_bounds__(kGatherThreads)
    kvpool_load(const GatherPiece* pieces, unsigned num_pieces, unsigned num_blocks,
                const __grid_constant__ GatherBlocks blocks) {
    copy_blocks<true>(pieces, num_pieces, num_blocks, blocks);
}

extern "C" __global__ void __launch_bounds__(kGatherThreads)
    kvpool_store(const GatherPiece* pieces, unsigned num_pieces, unsigned num_blocks,
                 const __grid_constant__ GatherBlocks blocks) {
    copy_blocks<false>(pieces, num_pieces, num_blocks, blocks);
}
