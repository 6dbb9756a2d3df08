// The product of a quantized panel. Integers meet rows that are rounded to integers as integers, where the set has such products
// (byte_dots.h, int8 tiles). All other codes are unpacked to bf16, which holds them exactly, in registers or a block of channels at a time,
// and are multiplied as a bf16 panel is (panel.h, panel_dots.h, panel_tiles.h). The sum over a group of channels is
// complete before its scales meet it, and groups are added in order:
//
//     y = bias + sum over groups of (sum over channels of x code - zero * sum of x) * scale of the row * scale of the weight
//
// so no weight is ever rounded, and the order is one for every number of rows.
#include "quantized_panel.h"

#include "byte_dots.h"
#include "codes.h"
#include "panel_scales.h"

namespace apportion::APPORTION_ISA {

namespace {

// Channels k .. end of a panel that are multiplied in one go: several whole groups, or a part of one.
APPORTION_INLINE int64_t block_end(int64_t k, int64_t group, int64_t depth) {
  const int64_t end = group >= CODE_BLOCK ? smaller(k + CODE_BLOCK, (k / group + 1) * group) : k + CODE_BLOCK / group * group;
  return smaller(end, depth);
}

// ---- scales -----------------------------------------------------------------------------------------------------------------

// Of one group of channels; zeros count from the middle of the codes.
struct GroupScales {
  V scale[PANEL_VECTORS], zero[PANEL_VECTORS];

  GroupScales(const PanelScales& panel, int64_t g) {
    for (int j = 0; j < PANEL_VECTORS; ++j) {
      scale[j] = panel.scale(g, j);
      zero[j] = APPORTION_ISA::zero();
      if (panel.zero == Zero::POINT) zero[j] = panel.point(g, j) - set1(panel.middle);
      if (panel.zero == Zero::MINIMUM) zero[j] = fma(set1(panel.middle), scale[j], panel.minimum(g, j));  // what the middle code stands for
    }
  }
};

APPORTION_INLINE V load_sums_of(const float* sums) { return load(sums); }
#if defined(__AMX_INT8__)
APPORTION_INLINE V load_sums_of(const int32_t* sums) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums)); }
#endif

// What the sums of some rows over one group of channels become: y[n, columns] += scaled sums.
template <typename Number>
struct GroupSums {
  const Number* sums;        // [n][32]
  int64_t n;
  const V* start;            // of y [PANEL_VECTORS] in the first group, else null: y holds the groups before
  const float* x_scales;     // of the rows, `num_scales` apart; null where x is not rounded
  int64_t num_scales;
  const float* x_sums;       // `num_sums` apart
  int64_t num_sums;
  float* y;
  int64_t y_stride;
  int columns;
};

template <Zero KIND, bool ROUNDED, typename Number>
inline void add_rows(const GroupScales& group, const GroupSums<Number>& s) {
  for (int64_t r = 0; r < s.n; ++r) {
    V x_scale, x_sum;
    if constexpr (ROUNDED) x_scale = set1(s.x_scales[r * s.num_scales]);
    if constexpr (KIND != Zero::NONE) x_sum = set1(s.x_sums[r * s.num_sums]);
    if constexpr (KIND == Zero::MINIMUM && ROUNDED) x_sum = x_sum * x_scale;
    for (int j = 0; j < PANEL_VECTORS; ++j) {
      const int left = s.columns - j * WIDTH;
      if (left <= 0) break;
      V sum = load_sums_of(s.sums + r * PANEL + j * WIDTH);
      if constexpr (KIND == Zero::POINT) sum = fnma(group.zero[j], x_sum, sum);
      float* out = s.y + r * s.y_stride + j * WIDTH;
      V total = s.start != nullptr ? s.start[j] : load_upto(out, left);
      if constexpr (ROUNDED) total = total + sum * x_scale * group.scale[j];
      else total = fma(sum, group.scale[j], total);
      if constexpr (KIND == Zero::MINIMUM) total = fma(group.zero[j], x_sum, total);
      if (left >= WIDTH) store(out, total);
      else store_n(out, total, left);
    }
  }
}

