// y[t] += sum over rows of scale * (U^T . core . V . x[t / fan]), all slices of one layer in one
// call. fan > 1: so many neighbouring tokens have one input (pairs of a token and its experts).
//
// Plan (serial): per slice, runs of tokens of one slot are sorted by their V, and cut into blocks
// of tokens that share it. Then each block goes through three stages on one thread:
//   shrink  z = V x      dot products, tiles of T inputs x R rows in registers
//   mix     h = core z   the same tiles: the core's rows against z; by element where diagonal
//   expand  y += U^T h   outer products, tiles of T tokens x C column vectors, scaled at their end
// A basis is read once per block, from memory only the first time. Rows in 8 bits are decoded on
// the way, a part at a time into a buffer that stays in the caches; packed in 8 bits they are not,
// and multiply as integers.
//
// One token's sums run in an order that depends on the layer's shape and its own rows alone: the
// tiles differ in what they share, never in how one number is summed. So a token's result is the
// same bits alone, in any batch, and with any number of threads.
//
// This is the only translation unit, so that the compiler sees all that it may inline. The headers,
// each after those that it needs:
//   platform.h       what the processor has, and words for the compiler
//   constants.h      numbers that Python has too; made by build.py
//   pools.h          what Python hands over
//   layout.h         how packed bases lie in memory
//   vectors.h        vectors of floats, and the types as which they are stored
//   codes.h          numbers in 8 and 4 bits
//   prefetch.h       memory that will be wanted soon
//   dot.h, outer.h   dot and outer products in tiles
//   packed.h         the same with packed bases in bfloat16
//   packed_codes.h   the same with packed bases in 8 bits
//   check.h          whether a call's rows lie in its pools
//   plan.h           the plan of a call
//   worker.h         a block's three stages
//   threads.h        a call's blocks, shared out to threads
//   call.h           what backend.py calls
//   torch_operator.h what compiled graphs call

#include "call.h"
#include "platform.h"
#include "torch_operator.h"

extern "C" const char* jd_isa() { return kInstructionSet; }
