#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <system_error>
#include <type_traits>

namespace kvpool::cuda {
namespace {

[[noreturn]] void unavailable(const std::string& what) {
    throw std::system_error(ENODEV, std::generic_category(), "CUDA: " + what);
}

void* open_library(const std::string& name) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) unavailable(dlerror());
    return library;
}

}  // namespace

// From cuda.h: those of which it says that the context or process is unusable afterwards.
bool CudaError::is_final() const {
    static const std::set<CUresult> final_ones = {
        4,    // DEINITIALIZED
        214,  // ECC_UNCORRECTABLE
        220,  // NVLINK_UNCORRECTABLE
        226,  // CONTAINED
        700,  // ILLEGAL_ADDRESS
        702,  // LAUNCH_TIMEOUT
        709,  // CONTEXT_IS_DESTROYED
        710,  // ASSERT
        714,  // HARDWARE_STACK_ERROR
        715,  // ILLEGAL_INSTRUCTION
        716,  // MISALIGNED_ADDRESS
        717,  // INVALID_ADDRESS_SPACE
        718,  // INVALID_PC
        719,  // LAUNCH_FAILED
        721,  // TENSOR_MEMORY_LEAK
        911,  // EXTERNAL_DEVICE
        999,  // UNKNOWN
    };
    return final_ones.count(result) != 0;
}

const Driver& Driver::load(const std::string& library) {
    static std::mutex mutex;
    static std::map<std::string, std::unique_ptr<const Driver>> loaded;
    std::lock_guard lock(mutex);
    std::unique_ptr<const Driver>& driver = loaded[library];
    if (driver == nullptr) driver.reset(new Driver(library));
    return *driver;
}

Driver::Driver(const std::string& library) {
    void* handle = open_library(library);
    auto find = [&](const char* symbol, auto& call) {
        call = reinterpret_cast<std::decay_t<decltype(call)>>(dlsym(handle, symbol));
        return call != nullptr;
    };
#define KVPOOL_FIND(member, symbol, parameters) \
    member.driver_ = this;                      \
    member.symbol_ = #symbol;                   \
    if (!find(#symbol, member.call_)) unavailable(library + " has no " #symbol);
    KVPOOL_CUDA_FUNCTIONS(KVPOOL_FIND)
#undef KVPOOL_FIND
    if (!find("cuMemcpyBatchAsync_v2", batch_v2_)) find("cuMemcpyBatchAsync", batch_v1_);
    CUresult result = init.quietly(0);
    if (result != kSuccess) {
        const char* name = nullptr;
        get_error_name.quietly(result, &name);
        unavailable("cuInit: " + std::string(name == nullptr ? std::to_string(result) : name));
    }
}

void Driver::fail(CUresult result, const char* symbol) const {
    const char* name = nullptr;
    get_error_name.quietly(result, &name);
    std::string text = name == nullptr ? "error " + std::to_string(result) : name;
    throw CudaError(std::string(symbol) + ": " + text, result);
}

void Driver::memcpy_batch_async(CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count,
                                CUstream stream) const {
    CUmemcpyAttributes attributes{kSrcAccessOrderStream, {0, 0}, {0, 0}, 0};
    size_t first = 0, failed = 0;
    CUresult result = batch_v2_ != nullptr ? batch_v2_(to, from, bytes, count, &attributes, &first, 1, stream)
                                           : batch_v1_(to, from, bytes, count, &attributes, &first, 1, &failed, stream);
    check(result, "cuMemcpyBatchAsync");
}

}  // namespace kvpool::cuda
