// The makers behind make_policy.
#pragma once

#include "kvpool/eviction.h"

namespace kvpool {

std::unique_ptr<EvictionPolicy> make_lru(size_t num_slots);
std::unique_ptr<EvictionPolicy> make_arc(size_t num_slots);
std::unique_ptr<EvictionPolicy> make_s3fifo(size_t num_slots);

}  // namespace kvpool
