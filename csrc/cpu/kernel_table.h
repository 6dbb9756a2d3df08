// The function pointers of one instruction set. Each kernel file declares its own group of them beside its arguments
// (linear.h, elementwise.h, ...) and defines the group once per set; kernel_table.cpp gathers the groups.
#pragma once

namespace apportion {

struct ElementwiseKernels;
struct ExpertsKernels;
struct LinearKernels;
struct SamplingKernels;

namespace attention {
struct Kernels;
}

struct KernelTable {
  const char* isa;
  const SamplingKernels* sampling;
  const attention::Kernels* attention;
  const LinearKernels* linear;
  const ElementwiseKernels* elementwise;
  const ExpertsKernels* experts;
};

// The table chosen for this process (isa.cpp).
const KernelTable& kernels();

}  // namespace apportion
