// Which blocks are copies: another host, their source, has them too, as they came from there or went there, so that
// forgetting one here loses nothing. Eviction takes them before blocks that may be the only ones; what it may take is
// `offer`ed.
//
// A block is a copy from the request for its slot, or since its source has it, until it is used a second time: then it
// is an ordinary block of this host, and so a prefix that is in demand spreads. Marks end with the block, and all those
// of a source at once when it is forgotten. They live on the daemon's heap: after a restart there are none.
#pragma once

#include <array>
#include <vector>

#include "kvpool/lazy_array.h"
#include "kvpool/slot_list.h"
#include "kvpool/types.h"

namespace kvpool {

using HostId = std::array<uint8_t, 16>;

class Copies {
  public:
    explicit Copies(size_t num_slots);
    Copies(const Copies&) = delete;

    // A number for `mark`; good until something else is called.
    uint16_t number_of(const HostId& source);
    void mark(uint32_t slot, uint16_t source);
    void unmark(uint32_t slot);
    // True: it was the second time, and it is no copy any more.
    bool use(uint32_t slot);
    // Its source counts as gone: none of its blocks are copies any more.
    void forget(const HostId& source);
    std::vector<HostId> sources() const;

    bool is_copy(uint32_t slot) const { return marks_[slot] != 0 && sources_[marks_[slot]].known; }
    bool used_once(uint32_t slot) const { return is_copy(slot) && nodes_[slot].freq == 1; }
    uint64_t size() const { return size_; }

    // Whether eviction may take it. What it could take all along, but for a child, comes `next`: the rest of a chain
    // goes before another one is begun.
    void offer(uint32_t slot, uint32_t name_space, bool expendable, bool next);
    uint64_t offered(uint32_t name_space) const { return offers_[name_space].size(); }
    // The one to take first; kNoSlot: none.
    uint32_t coldest(uint32_t name_space);
    // It cannot go now.
    void spare(uint32_t slot) { offers_[nodes_[slot].list - 1].refresh(slot); }

    // `slots`: how many slots have a mark, as far as the caller can see.
    void check_integrity(uint64_t slots) const;
    bool is_offered(uint32_t slot) const { return nodes_[slot].list != 0; }
    bool is_marked(uint32_t slot) const { return marks_[slot] != 0; }

  private:
    struct Source {
        HostId id{};
        bool known = false;
        uint64_t marks = 0;  // 0: the entry is free
    };
    LazyArray<uint16_t> marks_;     // place in `sources_`; 0 = no copy
    LazyArray<SlotNode> nodes_;     // `freq`: how often it was used; `list`: namespace + 1
    std::vector<Source> sources_;   // forgotten ones stay until their marks have gone, one by one
    std::vector<SlotList> offers_;  // by namespace
    uint64_t size_ = 0;
};

}  // namespace kvpool
