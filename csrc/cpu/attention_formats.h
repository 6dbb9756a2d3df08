// How a cached number is packed into dwords: all that a KV format supplies. Methods (attention_kernels.cpp) take it as a template
// argument, so method x format is generated.
//
// A dword holds LANES numbers, number j in bits [j * 32 / LANES, (j + 1) * 32 / LANES). A product takes it in OPERANDS vectors: one for
// each number, or one for both, and the other factor alike.
#pragma once
#include "simd.h"

namespace apportion::APPORTION_ISA {

struct Widened {
  APPORTION_INLINE V add_product(V x, V number, V sum) { return fma(x, number, sum); }
};

struct Fp32 : Widened {
  static constexpr int LANES = 1, OPERANDS = 1;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) { out[0] = load(reinterpret_cast<const float*>(p)); }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) { store(reinterpret_cast<float*>(codes), load(x)); }  // WIDTH numbers
};

struct Bf16 : Widened {
  static constexpr int LANES = 2, OPERANDS = 2;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) { load_bf16_pairs(reinterpret_cast<const uint16_t*>(p), out[0], out[1]); }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) {
    uint16_t packed[WIDTH];
    store_bf16(packed, load(x));
    for (int i = 0; i < WIDTH; ++i) codes[i] = packed[i];
  }
};

#if defined(__AVX512BF16__)
// bf16 as it lies, multiplied in pairs by bf16.
struct Bf16Pairs {
  static constexpr int LANES = 2, OPERANDS = 1;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[OPERANDS]) { out[0] = load(reinterpret_cast<const float*>(p)); }
  APPORTION_INLINE V add_product(V x, V pairs, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)pairs); }
};
#endif

struct Fp16 : Widened {
  static constexpr int LANES = 2, OPERANDS = 2;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) { load_fp16_pairs(reinterpret_cast<const uint16_t*>(p), out[0], out[1]); }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) {
    uint16_t packed[WIDTH];
    store_fp16(packed, load(x));
    for (int i = 0; i < WIDTH; ++i) codes[i] = packed[i];
  }
};

// Half floats in the low (high = 0) or high (high = 1) halves of WIDTH dwords.
#if defined(__AVX512F__)
using Dwords = __m512i;
APPORTION_INLINE Dwords dwords(const uint32_t* p) { return _mm512_loadu_si512(p); }
template <bool HIGH>
APPORTION_INLINE V halves(Dwords d) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(HIGH ? _mm512_srli_epi32(d, 16) : d)); }
#elif defined(__AVX2__)
using Dwords = __m256i;
APPORTION_INLINE Dwords dwords(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <bool HIGH>
APPORTION_INLINE V halves(Dwords d) {
  return _mm256_cvtph_ps(narrow(HIGH ? _mm256_srli_epi32(d, 16) : _mm256_and_si256(d, _mm256_set1_epi32(0xffff))));
}
#else
using Dwords = uint32_t __attribute__((vector_size(16)));
APPORTION_INLINE Dwords dwords(const uint32_t* p) {
  Dwords d;
  std::memcpy(&d, p, sizeof(d));
  return d;
}
template <bool HIGH>
APPORTION_INLINE V halves(Dwords d) {
  V out;
  for (int i = 0; i < WIDTH; ++i) out[i] = fp16_to_float(uint16_t(d[i] >> (HIGH ? 16 : 0)));
  return out;
}
#endif

// Two bytes of each dword, in the upper halves of its words, as half floats: a byte's bits stand as those of a half float, all of them
// for e5m2; e4m3 has one exponent bit less, so that what comes out is 2^-8 of the number (Shape::unit).
template <bool E4M3>
APPORTION_INLINE Dwords bytes_to_halves(Dwords high) {
#if defined(__AVX512F__)
  if constexpr (!E4M3) return _mm512_and_si512(high, _mm512_set1_epi32(int(0xff00ff00)));
  else return _mm512_or_si512(_mm512_and_si512(high, _mm512_set1_epi32(int(0x80008000))),
                              _mm512_and_si512(_mm512_srli_epi32(high, 1), _mm512_set1_epi32(0x3f803f80)));
#elif defined(__AVX2__)
  if constexpr (!E4M3) return _mm256_and_si256(high, _mm256_set1_epi32(int(0xff00ff00)));
  else return _mm256_or_si256(_mm256_and_si256(high, _mm256_set1_epi32(int(0x80008000))),
                              _mm256_and_si256(_mm256_srli_epi32(high, 1), _mm256_set1_epi32(0x3f803f80)));
#else
  if constexpr (!E4M3) return high & 0xff00ff00u;
  else return (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
#endif
}

APPORTION_INLINE Dwords bytes_up(Dwords d) {
#if defined(__AVX512F__)
  return _mm512_slli_epi32(d, 8);
#elif defined(__AVX2__)
  return _mm256_slli_epi32(d, 8);
#else
  return d << 8;
#endif
}

// One float8: MANTISSA bits, LARGEST its largest number. To nearest even, what is larger becomes LARGEST, a NaN stays one.
template <int MANTISSA>
APPORTION_INLINE uint32_t float_to_float8(float x) {
  constexpr int BIAS = MANTISSA == 3 ? 7 : 15, SHIFT = 23 - MANTISSA;
  constexpr float LARGEST = MANTISSA == 3 ? 448.f : 57344.f, NORMAL = MANTISSA == 3 ? 0x1p-6f : 0x1p-14f;
  constexpr float STEPS = MANTISSA == 3 ? 0x1p14f : 0x1p7f;  // its last place is a step of the subnormals
  const uint32_t sign = float_to_bits(x) >> 24 & 0x80;
  float a = std::fabs(x);
  if (a != a) return sign | 0x7f;
  a = a < LARGEST ? a : LARGEST;
  if (a < NORMAL) return sign | (float_to_bits(a + STEPS) - float_to_bits(STEPS));
  const uint32_t bits = float_to_bits(a);
  return sign | (((bits + ((1u << (SHIFT - 1)) - 1) + (bits >> SHIFT & 1)) >> SHIFT) - (uint32_t(127 - BIAS) << MANTISSA));
}

template <int MANTISSA>
struct Float8 : Widened {
  static constexpr int LANES = 4, OPERANDS = 4;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) {
    const Dwords d = dwords(p), even = bytes_to_halves<MANTISSA == 3>(bytes_up(d)), odd = bytes_to_halves<MANTISSA == 3>(d);
    out[0] = halves<false>(even);
    out[1] = halves<false>(odd);
    out[2] = halves<true>(even);
    out[3] = halves<true>(odd);
  }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) {
    for (int i = 0; i < WIDTH; ++i) codes[i] = float_to_float8<MANTISSA>(x[i]);
  }
};
using E4m3 = Float8<3>;  // NaN codes of e4m3 read as +-480 here: who stored one has a NaN in its hidden state anyway
using E5m2 = Float8<2>;

// The first n dwords at p, the rest 0, for the ends of rows that are no multiple of WIDTH.
template <typename F>
APPORTION_INLINE void unpack_n(const uint32_t* p, int n, V out[F::OPERANDS]) {
  uint32_t whole[WIDTH];
  store(reinterpret_cast<float*>(whole), load_n(reinterpret_cast<const float*>(p), n));
  F::unpack(whole, out);
}

}  // namespace apportion::APPORTION_ISA
