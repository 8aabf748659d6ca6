#pragma once

#include "detail/macros_off.hpp"

#include "e2m1.hpp"                 // e2m1
#include "e4m3.hpp"                 // e4m3
#include "e8m0.hpp"                 // e8m0
#include "error.hpp"                // error, result
#include "detail/for_each_row.hpp"  // for_each_row
#include "layout/swizzle.hpp"       // layout::swizzled_bytes, layout::swizzled_offset
#include "options.hpp"              // device_policy
#include "packed.hpp"               // packed_view, packed_like

#include <algorithm>    // std::copy_n, std::fill, std::any_of, std::find_if, std::max
#include <cmath>        // std::ldexp
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <numeric>      // std::accumulate
#include <optional>     // std::optional
#include <span>         // std::span
#include <type_traits>  // std::is_const_v
#include <vector>       // std::vector

/// Operands of the tensor cores that multiply 4-bit blocks by 4-bit blocks (Blackwell), which repack and repack_to make
/// on the host; <tetromino/cuda/block_scaled.hpp> makes the same bytes on the GPU, and multiplies them.
namespace TETROMINO_NAMESPACE {

/// What the tensor cores take as an operand, both of a product alike: E2M1 codes, and scales for blocks along K.
enum class block_scaled_kind : std::uint8_t {
  /// NVFP4: an E4M3 scale for 16 elements and a float for each matrix. (PTX ISA 9.0, kind::mxf4nvf4 with scale_vec::4X;
  /// cuBLASLt, VEC16_UE4M3)
  e4m3_16,
  /// MXFP4: an E8M0 scale for 32 elements. (PTX ISA 9.0, kind::mxf4; cuBLASLt does not take it)
  e8m0_32,
};

/// Sizes of operands [matrices, rows, cols]. Rows are padded with zero codes to a multiple of 64 columns, what one
/// instruction takes.
/// - codes [matrices, rows, padded_cols / 2]: low nibble = even k
/// - scales [matrices, 128x4 swizzle of rows by padded_cols / block]: E4M3 or E8M0 bytes, padding zero
/// - factors [matrices]: what products of kind e4m3_16 are multiplied by; none for e8m0_32
struct block_scaled_shape {
  block_scaled_kind kind = block_scaled_kind::e4m3_16;
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;

