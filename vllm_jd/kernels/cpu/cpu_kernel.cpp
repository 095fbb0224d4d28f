// y[t] += sum over rows of scale * (U^T . core . V . x[t]), all slices of one layer in one call.
//
// Plan (serial): per slice, runs of tokens of one slot are sorted by their V, and cut into blocks
// of tokens that share it. Then each block goes through three stages on one thread:
//   shrink  z = V x      dot products, tiles of T tokens x R rows in registers
//   mix     h = core z   the same tiles: the core's rows against z; by element where diagonal
//   expand  y += U^T h   outer products, tiles of T tokens x C column vectors, scaled at their end
// A basis is read once per block, from memory only the first time. Rows in 8 bits are decoded on the
// way, a part at a time into a buffer that stays in the caches; packed in 8 bits they are not, and
// multiply as integers.
//
// One token's sums run in an order that depends on the layer's shape and its own rows alone: the
// tiles differ in what they share, never in how one number is summed. So a token's result is the
// same bits alone, in any batch, and with any number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define JD_AVX512 1
#endif
#if defined(JD_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define JD_AVX512_BF16 1  // no processor has the one without the other
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The OpenMP runtime is the one that torch has loaded: a runtime of our own would bring a second
// pool of threads, which vLLM does not bind to cores. Absent: one thread.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

#define JD_INLINE inline __attribute__((always_inline))
#define JD_INLINE_LAMBDA __attribute__((always_inline))
#define JD_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kBlock = 32;     // tokens that share one reading of a basis, at most
constexpr int kColumns = 256;  // columns of U that stay in L1 while a block's tokens pass
constexpr int kDecoded = 16;   // rows of V in 8 bits that are decoded at once
constexpr int kBasisWork = 4;  // reading a basis takes about as long as so many tokens' sums
constexpr double kSerialWork = 1 << 19;  // multiply-adds, some 20 us: less is not worth threads

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// ---------------------------------------------------------------- what Python hands over

// ROW_FIELDS and CORE_* of row.py.
enum Field { kVStart, kUStart, kRank, kCoreKind, kScaleRow, kCoreSlot, kCoreOffset, kFields };
enum CoreKind { kCoreNone, kCoreFull, kCoreDiagonal };

struct SliceData {
    const void *u, *scales, *u_codes, *u_steps;
    int64_t u_rows, u_stride, u_code_rows, d_out, first_column;
    int64_t scale_rows, scale_stride;
};

struct PoolsData {
    const void *v, *v_codes, *v_steps, *packed, *cores;
    const int32_t* rows;
    const SliceData* slices;
    int64_t v_rows, v_stride, v_code_rows, d_in;
    int64_t packed_bytes;
    int64_t core_slots, core_stride, core_length;
    int64_t slots, slot_stride, n_slices, rows_per_slice;
    int64_t element;           // 0 float32, 1 bfloat16, 2 float16
    int64_t packed_in_8_bits;  // or else bfloat16
    int64_t core_bits;         // of codes; 0: cores are numbers
    const void* core_steps;
    int64_t core_steps_stride;
};

// ---------------------------------------------------------------- vectors of W floats

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

// ---------------------------------------------------------------- rows in 8 bits

constexpr int kStepBlock = 32;  // INT8_BLOCK of pools.py: neighbours that share a step

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

// 32 numbers of one step
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

// Codes [first, first + n) of some in 4 bits, n at most 32, as 8 bits.
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

// Columns [first, first + n) of one row, first a multiple of 32, rounded to E.
template <class E>
void decode_row(const Codes& from, int64_t row, int first, int n, E* out) {
    const int8_t* codes = from.row(row) + first;
    const uint16_t* steps = from.row_steps(row) + first / kStepBlock;
    int i = 0;
    for (; i + kStepBlock <= n; i += kStepBlock)
        decode_block(codes + i, step_of(*steps++), out + i);
    if (i < n) decode_first(codes + i, step_of(*steps), n - i, out + i);
}

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

// ---------------------------------------------------------------- sums across lanes

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

// ---------------------------------------------------------------- tiles

template <class E> struct Matrix {
    const E* data;
    int64_t stride;
    const E* row(int64_t i) const { return data + i * stride; }
};

