#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_HD, bit_cast

#include <cstdint>  // std::uint8_t

namespace TETROMINO_NAMESPACE {

/// The 4-bit element: codes 0..7 stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign. (OCP MX v1.0, sec. 5.3.3)
struct e2m1 {
  std::uint8_t bits = 0;  ///< 0..15, in the low nibble

  static constexpr float max = 6.0f;  ///< largest value

  constexpr e2m1() = default;
  template <class T>
  explicit constexpr e2m1(T) noexcept {
    static_assert(detail::never<T>, "e2m1::encode rounds a number to a code; e2m1::from_bits takes a code");
  }

  /// The element that these bits stand for.
  [[nodiscard]] TETROMINO_HD static constexpr e2m1 from_bits(std::uint8_t bits) noexcept {
    e2m1 x;
    x.bits = bits;
    return x;
  }

  /// Rounds to nearest, ties to the even code; saturates at 6; keeps -0. NaN becomes +6, as the hardware does.
  [[nodiscard]] TETROMINO_HD static constexpr e2m1 encode(float x) noexcept {
    const std::uint32_t word = detail::bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = word & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return from_bits(7);
    // How many midpoints lie below x; a midpoint between an even and an odd code belongs to the even one.
    const int code = (magnitude > 0x3E800000u)     // 0.25 goes down
                     + (magnitude >= 0x3F400000u)  // 0.75 goes up
                     + (magnitude > 0x3FA00000u)   // 1.25 goes down
                     + (magnitude >= 0x3FE00000u)  // 1.75 goes up
                     + (magnitude > 0x40200000u)   // 2.5 goes down
                     + (magnitude >= 0x40600000u)  // 3.5 goes up
                     + (magnitude > 0x40A00000u);  // 5 goes down
    return from_bits(static_cast<std::uint8_t>((word >> 31) << 3 | static_cast<std::uint32_t>(code)));
  }

  /// The value of the code, exactly.
  [[nodiscard]] TETROMINO_HD constexpr float value() const noexcept {
    // Codes 2..7 are floats with a 1-bit mantissa whose exponent field starts at 1; 0 and 1 are 0 and 0.5.
    const std::uint32_t magnitude = bits & 7u;
    const std::uint32_t sign = (bits & 8u) << 28;
    const std::uint32_t word = magnitude < 2 ? magnitude * 0x3F000000u : (magnitude << 22) + 0x3F000000u;
    return detail::bit_cast<float>(sign | word);
  }

  friend TETROMINO_ABI constexpr bool operator==(e2m1, e2m1) = default;
};

static_assert(e2m1::from_bits(7).value() == e2m1::max && e2m1::from_bits(11).value() == -1.5f);
static_assert(e2m1::encode(5.0f).value() == 4.0f);  // tie to even; 5 is not a code
static_assert(e2m1::encode(-0.0f).bits == 8);       // the sign of zero survives
static_assert(e2m1::encode(1e30f).value() == 6.0f);

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
