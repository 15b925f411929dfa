#include "kvpool/stream_copy.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

using namespace kvpool;

TEST(any_size_at_any_address_and_nothing_beside) {
    std::mt19937 random(5);
    std::vector<uint8_t> from(300'000), to(300'000);
    for (uint8_t& byte : from) byte = static_cast<uint8_t>(random());
    for (size_t bytes : {0u, 1u, 31u, 4'096u, 32'767u, 32'768u, 32'769u, 65'536u, 100'003u, 262'144u}) {
        for (size_t shift : {0u, 1u, 16u, 31u, 32u, 63u}) {
            size_t start = 64 + shift, other = 64 + random() % 64;
            std::fill(to.begin(), to.end(), uint8_t{7});
            stream_copy(to.data() + start, from.data() + other, bytes);
            auto begin = to.begin() + static_cast<ptrdiff_t>(start), end = begin + static_cast<ptrdiff_t>(bytes);
            CHECK(std::equal(begin, end, from.begin() + static_cast<ptrdiff_t>(other)));
            auto untouched = [](uint8_t byte) { return byte == 7; };
            CHECK(std::all_of(to.begin(), begin, untouched) && std::all_of(end, to.end(), untouched));
        }
    }
}
