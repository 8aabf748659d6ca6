#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// The sums of one tile of a product, and what becomes of them.

#if TETROMINO_SIMD

#include "../../cpu_matmul.hpp"  // matmul_tile, real_rows, with_type
#include "../isa.hpp"            // broadcast, load, store

#include <algorithm>  // std::copy_n
#include <cstddef>    // std::size_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Row m of the tile has output n in lane n % 16 of sums [n / 16][m]. Fewer rows may have more columns.
class tile_sums {
 public:
  static constexpr std::size_t most_rows = 64, most_cols = 128;

  explicit tile_sums(const matmul_tile& tile) : rows_(tile.last_row - tile.first_row) {
    const std::size_t groups = (tile.last_col - tile.first_col + lane_count - 1) / lane_count;
    for (std::size_t i = 0; i < groups * rows_; ++i) store(sums_[i], broadcast(0.0f));
  }
  /// The sums [rows][16] of outputs n ... n + 15 of the tile.
  float (*operator[](std::size_t n))[lane_count] { return sums_ + n / lane_count * rows_; }

  /// Stores row m, times `scale`.
  void store_row(const matmul_tile& tile, std::size_t m, float scale, const real_rows<void>& out) const {
    with_type(out.type, [&]<real Out>() TETROMINO_INLINE_LAMBDA {
      Out* const row = out.row<Out>(tile.first_row + m) + tile.first_col;
      const std::size_t cols = tile.last_col - tile.first_col;
      for (std::size_t n = 0; n < cols; n += lane_count) {
        Out last[lane_count];
        const bool is_whole = cols - n >= lane_count;
        store(is_whole ? row + n : last, load(sums_[n / lane_count * rows_ + m]) * broadcast(scale));
        if (!is_whole) std::copy_n(last, cols - n, row + n);
      }
    });
  }

 private:
  std::size_t rows_;
  alignas(64) float sums_[most_cols / lane_count * most_rows][lane_count];
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
