// The CUDA side of the C interface: each function picks a kernel by dtype, fills its arguments and enqueues it.
//
// Grids come from sizes that the host knows; nothing is allocated, read back or waited for, so calls may be captured in
// a CUDA graph. Compiled by a host compiler with FLORA_HOST_SHIM, the same code runs the emulated kernels.
#include <cstdint>

#ifndef FLORA_WITH_CUDA
#define FLORA_WITH_CUDA
#endif
#include "../common/backend.h"
#include "adamw.cuh"
#include "expand.cuh"
#include "merge.cuh"
#include "shrink.cuh"
#include "wgrad.cuh"

namespace flora {
namespace cuda {
namespace {

#ifdef FLORA_HOST_SHIM
struct OnDevice {
    explicit OnDevice(int) {}
};
flora_status launch_error(const char *name) {
    return fail(FLORA_DEVICE_ERROR, "%s: %s", name, shim::machine().error.c_str());
}
flora_status available(int32_t) { return FLORA_OK; }
#else
// Makes a GPU the current one for as long as it lives.
class OnDevice {
  public:
    explicit OnDevice(int index) {
        if (cudaGetDevice(&before_) == cudaSuccess && before_ != index) changed_ = cudaSetDevice(index) == cudaSuccess;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }

  private:
    int before_ = 0;
    bool changed_ = false;
};
flora_status launch_error(const char *name) {
    cudaError_t error = cudaGetLastError();
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
#endif

constexpr int64_t kLargest = INT32_MAX / 2;

flora_status check_sizes(const char *name, std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes)
        if (size > kLargest)
            return fail(FLORA_UNSUPPORTED, "%s: sizes on CUDA must be at most %lld, got %lld", name,
                        static_cast<long long>(kLargest), static_cast<long long>(size));
    return FLORA_OK;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
cudaStream_t stream_of(const flora_exec &exec) { return static_cast<cudaStream_t>(exec.stream); }
void put_strides(int64_t (&to)[2], const flora_matrix &matrix) {
    to[0] = matrix.row_stride, to[1] = matrix.column_stride;
}

// Call `then` with a zero of the C++ type.
template <class Then>
flora_status with_float(int32_t dtype, Then then) {
    if (dtype == FLORA_BF16) return then(bf16{});
    if (dtype == FLORA_FP16) return then(fp16{});
    return dtype == FLORA_FP64 ? then(double{}) : then(float{});
}

// The same for x and its factors, which are of its dtype or fp32 masters.
template <class Then>
flora_status with_pair(int32_t dtype, int32_t factor, Then then) {
    return with_float(dtype, [&](auto zero) {
        if constexpr (sizeof(zero) == 2) {
            if (factor == FLORA_FP32) return then(zero, float{});
        }
        return then(zero, zero);
    });
}

flora_status check_pair(const char *name, const char *what, int32_t dtype, int32_t factor) {
    if (factor == dtype || (factor == FLORA_FP32 && element_bytes(dtype) == 2)) return FLORA_OK;
    return fail(FLORA_UNSUPPORTED, "%s: %s must be of the dtype %s, or %s for 16-bit activations, on CUDA, got %s", name,
                what, dtype_name(dtype), dtype_name(FLORA_FP32), dtype_name(factor));
}

Clients clients_of(const flora_clients &from) {
    return {from.token_offsets, from.rank_offsets, from.scaling, from.q, from.seed, from.first_row,
            int32_t(from.num_clients), from.scaling_dtype};
}
int64_t max_rank(const flora_clients &clients, int64_t P) {
    return clients.max_rank > 0 && clients.max_rank < P ? clients.max_rank : P;
}

// merge

bool turned(const flora_merge_item &item, const flora_merge_options &options) {
    // A transposed weight (Conv1D) is merged as its transpose, which is contiguous; draws count by row and column.
    return item.weight.column_stride != 1 && item.weight.row_stride == 1 && options.rounding == FLORA_NEAREST;
}

Engine engine_of(const flora_merge_item &item, const flora_merge_options &options) {
    bool wide = options.accumulate == FLORA_FP64 || item.weight.dtype == FLORA_FP64 || item.A.dtype == FLORA_FP64;
    if (wide) return Engine::wide;
    return element_bytes(item.weight.dtype) == 2 && !item.low_bits.data ? Engine::tensor : Engine::plain;
}

bool same_launch(const flora_merge_item &a, const flora_merge_item &b, const flora_merge_options &options) {
    return engine_of(a, options) == engine_of(b, options) && a.A.dtype == b.A.dtype &&
           a.weight.dtype == b.weight.dtype && a.coef.dtype == b.coef.dtype;
}

bool empty(const flora_merge_item &item) { return !item.weight.rows || !item.weight.columns || !item.A.rows; }

MergeEntry entry_for(const flora_merge_item &item, bool swap) {
    MergeEntry entry{};
    const flora_matrix &A = swap ? item.B : item.A, &B = swap ? item.A : item.B;
    entry.weight = item.weight.data, entry.A = A.data, entry.B = B.data, entry.coef = item.coef.data;
    entry.low_bits = static_cast<int16_t *>(item.low_bits.data);
    put_strides(entry.weight_stride, item.weight), put_strides(entry.low_stride, item.low_bits);
    put_strides(entry.A_stride, A), put_strides(entry.B_stride, B);
    if (swap) {
        entry.weight_stride[0] = item.weight.column_stride, entry.weight_stride[1] = item.weight.row_stride;
        entry.low_stride[0] = item.low_bits.column_stride, entry.low_stride[1] = item.low_bits.row_stride;
    }
    entry.seed = uint64_t(item.seed), entry.coef_stride = int32_t(item.coef.stride);
    entry.N = int32_t(B.columns), entry.K = int32_t(A.columns), entry.P = int32_t(A.rows);
    return entry;
}

template <class F, Engine ENGINE>
bool launch_merge(const MergeTable &table, int64_t tiles, cudaStream_t stream) {
    constexpr int THREADS = MergeShape<F, ENGINE>::Tile::kThreads;
    return launch(merge_kernel<F, ENGINE>, dim3(unsigned(tiles)), THREADS, MergeMemory<F, ENGINE>::kBytes, stream, table);
}

template <Engine ENGINE>
int64_t tiles_of(const MergeEntry &entry) {
    using Tile = typename MergeShape<float, ENGINE>::Tile;
    return ceil_div(entry.N, Tile::kRows) * ceil_div(entry.K, Tile::kColumns);
}
int64_t tiles_of(const MergeEntry &entry, Engine engine) {
    if (engine == Engine::tensor) return tiles_of<Engine::tensor>(entry);
    return engine == Engine::plain ? tiles_of<Engine::plain>(entry) : tiles_of<Engine::wide>(entry);
}

flora_status launch_merge(const MergeTable &table, int64_t tiles, Engine engine, int32_t factor, cudaStream_t stream) {
    if (!table.count) return FLORA_OK;
    bool started = false;
    with_float(factor, [&](auto zero) {
        using F = decltype(zero);
        if constexpr (sizeof(F) < 8) {
            if (engine == Engine::tensor) started = launch_merge<F, Engine::tensor>(table, tiles, stream);
            if (engine == Engine::plain) started = launch_merge<F, Engine::plain>(table, tiles, stream);
        }
        if (engine == Engine::wide) started = launch_merge<F, Engine::wide>(table, tiles, stream);
        return FLORA_OK;
    });
    return started ? FLORA_OK : launch_error("flora_merge");
}

flora_status merge_workspace(const flora_exec &, const MergeItems &items, const flora_merge_options &options,
                             size_t *bytes) {
    *bytes = 0;
    for (int64_t i = 0; i < items.count; ++i) {
        const flora_merge_item &item = items[i];
        flora_status status = check_sizes("flora_merge", {item.weight.rows, item.weight.columns, item.A.rows});
        if (status != FLORA_OK) return status;
        if (item.A.dtype != item.B.dtype)
            return fail(FLORA_UNSUPPORTED, "items[%lld]: A and B must have one dtype on CUDA, got %s and %s; convert one of them",
                        static_cast<long long>(i), dtype_name(item.A.dtype), dtype_name(item.B.dtype));
        if (item.coef.stride > INT32_MAX || item.coef.stride < INT32_MIN)
            return fail(FLORA_UNSUPPORTED, "items[%lld]: coef must have a stride of 32 bits on CUDA, got %lld",
                        static_cast<long long>(i), static_cast<long long>(item.coef.stride));
    }
    (void)options;
    return FLORA_OK;
}

// All items of one kind, from item `first` on, in as few launches as their table allows.
flora_status merge_kind(const flora_exec &exec, const MergeItems &items, int64_t first,
                        const flora_merge_options &options) {
    const flora_merge_item &kind = items[first];
    Engine engine = engine_of(kind, options);
    MergeTable table;
    table.count = 0, table.weight_dtype = kind.weight.dtype, table.coef_dtype = kind.coef.dtype;
    table.stochastic = options.rounding == FLORA_STOCHASTIC;
    int64_t tiles = 0;
    for (int64_t i = first; i < items.count; ++i) {
        if (empty(items[i]) || !same_launch(kind, items[i], options)) continue;
        MergeEntry entry = entry_for(items[i], turned(items[i], options));
        int64_t more = tiles_of(entry, engine);
        if (table.count == MergeTable::kEntries || tiles + more > INT32_MAX) {
            flora_status status = launch_merge(table, tiles, engine, kind.A.dtype, stream_of(exec));
            if (status != FLORA_OK) return status;
            table.count = 0, tiles = 0;
        }
        entry.first_tile = int32_t(tiles), tiles += more;
        table.entry[table.count++] = entry;
    }
    return launch_merge(table, tiles, engine, kind.A.dtype, stream_of(exec));
}

flora_status merge(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options) {
    OnDevice guard(exec.device_index);
    for (int64_t i = 0; i < items.count; ++i) {
        bool seen = empty(items[i]);
        for (int64_t j = 0; j < i && !seen; ++j) seen = !empty(items[j]) && same_launch(items[j], items[i], options);
        flora_status status = seen ? FLORA_OK : merge_kind(exec, items, i, options);
        if (status != FLORA_OK) return status;
    }
    return FLORA_OK;
}

// shrink

template <class T>
int64_t token_tiles(int64_t M, int64_t clients, T block) {
    return ceil_div(M, block) + clients;  // each client has whole tiles of its own
}

flora_status shrink_workspace(const flora_exec &, const flora_shrink_args &args, size_t *bytes) {
    *bytes = 0;
    flora_status status = check_sizes("flora_shrink", {args.x.rows, args.x.columns, args.A.rows, args.clients.num_clients});
    return status != FLORA_OK ? status : check_pair("flora_shrink", "A", args.x.dtype, args.A.dtype);
}

flora_status shrink(const flora_exec &exec, const flora_shrink_args &from) {
    if (!from.x.rows || !from.A.rows) return FLORA_OK;
    OnDevice guard(exec.device_index);
    ShrinkArgs args{from.x.data, from.A.data, from.s.data, {}, {}, int32_t(from.x.columns), clients_of(from.clients)};
    put_strides(args.x_stride, from.x), put_strides(args.A_stride, from.A);
    return with_pair(from.x.dtype, from.A.dtype, [&](auto x, auto A) {
        using T = decltype(x);
        using F = decltype(A);
        using Tile = typename ShrinkShape<T>::Tile;
        dim3 grid(unsigned(token_tiles(from.x.rows, args.clients.count, Tile::kRows)),
                  unsigned(ceil_div(max_rank(from.clients, from.A.rows), Tile::kColumns)));
        bool started = launch(shrink_kernel<T, F>, grid, Tile::kThreads, sizeof(ShrinkMemory<T, F>), stream_of(exec), args);
        return started ? FLORA_OK : launch_error("flora_shrink");
    });
}

// expand

flora_status expand_workspace(const flora_exec &, const flora_expand_args &args, size_t *bytes) {
    *bytes = 0;
    flora_status status = check_sizes("flora_expand", {args.y.rows, args.y.columns, args.B.rows, args.clients.num_clients});
    return status != FLORA_OK ? status : check_pair("flora_expand", "B", args.y.dtype, args.B.dtype);
}

flora_status expand(const flora_exec &exec, const flora_expand_args &from) {
    if (!from.y.rows || !from.y.columns || !from.B.rows) return FLORA_OK;
    OnDevice guard(exec.device_index);
    ExpandArgs args{from.y.data, from.s.data, from.B.data, {}, {}, int32_t(from.y.columns), clients_of(from.clients)};
    put_strides(args.y_stride, from.y), put_strides(args.B_stride, from.B);
    return with_pair(from.y.dtype, from.B.dtype, [&](auto y, auto B) {
        using T = decltype(y);
        using F = decltype(B);
        using Tile = typename ExpandShape<T>::Tile;
        int64_t blocks = token_tiles(from.y.rows, args.clients.count, Tile::kRows) * ceil_div(args.N, Tile::kColumns);
        bool started = blocks <= INT32_MAX && launch(expand_kernel<T, F>, dim3(unsigned(blocks)), Tile::kThreads,
                                                     sizeof(ExpandMemory<T, F>), stream_of(exec), args);
        return started ? FLORA_OK : launch_error("flora_expand");
    });
}

// wgrad

// Rows of parts that clients of M tokens can leave at most: one longer than a chunk has at most one chunk more than
// whole ones, and there are no more of them than whole chunks.
int64_t part_rows(const flora_wgrad_args &args) {
    int64_t whole = args.x.rows / kChunk, clients = args.clients.num_clients;
    if (args.x.rows <= kChunk) return 0;
    return (whole + (clients < whole ? clients : whole)) * max_rank(args.clients, args.dA.rows);
}
int64_t part_ld(int64_t columns) { return ceil_div(columns, 8) * 8; }

flora_status wgrad_workspace(const flora_exec &, const flora_wgrad_args &args, size_t *bytes) {
    size_t sum_bytes = args.x.dtype == FLORA_FP64 ? 8 : 4;
    *bytes = size_t(part_rows(args)) * size_t(part_ld(args.dA.columns) + part_ld(args.dB.columns)) * sum_bytes;
    flora_status status = check_sizes("flora_wgrad", {args.x.rows, args.dA.columns, args.dB.columns, args.dA.rows, args.clients.num_clients});
    return status != FLORA_OK ? status : check_pair("flora_wgrad", "dA", args.x.dtype, args.dA.dtype);
}

WgradSide side_of(const flora_vector &s, const flora_matrix &data, const flora_matrix &out, void *parts, bool scaled) {
    WgradSide side{s.data, data.data, out.data, parts, {}, {}, part_ld(out.columns), int32_t(out.columns), scaled};
    put_strides(side.data_stride, data), put_strides(side.out_stride, out);
    return side;
}

flora_status wgrad(const flora_exec &exec, const flora_wgrad_args &from) {
    int64_t P = from.dA.rows, clients = from.clients.num_clients, columns = from.dA.columns, rows = part_rows(from);
    if (!P || !clients || columns + from.dB.columns == 0) return FLORA_OK;
    OnDevice guard(exec.device_index);
    return with_pair(from.x.dtype, from.dA.dtype, [&](auto x, auto out) {
        using T = decltype(x);
        using O = decltype(out);
        using Tile = typename WgradShape<T>::Tile;
        using Sum = typename Tile::Sum;
        Sum *parts = static_cast<Sum *>(exec.workspace);
        WgradArgs args{};
        args.side[0] = side_of(from.ds, from.x, from.dA, parts, false);
        args.side[1] = side_of(from.s, from.dy, from.dB, rows ? parts + rows * part_ld(columns) : nullptr, true);
        args.chunk = kChunk, args.P = int32_t(P), args.clients = clients_of(from.clients);
        int64_t across = ceil_div(args.side[0].D, Tile::kColumns) + ceil_div(args.side[1].D, Tile::kColumns);
        int64_t blocks = (ceil_div(from.x.rows, kChunk) + clients) * across;
        dim3 grid(unsigned(blocks), unsigned(ceil_div(max_rank(from.clients, P), Tile::kRows)));
        bool started = blocks <= INT32_MAX && launch(wgrad_kernel<T, O>, grid, Tile::kThreads, sizeof(WgradMemory<T>), stream_of(exec), args);
        if (started && rows) {
            int64_t widest = args.side[0].D > args.side[1].D ? args.side[0].D : args.side[1].D;
            dim3 sums(unsigned(P), unsigned(ceil_div(widest, 8 * kSumThreads)), 2);
            started = launch(wgrad_sum_kernel<Sum, O>, sums, kSumThreads, 0, stream_of(exec), args);
        }
        return started ? FLORA_OK : launch_error("flora_wgrad");
    });
}

// adamw

flora_status adamw_workspace(const flora_exec &, const flora_adamw_args &args, size_t *bytes) {
    *bytes = 0;
    if (args.numel / kAdamwBlock >= INT32_MAX)
        return fail(FLORA_UNSUPPORTED, "flora_adamw: numel must be below 2^41 on CUDA, got %lld", static_cast<long long>(args.numel));
    return FLORA_OK;
}

flora_status adamw(const flora_exec &exec, const flora_adamw_args &from) {
    if (!from.numel || !from.num_segments) return FLORA_OK;
    OnDevice guard(exec.device_index);
    AdamwArgs args{from.param, from.exp_avg, from.exp_avg_sq, from.grad, from.hyper.data, from.segment_offsets,
                   from.owner, from.numel, from.num_segments, {}, from.hyper.dtype, 0};
    put_strides(args.hyper_stride, from.hyper);
    uintptr_t any = 0;
    for (const void *p : {static_cast<const void *>(from.param), from.grad, static_cast<const void *>(from.exp_avg), static_cast<const void *>(from.exp_avg_sq)})
        any |= reinterpret_cast<uintptr_t>(p);
    args.wide = any % 16 == 0;
    dim3 grid(unsigned(ceil_div(from.numel, kAdamwBlock)));
    bool started = from.dtype == FLORA_FP64
                       ? launch(adamw_kernel<double>, grid, kAdamwThreads, sizeof(Settings<double>), stream_of(exec), args)
                       : launch(adamw_kernel<float>, grid, kAdamwThreads, sizeof(Settings<float>), stream_of(exec), args);
    return started ? FLORA_OK : launch_error("flora_adamw");
}

}  // namespace
}  // namespace cuda

const Backend cuda_backend = {
    cuda::available,        cuda::merge_workspace, cuda::merge, cuda::shrink_workspace, cuda::shrink, cuda::expand_workspace,
    cuda::expand,           cuda::wgrad_workspace, cuda::wgrad, cuda::adamw_workspace,  cuda::adamw,
};

}  // namespace flora
