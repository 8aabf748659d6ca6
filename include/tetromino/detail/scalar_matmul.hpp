#pragma once

#include "../e2m1.hpp"     // e2m1
#include "../e4m3.hpp"     // e4m3
#include "../e8m0.hpp"     // e8m0
#include "../scaling.hpp"  // macro_factor
#include "cpu_matmul.hpp"  // matmul_job, matmul_tile

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

namespace tetromino::detail {

/// The reference backend: one output at a time, one product at a time.
///
/// The order of its sums: products of one block along K (the smaller block of the two sides) from left to right,
/// exactly where both sides are integers; the block's sum times both block scales, added up over a macro block (the
/// smaller of the two sides, or all of K) from left to right; times 1 / f of each side that has a factor, added up from
/// left to right; times both tensor scales. Other backends may add in another order, as long as it is always the same.
struct scalar_matmul_kernels {
  static constexpr std::size_t tile_rows = 64, tile_cols = 64;

  template <class X, real Out>
  static void multiply(const matmul_job<X, Out>& job, const matmul_tile& tile) {
    const any_format blocks = activation_blocks(job.x);
    for (std::size_t m = tile.first_row; m < tile.last_row; ++m) {
      const auto x = activation_row(job.x, m);
      for (std::size_t n = tile.first_col; n < tile.last_col; ++n) {
        const packed_row<const std::uint8_t> w = weight_row(job.weights, tile.matrix, n);
        job.out.row(m)[n] = from_float<Out>(dot(x, blocks, w, job.weights.format, job.weights.cols));
      }
    }
  }

 private:
  static unsigned code(const std::uint8_t* codes, std::size_t k) {
    return k % 2 == 0 ? codes[k / 2] & 15u : codes[k / 2] >> 4;
  }
  static int twice(unsigned code) { return static_cast<int>(2.0f * e2m1{static_cast<std::uint8_t>(code)}.value()); }
  static float scale(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    const std::uint8_t byte = row.scales[k / format.block];
    return format.scale == scale_type::e4m3 ? e4m3{byte}.value() : e8m0{byte}.value();
  }
  static float inverse_factor(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    return format.macro_block == 0 ? 1.0f : 1.0f / macro_factor(row.macros[k / format.macro_block]);
  }

  /// The sum of one block, with all scales except macro factors and tensor scales.
  template <real T>
  static float block_sum(const T* x, const any_format&, const packed_row<const std::uint8_t>& w,
                         const any_format& format, std::size_t first, std::size_t last) {
    float sum = 0;
    for (std::size_t k = first; k < last; ++k)
      sum += to_float(x[k]) * e2m1{static_cast<std::uint8_t>(code(w.codes, k))}.value();
    return sum * scale(w, format, first);
  }
  static float block_sum(const int8_row& x, const any_format&, const packed_row<const std::uint8_t>& w,
                         const any_format& format, std::size_t first, std::size_t last) {
    int sum = 0;
    for (std::size_t k = first; k < last; ++k) sum += x.values[k] * twice(code(w.codes, k));
    return static_cast<float>(sum) * (x.scales[first / int8_view<>::block] * (0.5f * scale(w, format, first)));
  }
  static float block_sum(const packed_row<const std::uint8_t>& x, const any_format& blocks,
                         const packed_row<const std::uint8_t>& w, const any_format& format, std::size_t first,
                         std::size_t last) {
    int sum = 0;
    for (std::size_t k = first; k < last; ++k) sum += twice(code(x.codes, k)) * twice(code(w.codes, k));
    return 0.25f * static_cast<float>(sum) * (scale(x, blocks, first) * scale(w, format, first));
  }

  /// What stays the same for a whole macro block of the activations, and for the whole row.
  template <class Row>
  static float row_factor(const Row&, const any_format&, std::size_t) {
    return 1.0f;
  }
  static float row_factor(const packed_row<const std::uint8_t>& x, const any_format& blocks, std::size_t k) {
    return inverse_factor(x, blocks, k);
  }
  template <class Row>
  static float row_scale(const Row&) {
    return 1.0f;
  }
  static float row_scale(const packed_row<const std::uint8_t>& x) { return x.tensor_scale; }

  template <class Row>
  static float dot(const Row& x, const any_format& blocks, const packed_row<const std::uint8_t>& w,
                   const any_format& format, std::size_t cols) {
    const std::size_t block = common_block(format.block, blocks.block);
    const std::size_t common_macro = common_block(format.macro_block, blocks.macro_block);
    const std::size_t macro = common_macro == 0 ? cols : common_macro;
    float total = 0;
    for (std::size_t begin = 0; begin < cols; begin += macro) {
      const std::size_t end = std::min(cols, begin + macro);
      float sum = 0;
      for (std::size_t k = begin; k < end; k += block) {
        sum += block_sum(x, blocks, w, format, k, std::min(end, k + block));
      }
      total += sum * (inverse_factor(w, format, begin) * row_factor(x, blocks, begin));
    }
    return total * (w.tensor_scale * row_scale(x));
  }
};

}  // namespace tetromino::detail
