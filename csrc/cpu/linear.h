// Linears over packed panels: [N / 32][C / lanes][32][lanes], lanes = 4 / element bytes, N and C padded to 32 with zeros. So 32
// outputs of one or two input channels are 128 contiguous bytes, and 32 channels of a 16-bit panel are two bf16 matrix tiles
// (16 rows of 64 bytes) side by side with a row stride of 128 bytes. The layout is the same for every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "thread_team.h"

namespace apportion {

enum class DType : int { FP32 = 0, BF16 = 1, FP16 = 2 };

constexpr int64_t PANEL = 32;
constexpr int64_t element_bytes(DType dtype) { return dtype == DType::FP32 ? 4 : 2; }
constexpr int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

struct PackedMatrix {
  DType dtype;
  int64_t N, C;
  std::byte* panels = nullptr;
  const float* bias = nullptr;  // [padded(N)] or null
  int64_t interleaved = 1;      // matrices that share the buffer panel by panel (gate and up of an expert)

  int64_t num_panels() const { return padded(N) / PANEL; }
  int64_t panel_bytes() const { return padded(C) * PANEL * element_bytes(dtype); }
  int64_t nbytes() const { return num_panels() * panel_bytes(); }
  std::byte* panel(int64_t p) const { return panels + p * interleaved * panel_bytes(); }
  const float* panel_bias(int64_t p) const { return bias == nullptr ? nullptr : bias + p * PANEL; }
  int columns(int64_t p) const { return int(N - p * PANEL < PANEL ? N - p * PANEL : PANEL); }
};

struct LinearKernels {
  // y[rows, N] = x[rows, C] w^T + bias; x and y have row strides in floats.
  void (*multiply)(ThreadTeam& team, const PackedMatrix& w, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows);
  // Rows first .. first + count of w from source [count, C] (row stride in elements), rounded to nearest even. Zeroes the padding.
  void (*pack)(ThreadTeam& team, const PackedMatrix& w, const void* source, DType source_dtype, int64_t stride, int64_t first, int64_t count);
  // out[count, C] = rows ids[count] of w. Ids are in range.
  void (*gather)(ThreadTeam& team, const PackedMatrix& w, const int32_t* ids, int64_t count, float* out);
};

}  // namespace apportion
