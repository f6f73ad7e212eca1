// adamw: Adam with decoupled weight decay over flat buffers, every client with its own settings, in one launch.
//
//     p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
//     p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
//
// A block owns kAdamwBlock elements at an aligned address and goes through the segments that it meets, mostly one; the
// settings of each are worked out once, in float64, as torch does on the host. arXiv 1711.05101.
#pragma once

#include "tile.cuh"

namespace flora::cuda {

constexpr int kAdamwThreads = 256, kAdamwEach = 4, kAdamwBlock = kAdamwThreads * kAdamwEach;

struct AdamwArgs {
    void *param, *exp_avg, *exp_avg_sq;
    const void *grad, *hyper;
    const int64_t *offsets;
    const int32_t *owner;
    int64_t numel, segments, hyper_stride[2];
    int32_t hyper_dtype, wide;
};

template <class T>
struct Settings {
    T kept, to_m, keep_v, to_v, root, eps, rate, clip;
    int active;
};

// base^exponent for a whole exponent, exact at 1.
FLORA_DEVICE double power(double base, int64_t exponent) {
    double result = 1;
    for (; exponent > 0; exponent /= 2, base *= base)
        if (exponent % 2) result *= base;
    return result;
}

template <class T>
FLORA_DEVICE Settings<T> settings_of(const AdamwArgs &args, int64_t segment) {
    int64_t row = args.owner ? ld_global(args.owner + segment) : segment;
    double h[7];
    for (int i = 0; i < 7; ++i)
        h[i] = number_at<double>(args.hyper, row * args.hyper_stride[0] + i * args.hyper_stride[1], args.hyper_dtype);
    double lr = h[0], beta1 = h[1], beta2 = h[2];
    int64_t step = int64_t(h[5]);
    Settings<T> settings;
    settings.kept = T(1 - lr * h[4]);
    settings.to_m = T(1 - beta1), settings.keep_v = T(beta2), settings.to_v = T(1 - beta2);
    settings.root = T(root(1 - power(beta2, step)));
    settings.eps = T(h[3]), settings.rate = T(lr / (1 - power(beta1, step))), settings.clip = T(h[6]);
    settings.active = step > 0;
    return settings;
}

template <class T>
FLORA_DEVICE void load_mine(T (&values)[kAdamwEach], const void *from, int64_t at, bool wide, int real) {
    constexpr int V = kVector<T>;
    const T *p = static_cast<const T *>(from) + at;
    if (wide && real == kAdamwEach) {
        FLORA_UNROLL
        for (int i = 0; i < kAdamwEach / V; ++i) {
            uint4 words = ld_global(reinterpret_cast<const uint4 *>(p) + i);
            memcpy(&values[i * V], &words, 16);
        }
    } else {
        FLORA_UNROLL
        for (int e = 0; e < kAdamwEach; ++e) values[e] = e < real ? ld_global(p + e) : T(0);
    }
}
template <class T>
FLORA_DEVICE void store_mine(void *to, int64_t at, const T (&values)[kAdamwEach], bool wide, int real) {
    constexpr int V = kVector<T>;
    T *p = static_cast<T *>(to) + at;
    if (wide && real == kAdamwEach) {
        FLORA_UNROLL
        for (int i = 0; i < kAdamwEach / V; ++i) {
            uint4 words;
            memcpy(&words, &values[i * V], 16);
            st_global(reinterpret_cast<uint4 *>(p) + i, words);
        }
    } else {
        FLORA_UNROLL
        for (int e = 0; e < kAdamwEach; ++e)
            if (e < real) st_global(p + e, values[e]);
    }
}

template <class T>
__global__ void __launch_bounds__(kAdamwThreads) adamw_kernel(FLORA_TABLE(AdamwArgs) args) {
    auto &settings = shared_memory<Settings<T>>();
    int64_t start = int64_t(blockIdx.x) * kAdamwBlock, mine = start + thread_id() * kAdamwEach;
    int64_t block_end = start + kAdamwBlock < args.numel ? start + kAdamwBlock : args.numel;
    int real = clamp_to(args.numel - mine, kAdamwEach);
    T p[kAdamwEach], g[kAdamwEach], m[kAdamwEach], v[kAdamwEach];
    load_mine(p, args.param, mine, args.wide, real);
    load_mine(g, args.grad, mine, args.wide, real);
    load_mine(m, args.exp_avg, mine, args.wide, real);
    load_mine(v, args.exp_avg_sq, mine, args.wide, real);

    int64_t low = 0, high = args.segments - 1;  // the last segment that starts at or before the block
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (ld_global(args.offsets + middle) <= start) low = middle;
        else high = middle - 1;
    }
    for (int64_t segment = low; segment < args.segments; ++segment) {
        int64_t first = ld_global(args.offsets + segment), stop = ld_global(args.offsets + segment + 1);
        if (first >= block_end) break;
        if (first == stop) continue;
        sync_threads();
        if (thread_id() == 0) {
            Settings<T> found = settings_of<T>(args, segment);
            st_shared(&settings, found);
        }
        sync_threads();
        Settings<T> s = ld_shared(&settings);
        if (!s.active) continue;
        FLORA_UNROLL
        for (int e = 0; e < kAdamwEach; ++e) {
            if (mine + e < first || mine + e >= stop) continue;
            T grad = g[e] * s.clip;
            m[e] += s.to_m * (grad - m[e]);
            v[e] = v[e] * s.keep_v + s.to_v * (grad * grad);
            p[e] = p[e] * s.kept - s.rate * divide(m[e], divide(root(v[e]), s.root) + s.eps);
        }
    }
    // Who sits out gets its own bits back: a mask by segment would make every store narrow.
    store_mine(args.param, mine, p, args.wide, real);
    store_mine(args.exp_avg, mine, m, args.wide, real);
    store_mine(args.exp_avg_sq, mine, v, args.wide, real);
}

}  // namespace flora::cuda