// The group that begins at channel k, for `n` rows from `row` on.
template <typename Number>
inline void add_group(const PackedMatrix& w, int64_t p, const PanelScales& scales, int64_t k, const Number* sums, const Rows& rows, int64_t row, int64_t n, float* y,
                      int64_t y_stride) {
  const int64_t g = k / w.group();
  const GroupScales group(scales, g);
  V start[PANEL_VECTORS];
  const float* bias = w.panel_bias(p);
  for (int j = 0; j < PANEL_VECTORS; ++j) start[j] = bias == nullptr ? zero() : load(bias + j * WIDTH);
  GroupSums<Number> s = {sums, n, k == 0 ? start : nullptr, nullptr, rows.num_scales, nullptr, rows.num_sums, y, y_stride, w.columns(p)};
  const bool rounded = rows.scales != nullptr;
  if (rounded) s.x_scales = rows.scales + row * rows.num_scales + (rows.num_scales > 1 ? k / w.format.rounding.group : 0);
  if (rows.sums != nullptr) s.x_sums = rows.sums + row * rows.num_sums + g;
  switch (w.format.zero) {
    case Zero::NONE: return rounded ? add_rows<Zero::NONE, true>(group, s) : add_rows<Zero::NONE, false>(group, s);
    case Zero::POINT: return rounded ? add_rows<Zero::POINT, true>(group, s) : add_rows<Zero::POINT, false>(group, s);
    default: return rounded ? add_rows<Zero::MINIMUM, true>(group, s) : add_rows<Zero::MINIMUM, false>(group, s);
  }
}

#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
// ---- dot products of four bytes -----------------------------------------------------------------------------------------------

template <DType D>
void multiply_bytes(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch&) {
  const BytePanel panel(w, p);
  in_row_groups(0, rows.count, rows.count, [&](int64_t row, int n, int64_t block_rows) {
    multiply_byte_rows<code_bits(D)>(n, panel, rows, row, block_rows, row == 0, y + row * y_stride, y_stride);
  });
}
#endif

#if !defined(__AVX512BF16__)
// ---- vectors ----------------------------------------------------------------------------------------------------------------

template <DType D>
void multiply_quantized(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch& scratch) {
  const int64_t depth = w.depth(), group = scaled_together(w);
  const PanelScales scales(w, p);
  for (int64_t first = 0; first < rows.count; first += CODE_ROWS) {
    const int64_t last = smaller(rows.count, first + CODE_ROWS), all = last - first;
    const bool direct = w.is_gemv(all, DIRECT_ROWS);
    const int64_t height = direct ? all : ceil_div(all, ceil_div(all, BLOCK_ROWS));
    for (int64_t k = 0; k < depth;) {
      const int64_t end = block_end(k, group, depth);
      const std::byte* codes = w.codes(p) + k / STEP * Codes<D>::STEP_BYTES;
      for (int64_t i = 0; i < (end - k) / STEP; ++i) {
        for (int64_t line = 0; line < Codes<D>::STEP_BYTES; line += 64) prefetch(codes + i * Codes<D>::STEP_BYTES + line + PREFETCH_BYTES);
        Codes<D>::unpack(codes + i * Codes<D>::STEP_BYTES, scratch.pairs + i * STEP_NUMBERS);
      }
      if (!direct) unpack<Bf16>(reinterpret_cast<const std::byte*>(scratch.pairs), end - k, scratch.wide);
      for (int64_t row = first; row < last; row += height) {
        const int64_t n = smaller(height, last - row);
        for (int64_t at = k; at < end;) {
          const int64_t group_end = smaller((at / group + 1) * group, depth), stop = smaller(end, group_end), count = smaller(stop, w.C) - at;
          const bool begins = at % group == 0, ends = stop == group_end;
          float* sums = begins && ends ? scratch.few : scratch.many + (row - first) * PANEL;
          const std::byte* weights = direct ? reinterpret_cast<const std::byte*>(scratch.pairs + (at - k) * PANEL)
                                            : reinterpret_cast<const std::byte*>(scratch.wide + (at - k) * PANEL);
          const Slice slice = {weights, count, rows.x + row * rows.stride + at, rows.stride, sums, PANEL, int(PANEL), nullptr, !begins, nullptr, 0};
          if (direct) multiply_up_to<Bf16, DIRECT_ROWS, PANEL_VECTORS>(slice, int(n));
          else multiply_up_to<Fp32, BLOCK_ROWS, BLOCK_VECTORS>(slice, int(n));
          if (ends) add_group(w, p, scales, at / group * group, sums, rows, row, n, y + row * y_stride, y_stride);
          at = stop;
        }
      }
      k = end;
    }
  }
}

