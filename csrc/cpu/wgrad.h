// wgrad: dA_c = dS_c^T drop(X_c), then dB_c = s_c S_c^T dY_c, summed over each client's tokens.
//
// Where X or dY lies plainly in memory, in the type of the sums and without dropout, its rows are read where they lie:
// of few ranks, packing X as product.h does takes longer than the product. Everything else goes through run.h.
#pragma once

#include "clients.h"

namespace flora {
namespace FLORA_ISA {

// Tokens that are summed before the next columns: a tile of their rows lies in L1, where panels of ranks share it.
constexpr int64_t WGRAD_TOKENS = 128;
// Tiles of columns in a task.
constexpr int64_t WGRAD_TILES = 2;

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
    bool scaled;
};

// The columns column .. end, a tile of them at most, of one client's gradient.
template <class T>
static void gradient_tile(const Gradient &g, const Client &c, int64_t column, int64_t end) {
    constexpr int WIDTH = TILE_COLUMNS<T>;
    alignas(64) T block[WGRAD_TOKENS * WIDTH], tile[TILE_ROWS * WIDTH];
    const int64_t right_step = step(g.right->rows, g.right->row_stride), out_step = step(g.out->rows, g.out->row_stride);
    const int64_t columns = end - column, panels = ceil_div(c.ranks, TILE_ROWS), height = ceil_div(c.ranks, panels);
    const T *left = static_cast<const T *>(g.left->data) + c.flat;
    const T *right = static_cast<const T *>(g.right->data) + c.token * right_step + column;
    T *out = static_cast<T *>(g.out->data) + c.rank * out_step + column;
    const T scale = g.scaled ? static_cast<T>(c.scale) : T(1);
    const bool whole = columns == WIDTH, copies = panels > 1 || !whole;
    for (int64_t t = 0; t < c.tokens; t += WGRAD_TOKENS) {
        const int64_t tokens = smaller(WGRAD_TOKENS, c.tokens - t);
        const T *rows = right + t * right_step;
        if (copies) {
            if (!whole) __builtin_memset(block, 0, sizeof(block));
            for (int64_t i = 0; i < tokens; ++i) {
                __builtin_memcpy(block + i * WIDTH, rows + i * right_step, static_cast<size_t>(columns) * sizeof(T));
                for (int byte = 0; byte < WIDTH * static_cast<int>(sizeof(T)); byte += 64)
                    __builtin_prefetch(reinterpret_cast<const char *>(rows + i * right_step + WIDTH) + byte);
            }
        }
        for (int64_t r = 0; r < c.ranks; r += height) {
            const int64_t ranks = smaller(height, c.ranks - r);
            T *to = whole ? out + r * out_step : tile;
            outer_of<T>(ranks)(left + t * c.ranks + r, c.ranks, copies ? block : rows, copies ? WIDTH : right_step, tokens,
                               scale, to, whole ? out_step : WIDTH, whole ? t == 0 : true);
            for (int64_t i = 0; i < ranks && !whole; ++i)
                for (int64_t j = 0; j < columns; ++j) {
                    T &sum = out[(r + i) * out_step + j];
                    sum = (t == 0 ? T(0) : sum) + tile[i * WIDTH + j];
                }
        }
    }
    for (int64_t r = 0; r < c.ranks && !c.tokens; ++r)
        __builtin_memset(out + r * out_step, 0, static_cast<size_t>(columns) * sizeof(T));
}

// One thread's part of the gradients that are read where they lie. Who computes a tile does not change its bits.
template <class T>
static void gradient_work(const Gradient *gradients, int count, const flora_clients &table, int64_t *counter) {
    constexpr int64_t WIDTH = TILE_COLUMNS<T>;
    Clients clients = {&table, 0, 0};
    int64_t task = take(counter), before = 0;
    for (Client c; clients.next(c);) {
        for (int g = 0; g < count && c.ranks; ++g) {
            const int64_t columns = gradients[g].out->columns, tasks = ceil_div(columns, WGRAD_TILES * WIDTH);
            for (; task < before + tasks; task = take(counter)) {
                int64_t column = (task - before) * WGRAD_TILES * WIDTH;
                int64_t end = smaller(columns, column + WGRAD_TILES * WIDTH);
                for (; column < end; column += WIDTH)
                    gradient_tile<T>(gradients[g], c, column, smaller(end, column + WIDTH));
            }
            before += tasks;
        }
    }
}

// What is read where it lies, and the products of the rest.
template <class T>
struct WgradPlan {
    Gradient plain[2];
    int count;
    WgradProducts packed;

    explicit WgradPlan(const flora_wgrad_args &args) : count(0), packed{&args, {&args.clients, 0, 0}, {}, true, {}} {
        const Gradient both[] = {{&args.ds, &args.x, &args.dA, false}, {&args.s, &args.dy, &args.dB, true}};
        bool drops = false;
        for (int64_t c = 0; c < args.clients.num_clients && args.clients.q; ++c) drops |= args.clients.q[c] > 0;
        for (int i = 0; i < 2; ++i) {
            const Gradient &g = both[i];
            packed.wanted[i] = !(is_plain<T>(*g.right) && is_plain<T>(*g.out) && g.left->dtype == g.right->dtype) ||
                               (drops && i == 0);
            if (!packed.wanted[i]) plain[count++] = g;
        }
    }
};

template <class T>
static void run_wgrad(const flora_exec &exec, const flora_wgrad_args &args) {
    WgradPlan<T> plan(args);
    if (plan.count < 2) run<T>(plan.packed, exec);
    if (!plan.count) return;
    int64_t counter = 0;
#ifdef _OPENMP
    int threads = team_size(exec.num_threads);
    double columns = static_cast<double>(args.x.columns + args.dy.columns);
    bool worth = static_cast<double>(args.s.size) * columns > SMALL;
#pragma omp parallel num_threads(threads) if (worth)
#endif
    gradient_work<T>(plan.plain, plan.count, args.clients, &counter);
}

static flora_status wgrad_workspace(const flora_exec &exec, const flora_wgrad_args &args, size_t *bytes) {
    int32_t dtype = args.x.dtype;
    *bytes = product_workspace(exec, dtype, dtype == FLORA_FP64 ? WgradPlan<double>(args).packed
                                                                : WgradPlan<float>(args).packed);
    return FLORA_OK;
}

static flora_status wgrad(const flora_exec &exec, const flora_wgrad_args &args) {
    if (args.x.dtype == FLORA_FP64) run_wgrad<double>(exec, args);
    else run_wgrad<float>(exec, args);
    return FLORA_OK;
}

}  // namespace FLORA_ISA
}  // namespace flora
