// Who follows whom: the tree of prefixes. A block is worth nothing without its parent, so eviction takes leaves first.
// Links are by slot and live on the daemon's heap; `SlotHeader::parent_tag` lets a restart guess them again.
#pragma once

#include <cstdint>

#include "kvpool/lazy_array.h"
#include "kvpool/types.h"

namespace kvpool {

class Chains {
  public:
    explicit Chains(size_t num_slots) : links_(num_slots) {}

    // `child` must have no parent. Refuses (false) when that would close a circle.
    bool link(uint32_t child, uint32_t parent);
    // Takes a block out; its children, if any, stay as roots.
    void unlink(uint32_t slot);
    bool has_children(uint32_t slot) const { return links_[slot].first_child != 0; }
    uint32_t parent(uint32_t slot) const { return links_[slot].parent - 1; }  // kNoSlot for a root
    // A block without children at or below `slot`: down by the child that was linked first, as the newest is the one
    // that somebody works with.
    uint32_t leaf_below(uint32_t slot) const;
    void check_integrity(uint32_t slot) const;

  private:
    // All slot + 1, 0 = none. Siblings are in the order of linking; the first one's prev_sibling is the last.
    struct Links {
        uint32_t parent, first_child, next_sibling, prev_sibling;
    };
    LazyArray<Links> links_;
};

}  // namespace kvpool
