#include "kvpool/stream_copy.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvpool {

#if defined(__x86_64__)
namespace {

constexpr size_t kWorthIt = 32 << 10;  // less stays in the first cache anyway
constexpr size_t kVector = sizeof(__m256i), kStep = 4 * kVector;
constexpr size_t kAhead = 1024;  // processors do not fetch ahead by themselves where nothing is read from the target

__attribute__((target("avx2"))) void stream(uint8_t* to, const uint8_t* from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kStep) {
        _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_NTA);
        _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead + 64), _MM_HINT_NTA);
        __m256i vectors[4];
        for (size_t i = 0; i < 4; ++i) {
            vectors[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + i * kVector));
        }
        for (size_t i = 0; i < 4; ++i) {
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + i * kVector), vectors[i]);
        }
    }
    _mm_sfence();
}

}  // namespace

void stream_copy(void* to, const void* from, size_t bytes) {
    static const bool can = __builtin_cpu_supports("avx2");
    if (!can || bytes < kWorthIt) {
        std::memcpy(to, from, bytes);
        return;
    }
    auto* target = static_cast<uint8_t*>(to);
    auto* source = static_cast<const uint8_t*>(from);
    size_t head = -reinterpret_cast<uintptr_t>(to) % kVector;
    size_t body = (bytes - head) / kStep * kStep;
    std::memcpy(target, source, head);
    stream(target + head, source + head, body);
    std::memcpy(target + head + body, source + head + body, bytes - head - body);
}
#else
void stream_copy(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
}
#endif

}  // namespace kvpool