// Memory that will be wanted soon, asked for a few cache lines at a time between arithmetic, so
// that reading the next basis and computing with this one overlap.
class Prefetch {
  public:
    void clear() {
        regions.clear();
        next = end = nullptr;
        taken = 0;
        per_step = lines = 0;
    }
    void add(const void* begin, int64_t bytes) {
        regions.push_back({(const char*)begin, (const char*)begin + bytes});
        lines += bytes / kLine + 1;
    }
    // Spread what was added over so many steps.
    void spread(double steps) { per_step = (int)std::ceil(lines / std::max(steps, 1.0)); }
    JD_INLINE void step() {
        for (int i = 0; i < per_step; ++i, next += kLine) {
            if (next >= end && !next_region()) return;
            __builtin_prefetch(next, 0, 2);
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    struct Region { const char *begin, *end; };
    std::vector<Region> regions;
    size_t taken;
    const char *next, *end;
    int64_t lines;
    int per_step;

    bool next_region() {
        if (taken == regions.size()) return per_step = 0;
        next = regions[taken].begin;
        end = regions[taken++].end;
        return true;
    }
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

// Whether a row is its token's first, last or only one in the slice, and whether it has a scale.
// Sums go from row to row in float32, through `partial`; only the last row's round, into y.
struct Pass {
    bool first, last, scaled;
    bool operator!=(const Pass& o) const {
        return first != o.first || last != o.last || scaled != o.scaled;
    }
};

// Where a token's sums go: the row of y that they end in, of sums between passes, and its scale.
template <class E> struct Output {
    E* y;
    float* partial;
    const E* scale;
};

// C vectors from p, or the first `width` elements: in the order that sums of columns have.
template <int C, bool kWhole, class E>
JD_INLINE void load_columns(const E* p, int width, vf* out) {
    if constexpr (C == 1)
        out[0] = kWhole ? load(p) : load_first(p, width);
    else
        JD_UNROLL for (int c = 0; c < C; c += 2)
            Columns<E>::load2(p + c * W, out[c], out[c + 1]);
}

// Where the sums of T tokens and C vectors of columns begin: with a scale or in a token's first row
// anew, else at the sums of the rows before.
template <int T, int C, class E>
JD_INLINE void begin_sums(const Output<E>* out, int column, Pass pass, vf* sum) {
    JD_UNROLL for (int t = 0; t < T; ++t)
        JD_UNROLL for (int c = 0; c < C; ++c)
            sum[t * C + c] = pass.first || pass.scaled
                                 ? vf{} : load(out[t].partial + column + c * W);
}

// Scale them, add those of the rows before, and put them into y or aside.
template <int T, int C, bool kWhole, class E>
JD_INLINE void finish_sums(const Output<E>* out, int column, int width, Pass pass, vf* sum) {
    if (pass.scaled)
        JD_UNROLL for (int t = 0; t < T; ++t) {
            vf scale[C];
            load_columns<C, kWhole>(out[t].scale + column, width, scale);
            JD_UNROLL for (int c = 0; c < C; ++c) {
                vf before = pass.first ? vf{} : load(out[t].partial + column + c * W);
                sum[t * C + c] = madd(sum[t * C + c], scale[c], before);
            }
        }
    JD_UNROLL for (int t = 0; t < T; ++t) {
        E* place = out[t].y + column;
        if (!pass.last)
            JD_UNROLL for (int c = 0; c < C; ++c)
                store(out[t].partial + column + c * W, sum[t * C + c]);
        else if constexpr (C > 1)
            JD_UNROLL for (int c = 0; c < C; c += 2)
                Columns<E>::add2(place + c * W, sum[t * C + c], sum[t * C + c + 1]);
        else if constexpr (kWhole)
            store(place, load(place) + sum[t]);
        else
            store_first(place, load_first(place, width) + sum[t], width);
    }
}

// y[t][column...] += scale[t][column...] * sum over j of h[t][j] u[j][column...], C vectors wide or
// `width` elements.
template <int T, int C, bool kWhole, class E>
JD_INLINE void outer_tile(Matrix<E> u, int rank, const float* const* h, const Output<E>* out,
                          int column, int width, Pass pass, Prefetch& ahead) {
    vf sum[T * C];
    begin_sums<T, C>(out, column, pass, sum);
    const E* row = u.data + column;
    for (int j = 0; j < rank; ++j, row += u.stride) {
        ahead.step();
        vf us[C];
        load_columns<C, kWhole>(row, width, us);
        JD_UNROLL for (int t = 0; t < T; ++t) {
            vf weight = splat(h[t][j]);
            JD_UNROLL for (int c = 0; c < C; ++c)
                sum[t * C + c] = madd(us[c], weight, sum[t * C + c]);
        }
    }
    finish_sums<T, C, kWhole>(out, column, width, pass, sum);
}

template <int T, int C, class E>
void outer_columns(Matrix<E> u, int rank, const float* const* h, const Output<E>* out, int column,
                   int columns, Pass pass, Prefetch& ahead) {
    for (; columns - column >= C * W; column += C * W)
        outer_tile<T, C, true>(u, rank, h, out, column, 0, pass, ahead);
    if (column == columns) return;
    if constexpr (C > 1)
        outer_columns<T, C / 2>(u, rank, h, out, column, columns, pass, ahead);
    else
        outer_tile<T, 1, false>(u, rank, h, out, column, columns - column, pass, ahead);
}

// y[t] += scale[t] * u^T h[t] for n tokens and `columns` columns
template <class E>
void outer_tokens(Matrix<E> u, int rank, const float* const* h, const Output<E>* out, int columns,
                  int n, Pass pass, Prefetch& ahead) {
    int t = 0;
    for (; t + 4 <= n; t += 4)
        outer_columns<4, kTile / 4>(u, rank, h + t, out + t, 0, columns, pass, ahead);
    for (; t + 2 <= n; t += 2)
        outer_columns<2, kTile / 2>(u, rank, h + t, out + t, 0, columns, pass, ahead);
    for (; t < n; ++t)
        outer_columns<1, kTile>(u, rank, h + t, out + t, 0, columns, pass, ahead);
}

// ---------------------------------------------------------------- packed bases

// Bases that do not change may lie just as they are read, one after the other (packed.py): so the
// processor's own prefetching keeps up with the arithmetic, which it does not where many rows are
// read side by side. Sums are taken in the same order as from rows.
constexpr int kPacked = 1 << 30;  // PACKED: an index from here on is a place, in units of 64 bytes
constexpr int kGroup = 8;         // rows of V that lie side by side, 32 columns each
constexpr int kSide = 64;         // columns of U that lie together, of all its rows

// In 8 bits, a block of 32 columns has its steps (bfloat16) and then its codes: of V, for 16 rows
// after 16, 2 columns of all of them after 2; of U, for 2 rows after 2, one half of the columns and
// the other. U begins with a float32 for each block, a power of two by which all of its steps are
// to be taken: they are less than 2.
constexpr int kLanes = 16;   // steps, and rows of V, that lie side by side
constexpr int kMaxRank = 512;  // of U in 8 bits: sums of so many products fit 32 bits

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t code_steps_bytes(int64_t rank) { return parts(rank, kLanes) * kLanes * 2; }
int64_t u_codes_block_bytes(int64_t rank) { return code_steps_bytes(rank) + parts(rank, 2) * 64; }
int64_t u_powers_bytes(int64_t width) { return parts(width, 32 * 16) * 64; }
int64_t packed_side_bytes(int64_t rank) { return rank * kSide * 2; }
int64_t packed_v_bytes(int64_t rank, int64_t width, bool in_8_bits) {
    if (in_8_bits) return parts(width, 32) * parts(rank, kLanes) * kLanes * (32 + 2);
    return parts(width, 32) * rank * 64;
}
int64_t packed_u_bytes(int64_t rank, int64_t width, bool in_8_bits) {
    if (in_8_bits) return u_powers_bytes(width) + parts(width, 32) * u_codes_block_bytes(rank);
    return parts(width, kSide) * packed_side_bytes(rank);
}

// Ask for what the stream will give soon, so that its next page has begun when it is needed. The
// first tokens of a block do: for the others it is in the caches. (Into L2: lines that come into L1
// too early are in the way there.)
constexpr int kAhead = 6144;
template <int kBytes> JD_INLINE void fetch_ahead(const void* p, bool wanted) {
    if (wanted)
        JD_UNROLL for (int i = 0; i < kBytes; i += 64)
            __builtin_prefetch((const char*)p + kAhead + i, 0, 2);
}

// 32 neighbours in 16 bits with a step that is a power of two.
struct Rounded {
    const int16_t* numbers;
    const float* steps;
};

#if defined(JD_AVX512_BF16)
constexpr bool kCanPack = true;

// out[t][column + j] = rows[j] . x[t] for R of the rows of a group
template <int T, int R>
JD_INLINE void dot_group(const bf16* p, int rows, const bf16* const* x, int d, float* const* out,
                         int column, bool first) {
    using D = Dot<bf16, bf16>;
    vf sum[T * R] = {};
    auto add = [&](const __m512i* xs) JD_INLINE_LAMBDA {
        fetch_ahead<R * 64>(p, first);
        JD_UNROLL for (int j = 0; j < R; ++j) {
            auto a = D::operand(p + j * 32);
            JD_UNROLL for (int t = 0; t < T; ++t)
                sum[t * R + j] = D::step(sum[t * R + j], a, xs[t]);
        }
        p += rows * 32;
    };
    __m512i xs[T];
    int i = 0;
    for (; i + 32 <= d; i += 32) {
        JD_UNROLL for (int t = 0; t < T; ++t) xs[t] = D::operand(x[t] + i);
        add(xs);
    }
    if (i < d) {
        JD_UNROLL for (int t = 0; t < T; ++t) xs[t] = D::operand_first(x[t] + i, d - i);
        add(xs);
    }
    float sums[T * R];
    sum_lanes<T * R>(sum, sums);
    for (int t = 0; t < T; ++t) std::memcpy(out[t] + column, sums + t * R, R * sizeof(float));
}

template <int T, int R>
void dot_groups(const bf16* data, int rows, int done, const bf16* const* x, int d,
                float* const* out, int column, bool first) {
    for (; rows - done >= R; done += R)
        dot_group<T, R>(data + done * 32, rows, x, d, out, column + done, first);
    if constexpr (R > 1)
        if (done < rows) dot_groups<T, R / 2>(data, rows, done, x, d, out, column, first);
}

// out[t][j] = V[j] . x[t] for T tokens
template <int T>
void dot_packed(const bf16* data, int rank, const bf16* const* x, int d, float* const* out,
                bool first) {
    for (int j = 0; j < rank; j += kGroup) {
        int rows = std::min(kGroup, rank - j);
        dot_groups<T, T == 4 ? 4 : 8>(data, rows, 0, x, d, out, j, first);
        data += packed_v_bytes(rows, d, false) / sizeof(bf16);
    }
}

// 64 columns of y[t] += scale[t] * U^T h[t]
template <int T>
JD_INLINE void outer_side(const bf16* p, int rank, const float* const* h, const Output<bf16>* out,
                          int column, Pass pass, bool first) {
    vf sum[T * 4];
    begin_sums<T, 4>(out, column, pass, sum);
    for (int j = 0; j < rank; ++j, p += kSide) {
        fetch_ahead<kSide * 2>(p, first);
        vf us[4];
        load_columns<4, true>(p, 0, us);
        JD_UNROLL for (int t = 0; t < T; ++t) {
            vf weight = splat(h[t][j]);
            JD_UNROLL for (int c = 0; c < 4; ++c)
                sum[t * 4 + c] = madd(us[c], weight, sum[t * 4 + c]);
        }
    }
    finish_sums<T, 4, true>(out, column, 0, pass, sum);
}

// Packed bases in 8 bits. The other operand is rounded to 16 bits, so that products sum up in
// integers, exactly: whatever is within 2^7 of a block's largest number stays the bfloat16 it was.

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
                    _mm512_mul_ps(steps, _mm512_set1_ps(x[t].steps[i / 32])), sum[t]);
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
    alignas(64) float h[kMaxRank];
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

// 32 columns of y[t] += scale[t] * U^T h[t], U's steps times `power`
template <int T>
JD_INLINE void outer_block(const char* p, float power, int rank, const Weights* h,
                           const Output<bf16>* out, int column, Pass pass, bool first) {
    alignas(64) int16_t weights[T][kMaxRank];
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

// Call f(out, column) for every `size` columns of `columns`, the last ones with room for all.
template <int T, int size, class F>
JD_INLINE void for_columns(const Output<bf16>* out, int columns, Pass pass, F f) {
    int column = 0;
    for (; column + size <= columns; column += size) f(out, column);
    if (column == columns) return;
    bf16 y[T][size] = {}, scale[T][size] = {};
    Output<bf16> wide[T];
    size_t bytes = (columns - column) * sizeof(bf16);
    for (int t = 0; t < T; ++t) {
        wide[t] = {y[t], pass.first && pass.last ? nullptr : out[t].partial + column, scale[t]};
        std::memcpy(y[t], out[t].y + column, bytes);
        if (pass.scaled) std::memcpy(scale[t], out[t].scale + column, bytes);
    }
    f(wide, 0);
    for (int t = 0; t < T && pass.last; ++t) std::memcpy(out[t].y + column, y[t], bytes);
}

// y[t] += scale[t] * U^T h[t] for `columns` columns, the first of which is a multiple of 64
template <int T>
void outer_packed(const bf16* data, int rank, const float* const* h, const Output<bf16>* out,
                  int columns, Pass pass, bool first) {
    for_columns<T, kSide>(out, columns, pass, [&](const Output<bf16>* out, int column)
                          JD_INLINE_LAMBDA {
        outer_side<T>(data, rank, h, out, column, pass, first);
        data += rank * kSide;
    });
}

// The same in 8 bits, from a column on
template <int T>
void outer_codes(const char* data, int64_t width, int from, int rank, const float* const* h,
                 const Output<bf16>* out, int columns, Pass pass, bool first) {
    Weights weights[T];
    for (int t = 0; t < T; ++t) weights[t].set(h[t], rank);
    const float* powers = (const float*)data + from / 32;
    data += u_powers_bytes(width) + from / 32 * u_codes_block_bytes(rank);
    for_columns<T, 32>(out, columns, pass, [&](const Output<bf16>* out, int column)
                       JD_INLINE_LAMBDA {
        outer_block<T>(data, *powers++, rank, weights, out, column, pass, first);
        data += u_codes_block_bytes(rank);
    });
}
#else
constexpr bool kCanPack = false;
inline void round_numbers(const bf16*, int, int16_t*, float*) {}
template <int T> void dot_packed(const bf16*, int, const bf16* const*, int, float* const*, bool) {}
template <int T> void dot_codes(const char*, int, const Rounded*, int, float* const*, bool) {}
template <int T>
void outer_packed(const bf16*, int, const float* const*, const Output<bf16>*, int, Pass, bool) {}
template <int T>
void outer_codes(const char*, int64_t, int, int, const float* const*, const Output<bf16>*, int,
                 Pass, bool) {}
#endif

// ---------------------------------------------------------------- plan

struct Token {
    const int32_t* rows;  // its slot's rows of this slice
    int32_t index;
    int32_t slot;
};

struct Run {  // neighbouring tokens of one slot
    int32_t v_start, u_start, slot, begin, count;
    bool operator<(const Run& o) const {
        if (v_start != o.v_start) return v_start < o.v_start;
        if (u_start != o.u_start) return u_start < o.u_start;
        if (slot != o.slot) return slot < o.slot;
        return begin < o.begin;
    }
};

struct Block {  // tokens [begin, begin + count) of Plan::tokens, of one slice
    int32_t slice, begin, count;
    double work_before;
};

struct Plan {
    std::vector<int32_t> slots;  // that `runs` are of
    std::vector<Run> runs;
    std::vector<Token> tokens;
    std::vector<size_t> slice_begin;  // of each slice's blocks in `cut`
    std::vector<Block> cut;           // slice after slice
    std::vector<Block> blocks;        // in the order of their execution
    int max_rank;
    double work;
};

thread_local Plan kept_plan;  // for its memory
thread_local char error[256];

bool fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error, sizeof error, format, arguments);
    va_end(arguments);
    return false;
}

const int32_t* slot_rows(const PoolsData& pools, int64_t slot, int64_t slice) {
    return pools.rows + slot * pools.slot_stride + slice * pools.rows_per_slice * kFields;
}

// Runs of tokens with an adapter; the same for every slice. A step's layers have the same ones:
// they stay as they are, in the order of the layer before.
bool find_runs(const PoolsData& pools, const int32_t* slots, int n_tokens, Plan& plan) {
    size_t bytes = n_tokens * sizeof(int32_t);
    if (plan.slots.size() != (size_t)n_tokens || std::memcmp(plan.slots.data(), slots, bytes)) {
        plan.slots.assign(slots, slots + n_tokens);
        plan.runs.clear();
        for (int t = 0; t < n_tokens;) {
            int begin = t, slot = slots[t];
            while (t < n_tokens && slots[t] == slot) ++t;
            if (slot >= 0) plan.runs.push_back({0, 0, slot, begin, t - begin});
        }
    }
    for (const Run& run : plan.runs) {
        if (run.slot >= pools.slots)
            return fail("token %d has slot %d of %ld", run.begin, run.slot, (long)pools.slots);
        // Their rows lie far apart, and are looked at one after the other.
        const char* rows = (const char*)slot_rows(pools, run.slot, 0);
        int64_t bytes = pools.n_slices * pools.rows_per_slice * kFields * sizeof(int32_t);
        for (int64_t i = 0; i < bytes + 60; i += 64) __builtin_prefetch(rows + std::min(i, bytes));
    }
    return true;
}

bool check_core(const PoolsData& pools, int slice, int slot, const int32_t* row) {
    int64_t rank = row[kRank], kind = row[kCoreKind];
    if (kind == kCoreNone) return true;
    if (kind != kCoreFull && kind != kCoreDiagonal)
        return fail("slot %d, slice %d: core kind %ld is unknown", slot, slice, (long)kind);
    if (row[kCoreSlot] < 0 || row[kCoreSlot] >= pools.core_slots)
        return fail("slot %d, slice %d: core slot %d of %ld", slot, slice, row[kCoreSlot],
                    (long)pools.core_slots);
    int64_t length = kind == kCoreFull ? rank * rank : rank;
    if (row[kCoreOffset] < 0 || row[kCoreOffset] + length > pools.core_length)
        return fail("slot %d, slice %d: a %s core of rank %ld at %d reaches outside a core row of "
                    "%ld", slot, slice, kind == kCoreFull ? "full" : "diagonal", (long)rank,
                    row[kCoreOffset], (long)pools.core_length);
    return true;
}

// A basis lies among the rows in 8 bits, which come first, or behind them.
bool check_basis(char name, int64_t start, int64_t rank, int64_t code_rows, int64_t rows, int slice,
                 int slot) {
    if (start < 0 || start + rank > code_rows + rows)
        return fail("slot %d, slice %d: %c rows %ld..%ld of %ld", slot, slice, name, (long)start,
                    (long)(start + rank), (long)(code_rows + rows));
    if (start < code_rows && start + rank > code_rows)
        return fail("slot %d, slice %d: %c rows %ld..%ld reach across the end of 8 bits, %ld",
                    slot, slice, name, (long)start, (long)(start + rank), (long)code_rows);
    return true;
}

// A packed basis lies in the pools' packed memory.
bool check_place(char name, int64_t start, int64_t bytes, const PoolsData& pools, int slice,
                 int slot) {
    if (!kCanPack || pools.element != 1)
        return fail("slot %d, slice %d: %c is packed, which takes bfloat16 and a processor that "
                    "has AVX512-BF16", slot, slice, name);
    int64_t place = (start - kPacked) * 64;
    if (start < kPacked || place + bytes > pools.packed_bytes)
        return fail("slot %d, slice %d: packed %c at %ld, %ld bytes, of %ld", slot, slice, name,
                    (long)place, (long)bytes, (long)pools.packed_bytes);
    return true;
}

bool check_row(const PoolsData& pools, int slice, int slot, const int32_t* row) {
    const SliceData& place = pools.slices[slice];
    int64_t rank = row[kRank];
    if (row[kVStart] >= kPacked || row[kUStart] >= kPacked) {
        bool in_8_bits = pools.packed_in_8_bits;
        int64_t v_bytes = packed_v_bytes(rank, pools.d_in, in_8_bits);
        int64_t u_bytes = packed_u_bytes(rank, place.d_out, in_8_bits);
        if (in_8_bits && rank > kMaxRank)
            return fail("slot %d, slice %d: rank %ld is packed in 8 bits, which goes to %d", slot,
                        slice, (long)rank, kMaxRank);
        if (!check_place('V', row[kVStart], v_bytes, pools, slice, slot) ||
            !check_place('U', row[kUStart], u_bytes, pools, slice, slot))
            return false;
    } else if (!check_basis('V', row[kVStart], rank, pools.v_code_rows, pools.v_rows, slice,
                            slot) ||
               !check_basis('U', row[kUStart], rank, place.u_code_rows, place.u_rows, slice,
                            slot)) {
        return false;
    }
    if (row[kScaleRow] < -1 || row[kScaleRow] >= place.scale_rows)
        return fail("slot %d, slice %d: scale row %d of %ld", slot, slice, row[kScaleRow],
                    (long)place.scale_rows);
    return check_core(pools, slice, slot, row);
}

// Give each run the bases of its first used row in this slice (v_start -1: none); check all rows.
bool look_up_bases(const PoolsData& pools, int slice, Plan& plan) {
    for (Run& run : plan.runs) {
        const int32_t* row = slot_rows(pools, run.slot, slice);
        run.v_start = run.u_start = -1;
        for (int k = 0; k < pools.rows_per_slice; ++k, row += kFields) {
            if (row[kRank] <= 0) continue;
            if (!check_row(pools, slice, run.slot, row)) return false;
            // Sums are handed from row to row in an order of columns that differs between the two.
            if (run.v_start >= 0 && (run.v_start >= kPacked) != (row[kVStart] >= kPacked))
                return fail("slot %d, slice %d: has rows that are packed and others", run.slot,
                            slice);
            plan.max_rank = std::max(plan.max_rank, row[kRank]);
            if (run.v_start < 0) run.v_start = row[kVStart], run.u_start = row[kUStart];
        }
    }
    return true;
}

// Cut the sorted runs of one slice into blocks of tokens with one v_start.
void cut_blocks(const PoolsData& pools, int slice, int block_size, Plan& plan) {
    int32_t v_start = -1;
    for (const Run& run : plan.runs) {
        if (run.v_start < 0) continue;
        const int32_t* rows = slot_rows(pools, run.slot, slice);
        for (int t = 0; t < run.count; ++t) {
            if (run.v_start != v_start || plan.cut.back().count == block_size) {
                plan.cut.push_back({slice, (int32_t)plan.tokens.size(), 0, 0});
                v_start = run.v_start;
            }
            plan.tokens.push_back({rows, run.begin + t, run.slot});
            plan.cut.back().count += 1;
        }
    }
}

// Take the slices' blocks in turn: the blocks of one clustering read the same x.
void order_blocks(const PoolsData& pools, Plan& plan) {
    plan.blocks.clear();
    plan.work = 0;
    std::vector<size_t>& next = plan.slice_begin;
    while (plan.blocks.size() < plan.cut.size()) {
        for (int slice = 0; slice < pools.n_slices; ++slice) {
            if (next[slice] == plan.cut.size() || plan.cut[next[slice]].slice != slice) continue;
            Block block = plan.cut[next[slice]++];
            block.work_before = plan.work;
            plan.work += double(kBasisWork + block.count) * plan.max_rank *
                         (pools.d_in + pools.slices[slice].d_out);
            plan.blocks.push_back(block);
        }
    }
}

bool make_plan(const PoolsData& pools, const int32_t* slots, int n_tokens, int threads,
               Plan& plan) {
    plan.tokens.clear();
    plan.cut.clear();
    plan.slice_begin.clear();
    plan.max_rank = 0;
    if (!find_runs(pools, slots, n_tokens, plan)) return false;
    // Of one cluster's tokens each thread gets as many, in all slices: they differ in width.
    int share = (n_tokens + threads - 1) / threads;
    int block_size = std::clamp((share + 3) / 4 * 4, 4, kBlock);
    for (int slice = 0; slice < pools.n_slices; ++slice) {
        if (!look_up_bases(pools, slice, plan)) return false;
        // One clustering for all slices leaves their runs in the order of the slice before.
        if (!std::is_sorted(plan.runs.begin(), plan.runs.end()))
            std::sort(plan.runs.begin(), plan.runs.end());
        plan.slice_begin.push_back(plan.cut.size());
        cut_blocks(pools, slice, block_size, plan);
    }
    order_blocks(pools, plan);
    return true;
}

// ---------------------------------------------------------------- execution of one block

template <class E> struct Call {
    const PoolsData& pools;
    const Plan& plan;
    E* y;
    int64_t y_stride;
    const E* x;
    int64_t x_stride;
};

// A block's x in 16 bits: the blocks of the other slices often have the same tokens.
struct RoundedBlock {
    int count = 0;
    int32_t index[kBlock];
    Rounded x[kBlock];
    std::vector<int16_t> numbers;
    std::vector<float> steps;
};

template <class E> struct Worker {
    const Call<E>& call;
    const PoolsData& pools;
    int rank, depth;  // of the scratch: the largest rank, rows per slice
    std::vector<float>& scratch;
    std::vector<E>& decoded;
    Prefetch& ahead;
    RoundedBlock& rounded;
    const Token* tokens = nullptr;
    int n = 0;
    const SliceData* slice = nullptr;
    const Block* following = nullptr;
    int fetched = 0;

    Worker(const Call<E>& call, std::vector<float>& scratch, std::vector<E>& decoded,
           Prefetch& ahead, RoundedBlock& rounded)
        : call(call), pools(call.pools), rank(call.plan.max_rank),
          depth((int)pools.rows_per_slice), scratch(scratch), decoded(decoded), ahead(ahead),
          rounded(rounded) {
        size_t partial = depth > 1 ? kColumns : 0;
        scratch.resize(kBlock * ((depth + 1) * (size_t)rank + partial));
        ahead.clear();
        rounded.count = 0;
    }

    void take(const Block& block) {
        tokens = call.plan.tokens.data() + block.begin;
        n = block.count;
        slice = &pools.slices[block.slice];
    }

    const int32_t* row(int t, int k) const { return tokens[t].rows + k * kFields; }
    float* z(int t) const { return scratch.data() + (size_t)t * rank; }
    float* h(int t, int k) const { return scratch.data() + ((k + 1) * kBlock + (size_t)t) * rank; }
    float* partial(int t) const {
        return scratch.data() + kBlock * (depth + 1) * (size_t)rank + (size_t)t * kColumns;
    }

    // check_row has seen to it that a packed row is one of bfloat16 and of this processor.
    bool packed(const int32_t* row) const { return row[kVStart] >= kPacked; }
    const char* place(int64_t start) const {
        return (const char*)pools.packed + (start - kPacked) * 64;
    }

    void round_x() {
        auto same = [&](int t) { return rounded.index[t] == tokens[t].index; };
        int t = 0;
        while (t < std::min(n, rounded.count) && same(t)) ++t;
        if (t == n) return;
        int d = (int)pools.d_in, blocks = (int)parts(d, 32);
        rounded.numbers.resize((size_t)kBlock * blocks * 32);
        rounded.steps.resize((size_t)kBlock * blocks);
        for (; t < n; ++t) {
            int16_t* numbers = rounded.numbers.data() + (size_t)t * blocks * 32;
            float* steps = rounded.steps.data() + (size_t)t * blocks;
            round_numbers((const bf16*)call.x + tokens[t].index * call.x_stride, d, numbers, steps);
            rounded.index[t] = tokens[t].index;
            rounded.x[t] = {numbers, steps};
        }
        rounded.count = n;
    }

    // Call f(tokens at once, first) for n tokens.
    template <class F> void tokens_packed(int n, F f) const {
        int t = 0;
        for (; t + 4 <= n; t += 4) f(std::integral_constant<int, 4>{}, t);
        for (; t + 2 <= n; t += 2) f(std::integral_constant<int, 2>{}, t);
        for (; t < n; ++t) f(std::integral_constant<int, 1>{}, t);
    }

    Codes v_codes() const {
        return {(const int8_t*)pools.v_codes, (const uint16_t*)pools.v_steps, pools.v_code_rows,
                pools.d_in};
    }
    Codes u_codes() const {
        return {(const int8_t*)slice->u_codes, (const uint16_t*)slice->u_steps,
                slice->u_code_rows, slice->d_out};
    }
    Matrix<E> v_rows(const int32_t* row) const {
        int64_t first = row[kVStart] - pools.v_code_rows;
        return {(const E*)pools.v + first * pools.v_stride, pools.v_stride};
    }
    Matrix<E> u_rows(const int32_t* row) const {
        int64_t first = row[kUStart] - slice->u_code_rows;
        return {(const E*)slice->u + first * slice->u_stride, slice->u_stride};
    }

    // Rows [first, first + n), `columns` wide from `column` on, decoded.
    Matrix<E> decode(const Codes& from, int64_t first, int n, int column, int columns) const {
        // Rows a power of two apart would all lie in the same few sets of the cache.
        int64_t stride = (columns + 31) / 32 * 32 + 32;
        if (decoded.size() < (size_t)(n * stride)) decoded.resize(n * stride);
        for (int j = 0; j < n; ++j) {
            for (int i = 0; i < columns; i += 512) ahead.step();
            decode_row(from, first + j, column, columns, decoded.data() + j * stride);
        }
        return {decoded.data(), stride};
    }

    // Where a core begins, and of how many bytes it is.
    const char* core_place(const int32_t* row, int64_t* bytes) const {
        int64_t bits = pools.core_bits ? pools.core_bits : 8 * sizeof(E);
        *bytes = (core_entries(row) * bits + 7) / 8;
        return (const char*)pools.cores +
               (row[kCoreSlot] * pools.core_stride * (pools.core_bits ? 1 : sizeof(E))) +
               row[kCoreOffset] * bits / 8;
    }
    int core_entries(const int32_t* row) const {
        return row[kCoreKind] == kCoreFull ? row[kRank] * row[kRank] : row[kRank];
    }

    // Its numbers. Decoded, they last until the next call.
    const E* core(const int32_t* row) {
        int64_t bytes;
        if (!pools.core_bits) return (const E*)core_place(row, &bytes);
        int entries = core_entries(row);
        if (decoded.size() < (size_t)entries) decoded.resize(entries);
        decode_entries((const char*)pools.cores + row[kCoreSlot] * pools.core_stride,
                       (const uint16_t*)pools.core_steps + row[kCoreSlot] * pools.core_steps_stride,
                       (int)pools.core_bits, row[kCoreOffset], entries, decoded.data());
        return decoded.data();
    }
    const E* scale(const int32_t* row) const {
        return (const E*)slice->scales + row[kScaleRow] * slice->scale_stride;
    }

    // First token after t whose row k differs in one of two fields.
    int run_end(int t, int k, Field a, Field b) const {
        int end = t + 1;
        const int32_t* mine = row(t, k);
        while (end < n && row(end, k)[a] == mine[a] && row(end, k)[b] == mine[b]) ++end;
        return end;
    }

    // z = V x
    void shrink(int k) {
        if (pools.packed_in_8_bits) round_x();
        const E* x[kBlock];
        float* out[kBlock];
        for (int t = 0, end; t < n; t = end) {
            end = run_end(t, k, kVStart, kRank);
            if (row(t, k)[kRank] <= 0) continue;
            for (int i = t; i < end; ++i) {
                x[i - t] = call.x + tokens[i].index * call.x_stride;
                out[i - t] = z(i);
            }
            int rank = row(t, k)[kRank];
            int64_t first = row(t, k)[kVStart];
            int d_in = (int)pools.d_in;
            if (packed(row(t, k))) {
                tokens_packed(end - t, [&](auto tile, int i) {
                    if (k == 0) fetch_following(t + i + tile);
                    if (pools.packed_in_8_bits)
                        dot_codes<tile>(place(first), rank, rounded.x + t + i, d_in, out + i,
                                        i == 0);
                    else
                        dot_packed<tile>((const bf16*)place(first), rank,
                                         (const bf16* const*)x + i, d_in, out + i, i == 0);
                });
                continue;
            }
            if (first >= pools.v_code_rows) {
                dot_tokens(v_rows(row(t, k)), rank, x, d_in, out, end - t, ahead);
                continue;
            }
            for (int j = 0; j < rank; j += kDecoded) {
                int some = std::min(kDecoded, rank - j);
                Matrix<E> rows = decode(v_codes(), first + j, some, 0, d_in);
                dot_tokens(rows, some, x, d_in, out, end - t, ahead);
                for (int i = 0; i < end - t; ++i) out[i] += some;
            }
        }
    }

    // h = core z
    void mix(int k) {
        const float* in[kBlock];
        float* out[kBlock];
        for (int t = 0, end; t < n; t = end) {
            for (end = t + 1; end < n && tokens[end].slot == tokens[t].slot;) ++end;
            const int32_t* r = row(t, k);
            int rank = r[kRank];
            if (rank <= 0) continue;
            for (int i = t; i < end; ++i) {
                in[i - t] = z(i);
                out[i - t] = h(i, k);
                if (r[kCoreKind] == kCoreNone) std::memcpy(h(i, k), z(i), rank * sizeof(float));
                if (r[kCoreKind] == kCoreDiagonal) multiply(core(r), z(i), rank, h(i, k));
            }
            if (r[kCoreKind] != kCoreFull) continue;
            dot_tokens(Matrix<E>{core(r), rank}, rank, in, rank, out, end - t, ahead);
        }
    }

    Pass pass(int t, int k) const {
        Pass pass{true, true, row(t, k)[kScaleRow] >= 0};
        for (int i = 0; i < depth; ++i) {
            if (row(t, i)[kRank] <= 0) continue;
            if (i < k) pass.first = false;
            if (i > k) pass.last = false;
        }
        return pass;
    }

    // y += scale * U^T h, row after row, for some columns
    void expand(int k, int column, int columns) {
        const float* in[kBlock];
        Output<E> out[kBlock];
        for (int t = 0, end; t < n; t = end) {
            end = run_end(t, k, kUStart, kRank);
            if (row(t, k)[kRank] <= 0) continue;
            Pass mine = pass(t, k);
            for (int i = t; i < end; ++i) {
                if (pass(i, k) != mine) {
                    end = i;
                    break;
                }
                in[i - t] = h(i, k);
                out[i - t] = {
                    call.y + tokens[i].index * call.y_stride + slice->first_column + column,
                    depth > 1 ? partial(i) : nullptr,
                    mine.scaled ? scale(row(i, k)) + column : nullptr,
                };
            }
            int rank = row(t, k)[kRank];
            if (packed(row(t, k))) {
                const char* data = place(row(t, k)[kUStart]);
                tokens_packed(end - t, [&](auto tile, int i) {
                    auto* places = (const Output<bf16>*)out + i;
                    if (pools.packed_in_8_bits)
                        outer_codes<tile>(data, slice->d_out, column, rank, in + i, places,
                                          columns, mine, i == 0);
                    else
                        outer_packed<tile>(
                            (const bf16*)(data + column / kSide * packed_side_bytes(rank)), rank,
                            in + i, places, columns, mine, i == 0);
                });
                continue;
            }
            Matrix<E> u;
            if (int64_t first = row(t, k)[kUStart]; first < slice->u_code_rows) {
                u = decode(u_codes(), first, rank, column, columns);
            } else {
                u = u_rows(row(t, k));
                u.data += column;
            }
            outer_tokens(u, rank, in, out, columns, end - t, mine, ahead);
        }
    }

    void prefetch_codes(const Codes& codes, int64_t first, int rank) {
        ahead.add(codes.row_steps(first), rank * codes.steps_width() * sizeof(uint16_t));
        ahead.add(codes.row(first), rank * codes.width);
    }

    void prefetch_v(int k) {
        for (int t = 0; t < n; t = run_end(t, k, kVStart, kRank)) {
            int rank = row(t, k)[kRank];
            if (rank <= 0 || packed(row(t, k))) continue;
            if (int64_t first = row(t, k)[kVStart]; first < pools.v_code_rows)
                prefetch_codes(v_codes(), first, rank);
            else
                ahead.add(v_rows(row(t, k)).data, rank * pools.v_stride * sizeof(E));
        }
    }

    void prefetch_u(int k) {
        for (int t = 0; t < n; t = run_end(t, k, kUStart, kRank)) {
            int rank = row(t, k)[kRank];
            if (rank <= 0 || packed(row(t, k))) continue;
            if (int64_t first = row(t, k)[kUStart]; first < slice->u_code_rows)
                prefetch_codes(u_codes(), first, rank);
            else
                ahead.add(u_rows(row(t, k)).data, rank * slice->u_stride * sizeof(E));
        }
    }

    // The cores of some of a block's tokens: they are many and small, each from another place.
    void prefetch_cores(const Block& block, int first, int last) const {
        const Token* before = nullptr;
        for (int t = block.begin + first; t < block.begin + last; ++t) {
            const Token& token = call.plan.tokens[t];
            if (before != nullptr && token.slot == before->slot) continue;
            before = &token;
            for (int k = 0; k < depth; ++k) {
                const int32_t* r = token.rows + k * kFields;
                if (r[kRank] <= 0 || r[kCoreKind] == kCoreNone) continue;
                int64_t bytes;
                const char* p = core_place(r, &bytes);
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
            }
        }
    }

    // Of the next block's cores so many as of this block's tokens have been through stage one.
    void fetch_following(int done) {
        if (following == nullptr) return;
        int last = following->count * done / n;
        prefetch_cores(*following, fetched, last);
        fetched = std::max(fetched, last);
    }

    // What the block and the start of the next one will read, in that order.
    void plan_prefetch(const Block& block, const Block* next) {
        ahead.clear();
        for (int k = 1; k < depth; ++k) prefetch_v(k);
        for (int k = 0; k < depth; ++k) prefetch_u(k);
        if (next != nullptr) {
            take(*next);
            prefetch_v(0);
            take(block);
        }
        ahead.spread(n * depth * double(rank) / kTile *
                     (double(pools.d_in) / Dot<E, E>::kStep + double(slice->d_out) / W));
    }

    void run(const Block& block, const Block* next) {
        take(block);
        if (!packed(row(0, 0))) plan_prefetch(block, next);
        following = next;
        fetched = 0;
        for (int k = 0; k < depth; ++k) {
            shrink(k);
            fetch_following(n);
            mix(k);
        }
        for (int column = 0; column < slice->d_out; column += kColumns) {
            int columns = (int)std::min<int64_t>(kColumns, slice->d_out - column);
            for (int k = 0; k < depth; ++k) expand(k, column, columns);
        }
    }
};

// ---------------------------------------------------------------- threads

template <class E> struct Team {
    const Call<E>& call;
    int threads;
    std::atomic<int> next{0};

    // The blocks whose work begins in the given thread's share of all work: so the first thread,
    // which has begun already, has rather more of it.
    void share(int thread) {
        static thread_local std::vector<float> scratch;
        static thread_local std::vector<E> decoded;
        static thread_local Prefetch ahead;
        static thread_local RoundedBlock rounded;
        Worker<E> worker(call, scratch, decoded, ahead, rounded);
        double from = call.plan.work * thread / threads;
        double to = call.plan.work * (thread + 1) / threads;
        const std::vector<Block>& blocks = call.plan.blocks;
        size_t i = 0;
        while (i < blocks.size() && blocks[i].work_before < from) ++i;
        if (i < blocks.size()) worker.prefetch_cores(blocks[i], 0, blocks[i].count);
        for (; i < blocks.size() && blocks[i].work_before < to; ++i)
            worker.run(blocks[i], i + 1 < blocks.size() ? &blocks[i + 1] : nullptr);
    }

    // Shares are taken, not assigned: the runtime may give fewer threads than asked for.
    static void enter(void* self) {
        Team& team = *(Team*)self;
        for (int thread; (thread = team.next.fetch_add(1)) < team.threads;) team.share(thread);
    }
};

template <class E>
void execute(const PoolsData& pools, const Plan& plan, void* y, int64_t y_stride, const void* x,
             int64_t x_stride, int threads) {
    Call<E> call{pools, plan, (E*)y, y_stride, (const E*)x, x_stride};
    if (threads == 1 || plan.blocks.size() == 1 || plan.work < kSerialWork || !GOMP_parallel) {
        Team<E>{call, 1}.share(0);
        return;
    }
    Team<E> team{call, threads};
    GOMP_parallel(Team<E>::enter, &team, threads, 0);
}

}  // namespace

