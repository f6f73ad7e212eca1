// merge: W += B^T diag(coef) A in place over any number of layers in one launch: one sum, one rounding.
//
// A block owns a tile of one weight, finds it in a table of addresses that is the launch's argument, sums over P and
// writes W once. Memory-bound until P is in the hundreds: W is fetched into L2 while the product runs.
// arXiv 2409.05976, eq. 5. Letters: K in_features, N out_features, P sum of ranks. i counts N, j counts K, c counts P.
//
// Tensor cores sum 16-bit weights. B coef is cut into two bf16 pieces, and so is A unless it is bf16 already: what is
// left out is 2^-16 of a term, where plain TF32 loses 2^-11 and the weight's own rounding 2^-9 or 2^-11. Masters (fp32,
// or bf16 with low bits) are summed in IEEE float32, everything in float64 on request.
#pragma once

#include "tile.cuh"

namespace flora::cuda {

struct MergeEntry {
    void *weight;
    const void *A, *B, *coef;
    int16_t *low_bits;
    int64_t weight_stride[2], A_stride[2], B_stride[2], low_stride[2];
    uint64_t seed;
    int32_t N, K, P, first_tile, coef_stride;
};
// A kernel's arguments hold 32764 bytes.
struct MergeTable {
    static constexpr int kEntries = 232;
    MergeEntry entry[kEntries];
    int32_t count, weight_dtype, coef_dtype, stochastic;
};

enum class Engine { tensor, plain, wide };

template <class F, Engine ENGINE>
struct MergeShape {  // float32 on the CUDA cores
    using Tile = PlainTile<float, 128, 128, 16, 16, true, true>;
    static constexpr int kDepth = 16, kStages = 2, kPieces = 1, kBlocks = 1;
    static constexpr bool kDirect = sizeof(F) == 4;
};
template <class F>
struct MergeShape<F, Engine::tensor> {
    using Tile = TensorTile<bf16, 128, 128, 2, 4, true, true>;
    // Three stages of fp32 factors of depth 32 would leave room for one block only.
    static constexpr int kDepth = sizeof(F) == 2 ? 32 : 16, kStages = 3, kPieces = 2, kBlocks = 2;
    static constexpr bool kDirect = false;
};
template <>
struct MergeShape<bf16, Engine::tensor> : MergeShape<fp16, Engine::tensor> {
    static constexpr bool kDirect = true;  // A goes to the tensor cores as it is
};
template <class F>
struct MergeShape<F, Engine::wide> {
    using Tile = PlainTile<double, 64, 64, 16, 16, true, true>;
    static constexpr int kDepth = 16, kStages = 2, kPieces = 1, kBlocks = 2;
    static constexpr bool kDirect = sizeof(F) == 8;
};

template <class F, Engine ENGINE>
union MergeMemory {
    using Shape = MergeShape<F, ENGINE>;
    using Tile = typename Shape::Tile;
    using Operand = typename Tile::Operand;
    static constexpr int kRightPieces = Shape::kDirect ? 0 : Shape::kPieces;
    struct {
        F B[Shape::kStages][Shape::kDepth][kLd<F, Tile::kRows>];
        F A[Shape::kStages][Shape::kDepth][kLd<F, Tile::kColumns>];
        Operand left[Shape::kPieces][Shape::kDepth][kLd<Operand, Tile::kRows>];
        Operand right[kRightPieces ? kRightPieces : 1][Shape::kDepth][kLd<Operand, Tile::kColumns>];
    } ring;
    typename Tile::Sum staged[Tile::kRows][kStagedLd<Tile::kColumns>];
    // Without an operand of its own A needs no place for it.
    static constexpr size_t kUsed = sizeof(ring) - (kRightPieces ? 0 : sizeof(ring.right));
    static constexpr size_t kBytes = kUsed > sizeof(staged) ? kUsed : sizeof(staged);
};

// The two bf16 numbers that come nearest to a float32 together; what is not finite is the first alone.
FLORA_DEVICE void split(float value, bf16 (&piece)[2]) {
    narrow(value, piece[0]);
    bool finite = (piece[0].bits & 0x7F80) != 0x7F80;
    narrow(finite ? value - widen(piece[0]) : 0.0f, piece[1]);
}
FLORA_DEVICE void split(float value, float (&piece)[1]) { piece[0] = value; }
FLORA_DEVICE void split(double value, double (&piece)[1]) { piece[0] = value; }

// Eight neighbours of a tile that has arrived, scaled and cut into the product's pieces.
template <int PIECES, int LD, int DEPTH, class F, class Operand, class Sum>
FLORA_DEVICE void convert(Operand (&to)[PIECES][DEPTH][LD], const F *from, int row, int column, Sum scale) {
    Pack<F, 8> raw = ld_shared(reinterpret_cast<const Pack<F, 8> *>(from));
    Pack<Operand, 8> cut[PIECES];
    FLORA_UNROLL
    for (int e = 0; e < 8; ++e) {
        Operand piece[PIECES];
        split(Sum(widen(raw.v[e])) * scale, piece);
        FLORA_UNROLL
        for (int p = 0; p < PIECES; ++p) cut[p].v[e] = piece[p];
    }
    FLORA_UNROLL
    for (int p = 0; p < PIECES; ++p) st_shared(reinterpret_cast<Pack<Operand, 8> *>(&to[p][row][column]), cut[p]);
}

FLORA_DEVICE int entry_of(const MergeTable &table, int tile) {
    int low = 0, high = table.count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (table.entry[middle].first_tile <= tile) low = middle;
        else high = middle - 1;
    }
    return low;
}