#elif !defined(__AMX_BF16__)
// ---- dot products of bf16 pairs -----------------------------------------------------------------------------------------------

template <DType D>
void multiply_quantized(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch& scratch) {
  const int64_t depth = w.depth(), group = scaled_together(w);
  const PanelScales scales(w, p);
  const std::byte* codes = w.codes(p);
  if (w.is_gemv(rows.count, CODE_ROWS_ONCE)) {  // unpacked in registers, for every 8 to 12 rows again
    in_dot_groups(rows.tiles, depth, 0, rows.count, rows.count, 0, [&](int64_t row, int n, const uint16_t* x, int64_t x_stride) {
      for (int64_t k = 0; k < depth; k += group) {
        multiply_code_dot_rows<Codes<D>>({.x = x + k / TILE_K * x_stride, .x_stride = x_stride, .weights = codes + k / STEP * Codes<D>::STEP_BYTES,
                                          .steps = (smaller(k + group, depth) - k) / STEP, .sums = nullptr, .start = nullptr, .y = scratch.few,
                                          .y_stride = PANEL, .columns = int(PANEL)}, n);
        add_group(w, p, scales, k, scratch.few, rows, row, n, y + row * y_stride, y_stride);
      }
    });
    return;
  }
  for (int64_t first = 0; first < rows.count; first += CODE_ROWS) {
    const int64_t last = smaller(rows.count, first + CODE_ROWS);
    for (int64_t k = 0, end; k < depth; k = end) {
      end = block_end(k, group, depth);
      for (int64_t i = k / STEP; i < end / STEP; ++i) {
        const std::byte* step = codes + i * Codes<D>::STEP_BYTES;
        for (int64_t line = 0; line < Codes<D>::STEP_BYTES; line += 64) prefetch(step + line + CODES_AHEAD);
        Codes<D>::unpack(step, scratch.pairs + (i - k / STEP) * STEP_NUMBERS);
      }
      in_dot_groups(rows.tiles, depth, first, last, rows.count, k, [&](int64_t row, int n, const uint16_t* x, int64_t x_stride) {
        for (int64_t at = k, stop; at < end; at = stop) {
          const int64_t group_end = smaller((at / group + 1) * group, depth);
          stop = smaller(end, group_end);
          const bool begins = at % group == 0, ends = stop == group_end;
          float* unfinished = scratch.many + (row - first) * PANEL;
          float* sums = begins && ends ? scratch.few : unfinished;
          const std::byte* weights = reinterpret_cast<const std::byte*>(scratch.pairs + (at - k) * PANEL);
          multiply_dot_rows<false>({.x = x + (at - k) / TILE_K * x_stride, .x_stride = x_stride, .weights = weights, .steps = (stop - at) / TILE_K,
                                    .sums = begins ? nullptr : unfinished, .start = nullptr, .y = sums, .y_stride = PANEL, .columns = int(PANEL)}, n);
          if (ends) add_group(w, p, scales, at / group * group, sums, rows, row, n, y + row * y_stride, y_stride);
        }
      });
    }
  }
}

#else
// ---- matrix tiles -----------------------------------------------------------------------------------------------------------

// Up to 32 rows of x against the channels that follow one another from `at` on.
struct TileRows {
  const std::byte *upper, *lower;        // tiles of the first 16 rows and of the rest, from the block's first channel on
  int64_t upper_bytes, lower_bytes;      // from one tile to the next
};

template <bool BYTES>
APPORTION_INLINE void multiply_accumulate_upper() {
  if constexpr (BYTES) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
}

