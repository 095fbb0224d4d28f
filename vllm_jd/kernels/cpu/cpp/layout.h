// How packed bases lie in memory: as packed.py writes them. The numbers are layout.py's.

#pragma once

#include <cstdint>

#include "constants.h"

namespace {

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// In bfloat16: of V kGroup rows after kGroup, of these kVColumns columns of all rows after
// kVColumns; of U kSide columns of all rows after kSide.
int64_t packed_side_bytes(int64_t rank) { return rank * kSide * 2; }

// In 8 bits, a block of kStepBlock columns has its steps (bfloat16) and then its codes: of V, for
// kLanes rows after kLanes, 2 columns of all of them after 2; of U, for 2 rows after 2, one half of
// the columns and the other. U begins with a float32 for each block, a power of two by which all of
// its steps are to be taken: they are less than 2.
int64_t code_steps_bytes(int64_t rank) { return parts(rank, kLanes) * kLanes * 2; }
int64_t u_codes_block_bytes(int64_t rank) {
    return code_steps_bytes(rank) + parts(rank, 2) * 2 * kStepBlock;
}
int64_t u_powers_bytes(int64_t width) { return parts(width, kStepBlock * (kUnit / 4)) * kUnit; }

int64_t packed_v_bytes(int64_t rank, int64_t width, bool in_8_bits) {
    if (in_8_bits)
        return parts(width, kStepBlock) * parts(rank, kLanes) * kLanes * (kStepBlock + 2);
    return parts(width, kVColumns) * rank * kVColumns * 2;
}
int64_t packed_u_bytes(int64_t rank, int64_t width, bool in_8_bits) {
    if (in_8_bits)
        return u_powers_bytes(width) + parts(width, kStepBlock) * u_codes_block_bytes(rank);
    return parts(width, kSide) * packed_side_bytes(rank);
}

}  // namespace
