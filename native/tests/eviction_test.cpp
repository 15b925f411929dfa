#include "kvpool/eviction.h"

#include <algorithm>
#include <deque>
#include <map>

#include "fixtures.h"
#include "kvpool/ghosts.h"

using namespace kvpool;

namespace {

const char* const kPolicies[] = {"lru", "arc", "s3fifo"};

uint64_t hash_of(uint32_t slot) {
    return key_of(slot).hash();
}

// A policy whose blocks are known by their slots, as is what they are keyed by.
struct Subject {
    std::unique_ptr<EvictionPolicy> policy;

    Subject(const std::string& name, uint64_t capacity, size_t num_slots = 4096)
        : policy(make_policy(name, num_slots)) {
        policy->set_capacity(capacity);
    }
    EvictionPolicy* operator->() { return policy.get(); }
    void insert(std::initializer_list<uint32_t> slots) {
        for (uint32_t slot : slots) policy->insert(slot, hash_of(slot));
    }
    void hit(std::initializer_list<uint32_t> slots) {
        for (uint32_t slot : slots) policy->hit(slot);
    }
    uint32_t evict() {
        uint32_t slot = policy->coldest();
        if (slot != kNoSlot) policy->evicted(slot);
        policy->check_integrity();
        return slot;
    }
    std::vector<uint32_t> evict_all() {
        std::vector<uint32_t> order;
        for (uint32_t slot; (slot = evict()) != kNoSlot;) order.push_back(slot);
        return order;
    }
};

using Order = std::vector<uint32_t>;

// Two queues, oldest first, as the papers draw them; without ghosts.
struct Reference {
    std::string name;
    uint64_t small_target;
    std::deque<uint32_t> first, second;  // LRU uses one; T1, T2; small, main
    std::map<uint32_t, int> frequency;

    static bool take_out(std::deque<uint32_t>& queue, uint32_t slot) {
        auto found = std::find(queue.begin(), queue.end(), slot);
        if (found == queue.end()) return false;
        queue.erase(found);
        return true;
    }
    void remove(uint32_t slot) { take_out(first, slot) || take_out(second, slot); }
    void insert(uint32_t slot) {
        first.push_back(slot);
        frequency[slot] = 0;
    }
    void hit(uint32_t slot) {
        frequency[slot] = std::min(frequency[slot] + 1, 3);
        if (name == "s3fifo") return;
        remove(slot);
        (name == "arc" ? second : first).push_back(slot);
    }
    uint32_t coldest() {
        if (name != "s3fifo") return first.empty() ? second.front() : first.front();
        while (true) {
            bool from_small = first.size() >= small_target || second.empty();
            std::deque<uint32_t>& queue = from_small ? first : second;
            uint32_t slot = queue.front();
            if (frequency[slot] == 0) return slot;
            frequency[slot] = from_small ? 0 : frequency[slot] - 1;
            queue.pop_front();
            second.push_back(slot);
        }
    }
};

}  // namespace

TEST(unknown_policy) {
    CHECK_THROWS(std::invalid_argument, make_policy("fifo", 8));
    CHECK(make_policy("", 8) != nullptr);
}

TEST(lru_order) {
    Subject lru("lru", 4);
    lru.insert({1, 2, 3, 4});
    lru.hit({2, 1});
    lru->spare(3);
    CHECK(lru.evict_all() == Order({4, 2, 1, 3}));
}

// Blocks seen once go before blocks seen again, however old those are.
TEST(arc_keeps_what_was_seen_again) {
    Subject arc("arc", 4);
    arc.insert({1, 2, 3, 4});
    arc.hit({1, 2});
    CHECK(arc.evict_all() == Order({3, 4, 1, 2}));
}

// The paper's adaptation: a hit in B1 makes T1 larger, a hit in B2 makes it smaller.
TEST(arc_learns_from_its_ghosts) {
    Subject arc("arc", 4);
    arc.insert({1, 2, 3, 4});
    arc.hit({1, 2});
    CHECK_EQ(arc.evict(), 3u);  // T1 is over its target of 0
    arc.insert({3});            // in B1: target 1, and 3 counts as seen again
    CHECK_EQ(arc.evict(), 1u);  // T1 = {4} is within its target now: T2 = {1, 2, 3} gives
    arc.insert({1});            // in B2: target 0 again
    CHECK_EQ(arc.evict(), 4u);
    CHECK(arc.evict_all() == Order({2, 3, 1}));
}

TEST(arc_survives_a_scan) {
    Subject arc("arc", 100);
    for (uint32_t slot = 0; slot < 50; ++slot) {
        arc.insert({slot});
        arc.hit({slot});
    }
    for (uint32_t slot = 100; slot < 1100; ++slot) {
        arc.insert({slot});
        if (arc->size() > 100) arc.evict();
    }
    for (uint32_t slot = 0; slot < 50; ++slot) CHECK(arc->contains(slot));
}

TEST(s3fifo_lets_one_hit_wonders_go_first) {
    Subject s3("s3fifo", 10);
    s3.insert({1, 2, 3, 4});
    s3.hit({1, 3});
    CHECK_EQ(s3.evict(), 2u);  // 1 went to the main queue on the way
    CHECK_EQ(s3.evict(), 4u);  // and so did 3
    CHECK(s3.evict_all() == Order({1, 3}));
}

