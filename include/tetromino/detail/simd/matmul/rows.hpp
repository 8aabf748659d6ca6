#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Rows of weights for products that go along rows.

#if TETROMINO_SIMD

#include "../../cpu_matmul.hpp"  // weights_view, weight_row
#include "../../row.hpp"         // packed_row
#include "../isa.hpp"            // sixteen_bytes, low_bytes, prefetch

#include <algorithm>  // std::copy
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
    const std::uint8_t* panel = panel_of(w, matrix, n, k);
    panels_ = panel;
    group_bytes_ = w.repacked_sizes().bytes_per_group(), panel_bytes_ = w.repacked_sizes().bytes_per_panel();
    std::uint8_t scales[most_cols / 16 + 1][lane_count];  // one more than there are, of a panel with one block
    const std::size_t per_panel = repacked_shape::panel / w.format.block;
    for (std::size_t i = 0, b = 0, m = 0; i < used; i += repacked_shape::panel, b += per_panel) {
      const panel_parts<const std::uint8_t> parts = parts_of(w.format, k + i, panel);
      if (parts.macros != nullptr) {
        for (std::size_t l = 0; l < lane_count; ++l) macros_[l][m] = parts.macros[l];
        ++m;
      }
      store_16(scales[b], load_16(parts.scales));
      store_16(scales[b + 1], load_16(parts.scales + lane_count));
      repeat<4>([&](auto l) TETROMINO_INLINE_LAMBDA {
        part_rows(parts.codes + 16 * l, codes_[4 * l] + i / 2, sizeof codes_[0]);
      });
      panel = parts.end();
    }
    const std::size_t blocks = (used + w.format.block - 1) / w.format.block;
    for (std::size_t b = 0; b < blocks; b += 16) part_bytes(scales[b], scales_[0] + b, sizeof scales_[0]);
    for (std::size_t l = 0; l < lane_count; ++l) rows_[l] = {codes_[l], scales_[l], macros_[l], w.tensor_scale(matrix)};
  }
  const packed_row<const std::uint8_t>& operator[](std::size_t l) const { return rows_[l]; }

  /// Asks for what comes `Rows` rows after rows l ... l + Rows - 1 in columns [first, last) of the piece: hardware sees
  /// too many short runs to look ahead by itself. Of repacked weights that is as large a part of the next 16 rows.
  template <std::size_t Rows>
  TETROMINO_INLINE void prefetch_after(std::size_t l, std::size_t first, std::size_t last) const {
    if (panels_ != nullptr) {
      const std::size_t part = (last - first) / repacked_shape::panel * panel_bytes_ / lane_count;
      const std::uint8_t* from = panels_ + first / repacked_shape::panel * panel_bytes_ + part * l;
      for (std::size_t i = 0; i < part * Rows; i += 64) prefetch(from + i, group_bytes_);
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
  std::size_t panel_bytes_ = 0;           // without macro bytes, for which it is not worth asking
  std::uint8_t codes_[lane_count][most_cols / 2], scales_[lane_count][most_cols / 16],
      macros_[lane_count][most_cols / 32];
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
