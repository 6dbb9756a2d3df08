// Linear for Python: holds the weight's address, the team and the kernels of its instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind_formats.h"
#include "kernel_table.h"
#include "linear.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

// Gated: the first half of the rows are gates, the rest ups; their panels alternate in the buffer.
class Linear {
 public:
  Linear(ThreadTeam& team, const WeightFormat& format, int64_t N, int64_t C, bool bias, bool gated)
      : kernels_(kernels().linear), team_(team), w_{format, gated ? N / 2 : N, C}, has_bias_(bias), gated_(gated) {
    if (gated) w_.stride = 2 * w_.panel_bytes();
    up_ = w_;
  }

  int gemv_rows() const { return kernels_->gemv_rows(w_); }
  void set_gemv(uint64_t rows) { w_.gemv = up_.gemv = rows; }
  int64_t nbytes() const { return (bias_start() + bias_bytes() + w_.extra_bytes() + 255) / 256 * 256; }
  int64_t bias_start() const { return num_matrices() * w_.nbytes(); }

  void bind(uintptr_t buffer) {
    w_.panels = reinterpret_cast<std::byte*>(buffer);
    up_.panels = w_.panels + w_.panel_bytes();
    w_.bias = has_bias_ ? reinterpret_cast<const float*>(w_.panels + bias_start()) : nullptr;
    up_.bias = has_bias_ ? w_.bias + padded(w_.N) : nullptr;
    for (PackedMatrix* w : {&w_, &up_}) w->bind_extra(w_.panels + bias_start() + aligned(bias_bytes()));
  }

  void pack(uintptr_t source, int dtype, int64_t stride, int64_t first, int64_t count) {
    nb::gil_scoped_release release;
    const int64_t gates = std::clamp<int64_t>(w_.N - first, 0, count);  // all of them where it is not gated
    const std::byte* rows = reinterpret_cast<const std::byte*>(source);
    kernels_->pack(team_, w_, rows, DType(dtype), stride, first, gates);
    rows += gates * stride * element_bytes(DType(dtype));
    kernels_->pack(team_, up_, rows, DType(dtype), stride, first + gates - w_.N, count - gates);
  }

  void pack_codes(const CodeSource& source, int64_t first, int64_t count) {
    nb::gil_scoped_release release;
    const int64_t gates = std::clamp<int64_t>(w_.N - first, 0, count);
    source.pack(team_, w_, first, gates);
    if (gates == count) return;
    const int64_t zero_bytes = w_.format.zero == Zero::POINT ? 1 : 4;
    source.from(gates, w_.C, w_.num_groups(), zero_bytes).pack(team_, up_, first + gates - w_.N, count - gates);
  }

  void run(uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride, int64_t rows) const {
    perform(team_, [=, this] {
      const float* from = reinterpret_cast<const float*>(x);
      float* to = reinterpret_cast<float*>(y);
      if (gated_) kernels_->multiply_gated(team_, w_, up_, from, x_stride, to, y_stride, rows);
      else kernels_->multiply(team_, w_, from, x_stride, to, y_stride, rows);
    });
  }

  void gather(uintptr_t ids, int64_t count, uintptr_t out) const {
    perform(team_, [=, this] {
      const int32_t* row = reinterpret_cast<const int32_t*>(ids);
      for (int64_t i = 0; i < count; ++i)
        if (row[i] < 0 || row[i] >= w_.N)
          throw std::out_of_range("row " + std::to_string(row[i]) + " of a weight with " + std::to_string(w_.N) + " rows.");
      (is_quantized(w_.dtype()) ? gather_quantized : kernels_->gather)(team_, w_, row, count, reinterpret_cast<float*>(out));
    });
  }

 private:
  int64_t num_matrices() const { return gated_ ? 2 : 1; }
  int64_t bias_bytes() const { return has_bias_ ? aligned(num_matrices() * padded(w_.N) * 4) : 0; }

  const LinearKernels* kernels_;
  ThreadTeam& team_;
  PackedMatrix w_, up_;
  bool has_bias_, gated_;
};

void bind_linear(nb::module_& m) {
  nb::class_<WeightFormat>(m, "WeightFormat", "How the numbers of a matrix are stored and its input is rounded (linear.h); the codes of its enums.")
      .def(
          "__init__",
          [](WeightFormat* self, int dtype, int64_t group, bool common, int scale_dtype, int zero, bool permuted, int rounding, int input_bits,
             int64_t input_group, bool input_fixed) {
            new (self) WeightFormat{DType(dtype), group, common, DType(scale_dtype), Zero(zero), permuted,
                                    {Rounding(rounding), input_bits, input_group, input_fixed}};
          },
          "dtype"_a, nb::kw_only(), "group"_a = 0, "common"_a = false, "scale_dtype"_a = 0, "zero"_a = 0, "permuted"_a = false, "rounding"_a = 0,
          "input_bits"_a = 8, "input_group"_a = 0, "input_fixed"_a = false);
  nb::class_<CodeSource>(m, "CodeSource", "Rows of a quantized matrix as addresses; block: rows that share a scale, 0 for all.")
      .def(
          "__init__",
          [](CodeSource* self, uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t order, uintptr_t input_scale, int64_t block) {
            new (self) CodeSource{codes, scales, zeros, order, input_scale, block};
          },
          "codes"_a, "scales"_a, "zeros"_a, "order"_a, "input_scale"_a, "block"_a);
  nb::class_<Linear>(m, "Linear", "A weight in packed panels (linear.h). Addresses are integers, strides count elements.")
      .def(nb::init<ThreadTeam&, const WeightFormat&, int64_t, int64_t, bool, bool>(), "team"_a, "format"_a, "out_features"_a, "in_features"_a, "bias"_a,
           "gated"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("gemv_rows", &Linear::gemv_rows, "most rows of a GEMV")
      .def("set_gemv", &Linear::set_gemv, "rows"_a, "bit r - 1: r rows are multiplied as a GEMV")
      .def_prop_ro("nbytes", &Linear::nbytes)
      .def_prop_ro("bias_start", &Linear::bias_start)
      .def("bind", &Linear::bind, "buffer"_a)
      .def("pack", &Linear::pack, "source"_a, "dtype"_a, "stride"_a, "first"_a, "count"_a)
      .def("pack_codes", &Linear::pack_codes, "source"_a, "first"_a, "count"_a)
      .def("run", &Linear::run)
      .def("gather", &Linear::gather);
}

}  // namespace apportion