TEST(s3fifo_takes_ghosts_into_the_main_queue) {
    Subject s3("s3fifo", 10);
    s3.insert({1, 2, 3});
    CHECK_EQ(s3.evict(), 1u);
    s3.insert({1});  // was a ghost
    CHECK(s3.evict_all() == Order({2, 3, 1}));
}

TEST(s3fifo_gives_the_main_queue_another_round_for_each_use) {
    Subject s3("s3fifo", 40);  // small: up to 4
    s3.insert({1, 2, 3, 4});
    s3.hit({1, 2, 3, 4});
    s3.insert({5});
    s3.insert({6, 7, 8});
    CHECK_EQ(s3.evict(), 5u);  // 1 to 4 are in the main queue now, unused since
    s3.hit({1, 1, 3});
    CHECK(s3.evict_all() == Order({2, 4, 3, 1, 6, 7, 8}));
}

TEST(s3fifo_survives_a_scan) {
    Subject s3("s3fifo", 100);
    for (uint32_t slot = 0; slot < 50; ++slot) {
        s3.insert({slot});
        s3.hit({slot});
    }
    for (uint32_t slot = 100; slot < 1100; ++slot) {
        s3.insert({slot});
        if (s3->size() > 100) s3.evict();
    }
    for (uint32_t slot = 0; slot < 50; ++slot) CHECK(s3->contains(slot));
}

TEST(same_order_as_the_papers_without_ghosts) {
    for (const char* name : kPolicies) {
        Subject subject(name, 64);
        Reference reference{name, 6, {}, {}, {}};
        Random random(9);
        uint32_t next = 0;
        for (int step = 0; step < 4'000; ++step) {
            std::vector<uint32_t> in;
            for (auto* queue : {&reference.first, &reference.second}) {
                in.insert(in.end(), queue->begin(), queue->end());
            }
            CHECK_EQ(subject->size(), in.size());
            uint32_t some = in.empty() ? 0 : in[below(random, in.size())];
            uint64_t what = below(random, 10);
            if (in.size() < 2 || (what < 4 && in.size() < 64)) {
                subject.insert({next});
                reference.insert(next++);
            } else if (what < 7) {
                subject->hit(some);
                reference.hit(some);
            } else if (what < 8) {
                subject->erase(some);
                reference.remove(some);
            } else {
                uint32_t victim = reference.coldest();
                CHECK_EQ(subject.evict(), victim);
                reference.remove(victim);
            }
        }
    }
}

TEST(random_calls) {
    for (const char* name : kPolicies) {
        Subject subject(name, 50, 256);
        Random random(13);
        std::map<uint32_t, bool> in;
        for (int step = 0; step < 30'000; ++step) {
            auto slot = static_cast<uint32_t>(below(random, 256));
            if (below(random, 500) == 0) subject->set_capacity(below(random, 200));
            if (!in[slot]) {
                subject->insert(slot, hash_of(static_cast<uint32_t>(below(random, 400))));
                in[slot] = true;
                continue;
            }
            switch (below(random, 4)) {
                case 0:
                    subject->hit(slot);
                    break;
                case 1:
                    subject->spare(slot);
                    break;
                case 2:
                    subject->erase(slot);
                    in[slot] = false;
                    break;
                default:
                    slot = subject->coldest();
                    CHECK(slot != kNoSlot && in[slot]);
                    CHECK_EQ(subject.evict(), slot);
                    in[slot] = false;
            }
            CHECK_EQ(subject->contains(slot), in[slot]);
        }
        uint64_t left = 0;
        for (auto [slot, there] : in) left += there;
        CHECK_EQ(subject->size(), left);
        CHECK_EQ(subject.evict_all().size(), left);
    }
}

// Blocks that cannot go must not hide those that can, in whatever list these are.
TEST(a_list_that_is_stuck_does_not_starve_the_other) {
    for (const char* name : kPolicies) {
        Subject subject(name, 100);
        for (uint32_t slot = 0; slot < 50; ++slot) subject.insert({slot});
        for (uint32_t slot = 0; slot < 50; ++slot) subject.hit({slot});
        subject.evict();  // S3-FIFO moves them to its main queue only now
        for (uint32_t slot = 100; slot < 150; ++slot) subject.insert({slot});
        int spared = 0;
        uint32_t victim = subject->coldest();
        for (; victim >= 100; victim = subject->coldest()) {
            subject->spare(victim);
            CHECK(++spared < 60);
        }
        CHECK(victim < 50);
    }
}

TEST(ghosts_remember_about_as_many_as_they_should) {
    Ghosts ghosts;
    ghosts.set_capacity(1000);
    for (uint32_t i = 0; i < 5000; ++i) ghosts.add(hash_of(i));
    int remembered = 0;
    for (uint32_t i = 4000; i < 5000; ++i) remembered += ghosts.take(hash_of(i));
    CHECK(remembered > 800);
    for (uint32_t i = 0; i < 4000; ++i) CHECK(!ghosts.take(hash_of(i)));
    for (uint32_t i = 4000; i < 5000; ++i) CHECK(!ghosts.take(hash_of(i)));
    ghosts.add(1);
    ghosts.set_capacity(100'000);
    CHECK_EQ(ghosts.size(), 0u);
    CHECK(!ghosts.take(1));
}
