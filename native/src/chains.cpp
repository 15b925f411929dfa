#include "kvpool/chains.h"

#include <utility>

namespace kvpool {

bool Chains::link(uint32_t child, uint32_t parent) {
    ensure(links_[child].parent == 0, "linked a block that has a parent");
    if (links_[child].first_child != 0) {
        for (uint32_t up = parent + 1; up != 0; up = links_[up - 1].parent) {
            if (up - 1 == child) return false;
        }
    } else if (child == parent) {
        return false;
    }
    Links& links = links_[child];
    links.parent = parent + 1;
    uint32_t first = links_[parent].first_child;
    if (first == 0) {
        links_[parent].first_child = links.prev_sibling = child + 1;
        return true;
    }
    links.prev_sibling = std::exchange(links_[first - 1].prev_sibling, child + 1);
    links_[links.prev_sibling - 1].next_sibling = child + 1;
    return true;
}

void Chains::unlink(uint32_t slot) {
    Links& links = links_[slot];
    if (links.parent != 0) {
        uint32_t& first = links_[links.parent - 1].first_child;
        bool was_first = first == slot + 1;
        (was_first ? first : links_[links.prev_sibling - 1].next_sibling) = links.next_sibling;
        uint32_t behind = links.next_sibling != 0 ? links.next_sibling : first;  // the first knows the last
        if (behind != 0) links_[behind - 1].prev_sibling = links.prev_sibling;
    }
    for (uint32_t child = links.first_child; child != 0;) {
        Links& orphan = links_[child - 1];
        child = orphan.next_sibling;
        orphan.parent = orphan.next_sibling = orphan.prev_sibling = 0;
    }
    links = Links{};
}

uint32_t Chains::leaf_below(uint32_t slot) const {
    while (links_[slot].first_child != 0) slot = links_[slot].first_child - 1;
    return slot;
}

void Chains::check_integrity(uint32_t slot) const {
    const Links& links = links_[slot];
    uint32_t last = 0;
    for (uint32_t child = links.first_child; child != 0; child = links_[child - 1].next_sibling) {
        ensure(links_[child - 1].parent == slot + 1, "chain: child of another parent");
        ensure(last == 0 || links_[child - 1].prev_sibling == last, "chain: sibling order");
        last = child;
    }
    ensure(last == 0 || links_[links.first_child - 1].prev_sibling == last, "chain: the first knows the last");
}

}  // namespace kvpool
