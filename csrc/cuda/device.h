// What the host asks of CUDA's runtime around a launch: which GPU is current, what it can hold, how a launch went.
//
// Under FLORA_HOST_SHIM the runtime is emulator/runtime.h, over a machine that a test describes.
#pragma once

#include "../common/backend.h"
#include "ptx.cuh"

namespace flora {
namespace cuda {
namespace {

// Makes a GPU the current one for as long as it lives, or says why it cannot: on another one a call would run over
// addresses that are not its own.
class OnDevice {
  public:
    explicit OnDevice(int index) {
        cudaError_t error = cudaGetDevice(&before_);
        if (error == cudaSuccess && before_ != index) error = cudaSetDevice(index), changed_ = error == cudaSuccess;
        if (error == cudaSuccess) return;
        cudaGetLastError();
        status = fail(FLORA_NO_DEVICE, "GPU %d cannot be made the current one: %s", index, cudaGetErrorString(error));
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    flora_status status = FLORA_OK;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// What a launch gave back as a status; its error is taken out of the runtime, which keeps the last one.
flora_status launched(const char *name, cudaError_t error) {
    if (error == cudaSuccess) return FLORA_OK;
    cudaGetLastError();
    return fail(FLORA_DEVICE_ERROR, "%s could not be launched: %s", name, cudaGetErrorString(error));
}

flora_status available(int32_t device_index) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return fail(FLORA_NO_DEVICE, "no GPU can be used here: %s", cudaGetErrorString(error));
    }
    if (device_index < 0 || device_index >= count)
        return fail(FLORA_NO_DEVICE, "device_index must be below the %d GPUs that are here, got %d", count, device_index);
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index);
    if (major < 8)
        return fail(FLORA_NO_DEVICE, "GPU %d has compute capability %d.x; the kernels need 8.0", device_index, major);
    return FLORA_OK;
}

// What a kernel asks of the device, as far as sizes decide it.
struct Needs {
    int64_t blocks, blocks_y;
    size_t shared_bytes;
};

// Refuse a launch that the device cannot hold, before anything is written.
flora_status check_needs(const char *name, const flora_exec &exec, const Needs &needs) {
    if (needs.blocks > INT32_MAX || needs.blocks_y > 65535)
        return fail(FLORA_UNSUPPORTED, "%s: these sizes need a grid of %lld x %lld blocks, and CUDA launches at most "
                    "2147483647 x 65535; cut the call into smaller ones", name, static_cast<long long>(needs.blocks),
                    static_cast<long long>(needs.blocks_y));
    int most = 0;
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device_index);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return fail(FLORA_NO_DEVICE, "GPU %d cannot be asked for its shared memory: %s", exec.device_index,
                    cudaGetErrorString(error));
    }
    if (needs.shared_bytes > size_t(most))
        return fail(FLORA_UNSUPPORTED, "%s: the kernel for these dtypes needs %zu bytes of shared memory a block, and GPU "
                    "%d gives %d; narrower factors need less", name, needs.shared_bytes, exec.device_index, most);
    return FLORA_OK;
}

}  // namespace
}  // namespace cuda
}  // namespace flora
