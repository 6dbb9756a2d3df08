// One bf16 panel times many rows in matrix tiles (AMX).
#pragma once
#include "tile_rows.h"

#if defined(__AMX_BF16__)
namespace apportion::APPORTION_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 1 / 2 3: sums of the upper / lower 16 rows, left and right 16 columns. 4, 5: upper and lower rows of x. 6, 7: weights.
static inline void configure_tiles(int upper, int lower) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = uint8_t(tile >= 6 ? TILE_ROWS : tile == 4 || tile < 2 ? upper : lower);
  }
  _tile_loadconfig(&config);
}

struct TileSlice {
  const uint16_t* upper;               // tiles of the upper 16 rows
  const uint16_t* lower;               // of the lower rows; unused with one row block
  int64_t upper_stride, lower_stride;  // elements from one tile to the next
  const std::byte* weights;
  int64_t steps;                       // of 32 channels
  const float* sums;                   // so far, [rows][32]; null: begin with `start`
  const float* start;                  // bias [32] or null
  float* y;                            // where the sums go
  int64_t y_stride;
  const std::byte* ahead = nullptr;    // weights wanted after these: `ahead_lines` lines of each step are fetched into L2 meanwhile
  int ahead_lines = 0;
};

// A tile load that misses L1 stalls the multiplication: so the weights of TILE_K_BLOCK channels (16 KiB) stay in L1 while up to
// TILE_SUM_ROWS rows pass over them, whose sums wait in L2 meanwhile. From TILE_AHEAD_ROWS rows on they have time to fetch the next
// block, each pair of row blocks a few lines: a quarter faster than to meet it in memory.
constexpr int64_t TILE_K_BLOCK = 256, TILE_SUM_ROWS = 512, TILE_AHEAD_ROWS = 256;
constexpr int64_t TILE_STEP_BYTES = TILE_K * PANEL * int64_t(sizeof(uint16_t));

template <bool TWO>
APPORTION_INLINE void load_sums(const TileSlice& s) {
  const float* from = s.sums != nullptr ? s.sums : s.start;
  if (from == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  const int64_t stride = s.sums != nullptr ? PANEL : 0;  // a stride of zero repeats the bias in every row
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + 16, stride * 4);
  if constexpr (TWO) {
    _tile_loadd(2, from + TILE_ROWS * stride, stride * 4);
    _tile_loadd(3, from + TILE_ROWS * stride + 16, stride * 4);
  }
}

template <bool TWO>
APPORTION_INLINE void store_sums(const TileSlice& s) {
  const size_t stride = size_t(s.y_stride) * sizeof(float);
  float* lower = s.y + TILE_ROWS * s.y_stride;
  _tile_stored(0, s.y, stride);
  _tile_stored(1, s.y + 16, stride);
  if constexpr (TWO) {
    _tile_stored(2, lower, stride);
    _tile_stored(3, lower + 16, stride);
  }
}

