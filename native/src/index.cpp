#include "kvpool/index.h"

#include <algorithm>
#include <array>

namespace kvpool {
namespace {

constexpr size_t kGroup = 32;  // enough misses in flight to fill a core's load queue

uint64_t pack_entry(uint32_t tag, uint32_t slot) {
    return static_cast<uint64_t>(tag) << 32 | (slot + 1ull);
}
uint32_t entry_tag(uint64_t entry) {
    return static_cast<uint32_t>(entry >> 32);
}
uint32_t entry_slot(uint64_t entry) {
    return static_cast<uint32_t>(entry) - 1;
}

}  // namespace

bool IndexReader::confirm(uint32_t slot, const BlockKey& key, uint32_t now_s, SlotRef& ref) const {
    if (slot >= num_slots_) return false;
    const SlotHeader& header = slots_[slot];
    uint64_t word = header.word.load(std::memory_order_acquire);
    if (SlotWord::state(word) != SlotState::kReady || !(header.load_key() == key)) return false;
    uint32_t expiry_s = header.expiry_s.load(std::memory_order_acquire);
    if (expiry_s != 0 && now_s >= expiry_s) return false;
    // The writer changes the word before it changes the rest: the same word again means that the rest belonged to it.
    if (header.word.load(std::memory_order_relaxed) != word) return false;
    ref = {slot, SlotWord::generation(word)};
    return true;
}

std::optional<SlotRef> IndexReader::find_ready(const BlockKey& key, uint32_t now_s) const {
    uint32_t tag = key.tag();
    SlotRef ref;
    uint64_t at = home(tag);
    for (uint64_t probes = 0; probes <= mask_; ++probes, at = (at + 1) & mask_) {
        uint64_t entry = table_[at].load(std::memory_order_acquire);
        if (entry == 0) return std::nullopt;
        if (entry_tag(entry) == tag && confirm(entry_slot(entry), key, now_s, ref)) return ref;
    }
    return std::nullopt;
}

size_t IndexReader::match_prefix(const uint8_t* keys, size_t count, uint32_t now_s, uint64_t* refs) const {
    std::array<BlockKey, kGroup> group;
    for (size_t start = 0; start < count; start += kGroup) {
        size_t n = std::min(kGroup, count - start);
        for (size_t i = 0; i < n; ++i) {
            group[i] = BlockKey::from_bytes(keys + (start + i) * kKeyBytes);
            __builtin_prefetch(&table_[home(group[i].tag())]);
        }
        for (size_t i = 0; i < n; ++i) {
            uint64_t entry = table_[home(group[i].tag())].load(std::memory_order_relaxed);
            uint32_t slot = entry_slot(entry);
            if (entry != 0 && slot < num_slots_) __builtin_prefetch(&slots_[slot]);
        }
        for (size_t i = 0; i < n; ++i) {
            auto ref = find_ready(group[i], now_s);
            if (!ref) return start + i;
            refs[start + i] = ref->pack();
        }
    }
    return count;
}

void Index::clear() {
    for (uint64_t i = 0; i <= mask_; ++i) table_[i].store(0, std::memory_order_relaxed);
    size_ = 0;
}

void Index::insert(const BlockKey& key, uint32_t slot) {
    uint32_t tag = key.tag();
    uint64_t at = home(tag);
    while (table_[at].load(std::memory_order_relaxed) != 0) at = (at + 1) & mask_;
    table_[at].store(pack_entry(tag, slot), std::memory_order_release);
    ++size_;
}

bool Index::erase(const BlockKey& key, uint32_t slot) {
    uint64_t hole = home(key.tag());
    uint64_t wanted = pack_entry(key.tag(), slot);
    for (uint64_t entry; (entry = table_[hole].load(std::memory_order_relaxed)) != wanted; hole = (hole + 1) & mask_) {
        if (entry == 0) return false;
    }
    // Close the hole: move back every later entry of the run that may not lie behind an empty place.
    for (uint64_t at = (hole + 1) & mask_;; at = (at + 1) & mask_) {
        uint64_t entry = table_[at].load(std::memory_order_relaxed);
        if (entry == 0) break;
        uint64_t distance_home = (at - home(entry_tag(entry))) & mask_;
        uint64_t distance_hole = (at - hole) & mask_;
        if (distance_home < distance_hole) continue;
        table_[hole].store(entry, std::memory_order_release);
        hole = at;
    }
    table_[hole].store(0, std::memory_order_release);
    --size_;
    return true;
}

uint32_t Index::find(const BlockKey& key) const {
    uint32_t tag = key.tag();
    for (uint64_t at = home(tag);; at = (at + 1) & mask_) {
        uint64_t entry = table_[at].load(std::memory_order_relaxed);
        if (entry == 0) return kNoSlot;
        if (entry_tag(entry) == tag && slots_[entry_slot(entry)].load_key() == key) return entry_slot(entry);
    }
}

uint32_t Index::find_tag(uint32_t tag) const {
    for (uint64_t at = home(tag);; at = (at + 1) & mask_) {
        uint64_t entry = table_[at].load(std::memory_order_relaxed);
        if (entry == 0) return kNoSlot;
        if (entry_tag(entry) == tag) return entry_slot(entry);
    }
}

}  // namespace kvpool
