// Leases work like hazard pointers (Michael, 2004). A client owns a bitmap with one bit a slot:
//
//   reader:  set the bit          evictor: READY -> EVICTING
//            then check the word           then look at all bitmaps
//
// Both sides use sequentially consistent operations, so at least one of them sees the other: a reader never copies
// from a slot that was given away, and the evictor puts a leased slot back.
#pragma once

#include "kvpool/lazy_array.h"
#include "kvpool/mapping.h"

namespace kvpool {

// The daemon's side: is anybody reading this slot?
bool is_leased(const PoolFile& file, uint32_t slot);
// Bits set in one client's bitmap.
uint64_t count_leases(const PoolFile& file, uint32_t client);
void clear_leases(const PoolFile& file, uint32_t client);

// A client's side. Several requests may hold one slot: the count is local, the bit is shared. Not thread-safe.
// Invariant: bit(slot) == (count(slot) > 0), and held() is the number of such slots.
class LeaseTable {
  public:
    LeaseTable(const PoolFile& file, uint32_t client)
        : file_(file), bits_(file.bitmap(client)), counts_(file.geometry().num_slots()) {}

    // True when the slot is leased now and is READY with that generation.
    bool take(SlotRef ref);
    void release(SlotRef ref);
    uint64_t held() const { return held_; }
    void check_integrity() const;

  private:
    const PoolFile& file_;
    LeaseWord* bits_;
    LazyArray<uint32_t> counts_;
    uint64_t held_ = 0;
};

}  // namespace kvpool
