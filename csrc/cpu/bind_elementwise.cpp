// Norms, gating and routing for Python. Addresses are integers, strides count floats.
#include <nanobind/nanobind.h>

#include "elementwise.h"
#include "kernel_table.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

namespace {

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

class Elementwise {
 public:
  explicit Elementwise(ThreadTeam& team) : kernels_(kernels().elementwise), team_(team) {}

  void rms_norm(uintptr_t x, int64_t x_stride, uintptr_t weight, float eps, uintptr_t out, int64_t out_stride, int64_t rows, int64_t M) const {
    perform(team_, [=, this] { kernels_->rms_norm(team_, floats(x), x_stride, nullptr, 0, floats(weight), eps, floats(out), out_stride, rows, M); });
  }

  void add_rms_norm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight, float eps, uintptr_t out,
                    int64_t rows, int64_t M) const {
    perform(team_, [=, this] {
      kernels_->rms_norm(team_, floats(x), x_stride, floats(residual), residual_stride, floats(weight), eps, floats(out), M, rows, M);
    });
  }

  void silu_mul(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows, int64_t F) const {
    perform(team_, [=, this] { kernels_->silu_mul(team_, floats(x), x_stride, floats(out), out_stride, rows, F); });
  }

  void route(const Route& route, uintptr_t logits, int64_t stride, uintptr_t ids, uintptr_t weights, int64_t rows) const {
    perform(team_, [=, this] { kernels_->route(team_, route, floats(logits), stride, reinterpret_cast<int32_t*>(ids), floats(weights), rows); });
  }

 private:
  const ElementwiseKernels* kernels_;
  ThreadTeam& team_;
};

}  // namespace

void bind_elementwise(nb::module_& m) {
  nb::class_<Route>(m, "Route", "How router logits become experts (kernels.ops.RouteSpec).")
      .def(
          "__init__",
          [](Route* self, int64_t num_experts, int64_t top_k, bool sigmoid, bool renormalize, int64_t num_groups, int64_t top_groups,
             float scale) { new (self) Route{num_experts, top_k, sigmoid, renormalize, num_groups, top_groups, scale}; },
          "num_experts"_a, "top_k"_a, "sigmoid"_a, "renormalize"_a, "num_groups"_a, "top_groups"_a, "scale"_a);
  nb::class_<Elementwise>(m, "Elementwise", "Row-wise operators of one team (elementwise.h).")
      .def(nb::init<ThreadTeam&>(), "team"_a, nb::keep_alive<1, 2>())
      .def("rms_norm", &Elementwise::rms_norm)
      .def("add_rms_norm", &Elementwise::add_rms_norm)
      .def("silu_mul", &Elementwise::silu_mul)
      .def("route", &Elementwise::route);
}

}  // namespace apportion
