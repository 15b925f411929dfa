#include "kvpool/clients.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "kvpool/leases.h"

namespace kvpool {
namespace {

// Reading rights are enough for flock: another user of the pool's group may have made the file.
int open_lock(const std::string& path) {
    return open(path.c_str(), O_RDONLY | O_CLOEXEC);
}

// Is there a file at `path` that is not the one behind `fd`?
bool names_another(const std::string& path, int fd) {
    struct stat there{}, here{};
    if (stat(path.c_str(), &there) != 0) return false;
    return fd < 0 || fstat(fd, &here) != 0 || there.st_dev != here.st_dev || there.st_ino != here.st_ino;
}

}  // namespace

ClientTable::ClientTable(const PoolFile& file) : file_(file), locks_(kMaxClients) {
    bool plausible = file_.header().clients_high.load() <= kMaxClients;
    for (uint32_t i = 0; i < kMaxClients; ++i) {
        plausible = plausible && (!active(i) || name_space(i) < kMaxNamespaces);
    }
    if (!plausible) throw PoolFormatError("damaged client table");
}

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
        if (free == kNoSlot && !active(i)) free = i;
    }
    if (free == kNoSlot) return std::nullopt;

    const Geometry& g = file_.geometry();
    uint64_t bytes = g.bitmap_words * sizeof(LeaseWord);
    file_.populate(g.bitmaps_at + free * bytes, bytes);
    clear_leases(file_, free);
    int fd = open_lock(lock_path);
    if (fd < 0) throw_errno("lock file " + lock_path);
    locks_[free] = Lock{fd, lock_path, std::nullopt};
    ClientEntry& entry = file_.clients()[free];
    std::memcpy(entry.client_id, client_id.c_str(), client_id.size() + 1);
    entry.pid.store(pid);
    entry.name_space.store(name_space);
    // In this order: a daemon killed in between must not leave a client whose leases nobody looks at.
    if (file_.header().clients_high.load() <= free) file_.header().clients_high.store(free + 1);
    entry.active.store(1, std::memory_order_release);
    return free;
}

void ClientTable::adopt(uint32_t client, const std::string& lock_path) {
    locks_[client] = Lock{open_lock(lock_path), lock_path, std::nullopt};
}

bool ClientTable::active(uint32_t client) const {
    return file_.clients()[client].active.load() != 0;
}

std::string ClientTable::id(uint32_t client) const {
    const char* text = file_.clients()[client].client_id;
    return {text, strnlen(text, sizeof(ClientEntry::client_id))};
}

uint32_t ClientTable::name_space(uint32_t client) const {
    return file_.clients()[client].name_space.load();
}

bool ClientTable::nobody_holds(uint32_t client) {
    Lock& lock = locks_[client];
    if (lock.fd >= 0 && flock(lock.fd, LOCK_EX | LOCK_NB) != 0) return false;
    if (names_another(lock.path, lock.fd)) {
        // The file was deleted, and a living client made and locked it anew: ask that one.
        if (lock.fd >= 0) close(lock.fd);
        lock.fd = open_lock(lock.path);
        if (lock.fd >= 0) return flock(lock.fd, LOCK_EX | LOCK_NB) == 0;
    }
    if (lock.fd >= 0) return true;
    // Somebody deleted the lock file before this daemon came: the process number is all that is left to ask.
    return kill(file_.clients()[client].pid.load(), 0) != 0 && errno == ESRCH;
}

std::vector<uint32_t> ClientTable::dead(uint32_t now_s, uint32_t grace_s) {
    std::vector<uint32_t> result;
    for (uint32_t client : all()) {
        Lock& lock = locks_[client];
        if (!nobody_holds(client)) {
            lock.dead_since_s.reset();
            continue;
        }
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
