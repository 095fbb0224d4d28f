// Outer products: tiles of T tokens x C vectors of columns in registers.

#pragma once

#include <cstdint>

#include "dot.h"
#include "platform.h"
#include "prefetch.h"
#include "vectors.h"

namespace {

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

}  // namespace
