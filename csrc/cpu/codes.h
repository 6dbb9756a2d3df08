// Codes of low-bit weights, from where they lie in a panel to bf16, which holds every one of their values exactly, or to bytes.
//
// A step is 32 channels x 32 columns. In bf16 it is what a bf16 panel has: [16 pairs of channels][32 columns][2].
//   integers    in planes of bits (code_planes.h)
//   float8      a row of 64 bytes for each pair, in the order that interleaving two byte vectors brings forth
#pragma once
#include "code_planes.h"
#include "linear.h"
#include "simd.h"

namespace apportion::APPORTION_ISA {

constexpr int64_t STEP_NUMBERS = STEP * PANEL;

template <DType>
struct Codes;

APPORTION_INLINE uint16_t small_integer(int value) { return uint16_t(float_to_bits(float(value)) >> 16); }  // exact up to 8 bits

// ---- integers ---------------------------------------------------------------------------------------------------------------

#if defined(__AVX512BW__)
// Moves bits of 16-bit words from place `from` to place `to`.
APPORTION_INLINE __m512i move_bits(__m512i words, int from, int to) {
  return from >= to ? _mm512_srli_epi16(words, unsigned(from - to)) : _mm512_slli_epi16(words, unsigned(to - from));
}

// Byte vector v of a step, in offset binary.
template <int BITS>
APPORTION_INLINE __m512i integer_bytes(const std::byte* step, int v) {
  __m512i code = _mm512_setzero_si512();
  each_part<BITS>(v, 0, [&](int byte, int shift, int n, int before) __attribute__((always_inline)) {
    const __m512i part = move_bits(_mm512_loadu_si512(step + byte), shift, before), mask = _mm512_set1_epi8(char(((1 << n) - 1) << before));
    if (n == 8) code = _mm512_xor_si512(part, _mm512_set1_epi8(char(0x80)));
    else code = before == 0 ? _mm512_and_si512(part, mask) : _mm512_ternarylogic_epi64(code, part, mask, 0xf8);  // code | part & mask
  });
  return code;
}

template <int BITS>
struct IntegerTable {
  alignas(64) uint16_t entries[32];  // of each 5-bit word whose low BITS are a code: what lies above need not be masked away
  constexpr IntegerTable() : entries() {
    for (int i = 0; i < 32; ++i) entries[i] = uint16_t(__builtin_bit_cast(uint32_t, float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)))) >> 16);
  }
};
template <int BITS>
inline constexpr IntegerTable<BITS> integer_table;

// Pair `which` (0 or 1) of channels of byte vector v in bf16.
template <int BITS>
APPORTION_INLINE __m512i integer_pair(const std::byte* step, int v, int which) {
  if constexpr (BITS <= 5) {
    __m512i index = _mm512_setzero_si512();
    each_part<BITS>(v, 0, [&](int byte, int shift, int, int before) __attribute__((always_inline)) {
      const __m512i part = move_bits(_mm512_loadu_si512(step + byte), which * 8 + shift, before), below = _mm512_set1_epi16(int16_t((1 << before) - 1));
      index = before == 0 ? part : _mm512_ternarylogic_epi64(below, index, part, 0xca);  // below ? index : part
    });
    return _mm512_permutexvar_epi16(index, _mm512_load_si512(integer_table<BITS>.entries));
  } else {
    // byte | 2^23 as a float's bits is the float 2^23 + byte.
    const __m512i codes = integer_bytes<BITS>(step, v), byte = _mm512_set1_epi32(0xff), magic = _mm512_set1_epi32(0x4b000000);
    const __m512 base = _mm512_set1_ps(8388608.f + float(1 << (BITS - 1)));
    const auto number = [&](__m512i word) __attribute__((always_inline)) {
      return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(word, byte, magic, 0xea)), base));
    };
    const __m512i even = number(which == 0 ? codes : _mm512_srli_epi32(codes, 8)), odd = number(_mm512_srli_epi32(codes, which == 0 ? 16 : 24));
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
  }
}
#endif

#if defined(__AVX512BW__)
// A pair of channels of 32 columns in bf16.
struct Pair {
  __m512i left, right;
};

template <class Format>
APPORTION_INLINE void store_pairs(const std::byte* codes, uint16_t* out) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const Pair pair = Format::pair(codes, i);
    _mm512_storeu_si512(out + i * 64, pair.left);
    _mm512_storeu_si512(out + i * 64 + 32, pair.right);
  }
}
#endif

template <int BITS>
struct IntegerCodes {
  static constexpr int64_t STEP_BYTES = STEP_NUMBERS * BITS / 8;

#if defined(__AVX512BW__)
  APPORTION_INLINE Pair pair(const std::byte* codes, int i) {
    return {integer_pair<BITS>(codes, i / 2 * 2, i % 2), integer_pair<BITS>(codes, i / 2 * 2 + 1, i % 2)};
  }
#endif
  static inline void unpack(const std::byte* codes, uint16_t* out) {
#if defined(__AVX512BW__)
    store_pairs<IntegerCodes>(codes, out);
#else
    const uint8_t* step = reinterpret_cast<const uint8_t*>(codes);
    for (int v = 0; v < NUM_VECTORS; ++v)
      for (int lane = 0; lane < 64; ++lane)
        out[(v / 2 * 4 + lane % 2 * 2 + v % 2) * 32 + lane / 2] = small_integer(int(get_integer<BITS>(step, v, lane)) - (1 << (BITS - 1)));
#endif
  }
};

