// The pitched way, for blocks whose fragments lie equally far apart, as those of vLLM's layers may: the device's copy
// engines fetch them all in one two-dimensional copy, without a kernel. After staged copies each kernel of an engine's
// CUDA graphs begins later, for good, which makes decoding 2 % slower (docs/benchmarks.md); after copies alone it does
// not. Has to be asked for until it is measured with an engine, whose tensors are allocations of their own.
#pragma once

#include <vector>

#include "cuda_driver.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

// `height` fragments of `width` bytes, `pitch` apart in KV memory and `pool_pitch` in a slot.
struct Plane {
    CUdeviceptr base;
    uint64_t block_stride;
    uint64_t in_slot;  // the first one's offset
    uint64_t width, pitch, pool_pitch, height;
};

// The planes of a block, as few as can be: with a tensor for K and V of each layer one, or one of each.
std::vector<Plane> planes_of(const std::vector<Region>& merged);

// Whether they are few and their fragments long enough to be copied at the link's speed.
bool suits_pitched(const std::vector<Plane>& planes);

// For registered memory. Returns the number of copies.
size_t enqueue(const Driver& driver, Direction direction, const std::vector<Plane>& planes,
               const std::vector<BlockShard>& blocks, CUstream stream);

}  // namespace kvpool::cuda
