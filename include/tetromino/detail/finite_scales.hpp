#pragma once

#include "../e2m1.hpp"      // e2m1
#include "../e4m3.hpp"      // e4m3
#include "../float16.hpp"   // half, bfloat16, largest
#include "../rounding.hpp"  // element_rounding
#include "../scaling.hpp"   // fine_factor, fine_inverse

#include <cstdint>  // std::uint8_t, std::uint32_t

/// Scales under which no element decodes to an infinity of the input's type.
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The least float that rounds to infinity as a T.
template <class T>
inline constexpr float overflow_of = bit_cast<float>(0x7F800000u);
template <>
inline constexpr float overflow_of<half> = 65520.0f;
template <>
inline constexpr float overflow_of<bfloat16> = 0x1.ffp127f;

/// Blocks with largest magnitudes below this decode to finite values of type T under every scale that a rule may give
/// them: rounding does not so much as double an element.
template <class T>
inline constexpr float safely_finite = largest<T> / 4;

/// The largest value of E2M1 that y >= 0 may be rounded to.
[[nodiscard]] TETROMINO_HD constexpr float rounded_up_to(float y, element_rounding rounding) noexcept {
  const e2m1 nearest = e2m1::encode(y);
  if (rounding == element_rounding::nearest_even || !(nearest.value() < y) || nearest.bits == 7) return nearest.value();
  return e2m1::from_bits(static_cast<std::uint8_t>(nearest.bits + 1)).value();
}

/// 2^n for n in [-126, 127].
[[nodiscard]] TETROMINO_HD constexpr float normal_power(int n) noexcept {
  return bit_cast<float>(static_cast<std::uint32_t>(n + 127) << 23);
}

/// The E8M0 exponent of a block, lowered as far as it takes for its largest element to decode to less than `overflow`.
/// `amax` is its largest magnitude, at least safely_finite.
[[nodiscard]] TETROMINO_HD constexpr int finite_exponent(int exponent, float amax, float factor,
                                                         element_rounding rounding, float overflow) noexcept {
  const float scaled = rounded(factor * (amax * 0x1p-64f)) * 0x1p-32f;
  for (; exponent > -127; --exponent) {
    const float y = scaled * normal_power(96 - exponent);
    if (!(rounded_up_to(y, rounding) / factor * normal_power(exponent) >= overflow)) break;
  }
  return exponent;
}

/// The same for a group of elements with a factor of 2 bits; `amax` is the group's largest magnitude.
[[nodiscard]] TETROMINO_HD constexpr int finite_fine_exponent(int exponent, float amax, unsigned m,
                                                              element_rounding rounding, float overflow) noexcept {
  const float reduced = amax * 0x1p-64f;
  for (; exponent > -127; --exponent) {
    const float y = rounded(reduced * normal_power(64 - exponent) * fine_inverse(m));
    if (!(rounded_up_to(y, rounding) * fine_factor(m) * normal_power(exponent) >= overflow)) break;
  }
  return exponent;
}

/// The same for the E4M3 code of an NVFP4 block.
[[nodiscard]] TETROMINO_HD constexpr e4m3 finite_scale(e4m3 scale, float amax, float tensor_scale,
                                                       element_rounding rounding, float overflow) noexcept {
  for (; scale.bits > 1; --scale.bits) {
    const float step = rounded(tensor_scale * scale.value());
    if (!(rounded_up_to(amax / step, rounding) * step >= overflow)) break;
  }
  return scale;
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