template <>
struct Codes<DType::INT2> : IntegerCodes<2> {};
template <>
struct Codes<DType::INT3> : IntegerCodes<3> {};
template <>
struct Codes<DType::INT4> : IntegerCodes<4> {};
template <>
struct Codes<DType::INT5> : IntegerCodes<5> {};
template <>
struct Codes<DType::INT6> : IntegerCodes<6> {};
template <>
struct Codes<DType::INT7> : IntegerCodes<7> {};
template <>
struct Codes<DType::INT8> : IntegerCodes<8> {};

// ---- float8 -----------------------------------------------------------------------------------------------------------------

// The bf16 of a float8 with 4 or 5 bits of exponent: e4m3fn has one NaN and no infinity.
template <int EXPONENT>
constexpr uint16_t brain_of_float8(unsigned code) {
  constexpr int MANTISSA = 7 - EXPONENT, BIAS = (1 << (EXPONENT - 1)) - 1, TOP = (1 << EXPONENT) - 1;
  const unsigned sign = (code & 0x80) << 8, mantissa = code & ((1 << MANTISSA) - 1), exponent = code >> MANTISSA & TOP;
  if (exponent == 0) return uint16_t(sign | __builtin_bit_cast(uint32_t, float(mantissa) / float(1u << (BIAS + MANTISSA - 1))) >> 16);
  if (EXPONENT == 4 ? (exponent == TOP && mantissa == 7) : (exponent == TOP && mantissa > 0)) return uint16_t(sign | 0x7fc0);
  if (EXPONENT == 5 && exponent == TOP) return uint16_t(sign | 0x7f80);
  return uint16_t(sign | (exponent + 127 - BIAS) << 7 | mantissa << (7 - MANTISSA));
}

template <int EXPONENT>
struct Float8Table {
  alignas(64) uint8_t low[128], high[128];  // bytes of the bf16, by the code without its sign
  uint16_t brains[256];
  constexpr Float8Table() : low(), high(), brains() {
    for (unsigned code = 0; code < 256; ++code) {
      brains[code] = brain_of_float8<EXPONENT>(code);
      low[code & 127] = uint8_t(brains[code & 127]);
      high[code & 127] = uint8_t(brains[code & 127] >> 8);
    }
  }
};
template <int EXPONENT>
inline constexpr Float8Table<EXPONENT> float8_table;

template <int EXPONENT>
struct Float8Codes {
  static constexpr int64_t STEP_BYTES = STEP_NUMBERS;

#if defined(__AVX512VBMI__)
  APPORTION_INLINE Pair pair(const std::byte* codes, int i) {
    const auto& table = float8_table<EXPONENT>;
    const __m512i bytes = _mm512_loadu_si512(codes + i * 64), sign = _mm512_set1_epi8(char(0x80));
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), bytes, _mm512_load_si512(table.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table.high), bytes, _mm512_load_si512(table.high + 64));
    const __m512i signed_high = _mm512_ternarylogic_epi64(high, bytes, sign, 0xf8);
    return {_mm512_unpacklo_epi8(low, signed_high), _mm512_unpackhi_epi8(low, signed_high)};
  }
#elif defined(__AVX512BW__)
  // Exponent and mantissa are those of a float32 that is too small by a power of two, of a subnormal one too; infinities and NaN are not.
  APPORTION_INLINE Pair pair(const std::byte* codes, int i) {
    constexpr int SHIFT = 16 + EXPONENT, BIAS = (1 << (EXPONENT - 1)) - 1, SPECIAL = EXPONENT == 4 ? 0x7f : 0x7c;
    const __m512i bytes = _mm512_loadu_si512(codes + i * 64), sign = _mm512_set1_epi32(int(0x80000000));
    const auto number = [&](__m512i word, unsigned place) __attribute__((always_inline)) {  // of the byte at bit `place`
      const __m512i size = _mm512_and_si512(_mm512_slli_epi32(word, SHIFT - place), _mm512_set1_epi32(0x7f << SHIFT));
      const __m512i real = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(size), set1(bits_to_float((254 - BIAS) << 23))));
      const __mmask16 special = _mm512_cmpge_epi32_mask(size, _mm512_set1_epi32(SPECIAL << SHIFT));
      const __m512i whole = _mm512_mask_or_epi32(real, special, real, _mm512_set1_epi32(0x7f800000));
      return _mm512_ternarylogic_epi32(whole, _mm512_slli_epi32(word, 24 - place), sign, 0xf8);
    };
    const auto both = [&](__m512i words) __attribute__((always_inline)) {
      return _mm512_or_si512(_mm512_srli_epi32(number(words, 0), 16), _mm512_and_si512(number(words, 8), _mm512_set1_epi32(int(0xffff0000))));
    };
    return {both(_mm512_unpacklo_epi16(bytes, _mm512_setzero_si512())), both(_mm512_unpackhi_epi16(bytes, _mm512_setzero_si512()))};
  }
#endif

  static inline void unpack(const std::byte* codes, uint16_t* out) {
#if defined(__AVX512BW__)
    store_pairs<Float8Codes>(codes, out);
#else
    const auto& table = float8_table<EXPONENT>;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
    for (int pair = 0; pair < 16; ++pair)
      for (int quarter = 0; quarter < 4; ++quarter)
        for (int half = 0; half < 2; ++half)
          for (int i = 0; i < 8; ++i)
            out[pair * 64 + half * 32 + quarter * 8 + i] = table.brains[bytes[pair * 64 + quarter * 16 + half * 8 + i]];
#endif
  }
};

template <>
struct Codes<DType::E4M3> : Float8Codes<4> {};
template <>
struct Codes<DType::E5M2> : Float8Codes<5> {};

}  // namespace apportion::APPORTION_ISA
