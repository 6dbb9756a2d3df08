// A panel times rows, whatever the format: vectors or matrix tiles.
#pragma once
#include "panel.h"
#include "panel_tiles.h"

namespace apportion::APPORTION_ISA {

struct Rows {
  const float* x;          // [count, C] with a row stride; unused where the format uses tiles
  int64_t stride;
  const uint16_t* tiles;   // the bf16 copy of the rows (panel_tiles.h) where the format uses tiles
  int64_t count;
};

APPORTION_INLINE float* panel_scratch(ThreadTeam& team, int thread) {
#if defined(__AMX_BF16__)
  constexpr size_t BYTES = TILE_SCRATCH_BYTES;
  static_assert(BYTES >= K_BLOCK * PANEL * sizeof(float));
#else
  constexpr size_t BYTES = K_BLOCK * PANEL * sizeof(float);
#endif
  return reinterpret_cast<float*>(team.local(thread, BYTES));
}

// y[count, columns of panel p] = bias + rows w_p^T.
static inline void multiply_panel(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, float* scratch) {
#if defined(__AMX_BF16__)
  if (uses_tiles(w.dtype)) return multiply_panel_tiles(w, p, rows.tiles, rows.count, y, y_stride, scratch);
#endif
  const auto multiply = w.dtype == DType::FP32   ? multiply_panel_vectors<Fp32>
                        : w.dtype == DType::BF16 ? multiply_panel_vectors<Bf16>
                                                 : multiply_panel_vectors<Fp16>;
  multiply(w, p, rows.x, rows.stride, rows.count, y, y_stride, scratch);
}

}  // namespace apportion::APPORTION_ISA
