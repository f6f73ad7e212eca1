// The one product behind merge and expand:  out (rows, columns) += left^T diag(coef) right, summed over `inner`. Left
// is packed in panels of up to PRODUCT_ROWS rows, right in panels of PRODUCT_COLUMNS columns, both as T; a tile of out
// is summed in registers, meets what is in memory once (finish.h), and is rounded once.
//
//     merge    inner P, rows N, columns K      left B, right A
//     expand   inner R, rows m, columns N      left S^T, right B
#pragma once

#include "finish.h"

namespace flora {
namespace FLORA_ISA {

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
    Draws draws; // of out where ADD_MASKED, or of the rounding
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

// How many rows ahead packing asks for what it will read.
constexpr int64_t AHEAD = 12;

// Panels of PRODUCT_COLUMNS columns from `column` on, [panel][inner][PRODUCT_COLUMNS]; columns that are not there are
// 0. Some panels at once, for rows of right lie on pages of their own; each row's part is asked for some rows ahead.
template <class T, class E>
static void pack_right_as(const Product &job, int64_t column, int64_t end, T *to) {
    constexpr int64_t WIDTH = PRODUCT_COLUMNS<T>, TOGETHER = 4 * WIDTH;
    constexpr int L = LANES<T>;
    const typename E::raw *data = static_cast<const typename E::raw *>(job.right.data);
    const bool paired = in_pairs<T>(job.out_dtype);
    for (; column < end; column += TOGETHER, to += TOGETHER * job.inner) {
        for (int64_t p = 0; p < job.inner; ++p) {
            const auto *row = data + p * job.right.inner_stride;
            for (int64_t j = column; j < smaller(end, column + TOGETHER); j += WIDTH) {
                T *at = to + (j - column) * job.inner + p * WIDTH;
                for (int v = 0; v < WIDTH; v += L) {
                    const auto *from = row + (j + v) * job.right.outer_stride;
                    if (p + AHEAD < job.inner) __builtin_prefetch(from + AHEAD * job.right.inner_stride);
                    auto value = load_some<T, E>(from, job.right.outer_stride, job.columns - j - v);
                    if (job.right.via) value = through<T>(value, job.right.via);
                    store_bytes(at + v, value);
                }
                for (int v = 0; v < WIDTH && paired; v += 2 * L) part_pairs<T>(at + v);
            }
        }
    }
}

template <class T>
static void pack_right(const Product &job, int64_t column, int64_t end, T *to) {
    with_element(job.right.dtype, [&](auto e) { pack_right_as<T, decltype(e)>(job, column, end, to); });
}

// Panels of up to `height` rows from `row` on, [panel][inner][rows], each inner index scaled by its coefficient. All
// panels at once: rows of left may lie on pages of their own too.
template <class T, class E>
static void pack_left_as(const Product &job, int64_t row, int64_t last, int height, T *to) {
    const auto *data = static_cast<const typename E::raw *>(job.left.data);
    const bool straight = job.left.outer_stride == 1;
    for (int64_t p = 0; p < job.inner; ++p) {
        T factor = static_cast<T>(job.scale);
        if (job.coef) {
            with_element(job.coef_dtype, [&](auto c) {
                using C = decltype(c);
                factor *= load_one<T, C>(static_cast<const typename C::raw *>(job.coef) + p * job.coef_stride);
            });
        }
        const auto *from = data + p * job.left.inner_stride;
        for (int64_t i = row; straight && p + AHEAD < job.inner && i < last; i += 64 / static_cast<int>(sizeof(*from)))
            __builtin_prefetch(from + AHEAD * job.left.inner_stride + i);
        T *panel = to;
        for (int64_t i = row; i < last; i += height, panel += height * job.inner) {
            int64_t rows = smaller(height, last - i);
            T *at = panel + p * rows;
            // What a vector writes beyond its rows, the next inner index overwrites, if it is of the same panel.
            if (straight && rows <= LANES<T> && job.rows - i >= LANES<T> && (job.inner - p) * rows >= LANES<T>)
                store_bytes(at, load<T, E>(from + i) * factor);
            else
                for (int64_t j = 0; j < rows; ++j)
                    at[j] = load_one<T, E>(from + (i + j) * job.left.outer_stride) * factor;
        }
    }
}

template <class T>
static void pack_left(const Product &job, int64_t row, int64_t last, int height, T *to) {
    with_element(job.left.dtype, [&](auto e) { pack_left_as<T, decltype(e)>(job, row, last, height, to); });
}

// ---- a tile --------------------------------------------------------------------------------------------------------

// left[inner][ROWS]^T right[inner][PRODUCT_COLUMNS], in registers.
template <class T, int ROWS>
FLORA_INLINE void multiply_into(const T *left, const T *right, int64_t inner,
                                Vec<T, LANES<T>> (&acc)[ROWS][PRODUCT_VECTORS<T>]) {
    typedef Vec<T, LANES<T>> V;
    constexpr int VECTORS = PRODUCT_VECTORS<T>;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = V{};
    }
#pragma GCC unroll 2
    for (int64_t p = 0; p < inner; ++p, left += ROWS, right += PRODUCT_COLUMNS<T>) {
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
}

// sum[ROWS][PRODUCT_COLUMNS] = or += left^T right.
template <class T, int ROWS>
static void multiply(const T *left, const T *right, int64_t inner, T *sum, bool first) {
    typedef Vec<T, LANES<T>> V;
    V acc[ROWS][PRODUCT_VECTORS<T>];
    multiply_into<T, ROWS>(left, right, inner, acc);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < PRODUCT_VECTORS<T>; ++v, sum += LANES<T>)
            store_bytes(sum, first ? acc[i][v] : load_bytes<V>(sum) + acc[i][v]);
    }
}

