#include "kvpool/leases.h"

#include "fixtures.h"

using namespace kvpool;

namespace {

struct Leases {
    Folder folder;
    PoolFile file;

    Leases() : file(PoolFile::create(folder.pool(), Geometry::plan(8 * kMiB, kSlotBytes), 0600)) {
        file.header().clients_high.store(3);
        set(5, 1, SlotState::kReady);
    }
    void set(uint32_t slot, uint32_t generation, SlotState state) {
        file.slots()[slot].word.store(SlotWord::make(generation, state));
    }
};

}  // namespace

TEST(a_lease_is_seen_by_the_evictor) {
    Leases pool;
    LeaseTable table(pool.file, 2);
    CHECK(!is_leased(pool.file, 5));
    CHECK(table.take({5, 1}));
    CHECK(is_leased(pool.file, 5));
    CHECK(!is_leased(pool.file, 4) && !is_leased(pool.file, 69));
    CHECK_EQ(count_leases(pool.file, 2), 1u);
    CHECK_EQ(count_leases(pool.file, 1), 0u);
    table.release({5, 1});
    CHECK(!is_leased(pool.file, 5));
    table.check_integrity();
}

TEST(a_slot_is_leased_until_its_last_user_is_done) {
    Leases pool;
    LeaseTable table(pool.file, 0);
    for (int i = 0; i < 3; ++i) CHECK(table.take({5, 1}));
    CHECK_EQ(table.held(), 1u);
    table.release({5, 1});
    table.release({5, 1});
    CHECK(is_leased(pool.file, 5));
    table.check_integrity();
    table.release({5, 1});
    CHECK_EQ(table.held(), 0u);
    CHECK_THROWS(IntegrityError, table.release({5, 1}));
    CHECK_THROWS(IntegrityError, table.release({UINT32_MAX, 1}));
}

TEST(clients_do_not_release_for_each_other) {
    Leases pool;
    LeaseTable a(pool.file, 0), b(pool.file, 1);
    CHECK(a.take({5, 1}) && b.take({5, 1}));
    a.release({5, 1});
    CHECK(is_leased(pool.file, 5));
    CHECK_THROWS(IntegrityError, a.release({5, 1}));
    clear_leases(pool.file, 1);
    CHECK(!is_leased(pool.file, 5));
}

TEST(only_that_very_block_is_leased) {
    Leases pool;
    LeaseTable table(pool.file, 0);
    CHECK(!table.take({5, 2}));
    CHECK(!table.take({6, 1}));
    CHECK(!table.take({5, 0}));
    CHECK(!table.take({UINT32_MAX, 1}));
    for (SlotState state : {SlotState::kFree, SlotState::kWriting, SlotState::kEvicting}) {
        pool.set(5, 1, state);
        CHECK(!table.take({5, 1}));
    }
    CHECK(!is_leased(pool.file, 5));
    table.check_integrity();
    // A failed try takes nothing away from a lease that is held.
    pool.set(5, 1, SlotState::kReady);
    CHECK(table.take({5, 1}));
    CHECK(!table.take({5, 2}));
    CHECK(is_leased(pool.file, 5));
}

TEST(every_slot_has_its_own_bit) {
    Leases pool;
    auto num_slots = static_cast<uint32_t>(pool.file.geometry().num_slots());
    LeaseTable table(pool.file, 1);
    for (uint32_t slot = 0; slot < num_slots; ++slot) {
        pool.set(slot, 9, SlotState::kReady);
        CHECK(table.take({slot, 9}));
        CHECK_EQ(count_leases(pool.file, 1), slot + 1);
    }
    table.check_integrity();
    for (uint32_t slot = 0; slot < num_slots; slot += 2) table.release({slot, 9});
    for (uint32_t slot = 0; slot < num_slots; ++slot) {
        CHECK_EQ(is_leased(pool.file, slot), slot % 2 == 1);
    }
}
