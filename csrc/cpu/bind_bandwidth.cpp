// How fast a team can read memory: the floor under every step that is bound by weights (apportion/bench/bandwidth.py).
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "thread_team.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace apportion {

namespace {

constexpr int64_t PIECE = 1 << 18;      // bytes of one work item
constexpr int64_t AHEAD = 2048;         // bytes between a prefetch and its use
using Vector __attribute__((vector_size(16))) = uint64_t;

// Sixteen-byte loads keep a core's fill buffers full on every x86-64 and AArch64: wider ones read no faster from memory.
uint64_t read_piece(const char* begin, const char* end) {
  Vector a{}, b{}, c{}, d{};
  for (const char* p = begin; p < end; p += 64) {
    __builtin_prefetch(p + AHEAD);
    const Vector* v = reinterpret_cast<const Vector*>(p);
    a ^= v[0], b ^= v[1], c ^= v[2], d ^= v[3];
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1];
}

}  // namespace

void bind_bandwidth(nb::module_& m) {
  m.def(
      "read_memory",
      [](ThreadTeam& team, uintptr_t address, int64_t nbytes) {
        nb::gil_scoped_release release;
        const char* begin = reinterpret_cast<const char*>(address);
        const char* end = begin + nbytes / 64 * 64;
        std::atomic<uint64_t> sum{0};
        team.run((nbytes + PIECE - 1) / PIECE, [&](int64_t item, int) {
          sum.fetch_xor(read_piece(begin + item * PIECE, std::min(begin + (item + 1) * PIECE, end)), std::memory_order_relaxed);
        });
        return sum.load();
      },
      "team"_a, "address"_a, "nbytes"_a, "Read nbytes (16-byte aligned) once with all threads; returns their xor, so that nothing is left out.");
}

}  // namespace apportion
