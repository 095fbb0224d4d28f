// Products with packed bases in 8 bits.
//
// The other operand is rounded to 16 bits, so that products sum up in integers, exactly: whatever
// is within 2^7 of a block's largest number stays the bfloat16 it was.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"
#include "outer.h"
#include "packed.h"
#include "platform.h"
#include "vectors.h"

namespace {

// 32 neighbours in 16 bits with a step that is a power of two.
struct Rounded {
    const int16_t* numbers;
    const float* steps;
};

#if defined(JD_AVX512_BF16)
static_assert(kStepBlock == 32 && kLanes == 16 && kLanes == W, "what follows is written for these");

JD_INLINE float power_of_two(int exponent) {  // biased, 1 ... 254
    uint32_t bits = (uint32_t)exponent << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

// Round 32 bfloat16 to 16 bits; the step.
JD_INLINE float round_block(__m512i raw, int16_t* out) {
    __m512i size = _mm512_and_si512(raw, _mm512_set1_epi16(0x7fff));
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(size),
                                    _mm512_extracti64x4_epi64(size, 1));
    __m128i eighth = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    __m128i least = _mm_minpos_epu16(_mm_xor_si128(eighth, _mm_set1_epi32(-1)));
    int exponent = (0xffff - _mm_extract_epi16(least, 0)) >> 7;
    int up = std::min(268 - exponent, 253);  // the largest becomes 2^14 ... 2^15 - 2^7
    __m512 scale = _mm512_set1_ps(power_of_two(up));
    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(0xffff0000)));
    __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even, scale));
    __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(odd, scale));
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaau, low,
                                                     _mm512_slli_epi32(high, 16)));
    return exponent == 255 ? NAN : power_of_two(254 - up);
}

JD_INLINE void round_numbers(const bf16* x, int d, int16_t* numbers, float* steps) {
    int i = 0;
    for (; i + 32 <= d; i += 32)
        *steps++ = round_block(_mm512_loadu_si512(x + i), numbers + i);
    if (i < d) *steps = round_block(_mm512_maskz_loadu_epi16((1u << (d - i)) - 1u, x + i),
                                    numbers + i);
}

JD_INLINE __m512 load_steps(const char* p) {
    return (__m512)load((const bf16*)p);
}

JD_INLINE __m512i load_pairs(const char* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}

JD_INLINE __m512i splat_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}

// out[t][j] = V[j] . x[t] for T tokens
template <int T>
void dot_codes(const char* p, int rank, const Rounded* x, int d, float* const* out, bool first) {
    constexpr int kChains = 4 / T;  // sums that need not wait for each other
    for (int j = 0; j < rank; j += kLanes) {
        __m512 sum[T];
        JD_UNROLL for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_ps();
        for (int i = 0; i < d; i += 32) {
            fetch_ahead<kLanes * 34>(p, first);
            __m512 steps = load_steps(p);
            p += kLanes * 2;
            __m512i part[4];
            JD_UNROLL for (int k = 0; k < 4; ++k) part[k] = _mm512_setzero_si512();
            JD_UNROLL for (int k = 0; k < 32; k += 2) {
                __m512i codes = load_pairs(p);
                p += kLanes * 2;
                JD_UNROLL for (int t = 0; t < T; ++t) {
                    __m512i& mine = part[t * kChains + k / 2 % kChains];
                    mine = _mm512_dpwssd_epi32(mine, codes, splat_pair(x[t].numbers + i + k));
                }
            }
            JD_UNROLL for (int t = 0; t < T; ++t) {
                __m512i whole = part[t * kChains];
                JD_UNROLL for (int k = 1; k < kChains; ++k)
                    whole = _mm512_add_epi32(whole, part[t * kChains + k]);
                sum[t] = _mm512_fmadd_ps(
                    _mm512_cvtepi32_ps(whole),
                    _mm512_mul_ps(steps, _mm512_set1_ps(x[t].steps[i / kStepBlock])), sum[t]);
            }
        }
        uint32_t lanes = rank - j >= kLanes ? 0xffffu : (1u << (rank - j)) - 1u;
        JD_UNROLL for (int t = 0; t < T; ++t) _mm512_mask_storeu_ps(out[t] + j, lanes, sum[t]);
    }
}

