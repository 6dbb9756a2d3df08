// A mixture of experts: y = sum over the chosen e of p_e * down_e(silu(gate_e x) * up_e x). The panels of gate and up lie
// interleaved, so that one item makes 32 channels of the hidden layer from one stream of weights.
#pragma once
#include "linear.h"

namespace apportion {

struct Expert {
  PackedMatrix gate, up;  // [F, M]
  PackedMatrix down;      // [M, F]
};

struct ExpertsKernels {
  // x[rows, M], ids and weights [rows, top_k] -> y[rows, M]. An id of -1 is skipped; ids are in range.
  void (*run)(ThreadTeam& team, const Expert* experts, int64_t num_experts, int64_t M, int64_t F, const float* x, int64_t x_stride,
              const int32_t* ids, const float* weights, int64_t top_k, float* y, int64_t rows);
};

}  // namespace apportion
