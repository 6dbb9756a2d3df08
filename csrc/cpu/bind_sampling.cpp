// Python entries of sampling. Addresses are data_ptr() integers; rows are dealt to the team one by one.
#include <nanobind/nanobind.h>

#include "kernel_table.h"
#include "recording.h"
#include "sampling.h"
#include "thread_team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

class Sampling {
 public:
  explicit Sampling(ThreadTeam& team) : team_(team), kernels_(*kernels().sampling) {}

  void sample(Address logits, int64_t stride, int rows, int V, Address temperature, Address top_k, Address top_p, Address min_p, Address seed,
              Address position, Address out) const {
    perform(team_, [=, this] {
      const size_t bytes = kernels_.scratch_bytes(V);
      team_.run(rows, [&](int64_t r, int thread) {
        const SamplingRow row{at<const float>(temperature)[r], at<const float>(top_p)[r], at<const float>(min_p)[r], at<const int32_t>(top_k)[r],
                              uniform(at<const uint64_t>(seed)[r], at<const uint64_t>(position)[r])};
        at<int32_t>(out)[r] = kernels_.sample(at<const float>(logits) + r * stride, V, row, team_.local(thread, bytes));
      });
    });
  }

  void logprobs(Address logits, int64_t stride, int rows, int V, Address tokens, int n, Address values, Address ranks, Address top_ids,
                Address top_values) const {
    perform(team_, [=, this] {
      const size_t bytes = kernels_.scratch_bytes(V);
      team_.run(rows, [&](int64_t r, int thread) {
        kernels_.logprobs(at<const float>(logits) + r * stride, V, at<const int32_t>(tokens)[r], n, at<float>(values) + r,
                          at<int32_t>(ranks) + r, at<int32_t>(top_ids) + r * n, at<float>(top_values) + r * n, team_.local(thread, bytes));
      });
    });
  }

  void apply_bitmask(Address logits, int64_t stride, int V, Address row_ids, int rows, Address masks, int64_t mask_bytes) const {
    perform(team_, [=, this] {
      team_.run(rows, [&](int64_t r, int) {
        kernels_.apply_bitmask(at<float>(logits) + at<const int32_t>(row_ids)[r] * stride, V, at<const uint8_t>(masks) + r * mask_bytes);
      });
    });
  }

 private:
  ThreadTeam& team_;
  const SamplingKernels& kernels_;
};

}  // namespace

void bind_sampling(nb::module_& m) {
  nb::class_<Sampling>(m, "Sampling", "Tokens from logits; see csrc/cpu/sampling.h.")
      .def(nb::init<ThreadTeam&>(), "team"_a, nb::keep_alive<1, 2>())
      .def("sample", &Sampling::sample)
      .def("logprobs", &Sampling::logprobs)
      .def("apply_bitmask", &Sampling::apply_bitmask);
}

}  // namespace apportion
