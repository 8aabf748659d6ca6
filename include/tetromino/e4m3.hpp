#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_HD, bit_cast

#include <cstdint>  // std::uint8_t, std::uint32_t

namespace TETROMINO_NAMESPACE {

/// A number of 8 bits: 4 exponent bits (bias 7), 3 mantissa bits, subnormals, no infinity, largest value 448. The block
/// scale of NVFP4, which is never negative (UE4M3), and an element of e4m3_view. (OCP FP8 v1.0)
struct e4m3 {
  std::uint8_t bits = 0;

  static constexpr float max = 448.0f;             ///< largest value, code 0x7E
  static constexpr float min_normal = 0x1p-6f;     ///< smallest normal value, code 0x08
  static constexpr float min_subnormal = 0x1p-9f;  ///< smallest positive value, code 0x01
  static constexpr std::uint8_t max_finite_bits = 0x7E;
  static constexpr std::uint8_t nan_bits = 0x7F;

  constexpr e4m3() = default;
  template <class T>
  explicit constexpr e4m3(T) noexcept {
    static_assert(detail::never<T>, "e4m3::encode rounds a number to a scale; e4m3::from_bits takes its 8 bits");
  }

  /// The scale that these bits stand for.
  [[nodiscard]] TETROMINO_HD static constexpr e4m3 from_bits(std::uint8_t bits) noexcept {
    e4m3 x;
    x.bits = bits;
    return x;
  }

  /// Rounds to nearest, ties to the even code; saturates at 448 (infinity too); NaN stays NaN; keeps the sign.
  [[nodiscard]] TETROMINO_HD static constexpr e4m3 encode(float x) noexcept {
    const std::uint32_t word = detail::bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = word & 0x7FFFFFFFu;
    const std::uint32_t sign = (word >> 31) << 7;
    std::uint32_t code = max_finite_bits;
    if (magnitude > 0x7F800000u) {
      code = nan_bits;
    } else if (magnitude < 0x43E00000u) {  // below 448
      const std::uint32_t field = magnitude >> 23;
      // Mantissa bits to drop: 20 for normals, one more for each step below the smallest normal exponent.
      const std::uint32_t below = field < 121 ? 121 - field : 0;
      const std::uint32_t drop = 20 + (below < 5 ? below : 5);
      const std::uint32_t mantissa = below == 0 ? magnitude - (120u << 23) : (magnitude & 0x7FFFFFu) | 0x800000u;
      const std::uint32_t half_step = 1u << (drop - 1);
      const std::uint32_t odd = (mantissa >> drop) & 1u;
      code = below >= 5 ? 0 : (mantissa + half_step - 1 + odd) >> drop;
    }
    return from_bits(static_cast<std::uint8_t>(sign | code));
  }

  /// The value of the code, exactly.
  [[nodiscard]] TETROMINO_HD constexpr float value() const noexcept {
    const std::uint32_t magnitude = bits & 0x7Fu;
    const std::uint32_t sign = static_cast<std::uint32_t>(bits >> 7) << 31;
    if (magnitude == nan_bits) return detail::bit_cast<float>(sign | 0x7FC00000u);
    if (magnitude < 8) {
      const float subnormal = static_cast<float>(magnitude) * min_subnormal;
      return sign ? -subnormal : subnormal;
    }
    return detail::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  }

  friend TETROMINO_ABI constexpr bool operator==(e4m3, e4m3) = default;
};

static_assert(e4m3::from_bits(0x7E).value() == e4m3::max && e4m3::from_bits(0x08).value() == e4m3::min_normal);
static_assert(e4m3::from_bits(0x07).value() == 7 * e4m3::min_subnormal);
static_assert(e4m3::encode(0.5f * e4m3::min_subnormal).bits == 0);  // tie to even
static_assert(e4m3::encode(1.5f * e4m3::min_subnormal).bits == 2);  // tie to even
static_assert(e4m3::encode(0x1.fp-7f).bits == 0x08);                // rounds up into the normals
static_assert(e4m3::encode(1e9f).value() == 448.0f && e4m3::encode(447.0f).value() == 448.0f);

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
