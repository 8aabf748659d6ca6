#pragma once

#include "../../detail/macros_off.hpp"

#include "../../e2m1.hpp"     // e2m1
#include "../../e4m3.hpp"     // e4m3
#include "../../e8m0.hpp"     // e8m0
#include "../../options.hpp"  // special_values
#include "../../packed.hpp"   // packed_view

#include <algorithm>  // std::any_of, std::copy_n, std::fill_n, std::max
#include <array>      // std::array
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// E4M3 holds the powers of two from 2^-9 to 2^8: with the largest scale of a matrix at 2^8, scales down to 2^-17 of it
/// are exact. Below, they stay at 2^-9 and the codes shrink, which may round.
inline constexpr unsigned exact_cast_range = 17;

/// 2^(8 - below) as an E4M3 code.
[[nodiscard]] constexpr std::uint8_t e4m3_power(unsigned below) noexcept {
  const unsigned above_least = below < exact_cast_range ? exact_cast_range - below : 0;
  return static_cast<std::uint8_t>(above_least < 3 ? 1u << above_least : (above_least - 2) << 3);
}
static_assert(e4m3_power(0) == 0x78 && e4m3_power(17) == 1 && e4m3_power(40) == 1);

/// The bytes of two codes, each divided by 2^shift and rounded to nearest, and whether that is exact.
struct shrunk_codes {
  std::array<std::uint8_t, 256> bytes{};
  std::array<bool, 256> is_exact{};

  explicit shrunk_codes(unsigned shift) noexcept {
    const float factor = shift > 8 ? 0x1p-9f : 1.0f / static_cast<float>(1u << shift);
    for (unsigned pair = 0; pair < 256; ++pair) {
      const float low = e2m1::from_bits(static_cast<std::uint8_t>(pair & 15u)).value() * factor;
      const float high = e2m1::from_bits(static_cast<std::uint8_t>(pair >> 4)).value() * factor;
      const e2m1 a = e2m1::encode(low), b = e2m1::encode(high);
      bytes[pair] = static_cast<std::uint8_t>(b.bits << 4 | a.bits);
      is_exact[pair] = a.value() == low && b.value() == high;
    }
  }
};

/// The E8M0 code that a cast makes the least tensor scale for, 2^-126: smaller ones have no inverse.
inline constexpr std::uint8_t least_cast_code = 9;

/// The largest E8M0 code of the blocks of MXFP4 rows that hold a value other than zero and NaN, at least
/// least_cast_code; 0 if there is no such block.
inline std::uint8_t largest_scale_code(const packed_view<any_format>& rows) noexcept {
  const std::size_t bytes = rows.format.block / 2;
  std::uint8_t largest = 0;
  for (std::size_t b = 0; b < rows.scales.size(); ++b) {
    const std::uint8_t code = std::max(rows.scales[b], least_cast_code);
    if (code <= largest || code == e8m0::nan_bits) continue;
    const auto block = rows.codes.subspan(b * bytes, bytes);
    if (std::any_of(block.begin(), block.end(), [](std::uint8_t pair) { return (pair & 0x77) != 0; })) largest = code;
  }
  return largest;
}

/// MXFP4 rows as NVFP4 under the tensor scale 2^(top - 127 - 8), where `top` is largest_scale_code of their matrix; NaN
/// scales become NaN. Returns how many blocks of 32 it had to round.
inline std::size_t cast_rows(const packed_view<any_format>& from, std::uint8_t top,
                             const packed_view<any_format, std::uint8_t>& to) {
  constexpr std::size_t bytes = 16;
  std::size_t rounded = 0;
  for (std::size_t b = 0; b < from.scales.size(); ++b) {
    const std::uint8_t scale = from.scales[b];
    const auto* const in = from.codes.data() + b * bytes;
    auto* const out = to.codes.data() + b * bytes;
    const unsigned below = scale >= top ? 0u : static_cast<unsigned>(top - scale);
    to.scales[2 * b] = to.scales[2 * b + 1] = scale == e8m0::nan_bits ? e4m3::nan_bits : e4m3_power(below);
    if (below <= exact_cast_range) {
      std::copy_n(in, bytes, out);
      continue;
    }
    const shrunk_codes shrunk(below - exact_cast_range);
    bool is_exact = true;
    for (std::size_t i = 0; i < bytes; ++i) {
      out[i] = shrunk.bytes[in[i]];
      is_exact = is_exact && shrunk.is_exact[in[i]];
    }
    rounded += !is_exact;
  }
  return rounded;
}

/// Packed rows that did not come from values: blocks whose scale is NaN become what packing makes of NaN. Returns the
/// first of them where `special` rejects it, or the number of blocks.
inline std::size_t settle_nan_blocks(const packed_view<any_format, std::uint8_t>& rows,
                                     special_values special) noexcept {
  const bool is_e4m3 = rows.format.scale == scale_type::e4m3;
  const std::size_t bytes = rows.format.block / 2;
  for (std::size_t b = 0; b < rows.scales.size(); ++b) {
    if (is_e4m3 ? (rows.scales[b] & 0x7F) != e4m3::nan_bits : rows.scales[b] != e8m0::nan_bits) continue;
    if (special == special_values::reject) return b;
    rows.scales[b] = special == special_values::saturate ? 0 : is_e4m3 ? e4m3::nan_bits : e8m0::nan_bits;
    std::fill_n(rows.codes.data() + b * bytes, bytes, std::uint8_t{0});
  }
  return rows.scales.size();
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
