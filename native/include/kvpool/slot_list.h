// Doubly linked lists threaded through per-slot nodes: what eviction policies are made of.
#pragma once

#include <cstdint>

#include "kvpool/lazy_array.h"
#include "kvpool/types.h"

namespace kvpool {

struct SlotNode {
    uint32_t older = 0, newer = 0;  // slot + 1
    uint8_t list = 0;               // which list of the policy holds it; 0 = none
    uint8_t freq = 0;
    uint64_t key_hash = 0;
};

// Newest at one end, oldest at the other. A slot is in at most one of the lists that share the nodes.
class SlotList {
  public:
    SlotList(LazyArray<SlotNode>& nodes, uint8_t id) : nodes_(nodes), id_(id) {}

    void push_newest(uint32_t slot) {
        SlotNode& node = nodes_[slot];
        node.list = id_;
        node.older = newest_;
        node.newer = 0;
        (newest_ != 0 ? nodes_[newest_ - 1].newer : oldest_) = slot + 1;
        newest_ = slot + 1;
        ++size_;
    }
    void push_oldest(uint32_t slot) {
        SlotNode& node = nodes_[slot];
        node.list = id_;
        node.newer = oldest_;
        node.older = 0;
        (oldest_ != 0 ? nodes_[oldest_ - 1].older : newest_) = slot + 1;
        oldest_ = slot + 1;
        ++size_;
    }
    void remove(uint32_t slot) {
        SlotNode& node = nodes_[slot];
        (node.newer != 0 ? nodes_[node.newer - 1].older : newest_) = node.older;
        (node.older != 0 ? nodes_[node.older - 1].newer : oldest_) = node.newer;
        node.list = 0;
        --size_;
    }
    void refresh(uint32_t slot) {
        remove(slot);
        push_newest(slot);
    }
    // The oldest cannot go now: next time it is another one's turn. When none of them can, the list is stuck, and
    // asking it again is in vain until `retry`.
    void spare(uint32_t slot) {
        refresh(slot);
        ++spared_;
    }
    bool stuck() const { return spared_ >= size_; }
    void retry() { spared_ = 0; }
    bool has(uint32_t slot) const { return nodes_[slot].list == id_; }
    uint32_t oldest() const { return oldest_ - 1; }  // kNoSlot when empty
    uint64_t size() const { return size_; }

    void check_integrity() const {
        uint64_t seen = 0;
        for (uint32_t at = oldest_, older = 0; at != 0; older = at, at = nodes_[at - 1].newer) {
            ensure(nodes_[at - 1].older == older && nodes_[at - 1].list == id_, "policy list: broken link");
            ensure(++seen <= size_, "policy list: circle");
        }
        ensure(seen == size_, "policy list: size");
    }

  private:
    LazyArray<SlotNode>& nodes_;
    uint8_t id_;
    uint32_t newest_ = 0, oldest_ = 0;  // slot + 1
    uint64_t size_ = 0;
    uint64_t spared_ = 0;  // since `retry`
};

}  // namespace kvpool
