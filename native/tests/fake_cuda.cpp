// A CUDA driver on the CPU, with the entry points that the backend uses. Everything is done at once, but for work that
// a test holds back; device memory is ordinary memory; the kernels are gather.cu's, in C++. It is stricter than a real
// one: a kernel must touch no other memory of the device than what was allocated there, or a test's KV memory.
#include "fake_cuda.h"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_driver.h"
#include "gather_abi.h"

using namespace kvpool::cuda;

struct kvpool::cuda::CUevent_st {
    bool slow = false;  // recorded on the slow stream while that was held
};

// A launch, its parameters copied as a driver does.
struct kvpool::cuda::CUgraphNode_st {
    CUfunction function;
    unsigned grid;
    CUdeviceptr pieces;
    unsigned num_pieces;
    GatherBlocks blocks;
};

struct kvpool::cuda::CUgraph_st {
    CUgraphNode_st node;
};

struct kvpool::cuda::CUgraphExec_st {
    CUgraphNode node;  // that it was made of
    CUgraphNode_st own;
};

namespace {

constexpr CUresult kInvalidValue = 1, kInvalidDevice = 101, kIllegalAddress = 700, kAlready = 712, kNot = 713;

struct State {
    std::mutex mutex;  // guards all
    std::condition_variable changed;
    std::map<std::string, std::pair<CUresult, int>> failing;
    std::map<std::string, uint64_t> calls;
    std::map<CUdeviceptr, size_t> registered, allocated;
    uint64_t batched = 0;
    size_t alive = 0;
    bool held = false, ends_held = false;
    int slow_stream = 0, stream = 0, context = 0, module = 0, load = 0, store = 0;  // for their addresses
};

State& state() {
    static State* all = new State;
    return *all;
}

// Counts a call; its error, if the test asked for one.
CUresult enter(const char* symbol) {
    std::lock_guard lock(state().mutex);
    ++state().calls[symbol];
    auto failing = state().failing.find(symbol);
    if (failing == state().failing.end() || failing->second.second == 0) return kSuccess;
    --failing->second.second;
    return failing->second.first;
}

#define ENTER(symbol) \
    if (CUresult failed = enter(symbol); failed != kSuccess) return failed

void count(int change) {
    std::lock_guard lock(state().mutex);
    state().alive += static_cast<size_t>(change);
}

template <class T>
CUresult give(T** handle, T* made) {
    *handle = made;
    count(1);
    return kSuccess;
}

template <class T>
CUresult take_back(T* made) {
    delete made;
    count(-1);
    return kSuccess;
}

template <class T>
T pointer(CUdeviceptr address) {
    return reinterpret_cast<T>(address);
}

using Ranges = std::map<CUdeviceptr, size_t>;

bool lies_in(const Ranges& ranges, CUdeviceptr address, size_t bytes) {
    std::lock_guard lock(state().mutex);
    auto after = ranges.upper_bound(address);
    if (after == ranges.begin()) return false;
    auto range = std::prev(after);
    return address + bytes <= range->first + range->second;
}

CUresult wait_for(CUevent event) {
    std::unique_lock lock(state().mutex);
    state().changed.wait(lock, [&] { return !event->slow || !state().held; });
    return kSuccess;
}

[[maybe_unused]] CUresult batch(CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count,
                                CUmemcpyAttributes* attributes, size_t* first, size_t num_attributes, CUstream stream) {
    ENTER("cuMemcpyBatchAsync");
    if (stream == nullptr || num_attributes != 1 || *first != 0 || count == 0) return kInvalidValue;
    if (attributes->src_access_order != kSrcAccessOrderStream) return kInvalidValue;
    for (size_t i = 0; i < count; ++i) {
        const Ranges& host = state().registered;
        if (!lies_in(host, to[i], bytes[i]) && !lies_in(host, from[i], bytes[i])) return kInvalidValue;
        std::memcpy(pointer<void*>(to[i]), pointer<void*>(from[i]), bytes[i]);
    }
    std::lock_guard lock(state().mutex);
    state().batched += count;
    return kSuccess;
}

CUresult set(CUgraphNode_st& node, const CUkernelNodeParams& kernel) {
    bool flat = kernel.grid_y == 1 && kernel.grid_z == 1 && kernel.threads_y == 1 && kernel.threads_z == 1;
    bool plain = kernel.extra == nullptr && kernel.kernel == nullptr && kernel.context == nullptr;
    if (!flat || !plain || kernel.function == nullptr || kernel.grid_x == 0) return kInvalidValue;
    if (kernel.threads_x != kGatherThreads || kernel.shared_bytes != 0) return kInvalidValue;
    void** parameters = kernel.parameters;
    node = {kernel.function, kernel.grid_x, *static_cast<CUdeviceptr*>(parameters[0]),
            *static_cast<unsigned*>(parameters[1]), *static_cast<GatherBlocks*>(parameters[2])};
    return kSuccess;
}

CUresult gather(bool load, unsigned grid, const GatherPiece* pieces, unsigned num_pieces, const GatherBlocks& blocks) {
    for (unsigned work = 0; work < grid; ++work) {
        const GatherPiece& piece = pieces[work % num_pieces];
        unsigned number = work / num_pieces;
        if (number >= blocks.count) continue;
        CUdeviceptr kv = piece.kv + blocks.block[number] * piece.stride;
        CUdeviceptr staged = blocks.staged + number * blocks.staged_stride + piece.offset;
        if (!lies_in(state().allocated, staged, piece.bytes)) return kIllegalAddress;
        if ((kv | staged | piece.bytes) % 16 != 0) return kIllegalAddress;
        std::memcpy(pointer<void*>(load ? kv : staged), pointer<void*>(load ? staged : kv), piece.bytes);
    }
    return kSuccess;
}

void fail(const char* symbol, int result, int times) {
    std::lock_guard lock(state().mutex);
    state().failing[symbol] = {result, times};
}

uint64_t calls(const char* symbol) {
    std::lock_guard lock(state().mutex);
    return state().calls[symbol];
}

uint64_t batched() {
    std::lock_guard lock(state().mutex);
    return state().batched;
}

void hold(bool held) {
    std::lock_guard lock(state().mutex);
    state().held = held;
    state().changed.notify_all();
}

void hold_ends(bool held) {
    std::lock_guard lock(state().mutex);
    state().ends_held = held;
    state().changed.notify_all();
}

size_t registered() {
    std::lock_guard lock(state().mutex);
    return state().registered.size();
}

size_t alive() {
    std::lock_guard lock(state().mutex);
    return state().alive;
}

}  // namespace

