// The entry points of the CUDA driver that we use, found at run time: nothing of CUDA is needed to build or to import.
//
// Types and numbers are those of cuda.h (12.0 to 13.0), whose ABI is stable: an incompatible change there gets a new
// suffix, and we ask for suffixes by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace kvpool::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUkernel = struct CUkern_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphNode = struct CUgraphNode_st*;
using CUgraphExec = struct CUgraphExec_st*;

struct CUmemLocation {
    int type, id;
};
struct CUmemcpyAttributes {
    int src_access_order;
    CUmemLocation src_hint, dst_hint;
    unsigned flags;
};

// CUDA_KERNEL_NODE_PARAMS_v2. `kernel` and `context` are null: the function says both.
struct CUkernelNodeParams {
    CUfunction function;
    unsigned grid_x, grid_y, grid_z, threads_x, threads_y, threads_z, shared_bytes;
    void** parameters;
    void** extra;
    CUkernel kernel;
    CUcontext context;
};

inline constexpr CUresult kSuccess = 0, kNotReady = 600;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1, kEventDisableTiming = 2;
inline constexpr unsigned kHostPortable = 1;
inline constexpr int kCaptureModeRelaxed = 2;
inline constexpr int kSrcAccessOrderStream = 1;

// X(member, symbol, parameters), all of them returning CUresult and present since CUDA 12.0.
#define KVPOOL_CUDA_FUNCTIONS(X)                                                                   \
    X(init, cuInit, (unsigned))                                                                    \
    X(get_error_name, cuGetErrorName, (CUresult, const char**))                                    \
    X(device_get, cuDeviceGet, (CUdevice*, int))                                                   \
    X(device_get_name, cuDeviceGetName, (char*, int, CUdevice))                                    \
    X(primary_ctx_retain, cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice))                        \
    X(primary_ctx_release, cuDevicePrimaryCtxRelease_v2, (CUdevice))                               \
    X(ctx_set_current, cuCtxSetCurrent, (CUcontext))                                               \
    X(ctx_push_current, cuCtxPushCurrent_v2, (CUcontext))                                          \
    X(ctx_pop_current, cuCtxPopCurrent_v2, (CUcontext*))                                           \
    X(ctx_get_stream_priority_range, cuCtxGetStreamPriorityRange, (int*, int*))                    \
    X(thread_exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int*))                     \
    X(stream_create, cuStreamCreateWithPriority, (CUstream*, unsigned, int))                       \
    X(stream_destroy, cuStreamDestroy_v2, (CUstream))                                              \
    X(stream_synchronize, cuStreamSynchronize, (CUstream))                                         \
    X(stream_wait_event, cuStreamWaitEvent, (CUstream, CUevent, unsigned))                         \
    X(event_create, cuEventCreate, (CUevent*, unsigned))                                           \
    X(event_destroy, cuEventDestroy_v2, (CUevent))                                                 \
    X(event_record, cuEventRecord, (CUevent, CUstream))                                            \
    X(event_query, cuEventQuery, (CUevent))                                                        \
    X(event_synchronize, cuEventSynchronize, (CUevent))                                            \
    X(mem_alloc, cuMemAlloc_v2, (CUdeviceptr*, size_t))                                            \
    X(mem_free, cuMemFree_v2, (CUdeviceptr))                                                       \
    X(mem_host_alloc, cuMemHostAlloc, (void**, size_t, unsigned))                                  \
    X(mem_free_host, cuMemFreeHost, (void*))                                                       \
    X(mem_host_register, cuMemHostRegister_v2, (void*, size_t, unsigned))                          \
    X(mem_host_unregister, cuMemHostUnregister, (void*))                                           \
    X(memcpy_htod_async, cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void*, size_t, CUstream))       \
    X(memcpy_dtoh_async, cuMemcpyDtoHAsync_v2, (void*, CUdeviceptr, size_t, CUstream))             \
    X(module_load_data, cuModuleLoadData, (CUmodule*, const void*))                                \
    X(module_unload, cuModuleUnload, (CUmodule))                                                   \
    X(module_get_function, cuModuleGetFunction, (CUfunction*, CUmodule, const char*))              \
    X(graph_create, cuGraphCreate, (CUgraph*, unsigned))                                           \
    X(graph_destroy, cuGraphDestroy, (CUgraph))                                                    \
    X(graph_add_kernel_node, cuGraphAddKernelNode_v2,                                              \
      (CUgraphNode*, CUgraph, const CUgraphNode*, size_t, const CUkernelNodeParams*))              \
    X(graph_instantiate, cuGraphInstantiateWithFlags, (CUgraphExec*, CUgraph, unsigned long long)) \
    X(graph_exec_destroy, cuGraphExecDestroy, (CUgraphExec))                                       \
    X(graph_exec_kernel_node_set_params, cuGraphExecKernelNodeSetParams_v2,                        \
      (CUgraphExec, CUgraphNode, const CUkernelNodeParams*))                                       \
    X(graph_launch, cuGraphLaunch, (CUgraphExec, CUstream))

// An error of the driver. The text is "cuGraphLaunch: CUDA_ERROR_ILLEGAL_ADDRESS".
struct CudaError : std::runtime_error {
    CudaError(const std::string& text, CUresult result) : std::runtime_error(text), result(result) {}
    CUresult result;
    // The context is lost with everything in it: no later call can succeed.
    bool is_final() const;
};

// One for each library and process, never unloaded. A member takes the driver's arguments and throws CudaError.
class Driver {
  public:
    // std::system_error (ENODEV) when the library or one of the functions is missing.
    static const Driver& load(const std::string& library);

    template <class... Parameters>
    class Function {
      public:
        void operator()(Parameters... arguments) const { driver_->check(call_(arguments...), symbol_); }
        // For the ways out, where nobody is left to hear of an error.
        CUresult quietly(Parameters... arguments) const noexcept { return call_(arguments...); }

      private:
        friend class Driver;
        const Driver* driver_ = nullptr;
        const char* symbol_ = nullptr;
        CUresult (*call_)(Parameters...) = nullptr;
    };

    template <class Signature>
    struct FunctionOf;
    template <class... Parameters>
    struct FunctionOf<CUresult(Parameters...)> {
        using type = Function<Parameters...>;
    };
#define KVPOOL_DECLARE(member, symbol, parameters) FunctionOf<CUresult parameters>::type member;
    KVPOOL_CUDA_FUNCTIONS(KVPOOL_DECLARE)
#undef KVPOOL_DECLARE

    // cuMemcpyBatchAsync, in either of its forms (12.8 and 13.0).
    bool has_batch() const { return batch_v2_ != nullptr || batch_v1_ != nullptr; }
    void memcpy_batch_async(CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count, CUstream stream) const;

    void check(CUresult result, const char* symbol) const {
        if (result != kSuccess) fail(result, symbol);
    }

  private:
    explicit Driver(const std::string& library);
    [[noreturn]] void fail(CUresult result, const char* symbol) const;

    using BatchV1 = CUresult (*)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*, size_t*, size_t,
                                 size_t*, CUstream);
    using BatchV2 = CUresult (*)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*, size_t*, size_t,
                                 CUstream);
    BatchV1 batch_v1_ = nullptr;
    BatchV2 batch_v2_ = nullptr;
};

}  // namespace kvpool::cuda
