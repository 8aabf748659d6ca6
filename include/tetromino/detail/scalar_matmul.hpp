#pragma once

#include "../e2m1.hpp"     // e2m1
#include "../e4m3.hpp"     // e4m3
#include "../e8m0.hpp"     // e8m0
#include "../scaling.hpp"  // macro_factor, fine_factor
#include "cpu_matmul.hpp"  // float_product, integer_product, matmul_tile

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The reference backend: one output at a time, one product at a time.
///
/// The order of its sums, where both sides are integers: products of one block along K (the smaller block of the two
/// sides) exactly; times the product of both sides' scales, each of which is rounded after multiplication by 1 / f
/// where the side has a factor of 8 bits; blocks from left to right; times the product of both tensor scales. With
/// factors of 2 bits the integers are 8 q f, and the side's scale is divided by 4. All backends do so.
///
/// With float, half or bfloat16 activations: products of one block from left to right, times the block's scale, added
/// up over a macro block or all of K from left to right; times 1 / f, added up from left to right; times the tensor
/// scale. A factor of 2 bits is part of the elements. Other backends may add in another order, as long as it is always
/// the same.
struct scalar_matmul_kernels {
  static constexpr std::size_t tile_rows = 64, tile_cols = 64;

  static void multiply(const float_product& product, const matmul_tile& tile) {
    with_type(product.x.type, [&]<real T>() {
      each_output(product, tile, [&](std::size_t m, const packed_row<const std::uint8_t>& w) {
        return dot(product.x.row<T>(m), w, product.weights.format, product.weights.cols);
      });
    });
  }
  static void multiply(const integer_product& product, const matmul_tile& tile) {
    const any_format blocks = product.x.blocks();
    each_output(product, tile, [&](std::size_t m, const packed_row<const std::uint8_t>& w) {
      const weights_view& weights = product.weights;
      return product.x.are_packed ? dot(activation_row(product.x.packed, m), blocks, w, weights.format, weights.cols)
                                  : dot(activation_row(product.x.int8, m), blocks, w, weights.format, weights.cols);
    });
  }

 private:
  /// out[m, n] = of(m, row n of the weights).
  template <class Product, class Of>
  static void each_output(const Product& product, const matmul_tile& tile, const Of& of) {
    const weights_view& weights = product.weights;
    std::vector<std::uint8_t> buffer(row_buffer_size(weights, weights.cols));
    for (std::size_t n = tile.first_col; n < tile.last_col; ++n) {
      const packed_row<const std::uint8_t> w = read_row(weights, tile.matrix, n, 0, weights.cols, buffer.data());
      with_type(product.out.type, [&]<real Out>() {
        for (std::size_t m = tile.first_row; m < tile.last_row; ++m) {
          product.out.template row<Out>(m)[n] = from_float<Out>(of(m, w));
        }
      });
    }
  }

  static unsigned code(const std::uint8_t* codes, std::size_t k) {
    return k % 2 == 0 ? codes[k / 2] & 15u : codes[k / 2] >> 4;
  }
  /// The element of column k over its block's scale, exactly; a factor of 8 bits is left out.
  static float value(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    const float q = e2m1::from_bits(static_cast<std::uint8_t>(code(row.codes, k))).value();
    return format.macro_bits == 8 ? q : q * fine_factor(fine_bits(row.macros, elements_per_factor(format), k));
  }
  static int element(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    return static_cast<int>((format.macro_bits == 8 ? 2.0f : 8.0f) * value(row, format, k));
  }
  static float scale(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    const std::uint8_t byte = row.scales[k / format.block];
    return format.scale == scale_type::e4m3 ? e4m3::from_bits(byte).value() : e8m0::from_bits(byte).value();
  }
  static float inverse_factor(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    if (format.macro_block == 0 || format.macro_bits == 2) return 1.0f;
    return 1.0f / macro_factor(row.macros[k / format.macro_block]);
  }

  /// A block's scale with its macro factor, for integers that are twice the elements without either.
  static float whole_scale(const packed_row<const std::uint8_t>& row, const any_format& format, std::size_t k) {
    return rounded(scale(row, format, k) * (format.macro_bits == 2 ? 0.25f : inverse_factor(row, format, k)));
  }

  template <real T>
  static float dot(const T* x, const packed_row<const std::uint8_t>& w, const any_format& format, std::size_t cols) {
    const std::size_t macro = format.macro_block == 0 ? cols : format.macro_block;
    float total = 0;
    for (std::size_t begin = 0; begin < cols; begin += macro) {
      const std::size_t end = std::min(cols, begin + macro);
      float sum = 0;
      for (std::size_t first = begin; first < end; first += format.block) {
        float products = 0;
        for (std::size_t k = first; k < std::min(end, first + format.block); ++k) {
          products += to_float(x[k]) * value(w, format, k);
        }
        sum += products * scale(w, format, first);
      }
      total += sum * inverse_factor(w, format, begin);
    }
    return total * w.tensor_scale;
  }

  static int element(const int8_row& x, const any_format&, std::size_t k) { return x.values[k]; }
  /// With the halves of the values that are summed as their doubles.
  static float activation_scale(const int8_row& x, const any_format& blocks, std::size_t k) {
    return 0.5f * x.scales[k / blocks.block];
  }
  static float activation_scale(const packed_row<const std::uint8_t>& x, const any_format& blocks, std::size_t k) {
    return 0.25f * whole_scale(x, blocks, k);
  }
  static float tensor_scale(const int8_row&) { return 1.0f; }
  static float tensor_scale(const packed_row<const std::uint8_t>& x) { return x.tensor_scale; }

  template <class Row>
  static float dot(const Row& x, const any_format& blocks, const packed_row<const std::uint8_t>& w,
                   const any_format& format, std::size_t cols) {
    const std::size_t block = common_block(format.block, blocks.block);
    float total = 0;
    for (std::size_t first = 0; first < cols; first += block) {
      int sum = 0;
      for (std::size_t k = first; k < std::min(cols, first + block); ++k) {
        sum += element(x, blocks, k) * element(w, format, k);
      }
      const float scales = whole_scale(w, format, first) * activation_scale(x, blocks, first);
      total += rounded(static_cast<float>(sum) * scales);
    }
    return total * (w.tensor_scale * tensor_scale(x));
  }
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
