// shrink: S_c = s_c drop(X_c) A_c^T. Rows of X and of A are both contiguous along the sum, so these are dot products of
// vectors along K: neither side is transposed. X is widened (and dropped) once per block of rows, A once per client;
// what lies plainly in memory, in the type of the sums, is read where it lies.
#pragma once

#include "clients.h"

namespace flora {
namespace FLORA_ISA {

// Ranks are mostly multiples of four.
#if defined(__AVX512F__)
constexpr int DOT_ROWS = 6, DOT_RANKS = 4;
#elif defined(__AVX2__)
constexpr int DOT_ROWS = 3, DOT_RANKS = 4;
#else
constexpr int DOT_ROWS = 2, DOT_RANKS = 4;
#endif

// Columns that are summed in registers: DOT_ROWS + DOT_RANKS rows of so many floats stay in L1.
constexpr int64_t DOT_PIECE = 1024;

template <class T>
FLORA_INLINE T sum_of(Vec<T, LANES<T>> v) {
    T parts[LANES<T>];
    store_bytes(parts, v);
    for (int half = LANES<T> / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// sums[i * sum_stride + j] = or += the sum of acc[i][j]'s lanes, always in the order of sum_of.
template <class T, int ROWS, int RANKS>
FLORA_INLINE void store_sums(const Vec<T, LANES<T>> (&acc)[ROWS][RANKS], T *sums, int64_t sum_stride, bool first) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4 && RANKS <= 4) {
        // One by one, sums of 576 products took two fifths of the time.
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row += 4) {
            __m512 each[16], halves[8], quarters[4];
#pragma GCC unroll 16
            for (int n = 0; n < 16; ++n) {
                bool there = row + n % 4 < ROWS && n / 4 < RANKS;
                each[n] = there ? bits_as<__m512>(acc[there ? row + n % 4 : 0][there ? n / 4 : 0]) : _mm512_setzero_ps();
            }
#pragma GCC unroll 8
            for (int n = 0; n < 8; ++n)
                halves[n] = _mm512_add_ps(_mm512_shuffle_f32x4(each[2 * n], each[2 * n + 1], 0x44),
                                          _mm512_shuffle_f32x4(each[2 * n], each[2 * n + 1], 0xEE));
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n)
                quarters[n] = _mm512_add_ps(_mm512_shuffle_f32x4(halves[2 * n], halves[2 * n + 1], 0x88),
                                            _mm512_shuffle_f32x4(halves[2 * n], halves[2 * n + 1], 0xDD));
            __m512 pairs[2];
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) {
                __m512d a = _mm512_castps_pd(quarters[2 * n]), b = _mm512_castps_pd(quarters[2 * n + 1]);
                pairs[n] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
            }
            // Four ranks of a row after those of another.
            T parts[16];
            store_bytes(parts, _mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88),
                                             _mm512_shuffle_ps(pairs[0], pairs[1], 0xDD)));
            for (int i = row; i < ROWS && i < row + 4; ++i) {
                for (int j = 0; j < RANKS; ++j) {
                    T *to = sums + i * sum_stride + j, sum = parts[(i - row) * 4 + j];
                    *to = first ? sum : *to + sum;
                }
            }
        }
        return;
    }
#endif
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < RANKS; ++j) {
            T *to = sums + i * sum_stride + j, sum = sum_of<T>(acc[i][j]);
            *to = first ? sum : *to + sum;
        }
    }
}

// Rows of T, each `stride` after the one before.
template <class T>
struct Rows {
    const T *data;
    int64_t stride;

    const T *at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// sums[i * sum_stride + j] = or += x_i . a_j over `columns`, a multiple of LANES.
template <class T, int ROWS, int RANKS>
static void dots(const T *x, int64_t x_stride, const T *a, int64_t a_stride, int64_t columns, T *sums,
                 int64_t sum_stride, bool first) {
    typedef Vec<T, LANES<T>> V;
    V acc[ROWS][RANKS] = {};
    for (int64_t k = 0; k < columns; k += LANES<T>) {
        V left[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) left[i] = load_bytes<V>(x + i * x_stride + k);
#pragma GCC unroll 8
        for (int j = 0; j < RANKS; ++j) {
            V right = load_bytes<V>(a + j * a_stride + k);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) acc[i][j] += left[i] * right;
        }
    }
    store_sums<T, ROWS, RANKS>(acc, sums, sum_stride, first);
}

template <class T>
using Dots = void (*)(const T *, int64_t, const T *, int64_t, int64_t, T *, int64_t, bool);

