#include "kvpool/chains.h"

#include <map>
#include <set>

#include "fixtures.h"

using namespace kvpool;

TEST(a_leaf_is_found_below_any_block) {
    Chains chains(10);
    CHECK_EQ(chains.leaf_below(4), 4u);
    CHECK(chains.link(1, 0));
    CHECK(chains.link(2, 1));
    CHECK(chains.link(3, 2));
    CHECK_EQ(chains.leaf_below(0), 3u);
    CHECK_EQ(chains.parent(3), 2u);
    CHECK_EQ(chains.parent(0), kNoSlot);
    CHECK(chains.has_children(2) && !chains.has_children(3));
}

TEST(the_oldest_child_comes_first) {
    Chains chains(6);
    for (uint32_t child : {3, 1, 2}) chains.link(child, 0);
    for (uint32_t oldest : {3, 1, 2}) {
        CHECK_EQ(chains.leaf_below(0), oldest);
        chains.unlink(oldest);
        chains.check_integrity(0);
    }
    CHECK(!chains.has_children(0));
}

TEST(circles_are_refused) {
    Chains chains(4);
    CHECK(!chains.link(0, 0));
    chains.link(1, 0);
    chains.link(2, 1);
    CHECK(!chains.link(0, 2));
    CHECK(!chains.link(0, 1));
    CHECK_EQ(chains.parent(0), kNoSlot);
    CHECK(chains.link(0, 3));
}

TEST(a_block_has_one_parent) {
    Chains chains(4);
    chains.link(1, 0);
    CHECK_THROWS(IntegrityError, chains.link(1, 2));
}

TEST(children_of_a_block_that_goes_are_roots) {
    Chains chains(6);
    for (uint32_t child : {1, 2, 3}) chains.link(child, 0);
    chains.link(4, 2);
    chains.unlink(2);  // one in the middle
    CHECK_EQ(chains.parent(4), kNoSlot);
    chains.check_integrity(0);
    chains.unlink(0);
    for (uint32_t child : {1, 3}) CHECK_EQ(chains.parent(child), kNoSlot);
    CHECK(chains.link(3, 4));
    CHECK_EQ(chains.leaf_below(4), 3u);
}

TEST(random_links) {
    constexpr uint32_t kSlots = 40;
    Random random(5);
    Chains chains(kSlots);
    std::map<uint32_t, uint32_t> parent_of;
    auto above = [&](uint32_t slot, uint32_t wanted) {
        for (; slot != wanted; slot = parent_of.at(slot)) {
            if (parent_of.count(slot) == 0) return false;
        }
        return true;
    };
    for (int step = 0; step < 20'000; ++step) {
        auto a = static_cast<uint32_t>(below(random, kSlots));
        auto b = static_cast<uint32_t>(below(random, kSlots));
        if (below(random, 3) == 0) {
            chains.unlink(a);
            parent_of.erase(a);
            for (auto it = parent_of.begin(); it != parent_of.end();) {
                it = it->second == a ? parent_of.erase(it) : std::next(it);
            }
        } else if (parent_of.count(a) == 0) {
            bool circle = above(b, a);
            CHECK_EQ(chains.link(a, b), !circle);
            if (!circle) parent_of[a] = b;
        }
        std::set<uint32_t> parents;
        for (auto [child, parent] : parent_of) parents.insert(parent);
        for (uint32_t slot = 0; slot < kSlots; ++slot) {
            chains.check_integrity(slot);
            CHECK_EQ(chains.has_children(slot), parents.count(slot) != 0);
            CHECK_EQ(chains.parent(slot), parent_of.count(slot) != 0 ? parent_of[slot] : kNoSlot);
            uint32_t leaf = chains.leaf_below(slot);
            CHECK(!chains.has_children(leaf) && above(leaf, slot));
        }
    }
}
