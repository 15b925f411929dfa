// What the host hands to the kernels of gather.cu: plain C, read by both compilers.
#pragma once

// A piece of each block: `bytes` of them at `kv + block * stride` in KV memory, at `offset` in a staged block.
struct GatherPiece {
    unsigned long long kv;
    unsigned long long stride;
    unsigned long long offset;
    unsigned long long bytes;
};

enum { kGatherBlocks = 512, kGatherThreads = 256, kGatherPieceBytes = 16 << 10 };

// Of one launch, as a kernel parameter: parameters are 4 KiB at most, this is 2 KiB.
struct GatherBlocks {
    unsigned long long staged;  // block i of the launch lies at `staged + i * staged_stride`
    unsigned long long staged_stride;
    unsigned int count;
    unsigned int block[kGatherBlocks];
};