// The exponent (biased) of the largest of some numbers.
JD_INLINE int largest_exponent(const float* p, int n) {
    __m512i largest = _mm512_setzero_si512();
    for (int j = 0; j < n; j += kLanes) {
        uint32_t lanes = n - j >= kLanes ? 0xffffu : (1u << (n - j)) - 1u;
        __m512i bits = _mm512_maskz_loadu_epi32(lanes, p + j);
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    return _mm512_reduce_max_epu32(largest) >> 23;
}

// A token's h, by a power of two less than 2^14, and what its products are to be taken by.
struct Weights {
    alignas(64) float h[kMaxInt8Rank];
    float down;

    void set(const float* from, int rank) {
        int exponent = largest_exponent(from, rank);
        int up = std::clamp(267 - exponent, 1, 253);
        __m512 scale = _mm512_set1_ps(power_of_two(up));
        for (int j = 0; j < rank; j += kLanes) {
            uint32_t lanes = rank - j >= kLanes ? 0xffffu : (1u << (rank - j)) - 1u;
            _mm512_store_ps(h + j, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, from + j), scale));
        }
        down = exponent == 255 ? NAN : power_of_two(254 - up);
    }
};

// kStepBlock columns of y[t] += scale[t] * U^T h[t], U's steps times `power`
template <int T>
JD_INLINE void outer_block(const char* p, float power, int rank, const Weights* h,
                           const Output<bf16>* out, int column, Pass pass, bool first) {
    alignas(64) int16_t weights[T][kMaxInt8Rank];
    for (int j = 0; j < rank; j += kLanes, p += kLanes * 2) {
        fetch_ahead<kLanes * 34>(p + (int64_t)j * 32, first);
        __m512 steps = load_steps(p);
        JD_UNROLL for (int t = 0; t < T; ++t) {
            __m512i weight = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(h[t].h + j), steps));
            _mm256_store_si256((__m256i*)(weights[t] + j), _mm512_cvtsepi32_epi16(weight));
        }
    }
    __m512i part[T][2];
    JD_UNROLL for (int t = 0; t < T; ++t) part[t][0] = part[t][1] = _mm512_setzero_si512();
    for (int j = 0; j < rank; j += 2, p += 64) {
        __m512i first = load_pairs(p), second = load_pairs(p + 32);
        JD_UNROLL for (int t = 0; t < T; ++t) {
            __m512i pair = splat_pair(weights[t] + j);
            part[t][0] = _mm512_dpwssd_epi32(part[t][0], first, pair);
            part[t][1] = _mm512_dpwssd_epi32(part[t][1], second, pair);
        }
    }
    vf sum[T][2];
    JD_UNROLL for (int t = 0; t < T; ++t)
        JD_UNROLL for (int k = 0; k < 2; ++k)
            sum[t][k] = (vf)_mm512_cvtepi32_ps(part[t][k]) * splat(h[t].down * power);
    if (pass.first && pass.last && !pass.scaled) {
        JD_UNROLL for (int t = 0; t < T; ++t) {
            bf16* y = out[t].y + column;
            auto both = _mm512_cvtne2ps_pbh((__m512)(load(y + W) + sum[t][1]),
                                            (__m512)(load(y) + sum[t][0]));
            std::memcpy(y, &both, sizeof both);
        }
        return;
    }
    JD_UNROLL for (int t = 0; t < T; ++t)
        JD_UNROLL for (int k = 0; k < 2; ++k) {
            vf whole;
            begin_sums<1, 1>(out + t, column + k * W, pass, &whole);
            whole += sum[t][k];
            finish_sums<1, 1, true>(out + t, column + k * W, 0, pass, &whole);
        }
}

// y[t] += scale[t] * U^T h[t] for `columns` columns from a column on
template <int T>
void outer_codes(const char* data, int64_t width, int from, int rank, const float* const* h,
                 const Output<bf16>* out, int columns, Pass pass, bool first) {
    Weights weights[T];
    for (int t = 0; t < T; ++t) weights[t].set(h[t], rank);
    const float* powers = (const float*)data + from / kStepBlock;
    data += u_powers_bytes(width) + from / kStepBlock * u_codes_block_bytes(rank);
    for_columns<T, kStepBlock>(out, columns, pass, [&](const Output<bf16>* out, int column)
                       JD_INLINE_LAMBDA {
        outer_block<T>(data, *powers++, rank, weights, out, column, pass, first);
        data += u_codes_block_bytes(rank);
    });
}
#else  // no row is packed (kCanPack)
inline void round_numbers(const bf16*, int, int16_t*, float*) {}
template <int T> void dot_codes(const char*, int, const Rounded*, int, float* const*, bool) {}
template <int T>
void outer_codes(const char*, int64_t, int, int, const float* const*, const Output<bf16>*, int,
                 Pass, bool) {}
#endif

}  // namespace
