#pragma once

/// Where each storage layout puts the code of element [r, k] and the scale of its block, and what the two decode to:
/// one formula each, as the formats' owners describe them. Rows of all matrices are counted together, so r runs over
/// matrices * rows, and K is a multiple of the block. It includes nothing of tetromino.

#include <cmath>    // std::ldexp
#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t

namespace reference {

/// A nibble: 0 is bits 0-3 of the byte, 1 is bits 4-7.
struct nibble {
  std::size_t byte;
  std::size_t half;
};

inline nibble linear_code(std::size_t r, std::size_t k, std::size_t K) { return {r * (K / 2) + k / 2, k % 2}; }
inline std::size_t linear_scale(std::size_t r, std::size_t k, std::size_t K, std::size_t block) {
  return r * (K / block) + k / block;
}

inline nibble gpt_oss_code(std::size_t r, std::size_t k, std::size_t K) {
  return {(r * (K / 32) + k / 32) * 16 + (k % 32) / 2, k & 1};
}
inline std::size_t gpt_oss_scale(std::size_t r, std::size_t k, std::size_t K) { return r * (K / 32) + k / 32; }

/// ggml block_mxfp4: a scale byte, then 16 bytes whose low halves are elements 0-15, whose high halves are 16-31.
inline nibble ggml_mxfp4_code(std::size_t r, std::size_t k, std::size_t K) {
  const std::size_t base = 17 * (r * (K / 32) + k / 32), j = k % 32;
  return {base + 1 + j % 16, j / 16};
}
inline std::size_t ggml_mxfp4_scale(std::size_t r, std::size_t k, std::size_t K) {
  return 17 * (r * (K / 32) + k / 32);
}

/// ggml block_nvfp4: 4 scale bytes, then 4 times 8 bytes whose low halves are the first 8 elements of a group of 16.
inline nibble ggml_nvfp4_code(std::size_t r, std::size_t k, std::size_t K) {
  const std::size_t base = 36 * (r * (K / 64) + k / 64), s = (k % 64) / 16, j = k % 16;
  return {base + 4 + 8 * s + j % 8, j / 8};
}
inline std::size_t ggml_nvfp4_scale(std::size_t r, std::size_t k, std::size_t K) {
  return 36 * (r * (K / 64) + k / 64) + (k % 64) / 16;
}

/// The 128x4 swizzle of one matrix's scales: the byte of row r, block c of C.
inline std::size_t swizzled_scale(std::size_t r, std::size_t c, std::size_t C) {
  const std::size_t tiles = (C + 3) / 4;
  return ((r / 128) * tiles + c / 4) * 512 + (r % 32) * 16 + ((r % 128) / 32) * 4 + c % 4;
}

/// The inverse: which row and block the byte at `at` belongs to. They may lie in the padding.
struct scale_position {
  std::size_t row;
  std::size_t block;
};
inline scale_position swizzled_position(std::size_t at, std::size_t C) {
  const std::size_t tiles = (C + 3) / 4, tile = at / 512, i = at % 512;
  return {tile / tiles * 128 + i / 4 % 4 * 32 + i / 16, tile % tiles * 4 + i % 4};
}

inline unsigned nibble_at(const std::uint8_t* bytes, nibble where) {
  return bytes[where.byte] >> (4 * where.half) & 15u;
}

/// ggml decodes with doubled integers and a scale of half the value.
inline double ggml_doubled(unsigned code) {
  constexpr int values[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  return code < 8 ? values[code] : -values[code - 8];
}
inline double ggml_mxfp4_value(unsigned code, unsigned scale) {
  return ggml_doubled(code) * std::ldexp(1.0, static_cast<int>(scale) - 128);
}
inline double ggml_nvfp4_value(unsigned code, unsigned scale) {
  const int exponent = static_cast<int>(scale >> 3 & 15), mantissa = static_cast<int>(scale & 7);
  const double ue4m3 = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(1.0 + mantissa / 8.0, exponent - 7);
  return ggml_doubled(code) * ue4m3 / 2;
}

}  // namespace reference
