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

FLORA_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
FLORA_DEVICE int clamp_to(int64_t value, int limit) { return value < 0 ? 0 : value < limit ? int(value) : limit; }

// Two axes of global memory, and whether every row starts at a multiple of 16 bytes with its elements side by side.
template <class T>
struct View {
    T *data;
    int64_t row_stride, column_stride;

    FLORA_DEVICE T *at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
    FLORA_DEVICE View from(int64_t row, int64_t column) const { return {at(row, column), row_stride, column_stride}; }
    // The bytes up to 16 of which every row's start is a multiple, its elements side by side.
    FLORA_DEVICE int unit() const {
        uintptr_t all = reinterpret_cast<uintptr_t>(data) | uintptr_t(row_stride) * sizeof(T) | 16;
        return column_stride == 1 ? int(all & -all) : 1;
    }
    FLORA_DEVICE bool wide() const { return unit() == 16; }
};

// UNIT bytes from global to shared memory, the last elements of which may be outside.
template <int UNIT, class T>
FLORA_DEVICE void copy_unit(T *to, const T *from, const T *anything, int real) {
    real = clamp_to(real, UNIT / int(sizeof(T)));
    cp_async<UNIT>(to, real ? from : anything, real * int(sizeof(T)));
}

// ROWS x COLUMNS of a view into shared memory, asynchronously where its rows start at multiples of 16 bytes, else
// element by element; what lies outside becomes zero.
template <int ROWS, int COLUMNS, int LD, int THREADS, class T>
FLORA_DEVICE void load_tile(T *shared, const View<const T> &view, int unit, int rows, int columns) {
    constexpr int V = kVector<T>, ACROSS = COLUMNS / V;
    static_assert(COLUMNS % V == 0 && LD % V == 0, "rows of whole vectors");
    FLORA_UNROLL_ONCE  // copies wait for nothing; unrolled, their addresses fill registers
    for (int index = thread_id(); index < ROWS * ACROSS; index += THREADS) {
        int row = index / ACROSS, column = index % ACROSS * V;
        T *to = shared + row * LD + column;
        int real = row < rows ? clamp_to(columns - column, V) : 0;
        if (unit == 16) {
            copy_unit<16>(to, view.data + row * view.row_stride + column, view.data, real);
        } else {
            FLORA_UNROLL_ONCE
            for (int e = 0; e < V; ++e) st_shared(to + e, e < real ? ld_global(view.at(row, column + e)) : T{});
        }
    }
}

