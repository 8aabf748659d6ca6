#pragma once

#include "../arch/sm80.cuh"      // quick_reciprocal
#include "../detail/values.cuh"  // bit_cast

#include <cstdint>  // std::uint32_t

/// Macro-block factors in the products. Sums are kept in units of 1 / the factor of the macro block at hand, so that
/// entering the next one is one multiplication of each sum.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The macro-block factors 1 + m / 256 of rows g and g + 8 of a warp's tile.
struct macro_pair {
  float low, high;
};
/// Their bytes. Kept as they are until they are needed, so that nobody waits for them before.
[[nodiscard]] __device__ inline std::uint32_t load_macro_bytes(const std::uint8_t* at) {
  return __ldg(reinterpret_cast<const std::uint16_t*>(at));
}
[[nodiscard]] __device__ inline macro_pair macro_factors(std::uint32_t both) {
  return {bit_cast<float>(0x3F800000u + (both & 0xFFu) * 0x8000u),
          bit_cast<float>(0x3F800000u + (both >> 8) * 0x8000u)};
}

/// 1 / (1 + m / 256) for a macro byte.
[[nodiscard]] __device__ inline float inverse_macro(std::uint32_t m) {
  return quick_reciprocal(bit_cast<float>(m * 0x8000u + 0x3F800000u));
}

/// The way of a lane through the macro blocks of its two rows.
struct macro_walk {
  const std::uint8_t* at;
  std::uint32_t left;  ///< macro blocks after the current one
  macro_pair now{1.0f, 1.0f};
  std::uint32_t next = 0;  ///< bytes of the next macro block

  __device__ void start(const std::uint8_t* first, std::uint32_t after) {
    at = first, left = after, next = 0;
    now = macro_factors(load_macro_bytes(first));
    if (after != 0) next = load_macro_bytes(first + 64);
  }
  /// What sums in units of 1 / now grow by in units of the next macro block.
  [[nodiscard]] __device__ macro_pair growth() const {
    const macro_pair then = macro_factors(next);
    return {then.low * quick_reciprocal(now.low), then.high * quick_reciprocal(now.high)};
  }
  __device__ void advance() {
    now = macro_factors(next);
    at += 64;
    if (--left != 0) next = load_macro_bytes(at + 64);
  }
  /// What brings finished sums, which miss a power of two too, to units of 1.
  [[nodiscard]] __device__ macro_pair finish(float missing) const {
    return {missing * quick_reciprocal(now.low), missing * quick_reciprocal(now.high)};
  }
};

}  // namespace TETROMINO_NAMESPACE::cuda::detail
