#include "kernel_table.h"

#define APPORTION_STRINGIFY_(x) #x
#define APPORTION_STRINGIFY(x) APPORTION_STRINGIFY_(x)

namespace apportion::APPORTION_ISA {

extern const ElementwiseKernels elementwise_kernels;
extern const ExpertsKernels experts_kernels;
extern const LinearKernels linear_kernels;
extern const SamplingKernels sampling_kernels;

extern const attention::Kernels attention_kernels;

extern const KernelTable table;
const KernelTable table = {
    .isa = APPORTION_STRINGIFY(APPORTION_ISA) + 4,  // without "isa_"
    .sampling = &sampling_kernels,
    .attention = &attention_kernels,
    .linear = &linear_kernels,
    .elementwise = &elementwise_kernels,
    .experts = &experts_kernels,
};

}  // namespace apportion::APPORTION_ISA
