// The Python module `apportion.kernels.cpu._cpu`. Tensors come in as addresses (data_ptr() integers) and strides in elements:
// the Python classes check shapes and dtypes once. Every entry that computes releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"
#include "recording.h"
#include "thread_team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

// One function per kernel file; each binds its own entries.
void bind_attention(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_bandwidth(nb::module_& m);
void bind_elementwise(nb::module_& m);
void bind_experts(nb::module_& m);

static nb::dict features() {
  nb::dict sets;
  for (const IsaState& state : isa_states()) {
    nb::dict entry;
    entry["available"] = state.available;
    entry["reason"] = state.reason;
    sets[state.name.c_str()] = entry;
  }
  nb::dict out;
  out["isa"] = selected_isa();
  out["sets"] = sets;
  return out;
}

}  // namespace apportion

NB_MODULE(_cpu, m) {
  using namespace apportion;
  select_isa("");

  m.def("features", &features, "{'isa': chosen instruction set, 'sets': {name: {'available', 'reason'}}}");
  m.def("select_isa", &select_isa, "name"_a, "Pin the instruction set for objects made from now on; '' takes the fastest available.");

  nb::class_<ThreadTeam>(m, "ThreadTeam", "A team of persistent threads; the caller is thread 0.")
      .def(nb::init<int, std::vector<int>>(), "num_threads"_a, "cores"_a = std::vector<int>{})
      .def_prop_ro("num_threads", &ThreadTeam::num_threads)
      .def_prop_ro("cores", &ThreadTeam::cores)
      .def_static("run_seconds", &ThreadTeam::run_seconds, "Seconds that callers have spent inside teams since the process began.");
  nb::class_<Recording>(m, "Recording", "Inside `with recording:` every call of the team's operators is made and kept; replay makes them again.")
      .def(nb::init<ThreadTeam&>(), "team"_a, nb::keep_alive<1, 2>())
      .def("__enter__", &Recording::start, nb::rv_policy::reference)
      .def("__exit__", [](Recording& recording, nb::args) { recording.stop(); })
      .def_prop_ro("num_calls", &Recording::size)
      .def("replay", &Recording::replay);
  bind_attention(m);
  bind_sampling(m);
  bind_linear(m);
  bind_bandwidth(m);
  bind_elementwise(m);
  bind_experts(m);
}
