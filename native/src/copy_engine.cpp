#include <algorithm>
#include <chrono>
#include <utility>

#include "kvpool/checksum.h"
#include "kvpool/copy.h"

namespace kvpool {
namespace {

constexpr uint64_t kShardAlign = 256;

uint64_t now_ns() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

uint64_t payload_bytes(const std::vector<Region>& regions) {
    uint64_t bytes = 0;
    for (const Region& region : regions) bytes += region.bytes;
    return bytes;
}

}  // namespace

uint64_t CopyEngine::shard_bytes(const std::vector<Region>& regions) {
    uint64_t bytes = payload_bytes(regions) + sizeof(ShardTrailer);
    return (bytes + kShardAlign - 1) / kShardAlign * kShardAlign;
}

CopyEngine::CopyEngine(std::shared_ptr<PoolFile> file, std::vector<Region> regions, uint64_t shard_offset,
                       uint32_t checksum, unsigned threads)
    : file_(std::move(file)),
      regions_(std::move(regions)),
      payload_bytes_(payload_bytes(regions_)),
      shard_offset_(shard_offset),
      checksum_(checksum) {
    if (regions_.empty()) throw std::invalid_argument("regions: give at least one");
    try {
        for (unsigned i = 0; i < std::max(threads, 1u); ++i) threads_.emplace_back([this] { run(); });
    } catch (...) {
        close();  // the kernel refused a thread: end those that run
        throw;
    }
}

CopyEngine::~CopyEngine() {
    close();
}

uint64_t CopyEngine::submit(Direction direction, std::vector<CopyBlock> blocks) {
    auto job = std::make_shared<Job>();
    job->direction = direction;
    job->status.assign(blocks.size(), CopyStatus::kCancelled);
    job->blocks = std::move(blocks);
    job->started_ns = now_ns();
    std::lock_guard lock(mutex_);
    if (closing_) throw std::runtime_error("the copy engine is closed");
    job->number = ++last_number_;
    jobs_[job->number] = job;
    if (job->blocks.empty()) {
        finish(job);
    } else {
        (direction == Direction::kLoad ? loads_ : stores_).push_back(job);
        work_.notify_all();
    }
    return job->number;
}

std::vector<FinishedCopy> CopyEngine::poll() {
    std::lock_guard lock(mutex_);
    return std::exchange(finished_, {});
}

void CopyEngine::cancel(uint64_t number) {
    std::unique_lock lock(mutex_);
    auto found = jobs_.find(number);
    if (found == jobs_.end()) return;  // finished already
    std::shared_ptr<Job> job = found->second;
    job->next = job->blocks.size();
    idle_.wait(lock, [&] { return job->busy == 0; });
    if (jobs_.count(number) != 0) finish(job);
}

void CopyEngine::close() {
    {
        std::lock_guard lock(mutex_);
        closing_ = true;
        loads_.clear();
        stores_.clear();
        work_.notify_all();
    }
    for (std::thread& thread : threads_) {
        if (thread.joinable()) thread.join();
    }
    std::lock_guard lock(mutex_);
    while (!jobs_.empty()) finish(std::shared_ptr<Job>(jobs_.begin()->second));
}

void CopyEngine::finish(const std::shared_ptr<Job>& job) {
    finished_.push_back({job->number, job->status, now_ns() - job->started_ns});
    jobs_.erase(job->number);
}

std::shared_ptr<CopyEngine::Job> CopyEngine::next_job() {
    for (auto* queue : {&loads_, &stores_}) {
        while (!queue->empty() && queue->front()->next >= queue->front()->blocks.size()) queue->pop_front();
        if (!queue->empty()) return queue->front();
    }
    return nullptr;
}

void CopyEngine::run() {
    std::unique_lock lock(mutex_);
    while (true) {
        std::shared_ptr<Job> job;
        work_.wait(lock, [&] { return closing_ || (job = next_job()) != nullptr; });
        if (closing_) return;
        size_t i = job->next++;
        ++job->busy;
        lock.unlock();
        CopyStatus status = copy(job->direction, job->blocks[i]);
        lock.lock();
        job->status[i] = status;
        if (--job->busy > 0) continue;
        idle_.notify_all();
        if (job->next >= job->blocks.size() && jobs_.count(job->number) != 0) finish(job);
    }
}

CopyStatus CopyEngine::copy(Direction direction, const CopyBlock& block) const {
    SlotState expected = direction == Direction::kStore ? SlotState::kWriting : SlotState::kReady;
    if (block.ref.none() || block.ref.slot >= file_->geometry().num_slots()) return CopyStatus::kStale;
    const SlotHeader& header = file_->slots()[block.ref.slot];
    uint64_t word = SlotWord::make(block.ref.generation, expected);
    // A leased slot may be EVICTING: the bytes stay until the lease ends.
    auto still_ours = [&] {
        uint64_t now = header.word.load(std::memory_order_acquire);
        return now == word ||
               (direction == Direction::kLoad && now == SlotWord::make(block.ref.generation, SlotState::kEvicting));
    };
    if (!still_ours()) return CopyStatus::kStale;
    // Whatever the two sides think of each other's layout, no byte lands behind the slot.
    if (shard_offset_ + payload_bytes_ + sizeof(ShardTrailer) > header.length.load()) return CopyStatus::kStale;
    BlockKey key = header.load_key();
    uint8_t* shard = file_->payload(block.ref.slot) + shard_offset_;
    CopyStatus status = CopyStatus::kOk;
    if (direction == Direction::kStore) {
        store_shard(shard, block.block, block.ref, key);
    } else {
        status = load_shard(shard, block.block, block.ref, key);
    }
    return still_ours() ? status : CopyStatus::kStale;
}

void CopyEngine::store_shard(uint8_t* shard, uint32_t block, SlotRef ref, const BlockKey& key) const {
    uint8_t* to = shard;
    for (const Region& region : regions_) {
        std::memcpy(to, region.base + block * region.stride, region.bytes);
        to += region.bytes;
    }
    ShardTrailer trailer{0, ShardTrailer::kUnchecked};
    // Seeded with the generation: the right bytes of an earlier occupant are wrong bytes.
    if (wants_checksum(key)) trailer = {crc32c(shard, payload_bytes_, ref.generation), ShardTrailer::kChecked};
    std::memcpy(to, &trailer, sizeof(trailer));
}

CopyStatus CopyEngine::load_shard(const uint8_t* shard, uint32_t block, SlotRef ref, const BlockKey& key) const {
    if (wants_checksum(key)) {
        ShardTrailer trailer;
        std::memcpy(&trailer, shard + payload_bytes_, sizeof(trailer));
        bool good = trailer.mark == ShardTrailer::kUnchecked ||
                    (trailer.mark == ShardTrailer::kChecked &&
                     trailer.checksum == crc32c(shard, payload_bytes_, ref.generation));
        if (!good) return CopyStatus::kChecksum;
    }
    const uint8_t* from = shard;
    for (const Region& region : regions_) {
        std::memcpy(region.base + block * region.stride, from, region.bytes);
        from += region.bytes;
    }
    return CopyStatus::kOk;
}

}  // namespace kvpool
