// Attention in float32 arithmetic, for every KV format: compiled once per instruction set.
//
// The dword layout needs no horizontal sums: scores of WIDTH tokens accumulate down the channel rows of K with q broadcast,
// outputs accumulate down the token rows of V with p broadcast.
#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "attention_formats.h"
#include "attention_rows.h"
#include "attention_tiles.h"
#include "kernel_table.h"
#include "rope.h"

namespace apportion::APPORTION_ISA {

using namespace attention;

namespace {

// Rows of a register block. Its size changes no result: every row has its own sums, in one order.
#if defined(__AVX512F__)
constexpr int BLOCK = 8;
constexpr int wide(int rows) { return rows <= 4 ? 4 : 2; }  // vectors that a block of `rows` rows goes over at once
#else
constexpr int BLOCK = 4;
constexpr int wide(int rows) { return rows <= 2 ? 4 : 2; }
#endif

constexpr int SUB_VECTORS = SUB / WIDTH;

// scores[r][v * WIDTH ..] = q . K of M rows over N vectors of tokens; k[v] points at the first dword row of vector v. What the next chunk
// will read from `next` is fetched on the way: one line for each that is used.
template <typename F, int M, int N, bool FETCH>
APPORTION_INLINE void score_block(const float* q, int q_stride, const uint32_t* const* k, const uint32_t* const* next, int64_t k_stride,
                                  int rows, float* scores) {
  V sum[M][N];
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < N; ++v) sum[r][v] = zero();
  for (int row = 0; row < rows; ++row) {
    V key[N][F::OPERANDS];
    for (int v = 0; v < N; ++v) {
      F::unpack(k[v] + row * k_stride, key[v]);
      if constexpr (FETCH) fetch_line(next[v] + row * k_stride);
    }
    for (int j = 0; j < F::OPERANDS; ++j)
      for (int r = 0; r < M; ++r) {
        const V x = set1(q[r * q_stride + row * F::OPERANDS + j]);
        for (int v = 0; v < N; ++v) sum[r][v] = F::add_product(x, key[v][j], sum[r][v]);
      }
  }
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < N; ++v) store(scores + r * CHUNK + v * WIDTH, sum[r][v]);
}

template <typename F, int M, bool FETCH>
APPORTION_INLINE void score_rows(const float* q, int q_stride, const Chunk& chunk, const Chunk& next, int64_t k_stride, int rows, float* scores) {
  constexpr int N = wide(M);
  const uint32_t *k[CHUNK / WIDTH], *ahead[CHUNK / WIDTH];
  const int vectors = chunk.subs * SUB_VECTORS;
  for (int v = 0; v < vectors; ++v) {
    k[v] = chunk.k[v / SUB_VECTORS] + v % SUB_VECTORS * WIDTH;
    ahead[v] = next.k[v / SUB_VECTORS] + v % SUB_VECTORS * WIDTH;
  }
  int v = 0;
  for (; v + N <= vectors; v += N) score_block<F, M, N, FETCH>(q, q_stride, k + v, ahead + v, k_stride, rows, scores + v * WIDTH);
  for (; v < vectors; ++v) score_block<F, M, 1, FETCH>(q, q_stride, k + v, ahead + v, k_stride, rows, scores + v * WIDTH);
}

// acc[r][0 .. N * WIDTH) += p[r] . V over the tokens of a chunk. TAIL: the one vector holds `n` channels.
template <typename F, int M, int N, bool FETCH, bool TAIL>
APPORTION_INLINE void mix_block(const float* p, const Chunk& chunk, const Chunk& next, int channel, int n, int width, float* acc, int acc_stride) {
  constexpr int SHARE = F::LANES / F::OPERANDS;  // probabilities that one operand takes
  V sum[M][N];
  for (int r = 0; r < M; ++r)
    for (int c = 0; c < N; ++c) sum[r][c] = load(acc + r * acc_stride + c * WIDTH);
  for (int s = 0; s < chunk.subs; ++s) {
    const uint32_t *v = chunk.v[s] + channel, *ahead = next.v[s] + channel;
    for (int row = 0; row < SUB / F::LANES; ++row, v += width, ahead += width) {
      V value[N][F::OPERANDS];
      if constexpr (TAIL) unpack_n<F>(v, n, value[0]);
      else
        for (int c = 0; c < N; ++c) F::unpack(v + c * WIDTH, value[c]);
      if constexpr (FETCH)
        for (int c = 0; c < N; ++c) fetch_line(ahead + c * WIDTH);
      for (int j = 0; j < F::OPERANDS; ++j)
        for (int r = 0; r < M; ++r) {
          const V x = set1(p[(r * CHUNK + s * SUB) / SHARE + row * F::OPERANDS + j]);
          for (int c = 0; c < N; ++c) sum[r][c] = F::add_product(x, value[c][j], sum[r][c]);
        }
    }
  }
  for (int r = 0; r < M; ++r)
    for (int c = 0; c < N; ++c) store(acc + r * acc_stride + c * WIDTH, sum[r][c]);
}

