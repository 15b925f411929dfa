// Moves blocks between a worker's KV memory and pool slots.
//
// `CopyEngine` owns jobs, checks and verdicts. How bytes move is a backend's business: the CPU backend copies on
// threads; a GPU backend enqueues on streams. A block's bytes in KV memory are scattered over regions (one per layer,
// usually); its shard in the slot is those bytes in region order, then a trailer.
//
// Guarantees: a job is reported once; after `cancel` returns no thread touches its memory; a load is COPY_OK only when
// the slot held that very block before and after the copy, and its checksum fits where one is due.
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

#include "kvpool/mapping.h"

namespace kvpool {

enum class CopyStatus : uint8_t { kOk = 0, kStale = 1, kChecksum = 2, kCancelled = 3 };
enum class Direction { kStore, kLoad };

struct Region {
    uint8_t* base;
    uint64_t stride;  // from one block to the next
    uint64_t bytes;   // of one block
};

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
    CopyEngine(std::shared_ptr<PoolFile> file, std::vector<Region> regions, uint64_t shard_offset, uint32_t checksum,
               unsigned threads);
    ~CopyEngine();
    CopyEngine(const CopyEngine&) = delete;

    static uint64_t shard_bytes(const std::vector<Region>& regions);
    uint64_t submit(Direction direction, std::vector<CopyBlock> blocks);
    std::vector<FinishedCopy> poll();
    void cancel(uint64_t job);
    void close();  // cancels all and joins the threads; `poll` may follow

  private:
    struct Job {
        uint64_t number;
        Direction direction;
        std::vector<CopyBlock> blocks;
        std::vector<CopyStatus> status;
        uint64_t started_ns;
        size_t next = 0;  // first block that no thread has taken
        size_t busy = 0;  // blocks being copied now
    };
    using Jobs = std::map<uint64_t, std::shared_ptr<Job>>;

    void run();
    std::shared_ptr<Job> next_job();  // with a block that no thread has taken; loads before stores
    CopyStatus copy(Direction direction, const CopyBlock& block) const;
    void store_shard(uint8_t* shard, uint32_t block, SlotRef ref, const BlockKey& key) const;
    CopyStatus load_shard(const uint8_t* shard, uint32_t block, SlotRef ref, const BlockKey& key) const;
    bool wants_checksum(const BlockKey& key) const { return checksum_ != 0 && key.tag() % checksum_ == 0; }
    void finish(const std::shared_ptr<Job>& job);

    std::shared_ptr<PoolFile> file_;
    std::vector<Region> regions_;
    uint64_t payload_bytes_ = 0;
    uint64_t shard_offset_;
    uint32_t checksum_;

    std::mutex mutex_;  // guards everything below
    std::condition_variable work_, idle_;
    // Jobs in the order of their coming. A request waits for its load, nobody waits for a store.
    std::deque<std::shared_ptr<Job>> loads_, stores_;
    Jobs jobs_;  // not finished yet
    std::vector<FinishedCopy> finished_;
    uint64_t last_number_ = 0;
    bool closing_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace kvpool
