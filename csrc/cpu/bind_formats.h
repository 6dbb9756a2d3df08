// Weight formats and quantized rows as Python hands them over.
#pragma once
#include <cstdint>
#include <cstring>

#include "linear.h"

namespace apportion {

// Addresses of tensors; 0 stands for an absent one.
struct CodeSource {
  uintptr_t codes, scales, zeros, order, input_scale;
  int64_t block;

  void pack(ThreadTeam& team, const PackedMatrix& w, int64_t first, int64_t count) const {
    const QuantizedRows rows = {reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const float*>(scales),
                                reinterpret_cast<const void*>(zeros), block};
    pack_quantized(team, w, rows, first, count);
    if (w.order != nullptr) std::memcpy(const_cast<int32_t*>(w.order), reinterpret_cast<const void*>(order), size_t(w.C) * 4);
    if (w.input_scale != nullptr) std::memcpy(const_cast<float*>(w.input_scale), reinterpret_cast<const void*>(input_scale), 4);
  }

  // From row `row` on, of a matrix with C channels and some groups of them.
  CodeSource from(int64_t row, int64_t C, int64_t groups, int64_t zero_bytes) const {
    CodeSource rest = *this;
    const int64_t numbers = block == 0 ? 0 : row / block * groups;
    rest.codes += uintptr_t(row * C);
    rest.scales += uintptr_t(numbers * 4);
    if (zeros != 0) rest.zeros += uintptr_t(numbers * zero_bytes);
    return rest;
  }
};

}  // namespace apportion
