// Linear for Python: holds the weight's address, the team and the kernels of its instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "kernel_table.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

class Linear {
 public:
  Linear(ThreadTeam& team, int dtype, int64_t N, int64_t C, bool bias)
      : kernels_(kernels().linear), team_(team), w_{DType(dtype), N, C}, has_bias_(bias) {}

  int64_t nbytes() const {
    const int64_t bytes = w_.nbytes() + (has_bias_ ? padded(w_.N) * 4 : 0);
    return (bytes + 255) / 256 * 256;
  }

  void bind(uintptr_t buffer) {
    w_.panels = reinterpret_cast<std::byte*>(buffer);
    w_.bias = has_bias_ ? reinterpret_cast<const float*>(w_.panels + w_.nbytes()) : nullptr;
  }

  void pack(uintptr_t source, int dtype, int64_t stride, int64_t first, int64_t count) {
    nb::gil_scoped_release release;
    kernels_->pack(team_, w_, reinterpret_cast<const void*>(source), DType(dtype), stride, first, count);
  }

  void run(uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride, int64_t rows) const {
    nb::gil_scoped_release release;
    kernels_->multiply(team_, w_, reinterpret_cast<const float*>(x), x_stride, reinterpret_cast<float*>(y), y_stride, rows);
  }

  void gather(uintptr_t ids, int64_t count, uintptr_t out) const {
    nb::gil_scoped_release release;
    const int32_t* row = reinterpret_cast<const int32_t*>(ids);
    for (int64_t i = 0; i < count; ++i)
      if (row[i] < 0 || row[i] >= w_.N)
        throw std::out_of_range("row " + std::to_string(row[i]) + " of a weight with " + std::to_string(w_.N) + " rows.");
    kernels_->gather(team_, w_, row, count, reinterpret_cast<float*>(out));
  }

 private:
  const LinearKernels* kernels_;
  ThreadTeam& team_;
  PackedMatrix w_;
  bool has_bias_;
};

void bind_linear(nb::module_& m) {
  nb::class_<Linear>(m, "Linear", "A weight in packed panels (linear.h). Addresses are integers, strides count elements.")
      .def(nb::init<ThreadTeam&, int, int64_t, int64_t, bool>(), "team"_a, "dtype"_a, "out_features"_a, "in_features"_a, "bias"_a,
           nb::keep_alive<1, 2>())
      .def_prop_ro("nbytes", &Linear::nbytes)
      .def("bind", &Linear::bind, "buffer"_a)
      .def("pack", &Linear::pack, "source"_a, "dtype"_a, "stride"_a, "first"_a, "count"_a)
      .def("run", &Linear::run)
      .def("gather", &Linear::gather);
}

}  // namespace apportion
