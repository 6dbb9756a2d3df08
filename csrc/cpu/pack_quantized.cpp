// Packing of quantized matrices and the way back, the same for every instruction set. See codes.h for where a code lies.
#include <cmath>
#include <cstring>

#include "linear.h"

namespace apportion {

namespace {

constexpr int64_t STEP = 32;  // channels

// The byte of a step and the shift in it of the code of a channel and a column; of 3 bits: of the low two, and `high` of the third.
struct Place {
  int byte, shift, high_byte, high_shift;
};

Place place(DType dtype, int channel, int column) {
  const int lane = column % 16 * 2 + channel % 2, z = channel / 2 * 2 + column / 16;
  const auto in_words = [&](int bits) { return Place{(z * bits / 16 * 32 + lane) * 2 + z * bits % 16 / 8, z * bits % 8, 0, 0}; };
  switch (dtype) {
    case DType::INT4: return in_words(4);
    case DType::INT2: return in_words(2);
    case DType::INT3: {
      Place found = in_words(2);
      found.high_byte = 256 + (z / 16 * 32 + lane) * 2 + z % 16 / 8;
      found.high_shift = z % 8;
      return found;
    }
    case DType::INT8: return {(channel / 4 * 32 + column) * 4 + channel % 4, 0, 0, 0};
    default: return {channel / 2 * 64 + column % 16 / 4 * 16 + column / 16 * 8 + column % 4 * 2 + channel % 2, 0, 0, 0};
  }
}

struct Places {
  Place of[STEP][PANEL];
  explicit Places(DType dtype) {
    for (int channel = 0; channel < STEP; ++channel)
      for (int column = 0; column < PANEL; ++column) of[channel][column] = place(dtype, channel, column);
  }
};

const Places& places(DType dtype) {
  static const Places all[] = {Places(DType::E4M3), Places(DType::E5M2), Places(DType::INT8), Places(DType::INT4), Places(DType::INT3), Places(DType::INT2)};
  return all[int(dtype) - int(DType::E4M3)];
}

void put(std::byte* at, int shift, int bits, unsigned code) {
  const unsigned mask = ((1u << bits) - 1) << shift;
  *at = std::byte((unsigned(*at) & ~mask) | (code << shift & mask));
}

unsigned get(const std::byte* at, int shift, int bits) { return unsigned(*at) >> shift & ((1u << bits) - 1); }

void put_code(DType dtype, std::byte* step, const Place& at, unsigned code) {
  if (dtype == DType::INT3) {
    put(step + at.byte, at.shift, 2, code & 3);
    put(step + at.high_byte, at.high_shift, 1, code >> 2);
  } else if (code_bits(dtype) == 8) {
    step[at.byte] = std::byte(dtype == DType::INT8 ? code ^ 0x80 : code);
  } else {
    put(step + at.byte, at.shift, int(code_bits(dtype)), code);
  }
}

unsigned get_code(DType dtype, const std::byte* step, const Place& at) {
  if (dtype == DType::INT3) return get(step + at.byte, at.shift, 2) | get(step + at.high_byte, at.high_shift, 1) << 2;
  if (code_bits(dtype) == 8) return unsigned(step[at.byte]) ^ (dtype == DType::INT8 ? 0x80 : 0);
  return get(step + at.byte, at.shift, int(code_bits(dtype)));
}

float float8_value(DType dtype, unsigned code) {
  const unsigned mantissa_bits = dtype == DType::E4M3 ? 3 : 2, bias = dtype == DType::E4M3 ? 7 : 15, top = dtype == DType::E4M3 ? 15 : 31;
  const unsigned mantissa = code & ((1u << mantissa_bits) - 1), exponent = code >> mantissa_bits & top;
  float value;
  if (exponent == top && (dtype == DType::E5M2 || mantissa == 7)) value = dtype == DType::E5M2 && mantissa == 0 ? INFINITY : NAN;
  else value = std::ldexp(float(exponent == 0 ? mantissa : mantissa | 1u << mantissa_bits), int(exponent == 0 ? 1 : exponent) - int(bias + mantissa_bits));
  return code & 0x80 ? -value : value;
}

// Scales are stored in the dtype in which they are representable: the file had them so.
uint16_t narrow(float value, DType dtype) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if (dtype == DType::BF16) return uint16_t(bits >> 16);
  return __builtin_bit_cast(uint16_t, _Float16(value));
}

float widen(uint16_t bits, DType dtype) {
  if (dtype == DType::BF16) return __builtin_bit_cast(float, uint32_t(bits) << 16);
  return float(__builtin_bit_cast(_Float16, bits));
}

void put_number(std::byte* at, int64_t index, DType dtype, float value) {
  if (dtype == DType::FP32) {
    std::memcpy(at + index * 4, &value, 4);
    return;
  }
  const uint16_t bits = narrow(value, dtype);
  std::memcpy(at + index * 2, &bits, 2);
}

float get_number(const std::byte* at, int64_t index, DType dtype) {
  if (dtype == DType::FP32) {
    float value;
    std::memcpy(&value, at + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at + index * 2, 2);
  return widen(bits, dtype);
}

// Columns begin .. end of panel p; the first is row `row` of the source, those past row `count` are padding.
void pack_columns(const PackedMatrix& w, int64_t p, const QuantizedRows& source, int64_t row, int64_t count, int begin, int end) {
  const WeightFormat& format = w.format;
  const DType dtype = format.dtype;
  const int64_t groups = w.num_groups(), width = format.common ? 1 : PANEL;
  std::byte *scales = w.panel(p), *zeros = scales + w.scale_bytes();
  const unsigned middle = 1u << (code_bits(dtype) - 1), none = dtype == DType::E4M3 || dtype == DType::E5M2 ? 0 : middle;
  for (int64_t g = 0; g < groups; ++g)
    for (int column = begin; column < end && (!format.common || column == begin); ++column) {
      const int64_t from = row + column - begin, at = g * width + (format.common ? 0 : column);
      const bool present = from < count;
      const int64_t number = present ? (source.block == 0 ? 0 : from / source.block) * groups + g : 0;
      put_number(scales, at, format.scale_dtype, present ? source.scales[number] : 0.f);
      if (format.zero == Zero::POINT) zeros[at] = std::byte(present ? static_cast<const uint8_t*>(source.zeros)[number] : middle);
      if (format.zero == Zero::MINIMUM) put_number(zeros, at, format.scale_dtype, present ? static_cast<const float*>(source.zeros)[number] : 0.f);
    }
  const Places& at = places(dtype);
  std::byte* step = w.codes(p);
  for (int64_t k = 0; k < w.depth(); k += STEP, step += STEP * PANEL * code_bits(dtype) / 8)
    for (int column = begin; column < end; ++column) {
      const int64_t from = row + column - begin;
      const uint8_t* codes = source.codes + from * w.C + k;
      const int64_t present = from < count ? w.C - k : 0;
      for (int channel = 0; channel < STEP; ++channel)
        put_code(dtype, step, at.of[channel][column], channel < present ? codes[channel] : none);
    }
}

}  // namespace

void pack_quantized(ThreadTeam& team, const PackedMatrix& w, const QuantizedRows& source, int64_t first, int64_t count) {
  if (count <= 0) return;
  const int64_t last = first + count == w.N ? padded(w.N) : first + count;
  const int64_t begin_panel = first / PANEL, panels = (last + PANEL - 1) / PANEL - begin_panel;
  team.run(panels, [&](int64_t item, int) {
    const int64_t p = begin_panel + item, start = p * PANEL, begin = first > start ? first : start, end = last < start + PANEL ? last : start + PANEL;
    pack_columns(w, p, source, begin - first, count, int(begin - start), int(end - start));
  });
}

void gather_quantized(ThreadTeam& team, const PackedMatrix& w, const int32_t* ids, int64_t count, float* out) {
  const WeightFormat& format = w.format;
  const DType dtype = format.dtype;
  const Places& at = places(dtype);
  const int middle = 1 << (code_bits(dtype) - 1);
  team.run(count, [&](int64_t i, int) {
    const int64_t p = ids[i] / PANEL, column = ids[i] % PANEL;
    const std::byte *scales = w.panel(p), *zeros = scales + w.scale_bytes(), *codes = w.codes(p);
    for (int64_t k = 0; k < w.C; ++k) {
      const int64_t number = format.common ? k / w.group() : k / w.group() * PANEL + column;
      const unsigned code = get_code(dtype, codes + k / STEP * STEP * PANEL * code_bits(dtype) / 8, at.of[k % STEP][column]);
      float value;
      if (dtype == DType::E4M3 || dtype == DType::E5M2) value = float8_value(dtype, code);
      else if (format.zero == Zero::MINIMUM) value = float(code);
      else value = float(int(code) - (format.zero == Zero::POINT ? int(zeros[number]) : middle));
      value *= get_number(scales, number, format.scale_dtype);
      if (format.zero == Zero::MINIMUM) value += get_number(zeros, number, format.scale_dtype);
      out[i * w.C + (w.order == nullptr ? k : w.order[k])] = value;
    }
  });
}

}  // namespace apportion
