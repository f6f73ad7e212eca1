// The CUDA backend with what tests need, as one library of its own: built by a host compiler the emulated kernels, built
// by nvcc the same for a GPU. Not part of the product.
//
//     g++ -x c++ -O1 -std=c++17 -shared -fPIC -DFLORA_HOST_SHIM -I csrc/include csrc/cuda/probes.cu
//     nvcc -O3 -std=c++17 -shared -Xcompiler -fPIC -arch=native -I csrc/include csrc/cuda/probes.cu
#include <cstdarg>
#include <cstdio>
#include <initializer_list>

#include "backend.cu"

namespace flora {
namespace cuda {
namespace {

// Each wrapper of ptx.cuh alone, on one warp: 32-bit words in, 32-bit words out.
enum Probe { PROBE_LDMATRIX, PROBE_LDMATRIX_TRANSPOSED, PROBE_MMA_BF16, PROBE_MMA_FP16, PROBE_COPY, PROBE_GROUPS, PROBE_SHUFFLE, PROBE_NUMBERS, PROBE_DRAWS };

template <bool TRANSPOSED>
FLORA_DEVICE void probe_ldmatrix(const uint32_t *in, uint32_t *out) {
    auto &rows = shared_memory<uint4[32]>();
    int lane = thread_id();
    cp_async<16>(&rows[lane], in + 4 * lane, 16);
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();
    uint32_t r[4];
    ldmatrix<TRANSPOSED>(r, &rows[lane]);
    for (int i = 0; i < 4; ++i) st_global(out + 4 * lane + i, r[i]);
}

template <class T>
FLORA_DEVICE void probe_mma(const uint32_t *in, uint32_t *out) {
    const uint32_t *mine = in + 10 * thread_id();
    uint32_t a[4], b[2];
    float c[4];
    for (int i = 0; i < 4; ++i) a[i] = ld_global(mine + i);
    for (int i = 0; i < 2; ++i) b[i] = ld_global(mine + 4 + i);
    for (int i = 0; i < 4; ++i) c[i] = bits_float(ld_global(mine + 6 + i));
    mma(T{}, c, a, b);
    for (int i = 0; i < 4; ++i) st_global(out + 4 * thread_id() + i, float_bits(c[i]));
}

// Lane l copies its first in[128 + l] bytes.
FLORA_DEVICE void probe_copy(const uint32_t *in, uint32_t *out) {
    auto &words = shared_memory<uint32_t[128]>();
    int lane = thread_id();
    for (int i = 0; i < 4; ++i) st_shared(&words[4 * lane + i], 0xAAAAAAAAu);
    cp_async<16>(&words[4 * lane], in + 4 * lane, int(ld_global(in + 128 + lane)));
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();
    for (int i = 0; i < 4; ++i) st_global(out + 4 * lane + i, ld_shared(&words[(4 * lane + i + 5) % 128]));
}

// Four groups, waited for one by one, as the pipeline does.
FLORA_DEVICE void probe_groups(const uint32_t *in, uint32_t *out) {
    auto &words = shared_memory<uint32_t[512]>();
    int lane = thread_id();
    for (int group = 0; group < 4; ++group) {
        cp_async<16>(&words[128 * group + 4 * lane], in + 128 * group + 4 * lane, 16);
        cp_async_commit();
    }
    auto take = [&](int group) {
        sync_threads();
        for (int i = 0; i < 4; ++i)
            st_global(out + 128 * group + 4 * lane + i, ld_shared(&words[128 * group + (4 * lane + i + 5) % 128]));
    };
    cp_async_wait<3>(), take(0);
    cp_async_wait<2>(), take(1);
    cp_async_wait<1>(), take(2);
    cp_async_wait<0>(), take(3);
}

FLORA_DEVICE void probe_numbers(const uint32_t *in, uint32_t *out) {
    int lane = thread_id();
    uint32_t bits = ld_global(in + lane);
    float value = bits_float(bits), other = bits_float(ld_global(in + (lane + 1) % 32));
    bf16 brain;
    fp16 half;
    narrow(value, brain), narrow(value, half);
    uint32_t words[] = {brain.bits, half.bits, float_bits(widen(fp16{uint16_t(bits)})), float_bits(widen(bf16{uint16_t(bits)})),
                        float_bits(root(value < 0 ? -value : value)), float_bits(divide(value, other))};
    for (int i = 0; i < 6; ++i) st_global(out + 6 * lane + i, words[i]);
}

FLORA_DEVICE void probe_draws(const uint32_t *in, uint32_t *out) {
    int lane = thread_id();
    const uint32_t *mine = in + 5 * lane;
    uint64_t seed = uint64_t(ld_global(mine + 3)) << 32 | ld_global(mine + 2);
    Draws draws = draws_of(ld_global(mine), ld_global(mine + 1), seed, ld_global(mine + 4));
    for (int i = 0; i < 4; ++i) st_global(out + 4 * lane + i, draws.word[i]);
}

__global__ void probe_kernel(int probe, const uint32_t *in, uint32_t *out) {
    if (probe == PROBE_LDMATRIX) probe_ldmatrix<false>(in, out);
    if (probe == PROBE_LDMATRIX_TRANSPOSED) probe_ldmatrix<true>(in, out);
    if (probe == PROBE_MMA_BF16) probe_mma<bf16>(in, out);
    if (probe == PROBE_MMA_FP16) probe_mma<fp16>(in, out);
    if (probe == PROBE_COPY) probe_copy(in, out);
    if (probe == PROBE_GROUPS) probe_groups(in, out);
    if (probe == PROBE_NUMBERS) probe_numbers(in, out);
    if (probe == PROBE_DRAWS) probe_draws(in, out);
    if (probe == PROBE_SHUFFLE) {
        uint32_t value = shuffle(ld_global(in + thread_id()), int(ld_global(in + 32 + thread_id())));
        st_global(out + thread_id(), value);
    }
}

char last_error[512];

}  // namespace
}  // namespace cuda

flora_status fail(flora_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(cuda::last_error, sizeof cuda::last_error, format, arguments);
    va_end(arguments);
    return status;
}
size_t element_bytes(int32_t dtype) {
    return dtype == FLORA_FP32 ? 4 : dtype == FLORA_FP64 ? 8 : 2;
}
const char *dtype_name(int32_t dtype) {
    const char *names[] = {"?", "fp32", "bf16", "fp16", "fp64", "int16"};
    return names[dtype >= 1 && dtype <= 5 ? dtype : 0];
}

}  // namespace flora

