#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Products of packed weights and integers: 8-bit activations, or packed ones.

#if TETROMINO_SIMD

#include "../../../e4m3.hpp"     // e4m3
#include "../../../e8m0.hpp"     // e8m0
#include "../../../scaling.hpp"  // macro_factor, fine_bits
#include "../../cpu_matmul.hpp"  // integer_product, matmul_tile
#include "../isa.hpp"            // split_elements, split_codes
#include "panel.hpp"             // element_rows, add_panel, add_row_as_it_lies, row_panels, rows_at_once
#include "tile_sums.hpp"         // tile_sums
#include "tiles.hpp"             // tile_panels

#include <algorithm>  // std::all_of, std::min, std::copy_n, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int8_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Lanes are 16 outputs side by side, so that repacked weights are multiplied as they lie; others are put into that
/// order a piece at a time. The sums are those of scalar_matmul_kernels.
class integer_matmul {
 public:
  static void multiply(const integer_product& product, const matmul_tile& tile) {
    integer_matmul(product, tile).run<words>();
  }

 private:
  integer_matmul(const integer_product& product, const matmul_tile& tile)
      : product_(product),
        tile_(tile),
        blocks_(product.x.blocks()),
        rows_(tile.last_row - tile.first_row),
        common_(common_block(blocks_.block, product.weights.format.block)),
        totals_(tile) {}

  template <class Words>
  void run() {
    if constexpr (multiplies_by_tiles<Words>) {
      if (product_.weights.format.macro_bits == 8 && tile_panels<Words>::pay(rows_, common_)) {
        tile_panels<Words> tiles(common_);
        return add_all<tile_panels<Words>::rows_at_once>(
            [&](const weight_panels& w, std::size_t first, float(*total)[lane_count]) {
              tiles.add(w, x_, first, rows_, total);
            });
      }
    }
    add_all<1>([&](const weight_panels& w, std::size_t first, float(*total)[lane_count]) {
      add_panel(w, common_, x_, first, rows_, total);
    });
  }
  /// Goes along columns and outputs with add(panels, first column, sums), for activations that are laid out for
  /// `RowsAtOnce` rows side by side.
  template <std::size_t RowsAtOnce, class Add>
  void add_all(const Add& add) {
    const weights_view& w = product_.weights;
    const std::size_t room = (rows_ + RowsAtOnce - 1) / RowsAtOnce * RowsAtOnce;
    // As many columns of all rows as there is room for; with one row that is all of them, nearly always.
    const std::size_t depth = element_rows::capacity / room / row_panels::most_cols * row_panels::most_cols;
    for (std::size_t k = 0; k < w.cols; k += depth) {
      const std::size_t used = std::min(depth, w.cols - k);
      x_.stride = (used + 31) / 32 * 32;
      if (room != rows_) {
        std::fill(x_.values + rows_ * x_.stride, x_.values + room * x_.stride, std::int8_t{0});
        std::fill_n(x_.scales, room * x_.stride / 16, 1.0f);
      }
      for (std::size_t m = 0; m < rows_; ++m) load_activations<RowsAtOnce>(m, k, used);
      if (RowsAtOnce > 1 || (shifts_scales_of_many && rows_ >= rows_at_once)) x_.find_codes(room);
      for (std::size_t n = tile_.first_col; n < tile_.last_col; n += lane_count) {
        float(*total)[lane_count] = totals_[n - tile_.first_col];
        if (w.is_repacked) {
          add({w.format, panel_of(w, tile_.matrix, n, k), used, true}, 0, total);
          continue;
        }
        for (std::size_t i = 0; i < used; i += row_panels::most_cols) {
          const std::size_t width = std::min(row_panels::most_cols, used - i);
          row_panels panel(w, tile_.matrix, n, k + i, width);
          if (rows_ == 1 && add_row_as_it_lies(panel, common_, x_, i, total[0])) continue;
          add(panel.columns(), i, total);
        }
      }
    }
    const float scale = w.tensor_scale(tile_.matrix);
    for (std::size_t m = 0; m < rows_; ++m) {
      const integer_rows& x = product_.x;
      const float x_scale = x.are_packed ? activation_row(x.packed, tile_.first_row + m).tensor_scale : 1.0f;
      totals_.store_row(tile_, m, scale * x_scale, product_.out);
    }
  }

