// expand: Y_c += s_c S_c B_c in place, and with A for B the backward's dX += mask (dS A) / (1 - p).
//
// A block owns BLOCK_M tokens of one client and BLOCK_N columns of Y, sums over the client's rank and writes Y once; Y
// is fetched into L2 meanwhile. The mask goes on what is added, never on what was there. arXiv 2106.09685, eq. 3.
// Letters: M packed tokens, N columns of Y, R one client's rank. i counts M, j counts N, c counts R.
#pragma once

#include "clients.cuh"

namespace flora::cuda {

template <class T>
struct ExpandShape {
    using Tile = TensorTile<T, 64, 128, 2, 2, false, true>;
    static constexpr int kDepth = 32, kStages = 2;
};
template <>
struct ExpandShape<float> {
    using Tile = PlainTile<float, 64, 128, 8, 16, false, true>;
    static constexpr int kDepth = 16, kStages = 2;
};
template <>
struct ExpandShape<double> {
    using Tile = PlainTile<double, 64, 64, 16, 16, false, true>;
    static constexpr int kDepth = 16, kStages = 2;
};

template <class T, class F>
union ExpandMemory {
    using Shape = ExpandShape<T>;
    using Tile = typename Shape::Tile;
    static constexpr bool kDirect = sizeof(T) == sizeof(F);
    struct {
        T s[Shape::kStages][Tile::kRows][kLd<T, Shape::kDepth>];
        F B[Shape::kStages][Shape::kDepth][kLd<F, Tile::kColumns>];
        T copy[kDirect ? 1 : Shape::kDepth][kLd<T, Tile::kColumns>];
    } ring;
    typename Tile::Sum staged[Tile::kRows][kStagedLd<Tile::kColumns>];
};

struct ExpandArgs {
    void *y;
    const void *s, *B;
    int64_t y_stride[2], B_stride[2];
    int32_t N;
    Clients clients;
};

template <class T, class Sum>
struct AddMasked {
    View<T> y;
    Sum factor;
    Mask mask;
    int row, n;  // the tile's place in the client's Y
    bool wide;
    using Held = T[8];

    FLORA_DEVICE void fetch(int i, int j, int real, Held &held) const {
        load_8(held, y.at(i, j), y.column_stride, wide, real);
    }
    FLORA_DEVICE void put(int i, int j, int real, const Sum (&sums)[8], Held &held) const {
        Draws draws{};
        if (mask.on()) draws = mask.draws(row + i, n + j);
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) {
            // Selected, not multiplied: what is dropped adds 0 even where it is not finite.
            Sum add = draws[e] >= mask.q ? sums[e] * factor : Sum(0);
            narrow(Sum(widen(held[e])) + add, held[e]);
        }
        store_8(y.at(i, j), held, y.column_stride, wide, real);
    }
};

template <class T, class F>
__global__ void __launch_bounds__(ExpandShape<T>::Tile::kThreads) expand_kernel(FLORA_TABLE(ExpandArgs) args) {
    using Shape = ExpandShape<T>;
    using Tile = typename Shape::Tile;
    using Sum = typename Tile::Sum;
    constexpr int BM = Tile::kRows, BN = Tile::kColumns, DEPTH = Shape::kDepth, THREADS = Tile::kThreads;
    constexpr int LD_S = kLd<T, DEPTH>, LD_B = kLd<F, BN>, LD_COPY = kLd<T, BN>;
    constexpr bool DIRECT = ExpandMemory<T, F>::kDirect;
    auto &memory = shared_memory<ExpandMemory<T, F>>();
    auto &ring = memory.ring;

    int across = (args.N + BN - 1) / BN, n = int(blockIdx.x) % across * BN;
    Place place = find_place(args.clients, int(blockIdx.x) / across, BM, 0);
    if (!place.found || place.rank == 0) return;
    int rank = place.rank, rows = smaller(BM, place.stop - place.row), columns = smaller(BN, args.N - n);
    int row = place.row - place.first;  // in the client's own S
    View<T> y{static_cast<T *>(args.y), args.y_stride[0], args.y_stride[1]};
    bool y_wide = y.wide();
    y = y.from(place.row, n);
    prefetch_tile<BM, BN, THREADS>(y, rows, columns);
    View<const T> s{static_cast<const T *>(args.s) + place.s_start + int64_t(row) * rank, rank, 1};
    View<const F> B{static_cast<const F *>(args.B), args.B_stride[0], args.B_stride[1]};
    int s_unit = s.unit(), B_unit = B.unit();
    B = B.from(place.bank, n);

    Tile tile;
    tile.clear();
    auto load = [&](int step, int slot) {
        int r = step * DEPTH;
        load_ragged<BM, DEPTH, LD_S, THREADS>(&ring.s[slot][0][0], s.from(0, r), s_unit, rows, rank - r);
        load_tile<DEPTH, BN, LD_B, THREADS>(&ring.B[slot][0][0], B.from(r, 0), B_unit, rank - r, columns);
    };
    auto work = [&](int step, int slot) {
        if constexpr (!DIRECT) {
            compute_copy<DEPTH, BN, LD_B, LD_COPY, THREADS>(&ring.copy[0][0], &ring.B[slot][0][0]);
            sync_threads();
        }
        for (int c = 0; c < DEPTH && step * DEPTH + c < rank; c += Tile::kDepth) {
            const T *left[1] = {&ring.s[slot][0][c]}, *right[1];
            if constexpr (DIRECT) right[0] = &ring.B[slot][c][0];
            else right[0] = &ring.copy[c][0];
            tile.multiply(left, LD_S, right, LD_COPY, rows, columns);
        }
    };
    pipeline<Shape::kStages>((rank + DEPTH - 1) / DEPTH, load, work);

    Mask mask = mask_of(args.clients, place.client);
    Sum factor = Sum(scaling_of(args.clients, place.client)) * mask.scale<Sum>();
    finish(tile, &memory.staged[0][0], rows, columns, AddMasked<T, Sum>{y, factor, mask, row, n, y_wide});
}

}  // namespace flora::cuda
