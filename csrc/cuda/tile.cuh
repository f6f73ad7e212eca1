// What every kernel is made of: a tile of a matrix into shared memory, a product of two tiles, and the sums out again.
//
//     sum(i, j) += left(i, c) right(c, j)          c: what is summed over, i: rows of the result, j: its columns
//
// A tile in shared memory lies by c or by its own axis, whatever its matrix does in global memory: *_BY_C says so.
#pragma once

#include "ptx.cuh"

namespace flora::cuda {

// N elements that move together, in accesses of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    T v[N];
};

// Elements in 16 bytes, which is also the padding that keeps the rows of a tile out of each other's banks.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

FLORA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FLORA_DEVICE int clamp_to(int64_t value, int limit) { return value < 0 ? 0 : value < limit ? int(value) : limit; }

// Two axes of global memory, and whether every row starts at a multiple of 16 bytes with its elements side by side.
template <class T>
struct View {
    T *data;
    int64_t row_stride, column_stride;

    FLORA_DEVICE T *at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
    FLORA_DEVICE View from(int64_t row, int64_t column) const { return {at(row, column), row_stride, column_stride}; }
    FLORA_DEVICE bool wide() const {
        return column_stride == 1 && (reinterpret_cast<uintptr_t>(data) | uintptr_t(row_stride) * sizeof(T)) % 16 == 0;
    }
};

// ROWS x COLUMNS of a view into shared memory, asynchronously where it is wide; what lies outside becomes zero.
template <int ROWS, int COLUMNS, int LD, int THREADS, class T>
FLORA_DEVICE void load_tile(T *shared, const View<const T> &view, bool wide, int rows, int columns) {
    constexpr int V = kVector<T>, ACROSS = COLUMNS / V;
    static_assert(COLUMNS % V == 0 && LD % V == 0, "rows of whole vectors");
    FLORA_UNROLL
    for (int index = thread_id(); index < ROWS * ACROSS; index += THREADS) {
        int row = index / ACROSS, column = index % ACROSS * V;
        T *to = shared + row * LD + column;
        int real = row < rows ? clamp_to(columns - column, V) : 0;
        if (wide) {
            cp_async_16(to, real ? view.data + row * view.row_stride + column : view.data, real * int(sizeof(T)));
        } else {
            Pack<T, V> values{};
            for (int e = 0; e < V; ++e)
                if (e < real) values.v[e] = ld_global(view.at(row, column + e));
            st_shared(reinterpret_cast<Pack<T, V> *>(to), values);
        }
    }
}

// Eight neighbours of a row, of which the first `real` are there.
template <class T>
FLORA_DEVICE void load_8(T (&values)[8], const T *from, int64_t stride, bool wide, int real) {
    constexpr int V = kVector<T>;
    if (wide && real == 8) {
        FLORA_UNROLL
        for (int i = 0; i < 8 / V; ++i) {
            uint4 words = ld_global(reinterpret_cast<const uint4 *>(from) + i);
            memcpy(&values[i * V], &words, 16);
        }
    } else {
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) values[e] = e < real ? ld_global(from + e * stride) : T{};
    }
}
template <class T>
FLORA_DEVICE void store_8(T *to, const T (&values)[8], int64_t stride, bool wide, int real) {
    constexpr int V = kVector<T>;
    if (wide && real == 8) {
        FLORA_UNROLL
        for (int i = 0; i < 8 / V; ++i) {
            uint4 words;
            memcpy(&words, &values[i * V], 16);
            st_global(reinterpret_cast<uint4 *>(to) + i, words);
        }
    } else {
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e)
            if (e < real) st_global(to + e * stride, values[e]);
    }
}

// Ask for a tile: a thread for each 128 bytes.
template <int ROWS, int COLUMNS, int THREADS, class T>
FLORA_DEVICE void prefetch_tile(const View<T> &view, int rows, int columns) {
    constexpr int LINE = 128 / int(sizeof(T)), ACROSS = (COLUMNS + LINE - 1) / LINE;
    if (view.column_stride != 1) return;
    for (int index = thread_id(); index < ROWS * ACROSS; index += THREADS) {
        int row = index / ACROSS, column = index % ACROSS * LINE;
        if (row < rows && column < columns) prefetch(view.at(row, column));
    }
}

// A product on tensor cores, 16-bit operands and float32 sums; WI x WJ warps share the tile.
template <class T, int BI, int BJ, int WI, int WJ, bool LEFT_BY_C, bool RIGHT_BY_C>
struct TensorTile {
    using Operand = T;
    using Sum = float;
    static constexpr int kThreads = 32 * WI * WJ, kRows = BI, kColumns = BJ, kDepth = 16;
    static constexpr int MI = BI / WI / 16, MJ = BJ / WJ / 8;
    static_assert(MI * WI * 16 == BI && MJ * WJ * 8 == BJ && MJ % 2 == 0, "whole instructions");

    float sum[MI][MJ][4];