template <bool TWO>
APPORTION_INLINE void tile_step(const TileSlice& s, int64_t step, const std::byte* weights) {
  _tile_loadd(4, s.upper + step * s.upper_stride, 64);
  _tile_loadd(6, weights, 128);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, weights + 64, 128);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (TWO) {
    _tile_loadd(5, s.lower + step * s.lower_stride, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Few rows: weights come from memory, once. A tile load whose lines miss L1 stalls on each, so vector loads carry the next step into
// `buffer` (2 steps) while the tiles of this one are multiplied, and prefetches keep L2 ahead of them: 93 % of read bandwidth for one row against 78 %.
template <bool TWO>
static inline void stream_tiles(const TileSlice& s, std::byte* buffer) {
  constexpr int64_t AHEAD = 4096;
  const auto fetch = [&](int64_t step) __attribute__((always_inline)) {
    const std::byte* from = s.weights + step * TILE_STEP_BYTES;
    std::byte* to = buffer + (step & 1) * TILE_STEP_BYTES;
    for (int64_t i = 0; i < TILE_STEP_BYTES; i += 64) {
      __builtin_prefetch(from + AHEAD + i, 0, 2);
      _mm512_store_si512(to + i, _mm512_loadu_si512(from + i));
    }
    asm volatile("" ::: "memory");
  };
  load_sums<TWO>(s);
  fetch(0);
  for (int64_t step = 0; step < s.steps; ++step) {
    if (step + 1 < s.steps) fetch(step + 1);
    tile_step<TWO>(s, step, buffer + (step & 1) * TILE_STEP_BYTES);
  }
  store_sums<TWO>(s);
}

template <bool TWO>
static inline void multiply_tiles(const TileSlice& s) {
  load_sums<TWO>(s);
  for (int64_t step = 0; step < s.steps; ++step) {
    for (int line = 0; line < s.ahead_lines; ++line) __builtin_prefetch(s.ahead + step * TILE_STEP_BYTES + line * 64, 0, 2);
    tile_step<TWO>(s, step, s.weights + step * TILE_STEP_BYTES);
  }
  store_sums<TWO>(s);
}

// Panel p times all rows, in order of C for each. `scratch`: TILE_SCRATCH_BYTES of this thread: sums, then the stream's buffer.
constexpr size_t TILE_SCRATCH_BYTES = TILE_SUM_ROWS * PANEL * sizeof(float) + 2 * TILE_STEP_BYTES;

[[maybe_unused]] static void multiply_panel_tiles(const PackedMatrix& w, int64_t p, const uint16_t* tiles, int64_t rows, float* y, int64_t y_stride,
                                 float* scratch) {
  asm volatile("" ::: "memory");  // tile loads are opaque to the compiler: what they read must have been written
  std::byte* buffer = reinterpret_cast<std::byte*>(scratch + TILE_SUM_ROWS * PANEL);
  const int64_t C = padded(w.C), columns = w.columns(p);
  int configured = 0;
  for (int64_t first = 0; first < rows; first += TILE_SUM_ROWS) {
    const int64_t last = smaller(rows, first + TILE_SUM_ROWS);
    const int64_t k_block = last - first <= 2 * TILE_ROWS ? C : TILE_K_BLOCK;  // few rows: the weights pass once
    const int64_t pairs = ceil_div(last - first, 2 * TILE_ROWS), lines = ceil_div(TILE_STEP_BYTES / 64, pairs);
    const bool fetches = last - first >= TILE_AHEAD_ROWS;
    for (int64_t k = 0; k < C; k += k_block) {
      const int64_t n = smaller(k_block, C - k);
      const bool direct = k + n == C && columns == PANEL;
      for (int64_t row = first; row < last; row += 2 * TILE_ROWS) {
        const int64_t left = smaller(last - row, 2 * TILE_ROWS), block = row / TILE_ROWS;
        const int upper = int(smaller(left, TILE_ROWS)), lower = int(left - upper);
        if (configured != left) configure_tiles(upper, lower > 0 ? lower : upper);
        configured = int(left);
        float* sums = scratch + (row - first) * PANEL;
        const TileSlice slice = {
            .upper = tile_block(tiles, w.C, block) + k * upper,
            .lower = tile_block(tiles, w.C, block + 1) + k * lower,
            .upper_stride = upper * TILE_K,
            .lower_stride = lower * TILE_K,
            .weights = w.panel(p) + k * PANEL * 2,
            .steps = n / TILE_K,
            .sums = k > 0 ? sums : nullptr,
            .start = w.panel_bias(p),
            .y = direct ? y + row * y_stride : sums,
            .y_stride = direct ? y_stride : PANEL,
            .ahead = w.panel(p) + (k + n) * PANEL * 2 + (row - first) / (2 * TILE_ROWS) * lines * 64,  // what follows in memory
            .ahead_lines = fetches ? int(lines) : 0,
        };
        if (row == first && !fetches) lower > 0 ? stream_tiles<true>(slice, buffer) : stream_tiles<false>(slice, buffer);
        else lower > 0 ? multiply_tiles<true>(slice) : multiply_tiles<false>(slice);
      }
    }
    asm volatile("" ::: "memory");
    if (columns != PANEL)
      for (int64_t row = first; row < last; ++row) std::memcpy(y + row * y_stride, scratch + (row - first) * PANEL, size_t(columns) * sizeof(float));
  }
  _tile_release();
}

}  // namespace apportion::APPORTION_ISA
#endif
