// Tries the driver's and the staged way of copying on memory of its own and picks one for each direction.
#pragma once

#include <string>
#include <vector>

#include "cuda_driver.h"
#include "kvpool/copy_backend.h"

namespace kvpool::cuda {

struct Ways {
    CudaWay load = CudaWay::kDriver;
    CudaWay store = CudaWay::kDriver;
    CudaWay of(Direction direction) const { return direction == Direction::kLoad ? load : store; }
};

// Some 50 ms, or nothing when this process has asked for the same device and fragments before. The context is current.
// CudaError: it could not be tried.
Ways calibrate(const Driver& driver, const std::string& device_name, const std::vector<Region>& merged);

}  // namespace kvpool::cuda
