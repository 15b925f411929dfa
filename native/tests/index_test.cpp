#include "kvpool/index.h"

#include <algorithm>
#include <unordered_map>

#include "fixtures.h"

using namespace kvpool;

namespace {

// An index over bare slot headers; what the daemon does to them is played here.
struct Table {
    Folder folder;
    PoolFile file;
    Index index;

    explicit Table(uint64_t size = 64 * kMiB)
        : file(PoolFile::create(folder.pool(), Geometry::plan(size, 16 << 10), 0600)), index(file) {}

    uint64_t num_slots() const { return file.geometry().num_slots(); }
    void set(uint32_t slot, const BlockKey& key, SlotState state, uint32_t generation = 1, uint32_t expiry_s = 0) {
        SlotHeader& header = file.slots()[slot];
        header.store_key(key);
        header.expiry_s.store(expiry_s);
        header.word.store(SlotWord::make(generation, state));
    }
    void add(uint32_t slot, const BlockKey& key) {
        set(slot, key, SlotState::kReady);
        index.insert(key, slot);
    }
    void remove(uint32_t slot, const BlockKey& key) {
        CHECK(index.erase(key, slot));
        set(slot, key, SlotState::kFree);
    }
};

// Random inserts and erases of keys whose tags come from `draw`, against a map.
template <class Draw>
void compare_with_map(Table& table, size_t steps, Draw draw) {
    Random random(11);
    std::unordered_map<uint64_t, uint32_t> hash_to_slot;
    std::vector<uint64_t> hashes;  // of the keys in the map
    std::vector<uint32_t> free;
    for (uint32_t slot = 0; slot < table.num_slots(); ++slot) free.push_back(slot);
    for (size_t step = 0; step < steps; ++step) {
        bool insert = hashes.empty() || (!free.empty() && below(random, 100) < 55);
        if (insert) {
            uint64_t hash = draw(random);
            if (hash_to_slot.count(hash) != 0) continue;
            table.add(free.back(), key_with_hash(hash));
            hash_to_slot[hash] = free.back();
            hashes.push_back(hash);
            free.pop_back();
        } else {
            std::swap(hashes[below(random, hashes.size())], hashes.back());
            uint32_t slot = hash_to_slot.at(hashes.back());
            table.remove(slot, key_with_hash(hashes.back()));
            CHECK_EQ(table.index.find(key_with_hash(hashes.back())), kNoSlot);
            hash_to_slot.erase(hashes.back());
            hashes.pop_back();
            free.push_back(slot);
        }
        CHECK_EQ(table.index.size(), hash_to_slot.size());
        if (step % 64 != 0) continue;
        for (uint64_t hash : hashes) {
            CHECK_EQ(table.index.find(key_with_hash(hash)), hash_to_slot.at(hash));
            CHECK_EQ(table.index.find_ready(key_with_hash(hash), 0)->slot, hash_to_slot.at(hash));
        }
    }
}

std::vector<uint64_t> match(const Table& table, const std::vector<BlockKey>& keys, uint32_t now_s = 0) {
    std::vector<uint64_t> refs(keys.size());
    auto bytes = reinterpret_cast<const uint8_t*>(keys.data());
    refs.resize(table.index.match_prefix(bytes, keys.size(), now_s, refs.data()));
    return refs;
}

}  // namespace

TEST(keys_have_the_hash_that_was_asked_for) {
    Random random(1);
    for (int i = 0; i < 1000; ++i) {
        uint64_t hash = random();
        CHECK_EQ(key_with_hash(hash).hash(), hash);
    }
    CHECK_EQ(key_with_hash(5ull << 32).tag(), 5u);
}

TEST(random_keys) {
    Table table;
    compare_with_map(table, 20'000, [](Random& random) { return random(); });
}

// All keys want one of four places at the end of the table: long runs that wrap around, with
// entries of other homes in between.
TEST(clustered_tags) {
    Table table(8 * kMiB);
    uint64_t last = table.file.geometry().index_capacity - 1;
    compare_with_map(table, 6'000, [=](Random& random) {
        uint64_t tag = (last - 3 + below(random, 4)) | below(random, 8) << 20;
        return tag << 32 | below(random, 1 << 16);
    });
}

TEST(same_tag_other_key) {
    Table table;
    for (uint32_t i = 0; i < 20; ++i) table.add(i, key_with_hash(7ull << 32 | i));
    for (uint32_t i = 0; i < 20; ++i) {
        CHECK_EQ(table.index.find_ready(key_with_hash(7ull << 32 | i), 0)->slot, i);
    }
    CHECK(!table.index.find_ready(key_with_hash(7ull << 32 | 20), 0));
    CHECK(table.index.find_tag(7) < 20);
    CHECK_EQ(table.index.find_tag(8), kNoSlot);
    table.index.clear();
    CHECK_EQ(table.index.find_tag(7), kNoSlot);
}

TEST(erase_takes_only_the_pair_of_key_and_slot) {
    Table table;
    table.add(3, key_of(1));
    CHECK(!table.index.erase(key_of(1), 4));
    CHECK(!table.index.erase(key_of(2), 3));
    CHECK_EQ(table.index.find(key_of(1)), 3u);
    CHECK(table.index.erase(key_of(1), 3));
    CHECK(!table.index.erase(key_of(1), 3));
}

TEST(only_ready_blocks_in_time_are_hits) {
    Table table;
    table.add(5, key_of(1));
    for (SlotState state : {SlotState::kFree, SlotState::kWriting, SlotState::kEvicting}) {
        table.set(5, key_of(1), state);
        CHECK(!table.index.find_ready(key_of(1), 0));
        CHECK_EQ(table.index.find(key_of(1)), 5u);
    }
    table.set(5, key_of(1), SlotState::kReady, 42, 100);
    CHECK_EQ(table.index.find_ready(key_of(1), 99)->generation, 42u);
    CHECK(!table.index.find_ready(key_of(1), 100));
    // The entry is a hint: the slot may be somebody else's by now.
    table.set(5, key_of(2), SlotState::kReady);
    CHECK(!table.index.find_ready(key_of(1), 0));
}

TEST(a_match_ends_at_the_first_miss) {
    Table table;
    std::vector<BlockKey> keys = keys_of(0, 200);
    for (uint32_t i = 0; i < 200; ++i) table.add(i, keys[i]);
    CHECK_EQ(match(table, keys).size(), 200u);
    CHECK_EQ(SlotRef::unpack(match(table, keys)[77]).slot, 77u);
    // Within a group of prefetches, at its border, in the first place.
    for (uint32_t hole : {150u, 64u, 63u, 32u, 31u, 0u}) {
        table.set(hole, keys[hole], SlotState::kWriting);
        CHECK_EQ(match(table, keys).size(), hole);
    }
    CHECK_EQ(match(table, {}).size(), 0u);
}
