#include "cuda_staging.h"

#include <algorithm>

namespace kvpool::cuda {
namespace {

// And some trailers. 150 us on the link: no longer is a small copy of the engine's own kept waiting by one of ours.
constexpr uint64_t kRunBytes = (8 << 20) + (64 << 10);

}  // namespace

Staging::Staging(const Driver& driver, const Gather& gather, uint64_t payload_bytes, uint64_t stride,
                 const PoolRegistration* registration)
    : driver_(driver),
      gather_(gather),
      kernel_(gather.kernel()),
      registration_(registration),
      payload_bytes_(payload_bytes),
      stride_(stride),
      room_(std::max<uint64_t>(kStagingBytes / payload_bytes_, 1)),  // as many as in a batch at least
      buffer_(driver, room_ * stride_) {
    gather_.warm_up(kernel_);
}

size_t Staging::enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream,
                        EnqueueRuns* enqueue_runs) const {
    size_t copies = 0;
    for (size_t first = 0; first < blocks.size(); first += room_) {
        auto begin = blocks.begin() + static_cast<ptrdiff_t>(first);
        auto count = static_cast<ptrdiff_t>(std::min<size_t>(room_, blocks.size() - first));
        std::vector<BlockShard> part(begin, begin + count);
        std::vector<Run> staged = runs(part);
        if (direction == Direction::kLoad) enqueue_runs(driver_, direction, staged, stream);
        gather_.enqueue(direction, part, buffer_.get(), stride_, kernel_, stream);
        if (direction == Direction::kStore) enqueue_runs(driver_, direction, staged, stream);
        copies += staged.size();
    }
    return copies;
}

std::vector<Run> Staging::runs(const std::vector<BlockShard>& blocks) const {
    std::vector<Run> runs;
    CUdeviceptr at = buffer_.get();
    for (const BlockShard& block : blocks) {
        if (!runs.empty() && continues(runs.back(), block)) {
            runs.back().bytes += stride_;
        } else {
            runs.push_back({at, block.bytes, payload_bytes_});
        }
        at += stride_;
    }
    return runs;
}

// The gap between the two is the end of the first one's slot: nobody else's bytes.
bool Staging::continues(const Run& run, const BlockShard& next) const {
    if (registration_ == nullptr || run.bytes + stride_ > kRunBytes) return false;
    bool follows = run.pool + run.bytes - payload_bytes_ + stride_ == next.bytes;
    return follows && registration_->covers(run.pool, run.bytes + stride_);
}

}  // namespace kvpool::cuda
