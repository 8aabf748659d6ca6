#pragma once

#include <tetromino/detail/macros_off.hpp>

#include "detail/checks.hpp"  // is_aligned
#include "stream.hpp"         // stream

#include <tetromino/e4m3.hpp>      // e4m3
#include <tetromino/error.hpp>     // error, result
#include <tetromino/float16.hpp>   // half, bfloat16
#include <tetromino/format.hpp>    // scale_type
#include <tetromino/packed.hpp>    // packed_view
#include <tetromino/repacked.hpp>  // repack_to

#include <concepts>     // std::same_as
#include <cstddef>      // std::size_t, std::byte
#include <cstdint>      // std::uint8_t
#include <span>         // std::span
#include <type_traits>  // std::is_const_v

/// Packed weights in the order in which products on the GPU read them; tetromino::repack_to puts them there.
namespace TETROMINO_NAMESPACE::cuda {

/// The activation types of 16 bits of the products.
template <class T>
concept activation = std::same_as<T, half> || std::same_as<T, bfloat16>;

/// What weights can be repacked for: the activation types of the products.
template <class T>
concept repackable = activation<T> || std::same_as<T, e4m3>;

/// How the rows of a gated layer's two projections lie in its weights [2 n, K], where they do: a product with such
/// weights gives silu(gate) * up, [M, n].
enum class gating_rows : std::uint8_t {
  none,         ///< one projection
  halves,       ///< all gate rows, then all up rows
  interleaved,  ///< gate and up rows in turn (gpt-oss)
};

/// Sizes of weights [matrices, rows, cols] in the order in which the products of the GPU read them: tiles of 64 rows by
/// 64 columns whose codes lie as the tensor cores' lanes want them, each with its block scales and factors of 2 bits; a
/// float for each row; and the macro-block bytes of 8 bits.
struct repacked_shape {
  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  gating_rows gating = gating_rows::none;

  [[nodiscard]] constexpr std::size_t row_tiles() const noexcept { return (rows + 63) / 64; }
  /// An even number, so that a product can take two tiles at a time.
  [[nodiscard]] constexpr std::size_t col_tiles() const noexcept { return (cols + 127) / 128 * 2; }
  /// Codes and block scales; of factors of 2 bits also those, one for each eight columns.
  [[nodiscard]] constexpr std::size_t tile_bytes() const noexcept {
    return 64 * 64 / 2 + 64 * 64 / format.block + (format.macro_bits == 2 ? 64 * 64 / 32 : 0);
  }
  /// Columns of a macro block as it is stored behind the tiles, 0 for none: one of 64 columns is two of 32, which
  /// spares the products a case.
  [[nodiscard]] constexpr std::size_t stored_macro_block() const noexcept {
    if (format.macro_bits == 2) return 0;
    return format.macro_block == 64 ? 32 : static_cast<std::size_t>(format.macro_block);
  }
  [[nodiscard]] constexpr std::size_t macros_per_row() const noexcept {
    const std::size_t macro_block = stored_macro_block();
    return macro_block == 0 ? 0 : (col_tiles() * 64 + macro_block - 1) / macro_block;
  }
  /// Where the row factors and the macro bytes start.
  [[nodiscard]] constexpr std::size_t factors_at() const noexcept {
    return (matrices * row_tiles() * col_tiles() * tile_bytes() + 127) / 128 * 128;
  }
  [[nodiscard]] constexpr std::size_t macros_at() const noexcept {
    return factors_at() + matrices * row_tiles() * 64 * sizeof(float);
  }
  /// Bytes of repacked weights.
  [[nodiscard]] constexpr std::size_t bytes() const noexcept {
    return macros_at() + matrices * row_tiles() * macros_per_row() * 64;
  }
  /// Columns of a product.
  [[nodiscard]] constexpr std::size_t outputs() const noexcept { return gating == gating_rows::none ? rows : rows / 2; }

  friend constexpr bool operator==(const repacked_shape&, const repacked_shape&) = default;
};

/// Weights in that order, for activations of type T, in device memory that somebody else owns, at a multiple of 128
/// bytes. `Byte` is const for a read-only view.
template <repackable T, class Byte = const std::byte>
struct repacked_view {
  repacked_shape shape{};
  std::span<Byte> data{};

  /// A mutable view is also a read-only one.
  template <class Other>
    requires(std::is_const_v<Other> && !std::is_const_v<Byte>)
  constexpr operator repacked_view<T, Other>() const noexcept { return {shape, data}; }
};

namespace detail {

template <repackable T>
result<void> repack(const stream& s, const packed_view<any_format>& w, const repacked_shape& shape, std::byte* out);

/// Says why a view has no room for what its shape says, if it has none.
template <repackable T, class Byte>
[[nodiscard]] result<void> check_repacked(const repacked_view<T, Byte>& w) {
  if (w.data.size() == w.shape.bytes() && is_aligned(w.data.data(), 128)) return {};
  return error(errc::shape_mismatch,
               {"repacked weights need ", w.shape.bytes(), " bytes at a multiple of 128, got ", w.data.size()});
}

/// Says that products with activations in E4M3 do not take weights of this format, if so. `what`: who asks.
[[nodiscard]] inline result<void> check_e4m3_format(const char* what, const any_format& format) {
  if (format.scale == scale_type::e8m0 && format.block == 32 && format.macro_block == 0) return {};
  return error(errc::invalid_argument,
               {what, ": activations in E4M3 multiply mxfp4-32 weights without macro blocks, got ", name_of(format),
                format.macro_block == 0 ? "" : " with macro blocks", "; half and bfloat16 multiply all"});
}

}  // namespace detail

/// The hook that tetromino::repack_to finds. out.shape says the gating, and has the format and the sizes of `w`.
///
/// For bfloat16 activations nothing is rounded. For half, a block whose scale is more than 2^24 below the largest of
/// its row (2^22 where factors have 2 bits) loses low bits, which are below 2^-24 of the row's largest weight. For
/// E4M3, see matmul_on. Errors: shape_mismatch; invalid_argument where products with activations in E4M3 do not take
/// the format; device.
template <repackable T>
[[nodiscard]] result<void> repack_on(const stream& s, const packed_view<any_format>& w,
                                     const repacked_view<T, std::byte>& out) {
  using tetromino::detail::text;
  const repacked_shape& shape = out.shape;
  if (!(shape.format == w.format) || shape.matrices != w.matrices || shape.rows != w.rows || shape.cols != w.cols) {
    return error(errc::shape_mismatch, {"repack: the weights are ", name_of(w.format), " [", w.matrices, ", ", w.rows,
                                        ", ", w.cols, "], the repacked shape says ", name_of(shape.format), " [",
                                        shape.matrices, ", ", shape.rows, ", ", shape.cols, "]"});
  }
  if (shape.gating != gating_rows::none && shape.rows % 2 != 0) {
    return error(errc::shape_mismatch, {"repack: gate and up rows come in pairs, got ", shape.rows, " rows"});
  }
  if (auto fits = detail::check_repacked(out); !fits) return fits;
  if constexpr (std::same_as<T, e4m3>) {
    if (auto fits = detail::check_e4m3_format("repack", shape.format); !fits) return fits;
  }
  return detail::repack<T>(s, w, shape, out.data.data());
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
