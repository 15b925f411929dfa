#include "kvpool/view.h"

#include <stdexcept>

namespace kvpool {

PoolView::PoolView(const std::string& path) : file_(std::make_shared<PoolFile>(PoolFile::open(path))), index_(*file_) {}

void PoolView::attach_client(uint32_t client) {
    if (leased_slots() > 0) throw std::runtime_error("attach_client: leases are held");
    if (client >= kMaxClients) throw std::invalid_argument("client: no such bitmap");
    leases_ = std::make_unique<LeaseTable>(*file_, client);
}

LeaseTable& PoolView::leases() const {
    if (leases_ == nullptr) throw std::runtime_error("attach_client comes first");
    return *leases_;
}

std::vector<bool> PoolView::lease(const std::vector<SlotRef>& refs) {
    std::vector<bool> taken;
    for (SlotRef ref : refs) taken.push_back(leases().take(ref));
    return taken;
}

void PoolView::release(const std::vector<SlotRef>& refs) {
    for (SlotRef ref : refs) leases().release(ref);
}

PoolView::Bytes PoolView::payload(SlotRef ref) const {
    bool exists = !ref.none() && ref.slot < file_->geometry().num_slots();
    if (!exists || SlotWord::generation(file_->slots()[ref.slot].word.load()) != ref.generation) {
        throw std::invalid_argument("ref: no such slot");
    }
    const SlabEntry& slab = file_->slabs()[file_->slab_of(ref.slot)];
    if (ref.slot % file_->geometry().slots_per_slab >= slab.num_slots.load()) {
        throw std::invalid_argument("ref: its slab was cut anew");
    }
    return {file_->payload(ref.slot), slab.slot_bytes.load()};
}

void PoolView::check_integrity() const {
    if (leases_ != nullptr) leases_->check_integrity();
}

}  // namespace kvpool
