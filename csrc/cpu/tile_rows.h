// Rows rounded to bf16, as matrix tiles read them: blocks of 16 rows, [C / 32][rows of the block][32], so that each tile is contiguous.
#pragma once
#include "panel.h"

#if defined(__AVX512BF16__)
namespace apportion::APPORTION_ISA {

constexpr int TILE_ROWS = 16;
constexpr int TILE_K = 32;  // channels of a tile

// Where block b of the rows starts in the tile copy: every block but the last is full.
APPORTION_INLINE const uint16_t* tile_block(const uint16_t* tiles, int64_t C, int64_t block) { return tiles + block * TILE_ROWS * padded(C); }

// 32 floats to bf16 (to nearest even; subnormals become zero, as the products treat them).
APPORTION_INLINE void store_tile_row(uint16_t* out, V low, V high) { _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }

}  // namespace apportion::APPORTION_ISA
#endif
