// What the processor has, and words for the compiler.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define JD_AVX512 1
#endif
#if defined(JD_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define JD_AVX512_BF16 1  // no processor has the one without the other
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define JD_INLINE inline __attribute__((always_inline))
#define JD_INLINE_LAMBDA __attribute__((always_inline))
#define JD_UNROLL _Pragma("GCC unroll 16")

namespace {

// Whether this kernel takes packed bases.
#if defined(JD_AVX512_BF16)
constexpr bool kCanPack = true;
#else
constexpr bool kCanPack = false;
#endif

constexpr const char* kInstructionSet =
#if defined(JD_AVX512_BF16)
    "avx512_bf16";
#elif defined(JD_AVX512)
    "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    "avx2";
#else
    "portable";
#endif

}  // namespace
