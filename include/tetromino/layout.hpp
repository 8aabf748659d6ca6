#pragma once

#include "config.hpp"   // TETROMINO_EXPECTS
#include "error.hpp"    // error, result
#include "format.hpp"   // any_format, mxfp4, nvfp4
#include "packed.hpp"   // packed, packed_view, packed_like
#include "scaling.hpp"  // name_of

#include <algorithm>    // std::copy, std::copy_n, std::fill, std::find_if, std::equal, std::min
#include <bit>          // std::bit_cast, std::endian
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint32_t, std::uint64_t
#include <cstring>      // std::memcpy
#include <limits>       // std::numeric_limits
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

/// How other engines store the same 4-bit blocks. gpt-oss, compressed-tensors and ModelOpt keep the bytes of the linear
/// layout, so those are views, without a copy; ggml, interleaved rows and swizzled scales are other orders of the same
/// bytes, into storage that must not overlap the source. Nothing is ever rounded: the way there and back gives the same
/// bytes, and what a layout cannot hold is an error:
///   - formats that it does not have, and rows that do not end with a whole block
///   - block scales that its readers take for another value: NaN (made by the `poison` policy), negative ones
///   - tensor scales without an exact inverse, for compressed-tensors alone: see `invertible`
/// After an error, what the output holds is unspecified.
namespace TETROMINO_NAMESPACE::layout {

/// A gpt-oss checkpoint's tensors, MXFP4 with block 32: `*_blocks` u8 [matrices, rows, K / 32, 16] and `*_scales` u8
/// [matrices, rows, K / 32].
struct gpt_oss_view {
  std::span<const std::uint8_t> blocks{};
  std::span<const std::uint8_t> scales{};
};

/// A compressed-tensors checkpoint's tensors, MXFP4 with block 32 or NVFP4: `weight_packed` u8 [matrices, rows, K / 2],
/// `weight_scale` [matrices, rows, K / block] (u8 for MXFP4, F8_E4M3 for NVFP4), and for NVFP4 `weight_global_scale`
/// f32, one for all matrices or one for each, in encode sense: values are code * weight_scale / weight_global_scale.
struct compressed_tensors_view {
  std::span<const std::uint8_t> weight_packed{};
  std::span<const std::uint8_t> weight_scale{};
  std::span<const float> weight_global_scale{};
};

/// A ModelOpt checkpoint's tensors, NVFP4: `weight` u8 [matrices, rows, K / 2], `weight_scale` F8_E4M3 [matrices, rows,
/// K / 16] and `weight_scale_2` f32, one for all matrices or one for each, in decode sense: values are
/// code * weight_scale * weight_scale_2.
struct modelopt_view {
  std::span<const std::uint8_t> weight{};
  std::span<const std::uint8_t> weight_scale{};
  std::span<const float> weight_scale_2{};
};

inline namespace TETROMINO_ISA {

/// Bytes of block scales [matrices, rows, scales_per_row] in the 128x4 swizzle of cuBLASLt and CUTLASS: tiles of 512
/// bytes for 128 rows by 4 scales, a whole number of them for each matrix.
[[nodiscard]] constexpr std::size_t swizzled_bytes(std::size_t matrices, std::size_t rows,
                                                   std::size_t scales_per_row) noexcept {
  return matrices * ((rows + 127) / 128) * ((scales_per_row + 3) / 4) * 512;
}

/// Where the scale of row r, block c lies within its swizzled matrix. (cuBLASLt block scaling; CUTLASS
/// Sm1xxBlockScaledConfig)
[[nodiscard]] constexpr std::size_t swizzled_offset(std::size_t r, std::size_t c, std::size_t scales_per_row) noexcept {
  return (r / 128 * ((scales_per_row + 3) / 4) + c / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::layout

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline constexpr std::size_t ggml_mxfp4_block_bytes = 17;  // scale, 16 bytes of elements
inline constexpr std::size_t ggml_nvfp4_block_bytes = 36;  // 4 scales, 32 bytes of elements
inline constexpr std::size_t ggml_nvfp4_elements = 64;

inline error layout_error(errc code, std::string_view layout, std::string_view what) {
  return error(code, text("layout ", layout, ": ", what));
}

inline result<void> check_layout_size(std::string_view layout, std::string_view buffer, std::size_t expected,
                                      std::size_t got) {
  if (expected == got) return {};
  return layout_error(errc::shape_mismatch, layout, text(buffer, " needs ", expected, " entries, got ", got));
}

/// Says why a shape cannot be stored in a layout, if it cannot.
inline result<void> check_layout_shape(std::string_view layout, const packed_shape& shape, bool has_format,
                                       std::string_view formats, std::size_t multiple) {
  if (auto known = check_format(shape.format); !known) return known;
  if (!has_format) {
    return layout_error(errc::invalid_argument, layout,
                        text("it stores ", formats, ", got ", name_of(shape.format),
                             shape.format.macro_block == 0 ? "" : " with macro blocks"));
  }
  if (shape.cols % multiple != 0) {
    return layout_error(errc::shape_mismatch, layout,
                        text("it stores rows of whole blocks of ", multiple, ", got K = ", shape.cols));
  }
  std::size_t room = std::numeric_limits<std::size_t>::max();
  for (const std::size_t size : {shape.matrices, shape.rows, shape.cols}) {
    if (size != 0) room /= size;
  }
  if (room == 0) {
    return layout_error(
        errc::shape_mismatch, layout,
        text("expected fewer than 2^64 elements, got [", shape.matrices, ", ", shape.rows, ", ", shape.cols, "]"));
  }
  return {};
}

/// Says where the first block scale above `largest` is, if there is one.
inline result<void> check_layout_scales(std::string_view layout, const packed_shape& shape,
                                        std::span<const std::uint8_t> scales, std::uint8_t largest) {
  const auto bad = std::find_if(scales.begin(), scales.end(), [&](std::uint8_t scale) { return scale > largest; });
  if (bad == scales.end()) return {};
  const auto at = static_cast<std::size_t>(bad - scales.begin());
  const std::size_t per_row = shape.blocks_per_row();
  return layout_error(
      errc::non_finite, layout,
      text("expected finite, non-negative block scales, codes up to ", largest, "; got code ", *bad, " in matrix ",
           at / per_row / shape.rows, ", row ", at / per_row % shape.rows, ", block ", at % per_row));
}

inline constexpr std::uint8_t largest_e8m0 = 0xFE, largest_e4m3 = 0x7E;

inline bool is_plain_mxfp4(const any_format& format) { return format == any_format(mxfp4{}); }
inline bool is_nvfp4(const any_format& format) { return format == any_format(nvfp4{}); }

/// How many tensor scales a batch may have.
inline result<void> check_layout_tensor_scales(std::string_view layout, std::string_view buffer,
                                               const packed_shape& shape, std::size_t got) {
  if (is_nvfp4(shape.format)) return check_layout_size(layout, buffer, got == shape.matrices ? got : 1, got);
  return check_layout_size(layout, buffer, 0, got);
}

inline result<void> check_gpt_oss(const packed_shape& shape, std::size_t blocks, std::span<const std::uint8_t> scales) {
  constexpr std::string_view name = "gpt-oss";
  if (auto fits = check_layout_shape(name, shape, is_plain_mxfp4(shape.format), "mxfp4-32", 32); !fits) return fits;
  if (auto fits = check_layout_size(name, "blocks", shape.code_bytes(), blocks); !fits) return fits;
  if (auto fits = check_layout_size(name, "scales", shape.scale_bytes(), scales.size()); !fits) return fits;
  return check_layout_scales(name, shape, scales, largest_e8m0);
}

inline result<void> check_compressed_tensors(const packed_shape& shape, const layout::compressed_tensors_view& view) {
  constexpr std::string_view name = "compressed-tensors";
  const bool is_mx = is_plain_mxfp4(shape.format);
  if (auto fits =
          check_layout_shape(name, shape, is_mx || is_nvfp4(shape.format), "mxfp4-32 and nvfp4", shape.format.block);
      !fits) {
    return fits;
  }
  if (auto fits = check_layout_size(name, "weight_packed", shape.code_bytes(), view.weight_packed.size()); !fits) {
    return fits;
  }
  if (auto fits = check_layout_size(name, "weight_scale", shape.scale_bytes(), view.weight_scale.size()); !fits) {
    return fits;
  }
  if (is_mx) {
    if (auto fits = check_layout_scales(name, shape, view.weight_scale, largest_e8m0); !fits) return fits;
  }
  return check_layout_tensor_scales(name, "weight_global_scale", shape, view.weight_global_scale.size());
}

inline result<void> check_modelopt(const packed_shape& shape, const layout::modelopt_view& view) {
  constexpr std::string_view name = "modelopt";
  if (auto fits = check_layout_shape(name, shape, is_nvfp4(shape.format), "nvfp4", 16); !fits) return fits;
  if (auto fits = check_layout_size(name, "weight", shape.code_bytes(), view.weight.size()); !fits) return fits;
  if (auto fits = check_layout_size(name, "weight_scale", shape.scale_bytes(), view.weight_scale.size()); !fits) {
    return fits;
  }
  return check_layout_tensor_scales(name, "weight_scale_2", shape, view.weight_scale_2.size());
}

inline result<void> check_ggml_shape(const packed_shape& shape) {
  const bool is_nv = is_nvfp4(shape.format);
  return check_layout_shape("ggml", shape, is_nv || is_plain_mxfp4(shape.format), "mxfp4-32 and nvfp4",
                            is_nv ? ggml_nvfp4_elements : mxfp4::block);
}

constexpr std::size_t ggml_block_count(const packed_shape& shape) noexcept {
  const std::size_t elements = shape.format.scale == scale_type::e4m3 ? ggml_nvfp4_elements : mxfp4::block;
  return shape.matrices * shape.rows * (shape.cols / elements);
}

constexpr std::size_t ggml_size(const packed_shape& shape) noexcept {
  return ggml_block_count(shape) *
         (shape.format.scale == scale_type::e4m3 ? ggml_nvfp4_block_bytes : ggml_mxfp4_block_bytes);
}

/// `Bytes` bytes as a number, the first lowest.
template <std::size_t Bytes>
std::uint64_t load_bytes(const std::uint8_t* from) noexcept {
  std::uint64_t word = 0;
  if constexpr (std::endian::native == std::endian::little) {
    std::memcpy(&word, from, Bytes);
  } else {
    for (std::size_t i = 0; i < Bytes; ++i) word |= std::uint64_t{from[i]} << (8 * i);
  }
  return word;
}
template <std::size_t Bytes>
void store_bytes(std::uint64_t word, std::uint8_t* to) noexcept {
  if constexpr (std::endian::native == std::endian::little) {
    std::memcpy(to, &word, Bytes);
  } else {
    for (std::size_t i = 0; i < Bytes; ++i) to[i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
}

/// Four bytes to the even bytes of a word of eight, and back.
constexpr std::uint64_t spread_bytes(std::uint64_t x) noexcept {
  x = (x | x << 16) & 0x0000FFFF0000FFFFu;
  return (x | x << 8) & 0x00FF00FF00FF00FFu;
}
constexpr std::uint64_t gather_bytes(std::uint64_t x) noexcept {
  x = (x | x >> 8) & 0x0000FFFF0000FFFFu;
  return (x | x >> 16) & 0x00000000FFFFFFFFu;
}
inline constexpr std::uint64_t low_nibbles = 0x0F0F0F0Fu, high_nibbles = 0xF0F0F0F0u;

/// The elements under one scale, in `Bytes` bytes, from pairs of neighbours to pairs of (first half, second half) and
/// back; four bytes of each half at a time.
template <std::size_t Bytes>
void split_halves(const std::uint8_t* pairs, std::uint8_t* halves) noexcept {
  for (std::size_t i = 0; i < Bytes / 2; i += 4) {
    const std::uint64_t first = load_bytes<4>(pairs + i), second = load_bytes<4>(pairs + Bytes / 2 + i);
    const std::uint64_t even = (first & low_nibbles) | (second & low_nibbles) << 4;
    const std::uint64_t odd = (first >> 4 & low_nibbles) | (second & high_nibbles);
    store_bytes<8>(spread_bytes(even) | spread_bytes(odd) << 8, halves + 2 * i);
  }
}
template <std::size_t Bytes>
void join_halves(const std::uint8_t* halves, std::uint8_t* pairs) noexcept {
  for (std::size_t i = 0; i < Bytes / 2; i += 4) {
    const std::uint64_t word = load_bytes<8>(halves + 2 * i);
    const std::uint64_t even = gather_bytes(word & 0x00FF00FF00FF00FFu);
    const std::uint64_t odd = gather_bytes(word >> 8 & 0x00FF00FF00FF00FFu);
    store_bytes<4>((even & low_nibbles) | (odd & low_nibbles) << 4, pairs + i);
    store_bytes<4>((even >> 4 & low_nibbles) | (odd & high_nibbles), pairs + Bytes / 2 + i);
  }
}

/// Blocks of `Scales` scales, each over `Bytes` bytes of elements, from and to linear storage.
template <std::size_t Scales, std::size_t Bytes>
void write_ggml_blocks(const std::uint8_t* codes, const std::uint8_t* scales, std::uint8_t* blocks,
                       std::size_t count) noexcept {
  for (std::size_t b = 0; b < count; ++b) {
    std::copy_n(scales + b * Scales, Scales, blocks);
    blocks += Scales;
    for (std::size_t s = 0; s < Scales; ++s, codes += Bytes, blocks += Bytes) split_halves<Bytes>(codes, blocks);
  }
}
template <std::size_t Scales, std::size_t Bytes>
void read_ggml_blocks(const std::uint8_t* blocks, std::uint8_t* codes, std::uint8_t* scales,
                      std::size_t count) noexcept {
  for (std::size_t b = 0; b < count; ++b) {
    std::copy_n(blocks, Scales, scales + b * Scales);
    blocks += Scales;
    for (std::size_t s = 0; s < Scales; ++s, codes += Bytes, blocks += Bytes) join_halves<Bytes>(blocks, codes);
  }
}

/// Says which of row-major and swizzled scales does not have its size, if one does not.
inline result<void> check_swizzle(std::size_t matrices, std::size_t rows, std::size_t scales_per_row,
                                  std::size_t scales, std::size_t swizzled) {
  constexpr std::string_view name = "128x4 swizzle";
  std::size_t room = std::numeric_limits<std::size_t>::max() / 1024;
  for (const std::size_t size : {matrices, rows, scales_per_row}) {
    if (size != 0) room /= size;
  }
  if (room == 0) {
    return layout_error(
        errc::shape_mismatch, name,
        text("expected fewer than 2^54 scales, got [", matrices, ", ", rows, ", ", scales_per_row, "]"));
  }
  if (auto fits = check_layout_size(name, "scales", matrices * rows * scales_per_row, scales); !fits) return fits;
  return check_layout_size(name, "swizzled scales", layout::swizzled_bytes(matrices, rows, scales_per_row), swizzled);
}

/// Copies up to 4 scales; almost always 4, in one move.
inline void copy_quad(const std::uint8_t* from, std::size_t count, std::uint8_t* to) noexcept {
  if (count == 4) {
    store_bytes<4>(load_bytes<4>(from), to);
  } else {
    std::copy_n(from, count, to);
  }
}

/// Calls visit(matrix, row, first scale, how many) for each run of up to 4 scales that stay together in the swizzle.
template <class Visit>
void for_each_quad(std::size_t matrices, std::size_t rows, std::size_t scales_per_row, const Visit& visit) {
  if (rows == 0 || scales_per_row == 0) return;
  for (std::size_t e = 0; e < matrices; ++e) {
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::size_t c = 0; c < scales_per_row; c += 4) visit(e, r, c, std::min<std::size_t>(4, scales_per_row - c));
    }
  }
}

/// Says how two halves and the storage with their rows in turn do not fit together, if they do not.
template <class Half, class Whole>
result<void> check_interleaved(const Half& even, const Half& odd, const Whole& whole) {
  if (auto fits = check_storage(even); !fits) return fits;
  if (auto fits = check_storage(odd); !fits) return fits;
  if (auto fits = check_storage(whole); !fits) return fits;
  const packed_shape half = even.shape();
  packed_shape twice = half;
  twice.rows *= 2;
  const auto shape_of = [](const packed_shape& s) {
    const std::size_t macro = s.format.macro_block;
    return text('[', s.matrices, ", ", s.rows, ", ", s.cols, "] of ", name_of(s.format),
                macro == 0 ? std::string() : text(" with macro blocks of ", macro));
  };
  if (odd.shape() != half || whole.shape() != twice) {
    return layout_error(errc::shape_mismatch, "interleaved rows",
                        text("expected two of one shape and one of twice the rows, got ", shape_of(half), ", ",
                             shape_of(odd.shape()), " and ", shape_of(whole.shape())));
  }
  if (odd.tensor_scales.size() != even.tensor_scales.size() ||
      whole.tensor_scales.size() != even.tensor_scales.size()) {
    return layout_error(errc::shape_mismatch, "interleaved rows",
                        text("expected equally many tensor scales, got ", even.tensor_scales.size(), ", ",
                             odd.tensor_scales.size(), " and ", whole.tensor_scales.size()));
  }
  return {};
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) noexcept {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
  });
}

template <class View, class Visit>
void for_each_row_pair(const View& half, const Visit& visit) {
  if (half.codes.empty()) return;
  for (std::size_t e = 0; e < half.matrices; ++e) {
    for (std::size_t r = 0; r < half.rows; ++r) visit(e, r);
  }
}

template <class From, class To>
void copy_packed_row(const From& from, std::size_t from_e, std::size_t from_r, const To& to, std::size_t to_e,
                     std::size_t to_r) {
  const packed_shape shape = from.shape();
  std::copy_n(from.row_codes(from_e, from_r), shape.code_bytes_per_row(), to.row_codes(to_e, to_r));
  std::copy_n(from.row_scales(from_e, from_r), shape.blocks_per_row(), to.row_scales(to_e, to_r));
  std::copy_n(from.row_macros(from_e, from_r), shape.macros_per_row(), to.row_macros(to_e, to_r));
}

/// The inverse as a float; it is as exact as a float can be.
constexpr float reciprocal(float x) noexcept { return 1.0f / x; }

constexpr bool is_positive_finite(float x) noexcept { return x > 0.0f && x <= std::numeric_limits<float>::max(); }

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

/// Linear storage as the tensors of a gpt-oss checkpoint, without a copy. Fails with errc::invalid_argument for another
/// format than mxfp4, errc::shape_mismatch for K that is no multiple of 32, errc::non_finite for a NaN block scale.
template <packed_like Storage>
[[nodiscard]] result<gpt_oss_view> try_as_gpt_oss(const Storage& storage) {
  const auto in = detail::as_packed(storage);
  if (auto fits = detail::check_gpt_oss(in.shape(), in.codes.size(), in.scales); !fits) return fits.error();
  return gpt_oss_view{in.codes, in.scales};
}
template <packed_like Storage>
[[nodiscard]] gpt_oss_view as_gpt_oss(const Storage& storage) {
  return try_as_gpt_oss(storage).value();
}

/// The tensors of a gpt-oss checkpoint as linear storage [matrices, rows, cols], without a copy. Fails as `as_gpt_oss`
/// does, and for tensors of another size.
[[nodiscard]] inline result<packed_view<mxfp4>> try_from_gpt_oss(gpt_oss_view in, std::size_t matrices,
                                                                 std::size_t rows, std::size_t cols) {
  const packed_shape shape{mxfp4{}, matrices, rows, cols};
  if (auto fits = detail::check_gpt_oss(shape, in.blocks.size(), in.scales); !fits) return fits.error();
  return packed_view<mxfp4>{mxfp4{}, matrices, rows, cols, in.blocks, in.scales};
}
[[nodiscard]] inline packed_view<mxfp4> from_gpt_oss(gpt_oss_view in, std::size_t matrices, std::size_t rows,
                                                     std::size_t cols) {
  return try_from_gpt_oss(in, matrices, rows, cols).value();
}

/// Linear storage as the tensors of a ModelOpt checkpoint, without a copy. Fails with errc::invalid_argument for
/// another format than nvfp4, errc::shape_mismatch for K that is no multiple of 16.
template <packed_like Storage>
[[nodiscard]] result<modelopt_view> try_as_modelopt(const Storage& storage) {
  const auto in = detail::as_packed(storage);
  const modelopt_view out{in.codes, in.scales, in.tensor_scales};
  if (auto fits = detail::check_modelopt(in.shape(), out); !fits) return fits.error();
  return out;
}
template <packed_like Storage>
[[nodiscard]] modelopt_view as_modelopt(const Storage& storage) {
  return try_as_modelopt(storage).value();
}

/// The tensors of a ModelOpt checkpoint as linear storage [matrices, rows, cols], without a copy. Fails as
/// `as_modelopt` does, and for tensors of another size.
[[nodiscard]] inline result<packed_view<nvfp4>> try_from_modelopt(modelopt_view in, std::size_t matrices,
                                                                  std::size_t rows, std::size_t cols) {
  if (auto fits = detail::check_modelopt({nvfp4{}, matrices, rows, cols}, in); !fits) return fits.error();
  return packed_view<nvfp4>{nvfp4{}, matrices, rows, cols, in.weight, in.weight_scale, {}, in.weight_scale_2};
}
[[nodiscard]] inline packed_view<nvfp4> from_modelopt(modelopt_view in, std::size_t matrices, std::size_t rows,
                                                      std::size_t cols) {
  return try_from_modelopt(in, matrices, rows, cols).value();
}

/// Whether a tensor scale survives being stored as its inverse: 1 / (1 / scale) gives it back, bit for bit. About one
/// float in six does not, because floats lie denser on one side of the inverse than on the other.
[[nodiscard]] constexpr bool is_invertible(float scale) noexcept {
  return detail::is_positive_finite(scale) && detail::is_positive_finite(detail::reciprocal(scale)) &&
         detail::reciprocal(detail::reciprocal(scale)) == scale;
}

/// The tensor scale to quantize with when the result is going to be stored as compressed-tensors: `scale` itself if it
/// is invertible, otherwise a neighbour that is. Pre: 2^-126 <= scale <= 2^126.
[[nodiscard]] constexpr float invertible(float scale) {
  TETROMINO_EXPECTS(scale >= 0x1p-126f && scale <= 0x1p126f, "invertible needs a tensor scale from 2^-126 to 2^126");
  return detail::reciprocal(detail::reciprocal(scale));
}

/// Linear storage as the tensors of a compressed-tensors checkpoint, without a copy, except that the inverses of the
/// tensor scales are written to `global_scales`, as many as there are tensor scales. Fails with errc::invalid_argument
/// for another format than mxfp4 or nvfp4 and for a tensor scale that is not `invertible`, errc::shape_mismatch for K
/// that is no multiple of the block, errc::non_finite for a NaN block scale of MXFP4.
template <packed_like Storage>
[[nodiscard]] result<compressed_tensors_view> try_as_compressed_tensors(const Storage& storage,
                                                                        std::span<float> global_scales = {}) {
  const auto in = detail::as_packed(storage);
  const compressed_tensors_view out{in.codes, in.scales, in.tensor_scales};
  if (auto fits = detail::check_compressed_tensors(in.shape(), out); !fits) return fits.error();
  if (auto fits = detail::check_layout_size("compressed-tensors", "global_scales", in.tensor_scales.size(),
                                            global_scales.size());
      !fits) {
    return fits.error();
  }
  for (std::size_t i = 0; i < global_scales.size(); ++i) {
    if (!is_invertible(in.tensor_scales[i])) {
      return detail::layout_error(errc::invalid_argument, "compressed-tensors",
                                  detail::text("it stores the inverse of a tensor scale; expected a scale that its "
                                               "inverse gives back (see layout::invertible), got ",
                                               in.tensor_scales[i]));
    }
    global_scales[i] = detail::reciprocal(in.tensor_scales[i]);
  }
  return compressed_tensors_view{in.codes, in.scales, global_scales};
}
template <packed_like Storage>
[[nodiscard]] compressed_tensors_view as_compressed_tensors(const Storage& storage,
                                                            std::span<float> global_scales = {}) {
  return try_as_compressed_tensors(storage, global_scales).value();
}

/// The tensors of a compressed-tensors checkpoint as linear storage [matrices, rows, cols], without a copy, except that
/// the inverses of the global scales are written to `tensor_scales`, as many as there are global scales. These are the
/// decode scales that engines compute when they load such a file. Two neighbouring global scales can have the same
/// inverse: written again, a file keeps all codes, block scales and decoded values, but its global scale may become
/// that neighbour. Fails as `as_compressed_tensors` does, and for tensors of another size.
template <block_format Format>
[[nodiscard]] result<packed_view<Format>> try_from_compressed_tensors(Format format, compressed_tensors_view in,
                                                                      std::size_t matrices, std::size_t rows,
                                                                      std::size_t cols,
                                                                      std::span<float> tensor_scales = {}) {
  constexpr std::string_view name = "compressed-tensors";
  if (auto fits = detail::check_compressed_tensors({any_format(format), matrices, rows, cols}, in); !fits) {
    return fits.error();
  }
  if (auto fits = detail::check_layout_size(name, "tensor_scales", in.weight_global_scale.size(), tensor_scales.size());
      !fits) {
    return fits.error();
  }
  for (std::size_t i = 0; i < tensor_scales.size(); ++i) {
    const float global_scale = in.weight_global_scale[i];
    if (!detail::is_positive_finite(global_scale) || !detail::is_positive_finite(detail::reciprocal(global_scale))) {
      return detail::layout_error(
          errc::non_finite, name,
          detail::text("expected a positive, finite weight_global_scale with a finite inverse, got ", global_scale));
    }
    tensor_scales[i] = detail::reciprocal(global_scale);
  }
  return packed_view<Format>{format, matrices, rows, cols, in.weight_packed, in.weight_scale, {}, tensor_scales};
}
template <block_format Format>
[[nodiscard]] packed_view<Format> from_compressed_tensors(Format format, compressed_tensors_view in,
                                                          std::size_t matrices, std::size_t rows, std::size_t cols,
                                                          std::span<float> tensor_scales = {}) {
  return try_from_compressed_tensors(format, in, matrices, rows, cols, tensor_scales).value();
}

/// Bytes of a ggml tensor: 17 for each 32 elements of MXFP4 (`block_mxfp4`), 36 for each 64 of NVFP4 (`block_nvfp4`).
/// Fails with errc::invalid_argument for other formats, errc::shape_mismatch for K that is no multiple of 32 or 64.
[[nodiscard]] inline result<std::size_t> try_ggml_bytes(const packed_shape& shape) {
  if (auto fits = detail::check_ggml_shape(shape); !fits) return fits.error();
  return detail::ggml_size(shape);
}
[[nodiscard]] inline std::size_t ggml_bytes(const packed_shape& shape) { return try_ggml_bytes(shape).value(); }

/// Writes linear storage as the blocks of a ggml tensor: each block's scale (4 scales for NVFP4), then its elements in
/// split halves. `blocks` has ggml_bytes(shape). The tensor scales of NVFP4 stay as they are, in decode sense: ggml
/// keeps them in a tensor of their own. Fails as `ggml_bytes` does, for a wrong size, and with errc::non_finite for a
/// block scale that ggml reads as another value (NaN; negative ones of NVFP4).
template <packed_like Storage>
[[nodiscard]] result<void> try_to_ggml(const Storage& storage, std::span<std::uint8_t> blocks) {
  const auto in = detail::as_packed(storage);
  const packed_shape shape = in.shape();
  if (auto fits = detail::check_ggml_shape(shape); !fits) return fits;
  if (auto fits = detail::check_storage(in); !fits) return fits;
  if (auto fits = detail::check_layout_size("ggml", "blocks", detail::ggml_size(shape), blocks.size()); !fits) {
    return fits;
  }
  const bool is_mx = shape.format.scale == scale_type::e8m0;
  const std::uint8_t largest = is_mx ? detail::largest_e8m0 : detail::largest_e4m3;
  if (auto fits = detail::check_layout_scales("ggml", shape, in.scales, largest); !fits) return fits;
  const auto write = is_mx ? detail::write_ggml_blocks<1, 16> : detail::write_ggml_blocks<4, 8>;
  write(in.codes.data(), in.scales.data(), blocks.data(), detail::ggml_block_count(shape));
  return {};
}
template <packed_like Storage>
void to_ggml(const Storage& storage, std::span<std::uint8_t> blocks) {
  try_to_ggml(storage, blocks).value();
}
template <packed_like Storage>
[[nodiscard]] result<std::vector<std::uint8_t>> try_to_ggml(const Storage& storage) {
  const auto bytes = try_ggml_bytes(detail::as_packed(storage).shape());
  if (!bytes) return bytes.error();
  std::vector<std::uint8_t> blocks(*bytes);
  if (auto done = try_to_ggml(storage, blocks); !done) return done.error();
  return blocks;
}
template <packed_like Storage>
[[nodiscard]] std::vector<std::uint8_t> to_ggml(const Storage& storage) {
  return try_to_ggml(storage).value();
}

/// Reads the blocks of a ggml tensor into the codes and scales of linear storage; tensor scales are left as they are.
/// Fails as `to_ggml` does.
[[nodiscard]] inline result<void> try_from_ggml(std::span<const std::uint8_t> blocks,
                                                packed_view<any_format, std::uint8_t> out) {
  const packed_shape shape = out.shape();
  if (auto fits = detail::check_ggml_shape(shape); !fits) return fits;
  if (auto fits = detail::check_storage(out); !fits) return fits;
  if (auto fits = detail::check_layout_size("ggml", "blocks", detail::ggml_size(shape), blocks.size()); !fits) {
    return fits;
  }
  const bool is_mx = shape.format.scale == scale_type::e8m0;
  const auto read = is_mx ? detail::read_ggml_blocks<1, 16> : detail::read_ggml_blocks<4, 8>;
  read(blocks.data(), out.codes.data(), out.scales.data(), detail::ggml_block_count(shape));
  return detail::check_layout_scales("ggml", shape, out.scales, is_mx ? detail::largest_e8m0 : detail::largest_e4m3);
}
inline void from_ggml(std::span<const std::uint8_t> blocks, packed_view<any_format, std::uint8_t> out) {
  try_from_ggml(blocks, out).value();
}
/// The same, into new storage [matrices, rows, cols] with these tensor scales: one or one for each matrix for NVFP4,
/// none for MXFP4.
template <block_format Format>
[[nodiscard]] result<packed<Format>> try_from_ggml(Format format, std::span<const std::uint8_t> blocks,
                                                   std::size_t matrices, std::size_t rows, std::size_t cols,
                                                   std::span<const float> tensor_scales = {}) {
  const packed_shape shape{any_format(format), matrices, rows, cols};
  if (auto fits = detail::check_ggml_shape(shape); !fits) return fits.error();
  if (auto fits = detail::check_layout_size("ggml", "blocks", detail::ggml_size(shape), blocks.size()); !fits) {
    return fits.error();
  }
  if (auto fits = detail::check_layout_tensor_scales("ggml", "tensor_scales", shape, tensor_scales.size()); !fits) {
    return fits.error();
  }
  packed<Format> out(format, matrices, rows, cols, tensor_scales.size());
  std::copy(tensor_scales.begin(), tensor_scales.end(), out.tensor_scales.begin());
  if (auto done = try_from_ggml(blocks, out.view()); !done) return done.error();
  return out;
}
template <block_format Format>
[[nodiscard]] packed<Format> from_ggml(Format format, std::span<const std::uint8_t> blocks, std::size_t matrices,
                                       std::size_t rows, std::size_t cols, std::span<const float> tensor_scales = {}) {
  return try_from_ggml(format, blocks, matrices, rows, cols, tensor_scales).value();
}

/// Writes row-major block scales [matrices, rows, scales_per_row], E8M0 or E4M3, in the 128x4 swizzle; padding is zero.
/// `swizzled` has swizzled_bytes of them. Fails with errc::shape_mismatch for wrong sizes.
[[nodiscard]] inline result<void> try_swizzle_scales(std::span<const std::uint8_t> scales, std::size_t matrices,
                                                     std::size_t rows, std::size_t scales_per_row,
                                                     std::span<std::uint8_t> swizzled) {
  if (auto fits = detail::check_swizzle(matrices, rows, scales_per_row, scales.size(), swizzled.size()); !fits) {
    return fits;
  }
  std::fill(swizzled.begin(), swizzled.end(), std::uint8_t{0});
  const std::size_t matrix_bytes = swizzled_bytes(1, rows, scales_per_row);
  detail::for_each_quad(
      matrices, rows, scales_per_row, [&](std::size_t e, std::size_t r, std::size_t c, std::size_t n) {
        const std::uint8_t* const from = scales.data() + (e * rows + r) * scales_per_row + c;
        detail::copy_quad(from, n, swizzled.data() + e * matrix_bytes + swizzled_offset(r, c, scales_per_row));
      });
  return {};
}
inline void swizzle_scales(std::span<const std::uint8_t> scales, std::size_t matrices, std::size_t rows,
                           std::size_t scales_per_row, std::span<std::uint8_t> swizzled) {
  try_swizzle_scales(scales, matrices, rows, scales_per_row, swizzled).value();
}
/// The block scales of packed storage, in the 128x4 swizzle. Fails with errc::shape_mismatch for broken storage.
template <packed_like Storage>
[[nodiscard]] result<std::vector<std::uint8_t>> try_swizzled_scales(const Storage& storage) {
  const auto in = detail::as_packed(storage);
  const packed_shape shape = in.shape();
  if (auto fits = detail::check_storage(in); !fits) return fits.error();
  std::vector<std::uint8_t> out(swizzled_bytes(in.matrices, in.rows, shape.blocks_per_row()));
  if (auto done = try_swizzle_scales(in.scales, in.matrices, in.rows, shape.blocks_per_row(), out); !done) {
    return done.error();
  }
  return out;
}
template <packed_like Storage>
[[nodiscard]] std::vector<std::uint8_t> swizzled_scales(const Storage& storage) {
  return try_swizzled_scales(storage).value();
}

/// Reads block scales in the 128x4 swizzle back to row-major [matrices, rows, scales_per_row]; padding is not looked
/// at. Fails with errc::shape_mismatch for wrong sizes.
[[nodiscard]] inline result<void> try_unswizzle_scales(std::span<const std::uint8_t> swizzled, std::size_t matrices,
                                                       std::size_t rows, std::size_t scales_per_row,
                                                       std::span<std::uint8_t> scales) {
  if (auto fits = detail::check_swizzle(matrices, rows, scales_per_row, scales.size(), swizzled.size()); !fits) {
    return fits;
  }
  const std::size_t matrix_bytes = swizzled_bytes(1, rows, scales_per_row);
  detail::for_each_quad(
      matrices, rows, scales_per_row, [&](std::size_t e, std::size_t r, std::size_t c, std::size_t n) {
        const std::uint8_t* const from = swizzled.data() + e * matrix_bytes + swizzled_offset(r, c, scales_per_row);
        detail::copy_quad(from, n, scales.data() + (e * rows + r) * scales_per_row + c);
      });
  return {};
}
inline void unswizzle_scales(std::span<const std::uint8_t> swizzled, std::size_t matrices, std::size_t rows,
                             std::size_t scales_per_row, std::span<std::uint8_t> scales) {
  try_unswizzle_scales(swizzled, matrices, rows, scales_per_row, scales).value();
}

/// Takes rows in turn from two equally shaped [matrices, rows, cols] into one [matrices, 2 * rows, cols]: row 2r is row
/// r of `even`, row 2r + 1 is row r of `odd`. So gpt-oss stores gate (even) and up (odd) projections as one. Any
/// format; NVFP4 needs the same tensor scales on both sides. Fails with errc::shape_mismatch or errc::invalid_argument.
template <packed_like Even, packed_like Odd>
[[nodiscard]] result<void> try_interleave_rows(const Even& even, const Odd& odd,
                                               packed_view<any_format, std::uint8_t> out) {
  const auto first = detail::as_packed(even), second = detail::as_packed(odd);
  if (auto fits = detail::check_interleaved(first, second, out); !fits) return fits;
  if (!detail::same_bits(first.tensor_scales, second.tensor_scales)) {
    return detail::layout_error(errc::invalid_argument, "interleaved rows",
                                "expected the same tensor scales for both halves, got different ones");
  }
  std::copy(first.tensor_scales.begin(), first.tensor_scales.end(), out.tensor_scales.begin());
  detail::for_each_row_pair(first, [&](std::size_t e, std::size_t r) {
    detail::copy_packed_row(first, e, r, out, e, 2 * r);
    detail::copy_packed_row(second, e, r, out, e, 2 * r + 1);
  });
  return {};
}
template <packed_like Even, packed_like Odd>
void interleave_rows(const Even& even, const Odd& odd, packed_view<any_format, std::uint8_t> out) {
  try_interleave_rows(even, odd, out).value();
}

/// The other way: rows 0, 2, 4 ... of [matrices, 2 * rows, cols] to `even`, rows 1, 3, 5 ... to `odd`. Fails with
/// errc::shape_mismatch or errc::invalid_argument.
template <packed_like Storage>
[[nodiscard]] result<void> try_deinterleave_rows(const Storage& storage, packed_view<any_format, std::uint8_t> even,
                                                 packed_view<any_format, std::uint8_t> odd) {
  const auto in = detail::as_packed(storage);
  if (auto fits = detail::check_interleaved(even, odd, in); !fits) return fits;
  std::copy(in.tensor_scales.begin(), in.tensor_scales.end(), even.tensor_scales.begin());
  std::copy(in.tensor_scales.begin(), in.tensor_scales.end(), odd.tensor_scales.begin());
  detail::for_each_row_pair(even, [&](std::size_t e, std::size_t r) {
    detail::copy_packed_row(in, e, 2 * r, even, e, r);
    detail::copy_packed_row(in, e, 2 * r + 1, odd, e, r);
  });
  return {};
}
template <packed_like Storage>
void deinterleave_rows(const Storage& storage, packed_view<any_format, std::uint8_t> even,
                       packed_view<any_format, std::uint8_t> odd) {
  try_deinterleave_rows(storage, even, odd).value();
}

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA
