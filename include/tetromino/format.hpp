#pragma once

#include "detail/macros_off.hpp"

#include "e2m1.hpp"  // e2m1
#include "e4m3.hpp"  // e4m3
#include "e8m0.hpp"  // e8m0

#include <concepts>  // std::convertible_to
#include <cstddef>   // std::size_t
#include <cstdint>   // std::uint8_t

namespace TETROMINO_NAMESPACE {

/// The number format of a block's scale.
enum class scale_type : std::uint8_t {
  e8m0,  ///< a power of two (MX formats)
  e4m3,  ///< FP8, on top of one float per tensor (NVFP4)
};

/// A 4-bit block format: E2M1 elements, `block` of them along K sharing one scale of type `scale`, and optionally one
/// byte of factors for every `macro_block` elements (0: none): one factor of 8 bits, or four of 2 bits for a quarter of
/// them each, as `macro_bits` says. The members are constants, or variables in any_format.
template <class Format>
concept block_format = requires(const Format& format) {
  { format.scale } -> std::convertible_to<scale_type>;
  { format.block } -> std::convertible_to<std::size_t>;
  { format.macro_block } -> std::convertible_to<std::size_t>;
  { format.macro_bits } -> std::convertible_to<std::uint8_t>;
};

/// MXFP4: E2M1 elements under an E8M0 scale. Block 32 is the OCP standard; 16 halves the block for 0.25 bits.
/// (OCP MX v1.0, sec. 5.3.3)
template <std::size_t Block = 32>
struct mx {
  static_assert(Block == 16 || Block == 32, "MXFP4 has blocks of 16 or 32 elements");
  static constexpr scale_type scale = scale_type::e8m0;
  static constexpr std::size_t block = Block;
  static constexpr std::size_t macro_block = 0;
  static constexpr std::uint8_t macro_bits = 8;
};
using mxfp4 = mx<32>;
using mxfp4_16 = mx<16>;

/// NVFP4: E2M1 elements in blocks of 16 under an E4M3 scale, on top of one float scale per tensor. (NVIDIA)
struct nvfp4 {
  static constexpr scale_type scale = scale_type::e4m3;
  static constexpr std::size_t block = 16;
  static constexpr std::size_t macro_block = 0;
  static constexpr std::uint8_t macro_bits = 8;
};

/// An MX format with macro-block scaling: every `Macro` elements along K share a factor f of `Bits` bits m, next to the
/// scales 2^E of their blocks.
/// - 8 bits: f = 1 + m / 256 for 32 to 256 elements, which decode to q / f * 2^E. (arXiv 2603.08713, sec. 4.3)
/// - 2 bits: f = 1 + m / 4 for 8 or 16 elements, which decode to q * f * 2^E: q f is exact in bfloat16, and 8 q f in a
///   signed byte. Four factors share a byte, the first in its low bits. On top of mx<32>: with blocks of 16 the same
///   bits buy more as factors of 8 bits. (arXiv 2601.19213)
template <class Mx, std::size_t Macro = 128, std::uint8_t Bits = 8>
struct mbs {
  static_assert(Mx::scale == scale_type::e8m0 && Mx::macro_block == 0,
                "macro-block scaling goes on top of mx<16> or mx<32>");
  static_assert(Bits == 8 || Bits == 2, "a factor has 8 or 2 bits");
  static_assert(Bits != 8 || Macro == 32 || Macro == 64 || Macro == 128 || Macro == 256,
                "a macro block has 32, 64, 128 or 256 elements");
  static_assert(Bits != 2 || ((Macro == 8 || Macro == 16) && Mx::block == 32),
                "a factor of 2 bits has 8 or 16 elements, in blocks of 32");
  static constexpr scale_type scale = Mx::scale;
  static constexpr std::size_t block = Mx::block;
  static constexpr std::size_t macro_block = Macro * 8 / Bits;
  static constexpr std::uint8_t macro_bits = Bits;
};

/// A format chosen at run time, with the same members as the format types; each of them converts to it.
struct any_format {
  scale_type scale = scale_type::e8m0;
  std::uint8_t macro_bits = 8;
  std::size_t block = 32;
  std::size_t macro_block = 0;

  TETROMINO_ABI constexpr any_format() = default;
  TETROMINO_ABI constexpr any_format(scale_type scale_, std::size_t block_, std::size_t macro_block_,
                                     std::uint8_t macro_bits_ = 8) noexcept
      : scale(scale_), macro_bits(macro_bits_), block(block_), macro_block(macro_block_) {}
  template <block_format Format>
    requires(!std::same_as<Format, any_format>)
  TETROMINO_ABI constexpr any_format(const Format& format) noexcept
      : scale(format.scale), macro_bits(format.macro_bits), block(format.block), macro_block(format.macro_block) {}

  friend TETROMINO_ABI constexpr bool operator==(const any_format&, const any_format&) = default;
};

inline namespace TETROMINO_ISA {

/// Bits that a weight takes: 4, its share of the block scale and of the byte of factors (the tensor scale of NVFP4, one
/// float for a whole tensor, is not counted).
[[nodiscard]] constexpr double bits_per_weight(const any_format& format) noexcept {
  return 4.0 + 8.0 / static_cast<double>(format.block) +
         (format.macro_block == 0 ? 0.0 : 8.0 / static_cast<double>(format.macro_block));
}

/// Elements that share a factor; 0 where there are none.
[[nodiscard]] constexpr std::size_t elements_per_factor(const any_format& format) noexcept {
  return format.macro_block * format.macro_bits / 8;
}

}  // namespace TETROMINO_ISA

static_assert(bits_per_weight(mxfp4{}) == 4.25 && bits_per_weight(nvfp4{}) == 4.5);
static_assert(bits_per_weight(mbs<mxfp4_16>{}) == 4.5625);
static_assert(bits_per_weight(mbs<mxfp4, 16, 2>{}) == 4.375 && bits_per_weight(mbs<mxfp4, 8, 2>{}) == 4.5);
static_assert(elements_per_factor(mbs<mxfp4, 16, 2>{}) == 16 && elements_per_factor(mbs<mxfp4>{}) == 128);

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