template <typename F, int M, bool FETCH>
APPORTION_INLINE void mix_rows(const float* p, const Chunk& chunk, const Chunk& next, int channels, int width, float* acc, int acc_stride) {
  constexpr int N = wide(M);
  int c = 0;
  for (; c + N * WIDTH <= channels; c += N * WIDTH) mix_block<F, M, N, FETCH, false>(p, chunk, next, c, 0, width, acc + c, acc_stride);
  for (; c + WIDTH <= channels; c += WIDTH) mix_block<F, M, 1, FETCH, false>(p, chunk, next, c, 0, width, acc + c, acc_stride);
  if (c < channels) mix_block<F, M, 1, FETCH, true>(p, chunk, next, c, channels - c, width, acc + c, acc_stride);
}

// Scores of a latent chunk: the latent has the V layout, so lanes run over channels and the sum of a (row, token) is folded at the end.
template <typename F, int M>
APPORTION_INLINE void score_latent(const float* q, int q_stride, const Chunk& chunk, int channels, float* scores) {
  constexpr int T = 4 / F::LANES;  // token rows at once: 4 tokens
  for (int s = 0; s < chunk.subs; ++s)
    for (int row = 0; row < SUB / F::LANES; row += T) {
      const uint32_t* k = chunk.v[s] + int64_t(row) * channels;
      V sum[M][4];
      for (int r = 0; r < M; ++r)
        for (int t = 0; t < 4; ++t) sum[r][t] = zero();
      for (int c = 0; c < channels; c += WIDTH) {
        V key[4], x[M];
        for (int t = 0; t < T; ++t) {
          if (c + WIDTH <= channels) F::unpack(k + t * channels + c, key + t * F::LANES);
          else unpack_n<F>(k + t * channels + c, channels - c, key + t * F::LANES);
        }
        for (int r = 0; r < M; ++r) x[r] = load(q + r * q_stride + c);  // q rows are padded with zeros
        for (int r = 0; r < M; ++r)
          for (int t = 0; t < 4; ++t) sum[r][t] = fma(x[r], key[t], sum[r][t]);
      }
      for (int r = 0; r < M; ++r)
        for (int t = 0; t < 4; ++t) scores[r * CHUNK + s * SUB + row * F::LANES + t] = reduce_add(sum[r][t]);
    }
}

// f<M, FETCH>(first row) over the rows of a tile, in blocks of BLOCK and a last smaller one; the first fetches ahead (and the last,
// which is the only one where rows are few: elsewhere its lines are there already, and a second copy of it would be compiled).
template <int M = BLOCK - 1, typename Function>
APPORTION_INLINE void last_block(int row, int rows, const Function& f) {
  if (rows - row == M) f.template operator()<M, true>(row);
  else if constexpr (M > 1) last_block<M - 1>(row, rows, f);
}

template <typename Function>
APPORTION_INLINE void in_blocks(int rows, const Function& f) {
  if (rows < BLOCK) return last_block(0, rows, f);
  f.template operator()<BLOCK, true>(0);
  int row = BLOCK;
  for (; row + BLOCK <= rows; row += BLOCK) f.template operator()<BLOCK, false>(row);
  if (row < rows) last_block(row, rows, f);
}

// acc += probabilities . V for rows of a tile, in float32: one function for a latent and for K with V.
template <typename F>
void mix_vectors(const Tile& tile, const float* p, int first, int rows, const Chunk& chunk, const Chunk& next) {
  const Shape& shape = *tile.shape;
  in_blocks(rows, [&]<int M, bool FETCH>(int row) {
    row += first;
    mix_rows<F, M, FETCH>(p + row * (CHUNK * F::OPERANDS / F::LANES), chunk, next, shape.v_head_dim, shape.v_width(), tile.acc + row * tile.acc_stride,
                          tile.acc_stride);
  });
}

// The float32 arithmetic of a tile: what run_tile (attention_rows.h) asks of a method.
template <typename F, bool LATENT>
struct VectorProducts {
  static constexpr int LANES = F::LANES;
  static constexpr int UNIT = SUB;

