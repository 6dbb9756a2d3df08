// The rows of x as a product takes them: as they are, or copied: reordered, rounded to codes, as bf16 tiles, with the sums that zeros need.
// What is made of a row depends on that row alone.
#pragma once
#include "linear.h"
#include "panel_dots.h"
#include "panel_tiles.h"
#include "row_groups.h"

namespace apportion::APPORTION_ISA {

APPORTION_INLINE bool uses_tiles(const PackedMatrix& w) { return TILES && (w.dtype() == DType::BF16 || is_quantized(w.dtype())); }

// Groups of channels within which one scale of the weight and one of the row hold.
APPORTION_INLINE int64_t scaled_together(const PackedMatrix& w) {
  const int64_t x_group = w.format.rounding.group;
  return x_group == 0 ? w.group() : smaller(x_group, w.group());
}

// Whether rows rounded to integers meet integer codes as bytes, their sums exact in 32 bits: in int8 tiles, or in dot products of four
// bytes, which take codes in offset binary and so want the rows' sums.
#if defined(__AMX_INT8__)
constexpr bool OFFSET_CODES = false;
APPORTION_INLINE bool multiplies_bytes(const PackedMatrix& w) { return w.dtype() == DType::INT8 && w.format.group % 64 == 0 && w.format.rounding.group == 0; }
#elif defined(__AVX512VNNI__)
constexpr bool OFFSET_CODES = true;
constexpr int64_t MOST_SUMMED = int64_t(1) << 16;  // products of 8 by 7 bits
APPORTION_INLINE bool multiplies_bytes(const PackedMatrix& w) { return is_integer(w.dtype()) && scaled_together(w) <= MOST_SUMMED; }
#else
constexpr bool OFFSET_CODES = false;
APPORTION_INLINE bool multiplies_bytes(const PackedMatrix&) { return false; }
#endif

// How the rows for a matrix are made. Matrices of one form share the copy.
struct RowForm {
  bool tiles = false;    // bf16 tiles, or with `bytes` int8 ones: blocks of 16 rows, [C / 64][rows of the block][64], fours of channels as codes have them
  bool bytes = false;
  InputRounding rounding;
  float fixed_scale = 0;
  int64_t summed = 0;    // channels of each sum, 0: none wanted
  const int32_t* order = nullptr;
  int64_t C = 0, depth = 0;  // channels, and with the padding

  bool operator==(const RowForm&) const = default;
  bool copied() const { return tiles || order != nullptr || rounding.kind != Rounding::NONE || summed > 0; }
  // The copy is nothing but the rows in tiles, or nothing at all.
  bool plain() const { return order == nullptr && rounding.kind == Rounding::NONE && summed == 0 && depth == padded(C); }
  int64_t width() const { return bytes ? depth / 4 : tiles ? depth / 2 : depth; }  // of a row in floats
  int64_t num_scales() const { return rounding.kind == Rounding::NONE ? 0 : rounding.group == 0 ? 1 : ceil_div(C, rounding.group); }
  int64_t num_sums() const { return summed == 0 ? 0 : ceil_div(C, summed); }
  int64_t row_floats() const { return width() + num_scales() + num_sums(); }  // of the copy
};

static inline RowForm row_form(const PackedMatrix& w) {
  RowForm form;
  form.C = w.C;
  form.depth = is_quantized(w.dtype()) ? w.depth() : padded(w.C);
  form.tiles = uses_tiles(w);
  if (!is_quantized(w.dtype())) return form;
  form.rounding = w.format.rounding;
  if (form.rounding.kind == Rounding::INTEGER && multiplies_bytes(w)) {
    form.bytes = form.tiles = true;
    form.depth = aligned(w.C);
  }
  if (form.rounding.fixed) form.fixed_scale = *w.input_scale;
  if (w.format.zero != Zero::NONE || (form.bytes && OFFSET_CODES)) form.summed = scaled_together(w);
  form.order = w.order;
  return form;
}

struct Rows {
  const float* x;          // [count, C] with a row stride; null where they are tiles
  int64_t stride;
  const uint16_t* tiles;   // blocks of 16 rows (panel_tiles.h), or null
  int64_t tile_stride;     // 16-bit elements of a row in them
  int64_t count;
  const float* scales = nullptr;  // [count, num_scales] of rounded rows
  int64_t num_scales = 0;
  const float* sums = nullptr;    // [count, num_sums]
  int64_t num_sums = 0;

  // Row `row` at channel 0 in bytes.
  const int8_t* bytes(int64_t row) const {
    return reinterpret_cast<const int8_t*>(tiles + row / ROW_BLOCK * ROW_BLOCK * tile_stride) + row % ROW_BLOCK * 64;
  }

