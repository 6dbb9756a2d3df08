// One bf16 panel times many rows by dot products of bf16 pairs (AVX512_BF16), where there are no matrix tiles. The rows lie in
// the blocks of 16 that tiles would read (tile_rows.h): at one channel pair, all rows of a block are 64 bytes apart.
#pragma once
#include "row_groups.h"
#include "tile_rows.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
namespace apportion::APPORTION_ISA {

struct DotSlice {
  const uint16_t* x;       // the first row, at the first channel
  int64_t x_stride;        // elements from one step of 32 channels to the next
  const std::byte* weights;
  int64_t steps;
  const float* sums;       // so far, [rows][32]; null: begin with `start`
  const float* start;      // bias [32] or null
  float* y;
  int64_t y_stride;
  int columns;             // of y that exist
  const std::byte* ahead = nullptr;  // weights wanted after these: `ahead_lines` lines a step are fetched into L2 meanwhile
  int ahead_lines = 0;
};

// STREAM: the weights come from memory and are fetched some way ahead.
template <int R, bool STREAM>
static inline void multiply_dots(const DotSlice& s) {
  constexpr int64_t AHEAD = 4096;
  V acc[R][2];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j)
      acc[r][j] = s.sums != nullptr ? load(s.sums + r * PANEL + j * WIDTH) : s.start != nullptr ? load(s.start + j * WIDTH) : zero();
  const std::byte* weights = s.weights;
  const uint16_t* x = s.x;
  for (int64_t step = 0; step < s.steps; ++step, x += s.x_stride) {
    for (int line = 0; line < s.ahead_lines; ++line) __builtin_prefetch(s.ahead + (step * s.ahead_lines + line) * 64, 0, 2);
    for (int k = 0; k < TILE_K; k += 2, weights += PANEL * 4) {
      if constexpr (STREAM) prefetch(weights + AHEAD), prefetch(weights + AHEAD + 64);
      const __m512bh left = (__m512bh)_mm512_loadu_si512(weights), right = (__m512bh)_mm512_loadu_si512(weights + 64);
      for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, x + r * TILE_K + k, sizeof(pair));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], both, left);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], both, right);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) {
      const int n = s.columns - j * WIDTH;
      if (n >= WIDTH) store(s.y + r * s.y_stride + j * WIDTH, acc[r][j]);
      else if (n > 0) store_n(s.y + r * s.y_stride + j * WIDTH, acc[r][j], n);
    }
}

// As multiply_dots, the weights unpacked from codes on their way: x and sums in the same order.
template <class Codes, int R>
static inline void multiply_code_dots(const DotSlice& s) {
  V acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
  const std::byte* codes = s.weights;
  const uint16_t* x = s.x;
  for (int64_t step = 0; step < s.steps; ++step, x += s.x_stride, codes += Codes::STEP_BYTES) {
    for (int64_t line = 0; line < Codes::STEP_BYTES; line += 64) prefetch(codes + CODES_AHEAD + line);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_K / 2; ++i) {
      const auto weights = Codes::pair(codes, i);
      for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, x + r * TILE_K + i * 2, sizeof(pair));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], both, (__m512bh)weights.left);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], both, (__m512bh)weights.right);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) store(s.y + r * PANEL + j * WIDTH, acc[r][j]);
}

template <class Codes, int R = DOT_ROWS_ONCE>
static inline void multiply_code_dot_rows(const DotSlice& s, int rows) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_code_dot_rows<Codes, R - 1>(s, rows);
  }
  multiply_code_dots<Codes, R>(s);
}

template <bool STREAM, int R = DOT_ROWS_ONCE>
static inline void multiply_dot_rows(const DotSlice& s, int rows) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_dot_rows<STREAM, R - 1>(s, rows);
  }
  multiply_dots<R, STREAM>(s);
}

// f(first row, rows, x of the first row at channel k, its stride).
template <typename F>
APPORTION_INLINE void in_dot_groups(const uint16_t* tiles, int64_t C, int64_t first, int64_t last, int64_t all, int64_t k, F&& f) {
  in_row_groups(first, last, all, [&](int64_t row, int n, int64_t in_block) {
    f(row, n, tile_block(tiles, C, row / TILE_ROWS) + (k / TILE_K * in_block + row % TILE_ROWS) * TILE_K, in_block * TILE_K);
  });
}

// As in panel_tiles.h: weights of TILE_K_BLOCK channels stay in L1 while up to TILE_SUM_ROWS rows pass over them.
constexpr int64_t TILE_K_BLOCK = 256, TILE_SUM_ROWS = 512;
constexpr size_t TILE_SCRATCH_BYTES = TILE_SUM_ROWS * PANEL * sizeof(float);

// Panel p times all rows, in order of C for each. `scratch`: TILE_SCRATCH_BYTES of this thread.
[[maybe_unused]] static void multiply_panel_tiles(const PackedMatrix& w, int64_t p, const uint16_t* tiles, int64_t rows, float* y, int64_t y_stride,
                                                  float* scratch) {
  const int64_t C = padded(w.C);
  const int columns = w.columns(p);
  for (int64_t first = 0; first < rows; first += TILE_SUM_ROWS) {
    const int64_t last = smaller(rows, first + TILE_SUM_ROWS);
    const bool once = w.is_gemv(last - first, DOT_ROWS_ONCE);  // else block by block, each fetched during the one before, a part by each group
    const int64_t k_block = once ? C : TILE_K_BLOCK;
    const int64_t lines = ceil_div(PANEL * TILE_K * 2 / 64, ceil_div(last - first, DOT_ROWS));
    for (int64_t k = 0; k < C; k += k_block) {
      const int64_t n = smaller(k_block, C - k), steps = n / TILE_K;
      const bool ends = k + n == C;
      in_dot_groups(tiles, w.C, first, last, rows, k, [&](int64_t row, int count, const uint16_t* x, int64_t x_stride) {
        float* sums = scratch + (row - first) * PANEL;
        const DotSlice slice = {
            .x = x,
            .x_stride = x_stride,
            .weights = w.panel(p) + k * PANEL * 2,
            .steps = steps,
            .sums = k > 0 ? sums : nullptr,
            .start = w.panel_bias(p),
            .y = ends ? y + row * y_stride : sums,
            .y_stride = ends ? y_stride : PANEL,
            .columns = ends ? columns : int(PANEL),
            .ahead = w.panel(p) + (k + n) * PANEL * 2 + (row - first) / DOT_ROWS * lines * steps * 64,  // what follows in memory
            .ahead_lines = once ? 0 : int(lines),
        };
        if (row == first && once) multiply_dot_rows<true>(slice, count);
        else multiply_dot_rows<false>(slice, count);
      });
    }
  }
}

}  // namespace apportion::APPORTION_ISA
#endif