    FLORA_DEVICE static int first_row() { return thread_id() / 32 % WI * (BI / WI); }
    FLORA_DEVICE static int first_column() { return thread_id() / 32 / WI * (BJ / WJ); }

    FLORA_DEVICE void clear() {
        FLORA_UNROLL
        for (int mi = 0; mi < MI; ++mi)
            FLORA_UNROLL
            for (int mj = 0; mj < MJ; ++mj)
                FLORA_UNROLL
                for (int e = 0; e < 4; ++e) sum[mi][mj][e] = 0;
    }

    // Sixteen steps of c. An operand may come in pieces that add up to it, each 2^-8 of the one before; products that
    // are smaller than the last piece are left out, and small ones are added first.
    template <int NL, int NR>
    FLORA_DEVICE void multiply(const T *const (&left)[NL], int left_ld, const T *const (&right)[NR], int right_ld,
                               int rows = BI, int columns = BJ) {
        int lane = thread_id() % 32;
        uint32_t b[NR][MJ][2];
        FLORA_UNROLL
        for (int piece = 0; piece < NR; ++piece)
            FLORA_UNROLL
            for (int mj = 0; mj < MJ; mj += 2) {
                if (first_column() + mj * 8 >= columns) continue;
                int j = first_column() + mj * 8;
                int row = RIGHT_BY_C ? lane % 16 : j + lane % 8 + lane / 16 * 8;
                int column = RIGHT_BY_C ? j + lane / 16 * 8 : lane / 8 % 2 * 8;
                uint32_t four[4];
                ldmatrix<RIGHT_BY_C>(four, right[piece] + row * right_ld + column);
                b[piece][mj][0] = four[0], b[piece][mj][1] = four[1];
                b[piece][mj + 1][0] = four[2], b[piece][mj + 1][1] = four[3];
            }
        FLORA_UNROLL
        for (int mi = 0; mi < MI; ++mi) {
            int i = first_row() + mi * 16;
            if (i >= rows) continue;
            int row = LEFT_BY_C ? lane % 8 + lane / 16 * 8 : i + lane % 16;
            int column = LEFT_BY_C ? i + lane / 8 % 2 * 8 : lane / 16 * 8;
            uint32_t a[NL][4];
            FLORA_UNROLL
            for (int piece = 0; piece < NL; ++piece) ldmatrix<LEFT_BY_C>(a[piece], left[piece] + row * left_ld + column);
            FLORA_UNROLL
            for (int order = (NL > NR ? NL : NR) - 1; order >= 0; --order)
                FLORA_UNROLL
                for (int piece = 0; piece < NL; ++piece) {
                    if (order - piece < 0 || order - piece >= NR) continue;
                    FLORA_UNROLL
                    for (int mj = 0; mj < MJ; ++mj)
                        if (first_column() + mj * 8 < columns) mma(T{}, sum[mi][mj], a[piece], b[order - piece][mj]);
                }
        }
    }

    FLORA_DEVICE void stage(float *staged, int ld) const {
        int lane = thread_id() % 32;
        FLORA_UNROLL
        for (int mi = 0; mi < MI; ++mi)
            FLORA_UNROLL
            for (int mj = 0; mj < MJ; ++mj)
                FLORA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    int i = first_row() + mi * 16 + half * 8 + lane / 4, j = first_column() + mj * 8 + lane % 4 * 2;
                    Pack<float, 2> pair{{sum[mi][mj][2 * half], sum[mi][mj][2 * half + 1]}};
                    st_shared(reinterpret_cast<Pack<float, 2> *>(staged + i * ld + j), pair);
                }
    }
};

// The same on the CUDA cores, in IEEE float32 or float64; TI x TJ threads share the tile.
template <class T, int BI, int BJ, int TI, int TJ, bool LEFT_BY_C, bool RIGHT_BY_C>
struct PlainTile {
    using Operand = T;
    using Sum = T;
    static constexpr int kThreads = TI * TJ, kRows = BI, kColumns = BJ, kDepth = 4;
    static constexpr int UI = BI / TI, UJ = BJ / TJ, G = 4;
    static_assert(UI % G == 0 && UJ % G == 0, "each thread owns groups of four");

    T sum[UI][UJ];

    // Which row or column of the tile a thread's u-th is: groups of four, so that one access brings four.
    FLORA_DEVICE static int row(int u) { return u / G * (TI * G) + thread_id() / TJ * G + u % G; }
    FLORA_DEVICE static int column(int u) { return u / G * (TJ * G) + thread_id() % TJ * G + u % G; }

    FLORA_DEVICE void clear() {
        FLORA_UNROLL
        for (int u = 0; u < UI; ++u)
            FLORA_UNROLL
            for (int v = 0; v < UJ; ++v) sum[u][v] = 0;
    }