// out += left^T right for a whole tile of contiguous rows, straight from registers.
template <class T, class E, Mode MODE>
static void multiply_onto(const T *left, const T *right, int64_t inner, void *out, int64_t stride, int16_t *low,
                          int64_t low_stride) {
    Vec<T, LANES<T>> acc[PRODUCT_ROWS][PRODUCT_VECTORS<T>];
    multiply_into<T, PRODUCT_ROWS>(left, right, inner, acc);
    auto *to = static_cast<typename E::raw *>(out);
#pragma GCC unroll 16
    for (int i = 0; i < PRODUCT_ROWS; ++i, to += stride, low += MODE == ADD_LOW_BITS ? low_stride : 0)
        finish_row<T, E, MODE>(acc[i], to, low, nullptr, {});
}

template <class T, int ROWS = PRODUCT_ROWS>
FLORA_INLINE void multiply_rows(int rows, const T *left, const T *right, int64_t inner, T *sum, bool first) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply<T, ROWS>(left, right, inner, sum, first);
        multiply_rows<T, ROWS - 1>(rows, left, right, inner, sum, first);
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
    constexpr int WIDTH = PRODUCT_COLUMNS<T>;
    uint16_t draws[MODE == ADD_MASKED || MODE == ADD_STOCHASTIC ? PRODUCT_ROWS * WIDTH : WIDTH];
    if (MODE == ADD_MASKED || MODE == ADD_STOCHASTIC) draw(job.draws, row, rows, column / 8, WIDTH / 8, draws);
    R *out = static_cast<R *>(job.out) + row * job.row_stride + column * job.column_stride, *at = out;
    int16_t *low = MODE == ADD_LOW_BITS ? job.low + row * job.low_row_stride + column * job.low_column_stride : nullptr;
    int16_t *low_at = low;
    int64_t stride = job.row_stride, low_stride = job.low_row_stride;
    bool straight = columns == WIDTH && job.column_stride == 1 && (MODE != ADD_LOW_BITS || job.low_column_stride == 1);
    R copy[PRODUCT_ROWS * WIDTH];
    int16_t low_copy[MODE == ADD_LOW_BITS ? PRODUCT_ROWS * WIDTH : 1];
    if (!straight) {
        __builtin_memset(copy, 0, sizeof(copy));
        at = copy;
        stride = low_stride = WIDTH;
        copy_tile(out, job.row_stride, job.column_stride, copy, WIDTH, 1, rows, columns);
        if (MODE == ADD_LOW_BITS) {
            __builtin_memset(low_copy, 0, sizeof(low_copy));
            copy_tile(low, job.low_row_stride, job.low_column_stride, low_copy, WIDTH, 1, rows, columns);
            low_at = low_copy;
        }
    }
    for (int i = 0; i < rows; ++i) {
        Vec<T, LANES<T>> values[PRODUCT_VECTORS<T>];
        __builtin_memcpy(values, sum + i * WIDTH, sizeof(values));
        finish_row<T, E, MODE>(values, at + i * stride, low_at ? low_at + i * low_stride : nullptr,
                               draws + (MODE == ADD_MASKED || MODE == ADD_STOCHASTIC ? i * WIDTH : 0), job.draws);
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
        if (job.mode == ADD) found = finish_tile<T, E, ADD>;
        if (job.mode == ADD_MASKED) found = finish_tile<T, E, ADD_MASKED>;
    });
    if (job.mode == ADD_LOW_BITS) found = finish_tile<T, Bf16, ADD_LOW_BITS>;
    if (job.mode == ADD_STOCHASTIC) found = finish_tile<T, Bf16, ADD_STOCHASTIC>;
    return found;
}

