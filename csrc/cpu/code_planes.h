// Where the integers of a step (32 channels x 32 columns) lie, for every instruction set.
//
// Byte vector v = channel / 4 * 2 + column / 16 is 64 codes: lane = column % 16 * 4 + the place of the channel in its four, which stand in the
// order 0 2 1 3. So a 32-bit word has the four channels that one product of bytes takes, and in 16-bit words the low bytes are the first
// pair of channels, the high ones the second: what a bf16 panel has.
//
// Codes of b bits are cut into planes of 8, 4, 2 and 1 bits, their lowest bits in the widest. A plane of n bits has 8 / n vectors in a row of
// 64 bytes: vector v in row v / (8 / n), at bit v % (8 / n) * n of each byte. int8 is stored in two's complement, as int8 tiles
// multiply it, narrower ones in offset binary.
#pragma once
#include <cstdint>

namespace apportion {

constexpr int STEP = 32;          // channels
constexpr int NUM_VECTORS = 16;   // of bytes in a step

// Inlined wherever they are used: a function compiled for one instruction set must never be merged with another's.
#define APPORTION_PLANES static inline __attribute__((always_inline))

APPORTION_PLANES constexpr int byte_vector(int channel, int column) { return channel / 4 * 2 + column / 16; }
APPORTION_PLANES constexpr int byte_lane(int channel, int column) {
  constexpr int place[] = {0, 2, 1, 3};
  return column % 16 * 4 + place[channel % 4];
}

// The part of a code that lies in the plane of N bits, if the format has one: f(byte of the step, shift in it, N, how many bits of the code
// lie in wider planes: the binary digits above N).
template <int BITS, int N, typename F>
APPORTION_PLANES void part_in(int v, int lane, F& f) {
  constexpr int BEFORE = BITS & ~(2 * N - 1), PER_ROW = 8 / N;
  if constexpr (BITS & N) f(BEFORE * NUM_VECTORS * 8 + v / PER_ROW * 64 + lane, v % PER_ROW * N, N, BEFORE);
}

template <int BITS, typename F>
APPORTION_PLANES void each_part(int v, int lane, F&& f) {
  part_in<BITS, 8>(v, lane, f);
  part_in<BITS, 4>(v, lane, f);
  part_in<BITS, 2>(v, lane, f);
  part_in<BITS, 1>(v, lane, f);
}

// In offset binary.
template <int BITS>
APPORTION_PLANES unsigned get_integer(const uint8_t* step, int v, int lane) {
  unsigned code = 0;
  each_part<BITS>(v, lane, [&](int byte, int shift, int n, int before) { code |= (unsigned(step[byte]) >> shift & ((1u << n) - 1)) << before; });
  return BITS == 8 ? code ^ 0x80 : code;
}

template <int BITS>
APPORTION_PLANES void put_integer(uint8_t* step, int v, int lane, unsigned code) {
  if (BITS == 8) code ^= 0x80;
  each_part<BITS>(v, lane, [&](int byte, int shift, int n, int before) {
    const unsigned mask = (1u << n) - 1;
    step[byte] = uint8_t((step[byte] & ~(mask << shift)) | (code >> before & mask) << shift);
  });
}

}  // namespace apportion