extern "C" {

FLORA_API const char *flora_check_error() { return flora::cuda::last_error; }

FLORA_API flora_status flora_check_available() { return flora::cuda_backend.available(0); }

FLORA_API flora_status flora_check_probe(int probe, const uint32_t *in, uint32_t *out, void *stream) {
    using namespace flora::cuda;
    return launched("probe", launch(probe_kernel, dim3(1), 32, 2048, static_cast<cudaStream_t>(stream), probe, in, out));
}

// With `bytes` each asks for its workspace, without it works.
FLORA_API flora_status flora_check_merge(const flora_exec *exec, const flora_merge_item *items, int64_t count,
                                         const flora_merge_options *options, size_t *bytes) {
    const flora::MergeItems all{items, count};
    if (bytes) return flora::cuda_backend.merge_workspace(*exec, all, *options, bytes);
    return flora::cuda_backend.merge(*exec, all, *options);
}
#define FLORA_CHECK_FUNCTION(op)                                                                                    \
    FLORA_API flora_status flora_check_##op(const flora_exec *exec, const flora_##op##_args *args, size_t *bytes) { \
        if (bytes) return flora::cuda_backend.op##_workspace(*exec, *args, bytes);                                  \
        return flora::cuda_backend.op(*exec, *args);                                                                \
    }
FLORA_CHECK_FUNCTION(shrink)
FLORA_CHECK_FUNCTION(expand)
FLORA_CHECK_FUNCTION(wgrad)
FLORA_CHECK_FUNCTION(adamw)

#ifdef FLORA_HOST_SHIM
FLORA_API void flora_shim_reset(int order) {
    shim::Machine &m = shim::machine();
    m.error.clear(), m.fault.clear(), m.fault_at.clear(), m.buffers.clear(), m.sites.clear(), m.order = order;
}
// What the machine has and can do, and the error that an earlier call of the program's own left behind.
FLORA_API void flora_shim_machine(int devices, int current, int major, int shared_bytes, int last_error) {
    shim::runtime() = {devices, current, major, shared_bytes, last_error};
}
FLORA_API int flora_shim_current() { return shim::runtime().current; }
FLORA_API int flora_shim_last_error() { return shim::runtime().last_error; }
// What kernels may touch; everything else is out of bounds.
FLORA_API void flora_shim_buffer(const void *base, size_t bytes, const char *name) {
    shim::machine().buffers.push_back(std::make_unique<shim::Region>(base, bytes, name, false));
}
// Plant a fault ("skip", "swap", "transpose", "no zero fill", "one group early") at a site ("barrier tile.cuh:12").
FLORA_API void flora_shim_fault(const char *fault, const char *site) {
    shim::machine().fault = fault, shim::machine().fault_at = site;
}
// Every site met since the reset, one a line.
FLORA_API const char *flora_shim_sites() {
    static std::string lines;
    lines.clear();
    for (const auto &site : shim::machine().sites) lines += site.first + "\n";
    return lines.c_str();
}
#endif
}
