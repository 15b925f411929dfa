// Copies by the processor: KV memory is ordinary memory here.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kvpool/copy_backend.h"
#include "kvpool/stream_copy.h"

namespace kvpool {
namespace {

uint64_t sum_bytes(const std::vector<Region>& regions) {
    uint64_t bytes = 0;
    for (const Region& region : regions) bytes += region.bytes;
    return bytes;
}

class CpuBackend final : public CopyBackend {
  public:
    CpuBackend(std::vector<Region> regions, unsigned threads)
        : CopyBackend(std::move(regions)), threads_(std::max(threads, 1u)) {}

    unsigned threads() const override { return threads_; }
    bool serves(unsigned, Direction) const override { return true; }
    size_t batch_blocks(size_t, size_t) const override { return 1; }  // a thread that is done takes the next
    Fence fence(uint64_t) override { return nullptr; }
    bool order_after_loads(uint64_t) override { return false; }
    bool copy(unsigned, Direction direction, const std::vector<BlockShard>& shards, const Fence&,
              const std::function<void()>& on_the_way) override {
        on_the_way();
        for (const BlockShard& shard : shards) move(direction, shard);
        return true;
    }
    void close() override {}
    std::string describe() const override { return "cpu"; }
    std::string error() const override { return ""; }
    uint64_t registered_bytes() const override { return 0; }
    CopyCosts costs() const override { return {}; }  // copying is all that it does

  private:
    void move(Direction direction, const BlockShard& shard) const {
        uint8_t* in_slot = shard.bytes;
        for (const Region& region : regions()) {
            uint8_t* in_kv = region.base + shard.block * region.stride;
            if (direction == Direction::kStore) {
                stream_copy(in_slot, in_kv, region.bytes);
            } else {
                stream_copy(in_kv, in_slot, region.bytes);
            }
            in_slot += region.bytes;
        }
    }

    unsigned threads_;
};

}  // namespace

CopyBackend::CopyBackend(std::vector<Region> regions)
    : regions_(std::move(regions)), payload_bytes_(sum_bytes(regions_)) {
    if (payload_bytes_ == 0) throw std::invalid_argument("regions: give at least one");
}

std::unique_ptr<CopyBackend> cpu_backend(std::vector<Region> regions, unsigned threads) {
    return std::make_unique<CpuBackend>(std::move(regions), threads);
}

}  // namespace kvpool
