// Handing items to the team, or keeping them where the work is too small for it.
#pragma once
#include "simd.h"
#include "thread_team.h"

namespace apportion::APPORTION_ISA {

APPORTION_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
APPORTION_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
APPORTION_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t INLINE_WORK = 1 << 15;  // multiply-adds (or elements moved) below which waking the team costs more than it brings

// f(item, thread) for every item; `work` in multiply-adds or elements.
template <typename F>
inline void share(ThreadTeam& team, int64_t num_items, int64_t work, F&& f) {
  if (work <= INLINE_WORK)
    for (int64_t item = 0; item < num_items; ++item) f(item, 0);
  else
    team.run(num_items, f);
}

}  // namespace apportion::APPORTION_ISA
