// adamw: one pass over param, grad and both averages; each element by itself, so threads share the chunks as they come.
#pragma once

#include "run.h"

namespace flora {
namespace FLORA_ISA {

// One segment's settings, as torch.optim.AdamW turns them into factors.
template <class T>
struct Step {
    T clip, shrink, beta2, rest1, rest2, rate, root, eps;
    bool lerp_from_grad; // which end of the average is the nearer one: torch.lerp's rule

    Step(double lr, double beta1, double beta2_, double eps_, double decay, double step, double clip_)
        : clip(static_cast<T>(clip_)),
          shrink(static_cast<T>(1 - lr * decay)),
          beta2(static_cast<T>(beta2_)),
          rest1(static_cast<T>(1 - beta1)),
          rest2(static_cast<T>(1 - beta2_)),
          rate(static_cast<T>(lr / (1 - __builtin_pow(beta1, step)))),
          root(static_cast<T>(__builtin_sqrt(1 - __builtin_pow(beta2_, step)))),
          eps(static_cast<T>(eps_)),
          lerp_from_grad(!(static_cast<T>(1 - beta1) < static_cast<T>(0.5))) {}
};

template <class T>
FLORA_INLINE Vec<T, LANES<T>> root_of(Vec<T, LANES<T>> v) {
    for (int i = 0; i < LANES<T>; ++i) {
        if constexpr (sizeof(T) == 4) v[i] = __builtin_sqrtf(v[i]);
        else v[i] = __builtin_sqrt(v[i]);
    }
    return v;
}

template <class T>
FLORA_INLINE void step_vector(const Step<T> &s, Vec<T, LANES<T>> &p, Vec<T, LANES<T>> g, Vec<T, LANES<T>> &m,
                              Vec<T, LANES<T>> &v) {
    g *= s.clip;
    p *= s.shrink;
    m = s.lerp_from_grad ? g + (s.rest1 - 1) * (g - m) : m + s.rest1 * (g - m);
    v = v * s.beta2 + s.rest2 * g * g;
    p -= s.rate * m / (root_of<T>(v) / s.root + s.eps);
}

template <class T>
FLORA_INLINE void step_at(const Step<T> &s, T *p, const T *g, T *m, T *v) {
    typedef Vec<T, LANES<T>> V;
    V P = load_bytes<V>(p), M = load_bytes<V>(m), S = load_bytes<V>(v);
    step_vector<T>(s, P, load_bytes<V>(g), M, S);
    store_bytes(p, P), store_bytes(m, M), store_bytes(v, S);
}

template <class T>
static void step_range(const Step<T> &s, T *p, const T *g, T *m, T *v, int64_t count) {
    int64_t i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) step_at<T>(s, p + i, g + i, m + i, v + i);
    // What is left goes through a padded copy, so that every element has the same arithmetic.
    T copy[4][LANES<T>] = {};
    for (int64_t j = i; j < count; ++j)
        copy[0][j - i] = p[j], copy[1][j - i] = g[j], copy[2][j - i] = m[j], copy[3][j - i] = v[j];
    step_at<T>(s, copy[0], copy[1], copy[2], copy[3]);
    for (int64_t j = i; j < count; ++j) p[j] = copy[0][j - i], m[j] = copy[2][j - i], v[j] = copy[3][j - i];
}

FLORA_INLINE double hyper_at(const flora_matrix &hyper, int64_t row, int64_t column) {
    int64_t at = row * hyper.row_stride + column * hyper.column_stride;
    return hyper.dtype == FLORA_FP32 ? static_cast<const float *>(hyper.data)[at]
                                     : static_cast<const double *>(hyper.data)[at];
}

constexpr int64_t ADAMW_CHUNK = 1 << 15;

template <class T>
static void adamw_work(const flora_adamw_args &args, int64_t *counter) {
    int64_t mine = take(counter), chunk = 0;
    for (int64_t i = 0; i < args.num_segments; ++i) {
        int64_t row = args.owner ? args.owner[i] : i, end = args.segment_offsets[i + 1];
        double h[7];
        for (int column = 0; column < 7; ++column) h[column] = hyper_at(args.hyper, row, column);
        if (h[5] == 0) continue;
        Step<T> step(h[0], h[1], h[2], h[3], h[4], h[5], h[6]);
        for (int64_t at = args.segment_offsets[i]; at < end; at += ADAMW_CHUNK, ++chunk) {
            if (chunk != mine) continue;
            step_range<T>(step, static_cast<T *>(args.param) + at, static_cast<const T *>(args.grad) + at,
                          static_cast<T *>(args.exp_avg) + at, static_cast<T *>(args.exp_avg_sq) + at,
                          smaller(ADAMW_CHUNK, end - at));
            mine = take(counter);
        }
    }
}

static flora_status adamw_workspace(const flora_exec &, const flora_adamw_args &, size_t *bytes) {
    *bytes = 0;
    return FLORA_OK;
}

static flora_status adamw(const flora_exec &exec, const flora_adamw_args &args) {
    int64_t counter = 0;
    (void)exec;
#ifdef _OPENMP
    int threads = team_size(exec.num_threads);
#pragma omp parallel num_threads(threads) if (args.numel > ADAMW_CHUNK)
#endif
    {
        if (args.dtype == FLORA_FP64) adamw_work<double>(args, &counter);
        else adamw_work<float>(args, &counter);
    }
    return FLORA_OK;
}

}  // namespace FLORA_ISA
}  // namespace flora
