// Norms, gating and routing. See elementwise.h.
#include "elementwise.h"

#include "activation.h"
#include "kernel_table.h"
#include "share.h"

namespace apportion::APPORTION_ISA {

namespace {

// Blocks of rows of at least 4096 elements to the team, or all at once on the caller.
template <typename F>
void share_rows(ThreadTeam& team, int64_t rows, int64_t row_elements, F&& f) {
  const int64_t block = larger(1, 4096 / row_elements);
  share(team, ceil_div(rows, block), rows * row_elements, [&](int64_t item, int thread) {
    for (int64_t row = item * block; row < smaller(rows, (item + 1) * block); ++row) f(row, thread);
  });
}

// Four running sums of squares, folded in order.
float mean_square(const float* x, int64_t M) {
  V sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= M; i += 4 * WIDTH)
    for (int j = 0; j < 4; ++j) {
      const V a = load(x + i + j * WIDTH);
      sums[j] = fma(a, a, sums[j]);
    }
  for (int j = 0; i < M; i += WIDTH, ++j) {
    const V a = load_n(x + i, int(M - i));
    sums[j] = fma(a, a, sums[j]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(M);
}

void rms_norm(ThreadTeam& team, const float* x, int64_t x_stride, float* residual, int64_t residual_stride, const float* weight, float eps,
              float* out, int64_t out_stride, int64_t rows, int64_t M) {
  share_rows(team, rows, M, [&](int64_t row, int) {
    const float* a = x + row * x_stride;
    if (residual != nullptr) {
      float* sum = residual + row * residual_stride;
      for (int64_t i = 0; i < M; i += WIDTH) {
        const int n = int(M - i);
        if (n >= WIDTH) store(sum + i, load(sum + i) + load(a + i));
        else store_n(sum + i, load_n(sum + i, n) + load_n(a + i, n), n);
      }
      a = sum;
    }
    const V scale = set1(1.f / std::sqrt(mean_square(a, M) + eps));
    float* y = out + row * out_stride;
    for (int64_t i = 0; i < M; i += WIDTH) {
      const int n = int(M - i);
      if (n >= WIDTH) store(y + i, load(a + i) * scale * load(weight + i));
      else store_n(y + i, load_n(a + i, n) * scale * load_n(weight + i, n), n);
    }
  });
}

void silu_mul(ThreadTeam& team, const float* x, int64_t x_stride, float* out, int64_t out_stride, int64_t rows, int64_t F) {
  share_rows(team, rows, 4 * F, [&](int64_t row, int) {  // an exponential weighs about four moved elements
    gate_row(x + row * x_stride, x + row * x_stride + F, out + row * out_stride, F);
  });
}

// ---- routing ----------------------------------------------------------------------------------------------------------------

void softmax(const float* logits, float* scores, int64_t E) {
  float top = logits[0];
  for (int64_t e = 1; e < E; ++e) top = logits[e] > top ? logits[e] : top;
  V sum = zero();
  for (int64_t e = 0; e < E; e += WIDTH) {
    const int n = int(E - e);
    V a = exp(load_n(logits + e, n) - set1(top));
    store_n(scores + e, a, n);
    sum = sum + load_n(scores + e, n);
  }
  const float total = reduce_add(sum);
  for (int64_t e = 0; e < E; ++e) scores[e] /= total;
}

void sigmoid(const float* logits, float* scores, int64_t E) {
  for (int64_t e = 0; e < E; e += WIDTH) {
    const int n = int(E - e);
    store_n(scores + e, set1(1.f) / (set1(1.f) + exp(zero() - load_n(logits + e, n))), n);
  }
}

// The index of the largest of values[n] that is not taken, the lower one of equals; what is not a number loses.
int64_t largest_free(const float* values, const bool* taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!taken[i] && (best < 0 || values[i] > values[best] || (values[best] != values[best] && values[i] == values[i]))) best = i;
  return best;
}

// Experts outside the best groups can no longer be chosen: their keys become -infinity.
void limit_groups(const Route& route, float* keys, float* group_best, bool* taken) {
  const int64_t size = route.num_experts / route.num_groups;
  for (int64_t g = 0; g < route.num_groups; ++g) {
    group_best[g] = keys[g * size];
    for (int64_t i = 1; i < size; ++i) group_best[g] = keys[g * size + i] > group_best[g] ? keys[g * size + i] : group_best[g];
    taken[g] = false;
  }
  for (int64_t i = 0; i < route.top_groups; ++i) taken[largest_free(group_best, taken, route.num_groups)] = true;
  for (int64_t e = 0; e < route.num_experts; ++e)
    if (!taken[e / size]) keys[e] = -INFINITY;
}

void route_rows(ThreadTeam& team, const Route& route, const float* logits, int64_t stride, int32_t* ids, float* weights, int64_t rows) {
  const int64_t E = route.num_experts, k = route.top_k;
  share_rows(team, rows, E * (k + 4), [&](int64_t row, int thread) {
    float* scores = reinterpret_cast<float*>(team.local(thread, size_t(E) * 16));
    float *keys = scores + E, *group_best = keys + E;
    bool* taken = reinterpret_cast<bool*>(group_best + E);
    (route.sigmoid ? sigmoid : softmax)(logits + row * stride, scores, E);
    std::memcpy(keys, scores, size_t(E) * sizeof(float));
    if (route.num_groups > 1) limit_groups(route, keys, group_best, taken);
    std::memset(taken, 0, size_t(E));
    int32_t* chosen = ids + row * k;
    float* weight = weights + row * k;
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t best = largest_free(keys, taken, E);
      taken[best] = true;
      chosen[i] = int32_t(best);
      weight[i] = scores[best];
      sum += scores[best];
    }
    for (int64_t i = 0; i < k; ++i) weight[i] = (route.renormalize ? weight[i] / sum : weight[i]) * route.scale;
  });
}

}  // namespace

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels = {.rms_norm = rms_norm, .silu_mul = silu_mul, .route = route_rows};

}  // namespace apportion::APPORTION_ISA
