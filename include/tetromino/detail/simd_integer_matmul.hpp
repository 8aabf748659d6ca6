#pragma once

#include "../config.hpp"  // TETROMINO_SIMD, TETROMINO_VECTOR_BITS

/// Products of packed weights and integers: 8-bit activations, or packed ones.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS >= 256

#include "../e2m1.hpp"         // e2m1
#include "cpu_matmul.hpp"      // matmul_job, matmul_tile, activation_row
#include "simd_blocks.hpp"     // load_columns, biased_values, add_products
#include "simd_scales.hpp"     // decode_e8m0, decode_e4m3
#include "simd_x86_bytes.hpp"  // split_elements, store_elements

#include <algorithm>  // std::min, std::copy_n, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int8_t
#include <cstring>    // std::memcpy

TETROMINO_VECTOR_CODE_BEGIN

namespace tetromino::detail {
inline namespace TETROMINO_ISA {

/// Lanes are 16 outputs side by side. Weights are decoded once for all rows of a tile, to bytes 12 + 2 w, four along K
/// in a lane; sums over a block are exact, and 12 Σ x is taken off them. A block's sum times both scales is added up
/// over a macro block, or over 16 blocks of weights where there is none, then times both factors: always in this order.
template <class X, real Out>
class integer_matmul {
 public:
  static void multiply(const matmul_job<X, Out>& job, const matmul_tile& tile) {
    const any_format format = job.weights.format;
    if (format.block == 16) return integer_matmul<X, Out>(job, tile).template run<16>();
    return integer_matmul<X, Out>(job, tile).template run<32>();
  }

 private:
  static constexpr std::size_t most_rows = 64, most_cols = 128, depth = 512;

  integer_matmul(const matmul_job<X, Out>& job, const matmul_tile& tile)
      : job_(job), tile_(tile), blocks_(activation_blocks(job.x)), rows_(tile.last_row - tile.first_row) {}

  template <std::size_t Block>
  void run() {
    constexpr std::size_t chunk = Block * lane_count;
    const std::size_t cols = job_.weights.cols;
    float totals[most_cols / lane_count][most_rows][lane_count];
    for (auto& total : totals) std::fill(&total[0][0], &total[0][0] + rows_ * lane_count, 0.0f);
    for (std::size_t k = 0; k < cols; k += chunk) {
      const std::size_t used = std::min(chunk, cols - k);
      used_ = (used + 31) / 32 * 32;
      for (std::size_t m = 0; m < rows_; ++m) load_activations(m, k, used);
      for (std::size_t n = tile_.first_col; n < tile_.last_col; n += lane_count) {
        load_weights<Block>(n, k, used);
        auto* total = totals[(n - tile_.first_col) / lane_count];
        for (std::size_t m = 0; m < rows_; ++m) store(total[m], load(total[m]) + products<Block>(m));
      }
    }
    const float weight_scale = job_.weights.tensor_scale(tile_.matrix);
    for (std::size_t m = 0; m < rows_; ++m) {
      const float scale = tensor_scale(activation_row(job_.x, tile_.first_row + m)) * weight_scale;
      Out* out = job_.out.row(tile_.first_row + m);
      for (std::size_t n = tile_.first_col; n < tile_.last_col; ++n) {
        const std::size_t i = n - tile_.first_col;
        out[n] = from_float<Out>(totals[i / lane_count][m][i % lane_count] * scale);
      }
    }
  }

  // Activations
  // ---------------------------------------------------------------------------------------------------------

  static float tensor_scale(const int8_row&) { return 1.0f; }
  static float tensor_scale(const packed_row<const std::uint8_t>& row) { return row.tensor_scale; }

  void load_activations(std::size_t m, std::size_t k, std::size_t used) {
    const auto row = activation_row(job_.x, tile_.first_row + m);
    for (std::size_t i = 0; i < used_; i += 32) {
      store_elements(elements(row, k + i, std::min<std::size_t>(32, used - i)), &x_[m][i], &offset_[m][i / 16]);
      for (std::size_t j = i; j < i + 32; j += 16) {
        scale_[m][j / 16] = j < used ? scale_at(row, k + j) : 0.0f;
        factor_[m][j / 16] = j < used ? inverse_factor(row, k + j) : 1.0f;
      }
    }
  }
  /// Up to 32 elements, the rest zero.
  static auto elements(const int8_row& row, std::size_t k, std::size_t n) {
    if (n == 32) return split_elements(row.values + k);
    std::int8_t x[32] = {};
    std::copy_n(row.values + k, n, x);
    return split_elements(x);
  }
  static auto elements(const packed_row<const std::uint8_t>& row, std::size_t k, std::size_t n) {
    if (n == 32) return split_codes(row.codes + k / 2);
    std::uint8_t codes[16] = {};
    std::copy_n(row.codes + k / 2, (n + 1) / 2, codes);
    if (n % 2 != 0) codes[n / 2] &= 15;  // past the last element there may be anything
    return split_codes(codes);
  }
  float scale_at(const int8_row& row, std::size_t k) const { return 0.5f * row.scales[k / int8_view<>::block]; }
  float scale_at(const packed_row<const std::uint8_t>& row, std::size_t k) const {
    const std::uint8_t byte = row.scales[k / blocks_.block];
    return 0.25f * (blocks_.scale == scale_type::e4m3 ? e4m3{byte}.value() : e8m0{byte}.value());
  }
  float inverse_factor(const int8_row&, std::size_t) const { return 1.0f; }
  float inverse_factor(const packed_row<const std::uint8_t>& row, std::size_t k) const {
    return blocks_.macro_block == 0 ? 1.0f : 1.0f / macro_factor(row.macros[k / blocks_.macro_block]);
  }

  // Weights
  // -------------------------------------------------------------------------------------------------------------

  template <std::size_t Block>
  void load_weights(std::size_t n, std::size_t k, std::size_t used) {
    const any_format& format = job_.weights.format;
    const auto& weights = job_.weights;
    const std::size_t last = weights.rows - 1, blocks = (used + Block - 1) / Block;
    const std::size_t row_bytes = weights.shape().code_bytes_per_row();
    const std::uint8_t *codes[lane_count], *scales[lane_count];
    for (std::size_t l = 0; l < lane_count; ++l) {  // lanes past the last output repeat it
      const auto row = weight_row(weights, tile_.matrix, std::min(n + l, last));
      codes[l] = row.codes + k / 2;
      scales[l] = row.scales + k / Block;
      // The next lanes' rows: hardware sees too many short runs to look ahead by itself.
      for (std::size_t i = 0; i < used / 2; i += 64) prefetch(codes[l] + i, lane_count * row_bytes);
      prefetch(scales[l], lane_count * weights.shape().blocks_per_row());
    }
    for (std::size_t i = 0; format.macro_block != 0 && i < used; i += format.macro_block) {
      std::int32_t byte[lane_count];
      for (std::size_t l = 0; l < lane_count; ++l) {
        byte[l] = weight_row(weights, tile_.matrix, std::min(n + l, last)).macros[(k + i) / format.macro_block];
      }
      store(weight_factor_[i / 32], broadcast(1.0f) / macro_factors(load(byte)));
    }
    const std::size_t whole = blocks * Block / 32 * 32;
    for (std::size_t i = 0; i < whole; i += 32) store_codes(codes, i / 2, i);
    std::uint8_t padded[lane_count][16];
    const std::uint8_t* ends[lane_count];
    for (std::size_t l = 0; l < lane_count; ++l) ends[l] = padded[l];
    if (whole < blocks * Block) {
      pad(codes, whole / 2, Block / 2, padded);
      store_codes(ends, 0, whole);
    }
    if (blocks < lane_count) pad(scales, 0, blocks, padded);
    const byte_columns bytes = load_columns(blocks < lane_count ? ends : scales, 0);
    for (std::size_t d = 0; d * 4 < blocks; ++d) {
      const auto decoded = [&](const words& byte) TETROMINO_INLINE_LAMBDA {
        const words low = byte & broadcast(0xFF);
        return format.scale == scale_type::e4m3 ? decode_e4m3(low) : decode_e8m0(low);
      };
      store(weight_scale_[4 * d], decoded(bytes.part[d]));
      store(weight_scale_[4 * d + 1], decoded(shift_right<8>(bytes.part[d])));
      store(weight_scale_[4 * d + 2], decoded(shift_right<16>(bytes.part[d])));
      store(weight_scale_[4 * d + 3], decoded(shift_right<24>(bytes.part[d])));
    }
  }
  static void pad(const std::uint8_t* const* rows, std::size_t offset, std::size_t n, std::uint8_t (*out)[16]) {
    for (std::size_t l = 0; l < lane_count; ++l) {
      std::copy_n(rows[l] + offset, n, out[l]);
      std::fill(out[l] + n, out[l] + 16, std::uint8_t{0});
    }
  }
  /// Decodes 32 elements of each row, which are elements k ... k + 31 of the chunk.
  TETROMINO_INLINE void store_codes(const std::uint8_t* const* rows, std::size_t offset, std::size_t k) {
    const byte_columns pairs = load_columns(rows, offset);
    for (std::size_t d = 0; d < 4; ++d) {
      store(w_[k / 4 + 2 * d], biased_values(pairs.part[d]));
      store(w_[k / 4 + 2 * d + 1], biased_values(shift_right<4>(pairs.part[d])));
    }
  }

  // Products
  // ------------------------------------------------------------------------------------------------------------

  /// What the chunk adds to row m.
  template <std::size_t Block>
  floats products(std::size_t m) const {
    if (Block == 32 && blocks_.block == 32) return products<32, 32>(m);
    return products<Block, 16>(m);
  }
  template <std::size_t Block, std::size_t Common>
  TETROMINO_INLINE floats products(std::size_t m) const {
    const std::size_t macro = common_block(job_.weights.format.macro_block, blocks_.macro_block);
    const std::size_t step = macro == 0 ? used_ : macro;
    floats total = broadcast(0.0f);
    for (std::size_t begin = 0; begin < used_; begin += step) {
      floats sum = broadcast(0.0f);
      for (std::size_t k = begin; k < std::min(used_, begin + step); k += Common) {
        words products = broadcast(offset_[m][k / 16] + (Common == 32 ? offset_[m][k / 16 + 1] : 0));
        for (std::size_t i = 0; i < Common; i += 4) {
          std::int32_t x;
          std::memcpy(&x, &x_[m][k + i], sizeof x);
          products = add_products(products, load(w_[(k + i) / 4]), x);
        }
        const floats scale = load(weight_scale_[k / Block]) * broadcast(scale_[m][k / 16]);
        sum = sum + rounded(to_floats(products) * scale);
      }
      if (macro != 0) {
        floats factor = broadcast(factor_[m][begin / 16]);
        const std::size_t weight_macro = job_.weights.format.macro_block;
        if (weight_macro != 0) factor = factor * load(weight_factor_[begin / weight_macro * weight_macro / 32]);
        sum = sum * factor;
      }
      total = total + rounded(sum);
    }
    return total;
  }

  const matmul_job<X, Out>& job_;
  const matmul_tile& tile_;
  any_format blocks_;
  std::size_t rows_;
  std::size_t used_ = 0;  // columns of this chunk, rounded up to 32

  alignas(64) std::int32_t w_[depth / 4][lane_count];
  alignas(64) float weight_scale_[lane_count][lane_count];
  alignas(64) float weight_factor_[depth / 32][lane_count];
  std::int8_t x_[most_rows][depth];
  std::int32_t offset_[most_rows][depth / 16];
  float scale_[most_rows][depth / 16];
  float factor_[most_rows][depth / 16];
};

}  // namespace TETROMINO_ISA
}  // namespace tetromino::detail

TETROMINO_VECTOR_CODE_END

#endif
