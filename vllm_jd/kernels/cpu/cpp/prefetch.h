// Asking for memory before it is needed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "platform.h"

namespace {

// Memory that will be wanted soon, asked for a few cache lines at a time between arithmetic, so
// that reading the next basis and computing with this one overlap.
class Prefetch {
  public:
    void clear() {
        regions.clear();
        next = end = nullptr;
        taken = 0;
        per_step = lines = 0;
    }
    void add(const void* begin, int64_t bytes) {
        regions.push_back({(const char*)begin, (const char*)begin + bytes});
        lines += bytes / kLine + 1;
    }
    // Spread what was added over so many steps.
    void spread(double steps) { per_step = (int)std::ceil(lines / std::max(steps, 1.0)); }
    JD_INLINE void step() {
        for (int i = 0; i < per_step; ++i, next += kLine) {
            if (next >= end && !next_region()) return;
            __builtin_prefetch(next, 0, 2);
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    struct Region { const char *begin, *end; };
    std::vector<Region> regions;
    size_t taken;
    const char *next, *end;
    int64_t lines;
    int per_step;

    bool next_region() {
        if (taken == regions.size()) return (per_step = 0);
        next = regions[taken].begin;
        end = regions[taken++].end;
        return true;
    }
};

}  // namespace
