// One panel times many rows: the inner part of linears and experts. y[rows, columns] = bias + x[rows, C] panel^T.
//
// Every output is one accumulator that starts at the bias and walks C in order, whatever the blocking: the result of a row does
// not depend on how many rows there are. In float32 the walk is one fused multiply-add per channel; for bf16 weights it may be, with x
// rounded to bf16, one tile instruction per 32 channels or one dot product per two.
#pragma once
#include "linear.h"
#include "share.h"
#include "simd.h"

namespace apportion::APPORTION_ISA {

#if defined(__AVX512BF16__)
constexpr bool TILES = true;  // rows are rounded to bf16 and laid out as matrix tiles (tile_rows.h)
#else
constexpr bool TILES = false;
#endif

APPORTION_INLINE void prefetch(const std::byte* p) { __builtin_prefetch(p, 0, 3); }

// ---- vectors ----------------------------------------------------------------------------------------------------------------

struct Fp32 {
  static constexpr int LANES = 1;
  APPORTION_INLINE void load(const std::byte* p, V (&w)[1]) { w[0] = apportion::APPORTION_ISA::load(reinterpret_cast<const float*>(p)); }
};
struct Bf16 {
  static constexpr int LANES = 2;
  APPORTION_INLINE void load(const std::byte* p, V (&w)[2]) { load_bf16_pairs(reinterpret_cast<const uint16_t*>(p), w[0], w[1]); }
};
struct Fp16 {
  static constexpr int LANES = 2;
  APPORTION_INLINE void load(const std::byte* p, V (&w)[2]) { load_fp16_pairs(reinterpret_cast<const uint16_t*>(p), w[0], w[1]); }
};

constexpr int K_BLOCK = 256;                      // channels of a panel unpacked to float32 at a time: 32 KiB, kept in L1
constexpr int PANEL_VECTORS = int(PANEL) / WIDTH;
#if defined(__AVX512F__)
constexpr int DIRECT_ROWS = 12, BLOCK_ROWS = 12, BLOCK_VECTORS = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int DIRECT_ROWS = 2, BLOCK_ROWS = 6, BLOCK_VECTORS = 2;  // 12 of 16
#else
constexpr int DIRECT_ROWS = 1, BLOCK_ROWS = 4, BLOCK_VECTORS = 2;
#endif

struct Slice {
  const std::byte* weights;  // [C / LANES][32][LANES] from the first channel of the slice
  int64_t C;                 // channels
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
  int columns;               // of y that exist
  const float* start;        // bias [32], or null: zero; unused when `resume`
  bool resume;               // y holds the sums so far
  const std::byte* ahead;    // weights to prefetch meanwhile, or null
  int64_t ahead_bytes;       // of them for each step of LANES channels: 64 or 128
};

// R rows x VECTORS vectors of accumulators from column `column` on.
template <class Format, int R, int VECTORS>
static inline void multiply_rows(const Slice& s, int column) {
  constexpr int LANES = Format::LANES;
  V acc[R][VECTORS];
  for (int j = 0; j < VECTORS; ++j) {
    const int first = column + j * WIDTH, n = s.columns - first;
    const V start = s.resume || s.start == nullptr ? zero() : load(s.start + first);
    for (int r = 0; r < R; ++r) {
      const float* y = s.y + r * s.y_stride + first;
      acc[r][j] = !s.resume ? start : n >= WIDTH ? load(y) : n > 0 ? load_n(y, n) : zero();
    }
  }
  const std::byte* weights = s.weights + column * LANES * (4 / LANES);
  const auto step = [&](int64_t k, int lanes) __attribute__((always_inline)) {
    V w[VECTORS][LANES];
    for (int j = 0; j < VECTORS; ++j) Format::load(weights + j * WIDTH * 4, w[j]);
    for (int lane = 0; lane < lanes; ++lane)
      for (int r = 0; r < R; ++r) {
        const V x = set1(s.x[r * s.x_stride + k + lane]);
        for (int j = 0; j < VECTORS; ++j) acc[r][j] = fma(x, w[j][lane], acc[r][j]);
      }
    weights += PANEL * 4;
  };
  int64_t k = 0;
  if (s.ahead != nullptr && column == 0) {
    const std::byte* ahead = s.ahead;
    for (; k + LANES <= s.C; k += LANES) {
      prefetch(ahead);
      prefetch(ahead + s.ahead_bytes - 64);
      ahead += s.ahead_bytes;
      step(k, LANES);
    }
  } else {
    for (; k + LANES <= s.C; k += LANES) step(k, LANES);
  }
  if (k < s.C) step(k, 1);
  for (int j = 0; j < VECTORS; ++j) {
    const int first = column + j * WIDTH, n = s.columns - first;
    for (int r = 0; r < R; ++r) {
      float* y = s.y + r * s.y_stride + first;
      if (n >= WIDTH) store(y, acc[r][j]);
      else if (n > 0) store_n(y, acc[r][j], n);
    }
  }
}

// `rows` <= R rows, all columns.
template <class Format, int R, int VECTORS>
static inline void multiply_up_to(const Slice& s, int rows) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_up_to<Format, R - 1, VECTORS>(s, rows);
  }
  for (int column = 0; column < s.columns; column += VECTORS * WIDTH) multiply_rows<Format, R, VECTORS>(s, column);
}

