// Dot products of rows with tokens: tiles of T tokens x R rows in registers.

#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"
#include "prefetch.h"
#include "vectors.h"

namespace {

// How one step of a dot product of E with X is taken.
template <class E, class X> struct Dot {
    static constexpr int kStep = W;
    using Operand = vf;
    template <class P> static JD_INLINE Operand operand(const P* p) { return load(p); }
    template <class P> static JD_INLINE Operand operand_first(const P* p, int n) {
        return load_first(p, n);
    }
    static JD_INLINE vf step(vf sum, Operand a, Operand b) { return madd(a, b, sum); }
};

#if defined(JD_AVX512_BF16)
template <> struct Dot<bf16, bf16> {
    static constexpr int kStep = 32;
    using Operand = __m512i;
    static JD_INLINE Operand operand(const bf16* p) { return _mm512_loadu_si512(p); }
    static JD_INLINE Operand operand_first(const bf16* p, int n) {
        return _mm512_maskz_loadu_epi16((1u << n) - 1u, p);
    }
    static JD_INLINE vf step(vf sum, Operand a, Operand b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

#if defined(JD_AVX512)
// Lane i of the result is the sum of vector i. Every sum takes the same tree: halves, quarters,
// then lanes 0 + 2 and 1 + 3.
JD_INLINE __m512 sum_lanes16(const vf* v) {
    __m512 quarter[4];
    JD_UNROLL for (int i = 0; i < 4; ++i) {
        __m512 half[2];
        JD_UNROLL for (int k = 0; k < 2; ++k) {
            __m512 a = (__m512)v[8 * k + i], b = (__m512)v[8 * k + i + 4];
            half[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44),
                                    _mm512_shuffle_f32x4(a, b, 0xee));
        }
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                                   _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
    }
    __m512 pair[2];
    JD_UNROLL for (int i = 0; i < 2; ++i) {
        __m512 a = quarter[2 * i], b = quarter[2 * i + 1];
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x44),
                         _mm512_shuffle_ps(pair[0], pair[1], 0xee));
}
#endif

template <int N> JD_INLINE void sum_lanes(const vf* v, float* out) {
#if defined(JD_AVX512)
    vf padded[16] = {};
    JD_UNROLL for (int i = 0; i < N; ++i) padded[i] = v[i];
    float sums[16];
    _mm512_storeu_ps(sums, sum_lanes16(padded));
    std::memcpy(out, sums, N * sizeof(float));
#else
    for (int i = 0; i < N; ++i) {
        float lanes[W];
        std::memcpy(lanes, &v[i], sizeof lanes);
        for (int width = W / 2; width > 0; width /= 2)
            for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
        out[i] = lanes[0];
    }
#endif
}

template <class E> struct Matrix {
    const E* data;
    int64_t stride;
    const E* row(int64_t i) const { return data + i * stride; }
};

// out[t][j] = rows[j] . x[t]
template <int T, int R, class E, class X>
JD_INLINE void dot_tile(Matrix<E> rows, const X* const* x, int d, float* const* out, int column,
                        Prefetch& ahead) {
    using D = Dot<E, X>;
    vf sum[T * R] = {};
    int i = 0;
    for (; i + D::kStep <= d; i += D::kStep) {
        ahead.step();
        typename D::Operand xs[T];
        const E* row = rows.data + i;
        JD_UNROLL for (int t = 0; t < T; ++t) xs[t] = D::operand(x[t] + i);
        JD_UNROLL for (int j = 0; j < R; ++j) {
            auto a = D::operand(row);
            row += rows.stride;
            asm("" : "+r"(row));  // one moving pointer: R kept ones would not fit the registers
            JD_UNROLL for (int t = 0; t < T; ++t)
                sum[t * R + j] = D::step(sum[t * R + j], a, xs[t]);
        }
    }
    if (i < d) {
        JD_UNROLL for (int j = 0; j < R; ++j) {
            auto a = D::operand_first(rows.row(j) + i, d - i);
            JD_UNROLL for (int t = 0; t < T; ++t)
                sum[t * R + j] = D::step(sum[t * R + j], a, D::operand_first(x[t] + i, d - i));
        }
    }
    float sums[T * R];
    sum_lanes<T * R>(sum, sums);
    for (int t = 0; t < T; ++t) std::memcpy(out[t] + column, sums + t * R, R * sizeof(float));
}

template <int T, int R, class E, class X>
void dot_rows(Matrix<E> rows, int n_rows, const X* const* x, int d, float* const* out, int done,
              Prefetch& ahead) {
    for (; n_rows - done >= R; done += R)
        dot_tile<T, R>(Matrix<E>{rows.row(done), rows.stride}, x, d, out, done, ahead);
    if constexpr (R > 1)
        if (done < n_rows) dot_rows<T, R / 2>(rows, n_rows, x, d, out, done, ahead);
}

// out[t][j] = rows[j] . x[t] for n tokens
template <class E, class X>
void dot_tokens(Matrix<E> rows, int n_rows, const X* const* x, int d, float* const* out, int n,
                Prefetch& ahead) {
    int t = 0;
    for (; t + 4 <= n; t += 4) dot_rows<4, kTile / 4>(rows, n_rows, x + t, d, out + t, 0, ahead);
    for (; t + 2 <= n; t += 2) dot_rows<2, kTile / 2>(rows, n_rows, x + t, d, out + t, 0, ahead);
    for (; t < n; ++t) dot_rows<1, kTile>(rows, n_rows, x + t, d, out + t, 0, ahead);
}

// out[j] = a[j] b[j]
template <class E> void multiply(const E* a, const float* b, int n, float* out) {
    int j = 0;
    for (; j + W <= n; j += W) store(out + j, load(a + j) * load(b + j));
    if (j < n) store_first(out + j, load_first(a + j, n - j) * load_first(b + j, n - j), n - j);
}

}  // namespace
