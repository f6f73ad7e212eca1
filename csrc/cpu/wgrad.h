// wgrad: dA_c = dS_c^T drop(X_c), then dB_c = s_c S_c^T dY_c, summed over each client's tokens.
//
// A tile of columns at a time, a block of tokens at a time: few ranks read rows of X or dY where they lie, for a packed
// copy would take longer than the product; panels of many ranks share a copy in L1, and so do rows that must be widened,
// dropped or gathered. All are summed in one order: how a matrix lies in memory does not change a bit.
#pragma once

#include "clients.h"

namespace flora {
namespace FLORA_ISA {

// Tokens of a block: a tile of their rows lies in L1.
constexpr int64_t WGRAD_TOKENS = 128;
// Tiles of columns in a task.
constexpr int64_t WGRAD_TILES = 2;
// Rows whose draws are made together, so that no lane is idle.
constexpr int DRAW_ROWS = 8;

// out[ROWS][TILE_COLUMNS] = or += scale left[tokens][ROWS]^T right[tokens][TILE_COLUMNS].
template <class T, int ROWS>
static void outer(const T *left, int64_t left_stride, const T *right, int64_t right_stride, int64_t tokens, T scale,
                  T *out, int64_t out_stride, bool first) {
    typedef Vec<T, LANES<T>> V;
    constexpr int VECTORS = TILE_VECTORS<T>;
    V acc[ROWS][VECTORS] = {};
    for (int64_t t = 0; t < tokens; ++t, left += left_stride, right += right_stride) {
        V b[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            b[v] = load_bytes<V>(right + v * LANES<T>);
            // The next columns of this row: rows lie on pages of their own, which hardware does not look ahead in.
            if (v * VECTOR_BYTES % 64 == 0) __builtin_prefetch(right + TILE_COLUMNS<T> + v * LANES<T>);
        }
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
        for (int v = 0; v < VECTORS; ++v) {
            T *to = out + i * out_stride + v * LANES<T>;
            V sum = acc[i][v] * scale;
            store_bytes(to, first ? sum : load_bytes<V>(to) + sum);
        }
    }
}

template <class T>
using Outer = void (*)(const T *, int64_t, const T *, int64_t, int64_t, T, T *, int64_t, bool);

template <class T, int ROWS = TILE_ROWS>
FLORA_INLINE Outer<T> outer_of(int64_t rows) {
    if constexpr (ROWS == 1) return outer<T, 1>;
    else return rows >= ROWS ? outer<T, ROWS> : outer_of<T, ROWS - 1>(rows);
}

// One of the two gradients.
struct Gradient {
    const flora_vector *left;
    const flora_matrix *right, *out;
    bool is_dA;
};

// Rows of a tile as T, TILE_COLUMNS apart and 0 beyond the matrix; `drop` says whose dropout they get.
template <class T, class E>
static void copy_block(const flora_matrix &m, int64_t row, int64_t rows, int64_t column, const Client *drop, T *to) {
    constexpr int WIDTH = TILE_COLUMNS<T>;
    uint16_t draws[DRAW_ROWS * WIDTH];
    const int64_t row_step = step(m.rows, m.row_stride), stride = step(m.columns, m.column_stride);
    const auto *from = static_cast<const typename E::raw *>(m.data) + row * row_step + column * stride;
    for (int64_t i = 0; i < rows; ++i, from += row_step) {
        if (drop && i % DRAW_ROWS == 0)
            draw(drop->draws, row - drop->token + i, static_cast<int>(smaller(DRAW_ROWS, rows - i)), column / 8,
                 WIDTH / 8, draws);
        for (int v = 0; v < WIDTH; v += LANES<T>) {
            if (v * static_cast<int>(sizeof(typename E::raw)) % 64 == 0) __builtin_prefetch(from + WIDTH + v);
            auto value = load_some<T, E>(from + v * stride, stride, m.columns - column - v);
            if (drop) value = masked<T>(value, draws + i % DRAW_ROWS * WIDTH + v, drop->draws);
            store_bytes(to + i * WIDTH + v, value);
        }
    }
}

// A thread's own memory besides its stack.
template <class T>
struct WgradBuffers {
    T *left; // a block's S as T, all ranks
    T *sums; // of a tile, all ranks

