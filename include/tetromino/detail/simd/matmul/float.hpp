#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Products of packed weights and float, half or bfloat16 activations.

#if TETROMINO_SIMD

#include "../../../scaling.hpp"  // macro_factor
#include "../../cpu_matmul.hpp"  // float_product, matmul_tile
#include "../fine.hpp"           // factors_of_eight
#include "../isa.hpp"            // e2m1_decoder, multiply_add, shifts_scales, sum_each
#include "panel.hpp"             // load_scales
#include "rows.hpp"              // linear_rows
#include "tile_sums.hpp"         // tile_sums

#include <algorithm>  // std::min, std::copy_n, std::fill
#include <array>      // std::array
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <cstring>    // std::memcpy
#include <utility>    // std::index_sequence

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Weights are decoded to float with their scales and macro factors, 16 outputs of 512 columns at a time, and
/// multiplied by all rows of a tile. An output has 16 sums, over two of every 32 columns of a chunk of 512, which are
/// then added up by halves, and chunks from left to right: always in this order.
class float_matmul {
 public:
  static void multiply(const float_product& product, const matmul_tile& tile) {
    if (product.weights.format.macro_bits == 2) return float_matmul(product, tile).run<8>();
    if (product.weights.format.block == 16) return float_matmul(product, tile).run<16>();
    return float_matmul(product, tile).run<32>();
  }

 private:
  static constexpr std::size_t most_rows = tile_sums::most_rows, depth = 512;
  static constexpr std::size_t chunks_at_once = 8;  // of one row
  // Rows and outputs whose sums are kept in registers at once, for most rows and for those that are left over.
  static constexpr std::size_t rows_at_once = registers == 1 ? 4 : 3, outputs_at_once = registers == 1 ? 4 : 2;
  static constexpr std::size_t outputs_of_one_row = registers == 1 ? 8 : 4;

  float_matmul(const float_product& product, const matmul_tile& tile)
      : product_(product),
        weights_(product.weights),
        tile_(tile),
        rows_(tile.last_row - tile.first_row),
        totals_(tile) {}

  template <std::size_t Block>
  void run() {
    const std::size_t cols = weights_.cols;
    for (std::size_t k = rows_ == 1 ? add_one_row<Block>() : 0; k < cols; k += depth) {
      const std::size_t used = std::min(depth, cols - k);
      used_ = (used + 31) / 32 * 32;
      for (std::size_t m = 0; m < rows_; ++m) load_activations(m, k, used, x_[m]);
      for (std::size_t n = tile_.first_col; n < tile_.last_col; n += lane_count) {
        const std::size_t width = std::min(lane_count, tile_.last_col - n);
        rows_of_weights_.read(weights_, tile_.matrix, n, k, used);
        rows_of_weights_.prefetch_after<lane_count>(0, 0, used);
        for (std::size_t l = 0; l < width; ++l) load_weights<Block>(rows_of_weights_[l], used, w_[l]);
        for (std::size_t l = width; l < lane_count; ++l) std::fill(w_[l], w_[l] + used_, 0.0f);
        float(*total)[lane_count] = totals_[n - tile_.first_col];
        std::size_t m = 0;
        for (; m + rows_at_once <= rows_; m += rows_at_once) add<rows_at_once, outputs_at_once>(m, total);
        for (; m < rows_; ++m) add<1, outputs_of_one_row>(m, total);
      }
    }
    const float scale = weights_.tensor_scale(tile_.matrix);
    for (std::size_t m = 0; m < rows_; ++m) totals_.store_row(tile_, m, scale, product_.out);
  }

  /// Where column i of a chunk goes: the order in which codes are decoded.
  static constexpr std::size_t place(std::size_t i) { return i / 32 * 32 + e2m1_decoder::place(i % 32); }

