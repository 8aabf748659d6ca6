#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Panels: 16 rows of packed weights with their bytes side by side, and their products with rows of bytes.

#if TETROMINO_SIMD

#include "../../cpu_matmul.hpp"  // weights_view
#include "../isa.hpp"            // load_columns, biased_values, add_products, multiplies_rows
#include "../scales.hpp"         // decode_e8m0, decode_e4m3, macro_factors

#include <algorithm>  // std::min, std::copy_n, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uintptr_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
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

/// Rows of activations as bytes; in the order of split_elements. Row m begins at m * stride, in units of 16 where there
/// is one number for each of those.
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

/// At most 512 columns of 16 rows in the linear layout.
class row_panel {
 public:
  static constexpr std::size_t most_cols = 512;

  /// Columns k ... k + used - 1 of rows n ... n + 15; rows past the last repeat it.
  row_panel(const weights_view& w, std::size_t matrix, std::size_t n, std::size_t k, std::size_t used)
      : format_(w.format), used_(used), blocks_((used + w.format.block - 1) / w.format.block) {
    const packed_shape shape = w.shape();
    const std::size_t row_bytes = shape.code_bytes_per_row(), row_scales = shape.blocks_per_row();
    const std::size_t row_macros = shape.macros_per_row();
    const std::size_t block = k / format_.block, bytes = code_bytes();
    const std::size_t macro = format_.macro_block == 0 ? 0 : k / format_.macro_block;
    const std::size_t macros = format_.macro_block == 0 ? 0 : (used + format_.macro_block - 1) / format_.macro_block;
    const std::size_t last = w.rows - 1 - std::min(n, w.rows - 1), row = matrix * w.rows + n;
    const std::uint8_t* codes = w.codes.data() + row * row_bytes + k / 2;
    const std::uint8_t* scales = w.scales.data() + row * row_scales + block;
    for (std::size_t l = 0; l < lane_count; ++l) {
      codes_[l] = codes;
      scales_[l] = scales;
      // The next panel's rows: hardware sees too many short runs to look ahead by itself. Rows are often a power of two
      // apart, and so many of them drive each other out of the few places that the first cache has for such addresses.
      if (used == most_cols) {
        repeat<most_cols / 128>(
            [&](auto i) TETROMINO_INLINE_LAMBDA { prefetch_to_l2(codes + 64 * i, lane_count * row_bytes); });
      } else {
        for (std::size_t i = 0; i < bytes; i += 64) prefetch_to_l2(codes + i, lane_count * row_bytes);
      }
      prefetch_to_l2(scales, lane_count * row_scales);
      if (l < last) codes += row_bytes, scales += row_scales;
    }
    for (std::size_t l = 0; l < lane_count && macros != 0; ++l) {
      const std::uint8_t* from = w.macros.data() + (row + std::min(l, last)) * row_macros + macro;
      for (std::size_t i = 0; i < macros; ++i) macro_columns_[i * lane_count + l] = from[i];
    }
    store_scales();
  }

  /// The panel, but for its codes.
  [[nodiscard]] weight_panel scales() const {
    return {format_, code_columns_, scale_columns_, macro_columns_, used_, false};
  }
  [[nodiscard]] const std::uint8_t* const* rows() const { return codes_; }

  /// The whole panel.
  weight_panel columns() {
    const std::size_t bytes = code_bytes(), whole = bytes / 16 * 16;
    for (std::size_t i = 0; i < whole; i += 16) store_columns(codes_, i, i);
    if (whole < bytes) {
      std::uint8_t padded[lane_count][16];
      const std::uint8_t* ends[lane_count];
      pad_rows(codes_, whole, bytes - whole, padded, ends);
      store_columns(ends, 0, whole);
    }
    return scales();
  }

 private:
  [[nodiscard]] std::size_t code_bytes() const { return blocks_ * format_.block / 2; }

  /// The first n of 16 bytes of each row, the rest zero.
  static void pad_rows(const std::uint8_t* const* rows, std::size_t offset, std::size_t n, std::uint8_t (*out)[16],
                       const std::uint8_t** out_rows) {
    for (std::size_t l = 0; l < lane_count; ++l) {
      std::copy_n(rows[l] + offset, n, out[l]);
      std::fill(out[l] + n, out[l] + 16, std::uint8_t{0});
      out_rows[l] = out[l];
    }
  }
  TETROMINO_INLINE void store_columns(const std::uint8_t* const* rows, std::size_t offset, std::size_t i) {
    const byte_columns columns = load_columns(rows, offset);
    repeat<4>([&](auto d)
                  TETROMINO_INLINE_LAMBDA { store_words(code_columns_ + (i + 4 * d) * lane_count, columns.part[d]); });
  }
  void store_scales() {
    for (std::size_t b = 0; b < blocks_; b += 16) {
      std::uint8_t padded[lane_count][16];
      const std::uint8_t* ends[lane_count];
      if (blocks_ - b < 16) pad_rows(scales_, b, blocks_ - b, padded, ends);
      const byte_columns columns = blocks_ - b < 16 ? load_columns(ends, 0) : load_columns(scales_, b);
      repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA {
        std::uint8_t* to = scale_columns_ + (b + 4 * d) * lane_count;
        const words& all = columns.part[d];
        store_bytes(to, all & broadcast(0xFF));
        store_bytes(to + lane_count, shift_right<8>(all) & broadcast(0xFF));
        store_bytes(to + 2 * lane_count, shift_right<16>(all) & broadcast(0xFF));
        store_bytes(to + 3 * lane_count, shift_right<24>(all) & broadcast(0xFF));
      });
    }
  }

  any_format format_;
  std::size_t used_, blocks_;
  const std::uint8_t *codes_[lane_count], *scales_[lane_count];
  alignas(64) std::uint8_t code_columns_[most_cols / 2 * lane_count];
  std::uint8_t scale_columns_[most_cols / 16 * lane_count];
  std::uint8_t macro_columns_[most_cols / 32 * lane_count];
};

