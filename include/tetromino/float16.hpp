#pragma once

#include "config.hpp"  // TETROMINO_HD, bit_cast

#include <cstdint>  // std::uint16_t, std::uint32_t

namespace TETROMINO_NAMESPACE {

/// IEEE 754 binary16, laid out as `_Float16` and CUDA's `__half`: storage and conversion only.
struct half {
  std::uint16_t bits = 0;

  static constexpr float max = 65504.0f;  ///< largest finite value

  /// Rounds to nearest even; overflows to infinity; NaN stays NaN (quiet).
  [[nodiscard]] TETROMINO_HD static constexpr half encode(float x) noexcept {
    const std::uint32_t word = detail::bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = word & 0x7FFFFFFFu;
    const std::uint32_t sign = (word >> 16) & 0x8000u;
    std::uint32_t code = 0x7C00u;
    if (magnitude > 0x7F800000u) {
      code = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    } else if (magnitude < 0x477FF000u) {  // below the tie between 65504 and infinity
      const std::uint32_t field = magnitude >> 23;
      // Mantissa bits to drop: 13 for normals, one more for each step below the smallest normal exponent.
      const std::uint32_t below = field < 113 ? 113 - field : 0;
      const std::uint32_t drop = 13 + (below < 12 ? below : 12);
      const std::uint32_t mantissa = below == 0 ? magnitude - (112u << 23) : (magnitude & 0x7FFFFFu) | 0x800000u;
      const std::uint32_t half_step = 1u << (drop - 1);
      const std::uint32_t odd = (mantissa >> drop) & 1u;
      code = below >= 12 ? 0 : (mantissa + half_step - 1 + odd) >> drop;
    }
    return {static_cast<std::uint16_t>(sign | code)};
  }

  /// The value, exactly.
  [[nodiscard]] TETROMINO_HD constexpr float value() const noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t magnitude = bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) return detail::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    if (magnitude < 0x400u) {
      const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
      return sign ? -subnormal : subnormal;
    }
    return detail::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }

  friend constexpr bool operator==(half, half) = default;
};

/// The upper half of a float, laid out as `__nv_bfloat16`: storage and conversion only.
struct bfloat16 {
  std::uint16_t bits = 0;

  static constexpr float max = 0x1.fep127f;  ///< largest finite value

  /// Rounds to nearest even; overflows to infinity; NaN stays NaN (quiet).
  [[nodiscard]] TETROMINO_HD static constexpr bfloat16 encode(float x) noexcept {
    const std::uint32_t word = detail::bit_cast<std::uint32_t>(x);
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<std::uint16_t>(word >> 16 | 0x40u)};
    return {static_cast<std::uint16_t>((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16)};
  }

  /// The value, exactly.
  [[nodiscard]] TETROMINO_HD constexpr float value() const noexcept {
    return detail::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }

  friend constexpr bool operator==(bfloat16, bfloat16) = default;
};

static_assert(sizeof(half) == 2 && sizeof(bfloat16) == 2);
static_assert(half{0x7BFF}.value() == half::max && half{1}.value() == 0x1p-24f && half{0x3C00}.value() == 1.0f);
static_assert(half::encode(65520.0f).bits == 0x7C00 && half::encode(0x1p-25f).bits == 0);
static_assert(bfloat16{0x7F7F}.value() == bfloat16::max && bfloat16::encode(1.0f).bits == 0x3F80);

namespace detail {

/// The float value of any input type.
TETROMINO_HD constexpr float to_float(float x) noexcept { return x; }
TETROMINO_HD constexpr float to_float(half x) noexcept { return x.value(); }
TETROMINO_HD constexpr float to_float(bfloat16 x) noexcept { return x.value(); }

/// Rounds a float to any output type.
template <class T>
TETROMINO_HD constexpr T from_float(float x) noexcept {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return T::encode(x);
  }
}

/// The largest finite value of an input type.
template <class T>
inline constexpr float largest = T::max;
template <>
inline constexpr float largest<float> = 0x1.fffffep127f;

}  // namespace detail
}  // namespace tetromino
