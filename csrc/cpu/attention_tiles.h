// The two products of attention on AMX matrix tiles, for a bfloat16 cache: q and p are rounded to bfloat16, sums are float32.
//
// A dword row of a 16-bit block is a row of a tile's B operand as it stands: 16 channel pairs by 16 tokens of K, 16 token pairs by
// 16 channels of V. A row of a tile has its own sums, so what stands beside it changes nothing.
#pragma once
#if defined(__AMX_BF16__)
#include "attention_rows.h"

namespace apportion::APPORTION_ISA {

struct TileProducts {
  static constexpr int LANES = 2;
  static constexpr int UNIT = 32;    // tokens of a V operand
  static constexpr int TILE = 16;    // rows, and columns, of a tile
  static constexpr int STEP = 32;    // channels of a K operand
  static_assert(CHUNK == 4 * TILE);

  static bool fits(const Shape& shape) { return shape.head_dim % STEP == 0 && shape.v_head_dim % TILE == 0; }

  static uint16_t* q(const Tile& tile) { return reinterpret_cast<uint16_t*>(tile.method); }
  static uint16_t* p(const Tile& tile) { return q(tile) + ROWS * tile.shape->head_dim; }

  // Tiles 0 to 3: sums, 4: q or p, each of `rows` rows; 6: K or V.
  static void configure(int rows) {
    struct alignas(64) Config {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 5; ++i) config.rows[i] = uint8_t(rows);
    config.rows[5] = config.rows[6] = config.rows[7] = TILE;
    _tile_loadconfig(&config);
  }

  static void prepare(Tile& tile) {
    const int channels = tile.shape->head_dim;
    for (int r = 0; r < tile.rows; ++r)
      for (int c = 0; c < channels; c += WIDTH) store_rounded(q(tile) + r * channels + c, load(tile.q + r * tile.q_stride + c));
    configure(std::min(TILE, tile.rows_per_head));
  }

  static void finish() { _tile_release(); }

  APPORTION_INLINE void store_rounded(uint16_t* to, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(_mm512_cvtneps_pbh(a)));
  }

  APPORTION_INLINE void put(Tile& tile, int row, int vector, V a) { store_rounded(p(tile) + row * CHUNK + vector * WIDTH, a); }

  // f(first row) in blocks of TILE rows; a last smaller block has its own configuration.
  template <typename Function>
  APPORTION_INLINE void in_blocks(int first, int rows, const Function& f) {
    int row = 0;
    for (; row + TILE <= rows; row += TILE) f(first + row, row == 0);
    if (row == rows) return;
    if (row > 0) configure(rows - row);
    f(first + row, row == 0);
    if (row > 0) configure(TILE);
  }

  static void score(const Tile& tile, int first, int rows, const Chunk& chunk, const Chunk& next) {
    const Shape& shape = *tile.shape;
    const int channels = shape.head_dim, stride = shape.block_size;
    in_blocks(first, rows, [&](int row, bool fetch) {
      const uint16_t* a = q(tile) + row * channels;
      float* to = tile.scores + row * CHUNK;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int c = 0; c < channels; c += STEP) {
        const int64_t at = int64_t(c) / 2 * stride;
        _tile_loadd(4, a + c, channels * 2);
        _tile_loadd(6, chunk.k[0] + at, stride * 4);
        _tile_loadd(7, chunk.k[1] + at, stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (chunk.subs > 2) {
          _tile_loadd(6, chunk.k[2] + at, stride * 4);
          _tile_loadd(7, chunk.k[3] + at, stride * 4);
          _tile_dpbf16ps(2, 4, 6);
          _tile_dpbf16ps(3, 4, 7);
        }
        if (fetch)
          for (int s = 0; s < chunk.subs; ++s)
            for (int i = 0; i < TILE; ++i) fetch_line(next.k[s] + at + i * stride);
      }
      _tile_stored(0, to, CHUNK * 4);
      _tile_stored(1, to + TILE, CHUNK * 4);
      if (chunk.subs > 2) {
        _tile_stored(2, to + 2 * TILE, CHUNK * 4);
        _tile_stored(3, to + 3 * TILE, CHUNK * 4);
      }
    });
  }

  // acc[0 .. N tiles) += p . V
  template <int N>
  APPORTION_INLINE void mix_tiles(const uint16_t* a, const Chunk& chunk, const Chunk& next, int channel, int width, float* acc, int stride,
                                  bool fetch) {
    _tile_loadd(0, acc, stride * 4);
    if constexpr (N > 1) _tile_loadd(1, acc + TILE, stride * 4);
    if constexpr (N > 2) _tile_loadd(2, acc + 2 * TILE, stride * 4);
    if constexpr (N > 3) _tile_loadd(3, acc + 3 * TILE, stride * 4);
    for (int s = 0; s < chunk.subs; s += 2) {
      const uint32_t* v = chunk.v[s] + channel;
      _tile_loadd(4, a + s * SUB, CHUNK * 2);
      _tile_loadd(6, v, width * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(7, v + TILE, width * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (N > 2) {
        _tile_loadd(6, v + 2 * TILE, width * 4);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (N > 3) {
        _tile_loadd(7, v + 3 * TILE, width * 4);
        _tile_dpbf16ps(3, 4, 7);
      }
      if (fetch)
        for (int i = 0; i < TILE; ++i)
          for (int n = 0; n < N; ++n) fetch_line(next.v[s] + channel + int64_t(i) * width + n * TILE);
    }
    _tile_stored(0, acc, stride * 4);
    if constexpr (N > 1) _tile_stored(1, acc + TILE, stride * 4);
    if constexpr (N > 2) _tile_stored(2, acc + 2 * TILE, stride * 4);
    if constexpr (N > 3) _tile_stored(3, acc + 3 * TILE, stride * 4);
  }

  static void mix(const Tile& tile, int first, int rows, const Chunk& chunk, const Chunk& next) {
    const int channels = tile.shape->v_head_dim, stride = tile.acc_stride;
    in_blocks(first, rows, [&](int row, bool fetch) {
      const uint16_t* a = p(tile) + row * CHUNK;
      float* acc = tile.acc + row * stride;
      int c = 0;
      for (; c + 4 * TILE <= channels; c += 4 * TILE) mix_tiles<4>(a, chunk, next, c, channels, acc + c, stride, fetch);
      if (c + 2 * TILE <= channels) mix_tiles<2>(a, chunk, next, c, channels, acc + c, stride, fetch), c += 2 * TILE;
      if (c < channels) mix_tiles<1>(a, chunk, next, c, channels, acc + c, stride, fetch);
    });
  }
};

}  // namespace apportion::APPORTION_ISA
#endif
