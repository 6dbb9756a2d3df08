// Experts for Python: the weights of all experts in one buffer, expert after expert.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind_formats.h"
#include "experts.h"
#include "kernel_table.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

class Experts {
 public:
  // formats: of gate, up and down, expert after expert
  Experts(ThreadTeam& team, const std::vector<WeightFormat>& formats, int64_t M, int64_t F)
      : linear_(kernels().linear), experts_kernels_(kernels().experts), team_(team), M_(M), F_(F) {
    for (size_t i = 0; i + 2 < formats.size(); i += 3) {
      Expert expert{{formats[i], F, M}, {formats[i + 1], F, M}, {formats[i + 2], M, F}};
      expert.gate.stride = expert.up.stride = expert.gate.panel_bytes() + expert.up.panel_bytes();
      experts_.push_back(expert);
    }
  }

  int64_t nbytes() const {
    int64_t bytes = 0;
    for (const Expert& expert : experts_)
      for (const PackedMatrix* w : {&expert.gate, &expert.up, &expert.down}) bytes += w->nbytes() + w->extra_bytes();
    return bytes;
  }

  void bind(uintptr_t buffer) {
    std::byte* at = reinterpret_cast<std::byte*>(buffer);
    for (Expert& expert : experts_) {
      expert.gate.panels = at;
      expert.up.panels = at + expert.gate.panel_bytes();
      expert.down.panels = at + expert.gate.nbytes() + expert.up.nbytes();
      at = expert.down.panels + expert.down.nbytes();
      for (PackedMatrix* w : {&expert.gate, &expert.up, &expert.down}) {
        w->bind_extra(at);
        at += w->extra_bytes();
      }
    }
  }

  // projection: 0 gate, 1 up, 2 down
  void pack(int64_t expert, int projection, uintptr_t source, int dtype, int64_t stride, int64_t first, int64_t count) {
    nb::gil_scoped_release release;
    linear_->pack(team_, matrix(expert, projection), reinterpret_cast<const void*>(source), DType(dtype), stride, first, count);
  }

  void pack_codes(int64_t expert, int projection, const CodeSource& source, int64_t first, int64_t count) {
    nb::gil_scoped_release release;
    source.pack(team_, matrix(expert, projection), first, count);
  }

  void run(uintptr_t x, int64_t x_stride, uintptr_t ids, uintptr_t weights, int64_t top_k, uintptr_t y, int64_t rows) const {
    perform(team_, [=, this] {
      const int32_t* chosen = reinterpret_cast<const int32_t*>(ids);
      for (int64_t i = 0; i < rows * top_k; ++i)
        if (chosen[i] < -1 || chosen[i] >= int64_t(experts_.size()))
          throw std::out_of_range("expert " + std::to_string(chosen[i]) + " of " + std::to_string(experts_.size()) + ".");
      experts_kernels_->run(team_, experts_.data(), int64_t(experts_.size()), M_, F_, reinterpret_cast<const float*>(x), x_stride, chosen,
                            reinterpret_cast<const float*>(weights), top_k, reinterpret_cast<float*>(y), rows);
    });
  }

 private:
  const PackedMatrix& matrix(int64_t expert, int projection) const {
    const Expert& e = experts_.at(size_t(expert));
    return projection == 0 ? e.gate : projection == 1 ? e.up : e.down;
  }

  const LinearKernels* linear_;
  const ExpertsKernels* experts_kernels_;
  ThreadTeam& team_;
  int64_t M_, F_;
  std::vector<Expert> experts_;
};

void bind_experts(nb::module_& m) {
  nb::class_<Experts>(m, "Experts", "The packed weights of a mixture of experts (experts.h).")
      .def(nb::init<ThreadTeam&, const std::vector<WeightFormat>&, int64_t, int64_t>(), "team"_a, "formats"_a, "hidden"_a, "ffn"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("nbytes", &Experts::nbytes)
      .def("bind", &Experts::bind, "buffer"_a)
      .def("pack", &Experts::pack, "expert"_a, "projection"_a, "source"_a, "dtype"_a, "stride"_a, "first"_a, "count"_a)
      .def("pack_codes", &Experts::pack_codes, "expert"_a, "projection"_a, "source"_a, "first"_a, "count"_a)
      .def("run", &Experts::run);
}

}  // namespace apportion
