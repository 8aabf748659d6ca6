#pragma once

#include "simd_float_matmul.hpp"    // float_matmul
#include "simd_integer_matmul.hpp"  // integer_matmul
#include "simd_lanes.hpp"           // floats

#include <algorithm>    // std::min
#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <type_traits>  // std::is_same_v, std::remove_const_t

TETROMINO_VECTOR_CODE_BEGIN

namespace tetromino::detail {
inline namespace TETROMINO_ISA {

/// Matrix products on vectors; see float_matmul and integer_matmul.
struct simd_matmul_kernels {
  static constexpr std::size_t tile_rows = 63, tile_cols = 128;

  template <class X, real Out>
  static void multiply(const matmul_job<X, Out>& job, const matmul_tile& tile) {
    using activations = std::remove_const_t<X>;
    constexpr bool are_integers =
        std::is_same_v<activations, int8_view<>> || std::is_same_v<activations, packed_view<any_format>>;
    if constexpr (!are_integers) {
      float_matmul<std::remove_const_t<std::remove_pointer_t<decltype(job.x.data)>>, Out>::multiply(job, tile);
    } else {
#if TETROMINO_VECTOR_BITS >= 256
      integer_matmul<X, Out>::multiply(job, tile);
#else
      multiply_decoded(job, tile);
#endif
    }
  }

 private:
#if TETROMINO_VECTOR_BITS < 256
  /// Integers without integer products: lanes are 16 outputs side by side, and both operands are decoded to float, a
  /// piece at a time, the weights transposed, so that every output adds its products from left to right over a macro
  /// block (or over 256 columns where there is none), however many rows are computed together.
  template <class X, real Out>
  static void multiply_decoded(const matmul_job<X, Out>& job, const matmul_tile& tile) {
    const any_format format = job.weights.format, blocks = activation_blocks(job.x);
    const std::size_t cols = job.weights.cols, rows = tile.last_row - tile.first_row;
    const std::size_t common_macro = common_block(format.macro_block, blocks.macro_block);
    const std::size_t macro = common_macro == 0 ? depth : common_macro;
    alignas(64) float x[tile_rows * depth], w[depth * lane_count],
        totals[tile_cols / lane_count][tile_rows][lane_count] = {};
    float factors[tile_rows] = {}, weight_factors[lane_count];
    const std::size_t padded = (rows + together - 1) / together * together;
    std::fill(x + rows * depth, x + padded * depth, 0.0f);
    for (std::size_t k = 0; k < cols; k += depth) {
      const std::size_t used = std::min(depth, cols - k);
      for (std::size_t m = 0; m < rows; ++m) {
        decode(activation_row(job.x, tile.first_row + m), blocks, k, used, 1, x + m * depth);
      }
      for (std::size_t n = tile.first_col; n < tile.last_col; n += lane_count) {
        auto* total = totals[(n - tile.first_col) / lane_count];
        const std::size_t width = std::min(lane_count, tile.last_col - n);
        if (width < lane_count) std::fill(w, w + used * lane_count, 0.0f);
        for (std::size_t l = 0; l < width; ++l) {
          decode(weight_row(job.weights, tile.matrix, n + l), format, k, used, lane_count, w + l);
        }
        for (std::size_t s = 0; s < used; s += macro) {
          const std::size_t size = std::min(macro, used - s);
          for (std::size_t m = 0; m < rows; ++m) {
            factors[m] = inverse_factor(activation_row(job.x, tile.first_row + m), blocks, k + s);
          }
          for (std::size_t l = 0; l < lane_count; ++l) {
            weight_factors[l] =
                l < width ? inverse_factor(weight_row(job.weights, tile.matrix, n + l), format, k + s) : 0.0f;
          }
          for (std::size_t m = 0; m < rows; m += together) {
            add(x + m * depth + s, w + s * lane_count, size, factors + m, weight_factors, total + m);
          }
        }
      }
    }
    for (std::size_t m = 0; m < rows; ++m) {
      const float scale =
          tensor_scale(activation_row(job.x, tile.first_row + m)) * job.weights.tensor_scale(tile.matrix);
      Out* out = job.out.row(tile.first_row + m);
      for (std::size_t n = tile.first_col; n < tile.last_col; ++n) {
        const std::size_t i = n - tile.first_col;
        out[n] = from_float<Out>(totals[i / lane_count][m][i % lane_count] * scale);
      }
    }
  }

  static constexpr std::size_t together = registers == 1 ? 9 : 3;  // rows that share a load; divides tile_rows
  static constexpr std::size_t depth = 256;  // columns decoded at a time: a multiple of every macro block

  /// Both values of a byte of codes.
  static constexpr std::array<std::array<float, 2>, 256> pairs = [] {
    std::array<std::array<float, 2>, 256> out{};
    for (unsigned byte = 0; byte < 256; ++byte) {
      out[byte] = {e2m1{static_cast<std::uint8_t>(byte & 15)}.value(),
                   e2m1{static_cast<std::uint8_t>(byte >> 4)}.value()};
    }
    return out;
  }();

  /// Writes elements k … k + n − 1 of a row, without macro factors and tensor scale, `step` floats apart.
  static void decode(const int8_row& row, const any_format&, std::size_t k, std::size_t n, std::size_t step,
                     float* out) {
    for (std::size_t i = 0; i < n; ++i) {
      out[i * step] = static_cast<float>(row.values[k + i]) * row.scales[(k + i) / int8_view<>::block];
    }
  }
  static void decode(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k, std::size_t n,
                     std::size_t step, float* out) {
    for (std::size_t b = 0; b < n; b += format.block) {
      const std::uint8_t byte = row.scales[(k + b) / format.block];
      const float scale = format.scale == scale_type::e4m3 ? e4m3{byte}.value() : e8m0{byte}.value();
      const std::size_t used = std::min(format.block, n - b);
      const std::uint8_t* codes = row.codes + (k + b) / 2;
      float* to = out + b * step;
      for (std::size_t i = 0; i + 1 < used; i += 2) {
        const auto& pair = pairs[codes[i / 2]];
        to[i * step] = pair[0] * scale;
        to[(i + 1) * step] = pair[1] * scale;
      }
      if (used % 2 != 0) to[(used - 1) * step] = pairs[codes[used / 2]][0] * scale;
    }
  }

  template <class Row>
  static float inverse_factor(const Row& row, const any_format& format, std::size_t k) {
    if constexpr (std::is_same_v<Row, packed_row<const std::uint8_t>>) {
      if (format.macro_block != 0) return 1.0f / macro_factor(row.macros[k / format.macro_block]);
    }
    return 1.0f;
  }
  template <class Row>
  static float tensor_scale(const Row& row) {
    if constexpr (std::is_same_v<Row, packed_row<const std::uint8_t>>) return row.tensor_scale;
    return 1.0f;
  }

  /// total[r][l] += factors[r] * weight_factors[l] * Σ_k x[r, k] * w[k, l] for `together` rows.
  static void add(const float* x, const float* w, std::size_t size, const float* factors, const float* weight_factors,
                  float (*total)[lane_count]) {
    floats sum[together];
    for (floats& f : sum) f = broadcast(0.0f);
    for (std::size_t k = 0; k < size; ++k) {
      const floats right = load(w + k * lane_count);
      for (std::size_t r = 0; r < together; ++r) sum[r] = sum[r] + broadcast(x[r * depth + k]) * right;
    }
    for (std::size_t r = 0; r < together; ++r) {
      store(total[r], load(total[r]) + sum[r] * (load(weight_factors) * broadcast(factors[r])));
    }
  }
#endif
};

}  // namespace TETROMINO_ISA
}  // namespace tetromino::detail

TETROMINO_VECTOR_CODE_END
