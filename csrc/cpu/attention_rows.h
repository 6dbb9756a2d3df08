// The walk of a tile over its context: softmax with a running maximum per partition (Dao et al., FlashAttention-2, algorithm 1),
// partitions merged in order. Shared by all methods and formats; a method supplies the two products.
#pragma once
#include <algorithm>

#include "attention.h"
#include "simd.h"

namespace apportion::APPORTION_ISA {

using namespace attention;

constexpr int AHEAD = 2;  // heads of a chunk between fetching and use
constexpr float LOWEST = -1e30f;  // a maximum before any token; finite, so that LOWEST - LOWEST is 0
constexpr float LOG2E = 1.44269504f;

// 2^x for x <= 126: 1 at 0 exactly, 0 below -126, NaN for NaN. Cephes exp2f.
APPORTION_INLINE V exp2(V x) {
  const V low = set1(-126.f), clamped = max(low, x);  // the second operand wins where x is NaN
  const V magic = set1(12582912.f);                   // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const V n = (clamped + magic) - magic, f = clamped - n;
  V p = set1(1.535336188319500e-4f);
  p = fma(p, f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  p = fma(p, f, set1(1.f));
  return select_less(x, low, zero(), scale_pow2(p, n));
}

APPORTION_INLINE float exp2(float x) {
  float lanes[WIDTH];
  store(lanes, exp2(set1(x)));
  return lanes[0];
}

// Into L2: there is room for all that is on the way.
APPORTION_INLINE void fetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// Up to CHUNK tokens from absolute position `first`, in units of SUB; where each unit's K and V stand.
struct Chunk {
  int first, subs;
  const uint32_t* k[CHUNK / SUB];
  const uint32_t* v[CHUNK / SUB];
};

// The rows of one item and their state within the present partition.
struct Tile {
  const Shape* shape;
  int rows, rows_per_head, q_stride, acc_stride;
  int low[ROWS], high[ROWS];  // row r sees tokens [low, high)
  int begin, end;             // what any row sees
  bool unified[ROWS];
  float phi[ROWS];            // where a partition's maximum starts, and stays if unified
  float highest[ROWS];        // running maximum of the scores, unscaled
  float* q;                   // [ROWS][q_stride], padded with zeros
  float* scores;              // [ROWS][CHUNK], then probabilities in the same place
  float* acc;                 // [ROWS][acc_stride]: the sums of p * v
  float* sums;                // [ROWS][WIDTH]: sums of p by lane
  float* total;               // [ROWS][partial_floats]: partitions merged so far
  std::byte* method;          // the method's own scratch
};

inline size_t tile_bytes(const Shape& shape) {
  const size_t row = padded(shape.head_dim) + CHUNK + padded(shape.v_head_dim) + WIDTH + partial_floats(shape);
  const size_t method = ROWS * (padded(shape.head_dim) + CHUNK) * sizeof(uint16_t);
  return std::max<size_t>(ROWS * row * sizeof(float) + method, 2 * padded(shape.head_dim) * sizeof(float) + 256);
}

APPORTION_INLINE void load_tile(Tile& tile, const RunCall& call, const Item& item, std::byte* scratch) {
  const Shape& shape = *call.shape;
  const int group = shape.group(), first = call.plan->query_start_loc[item.request];
  const int start = call.plan->seq_lens[item.request] - (call.plan->query_start_loc[item.request + 1] - first);
  tile.shape = &shape;
  tile.rows = item.rows();
  tile.rows_per_head = item.num_rows;
  tile.q_stride = padded(shape.head_dim);
  tile.acc_stride = padded(shape.v_head_dim);
  tile.q = reinterpret_cast<float*>(scratch);
  tile.scores = tile.q + ROWS * tile.q_stride;
  tile.acc = tile.scores + ROWS * CHUNK;
  tile.sums = tile.acc + ROWS * tile.acc_stride;
  tile.total = tile.sums + ROWS * WIDTH;
  tile.method = reinterpret_cast<std::byte*>(tile.total + ROWS * partial_floats(shape));
  for (int r = 0; r < tile.rows; ++r) {
    const int row = item.first_row + r % item.num_rows, head = (item.kv_head + r / item.num_rows) * group + row % group;
    const float* q = call.q + (first + row / group) * call.q_stride + head * shape.head_dim;
    const float factor = shape.unit() * (call.scales ? call.scales[item.kv_head + r / item.num_rows] : 1.f);
    for (int c = 0; c < shape.head_dim; ++c) tile.q[r * tile.q_stride + c] = q[c] * factor;
    std::memset(tile.q + r * tile.q_stride + shape.head_dim, 0, (tile.q_stride - shape.head_dim) * sizeof(float));
    const float phi = call.phi == nullptr ? NAN : call.phi[head];
    tile.unified[r] = phi == phi;
    tile.phi[r] = tile.unified[r] ? phi : LOWEST;
    tile.high[r] = start + row / group + 1;
    tile.low[r] = shape.window ? std::max(0, tile.high[r] - shape.window) : 0;
  }
  tile.begin = tile.low[0];
  tile.end = tile.high[item.num_rows - 1];
}

APPORTION_INLINE void find_chunk(Chunk& chunk, const RunCall& call, const Item& item, int lanes, int begin, int end) {
  const Shape& shape = *call.shape;
  const int32_t* table = call.plan->block_table + item.request * call.plan->block_table_stride;
  const std::byte* k = call.layer + item.kv_head * shape.k_head_bytes();
  const std::byte* v = call.layer + shape.v_offset() + item.kv_head * shape.v_head_bytes();
  chunk.first = begin;
  chunk.subs = 0;
  for (int token = begin; token < end; token += SUB, ++chunk.subs) {
    const int64_t block = int64_t(table[token / shape.block_size]) * 256;
    const int slot = token % shape.block_size;
    chunk.k[chunk.subs] = reinterpret_cast<const uint32_t*>(k + block) + slot;
    chunk.v[chunk.subs] = reinterpret_cast<const uint32_t*>(v + block) + int64_t(slot) / lanes * shape.v_width();
  }
  for (int s = chunk.subs; s < CHUNK / SUB; ++s) chunk.k[s] = chunk.k[0], chunk.v[s] = chunk.v[0];  // who fetches ahead looks at all
}

APPORTION_INLINE Chunk move(const Chunk& chunk, int64_t k_dwords, int64_t v_dwords) {
  Chunk moved{chunk.first, chunk.subs, {}, {}};
  for (int s = 0; s < CHUNK / SUB; ++s) moved.k[s] = chunk.k[s] + k_dwords, moved.v[s] = chunk.v[s] + v_dwords;
  return moved;
}

// One row's scores -> probabilities under its unified maximum: neither sums nor accumulators change their scale. What is far too high is
// held at a power that is still a number, and shows in the sum.
template <typename Method, bool MASKED>
APPORTION_INLINE void unify(Tile& tile, const Chunk& chunk, int r, V lane, float scale) {
  const int vectors = chunk.subs * (SUB / WIDTH);
  const float* scores = tile.scores + r * CHUNK;
  const V low = set1(float(tile.low[r] - chunk.first) - 0.5f), high = set1(float(tile.high[r] - chunk.first)), hidden = set1(-INFINITY);
  const V shift = set1(tile.phi[r] * scale), factor = set1(scale), most = set1(126.f);
  V sum = load(tile.sums + r * WIDTH);
  for (int v = 0; v < vectors; ++v) {
    V power = load(scores + v * WIDTH) * factor - shift;
    power = select_less(most, power, most, power);
    if constexpr (MASKED) {
      const V token = lane + set1(float(v * WIDTH));
      power = select_less(token, high, select_less(low, token, power, hidden), hidden);
    }
    const V p = exp2(power);
    sum = sum + p;
    Method::put(tile, r, v, p);
  }
  store(tile.sums + r * WIDTH, sum);
}

// Scores -> probabilities, the row's maximum, sums and accumulators kept in step. MASKED: some row does not see all of the chunk.
template <typename Method, bool MASKED>
APPORTION_INLINE void soften(Tile& tile, const Chunk& chunk) {
  const int vectors = chunk.subs * (SUB / WIDTH);
  const float scale = tile.shape->scale * LOG2E;
  float index[WIDTH];
  for (int i = 0; i < WIDTH; ++i) index[i] = float(i);
  const V lane = load(index);
  for (int r = 0; r < tile.rows; ++r) {
    float* scores = tile.scores + r * CHUNK;
    if (tile.unified[r]) {
      unify<Method, MASKED>(tile, chunk, r, lane, scale);
      continue;
    }
    V top = set1(LOWEST);
    if constexpr (MASKED) {
      const V low = set1(float(tile.low[r] - chunk.first) - 0.5f), high = set1(float(tile.high[r] - chunk.first));
      for (int v = 0; v < vectors; ++v) {
        const V token = lane + set1(float(v * WIDTH)), hidden = set1(-INFINITY);
        const V score = select_less(token, high, select_less(low, token, load(scores + v * WIDTH), hidden), hidden);
        store(scores + v * WIDTH, score);
        top = max(top, score);
      }
    } else {
      for (int v = 0; v < vectors; ++v) top = max(top, load(scores + v * WIDTH));
    }
    const float highest = reduce_max(top);
    V sum = load(tile.sums + r * WIDTH);
    if (highest > tile.highest[r]) {
      const V shrink = exp2(set1((tile.highest[r] - highest) * scale));
      tile.highest[r] = highest;
      sum = sum * shrink;
      float* acc = tile.acc + r * tile.acc_stride;
      for (int c = 0; c < tile.acc_stride; c += WIDTH) store(acc + c, load(acc + c) * shrink);
    }
    const V shift = set1(tile.highest[r] * scale), factor = set1(scale);
    for (int v = 0; v < vectors; ++v) {
      const V p = exp2(load(scores + v * WIDTH) * factor - shift);
      sum = sum + p;
      Method::put(tile, r, v, p);
    }
    store(tile.sums + r * WIDTH, sum);
  }
}

template <typename Method>
APPORTION_INLINE void walk_partition(Tile& tile, const RunCall& call, const Item& item, int begin, int end) {
  std::copy(tile.phi, tile.phi + tile.rows, tile.highest);
  std::memset(tile.acc, 0, sizeof(float) * tile.rows * tile.acc_stride);
  std::memset(tile.sums, 0, sizeof(float) * tile.rows * WIDTH);
  const int all_low = tile.low[item.num_rows - 1], all_high = tile.high[0];  // every row sees [all_low, all_high)
  Chunk chunks[PARTITION / CHUNK];
  int count = 0;
  for (int from = begin, to; from < end; from = to) {
    to = std::min(from / CHUNK * CHUNK + CHUNK, (end + Method::UNIT - 1) / Method::UNIT * Method::UNIT);
    find_chunk(chunks[count++], call, item, Method::LANES, from, to);
  }
  // The chunk of head h, and what is read AHEAD heads later: fetched meanwhile.
  const int64_t k_head = call.shape->k_head_bytes() / 4, v_head = call.shape->v_head_bytes() / 4;
  const auto at = [&](int i, int h) {
    i = std::min(i + h / item.num_heads, count - 1);
    return move(chunks[i], h % item.num_heads * k_head, h % item.num_heads * v_head);
  };
  for (int i = 0; i < count; ++i) {
    const Chunk& chunk = chunks[i];
    for (int h = 0; h < item.num_heads; ++h) Method::score(tile, h * item.num_rows, item.num_rows, at(i, h), at(i, h + AHEAD));
    if (chunk.first >= all_low && chunk.first + chunk.subs * SUB <= all_high) soften<Method, false>(tile, chunk);
    else soften<Method, true>(tile, chunk);
    for (int h = 0; h < item.num_heads; ++h) Method::mix(tile, h * item.num_rows, item.num_rows, at(i, h), at(i, h + AHEAD));
  }
}

// total <- total merged with a partition's (acc, highest, sum). A partition that the row does not see changes nothing.
APPORTION_INLINE void merge_row(float* total, const float* acc, float highest, float sum, int width, float scale, bool first) {
  float *top = total + padded(width), *norm = top + 1;
  if (first) *top = LOWEST, *norm = 0.f;
  const float both = *top > highest ? *top : highest;
  const float keep = exp2((*top - both) * scale), take = exp2((highest - both) * scale);
  *norm = *norm * keep + sum * take;
  *top = both;
  for (int c = 0; c < padded(width); c += WIDTH) {
    const V old = first ? zero() : load(total + c);
    store(total + c, fma(load(acc + c), set1(take), old * set1(keep)));
  }
}

// The softmax of a row under a unified maximum lost nothing. A NaN is one either way.
APPORTION_INLINE bool in_range(const RunCall& call, const Item& item, int r, float sum) {
  if (call.phi == nullptr) return true;
  const int group = call.shape->group(), head = (item.kv_head + r / item.num_rows) * group + (item.first_row + r % item.num_rows) % group;
  return call.phi[head] != call.phi[head] || !(sum < std::ldexp(1.f, -RANGE) || sum > std::ldexp(1.f, RANGE));
}

APPORTION_INLINE void write_row(const RunCall& call, const Item& item, int r, const float* total) {
  const Shape& shape = *call.shape;
  const int group = shape.group(), row = item.first_row + r % item.num_rows, width = shape.v_head_dim;
  const int head = (item.kv_head + r / item.num_rows) * group + row % group;
  const int64_t token = call.plan->query_start_loc[item.request] + row / group;
  float* out = call.out + token * call.out_stride + head * int64_t(width);
  const V norm = set1(total[padded(width) + 1]);
  const V factor = set1(shape.unit() * (call.scales ? call.scales[shape.num_kv_heads + item.kv_head + r / item.num_rows] : 1.f));
  for (int c = 0; c < width; c += WIDTH) store_n(out + c, load(total + c) / norm * factor, width - c);
}

template <typename Method>
RowMask run_tile(const RunCall& call, const Item& item, RowMask rows, std::byte* scratch) {
  Tile tile;
  load_tile(tile, call, item, scratch);
  Method::prepare(tile);
  const Shape& shape = *call.shape;
  const int size = partial_floats(shape), width = shape.v_head_dim;
  const Merge* merge = item.merge < 0 ? nullptr : &call.plan->merges[item.merge];
  for (int part = item.first_partition; part < item.last_partition; ++part) {
    walk_partition<Method>(tile, call, item, std::max(part * PARTITION, tile.begin / Method::UNIT * Method::UNIT), std::min((part + 1) * PARTITION, tile.end));
    for (int r = 0; r < tile.rows; ++r) {
      const float *acc = tile.acc + r * tile.acc_stride, sum = reduce_add(load(tile.sums + r * WIDTH));
      if (merge == nullptr) {
        merge_row(tile.total + r * size, acc, tile.highest[r], sum, width, shape.scale * LOG2E, part == item.first_partition);
        continue;
      }
      float* partial = call.workspace + merge->partials + (int64_t(part - merge->first_partition) * tile.rows + r) * size;
      std::memcpy(partial, acc, sizeof(float) * padded(width));
      partial[padded(width)] = tile.highest[r];
      partial[padded(width) + 1] = sum;
    }
  }
  Method::finish();
  RowMask left = 0;
  for (int r = 0; r < tile.rows && merge == nullptr; ++r) {
    if (!(rows >> r & 1)) continue;
    if (in_range(call, item, r, tile.total[r * size + padded(width) + 1])) write_row(call, item, r, tile.total + r * size);
    else left |= RowMask(1) << r;
  }
  return left;
}

inline RowMask merge_partitions(const RunCall& call, const Item& item, const Merge& merge, std::byte* scratch) {
  const Shape& shape = *call.shape;
  const int size = partial_floats(shape), width = padded(shape.v_head_dim);
  float* total = reinterpret_cast<float*>(scratch);
  RowMask left = 0;
  for (int r = 0; r < item.rows(); ++r) {
    for (int part = 0; part < merge.num_partitions; ++part) {
      const float* partial = call.workspace + merge.partials + (int64_t(part) * item.rows() + r) * size;
      merge_row(total, partial, partial[width], partial[width + 1], shape.v_head_dim, shape.scale * LOG2E, part == 0);
    }
    if (in_range(call, item, r, total[width + 1])) write_row(call, item, r, total);
    else left |= RowMask(1) << r;
  }
  return left;
}

}  // namespace apportion::APPORTION_ISA
