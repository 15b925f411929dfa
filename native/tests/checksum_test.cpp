#include "kvpool/checksum.h"

#include <random>
#include <string>

#include "check.h"

using namespace kvpool;

namespace {

std::vector<uint8_t> noise(size_t bytes) {
    std::mt19937 random(7);
    std::vector<uint8_t> data(bytes);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    return data;
}

}  // namespace

// RFC 3720, appendix B.4, and the check value of the CRC catalogues.
TEST(known_values) {
    std::vector<uint8_t> data(32, 0);
    CHECK_EQ(crc32c(data.data(), 32), 0x8a9136aau);
    data.assign(32, 0xff);
    CHECK_EQ(crc32c(data.data(), 32), 0x62a8ab43u);
    for (uint8_t i = 0; i < 32; ++i) data[i] = i;
    CHECK_EQ(crc32c(data.data(), 32), 0x46dd794eu);
    for (uint8_t i = 0; i < 32; ++i) data[i] = 31 - i;
    CHECK_EQ(crc32c(data.data(), 32), 0x113fdb5cu);
    CHECK_EQ(crc32c("123456789", 9), 0xe3069283u);
    CHECK_EQ(crc32c("", 0), 0u);
}

TEST(hardware_and_table_agree) {
    std::vector<uint8_t> data = noise(40'000);
    // Around 8 bytes, one stream of 4 KiB and a round of three of them, where the loops change
    // over.
    std::vector<size_t> lengths;
    for (size_t n = 0; n <= 80; ++n) lengths.push_back(n);
    for (size_t middle : {4096, 8192, 12'288, 24'576, 36'864}) {
        for (size_t n = middle - 9; n <= middle + 9; ++n) lengths.push_back(n);
    }
    for (size_t length : lengths) {
        for (size_t start : {0, 1, 3, 8, 13}) {
            for (uint32_t seed : {0u, 1u, 0xffffffffu, 0xdeadbeefu}) {
                const uint8_t* p = data.data() + start;
                CHECK_EQ(crc32c(p, length, seed), crc32c_portable(p, length, seed));
            }
        }
    }
}

TEST(a_seed_continues_an_earlier_part) {
    std::vector<uint8_t> data = noise(30'000);
    uint32_t whole = crc32c(data.data(), data.size());
    for (size_t cut : {0, 1, 4095, 12'288, 29'999}) {
        uint32_t head = crc32c(data.data(), cut);
        CHECK_EQ(crc32c(data.data() + cut, data.size() - cut, head), whole);
    }
}

TEST(every_bit_counts) {
    std::vector<uint8_t> data = noise(13'000);
    uint32_t whole = crc32c(data.data(), data.size());
    for (size_t bit = 0; bit < data.size() * 8; bit += 997) {
        data[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        CHECK(crc32c(data.data(), data.size()) != whole);
        data[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
}