  // `n` of them from `row` on, a whole number of tile blocks.
  Rows from(int64_t row, int64_t n) const {
    Rows part = *this;
    if (x != nullptr) part.x += row * stride;
    if (tiles != nullptr) part.tiles += row * tile_stride;
    if (scales != nullptr) part.scales += row * num_scales;
    if (sums != nullptr) part.sums += row * num_sums;
    part.count = n;
    return part;
  }
};

// The copy of `count` rows in `memory`, row_floats() each.
static inline Rows copied_rows(const RowForm& form, float* memory, int64_t count) {
  Rows rows{memory, form.width(), nullptr, 0, count};
  if (form.tiles) rows = {nullptr, 0, reinterpret_cast<const uint16_t*>(memory), form.width() * 2, count};
  memory += count * form.width();
  if (form.num_scales() > 0) rows.scales = memory, rows.num_scales = form.num_scales();
  memory += count * form.num_scales();
  if (form.num_sums() > 0) rows.sums = memory, rows.num_sums = form.num_sums();
  return rows;
}

// ---- rounding ---------------------------------------------------------------------------------------------------------------

using Bits = int32_t __attribute__((vector_size(WIDTH * 4), may_alias));

// The nearest number of e4m3, ties to even, saturating; NaN stays NaN.
APPORTION_INLINE V round_float8(V r) {
  const Bits sign = Bits(r) & int32_t(0x80000000);
  const V size = V(Bits(r) & 0x7fffffff);
  const V limited = min(set1(448.f), size);
  const Bits bits = Bits(limited);
  const V normal = V((bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffff);
  const V magic = set1(16384.f);  // its unit in the last place is 2^-9, the least number of e4m3
  const V small = (limited + magic) - magic;
  const V rounded = select_less(limited, set1(0.015625f), small, normal);
  return V(Bits(select_less(limited, set1(449.f), rounded, size)) | sign);
}

// The nearest integer of `bits` bits, ties to even, saturating; NaN stays NaN.
APPORTION_INLINE V round_integer(V r, float low, float high) {
  const V limited = min(set1(high), max(set1(low), r));
  const V magic = set1(12582912.f);
  return (limited + magic) - magic;
}

// The largest magnitude of n numbers; NaN where one is NaN: as integers NaN are the largest.
static inline float largest(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return bits_to_float(most);
}

constexpr float LEAST_FLOAT8_SCALE = 1.f / (448.f * 512.f), LEAST_INTEGER_SCALE = 1.1920929e-7f;

// Scale of n numbers that are rounded together.
static inline float scale_of(const InputRounding& rounding, const float* x, int64_t n) {
  const bool float8 = rounding.kind == Rounding::FLOAT8;
  const float scale = largest(x, n) / (float8 ? 448.f : (float(1 << rounding.bits) - 1.f) / 2.f);
  const float least = float8 ? LEAST_FLOAT8_SCALE : LEAST_INTEGER_SCALE;
  return scale < least ? least : scale;
}

// ---- copying ----------------------------------------------------------------------------------------------------------------

APPORTION_INLINE V load_upto(const float* p, int64_t n) { return n >= WIDTH ? load(p) : n > 0 ? load_n(p, int(n)) : zero(); }

// 32 numbers into the copy: element k of row r in a block of n rows that begins at `out`. Returns their sum as it was stored.
template <typename Code>
APPORTION_INLINE V store_numbers(const RowForm& form, float* out, int64_t n, int64_t r, int64_t k, Code&& code) {
#if defined(__AVX512BW__)
  if (form.bytes) {
    int8_t* to = reinterpret_cast<int8_t*>(out) + (k / 64 * n + r) * 64 + k % 64;
    const __m128i places = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);  // code_planes.h
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code(i)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm_shuffle_epi8(bytes, places));
    }
    return code(0) + code(1);
  }
#endif
#if defined(__AVX512BF16__)
  if (form.tiles) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out) + (k / TILE_K * n + r) * TILE_K;
    store_tile_row(to, code(0), code(1));
    return load_bf16(to) + load_bf16(to + WIDTH);
  }
#endif
  (void)n;
  V sum = zero();
  for (int i = 0; i < PANEL / WIDTH; ++i) {
    const V number = code(i);
    store(out + r * form.width() + k + i * WIDTH, number);
    sum = sum + number;
  }
  return sum;
}

// One row into row r of a block of n; `scales` and `sums` are its own.
static inline void copy_row(const RowForm& form, const float* row, float* out, int64_t n, int64_t r, float* scales, float* sums) {
  const InputRounding& rounding = form.rounding;
  const int64_t group = rounding.group == 0 ? form.C : rounding.group;
  const float reach = float(1 << (rounding.bits - 1));
  V sum = zero(), scale = set1(1.f);
  for (int64_t k = 0; k < form.depth; k += PANEL) {
    const int64_t left = form.C - k;
    if (rounding.kind != Rounding::NONE && k % group == 0 && left > 0) {
      float found = rounding.fixed ? form.fixed_scale : scale_of(rounding, row + k, smaller(group, left));
      if (form.bytes && std::isnan(largest(row + k, smaller(group, left)))) found = NAN;  // which bytes cannot hold
      scales[k / group] = found;
      scale = set1(found);
    }
    const auto code = [&](int i) __attribute__((always_inline)) {
      const V x = load_upto(row + k + i * WIDTH, left - i * WIDTH);
      if (rounding.kind == Rounding::FLOAT8) return round_float8(x / scale);
      if (rounding.kind == Rounding::INTEGER) return round_integer(x / scale, -reach, reach - 1.f);
      return x;
    };
    sum = sum + store_numbers(form, out, n, r, k, code);
    if (form.summed > 0 && left > 0 && ((k + PANEL) % form.summed == 0 || left <= PANEL)) {
      sums[k / form.summed] = reduce_add(sum);
      sum = zero();
    }
  }
}

// Row r of `count`, which lies at `row`, into the copy at `memory`. `gathered`: C floats, where there is an order.
static inline void copy_into(const RowForm& form, const float* row, int64_t count, int64_t r, float* memory, float* gathered) {
  const int64_t first = r / ROW_BLOCK * ROW_BLOCK, n = smaller(ROW_BLOCK, count - first);
  if (form.order != nullptr) {
    for (int64_t k = 0; k < form.C; ++k) gathered[k] = row[form.order[k]];
    row = gathered;
  }
  float* scales = memory + count * form.width() + r * form.num_scales();
  float* sums = memory + count * (form.width() + form.num_scales()) + r * form.num_sums();
  copy_row(form, row, memory + first * form.width(), n, r - first, scales, sums);
}

}  // namespace apportion::APPORTION_ISA
