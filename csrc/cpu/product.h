// The one product behind merge, expand and wgrad:  out (rows, columns) = or += left^T diag(coef) right, summed over
// `inner`. Left is packed in panels of up to TILE_ROWS rows, right in panels of TILE_COLUMNS columns, both as T; a tile
// of out is summed in registers, meets what is in memory once, and is rounded once.
//
//     merge    inner P, rows N, columns K      left B, right A
//     expand   inner R, rows m, columns N      left S^T, right B
//     wgrad    inner m, rows R, columns K      left dS, right drop(X);   dB: left S, right dY
#pragma once

#include "draws.h"

namespace flora {
namespace FLORA_ISA {

// What becomes of a sum.
enum Mode { STORE, ADD, ADD_MASKED, ADD_LOW_BITS, ADD_STOCHASTIC };

// Element (p, j) lies at data[p * inner_stride + j * outer_stride].
struct Operand {
    const void *data;
    int64_t inner_stride, outer_stride;
    int32_t dtype;
    int32_t via; // rounded to this dtype first; 0 for none
};

// The stride of an axis; of one element it means nothing and may be anything.
FLORA_INLINE int64_t step(int64_t size, int64_t stride) { return size > 1 ? stride : 1; }

struct Product {
    int64_t rows, columns, inner;
    Operand left, right;
    const void *coef; // one factor for each inner index, or NULL
    int64_t coef_stride;
    int32_t coef_dtype;
    double scale;
    void *out;
    int64_t row_stride, column_stride;
    int32_t out_dtype;
    Mode mode;
    int16_t *low;
    int64_t low_row_stride, low_column_stride;
    bool drop_right; // element (p, j) of right is dropped by draw (p, j)
    Draws draws;     // of right, of out where ADD_MASKED, or of the rounding
};

// Sums longer than this are made in pieces: the error of a float sum grows with its length.
constexpr int64_t PIECE = 256;

// ---- packing -------------------------------------------------------------------------------------------------------

template <class T, class E>
FLORA_INLINE Vec<T, LANES<T>> load_some(const typename E::raw *from, int64_t stride, int64_t count) {
    if (stride == 1 && count >= LANES<T>) return load<T, E>(from);
    Vec<T, LANES<T>> value = {};
    for (int i = 0; i < smaller(count, LANES<T>); ++i) value[i] = load_one<T, E>(from + i * stride);
    return value;
}

// x scaled up where its draw is at least q, else exactly 0.
template <class T>
FLORA_INLINE Vec<T, LANES<T>> masked(Vec<T, LANES<T>> x, const uint16_t *draws, const Draws &key) {
    constexpr int L = LANES<T>;
    auto drawn = __builtin_convertvector(load_bytes<Vec<uint16_t, L>>(draws), Vec<int32_t, L>);
    x *= static_cast<T>(key.scale);
    if constexpr (sizeof(T) == 8) {
        auto keep = __builtin_convertvector(drawn >= key.q, Vec<int64_t, L>);
        return bits_as<Vec<T, L>>(bits_as<Vec<int64_t, L>>(x) & keep);
    } else {
        return bits_as<Vec<T, L>>(bits_as<Vec<int32_t, L>>(x) & (drawn >= key.q));
    }
}

// Panels of TILE_COLUMNS columns from `column` on, [panel][inner][TILE_COLUMNS]; columns that are not there are 0. Some
// panels at once, for rows of right lie on pages of their own.
template <class T, class E>
static void pack_right_as(const Product &job, int64_t column, int64_t end, T *to) {
    constexpr int64_t WIDTH = TILE_COLUMNS<T>, TOGETHER = 4 * WIDTH;
    const typename E::raw *data = static_cast<const typename E::raw *>(job.right.data);
    uint16_t draws[WIDTH];
    for (; column < end; column += TOGETHER, to += TOGETHER * job.inner) {
        for (int64_t p = 0; p < job.inner; ++p) {
            const auto *row = data + p * job.right.inner_stride;
            for (int64_t j = column; j < smaller(end, column + TOGETHER); j += WIDTH) {
                T *at = to + (j - column) * job.inner + p * WIDTH;
                if (job.drop_right) draw(job.draws, p, 1, j / 8, WIDTH / 8, draws);
                for (int v = 0; v < WIDTH; v += LANES<T>) {
                    const auto *from = row + (j + v) * job.right.outer_stride;
                    auto value = load_some<T, E>(from, job.right.outer_stride, job.columns - j - v);
                    if (job.right.via) value = through<T>(value, job.right.via);
                    if (job.drop_right) value = masked<T>(value, draws + v, job.draws);
                    store_bytes(at + v, value);
                }
            }
        }
    }
}

template <class T>
static void pack_right(const Product &job, int64_t column, int64_t end, T *to) {
    with_element(job.right.dtype, [&](auto e) { pack_right_as<T, decltype(e)>(job, column, end, to); });
}

// [inner][rows], each inner index scaled by its coefficient. What a vector writes beyond its rows, the next inner index
// overwrites; the last one's needs SLACK bytes behind the panel.
constexpr int64_t SLACK = VECTOR_BYTES;

template <class T, class E>
static void pack_left_as(const Product &job, int64_t row, int rows, T *to) {
    const auto *data = static_cast<const typename E::raw *>(job.left.data) + row * job.left.outer_stride;
    bool wide = job.left.outer_stride == 1 && rows <= LANES<T> && job.rows - row >= LANES<T>;
    for (int64_t p = 0; p < job.inner; ++p, to += rows) {
        T factor = static_cast<T>(job.scale);
        if (job.coef) {
            with_element(job.coef_dtype, [&](auto c) {
                using C = decltype(c);
                factor *= load_one<T, C>(static_cast<const typename C::raw *>(job.coef) + p * job.coef_stride);
            });
        }
        const auto *from = data + p * job.left.inner_stride;
        if (wide) store_bytes(to, load<T, E>(from) * factor);
        else
            for (int i = 0; i < rows; ++i) to[i] = load_one<T, E>(from + i * job.left.outer_stride) * factor;
    }
}

template <class T>
static void pack_left(const Product &job, int64_t row, int rows, T *to) {
    with_element(job.left.dtype, [&](auto e) { pack_left_as<T, decltype(e)>(job, row, rows, to); });
}

// ---- a tile --------------------------------------------------------------------------------------------------------

// put(i, v, vector v of row i of left[inner][ROWS]^T right[inner][TILE_COLUMNS]), for each row and vector.
template <class T, int ROWS, class Put>
FLORA_INLINE void multiply_into(const T *left, const T *right, int64_t inner, Put put) {
    typedef Vec<T, LANES<T>> V;
    constexpr int VECTORS = TILE_VECTORS<T>;
    V acc[ROWS][VECTORS] = {};
#pragma GCC unroll 2
    for (int64_t p = 0; p < inner; ++p, left += ROWS, right += TILE_COLUMNS<T>) {
        V b[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) b[v] = load_bytes<V>(right + v * LANES<T>);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            V a = left[i] - V{};
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) acc[i][v] += a * b[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) put(i, v, acc[i][v]);
    }
}

// sum[ROWS][TILE_COLUMNS] = or += left^T right.
template <class T, int ROWS>
static void multiply(const T *left, const T *right, int64_t inner, T *sum, bool first) {
    auto put = [&](int i, int v, Vec<T, LANES<T>> value) __attribute__((always_inline)) {
        T *to = sum + i * TILE_COLUMNS<T> + v * LANES<T>;
        store_bytes(to, first ? value : load_bytes<Vec<T, LANES<T>>>(to) + value);
    };
    multiply_into<T, ROWS>(left, right, inner, put);
}

// out += left^T right for a whole tile of contiguous rows, straight from registers.
template <class T, class E>
static void multiply_onto(const T *left, const T *right, int64_t inner, void *out, int64_t stride) {
    typedef typename E::raw R;
    auto put = [&](int i, int v, Vec<T, LANES<T>> value) __attribute__((always_inline)) {
        R *to = static_cast<R *>(out) + i * stride + v * LANES<T>;
        store<T, E>(to, load<T, E>(to) + value);
    };
    multiply_into<T, TILE_ROWS>(left, right, inner, put);
}

template <class T, int ROWS = TILE_ROWS>
FLORA_INLINE void multiply_rows(int rows, const T *left, const T *right, int64_t inner, T *sum, bool first) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply<T, ROWS>(left, right, inner, sum, first);
        multiply_rows<T, ROWS - 1>(rows, left, right, inner, sum, first);
    }
}

