// Every instruction that C++ has no word for, and every access to memory that threads share, in one place: on the
// device as inline PTX, on the host (FLORA_HOST_SHIM) as its emulation. bench/gpu/check.py holds one against the other.
//
// On the host each access is checked: inside a buffer, aligned, written before, and not in a race.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef FLORA_HOST_SHIM
#include "../emulator/cuda_words.h"
#include "../emulator/emulate.h"
// Where a call stands in the source, as hidden last arguments.
#define FLORA_SITE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define FLORA_ONLY_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define FLORA_UNROLL
#define FLORA_UNROLL_ONCE
// A kernel's argument that is large and read in place.
#define FLORA_TABLE(type) const type &
#define FLORA_DEVICE inline
#else
#include <cuda_runtime.h>
#define FLORA_SITE
#define FLORA_ONLY_SITE
#define FLORA_UNROLL _Pragma("unroll")
#define FLORA_UNROLL_ONCE _Pragma("unroll 1")
#define FLORA_TABLE(type) const __grid_constant__ type
#define FLORA_DEVICE __device__ __forceinline__
#endif

namespace flora::cuda {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

FLORA_DEVICE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
FLORA_DEVICE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

FLORA_DEVICE float widen(float value) { return value; }
FLORA_DEVICE double widen(double value) { return value; }
FLORA_DEVICE float widen(bf16 value) { return bits_float(uint32_t(value.bits) << 16); }
FLORA_DEVICE float widen(fp16 value) {
#ifdef FLORA_HOST_SHIM
    return shim::fp16_to_float(value.bits);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#endif
}

// To nearest, ties to even.
FLORA_DEVICE void narrow(float value, float &out) { out = value; }
FLORA_DEVICE void narrow(float value, double &out) { out = value; }
FLORA_DEVICE void narrow(double value, double &out) { out = value; }
FLORA_DEVICE void narrow(double value, float &out) { out = float(value); }
FLORA_DEVICE void narrow(float value, bf16 &out) {
#ifdef FLORA_HOST_SHIM
    out.bits = shim::float_to_bf16(value);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#endif
}
FLORA_DEVICE void narrow(float value, fp16 &out) {
#ifdef FLORA_HOST_SHIM
    out.bits = shim::float_to_fp16(value);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#endif
}
// There is no instruction from float64 to 16 bits.
FLORA_DEVICE void narrow(double value, bf16 &out) { narrow(float(value), out); }
FLORA_DEVICE void narrow(double value, fp16 &out) { narrow(float(value), out); }

FLORA_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) { return uint64_t(a) * b; }

FLORA_DEVICE int thread_id() { return int(threadIdx.x); }

// Global memory; T of 16 bytes makes one wide access.
template <class T>
FLORA_DEVICE T ld_global(const T *p) {
#ifdef FLORA_HOST_SHIM
    shim::machine().check("global memory:", "reads", p, sizeof(T), false);
#endif
    return *p;
}
template <class T>
FLORA_DEVICE void st_global(T *p, T value) {
#ifdef FLORA_HOST_SHIM
    shim::machine().check("global memory:", "writes", p, sizeof(T), true);
#endif
    *p = value;
}

