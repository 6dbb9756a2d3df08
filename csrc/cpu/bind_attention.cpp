// Python entries of attention. Addresses are data_ptr() integers, strides count elements, 0 stands for an absent tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "kernel_table.h"
#include "recording.h"
#include "thread_team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

using namespace attention;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

Format parse_format(const std::string& name) {
  if (name == "float32") return Format::FP32;
  if (name == "bfloat16") return Format::BF16;
  if (name == "float16") return Format::FP16;
  if (name == "fp8_e4m3") return Format::E4M3;
  if (name == "fp8_e5m2") return Format::E5M2;
  throw std::invalid_argument("the CPU attention kernels have no KV format '" + name + "'.");
}

nb::dict limits() {
  nb::dict out;
  out["span"] = SPAN;
  out["partition_len"] = PARTITION;
  return out;
}

class Rotary {
 public:
  explicit Rotary(ThreadTeam& team) : team_(team), rotate_(kernels().attention->rotate) {}

  void rotate(Address x, int64_t row_stride, int64_t head_stride, int rows, int heads, int rotary_dim, Address positions, Address cos_sin,
              bool interleaved) const {
    perform(team_, [=, this] {
      const int rows_per_item = std::max(1, 4096 / (heads * rotary_dim));
      team_.run((rows + rows_per_item - 1) / rows_per_item, [&](int64_t item, int) {
        const int64_t first = item * rows_per_item;
        rotate_(at<float>(x) + first * row_stride, row_stride, head_stride, int(std::min<int64_t>(rows_per_item, rows - first)), heads,
                rotary_dim, at<const int32_t>(positions) + first, at<const float>(cos_sin), interleaved);
      });
    });
  }

 private:
  ThreadTeam& team_;
  decltype(Kernels::rotate) rotate_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_limits", &limits, "{'span': what block sizes are multiples of, 'partition_len': tokens of a partition}");

  nb::class_<Plan>(m, "AttentionPlan", "The work items of one step for one layer group.")
      .def(nb::init<>())
      .def_prop_ro("num_items", [](const Plan& plan) { return plan.items.size(); })
      .def_prop_ro("num_merges", [](const Plan& plan) { return plan.merges.size(); });

  nb::class_<PagedAttention>(m, "PagedAttention", "Attention of one layer group; see csrc/cpu/attention.h.")
      .def(
          "__init__",
          [](PagedAttention* self, ThreadTeam& team, Address arena, const std::string& format, int num_heads, int num_kv_heads, int head_dim,
             int v_head_dim, int block_size, int window, bool latent, float scale, int rotary_dim, bool interleaved, float qk_norm_eps) {
            new (self) PagedAttention(team,
                                      Shape{num_heads, num_kv_heads, head_dim, v_head_dim, block_size, window, latent, parse_format(format),
                                            scale, rotary_dim, interleaved, qk_norm_eps},
                                      at<std::byte>(arena));
          },
          nb::keep_alive<1, 2>(), "team"_a, nb::kw_only(), "arena"_a, "format"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "v_head_dim"_a, "block_size"_a, "window"_a, "latent"_a, "scale"_a, "rotary_dim"_a, "interleaved"_a, "qk_norm_eps"_a)
      .def("plan",
           [](const PagedAttention& self, Plan& plan, Address query_start_loc, Address seq_lens, Address block_table, int64_t stride,
              int num_requests) {
             plan.clear();
             plan.query_start_loc = at<const int32_t>(query_start_loc);
             plan.seq_lens = at<const int32_t>(seq_lens);
             plan.block_table = at<const int32_t>(block_table);
             plan.block_table_stride = stride;
             self.plan(plan, num_requests);
           })
      .def("write",
           [](const PagedAttention& self, Plan& plan, int64_t layer_offset, Address qkv, int64_t stride, Address positions, Address cos_sin,
              Address q_norm, Address k_norm, Address scales) {
             perform(self.team(), [=, &self, &plan] {
               self.write(plan, layer_offset, at<float>(qkv), stride, at<const int32_t>(positions), at<const float>(cos_sin),
                          at<const float>(q_norm), at<const float>(k_norm), at<const float>(scales));
             });
           })
      .def_prop_ro("recomputed", &PagedAttention::recomputed)
      .def("run", [](PagedAttention& self, Plan& plan, int64_t layer_offset, Address q, int64_t q_stride, Address out, int64_t out_stride,
                     Address scales, Address phi) {
        perform(self.team(), [=, &self, &plan] {
          self.run(plan, layer_offset, at<const float>(q), q_stride, at<float>(out), out_stride, at<const float>(scales),
                   at<const float>(phi));
        });
      });

  nb::class_<Rotary>(m, "Rotary", "Rotary embedding in place.").def(nb::init<ThreadTeam&>(), "team"_a, nb::keep_alive<1, 2>()).def("rotate", &Rotary::rotate);
}

}  // namespace apportion
