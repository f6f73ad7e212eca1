// The few calls of CUDA's runtime that the backend makes, over a machine that a test describes: how many GPUs it has,
// what each of them can do, and which error an earlier call of the program's own left behind.
#pragma once

#include "block.h"

namespace shim {

enum Error { kSuccess = 0, kInvalidDevice = 101, kNoDevice = 100, kLaunchFailure = 719 };

// What a test may set; the defaults are a Hopper GPU's.
struct Runtime {
    int devices = 1, current = 0, major = 9, shared_bytes = 232448;
    int last_error = kSuccess;

    int leave(int error) {
        if (error != kSuccess) last_error = error;
        return error;
    }
};

inline Runtime& runtime() {
    static Runtime one;
    return one;
}

}  // namespace shim

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = shim::kSuccess;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = shim::runtime().devices;
    return shim::runtime().leave(*count ? shim::kSuccess : shim::kNoDevice);
}
inline cudaError_t cudaGetDevice(int* index) {
    *index = shim::runtime().current;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= shim::runtime().devices) return shim::runtime().leave(shim::kInvalidDevice);
    shim::runtime().current = index;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int index) {
    if (index < 0 || index >= shim::runtime().devices) return shim::runtime().leave(shim::kInvalidDevice);
    *value = which == cudaDevAttrComputeCapabilityMajor ? shim::runtime().major : shim::runtime().shared_bytes;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    int error = shim::runtime().last_error;
    shim::runtime().last_error = shim::kSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == shim::kLaunchFailure) return shim::machine().error.c_str();
    return error == shim::kInvalidDevice ? "invalid device ordinal" : "no CUDA-capable device is detected";
}
