// The rows that dot products take at a time, where they lie in blocks of 16 as matrix tiles would read them.
#pragma once
#include "share.h"

namespace apportion::APPORTION_ISA {

constexpr int64_t ROW_BLOCK = 16;  // rows copied by one work item; those of a tile
constexpr int DOT_ROWS = 8;        // two vectors each: 16 sums hide the latency of two products a cycle
constexpr int DOT_ROWS_ONCE = 12;  // that one pass over the weights takes from memory
constexpr int CODE_ROWS_ONCE = 32; // whose codes may be unpacked in registers, for every 8 to 12 rows again
constexpr int64_t CODES_AHEAD = 8192;  // bytes between the codes that are multiplied and those that are fetched

// f(first row, rows, rows of their block) for rows first .. last of `all`, in groups that lie within one block.
template <typename F>
APPORTION_INLINE void in_row_groups(int64_t first, int64_t last, int64_t all, F&& f) {
  for (int64_t row = first; row < last;) {
    const int64_t block = row / ROW_BLOCK * ROW_BLOCK, in_block = smaller(ROW_BLOCK, all - block);
    const int64_t height = in_block <= DOT_ROWS_ONCE ? in_block : ceil_div(in_block, 2);
    const int64_t n = smaller(height, block + in_block - row);
    f(row, int(n), in_block);
    row += n;
  }
}

}  // namespace apportion::APPORTION_ISA
