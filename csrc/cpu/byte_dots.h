// Integer codes of one panel times rows of 8-bit integers by dot products of four bytes (AVX512_VNNI). The codes are the unsigned factor, as
// they are stored, in offset binary: nothing is widened, and the zero point (or the middle) times the sum of the row is taken off afterwards.
// Within a group of channels all is exact in 32 bits, so that the order of products is free; then
//
//     y = bias + sum over groups, in order, of (sum of x code - zero * sum of x) * scale of the row * scale of the weight
#pragma once
#include "codes.h"
#include "panel_scales.h"
#include "rows.h"

#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
namespace apportion::APPORTION_ISA {

struct BytePanel {
  const PackedMatrix& w;
  PanelScales scales;
  const std::byte* codes;
  const float* bias;
  int columns;
  int64_t group;  // channels within which one scale of the weight and one of the row hold

  BytePanel(const PackedMatrix& w, int64_t p)
      : w(w), scales(w, p), codes(w.codes(p)), bias(w.panel_bias(p)), columns(w.columns(p)), group(scaled_together(w)) {}
};

// R rows from row `row` on of a block of `block_rows`; the codes come from memory where `streams`.
template <int BITS, int R>
static void multiply_byte_rows_of(const BytePanel& panel, const Rows& rows, int64_t row, int64_t block_rows, bool streams, float* y, int64_t y_stride) {
  constexpr int64_t STEP_BYTES = STEP_NUMBERS * BITS / 8;
  constexpr int CHAINS = R <= 2 ? 2 : 1;  // enough sums in flight to hide the latency of a product
  alignas(64) float totals[R][PANEL];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) store(totals[r] + j * WIDTH, panel.bias == nullptr ? zero() : load(panel.bias + j * WIDTH));

  const int64_t depth = panel.w.depth(), group = panel.group, w_group = panel.w.group(), x_group = panel.w.format.rounding.group;
  const int8_t* x = rows.bytes(row);
  for (int64_t k = 0, g = 0; k < depth; k += group, ++g) {
    __m512i sums[CHAINS][R][2];
    for (int chain = 0; chain < CHAINS; ++chain)
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) sums[chain][r][j] = _mm512_setzero_si512();
    for (int64_t step = k / STEP, last = smaller(k + group, depth) / STEP; step < last; ++step) {
      const std::byte* codes = panel.codes + step * STEP_BYTES;
      const int8_t* fours = x + step / 2 * block_rows * 64 + step % 2 * STEP;
      if (streams)
        for (int64_t line = 0; line < STEP_BYTES; line += 64) prefetch(codes + line + CODES_AHEAD);
#pragma GCC unroll 8
      for (int four = 0; four < 8; ++four) {
        const __m512i left = integer_bytes<BITS>(codes, 2 * four), right = integer_bytes<BITS>(codes, 2 * four + 1);
        for (int r = 0; r < R; ++r) {
          int channels;
          std::memcpy(&channels, fours + r * 64 + four * 4, sizeof(channels));
          const __m512i all = _mm512_set1_epi32(channels);
          sums[four % CHAINS][r][0] = _mm512_dpbusd_epi32(sums[four % CHAINS][r][0], left, all);
          sums[four % CHAINS][r][1] = _mm512_dpbusd_epi32(sums[four % CHAINS][r][1], right, all);
        }
      }
    }
    const int64_t of_w = k / w_group, of_x = x_group == 0 ? 0 : k / x_group;
    const PanelScales& scales = panel.scales;
    for (int j = 0; j < 2; ++j) {
      const V scale = scales.scale(of_w, j), least = scales.zero == Zero::MINIMUM ? scales.minimum(of_w, j) : zero();
      const V from = scales.zero == Zero::POINT ? scales.point(of_w, j) : set1(scales.zero == Zero::NONE ? scales.middle : 0.f);
      for (int r = 0; r < R; ++r) {
        const float x_scale = rows.scales[(row + r) * rows.num_scales + of_x], x_sum = rows.sums[(row + r) * rows.num_sums + g];
        __m512i sum = sums[0][r][j];
        if constexpr (CHAINS == 2) sum = _mm512_add_epi32(sum, sums[1][r][j]);
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_cvtps_epi32(from), _mm512_cvtps_epi32(set1(x_sum))));
        V total = load(totals[r] + j * WIDTH) + _mm512_cvtepi32_ps(sum) * set1(x_scale) * scale;
        if (scales.zero == Zero::MINIMUM) total = fma(least, set1(x_sum * x_scale), total);
        store(totals[r] + j * WIDTH, total);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j)
      if (const int n = panel.columns - j * WIDTH; n > 0) store_n(y + r * y_stride + j * WIDTH, load(totals[r] + j * WIDTH), n);
}

template <int BITS, int R = DOT_ROWS_ONCE>
static inline void multiply_byte_rows(int n, const BytePanel& panel, const Rows& rows, int64_t row, int64_t block_rows, bool streams, float* y, int64_t y_stride) {
  if constexpr (R > 1) {
    if (n < R) return multiply_byte_rows<BITS, R - 1>(n, panel, rows, row, block_rows, streams, y, y_stride);
  }
  multiply_byte_rows_of<BITS, R>(panel, rows, row, block_rows, streams, y, y_stride);
}

}  // namespace apportion::APPORTION_ISA
#endif
