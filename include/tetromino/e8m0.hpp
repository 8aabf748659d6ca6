#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_HD, bit_cast

#include <cstdint>  // std::uint8_t

namespace TETROMINO_NAMESPACE {

/// The block scale of MX formats: a power of two, 2^(bits - 127); 255 is NaN. (OCP MX v1.0, sec. 5.4.1)
struct e8m0 {
  std::uint8_t bits = 127;

  static constexpr int min_exponent = -127;
  static constexpr int max_exponent = 127;
  static constexpr std::uint8_t nan_bits = 0xFF;

  constexpr e8m0() = default;
  template <class T>
  explicit constexpr e8m0(T) noexcept {
    static_assert(
        detail::never<T>,
        "e8m0::encode cuts a number to a power of two; e8m0::from_exponent and e8m0::from_bits take integers");
  }

  /// The scale that these bits stand for.
  [[nodiscard]] TETROMINO_HD static constexpr e8m0 from_bits(std::uint8_t bits) noexcept {
    e8m0 x;
    x.bits = bits;
    return x;
  }

  /// The scale 2^exponent, with the exponent clamped to [-127, 127].
  [[nodiscard]] TETROMINO_HD static constexpr e8m0 from_exponent(int exponent) noexcept {
    const int clamped = exponent < min_exponent ? min_exponent : exponent > max_exponent ? max_exponent : exponent;
    return from_bits(static_cast<std::uint8_t>(clamped + 127));
  }

  /// The largest power of two not above |x|, clamped to [2^-127, 2^127]; infinity gives 2^127, NaN gives NaN.
  [[nodiscard]] TETROMINO_HD static constexpr e8m0 encode(float x) noexcept {
    const std::uint32_t magnitude = detail::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return from_bits(nan_bits);
    const std::uint32_t field = magnitude >> 23;  // 0 for subnormals: they are below 2^-126
    return from_bits(static_cast<std::uint8_t>(field < 254 ? field : 254));
  }

  [[nodiscard]] TETROMINO_HD constexpr int exponent() const noexcept { return static_cast<int>(bits) - 127; }
  [[nodiscard]] TETROMINO_HD constexpr bool is_nan() const noexcept { return bits == nan_bits; }

  /// The value, exactly (2^-127 is a subnormal float).
  [[nodiscard]] TETROMINO_HD constexpr float value() const noexcept {
    if (bits == nan_bits) return detail::bit_cast<float>(0x7FC00000u);
    return detail::bit_cast<float>(bits == 0 ? 0x00400000u : static_cast<std::uint32_t>(bits) << 23);
  }

  friend TETROMINO_ABI constexpr bool operator==(e8m0, e8m0) = default;
};

static_assert(e8m0::from_bits(0).value() == 0x1p-127f && e8m0::from_bits(254).value() == 0x1p127f);
static_assert(e8m0::encode(3.99f).value() == 2.0f && e8m0::encode(0.0f).bits == 0);

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