extern "C" {

FakeCuda* fake_cuda() {
    static FakeCuda all{fail,      calls,      batched, hold, reinterpret_cast<uint64_t>(&state().slow_stream),
                        hold_ends, registered, alive};
    return &all;
}

CUresult cuInit(unsigned) {
    return kSuccess;
}

CUresult cuGetErrorName(CUresult result, const char** name) {
    static const std::map<CUresult, const char*> names = {{kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                          {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                          {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
    auto found = names.find(result);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? kInvalidValue : kSuccess;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? kSuccess : kInvalidDevice;
}

CUresult cuDeviceGetName(char* name, int bytes, CUdevice) {
    std::strncpy(name, "Fake", static_cast<size_t>(bytes));
    return kSuccess;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    ENTER("cuDevicePrimaryCtxRetain");
    *context = reinterpret_cast<CUcontext>(&state().context);
    count(1);
    return kSuccess;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
    count(-1);
    return kSuccess;
}

CUresult cuCtxSetCurrent(CUcontext) {
    return kSuccess;
}

CUresult cuCtxPushCurrent_v2(CUcontext) {
    return kSuccess;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    *context = nullptr;
    return kSuccess;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return kSuccess;
}

CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    return *mode == kCaptureModeRelaxed ? kSuccess : kInvalidValue;
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned, int) {
    ENTER("cuStreamCreateWithPriority");
    *stream = reinterpret_cast<CUstream>(&state().stream);
    count(1);
    return kSuccess;
}

CUresult cuStreamDestroy_v2(CUstream) {
    count(-1);
    return kSuccess;
}

CUresult cuStreamSynchronize(CUstream) {
    return enter("cuStreamSynchronize");
}

CUresult cuStreamWaitEvent(CUstream, CUevent event, unsigned) {
    ENTER("cuStreamWaitEvent");
    return wait_for(event);
}

CUresult cuEventCreate(CUevent* event, unsigned) {
    ENTER("cuEventCreate");
    return give(event, new CUevent_st);
}

CUresult cuEventDestroy_v2(CUevent event) {
    return take_back(event);
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER("cuEventRecord");
    std::lock_guard lock(state().mutex);
    event->slow = state().held && stream == reinterpret_cast<CUstream>(&state().slow_stream);
    return kSuccess;
}

CUresult cuEventQuery(CUevent event) {
    ENTER("cuEventQuery");
    std::lock_guard lock(state().mutex);
    return event->slow && state().held ? kNotReady : kSuccess;
}

CUresult cuEventSynchronize(CUevent event) {
    ENTER("cuEventSynchronize");
    std::unique_lock lock(state().mutex);
    state().changed.wait(lock, [] { return !state().ends_held; });
    lock.unlock();
    return wait_for(event);
}

CUresult cuMemAlloc_v2(CUdeviceptr* memory, size_t bytes) {
    ENTER("cuMemAlloc");
    *memory = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    count(1);
    std::lock_guard lock(state().mutex);
    state().allocated[*memory] = bytes;
    return kSuccess;
}

CUresult cuMemFree_v2(CUdeviceptr memory) {
    if (memory != 0) count(-1);
    {
        std::lock_guard lock(state().mutex);
        state().allocated.erase(memory);
    }
    std::free(pointer<void*>(memory));
    return kSuccess;
}

CUresult cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
    ENTER("cuMemHostRegister");
    std::lock_guard lock(state().mutex);
    bool added = state().registered.emplace(reinterpret_cast<CUdeviceptr>(memory), bytes).second;
    return added ? kSuccess : kAlready;
}

CUresult cuMemHostUnregister(void* memory) {
    std::lock_guard lock(state().mutex);
    return state().registered.erase(reinterpret_cast<CUdeviceptr>(memory)) == 1 ? kSuccess : kNot;
}

CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
    *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    count(1);
    return cuMemHostRegister_v2(*memory, bytes, flags);
}

CUresult cuMemFreeHost(void* memory) {
    cuMemHostUnregister(memory);
    std::free(memory);
    count(-1);
    return kSuccess;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
    ENTER("cuMemcpyHtoDAsync");
    std::memcpy(pointer<void*>(to), from, bytes);
    return kSuccess;
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream) {
    ENTER("cuMemcpyDtoHAsync");
    std::memcpy(to, pointer<void*>(from), bytes);
    return kSuccess;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    ENTER("cuModuleLoadData");
    if (std::strstr(static_cast<const char*>(image), ".entry kvpool_load") == nullptr) return kInvalidValue;
    *module = reinterpret_cast<CUmodule>(&state().module);
    count(1);
    return kSuccess;
}

CUresult cuModuleUnload(CUmodule) {
    count(-1);
    return kSuccess;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    bool load = std::strcmp(name, "kvpool_load") == 0;
    *function = reinterpret_cast<CUfunction>(load ? &state().load : &state().store);
    return kSuccess;
}

CUresult cuGraphCreate(CUgraph* graph, unsigned) {
    ENTER("cuGraphCreate");
    return give(graph, new CUgraph_st);
}

CUresult cuGraphDestroy(CUgraph graph) {
    return take_back(graph);
}

CUresult cuGraphAddKernelNode_v2(CUgraphNode* node, CUgraph graph, const CUgraphNode* after, size_t num_after,
                                 const CUkernelNodeParams* kernel) {
    ENTER("cuGraphAddKernelNode");
    if (after != nullptr || num_after != 0) return kInvalidValue;
    *node = &graph->node;
    return set(graph->node, *kernel);
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
    ENTER("cuGraphInstantiate");
    if (flags != 0) return kInvalidValue;
    return give(exec, new CUgraphExec_st{&graph->node, graph->node});
}

CUresult cuGraphExecDestroy(CUgraphExec exec) {
    return take_back(exec);
}

CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec exec, CUgraphNode node, const CUkernelNodeParams* kernel) {
    ENTER("cuGraphExecKernelNodeSetParams");
    return node == exec->node ? set(exec->own, *kernel) : kInvalidValue;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
    ENTER("cuGraphLaunch");
    if (stream == nullptr) return kInvalidValue;
    const CUgraphNode_st& node = exec->own;
    bool load = node.function == reinterpret_cast<CUfunction>(&state().load);
    return gather(load, node.grid, pointer<const GatherPiece*>(node.pieces), node.num_pieces, node.blocks);
}

#if FAKE_CUDA_BATCH == 1
CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count,
                            CUmemcpyAttributes* attributes, size_t* first, size_t num_attributes, size_t* failed,
                            CUstream stream) {
    *failed = 0;
    return batch(to, from, bytes, count, attributes, first, num_attributes, stream);
}
#elif FAKE_CUDA_BATCH == 2
// Of 12.8, and not for us when the other is there.
CUresult cuMemcpyBatchAsync() {
    return kInvalidValue;
}
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count,
                               CUmemcpyAttributes* attributes, size_t* first, size_t num_attributes, CUstream stream) {
    return batch(to, from, bytes, count, attributes, first, num_attributes, stream);
}
#endif
}
