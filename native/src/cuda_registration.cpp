#include "cuda_registration.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

namespace kvpool::cuda {
namespace {

constexpr uint64_t kChunkBytes = 64 << 20;  // or one slab: some 5 to 8 ms, for which the engine may wait

// A range can be registered once in a process, and engines over one view share their mapping.
class Registrations {
  public:
    static Registrations& of_process() {
        static Registrations all;
        return all;
    }
    void acquire(const Driver& driver, uint8_t* begin, uint64_t bytes) {
        std::lock_guard lock(mutex_);
        if (users_.count(begin) == 0) driver.mem_host_register(begin, bytes, kHostPortable);
        ++users_[begin];
    }
    void release(const Driver& driver, uint8_t* begin) {
        std::lock_guard lock(mutex_);
        if (--users_[begin] > 0) return;
        driver.mem_host_unregister.quietly(begin);
        users_.erase(begin);
    }

  private:
    std::mutex mutex_;
    std::map<uint8_t*, unsigned> users_;
};

}  // namespace

PoolRegistration::PoolRegistration(const Driver& driver, std::shared_ptr<PoolFile> file)
    : driver_(driver),
      file_(std::move(file)),
      slabs_per_chunk_(std::max<uint64_t>(kChunkBytes / file_->geometry().slab_bytes, 1)),
      chunks_((file_->geometry().num_slabs + slabs_per_chunk_ - 1) / slabs_per_chunk_) {}

void PoolRegistration::close() {
    // With pauses, as for registering: the driver does nothing else meanwhile, and the engine may go on with another
    // pool. 40 GiB in a row held up a launch by 0.6 s.
    for (size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
        if (!chunks_[chunk].registered.exchange(false)) continue;
        auto begun = std::chrono::steady_clock::now();
        Registrations::of_process().release(driver_, begin(chunk));
        registered_bytes_ -= bytes_of(chunk);
        std::this_thread::sleep_for(std::chrono::steady_clock::now() - begun);
    }
    file_.reset();
}

uint64_t PoolRegistration::end_slab(size_t chunk) const {
    return std::min(first_slab(chunk + 1), file_->geometry().num_slabs);
}

uint8_t* PoolRegistration::begin(size_t chunk) const {
    return file_->base() + file_->geometry().slab_at(first_slab(chunk));
}

uint64_t PoolRegistration::bytes_of(size_t chunk) const {
    return (end_slab(chunk) - first_slab(chunk)) * file_->geometry().slab_bytes;
}

bool PoolRegistration::exists(size_t chunk) const {
    for (uint64_t slab = first_slab(chunk); slab < end_slab(chunk); ++slab) {
        if (file_->slabs()[slab].populated.load(std::memory_order_acquire) == 0) return false;
    }
    return true;
}

bool PoolRegistration::register_next() {
    for (size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
        if (chunks_[chunk].tried || !exists(chunk)) continue;
        chunks_[chunk].tried = true;
        try {
            Registrations::of_process().acquire(driver_, begin(chunk), bytes_of(chunk));
        } catch (const CudaError&) {
            refused_ = true;
            throw;
        }
        chunks_[chunk].registered.store(true, std::memory_order_release);
        registered_bytes_.fetch_add(bytes_of(chunk), std::memory_order_release);
        return true;
    }
    return false;
}

bool PoolRegistration::is_complete() const {
    return std::all_of(chunks_.begin(), chunks_.end(), [](const Chunk& chunk) { return chunk.tried; });
}

bool PoolRegistration::covers(const uint8_t* bytes, uint64_t count) const {
    auto offset = static_cast<uint64_t>(bytes - begin(0));
    uint64_t chunk = offset / (slabs_per_chunk_ * file_->geometry().slab_bytes);
    if (bytes < begin(0) || chunk >= chunks_.size()) return false;
    auto in_chunk = static_cast<uint64_t>(bytes - begin(chunk));
    return chunks_[chunk].registered.load(std::memory_order_acquire) && in_chunk + count <= bytes_of(chunk);
}

}  // namespace kvpool::cuda
