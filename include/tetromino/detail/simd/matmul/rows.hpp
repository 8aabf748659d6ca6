#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Rows of weights for products that go along rows.

#if TETROMINO_SIMD

#include "../../cpu_matmul.hpp"  // weights_view, weight_row
#include "../../row.hpp"         // packed_row
#include "../isa.hpp"            // sixteen_bytes, low_bytes, prefetch

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// 16 bytes of each of four rows, out of a panel that has four of each of 16 rows side by side.
TETROMINO_INLINE void part_rows(const std::uint8_t* panel, std::uint8_t* out, std::size_t stride) {
  const sixteen_bytes a = load_16(panel), b = load_16(panel + 64), c = load_16(panel + 128), d = load_16(panel + 192);
  const sixteen_bytes ab = low_words(a, b), cd = low_words(c, d), ab_high = high_words(a, b),
                      cd_high = high_words(c, d);
  store_16(out, low_halves(ab, cd));
  store_16(out + stride, high_halves(ab, cd));
  store_16(out + 2 * stride, low_halves(ab_high, cd_high));
  store_16(out + 3 * stride, high_halves(ab_high, cd_high));
}
/// Bytes [16][16], transposed.
inline void part_bytes(const std::uint8_t* in, std::uint8_t* out, std::size_t stride) {
  std::uint8_t mixed[16][16];
  const auto mix = [](const std::uint8_t* from, std::uint8_t* to) {  // four times is what it takes
    for (std::size_t i = 0; i < 8; ++i) {
      const sixteen_bytes a = load_16(from + 16 * i), b = load_16(from + 16 * i + 128);
      store_16(to + 32 * i, low_bytes(a, b));
      store_16(to + 32 * i + 16, high_bytes(a, b));
    }
  };
  std::uint8_t other[16][16];
  mix(in, mixed[0]);
  mix(mixed[0], other[0]);
  mix(other[0], mixed[0]);
  mix(mixed[0], other[0]);
  for (std::size_t i = 0; i < 16; ++i) store_16(out + i * stride, load_16(other[i]));
}

/// Columns of 16 rows of weights as they lie in the linear layout; those of repacked weights are copied, at most
/// `most_cols` of them.
class linear_rows {
 public:
  static constexpr std::size_t most_cols = 1024;

  /// Columns k ... k + used - 1 of rows n ... n + 15, where k is a multiple of every block; rows past the last repeat
  /// it, or are padding.
  void read(const weights_view& w, std::size_t matrix, std::size_t n, std::size_t k, std::size_t used) {
    const std::size_t block = k / w.format.block, macro = w.format.macro_block == 0 ? 0 : k / w.format.macro_block;
    const packed_shape shape = w.shape();
    row_bytes_ = shape.code_bytes_per_row(), row_scales_ = shape.blocks_per_row();
    if (!w.is_repacked) {
      panels_ = nullptr;
      packed_row<const std::uint8_t> row = weight_row(w, matrix, n);
      row.codes += k / 2, row.scales += block, row.macros += macro;
      const std::size_t last = w.rows - 1 - n, row_macros = shape.macros_per_row();
      for (std::size_t l = 0; l < lane_count; ++l) {
        rows_[l] = row;
        if (l < last) row.codes += row_bytes_, row.scales += row_scales_, row.macros += row_macros;
      }
      return;
    }
    constexpr std::size_t group = repacked_shape::group;
    const packed_shape piece{w.format, 1, 1, used};
    const repacked_place from = place_of(w.repacked_sizes(), matrix, n);
    panels_ = w.codes.data() + from.codes + k / 2 * group;
    group_bytes_ = w.repacked_sizes().code_bytes_per_group();
    for (std::size_t i = 0; i < (used + 1) / 2; i += 16) {
      for (std::size_t l = 0; l < lane_count; l += 4) {
        part_rows(panels_ + i * group + 4 * l, codes_[l] + i, sizeof codes_[0]);
      }
    }
    const std::uint8_t* scales = w.scales.data() + from.scales + block * group;
    const std::size_t blocks = piece.scale_bytes(), whole = blocks / 16 * 16;
    for (std::size_t b = 0; b < whole; b += 16) part_bytes(scales + b * group, scales_[0] + b, sizeof scales_[0]);
    for (std::size_t l = 0; l < lane_count; ++l) {
      gather_row(scales + whole * group + l, blocks - whole, scales_[l] + whole);
      if (w.format.macro_block != 0) {
        gather_row(w.macros.data() + from.macros + macro * group + l, piece.macro_bytes(), macros_[l]);
      }
      rows_[l] = {codes_[l], scales_[l], macros_[l], w.tensor_scale(matrix)};
    }
  }
  const packed_row<const std::uint8_t>& operator[](std::size_t l) const { return rows_[l]; }

  /// Asks for what comes `Rows` rows after rows l ... l + Rows - 1 in columns [first, last) of the piece: hardware sees
  /// too many short runs to look ahead by itself. Of repacked weights that is as large a part of the next 16 rows.
  template <std::size_t Rows>
  TETROMINO_INLINE void prefetch_after(std::size_t l, std::size_t first, std::size_t last) const {
    if (panels_ != nullptr) {
      const std::uint8_t* from = panels_ + first / 2 * lane_count + (last - first) / 2 * l;
      for (std::size_t i = 0; i < (last - first) / 2 * Rows; i += 64) prefetch(from + i, group_bytes_);
      return;
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      const std::uint8_t* codes = rows_[l + r].codes + first / 2;
      if (constexpr std::size_t usual = 512; last - first == usual) {
        repeat<usual / 128>([&](auto i) TETROMINO_INLINE_LAMBDA { prefetch(codes + 64 * i, Rows * row_bytes_); });
      } else {
        for (std::size_t i = 0; i < (last - first) / 2; i += 64) prefetch(codes + i, Rows * row_bytes_);
      }
      if (first == 0) prefetch(rows_[l + r].scales, Rows * row_scales_);
    }
  }

 private:
  packed_row<const std::uint8_t> rows_[lane_count];
  std::size_t row_bytes_ = 0, row_scales_ = 0;
  const std::uint8_t* panels_ = nullptr;  // of repacked weights
  std::size_t group_bytes_ = 0;           // the next 16 rows' panels are this far away
  std::uint8_t codes_[lane_count][most_cols / 2], scales_[lane_count][most_cols / 16],
      macros_[lane_count][most_cols / 32];
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
