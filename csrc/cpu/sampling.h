// Choosing tokens from logits, and log-probabilities (kernels/ops.Ops.sample and .logprobs). One row is one item of the team.
#pragma once
#include <cstddef>
#include <cstdint>

namespace apportion {

struct SamplingRow {
  float temperature, top_p, min_p;
  int32_t top_k;
  double uniform;  // in [0, 1)
};

struct SamplingKernels {
  // The token of one row; -1 where its largest logit is NaN or infinite. scratch: scratch_bytes(V), 64-byte aligned.
  int32_t (*sample)(const float* logits, int V, const SamplingRow& row, std::byte* scratch);
  // Of one row: log-softmax of `token`, how many logits are larger plus 1, and the n largest (ties to the lower id).
  void (*logprobs)(const float* logits, int V, int32_t token, int n, float* logprob, int32_t* rank, int32_t* ids, float* values,
                   std::byte* scratch);
  // -infinity where the bit of an id is 0; lowest bit of the first byte first.
  void (*apply_bitmask)(float* logits, int V, const uint8_t* bits);
  size_t (*scratch_bytes)(int V);
};

// The first word of Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (position, 0), as 24 bits over 2^24.
inline double uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c[0], p1 = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k[1], uint32_t(p0)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return double(c[0] >> 8) * 0x1p-24;
}

}  // namespace apportion
