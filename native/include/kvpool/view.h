// A client's side of a pool: lookups and leases in shared memory, without locks and without the daemon. Not
// thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kvpool/index.h"
#include "kvpool/leases.h"

namespace kvpool {

class PoolView {
  public:
    // PoolFormatError or std::system_error as `PoolFile::open`.
    explicit PoolView(const std::string& path);

    const std::shared_ptr<PoolFile>& file() const { return file_; }
    const IndexReader& index() const { return index_; }

    // From now on leases are taken in this client's bitmap. std::runtime_error: some are held in another's.
    void attach_client(uint32_t client);
    // One for each reference: whether it is leased now, and is that block.
    std::vector<bool> lease(const std::vector<SlotRef>& refs);
    void release(const std::vector<SlotRef>& refs);
    uint64_t leased_slots() const { return leases_ == nullptr ? 0 : leases_->held(); }

    struct Bytes {
        uint8_t* data;
        uint64_t size;
    };
    // std::invalid_argument: not (any more) the slot that the reference names.
    Bytes payload(SlotRef ref) const;

    void check_integrity() const;

  private:
    LeaseTable& leases() const;

    std::shared_ptr<PoolFile> file_;
    IndexReader index_;
    std::unique_ptr<LeaseTable> leases_;  // null until `attach_client`
};

}  // namespace kvpool
