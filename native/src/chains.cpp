#include "kvpool/chains.h"

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
    links.next_sibling = links_[parent].first_child;
    if (links.next_sibling != 0) links_[links.next_sibling - 1].prev_sibling = child + 1;
    links_[parent].first_child = child + 1;
    return true;
}

void Chains::unlink(uint32_t slot) {
    Links& links = links_[slot];
    if (links.parent != 0) {
        if (links.prev_sibling != 0) {
            links_[links.prev_sibling - 1].next_sibling = links.next_sibling;
        } else {
            links_[links.parent - 1].first_child = links.next_sibling;
        }
        if (links.next_sibling != 0) links_[links.next_sibling - 1].prev_sibling = links.prev_sibling;
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
    for (uint32_t child = links.first_child, prev = 0; child != 0; child = links_[child - 1].next_sibling) {
        ensure(links_[child - 1].parent == slot + 1, "chain: child of another parent");
        ensure(links_[child - 1].prev_sibling == prev, "chain: sibling order");
        prev = child;
    }
}

}  // namespace kvpool
