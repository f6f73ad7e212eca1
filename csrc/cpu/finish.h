// How sums meet memory: one row of a tile at a time, each element loaded, added to and rounded once.
#pragma once

#include "draws.h"

namespace flora {
namespace FLORA_ISA {

// A product's tile, in vectors. 6 x 4 fill 24 of AVX-512's 32 registers, 10 loads feed 24 products (9 x 3: 12 feed 27,
// 14 x 2: 16 feed 28), and a row of bf16 is two whole lines of memory.
#if defined(__AVX512F__)
constexpr int PRODUCT_ROWS = 6, MOST_VECTORS = 4;
#else
constexpr int PRODUCT_ROWS = TILE_ROWS, MOST_VECTORS = TILE_MOST_VECTORS;
#endif
// Wide enough for whole groups of eight draws.
template <class T>
constexpr int PRODUCT_VECTORS = LANES<T> * MOST_VECTORS < 8 ? 8 / LANES<T> : MOST_VECTORS;
template <class T>
constexpr int PRODUCT_COLUMNS = PRODUCT_VECTORS<T> * LANES<T>;

// What becomes of a sum.
enum Mode { ADD, ADD_MASKED, ADD_LOW_BITS, ADD_STOCHASTIC };

// Float sums of a bf16 matrix lie in pairs of vectors, first the even columns of both, then the odd ones: two bf16 are
// one 32-bit number, of which either half is widened or put back by a shift or a mask, without moving it between lanes.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even column is the lower half of a pair");

template <class T>
FLORA_INLINE bool in_pairs(int32_t dtype) {
    return sizeof(T) == 4 && dtype == FLORA_BF16;
}

template <int L>
using Ints = Vec<uint32_t, L>;

constexpr uint32_t UPPER = 0xFFFF0000;

// 2 LANES columns in order become the even ones, then the odd ones.
template <class T>
FLORA_INLINE void part_pairs(T *columns) {
    constexpr int L = LANES<T>;
    T copy[2 * L];
    __builtin_memcpy(copy, columns, sizeof(copy));
    for (int i = 0; i < L; ++i) columns[i] = copy[2 * i], columns[L + i] = copy[2 * i + 1];
}

template <int L>
FLORA_INLINE Ints<L> drawn_at(const uint16_t *draws) {
    return __builtin_convertvector(load_bytes<Vec<uint16_t, L>>(draws), Ints<L>);
}

// x scaled up where its draw is at least q, else exactly 0.
template <class T>
FLORA_INLINE Vec<T, LANES<T>> masked(Vec<T, LANES<T>> x, Ints<LANES<T>> drawn, const Draws &key) {
    constexpr int L = LANES<T>;
    auto keep = (Vec<int32_t, L>)drawn >= key.q;
    x *= static_cast<T>(key.scale);
    if constexpr (sizeof(T) == 8) {
        return bits_as<Vec<T, L>>(bits_as<Vec<int64_t, L>>(x) & __builtin_convertvector(keep, Vec<int64_t, L>));
    } else {
        return bits_as<Vec<T, L>>(bits_as<Vec<int32_t, L>>(x) & keep);
    }
}

template <class T>
FLORA_INLINE Vec<T, LANES<T>> masked(Vec<T, LANES<T>> x, const uint16_t *draws, const Draws &key) {
    return masked<T>(x, drawn_at<LANES<T>>(draws), key);
}

// The bits of a float whose upper half is its bf16, to nearest, ties to even. A NaN that an operation made stays one.
template <int L>
FLORA_INLINE Ints<L> rounded_up(Vec<float, L> value) {
    Ints<L> bits = bits_as<Ints<L>>(value);
#if defined(__AVX512F__)
    if constexpr (L == 16) {
        __m512i x = bits_as<__m512i>(value);
        __mmask16 number = _mm512_cmp_ps_mask(bits_as<__m512>(value), bits_as<__m512>(value), _CMP_ORD_Q);
        __mmask16 odd = _mm512_mask_test_epi32_mask(number, x, _mm512_set1_epi32(0x10000));
        x = _mm512_mask_add_epi32(x, number, x, _mm512_set1_epi32(0x7FFF));
        return bits_as<Ints<L>>(_mm512_mask_sub_epi32(x, odd, x, _mm512_set1_epi32(-1)));
    }
#endif
    return bits + ((0x7FFF + (bits >> 16 & 1)) & (Ints<L>)(value == value));
}

// The same with a draw instead of a half; what is not finite is cut.
template <int L>
FLORA_INLINE Ints<L> drawn_up(Vec<float, L> value, Ints<L> draw) {
    Ints<L> bits = bits_as<Ints<L>>(value);
    // A carry would turn a NaN into something else.
    return bits + ((Ints<L>)((bits & 0x7F800000) != 0x7F800000) & draw);
}

// The upper halves of two vectors of bits as a vector of pairs.
template <int L>
FLORA_INLINE Ints<L> upper_pair(Ints<L> even, Ints<L> odd) {
    return even >> 16 | (odd & UPPER);
}

// A pair of vectors meets memory.
template <Mode MODE>
FLORA_INLINE void finish_pair(Vec<float, LANES<float>> even, Vec<float, LANES<float>> odd, uint16_t *out, int16_t *low,
                              const uint16_t *draws, const Draws &key) {
    constexpr int L = LANES<float>;
    typedef Vec<float, L> V;
    typedef Ints<L> U;
    U drawn = {};
    if constexpr (MODE == ADD_MASKED || MODE == ADD_STOCHASTIC) drawn = load_bytes<U>(draws);
    if constexpr (MODE == ADD_MASKED) {
        even = masked<float>(even, drawn & 0xFFFF, key);
        odd = masked<float>(odd, drawn >> 16, key);
    }
    if constexpr (MODE == ADD_LOW_BITS) {
        U high = load_bytes<U>(out), below = load_bytes<U>(low);
        U even_bits = bits_as<U>(bits_as<V>((high << 16) + (U)((Vec<int32_t, L>)(below << 16) >> 16)) + even);
        U odd_bits = bits_as<U>(bits_as<V>((high & UPPER) + (U)((Vec<int32_t, L>)below >> 16)) + odd);
        store_bytes(out, upper_pair<L>(even_bits + 0x8000, odd_bits + 0x8000));
        store_bytes(low, (even_bits & 0xFFFF) | odd_bits << 16);
        return;
    }
    U pairs = load_bytes<U>(out);
    even = bits_as<V>(pairs << 16) + even;
    odd = bits_as<V>(pairs & UPPER) + odd;
    if constexpr (MODE == ADD_STOCHASTIC)
        store_bytes(out, upper_pair<L>(drawn_up<L>(even, drawn & 0xFFFF), drawn_up<L>(odd, drawn >> 16)));
    else store_bytes(out, upper_pair<L>(rounded_up<L>(even), rounded_up<L>(odd)));
}

// A vector meets memory.
template <class T, class E, Mode MODE>
FLORA_INLINE void finish(Vec<T, LANES<T>> sum, typename E::raw *out, int16_t *low, const uint16_t *draws,
                         const Draws &key) {
    constexpr int L = LANES<T>;
    if constexpr (MODE == ADD) {
        store<T, E>(out, load<T, E>(out) + sum);
    } else if constexpr (MODE == ADD_MASKED) {
        store<T, E>(out, load<T, E>(out) + masked<T>(sum, draws, key));
    } else if constexpr (MODE == ADD_LOW_BITS) {
        auto high = __builtin_convertvector(load_bytes<Vec<uint16_t, L>>(out), Ints<L>) << 16;
        auto below = __builtin_convertvector(load_bytes<Vec<int16_t, L>>(low), Vec<int32_t, L>);
        auto master = bits_as<Vec<float, L>>(high + (Ints<L>)below);
        auto total = __builtin_convertvector(__builtin_convertvector(master, Vec<T, L>) + sum, Vec<float, L>);
        auto bits = bits_as<Ints<L>>(total);
        store_bytes(out, __builtin_convertvector((bits + 0x8000) >> 16, Vec<uint16_t, L>));
        store_bytes(low, __builtin_convertvector(bits, Vec<uint16_t, L>));
    } else {
        auto total = __builtin_convertvector(load<T, E>(out) + sum, Vec<float, L>);
        store_bytes(out, __builtin_convertvector(drawn_up<L>(total, drawn_at<L>(draws)) >> 16, Vec<uint16_t, L>));
    }
}

// A tile's row of sums meets memory; low and draws are read where the mode needs them.
template <class T, class E, Mode MODE>
FLORA_INLINE void finish_row(const Vec<T, LANES<T>> *sums, typename E::raw *out, int16_t *low, const uint16_t *draws,
                             const Draws &key) {
    constexpr int L = LANES<T>, PAIRED = __is_same(E, Bf16) && sizeof(T) == 4, EACH = PAIRED ? 2 : 1;
    static_assert(PRODUCT_VECTORS<T> % EACH == 0, "a row of bf16 is whole pairs of vectors");
#pragma GCC unroll 8
    for (int v = 0; v < PRODUCT_VECTORS<T>; v += EACH) {
        int16_t *low_at = MODE == ADD_LOW_BITS ? low + v * L : nullptr;
        const uint16_t *draws_at = MODE == ADD_MASKED || MODE == ADD_STOCHASTIC ? draws + v * L : nullptr;
        if constexpr (PAIRED) finish_pair<MODE>(sums[v], sums[v + 1], out + v * L, low_at, draws_at, key);
        else finish<T, E, MODE>(sums[v], out + v * L, low_at, draws_at, key);
    }
}

}  // namespace FLORA_ISA
}  // namespace flora
