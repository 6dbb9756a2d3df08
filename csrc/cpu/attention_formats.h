// How a cached number is packed into dwords: all that a KV format supplies. Methods (attention_kernels.cpp) take it as a template
// argument, so method x format is generated.
//
// A dword holds LANES numbers, number j in bits [j * 32 / LANES, (j + 1) * 32 / LANES).
#pragma once
#include "simd.h"

namespace apportion::APPORTION_ISA {

struct Fp32 {
  static constexpr int LANES = 1;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) { out[0] = load(reinterpret_cast<const float*>(p)); }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) { store(reinterpret_cast<float*>(codes), load(x)); }  // WIDTH numbers
};

struct Bf16 {
  static constexpr int LANES = 2;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) { load_bf16_pairs(reinterpret_cast<const uint16_t*>(p), out[0], out[1]); }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) {
    uint16_t packed[WIDTH];
    store_bf16(packed, load(x));
    for (int i = 0; i < WIDTH; ++i) codes[i] = packed[i];
  }
};

struct Fp16 {
  static constexpr int LANES = 2;
  APPORTION_INLINE void unpack(const uint32_t* p, V out[LANES]) { load_fp16_pairs(reinterpret_cast<const uint16_t*>(p), out[0], out[1]); }
  APPORTION_INLINE void encode(const float* x, uint32_t* codes) {
    uint16_t packed[WIDTH];
    store_fp16(packed, load(x));
    for (int i = 0; i < WIDTH; ++i) codes[i] = packed[i];
  }
};

// The first n dwords at p, the rest 0, for the ends of rows that are no multiple of WIDTH.
template <typename F>
APPORTION_INLINE void unpack_n(const uint32_t* p, int n, V out[F::LANES]) {
  uint32_t whole[WIDTH];
  store(reinterpret_cast<float*>(whole), load_n(reinterpret_cast<const float*>(p), n));
  F::unpack(whole, out);
}

}  // namespace apportion::APPORTION_ISA
