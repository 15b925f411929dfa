#include "kvpool/copies.h"

#include <algorithm>

#include "kvpool/format.h"

namespace kvpool {
namespace {

constexpr int kTidyAtATime = 256;  // marks of forgotten sources cleared in one call

}  // namespace

Copies::Copies(size_t num_slots) : marks_(num_slots), nodes_(num_slots), sources_(1) {
    for (uint32_t ns = 0; ns < kMaxNamespaces; ++ns) offers_.emplace_back(nodes_, static_cast<uint8_t>(ns + 1));
}

uint16_t Copies::number_of(const HostId& source) {
    auto is_it = [&](const Source& s) { return s.known && s.id == source; };
    auto found = std::find_if(sources_.begin() + 1, sources_.end(), is_it);
    if (found == sources_.end()) {
        found = std::find_if(sources_.begin() + 1, sources_.end(), [](const Source& s) { return s.marks == 0; });
        if (found == sources_.end()) {
            if (sources_.size() > UINT16_MAX) return 0;
            found = sources_.emplace(sources_.end());
        }
        *found = {source, true, 0};
    }
    return static_cast<uint16_t>(found - sources_.begin());
}

void Copies::mark(uint32_t slot, uint16_t source) {
    if (source == 0) return;
    marks_[slot] = source;
    nodes_[slot].freq = 0;
    ++sources_[source].marks;
    ++size_;
}

void Copies::unmark(uint32_t slot) {
    if (marks_[slot] == 0) return;
    if (is_offered(slot)) offers_[nodes_[slot].list - 1].remove(slot);
    Source& source = sources_[marks_[slot]];
    marks_[slot] = 0;
    --source.marks;
    if (source.known) --size_;
}

bool Copies::use(uint32_t slot) {
    if (!is_copy(slot)) return false;
    if (++nodes_[slot].freq == 1) return false;
    unmark(slot);
    return true;
}

void Copies::forget(const HostId& source) {
    for (Source& s : sources_) {
        if (!s.known || s.id != source) continue;
        s.known = false;
        size_ -= s.marks;
    }
}

std::vector<HostId> Copies::sources() const {
    std::vector<HostId> ids;
    for (const Source& s : sources_) {
        if (s.known && s.marks > 0) ids.push_back(s.id);
    }
    return ids;
}

void Copies::offer(uint32_t slot, uint32_t name_space, bool expendable, bool next) {
    if (expendable == is_offered(slot)) return;
    SlotList& offers = offers_[name_space];
    if (!expendable) {
        offers.remove(slot);
    } else if (next) {
        offers.push_oldest(slot);
    } else {
        offers.push_newest(slot);
    }
}

uint32_t Copies::coldest(uint32_t name_space) {
    for (int tidied = 0; tidied < kTidyAtATime; ++tidied) {
        uint32_t slot = offers_[name_space].oldest();
        if (slot == kNoSlot || is_copy(slot)) return slot;
        unmark(slot);
    }
    return kNoSlot;
}

void Copies::check_integrity(uint64_t slots) const {
    uint64_t marks = 0, known = 0;
    for (const Source& s : sources_) {
        marks += s.marks;
        known += s.known ? s.marks : 0;
    }
    ensure(marks == slots, "copies: marks of all sources");
    ensure(known == size_, "copies: marks of known sources");
    for (const SlotList& offers : offers_) offers.check_integrity();
}

}  // namespace kvpool
