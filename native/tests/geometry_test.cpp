#include "check.h"
#include "kvpool/format.h"

using namespace kvpool;

namespace {

constexpr uint64_t kKiB = 1ull << 10, kMiB = 1ull << 20, kGiB = 1ull << 30, kTiB = 1ull << 40;

// Parts follow each other without overlap, aligned as their types and the kernel want them.
void check_layout(const Geometry& g) {
    uint64_t slots = g.num_slots();
    CHECK(g.num_slabs > 0 && slots > 0 && slots < kNoSlot);
    CHECK((g.index_capacity & (g.index_capacity - 1)) == 0);
    CHECK(g.index_capacity >= 2 * slots);
    CHECK(g.bitmap_words * 64 >= slots);
    CHECK(g.clients_at >= sizeof(FileHeader));
    CHECK(g.namespaces_at >= g.clients_at + kMaxClients * sizeof(ClientEntry));
    CHECK(g.slab_table_at >= g.namespaces_at + kMaxNamespaces * sizeof(NamespaceEntry));
    CHECK(g.index_at >= g.slab_table_at + g.num_slabs * sizeof(SlabEntry));
    CHECK(g.slots_at >= g.index_at + g.index_capacity * sizeof(IndexEntry));
    CHECK(g.bitmaps_at >= g.slots_at + slots * sizeof(SlotHeader));
    CHECK(g.slabs_at >= g.bitmaps_at + kMaxClients * g.bitmap_words * sizeof(LeaseWord));
    CHECK_EQ(g.end, g.slabs_at + g.num_slabs * g.slab_bytes);
    for (uint64_t at : {g.clients_at, g.namespaces_at, g.slab_table_at, g.index_at, g.slots_at, g.bitmaps_at,
                        g.bitmap_words * sizeof(LeaseWord)}) {
        CHECK_EQ(at % 4096, 0u);
    }
    CHECK_EQ(g.slabs_at % kPayloadAlign, 0u);
}

}  // namespace

TEST(every_size_has_a_sound_layout) {
    for (uint64_t size : {4 * kMiB, 5 * kMiB + 1, 24 * kMiB, 512 * kMiB, 3 * kGiB, 64 * kGiB + 4096, kTiB, 16 * kTiB}) {
        for (uint64_t slot : {4 * kKiB, uint64_t{5'000}, 64 * kKiB, kMiB, 2 * kMiB}) {
            if (size / slot > 1ull << 31) continue;
            Geometry g = Geometry::plan(size, slot);
            check_layout(g);
            CHECK_EQ(g.size, size);
            CHECK(g.end - (g.slabs_at - g.bitmaps_at) <= size);
        }
    }
}

TEST(the_smallest_pools) {
    // Three numbers with as few slots as can be: a table of two entries is aligned as well.
    Geometry g = Geometry::derive(4 * kMiB, 2 * kMiB, 2 * kMiB);
    CHECK_EQ(g.num_slots(), 1u);
    CHECK_EQ(g.index_capacity, 2u);
    check_layout(g);
}

TEST(blocks_of_a_power_of_two_and_their_trailers_fill_a_slab) {
    for (uint64_t size : {512 * kMiB, kGiB, 8 * kGiB, 256 * kGiB}) {
        uint64_t slab_bytes = Geometry::plan(size, 64 * kKiB).slab_bytes;
        for (uint64_t block = 64 * kKiB; block <= 2 * kMiB; block *= 2) {
            uint64_t slots = slab_bytes / (block + 256);
            CHECK(slots * block > slab_bytes * 99 / 100);
        }
    }
}

TEST(tables_are_a_small_part_of_a_large_pool) {
    Geometry g = Geometry::plan(kTiB, 64 * kKiB);
    CHECK_EQ(g.slab_bytes, kGiB + 4 * kMiB);
    uint64_t tables = g.slabs_at - (g.slabs_at - g.bitmaps_at);
    CHECK(tables < kTiB / 500);
    CHECK(g.num_slabs > 1016);
}

TEST(a_file_says_the_same_of_itself) {
    for (uint64_t size : {24 * kMiB, 3 * kGiB, kTiB}) {
        Geometry a = Geometry::plan(size, 64 * kKiB);
        Geometry b = Geometry::derive(a.size, a.slab_bytes, a.min_slot_bytes);
        CHECK_EQ(a.num_slabs, b.num_slabs);
        CHECK_EQ(a.slots_at, b.slots_at);
        CHECK_EQ(a.end, b.end);
    }
}

TEST(sizes_that_cannot_be) {
    CHECK_THROWS(PoolFormatError, Geometry::plan(0, 64 * kKiB));
    CHECK_THROWS(PoolFormatError, Geometry::plan(2 * kMiB, 64 * kKiB));  // no room for the tables
    CHECK_THROWS(PoolFormatError, Geometry::plan(64 * kMiB, 0));
    CHECK_THROWS(PoolFormatError, Geometry::plan(64 * kMiB, 3 * kMiB));  // larger than a slab
    CHECK_THROWS(PoolFormatError, Geometry::derive(64 * kMiB, 0, 4096));
    CHECK_THROWS(PoolFormatError, Geometry::plan(kTiB, 128));  // more than 2^32 slots
    // Products that do not fit into 64 bits are an error too, and no endless loop.
    CHECK_THROWS(PoolFormatError, Geometry::plan(UINT64_MAX, 1));
    CHECK_THROWS(PoolFormatError, Geometry::derive(UINT64_MAX, 1ull << 32, 1));
}

TEST(references_pack_into_a_word) {
    SlotRef ref{0x12345678, 0x9abcdef0};
    SlotRef back = SlotRef::unpack(ref.pack());
    CHECK_EQ(back.slot, ref.slot);
    CHECK_EQ(back.generation, ref.generation);
    CHECK(SlotRef::unpack(0).none());
    uint64_t word = SlotWord::make(7, SlotState::kReady);
    CHECK_EQ(SlotWord::generation(word), 7u);
    CHECK(SlotWord::state(word) == SlotState::kReady);
}
