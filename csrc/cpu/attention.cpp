// Deals a step of attention to the team: which tiles, which partitions, who merges.
#include "attention.h"

#include <algorithm>
#include <bit>

#include "kernel_table.h"
#include "thread_team.h"

namespace apportion::attention {

namespace {

// Below so much work the calling thread does it alone: waking the team costs more than it brings.
constexpr int64_t SMALL = 1 << 15;

constexpr int ITEMS_PER_THREAD = 4;  // what a split aims at, so that the last item to end costs little

struct Tile {
  int request, first_row, num_rows;
  int first_partition, last_partition;  // partitions that any of its rows sees
  int64_t cost;                         // rows * tokens
};

template <typename F>
void deal(ThreadTeam& team, size_t items, int64_t work, F&& f) {
  if (work > SMALL) return team.run(int64_t(items), f);
  for (size_t i = 0; i < items; ++i) f(int64_t(i), 0);
}

std::vector<Tile> cut_tiles(const Shape& shape, const Plan& plan, int num_requests, int64_t& total) {
  std::vector<Tile> tiles;
  const int group = shape.group();
  for (int r = 0; r < num_requests; ++r) {
    const int count = plan.query_start_loc[r + 1] - plan.query_start_loc[r];
    const int start = plan.seq_lens[r] - count;
    const int64_t rows = int64_t(count) * group;
    for (int64_t row = (rows - 1) / ROWS * ROWS; rows > 0 && row >= 0; row -= ROWS) {  // the longest context first
      const int n = int(std::min<int64_t>(ROWS, rows - row));
      const int end = start + int((row + n - 1) / group) + 1;
      const int begin = shape.window ? std::max(0, start + int(row / group) - shape.window + 1) : 0;
      tiles.push_back({r, int(row), n, begin / PARTITION, (end - 1) / PARTITION + 1, int64_t(n) * (end - begin)});
      total += tiles.back().cost * shape.num_kv_heads;
    }
  }
  return tiles;
}

}  // namespace

PagedAttention::PagedAttention(ThreadTeam& team, const Shape& shape, std::byte* arena)
    : team_(team), shape_(shape), arena_(arena), kernels_(*kernels().attention) {}

void PagedAttention::plan(Plan& plan, int num_requests) const {
  for (int r = 0; r < num_requests; ++r) {
    const int first = plan.query_start_loc[r], count = plan.query_start_loc[r + 1] - first, start = plan.seq_lens[r] - count;
    for (int done = 0; done < count;) {
      const int position = start + done, n = std::min(SPAN - position % SPAN, count - done);
      const int64_t entry = plan.block_table[r * plan.block_table_stride + position / shape_.block_size];
      plan.writes.push_back({first + done, n, position % shape_.block_size, entry * 256});
      done += n;
    }
  }
  plan.write_work = plan.query_start_loc[num_requests] * int64_t(shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim;
  int64_t total = 0;
  const std::vector<Tile> tiles = cut_tiles(shape_, plan, num_requests, total);
  plan.run_work = total * (shape_.head_dim + shape_.v_head_dim);
  const int64_t target = std::max<int64_t>(1, total / (ITEMS_PER_THREAD * team_.num_threads()));
  int64_t units = 0;  // what could be dealt at most, per kv head
  for (const Tile& tile : tiles) units += tile.last_partition - tile.first_partition;
  // As many kv heads as fit in an item, but not so many that a short step leaves a thread without work.
  const int64_t groups = std::max<int64_t>(1, 2 * team_.num_threads() / std::max<int64_t>(1, units));
  const int most = int((shape_.num_kv_heads + groups - 1) / groups);
  // Tiles of one request that fill an item each walk the same K and V: those of one head follow one another.
  for (int head = 0; head < shape_.num_kv_heads; ++head) {
    for (const Tile& tile : tiles) {
      const int heads = std::clamp(ROWS / tile.num_rows, 1, most);
      if (head % heads) continue;
      const int taken = std::min(heads, shape_.num_kv_heads - head), parts = tile.last_partition - tile.first_partition;
      const int pieces = team_.num_threads() == 1 ? 1 : int(std::min<int64_t>(parts, (tile.cost * taken + target - 1) / target));
      for (int i = 0; i < pieces; ++i)
        plan.items.push_back({tile.request, head, taken, tile.first_row, tile.num_rows, tile.first_partition + parts * i / pieces,
                              tile.first_partition + parts * (i + 1) / pieces, pieces > 1 ? int(plan.merges.size()) : -1});
      if (pieces == 1) continue;
      plan.merges.push_back({pieces, tile.first_partition, parts, plan.workspace_floats});
      plan.workspace_floats += int64_t(parts) * plan.items.back().rows() * partial_floats(shape_);
    }
  }
  for (const Merge& merge : plan.merges) plan.pending.push_back(merge.items);
}

void PagedAttention::write(Plan& plan, int64_t layer_offset, float* qkv, int64_t stride, const int32_t* positions, const float* cos_sin,
                           const float* q_norm, const float* k_norm, const float* scales) const {
  const WriteCall call{&shape_, arena_ + layer_offset, qkv, stride, positions, cos_sin, q_norm, k_norm, scales};
  const auto kernel = (shape_.latent ? kernels_.write_latent : kernels_.write)[int(shape_.format)];
  const size_t bytes = kernels_.scratch_bytes(shape_);
  deal(team_, plan.writes.size(), plan.write_work, [&](int64_t i, int thread) { kernel(call, plan.writes[i], team_.local(thread, bytes)); });
}

void PagedAttention::run(Plan& plan, int64_t layer_offset, const float* q, int64_t q_stride, float* out, int64_t out_stride,
                         const float* scales, const float* phi) {
  float* workspace = plan.workspace_floats ? reinterpret_cast<float*>(team_.shared(plan.workspace_floats * sizeof(float))) : nullptr;
  const RunCall call{&shape_, arena_ + layer_offset, q, q_stride, out, out_stride, &plan, workspace, scales, phi};
  const auto kernel = (shape_.latent ? kernels_.run_latent : kernels_.run)[int(shape_.format)];
  const size_t bytes = kernels_.scratch_bytes(shape_);
  deal(team_, plan.items.size(), plan.run_work, [&](int64_t i, int thread) {
    const Item& item = plan.items[i];
    std::byte* scratch = team_.local(thread, bytes);
    RowMask left = kernel(call, item, ~RowMask(0), scratch);
    Item whole = item;
    if (item.merge >= 0) {
      std::atomic_ref<int> pending(plan.pending[item.merge]);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      const Merge& merge = plan.merges[item.merge];
      pending.store(merge.items, std::memory_order_relaxed);  // ready for the next layer
      left = kernels_.merge(call, item, merge, scratch);
      whole.merge = -1, whole.first_partition = merge.first_partition, whole.last_partition = merge.first_partition + merge.num_partitions;
    }
    if (left == 0) return;
    RunCall safe = call;
    safe.phi = nullptr;
    kernel(safe, whole, left, scratch);
    recomputed_.fetch_add(std::popcount(left), std::memory_order_relaxed);
  });
}

}  // namespace apportion::attention
