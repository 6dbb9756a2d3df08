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

// The pairs of one pass, sorted by expert; all arrays lie in the team's shared scratch.
struct Pass {
  int32_t* active;    // experts with at least one pair
  int64_t num_active;
  int32_t* start;     // [num_experts + 1]: pairs start[e] .. start[e + 1] belong to expert e
  int32_t* token;     // [pairs] by sorted position
  int32_t* position;  // [rows, top_k]: sorted position of a choice, -1 where it is skipped
  float *x, *up_x, *hidden, *parts;  // of each pair: x as its expert's gate takes it and, where that differs, up; what down takes; y
  float* plain_hidden;               // hidden rows [pairs, padded F] that are rounded or reordered for down
  int64_t x_floats, up_floats, hidden_floats;  // of a pair
  bool copies_hidden;
};

// How the rows of one expert are made.
struct ExpertForms {
  RowForm gate, up, down;
  explicit ExpertForms(const Expert& expert) : gate(row_form(expert.gate)), up(row_form(expert.up)), down(row_form(expert.down)) {}
  bool one() const { return gate == up; }
};

Pass make_pass(ThreadTeam& team, const Expert* experts, int64_t num_experts, int64_t M, int64_t F, int64_t rows, int64_t top_k) {
  const int64_t pairs = rows * top_k;
  int64_t x_floats = 0, up_floats = 0, hidden_floats = 0, plain_floats = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const ExpertForms forms(experts[e]);
    x_floats = larger(x_floats, forms.gate.row_floats());
    if (!forms.one()) up_floats = larger(up_floats, forms.up.row_floats());
    hidden_floats = larger(hidden_floats, forms.down.row_floats());
    if (!forms.down.plain()) plain_floats = padded(F);
  }
  for (int64_t* floats : {&x_floats, &up_floats, &hidden_floats}) *floats = ceil_div(*floats, 16) * 16;
  const int64_t sizes[] = {num_experts * 4,      (num_experts + 1) * 4,     pairs * 4,     pairs * 4,           pairs * x_floats * 4,
                           pairs * up_floats * 4, pairs * hidden_floats * 4, pairs * M * 4, pairs * plain_floats * 4};
  constexpr int COUNT = sizeof(sizes) / sizeof(sizes[0]);
  int64_t total = 0;
  for (int64_t size : sizes) total += aligned(size);
  std::byte* memory = team.shared(size_t(total));
  std::byte* parts[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    parts[i] = memory;
    memory += aligned(sizes[i]);
  }
  const auto ints = [&](int i) { return reinterpret_cast<int32_t*>(parts[i]); };
  const auto floats = [&](int i) { return reinterpret_cast<float*>(parts[i]); };
  return {ints(0), 0, ints(1), ints(2), ints(3), floats(4), floats(5), floats(6), floats(7), floats(8), x_floats, up_floats, hidden_floats, plain_floats > 0};
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

// All rows of one expert into the copy at `memory`; address(r) is where row r is.
template <typename Address>
void copy_rows(ThreadTeam& team, int thread, const RowForm& form, Address&& address, int64_t count, float* memory) {
  float* gathered = form.order == nullptr ? nullptr : reinterpret_cast<float*>(team.local(thread, size_t(form.C) * sizeof(float)));
  for (int64_t r = 0; r < count; ++r) copy_into(form, address(r), count, r, memory, gathered);
}

// 32 channels of silu(gate) * up for `n` rows from row `row` of the expert's `count`, as tiles where `tiles`.
void store_hidden(bool tiles, int64_t F, const float* gates, const float* ups, int64_t row, int64_t n, int64_t count, int64_t p, float* hidden) {
#if defined(__AVX512BF16__)
  if (tiles) {
    uint16_t* out = reinterpret_cast<uint16_t*>(hidden);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t block = (row + r) / TILE_ROWS, in_block = (row + r) % TILE_ROWS, height = smaller(TILE_ROWS, count - block * TILE_ROWS);
      const float *g = gates + r * PANEL, *u = ups + r * PANEL;
      store_tile_row(out + block * TILE_ROWS * F + (p * height + in_block) * TILE_K, gate(load(g), load(u)), gate(load(g + WIDTH), load(u + WIDTH)));
    }
    return;
  }
#endif
  (void)tiles, (void)count;
  for (int64_t r = 0; r < n; ++r) gate_row(gates + r * PANEL, ups + r * PANEL, hidden + (row + r) * F + p * PANEL, PANEL);
}

void run_pass(ThreadTeam& team, const Expert* experts, int64_t num_experts, int64_t M, int64_t F, const float* x, int64_t x_stride,
              const int32_t* ids, const float* weights, int64_t top_k, float* y, int64_t rows) {
  Pass pass = make_pass(team, experts, num_experts, M, F, rows, top_k);
  sort_by_expert(pass, num_experts, ids, rows, top_k);
  const int64_t pairs = pass.start[num_experts], wide_M = padded(M), wide_F = padded(F);
  const auto first = [&](int64_t e) { return int64_t(pass.start[e]); };
  const auto count = [&](int64_t e) { return int64_t(pass.start[e + 1] - pass.start[e]); };

  share(team, pass.num_active, pairs * M, [&](int64_t item, int thread) {
    const int64_t e = pass.active[item];
    const ExpertForms forms(experts[e]);
    const auto address = [&](int64_t r) { return x + pass.token[first(e) + r] * x_stride; };
    copy_rows(team, thread, forms.gate, address, count(e), pass.x + first(e) * pass.x_floats);
    if (!forms.one()) copy_rows(team, thread, forms.up, address, count(e), pass.up_x + first(e) * pass.up_floats);
  });
  const int64_t hidden_panels = wide_F / PANEL;
  share(team, pass.num_active * hidden_panels, pairs * M * F, [&](int64_t item, int thread) {
    const int64_t e = pass.active[item / hidden_panels], p = item % hidden_panels;
    const Expert& expert = experts[e];
    const ExpertForms forms(expert);
    const Rows gate_rows = copied_rows(forms.gate, pass.x + first(e) * pass.x_floats, count(e));
    const Rows up_rows = forms.one() ? gate_rows : copied_rows(forms.up, pass.up_x + first(e) * pass.up_floats, count(e));
    const bool plain = forms.down.plain();
    float* hidden = plain ? pass.hidden + first(e) * pass.hidden_floats : pass.plain_hidden + first(e) * wide_F;
    multiply_gated_panel(team, thread, expert.gate, expert.up, p, gate_rows, up_rows, [&](int64_t row, int64_t n, const float* gates, const float* ups) {
      store_hidden(plain && forms.down.tiles, wide_F, gates, ups, row, n, count(e), p, hidden);
    });
  });
  if (pass.copies_hidden) {
    share(team, pass.num_active, pairs * F, [&](int64_t item, int thread) {
      const int64_t e = pass.active[item];
      const RowForm form = row_form(experts[e].down);
      if (form.plain()) return;
      const float* hidden = pass.plain_hidden + first(e) * wide_F;
      copy_rows(team, thread, form, [&](int64_t r) { return hidden + r * wide_F; }, count(e), pass.hidden + first(e) * pass.hidden_floats);
    });
  }
  const int64_t out_panels = wide_M / PANEL;
  share(team, pass.num_active * out_panels, pairs * M * F, [&](int64_t item, int thread) {
    const int64_t e = pass.active[item / out_panels], p = item % out_panels;
    const Rows all = copied_rows(row_form(experts[e].down), pass.hidden + first(e) * pass.hidden_floats, count(e));
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
