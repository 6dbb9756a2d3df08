// A panel times rows, whatever the format: vectors or matrix tiles.
#pragma once
#include "quantized_panel.h"

namespace apportion::APPORTION_ISA {

#if defined(__AVX512BF16__)
constexpr size_t PANEL_SCRATCH_BYTES = size_t(larger(TILE_SCRATCH_BYTES, sizeof(CodeScratch)));
constexpr int64_t GATED_ROWS = TILE_SUM_ROWS;
static_assert(PANEL_SCRATCH_BYTES >= K_BLOCK * PANEL * sizeof(float) && PANEL_SCRATCH_BYTES % 64 == 0);
#else
constexpr size_t PANEL_SCRATCH_BYTES = size_t(larger(K_BLOCK * PANEL * sizeof(float), sizeof(CodeScratch)));
constexpr int64_t GATED_ROWS = 64;  // whose gates and ups stay in L1 until they are combined
#endif

APPORTION_INLINE float* panel_scratch(ThreadTeam& team, int thread) { return reinterpret_cast<float*>(team.local(thread, PANEL_SCRATCH_BYTES)); }

// y[count, columns of panel p] = bias + rows w_p^T.
static inline void multiply_panel(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, float* scratch) {
  if (is_quantized(w.dtype())) return multiply_quantized_panel(w, p, rows, y, y_stride, scratch);
#if defined(__AVX512BF16__)
  if (uses_tiles(w)) return multiply_panel_tiles(w, p, rows.tiles, rows.count, y, y_stride, scratch);
#endif
  const auto multiply = w.dtype() == DType::FP32   ? multiply_panel_vectors<Fp32>
                        : w.dtype() == DType::BF16 ? multiply_panel_vectors<Bf16>
                                                 : multiply_panel_vectors<Fp16>;
  multiply(w, p, rows.x, rows.stride, rows.count, y, y_stride, scratch);
}

// Gate and up outputs of panel p, some rows at a time: f(first row, count, gates [count][32], ups [count][32]), padding included.
template <typename F>
static inline void multiply_gated_panel(ThreadTeam& team, int thread, PackedMatrix gate, PackedMatrix up, int64_t p, const Rows& gate_rows,
                                        const Rows& up_rows, F&& f) {
  constexpr size_t SCRATCH = PANEL_SCRATCH_BYTES / sizeof(float), OUTPUTS = size_t(larger(SCRATCH, GATED_ROWS * PANEL));
  float* memory = reinterpret_cast<float*>(team.local(thread, (SCRATCH + 2 * OUTPUTS) * sizeof(float)));
  float *gates = memory + SCRATCH, *ups = gates + OUTPUTS;
  const auto in_place = [](const PackedMatrix& w) { return uses_tiles(w) && !is_quantized(w.dtype()); };  // tiles keep sums where they end
  gate.N = up.N = padded(gate.N);  // the padding is zeros: its channels come out as zeros
  for (int64_t row = 0; row < gate_rows.count; row += GATED_ROWS) {
    const int64_t n = smaller(GATED_ROWS, gate_rows.count - row);
    multiply_panel(gate, p, gate_rows.from(row, n), gates, PANEL, in_place(gate) ? gates : memory);
    multiply_panel(up, p, up_rows.from(row, n), ups, PANEL, in_place(up) ? ups : memory);
    f(row, n, gates, ups);
  }
}

}  // namespace apportion::APPORTION_ISA
