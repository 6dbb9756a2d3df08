#include "isa.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace apportion {

#define APPORTION_DECLARE(isa) \
  namespace isa {              \
  extern const KernelTable table; \
  }
APPORTION_DECLARE(isa_generic)
#if defined(APPORTION_HAVE_avx2)
APPORTION_DECLARE(isa_avx2)
APPORTION_DECLARE(isa_avx512)
APPORTION_DECLARE(isa_avx512vnni)
APPORTION_DECLARE(isa_avx512bf16)
APPORTION_DECLARE(isa_amx)
#endif
#undef APPORTION_DECLARE

namespace {

struct Candidate {
  IsaState state;
  const KernelTable* table;
};

#if defined(APPORTION_HAVE_avx2)
struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  Cpuid(uint32_t leaf, uint32_t sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

struct Need {
  bool met;
  const char* what;
};

template <int N>
IsaState judge(const char* name, const Need (&needs)[N]) {
  std::string found, missing;
  for (const Need& need : needs) {
    std::string& list = need.met ? found : missing;
    list += (list.empty() ? "" : ", ") + std::string(need.what);
  }
  return missing.empty() ? IsaState{name, true, "found " + found} : IsaState{name, false, "lacks " + missing};
}

// The kernel hands out the 8 KiB tile state only to a process that asks (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA), and
// threads inherit the permission: so it is asked at import, before any team is made.
bool request_tiles() {
#if defined(__linux__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Candidate> detect() {
  std::vector<Candidate> found = {{{"generic", true, "portable C++"}, &isa_generic::table}};
#if defined(APPORTION_HAVE_avx2)
  const Cpuid one(1, 0), seven(7, 0), seven_one(7, 1);
  const bool osxsave = one.c >> 27 & 1;
  const uint64_t states = osxsave ? xcr0() : 0;
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6, tile = (states & 0x60000) == 0x60000;
  found.push_back({judge("avx2", {{bool(seven.b >> 5 & 1), "avx2"},
                                  {bool(one.c >> 12 & 1), "fma"},
                                  {bool(one.c >> 29 & 1), "f16c"},
                                  {ymm, "ymm state"}}),
                   &isa_avx2::table});
  const bool avx2 = found.back().state.available;
  found.push_back({judge("avx512", {{avx2, "avx2"},
                                    {bool(seven.b >> 16 & 1), "avx512f"},
                                    {bool(seven.b >> 30 & 1), "avx512bw"},
                                    {bool(seven.b >> 17 & 1), "avx512dq"},
                                    {bool(seven.b >> 31 & 1), "avx512vl"},
                                    {zmm, "zmm state"}}),
                   &isa_avx512::table});
  const bool avx512 = found.back().state.available;
  found.push_back({judge("avx512vnni", {{avx512, "avx512"}, {bool(seven.c >> 11 & 1), "avx512_vnni"}}), &isa_avx512vnni::table});
  const bool avx512vnni = found.back().state.available;
  const Need dots = {bool(seven_one.a >> 5 & 1), "avx512_bf16"}, bytes = {bool(seven.c >> 1 & 1), "avx512_vbmi"};
  found.push_back({judge("avx512bf16", {{avx512vnni, "avx512vnni"}, dots, bytes}), &isa_avx512bf16::table});
  const bool amx = avx512vnni && (seven.d >> 24 & 1) && (seven.d >> 22 & 1) && (seven.d >> 25 & 1) && tile;
  found.push_back({judge("amx", {{avx512vnni, "avx512vnni"},
                                 dots,
                                 bytes,
                                 {bool(seven.d >> 24 & 1), "amx_tile"},
                                 {bool(seven.d >> 22 & 1), "amx_bf16"},
                                 {bool(seven.d >> 25 & 1), "amx_int8"},
                                 {tile, "tile state"},
                                 {amx && request_tiles(), "the kernel's permission for tiles"}}),
                   &isa_amx::table});
#endif
  return found;
}

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = detect();
  return all;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const std::vector<IsaState>& isa_states() {
  static const std::vector<IsaState> states = [] {
    std::vector<IsaState> out;
    for (const Candidate& candidate : candidates()) out.push_back(candidate.state);
    return out;
  }();
  return states;
}

void select_isa(const std::string& name) {
  const Candidate* best = nullptr;
  std::string names;
  for (const Candidate& candidate : candidates()) {
    if (name.empty() ? candidate.state.available : candidate.state.name == name) best = &candidate;
    names += (names.empty() ? "" : ", ") + candidate.state.name;
  }
  if (best == nullptr) throw std::invalid_argument("no CPU kernels are built for the instruction set '" + name + "'; there are " + names + ".");
  if (!best->state.available)
    throw std::invalid_argument("this processor cannot run the instruction set '" + name + "': it " + best->state.reason + ".");
  chosen.store(best->table, std::memory_order_release);
}

const KernelTable& kernels() { return *chosen.load(std::memory_order_acquire); }

const char* selected_isa() { return kernels().isa; }

}  // namespace apportion
