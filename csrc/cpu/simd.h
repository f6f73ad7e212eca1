// Vectors of this file's instruction set: load, store and round every element type, sums in float or double.
//
// Each isa_*.cpp compiles these headers once with its own flags, inside its own namespace FLORA_ISA. Nothing here may
// include a C++ standard header: an inline function of one, compiled for AVX-512, could be the copy that the linker
// keeps for all.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "flora_kernels.h"

#define FLORA_INLINE static inline __attribute__((always_inline))

namespace flora {
namespace FLORA_ISA {

template <class E, int LANES>
struct VecOf {
    typedef E type __attribute__((vector_size(sizeof(E) * LANES)));
};
template <class E, int LANES>
using Vec = typename VecOf<E, LANES>::type;

// 9 x 3 vectors fill 27 of AVX-512's 32 registers with the fewest instructions for each product: up to a quarter faster
// than 12 x 2 in double where a neighbour shares the core.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 9, TILE_MOST_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 6, TILE_MOST_VECTORS = 2;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 4, TILE_MOST_VECTORS = 2;
#endif

// T is the type of a sum: float or double.
template <class T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));
// A tile is wide enough for whole groups of eight draws.
template <class T>
constexpr int TILE_VECTORS = LANES<T> * TILE_MOST_VECTORS < 8 ? 8 / LANES<T> : TILE_MOST_VECTORS;
template <class T>
constexpr int TILE_COLUMNS = TILE_VECTORS<T> * LANES<T>;

// Element types in memory.
struct Fp32 {
    typedef float raw;
};
struct Fp64 {
    typedef double raw;
};
struct Bf16 {
    typedef uint16_t raw;
};
struct Fp16 {
    typedef uint16_t raw;
};

template <class V>
FLORA_INLINE V load_bytes(const void *from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(V));
    return value;
}

template <class V>
FLORA_INLINE void store_bytes(void *to, V value) {
    __builtin_memcpy(to, &value, sizeof(V));
}

template <class To, class From>
FLORA_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits_as keeps the bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

// fp16, one at a time: where there is no instruction for it, and for single elements.
FLORA_INLINE float half_to_float(uint16_t half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
    // A normal number is rebiased; a subnormal one is a whole number of 2^-24.
    if (rest < 0x400) return bits_as<float>(bits_as<uint32_t>(static_cast<float>(rest) * 0x1p-24f) | sign);
    return bits_as<float>(sign | (rest >= 0x7C00 ? 0x7F800000 | (rest & 0x3FF) << 13 : (rest << 13) + 0x38000000));
}

FLORA_INLINE uint16_t float_to_half(float value) {
    uint32_t bits = bits_as<uint32_t>(value), rest = bits & 0x7FFFFFFF;
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
    if (rest < 0x38800000) {
        // Adding 0.5 rounds to a whole number of 2^-24, in the low bits of the sum.
        uint32_t sum = bits_as<uint32_t>(bits_as<float>(rest) + 0.5f);
        return static_cast<uint16_t>(sign | (sum - 0x3F000000));
    }
    return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
}

template <int L>
FLORA_INLINE Vec<float, L> halves_to_floats(Vec<uint16_t, L> halves) {
#if defined(__AVX512F__)
    if constexpr (L == 16) return bits_as<Vec<float, L>>(_mm512_cvtph_ps(bits_as<__m256i>(halves)));
#endif
#if defined(__F16C__)
    if constexpr (L == 8) return bits_as<Vec<float, L>>(_mm256_cvtph_ps(bits_as<__m128i>(halves)));
    if constexpr (L == 4) return bits_as<Vec<float, L>>(_mm_cvtph_ps(_mm_cvtsi64_si128(bits_as<long long>(halves))));
#endif
    Vec<float, L> floats;
    for (int i = 0; i < L; ++i) floats[i] = half_to_float(halves[i]);
    return floats;
}

template <int L>
FLORA_INLINE Vec<uint16_t, L> floats_to_halves(Vec<float, L> floats) {
    typedef Vec<uint16_t, L> Halves;
#if defined(__AVX512F__)
    if constexpr (L == 16)
        return bits_as<Halves>(_mm512_cvtps_ph(bits_as<__m512>(floats), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
    if constexpr (L == 8)
        return bits_as<Halves>(_mm256_cvtps_ph(bits_as<__m256>(floats), _MM_FROUND_TO_NEAREST_INT));
    if constexpr (L == 4) {
        __m128i halves = _mm_cvtps_ph(bits_as<__m128>(floats), _MM_FROUND_TO_NEAREST_INT);
        return bits_as<Halves>(_mm_cvtsi128_si64(halves));
    }
#endif
    Halves halves;
    for (int i = 0; i < L; ++i) halves[i] = float_to_half(floats[i]);
    return halves;
}

template <int L>
FLORA_INLINE Vec<float, L> bf16_to_floats(Vec<uint16_t, L> halves) {
#if defined(__AVX512F__)  // GCC would widen in two halves
    if constexpr (L == 16)
        return bits_as<Vec<float, L>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits_as<__m256i>(halves)), 16));
