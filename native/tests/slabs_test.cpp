#include "kvpool/slabs.h"

#include <set>

#include "fixtures.h"

using namespace kvpool;

namespace {

// Three slabs of 32 slots; two namespaces, the second with slots four times as large.
struct Slabs {
    Folder folder;
    PoolFile file;
    std::unique_ptr<SlabAllocator> allocator;

    Slabs() : file(PoolFile::create(folder.pool(), Geometry::plan(8 * kMiB, kSlotBytes), 0600)) {
        for (uint32_t ns = 0; ns < 2; ++ns) {
            file.namespaces()[ns].active.store(1);
            file.slabs()[ns].populated.store(1);
        }
        reload();
    }
    void reload() { allocator = std::make_unique<SlabAllocator>(file); }
    SlabAllocator* operator->() { return allocator.get(); }

    std::vector<uint32_t> take_all(uint32_t ns) {
        std::vector<uint32_t> slots;
        while (true) {
            uint32_t slot = allocator->take(ns);
            if (slot == kNoSlot) return slots;
            slots.push_back(slot);
        }
    }
};

}  // namespace

TEST(slots_of_a_slab_are_given_out_once) {
    Slabs slabs;
    CHECK_EQ(slabs->take(0), kNoSlot);
    CHECK(slabs->assign_any(0, kSlotBytes));
    std::vector<uint32_t> slots = slabs.take_all(0);
    CHECK_EQ(std::set<uint32_t>(slots.begin(), slots.end()).size(), 32u);
    CHECK_EQ(slabs->used_slots(0), 32u);
    slabs->give(slots[7]);
    slabs->give(slots[3]);
    slabs->check_integrity();
    CHECK_EQ(slabs->take(0), slots[3]);
    CHECK_EQ(slabs->take(0), slots[7]);
    CHECK_EQ(slabs->take(0), kNoSlot);
}

TEST(only_slabs_with_pages_are_assigned) {
    Slabs slabs;
    CHECK_EQ(slabs->unassigned_populated(), 2u);
    CHECK(slabs->assign_any(0, kSlotBytes));
    CHECK(slabs->assign_any(1, 4 * kSlotBytes));
    CHECK(!slabs->assign_any(0, kSlotBytes));
    slabs.file.slabs()[2].populated.store(1);
    CHECK(slabs->assign_any(0, kSlotBytes));
    CHECK_EQ(slabs->num_slots(0), 64u);
}

TEST(larger_slots_are_fewer) {
    Slabs slabs;
    slabs->assign_any(0, kSlotBytes);
    slabs->assign_any(1, 4 * kSlotBytes);
    std::vector<uint32_t> slots = slabs.take_all(1);
    CHECK_EQ(slots.size(), 8u);
    // Numbers stay those of the slab, payloads lie one after the other in it.
    CHECK_EQ(slots[0], 32u);
    CHECK_EQ(slabs.file.payload(slots[7]) - slabs.file.payload(slots[0]), 7 * 4 * kSlotBytes);
    CHECK(slabs.file.payload(slots[7]) + 4 * kSlotBytes <= slabs.file.base() + slabs.file.geometry().slab_at(2));
}

TEST(a_slab_moves_when_it_is_empty) {
    Slabs slabs;
    slabs->assign_any(0, kSlotBytes);
    uint32_t slot = slabs->take(0);
    CHECK_THROWS(IntegrityError, slabs->unassign(0));
    slabs->give(slot);
    slabs->unassign(0);
    CHECK_EQ(slabs->num_slots(0), 0u);
    CHECK_EQ(slabs->take(0), kNoSlot);
    CHECK(slabs->assign_any(1, 4 * kSlotBytes));
    CHECK_EQ(slabs.take_all(1).size(), 8u);
    slabs->check_integrity();
}

TEST(recovered_slots_are_in_use_and_the_others_free) {
    Slabs slabs;
    slabs->assign_any(0, kSlotBytes);
    slabs.reload();
    std::set<uint32_t> kept = {0, 3, 4, 17};
    for (uint32_t slot : kept) slabs->adopt(slot);
    slabs->check_integrity();
    CHECK_EQ(slabs->used_slots(0), 4u);
    std::vector<uint32_t> rest = slabs.take_all(0);
    CHECK_EQ(rest.size(), 28u);
    for (uint32_t slot : rest) CHECK(kept.insert(slot).second);
    slabs->check_integrity();
}

TEST(random_takes_and_gives) {
    Slabs slabs;
    Random random(3);
    std::vector<uint32_t> held[2];
    uint32_t slot_bytes[2] = {kSlotBytes, 4 * kSlotBytes};
    for (int step = 0; step < 20'000; ++step) {
        auto ns = static_cast<uint32_t>(below(random, 2));
        uint32_t slot = kNoSlot;
        if (below(random, 2) == 0) slot = slabs->take(ns);
        if (slot != kNoSlot) {
            held[ns].push_back(slot);
        } else if (!held[ns].empty()) {
            std::swap(held[ns][below(random, held[ns].size())], held[ns].back());
            slabs->give(held[ns].back());
            held[ns].pop_back();
        } else {
            for (uint32_t slab : std::vector<uint32_t>(slabs->slabs_of(ns))) slabs->unassign(slab);
            slabs->assign_any(ns, slot_bytes[ns]);
        }
        CHECK_EQ(slabs->used_slots(ns), held[ns].size());
        if (step % 50 == 0) slabs->check_integrity();
    }
}

TEST(a_table_that_cannot_be_is_refused) {
    Slabs slabs;
    slabs->assign_any(0, kSlotBytes);
    SlabEntry& entry = slabs.file.slabs()[0];
    slabs.reload();
    entry.owner.store(kMaxNamespaces + 1);
    CHECK_THROWS(PoolFormatError, slabs.reload());
    entry.owner.store(3);  // a namespace that is not there
    CHECK_THROWS(PoolFormatError, slabs.reload());
    entry.owner.store(1);
    entry.slot_bytes.store(0);
    CHECK_THROWS(PoolFormatError, slabs.reload());
    entry.slot_bytes.store(2 * kSlotBytes);  // with the number of slots of another size
    CHECK_THROWS(PoolFormatError, slabs.reload());
}
