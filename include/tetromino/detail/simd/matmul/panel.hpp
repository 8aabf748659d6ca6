#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD

/// Panels: 16 rows of packed weights with their bytes side by side, and their products with rows of bytes.

#if TETROMINO_SIMD

#include "../../cpu_matmul.hpp"  // weights_view
#include "../isa.hpp"            // load_columns, biased_values, add_products, multiplies_rows
#include "../scales.hpp"         // decode_e8m0, decode_e4m3, macro_factors

#include <algorithm>    // std::min, std::max, std::min_element, std::max_element, std::copy_n, std::fill
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <type_traits>  // std::integral_constant

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Columns of 16 rows of weights, panel after panel, the first of which begins a macro block: as repacked_view has
/// them, or with everything before the codes at the end of 64 bytes, so that these do not straddle cache lines.
struct weight_panels {
  static constexpr std::size_t code_bytes = 16 * lane_count, header_bytes = 64, panel_bytes = header_bytes + code_bytes;

  any_format format;
  const std::uint8_t* data;
  std::size_t cols;
  bool is_repacked;
};

template <scale_type Scale>
TETROMINO_INLINE floats load_scales(const std::uint8_t* x) {
  if constexpr (Scale == scale_type::e8m0) {
    return decode_e8m0(load_bytes(x));
  } else {
    return load_e4m3(x);
  }
}

/// Goes along panels. `IsFine`: factors have 2 bits, and belong to the elements, which are 4 f times as large.
template <std::size_t Block, bool IsFine = false>
class panel_walk {
 public:
  TETROMINO_INLINE explicit panel_walk(const weight_panels& w)
      : format_(w.format),
        step_(w.is_repacked ? scale_bytes + weight_panels::code_bytes : weight_panels::panel_bytes),
        macro_step_(w.is_repacked ? lane_count : 0),
        codes_(w.data + step_ - weight_panels::code_bytes) {}

  /// Arrives at the panel of column k, in turn from 0 on.
  TETROMINO_INLINE void arrive(std::size_t k) {
    if constexpr (IsFine) return arrive_at_fine(k);
    if (!begins_macro_block(format_, k)) return;
    codes_ += macro_step_;
    factor_ = broadcast(1.0f) / macro_factors(load_bytes(codes_ - scale_bytes - lane_count));
  }
  TETROMINO_INLINE void leave() { codes_ += step_; }
  /// Asks for what comes 8192 bytes later, in the second cache: the first has too few requests under way for that.
  TETROMINO_INLINE void prefetch_ahead() const {
    repeat<5>([&](auto i) TETROMINO_INLINE_LAMBDA { prefetch_to_l2(codes_ + 64 * i, 8192); });
  }

  [[nodiscard]] TETROMINO_INLINE const std::uint8_t* codes() const { return codes_; }
  /// The bytes of the scales of block b of the panel.
  [[nodiscard]] TETROMINO_INLINE const std::uint8_t* scale_codes(std::size_t b) const {
    return codes_ - scale_bytes + b * lane_count;
  }
  /// The factors of 2 bits of each eight columns of the panel, the first in the low bits.
  [[nodiscard]] TETROMINO_INLINE const words& fine_factors() const { return factors_; }
  /// The scales of block b of the panel, times the factors of the macro block.
  template <scale_type Scale>
  [[nodiscard]] TETROMINO_INLINE floats scales(std::size_t b) const {
    const floats all = load_scales<Scale>(scale_codes(b));
    return format_.macro_block != 0 ? rounded(all * factor_) : all;
  }

 private:
  TETROMINO_INLINE void arrive_at_fine(std::size_t k) {
    const bool begins = begins_macro_block(format_, k);
    if (begins) codes_ += macro_step_;
    if (format_.macro_block == 32) {
      factors_ = load_bytes(codes_ - scale_bytes - lane_count);
      return;
    }
    // A byte has two factors for this panel and two for the next.
    bytes_ = begins ? load_bytes(codes_ - scale_bytes - lane_count) : shift_right<4>(bytes_);
    const words apart = (bytes_ & broadcast(3)) | shift_left<2>(bytes_ & broadcast(12));
    factors_ = apart | shift_left<2>(apart);
  }