// One vector of sums meets memory.
template <class T, class E, Mode MODE>
FLORA_INLINE void finish(Vec<T, LANES<T>> sum, typename E::raw *out, int16_t *low, const uint16_t *draws,
                         const Draws &key) {
    constexpr int L = LANES<T>;
    typedef Vec<uint32_t, L> U32;
    typedef Vec<int32_t, L> I32;
    if constexpr (MODE == STORE) {
        store<T, E>(out, sum);
    } else if constexpr (MODE == ADD) {
        store<T, E>(out, load<T, E>(out) + sum);
    } else if constexpr (MODE == ADD_MASKED) {
        store<T, E>(out, load<T, E>(out) + masked<T>(sum, draws, key));
    } else if constexpr (MODE == ADD_LOW_BITS) {
        auto high = __builtin_convertvector(load_bytes<Vec<uint16_t, L>>(out), U32) << 16;
        auto below = __builtin_convertvector(load_bytes<Vec<int16_t, L>>(low), I32);
        auto master = bits_as<Vec<float, L>>(high + (U32)below);
        auto total = __builtin_convertvector(__builtin_convertvector(master, Vec<T, L>) + sum, Vec<float, L>);
        U32 bits = bits_as<U32>(total), upper = (bits + 0x8000) >> 16;
        store_bytes(out, __builtin_convertvector(upper, Vec<uint16_t, L>));
        store_bytes(low, __builtin_convertvector(bits - (upper << 16), Vec<uint16_t, L>));
    } else {
        auto total = __builtin_convertvector(load<T, E>(out) + sum, Vec<float, L>);
        U32 bits = bits_as<U32>(total);
        // A carry would turn a NaN into something else.
        U32 finite = (U32)((bits & 0x7F800000) != 0x7F800000);
        bits += finite & __builtin_convertvector(load_bytes<Vec<uint16_t, L>>(draws), U32);
        store_bytes(out, __builtin_convertvector(bits >> 16, Vec<uint16_t, L>));
    }
}

