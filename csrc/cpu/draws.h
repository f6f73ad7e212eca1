// 16-bit draws of Philox4x32-7 (Salmon et al., SC 2011), as reference.py defines them: key = seed (low, high word),
// counter = (column / 8, row, 0, stream); the eight halves of its four words, low half first, are a group's columns.
#pragma once

#include "simd.h"

namespace flora {
namespace FLORA_ISA {

// Dropout of one client, or the key of a stochastic rounding.
struct Draws {
    int64_t seed;
    int64_t first_row;
    int32_t q;       // threshold of dropout
    uint32_t stream; // 0 dropout, 1 rounding
    double scale;    // of what dropout keeps: 65536 / (65536 - q)
};

constexpr int DRAW_LANES = VECTOR_BYTES / 4;
typedef Vec<uint32_t, DRAW_LANES> Words;

FLORA_INLINE void multiply_wide(Words a, uint32_t by, Words &high, Words &low) {
#if defined(__AVX512F__)
    __m512i x = bits_as<__m512i>(a), m = _mm512_set1_epi32(static_cast<int>(by));
    __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
    low = bits_as<Words>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
    high = bits_as<Words>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
    __m256i x = bits_as<__m256i>(a), m = _mm256_set1_epi32(static_cast<int>(by));
    __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
    low = bits_as<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
    high = bits_as<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
    for (int i = 0; i < DRAW_LANES; ++i) {
        uint64_t product = static_cast<uint64_t>(a[i]) * by;
        high[i] = static_cast<uint32_t>(product >> 32);
        low[i] = static_cast<uint32_t>(product);
    }
#endif
}

// Draws of rows row .. row + rows and of `groups` groups of eight columns from column 8 * group on, row by row.
FLORA_INLINE void draw(const Draws &key, int64_t row, int rows, int64_t group, int groups, uint16_t *out) {
    int total = rows * groups;
    for (int start = 0; start < total; start += DRAW_LANES) {
        Words c0 = {}, c1 = {}, c2 = {}, c3 = {};
        int lanes = total - start < DRAW_LANES ? total - start : DRAW_LANES;
        for (int i = 0; i < lanes; ++i) {
            c0[i] = static_cast<uint32_t>(group + (start + i) % groups);
            c1[i] = static_cast<uint32_t>(key.first_row + row + (start + i) / groups);
        }
        c3 += key.stream;
        uint64_t seed = static_cast<uint64_t>(key.seed);
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 7; ++round) {
            Words high0, low0, high2, low2;
            multiply_wide(c0, 0xD2511F53u, high0, low0);
            multiply_wide(c2, 0xCD9E8D57u, high2, low2);
            c0 = high2 ^ c1 ^ k0;
            c1 = low2;
            c2 = high0 ^ c3 ^ k1;
            c3 = low0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < lanes; ++i) {
            uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
            for (int half = 0; half < 8; ++half)
                out[(start + i) * 8 + half] = static_cast<uint16_t>(words[half / 2] >> (half % 2 * 16));
        }
    }
}

}  // namespace FLORA_ISA
}  // namespace flora
