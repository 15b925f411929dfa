#include "kvpool/format.h"

#include <algorithm>

namespace kvpool {
namespace {

uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

uint64_t power_of_two_at_most(uint64_t value) {
    uint64_t power = 1;
    while (power * 2 <= value) power *= 2;
    return power;
}

// About 256 slabs: small enough to share the pool between namespaces, large enough for any block of a large pool.
// A bit more than a power of two: blocks often have a power of two of bytes, and a trailer for each rank.
uint64_t choose_slab_bytes(uint64_t size) {
    uint64_t power = std::clamp<uint64_t>(power_of_two_at_most(size / 256), 2ull << 20, 1ull << 30);
    return power + power / 256;
}

}  // namespace

Geometry Geometry::plan(uint64_t size, uint64_t min_slot_bytes) {
    return derive(size, choose_slab_bytes(size), min_slot_bytes);
}

Geometry Geometry::derive(uint64_t size, uint64_t slab_bytes, uint64_t min_slot_bytes) {
    if (slab_bytes == 0 || min_slot_bytes == 0 || min_slot_bytes > slab_bytes) {
        throw PoolFormatError("slab and slot sizes do not fit each other");
    }
    Geometry g;
    g.size = size;
    g.slab_bytes = slab_bytes;
    g.min_slot_bytes = min_slot_bytes;
    g.slots_per_slab = slab_bytes / min_slot_bytes;
    for (g.num_slabs = size / slab_bytes; g.num_slabs > 0; --g.num_slabs) {
        // Before the product, which a silly size would make overflow.
        if (g.num_slabs > (kNoSlot - 1) / g.slots_per_slab) {
            throw PoolFormatError("more than 2^32 slots: give a larger smallest block");
        }
        uint64_t slots = g.num_slots();
        g.index_capacity = power_of_two_at_most(slots * 2 - 1) * 2;  // at most half full
        g.bitmap_words = round_up(slots, 4096 * 8) / 64;             // whole pages: no two clients write one line
        g.clients_at = 4096;
        g.namespaces_at = round_up(g.clients_at + kMaxClients * sizeof(ClientEntry), 4096);
        g.slab_table_at = round_up(g.namespaces_at + kMaxNamespaces * sizeof(NamespaceEntry), 4096);
        g.index_at = round_up(g.slab_table_at + g.num_slabs * sizeof(SlabEntry), 4096);
        g.slots_at = round_up(g.index_at + g.index_capacity * sizeof(IndexEntry), 4096);
        g.bitmaps_at = round_up(g.slots_at + slots * sizeof(SlotHeader), 4096);
        g.slabs_at = round_up(g.bitmaps_at + kMaxClients * g.bitmap_words * sizeof(LeaseWord), kPayloadAlign);
        g.end = g.slabs_at + g.num_slabs * slab_bytes;
        // The bitmaps of clients that never come stay holes in the file, so they do not count.
        uint64_t holes = g.slabs_at - g.bitmaps_at;
        if (g.end - holes <= size) return g;
    }
    throw PoolFormatError("a pool of " + std::to_string(size) + " bytes has no room for a single slab of " +
                          std::to_string(slab_bytes) + " bytes");
}

}  // namespace kvpool