// Channels k .. k + n of a panel as float32 [n][32].
template <class Format>
static inline void unpack(const std::byte* weights, int64_t n, float* out) {
  constexpr int LANES = Format::LANES;
  for (int64_t k = 0; k < n; k += LANES) {
    for (int j = 0; j < PANEL_VECTORS; ++j) {
      V w[LANES];
      Format::load(weights + j * WIDTH * 4, w);
      for (int lane = 0; lane < LANES; ++lane) store(out + (k + lane) * PANEL + j * WIDTH, w[lane]);
    }
    weights += PANEL * 4;
  }
}

constexpr int64_t PREFETCH_BYTES = 2048;

// Panel p of w times all rows. `scratch`: K_BLOCK * 32 floats of this thread.
template <class Format>
static void multiply_panel_vectors(const PackedMatrix& w, int64_t p, const float* x, int64_t x_stride, int64_t rows, float* y,
                                   int64_t y_stride, float* scratch) {
  const std::byte* panel = w.panel(p);
  const float* bias = w.panel_bias(p);
  const int columns = w.columns(p);
  const int64_t C = w.C;
  if (w.is_gemv(rows, DIRECT_ROWS)) {
    const Slice all = {panel, C, x, x_stride, y, y_stride, columns, bias, false, panel + PREFETCH_BYTES, 128};
    return multiply_up_to<Format, DIRECT_ROWS, PANEL_VECTORS>(all, int(rows));
  }
  constexpr bool UNPACK = Format::LANES != 1;
  const int64_t height = ceil_div(rows, ceil_div(rows, BLOCK_ROWS));  // blocks of one height: 16 rows are 8 and 8, not 12 and 4
  for (int64_t k = 0; k < C; k += K_BLOCK) {
    const int64_t n = smaller(K_BLOCK, C - k);
    const std::byte* block = panel + k * PANEL * (4 / Format::LANES);
    const std::byte* next = block + K_BLOCK * PANEL * (4 / Format::LANES);  // fetched while the first rows meet this block
    if constexpr (UNPACK) unpack<Format>(block, n, scratch);
    const std::byte* weights = UNPACK ? reinterpret_cast<const std::byte*>(scratch) : block;
    for (int64_t row = 0; row < rows; row += height) {
      const Slice slice = {weights, n, x + row * x_stride + k, x_stride, y + row * y_stride, y_stride, columns, bias, k > 0, row == 0 ? next : nullptr, PANEL * (4 / Format::LANES)};
      multiply_up_to<Fp32, BLOCK_ROWS, BLOCK_VECTORS>(slice, int(smaller(height, rows - row)));
    }
  }
}

}  // namespace apportion::APPORTION_ISA
