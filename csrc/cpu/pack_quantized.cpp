// Packing of quantized matrices and the way back, the same for every instruction set. See code_planes.h and codes.h for where a code lies.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "code_planes.h"
#include "linear.h"

namespace apportion {

namespace {

int float8_byte(int channel, int column) { return channel / 2 * 64 + column % 16 / 4 * 16 + column / 16 * 8 + column % 4 * 2 + channel % 2; }

template <DType D>
void put_code(std::byte* step, int channel, int column, unsigned code) {
  if constexpr (is_integer(D)) put_integer<code_bits(D)>(reinterpret_cast<uint8_t*>(step), byte_vector(channel, column), byte_lane(channel, column), code);
  else step[float8_byte(channel, column)] = std::byte(code);
}

template <DType D>
unsigned get_code(const std::byte* step, int channel, int column) {
  if constexpr (is_integer(D)) return get_integer<code_bits(D)>(reinterpret_cast<const uint8_t*>(step), byte_vector(channel, column), byte_lane(channel, column));
  else return unsigned(step[float8_byte(channel, column)]);
}

// f of the dtype as a constant.
template <typename F>
auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::E4M3: return f(std::integral_constant<DType, DType::E4M3>{});
    case DType::E5M2: return f(std::integral_constant<DType, DType::E5M2>{});
    case DType::INT8: return f(std::integral_constant<DType, DType::INT8>{});
    case DType::INT7: return f(std::integral_constant<DType, DType::INT7>{});
    case DType::INT6: return f(std::integral_constant<DType, DType::INT6>{});
    case DType::INT5: return f(std::integral_constant<DType, DType::INT5>{});
    case DType::INT4: return f(std::integral_constant<DType, DType::INT4>{});
    case DType::INT3: return f(std::integral_constant<DType, DType::INT3>{});
    default: return f(std::integral_constant<DType, DType::INT2>{});
  }
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
template <DType D>
void pack_columns(const PackedMatrix& w, int64_t p, const QuantizedRows& source, int64_t row, int64_t count, int begin, int end) {
  const WeightFormat& format = w.format;
  const int64_t groups = w.num_groups(), width = format.common ? 1 : PANEL;
  std::byte *scales = w.panel(p), *zeros = scales + w.scale_bytes();
  const unsigned middle = 1u << (code_bits(D) - 1), none = is_integer(D) ? middle : 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int column = begin; column < end && (!format.common || column == begin); ++column) {
      const int64_t from = row + column - begin, at = g * width + (format.common ? 0 : column);
      const bool present = from < count;
      const int64_t number = present ? (source.block == 0 ? 0 : from / source.block) * groups + g : 0;
      put_number(scales, at, format.scale_dtype, present ? source.scales[number] : 0.f);
      if (format.zero == Zero::POINT) zeros[at] = std::byte(present ? static_cast<const uint8_t*>(source.zeros)[number] : middle);
      if (format.zero == Zero::MINIMUM) put_number(zeros, at, format.scale_dtype, present ? static_cast<const float*>(source.zeros)[number] : 0.f);
    }
  std::byte* step = w.codes(p);
  for (int64_t k = 0; k < w.depth(); k += STEP, step += STEP * PANEL * code_bits(D) / 8)
    for (int column = begin; column < end; ++column) {
      const int64_t from = row + column - begin;
      const uint8_t* codes = source.codes + from * w.C + k;
      const int64_t present = from < count ? w.C - k : 0;
      for (int channel = 0; channel < STEP; ++channel)
        put_code<D>(step, channel, column, channel < present ? codes[channel] : none);
    }
}

}  // namespace

void pack_quantized(ThreadTeam& team, const PackedMatrix& w, const QuantizedRows& source, int64_t first, int64_t count) {
  if (count <= 0) return;
  const int64_t last = first + count == w.N ? padded(w.N) : first + count;
  const int64_t begin_panel = first / PANEL, panels = (last + PANEL - 1) / PANEL - begin_panel;
  team.run(panels, [&](int64_t item, int) {
    const int64_t p = begin_panel + item, start = p * PANEL, begin = first > start ? first : start, end = last < start + PANEL ? last : start + PANEL;
    with_dtype(w.dtype(), [&](auto dtype) { pack_columns<dtype>(w, p, source, begin - first, count, int(begin - start), int(end - start)); });
  });
}

template <DType D>
static void gather_row(const PackedMatrix& w, int64_t p, int64_t column, float* out) {
  const WeightFormat& format = w.format;
  const std::byte *scales = w.panel(p), *zeros = scales + w.scale_bytes(), *step = w.codes(p);
  constexpr int middle = 1 << (code_bits(D) - 1);
  for (int64_t k = 0; k < w.C; ++k) {
    const int64_t number = format.common ? k / w.group() : k / w.group() * PANEL + column;
    const unsigned code = get_code<D>(step + k / STEP * STEP * PANEL * code_bits(D) / 8, int(k % STEP), int(column));
    float value;
    if constexpr (!is_integer(D)) value = float8_value(D, code);
    else value = float(int(code) - (format.zero == Zero::POINT ? int(zeros[number]) : format.zero == Zero::NONE ? middle : 0));
    value *= get_number(scales, number, format.scale_dtype);
    if (format.zero == Zero::MINIMUM) value += get_number(zeros, number, format.scale_dtype);
    out[w.order == nullptr ? k : w.order[k]] = value;
  }
}

void gather_quantized(ThreadTeam& team, const PackedMatrix& w, const int32_t* ids, int64_t count, float* out) {
  team.run(count, [&](int64_t i, int) {
    with_dtype(w.dtype(), [&](auto dtype) { gather_row<dtype>(w, ids[i] / PANEL, ids[i] % PANEL, out + i * w.C); });
  });
}

}  // namespace apportion
