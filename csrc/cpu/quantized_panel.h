// One quantized panel times many rows (quantized_panel.cpp says how).
#pragma once
#include "rows.h"

namespace apportion::APPORTION_ISA {

constexpr int64_t CODE_BLOCK = 256;  // channels unpacked at a time: 16 KiB of bf16, kept in L1
constexpr int64_t CODE_ROWS = 512;   // whose sums over unfinished groups wait in L2

// Scratch of one thread: a block as bf16 and as float32, the sums of a few rows, those of many.
struct CodeScratch {
  alignas(64) uint16_t pairs[CODE_BLOCK * PANEL];
  alignas(64) float wide[TILES ? 16 : CODE_BLOCK * PANEL];
  alignas(64) float few[2 * ROW_BLOCK * PANEL];
  alignas(64) float many[CODE_ROWS * PANEL];
};

// y[rows, columns of panel p] = bias + rows w_p^T. `memory`: a CodeScratch of this thread.
void multiply_quantized_panel(const PackedMatrix& w, int64_t p, const Rows& rows, float* y, int64_t y_stride, float* memory);

}  // namespace apportion::APPORTION_ISA
