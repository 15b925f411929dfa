#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "kvpool/checksum.h"
#include "kvpool/copy.h"

namespace kvpool {
namespace {

constexpr uint64_t kShardAlign = 256;

uint64_t now_ns() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

}  // namespace

uint64_t CopyEngine::shard_bytes(const std::vector<Region>& regions) {
    uint64_t bytes = sizeof(ShardTrailer);
    for (const Region& region : regions) bytes += region.bytes;
    return (bytes + kShardAlign - 1) / kShardAlign * kShardAlign;
}

CopyEngine::CopyEngine(std::shared_ptr<PoolFile> file, std::unique_ptr<CopyBackend> backend, uint64_t shard_offset,
                       uint32_t checksum)
    : file_(std::move(file)),
      backend_(std::move(backend)),
      payload_bytes_(backend_->payload_bytes()),
      shard_offset_(shard_offset),
      checksum_(checksum) {
    try {
        for (unsigned i = 0; i < backend_->threads(); ++i) threads_.emplace_back([this, i] { run(i); });
    } catch (...) {
        close();  // the kernel refused a thread: end those that run
        throw;
    }
}

CopyEngine::~CopyEngine() {
    close();
}

uint64_t CopyEngine::submit(Direction direction, std::vector<CopyBlock> blocks, uint64_t stream) {
    auto job = std::make_shared<Job>();
    job->direction = direction;
    job->fence = backend_->fence(stream);
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

std::vector<uint64_t> CopyEngine::arriving(uint64_t milliseconds) {
    std::unique_lock lock(mutex_);
    std::vector<uint64_t> numbers;
    auto told = [&] {
        return !(numbers = arriving_loads()).empty() || !finished_.empty() || first_load() == jobs_.end();
    };
    idle_.wait_for(lock, std::chrono::milliseconds(milliseconds), told);
    return numbers;
}

CopyEngine::Jobs::const_iterator CopyEngine::first_load() const {
    auto loads = [](const auto& job) { return job.second->direction == Direction::kLoad; };
    return std::find_if(jobs_.begin(), jobs_.end(), loads);
}

uint64_t CopyEngine::loads_stand_still_ns() {
    std::unique_lock lock(mutex_);
    auto oldest = first_load();
    if (oldest == jobs_.end()) return 0;
    std::shared_ptr<Job> job = oldest->second;
    if (job->free_ns != 0) return now_ns() - std::max(job->free_ns, load_progress_ns_);
    Fence fence = job->fence;
    lock.unlock();  // a driver may take its time to answer
    if (backend_->has_passed(fence)) job->free_ns = now_ns();
    return 0;
}

std::vector<uint64_t> CopyEngine::arriving_loads() const {
    std::vector<uint64_t> numbers;
    for (const auto& [number, job] : jobs_) {
        bool arriving = job->on_the_way == job->blocks.size() && job->good;
        if (arriving && job->direction == Direction::kLoad) numbers.push_back(number);
    }
    return numbers;
}

bool CopyEngine::wait(uint64_t number, uint64_t milliseconds) {
    std::unique_lock lock(mutex_);
    return idle_.wait_for(lock, std::chrono::milliseconds(milliseconds), [&] { return jobs_.count(number) == 0; });
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
    backend_->close();
    file_.reset();
}

void CopyEngine::finish(const std::shared_ptr<Job>& job) {
    finished_.push_back({job->number, job->status, now_ns() - job->started_ns});
    job->fence.reset();
    jobs_.erase(job->number);
    idle_.notify_all();
}

std::shared_ptr<CopyEngine::Job> CopyEngine::next_job(unsigned thread) {
    for (Direction direction : {Direction::kLoad, Direction::kStore}) {
        if (!backend_->serves(thread, direction)) continue;
        auto& queue = direction == Direction::kLoad ? loads_ : stores_;
        while (!queue.empty() && queue.front()->next >= queue.front()->blocks.size()) queue.pop_front();
        if (!queue.empty()) return queue.front();
    }
    return nullptr;
}

CopyEngine::Batch CopyEngine::take(const std::shared_ptr<Job>& job) const {
    size_t blocks = job->blocks.size();
    Batch batch{job, job->next, std::min(backend_->batch_blocks(blocks, job->next), blocks - job->next)};
    job->next += batch.count;
    ++job->busy;
    return batch;
}

void CopyEngine::put_back(const Batch& batch, const std::vector<CopyStatus>& status) {
    const std::shared_ptr<Job>& job = batch.job;
    auto bad = [](CopyStatus one) { return one != CopyStatus::kOk; };
    if (std::any_of(status.begin(), status.end(), bad)) job->good = false;
    std::copy(status.begin(), status.end(), job->status.begin() + static_cast<ptrdiff_t>(batch.first));
    if (job->direction == Direction::kLoad) load_progress_ns_ = now_ns();
    if (--job->busy > 0) return;
    idle_.notify_all();
    if (job->next >= job->blocks.size() && jobs_.count(job->number) != 0) finish(job);
}

void CopyEngine::run(unsigned thread) {
    std::unique_lock lock(mutex_);
    while (true) {
        std::shared_ptr<Job> job;
        work_.wait(lock, [&] { return closing_ || (job = next_job(thread)) != nullptr; });
        if (closing_) return;
        Batch batch = take(job);
        lock.unlock();
        std::vector<CopyStatus> status = copy(thread, batch);
        lock.lock();
        put_back(batch, status);
    }
}

std::vector<CopyStatus> CopyEngine::copy(unsigned thread, const Batch& batch) {
    Direction direction = batch.job->direction;
    const CopyBlock* blocks = batch.job->blocks.data() + batch.first;
    std::vector<CopyStatus> status(batch.count);
    std::vector<BlockShard> shards;
    for (size_t i = 0; i < batch.count; ++i) {
        status[i] = check_before(direction, blocks[i].ref);
        if (status[i] == CopyStatus::kOk) shards.push_back({shard(blocks[i].ref), blocks[i].block});
    }
    auto on_the_way = [&] {
        if (shards.size() == batch.count) note_on_the_way(batch);
    };
    bool moved = shards.empty() || backend_->copy(thread, direction, shards, batch.job->fence, on_the_way);
    for (size_t i = 0; i < batch.count; ++i) {
        if (status[i] != CopyStatus::kOk) continue;
        status[i] = moved ? check_after(direction, blocks[i].ref) : CopyStatus::kFailed;
    }
    return status;
}

void CopyEngine::note_on_the_way(const Batch& batch) {
    std::lock_guard lock(mutex_);
    batch.job->on_the_way += batch.count;
    if (batch.job->on_the_way == batch.job->blocks.size()) idle_.notify_all();
}

CopyStatus CopyEngine::check_before(Direction direction, SlotRef ref) const {
    if (ref.none() || ref.slot >= file_->geometry().num_slots()) return CopyStatus::kStale;
    if (!is_ours(direction, ref)) return CopyStatus::kStale;
    // Whatever the two sides think of each other's layout, no byte lands behind the slot.
    uint64_t end = shard_offset_ + payload_bytes_ + sizeof(ShardTrailer);
    if (end > file_->slots()[ref.slot].length.load()) return CopyStatus::kStale;
    if (direction == Direction::kStore || has_good_checksum(ref)) return CopyStatus::kOk;
    return is_ours(direction, ref) ? CopyStatus::kChecksum : CopyStatus::kStale;
}

CopyStatus CopyEngine::check_after(Direction direction, SlotRef ref) const {
    if (direction == Direction::kStore && is_ours(direction, ref)) write_trailer(ref);
    return is_ours(direction, ref) ? CopyStatus::kOk : CopyStatus::kStale;
}

bool CopyEngine::is_ours(Direction direction, SlotRef ref) const {
    uint64_t now = file_->slots()[ref.slot].word.load(std::memory_order_acquire);
    if (direction == Direction::kStore) return now == SlotWord::make(ref.generation, SlotState::kWriting);
    // A leased slot may be EVICTING: the bytes stay until the lease ends.
    return now == SlotWord::make(ref.generation, SlotState::kReady) ||
           now == SlotWord::make(ref.generation, SlotState::kEvicting);
}

bool CopyEngine::wants_checksum(SlotRef ref) const {
    return checksum_ != 0 && file_->slots()[ref.slot].load_key().tag() % checksum_ == 0;
}

// The key's: the right bytes of an earlier occupant are wrong bytes, and a block that another host sends byte by byte
// keeps its trailer.
uint32_t CopyEngine::seed_of(SlotRef ref) const {
    return file_->slots()[ref.slot].load_key().tag();
}

bool CopyEngine::has_good_checksum(SlotRef ref) const {
    if (!wants_checksum(ref)) return true;
    ShardTrailer trailer;
    std::memcpy(&trailer, shard(ref) + payload_bytes_, sizeof(trailer));
    if (trailer.mark != ShardTrailer::kChecked) return trailer.mark == ShardTrailer::kUnchecked;
    return trailer.checksum == crc32c(shard(ref), payload_bytes_, seed_of(ref));
}

void CopyEngine::write_trailer(SlotRef ref) const {
    ShardTrailer trailer{0, ShardTrailer::kUnchecked};
    if (wants_checksum(ref)) trailer = {crc32c(shard(ref), payload_bytes_, seed_of(ref)), ShardTrailer::kChecked};
    std::memcpy(shard(ref) + payload_bytes_, &trailer, sizeof(trailer));
}

}  // namespace kvpool
