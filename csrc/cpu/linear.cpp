// Linears over packed panels, packing, and the gather of rows: work items for the team. See linear.h for the layout.
#include "linear.h"

#include "activation.h"
#include "kernel_table.h"
#include "panel_product.h"

namespace apportion::APPORTION_ISA {

namespace {

// ---- multiply ---------------------------------------------------------------------------------------------------------------

int gemv_rows(const PackedMatrix& w) {
  if (w.format.rounding.kind == Rounding::INTEGER && multiplies_bytes(w)) return 0;
#if defined(__AMX_BF16__)
  return uses_tiles(w) ? 0 : DIRECT_ROWS;
#elif defined(__AVX512BF16__)
  return is_quantized(w.dtype()) ? CODE_ROWS_ONCE : w.dtype() == DType::BF16 ? DOT_ROWS_ONCE : DIRECT_ROWS;
#else
  return DIRECT_ROWS;
#endif
}

constexpr int64_t COPY_BYTES = 3 << 19;
constexpr int64_t ROUNDING_COST = 8;  // of a number, in numbers moved

// Rows of x that stay in L2 while all panels pass over them; in matrix tiles they fill whole pairs of blocks.
int64_t rows_at_a_time(const RowForm& form, int64_t rows) {
  if (!form.tiles) return smaller(rows, larger(BLOCK_ROWS * 4, (int64_t(1) << 18) / form.C / BLOCK_ROWS * BLOCK_ROWS));
  const int64_t most = larger(4, COPY_BYTES / (form.row_floats() * 4) / ROW_BLOCK) * ROW_BLOCK;
  return ceil_div(ceil_div(rows, ceil_div(rows, most)), 2 * ROW_BLOCK) * 2 * ROW_BLOCK;
}

// f(rows, their first) for pieces of x, copied by the team where the form wants it.
template <typename F>
void in_pieces(ThreadTeam& team, const RowForm& form, const float* x, int64_t x_stride, int64_t rows, F&& f) {
  const int64_t piece = rows_at_a_time(form, rows);
  for (int64_t row = 0; row < rows; row += piece) {
    const int64_t n = smaller(piece, rows - row);
    const float* from = x + row * x_stride;
    if (!form.copied()) {
      f(Rows{from, x_stride, nullptr, 0, n}, row);
      continue;
    }
    float* copy = reinterpret_cast<float*>(team.shared(size_t(n * form.row_floats()) * sizeof(float)));
    const int64_t cost = form.rounding.kind == Rounding::NONE ? 1 : ROUNDING_COST;
    share(team, n, cost * n * form.C, [&](int64_t r, int thread) {
      float* gathered = form.order == nullptr ? nullptr : reinterpret_cast<float*>(team.local(thread, size_t(form.C) * sizeof(float)));
      copy_into(form, from + r * x_stride, n, r, copy, gathered);
    });
    f(copied_rows(form, copy, n), row);
  }
}

void multiply(ThreadTeam& team, const PackedMatrix& w, const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows) {
  in_pieces(team, row_form(w), x, x_stride, rows, [&](const Rows& piece, int64_t row) {
    share(team, w.num_panels(), piece.count * w.N * w.C, [&](int64_t p, int thread) {
      multiply_panel(w, p, piece, y + row * y_stride + p * PANEL, y_stride, panel_scratch(team, thread));
    });
  });
}

void multiply_gated(ThreadTeam& team, const PackedMatrix& gate, const PackedMatrix& up, const float* x, int64_t x_stride, float* y,
                    int64_t y_stride, int64_t rows) {
  in_pieces(team, row_form(gate), x, x_stride, rows, [&](const Rows& piece, int64_t row) {
    share(team, gate.num_panels(), 2 * piece.count * gate.N * gate.C, [&](int64_t p, int thread) {
      const auto combine = [&](int64_t first, int64_t count, const float* gates, const float* ups) {
        float* out = y + (row + first) * y_stride + p * PANEL;
        for (int64_t r = 0; r < count; ++r) gate_row(gates + r * PANEL, ups + r * PANEL, out + r * y_stride, gate.columns(p));
      };
      multiply_gated_panel(team, thread, gate, up, p, piece, piece, combine);
    });
  });
}

// ---- pack -------------------------------------------------------------------------------------------------------------------

struct HalfBits {
  uint16_t bits;
};
struct BrainBits {
  uint16_t bits;
};

APPORTION_INLINE float widen(float a) { return a; }
APPORTION_INLINE float widen(HalfBits a) { return fp16_to_float(a.bits); }
APPORTION_INLINE float widen(BrainBits a) { return bf16_to_float(a.bits); }
APPORTION_INLINE void narrow_to(float a, float& out) { out = a; }
APPORTION_INLINE void narrow_to(float a, HalfBits& out) { out.bits = float_to_fp16(a); }
APPORTION_INLINE void narrow_to(float a, BrainBits& out) { out.bits = float_to_bf16(a); }

// n elements of one row, then zeros up to `total`.
template <typename From, typename To>
inline void convert_row(const void* from, int64_t n, int64_t total, void* to) {
  const From* source = static_cast<const From*>(from);
  To* target = static_cast<To*>(to);
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(target, source, size_t(n) * sizeof(To));
  else
    for (int64_t i = 0; i < n; ++i) narrow_to(widen(source[i]), target[i]);
  std::memset(static_cast<void*>(target + n), 0, size_t(total - n) * sizeof(To));
}

using ConvertRow = void (*)(const void*, int64_t, int64_t, void*);

ConvertRow converter(DType from, DType to) {
  static constexpr ConvertRow table[3][3] = {
      {convert_row<float, float>, convert_row<float, BrainBits>, convert_row<float, HalfBits>},
      {convert_row<BrainBits, float>, convert_row<BrainBits, BrainBits>, convert_row<BrainBits, HalfBits>},
      {convert_row<HalfBits, float>, convert_row<HalfBits, BrainBits>, convert_row<HalfBits, HalfBits>},
  };
  return table[int(from)][int(to)];
}

// Columns begin .. end of one panel from rows of `source`; columns past `count` rows are zeroed. The rows go through a buffer
// of 64 words each: read contiguously there, turned over from there, so that 32 row strides never compete for one cache set.
void pack_columns(std::byte* panel, DType dtype, int64_t C, const std::byte* source, DType source_dtype, int64_t stride, int begin, int end,
                  int64_t count) {
  constexpr int WORDS = 64, ROW = WORDS + 16;
  alignas(64) uint32_t buffer[PANEL * ROW];
  const ConvertRow convert = converter(source_dtype, dtype);
  const int64_t per_word = 4 / element_bytes(dtype), words = padded(C) / per_word;
  uint32_t* out = reinterpret_cast<uint32_t*>(panel);
  for (int64_t word = 0; word < words; word += WORDS) {
    const int64_t n = smaller(WORDS, words - word), k = word * per_word;
    const int64_t present = larger(0, smaller(n * per_word, C - k));
    for (int column = begin; column < end; ++column) {
      const int64_t row = column - begin;
      convert(source + (row < count ? row * stride + k : 0) * element_bytes(source_dtype), row < count ? present : 0, n * per_word,
              buffer + column * ROW);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int column = begin; column < end; ++column) out[(word + i) * PANEL + column] = buffer[column * ROW + i];
  }
}

void pack(ThreadTeam& team, const PackedMatrix& w, const void* source, DType source_dtype, int64_t stride, int64_t first, int64_t count) {
  if (count <= 0) return;
  const int64_t last = first + count == w.N ? padded(w.N) : first + count;  // the last rows bring the padding with them
  const int64_t begin_panel = first / PANEL, end_panel = ceil_div(last, PANEL);
  share(team, end_panel - begin_panel, count * w.C, [&](int64_t item, int) {
    const int64_t p = begin_panel + item, begin = larger(first, p * PANEL), end = smaller(last, (p + 1) * PANEL);
    const std::byte* rows = static_cast<const std::byte*>(source) + (begin - first) * stride * element_bytes(source_dtype);
    pack_columns(w.panel(p), w.dtype(), w.C, rows, source_dtype, stride, int(begin - p * PANEL), int(end - p * PANEL),
                 first + count - begin);
  });
}

// ---- gather -----------------------------------------------------------------------------------------------------------------

void gather(ThreadTeam& team, const PackedMatrix& w, const int32_t* ids, int64_t count, float* out) {
  share(team, count, count * w.C, [&](int64_t i, int) {
    const std::byte* column = w.panel(ids[i] / PANEL) + ids[i] % PANEL * 4;
    float* row = out + i * w.C;
    if (w.dtype() == DType::FP32) {
      for (int64_t k = 0; k < w.C; ++k) std::memcpy(row + k, column + k * PANEL * 4, 4);
      return;
    }
    const bool brain = w.dtype() == DType::BF16;
    for (int64_t k = 0; k < w.C; k += 2) {
      uint16_t pair[2];
      std::memcpy(pair, column + k / 2 * PANEL * 4, 4);
      row[k] = brain ? bf16_to_float(pair[0]) : fp16_to_float(pair[0]);
      if (k + 1 < w.C) row[k + 1] = brain ? bf16_to_float(pair[1]) : fp16_to_float(pair[1]);
    }
  });
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {.gemv_rows = gemv_rows, .multiply = multiply, .multiply_gated = multiply_gated, .pack = pack, .gather = gather};

}  // namespace apportion::APPORTION_ISA
