// The blocks of a call, shared out to threads.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.h"
#include "pools.h"
#include "worker.h"

// The OpenMP runtime is the one that torch has loaded: a runtime of our own would bring a second
// pool of threads, which vLLM does not bind to cores. Absent: one thread.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

namespace {

constexpr double kSerialWork = 1 << 19;  // multiply-adds, some 20 us: less is not worth threads

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