  static void prepare(Tile&) {}
  static void finish() {}
  APPORTION_INLINE void put(Tile& tile, int row, int vector, V p) { store(tile.scores + row * CHUNK + vector * WIDTH, p); }

  static void score(const Tile& tile, int first, int rows, const Chunk& chunk, const Chunk& next) {
    const Shape& shape = *tile.shape;
    in_blocks(rows, [&]<int M, bool FETCH>(int row) {
      row += first;
      const float* q = tile.q + row * tile.q_stride;
      float* scores = tile.scores + row * CHUNK;
      if constexpr (LATENT) score_latent<F, M>(q, tile.q_stride, chunk, shape.head_dim, scores);
      else score_rows<F, M, FETCH>(q, tile.q_stride, chunk, next, shape.block_size, shape.head_dim / F::LANES, scores);
    });
  }

  static void mix(const Tile& tile, int first, int rows, const Chunk& chunk, const Chunk& next) {
    mix_vectors<F>(tile, tile.scores, first, rows, chunk, next);
  }
};

#if defined(__AVX512BF16__)
// For a bfloat16 cache: q and p are rounded to bfloat16 and multiplied in pairs, sums are float32.
struct PairProducts {
  static constexpr int LANES = 2;
  static constexpr int UNIT = SUB;

  static int q_stride(const Tile& tile) { return tile.q_stride / 2; }  // pairs
  static float* q(const Tile& tile) { return reinterpret_cast<float*>(tile.method); }
  static float* p(const Tile& tile) { return q(tile) + ROWS * q_stride(tile); }

  APPORTION_INLINE void store_rounded(float* to, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(_mm512_cvtneps_pbh(a))); }

  static void prepare(Tile& tile) {
    for (int i = 0; i < tile.rows * tile.q_stride; i += WIDTH) store_rounded(q(tile) + i / 2, load(tile.q + i));
  }
  static void finish() {}
  APPORTION_INLINE void put(Tile& tile, int row, int vector, V a) { store_rounded(p(tile) + (row * CHUNK + vector * WIDTH) / 2, a); }

  static void score(const Tile& tile, int first, int rows, const Chunk& chunk, const Chunk& next) {
    in_blocks(rows, [&]<int M, bool FETCH>(int row) {
      row += first;
      score_rows<Bf16Pairs, M, FETCH>(q(tile) + row * q_stride(tile), q_stride(tile), chunk, next, tile.shape->block_size,
                                      tile.shape->head_dim / LANES, tile.scores + row * CHUNK);
    });
  }

  static void mix(const Tile& tile, int first, int rows, const Chunk& chunk, const Chunk& next) {
    mix_vectors<Bf16Pairs>(tile, p(tile), first, rows, chunk, next);
  }
};
#endif

template <typename F>
void clear_span(uint32_t* v, int width) {
  std::memset(v, 0, size_t(SPAN) / F::LANES * width * 4);
}

// Numbers x[n] into lane `lane` of the dwords at `row`, the others kept.
template <typename F>
void put_lane(uint32_t* row, const uint32_t* codes, int n, int lane) {
  constexpr int BITS = 32 / F::LANES;
  const uint32_t keep = F::LANES == 1 ? 0 : ~(((uint64_t(1) << BITS) - 1) << (lane * BITS));
  for (int c = 0; c < n; ++c) row[c] = (row[c] & keep) | codes[c] << (lane * BITS);
}

APPORTION_INLINE void divide(float* to, const float* x, int n, float scale) {
  for (int i = 0; i < n; ++i) to[i] = x[i] / scale;
}

// x [n] -> codes; x and codes are padded to WIDTH.
template <typename F>
APPORTION_INLINE void encode(const float* x, uint32_t* codes, int n) {
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) F::encode(x + i, codes + i);
  if (i < n) {
    float last[WIDTH];
    store(last, load_n(x + i, n - i));
    F::encode(last, codes + i);
  }
}

template <typename F>
void store_values(const Shape& shape, std::byte* block, const float* x, int head, int slot, uint32_t* codes) {
  uint32_t* v = reinterpret_cast<uint32_t*>(block + shape.v_offset() + head * shape.v_head_bytes());
  const int width = shape.v_width();
  encode<F>(x, codes, width);
  v += int64_t(slot) / F::LANES * width;
  if (slot % SPAN == 0) clear_span<F>(v, width);
  put_lane<F>(v, codes, width, slot % F::LANES);
}