// ---------------------------------------------------------------- what Python calls

extern "C" {

// 0, or 1 with a message in jd_error(): a slot or an index of its rows is out of range. y is
// unchanged then.
int jd_add_adapters(const PoolsData* pools, void* y, int64_t y_stride, const void* x,
                    int64_t x_stride, const int32_t* slots, int64_t n_tokens, int threads) {
    Plan& plan = kept_plan;
    if (!make_plan(*pools, slots, (int)n_tokens, threads, plan)) return 1;
    if (plan.blocks.empty()) return 0;
    auto run = pools->element == 0 ? execute<float>
               : pools->element == 1 ? execute<bf16> : execute<fp16>;
    run(*pools, plan, y, y_stride, x, x_stride, threads);
    return 0;
}

const char* jd_error() { return error; }

// ---- the same as an operator of torch's, see compiled.py

// torch's stable C interface (aoti_torch/c/shim.h), of the libtorch that is loaded.
struct TorchApi {
    int (*data_ptr)(void* tensor, void** pointer);
    int (*size)(void* tensor, int64_t dimension, int64_t* size);
    int (*stride)(void* tensor, int64_t dimension, int64_t* stride);
    int (*dtype)(void* tensor, int32_t* type);
    int (*release)(void* tensor);
};

struct StepData {
    const int32_t* slots;
    int64_t n_slots, active, threads;
};

struct Layer {
    const PoolsData* pools;
    const StepData* step;
};

static TorchApi torch_api;
static std::deque<Layer> layers;  // only ever grows: graphs hold indices

void jd_bind_torch(const TorchApi* api) { torch_api = *api; }

int64_t jd_add_layer(const PoolsData* pools, const StepData* step) {
    layers.push_back({pools, step});
    return (int64_t)layers.size() - 1;
}

struct Tensor {
    void* handle;  // owned
    void* data = nullptr;
    int64_t rows = 0, columns = 0, stride = 0, unit = 0;
    int32_t dtype = -1;
    bool good;

    explicit Tensor(uint64_t argument) : handle((void*)argument) {
        good = !torch_api.data_ptr(handle, &data) && !torch_api.size(handle, 0, &rows) &&
               !torch_api.size(handle, 1, &columns) && !torch_api.stride(handle, 0, &stride) &&
               !torch_api.stride(handle, 1, &unit) && !torch_api.dtype(handle, &dtype);
    }
    ~Tensor() { torch_api.release(handle); }

    bool fits(const PoolsData& pools, int64_t width) const {
        static const int32_t types[] = {6, 15, 5};  // c10::ScalarType: Float, BFloat16, Half
        return good && columns == width && (unit == 1 || width == 1) &&
               dtype == types[pools.element];
    }
};

// (Tensor(a!) y, Tensor x, int layer) -> (): a boxed kernel of the stable interface.
void jd_torch_op(uint64_t* stack, uint64_t, uint64_t) {
    Tensor y(stack[0]), x(stack[1]);
    int64_t index = (int64_t)stack[2];
    if (index < 0 || index >= (int64_t)layers.size())
        throw std::out_of_range("vllm_jd: no such layer");
    const Layer& layer = layers[index];
    if (!layer.step->active) return;
    const PoolsData& pools = *layer.pools;
    const SliceData& last = pools.slices[pools.n_slices - 1];
    if (!x.fits(pools, pools.d_in) || !y.fits(pools, last.first_column + last.d_out) ||
        x.rows != y.rows || x.rows > layer.step->n_slots)
        throw std::invalid_argument("vllm_jd: the tensors of a call do not fit the layer's pools");
    if (jd_add_adapters(&pools, y.data, y.stride, x.data, x.stride, layer.step->slots, x.rows,
                        (int)layer.step->threads))
        throw std::out_of_range(error);
}

const char* jd_isa() {
#if defined(JD_AVX512_BF16)
    return "avx512_bf16";
#elif defined(JD_AVX512)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#else
    return "portable";
#endif
}
}
