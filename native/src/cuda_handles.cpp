#include "cuda_handles.h"

#include <system_error>

namespace kvpool::cuda {

Context::Context(const Driver& driver, int device) : driver_(driver) {
    char name[256] = "";
    try {
        driver_.device_get(&device_, device);
        driver_.device_get_name(name, sizeof(name), device_);
        driver_.primary_ctx_retain(&context_, device_);
    } catch (const CudaError& error) {
        throw std::system_error(ENODEV, std::generic_category(),
                                "CUDA device " + std::to_string(device) + ": " + error.what());
    }
    device_name_ = name;
}

}  // namespace kvpool::cuda
