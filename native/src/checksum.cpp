// After Mark Adler's public-domain crc32c.c: three independent streams hide the latency of the CRC instruction, and
// their results are joined by advancing a CRC over zeros, which is a linear map and so a table look-up.
#include "kvpool/checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define KVPOOL_HARDWARE_CRC __attribute__((target("sse4.2")))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define KVPOOL_HARDWARE_CRC __attribute__((target("+crc")))
#endif

namespace kvpool {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected

constexpr std::array<uint32_t, 256> make_byte_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ kPolynomial : crc >> 1;
        table[i] = crc;
    }
    return table;
}
constexpr auto kByteTable = make_byte_table();

#ifdef KVPOOL_HARDWARE_CRC

constexpr size_t kStreamBytes = 4096;

// The CRC of a message followed by kStreamBytes zeros, from the CRC of the message: four tables of a byte each.
struct Shift {
    std::array<std::array<uint32_t, 256>, 4> table{};

    Shift() {
        for (int byte = 0; byte < 4; ++byte) {
            for (uint32_t value = 0; value < 256; ++value) {
                uint32_t crc = value << (8 * byte);
                for (size_t i = 0; i < kStreamBytes; ++i) crc = (crc >> 8) ^ kByteTable[crc & 0xff];
                table[byte][value] = crc;
            }
        }
    }
    uint32_t apply(uint32_t crc) const {
        return table[0][crc & 0xff] ^ table[1][crc >> 8 & 0xff] ^ table[2][crc >> 16 & 0xff] ^ table[3][crc >> 24];
    }
};

KVPOOL_HARDWARE_CRC inline uint64_t step(uint64_t crc, const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, sizeof(word));
#if defined(__x86_64__)
    return _mm_crc32_u64(crc, word);
#else
    return __crc32cd(static_cast<uint32_t>(crc), word);
#endif
}

KVPOOL_HARDWARE_CRC uint32_t crc32c_hardware(const uint8_t* p, size_t bytes, uint32_t seed) {
    static const Shift shift;
    uint64_t a = ~seed;
    for (; bytes >= 3 * kStreamBytes; p += 3 * kStreamBytes, bytes -= 3 * kStreamBytes) {
        uint64_t b = 0, c = 0;
        for (size_t i = 0; i < kStreamBytes; i += 8) {
            a = step(a, p + i);
            b = step(b, p + i + kStreamBytes);
            c = step(c, p + i + 2 * kStreamBytes);
        }
        a = shift.apply(static_cast<uint32_t>(a)) ^ b;
        a = shift.apply(static_cast<uint32_t>(a)) ^ c;
    }
    for (; bytes >= 8; p += 8, bytes -= 8) a = step(a, p);
    auto crc = static_cast<uint32_t>(a);
    for (; bytes > 0; ++p, --bytes) crc = (crc >> 8) ^ kByteTable[(crc ^ *p) & 0xff];
    return ~crc;
}

bool has_hardware() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2");
#else
    return (getauxval(AT_HWCAP) & (1 << 7)) != 0;  // HWCAP_CRC32
#endif
}

#endif

}  // namespace

uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t seed) {
    auto p = static_cast<const uint8_t*>(data);
    uint32_t crc = ~seed;
    for (; bytes > 0; ++p, --bytes) crc = (crc >> 8) ^ kByteTable[(crc ^ *p) & 0xff];
    return ~crc;
}

uint32_t crc32c(const void* data, size_t bytes, uint32_t seed) {
#ifdef KVPOOL_HARDWARE_CRC
    static const bool hardware = has_hardware();
    if (hardware) return crc32c_hardware(static_cast<const uint8_t*>(data), bytes, seed);
#endif
    return crc32c_portable(data, bytes, seed);
}

}  // namespace kvpool
