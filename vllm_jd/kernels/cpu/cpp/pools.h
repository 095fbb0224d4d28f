// What Python hands over: the structures of backend.py.

#pragma once

#include <cstdint>

namespace {

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
    const int32_t* long_rows;  // of the slots behind those of `rows`, which may have more of them
    int64_t long_slots, long_slot_stride, long_rows_per_slice;
};

}  // namespace
