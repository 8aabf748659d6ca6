#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// 8-bit activations on vectors, 16 blocks at a time; byte for byte what scalar_int8 gives.

#if TETROMINO_SIMD

#include "../../matrix.hpp"  // real
#include "isa.hpp"           // floats, words, block_amax, load_pair

#include <algorithm>  // std::copy_n, std::fill, std::find_if, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int8_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

struct simd_int8 {
  /// See scalar_int8.
  template <real T>
  static std::size_t quantize_int8_row(const T* x, std::size_t cols, std::int8_t* values, float* scales) {
    const std::size_t blocks = (cols + block - 1) / block;
    for (std::size_t b = 0; b < blocks; b += lane_count) {
      // The last 16 blocks of a row overlap those before, where there are any: they come out the same again.
      if (blocks - b < lane_count && blocks > lane_count) b = blocks - lane_count;
      const std::size_t k = b * block, n = std::min(span, cols - k);
      const std::size_t rejected = n == span ? round_blocks(x + k, lane_count, values + k, scales + b)
                                             : round_some(x + k, n, values + k, scales + b);
      if (rejected < lane_count) return b + rejected;
    }
    return blocks;
  }

 private:
  static constexpr std::size_t block = 32, span = block * lane_count;

  /// Rounds x[n] of at most 16 blocks, the last of which may be short.
  template <real T>
  static std::size_t round_some(const T* x, std::size_t n, std::int8_t* values, float* scales) {
    if (n > span) __builtin_unreachable();  // g++ 12 -O3 warns of larger copies
    T padded[span];
    std::int8_t bytes[span];
    float scale[lane_count];
    std::copy_n(x, n, padded);
    std::fill(padded + n, padded + span, T{});
    const std::size_t blocks = (n + block - 1) / block, rejected = round_blocks(padded, blocks, bytes, scale);
    std::copy_n(bytes, n, values);
    std::copy_n(scale, blocks, scales);
    return rejected;
  }

  /// Rounds the first `used` of 16 blocks, and writes all 16 scales; returns the first that is not finite, or 16.
  template <real T>
  static std::size_t round_blocks(const T* x, std::size_t used, std::int8_t* values, float* scales) {
    const words bits = block_amax<block_size<block>>(block, x);
    if (any_at_least(bits, infinity)) return first_at_least(bits, infinity);
    const floats amax = floats_of(bits), zero = broadcast(0.0f), largest = broadcast(127.0f);
    const flags tiny = amax < broadcast(0x1p-120f);
    float inverse[lane_count];
    store(inverse, select(tiny, zero, largest / amax));
    store(scales, select(tiny, zero, amax / largest));
    for (std::size_t b = 0; b < used; ++b) {
      const floats factor = broadcast(inverse[b]);
      const floats_pair y = load_pair(x + b * block);
      const words first = nearest(y.first * factor), second = nearest(y.second * factor);
      if constexpr (is_split<T>) {
        store_signed_halves(values + b * block, (first & broadcast(0xFFFF)) | shift_left<16>(second));
      } else {
        store_signed_bytes(values + b * block, first, second);
      }
    }
    return lane_count;
  }

  static constexpr std::int32_t infinity = 0x7F800000;
  static std::size_t first_at_least(const words& a, std::int32_t limit) {
    std::int32_t lane[lane_count];
    store(lane, a);
    return static_cast<std::size_t>(std::find_if(lane, lane + lane_count, [&](auto l) { return l >= limit; }) - lane);
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