  static constexpr std::size_t scale_bytes = 32 / Block * lane_count;  // right before the codes, behind macro bytes

  any_format format_;
  std::size_t step_, macro_step_;
  const std::uint8_t* codes_;
  floats factor_ = broadcast(IsFine ? 0.25f : 1.0f);
  words factors_, bytes_;
};

/// Rows of activations as bytes; in the order of split_elements. Row m begins at m * stride, in units of 16 where there
/// is one number for each of those. For tiles, scales are [rows / 16][stride / 16][16], and there are no offsets.
struct element_rows {
  static constexpr std::size_t capacity = 32768;
  std::size_t stride = 0;
  alignas(64) std::int8_t values[capacity];
  std::int32_t offsets[capacity / 16];      ///< for blocks of 32, the first of two is for both
  std::int32_t fine_offsets[capacity / 8];  ///< for weights with factors of 2 bits
  float scales[capacity / 16];

  /// Codes of E8M0 by which all scales can be multiplied by addition to their exponents: they and the products are
  /// normal floats. There is none if the last is less than the first.
  std::int32_t first_code = 1, last_code = 0;

  /// Finds those codes, for `rows` rows.
  void find_codes(std::size_t rows) {
    const std::size_t n = rows * stride / 16;
    words least = broadcast(0x7F800000), most = broadcast(0);
    std::fill(scales + n, scales + (n + lane_count - 1) / lane_count * lane_count, 1.0f);
    for (std::size_t i = 0; i < n; i += lane_count) {
      const words bits = bits_of(load(scales + i));
      least = min(least, bits), most = max(most, bits);
    }
    std::int32_t lanes_least[lane_count], lanes_most[lane_count];
    store(lanes_least, least), store(lanes_most, most);
    const std::int32_t low = *std::min_element(lanes_least, lanes_least + lane_count) >> 23,
                       high = *std::max_element(lanes_most, lanes_most + lane_count) >> 23;
    const bool are_normal = low > 0 && high < 255;
    first_code = are_normal ? std::max(0, 128 - low) : 255;
    last_code = std::min(254, 381 - high);
  }
};

/// At most 512 columns of 16 rows in the linear layout.
class row_panels {
 public:
  static constexpr std::size_t most_cols = 512;

