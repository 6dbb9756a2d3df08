// Float vectors of one instruction set: the words kernels are written in. `V` is a compiler vector, so + - * / work on it; its
// width is WIDTH. A new instruction set adds one branch here. No sum is reassociated: what the code says is the order.
//
// Everything is static inline inside the set's namespace: a function compiled for one set must never be merged with another's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define APPORTION_INLINE static inline __attribute__((always_inline))

namespace apportion::APPORTION_ISA {

APPORTION_INLINE float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
APPORTION_INLINE uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

APPORTION_INLINE float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
APPORTION_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

APPORTION_INLINE float fp16_to_float(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
  const uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);  // subnormals come out right
  const uint32_t special = magnitude | 0x7f800000;                             // infinity and NaN
  return bits_to_float((magnitude >= 0x0f800000 ? special : scaled) | uint32_t(bits & 0x8000) << 16);
#endif
}

// Round to nearest even, overflow to infinity, a NaN stays a NaN.
APPORTION_INLINE uint16_t float_to_fp16(float value) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  else if (magnitude >= 0x477ff000) half = 0x7c00;
  else if (magnitude < 0x38800000) half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds subnormals
  else half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return uint16_t(half | sign);
#endif
}

#if defined(__AVX512F__)

using V = __m512;
constexpr int WIDTH = 16;
APPORTION_INLINE V zero() { return _mm512_setzero_ps(); }
APPORTION_INLINE V set1(float a) { return _mm512_set1_ps(a); }
APPORTION_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
APPORTION_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
APPORTION_INLINE __mmask16 first(int n) { return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1); }
APPORTION_INLINE V load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
APPORTION_INLINE void store_n(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
APPORTION_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
APPORTION_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
APPORTION_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }              // b where either is NaN
APPORTION_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
APPORTION_INLINE V sqrt(V a) { return _mm512_sqrt_ps(a); }
// 1 / a for a in [1, 2^125], error below 2 units in the last place; NaN for NaN.
APPORTION_INLINE V reciprocal(V a) {
  const V r = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(a, r, set1(1.f)), r, r);
}
APPORTION_INLINE V select_less(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
// a * 2^n for a in [1/2, 4), n an integral float in [-127, 127]
APPORTION_INLINE V scale_pow2(V a, V n) { return _mm512_scalef_ps(a, n); }
APPORTION_INLINE V load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
APPORTION_INLINE V load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
APPORTION_INLINE void store_bf16(uint16_t* p, V a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
APPORTION_INLINE void store_fp16(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// 16-bit values in pairs (k, k + 1) of 32-bit words, as weight panels keep them.
APPORTION_INLINE void load_bf16_pairs(const uint16_t* p, V& even, V& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}
APPORTION_INLINE void load_fp16_pairs(const uint16_t* p, V& even, V& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}

#elif defined(__AVX2__)

using V = __m256;
constexpr int WIDTH = 8;
APPORTION_INLINE V zero() { return _mm256_setzero_ps(); }
APPORTION_INLINE V set1(float a) { return _mm256_set1_ps(a); }
APPORTION_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
APPORTION_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
APPORTION_INLINE __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
APPORTION_INLINE V load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
APPORTION_INLINE void store_n(float* p, V a, int n) { _mm256_maskstore_ps(p, first(n), a); }
APPORTION_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
APPORTION_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
APPORTION_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
APPORTION_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
APPORTION_INLINE V sqrt(V a) { return _mm256_sqrt_ps(a); }
APPORTION_INLINE V reciprocal(V a) { return set1(1.f) / a; }
APPORTION_INLINE V select_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
APPORTION_INLINE V scale_pow2(V a, V n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
APPORTION_INLINE V load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
APPORTION_INLINE V load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// The low halves of eight 32-bit words below 65536.
APPORTION_INLINE __m128i narrow(__m256i words) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08));
}
APPORTION_INLINE void store_bf16(uint16_t* p, V a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(_mm256_blendv_epi8(rounded, quiet, nan)));
}
APPORTION_INLINE void store_fp16(uint16_t* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
APPORTION_INLINE void load_bf16_pairs(const uint16_t* p, V& even, V& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}
APPORTION_INLINE void load_fp16_pairs(const uint16_t* p, V& even, V& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_cvtph_ps(narrow(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff))));
  odd = _mm256_cvtph_ps(narrow(_mm256_srli_epi32(pairs, 16)));
}

#else

