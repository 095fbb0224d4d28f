// Products with packed bases in bfloat16.
//
// Bases that lie just as they are read, one after the other, let the processor's own prefetching
// keep up with the arithmetic, which it does not where many rows are read side by side. Sums are
// taken in the same order as from rows.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dot.h"
#include "layout.h"
#include "outer.h"
#include "platform.h"
#include "vectors.h"

namespace {

// Ask for what the stream will give soon, so that its next page has begun when it is needed. The
// first tokens of a block do: for the others it is in the caches. (Into L2: lines that come into L1
// too early are in the way there.)
constexpr int kAhead = 6144;
template <int kBytes> JD_INLINE void fetch_ahead(const void* p, bool wanted) {
    if (wanted)
        JD_UNROLL for (int i = 0; i < kBytes; i += 64)
            __builtin_prefetch((const char*)p + kAhead + i, 0, 2);
}

#if defined(JD_AVX512_BF16)
static_assert(kVColumns == Dot<bf16, bf16>::kStep && kSide == 4 * W,
              "dot_group and outer_side are written for these");

// out[t][column + j] = rows[j] . x[t] for R of the rows of a group
template <int T, int R>
JD_INLINE void dot_group(const bf16* p, int rows, const bf16* const* x, int d, float* const* out,
                         int column, bool first) {
    using D = Dot<bf16, bf16>;
    vf sum[T * R] = {};
    auto add = [&](const __m512i* xs) JD_INLINE_LAMBDA {
        fetch_ahead<R * kVColumns * 2>(p, first);
        JD_UNROLL for (int j = 0; j < R; ++j) {
            auto a = D::operand(p + j * kVColumns);
            JD_UNROLL for (int t = 0; t < T; ++t)
                sum[t * R + j] = D::step(sum[t * R + j], a, xs[t]);
        }
        p += rows * kVColumns;
    };
    __m512i xs[T];
    int i = 0;
    for (; i + kVColumns <= d; i += kVColumns) {
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
        dot_group<T, R>(data + done * kVColumns, rows, x, d, out, column + done, first);
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

// kSide columns of y[t] += scale[t] * U^T h[t]
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

// y[t] += scale[t] * U^T h[t] for `columns` columns, the first of which is a multiple of kSide
template <int T>
void outer_packed(const bf16* data, int rank, const float* const* h, const Output<bf16>* out,
                  int columns, Pass pass, bool first) {
    for_columns<T, kSide>(out, columns, pass, [&](const Output<bf16>* out, int column)
                          JD_INLINE_LAMBDA {
        outer_side<T>(data, rank, h, out, column, pass, first);
        data += rank * kSide;
    });
}
#else  // no row is packed (kCanPack)
template <int T> void dot_packed(const bf16*, int, const bf16* const*, int, float* const*, bool) {}
template <int T>
void outer_packed(const bf16*, int, const float* const*, const Output<bf16>*, int, Pass, bool) {}
#endif

}  // namespace