  /// Columns k ... k + used - 1 of rows n ... n + 15; rows past the last repeat it.
  row_panels(const weights_view& w, std::size_t matrix, std::size_t n, std::size_t k, std::size_t used)
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
      macros_[l] = w.macros.data() + (row + std::min(l, last)) * row_macros + macro;
    }
    if (format_.macro_block == 32) {
      store_bytes_of_rows<32>(macros_, macros, lane_count);
    } else {
      for (std::size_t i = 0; i < macros; ++i) {
        std::uint8_t* const to = scales_of(i * format_.macro_block) - lane_count;
        for (std::size_t l = 0; l < lane_count; ++l) to[l] = macros_[l][i];
      }
    }
    format_.block == 16 ? store_bytes_of_rows<16>(scales_, blocks_, 0) : store_bytes_of_rows<32>(scales_, blocks_, 0);
  }

  /// The panels, but for their codes.
  [[nodiscard]] weight_panels scales() const { return {format_, data_[0], used_, false}; }
  [[nodiscard]] const std::uint8_t* const* rows() const { return codes_; }
  /// Their bytes of factors; unset where there are none.
  [[nodiscard]] const std::uint8_t* const* macros() const { return macros_; }

  /// The whole panels.
  weight_panels columns() {
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
    std::uint8_t* const codes = codes_of(2 * i);
    repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA { store_words(codes + 4 * d * lane_count, columns.part[d]); });
  }
  /// Stores n bytes of each row, one for each `Columns`, so far before the place of the scales.
  template <std::size_t Columns>
  void store_bytes_of_rows(const std::uint8_t* const* rows, std::size_t n, std::size_t before) {
    for (std::size_t b = 0; b < n; b += 16) {
      std::uint8_t padded[lane_count][16];
      const std::uint8_t* ends[lane_count];
      if (n - b < 16) pad_rows(rows, b, n - b, padded, ends);
      const byte_columns columns = n - b < 16 ? load_columns(ends, 0) : load_columns(rows, b);
      std::uint8_t* const first = scales_of(b * Columns) - before;
      repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA {
        repeat<4>([&](auto i) TETROMINO_INLINE_LAMBDA {
          constexpr std::size_t k = (4 * d + i) * Columns;
          store_bytes(first + k / 32 * weight_panels::panel_bytes + k % 32 / Columns * lane_count,
                      shift_right<8 * i>(columns.part[d]) & broadcast(0xFF));
        });
      });
    }
  }
  /// Of the panel of column k.
  TETROMINO_INLINE std::uint8_t* codes_of(std::size_t k) { return data_[k / 32] + weight_panels::header_bytes; }
  TETROMINO_INLINE std::uint8_t* scales_of(std::size_t k) {
    return codes_of(k) - (format_.block == 16 ? 2 : 1) * lane_count;
  }

  any_format format_;
  std::size_t used_, blocks_;
  const std::uint8_t *codes_[lane_count], *scales_[lane_count], *macros_[lane_count];
  alignas(64) std::uint8_t data_[most_cols / 32][weight_panels::panel_bytes];
};

/// Rows of activations that are multiplied at once, as many as have their sums in registers.
inline constexpr std::size_t rows_at_once = registers == 1 ? 8 : registers == 2 ? 2 : 1;
/// Whether so many have their scales multiplied by addition to exponents. Fewer, in fewer registers, do not gain by it.
inline constexpr bool shifts_scales_of_many = registers == 1;

/// Adds the products of panels with `Rows` rows of activations to total[row][output]. With `shifts`, many rows have
/// their scales multiplied by addition to exponents; where that does not give their product, nothing is added, and
/// false returned.
template <std::size_t Rows, scale_type Scale, std::size_t Block, std::size_t Common>
bool add_rows(const weight_panels& w, const element_rows& x, std::size_t at, float (*total)[lane_count], bool shifts) {
  constexpr bool can_shift = shifts_scales_of_many && Scale == scale_type::e8m0 && Rows == rows_at_once;
  const std::size_t stride = x.stride;
  const std::int8_t* values = x.values + at;
  const std::int32_t* offsets = x.offsets + at / 16;
  const float* row_scales = x.scales + at / 16;
  panel_walk<Block> panel(w);
  floats sum[Rows];
  words misfits = broadcast(0);
  repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = load(total[r]); });
  for (std::size_t k = 0; k < w.cols; k += 32) {
    panel.arrive(k);
    const std::uint8_t* const codes = panel.codes();
    if (w.is_repacked) panel.prefetch_ahead();
    floats scale;
    words shift;
    repeat<32 / Common>([&](auto part) TETROMINO_INLINE_LAMBDA {
      if constexpr (part == 0 || Block == 16) {
        if (!can_shift || !shifts) scale = panel.template scales<Scale>(part);
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
      const auto add_scaled = [&](const auto& times_row) TETROMINO_INLINE_LAMBDA {
        repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
          const floats both = times_row(broadcast(row_scales[(r * stride + k) / 16 + part]));
          sum[r] = sum[r] + rounded(to_floats(products[r]) * both);
        });
      };
      if (!can_shift || !shifts) {
        return add_scaled([&](const floats& row) TETROMINO_INLINE_LAMBDA { return scale * row; });
      }
      if constexpr (can_shift && (part == 0 || Block == 16)) {
        const words code = load_bytes(panel.scale_codes(part));
        misfits = misfits | (code - broadcast(x.first_code)) | (broadcast(x.last_code) - code);
        shift = shift_left<23>(code - broadcast(127));
      }
      add_scaled([&](const floats& row) TETROMINO_INLINE_LAMBDA { return floats_of(bits_of(row) + shift); });
    });
    panel.leave();
  }
  if (can_shift && shifts && any_at_least(shift_right<31>(misfits) & broadcast(1), 1)) return false;
  repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { store(total[r], sum[r]); });
  return true;
}

