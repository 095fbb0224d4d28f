// One call of the kernel, as backend.py makes it.

#pragma once

#include <cstdint>

#include "check.h"
#include "plan.h"
#include "pools.h"
#include "threads.h"
#include "vectors.h"

extern "C" {

// 0, or 1 with a message in jd_error(): a slot or an index of its rows is out of range. y is
// unchanged then.
int jd_add_adapters(const PoolsData* pools, void* y, int64_t y_stride, const void* x,
                    int64_t x_stride, const int32_t* slots, int64_t n_tokens, int64_t fan,
                    int threads) {
    Plan& plan = kept_plan;
    if (!make_plan(*pools, slots, (int)n_tokens, (int)fan, threads, plan)) return 1;
    if (plan.blocks.empty()) return 0;
    auto run = pools->element == 0 ? execute<float>
               : pools->element == 1 ? execute<bf16> : execute<fp16>;
    run(*pools, plan, y, y_stride, x, x_stride, threads);
    return 0;
}

const char* jd_error() { return error; }
}