  template <std::size_t RowsAtOnce>
  void load_activations(std::size_t m, std::size_t k, std::size_t used) {
    const integer_rows& x = product_.x;
    if (x.are_packed) return load_row<RowsAtOnce>(activation_row(x.packed, tile_.first_row + m), m, k, used);
    load_row<RowsAtOnce>(activation_row(x.int8, tile_.first_row + m), m, k, used);
  }
  template <std::size_t RowsAtOnce, class Row>
  void load_row(const Row& row, std::size_t m, std::size_t k, std::size_t used) {
    std::int8_t* values = x_.values + m * x_.stride;
    std::int32_t* offsets = x_.offsets + m * x_.stride / 16;
    float* scales = x_.scales + m / RowsAtOnce * RowsAtOnce * x_.stride / 16 + m % RowsAtOnce;
    for (std::size_t i = 0; i < used; i += 32, values += 32, offsets += 2, scales += 2 * RowsAtOnce) {
      float &first = scales[0], &second = scales[RowsAtOnce];
      std::int32_t unused[2];
      split(row, k + i, std::min<std::size_t>(32, used - i), values, RowsAtOnce == 1 ? offsets : unused);
      if (RowsAtOnce == 1 && common_ == 32) offsets[0] += offsets[1];
      first = scale_at(row, k + i);
      second = blocks_.block == 32 ? first : i + 16 < used ? scale_at(row, k + i + 16) : 0.0f;
      if (first < least_scale || second < least_scale) drop_scales_of_zeros(values, first, second);
    }
    if (blocks_.macro_bits == 2) apply_factors(row, m, k, RowsAtOnce == 1);
    if (product_.weights.format.macro_bits == 2) {
      const std::size_t begin = m * x_.stride, end = begin + x_.stride;
      for (std::size_t at = begin; at < end; at += 32) {
        store_fine_offsets(x_.values + at, x_.offsets + at / 16, x_.fine_offsets + at / 8);
      }
    }
  }
  /// What its own factors of 2 bits change about row m of values that are there.
  template <class Row>
  TETROMINO_OUTLINE void apply_factors(const Row& row, std::size_t m, std::size_t k, bool has_offsets) {
    for (std::size_t i = 0; i < x_.stride; i += 8) {
      const std::size_t at = m * x_.stride + i;
      std::int8_t* const values = x_.values + at;
      multiply_by_factor(row, std::min(k + i, product_.weights.cols - 1), values);
      if (!has_offsets) continue;
      std::int32_t sum = 0;
      for (std::size_t e = 0; e < 8; ++e) sum += values[e];
      std::int32_t& offset = x_.offsets[at / common_ * common_ / 16];
      offset = -value_bias * sum + (at % common_ == 0 ? 0 : offset);
    }
  }
  /// Eight values by four times their factor.
  void multiply_by_factor(const packed_row<const std::uint8_t>& row, std::size_t column, std::int8_t* values) const {
    const unsigned m = fine_bits(row.macros, elements_per_factor(blocks_), column);
    for (std::size_t e = 0; e < 8; ++e) values[e] = static_cast<std::int8_t>(values[e] * static_cast<int>(4 + m));
  }
  void multiply_by_factor(const int8_row&, std::size_t, std::int8_t*) const {}

  static constexpr float least_scale = 0x1p-100f;
  /// Blocks of zeros have the least scale there is, which is no normal float and slow to multiply with; 1 does as well.
  void drop_scales_of_zeros(const std::int8_t* values, float& first, float& second) const {
    const auto are_zero = [](const std::int8_t* begin, const std::int8_t* end) {
      return std::all_of(begin, end, [](std::int8_t v) { return v == 0; });
    };
    const auto is_tiny = [](float scale) { return 0.0f <= scale && scale < least_scale; };
    const std::size_t block = blocks_.block;
    if (is_tiny(first) && are_zero(values, values + block)) first = 1.0f;
    if (is_tiny(second) && are_zero(values + 32 - block, values + 32)) second = 1.0f;
  }
  /// Up to 32 elements, the rest zero.
  static TETROMINO_INLINE void split(const int8_row& row, std::size_t k, std::size_t n, std::int8_t* values,
                                     std::int32_t* offsets) {
    if (n == 32) return split_elements(row.values + k, values, offsets);
    std::int8_t x[32] = {};
    std::copy_n(row.values + k, n, x);
    split_elements(x, values, offsets);
  }
  static TETROMINO_INLINE void split(const packed_row<const std::uint8_t>& row, std::size_t k, std::size_t n,
                                     std::int8_t* values, std::int32_t* offsets) {
    if (n == 32) return split_codes(row.codes + k / 2, values, offsets);
    std::uint8_t codes[16] = {};
    std::copy_n(row.codes + k / 2, (n + 1) / 2, codes);
    if (n % 2 != 0) codes[n / 2] &= 15;  // past the last element there may be anything
    split_codes(codes, values, offsets);
  }
  TETROMINO_INLINE float scale_at(const int8_row& row, std::size_t k) const {
    return 0.5f * row.scales[k / int8_view<>::block];
  }
  TETROMINO_INLINE float scale_at(const packed_row<const std::uint8_t>& row, std::size_t k) const {
    const std::uint8_t byte = row.scales[k >> (blocks_.block == 32 ? 5 : 4)];
    float scale = blocks_.scale == scale_type::e4m3 ? e4m3::from_bits(byte).value() : e8m0::from_bits(byte).value();
    if (blocks_.macro_bits == 2) {
      scale *= 0.25f;
    } else if (blocks_.macro_block != 0) {
      scale *= 1.0f / macro_factor(row.macros[k / blocks_.macro_block]);
    }
    return 0.25f * scale;
  }

  const integer_product& product_;
  const matmul_tile& tile_;
  any_format blocks_;
  std::size_t rows_;
  std::size_t common_;  // the smaller block of both sides

  tile_sums totals_;
  element_rows x_;
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