// W + sums, rounded to nearest.
template <class T, class Sum>
struct Add {
    View<T> weight;
    bool wide;
    using Held = T[8];

    FLORA_DEVICE void fetch(int i, int j, int real, Held &held) const {
        load_8(held, weight.at(i, j), weight.column_stride, wide, real);
    }
    FLORA_DEVICE void put(int i, int j, int real, const Sum (&sums)[8], Held &held) const {
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) narrow(Sum(widen(held[e])) + sums[e], held[e]);
        store_8(weight.at(i, j), held, weight.column_stride, wide, real);
    }
};

// Up or down with the odds of the bits that are cut off; what is not finite is cut without a draw.
template <class Sum>
struct AddAtRandom : Add<bf16, Sum> {
    int n, k;  // the tile's place in W
    uint64_t seed;
    using Held = bf16[8];

    FLORA_DEVICE void put(int i, int j, int real, const Sum (&sums)[8], Held &held) const {
        Draws draws = draws_of(uint32_t(k + j) / 8, uint32_t(n + i), seed, 1);
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) {
            uint32_t bits = float_bits(float(Sum(widen(held[e])) + sums[e]));
            if ((bits & 0x7F800000u) != 0x7F800000u) bits += draws[e];
            held[e].bits = uint16_t(bits >> 16);
        }
        store_8(this->weight.at(i, j), held, this->weight.column_stride, this->wide, real);
    }
};

// bits(master) = (bits(W) << 16) + low, rounded to nearest with ties away from zero.
template <class Sum>
struct AddToMaster {
    View<bf16> weight;
    View<int16_t> low;
    bool weight_wide, low_wide;
    struct Held {
        bf16 high[8];
        int16_t low[8];
    };

    FLORA_DEVICE void fetch(int i, int j, int real, Held &held) const {
        load_8(held.high, weight.at(i, j), weight.column_stride, weight_wide, real);
        load_8(held.low, low.at(i, j), low.column_stride, low_wide, real);
    }
    FLORA_DEVICE void put(int i, int j, int real, const Sum (&sums)[8], Held &held) const {
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) {
            float master = bits_float((uint32_t(held.high[e].bits) << 16) + uint32_t(int32_t(held.low[e])));
            uint32_t bits = float_bits(float(Sum(master) + sums[e]));
            held.high[e].bits = uint16_t((bits + 0x8000u) >> 16);
            held.low[e] = int16_t(uint16_t(bits));
        }
        store_8(weight.at(i, j), held.high, weight.column_stride, weight_wide, real);
        store_8(low.at(i, j), held.low, low.column_stride, low_wide, real);
    }
};

