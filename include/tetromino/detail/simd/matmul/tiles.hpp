#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Products of panels with many rows of bytes, where the set multiplies tiles of them.

#if TETROMINO_SIMD

#include "../isa.hpp"  // multiplies_by_tiles, load, store, multiply_add
#include "panel.hpp"   // weight_panels, panel_walk, element_rows, with_blocks

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int8_t, std::int32_t
#include <utility>    // std::declval

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Adds the products of panels with 16 rows of activations at a time. Weights are decoded once for all rows, a piece at
/// a time; the tiles' sums of one block are exact, and get their scales from vectors while tiles multiply the next.
template <class Words>
class tile_panels {
  using tiles = decltype(tiles_of(std::declval<const Words&>()));

 public:
  static constexpr std::size_t rows_at_once = 16;

  /// Whether so many rows are multiplied faster than by vectors alone. Tiles take as long for fewer rows than 16, and
  /// with blocks of 16 twice as long, of which as much is saved only where weights are decoded once for more rows.
  static bool pay(std::size_t rows, std::size_t common) {
    const std::size_t taken = (rows + rows_at_once - 1) / rows_at_once * rows_at_once;
    const bool gain = common == 32 ? rows >= 14 && 4 * rows >= 3 * taken : rows >= 28 && 8 * rows >= 7 * taken;
    return gain && tiles::are_allowed();
  }

  /// `common` is the smaller block of both sides.
  explicit tile_panels(std::size_t common) : common_(common), tiles_(common) {}

  /// Adds the products of w with columns first ... of rows of activations, which are laid out for tiles, to
  /// total[row][output].
  void add(const weight_panels& w, const element_rows& x, std::size_t first, std::size_t rows,
           float (*total)[lane_count]) {
    with_blocks(w.format, common_, [&]<scale_type Scale, std::size_t Block, std::size_t Common>() {
      panel_walk<Block> panel(w);
      for (std::size_t k = 0; k < w.cols; k += most_cols) {
        const std::size_t panels = (std::min(most_cols, w.cols - k) + 31) / 32;
        const bool fuses = decode<Scale>(panel, w, x, k, panels);
        for (std::size_t m = 0; m < rows; m += rows_at_once) {
          const std::size_t used = std::min(rows_at_once, rows - m);
          fuses ? add_rows<Block, Common, true>(x, m, first + k, panels, used, total + m)
                : add_rows<Block, Common, false>(x, m, first + k, panels, used, total + m);
        }
      }
    });
  }

 private:
  static constexpr std::size_t most_cols = row_panels::most_cols;
  static constexpr std::size_t at_once = 2;  // blocks that tiles multiply while vectors scale as many

  /// Decodes panels from column k on. Whether their scales are powers of two with which a block's sum, times the scale
  /// of a row and rounded, has an exact product that is a normal float; so are the sums, which are below 2^16, times
  /// that scale.
  template <scale_type Scale, std::size_t Block>
  bool decode(panel_walk<Block>& panel, const weight_panels& w, const element_rows& x, std::size_t k,
              std::size_t panels) {
    constexpr std::int32_t sum_bits = 17;
    const bool sums_are_finite = x.last_code >= 127 + sum_bits;  // times any row's scale
    const words first_code = broadcast(x.first_code), last_code = broadcast(x.last_code - sum_bits);
    words misfits = broadcast(0);
    for (std::size_t i = 0; i < panels; ++i) {
      panel.arrive(k + 32 * i);
      if (w.is_repacked) panel.prefetch_ahead();
      repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA {
        const words codes = load(reinterpret_cast<const std::int32_t*>(panel.codes() + 64 * d));
        store_words(values_[8 * i + 2 * d], tiles::values(codes));
        store_words(values_[8 * i + 2 * d + 1], tiles::values(shift_right<4>(codes)));
      });
      repeat<32 / Block>([&](auto b) TETROMINO_INLINE_LAMBDA {
        store(scales_[32 / Block * i + b], panel.template scales<Scale>(b));
        if constexpr (Scale == scale_type::e8m0) {
          const words code = load_bytes(panel.scale_codes(b));
          misfits = misfits | (code - first_code) | (last_code - code);
        }
      });
      panel.leave();
    }
    return Scale == scale_type::e8m0 && w.format.macro_block == 0 && sums_are_finite &&
           !any_at_least(shift_right<31>(misfits) & broadcast(1), 1);
  }

  /// Adds the products of what is decoded with columns k ... of rows m ... m + 15, of which `used` count. Fused, a
  /// block's sum gets the row's scale first, and the weights' in the addition.
  template <std::size_t Block, std::size_t Common, bool Fuses>
  TETROMINO_OUTLINE void add_rows(const element_rows& x, std::size_t m, std::size_t k, std::size_t panels,
                                  std::size_t used, float (*total)[lane_count]) const {
    const std::int8_t* const values = x.values + m * x.stride + k;
    const float* const row_scales = x.scales + m / rows_at_once * x.stride + k;
    const std::size_t blocks = panels * (32 / Common);
    alignas(64) std::int32_t products[2][at_once][rows_at_once][lane_count];
    const auto multiply = [&](std::size_t first) TETROMINO_INLINE_LAMBDA {
      const auto each = [&](const auto& f) TETROMINO_INLINE_LAMBDA {
        repeat<at_once>([&](auto i) TETROMINO_INLINE_LAMBDA {
          if (first + i < blocks) f(i);
        });
      };
      each([&](auto i) TETROMINO_INLINE_LAMBDA {
        tiles::template multiply<i>(values + (first + i) * Common, x.stride, values_[(first + i) * Common / 4]);
      });
      each([&](auto i) TETROMINO_INLINE_LAMBDA { tiles::template store<i>(products[first / at_once % 2][i]); });
    };
    floats sum[rows_at_once];
    repeat<rows_at_once>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = r < used ? load(total[r]) : broadcast(0.0f); });
    multiply(0);
    for (std::size_t first = 0; first < blocks; first += at_once) {
      multiply(first + at_once);
      for (std::size_t b = first; b < std::min(first + at_once, blocks); ++b) {
        const floats scale = load(scales_[b * Common / Block]);
        const float* const of_row = row_scales + b * Common;
        repeat<rows_at_once>([&](auto r) TETROMINO_INLINE_LAMBDA {
          const floats exact = to_floats(load(products[first / at_once % 2][b - first][r]));
          if constexpr (Fuses) {
            sum[r] = multiply_add(rounded(exact * broadcast(of_row[r])), scale, sum[r]);
          } else {
            sum[r] = sum[r] + rounded(exact * (scale * broadcast(of_row[r])));
          }
        });
      }
    }
    repeat<rows_at_once>([&](auto r) TETROMINO_INLINE_LAMBDA {
      if (r < used) store(total[r], sum[r]);
    });
  }

  std::size_t common_;
  [[maybe_unused]] tiles tiles_;
  alignas(64) std::int8_t values_[most_cols / 4][64];     // [columns / 4][output][4], twice their values
  alignas(64) float scales_[most_cols / 16][lane_count];  // [blocks][output]
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
