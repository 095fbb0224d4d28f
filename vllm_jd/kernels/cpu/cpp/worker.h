// The execution of one block of a plan, on one thread: shrink, mix, expand.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "constants.h"
#include "dot.h"
#include "layout.h"
#include "outer.h"
#include "packed.h"
#include "packed_codes.h"
#include "plan.h"
#include "platform.h"
#include "pools.h"
#include "prefetch.h"
#include "vectors.h"

namespace {

constexpr int kColumns = 256;  // columns of U that stay in L1 while a block's tokens pass
constexpr int kDecoded = 16;   // rows of V in 8 bits that are decoded at once

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
    int32_t index[kBlockTokens];
    Rounded x[kBlockTokens];
    std::vector<int16_t> numbers;
    std::vector<float> steps;
};

template <class E> struct Worker {
    const Call<E>& call;
    const PoolsData& pools;
    int rank, depth;  // of the scratch: the largest rank, rows per slice
    int plain_depth;  // that all slots have
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
          depth(call.plan.depth), plain_depth((int)pools.rows_per_slice), scratch(scratch),
          decoded(decoded), ahead(ahead), rounded(rounded) {
        size_t partial = depth > 1 ? kColumns : 0;
        scratch.resize(kBlockTokens * ((depth + 1) * (size_t)rank + partial));
        ahead.clear();
        rounded.count = 0;
    }

    void take(const Block& block) {
        tokens = call.plan.tokens.data() + block.begin;
        n = block.count;
        slice = &pools.slices[block.slice];
    }

    const int32_t* row(int t, int k) const { return row_of(tokens[t], k); }
    const int32_t* row_of(const Token& token, int k) const {
        static const int32_t unused[kFields] = {};
        bool there = k < plain_depth || token.slot >= pools.slots;
        return there ? token.rows + k * kFields : unused;
    }
    float* z(int t) const { return scratch.data() + (size_t)t * rank; }
    float* h(int t, int k) const {
        return scratch.data() + ((k + 1) * kBlockTokens + (size_t)t) * rank;
    }
    float* partial(int t) const {
        return scratch.data() + kBlockTokens * (depth + 1) * (size_t)rank + (size_t)t * kColumns;
    }

    // check_row has seen to it that a packed row is one of bfloat16 and of this processor.
    bool packed(const int32_t* row) const { return row[kVStart] >= kPacked; }
    const char* place(int64_t start) const {
        return (const char*)pools.packed + (start - kPacked) * kUnit;
    }

    void round_x() {
        auto same = [&](int t) { return rounded.index[t] == tokens[t].input; };
        int t = 0;
        while (t < std::min(n, rounded.count) && same(t)) ++t;
        if (t == n) return;
        int d = (int)pools.d_in, blocks = (int)parts(d, kStepBlock);
        rounded.numbers.resize((size_t)kBlockTokens * blocks * kStepBlock);
        rounded.steps.resize((size_t)kBlockTokens * blocks);
        for (; t < n; ++t) {
            int16_t* numbers = rounded.numbers.data() + (size_t)t * blocks * kStepBlock;
            float* steps = rounded.steps.data() + (size_t)t * blocks;
            round_numbers((const bf16*)call.x + tokens[t].input * call.x_stride, d, numbers, steps);
            rounded.index[t] = tokens[t].input;
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

    // z = V x, once for neighbours of one input (in packed bases, for each)
    void shrink(int k) {
        if (pools.packed_in_8_bits) round_x();
        const E* x[kBlockTokens];
        float* out[kBlockTokens];
        for (int t = 0, end; t < n; t = end) {
            end = run_end(t, k, kVStart, kRank);
            if (row(t, k)[kRank] <= 0) continue;
            int rank = row(t, k)[kRank], count = 0;
            for (int i = t; i < end; ++i) {
                if (repeats(i, t) && !packed(row(t, k))) continue;
                x[count] = call.x + tokens[i].input * call.x_stride;
                out[count++] = z(i);
            }
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
                dot_tokens(v_rows(row(t, k)), rank, x, d_in, out, count, ahead);
                copy_repeats(t, end, rank);
                continue;
            }
            for (int j = 0; j < rank; j += kDecoded) {
                int some = std::min(kDecoded, rank - j);
                Matrix<E> rows = decode(v_codes(), first + j, some, 0, d_in);
                dot_tokens(rows, some, x, d_in, out, count, ahead);
                for (int i = 0; i < count; ++i) out[i] += some;
            }
            copy_repeats(t, end, rank);
        }
    }

    // Whether a token has the input of the one before it, both from `first` on.
    bool repeats(int t, int first) const {
        return t > first && tokens[t].input == tokens[t - 1].input;
    }
    void copy_repeats(int first, int end, int rank) {
        for (int i = first + 1; i < end; ++i)
            if (repeats(i, first)) std::memcpy(z(i), z(i - 1), rank * sizeof(float));
    }

    // h = core z
    void mix(int k) {
        const float* in[kBlockTokens];
        float* out[kBlockTokens];
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

    // Packed rows come first; where others follow, y is rounded between the two.
    Pass pass(int t, int k) const {
        Pass pass{true, true, row(t, k)[kScaleRow] >= 0};
        for (int i = 0; i < depth; ++i) {
            if (row(t, i)[kRank] <= 0 || packed(row(t, i)) != packed(row(t, k))) continue;
            if (i < k) pass.first = false;
            if (i > k) pass.last = false;
        }
        return pass;
    }

    // y += scale * U^T h, row after row, for some columns
    void expand(int k, int column, int columns) {
        const float* in[kBlockTokens];
        Output<E> out[kBlockTokens];
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
                const int32_t* r = row_of(token, k);
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

}  // namespace
