// How a test talks to fake_cuda.cpp, which it loads in place of libcuda.so.1.
#pragma once

#include <cstddef>
#include <cstdint>

struct FakeCuda {
    // So many of the coming calls of that function fail.
    void (*fail)(const char* symbol, int result, int times);
    uint64_t (*calls)(const char* symbol);
    uint64_t (*batched)();  // copies in all batches
    // Work on `slow_stream` does not end while it is held.
    void (*hold)(bool);
    uint64_t slow_stream;
    // Nobody hears of the end of any work while these are held.
    void (*hold_ends)(bool);
    size_t (*registered)();  // ranges of host memory
    size_t (*alive)();       // streams, events, modules, graphs, memory
};

extern "C" FakeCuda* fake_cuda();
