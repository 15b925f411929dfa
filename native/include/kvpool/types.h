// Values shared by all parts of the core.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

namespace kvpool {

inline constexpr uint32_t kNoSlot = UINT32_MAX;
inline constexpr size_t kKeyBytes = 32;

// A slot and the generation it had when it was named. Generations start at 1, so packed 0 means "no slot".
struct SlotRef {
    uint32_t slot = 0;
    uint32_t generation = 0;

    static SlotRef unpack(uint64_t packed) {
        return {static_cast<uint32_t>(packed), static_cast<uint32_t>(packed >> 32)};
    }
    uint64_t pack() const { return static_cast<uint64_t>(generation) << 32 | slot; }
    bool none() const { return generation == 0; }
};

// 32 bytes as four words. `hash` spreads keys that are not hashes themselves (tests, tools) as well.
struct BlockKey {
    std::array<uint64_t, 4> words{};

    static BlockKey from_bytes(const void* bytes) {
        BlockKey key;
        std::memcpy(key.words.data(), bytes, kKeyBytes);
        return key;
    }
    uint64_t hash() const {
        uint64_t h = words[0] ^ (words[1] * 0x9e3779b97f4a7c15ull) ^ (words[2] << 23 | words[2] >> 41) ^ words[3];
        h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;  // splitmix64's finaliser
        h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
        return h ^ (h >> 31);
    }
    // What the index stores beside a slot number, and what picks a key's home and its checksum sample.
    uint32_t tag() const { return static_cast<uint32_t>(hash() >> 32); }
    bool operator==(const BlockKey& other) const { return words == other.words; }
};

// Not a pool file, another format version, another size, or a damaged header.
struct PoolFormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A broken invariant of our own: the message names the first one found.
struct IntegrityError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] inline void throw_errno(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

inline void ensure(bool ok, const char* invariant) {
    if (!ok) throw IntegrityError(invariant);
}

}  // namespace kvpool