template <class R>
FLORA_INLINE void copy_tile(const R *from, int64_t from_row, int64_t from_column, R *to, int64_t to_row,
                            int64_t to_column, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[i * to_row + j * to_column] = from[i * from_row + j * from_column];
}

// Finish the tile of `rows` x `columns` sums at (row, column). What is narrower than a tile, or not contiguous along
// its rows, goes through a copy, so that there is one arithmetic for all.
template <class T, class E, Mode MODE>
static void finish_tile(const Product &job, const T *sum, int64_t row, int rows, int64_t column, int64_t columns) {
    typedef typename E::raw R;
    constexpr int WIDTH = TILE_COLUMNS<T>;
    uint16_t draws[MODE == ADD_MASKED || MODE == ADD_STOCHASTIC ? TILE_ROWS * WIDTH : WIDTH];
    if (MODE == ADD_MASKED || MODE == ADD_STOCHASTIC) draw(job.draws, row, rows, column / 8, WIDTH / 8, draws);
    R *out = static_cast<R *>(job.out) + row * job.row_stride + column * job.column_stride, *at = out;
    int16_t *low = MODE == ADD_LOW_BITS ? job.low + row * job.low_row_stride + column * job.low_column_stride : nullptr;
    int16_t *low_at = low;
    int64_t stride = job.row_stride, low_stride = job.low_row_stride;
    bool straight = columns == WIDTH && job.column_stride == 1 && (MODE != ADD_LOW_BITS || job.low_column_stride == 1);
    R copy[TILE_ROWS * WIDTH];
    int16_t low_copy[MODE == ADD_LOW_BITS ? TILE_ROWS * WIDTH : 1];
    if (!straight) {
        __builtin_memset(copy, 0, sizeof(copy));
        at = copy;
        stride = low_stride = WIDTH;
        if (MODE != STORE) copy_tile(out, job.row_stride, job.column_stride, copy, WIDTH, 1, rows, columns);
        if (MODE == ADD_LOW_BITS) {
            __builtin_memset(low_copy, 0, sizeof(low_copy));
            copy_tile(low, job.low_row_stride, job.low_column_stride, low_copy, WIDTH, 1, rows, columns);
            low_at = low_copy;
        }
    }
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < WIDTH; v += LANES<T>) {
            finish<T, E, MODE>(load_bytes<Vec<T, LANES<T>>>(sum + i * WIDTH + v), at + i * stride + v,
                               low_at ? low_at + i * low_stride + v : nullptr,
                               draws + (MODE == ADD_MASKED || MODE == ADD_STOCHASTIC ? i * WIDTH + v : 0), job.draws);
        }
    }
    if (!straight) {
        copy_tile(copy, WIDTH, 1, out, job.row_stride, job.column_stride, rows, columns);
        if (MODE == ADD_LOW_BITS)
            copy_tile(low_copy, WIDTH, 1, low, job.low_row_stride, job.low_column_stride, rows, columns);
    }
}