template <class T, int ROWS, int RANKS = DOT_RANKS>
FLORA_INLINE Dots<T> dots_of(int64_t ranks) {
    if constexpr (RANKS == 1) return dots<T, ROWS, 1>;
    else return ranks >= RANKS ? dots<T, ROWS, RANKS> : dots_of<T, ROWS, RANKS - 1>(ranks);
}

template <class T, int ROWS = DOT_ROWS>
FLORA_INLINE Dots<T> dots_for(int64_t rows, int64_t ranks) {
    if constexpr (ROWS == 1) return dots_of<T, 1>(ranks);
    else return rows >= ROWS ? dots_of<T, ROWS>(ranks) : dots_for<T, ROWS - 1>(rows, ranks);
}

// Rows row .. end of a matrix as T, `width` apart and zero beyond its columns.
template <class T, class E>
static void widen_rows_as(const flora_matrix &m, int64_t row, int64_t end, int32_t via, const Client *drop, T *to,
                          int64_t width) {
    uint16_t draws[128];
    // Rows without a column are nowhere: their stride may be anything.
    const int64_t row_stride = m.columns ? step(m.rows, m.row_stride) : 0, stride = step(m.columns, m.column_stride);
    for (; row < end; ++row, to += width) {
        const auto *from = static_cast<const typename E::raw *>(m.data) + row * row_stride;
        for (int64_t k = 0; k < width; k += LANES<T>) {
            auto value = load_some<T, E>(from + k * stride, stride, m.columns - k);
            if (via) value = through<T>(value, via);
            if (drop) {
                if (k % 128 == 0) draw(drop->draws, row - drop->token, 1, k / 8, 16, draws);
                value = masked<T>(value, draws + k % 128, drop->draws);
            }
            store_bytes(to + k, value);
        }
    }
}

template <class T>
static void widen_rows(const flora_matrix &m, int64_t row, int64_t end, int32_t via, const Client *drop, T *to,
                       int64_t width) {
    with_element(m.dtype, [&](auto e) { widen_rows_as<T, decltype(e)>(m, row, end, via, drop, to, width); });
}

// The rows of a matrix from `row` on where they lie, if they can be summed so; else nothing.
template <class T>
FLORA_INLINE Rows<T> rows_in_place(const flora_matrix &m, int64_t row) {
    const int64_t stride = step(m.rows, m.row_stride);
    if (!is_plain<T>(m) || !m.columns || m.columns % LANES<T>) return {nullptr, 0};
    return {static_cast<const T *>(m.data) + row * stride, stride};
}

template <class T>
struct ShrinkPlan {
    int64_t width; // of a widened row
    int64_t rows;  // of X in a task
    int64_t ranks; // of A in a block

    explicit ShrinkPlan(const flora_shrink_args &args) {
        width = ceil_div(args.x.columns, LANES<T>) * LANES<T>;
        int64_t row_bytes = larger(width, 1) * static_cast<int64_t>(sizeof(T));
        rows = larger(DOT_ROWS, smaller(16 * DOT_ROWS, LEFT_BYTES / row_bytes / DOT_ROWS * DOT_ROWS));
        ranks = larger(DOT_RANKS, smaller(128, PANEL_BYTES / row_bytes));
    }
    size_t right_bytes() const { return aligned(static_cast<size_t>(ranks * width) * sizeof(T)); }
    // A task's rows of X and its sums.
    size_t left_bytes() const { return aligned(static_cast<size_t>(rows * (width + ranks)) * sizeof(T)); }
};

// s of the rows row .. end and the ranks rank .. rank + ranks of one client, whose A is `a`.
template <class T>
static void shrink_task(const flora_shrink_args &args, const ShrinkPlan<T> &plan, const Client &c, int64_t row,
                        int64_t end, int64_t rank, int64_t ranks, Rows<T> a, T *own) {
    T *sums = own + plan.rows * plan.width;
    Rows<T> x = c.drops ? Rows<T>{nullptr, 0} : rows_in_place<T>(args.x, row);
    if (!x.data) {
        widen_rows<T>(args.x, row, end, 0, c.drops ? &c : nullptr, own, plan.width);
        x = {own, plan.width};
    }
    if (!plan.width) __builtin_memset(sums, 0, static_cast<size_t>((end - row) * ranks) * sizeof(T));
    for (int64_t k = 0; k < plan.width; k += DOT_PIECE) {
        int64_t columns = smaller(DOT_PIECE, plan.width - k);
        for (int64_t j = 0; j < ranks; j += DOT_RANKS) {
            for (int64_t i = 0; i < end - row; i += DOT_ROWS) {
                Dots<T> dot = dots_for<T>(end - row - i, ranks - j);
                dot(x.at(i, k), x.stride, a.at(j, k), a.stride, columns, sums + i * ranks + j, ranks, k == 0);
            }
        }
    }
    with_element(args.s.dtype, [&](auto e) {
        using E = decltype(e);
        auto *out = static_cast<typename E::raw *>(args.s.data) + c.flat + (row - c.token) * c.ranks + rank;
        for (int64_t i = 0; i < end - row; ++i)
            for (int64_t j = 0; j < ranks; ++j)
                store_one<T, E>(out + i * c.ranks + j, sums[i * ranks + j] * static_cast<T>(c.scale));
    });
}

