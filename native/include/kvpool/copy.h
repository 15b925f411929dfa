// Moves blocks between a worker's KV memory and pool slots.
//
// `CopyEngine` owns jobs, checks and verdicts; a `CopyBackend` moves the bytes. A block's bytes in KV memory are
// scattered over regions (one per layer, usually); its shard in the slot is those bytes in region order, then a
// trailer.
//
// Guarantees: a job is reported once; after `cancel` returns nothing touches its memory; a load is COPY_OK only when
// the slot held that very block before and after the copy, and its checksum fits where one is due.
//
// `arriving` tells of loads that are about to end, so that whoever prepares to use one need not wait for its end first.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kvpool/copy_backend.h"
#include "kvpool/mapping.h"

namespace kvpool {

// `kUnmapped` is for a worker's report of blocks for which it had no engine.
enum class CopyStatus : uint8_t { kOk = 0, kStale = 1, kChecksum = 2, kCancelled = 3, kFailed = 4, kUnmapped = 5 };

struct CopyBlock {
    SlotRef ref;
    uint32_t block;
};

struct FinishedCopy {
    uint64_t job;
    std::vector<CopyStatus> status;  // one a block
    uint64_t nanoseconds;            // from submit to the end of the last block
};

// Behind each shard's bytes. `mark` tells a shard without checksum from one that was overwritten.
struct ShardTrailer {
    static constexpr uint32_t kChecked = 0x4b56c5c5;
    static constexpr uint32_t kUnchecked = 0x4b560000;
    uint32_t checksum;
    uint32_t mark;
};

class CopyEngine {
  public:
    // `checksum`: every n-th block (by key) carries one; 0 = none, 1 = all.
    CopyEngine(std::shared_ptr<PoolFile> file, std::unique_ptr<CopyBackend> backend, uint64_t shard_offset,
               uint32_t checksum);
    ~CopyEngine();
    CopyEngine(const CopyEngine&) = delete;

    static uint64_t shard_bytes(const std::vector<Region>& regions);
    const CopyBackend& backend() const { return *backend_; }
    // The copies come after all that `stream` (of the backend's device) has been given so far.
    uint64_t submit(Direction direction, std::vector<CopyBlock> blocks, uint64_t stream = 0);
    std::vector<FinishedCopy> poll();
    // Loads whose last bytes are on their way: all slots were found good before the copy, no batch has ended badly, and
    // only the loss of the device, or of a lease, can still spoil them.
    // Waits up to so many milliseconds for the first one, while there are loads none of which has ended.
    std::vector<uint64_t> arriving(uint64_t milliseconds = 0);
    // Work that `stream` is given from now on comes after the loads that are arriving. False: wait for them here.
    bool order_after_loads(uint64_t stream) { return backend_->order_after_loads(stream); }
    // Until `job` has ended, or so many milliseconds. Whether it has.
    bool wait(uint64_t job, uint64_t milliseconds);
    // For how long no batch of any load has ended, while loads are under way; 0 without any. A load may be long, and
    // many wait for each other: what matters is whether they get on. It counts from the first call that finds the
    // oldest of them free to begin: what its stream was given before may take as long as it likes. One thread calls it.
    uint64_t loads_stand_still_ns();
    void cancel(uint64_t job);
    void close();  // cancels all, joins the threads and lets go of the pool; `poll` may follow

  private:
    struct Job {
        uint64_t number;
        Direction direction;
        std::vector<CopyBlock> blocks;
        Fence fence;
        std::vector<CopyStatus> status;
        uint64_t started_ns;
        uint64_t free_ns = 0;   // when it was first seen to be free to begin
        size_t next = 0;        // first block that no thread has taken
        size_t busy = 0;        // batches being copied now
        size_t on_the_way = 0;  // blocks, of batches without a bad one
        bool good = true;       // no batch has ended badly
    };
    using Jobs = std::map<uint64_t, std::shared_ptr<Job>>;
    // Blocks of one job that one thread copies.
    struct Batch {
        std::shared_ptr<Job> job;
        size_t first;
        size_t count;
    };

    void run(unsigned thread);
    std::shared_ptr<Job> next_job(unsigned thread);  // with a block that no thread has taken; loads before stores
    Batch take(const std::shared_ptr<Job>& job) const;
    void put_back(const Batch& batch, const std::vector<CopyStatus>& status);
    std::vector<uint64_t> arriving_loads() const;
    Jobs::const_iterator first_load() const;  // the oldest one that has not ended
    void finish(const std::shared_ptr<Job>& job);

    std::vector<CopyStatus> copy(unsigned thread, const Batch& batch);
    void note_on_the_way(const Batch& batch);
    CopyStatus check_before(Direction direction, SlotRef ref) const;
    CopyStatus check_after(Direction direction, SlotRef ref) const;
    bool is_ours(Direction direction, SlotRef ref) const;
    uint8_t* shard(SlotRef ref) const { return file_->payload(ref.slot) + shard_offset_; }
    uint32_t seed_of(SlotRef ref) const;
    bool has_good_checksum(SlotRef ref) const;
    void write_trailer(SlotRef ref) const;
    bool wants_checksum(SlotRef ref) const;

    std::shared_ptr<PoolFile> file_;
    std::unique_ptr<CopyBackend> backend_;
    uint64_t payload_bytes_;
    uint64_t shard_offset_;
    uint32_t checksum_;

    mutable std::mutex mutex_;  // guards everything below
    std::condition_variable work_, idle_;
    // Jobs in the order of their coming. A request waits for its load, nobody waits for a store.
    std::deque<std::shared_ptr<Job>> loads_, stores_;
    Jobs jobs_;  // not finished yet
    std::vector<FinishedCopy> finished_;
    uint64_t last_number_ = 0;
    uint64_t load_progress_ns_ = 0;  // when a batch of a load last ended
    bool closing_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace kvpool
