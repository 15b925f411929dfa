// Copies by a CUDA device: two threads for each direction, each with its stream, so that one batch is under way while
// the next is being checked, and a load never waits for a store.
#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "cuda_calibration.h"
#include "cuda_fences.h"
#include "cuda_registration.h"
#include "cuda_staging.h"
#include "kvpool/copy.h"

namespace kvpool {
namespace cuda {
namespace {

constexpr unsigned kThreads = 4;  // even ones load, odd ones store
constexpr unsigned kThreadsEach = kThreads / 2;
constexpr uint64_t kBatchBytes = 512 << 20;  // 10 ms at the link's speed, for one wait of some 50 us
constexpr int kFailuresInARow = 3;           // then the device is left alone
constexpr auto kPopulatePoll = std::chrono::milliseconds(100);

// Processor time of the calling thread.
uint64_t thread_ns() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

class CudaBackend final : public CopyBackend {
  public:
    CudaBackend(std::shared_ptr<PoolFile> file, std::vector<Region> regions, const CudaOptions& options);
    ~CudaBackend() override { close(); }

    unsigned threads() const override { return kThreads; }
    bool serves(unsigned thread, Direction direction) const override { return direction_of(thread) == direction; }
    size_t batch_blocks(size_t job_blocks, size_t first) const override;
    Fence fence(uint64_t stream) override;
    bool has_passed(const Fence& fence) override;
    bool order_after_loads(uint64_t stream) override;
    bool copy(unsigned thread, Direction direction, const std::vector<BlockShard>& shards, const Fence& fence,
              const std::function<void()>& on_the_way) override;
    void close() override;
    std::string describe() const override;
    std::string error() const override;
    bool is_off() const override { return off_; }
    uint64_t registered_bytes() const override { return registration_.registered_bytes(); }
    CopyCosts costs() const override;

  private:
    // What one thread of the engine uses.
    struct Lane {
        Lane(const Driver& driver, int priority) : stream(driver, priority), done(driver) {}
        Stream stream;
        Event done;
        std::unique_ptr<Staging> staging;  // null: the driver's way
        bool entered = false;
        std::atomic<uint64_t> batches{0}, copies{0}, start_ns{0}, wait_ns{0};  // see CopyCosts
    };
    static Direction direction_of(unsigned thread) { return thread % 2 == 0 ? Direction::kLoad : Direction::kStore; }

    void open_lanes();
    void move(Lane& lane, Direction direction, const std::vector<BlockShard>& shards, const Fence& fence,
              const std::function<void()>& on_the_way);
    size_t enqueue(Lane& lane, Direction direction, const std::vector<BlockShard>& shards, const Fence& fence) const;
    bool is_registered(const std::vector<BlockShard>& shards) const;

    // On a thread of its own: the engine need not wait for any of it.
    void prepare();
    void choose_ways();
    Ways best_ways() const;
    void open_staging();
    void register_pool();

    void note(const CudaError& error);                                 // for the log
    void refused(const CudaError& error, std::atomic<int>& in_a_row);  // and counted

    const Driver& driver_;
    Context context_;
    std::vector<Region> merged_;
    CudaWay wanted_;
    FencePool fences_;
    std::array<std::unique_ptr<Lane>, kThreads> lanes_;
    PoolRegistration registration_;

    // Written, like each lane's staging, before `chosen_` is set; read afterwards.
    std::unique_ptr<Gather> gather_;
    Ways ways_;
    std::atomic<bool> chosen_{false};

    // In a row, each of its kind: loads that succeed say nothing of stores.
    std::atomic<int> load_failures_{0}, store_failures_{0}, fence_failures_{0}, order_failures_{0};
    std::atomic<bool> off_{false};

