// Scales and zeros of one panel, as they lie before its codes.
#pragma once
#include "linear.h"
#include "panel.h"

namespace apportion::APPORTION_ISA {

struct PanelScales {
  const std::byte *scales, *zeros;
  DType dtype;
  bool common;    // one for the 32 columns, else one each
  Zero zero;
  float middle;   // of the codes

  PanelScales(const PackedMatrix& w, int64_t p)
      : scales(w.panel(p)), zeros(scales + w.scale_bytes()), dtype(w.format.scale_dtype), common(w.format.common), zero(w.format.zero),
        middle(float(1 << (code_bits(w.dtype()) - 1))) {}

  // Of vector j of the columns, in group g of the channels.
  inline __attribute__((always_inline)) V scale(int64_t g, int j) const { return numbers(scales, g, j); }
  inline __attribute__((always_inline)) V minimum(int64_t g, int j) const { return numbers(zeros, g, j); }
  inline __attribute__((always_inline)) V point(int64_t g, int j) const {
    if (common) return set1(float(uint8_t(zeros[g])));
    alignas(64) float points[WIDTH];
    for (int c = 0; c < WIDTH; ++c) points[c] = float(uint8_t(zeros[g * PANEL + j * WIDTH + c]));
    return load(points);
  }

 private:
  inline __attribute__((always_inline)) V numbers(const std::byte* from, int64_t g, int j) const {
    if (common) {
      if (dtype == DType::FP32) return set1(reinterpret_cast<const float*>(from)[g]);
      const uint16_t half = reinterpret_cast<const uint16_t*>(from)[g];
      return set1(dtype == DType::BF16 ? bf16_to_float(half) : fp16_to_float(half));
    }
    const int64_t i = g * PANEL + j * WIDTH;
    if (dtype == DType::FP32) return load(reinterpret_cast<const float*>(from) + i);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from) + i;
    return dtype == DType::BF16 ? load_bf16(halves) : load_fp16(halves);
  }
};

}  // namespace apportion::APPORTION_ISA
