// Codes of low-bit weights: where each lies in a panel, and from there to bf16, which holds every one of their values exactly.
//
// A step is 32 channels x 32 columns. Unpacked it is what a bf16 panel has: [16 pairs of channels][32 columns][2]; by vectors of 32
// numbers, vector z = pair * 2 + half holds columns 16 half .. 16 half + 15, and its lane is column % 16 * 2 + channel % 2.
//   2, 4 bits   rows of 32 16-bit words, one word per lane: vector z lies in row z / (16 / bits), shifted by z % (16 / bits) * bits
//   3 bits      two planes: the low two bits as above, then the high bit in the same way
//   float8      a row of 64 bytes for each pair, in the order that interleaving two byte vectors brings forth (code_byte below)
//   int8        [8 fours of channels][32 columns][4], two's complement: the layout of int8 matrix tiles
#pragma once
#include "linear.h"
#include "simd.h"

namespace apportion::APPORTION_ISA {

constexpr int64_t STEP = 32;                    // channels
constexpr int64_t STEP_NUMBERS = STEP * PANEL;

template <DType>
struct Codes;

APPORTION_INLINE uint16_t small_integer(int value) { return uint16_t(float_to_bits(float(value)) >> 16); }  // exact up to 8 bits

// ---- 2, 3 and 4 bits --------------------------------------------------------------------------------------------------------

template <int BITS>
struct IntegerTable {
  alignas(64) uint16_t entries[32];  // of each 5-bit word whose low BITS are a code: what lies above need not be masked away
  constexpr IntegerTable() : entries() {
    for (int i = 0; i < 32; ++i) entries[i] = uint16_t(__builtin_bit_cast(uint32_t, float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)))) >> 16);
  }
};
template <int BITS>
inline constexpr IntegerTable<BITS> integer_table;

template <int BITS>
struct IntegerCodes {
  static constexpr int64_t STEP_BYTES = STEP_NUMBERS * BITS / 8;

  static inline void unpack(const std::byte* codes, uint16_t* out) {
#if defined(__AVX512BW__)
    const __m512i table = _mm512_load_si512(integer_table<BITS>.entries);
    if constexpr (BITS == 3) {
      const __m512i low_bits = _mm512_set1_epi16(3);
      for (int row = 0; row < 2; ++row) {
        __m512i high = _mm512_loadu_si512(codes + 256 + row * 64);
        for (int quarter = 0; quarter < 2; ++quarter) {
          __m512i low = _mm512_loadu_si512(codes + (row * 2 + quarter) * 64);
          for (int i = 0; i < 8; ++i) {
            const int z = quarter * 8 + i;
            const __m512i third = z < 2 ? _mm512_slli_epi16(high, 2 - z) : _mm512_srli_epi16(high, z - 2);  // its bit at place 2
            const __m512i index = _mm512_ternarylogic_epi64(low_bits, _mm512_srli_epi16(low, 2 * i), third, 0xca);
            _mm512_storeu_si512(out + (row * 16 + z) * 32, _mm512_permutexvar_epi16(index, table));
          }
        }
      }
    } else {
      constexpr int PER_WORD = 16 / BITS;
      for (int row = 0; row < 32 / PER_WORD; ++row) {
        const __m512i words = _mm512_loadu_si512(codes + row * 64);
        for (int i = 0; i < PER_WORD; ++i)
          _mm512_storeu_si512(out + (row * PER_WORD + i) * 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, i * BITS), table));
      }
    }
#else
    const uint16_t* words = reinterpret_cast<const uint16_t*>(codes);
    constexpr int LOW = BITS == 3 ? 2 : BITS, PER_WORD = 16 / LOW;
    for (int z = 0; z < 32; ++z)
      for (int lane = 0; lane < 32; ++lane) {
        int code = words[z / PER_WORD * 32 + lane] >> z % PER_WORD * LOW & ((1 << LOW) - 1);
        if constexpr (BITS == 3) code |= (words[128 + z / 16 * 32 + lane] >> z % 16 & 1) << 2;
        out[z * 32 + lane] = small_integer(code - (1 << (BITS - 1)));
      }
#endif
  }
};

template <>
struct Codes<DType::INT2> : IntegerCodes<2> {};
template <>
struct Codes<DType::INT3> : IntegerCodes<3> {};
template <>
struct Codes<DType::INT4> : IntegerCodes<4> {};

// ---- int8 -------------------------------------------------------------------------------------------------------------------

template <>
struct Codes<DType::INT8> {
  static constexpr int64_t STEP_BYTES = STEP_NUMBERS;

  static inline void unpack(const std::byte* codes, uint16_t* out) {
#if defined(__AVX512BW__)
    // byte ^ (2^23 + 128 as a float's bits) is the float 2^23 + 128 + code.
    const __m512i byte = _mm512_set1_epi32(0xff), magic = _mm512_set1_epi32(0x4b000080);
    const __m512 base = _mm512_set1_ps(8388608.f + 128.f);
    const auto number = [&](__m512i word) { return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(word, byte, magic, 0x6a)), base)); };
    const auto pair = [&](__m512i even, __m512i odd) { return _mm512_or_si512(_mm512_srli_epi32(number(even), 16), number(odd)); };
    for (int four = 0; four < 8; ++four)
      for (int half = 0; half < 2; ++half) {
        const __m512i w = _mm512_loadu_si512(codes + (four * 2 + half) * 64);
        _mm512_storeu_si512(out + (four * 4 + half) * 32, pair(w, _mm512_srli_epi32(w, 8)));
        _mm512_storeu_si512(out + (four * 4 + 2 + half) * 32, pair(_mm512_srli_epi32(w, 16), _mm512_srli_epi32(w, 24)));
      }
#else
    const int8_t* bytes = reinterpret_cast<const int8_t*>(codes);
    for (int four = 0; four < 8; ++four)
      for (int column = 0; column < 32; ++column)
        for (int i = 0; i < 4; ++i) out[(four * 2 + i / 2) * 64 + column * 2 + i % 2] = small_integer(bytes[(four * 32 + column) * 4 + i]);
#endif
  }
};

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

  static inline void unpack(const std::byte* codes, uint16_t* out) {
    const auto& table = float8_table<EXPONENT>;
#if defined(__AVX512VBMI__)
    const __m512i low[2] = {_mm512_load_si512(table.low), _mm512_load_si512(table.low + 64)};
    const __m512i high[2] = {_mm512_load_si512(table.high), _mm512_load_si512(table.high + 64)};
    const __m512i sign = _mm512_set1_epi8(char(0x80));
    for (int pair = 0; pair < 16; ++pair) {
      const __m512i bytes = _mm512_loadu_si512(codes + pair * 64);
      const __m512i l = _mm512_permutex2var_epi8(low[0], bytes, low[1]);
      const __m512i h = _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high[0], bytes, high[1]), bytes, sign, 0xf8);
      _mm512_storeu_si512(out + pair * 64, _mm512_unpacklo_epi8(l, h));
      _mm512_storeu_si512(out + pair * 64 + 32, _mm512_unpackhi_epi8(l, h));
    }
#else
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