  /// In that order, with zeros up to a multiple of 32.
  void load_activations(std::size_t m, std::size_t k, std::size_t used, float* out) const {
    with_type(product_.x.type, [&]<real T>() TETROMINO_INLINE_LAMBDA {
      const T* x = product_.x.row<T>(tile_.first_row + m) + k;
      for (std::size_t i = 0; i < used; i += 32) {
        T last[32];
        const bool is_whole = used - i >= 32;
        if (!is_whole) std::fill(std::copy_n(x + i, used - i, last), last + 32, T{});
        const floats_pair pair = e2m1_decoder::load_in_place(is_whole ? x + i : last);
        store(out + i, pair.first);
        store(out + i + lane_count, pair.second);
      }
    });
  }

  static constexpr std::array<float, 256> inverse_factors = [] {
    std::array<float, 256> out{};
    for (unsigned byte = 0; byte < 256; ++byte) out[byte] = 1.0f / macro_factor(static_cast<std::uint8_t>(byte));
    return out;
  }();

  /// Those of 2 bits of each byte, the first in the low bits.
  using four_lanes = float __attribute__((vector_size(16)));
  static constexpr std::array<four_lanes, 256> fine_factors = [] {
    std::array<four_lanes, 256> out{};
    for (unsigned byte = 0; byte < 256; ++byte) {
      out[byte] = four_lanes{fine_factor(byte & 3), fine_factor(byte >> 2 & 3), fine_factor(byte >> 4 & 3),
                             fine_factor(byte >> 6)};
    }
    return out;
  }();

  /// Block scales with their macro factors. Where these have 2 bits, each eight elements count as a block.
  template <std::size_t Block>
  void load_block_scales(const packed_row<const std::uint8_t>& row, std::size_t blocks, float* scales) const {
    const any_format& format = weights_.format;
    if constexpr (Block == 8) {
      const std::size_t own = blocks / 4;
      for (std::size_t b = 0; b < own; b += lane_count) {
        alignas(64) float of_blocks[lane_count];
        std::uint8_t padded[lane_count] = {}, bytes[lane_count];
        const bool are_whole = own - b >= lane_count;
        if (!are_whole) std::copy_n(row.scales + b, own - b, padded);
        store(of_blocks, load_scales<scale_type::e8m0>(are_whole ? row.scales + b : padded));
        const std::size_t n = std::min(own - b, lane_count);
        factors_of_eight(row.macros + b * 32 / format.macro_block, format, n, bytes);
        for (std::size_t i = 0; i < n; ++i) {
          const four_lanes factors = fine_factors[bytes[i]] * of_blocks[i];
          std::memcpy(scales + 4 * (b + i), &factors, sizeof factors);
        }
      }
      return;
    }
    for (std::size_t b = 0; b < blocks; b += lane_count) {
      std::uint8_t padded[lane_count] = {};
      const std::uint8_t* bytes = row.scales + b;
      if (blocks - b < lane_count) {
        std::copy_n(bytes, blocks - b, padded);
        bytes = padded;
      }
      store(scales + b, format.scale == scale_type::e4m3 ? load_scales<scale_type::e4m3>(bytes)
                                                         : load_scales<scale_type::e8m0>(bytes));
    }
    if (format.macro_block != 0) {
      const std::size_t each = format.macro_block / Block;
      const std::uint8_t* macro = row.macros;
      if (each == lane_count / 2) {
        for (std::size_t b = 0; b < blocks; b += lane_count, macro += 2) {
          const float last = b + each < blocks ? inverse_factors[macro[1]] : 1.0f;
          store(scales + b, load(scales + b) * broadcast_halves(inverse_factors[macro[0]], last));
        }
        return;
      }
      for (std::size_t b = 0; b < blocks; b += each, ++macro) {
        for (std::size_t i = b; i < b + each; ++i) scales[i] *= inverse_factors[*macro];
      }
    }
  }