// For whole tiles of a plain sum of one piece; else NULL.
template <class T>
using Onto = void (*)(const T *, const T *, int64_t, void *, int64_t, int16_t *, int64_t);

template <class T>
static Onto<T> onto_for(const Product &job) {
    Onto<T> found = nullptr;
    if (job.column_stride != 1 || job.inner > PIECE) return found;
    if (job.mode == ADD) with_element(job.out_dtype, [&](auto e) { found = multiply_onto<T, decltype(e), ADD>; });
    if (job.mode == ADD_LOW_BITS && job.low_column_stride == 1) found = multiply_onto<T, Bf16, ADD_LOW_BITS>;
    return found;
}

// The tile comes into L2 while its sum is made; in L1, where rows of a power of two share few sets, it would not last.
template <class T>
FLORA_INLINE void prefetch_tile(const Product &job, int64_t row, int rows, int64_t column, int element) {
    if (job.column_stride != 1) return;
    const char *out = static_cast<const char *>(job.out) + (row * job.row_stride + column) * element;
    for (int i = 0; i < rows; ++i, out += job.row_stride * element)
        for (int byte = 0; byte < PRODUCT_COLUMNS<T> * element; byte += 64) __builtin_prefetch(out + byte, 0, 2);
    if (job.mode != ADD_LOW_BITS || job.low_column_stride != 1) return;
    const int16_t *low = job.low + row * job.low_row_stride + column;
    for (int i = 0; i < rows; ++i, low += job.low_row_stride) __builtin_prefetch(low, 0, 2);
}

// Row panels that share one right panel while it lies in L1. More would push W's lines, two tiles to a line, out of L2.
constexpr int GROUP = 16;

// Tiles of a group of row panels of `height` rows each, row .. last, and the columns column .. end, whose right panels
// start at `right`. Left panels follow each other. A sum of one piece meets memory at once.
template <class T>
static void group_of_tiles(const Product &job, const T *left, int64_t row, int64_t last, int height, const T *right,
                           int64_t column, int64_t end) {
    constexpr int TILE = PRODUCT_ROWS * PRODUCT_COLUMNS<T>;
    alignas(64) T sums[GROUP * TILE];
    Finish<T> finish_it = finish_for<T>(job);
    Onto<T> onto = onto_for<T>(job);
    int element = job.out_dtype == FLORA_FP64 ? 8 : job.out_dtype == FLORA_FP32 ? 4 : 2;
    bool whole = job.inner <= PIECE;
    auto finish_at = [&](int64_t i, const T *sum) {
        finish_it(job, sum, i, static_cast<int>(smaller(height, last - i)), column,
                  smaller(PRODUCT_COLUMNS<T>, end - column));
    };
    for (; column < end; column += PRODUCT_COLUMNS<T>, right += job.inner * PRODUCT_COLUMNS<T>) {
        for (int64_t p = 0; p < job.inner; p += PIECE) {
            int64_t piece = smaller(PIECE, job.inner - p);
            T *sum = sums;
            for (int64_t i = row; i < last; i += height, sum += whole ? 0 : TILE) {
                int rows = static_cast<int>(smaller(height, last - i));
                if (p == 0) prefetch_tile<T>(job, i, rows, column, element);
                const T *panel = left + (i - row) * job.inner;
                if (onto && rows == PRODUCT_ROWS && end - column >= PRODUCT_COLUMNS<T>) {
                    void *out = static_cast<char *>(job.out) + (i * job.row_stride + column) * element;
                    int16_t *low = job.low ? job.low + i * job.low_row_stride + column : nullptr;
                    onto(panel, right, piece, out, job.row_stride, low, job.low_row_stride);
                    continue;
                }
                multiply_rows<T>(rows, panel + p * rows, right + p * PRODUCT_COLUMNS<T>, piece, sum, p == 0);
                if (whole) finish_at(i, sum);
            }
        }
        const T *sum = sums;
        for (int64_t i = row; i < last && !whole; i += height, sum += TILE) finish_at(i, sum);
    }
}

}  // namespace FLORA_ISA
}  // namespace flora