// The same for S, whose rows are as long as a rank: copies of 8 and 4 bytes too (rank 4 starts at multiples of 8), and
// odd ranks with several elements under way at once.
template <int ROWS, int COLUMNS, int LD, int THREADS, class T>
FLORA_DEVICE void load_ragged(T *shared, const View<const T> &view, int unit, int rows, int columns) {
    constexpr int V = kVector<T>, ACROSS = COLUMNS / V, SIZE = int(sizeof(T));
    if (unit == 16) return load_tile<ROWS, COLUMNS, LD, THREADS>(shared, view, unit, rows, columns);
    FLORA_UNROLL_ONCE
    for (int index = thread_id(); index < ROWS * ACROSS; index += THREADS) {
        int row = index / ACROSS, column = index % ACROSS * V;
        T *to = shared + row * LD + column;
        int real = row < rows ? clamp_to(columns - column, V) : 0;
        const T *from = view.data + row * view.row_stride + column;
        if (unit == 8 && SIZE < 8) {
            FLORA_UNROLL
            for (int e = 0; e < V; e += 8 / SIZE) copy_unit<8>(to + e, from + e, view.data, real - e);
        } else if (unit == 4 && SIZE < 4) {
            FLORA_UNROLL
            for (int e = 0; e < V; e += 4 / SIZE) copy_unit<4>(to + e, from + e, view.data, real - e);
        } else {
            Pack<T, V> values{};
            FLORA_UNROLL
            for (int e = 0; e < V; ++e)
                if (e < real) values.v[e] = ld_global(from + e);
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
        constexpr int PIECES = NL > NR ? NL : NR;
        FLORA_UNROLL
        for (int r = NR - 1; r >= 0; --r) {
            uint32_t b[MJ][2];
            fetch_right(b, right[r], right_ld, columns);
            FLORA_UNROLL
            for (int mi = 0; mi < MI; ++mi) {
                if (first_row() + mi * 16 >= rows) continue;
                FLORA_UNROLL
                for (int l = smaller(NL, PIECES - r) - 1; l >= 0; --l) {
                    uint32_t a[4];
                    fetch_left(a, left[l], left_ld, mi);
                    FLORA_UNROLL
                    for (int mj = 0; mj < MJ; ++mj)
                        if (first_column() + mj * 8 < columns) mma(T{}, sum[mi][mj], a, b[mj]);
                }
            }
        }
    }

    FLORA_DEVICE static void fetch_left(uint32_t (&a)[4], const T *left, int ld, int mi) {
        int lane = thread_id() % 32, i = first_row() + mi * 16;
        int row = LEFT_BY_C ? lane % 8 + lane / 16 * 8 : i + lane % 16;
        int column = LEFT_BY_C ? i + lane / 8 % 2 * 8 : lane / 16 * 8;
        ldmatrix<LEFT_BY_C>(a, left + row * ld + column);
    }
    FLORA_DEVICE static void fetch_right(uint32_t (&b)[MJ][2], const T *right, int ld, int columns) {
        int lane = thread_id() % 32;
        FLORA_UNROLL
        for (int mj = 0; mj < MJ; mj += 2) {
            int j = first_column() + mj * 8;
            if (j >= columns) continue;
            int row = RIGHT_BY_C ? lane % 16 : j + lane % 8 + lane / 16 * 8;
            int column = RIGHT_BY_C ? j + lane / 16 * 8 : lane / 8 % 2 * 8;
            uint32_t four[4];
            ldmatrix<RIGHT_BY_C>(four, right + row * ld + column);
            b[mj][0] = four[0], b[mj][1] = four[1], b[mj + 1][0] = four[2], b[mj + 1][1] = four[3];
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

// Sums through shared memory, so that every thread gets eight neighbours of one row at a time: what `update.fetch(i, j,
// real)` read goes to `update.put(i, j, real, sums, held)`. Several are read before the first is used.
template <class Tile, class Update>
FLORA_DEVICE void finish(const Tile &tile, typename Tile::Sum *staged, int rows, int columns, const Update &update) {
    using Eight = Pack<typename Tile::Sum, 8>;
    constexpr int LD = kStagedLd<Tile::kColumns>, ACROSS = Tile::kColumns / 8, AT_ONCE = 4;
    constexpr int EACH = Tile::kRows * ACROSS / Tile::kThreads;
    static_assert(EACH % AT_ONCE == 0 || EACH < AT_ONCE, "whole rounds");
    sync_threads();  // the tiles that lay here are read
    tile.stage(staged, LD);
    sync_threads();
    constexpr int ROUND = EACH < AT_ONCE ? EACH : AT_ONCE;
    FLORA_UNROLL_ONCE
    for (int first = thread_id(); first < EACH * Tile::kThreads; first += ROUND * Tile::kThreads) {
        typename Update::Held held[ROUND];
        auto place = [&](int u, int &i, int &j) {
            int index = first + u * Tile::kThreads;
            i = index / ACROSS, j = index % ACROSS * 8;
            return i < rows ? clamp_to(columns - j, 8) : 0;
        };
        int i, j;
        FLORA_UNROLL
        for (int u = 0; u < ROUND; ++u)
            if (int real = place(u, i, j)) update.fetch(i, j, real, held[u]);
        FLORA_UNROLL
        for (int u = 0; u < ROUND; ++u)
            if (int real = place(u, i, j)) {
                Eight sums = ld_shared(reinterpret_cast<const Eight *>(staged + i * LD + j));
                update.put(i, j, real, sums.v, held[u]);
            }
    }
}

// Sums times a factor, rounded once, over whatever was there.
template <class T, class Sum>
struct Write {
    View<T> out;
    Sum factor;
    bool wide;
    struct Held {};

    FLORA_DEVICE void fetch(int, int, int, Held &) const {}
    FLORA_DEVICE void put(int i, int j, int real, const Sum (&sums)[8], Held &) const {
        T values[8];
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) narrow(sums[e] * factor, values[e]);
        store_8(out.at(i, j), values, out.column_stride, wide, real);
    }
};

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
template <class Number>
FLORA_DEVICE Number number_at(const void *table, int64_t index, int dtype) {
    if (dtype == 1) return Number(ld_global(static_cast<const float *>(table) + index));
    if (dtype == 2) return Number(widen(ld_global(static_cast<const bf16 *>(table) + index)));
    if (dtype == 3) return Number(widen(ld_global(static_cast<const fp16 *>(table) + index)));
    return Number(ld_global(static_cast<const double *>(table) + index));
}

}  // namespace flora::cuda
