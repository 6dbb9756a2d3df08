// Linears over packed panels. Floating point: [N / 32][C / lanes][32][lanes], lanes = 4 / element bytes, N and C padded to 32 with
// zeros. So 32 outputs of one or two input channels are 128 contiguous bytes, and 32 channels of a 16-bit panel are two bf16 matrix
// tiles (16 rows of 64 bytes) side by side with a row stride of 128 bytes.
//
// Quantized: a panel is the scales of its groups of channels, [groups][32 or 1], their zeros alike, and the codes, 32 channels after 32
// channels (codes.h); each part is aligned to 64 bytes. C is padded to 32 (int8: 64); scales of padded outputs are 0.
// The layout is the same for every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "thread_team.h"

namespace apportion {

enum class DType : int { FP32 = 0, BF16 = 1, FP16 = 2, E4M3 = 3, E5M2 = 4, INT8 = 5, INT4 = 6, INT3 = 7, INT2 = 8, INT5 = 9, INT6 = 10, INT7 = 11 };
enum class Zero : int { NONE = 0, POINT = 1, MINIMUM = 2 };
enum class Rounding : int { NONE = 0, FLOAT8 = 1, INTEGER = 2 };

constexpr int64_t PANEL = 32;
constexpr bool is_quantized(DType dtype) { return dtype > DType::FP16; }
constexpr int64_t element_bytes(DType dtype) { return dtype == DType::FP32 ? 4 : 2; }  // of floating point
constexpr bool is_integer(DType dtype) { return dtype > DType::E5M2; }
constexpr int code_bits(DType dtype) {  // of quantized ones
  constexpr int bits[] = {8, 8, 8, 4, 3, 2, 5, 6, 7};
  return bits[int(dtype) - int(DType::E4M3)];
}
constexpr int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }
constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// What x is rounded to before a quantized matrix multiplies its codes: e4m3, or integers of some bits.
struct InputRounding {
  Rounding kind = Rounding::NONE;
  int bits = 8;
  int64_t group = 0;  // channels of a row that share a scale, 0: all
  bool fixed = false;  // one scale, stored with the matrix

  bool operator==(const InputRounding&) const = default;
};

// How the numbers of a matrix are stored. Beyond `dtype` all is about quantized ones.
struct WeightFormat {
  DType dtype = DType::FP32;
  int64_t group = 0;               // channels that share a scale, a multiple of 32; 0: all
  bool common = false;             // one scale for the 32 outputs of a panel, else one each
  DType scale_dtype = DType::FP32;
  Zero zero = Zero::NONE;
  bool permuted = false;
  InputRounding rounding;
};

struct PackedMatrix {
  WeightFormat format;
  int64_t N, C;
  std::byte* panels = nullptr;
  const float* bias = nullptr;         // [padded(N)] or null
  int64_t stride = 0;                  // bytes from a panel to the next, where another matrix lies between them; 0: none
  const int32_t* order = nullptr;      // [C]: the input channel of each column, or null
  const float* input_scale = nullptr;  // of a fixed rounding
  uint64_t gemv = ~uint64_t(0);        // bit r - 1: r rows may be multiplied directly, as far as the instruction set can (`gemv_rows`)

  DType dtype() const { return format.dtype; }
  int64_t num_panels() const { return padded(N) / PANEL; }
  // C padded: int8 to whole int8 tiles.
  int64_t depth() const { return dtype() == DType::INT8 && format.group % 64 == 0 ? aligned(C) : padded(C); }
  int64_t group() const { return format.group == 0 ? depth() : format.group; }
  bool is_gemv(int64_t rows, int most) const { return rows <= most && (gemv >> (rows - 1) & 1); }
  int64_t num_groups() const { return (C + group() - 1) / group(); }
  int64_t scale_bytes() const { return aligned(num_groups() * (format.common ? 1 : PANEL) * element_bytes(format.scale_dtype)); }
  int64_t zero_bytes() const {
    const int64_t count = num_groups() * (format.common ? 1 : PANEL);
    return format.zero == Zero::NONE ? 0 : aligned(count * (format.zero == Zero::POINT ? 1 : element_bytes(format.scale_dtype)));
  }
  int64_t panel_bytes() const {
    if (!is_quantized(dtype())) return padded(C) * PANEL * element_bytes(dtype());
    return scale_bytes() + zero_bytes() + depth() * PANEL * code_bits(dtype()) / 8;
  }
  int64_t nbytes() const { return num_panels() * panel_bytes(); }
  std::byte* panel(int64_t p) const { return panels + p * (stride > 0 ? stride : panel_bytes()); }
  std::byte* codes(int64_t p) const { return panel(p) + scale_bytes() + zero_bytes(); }
  const float* panel_bias(int64_t p) const { return bias == nullptr ? nullptr : bias + p * PANEL; }
  // What follows panels and bias: the order, and the input's scale.
  int64_t extra_bytes() const { return (format.permuted ? aligned(C * 4) : 0) + (format.rounding.fixed ? 64 : 0); }
  void bind_extra(std::byte* at) {
    if (format.permuted) order = reinterpret_cast<const int32_t*>(at);
    if (format.rounding.fixed) input_scale = reinterpret_cast<const float*>(at + (format.permuted ? aligned(C * 4) : 0));
  }
  int columns(int64_t p) const { return int(N - p * PANEL < PANEL ? N - p * PANEL : PANEL); }
};

// Two ways through a panel, of one order of sums: as a GEMV, every number widened in registers where it is multiplied, or flat, a block
// of channels widened once, into L1, for all rows. Which is faster for how many rows is measured (PackedMatrix::gemv).
struct LinearKernels {
  int (*gemv_rows)(const PackedMatrix& w);  // most rows of a GEMV; 0: there is one way through such a matrix
  // y[rows, N] = x[rows, C] w^T + bias; x and y have row strides in floats.
  void (*multiply)(ThreadTeam& team, const PackedMatrix& w, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows);
  // y[rows, N] = silu(x gate^T + bias) * (x up^T + bias), gate and up of one shape and dtype.
  void (*multiply_gated)(ThreadTeam& team, const PackedMatrix& gate, const PackedMatrix& up, const float* x, int64_t x_stride, float* y,
                         int64_t y_stride, int64_t rows);
  // Rows first .. first + count of w from source [count, C] (row stride in elements), rounded to nearest even. Zeroes the padding.
  void (*pack)(ThreadTeam& team, const PackedMatrix& w, const void* source, DType source_dtype, int64_t stride, int64_t first, int64_t count);
  // out[count, C] = rows ids[count] of w. Ids are in range.
  void (*gather)(ThreadTeam& team, const PackedMatrix& w, const int32_t* ids, int64_t count, float* out);
};

// Rows of a quantized matrix as they come: codes [count, C], one byte each (integers in offset binary); scales [rows, groups] float32 and
// zeros (bytes, or float32 minima) of that shape, a row of them for each `block` rows of the matrix (0: one for all).
struct QuantizedRows {
  const uint8_t* codes;
  const float* scales;
  const void* zeros;
  int64_t block;
};

// `first` is a multiple of the block. Pads as `pack` does.
void pack_quantized(ThreadTeam& team, const PackedMatrix& w, const QuantizedRows& source, int64_t first, int64_t count);
// As LinearKernels::gather: code times scale in float32, columns in the order of the inputs.
void gather_quantized(ThreadTeam& team, const PackedMatrix& w, const int32_t* ids, int64_t count, float* out);

}  // namespace apportion
