// CRC-32C (Castagnoli): the processor has an instruction for it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvpool {

// Hardware where present (SSE 4.2, Arm CRC; three streams at once, about 20 GB/s), a table elsewhere.
uint32_t crc32c(const void* data, size_t bytes, uint32_t seed = 0);

// The table version, for tests to compare with.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t seed = 0);

}  // namespace kvpool
