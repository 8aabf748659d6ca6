#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// Activations in E4M3 on vectors; byte for byte what scalar_e4m3 gives.

#if TETROMINO_SIMD

#include "../../matrix.hpp"  // real
#include "isa.hpp"           // floats, words, store_bytes
#include "scales.hpp"        // encode_e4m3

#include <algorithm>  // std::copy_n, std::fill_n, std::max_element
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::uint8_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

struct simd_e4m3 {
  /// See scalar_e4m3.
  template <real T>
  static std::size_t quantize_e4m3_row(const T* x, std::size_t cols, std::uint8_t* values, float& scale) {
    const std::size_t whole = cols / lane_count * lane_count, padded = (cols + 127) / 128 * 128;
    T last[lane_count] = {};
    std::copy_n(x + whole, cols - whole, last);
    words largest = magnitude_bits(load(last));
    for (std::size_t k = 0; k < whole; k += lane_count) largest = max(largest, magnitude_bits(load(x + k)));
    std::int32_t lane[lane_count];
    store(lane, largest);
    const std::int32_t most = *std::max_element(lane, lane + lane_count);
    if (most >= infinity) return first_special(x);
    const float amax = detail::bit_cast<float>(most);
    if (amax < 0x1p-117f) {
      scale = 0.0f;
      std::fill_n(values, padded, std::uint8_t{0});
      return cols;
    }
    scale = amax / 448.0f;
    const floats inverse = broadcast(448.0f / amax);
    for (std::size_t k = 0; k < whole; k += lane_count) store_codes(load(x + k) * inverse, values + k);
    std::size_t written = whole;
    if (whole < cols) store_codes(load(last) * inverse, values + whole), written += lane_count;
    std::fill_n(values + written, padded - written, std::uint8_t{0});
    return cols;
  }

 private:
  static constexpr std::int32_t infinity = 0x7F800000;

  TETROMINO_INLINE static words magnitude_bits(const floats& x) { return bits_of(x) & broadcast(0x7FFFFFFF); }

  /// The first element that is not finite; there is one.
  template <real T>
  static std::size_t first_special(const T* x) {
    std::size_t k = 0;
    while ((detail::bit_cast<std::int32_t>(to_float(x[k])) & 0x7FFFFFFF) < infinity) ++k;
    return k;
  }

  /// The codes of sixteen columns.
  TETROMINO_INLINE static void store_codes(const floats& product, std::uint8_t* out) {
    const floats y = rounded(product);
    const words sign = shift_right<24>(bits_of(y)) & broadcast(0x80);
    store_bytes(out, encode_e4m3(magnitude(y)) | sign);
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
