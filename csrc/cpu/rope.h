// Rotary embedding of one head (Su et al., RoFormer, section 3.4.2).
#pragma once
#include "simd.h"

namespace apportion::APPORTION_ISA {

// x [rotary_dim] in place; cs: rotary_dim / 2 cosines, then as many sines. Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1).
APPORTION_INLINE void rotate_head(float* x, const float* cs, int rotary_dim, bool interleaved) {
  const int half = rotary_dim / 2;
  const float *cosines = cs, *sines = cs + half;
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  for (int i = 0; i < half; i += WIDTH) {
    const int n = half - i;
    const V a = load_n(x + i, n), b = load_n(x + half + i, n), c = load_n(cosines + i, n), s = load_n(sines + i, n);
    store_n(x + i, a * c - b * s, n);
    store_n(x + half + i, b * c + a * s, n);
  }
}

// x [n] -> x / sqrt(mean(x^2) + eps) * weight in place
APPORTION_INLINE void normalize_head(float* x, const float* weight, int n, float eps) {
  V sum = zero();
  for (int i = 0; i < n; i += WIDTH) {
    const V a = load_n(x + i, n - i);
    sum = fma(a, a, sum);
  }
  const V scale = set1(1.f / std::sqrt(reduce_add(sum) / float(n) + eps));
  for (int i = 0; i < n; i += WIDTH) store_n(x + i, load_n(x + i, n - i) * scale * load_n(weight + i, n - i), n - i);
}

}  // namespace apportion::APPORTION_ISA
