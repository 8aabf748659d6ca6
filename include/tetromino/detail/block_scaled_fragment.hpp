#pragma once

#include "../config.hpp"  // TETROMINO_HD

#include <cstdint>  // std::uint32_t

/// Which lane of a warp holds what in a 16 x 8 x 64 product of 4-bit blocks: words of 8 codes along K, of which a row
/// of 64 columns has 8, and words of the block scales of a row. (PTX ISA 9.0, matrix fragments for mma.m16n8k64, and
/// block scaling with the selectors of byte and thread 0)
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// A place in the 16 x 8 sums.
struct fragment_place {
  std::uint32_t row;
  std::uint32_t col;
};

/// Operand A, 16 rows: four words of a lane.
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t a_fragment_row(std::uint32_t lane, std::uint32_t i) noexcept {
  return lane / 4 + i % 2 * 8;
}
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t a_fragment_word(std::uint32_t lane, std::uint32_t i) noexcept {
  return lane % 4 + i / 2 * 4;
}
/// Operand B, 8 columns, which are rows of the transposed operand: two words of a lane.
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t b_fragment_row(std::uint32_t lane) noexcept { return lane / 4; }
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t b_fragment_word(std::uint32_t lane, std::uint32_t i) noexcept {
  return lane % 4 + i * 4;
}
/// The row whose scales a lane brings: of A two lanes of four, of B one; the others are not read.
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t a_scale_row(std::uint32_t lane) noexcept {
  return lane / 4 + lane % 2 * 8;
}
[[nodiscard]] TETROMINO_HD constexpr std::uint32_t b_scale_row(std::uint32_t lane) noexcept { return lane / 4; }

/// The sums, four of a lane.
[[nodiscard]] TETROMINO_HD constexpr fragment_place sum_fragment(std::uint32_t lane, std::uint32_t i) noexcept {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
