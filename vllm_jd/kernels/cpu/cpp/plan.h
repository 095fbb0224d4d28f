// The plan of a call: per slice, runs of tokens of one slot are sorted by their V, and cut into
// blocks of tokens that share it.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "constants.h"
#include "pools.h"

namespace {

constexpr int kBlockTokens = 32;  // that share one reading of a basis, at most
constexpr int kBasisWork = 4;     // reading a basis takes about as long as so many tokens' sums

struct Token {
    const int32_t* rows;  // its slot's rows of this slice
    int32_t index;
    int32_t input;  // which row of x
    int32_t slot;
};

struct Run {  // neighbouring tokens of one slot
    int32_t v_start, u_start, slot, begin, count;
};

// Tokens of one input stand side by side if there are such, or else those of one core.
struct Order {
    bool by_input;
    bool operator()(const Run& a, const Run& b) const {
        if (a.v_start != b.v_start) return a.v_start < b.v_start;
        if (a.u_start != b.u_start) return a.u_start < b.u_start;
        if (!by_input && a.slot != b.slot) return a.slot < b.slot;
        return a.begin < b.begin;
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
    int depth;  // rows that a token may have
    double work;
};

thread_local Plan kept_plan;  // for its memory

int64_t slot_depth(const PoolsData& pools, int64_t slot) {
    return slot < pools.slots ? pools.rows_per_slice : pools.long_rows_per_slice;
}

const int32_t* slot_rows(const PoolsData& pools, int64_t slot, int64_t slice) {
    if (slot < pools.slots)
        return pools.rows + slot * pools.slot_stride + slice * pools.rows_per_slice * kFields;
    return pools.long_rows + (slot - pools.slots) * pools.long_slot_stride +
           slice * pools.long_rows_per_slice * kFields;
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
        if (run.slot >= pools.slots + pools.long_slots)
            return fail("token %d has slot %d of %ld", run.begin, run.slot,
                        (long)(pools.slots + pools.long_slots));
        // Their rows lie far apart, and are looked at one after the other.
        const char* rows = (const char*)slot_rows(pools, run.slot, 0);
        int64_t bytes = pools.n_slices * slot_depth(pools, run.slot) * kFields * sizeof(int32_t);
        for (int64_t i = 0; i < bytes + 60; i += 64) __builtin_prefetch(rows + std::min(i, bytes));
    }
    return true;
}

// Give each run the bases of its first used row in this slice (v_start -1: none); check all rows.
bool look_up_bases(const PoolsData& pools, int slice, Plan& plan) {
    for (Run& run : plan.runs) {
        const int32_t* row = slot_rows(pools, run.slot, slice);
        run.v_start = run.u_start = -1;
        bool unpacked = false;
        int depth = (int)slot_depth(pools, run.slot);
        for (int k = 0; k < depth; ++k, row += kFields) {
            if (row[kRank] <= 0) continue;
            if (!check_row(pools, slice, run.slot, row)) return false;
            // Sums are handed from row to row in an order of columns that differs between the two.
            if (unpacked && row[kVStart] >= kPacked)
                return fail("slot %d, slice %d: has packed rows behind others", run.slot, slice);
            unpacked |= row[kVStart] < kPacked;
            plan.depth = std::max(plan.depth, k + 1);
            plan.max_rank = std::max(plan.max_rank, row[kRank]);
            if (run.v_start < 0) run.v_start = row[kVStart], run.u_start = row[kUStart];
        }
    }
    return true;
}

// How many of the last block's tokens stay with one more of the given input, which has no room in
// it. A block of one input is cut.
int32_t tokens_to_move(const Plan& plan, int32_t input) {
    int32_t count = plan.cut.back().count, n = 0;
    while (n < count && plan.tokens[plan.tokens.size() - 1 - n].input == input) ++n;
    return n < count ? n : 0;
}

// Cut the sorted runs of one slice into blocks of tokens with one v_start.
void cut_blocks(const PoolsData& pools, int slice, int fan, int block_size, Plan& plan) {
    int32_t v_start = -1;
    for (const Run& run : plan.runs) {
        if (run.v_start < 0) continue;
        const int32_t* rows = slot_rows(pools, run.slot, slice);
        for (int t = 0; t < run.count; ++t) {
            int32_t input = (run.begin + t) / fan;
            if (run.v_start != v_start || plan.cut.back().count == block_size) {
                int32_t moved = run.v_start == v_start ? tokens_to_move(plan, input) : 0;
                if (moved > 0) plan.cut.back().count -= moved;
                plan.cut.push_back({slice, (int32_t)plan.tokens.size() - moved, moved, 0});
                v_start = run.v_start;
            }
            plan.tokens.push_back({rows, run.begin + t, input, run.slot});
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

bool make_plan(const PoolsData& pools, const int32_t* slots, int n_tokens, int fan, int threads,
               Plan& plan) {
    plan.tokens.clear();
    plan.cut.clear();
    plan.slice_begin.clear();
    plan.max_rank = 0;
    plan.depth = (int)pools.rows_per_slice;
    if (!find_runs(pools, slots, n_tokens, plan)) return false;
    // Of one cluster's tokens each thread gets as many, in all slices: they differ in width.
    int share = (n_tokens + threads - 1) / threads;
    int block_size = std::clamp((std::max(share, fan) + 3) / 4 * 4, 4, kBlockTokens);
    Order order{fan > 1};
    for (int slice = 0; slice < pools.n_slices; ++slice) {
        if (!look_up_bases(pools, slice, plan)) return false;
        // One clustering for all slices leaves their runs in the order of the slice before.
        if (!std::is_sorted(plan.runs.begin(), plan.runs.end(), order))
            std::sort(plan.runs.begin(), plan.runs.end(), order);
        plan.slice_begin.push_back(plan.cut.size());
        cut_blocks(pools, slice, fan, block_size, plan);
    }
    order_blocks(pools, plan);
    return true;
}

}  // namespace
