// Experts for Python: the weights of all experts in one buffer, expert after expert.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "experts.h"
#include "kernel_table.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

class Experts {
 public:
  Experts(ThreadTeam& team, const std::vector<int>& dtypes, int64_t M, int64_t F)
      : linear_(kernels().linear), experts_kernels_(kernels().experts), team_(team), M_(M), F_(F) {
    for (int code : dtypes) {
      const DType dtype = DType(code);
      experts_.push_back({{dtype, F, M, nullptr, nullptr, 2}, {dtype, F, M, nullptr, nullptr, 2}, {dtype, M, F}});
    }
  }

  int64_t nbytes() const {
    int64_t bytes = 0;
    for (const Expert& expert : experts_) bytes += expert.gate.nbytes() + expert.up.nbytes() + expert.down.nbytes();
    return bytes;
  }

  void bind(uintptr_t buffer) {
    std::byte* at = reinterpret_cast<std::byte*>(buffer);
    for (Expert& expert : experts_) {
      expert.gate.panels = at;
      expert.up.panels = at + expert.gate.panel_bytes();
      expert.down.panels = at + expert.gate.nbytes() + expert.up.nbytes();
      at = expert.down.panels + expert.down.nbytes();
    }
  }

  // projection: 0 gate, 1 up, 2 down
  void pack(int64_t expert, int projection, uintptr_t source, int dtype, int64_t stride, int64_t first, int64_t count) {
    nb::gil_scoped_release release;
    const Expert& e = experts_.at(size_t(expert));
    const PackedMatrix& w = projection == 0 ? e.gate : projection == 1 ? e.up : e.down;
    linear_->pack(team_, w, reinterpret_cast<const void*>(source), DType(dtype), stride, first, count);
  }

  void run(uintptr_t x, int64_t x_stride, uintptr_t ids, uintptr_t weights, int64_t top_k, uintptr_t y, int64_t rows) const {
    nb::gil_scoped_release release;
    const int32_t* chosen = reinterpret_cast<const int32_t*>(ids);
    for (int64_t i = 0; i < rows * top_k; ++i)
      if (chosen[i] < -1 || chosen[i] >= int64_t(experts_.size()))
        throw std::out_of_range("expert " + std::to_string(chosen[i]) + " of " + std::to_string(experts_.size()) + ".");
    experts_kernels_->run(team_, experts_.data(), int64_t(experts_.size()), M_, F_, reinterpret_cast<const float*>(x), x_stride, chosen,
                          reinterpret_cast<const float*>(weights), top_k, reinterpret_cast<float*>(y), rows);
  }

 private:
  const LinearKernels* linear_;
  const ExpertsKernels* experts_kernels_;
  ThreadTeam& team_;
  int64_t M_, F_;
  std::vector<Expert> experts_;
};

void bind_experts(nb::module_& m) {
  nb::class_<Experts>(m, "Experts", "The packed weights of a mixture of experts (experts.h).")
      .def(nb::init<ThreadTeam&, const std::vector<int>&, int64_t, int64_t>(), "team"_a, "dtypes"_a, "hidden"_a, "ffn"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("nbytes", &Experts::nbytes)
      .def("bind", &Experts::bind, "buffer"_a)
      .def("pack", &Experts::pack, "expert"_a, "projection"_a, "source"_a, "dtype"_a, "stride"_a, "first"_a, "count"_a)
      .def("run", &Experts::run);
}

}  // namespace apportion
