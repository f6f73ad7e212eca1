// wgrad: dA_c = dS_c^T drop(X_c) with the mask drawn again, and dB_c = s_c S_c^T dY_c, in one grouped launch.
//
// A block owns a tile of one client's dA or dB and sums over its tokens. A client with more than kChunk tokens is cut
// into chunks of that size, counted from its own first token; their float32 parts are summed in order by a second
// launch. So no atomics are needed, and a client's bits do not depend on its cohort.
// Letters: M packed tokens, D columns of X or dY (K or N), R one client's rank, P sum of ranks, C clients.
// i counts R, j counts D, c counts M.
#pragma once

#include "clients.cuh"

namespace flora::cuda {

// A chunk's part costs 8 R D bytes against the 2 M D that it reads: 1/8 at rank 64 in 16 bits.
constexpr int kChunk = 2048;
constexpr int kSumThreads = 128;

template <class T>
struct WgradShape {
    using Tile = TensorTile<T, 64, 128, 2, 2, true, true>;
    static constexpr int kDepth = 32, kStages = 3, kBlocks = 3;
};
template <>
struct WgradShape<float> {
    using Tile = PlainTile<float, 64, 128, 8, 16, true, true>;
    static constexpr int kDepth = 16, kStages = 3, kBlocks = 2;
};
template <>
struct WgradShape<double> {
    using Tile = PlainTile<double, 64, 64, 16, 16, true, true>;
    static constexpr int kDepth = 16, kStages = 2, kBlocks = 1;
};

template <class T>
union WgradMemory {
    using Shape = WgradShape<T>;
    using Tile = typename Shape::Tile;
    struct {
        T s[Shape::kStages][Shape::kDepth][kLd<T, Tile::kRows>];
        T data[Shape::kStages][Shape::kDepth][kLd<T, Tile::kColumns>];
    } ring;
    typename Tile::Sum staged[Tile::kRows][kStagedLd<Tile::kColumns>];
};

// One of the two products: its columns, what lies on its two sides, and where its sums go.
struct WgradSide {
    const void *s, *data;
    void *out, *parts;  // parts: rows of part_ld sums each
    int64_t data_stride[2], out_stride[2], part_ld;
    int32_t D, scaled;
};
struct WgradArgs {
    WgradSide side[2];  // dA, then dB
    int32_t chunk, P;
    Clients clients;
};

template <class T, class O>
__global__ void __launch_bounds__(WgradShape<T>::Tile::kThreads, WgradShape<T>::kBlocks)
    wgrad_kernel(FLORA_TABLE(WgradArgs) args) {
    using Shape = WgradShape<T>;
    using Tile = typename Shape::Tile;
    using Sum = typename Tile::Sum;
    constexpr int BR = Tile::kRows, BD = Tile::kColumns, DEPTH = Shape::kDepth, THREADS = Tile::kThreads;
    constexpr int LD_S = kLd<T, BR>, LD_D = kLd<T, BD>;
    auto &memory = shared_memory<WgradMemory<T>>();
    auto &ring = memory.ring;

    int across_A = (args.side[0].D + BD - 1) / BD, across = across_A + (args.side[1].D + BD - 1) / BD;
    int tile_id = int(blockIdx.x) % across, piece = int(blockIdx.y) * BR;
    Place place = find_place(args.clients, int(blockIdx.x) / across, args.chunk, 1);
    if (!place.found || piece >= place.rank) return;
    const WgradSide &side = args.side[tile_id >= across_A];
    int d = (tile_id >= across_A ? tile_id - across_A : tile_id) * BD, columns = smaller(BD, side.D - d);
    int row = place.row - place.first, ranks = smaller(BR, place.rank - piece);
    int tokens = smaller(args.chunk, place.stop - place.row);
    View<const T> s{static_cast<const T *>(side.s) + place.s_start + int64_t(row) * place.rank + piece, place.rank, 1};
    View<const T> data{static_cast<const T *>(side.data), side.data_stride[0], side.data_stride[1]};
    int s_unit = s.unit(), data_unit = data.unit();
    data = data.from(place.row, d);
    Mask mask{};
    if (!side.scaled) mask = mask_of(args.clients, place.client);

    Tile tile;
    tile.clear();
    auto load = [&](int step, int slot) {
        int t = step * DEPTH;
        load_ragged<DEPTH, BR, LD_S, THREADS>(&ring.s[slot][0][0], s.from(t, 0), s_unit, tokens - t, ranks);
        load_tile<DEPTH, BD, LD_D, THREADS>(&ring.data[slot][0][0], data.from(t, 0), data_unit, tokens - t, columns);
    };
    auto work = [&](int step, int slot) {
        if (mask.on()) {
            drop<DEPTH, BD, LD_D, THREADS>(&ring.data[slot][0][0], mask, row + step * DEPTH, d);
            sync_threads();
        }
        for (int c = 0; c < DEPTH; c += Tile::kDepth) {
            const T *left[1] = {ring.s[slot][c]}, *right[1] = {ring.data[slot][c]};
            tile.multiply(left, LD_S, right, LD_D, ranks, columns);
        }
    };
    pipeline<Shape::kStages>((tokens + DEPTH - 1) / DEPTH, load, work);

    // Without tokens there is no product to scale: 0 * NaN would be NaN.
    Sum factor = tokens <= 0 ? Sum(0) : side.scaled ? Sum(scaling_of(args.clients, place.client)) : mask.scale<Sum>();
    bool split = place.stop - place.first > args.chunk;
    View<O> out{static_cast<O *>(side.out), side.out_stride[0], side.out_stride[1]};
    bool out_wide = out.wide();
    // Parts lie by client, by chunk, by rank.
    int64_t part = (place.part + int64_t(row / args.chunk) * place.rank + piece) * side.part_ld + d;
    View<Sum> parts{static_cast<Sum *>(side.parts) + part, side.part_ld, 1};
    auto *staged = &memory.staged[0][0];
    if (split) finish(tile, staged, ranks, columns, Write<Sum, Sum>{parts, factor, true});
    else finish(tile, staged, ranks, columns, Write<O, Sum>{out.from(place.bank + piece, d), factor, out_wide});
}

// Sum the chunks of one bank row in order; a thread has eight columns.
template <class Sum, class O>
__global__ void __launch_bounds__(kSumThreads) wgrad_sum_kernel(FLORA_TABLE(WgradArgs) args) {
    int lane = thread_id() % 32, bank_row = int(blockIdx.x);
    uint64_t parts = 0, found = 0;  // found: 1 + chunks << 1 of the owner, with its rank and its bank's start above
    uint64_t place = 0;
    for (int client = lane; client < args.clients.count; client += 32) {
        int length = ld_global(args.clients.tokens + client + 1) - ld_global(args.clients.tokens + client);
        int bank = ld_global(args.clients.ranks + client), end = ld_global(args.clients.ranks + client + 1);
        int chunks = length > args.chunk ? (length + args.chunk - 1) / args.chunk : 0;
        if (end <= bank_row) parts += uint64_t(chunks) * uint64_t(end - bank);
        if (bank <= bank_row && bank_row < end) found = uint64_t(chunks), place = uint64_t(bank) << 32 | uint64_t(end - bank);
    }
    int chunks = int(sum_of_lanes(found));  // one lane alone has it
    place = sum_of_lanes(place), parts = sum_of_lanes(parts);
    if (chunks == 0) return;
    int64_t first = int64_t(parts) + bank_row - int64_t(place >> 32), rank = int64_t(place & 0xFFFFFFFF);
    const WgradSide &side = args.side[blockIdx.z];
    int d = (int(blockIdx.y) * kSumThreads + thread_id()) * 8, real = clamp_to(side.D - d, 8);
    if (!real) return;
    Sum sums[8] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
        Sum values[8];
        load_8(values, static_cast<const Sum *>(side.parts) + (first + chunk * rank) * side.part_ld + d, 1, true, real);
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) sums[e] += values[e];
    }
    O values[8];
    FLORA_UNROLL
    for (int e = 0; e < 8; ++e) narrow(sums[e], values[e]);
    View<O> out{static_cast<O *>(side.out), side.out_stride[0], side.out_stride[1]};
    store_8(out.at(bank_row, d), values, out.column_stride, out.wide(), real);
}

}  // namespace flora::cuda
