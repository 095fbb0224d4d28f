// Whether the rows of a call lie in its pools.

#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "constants.h"
#include "layout.h"
#include "platform.h"
#include "pools.h"

namespace {

thread_local char error[256];

bool fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error, sizeof error, format, arguments);
    va_end(arguments);
    return false;
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
    int64_t place = (start - kPacked) * kUnit;
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
        if (in_8_bits && rank > kMaxInt8Rank)
            return fail("slot %d, slice %d: rank %ld is packed in 8 bits, which goes to %d", slot,
                        slice, (long)rank, kMaxInt8Rank);
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

}  // namespace
