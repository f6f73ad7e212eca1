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
#include "device.h"
#include "expand.cuh"
#include "merge.cuh"
#include "shrink.cuh"
#include "wgrad.cuh"

namespace flora {
namespace cuda {
namespace {

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
cudaError_t launch_merge(const MergeTable &table, int64_t tiles, cudaStream_t stream) {
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

// Call `then` with a factor's type and an engine that sums it.
template <class Then>
flora_status with_engine(int32_t factor, Engine engine, Then then) {
    return with_float(factor, [&](auto zero) {
        using F = decltype(zero);
        if constexpr (sizeof(F) < 8) {
            if (engine == Engine::tensor) return then(zero, std::integral_constant<Engine, Engine::tensor>{});
            if (engine == Engine::plain) return then(zero, std::integral_constant<Engine, Engine::plain>{});
        }
        return then(zero, std::integral_constant<Engine, Engine::wide>{});
    });
}

flora_status launch_merge(const MergeTable &table, int64_t tiles, Engine engine, int32_t factor, cudaStream_t stream) {
    if (!table.count) return FLORA_OK;
    return with_engine(factor, engine, [&](auto zero, auto kind) {
        return launched("flora_merge", launch_merge<decltype(zero), kind.value>(table, tiles, stream));
    });
}

flora_status check_merge_needs(const flora_exec &exec, const flora_merge_item &item, const flora_merge_options &options) {
    MergeEntry entry = entry_for(item, turned(item, options));
    return with_engine(item.A.dtype, engine_of(item, options), [&](auto zero, auto kind) {
        return check_needs("flora_merge", exec,
                           {tiles_of<kind.value>(entry), 1, MergeMemory<decltype(zero), kind.value>::kBytes});
    });
}

flora_status merge_workspace(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options,
                             size_t *bytes) {
    *bytes = 0;
    for (int64_t i = 0; i < items.count; ++i) {
        const flora_merge_item &item = items[i];
        FLORA_TRY(check_sizes("flora_merge", {item.weight.rows, item.weight.columns, item.A.rows}));
        if (item.A.dtype != item.B.dtype)
            return fail(FLORA_UNSUPPORTED, "items[%lld]: A and B must have one dtype on CUDA, got %s and %s; convert one of them",
                        static_cast<long long>(i), dtype_name(item.A.dtype), dtype_name(item.B.dtype));
        if (item.coef.stride > INT32_MAX || item.coef.stride < INT32_MIN)
            return fail(FLORA_UNSUPPORTED, "items[%lld]: coef must have a stride of 32 bits on CUDA, got %lld",
                        static_cast<long long>(i), static_cast<long long>(item.coef.stride));
        FLORA_TRY(check_merge_needs(exec, item, options));
    }
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
            FLORA_TRY(launch_merge(table, tiles, engine, kind.A.dtype, stream_of(exec)));
            table.count = 0, tiles = 0;
        }
        entry.first_tile = int32_t(tiles), tiles += more;
        table.entry[table.count++] = entry;
    }
    return launch_merge(table, tiles, engine, kind.A.dtype, stream_of(exec));
}

flora_status merge(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options) {
    OnDevice guard(exec.device_index);
    FLORA_TRY(guard.status);
    for (int64_t i = 0; i < items.count; ++i) {
        bool seen = empty(items[i]);
        for (int64_t j = 0; j < i && !seen; ++j) seen = !empty(items[j]) && same_launch(items[j], items[i], options);
        if (!seen) FLORA_TRY(merge_kind(exec, items, i, options));
    }
    return FLORA_OK;
}

// shrink

template <class T>
int64_t token_tiles(int64_t M, int64_t clients, T block) {
    return ceil_div(M, block) + clients;  // each client has whole tiles of its own
}

// The grid of `shrink` and what its kernel for x in T and factors in F needs.
template <class T, class F>
Needs shrink_needs(const flora_shrink_args &args) {
    using Tile = typename ShrinkShape<T, F>::Tile;
    return {token_tiles(args.x.rows, args.clients.num_clients, Tile::kRows),
            ceil_div(max_rank(args.clients, args.A.rows), Tile::kColumns), sizeof(ShrinkMemory<T, F>)};
}

flora_status shrink_workspace(const flora_exec &exec, const flora_shrink_args &args, size_t *bytes) {
    *bytes = 0;
    FLORA_TRY(check_sizes("flora_shrink", {args.x.rows, args.x.columns, args.A.rows, args.clients.num_clients}));
    FLORA_TRY(check_pair("flora_shrink", "A", args.x.dtype, args.A.dtype));
    return with_pair(args.x.dtype, args.A.dtype, [&](auto x, auto A) {
        return check_needs("flora_shrink", exec, shrink_needs<decltype(x), decltype(A)>(args));
    });
}

flora_status shrink(const flora_exec &exec, const flora_shrink_args &from) {
    if (!from.x.rows || !from.A.rows) return FLORA_OK;
    OnDevice guard(exec.device_index);
    FLORA_TRY(guard.status);
    ShrinkArgs args{from.x.data, from.A.data, from.s.data, {}, {}, int32_t(from.x.columns), clients_of(from.clients)};
    put_strides(args.x_stride, from.x), put_strides(args.A_stride, from.A);
    return with_pair(from.x.dtype, from.A.dtype, [&](auto x, auto A) {
        using T = decltype(x);
        using F = decltype(A);
        Needs needs = shrink_needs<T, F>(from);
        dim3 grid(unsigned(needs.blocks), unsigned(needs.blocks_y));
        constexpr int THREADS = ShrinkShape<T, F>::Tile::kThreads;
        return launched("flora_shrink",
                        launch(shrink_kernel<T, F>, grid, THREADS, needs.shared_bytes, stream_of(exec), args));
    });
}

// expand

template <class T, class F>
Needs expand_needs(const flora_expand_args &args) {
    using Tile = typename ExpandShape<T>::Tile;
    int64_t across = ceil_div(args.y.columns, Tile::kColumns);
    return {token_tiles(args.y.rows, args.clients.num_clients, Tile::kRows) * across, 1, sizeof(ExpandMemory<T, F>)};
}

flora_status expand_workspace(const flora_exec &exec, const flora_expand_args &args, size_t *bytes) {
    *bytes = 0;
    FLORA_TRY(check_sizes("flora_expand", {args.y.rows, args.y.columns, args.B.rows, args.clients.num_clients}));
    FLORA_TRY(check_pair("flora_expand", "B", args.y.dtype, args.B.dtype));
    return with_pair(args.y.dtype, args.B.dtype, [&](auto y, auto B) {
        return check_needs("flora_expand", exec, expand_needs<decltype(y), decltype(B)>(args));
    });
}

flora_status expand(const flora_exec &exec, const flora_expand_args &from) {
    if (!from.y.rows || !from.y.columns || !from.B.rows) return FLORA_OK;
    OnDevice guard(exec.device_index);
    FLORA_TRY(guard.status);
    ExpandArgs args{from.y.data, from.s.data, from.B.data, {}, {}, int32_t(from.y.columns), clients_of(from.clients)};
    put_strides(args.y_stride, from.y), put_strides(args.B_stride, from.B);
    return with_pair(from.y.dtype, from.B.dtype, [&](auto y, auto B) {
        using T = decltype(y);
        using F = decltype(B);
        Needs needs = expand_needs<T, F>(from);
        constexpr int THREADS = ExpandShape<T>::Tile::kThreads;
        return launched("flora_expand", launch(expand_kernel<T, F>, dim3(unsigned(needs.blocks)), THREADS,
                                               needs.shared_bytes, stream_of(exec), args));
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

template <class T>
Needs wgrad_needs(const flora_wgrad_args &args) {
    using Tile = typename WgradShape<T>::Tile;
    int64_t across = ceil_div(args.dA.columns, Tile::kColumns) + ceil_div(args.dB.columns, Tile::kColumns);
    return {(ceil_div(args.x.rows, kChunk) + args.clients.num_clients) * across,
            ceil_div(max_rank(args.clients, args.dA.rows), Tile::kRows), sizeof(WgradMemory<T>)};
}

// Of the launch that sums the parts of clients that were cut: a row of it for each row of the bank.
Needs sum_needs(const flora_wgrad_args &args) {
    int64_t widest = args.dA.columns > args.dB.columns ? args.dA.columns : args.dB.columns;
    return {args.dA.rows, ceil_div(widest, 8 * kSumThreads), 0};
}

flora_status wgrad_workspace(const flora_exec &exec, const flora_wgrad_args &args, size_t *bytes) {
    size_t sum_bytes = args.x.dtype == FLORA_FP64 ? 8 : 4;
    *bytes = size_t(part_rows(args)) * size_t(part_ld(args.dA.columns) + part_ld(args.dB.columns)) * sum_bytes;
    FLORA_TRY(check_sizes("flora_wgrad", {args.x.rows, args.dA.columns, args.dB.columns, args.dA.rows, args.clients.num_clients}));
    FLORA_TRY(check_pair("flora_wgrad", "dA", args.x.dtype, args.dA.dtype));
    if (part_rows(args)) FLORA_TRY(check_needs("flora_wgrad", exec, sum_needs(args)));
    return with_pair(args.x.dtype, args.dA.dtype, [&](auto x, auto) {
        return check_needs("flora_wgrad", exec, wgrad_needs<decltype(x)>(args));
    });
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
    FLORA_TRY(guard.status);
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
        Needs needs = wgrad_needs<T>(from), sums = sum_needs(from);
        dim3 grid(unsigned(needs.blocks), unsigned(needs.blocks_y));
        FLORA_TRY(launched("flora_wgrad", launch(wgrad_kernel<T, O>, grid, Tile::kThreads, needs.shared_bytes,
                                                 stream_of(exec), args)));
        if (!rows) return flora_status(FLORA_OK);
        dim3 across(unsigned(sums.blocks), unsigned(sums.blocks_y), 2);
        return launched("flora_wgrad",
                        launch(wgrad_sum_kernel<Sum, O>, across, kSumThreads, 0, stream_of(exec), args));
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
    FLORA_TRY(guard.status);
    AdamwArgs args{from.param, from.exp_avg, from.exp_avg_sq, from.grad, from.hyper.data, from.segment_offsets,
                   from.owner, from.numel, from.num_segments, {}, from.hyper.dtype, 0};
    put_strides(args.hyper_stride, from.hyper);
    uintptr_t any = 0;
    for (const void *p : {static_cast<const void *>(from.param), from.grad, static_cast<const void *>(from.exp_avg), static_cast<const void *>(from.exp_avg_sq)})
        any |= reinterpret_cast<uintptr_t>(p);
    args.wide = any % 16 == 0;
    dim3 grid(unsigned(ceil_div(from.numel, kAdamwBlock)));
    return launched("flora_adamw",
                    from.dtype == FLORA_FP64
                        ? launch(adamw_kernel<double>, grid, kAdamwThreads, sizeof(Settings<double>), stream_of(exec), args)
                        : launch(adamw_kernel<float>, grid, kAdamwThreads, sizeof(Settings<float>), stream_of(exec), args));
}

}  // namespace
}  // namespace cuda

const Backend cuda_backend = {
    cuda::available,        cuda::merge_workspace, cuda::merge, cuda::shrink_workspace, cuda::shrink, cuda::expand_workspace,
    cuda::expand,           cuda::wgrad_workspace, cuda::wgrad, cuda::adamw_workspace,  cuda::adamw,
};

}  // namespace flora