template <scale_type Scale, std::size_t Block, std::size_t Common>
void add_each(const weight_panels& w, const element_rows& x, std::size_t first, std::size_t rows,
              float (*total)[lane_count]) {
  const bool shifts = w.format.macro_block == 0 && x.first_code <= x.last_code;
  std::size_t m = 0;
  const auto add = [&](auto at_once) TETROMINO_INLINE_LAMBDA {
    for (; m + at_once <= rows; m += at_once) {
      const std::size_t at = m * x.stride + first;
      if (!add_rows<at_once, Scale, Block, Common>(w, x, at, total + m, shifts)) {
        add_rows<at_once, Scale, Block, Common>(w, x, at, total + m, false);
      }
    }
  };
  add(std::integral_constant<std::size_t, rows_at_once>{});
  if constexpr (rows_at_once > 4) add(std::integral_constant<std::size_t, 4>{});
  if constexpr (rows_at_once > 1) add(std::integral_constant<std::size_t, 1>{});
}

/// add_rows for weights with factors of 2 bits. `common` is the smaller block of both sides.
template <std::size_t Rows>
TETROMINO_OUTLINE void add_fine_rows(const weight_panels& w, std::size_t common, const element_rows& x, std::size_t at,
                                     float (*total)[lane_count]) {
  const std::size_t stride = x.stride;
  const std::int8_t* values = x.values + at;
  const std::int32_t* offsets = x.fine_offsets + at / 8;
  const float* row_scales = x.scales + at / 16;
  panel_walk<32, true> panel(w);
  floats sum[Rows];
  repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { sum[r] = load(total[r]); });
  for (std::size_t k = 0; k < w.cols; k += 32) {
    panel.arrive(k);
    const std::uint8_t* const codes = panel.codes();
    if (w.is_repacked) panel.prefetch_ahead();
    const floats scale = panel.template scales<scale_type::e8m0>(0);
    words products[Rows];
    const auto add_scaled = [&](std::size_t part) TETROMINO_INLINE_LAMBDA {
      repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
        const floats both = scale * broadcast(row_scales[(r * stride + k) / 16 + part]);
        sum[r] = sum[r] + rounded(to_floats(products[r]) * both);
      });
    };
    repeat<4>([&](auto d) TETROMINO_INLINE_LAMBDA {
      if (d == 2 && common == 16) add_scaled(0);
      const words all = load(reinterpret_cast<const std::int32_t*>(codes + 64 * d));
      const words factor = fine_multipliers<static_cast<int>(d)>(panel.fine_factors());
      const words a = fine_values(all, factor), b = fine_values(shift_right<4>(all), factor);
      const bool begins = d == 0 || (d == 2 && common == 16);
      repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA {
        const std::size_t first = r * stride + k + 8 * d;
        const std::int32_t* const offset = offsets + first / 8;
        if (begins) products[r] = broadcast(begins_with_fine_offset ? *offset : 0);
        products[r] = add_fine_products(products[r], a, b, values + first, offset, factor);
      });
    });
    add_scaled(common == 16 ? 1 : 0);
    panel.leave();
  }
  repeat<Rows>([&](auto r) TETROMINO_INLINE_LAMBDA { store(total[r], sum[r]); });
}
/// add_each for such weights.
inline void add_each_fine(const weight_panels& w, std::size_t common, const element_rows& x, std::size_t first,
                          std::size_t rows, float (*total)[lane_count]) {
  std::size_t m = 0;
  const auto add = [&](auto at_once) TETROMINO_INLINE_LAMBDA {
    for (; m + at_once <= rows; m += at_once) add_fine_rows<at_once>(w, common, x, m * x.stride + first, total + m);
  };
  add(std::integral_constant<std::size_t, rows_at_once>{});
  if constexpr (rows_at_once > 4) add(std::integral_constant<std::size_t, 4>{});
  if constexpr (rows_at_once > 1) add(std::integral_constant<std::size_t, 1>{});
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
inline void add_panel(const weight_panels& w, std::size_t common, const element_rows& x, std::size_t first,
                      std::size_t rows, float (*total)[lane_count]) {
  if (w.format.macro_bits == 2) return add_each_fine(w, common, x, first, rows, total);
  with_blocks(w.format, common, [&]<scale_type Scale, std::size_t Block, std::size_t Common>() TETROMINO_INLINE_LAMBDA {
    add_each<Scale, Block, Common>(w, x, first, rows, total);
  });
}

/// The same for one row of activations and the linear layout, of a number of columns that is a multiple of 128.
template <scale_type Scale, std::size_t Block, std::size_t Common>
void add_row_of_linear(const weight_panels& w, const std::uint8_t* const* rows, const element_rows& x, std::size_t at,
                       float* total) {
  floats sum = load(total), scale;
  panel_walk<Block> panel(w);
  for (std::size_t k = 0; k < w.cols; k += 128) {
    words products[128 / Common];
    multiply_rows<Common>(rows, k / 2, x.values + at + k, products);
    repeat<128 / Common>([&](auto i) TETROMINO_INLINE_LAMBDA {
      const std::size_t column = k + i * Common, position = (at + column) / 16;
      if constexpr (i * Common % 32 == 0) panel.arrive(column);
      if constexpr (i * Common % Block == 0) scale = panel.template scales<Scale>(i * Common % 32 / Block);
      if constexpr ((i + 1) * Common % 32 == 0) panel.leave();
      const words exact = products[i] + broadcast(x.offsets[position]);
      sum = sum + rounded(to_floats(exact) * (scale * broadcast(x.scales[position])));
    });
  }
  store(total, sum);
}

/// The same with factors of 2 bits and blocks of 32 on both sides.
template <class Words>
void add_row_of_fine(const row_panels& panels, const element_rows& x, std::size_t at, float* total) {
  const weight_panels w = panels.scales();
  floats sum = load(total);
  panel_walk<32, true> panel(w);
  const std::uint8_t* bytes[lane_count];
  for (std::size_t k = 0; k < w.cols; k += 128) {
    for (std::size_t l = 0; l < lane_count; ++l) bytes[l] = panels.macros()[l] + k / w.format.macro_block;
    const auto factors = factors_of_rows(Words{}, w.format, bytes, x.fine_offsets + (at + k) / 8);
    words products[4];
    multiply_rows<32>(panels.rows(), k / 2, x.values + at + k, products, &factors);
    for (std::size_t i = 0; i < 4; ++i) {
      const floats both = panel.template scales<scale_type::e8m0>(0) * broadcast(x.scales[(at + k) / 16 + 2 * i]);
      sum = sum + rounded(to_floats(products[i]) * both);
      panel.leave();
    }
  }
  store(total, sum);
}

/// add_panel for one row of activations where the set multiplies rows of weights as they lie: columns need not be put
/// side by side first. Otherwise, or for other numbers of columns than multiples of 128, returns false.
template <class Words = words>
TETROMINO_INLINE bool add_row_as_it_lies(const row_panels& panel, std::size_t common, const element_rows& x,
                                         std::size_t at, float* total) {
  if constexpr (multiplies_rows<Words>) {
    const weight_panels w = panel.scales();
    if (w.cols % 128 != 0) return false;
    if (w.format.macro_bits == 2) {
      if constexpr (multiplies_fine_rows<Words>) {
        if (common == 32) return add_row_of_fine<Words>(panel, x, at, total), true;
      }
      return false;
    }
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
