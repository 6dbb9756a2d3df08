// Grouped expert linears. Tokens are sorted by expert; the items shared out are (expert, panel), so that one token with four
// experts keeps every thread busy. A row's result depends on the row alone (panel.h); the parts of a token are summed in the
// order of its choices.
#include "experts.h"

#include "activation.h"
#include "kernel_table.h"
#include "panel_product.h"

namespace apportion::APPORTION_ISA {

namespace {

constexpr int64_t PAIRS_AT_A_TIME = 4096;  // (token, expert) pairs whose intermediates are held at once
constexpr int64_t CHUNK_ROWS = 64;         // rows of gate and up products kept in L1 until they are combined; whole tile blocks

// The pairs of one pass, sorted by expert; all arrays lie in the team's shared scratch.
struct Pass {
  int32_t* active;    // experts with at least one pair
  int64_t num_active;
  int32_t* start;     // [num_experts + 1]: pairs start[e] .. start[e + 1] belong to expert e
  int32_t* token;     // [pairs] by sorted position
  int32_t* position;  // [rows, top_k]: sorted position of a choice, -1 where it is skipped
  float *x, *hidden, *parts;  // [pairs, padded M], [pairs, padded F], [pairs, M]; x and hidden as bf16 tiles where tiles are used
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Pass make_pass(ThreadTeam& team, int64_t num_experts, int64_t M, int64_t F, int64_t rows, int64_t top_k) {
  const int64_t pairs = rows * top_k;
  const int64_t sizes[] = {num_experts * 4, (num_experts + 1) * 4, pairs * 4, pairs * 4, pairs * padded(M) * 4, pairs * padded(F) * 4, pairs * M * 4};
  int64_t total = 0;
  for (int64_t size : sizes) total += aligned(size);
  std::byte* memory = team.shared(size_t(total));
  std::byte* parts[7];
  for (int i = 0; i < 7; ++i) {
    parts[i] = memory;
    memory += aligned(sizes[i]);
  }
  const auto ints = [&](int i) { return reinterpret_cast<int32_t*>(parts[i]); };
  const auto floats = [&](int i) { return reinterpret_cast<float*>(parts[i]); };
  return {ints(0), 0, ints(1), ints(2), ints(3), floats(4), floats(5), floats(6)};
}

void sort_by_expert(Pass& pass, int64_t num_experts, const int32_t* ids, int64_t rows, int64_t top_k) {
  for (int64_t e = 0; e <= num_experts; ++e) pass.start[e] = 0;
  for (int64_t i = 0; i < rows * top_k; ++i)
    if (ids[i] >= 0) ++pass.start[ids[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) {
    if (pass.start[e + 1] > 0) pass.active[pass.num_active++] = int32_t(e);
    pass.start[e + 1] += pass.start[e];
  }
  for (int64_t i = 0; i < rows * top_k; ++i) {
    pass.position[i] = ids[i] < 0 ? -1 : pass.start[ids[i]]++;
    if (ids[i] >= 0) pass.token[pass.position[i]] = int32_t(i / top_k);
  }
  for (int64_t e = num_experts; e > 0; --e) pass.start[e] = pass.start[e - 1];  // the sort moved every start to its end
  pass.start[0] = 0;
}

// The rows of one expert from `row` on, `stored` of `width` channels.
Rows rows_of(const float* stored, int64_t width, int64_t row, int64_t count) {
  const uint16_t* tiles = reinterpret_cast<const uint16_t*>(stored) + row * width;
  return {stored + row * width, width, tiles, count};
}

void gather_rows(const Pass& pass, const Expert& expert, int64_t first, int64_t count, int64_t M, const float* x, int64_t x_stride) {
  float* target = pass.x + first * padded(M);
  const auto row = [&](int64_t r) { return x + pass.token[first + r] * x_stride; };
#if defined(__AMX_BF16__)
  if (uses_tiles(expert.gate.dtype)) {
    for (int64_t block = 0; block * TILE_ROWS < count; ++block) copy_tile_block(row, count, M, block, reinterpret_cast<uint16_t*>(target));
    return;
  }
#endif
  (void)expert;
  for (int64_t r = 0; r < count; ++r) std::memcpy(target + r * padded(M), row(r), size_t(M) * sizeof(float));
}

// 32 channels of silu(gate) * up for `n` rows from row `row` of the expert's `count`.
void store_hidden(const Expert& expert, const float* gates, const float* ups, int64_t row, int64_t n, int64_t count, int64_t p, float* hidden) {
  const int64_t F = padded(expert.down.C);
#if defined(__AMX_BF16__)
  if (uses_tiles(expert.down.dtype)) {
    uint16_t* tiles = reinterpret_cast<uint16_t*>(hidden);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t block = (row + r) / TILE_ROWS, in_block = (row + r) % TILE_ROWS, height = smaller(TILE_ROWS, count - block * TILE_ROWS);
      const float *g = gates + r * PANEL, *u = ups + r * PANEL;
      store_tile_row(tiles + block * TILE_ROWS * F + (p * height + in_block) * TILE_K, gate(load(g), load(u)), gate(load(g + WIDTH), load(u + WIDTH)));
    }
    return;
  }
#endif
  (void)count;
  for (int64_t r = 0; r < n; ++r) gate_row(gates + r * PANEL, ups + r * PANEL, hidden + (row + r) * F + p * PANEL, PANEL);
}

void run_pass(ThreadTeam& team, const Expert* experts, int64_t num_experts, int64_t M, int64_t F, const float* x, int64_t x_stride,
              const int32_t* ids, const float* weights, int64_t top_k, float* y, int64_t rows) {
  Pass pass = make_pass(team, num_experts, M, F, rows, top_k);
  sort_by_expert(pass, num_experts, ids, rows, top_k);
  const int64_t pairs = pass.start[num_experts], wide_M = padded(M), wide_F = padded(F);
  const auto first = [&](int64_t e) { return int64_t(pass.start[e]); };
  const auto count = [&](int64_t e) { return int64_t(pass.start[e + 1] - pass.start[e]); };

  share(team, pass.num_active, pairs * M, [&](int64_t item, int) {
    const int64_t e = pass.active[item];
    gather_rows(pass, experts[e], first(e), count(e), M, x, x_stride);
  });
  const int64_t hidden_panels = wide_F / PANEL;
  share(team, pass.num_active * hidden_panels, pairs * M * F, [&](int64_t item, int thread) {
    const int64_t e = pass.active[item / hidden_panels], p = item % hidden_panels;
    const Expert& expert = experts[e];
    float* scratch = reinterpret_cast<float*>(team.local(thread, size_t(K_BLOCK + 2 * CHUNK_ROWS) * PANEL * sizeof(float)));
    float *gates = scratch + K_BLOCK * PANEL, *ups = gates + CHUNK_ROWS * PANEL;
    PackedMatrix gate = expert.gate, up = expert.up;
    gate.N = up.N = wide_F;  // the padding is zeros: its channels come out as zeros
    for (int64_t row = 0; row < count(e); row += CHUNK_ROWS) {
      const int64_t n = smaller(CHUNK_ROWS, count(e) - row);
      const Rows chunk = rows_of(pass.x + first(e) * wide_M, wide_M, row, n);
      multiply_panel(gate, p, chunk, gates, PANEL, scratch);
      multiply_panel(up, p, chunk, ups, PANEL, scratch);
      store_hidden(expert, gates, ups, row, n, count(e), p, pass.hidden + first(e) * wide_F);
    }
  });
  const int64_t out_panels = wide_M / PANEL;
  share(team, pass.num_active * out_panels, pairs * M * F, [&](int64_t item, int thread) {
    const int64_t e = pass.active[item / out_panels], p = item % out_panels;
    const Rows all = rows_of(pass.hidden + first(e) * wide_F, wide_F, 0, count(e));
    multiply_panel(experts[e].down, p, all, pass.parts + first(e) * M + p * PANEL, M, panel_scratch(team, thread));
  });
  share(team, rows, rows * top_k * M, [&](int64_t row, int) {
    for (int64_t i = 0; i < M; i += WIDTH) {
      const int n = int(M - i);
      V sum = zero();
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t position = pass.position[row * top_k + k];
        if (position >= 0) sum = fma(set1(weights[row * top_k + k]), load_n(pass.parts + position * M + i, n), sum);
      }
      store_n(y + row * M + i, sum, n);
    }
  });
}

void run(ThreadTeam& team, const Expert* experts, int64_t num_experts, int64_t M, int64_t F, const float* x, int64_t x_stride,
         const int32_t* ids, const float* weights, int64_t top_k, float* y, int64_t rows) {
  const int64_t chunk = larger(1, PAIRS_AT_A_TIME / top_k);
  for (int64_t row = 0; row < rows; row += chunk)
    run_pass(team, experts, num_experts, M, F, x + row * x_stride, x_stride, ids + row * top_k, weights + row * top_k, top_k, y + row * M,
             smaller(chunk, rows - row));
}

}  // namespace

extern const ExpertsKernels experts_kernels;
const ExpertsKernels experts_kernels = {.run = run};

}  // namespace apportion::APPORTION_ISA