template <scale_type Scale>
TETROMINO_INLINE floats load_scales(const std::uint8_t* x) {
  if constexpr (Scale == scale_type::e8m0) {
    return decode_e8m0(load_bytes(x));
  } else {
    return load_e4m3(x);
  }
}

/// Adds the products of a panel with `Rows` rows of activations to total[row][output].
template <std::size_t Rows, scale_type Scale, std::size_t Block, std::size_t Common>
void add_rows(const weight_panel& w, const element_rows& x, std::size_t at, float (*total)[lane_count]) {
  constexpr std::size_t ahead = 2048;  // bytes of codes, and as far for scales
  const std::size_t stride = x.stride;
  const std::int8_t* values = x.values + at;
  const std::int32_t* offsets = x.offsets + at / 16;
  const float* row_scales = x.scales + at / 16;
  const std::uint8_t* macros = w.macros;
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
    if (has_factor && (k & (w.format.macro_block - 1)) == 0) {
      factor = broadcast(1.0f) / macro_factors(load_bytes(macros));
      macros += lane_count;
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
  constexpr std::size_t many = registers == 1 ? 4 : registers == 2 ? 2 : 1;  // sums that fit the registers
  std::size_t m = 0;
  for (; m + many <= rows; m += many) add_rows<many, Scale, Block, Common>(w, x, m * x.stride + first, total + m);
  if constexpr (many > 1) {
    for (; m < rows; ++m) add_rows<1, Scale, Block, Common>(w, x, m * x.stride + first, total + m);
  }
}

/// Calls f<Scale, Block, Common>() for weights of this format, where `common` is the smaller block of both sides.
template <class F>
TETROMINO_INLINE void with_blocks(const any_format& format, std::size_t common, const F& f) {
  if (format.scale == scale_type::e4m3) return f.template operator()<scale_type::e4m3, 16, 16>();
  if (format.block == 16) return f.template operator()<scale_type::e8m0, 16, 16>();
  if (common == 16) return f.template operator()<scale_type::e8m0, 32, 16>();
  f.template operator()<scale_type::e8m0, 32, 32>();
}

/// Adds the products of a panel with columns first ... of rows of activations to total[row][output]; `common` is the
/// smaller block of both.
inline void add_panel(const weight_panel& w, std::size_t common, const element_rows& x, std::size_t first,
                      std::size_t rows, float (*total)[lane_count]) {
  with_blocks(w.format, common, [&]<scale_type Scale, std::size_t Block, std::size_t Common>() TETROMINO_INLINE_LAMBDA {
    add_each<Scale, Block, Common>(w, x, first, rows, total);
  });
}

/// The same for one row of activations and the linear layout, of a number of columns that is a multiple of 128.
template <scale_type Scale, std::size_t Block, std::size_t Common>
void add_row_of_linear(const weight_panel& w, const std::uint8_t* const* rows, const element_rows& x, std::size_t at,
                       float* total) {
  floats sum = load(total), factor = broadcast(1.0f), scale;
  const std::uint8_t* macros = w.macros;
  for (std::size_t k = 0; k < w.cols; k += 128) {
    words products[128 / Common];
    multiply_rows<Common>(rows, k / 2, x.values + at + k, products);
    repeat<128 / Common>([&](auto i) TETROMINO_INLINE_LAMBDA {
      const std::size_t column = k + i * Common, position = (at + column) / 16;
      if constexpr (i * Common % Block == 0) {
        scale = load_scales<Scale>(w.scales + column / Block * lane_count);
        if (w.format.macro_block != 0) {
          if ((column & (w.format.macro_block - 1)) == 0) {
            factor = broadcast(1.0f) / macro_factors(load_bytes(macros));
            macros += lane_count;
          }
          scale = rounded(scale * factor);
        }
      }
      const words exact = products[i] + broadcast(x.offsets[position]);
      sum = sum + rounded(to_floats(exact) * (scale * broadcast(x.scales[position])));
    });
  }
  store(total, sum);
}

/// add_panel for one row of activations where the set multiplies rows of weights as they lie: columns need not be put
/// side by side first. Otherwise, or for other numbers of columns than multiples of 128, returns false.
template <class Words = words>
TETROMINO_INLINE bool add_row_as_it_lies(const row_panel& panel, std::size_t common, const element_rows& x,
                                         std::size_t at, float* total) {
  if constexpr (multiplies_rows<Words>) {
    const weight_panel w = panel.scales();
    if (w.cols % 128 != 0) return false;
    with_blocks(w.format, common,
                [&]<scale_type Scale, std::size_t Block, std::size_t Common>() TETROMINO_INLINE_LAMBDA {
                  add_row_of_linear<Scale, Block, Common>(w, panel.rows(), x, at, total);
                });
    return true;
  }
  return false;
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