// Ask for the 128 bytes around p; a hint, so any address of an argument will do.
FLORA_DEVICE void prefetch(const void *p) {
#ifdef FLORA_HOST_SHIM
    (void)p;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

// A block's shared memory: as many bytes as the launch gave it, aligned to 128.
template <class T>
FLORA_DEVICE T &shared_memory() {
#ifdef FLORA_HOST_SHIM
    return *reinterpret_cast<T *>(shim::machine().shared());
#else
    extern __shared__ __align__(128) unsigned char raw[];
    return *reinterpret_cast<T *>(raw);
#endif
}
template <class T>
FLORA_DEVICE T ld_shared(const T *p) {
#ifdef FLORA_HOST_SHIM
    shim::machine().check("shared memory:", "reads", p, sizeof(T), false);
#endif
    return *p;
}
template <class T>
FLORA_DEVICE void st_shared(T *p, T value) {
#ifdef FLORA_HOST_SHIM
    shim::machine().check("shared memory:", "writes", p, sizeof(T), true);
#endif
    *p = value;
}

FLORA_DEVICE void sync_threads(FLORA_ONLY_SITE) {
#ifdef FLORA_HOST_SHIM
    shim::machine().barrier(file, line);
#else
    __syncthreads();
#endif
}

// UNIT = 16, 8 or 4 bytes from global to shared memory while the thread goes on; of these, the first `bytes` are read
// and the rest become zero. Both addresses are multiples of UNIT.
template <int UNIT>
FLORA_DEVICE void cp_async(void *shared, const void *global, int bytes FLORA_SITE) {
#ifdef FLORA_HOST_SHIM
    bool unfilled = shim::machine().faulty("no zero fill", "copy", file, line);
    shim::machine().copy_async(shared, global, UNIT, bytes, unfilled ? 0xFF : 0);
#else
    uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
    if (UNIT == 16)  // past L1, which has no use for what a block reads once
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(UNIT), "r"(bytes)
                     : "memory");
#endif
}
// Closes a group of copies.
FLORA_DEVICE void cp_async_commit() {
#ifdef FLORA_HOST_SHIM
    shim::machine().commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `LEFT` of this thread's groups are under way.
template <int LEFT>
FLORA_DEVICE void cp_async_wait(FLORA_ONLY_SITE) {
#ifdef FLORA_HOST_SHIM
    bool early = shim::machine().faulty("one group early", "wait", file, line);
    if (!shim::machine().faulty("skip", "wait", file, line)) shim::machine().wait(LEFT + early);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit numbers; lane l brings the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
FLORA_DEVICE void ldmatrix(uint32_t (&r)[4], const void *row FLORA_SITE) {
#ifdef FLORA_HOST_SHIM
    shim::ldmatrix(r, row, TRANSPOSED, file, line);
#else
    uint32_t address = uint32_t(__cvta_generic_to_shared(row));
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
#endif
}

// C (16, 8) += A (16, 16) B (16, 8), summed in float32. The first argument only names the type of A and B.
FLORA_DEVICE void mma(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FLORA_SITE) {
#ifdef FLORA_HOST_SHIM
    shim::mma_16816<shim::bf16_to_float>(c, a, b, file, line);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
FLORA_DEVICE void mma(fp16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FLORA_SITE) {
#ifdef FLORA_HOST_SHIM
    shim::mma_16816<shim::fp16_to_float>(c, a, b, file, line);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The value of another lane of the warp.
FLORA_DEVICE uint32_t shuffle(uint32_t value, int source FLORA_SITE) {
#ifdef FLORA_HOST_SHIM
    return shim::shuffle(value, source, file, line);
#else
    return __shfl_sync(0xFFFFFFFFu, value, source);
#endif
}

// Correctly rounded, whatever the compiler's flags.
FLORA_DEVICE float divide(float a, float b) {
#ifdef FLORA_HOST_SHIM
    return a / b;
#else
    return __fdiv_rn(a, b);
#endif
}
FLORA_DEVICE double divide(double a, double b) { return a / b; }
FLORA_DEVICE float root(float a) {
#ifdef FLORA_HOST_SHIM
    return std::sqrt(a);
#else
    return __fsqrt_rn(a);
#endif
}
FLORA_DEVICE double root(double a) { return ::sqrt(a); }

// Start a kernel. The status is this launch's own: an error that an earlier call left in the runtime is neither
// reported here nor cleared. `Arguments` must be the kernel's parameters to the byte, which are copied from there.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments &...arguments) {
    static_assert((std::is_same<std::decay_t<Parameters>, Arguments>::value && ...), "a kernel's own parameters");
#ifdef FLORA_HOST_SHIM
    (void)stream;
    bool ran = shim::machine().launch(grid, dim3(unsigned(threads)), shared_bytes, [&] { kernel(arguments...); });
    return shim::runtime().leave(ran ? shim::kSuccess : shim::kLaunchFailure);
#else
    if (shared_bytes > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    void *places[] = {const_cast<void *>(static_cast<const void *>(&arguments))...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), places);
#endif
}

}  // namespace flora::cuda
