#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Products of packed weights and bfloat16 activations where the set sums pairs of these.

#if TETROMINO_SIMD

#include "../../../float16.hpp"  // bfloat16
#include "../../cpu_matmul.hpp"  // float_product, matmul_tile
#include "../isa.hpp"            // value_pairs, add_pair, multiply_add
#include "panel.hpp"             // weight_panels, panel_walk, row_panels, with_blocks
#include "tile_sums.hpp"         // tile_sums

#include <algorithm>    // std::min, std::fill
#include <cstddef>      // std::size_t
#include <cstdint>      // std::int32_t, std::uint16_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::integral_constant

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Lanes are 16 outputs side by side, as in integer_matmul. Products of a block are added up from 0 on by pairs of
/// columns: that of the second column first, each by one fused operation which takes denormal numbers, its own outcome
/// included, for 0. Times the block's scale with its factor (rounded), they are added up from left to right, fused;
/// times the tensor scale.
template <class Words>
class bfloat16_matmul {
 public:
  static void multiply(const float_product& product, const matmul_tile& tile) { bfloat16_matmul(product, tile).run(); }

 private:
  static constexpr std::size_t capacity = 32768;

  bfloat16_matmul(const float_product& product, const matmul_tile& tile)
      : product_(product), tile_(tile), rows_(tile.last_row - tile.first_row), totals_(tile) {}

  void run() {
    const weights_view& w = product_.weights;
    const std::size_t depth = capacity / rows_ / row_panels::most_cols * row_panels::most_cols;
    for (std::size_t k = 0; k < w.cols; k += depth) {
      const std::size_t used = std::min(depth, w.cols - k);
      stride_ = (used + 31) / 32 * 32;
      for (std::size_t m = 0; m < rows_; ++m) {
        std::uint16_t* const x = x_ + m * stride_;
        std::memcpy(x, product_.x.row<bfloat16>(tile_.first_row + m) + k, used * sizeof *x);
        std::fill(x + used, x + stride_, std::uint16_t{0});
      }
      for (std::size_t n = tile_.first_col; n < tile_.last_col; n += lane_count) {
        if (w.is_repacked) {
          add_panels({w.format, panel_of(w, tile_.matrix, n, k), used, true}, n, 0);
          continue;
        }
        for (std::size_t i = 0; i < used; i += row_panels::most_cols) {
          row_panels panels(w, tile_.matrix, n, k + i, std::min(row_panels::most_cols, used - i));
          add_panels(panels.columns(), n, i);
        }
      }
    }
    const float scale = w.tensor_scale(tile_.matrix);
    for (std::size_t m = 0; m < rows_; ++m) totals_.store_row(tile_, m, scale, product_.out);
  }

  /// The products with columns `first` ... of all rows.
  void add_panels(const weight_panels& w, std::size_t n, std::size_t first) {
    float(*total)[lane_count] = totals_[n - tile_.first_col];
    with_blocks(w.format, w.format.block, [&]<scale_type Scale, std::size_t Block, std::size_t>() {
      std::size_t m = 0;
      const auto add = [&](auto at_once) {
        for (; m + at_once <= rows_; m += at_once) {
          add_rows<at_once, Scale, Block>(w, x_ + m * stride_ + first, total + m);
        }
      };
      add(std::integral_constant<std::size_t, 8>{});
      add(std::integral_constant<std::size_t, 4>{});
      add(std::integral_constant<std::size_t, 1>{});
    });
  }
  template <std::size_t Rows, scale_type Scale, std::size_t Block>
  void add_rows(const weight_panels& w, const std::uint16_t* x, float (*total)[lane_count]) const {
    panel_walk<Block> panel(w);
    floats sum[Rows];
    repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = load(total[r]); });
    for (std::size_t k = 0; k < w.cols; k += 32) {
      panel.arrive(k);
      const std::uint8_t* const codes = panel.codes();
      if (w.is_repacked) panel.prefetch_ahead();
      for (std::size_t part = 0; part < 32 / Block; ++part) {
        floats products[Rows];
        repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { products[r] = broadcast(0.0f); });
        for (std::size_t column = part * Block; column < (part + 1) * Block; column += 8) {
          const auto pairs = value_pairs(Words(load(reinterpret_cast<const std::int32_t*>(codes + 8 * column))));
          repeat<4>([&](auto j) TETROMINO_INLINE_LAMBDA {
            repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
              products[r] = add_pair(products[r], pairs.pair[j], x + r * stride_ + k + column + 2 * j);
            });
          });
        }
        const floats scale = panel.template scales<Scale>(part);
        repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = multiply_add(products[r], scale, sum[r]); });
      }
      panel.leave();
    }
    repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { store(total[r], sum[r]); });
  }

  const float_product& product_;
  const matmul_tile& tile_;
  std::size_t rows_;
  std::size_t stride_ = 0;  // of rows of x_
  tile_sums totals_;
  alignas(64) std::uint16_t x_[capacity];  // bits, which are left as they are at first
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
