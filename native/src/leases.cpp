#include "kvpool/leases.h"

namespace kvpool {

bool is_leased(const PoolFile& file, uint32_t slot) {
    uint64_t bit = 1ull << (slot % 64);
    uint32_t clients = file.header().clients_high.load(std::memory_order_seq_cst);
    for (uint32_t client = 0; client < clients; ++client) {
        if (file.bitmap(client)[slot / 64].load(std::memory_order_seq_cst) & bit) return true;
    }
    return false;
}

uint64_t count_leases(const PoolFile& file, uint32_t client) {
    uint64_t count = 0;
    const LeaseWord* words = file.bitmap(client);
    for (uint64_t i = 0; i < file.geometry().bitmap_words; ++i) {
        count += static_cast<uint64_t>(__builtin_popcountll(words[i].load(std::memory_order_relaxed)));
    }
    return count;
}

void clear_leases(const PoolFile& file, uint32_t client) {
    LeaseWord* words = file.bitmap(client);
    for (uint64_t i = 0; i < file.geometry().bitmap_words; ++i) words[i].store(0, std::memory_order_seq_cst);
}

bool LeaseTable::take(SlotRef ref) {
    if (ref.none() || ref.slot >= file_.geometry().num_slots()) return false;
    uint64_t bit = 1ull << (ref.slot % 64);
    uint32_t& count = counts_[ref.slot];
    if (count == 0) bits_[ref.slot / 64].fetch_or(bit, std::memory_order_seq_cst);
    uint64_t word = file_.slots()[ref.slot].word.load(std::memory_order_seq_cst);
    if (word != SlotWord::make(ref.generation, SlotState::kReady)) {
        if (count == 0) bits_[ref.slot / 64].fetch_and(~bit, std::memory_order_seq_cst);
        return false;
    }
    if (count++ == 0) ++held_;
    return true;
}

void LeaseTable::release(SlotRef ref) {
    ensure(ref.slot < file_.geometry().num_slots() && counts_[ref.slot] > 0, "released a slot that was not leased");
    if (--counts_[ref.slot] > 0) return;
    bits_[ref.slot / 64].fetch_and(~(1ull << (ref.slot % 64)), std::memory_order_seq_cst);
    --held_;
}

void LeaseTable::check_integrity() const {
    uint64_t held = 0;
    for (uint64_t slot = 0; slot < file_.geometry().num_slots(); ++slot) {
        bool bit = bits_[slot / 64].load(std::memory_order_relaxed) >> (slot % 64) & 1;
        ensure(bit == (counts_[slot] > 0), "lease bit differs from its count");
        held += bit;
    }
    ensure(held == held_, "number of held leases");
}

}  // namespace kvpool