template <typename F>
void write(const WriteCall& call, const WriteItem& item, std::byte* scratch) {
  const Shape& s = *call.shape;
  float* key = reinterpret_cast<float*>(scratch);
  uint32_t* codes = reinterpret_cast<uint32_t*>(key + padded(s.head_dim));
  std::byte* block = call.layer + item.block_bytes;
  for (int i = 0; i < item.count; ++i) {
    float* q = call.qkv + (item.row + i) * call.stride;
    const float *k = q + s.num_heads * s.head_dim, *v = k + s.num_kv_heads * s.head_dim;
    const float* cs = call.cos_sin + int64_t(call.positions[item.row + i]) * s.rotary_dim;
    const int slot = item.slot + i;
    for (int h = 0; h < s.num_heads; ++h) {
      if (call.q_norm) normalize_head(q + h * s.head_dim, call.q_norm, s.head_dim, s.qk_norm_eps);
      rotate_head(q + h * s.head_dim, cs, s.rotary_dim, s.interleaved);
    }
    for (int h = 0; h < s.num_kv_heads; ++h) {
      std::memcpy(key, k + h * s.head_dim, s.head_dim * sizeof(float));
      if (call.k_norm) normalize_head(key, call.k_norm, s.head_dim, s.qk_norm_eps);
      rotate_head(key, cs, s.rotary_dim, s.interleaved);
      if (call.scales) divide(key, key, s.head_dim, call.scales[h]);
      encode<F>(key, codes, s.head_dim);
      uint32_t* column = reinterpret_cast<uint32_t*>(block + h * s.k_head_bytes()) + slot;
      for (int d = 0; d < s.head_dim; d += F::LANES, column += s.block_size) {
        uint32_t dword = 0;
        for (int j = 0; j < F::LANES; ++j) dword |= codes[d + j] << (j * (32 / F::LANES));
        *column = dword;
      }
      const float* value = v + h * s.v_head_dim;
      if (call.scales) divide(key, value, s.v_head_dim, call.scales[s.num_kv_heads + h]), value = key;
      store_values<F>(s, block, value, h, slot, codes);
    }
  }
}

template <typename F>
void write_latent(const WriteCall& call, const WriteItem& item, std::byte* scratch) {
  const Shape& s = *call.shape;
  float* scaled = reinterpret_cast<float*>(scratch);
  uint32_t* codes = reinterpret_cast<uint32_t*>(scaled + padded(s.head_dim));
  for (int i = 0; i < item.count; ++i) {
    const float* latent = call.qkv + (item.row + i) * call.stride;
    if (call.scales) divide(scaled, latent, s.head_dim, call.scales[0]), latent = scaled;
    store_values<F>(s, call.layer + item.block_bytes, latent, 0, item.slot + i, codes);
  }
}

void rotate(float* x, int64_t row_stride, int64_t head_stride, int rows, int heads, int rotary_dim, const int32_t* positions,
            const float* cos_sin, bool interleaved) {
  for (int t = 0; t < rows; ++t)
    for (int h = 0; h < heads; ++h)
      rotate_head(x + t * row_stride + h * head_stride, cos_sin + int64_t(positions[t]) * rotary_dim, rotary_dim, interleaved);
}

template <typename F>
RowMask run(const RunCall& call, const Item& item, RowMask rows, std::byte* scratch) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<F, Bf16>)
    if (TileProducts::fits(*call.shape)) return run_tile<TileProducts>(call, item, rows, scratch);
#endif
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<F, Bf16>) return run_tile<PairProducts>(call, item, rows, scratch);
#endif
  return run_tile<VectorProducts<F, false>>(call, item, rows, scratch);
}
template <typename F>
RowMask run_latent(const RunCall& call, const Item& item, RowMask rows, std::byte* scratch) {
  return run_tile<VectorProducts<F, true>>(call, item, rows, scratch);
}

size_t scratch_bytes(const Shape& shape) { return tile_bytes(shape); }

}  // namespace

extern const Kernels attention_kernels;
const Kernels attention_kernels = {
    .write = {write<Fp32>, write<Bf16>, write<Fp16>, write<E4m3>, write<E5m2>},
    .write_latent = {write_latent<Fp32>, write_latent<Bf16>, write_latent<Fp16>, write_latent<E4m3>, write_latent<E5m2>},
    .run = {run<Fp32>, run<Bf16>, run<Fp16>, run<E4m3>, run<E5m2>},
    .run_latent = {run_latent<Fp32>, run_latent<Bf16>, run_latent<Fp16>, run_latent<E4m3>, run_latent<E5m2>},
    .merge = merge_partitions,
    .rotate = rotate,
    .scratch_bytes = scratch_bytes,
};

}  // namespace apportion::APPORTION_ISA
