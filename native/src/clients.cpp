#include "kvpool/clients.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "kvpool/leases.h"

namespace kvpool {

ClientTable::ClientTable(const PoolFile& file) : file_(file), locks_(kMaxClients) {}

ClientTable::~ClientTable() {
    for (Lock& lock : locks_) {
        if (lock.fd >= 0) close(lock.fd);
    }
}

std::optional<uint32_t> ClientTable::add(const std::string& client_id, const std::string& lock_path, int pid,
                                         uint32_t name_space) {
    if (client_id.empty() || client_id.size() >= sizeof(ClientEntry::client_id)) {
        throw std::invalid_argument("client_id: give 1 to 43 characters");
    }
    uint32_t free = kNoSlot;
    for (uint32_t i = 0; i < kMaxClients; ++i) {
        if (active(i) && id(i) == client_id) {
            file_.clients()[i].pid.store(pid);
            file_.clients()[i].name_space.store(name_space);
            return i;
        }
        if (!active(i) && free == kNoSlot) free = i;
    }
    if (free == kNoSlot) return std::nullopt;

    int fd = open(lock_path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) throw_errno("lock file " + lock_path);
    locks_[free] = Lock{fd, lock_path, std::nullopt};
    const Geometry& g = file_.geometry();
    uint64_t bytes = g.bitmap_words * sizeof(LeaseWord);
    file_.populate(g.bitmaps_at + free * bytes, bytes);
    clear_leases(file_, free);
    ClientEntry& entry = file_.clients()[free];
    std::memcpy(entry.client_id, client_id.c_str(), client_id.size() + 1);
    entry.pid.store(pid);
    entry.name_space.store(name_space);
    entry.active.store(1, std::memory_order_release);
    if (file_.header().clients_high.load() <= free) file_.header().clients_high.store(free + 1);
    return free;
}

void ClientTable::adopt(uint32_t client, const std::string& lock_path) {
    locks_[client] = Lock{open(lock_path.c_str(), O_RDWR | O_CLOEXEC), lock_path, std::nullopt};
}

bool ClientTable::active(uint32_t client) const { return file_.clients()[client].active.load() != 0; }

std::string ClientTable::id(uint32_t client) const {
    const char* text = file_.clients()[client].client_id;
    return {text, strnlen(text, sizeof(ClientEntry::client_id))};
}

uint32_t ClientTable::name_space(uint32_t client) const { return file_.clients()[client].name_space.load(); }

bool ClientTable::alive(uint32_t client) {
    Lock& lock = locks_[client];
    if (lock.dead_since_s) return false;
    if (!nobody_holds(client)) return true;
    if (lock.fd >= 0) flock(lock.fd, LOCK_UN);
    return false;
}

bool ClientTable::nobody_holds(uint32_t client) {
    int fd = locks_[client].fd;
    if (fd >= 0) return flock(fd, LOCK_EX | LOCK_NB) == 0;
    // Somebody deleted the lock file before this daemon came: the process number is all that is left to ask.
    return kill(file_.clients()[client].pid.load(), 0) != 0 && errno == ESRCH;
}

std::vector<uint32_t> ClientTable::dead(uint32_t now_s, uint32_t grace_s) {
    std::vector<uint32_t> result;
    for (uint32_t client : all()) {
        Lock& lock = locks_[client];
        if (!lock.dead_since_s && !nobody_holds(client)) continue;
        if (!lock.dead_since_s) lock.dead_since_s = now_s;
        if (now_s - *lock.dead_since_s > grace_s) result.push_back(client);
    }
    return result;
}

void ClientTable::remove(uint32_t client) {
    clear_leases(file_, client);
    file_.clients()[client].active.store(0, std::memory_order_release);
    Lock& lock = locks_[client];
    unlink(lock.path.c_str());
    if (lock.fd >= 0) close(lock.fd);
    lock = Lock{};
}

std::vector<uint32_t> ClientTable::all() const {
    std::vector<uint32_t> result;
    for (uint32_t i = 0; i < file_.header().clients_high.load(); ++i) {
        if (active(i)) result.push_back(i);
    }
    return result;
}

}  // namespace kvpool
