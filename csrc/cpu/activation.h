// silu(gate) * up, shared by the operator and the experts.
#pragma once
#include "simd.h"

namespace apportion::APPORTION_ISA {

// e^80 stands for all that is larger: 1 / (1 + e^80) is 0 beside 1, and its reciprocal is a normal number.
APPORTION_INLINE V gate(V g, V up) { return g * reciprocal(set1(1.f) + exp(min(set1(80.f), zero() - g))) * up; }

static inline void gate_row(const float* g, const float* up, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(out + i, gate(load(g + i), load(up + i)));
  if (i < n) store_n(out + i, gate(load_n(g + i, int(n - i)), load_n(up + i, int(n - i))), int(n - i));
}

}  // namespace apportion::APPORTION_ISA
