// The words of CUDA C++ that kernels use, for a host compiler.
#pragma once

#include <cstdint>

#include "block.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
using cudaStream_t = void *;
using dim3 = shim::Dim3;

#define threadIdx (shim::Dim3(unsigned(shim::machine().thread), 0, 0))
#define blockIdx (shim::machine().block_id)
#define gridDim (shim::machine().grid)