#endif
    return bits_as<Vec<float, L>>(__builtin_convertvector(halves, Vec<uint32_t, L>) << 16);
}

// To nearest, ties to even; a NaN stays one.
template <int L>
FLORA_INLINE Vec<uint16_t, L> floats_to_bf16(Vec<float, L> floats) {
    Vec<uint32_t, L> bits = bits_as<Vec<uint32_t, L>>(floats), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#if defined(__AVX512F__)
    if constexpr (L == 16) {
        __mmask16 nan = _mm512_cmp_ps_mask(bits_as<__m512>(floats), bits_as<__m512>(floats), _CMP_UNORD_Q);
        __m512i kept = _mm512_mask_mov_epi32(bits_as<__m512i>(rounded), nan, _mm512_set1_epi32(0x7FC0));
        return bits_as<Vec<uint16_t, L>>(_mm512_cvtepi32_epi16(kept));
    }
#endif
    Vec<uint32_t, L> nan = (Vec<uint32_t, L>)(floats != floats);
    return __builtin_convertvector((nan & 0x7FC0) | (~nan & rounded), Vec<uint16_t, L>);
}

// LANES<T> elements of type E, widened to T.
template <class T, class E>
FLORA_INLINE Vec<T, LANES<T>> load(const typename E::raw *from) {
    constexpr int L = LANES<T>;
    auto raw = load_bytes<Vec<typename E::raw, L>>(from);
    if constexpr (__is_same(E, Bf16)) return __builtin_convertvector(bf16_to_floats<L>(raw), Vec<T, L>);
    else if constexpr (__is_same(E, Fp16)) return __builtin_convertvector(halves_to_floats<L>(raw), Vec<T, L>);
    else return __builtin_convertvector(raw, Vec<T, L>);
}

// Rounded to nearest; a double goes to 16 bits through float.
template <class T, class E>
FLORA_INLINE void store(typename E::raw *to, Vec<T, LANES<T>> value) {
    constexpr int L = LANES<T>;
    if constexpr (__is_same(E, Bf16)) store_bytes(to, floats_to_bf16<L>(__builtin_convertvector(value, Vec<float, L>)));
    else if constexpr (__is_same(E, Fp16))
        store_bytes(to, floats_to_halves<L>(__builtin_convertvector(value, Vec<float, L>)));
    else store_bytes(to, __builtin_convertvector(value, Vec<typename E::raw, L>));
}

// One element.
template <class T, class E>
FLORA_INLINE T load_one(const typename E::raw *from) {
    if constexpr (__is_same(E, Bf16)) return bits_as<float>(static_cast<uint32_t>(*from) << 16);
    else if constexpr (__is_same(E, Fp16)) return half_to_float(*from);
    else return static_cast<T>(*from);
}

template <class T, class E>
FLORA_INLINE void store_one(typename E::raw *to, T value) {
    if constexpr (__is_same(E, Bf16) || __is_same(E, Fp16)) {
        Vec<T, LANES<T>> many = value - Vec<T, LANES<T>>{};
        typename E::raw rounded[LANES<T>];
        store<T, E>(rounded, many);
        *to = rounded[0];
    } else {
        *to = static_cast<typename E::raw>(value);
    }
}

// The value as a 16-bit dtype would hold it; FLORA_FP32 and FLORA_FP64 leave it alone.
template <class T>
FLORA_INLINE Vec<T, LANES<T>> through(Vec<T, LANES<T>> value, int32_t dtype) {
    constexpr int L = LANES<T>;
    Vec<float, L> floats = __builtin_convertvector(value, Vec<float, L>);
    if (dtype == FLORA_BF16) floats = bf16_to_floats<L>(floats_to_bf16<L>(floats));
    else if (dtype == FLORA_FP16) floats = halves_to_floats<L>(floats_to_halves<L>(floats));
    else return value;
    return __builtin_convertvector(floats, Vec<T, L>);
}

// Call do_it(E{}) for the element type of a dtype code.
template <class F>
FLORA_INLINE void with_element(int32_t dtype, F do_it) {
    switch (dtype) {
        case FLORA_FP32: return do_it(Fp32{});
        case FLORA_BF16: return do_it(Bf16{});
        case FLORA_FP16: return do_it(Fp16{});
        default: return do_it(Fp64{});
    }
}

FLORA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FLORA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FLORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace FLORA_ISA
}  // namespace flora
