#pragma once

#include "../config.hpp"  // TETROMINO_SIMD

/// Panels: 16 rows of packed weights with their bytes side by side, and their products with rows of bytes.

#if TETROMINO_SIMD

#include "cpu_matmul.hpp"   // weights_view
#include "simd_blocks.hpp"  // load_columns, biased_values, add_products
#include "simd_scales.hpp"  // decode_e8m0, decode_e4m3, macro_factors

#include <algorithm>  // std::min, std::copy_n, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

TETROMINO_VECTOR_CODE_BEGIN

namespace tetromino::detail {
inline namespace TETROMINO_ISA {

/// Columns of 16 rows of weights, as repacked_view has them.
struct weight_panel {
  any_format format;
  const std::uint8_t* codes;
  const std::uint8_t* scales;
  const std::uint8_t* macros;
  std::size_t cols;
  bool is_streamed;  ///< comes from memory, where it goes on
};

/// Rows of activations as bytes; see simd_elements.hpp. Row m begins at m * stride, in units of 16 where there is one
/// number for each of those.
struct element_rows {
  static constexpr std::size_t capacity = 32768;
  std::size_t stride = 0;
  alignas(64) std::int8_t values[capacity];
  std::int32_t offsets[capacity / 16];  ///< for blocks of 32, the first of two is for both
  float scales[capacity / 16];
};

/// Columns k ... k + used - 1 of rows n ... n + 15 of repacked weights.
inline weight_panel panel_of_repacked(const weights_view& w, std::size_t matrix, std::size_t n, std::size_t k,
                                      std::size_t used) {
  const repacked_place at = place_of(w.repacked_sizes(), matrix, n);
  const std::size_t macro = w.format.macro_block == 0 ? 0 : k / w.format.macro_block;
  return {w.format,
          w.codes.data() + at.codes + k / 2 * lane_count,
          w.scales.data() + at.scales + k / w.format.block * lane_count,
          w.macros.data() + at.macros + macro * lane_count,
          used,
          true};
}

/// Room for a panel of 16 blocks of 16 rows.
struct panel_scratch {
  alignas(64) std::uint8_t codes[lane_count * 32 / 2 * lane_count];
  std::uint8_t scales[(lane_count + 1) * lane_count];
  std::uint8_t macros[lane_count * lane_count];
};

/// The first n of 16 bytes of each row, the rest zero.
inline void pad_rows(const std::uint8_t* const* rows, std::size_t offset, std::size_t n, std::uint8_t (*out)[16]) {
  for (std::size_t l = 0; l < lane_count; ++l) {
    std::copy_n(rows[l] + offset, n, out[l]);
    std::fill(out[l] + n, out[l] + 16, std::uint8_t{0});
  }
}
/// The same columns, at most 16 blocks, of rows in the linear layout; rows past the last repeat it.
inline weight_panel panel_of_rows(const weights_view& w, std::size_t matrix, std::size_t n, std::size_t k,
                                  std::size_t used, panel_scratch& out) {
  const any_format format = w.format;
  const packed_shape shape = w.shape();
  const std::size_t blocks = (used + format.block - 1) / format.block, bytes = blocks * format.block / 2;
  const std::size_t row_bytes = shape.code_bytes_per_row(), row_scales = shape.blocks_per_row();
  const std::uint8_t *codes[lane_count], *scales[lane_count];
  for (std::size_t l = 0; l < lane_count; ++l) {
    const std::size_t row = matrix * w.rows + std::min(n + l, w.rows - 1);
    codes[l] = w.codes.data() + row * row_bytes + k / 2;
    scales[l] = w.scales.data() + row * row_scales + k / format.block;
    // The next panel's rows: hardware sees too many short runs to look ahead by itself.
    for (std::size_t i = 0; i < bytes; i += 64) prefetch(codes[l] + i, lane_count * row_bytes);
    prefetch(scales[l], lane_count * row_scales);
    for (std::size_t i = 0; format.macro_block != 0 && i < used; i += format.macro_block) {
      out.macros[i / format.macro_block * lane_count + l] =
          w.macros[row * shape.macros_per_row() + (k + i) / format.macro_block];
    }
  }
  const auto store_columns = [&](const std::uint8_t* const* rows, std::size_t offset, std::size_t i)
                                 TETROMINO_INLINE_LAMBDA {
                                   const byte_columns columns = load_columns(rows, offset);
                                   repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA {
                                     store_words(out.codes + (i + 4 * d) * lane_count, columns.part[d]);
                                   });
                                 };
  std::uint8_t padded[lane_count][16];
  const std::uint8_t* ends[lane_count];
  for (std::size_t l = 0; l < lane_count; ++l) ends[l] = padded[l];
  const std::size_t whole = bytes / 16 * 16;
  for (std::size_t i = 0; i < whole; i += 16) store_columns(codes, i, i);
  if (whole < bytes) {
    pad_rows(codes, whole, bytes - whole, padded);
    store_columns(ends, 0, whole);
  }
  if (blocks < lane_count) pad_rows(scales, 0, blocks, padded);
  const byte_columns columns = load_columns(blocks < lane_count ? ends : scales, 0);
  repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA {
    std::uint8_t* to = out.scales + 4 * d * lane_count;
    const words& all = columns.part[d];
    store_bytes(to, all & broadcast(0xFF));
    store_bytes(to + lane_count, shift_right<8>(all) & broadcast(0xFF));
    store_bytes(to + 2 * lane_count, shift_right<16>(all) & broadcast(0xFF));
    store_bytes(to + 3 * lane_count, shift_right<24>(all) & broadcast(0xFF));
  });
  return {format, out.codes, out.scales, out.macros, used, false};
}

