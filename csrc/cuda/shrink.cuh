// shrink: S_c = s_c drop(X_c) A_c^T, and with B for A the backward's dS = s dY B^T.
//
// A block owns BLOCK_M tokens of one client and up to 64 of its ranks and sums over K; X is read once for ranks up to
// 64, and rows of A past the rank are never read. arXiv 2106.09685, eq. 3.
// Letters: M packed tokens, K columns of X, R one client's rank, C clients. i counts M, j counts R, c counts K.
#pragma once

#include "clients.cuh"

namespace flora::cuda {

// fp32 factors are kept as they come beside their 16-bit copy: a fourth stage would take 115,712 bytes, more than a block
// may have on sm_86, sm_89 and sm_120 (101,376), and leave room for one block only on sm_90. Three take 89,088.
template <class T, class F>
struct ShrinkShape {
    using Tile = TensorTile<T, 64, 64, 4, 1, false, false>;
    static constexpr int kDepth = 64, kStages = sizeof(F) == sizeof(T) ? 4 : 3;
};
template <>
struct ShrinkShape<float, float> {
    using Tile = PlainTile<float, 64, 64, 16, 8, false, false>;
    static constexpr int kDepth = 32, kStages = 3;
};
template <>
struct ShrinkShape<double, double> {
    using Tile = PlainTile<double, 64, 64, 16, 16, false, false>;
    static constexpr int kDepth = 16, kStages = 2;
};

template <class T, class F>
union ShrinkMemory {
    using Shape = ShrinkShape<T, F>;
    using Tile = typename Shape::Tile;
    static constexpr bool kDirect = sizeof(T) == sizeof(F);
    struct {
        T x[Shape::kStages][Tile::kRows][kLd<T, Shape::kDepth>];
        F A[Shape::kStages][Tile::kColumns][kLd<F, Shape::kDepth>];
        T copy[kDirect ? 1 : Tile::kColumns][kLd<T, Shape::kDepth>];
    } ring;
    typename Tile::Sum staged[Tile::kRows][kStagedLd<Tile::kColumns>];
};

struct ShrinkArgs {
    const void *x, *A;
    void *s;
    int64_t x_stride[2], A_stride[2];
    int32_t K;
    Clients clients;
};

template <class T, class F>
__global__ void __launch_bounds__((ShrinkShape<T, F>::Tile::kThreads)) shrink_kernel(FLORA_TABLE(ShrinkArgs) args) {
    using Shape = ShrinkShape<T, F>;
    using Tile = typename Shape::Tile;
    using Sum = typename Tile::Sum;
    constexpr int BM = Tile::kRows, BR = Tile::kColumns, DEPTH = Shape::kDepth, THREADS = Tile::kThreads;
    constexpr int LD_X = kLd<T, DEPTH>, LD_A = kLd<F, DEPTH>;
    constexpr bool DIRECT = ShrinkMemory<T, F>::kDirect;
    auto &memory = shared_memory<ShrinkMemory<T, F>>();
    auto &ring = memory.ring;

    Place place = find_place(args.clients, int(blockIdx.x), BM, 0);
    int piece = int(blockIdx.y) * BR;
    if (!place.found || piece >= place.rank) return;
    int rows = smaller(BM, place.stop - place.row), ranks = smaller(BR, place.rank - piece), K = args.K;
    View<const T> x{static_cast<const T *>(args.x), args.x_stride[0], args.x_stride[1]};
    View<const F> A{static_cast<const F *>(args.A), args.A_stride[0], args.A_stride[1]};
    int x_unit = x.unit(), A_unit = A.unit();
    x = x.from(place.row, 0), A = A.from(place.bank + piece, 0);
    Mask mask = mask_of(args.clients, place.client);

    Tile tile;
    tile.clear();
    auto load = [&](int step, int slot) {
        int k = step * DEPTH;
        load_tile<BM, DEPTH, LD_X, THREADS>(&ring.x[slot][0][0], x.from(0, k), x_unit, rows, K - k);
        load_tile<BR, DEPTH, LD_A, THREADS>(&ring.A[slot][0][0], A.from(0, k), A_unit, ranks, K - k);
    };
    auto work = [&](int step, int slot) {
        // The mask alone goes before the product; scaled up in 16 bits, X would be rounded.
        if (mask.on()) drop<BM, DEPTH, LD_X, THREADS>(&ring.x[slot][0][0], mask, place.row - place.first, step * DEPTH);
        if constexpr (!DIRECT) compute_copy<BR, DEPTH, LD_A, LD_X, THREADS>(&ring.copy[0][0], &ring.A[slot][0][0]);
        if (!DIRECT || mask.on()) sync_threads();
        for (int c = 0; c < DEPTH; c += Tile::kDepth) {
            const T *left[1] = {&ring.x[slot][0][c]}, *right[1];
            if constexpr (DIRECT) right[0] = &ring.A[slot][0][c];
            else right[0] = &ring.copy[0][c];
            tile.multiply(left, LD_X, right, LD_X, rows, ranks);
        }
    };
    pipeline<Shape::kStages>((K + DEPTH - 1) / DEPTH, load, work);

    Sum factor = Sum(scaling_of(args.clients, place.client)) * mask.scale<Sum>();
    T *s = static_cast<T *>(args.s) + place.s_start + int64_t(place.row - place.first) * place.rank + piece;
    View<T> out{s, place.rank, 1};
    finish(tile, &memory.staged[0][0], rows, ranks, Write<T, Sum>{out, factor, out.wide()});
}

}  // namespace flora::cuda