using V = float __attribute__((vector_size(16), may_alias));
using VInt = int32_t __attribute__((vector_size(16), may_alias));
constexpr int WIDTH = 4;
APPORTION_INLINE V set1(float a) { return V{a, a, a, a}; }
APPORTION_INLINE V zero() { return set1(0.f); }
APPORTION_INLINE V load(const float* p) {
  V a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
APPORTION_INLINE void store(float* p, V a) { std::memcpy(p, &a, sizeof(a)); }
APPORTION_INLINE V load_n(const float* p, int n) {
  V a = zero();
  for (int i = 0; i < WIDTH && i < n; ++i) a[i] = p[i];
  return a;
}
APPORTION_INLINE void store_n(float* p, V a, int n) {
  for (int i = 0; i < WIDTH && i < n; ++i) p[i] = a[i];
}
// Two roundings: a fused multiply-add is not in the baseline of x86-64.
APPORTION_INLINE V fma(V a, V b, V c) { return a * b + c; }
APPORTION_INLINE V fnma(V a, V b, V c) { return c - a * b; }
APPORTION_INLINE V max(V a, V b) { return a > b ? a : b; }
APPORTION_INLINE V min(V a, V b) { return a < b ? a : b; }
APPORTION_INLINE V sqrt(V a) {
  for (int i = 0; i < WIDTH; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
APPORTION_INLINE V reciprocal(V a) { return set1(1.f) / a; }
APPORTION_INLINE V select_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
APPORTION_INLINE V scale_pow2(V a, V n) { return V(VInt(a) + (__builtin_convertvector(n, VInt) << 23)); }
APPORTION_INLINE V load_bf16(const uint16_t* p) {
  V a;
  for (int i = 0; i < WIDTH; ++i) a[i] = bf16_to_float(p[i]);
  return a;
}
APPORTION_INLINE V load_fp16(const uint16_t* p) {
  V a;
  for (int i = 0; i < WIDTH; ++i) a[i] = fp16_to_float(p[i]);
  return a;
}
APPORTION_INLINE void store_bf16(uint16_t* p, V a) {
  for (int i = 0; i < WIDTH; ++i) p[i] = float_to_bf16(a[i]);
}
APPORTION_INLINE void store_fp16(uint16_t* p, V a) {
  for (int i = 0; i < WIDTH; ++i) p[i] = float_to_fp16(a[i]);
}
APPORTION_INLINE void load_bf16_pairs(const uint16_t* p, V& even, V& odd) {
  VInt pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  even = V(pairs << 16);
  odd = V(pairs & int32_t(0xffff0000));
}
APPORTION_INLINE void load_fp16_pairs(const uint16_t* p, V& even, V& odd) {
  for (int i = 0; i < WIDTH; ++i) {
    even[i] = fp16_to_float(p[2 * i]);
    odd[i] = fp16_to_float(p[2 * i + 1]);
  }
}

#endif

// Lanes are folded in halves: one order, whatever the compiler and the set.
#if defined(__AVX2__)
APPORTION_INLINE float fold_add(__m128 a) {
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
APPORTION_INLINE float fold_max(__m128 a) {
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}
APPORTION_INLINE __m128 half_add(__m256 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
APPORTION_INLINE __m128 half_max(__m256 a) { return _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
#if defined(__AVX512F__)
APPORTION_INLINE float reduce_add(V a) { return fold_add(half_add(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)))); }
APPORTION_INLINE float reduce_max(V a) { return fold_max(half_max(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)))); }
#else
APPORTION_INLINE float reduce_add(V a) { return fold_add(half_add(a)); }
APPORTION_INLINE float reduce_max(V a) { return fold_max(half_max(a)); }
#endif
#else
APPORTION_INLINE float reduce_add(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
APPORTION_INLINE float reduce_max(V a) {
  const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
  return even > odd ? even : odd;
}
#endif

// e^x, error below 2 units in the last place; 0 below -87.3, infinity above 88.7, NaN for NaN.
// Cephes expf: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 5 in r.
APPORTION_INLINE V exp(V x) {
  const V low = set1(-87.33654f), high = set1(88.72283f);
  const V clamped = min(set1(88.02969f), max(low, x));  // the second operand wins where x is NaN
  const V magic = set1(12582912.f);                     // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const V n = (fma(clamped, set1(1.44269504f), magic)) - magic;
  V r = fnma(n, set1(0.693359375f), clamped);
  r = fnma(n, set1(-2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.f);
  const V result = select_less(x, low, zero(), scale_pow2(p, n));
  return select_less(high, x, set1(INFINITY), result);
}

}  // namespace apportion::APPORTION_ISA
