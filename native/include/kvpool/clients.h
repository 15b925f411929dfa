// Who may hold leases and WRITING slots. A client is an engine: all of its processes hold a shared flock on one file
// beside the pool. The kernel lets go of it when the last of them is gone, and only then is the daemon's try for the
// exclusive lock a success. No timer decides that a client is dead: a stopped engine keeps what it holds.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kvpool/mapping.h"

namespace kvpool {

class ClientTable {
  public:
    // PoolFormatError when the client table of the file cannot be true.
    explicit ClientTable(const PoolFile& file);
    ~ClientTable();
    ClientTable(const ClientTable&) = delete;

    // Index of the client; its bitmap is clear when it is new. nullopt when the table is full.
    std::optional<uint32_t> add(const std::string& client_id, const std::string& lock_path, int pid,
                                uint32_t name_space);
    // Takes over an entry that an earlier daemon left. Where `lock_path` is gone, its process number must do.
    void adopt(uint32_t client, const std::string& lock_path);

    bool active(uint32_t client) const;
    std::string id(uint32_t client) const;
    uint32_t name_space(uint32_t client) const;
    // Clients that nobody holds since more than `grace_s`: a DMA in flight of a dying engine has ended by then.
    std::vector<uint32_t> dead(uint32_t now_s, uint32_t grace_s);
    void remove(uint32_t client);
    std::vector<uint32_t> all() const;

  private:
    struct Lock {
        int fd = -1;
        std::string path;
        std::optional<uint32_t> dead_since_s;  // we hold it exclusively since then
    };
    bool nobody_holds(uint32_t client);  // then we do, until it is removed

    const PoolFile& file_;
    std::vector<Lock> locks_;
};

}  // namespace kvpool