  [[nodiscard]] TETROMINO_ABI constexpr std::size_t block() const noexcept {
    return kind == block_scaled_kind::e4m3_16 ? 16 : 32;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t padded_cols() const noexcept {
    return cols / 64 * 64 + (cols % 64 != 0) * 64;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t code_bytes_per_row() const noexcept { return padded_cols() / 2; }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t scales_per_row() const noexcept { return padded_cols() / block(); }
  /// Bytes of one matrix's scales, a multiple of 512.
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t scale_bytes_per_matrix() const noexcept {
    return layout::swizzled_bytes(1, rows, scales_per_row());
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t code_bytes() const noexcept {
    return matrices * rows * code_bytes_per_row();
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t scale_bytes() const noexcept {
    return matrices * scale_bytes_per_matrix();
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t factor_count() const noexcept {
    return kind == block_scaled_kind::e4m3_16 ? matrices : 0;
  }

  friend TETROMINO_ABI constexpr bool operator==(const block_scaled_shape&, const block_scaled_shape&) = default;
};

/// Operands that somebody else owns. `Byte` and `Float` are const for a read-only view.
template <class Byte = const std::uint8_t, class Float = const float>
struct block_scaled_view {
  block_scaled_shape shape{};
  std::span<Byte> codes{};
  std::span<Byte> scales{};
  std::span<Float> factors{};

  /// One matrix of the batch.
  [[nodiscard]] TETROMINO_ABI constexpr block_scaled_view operator[](std::size_t e) const noexcept {
    block_scaled_shape one = shape;
    one.matrices = 1;
    return {one, codes.subspan(e * one.code_bytes(), one.code_bytes()),
            scales.subspan(e * one.scale_bytes(), one.scale_bytes()),
            factors.subspan(e * one.factor_count(), one.factor_count())};
  }

  /// A mutable view is also a read-only one.
  template <class OtherByte, class OtherFloat>
    requires(std::is_const_v<OtherByte> && !std::is_const_v<Byte>)
  TETROMINO_ABI constexpr operator block_scaled_view<OtherByte, OtherFloat>() const noexcept {
    return {shape, codes, scales, factors};
  }
};

/// Operands that own their bytes.
struct block_scaled {
  block_scaled_shape shape{};
  std::vector<std::uint8_t> codes{};
  std::vector<std::uint8_t> scales{};
  std::vector<float> factors{};
  std::size_t rounded_blocks = 0;  ///< blocks that lost low bits, see repack_to

  TETROMINO_ABI block_scaled() = default;
  TETROMINO_ABI block_scaled(const block_scaled&) = default;
  TETROMINO_ABI block_scaled(block_scaled&&) = default;
  TETROMINO_ABI block_scaled& operator=(const block_scaled&) = default;
  TETROMINO_ABI block_scaled& operator=(block_scaled&&) = default;

  [[nodiscard]] TETROMINO_ABI block_scaled_view<std::uint8_t, float> view() noexcept {
    return {shape, codes, scales, factors};
  }
  [[nodiscard]] TETROMINO_ABI block_scaled_view<> view() const noexcept { return {shape, codes, scales, factors}; }
};

namespace detail::inline TETROMINO_ISA {

/// E4M3 has the powers of two from 2^-9 to 2^8. A matrix's largest E8M0 scale becomes 2^8 and the factor says what it
/// was; a scale `below` powers of two smaller has this code. Past 17 it stays at 2^-9, and its codes shrink instead.
inline constexpr unsigned rebased_range = 17;
[[nodiscard]] TETROMINO_HD constexpr std::uint8_t rebased_scale(unsigned below) noexcept {
  if (below >= rebased_range) return 1;
  const unsigned above_least = rebased_range - below;
  return static_cast<std::uint8_t>(above_least < 3 ? 1u << above_least : (above_least - 2) << 3);
}
static_assert(e4m3::from_bits(rebased_scale(0)).value() == 0x1p8f &&
              e4m3::from_bits(rebased_scale(14)).value() == 0x1p-6f);
static_assert(e4m3::from_bits(rebased_scale(15)).value() == 0x1p-7f &&
              e4m3::from_bits(rebased_scale(17)).value() == 0x1p-9f);

/// An E2M1 code divided by 2^shift, to nearest.
[[nodiscard]] TETROMINO_HD constexpr std::uint8_t shifted_code(std::uint8_t code, unsigned shift) noexcept {
  const float value = e2m1::from_bits(code).value();
  return e2m1::encode(shift > 8 ? value * 0x1p-9f : value / static_cast<float>(1u << shift)).bits;
}
/// Two codes of a byte.
[[nodiscard]] TETROMINO_HD constexpr std::uint8_t shifted_codes(std::uint8_t codes, unsigned shift) noexcept {
  const unsigned high = shifted_code(static_cast<std::uint8_t>(codes >> 4), shift);
  return static_cast<std::uint8_t>(high << 4 | shifted_code(codes & 15u, shift));
}
static_assert(shifted_codes(0x72, 1) == 0x51 && shifted_codes(0x0F, 2) == 0x0B && shifted_codes(0xF7, 40) == 0x80);

/// The factor of a matrix whose largest E8M0 scale has code `top`.
[[nodiscard]] TETROMINO_HD constexpr float rebased_factor(unsigned top) noexcept {
  return top > 8 ? bit_cast<float>((top - 8) << 23) : bit_cast<float>(1u << (top + 14));
}
static_assert(rebased_factor(135) == 1.0f && rebased_factor(9) == 0x1p-126f && rebased_factor(8) == 0x1p-127f);
static_assert(rebased_factor(0) == 0x1p-135f && rebased_factor(254) == 0x1p119f);

/// Says why packed storage of this shape is no operand of that one, if it is not.
inline result<void> check_block_scaled(const packed_shape& from, const block_scaled_shape& to) {
  const any_format& format = from.format;
  if (format.macro_block != 0) {
    return error(errc::invalid_argument,
                 {"block-scaled operand: expected a format without macro blocks, whose factors the tensor cores do "
                  "not know, got factors of ",
                  format.macro_bits, " bits for ", elements_per_factor(format), " elements"});
  }
  const bool is_same = to.kind == block_scaled_kind::e4m3_16 || format == any_format(mxfp4{});
  if (!is_same) {
    return error(errc::invalid_argument, {"block-scaled operand: kind e8m0_32 is made of mxfp4-32, got ",
                                          name_of(format), "; kind e4m3_16 takes it"});
  }
  if (from.matrices != to.matrices || from.rows != to.rows || from.cols != to.cols) {
    return error(errc::shape_mismatch,
                 {"block-scaled operand: packed storage is [", from.matrices, ", ", from.rows, ", ", from.cols,
                  "], the operand [", to.matrices, ", ", to.rows, ", ", to.cols, "]"});
  }
  return check_layout_shape("block-scaled operand", from, {}, 1);
}

/// Says which buffer of an operand does not have its size, if one does not.
template <class Byte, class Float>
result<void> check_block_scaled_sizes(const block_scaled_view<Byte, Float>& view) {
  const auto expect = [](const char* buffer, std::size_t expected, std::size_t got) -> result<void> {
    if (expected == got) return {};
    return error(errc::shape_mismatch, {"block-scaled operand: ", buffer, " needs ", expected, " entries, got ", got});
  };
  if (auto fits = expect("codes", view.shape.code_bytes(), view.codes.size()); !fits) return fits;
  if (auto fits = expect("scales", view.shape.scale_bytes(), view.scales.size()); !fits) return fits;
  return expect("factors", view.shape.factor_count(), view.factors.size());
}

/// Whether any code is not a zero, of either sign.
[[nodiscard]] inline bool has_values(std::span<const std::uint8_t> codes) noexcept {
  return std::any_of(codes.begin(), codes.end(), [](std::uint8_t pair) { return (pair & 0x77u) != 0; });
}

/// The largest E8M0 code of a matrix's blocks that hold anything but zeros; NaN aside.
[[nodiscard]] inline std::optional<unsigned> top_scale(const packed_view<any_format>& matrix) {
  const std::size_t block_bytes = matrix.format.block / 2;
  std::optional<unsigned> top;
  for (std::size_t i = 0; i < matrix.scales.size(); ++i) {
    const unsigned scale = matrix.scales[i];
    if (scale == e8m0::nan_bits || (top && scale <= *top)) continue;
    if (has_values(matrix.codes.subspan(i * block_bytes, block_bytes))) top = scale;
  }
  return top;
}

/// Divides the values of a block by 2^down. Returns whether all of them stayed exact.
inline bool shift_block(std::span<std::uint8_t> codes, unsigned down) {
  bool is_exact = true;
  for (std::uint8_t& pair : codes) {
    const std::uint8_t before = pair;
    pair = shifted_codes(pair, down);
    for (const int half : {0, 4}) {
      const float wanted =
          std::ldexp(e2m1::from_bits(static_cast<std::uint8_t>(before >> half & 15)).value(), -static_cast<int>(down));
      is_exact = is_exact && e2m1::from_bits(static_cast<std::uint8_t>(pair >> half & 15)).value() == wanted;
    }
  }
  return is_exact;
}

/// The scales of an MX matrix as E4M3, each for 16 elements, and its codes. Returns how many blocks lost low bits.
inline std::size_t rebase(const packed_view<any_format>& from, const block_scaled_view<std::uint8_t, float>& to) {
  const std::optional<unsigned> top = top_scale(from);
  to.factors[0] = rebased_factor(top.value_or(135));
  const std::size_t block_bytes = from.format.block / 2, blocks = from.shape().blocks_per_row(),
                    repeats = from.format.block / 16, scales_per_row = to.shape.scales_per_row();
  std::size_t rounded = 0;
  for (std::size_t r = 0; r < from.rows; ++r) {
    std::uint8_t* const row = to.codes.data() + r * to.shape.code_bytes_per_row();
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::uint8_t scale = from.row_scales(0, r)[b];
      const std::span codes(row + b * block_bytes, block_bytes);
      std::uint8_t out = 0;
      if (scale == e8m0::nan_bits) {
        out = e4m3::nan_bits;
      } else if (has_values(codes)) {
        const unsigned below = *top - scale;
        out = rebased_scale(below);
        if (below > rebased_range && !shift_block(codes, below - rebased_range)) ++rounded;
      }
      for (std::size_t i = 0; i < repeats; ++i) {
        to.scales[layout::swizzled_offset(r, b * repeats + i, scales_per_row)] = out;
      }
    }
  }
  return rounded;
}

/// Writes matrix e as the one of an operand. Returns how many blocks lost low bits.
inline std::size_t write_operand(const packed_view<any_format>& in, std::size_t e,
                                 const block_scaled_view<std::uint8_t, float>& to) {
  const auto from = in[e];
  const packed_shape shape = from.shape();
  const std::size_t blocks = shape.blocks_per_row();
  const bool is_nv = in.format.scale == scale_type::e4m3;
  std::fill(to.codes.begin(), to.codes.end(), std::uint8_t{0});
  std::fill(to.scales.begin(), to.scales.end(), std::uint8_t{0});
  for (std::size_t r = 0; r < in.rows; ++r) {
    std::copy_n(from.row_codes(0, r), shape.code_bytes_per_row(), to.codes.data() + r * to.shape.code_bytes_per_row());
  }
  if (!is_nv && to.shape.kind == block_scaled_kind::e4m3_16) return rebase(from, to);
  for (std::size_t r = 0; r < in.rows; ++r) {
    for (std::size_t c = 0; c < blocks; ++c) {
      to.scales[layout::swizzled_offset(r, c, to.shape.scales_per_row())] = from.row_scales(0, r)[c];
    }
  }
  if (is_nv) to.factors[0] = in.tensor_scale(e);
  return 0;
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Writes packed storage [matrices, rows, cols] as operands of tensor cores, out.shape, which says the kind. Kind
/// e8m0_32 takes mxfp4-32; kind e4m3_16 takes nvfp4, and MXFP4 with either block too: a factor for each matrix brings
/// its scales into the range of E4M3, which holds 18 powers of two, and nothing is rounded where the scales of a matrix
/// lie within them (blocks of zeros do not count). A block further below the largest loses low bits, of elements at
/// most 2^-19 times the largest scale; the result says how many did. NaN scales stay NaN. Matrices are shared out among
/// the policy's threads; all policies of the CPU do the same.
///
/// Errors: invalid_argument for macro blocks, for kind e8m0_32 of another format and for negative scales;
/// shape_mismatch.
template <class Policy, packed_like Storage>
  requires(!device_policy<Policy>)
result<std::size_t> try_repack_to(const Policy& policy, const Storage& storage,
                                  const block_scaled_view<std::uint8_t, float>& out) {
  const packed_view<any_format> in = detail::as_packed(storage);
  if (auto fits = detail::check_storage(in); !fits) return fits.error();
  if (auto fits = detail::check_block_scaled(in.shape(), out.shape); !fits) return fits.error();
  if (auto fits = detail::check_block_scaled_sizes(out); !fits) return fits.error();
  const bool is_nv = in.format.scale == scale_type::e4m3;
  const auto negative = std::find_if(in.scales.begin(), in.scales.end(), [](std::uint8_t s) { return s > 0x7F; });
  if (is_nv && negative != in.scales.end()) {
    return error(errc::invalid_argument, {"block-scaled operand: expected scales that are not negative, "
                                          "codes up to 127, got code ",
                                          *negative});
  }
  std::vector<std::size_t> rounded(in.matrices);
  detail::for_each_row(policy.executor, in.matrices, std::max<std::size_t>(1, in.rows * in.cols),
                       [&](std::size_t e) { rounded[e] = detail::write_operand(in, e, out[e]); });
  return std::accumulate(rounded.begin(), rounded.end(), std::size_t{0});
}
/// try_repack_to, throwing its error.
template <class Policy, packed_like Storage>
  requires(!device_policy<Policy>)
std::size_t repack_to(const Policy& policy, const Storage& storage, const block_scaled_view<std::uint8_t, float>& out) {
  return try_repack_to(policy, storage, out).value();
}

/// The same into operands that it makes.
template <class Policy, packed_like Storage>
  requires(!device_policy<Policy>)
result<block_scaled> try_repack(const Policy& policy, const Storage& storage, block_scaled_kind kind) {
  const packed_view<any_format> in = detail::as_packed(storage);
  if (auto fits = detail::check_storage(in); !fits) return fits.error();
  block_scaled out;
  out.shape = {kind, in.matrices, in.rows, in.cols};
  if (auto fits = detail::check_block_scaled(in.shape(), out.shape); !fits) return fits.error();
  out.codes.resize(out.shape.code_bytes());
  out.scales.resize(out.shape.scale_bytes());
  out.factors.resize(out.shape.factor_count());
  auto rounded = try_repack_to(policy, storage, out.view());
  if (!rounded) return rounded.error();
  out.rounded_blocks = *rounded;
  return out;
}
/// try_repack, throwing its error.
template <class Policy, packed_like Storage>
  requires(!device_policy<Policy>)
[[nodiscard]] block_scaled repack(const Policy& policy, const Storage& storage, block_scaled_kind kind) {
  return try_repack(policy, storage, kind).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