    template <int N, bool BY_C>
    FLORA_DEVICE static void fetch(T (&values)[N], const T *tile, int ld, int c, int (*place)(int)) {
        FLORA_UNROLL
        for (int u = 0; u < N; u += G) {
            if (BY_C) {
                Pack<T, G> four = ld_shared(reinterpret_cast<const Pack<T, G> *>(tile + c * ld + place(u)));
                FLORA_UNROLL
                for (int e = 0; e < G; ++e) values[u + e] = four.v[e];
            } else {
                FLORA_UNROLL
                for (int e = 0; e < G; ++e) values[u + e] = ld_shared(tile + place(u + e) * ld + c);
            }
        }
    }

    FLORA_DEVICE void multiply(const T *const (&left)[1], int left_ld, const T *const (&right)[1], int right_ld,
                               int rows = BI, int columns = BJ) {
        FLORA_UNROLL
        for (int c = 0; c < kDepth; ++c) {
            T a[UI], b[UJ];
            fetch<UI, LEFT_BY_C>(a, left[0], left_ld, c, row);
            fetch<UJ, RIGHT_BY_C>(b, right[0], right_ld, c, column);
            FLORA_UNROLL
            for (int u = 0; u < UI; ++u)
                FLORA_UNROLL
                for (int v = 0; v < UJ; ++v)
                    if (row(u / G * G) < rows && column(v / G * G) < columns) sum[u][v] += a[u] * b[v];
        }
    }

    FLORA_DEVICE void stage(T *staged, int ld) const {
        FLORA_UNROLL
        for (int u = 0; u < UI; ++u)
            FLORA_UNROLL
            for (int v = 0; v < UJ; v += G) {
                Pack<T, G> four;
                FLORA_UNROLL
                for (int e = 0; e < G; ++e) four.v[e] = sum[u][v + e];
                st_shared(reinterpret_cast<Pack<T, G> *>(staged + row(u) * ld + column(v)), four);
            }
    }
};

// The elements between two operands' rows in shared memory, and between two rows of staged sums.
template <class T, int COLUMNS>
constexpr int kLd = COLUMNS + kVector<T>;
template <int COLUMNS>
constexpr int kStagedLd = COLUMNS + 8;

// Load `STAGES - 1` steps ahead: `load(step, slot)` starts copies, `work(step, slot)` finds them landed.
template <int STAGES, class Load, class Work>
FLORA_DEVICE void pipeline(int steps, Load load, Work work) {
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step, step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<STAGES - 2>();
        // Everyone's copies of this step have landed, and everyone is done with the slot that is filled next.
        sync_threads();
        int next = step + STAGES - 1;
        if (next < steps) load(next, next % STAGES);
        cp_async_commit();
        work(step, step % STAGES);
    }
}

// Sums through shared memory, so that every thread gets eight neighbours of one row: `put(i, j, sums, real)`.
template <class Tile, class Put>
FLORA_DEVICE void finish(const Tile &tile, typename Tile::Sum *staged, int rows, int columns, Put put) {
    constexpr int LD = kStagedLd<Tile::kColumns>, ACROSS = Tile::kColumns / 8;
    sync_threads();  // the tiles that lay here are read
    tile.stage(staged, LD);
    sync_threads();
    FLORA_UNROLL
    for (int index = thread_id(); index < Tile::kRows * ACROSS; index += Tile::kThreads) {
        int i = index / ACROSS, j = index % ACROSS * 8, real = i < rows ? clamp_to(columns - j, 8) : 0;
        if (!real) continue;
        using Eight = Pack<typename Tile::Sum, 8>;
        Eight sums = ld_shared(reinterpret_cast<const Eight *>(staged + i * LD + j));
        put(i, j, sums.v, real);
    }
}

// Philox4x32-7 (Salmon et al., SC 2011): eight 16-bit draws for the columns of one group of eight.
struct Draws {
    uint32_t word[4];

    FLORA_DEVICE uint32_t operator[](int column) const { return word[column / 2] >> 16 * (column % 2) & 0xFFFF; }
};
FLORA_DEVICE Draws draws_of(uint32_t group, uint32_t row, uint64_t seed, uint32_t stream) {
    uint32_t c0 = group, c1 = row, c2 = 0, c3 = stream, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    FLORA_UNROLL
    for (int round = 0; round < 7; ++round) {
        uint64_t p0 = wide_product(0xD2511F53u, c0), p1 = wide_product(0xCD9E8D57u, c2);
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1), c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// A number of a table whose dtype is known at run time (FLORA_FP32 = 1, BF16 = 2, FP16 = 3, FP64 = 4).
FLORA_DEVICE double number_at(const void *table, int64_t index, int dtype) {
    if (dtype == 1) return double(ld_global(static_cast<const float *>(table) + index));
    if (dtype == 2) return double(widen(ld_global(static_cast<const bf16 *>(table) + index)));
    if (dtype == 3) return double(widen(ld_global(static_cast<const fp16 *>(table) + index)));
    return ld_global(static_cast<const double *>(table) + index);
}

}  // namespace flora::cuda
