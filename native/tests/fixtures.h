// Pools in temporary folders, engines that hold their lock, keys of any hash, payloads that tell
// whose they are.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kvpool/owner.h"

namespace kvpool {

using Random = std::mt19937_64;

inline uint64_t below(Random& random, uint64_t bound) {
    return random() % bound;
}

// Laid out as the daemon's folder: `pool`, and the lock files in `clients/`.
class Folder {
  public:
    Folder() {
        const char* base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
        std::string pattern = std::string(base) + "/kvpool-test-XXXXXX";  // mkdtemp fills the X in
        if (mkdtemp(pattern.data()) == nullptr) throw_errno(pattern);
        path_ = pattern;
        std::filesystem::create_directory(path_ + "/clients");
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    Folder(const Folder&) = delete;

    std::string pool() const { return path_ + "/pool"; }
    std::string lock(const std::string& client_id) const { return path_ + "/clients/" + client_id + ".lock"; }

  private:
    std::string path_;
};

// A process's share of an engine's lock. flock belongs to the open file, so one process can play
// the daemon and all the engines.
class HeldLock {
  public:
    explicit HeldLock(const std::string& path) : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
        if (fd_ < 0 || flock(fd_, LOCK_SH) != 0) throw_errno(path);
    }
    ~HeldLock() { close(fd_); }
    HeldLock(const HeldLock&) = delete;

  private:
    int fd_;
};

// The key with that `hash()`: splitmix64's finaliser, backwards.
inline BlockKey key_with_hash(uint64_t hash) {
    hash = (hash ^ hash >> 31 ^ hash >> 62) * 0x319642b2d24d8ec3ull;
    hash = (hash ^ hash >> 27 ^ hash >> 54) * 0x96de1b173f119089ull;
    BlockKey key;
    key.words[0] = hash ^ hash >> 30 ^ hash >> 60;
    return key;
}

inline BlockKey key_of(uint64_t number) {
    BlockKey key;
    key.words = {number, ~number, number * 3, 7};
    return key;
}

inline std::vector<BlockKey> keys_of(uint64_t first, size_t count) {
    std::vector<BlockKey> keys;
    for (size_t i = 0; i < count; ++i) keys.push_back(key_of(first + i));
    return keys;
}

inline constexpr uint64_t kMiB = 1 << 20;
inline constexpr uint32_t kSlotBytes = 64 << 10;  // 32 of them in a slab of a small pool
inline constexpr uint64_t kSlabBytes = 2 * kMiB + 8192;

// A pool with all of its slabs populated, and a namespace.
struct Pool {
    Folder folder;
    std::unique_ptr<PoolOwner> owner;
    std::vector<std::unique_ptr<HeldLock>> locks;
    uint32_t name_space;

    explicit Pool(uint64_t slabs, const std::string& policy = "lru", uint32_t slot_bytes = kSlotBytes) {
        // One more slab's worth for header, tables and index.
        owner = PoolOwner::create(folder.pool(), slabs * kSlabBytes + 2 * kMiB, kSlotBytes, 0600, policy);
        for (uint32_t slab = 0; slab < slabs; ++slab) owner->populate(slab);
        name_space = add_namespace(1, slot_bytes);
    }
    uint32_t add_namespace(uint8_t digest, uint32_t slot_bytes = kSlotBytes) {
        std::vector<uint8_t> bytes(32, digest);
        return owner->add_namespace(bytes.data(), slot_bytes, "test");
    }
    uint32_t add_client(const std::string& id, uint32_t of) {
        locks.push_back(std::make_unique<HeldLock>(folder.lock(id)));
        return owner->add_client(id, folder.lock(id), getpid(), of);
    }
    uint32_t add_client(const std::string& id = "engine") { return add_client(id, name_space); }
    void restart(uint32_t now_s = 0, const std::string& policy = "lru") {
        owner.reset();
        owner = PoolOwner::attach(folder.pool(), now_s, policy);
    }

    SlotState state(SlotRef ref) const {
        uint64_t word = owner->file().slots()[ref.slot].word.load();
        return SlotWord::generation(word) == ref.generation ? SlotWord::state(word) : SlotState::kFree;
    }
    bool has(const BlockKey& key, uint32_t now_s = 0) const {
        return IndexReader(owner->file()).find_ready(key, now_s).has_value();
    }
    std::vector<SlotRef> match(const std::vector<BlockKey>& keys, uint32_t now_s = 0) const {
        std::vector<uint64_t> refs(keys.size());
        auto bytes = reinterpret_cast<const uint8_t*>(keys.data());
        size_t hits = IndexReader(owner->file()).match_prefix(bytes, keys.size(), now_s, refs.data());
        std::vector<SlotRef> result;
        for (size_t i = 0; i < hits; ++i) result.push_back(SlotRef::unpack(refs[i]));
        return result;
    }
    std::vector<SlotRef> prepare(uint32_t client, const std::vector<BlockKey>& keys, const BlockKey* parent = nullptr,
                                 StoreOptions options = {}, uint32_t now_s = 0) {
        std::vector<uint64_t> packed(keys.size());
        owner->prepare_store(client, keys, parent, now_s, options, packed.data());
        std::vector<SlotRef> refs;
        for (uint64_t ref : packed) refs.push_back(SlotRef::unpack(ref));
        return refs;
    }
    // Prepares and completes; the refs, in which 0 says "present" or "no room".
    std::vector<SlotRef> store(uint32_t client, const std::vector<BlockKey>& keys, const BlockKey* parent = nullptr,
                               StoreOptions options = {}) {
        std::vector<SlotRef> refs = prepare(client, keys, parent, options);
        owner->complete_store(client, refs);
        return refs;
    }
    uint64_t stat(const std::string& name) const { return owner->stats().at(name); }
};

// What a slot of this key and generation should hold, word by word, at both ends of its payload.
class Pattern {
  public:
    static constexpr size_t kWords = 64;

    static void write(uint8_t* payload, uint64_t bytes, const BlockKey& key, uint32_t generation) {
        for (uint64_t at : {uint64_t{0}, bytes - kWords * 8}) {
            for (size_t i = 0; i < kWords; ++i) {
                uint64_t word = word_of(key, generation, at + i);
                std::memcpy(payload + at + i * 8, &word, 8);
            }
        }
    }
    static bool fits(const uint8_t* payload, uint64_t bytes, const BlockKey& key, uint32_t generation) {
        for (uint64_t at : {uint64_t{0}, bytes - kWords * 8}) {
            for (size_t i = 0; i < kWords; ++i) {
                uint64_t word;
                std::memcpy(&word, payload + at + i * 8, 8);
                if (word != word_of(key, generation, at + i)) return false;
            }
        }
        return true;
    }

  private:
    static uint64_t word_of(const BlockKey& key, uint32_t generation, uint64_t place) {
        return (key.hash() ^ generation) + place * 0x9e3779b97f4a7c15ull;
    }
};

}  // namespace kvpool