    WgradBuffers(char *base, int64_t ranks)
        : left(reinterpret_cast<T *>(base)), sums(left + WGRAD_TOKENS * ranks + LANES<T>) {}
    static size_t bytes(int64_t ranks) {
        return aligned(static_cast<size_t>(ranks * (WGRAD_TOKENS + TILE_COLUMNS<T>) + LANES<T>) * sizeof(T));
    }
};

// A block of S or dS as T: where it lies if it can be, else widened.
template <class T>
static const T *left_of(const flora_vector &flat, int64_t start, int64_t size, T *to) {
    const T *found = to;
    with_element(flat.dtype, [&](auto e) {
        using E = decltype(e);
        const auto *from = static_cast<const typename E::raw *>(flat.data) + start;
        if constexpr (__is_same(typename E::raw, T)) found = from;
        else
            for (int64_t i = 0; i < size; i += LANES<T>) store_bytes(to + i, load_some<T, E>(from + i, 1, size - i));
    });
    return found;
}

// Sums [rows][TILE_COLUMNS] into a tile of out.
template <class T, class E>
static void store_tile(const T *sums, const flora_matrix &m, int64_t row, int64_t rows, int64_t column, int64_t end) {
    constexpr int WIDTH = TILE_COLUMNS<T>;
    typename E::raw line[WIDTH];
    const int64_t row_step = step(m.rows, m.row_stride), stride = step(m.columns, m.column_stride);
    auto *to = static_cast<typename E::raw *>(m.data) + row * row_step + column * stride;
    for (int64_t i = 0; i < rows; ++i, to += row_step, sums += WIDTH) {
        for (int v = 0; v < WIDTH; v += LANES<T>) store<T, E>(line + v, load_bytes<Vec<T, LANES<T>>>(sums + v));
        for (int64_t j = 0; j < end - column; ++j) to[j * stride] = line[j];
    }
}

// The columns column .. end, a tile of them at most, of one client's gradient.
template <class T>
static void gradient_tile(const Gradient &g, const Client &c, int64_t column, int64_t end, WgradBuffers<T> own) {
    constexpr int WIDTH = TILE_COLUMNS<T>;
    alignas(64) T block[WGRAD_TOKENS * WIDTH];
    const flora_matrix &right = *g.right, &out = *g.out;
    const int64_t panels = ceil_div(c.ranks, TILE_ROWS), height = ceil_div(c.ranks, panels);
    const bool drops = g.is_dA && c.drops, whole = end - column == WIDTH, straight = whole && is_plain<T>(out);
    const bool copies = panels > 1 || drops || !whole || !is_plain<T>(right);
    const T scale = g.is_dA ? T(1) : static_cast<T>(c.scale);
    const int64_t right_step = copies ? WIDTH : step(right.rows, right.row_stride);
    const int64_t to_step = straight ? step(out.rows, out.row_stride) : WIDTH;
    T *to = straight ? static_cast<T *>(out.data) + c.rank * to_step + column : own.sums;
    for (int64_t t = 0; t < c.tokens; t += WGRAD_TOKENS) {
        const int64_t tokens = smaller(WGRAD_TOKENS, c.tokens - t), row = c.token + t;
        const T *left = left_of<T>(*g.left, c.flat + t * c.ranks, tokens * c.ranks, own.left), *rows = block;
        if (!copies) rows = static_cast<const T *>(right.data) + row * right_step + column;
        else with_element(right.dtype, [&](auto e) {
            copy_block<T, decltype(e)>(right, row, tokens, column, drops ? &c : nullptr, block);
        });
        for (int64_t r = 0; r < c.ranks; r += height)
            outer_of<T>(smaller(height, c.ranks - r))(left + r, c.ranks, rows, right_step, tokens, scale,
                                                      to + r * to_step, to_step, t == 0);
    }
    for (int64_t r = 0; r < c.ranks && !c.tokens; ++r)
        __builtin_memset(to + r * to_step, 0, static_cast<size_t>(WIDTH) * sizeof(T));
    if (!straight)
        with_element(out.dtype, [&](auto e) { store_tile<T, decltype(e)>(to, out, c.rank, c.ranks, column, end); });
}

// One thread's part. Who computes a tile does not change its bits.
template <class T>
static void gradient_work(const flora_wgrad_args &args, WgradBuffers<T> own, int64_t *counter) {
    constexpr int64_t WIDTH = TILE_COLUMNS<T>;
    const Gradient both[] = {{&args.ds, &args.x, &args.dA, true}, {&args.s, &args.dy, &args.dB, false}};
    Clients clients = {&args.clients, 0, 0};
    int64_t task = take(counter), before = 0;
    for (Client c; clients.next(c);) {
        for (int i = 0; i < 2 && c.ranks; ++i) {
            const int64_t columns = both[i].out->columns, tasks = ceil_div(columns, WGRAD_TILES * WIDTH);
            for (; task < before + tasks; task = take(counter)) {
                int64_t column = (task - before) * WGRAD_TILES * WIDTH;
                int64_t end = smaller(columns, column + WGRAD_TILES * WIDTH);
                for (; column < end; column += WIDTH)
                    gradient_tile<T>(both[i], c, column, smaller(end, column + WIDTH), own);
            }
            before += tasks;
        }
    }
}

static int64_t most_ranks(const flora_clients &table) {
    int64_t most = 0;
    Clients clients = {&table, 0, 0};
    for (Client c; clients.next(c);) most = larger(most, c.ranks);
    return most;
}

template <class T>
static void run_wgrad(const flora_exec &exec, const flora_wgrad_args &args) {
    int64_t counter = 0, ranks = most_ranks(args.clients);
    char *base = static_cast<char *>(exec.workspace);
#ifdef _OPENMP
    int threads = team_size(exec.num_threads);
    double columns = static_cast<double>(args.x.columns + args.dy.columns);
    bool worth = static_cast<double>(args.s.size) * columns > SMALL;
#pragma omp parallel num_threads(threads) if (worth)
#endif
    gradient_work<T>(args, {base + WgradBuffers<T>::bytes(ranks) * static_cast<size_t>(thread_index()), ranks}, &counter);
}

static flora_status wgrad_workspace(const flora_exec &exec, const flora_wgrad_args &args, size_t *bytes) {
    int64_t ranks = most_ranks(args.clients);
    size_t one = args.x.dtype == FLORA_FP64 ? WgradBuffers<double>::bytes(ranks) : WgradBuffers<float>::bytes(ranks);
    *bytes = one * static_cast<size_t>(team_size(exec.num_threads));
    return FLORA_OK;
}

static flora_status wgrad(const flora_exec &exec, const flora_wgrad_args &args) {
    if (args.x.dtype == FLORA_FP64) run_wgrad<double>(exec, args);
    else run_wgrad<float>(exec, args);
    return FLORA_OK;
}

}  // namespace FLORA_ISA
}  // namespace flora
