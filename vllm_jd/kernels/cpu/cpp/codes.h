// Rows of bases, and cores, in codes of 8 or 4 bits: neighbours share a step.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "constants.h"
#include "vectors.h"

namespace {

// Int8Rows of pools.py, or none of them.
struct Codes {
    const int8_t* codes;
    const uint16_t* steps;
    int64_t rows, width;
    int64_t steps_width() const { return (width + kStepBlock - 1) / kStepBlock; }
    const int8_t* row(int64_t i) const { return codes + i * width; }
    const uint16_t* row_steps(int64_t i) const { return steps + i * steps_width(); }
};

JD_INLINE float step_of(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float step;
    std::memcpy(&step, &wide, sizeof step);
    return step;
}

JD_INLINE vf load_codes(const int8_t* p) {
#if defined(JD_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    typedef int8_t vb __attribute__((vector_size(W)));
    typedef int32_t vi __attribute__((vector_size(W * 4)));
    vb raw;
    std::memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(__builtin_convertvector(raw, vi), vf);
#endif
}

static_assert(kStepBlock == 32, "decode_block and widen_codes are written for it");

// The numbers of one step
template <class E> JD_INLINE void decode_block(const int8_t* codes, float step, E* out) {
    vf steps = splat(step);
    for (int i = 0; i < kStepBlock; i += W) store(out + i, load_codes(codes + i) * steps);
}

#if defined(JD_AVX512_BF16)
JD_INLINE void decode_block(const int8_t* codes, float step, bf16* out) {
    vf steps = splat(step), low = load_codes(codes) * steps, high = load_codes(codes + W) * steps;
    auto both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(out, &both, sizeof both);
}
#endif

// The first n of a block's numbers.
template <class E> JD_INLINE void decode_first(const int8_t* codes, float step, int n, E* out) {
    int8_t last[kStepBlock] = {};
    E numbers[kStepBlock];
    std::memcpy(last, codes, n);
    decode_block(last, step, numbers);
    std::memcpy(out, numbers, n * sizeof(E));
}

// Codes [first, first + n) of some in 4 bits, n at most kStepBlock, as 8 bits.
JD_INLINE void widen_codes(const uint8_t* pairs, int64_t first, int n, int8_t* out) {
#if defined(__SSE2__)
    if (n == kStepBlock && first % 2 == 0) {
        __m128i both = _mm_loadu_si128((const __m128i*)(pairs + first / 2));
        __m128i mask = _mm_set1_epi8(15), middle = _mm_set1_epi8(8);
        __m128i even = _mm_sub_epi8(_mm_and_si128(both, mask), middle);
        __m128i odd = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), mask), middle);
        _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi8(even, odd));
        _mm_storeu_si128((__m128i*)(out + 16), _mm_unpackhi_epi8(even, odd));
        return;
    }
#endif
    for (int i = 0; i < n; ++i) {
        int64_t j = first + i;
        out[i] = (int8_t)((pairs[j / 2] >> (j % 2 * 4) & 15) - 8);
    }
}

// Entries [first, first + n) of a row of 8- or 4-bit codes, rounded to E.
template <class E>
void decode_entries(const void* codes, const uint16_t* steps, int bits, int64_t first, int n,
                    E* out) {
    for (int some; n > 0; first += some, n -= some, out += some) {
        some = std::min<int>(n, kStepBlock - first % kStepBlock);
        int8_t wide[kStepBlock];
        const int8_t* mine = (const int8_t*)codes + first;
        if (bits == 4) widen_codes((const uint8_t*)codes, first, some, wide), mine = wide;
        float step = step_of(steps[first / kStepBlock]);
        if (some == kStepBlock)
            decode_block(mine, step, out);
        else
            decode_first(mine, step, some, out);
    }
}

// Columns [first, first + n) of one row, first a multiple of kStepBlock, rounded to E.
template <class E>
void decode_row(const Codes& from, int64_t row, int first, int n, E* out) {
    const int8_t* codes = from.row(row) + first;
    const uint16_t* steps = from.row_steps(row) + first / kStepBlock;
    int i = 0;
    for (; i + kStepBlock <= n; i += kStepBlock)
        decode_block(codes + i, step_of(*steps++), out + i);
    if (i < n) decode_first(codes + i, step_of(*steps), n - i, out + i);
}

}  // namespace
