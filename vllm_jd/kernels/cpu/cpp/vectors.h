// Vectors of W floats, and the element types as which they are stored.

#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#if defined(JD_AVX512)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int kTile = W == 16 ? 16 : 8;  // accumulators that fit the registers beside operands

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

JD_INLINE vf madd(vf a, vf b, vf c) {
#if defined(JD_AVX512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

JD_INLINE vf splat(float value) { return value - vf{}; }

// Widening and rounding of the element types.

JD_INLINE vf widen(vf v, float) { return v; }

JD_INLINE vu zero_extend(vh v) {
#if defined(JD_AVX512)
    return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#else
    return __builtin_convertvector(v, vu);
#endif
}

JD_INLINE vf widen(vh v, bf16) { return (vf)(zero_extend(v) << 16); }

// The upper half of each lane becomes the nearest bfloat16; the lower half is left over.
JD_INLINE vu round_to_upper_half(vf v) {
    vu bits = (vu)v, nan = (vu)(v != v);
    return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (0x7fc00000u & nan);
}

JD_INLINE vh narrow(vf v, bf16) {
    return __builtin_convertvector(round_to_upper_half(v) >> 16, vh);
}

#if defined(JD_AVX512)
JD_INLINE vf widen(vh v, fp16) { return (vf)_mm512_cvtph_ps((__m256i)v); }
JD_INLINE vh narrow(vf v, fp16) {
    return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__) && defined(__AVX__)
JD_INLINE vf widen(vh v, fp16) { return (vf)_mm256_cvtph_ps((__m128i)v); }
JD_INLINE vh narrow(vf v, fp16) {
    return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
JD_INLINE vf widen(vh v, fp16) {
    // A float's exponent field reaches 112 further; the product moves normals and subnormals alike.
    vu bits = zero_extend(v), sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    vf scaled = (vf)magnitude * splat(0x1p112f);
    vu special = (vu)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return (vf)((vu)scaled | special | sign);
}
JD_INLINE vh narrow(vf v, fp16) {
    vu bits = (vu)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves a subnormal's bits, rounded, at the end of the mantissa.
    vu tiny = (vu)((vf)magnitude + splat(0.5f)) - (126u << 23);
    vu is_tiny = (vu)(magnitude < (113u << 23)), is_big = (vu)(normal > 0x7c00u);
    vu is_nan = (vu)(magnitude > 0x7f800000u);
    is_big |= (vu)(magnitude >= 0x7f800000u);
    vu result = (tiny & is_tiny) | (normal & ~is_tiny);
    result = (result & ~is_big) | (0x7c00u & is_big) | (0x200u & is_nan);
    return __builtin_convertvector((result & ~(vu)(is_tiny & is_big)) | sign, vh);
}
#endif
JD_INLINE vf narrow(vf v, float) { return v; }

template <class E> struct Stored { using type = vh; };
template <> struct Stored<float> { using type = vf; };

template <class E> JD_INLINE vf load(const E* p) {
    typename Stored<E>::type raw;
    std::memcpy(&raw, p, sizeof raw);
    return widen(raw, E{});
}

template <class E> JD_INLINE vf load_first(const E* p, int n) {
    typename Stored<E>::type raw{};
    std::memcpy(&raw, p, n * sizeof(E));
    return widen(raw, E{});
}

template <class E> JD_INLINE void store(E* p, vf v) {
    auto raw = narrow(v, E{});
    std::memcpy(p, &raw, sizeof raw);
}

template <class E> JD_INLINE void store_first(E* p, vf v, int n) {
    auto raw = narrow(v, E{});
    std::memcpy(p, &raw, n * sizeof(E));
}

// 2 W neighbouring columns as two vectors, in an order of the element type's own.
template <class E> struct Columns {
    static JD_INLINE void load2(const E* p, vf& a, vf& b) { a = load(p), b = load(p + W); }
    static JD_INLINE void add2(E* p, vf a, vf b) {
        store(p, load(p) + a);
        store(p + W, load(p + W) + b);
    }
};

// A lane of 32 bits holds two bfloat16, each one step from being a float: even, then odd columns.
template <> struct Columns<bf16> {
    static constexpr uint32_t kUpper = 0xffff0000u;
    static JD_INLINE void load2(const bf16* p, vf& even, vf& odd) {
        vu raw;
        std::memcpy(&raw, p, sizeof raw);
        even = (vf)(raw << 16), odd = (vf)(raw & kUpper);
    }
    static JD_INLINE void add2(bf16* p, vf even, vf odd) {
        vf y_even, y_odd;
        load2(p, y_even, y_odd);
        vu sum = round_to_upper_half(y_even + even) >> 16;
        sum |= round_to_upper_half(y_odd + odd) & kUpper;
        std::memcpy(p, &sum, sizeof sum);
    }
};

}  // namespace