// Where A is read where it lies nobody waits for anybody: the tasks of all clients are taken from one counter. A wait for
// a thread that another program has put aside takes as long as that program's turn.
template <class T>
static void shrink_in_place(const flora_shrink_args &args, const ShrinkPlan<T> &plan, T *own, int64_t *counter) {
    Clients clients = {&args.clients, 0, 0};
    int64_t task = take(counter), before = 0;
    for (Client c; clients.next(c);) {
        const int64_t tasks = ceil_div(c.tokens, plan.rows), last = c.token + c.tokens;
        for (int64_t rank = 0; rank < c.ranks; rank += plan.ranks, before += tasks) {
            for (; task < before + tasks; task = take(counter)) {
                int64_t row = c.token + (task - before) * plan.rows;
                shrink_task<T>(args, plan, c, row, smaller(last, row + plan.rows), rank,
                               smaller(plan.ranks, c.ranks - rank), rows_in_place<T>(args.A, c.rank + rank), own);
            }
        }
    }
}

template <class T>
static void shrink_work(const flora_shrink_args &args, const ShrinkPlan<T> &plan, char *base, Counters *counters) {
    T *x = reinterpret_cast<T *>(base + 2 * plan.right_bytes() +
                                 plan.left_bytes() * static_cast<size_t>(thread_index()));
    if (rows_in_place<T>(args.A, 0).data) return shrink_in_place<T>(args, plan, x, &counters->done[0]);
    int32_t via = is_half(args.x.dtype) && args.A.dtype == FLORA_FP32 ? args.x.dtype : 0;
    Clients clients = {&args.clients, 0, 0};
    int64_t step = 0;
    for (Client c; clients.next(c);) {
        if (!c.tokens) continue;
        for (int64_t rank = 0; rank < c.ranks; rank += plan.ranks, ++step) {
            int64_t ranks = smaller(plan.ranks, c.ranks - rank), now = step % 2;
            T *wide = reinterpret_cast<T *>(base + static_cast<size_t>(now) * plan.right_bytes());
            for (int64_t j = take(&counters->packed[now]); j < ranks; j = take(&counters->packed[now]))
                widen_rows<T>(args.A, c.rank + rank + j, c.rank + rank + j + 1, via, nullptr, wide + j * plan.width,
                              plan.width);
            wait_for_all();
            if (thread_index() == 0) counters->packed[now] = counters->done[1 - now] = 0;
            int64_t *counter = &counters->done[now], last = c.token + c.tokens;
            for (int64_t i = c.token + take(counter) * plan.rows; i < last; i = c.token + take(counter) * plan.rows)
                shrink_task<T>(args, plan, c, i, smaller(last, i + plan.rows), rank, ranks, {wide, plan.width}, x);
        }
    }
}

template <class T>
static void run_shrink(const flora_exec &exec, const flora_shrink_args &args) {
    ShrinkPlan<T> plan(args);
    Counters counters = {};
    char *base = static_cast<char *>(exec.workspace);
#ifdef _OPENMP
    int threads = team_size(exec.num_threads);
    bool worth = static_cast<double>(args.s.size) * static_cast<double>(args.x.columns) > SMALL;
#pragma omp parallel num_threads(threads) if (worth)
#endif
    shrink_work<T>(args, plan, base, &counters);
}

static flora_status shrink(const flora_exec &exec, const flora_shrink_args &args) {
    if (args.x.dtype == FLORA_FP64) run_shrink<double>(exec, args);
    else run_shrink<float>(exec, args);
    return FLORA_OK;
}

template <class T>
static size_t shrink_bytes(const flora_shrink_args &args, int threads) {
    ShrinkPlan<T> plan(args);
    return 2 * plan.right_bytes() + plan.left_bytes() * static_cast<size_t>(threads);
}

static flora_status shrink_workspace(const flora_exec &exec, const flora_shrink_args &args, size_t *bytes) {
    int threads = team_size(exec.num_threads);
    *bytes = args.x.dtype == FLORA_FP64 ? shrink_bytes<double>(args, threads) : shrink_bytes<float>(args, threads);
    return FLORA_OK;
}

}  // namespace FLORA_ISA
}  // namespace flora
