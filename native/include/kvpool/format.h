// The pool file: what lies where. Everything here is shared memory, read by processes of other versions of this code;
// change a struct and kFormatVersion grows.
//
//   header | clients | namespaces | slab table | index | slot headers | lease bitmaps | slabs (2 MiB aligned)
//
// Writers: the daemon writes all of it but two things. A client sets and clears bits in its own lease bitmap, and
// writes the payload of WRITING slots that it owns.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kvpool/types.h"

namespace kvpool {

inline constexpr uint64_t kMagic = 0x6c6f6f70766b0001ull;  // "\1\0kvpool" in memory
inline constexpr uint32_t kFormatVersion = 1;
inline constexpr uint32_t kMaxClients = 256;
inline constexpr uint32_t kReservedBitmaps = 16;  // lease bitmaps whose pages exist from the start
inline constexpr uint32_t kMaxNamespaces = 64;
inline constexpr size_t kDescriptionBytes = 2048;
inline constexpr size_t kPayloadAlign = 2 << 20;

enum class SlotState : uint32_t { kFree = 0, kWriting = 1, kReady = 2, kEvicting = 3 };

// Generation and state change together, in one word, so that a reader sees a pair that really was.
struct SlotWord {
    static constexpr uint64_t make(uint32_t generation, SlotState state) {
        return static_cast<uint64_t>(generation) << 32 | static_cast<uint32_t>(state);
    }
    static uint32_t generation(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
    static SlotState state(uint64_t word) { return static_cast<SlotState>(static_cast<uint32_t>(word)); }
};

inline constexpr uint16_t kFlagPinned = 1;  // not evictable until it expires

// FREE -> WRITING -> READY -> EVICTING -> FREE. Only the daemon moves it; a generation names one occupant.
// EVICTING is a question to the lease holders: a victim that is leased goes back to READY, a block that must go stays
// EVICTING until the last lease on it is gone. No new lease is taken meanwhile.
// All fields are atomics because readers look while the daemon writes; `word` tells them whether to believe the rest,
// which changes while it says FREE.
struct alignas(64) SlotHeader {
    std::atomic<uint64_t> word;
    std::atomic<uint64_t> key[4];
    std::atomic<uint32_t> length;      // payload bytes
    std::atomic<uint32_t> expiry_s;    // CLOCK_BOOTTIME; 0 = never
    std::atomic<uint32_t> parent_tag;  // of the key before this one in the chain; 0 = none (finds it after a restart)
    std::atomic<uint32_t> checksum;    // over all of the above but the state; set when READY
    std::atomic<uint16_t> flags;
    std::atomic<uint16_t> owner;  // client that writes it
    uint32_t reserved;

    BlockKey load_key() const {
        BlockKey k;
        for (int i = 0; i < 4; ++i) k.words[i] = key[i].load(std::memory_order_acquire);
        return k;
    }
    void store_key(const BlockKey& k) {
        for (int i = 0; i < 4; ++i) key[i].store(k.words[i], std::memory_order_release);
    }
};
static_assert(sizeof(SlotHeader) == 64);

struct alignas(64) ClientEntry {
    std::atomic<uint32_t> active;
    std::atomic<uint32_t> name_space;
    std::atomic<int32_t> pid;
    char client_id[44];
};
static_assert(sizeof(ClientEntry) == 64);

struct alignas(64) NamespaceEntry {
    std::atomic<uint32_t> active;
    std::atomic<uint32_t> slot_bytes;
    uint8_t digest[32];
    char description[kDescriptionBytes];
};

struct alignas(16) SlabEntry {
    std::atomic<uint32_t> owner;  // namespace + 1; 0 = not given to anyone
    std::atomic<uint32_t> slot_bytes;
    std::atomic<uint32_t> num_slots;
    std::atomic<uint32_t> populated;  // its pages exist
};

using IndexEntry = std::atomic<uint64_t>;  // tag << 32 | slot + 1; 0 = empty
using LeaseWord = std::atomic<uint64_t>;

// Sizes and offsets, all derived from three numbers.
struct Geometry {
    uint64_t size = 0;  // of the file, as asked for
    uint64_t slab_bytes = 0;
    uint64_t min_slot_bytes = 0;

    uint64_t num_slabs = 0;
    uint64_t slots_per_slab = 0;  // slot numbers a slab owns; larger slots use the first few of them
    uint64_t index_capacity = 0;  // power of two, at most half full
    uint64_t bitmap_words = 0;

    uint64_t clients_at = 0, namespaces_at = 0, slab_table_at = 0, index_at = 0, slots_at = 0, bitmaps_at = 0,
             slabs_at = 0, end = 0;

    // Throws PoolFormatError when `size` has no room for a single slab.
    static Geometry plan(uint64_t size, uint64_t min_slot_bytes);
    static Geometry derive(uint64_t size, uint64_t slab_bytes, uint64_t min_slot_bytes);
    uint64_t num_slots() const { return num_slabs * slots_per_slab; }
    uint64_t slab_at(uint64_t slab) const { return slabs_at + slab * slab_bytes; }
};

struct FileHeader {
    uint64_t magic;
    uint32_t format_version;
    uint32_t checksum;  // CRC-32C of `fixed`
    struct Fixed {
        uint64_t size, slab_bytes, min_slot_bytes;
        char pool_id[32];
    } fixed;
    std::atomic<uint64_t> epoch;  // grows with each daemon that takes the pool over
    std::atomic<uint64_t> heartbeat_ms;
    std::atomic<int64_t> daemon_pid;
    std::atomic<uint32_t> clients_high;  // client indexes in use lie below
};
static_assert(sizeof(FileHeader) <= 4096);

}  // namespace kvpool