template <class F, Engine ENGINE>
__global__ void __launch_bounds__(256, (MergeShape<F, ENGINE>::kBlocks)) merge_kernel(FLORA_TABLE(MergeTable) table) {
    using Shape = MergeShape<F, ENGINE>;
    using Tile = typename Shape::Tile;
    using Operand = typename Tile::Operand;
    using Sum = typename Tile::Sum;
    constexpr int BI = Tile::kRows, BJ = Tile::kColumns, DEPTH = Shape::kDepth, THREADS = Tile::kThreads;
    constexpr int PIECES = Shape::kPieces, EIGHTS_I = BI / 8, EIGHTS_J = BJ / 8;
    auto &memory = shared_memory<MergeMemory<F, ENGINE>>();
    auto &ring = memory.ring;

    const MergeEntry &entry = table.entry[entry_of(table, int(blockIdx.x))];
    int tile_id = int(blockIdx.x) - entry.first_tile, across = (entry.K + BJ - 1) / BJ, P = entry.P;
    int n = tile_id / across * BI, k = tile_id % across * BJ, rows = smaller(BI, entry.N - n);
    int columns = smaller(BJ, entry.K - k);
    View<const F> A{static_cast<const F *>(entry.A), entry.A_stride[0], entry.A_stride[1]};
    View<const F> B{static_cast<const F *>(entry.B), entry.B_stride[0], entry.B_stride[1]};
    int A_unit = A.unit(), B_unit = B.unit();
    A = A.from(0, k), B = B.from(0, n);
    if (table.weight_dtype == 2 || table.weight_dtype == 3) {
        View<bf16> weight{static_cast<bf16 *>(entry.weight), entry.weight_stride[0], entry.weight_stride[1]};
        prefetch_tile<BI, BJ, THREADS>(weight.from(n, k), rows, columns);
    }

    Tile tile;
    tile.clear();
    auto load = [&](int step, int slot) {
        int p = step * DEPTH;
        load_tile<DEPTH, BI, kLd<F, BI>, THREADS>(&ring.B[slot][0][0], B.from(p, 0), B_unit, P - p, rows);
        load_tile<DEPTH, BJ, kLd<F, BJ>, THREADS>(&ring.A[slot][0][0], A.from(p, 0), A_unit, P - p, columns);
    };
    auto work = [&](int step, int slot) {
        FLORA_UNROLL_ONCE
        for (int index = thread_id(); index < DEPTH * EIGHTS_I; index += THREADS) {
            int c = index / EIGHTS_I, i = index % EIGHTS_I * 8, p = step * DEPTH + c;
            Sum scale = p < P ? number_at<Sum>(entry.coef, int64_t(p) * entry.coef_stride, table.coef_dtype) : Sum(0);
            convert(ring.left, &ring.B[slot][c][i], c, i, scale);
        }
        if constexpr (!Shape::kDirect) {
            FLORA_UNROLL_ONCE
            for (int index = thread_id(); index < DEPTH * EIGHTS_J; index += THREADS) {
                int c = index / EIGHTS_J, j = index % EIGHTS_J * 8;
                convert(ring.right, &ring.A[slot][c][j], c, j, Sum(1));
            }
        }
        sync_threads();
        FLORA_UNROLL_ONCE  // both steps at once spill on sm_80
        for (int c = 0; c < DEPTH; c += Tile::kDepth) {
            const Operand *left[PIECES];
            FLORA_UNROLL
            for (int piece = 0; piece < PIECES; ++piece) left[piece] = ring.left[piece][c];
            if constexpr (Shape::kDirect) {
                const Operand *right[1] = {ring.A[slot][c]};
                tile.multiply(left, kLd<Operand, BI>, right, kLd<F, BJ>);
            } else {
                const Operand *right[PIECES];
                FLORA_UNROLL
                for (int piece = 0; piece < PIECES; ++piece) right[piece] = ring.right[piece][c];
                tile.multiply(left, kLd<Operand, BI>, right, kLd<Operand, BJ>);
            }
        }
    };
    pipeline<Shape::kStages>((P + DEPTH - 1) / DEPTH, load, work);

    auto *staged = &memory.staged[0][0];
    auto add = [&](auto zero) {
        using T = decltype(zero);
        View<T> weight{static_cast<T *>(entry.weight), entry.weight_stride[0], entry.weight_stride[1]};
        return Add<T, Sum>{weight.from(n, k), weight.wide()};
    };
    // Masters are summed by their own engines, so the others need no code for them.
    if constexpr (ENGINE != Engine::tensor) {
        if (entry.low_bits) {
            View<int16_t> low{entry.low_bits, entry.low_stride[0], entry.low_stride[1]};
            auto weight = add(bf16{});
            return finish(tile, staged, rows, columns, AddToMaster<Sum>{weight.weight, low.from(n, k), weight.wide, low.wide()});
        }
        if (table.weight_dtype == 1) return finish(tile, staged, rows, columns, add(float{}));
    }
    if constexpr (ENGINE == Engine::wide)
        if (table.weight_dtype == 4) return finish(tile, staged, rows, columns, add(double{}));
    if constexpr (ENGINE != Engine::plain) {
        if (table.stochastic) finish(tile, staged, rows, columns, AddAtRandom<Sum>{add(bf16{}), n, k, entry.seed});
        else if (table.weight_dtype == 2) finish(tile, staged, rows, columns, add(bf16{}));
        else finish(tile, staged, rows, columns, add(fp16{}));
    }
}

}  // namespace flora::cuda