  /// The first columns of a row of weights, without the tensor scale.
  template <std::size_t Block>
  void load_weights(const packed_row<const std::uint8_t>& row, std::size_t used, float* out) {
    const std::uint8_t* codes = row.codes;
    const std::size_t blocks = Block == 8 ? (used + 31) / 32 * 4 : (used + Block - 1) / Block;
    alignas(64) float scales[depth / Block] = {};
    load_block_scales<Block>(row, blocks, scales);
    const e2m1_decoder decode;
    const auto decode_32 = [&](const std::uint8_t* from, std::size_t i) TETROMINO_INLINE_LAMBDA {
      const floats_pair w = decode.template scaled<Block>(from, scales + i / Block);
      store(out + i, w.first);
      store(out + i + lane_count, w.second);
    };
    const std::size_t whole = blocks * Block / 32 * 32;
    for (std::size_t i = 0; i < whole; i += 32) decode_32(codes + i / 2, i);
    if (whole < blocks * Block) {
      std::uint8_t padded[16] = {};
      std::copy_n(codes + whole / 2, Block / 2, padded);
      scales[whole / Block + 32 / Block - 1] = 0.0f;
      decode_32(padded, whole);
    }
    for (std::size_t i = used; i < used_; ++i) out[place(i)] = 0.0f;  // codes past the last column may be anything
  }