    mutable std::mutex mutex_;  // guards what follows
    std::condition_variable wake_;
    std::string error_;
    bool closing_ = false;
    std::thread preparing_;
};

CudaBackend::CudaBackend(std::shared_ptr<PoolFile> file, std::vector<Region> regions, const CudaOptions& options)
    : CopyBackend(std::move(regions)),
      driver_(Driver::load(options.library)),
      context_(driver_, options.device),
      merged_(merge_regions(this->regions())),
      wanted_(options.way),
      fences_(driver_, context_),
      registration_(driver_, std::move(file)) {
    try {
        open_lanes();
    } catch (const CudaError& error) {
        throw std::system_error(ENODEV, std::generic_category(), error.what());
    }
    preparing_ = std::thread([this] { prepare(); });
}

void CudaBackend::open_lanes() {
    Visit visit(driver_, context_);
    int least = 0, greatest = 0;
    driver_.ctx_get_stream_priority_range(&least, &greatest);
    for (unsigned thread = 0; thread < kThreads; ++thread) {
        // A request waits for its load, nobody waits for a store.
        bool load = direction_of(thread) == Direction::kLoad;
        lanes_[thread] = std::make_unique<Lane>(driver_, load ? greatest : least);
    }
}

void CudaBackend::close() {
    {
        std::lock_guard lock(mutex_);
        closing_ = true;
        wake_.notify_all();
    }
    if (preparing_.joinable()) preparing_.join();
    off_ = true;
    fences_.close();
    // Quiet, and as good as it gets: at the end of a process the driver may be gone already.
    bool visiting = driver_.ctx_push_current.quietly(context_.get()) == kSuccess;
    for (auto& lane : lanes_) lane.reset();
    gather_.reset();
    registration_.close();
    CUcontext popped;
    if (visiting) driver_.ctx_pop_current.quietly(&popped);
}

Fence CudaBackend::fence(uint64_t stream) {
    if (off_) return nullptr;
    try {
        Fence fence = fences_.record(stream);
        fence_failures_ = 0;
        return fence;
    } catch (const CudaError& error) {
        refused(error, fence_failures_);
        return nullptr;
    }
}

bool CudaBackend::has_passed(const Fence& fence) {
    if (off_ || fence == nullptr) return true;
    return driver_.event_query.quietly(FencePool::event(fence)) != kNotReady;
}

// A batch's end is recorded before it counts as on the way, and a lane's batches end one after the other.
bool CudaBackend::order_after_loads(uint64_t stream) {
    if (off_) return false;
    try {
        Visit visit(driver_, context_);
        for (unsigned thread = 0; thread < kThreads; ++thread) {
            if (!serves(thread, Direction::kLoad)) continue;
            driver_.stream_wait_event(reinterpret_cast<CUstream>(stream), lanes_[thread]->done.get(), 0);
        }
        order_failures_ = 0;
        return true;
    } catch (const CudaError& error) {
        refused(error, order_failures_);
        return false;
    }
}

bool CudaBackend::copy(unsigned thread, Direction direction, const std::vector<BlockShard>& shards, const Fence& fence,
                       const std::function<void()>& on_the_way) {
    if (off_ || fence == nullptr) return false;
    Lane& lane = *lanes_[thread];
    std::atomic<int>& failures = direction == Direction::kLoad ? load_failures_ : store_failures_;
    try {
        if (!lane.entered) context_.enter_thread();
        lane.entered = true;
        move(lane, direction, shards, fence, on_the_way);
        failures = 0;
        return true;
    } catch (const CudaError& error) {
        refused(error, failures);
        driver_.stream_synchronize.quietly(lane.stream.get());  // what was enqueued before the error ends here
        return false;
    }
}

void CudaBackend::move(Lane& lane, Direction direction, const std::vector<BlockShard>& shards, const Fence& fence,
                       const std::function<void()>& on_the_way) {
    uint64_t begun_ns = thread_ns();
    lane.copies += enqueue(lane, direction, shards, fence);
    driver_.event_record(lane.done.get(), lane.stream.get());
    uint64_t started_ns = thread_ns();
    on_the_way();
    driver_.event_synchronize(lane.done.get());
    lane.wait_ns += thread_ns() - started_ns;
    lane.start_ns += started_ns - begun_ns;
    ++lane.batches;
}

size_t CudaBackend::enqueue(Lane& lane, Direction direction, const std::vector<BlockShard>& shards,
                            const Fence& fence) const {
    CUstream stream = lane.stream.get();
    CUevent fenced = FencePool::event(fence);
    bool registered = is_registered(shards);
    if (registered) {
        driver_.stream_wait_event(stream, fenced, 0);
    } else {
        driver_.event_synchronize(fenced);  // not in the driver, which might hold up other threads meanwhile
    }
    EnqueueRuns* enqueue_runs = registered ? cuda::enqueue : enqueue_each;
    // A store to other memory would wait in the driver for the kernel, which comes after all that the engine computes.
    bool staged = registered || direction == Direction::kLoad;
    if (staged && chosen_ && lane.staging) return lane.staging->enqueue(direction, shards, stream, enqueue_runs);
    std::vector<Run> runs = runs_of(merged_, shards);
    enqueue_runs(driver_, direction, runs, stream);
    return runs.size();
}

// As few batches as can be, each of which is waited for, but the same number for each thread: while one waits, the
// other's copies go on. For that the first of many is half a one: they would all end in pairs, and the link would rest
// while the next pair is being checked. What one buffer holds is not worth a second wait.
size_t CudaBackend::batch_blocks(size_t job_blocks, size_t first) const {
    auto divide = [](uint64_t value, uint64_t by) { return (value + by - 1) / by; };
    uint64_t rounds = divide(job_blocks * payload_bytes(), kThreadsEach * kBatchBytes);
    uint64_t share = divide(job_blocks, kThreadsEach * rounds);
    if (rounds > 1 && first == 0) share = divide(share, 2);
    return std::max<uint64_t>({share, kStagingBytes / payload_bytes(), 1});
}

CopyCosts CudaBackend::costs() const {
    CopyCosts all;
    for (const auto& lane : lanes_) {
        if (lane == nullptr) continue;
        all.batches += lane->batches;
        all.copies += lane->copies;
        all.start_ns += lane->start_ns;
        all.wait_ns += lane->wait_ns;
    }
    return all;
}

bool CudaBackend::is_registered(const std::vector<BlockShard>& shards) const {
    return std::all_of(shards.begin(), shards.end(),
                       [this](const BlockShard& shard) { return registration_.covers(shard.bytes, payload_bytes()); });
}

void CudaBackend::prepare() {
    try {
        context_.enter_thread();
    } catch (const CudaError& error) {
        return note(error);
    }
    choose_ways();
    register_pool();
}

void CudaBackend::choose_ways() {
    try {
        ways_ = best_ways();
        open_staging();
    } catch (const CudaError& error) {
        note(error);  // the driver's way is left
        ways_ = {};
        for (auto& lane : lanes_) lane->staging.reset();
    }
    chosen_ = true;
}

Ways CudaBackend::best_ways() const {
    if (wanted_ == CudaWay::kDriver || !Gather::fits(merged_)) return {};
    if (wanted_ == CudaWay::kStaged) return {wanted_, wanted_};
    if (merged_.size() == 1) return {};  // one run a block already
    return calibrate(driver_, context_.device_name(), merged_);
}

void CudaBackend::open_staging() {
    for (unsigned thread = 0; thread < kThreads; ++thread) {
        if (ways_.of(direction_of(thread)) != CudaWay::kStaged) continue;
        if (gather_ == nullptr) gather_ = std::make_unique<Gather>(driver_, merged_);
        lanes_[thread]->staging = std::make_unique<Staging>(driver_, *gather_, payload_bytes(),
                                                            CopyEngine::shard_bytes(regions()), &registration_);
    }
}

void CudaBackend::register_pool() {
    std::unique_lock lock(mutex_);
    while (!closing_ && !off_ && !registration_.is_complete()) {
        lock.unlock();
        auto begun = std::chrono::steady_clock::now();
        bool registered = true;
        try {
            registered = registration_.register_next();
        } catch (const CudaError& error) {
            note(error);
            if (error.is_final()) off_ = true;
        }
        // The driver does nothing else for this process meanwhile, and would go on with the next chunk before the
        // engine gets its turn: 64 GiB in a row held up the first request by 5 s.
        auto took = std::chrono::steady_clock::now() - begun;
        lock.lock();
        wake_.wait_for(lock, registered ? took : kPopulatePoll, [this] { return closing_; });
    }
}

void CudaBackend::note(const CudaError& error) {
    std::lock_guard lock(mutex_);
    error_ = error.what();
}

void CudaBackend::refused(const CudaError& error, std::atomic<int>& in_a_row) {
    note(error);
    if (error.is_final() || ++in_a_row >= kFailuresInARow) off_ = true;
}

std::string CudaBackend::error() const {
    std::lock_guard lock(mutex_);
    return error_;
}

std::string CudaBackend::describe() const {
    auto name = [](CudaWay way) { return way == CudaWay::kStaged ? "staged" : "by the driver"; };
    std::string text = "cuda " + context_.device_name();
    if (off_) return text + ", switched off";
    if (!chosen_) return text + ", not calibrated yet";
    text += std::string(", loads ") + name(ways_.load) + ", stores " + name(ways_.store);
    return registration_.is_refused() ? text + ", slower where memory could not be registered" : text;
}

}  // namespace
}  // namespace cuda

std::unique_ptr<CopyBackend> cuda_backend(std::shared_ptr<PoolFile> file, std::vector<Region> regions,
                                          const CudaOptions& options) {
    return std::make_unique<cuda::CudaBackend>(std::move(file), std::move(regions), options);
}

}  // namespace kvpool
