// Norms, gating and routing: every row for itself, so a row's result never depends on its neighbours or the threads.
#pragma once
#include <cstdint>

#include "thread_team.h"

namespace apportion {

struct Route {
  int64_t num_experts, top_k;
  bool sigmoid, renormalize;
  int64_t num_groups, top_groups;
  float scale;
};

// Strides in floats from row to row.
struct ElementwiseKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight. With `residual`: residual += x first, and the norm is of the residual.
  void (*rms_norm)(ThreadTeam& team, const float* x, int64_t x_stride, float* residual, int64_t residual_stride, const float* weight, float eps,
                   float* out, int64_t out_stride, int64_t rows, int64_t M);
  // out[rows, F] = silu(x[:, :F]) * x[:, F:]
  void (*silu_mul)(ThreadTeam& team, const float* x, int64_t x_stride, float* out, int64_t out_stride, int64_t rows, int64_t F);
  // ids[rows, top_k], weights[rows, top_k] from logits[rows, num_experts]
  void (*route)(ThreadTeam& team, const Route& route, const float* logits, int64_t stride, int32_t* ids, float* weights, int64_t rows);
};

}  // namespace apportion