  /// load_weights and add for one row, without storing weights in between. Returns how many columns it took: all of
  /// them, or all chunks but the last, if that ends with less than 32.
  template <std::size_t Block>
  std::size_t add_one_row() {
    const std::size_t cols = weights_.cols, whole = cols % 32 == 0 ? cols : cols / depth * depth;
    const std::size_t step = weights_.is_repacked ? linear_rows::most_cols : chunks_at_once * depth;
    for (std::size_t k = 0; k < whole; k += step) {
      const std::size_t used = std::min(step, whole - k);
      for (std::size_t i = 0; i < used; i += depth) {
        load_activations(0, k + i, std::min(depth, used - i), x_[i / depth]);
      }
      for (std::size_t n = tile_.first_col; n < tile_.last_col; n += lane_count) {
        rows_of_weights_.read(weights_, tile_.matrix, n, k, used);
        add_chunks<Block>(used, totals_[n - tile_.first_col][0]);
      }
    }
    return whole;
  }
  template <std::size_t Block, class Decoder = e2m1_decoder>
  void add_chunks(std::size_t used, float* total) {
    constexpr std::size_t together = registers == 4 ? 2 : 4;  // rows of weights whose sums are independent
    constexpr std::size_t most = chunks_at_once * depth;
    const Decoder decode;
    alignas(64) float scales[together][most / Block];
    alignas(64) float sums[chunks_at_once][lane_count][lane_count];
    for (std::size_t l = 0; l < lane_count; l += together) {
      const std::uint8_t* codes[together];
      for (std::size_t r = 0; r < together; ++r) codes[r] = rows_of_weights_[l + r].codes;
      const auto add_all = [&](const auto& decode_32) TETROMINO_INLINE_LAMBDA {
        for (std::size_t first = 0; first < used; first += depth) {
          const std::size_t last = std::min(used, first + depth);
          rows_of_weights_.prefetch_after<together>(l, first, last);
          floats sum[together];
          repeat<together>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = broadcast(0.0f); });
          for (std::size_t i = first; i < last; i += 32) {
            const floats even = load(&x_[0][0] + i), odd = load(&x_[0][0] + i + lane_count);
            repeat<together>([&](auto r) TETROMINO_INLINE_LAMBDA {
              const floats_pair w = decode_32(r, i);
              sum[r] = multiply_add(odd, w.second, multiply_add(even, w.first, sum[r]));
            });
          }
          repeat<together>([&](auto r) TETROMINO_INLINE_LAMBDA { store(sums[first / depth][l + r], sum[r]); });
        }
      };
      if constexpr (shifts_scales<Decoder> && Block != 8) {
        alignas(64) std::int32_t shifts[together][most / Block];
        if (load_shifts<Block, together, Decoder>(l, used, shifts)) {
          add_all([&](auto r, std::size_t i) TETROMINO_INLINE_LAMBDA {
            return decode.template shifted<Block>(codes[r] + i / 2, shifts[r] + i / Block);
          });
          continue;
        }
      }
      for (std::size_t r = 0; r < together; ++r) {
        load_block_scales<Block>(rows_of_weights_[l + r], used / Block, scales[r]);
      }
      add_all([&](auto r, std::size_t i) TETROMINO_INLINE_LAMBDA {
        return decode.template scaled<Block>(codes[r] + i / 2, scales[r] + i / Block);
      });
    }
    for (std::size_t c = 0; c * depth < used; ++c) {
      const floats sum = sum_each([&](std::size_t l) TETROMINO_INLINE_LAMBDA { return load(sums[c][l]); });
      store(total, load(total) + sum);
    }
  }

  /// Scales as the decoder's `shifted` takes them; says whether all of them can be.
  template <std::size_t Block, std::size_t Rows, class Decoder>
  bool load_shifts(std::size_t l, std::size_t used, std::int32_t (*shifts)[chunks_at_once * depth / Block]) const {
    const any_format& format = weights_.format;
    if (format.scale != scale_type::e8m0 || format.macro_block != 0) return false;
    words misfits = broadcast(0);
    const std::size_t blocks = used / Block;
    for (std::size_t r = 0; r < Rows; ++r) {
      const std::uint8_t* bytes = rows_of_weights_[l + r].scales;
      std::size_t b = 0;
      for (; b + lane_count <= blocks; b += lane_count) Decoder::scale_shifts(bytes + b, shifts[r] + b, misfits);
      if (b < blocks) {
        std::uint8_t padded[lane_count];
        std::fill(padded, padded + lane_count, std::uint8_t{127});
        std::copy_n(bytes + b, blocks - b, padded);
        Decoder::scale_shifts(padded, shifts[r] + b, misfits);
      }
    }
    return !any_at_least(shift_right<31>(misfits) & broadcast(1), 1);
  }

  /// What the chunk adds to `Rows` rows from m on, `Outputs` outputs at a time.
  template <std::size_t Rows, std::size_t Outputs>
  void add(std::size_t m, float (*total)[lane_count]) const {
    alignas(64) float sums[Rows][lane_count][lane_count];
    for (std::size_t n = 0; n < lane_count; n += Outputs) {
      each_sum<Rows, Outputs>(m, n, sums, std::make_index_sequence<Rows * Outputs>{});
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      const floats sum = sum_each([&](std::size_t n) TETROMINO_INLINE_LAMBDA { return load(sums[r][n]); });
      store(total[m + r], load(total[m + r]) + sum);
    }
  }
  template <std::size_t Rows, std::size_t Outputs, std::size_t... Sum>
  TETROMINO_INLINE void each_sum(std::size_t m, std::size_t n, float (*sums)[lane_count][lane_count],
                                 std::index_sequence<Sum...>) const {
    floats sum[Rows * Outputs];
    ((sum[Sum] = broadcast(0.0f)), ...);
    for (std::size_t k = 0; k < used_; k += lane_count) {
      ((sum[Sum] = multiply_add(load(&x_[m + Sum / Outputs][k]), load(&w_[n + Sum % Outputs][k]), sum[Sum])), ...);
    }
    (store(sums[Sum / Outputs][n + Sum % Outputs], sum[Sum]), ...);
  }

  const float_product& product_;
  const weights_view& weights_;
  const matmul_tile& tile_;
  std::size_t rows_;
  std::size_t used_ = 0;  // columns of this chunk, rounded up to 32

  tile_sums totals_;
  linear_rows rows_of_weights_;
  alignas(64) float w_[lane_count][depth];
  alignas(64) float x_[most_rows][depth];
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
