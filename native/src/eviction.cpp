#include "kvpool/eviction.h"

#include "eviction_policies.h"

namespace kvpool {

std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, size_t num_slots) {
    const std::string& wanted = name.empty() ? kDefaultPolicy : name;
    if (wanted == "lru") return make_lru(num_slots);
    if (wanted == "arc") return make_arc(num_slots);
    if (wanted == "s3fifo") return make_s3fifo(num_slots);
    throw std::invalid_argument("eviction policy '" + wanted + "': known are lru, arc, s3fifo");
}

}  // namespace kvpool
