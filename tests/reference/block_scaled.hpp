#pragma once

/// Operands of block-scaled tensor cores, from the vendor's documents: where cuBLASLt expects each scale (cuBLAS 13,
/// "1D Block Scaling Factors Layout", the direction from offset to indices), and what the warp's instruction computes
/// from its registers (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k64" and "Block Scaling"). It includes nothing of
/// tetromino.

#include "numbers.hpp"  // e2m1_value, e4m3_value, e8m0_value

#include <array>    // std::array
#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t, std::uint32_t

namespace reference {

/// The row and the block along K whose scale is the byte at `offset` of a matrix with so many scales in a padded row.
struct tiled_scale {
  std::size_t outer;
  std::size_t inner;
};
inline tiled_scale tiled_scale_at(std::size_t offset, std::size_t sf_inner_dim) {
  const std::size_t tile = offset / 512, in_tile = offset % 512;
  // a tile's own offset is (sf_inner + sf_outer * sf_inner_dim) * 128, and it spans 4 scales of 128 rows
  const std::size_t sf_outer = tile * 4 / sf_inner_dim, sf_inner = tile * 4 % sf_inner_dim;
  return {sf_outer * 128 + in_tile % 16 / 4 * 32 + in_tile / 16, sf_inner + in_tile % 4};
}

/// The registers that the 32 lanes of a warp pass to mma.m16n8k64 with block scales.
struct block_scaled_mma {
  std::array<std::array<std::uint32_t, 4>, 32> a{};
  std::array<std::array<std::uint32_t, 2>, 32> b{};
  std::array<std::uint32_t, 32> scale_a{};
  std::array<std::uint32_t, 32> scale_b{};
  bool ue8m0 = false;  ///< two E8M0 scales (scale_vec::2X) from byte `byte_id` on, not four of E4M3 (4X)
  unsigned byte_id = 0;

  /// sums[lane][i] of all lanes, from zero.
  [[nodiscard]] std::array<std::array<double, 4>, 32> sums() const {
    double left[16][64], right[64][8];
    for (std::size_t lane = 0; lane < 32; ++lane) {
      const std::size_t group = lane >> 2, in_group = lane % 4;
      for (std::size_t i = 0; i < 32; ++i) {  // a0 ... a31, eight to a register
        const bool is_upper = i < 8 || (i >= 16 && i < 24);
        const std::size_t row = is_upper ? group : group + 8;
        const std::size_t col = in_group * 8 + (i & 7) + (i < 16 ? 0 : 32);
        left[row][col] = e2m1_value(a[lane][i / 8] >> (i % 8 * 4) & 15u);
      }
      for (std::size_t i = 0; i < 16; ++i) {
        const std::size_t row = in_group * 8 + (i & 7) + (i < 8 ? 0 : 32);
        right[row][group] = e2m1_value(b[lane][i / 8] >> (i % 8 * 4) & 15u);
      }
    }
    const std::size_t block = ue8m0 ? 32 : 16;
    const auto scale = [&](std::uint32_t word, std::size_t k) {
      const auto byte = static_cast<std::uint8_t>(word >> (8 * (byte_id + k / block)));
      return ue8m0 ? e8m0_value(byte) : e4m3_value(byte & 0x7Fu);
    };
    std::array<std::array<double, 4>, 32> out{};
    for (std::size_t lane = 0; lane < 32; ++lane) {
      const std::size_t group = lane >> 2, in_group = lane % 4;
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t row = i < 2 ? group : group + 8, col = in_group * 2 + (i & 1);
        // thread-id 0: the first pair of a quad has the scales of its two rows of A, the first thread that of B
        const std::uint32_t of_row = scale_a[row % 8 * 4 + row / 8], of_col = scale_b[col * 4];
        for (std::size_t k = 0; k < 64; ++k) {
          out[lane][i] += left[row][k] * scale(of_row, k) * right[k][col] * scale(of_col, k);
        }
      }
    }
    return out;
  }
};

}  // namespace reference
