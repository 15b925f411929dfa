// What the host hands to the kernels of gather.cu: plain C, read by both compilers.
#pragma once

// A piece of each block: `bytes` of them at `kv + block * stride` in KV memory, at `offset` in the shard.
struct GatherPiece {
    unsigned long long kv;
    unsigned long long stride;
    unsigned long long offset;
    unsigned long long bytes;
};

enum { kGatherBlocks = 256, kGatherThreads = 256, kGatherPieceBytes = 16 << 10 };

// The blocks of one launch, as a kernel parameter: parameters are 4 KiB at most, this is 3 KiB.
struct GatherBlocks {
    unsigned long long shard[kGatherBlocks];  // the device's address of the shard in the pool
    unsigned int block[kGatherBlocks];
};