template <scale_type Scale>
TETROMINO_INLINE floats load_scales(const std::uint8_t* x) {
  if constexpr (Scale == scale_type::e4m3) return decode_e4m3(load_bytes(x));
  return decode_e8m0(load_bytes(x));
}

/// Adds the products of a panel with `Rows` rows of activations to total[row][output].
template <std::size_t Rows, scale_type Scale, std::size_t Block, std::size_t Common>
void add_rows(const weight_panel& w, const element_rows& x, std::size_t at, float (*total)[lane_count]) {
  constexpr std::size_t ahead = 2048;  // bytes of codes, and as far for scales
  const std::size_t stride = x.stride;
  const std::int8_t* values = x.values + at;
  const std::int32_t* offsets = x.offsets + at / 16;
  const float* row_scales = x.scales + at / 16;
  floats sum[Rows], factor = broadcast(1.0f);
  repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = load(total[r]); });
  for (std::size_t k = 0; k < w.cols; k += 32) {
    const std::uint8_t* codes = w.codes + k / 2 * lane_count;
    const std::uint8_t* scales = w.scales + k / Block * lane_count;
    if (w.is_streamed) {
      repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA { prefetch(codes + 64 * d, ahead); });
      prefetch(scales, ahead / 16);
    }
    const bool has_factor = w.format.macro_block != 0;
    if (has_factor && k % w.format.macro_block == 0) {
      factor = broadcast(1.0f) / macro_factors(load_bytes(w.macros + k / w.format.macro_block * lane_count));
    }
    floats scale;
    repeat<32 / Common>([&](auto part) TETROMINO_INLINE_LAMBDA {
      if constexpr (part == 0 || Block == 16) {
        scale = load_scales<Scale>(scales + part * lane_count);
        if (has_factor) scale = rounded(scale * factor);
      }
      words products[Rows];
      repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
        products[r] = broadcast(value_bias == 0 ? 0 : offsets[(r * stride + k) / 16 + part]);
      });
      repeat<Common / 16>([&](auto i) TETROMINO_INLINE_LAMBDA {
        constexpr std::size_t first = part * 32 + i * 32 * (Common / 32);
        const words even = load(reinterpret_cast<const std::int32_t*>(codes + 4 * first)),
                    odd = load(reinterpret_cast<const std::int32_t*>(codes + 4 * first + 64));
        const words a = biased_values(even), b = biased_values(shift_right<4>(even)), c = biased_values(odd),
                    d = biased_values(shift_right<4>(odd));
        repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
          products[r] = add_products(products[r], a, b, c, d, values + r * stride + k + first / 2);
        });
      });
      repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
        const floats both = scale * broadcast(row_scales[(r * stride + k) / 16 + part]);
        sum[r] = sum[r] + rounded(to_floats(products[r]) * both);
      });
    });
  }
  repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { store(total[r], sum[r]); });
}

template <scale_type Scale, std::size_t Block, std::size_t Common>
void add_each(const weight_panel& w, const element_rows& x, std::size_t first, std::size_t rows,
              float (*total)[lane_count]) {
  constexpr std::size_t many = registers == 1 ? 8 : registers == 2 ? 2 : 1;  // sums that fit the registers
  std::size_t m = 0;
  for (; m + many <= rows; m += many) add_rows<many, Scale, Block, Common>(w, x, m * x.stride + first, total + m);
  if constexpr (many > 4) {
    for (; m + 4 <= rows; m += 4) add_rows<4, Scale, Block, Common>(w, x, m * x.stride + first, total + m);
  }
  if constexpr (many > 1) {
    for (; m < rows; ++m) add_rows<1, Scale, Block, Common>(w, x, m * x.stride + first, total + m);
  }
}

/// Adds the products of a panel with columns first ... of rows of activations to total[row][output]; `common` is the
/// smaller block of both.
inline void add_panel(const weight_panel& w, std::size_t common, const element_rows& x, std::size_t first,
                      std::size_t rows, float (*total)[lane_count]) {
  if (w.format.scale == scale_type::e4m3) return add_each<scale_type::e4m3, 16, 16>(w, x, first, rows, total);
  if (w.format.block == 16) return add_each<scale_type::e8m0, 16, 16>(w, x, first, rows, total);
  if (common == 16) return add_each<scale_type::e8m0, 32, 16>(w, x, first, rows, total);
  add_each<scale_type::e8m0, 32, 32>(w, x, first, rows, total);
}

}  // namespace TETROMINO_ISA
}  // namespace tetromino::detail

TETROMINO_VECTOR_CODE_END

#endif
