#pragma once

#include "../detail/macros_off.hpp"

#include "../detail/layout.hpp"  // check_layout_shape
#include "../packed.hpp"         // packed, packed_view, packed_like

#include <algorithm>  // std::copy, std::copy_n
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uint64_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline constexpr std::size_t ggml_mxfp4_block_bytes = 17;  // scale, 16 bytes of elements
inline constexpr std::size_t ggml_nvfp4_block_bytes = 36;  // 4 scales, 32 bytes of elements
inline constexpr std::size_t ggml_nvfp4_elements = 64;

inline result<void> check_ggml_shape(const packed_shape& shape) {
  return check_layout_shape("ggml", shape, {mxfp4{}, nvfp4{}},
                            is_nvfp4(shape.format) ? ggml_nvfp4_elements : mxfp4::block);
}

constexpr std::size_t ggml_block_count(const packed_shape& shape) noexcept {
  const std::size_t elements = shape.format.scale == scale_type::e4m3 ? ggml_nvfp4_elements : mxfp4::block;
  return shape.matrices * shape.rows * (shape.cols / elements);
}

constexpr std::size_t ggml_size(const packed_shape& shape) noexcept {
  return ggml_block_count(shape) *
         (shape.format.scale == scale_type::e4m3 ? ggml_nvfp4_block_bytes : ggml_mxfp4_block_bytes);
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

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

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
  const auto in = detail::as_packed(storage);
  const auto bytes = try_ggml_bytes(in.shape());
  if (!bytes) return bytes.error();
  if (auto fits = detail::check_storage(in); !fits) return fits.error();  // before room is made for what it claims
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

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA

#include "../detail/macros_back.hpp"
