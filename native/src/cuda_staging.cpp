#include "cuda_staging.h"

#include <algorithm>

namespace kvpool::cuda {
namespace {

constexpr uint64_t kBufferBytes = 32 << 20;  // one for each of the backend's threads
constexpr uint64_t kAlign = 256;

}  // namespace

Staging::Staging(const Driver& driver, const Gather& gather, uint64_t payload_bytes)
    : gather_(gather),
      stride_((payload_bytes + kAlign - 1) / kAlign * kAlign),
      room_(std::max<uint64_t>(kBufferBytes / stride_, 1)),
      buffer_(driver, room_ * stride_),
      runs_(driver, {{reinterpret_cast<uint8_t*>(buffer_.get()), stride_, payload_bytes}}) {}

void Staging::enqueue(Direction direction, const std::vector<BlockShard>& blocks, CUstream stream) const {
    for (size_t first = 0; first < blocks.size(); first += room_) {
        size_t count = std::min<size_t>(room_, blocks.size() - first);
        auto begin = blocks.begin() + static_cast<ptrdiff_t>(first);
        std::vector<BlockShard> in_kv(begin, begin + static_cast<ptrdiff_t>(count)), staged = in_kv;
        for (uint32_t i = 0; i < count; ++i) staged[i].block = i;
        if (direction == Direction::kLoad) {
            runs_.enqueue(direction, staged, stream);
            gather_.enqueue(direction, in_kv, buffer_.get(), stride_, stream);
        } else {
            gather_.enqueue(direction, in_kv, buffer_.get(), stride_, stream);
            runs_.enqueue(direction, staged, stream);
        }
    }
}

}  // namespace kvpool::cuda
