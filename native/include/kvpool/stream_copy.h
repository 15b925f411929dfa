// memcpy for bytes that nobody reads soon: they go past the caches. A copy of many megabytes takes two thirds of the
// time so, and leaves the caches to others.
#pragma once

#include <cstddef>

namespace kvpool {

// Bytes are there for whoever synchronizes with the caller afterwards, as after memcpy.
void stream_copy(void* to, const void* from, size_t bytes);

}  // namespace kvpool
