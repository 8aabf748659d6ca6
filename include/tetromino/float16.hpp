#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_HD, TETROMINO_MAY_ALIAS, bit_cast, never

#include <cstdint>      // std::uint16_t, std::uint32_t, std::uint64_t
#include <type_traits>  // std::is_trivially_copyable_v, std::is_convertible_v

namespace TETROMINO_NAMESPACE {
namespace detail {

/// The bits of a float that rounds to any narrower format as `x` itself does: cut towards zero, with the last bit set
/// where something was cut ("round to odd"). Numbers of 2^128 and more become the largest float, NaNs stay NaN.
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t float_bits_to_odd(double x) noexcept {
  const std::uint64_t word = bit_cast<std::uint64_t>(x);
  const std::uint64_t magnitude = word & 0x7FFFFFFFFFFFFFFFu;
  const std::uint32_t sign = static_cast<std::uint32_t>(word >> 32) & 0x80000000u;
  if (magnitude == 0) return sign;
  if (magnitude >= 0x7FF0000000000000u) return sign | (magnitude > 0x7FF0000000000000u ? 0x7FC00000u : 0x7F800000u);
  if (magnitude >= std::uint64_t{1023 + 128} << 52) return sign | 0x7F7FFFFFu;
  const std::uint64_t field = magnitude >> 52;
  constexpr std::uint64_t smallest_normal = 1023 - 126;
  const std::uint64_t below = field < smallest_normal ? smallest_normal - field : 0;
  const std::uint64_t drop = 29 + (below < 34 ? below : 34);
  const std::uint64_t mantissa =
      below == 0 ? magnitude - ((smallest_normal - 1) << 52) : (magnitude & 0xFFFFFFFFFFFFFu) | std::uint64_t{1} << 52;
  const bool is_cut = (mantissa & ((std::uint64_t{1} << drop) - 1)) != 0;
  return sign | static_cast<std::uint32_t>(mantissa >> drop) | (is_cut ? 1u : 0u);
}

}  // namespace detail

/// IEEE 754 binary16, laid out as `_Float16` and CUDA's `__half`: storage and conversion only. Equal means equal bits.
struct TETROMINO_MAY_ALIAS half {
  std::uint16_t bits = 0;

  static constexpr float max = 65504.0f;  ///< largest finite value

  constexpr half() = default;
  /// Rounds to nearest even; overflows to infinity; NaN stays NaN (quiet).
  TETROMINO_HD explicit constexpr half(float x) noexcept : bits(rounded(detail::bit_cast<std::uint32_t>(x))) {}
  /// The same, with one rounding.
  TETROMINO_HD explicit constexpr half(double x) noexcept : bits(rounded(detail::float_bits_to_odd(x))) {}
  template <class T>
  explicit constexpr half(T) noexcept {
    static_assert(detail::never<T>,
                  "a half rounds a float or a double, so convert to one first; half::from_bits takes its 16 bits");
  }

  [[nodiscard]] TETROMINO_HD static constexpr half from_bits(std::uint16_t bits) noexcept {
    half x;
    x.bits = bits;
    return x;
  }

  /// The value, exactly.
  [[nodiscard]] TETROMINO_HD explicit constexpr operator float() const noexcept {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t magnitude = bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) return detail::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    if (magnitude < 0x400u) {
      const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
      return sign ? -subnormal : subnormal;
    }
    return detail::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  [[nodiscard]] TETROMINO_HD explicit constexpr operator double() const noexcept { return static_cast<float>(*this); }

  friend TETROMINO_ABI constexpr bool operator==(half, half) = default;

 private:
  /// The half nearest to a float that is given by its bits.
  [[nodiscard]] TETROMINO_HD static constexpr std::uint16_t rounded(std::uint32_t word) noexcept {
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
    return static_cast<std::uint16_t>(sign | code);
  }
};

/// The upper half of a float, laid out as `__bf16` and CUDA's `__nv_bfloat16`: storage and conversion only. Equal means
/// equal bits.
struct TETROMINO_MAY_ALIAS bfloat16 {
  std::uint16_t bits = 0;

  static constexpr float max = 0x1.fep127f;  ///< largest finite value

  constexpr bfloat16() = default;
  /// Rounds to nearest even; overflows to infinity; NaN stays NaN (quiet).
  TETROMINO_HD explicit constexpr bfloat16(float x) noexcept : bits(rounded(detail::bit_cast<std::uint32_t>(x))) {}
  /// The same, with one rounding.
  TETROMINO_HD explicit constexpr bfloat16(double x) noexcept : bits(rounded(detail::float_bits_to_odd(x))) {}
  template <class T>
  explicit constexpr bfloat16(T) noexcept {
    static_assert(
        detail::never<T>,
        "a bfloat16 rounds a float or a double, so convert to one first; bfloat16::from_bits takes its 16 bits");
  }

  [[nodiscard]] TETROMINO_HD static constexpr bfloat16 from_bits(std::uint16_t bits) noexcept {
    bfloat16 x;
    x.bits = bits;
    return x;
  }

  /// The value, exactly.
  [[nodiscard]] TETROMINO_HD explicit constexpr operator float() const noexcept {
    return detail::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  [[nodiscard]] TETROMINO_HD explicit constexpr operator double() const noexcept { return static_cast<float>(*this); }

  friend TETROMINO_ABI constexpr bool operator==(bfloat16, bfloat16) = default;

 private:
  /// The bfloat16 nearest to a float that is given by its bits.
  [[nodiscard]] TETROMINO_HD static constexpr std::uint16_t rounded(std::uint32_t word) noexcept {
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>(word >> 16 | 0x40u);
    return static_cast<std::uint16_t>((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16);
  }
};

static_assert(sizeof(half) == 2 && sizeof(bfloat16) == 2);
static_assert(std::is_trivially_copyable_v<half> && std::is_trivially_copyable_v<bfloat16>);
static_assert(!std::is_convertible_v<float, half> && !std::is_convertible_v<half, float>);
static_assert(half(0.5f).bits == 0x3800 && half(3.7f) == half(3.7) && bfloat16(0.7f).bits == 0x3F33);
static_assert(float(half::from_bits(0x7BFF)) == half::max && float(half::from_bits(1)) == 0x1p-24f);
static_assert(half(65520.0f).bits == 0x7C00 && half(0x1p-25f).bits == 0);
static_assert(float(bfloat16::from_bits(0x7F7F)) == bfloat16::max && bfloat16(1.0f).bits == 0x3F80);
static_assert(half(1 + 0x1p-11 + 0x1p-40).bits == 0x3C01);  // as a float it would be a tie, and go down to 1

namespace detail::inline TETROMINO_ISA {

/// The float value of any input type.
TETROMINO_HD constexpr float to_float(float x) noexcept { return x; }
TETROMINO_HD constexpr float to_float(half x) noexcept { return static_cast<float>(x); }
TETROMINO_HD constexpr float to_float(bfloat16 x) noexcept { return static_cast<float>(x); }

/// Rounds a float to any output type.
template <class T>
TETROMINO_HD constexpr T from_float(float x) noexcept {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return T(x);
  }
}

/// The largest finite value of an input type.
template <class T>
inline constexpr float largest = T::max;
template <>
inline constexpr float largest<float> = 0x1.fffffep127f;

}  // namespace detail::inline TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
