#pragma once

#include "../options.hpp"  // quantize_options

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t

namespace TETROMINO_NAMESPACE::detail {

/// How every row of a job is packed.
struct row_rules {
  any_format format;
  scale_rule rule;
  macro_rule macro;
  element_rounding rounding;
  special_values special;
  tiny_block_scale tiny_blocks;
  std::uint64_t seed;
};

/// Where one packed row, or a piece of it that starts at a macro block, lies.
template <class Byte>
struct packed_row {
  Byte* codes;
  Byte* scales;
  Byte* macros;
  float tensor_scale;
};

/// One row of input, or a piece of it that starts at a macro block.
template <real T>
struct input_row {
  const T* data;
  std::size_t cols;
  const float* weights;       ///< one per column, or null
  std::uint64_t first_index;  ///< stochastic rounding: position of data[0]
};

inline namespace TETROMINO_ISA {

inline bool is_finite(float x) { return (bit_cast<std::uint32_t>(x) & 0x7F800000u) != 0x7F800000u; }

inline bool is_infinite(float x) { return (bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu) == 0x7F800000u; }

/// An input value as the special-value policy sees it: saturating replaces what is not finite. `largest` is the largest
/// finite value of the input's type.
inline float admit(float x, special_values special, float largest) {
  if (special != special_values::saturate || is_finite(x)) return x;
  const std::uint32_t word = bit_cast<std::uint32_t>(x);
  if ((word & 0x7FFFFFu) != 0) return 0.0f;
  return (word >> 31) != 0 ? -largest : largest;
}
template <real T>
float admit(T value, special_values special) {
  return admit(to_float(value), special, largest<T>);
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail
