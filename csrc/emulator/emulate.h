// Warp instructions by their documented fragment layouts (PTX ISA 9.0, sections "ldmatrix" and "mma.m16n8k16").
//
// In every fragment g = lane / 4 and t = lane % 4. A register holds two 16-bit numbers, the lower half first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

namespace shim {

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
inline uint16_t float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if (std::isnan(value)) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float fp16_to_float(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                : std::ldexp(float(exponent ? fraction | 1024 : fraction), (exponent ? exponent : 1) - 25);
    return half >> 15 ? -size : size;
}
inline uint16_t float_to_fp16(float value) {
    uint16_t sign = uint16_t(float_to_bits(value) >> 16 & 0x8000);
    if (std::isnan(value)) return 0x7FFF;
    float size = std::fabs(value);
    if (size >= 65520.0f) return uint16_t(sign | 0x7C00);
    int exponent;
    std::frexp(size, &exponent);
    if (size < 0x1p-14f) exponent = -13;  // below 2^-14 the numbers lie evenly
    // nearbyint rounds ties to even; a fraction that grows to 2048 carries into the exponent by itself.
    int fraction = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return uint16_t(sign | (((exponent + 13) << 10) + fraction));
}

// Four 8x8 matrices of 16-bit numbers: lanes 8m .. 8m + 7 bring the rows of matrix m.
struct LoadMatrix {
    const void *row;
    uint32_t *r;
};
inline void ldmatrix(uint32_t *r, const void *row, bool transposed, const char *file, int line) {
    Machine &m = machine();
    m.check("shared memory:", "reads", row, 16, false);
    bool flip = transposed != m.faulty("transpose", "ldmatrix", file, line);
    bool swapped = m.faulty("swap", "ldmatrix", file, line);
    LoadMatrix mine{row, r};
    m.meet(mine, file, line, [&](LoadMatrix **all) {
        for (int i = 0; i < 4; ++i) {
            for (int lane = 0; lane < 32; ++lane) {
                uint16_t pair[2];
                for (int h = 0; h < 2; ++h) {
                    int across = lane / 4, along = lane % 4 * 2 + h;
                    if (flip) std::swap(across, along);
                    memcpy(&pair[h], static_cast<const char *>(all[8 * i + across]->row) + 2 * along, 2);
                }
                memcpy(&all[lane]->r[swapped && (i == 1 || i == 2) ? 3 - i : i], pair, 4);
            }
        }
    });
}

// C (16, 8) += A (16, 16) B (16, 8). The hardware's order of additions is not documented; it is known to cut off where
// IEEE would round (Fasi et al., PeerJ CS 2021), so the exact sum is cut towards zero here.
struct Multiply {
    const uint32_t *a, *b;
    float *c;
};
template <float (*widen)(uint16_t)>
void mma_16816(float *c, const uint32_t *a, const uint32_t *b, const char *file, int line) {
    Machine &m = machine();
    bool swapped = m.faulty("swap", "mma", file, line);
    Multiply mine{a, b, c};
    m.meet(mine, file, line, [&](Multiply **all) {
        double left[16][16], right[8][16];
        for (int lane = 0; lane < 32; ++lane) {
            int g = lane / 4, t = lane % 4;
            for (int h = 0; h < 2; ++h) {
                for (int i = 0; i < 4; ++i) {
                    int from = swapped && (i == 1 || i == 2) ? 3 - i : i;
                    left[g + i % 2 * 8][2 * t + h + i / 2 * 8] = double(widen(uint16_t(all[lane]->a[from] >> 16 * h)));
                }
                for (int i = 0; i < 2; ++i) right[g][2 * t + h + i * 8] = double(widen(uint16_t(all[lane]->b[i] >> 16 * h)));
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                double sum = double(all[lane]->c[i]);
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
                float cut = float(sum);
                if (std::fabs(double(cut)) > std::fabs(sum) && std::isfinite(cut)) cut = std::nextafter(cut, 0.0f);
                all[lane]->c[i] = cut;
            }
        }
    });
}

struct Shuffle {
    uint32_t value;
    int source;
};
inline uint32_t shuffle(uint32_t value, int source, const char *file, int line) {
    Shuffle mine{value, source};
    bool broken = machine().faulty("skip", "shuffle", file, line);
    machine().meet(mine, file, line, [&](Shuffle **all) {
        uint32_t given[32];
        for (int lane = 0; lane < 32; ++lane) given[lane] = all[lane]->value;
        for (int lane = 0; lane < 32 && !broken; ++lane) all[lane]->value = given[all[lane]->source & 31];
    });
    return mine.value;
}

inline void sync_warp(const char *file, int line) {
    Shuffle mine{};
    machine().meet(mine, file, line, [](Shuffle **) { machine().next_stamp(); });
}

}  // namespace shim