template <bool BYTES>
APPORTION_INLINE void multiply_accumulate_lower() {
  if constexpr (BYTES) {
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool BYTES, bool TWO>
APPORTION_INLINE void code_step(const TileRows& x, int64_t step, const std::byte* weights) {
  _tile_loadd(4, x.upper + step * x.upper_bytes, 64);
  _tile_loadd(6, weights, 128);
  _tile_loadd(7, weights + 64, 128);
  multiply_accumulate_upper<BYTES>();
  if constexpr (TWO) {
    _tile_loadd(5, x.lower + step * x.lower_bytes, 64);
    multiply_accumulate_lower<BYTES>();
  }
}

template <bool TWO>
APPORTION_INLINE void begin_sums(const float* sums) {
  if (sums == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  _tile_loadd(0, sums, PANEL * 4);
  _tile_loadd(1, sums + 16, PANEL * 4);
  if constexpr (TWO) {
    _tile_loadd(2, sums + ROW_BLOCK * PANEL, PANEL * 4);
    _tile_loadd(3, sums + ROW_BLOCK * PANEL + 16, PANEL * 4);
  }
}

template <bool TWO>
APPORTION_INLINE void end_sums(float* sums) {
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + 16, PANEL * 4);
  if constexpr (TWO) {
    _tile_stored(2, sums + ROW_BLOCK * PANEL, PANEL * 4);
    _tile_stored(3, sums + ROW_BLOCK * PANEL + 16, PANEL * 4);
  }
}

constexpr int64_t CODE_AHEAD = 4096;  // bytes between the codes that are unpacked and those that are fetched

constexpr int64_t STEPS_AHEAD = 2;    // unpacked before they are multiplied: a tile load waits for stores that are under way

// Codes of one tile step as the tiles want them: bf16 pairs of 32 channels, or as they lie, of 64.
template <DType D, bool BYTES>
APPORTION_INLINE void unpack_step(const std::byte* codes, uint16_t* out) {
  constexpr int64_t BYTES_READ = BYTES ? 2 * STEP_NUMBERS : Codes<D>::STEP_BYTES;
  for (int64_t line = 0; line < BYTES_READ; line += 64) __builtin_prefetch(codes + CODE_AHEAD + line, 0, 2);
  if constexpr (BYTES)
    for (int64_t i = 0; i < BYTES_READ; i += 64) _mm512_store_si512(reinterpret_cast<std::byte*>(out) + i, _mm512_loadu_si512(codes + i));
  else
    Codes<D>::unpack(codes, out);
  asm volatile("" ::: "memory");
}

template <DType D, bool BYTES, bool TWO, bool STREAM>
inline void multiply_code_rows(const PackedMatrix& w, int64_t p, const PanelScales& scales, const Rows& rows, int64_t row, int64_t n, int64_t k, int64_t end,
                                      float* y, int64_t y_stride, float* unfinished, CodeScratch& scratch) {
  constexpr int64_t CHANNELS = BYTES ? 64 : STEP;
  const int64_t group = scaled_together(w), depth = w.depth(), steps = (end - k) / CHANNELS;
  const std::byte* codes = w.codes(p) + k * PANEL * code_bits(D) / 8;
  const int64_t upper = smaller(n, ROW_BLOCK), lower = n - upper;
  const std::byte* tiles = reinterpret_cast<const std::byte*>(rows.tiles + row * rows.tile_stride);
  const TileRows x = {tiles + k / CHANNELS * upper * 64, tiles + ROW_BLOCK * rows.tile_stride * 2 + k / CHANNELS * lower * 64, upper * 64, lower * 64};
  const auto slot = [&](int64_t step) { return scratch.pairs + step % (CODE_BLOCK / STEP) * STEP_NUMBERS; };
  const auto unpack_next = [&](int64_t step) __attribute__((always_inline)) {
    if (step < steps) unpack_step<D, BYTES>(codes + step * CHANNELS * PANEL * code_bits(D) / 8, slot(step));
  };
  if constexpr (STREAM)
    for (int64_t step = 0; step < STEPS_AHEAD; ++step) unpack_next(step);
  for (int64_t at = k; at < end;) {
    const int64_t group_end = smaller((at / group + 1) * group, depth), stop = smaller(end, group_end);
    const bool begins = at % group == 0, ends = stop == group_end;
    begin_sums<TWO>(begins ? nullptr : unfinished);
    for (int64_t step = (at - k) / CHANNELS; step < (stop - k) / CHANNELS; ++step) {
      if constexpr (STREAM) unpack_next(step + STEPS_AHEAD);
      const bool in_place = BYTES && !STREAM;  // int8 tiles need no unpacking
      code_step<BYTES, TWO>(x, step, in_place ? codes + step * 2 * STEP_NUMBERS : reinterpret_cast<const std::byte*>(slot(step)));
    }
    float* sums = ends ? scratch.few : unfinished;
    end_sums<TWO>(sums);
    asm volatile("" ::: "memory");
    if (ends) {
      using Number = std::conditional_t<BYTES, int32_t, float>;
      add_group(w, p, scales, at / group * group, reinterpret_cast<const Number*>(sums), rows, row, n, y + row * y_stride, y_stride);
    }
    at = stop;
  }
}

template <DType D, bool BYTES>
void multiply_quantized_as(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch& scratch) {
  asm volatile("" ::: "memory");  // tile loads are opaque to the compiler: what they read must have been written
  const int64_t depth = w.depth(), group = scaled_together(w);
  const PanelScales scales(w, p);
  int64_t configured = 0;
  const auto configure = [&](int64_t n) {
    if (n != configured) configure_tiles(int(smaller(n, ROW_BLOCK)), int(n > ROW_BLOCK ? n - ROW_BLOCK : n));
    configured = n;
  };
  for (int64_t first = 0; first < rows.count; first += CODE_ROWS) {
    const int64_t last = smaller(rows.count, first + CODE_ROWS), all = last - first;
    if (all <= 2 * ROW_BLOCK) {  // the codes pass once, each step unpacked while the one before is multiplied
      configure(all);
      const auto multiply = all > ROW_BLOCK ? multiply_code_rows<D, BYTES, true, true> : multiply_code_rows<D, BYTES, false, true>;
      multiply(w, p, scales, rows, first, all, 0, depth, y, y_stride, scratch.many, scratch);
      continue;
    }
    for (int64_t k = 0; k < depth;) {
      const int64_t end = block_end(k, group, depth);
      if constexpr (!BYTES)
        for (int64_t i = 0; i < (end - k) / STEP; ++i)
          unpack_step<D, false>(w.codes(p) + (k / STEP + i) * Codes<D>::STEP_BYTES, scratch.pairs + i * STEP_NUMBERS);
      for (int64_t row = first; row < last; row += 2 * ROW_BLOCK) {
        const int64_t n = smaller(last - row, 2 * ROW_BLOCK);
        configure(n);
        const auto multiply = n > ROW_BLOCK ? multiply_code_rows<D, BYTES, true, false> : multiply_code_rows<D, BYTES, false, false>;
        multiply(w, p, scales, rows, row, n, k, end, y, y_stride, scratch.many + (row - first) * PANEL, scratch);
      }
      k = end;
    }
  }
  _tile_release();
}

template <DType D>
void multiply_quantized(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch& scratch) {
  multiply_quantized_as<D, false>(w, p, rows, y, y_stride, scratch);
}
template <DType D>
void multiply_bytes(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch& scratch) {
  if constexpr (D == DType::INT8) multiply_quantized_as<D, true>(w, p, rows, y, y_stride, scratch);
}
#endif

template <DType D>
void multiply_as(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, CodeScratch& scratch) {
#if defined(__AVX512VNNI__)
  if constexpr (is_integer(D))
    if (w.format.rounding.kind == Rounding::INTEGER && multiplies_bytes(w)) return multiply_bytes<D>(w, p, rows, y, y_stride, scratch);
#endif
  multiply_quantized<D>(w, p, rows, y, y_stride, scratch);
}

}  // namespace

void multiply_quantized_panel(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, float* memory) {
  CodeScratch& scratch = *reinterpret_cast<CodeScratch*>(memory);
  switch (w.dtype()) {
    case DType::E4M3: return multiply_as<DType::E4M3>(w, p, rows, y, y_stride, scratch);
    case DType::E5M2: return multiply_as<DType::E5M2>(w, p, rows, y, y_stride, scratch);
    case DType::INT8: return multiply_as<DType::INT8>(w, p, rows, y, y_stride, scratch);
    case DType::INT7: return multiply_as<DType::INT7>(w, p, rows, y, y_stride, scratch);
    case DType::INT6: return multiply_as<DType::INT6>(w, p, rows, y, y_stride, scratch);
    case DType::INT5: return multiply_as<DType::INT5>(w, p, rows, y, y_stride, scratch);
    case DType::INT4: return multiply_as<DType::INT4>(w, p, rows, y, y_stride, scratch);
    case DType::INT3: return multiply_as<DType::INT3>(w, p, rows, y, y_stride, scratch);
    default: return multiply_as<DType::INT2>(w, p, rows, y, y_stride, scratch);
  }
}

}  // namespace apportion::APPORTION_ISA