template <class T>
using Finish = void (*)(const Product &, const T *, int64_t, int, int64_t, int64_t);

template <class T>
static Finish<T> finish_for(const Product &job) {
    Finish<T> found = nullptr;
    with_element(job.out_dtype, [&](auto e) {
        using E = decltype(e);
        if (job.mode == STORE) found = finish_tile<T, E, STORE>;
        if (job.mode == ADD) found = finish_tile<T, E, ADD>;
        if (job.mode == ADD_MASKED) found = finish_tile<T, E, ADD_MASKED>;
    });
    if (job.mode == ADD_LOW_BITS) found = finish_tile<T, Bf16, ADD_LOW_BITS>;
    if (job.mode == ADD_STOCHASTIC) found = finish_tile<T, Bf16, ADD_STOCHASTIC>;
    return found;
}

// For whole tiles of a plain sum of one piece; else NULL.
template <class T>
using Onto = void (*)(const T *, const T *, int64_t, void *, int64_t);

template <class T>
static Onto<T> onto_for(const Product &job) {
    Onto<T> found = nullptr;
    if (job.mode == ADD && job.column_stride == 1 && job.inner <= PIECE)
        with_element(job.out_dtype, [&](auto e) { found = multiply_onto<T, decltype(e)>; });
    return found;
}

// The tile comes into cache while its sum is made.
template <class T>
FLORA_INLINE void prefetch_tile(const Product &job, int64_t row, int rows, int64_t column, int element) {
    if (job.mode == STORE || job.column_stride != 1) return;
    const char *out = static_cast<const char *>(job.out) + (row * job.row_stride + column) * element;
    for (int i = 0; i < rows; ++i, out += job.row_stride * element)
        for (int byte = 0; byte < TILE_COLUMNS<T> * element; byte += 64) __builtin_prefetch(out + byte, 1);
    if (job.mode != ADD_LOW_BITS || job.low_column_stride != 1) return;
    const int16_t *low = job.low + row * job.low_row_stride + column;
    for (int i = 0; i < rows; ++i, low += job.low_row_stride) __builtin_prefetch(low, 1);
}

// Row panels that share one right panel while it lies in L1. More would push W's lines, two tiles to a line, out of L2.
constexpr int GROUP = 8;

// Tiles of a group of row panels of `height` rows each, row .. last, and the columns column .. end, whose right panels
// start at `right`. Left panels follow each other. A sum of one piece meets memory at once.
template <class T>
static void group_of_tiles(const Product &job, const T *left, int64_t row, int64_t last, int height, const T *right,
                           int64_t column, int64_t end) {
    constexpr int TILE = TILE_ROWS * TILE_COLUMNS<T>;
    alignas(64) T sums[GROUP * TILE];
    Finish<T> finish_it = finish_for<T>(job);
    Onto<T> onto = onto_for<T>(job);
    int element = job.out_dtype == FLORA_FP64 ? 8 : job.out_dtype == FLORA_FP32 ? 4 : 2;
    bool whole = job.inner <= PIECE;
    if (job.inner == 0) __builtin_memset(sums, 0, sizeof(sums));
    auto finish_at = [&](int64_t i, const T *sum) {
        finish_it(job, sum, i, static_cast<int>(smaller(height, last - i)), column,
                  smaller(TILE_COLUMNS<T>, end - column));
    };
    for (; column < end; column += TILE_COLUMNS<T>, right += job.inner * TILE_COLUMNS<T>) {
        for (int64_t p = 0; p < larger(job.inner, 1); p += PIECE) {
            int64_t piece = smaller(PIECE, job.inner - p);
            T *sum = sums;
            for (int64_t i = row; i < last; i += height, sum += whole ? 0 : TILE) {
                int rows = static_cast<int>(smaller(height, last - i));
                if (p == 0) prefetch_tile<T>(job, i, rows, column, element);
                const T *panel = left + (i - row) * job.inner;
                if (onto && rows == TILE_ROWS && end - column >= TILE_COLUMNS<T>) {
                    void *out = static_cast<char *>(job.out) + (i * job.row_stride + column) * element;
                    onto(panel, right, piece, out, job.row_stride);
                    continue;
                }
                if (piece) multiply_rows<T>(rows, panel + p * rows, right + p * TILE_COLUMNS<T>, piece, sum, p == 0);
                if (whole) finish_at(i, sum);
            }
        }
        const T *sum = sums;
        for (int64_t i = row; i < last && !whole; i += height, sum += TILE) finish_at(i, sum);
    }
}

}  // namespace FLORA_ISA
}  // namespace flora
