#pragma once

#include "detail/macros_off.hpp"

#include "detail/sizes.hpp"  // check_sizes
#include "error.hpp"         // error
#include "format.hpp"        // block_format, any_format

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <span>         // std::span, std::data
#include <type_traits>  // std::conditional_t, std::is_same_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE {

/// Sizes of a packed batch [matrices, rows, cols] in the linear layout.
/// - codes [matrices, rows, blocks_per_row * block / 2]: low nibble = even k; the last block is padded with zero codes
/// - scales [matrices, rows, blocks_per_row]: E8M0 or E4M3 bytes
/// - macros [matrices, rows, macros_per_row]: macro-block bytes, each one factor of 8 bits or four of 2 bits, the first
///   in its low bits; empty without macro blocks
struct packed_shape {
  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;

  TETROMINO_ABI constexpr packed_shape() = default;
  TETROMINO_ABI constexpr packed_shape(any_format format_, std::size_t rows_, std::size_t cols_) noexcept
      : packed_shape(format_, 1, rows_, cols_) {}
  TETROMINO_ABI constexpr packed_shape(any_format format_, std::size_t matrices_, std::size_t rows_,
                                       std::size_t cols_) noexcept
      : format(format_), matrices(matrices_), rows(rows_), cols(cols_) {}

  [[nodiscard]] TETROMINO_ABI constexpr std::size_t blocks_per_row() const noexcept {
    return cols / format.block + (cols % format.block != 0);
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t macros_per_row() const noexcept {
    return format.macro_block == 0 ? 0 : cols / format.macro_block + (cols % format.macro_block != 0);
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t code_bytes_per_row() const noexcept {
    return blocks_per_row() * (format.block / 2);
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t code_bytes() const noexcept {
    return matrices * rows * code_bytes_per_row();
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t scale_bytes() const noexcept {
    return matrices * rows * blocks_per_row();
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t macro_bytes() const noexcept {
    return matrices * rows * macros_per_row();
  }

  /// Buffers of these sizes as packed storage: spans, vectors or arrays of bytes, and behind them what the format has
  /// besides: macro bytes, or 1 or `matrices` floats for the tensor scales of NVFP4. The view is for reading if any of
  /// the bytes is const. Calls that take it check the sizes.
  template <class Codes, class Scales, class... More>
  [[nodiscard]] TETROMINO_ABI constexpr auto view(Codes&& codes, Scales&& scales, More&&... more) const;

  friend TETROMINO_ABI constexpr bool operator==(const packed_shape&, const packed_shape&) = default;
};

/// Packed 4-bit storage that somebody else owns, in the linear layout of packed_shape. `tensor_scales` holds the decode
/// scale of NVFP4, one float for the whole batch or one for each matrix; other formats leave it empty. `Byte` and
/// `Scale` are const for a read-only view. `Format` is a format type, or any_format where it is known at run time only.
template <block_format Format = any_format, class Byte = const std::uint8_t>
struct packed_view {
  using scale_value = std::conditional_t<std::is_const_v<Byte>, const float, float>;

  [[no_unique_address]] Format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::span<Byte> codes{};
  std::span<Byte> scales{};
  std::span<Byte> macros{};
  std::span<scale_value> tensor_scales{};

  [[nodiscard]] TETROMINO_ABI constexpr packed_shape shape() const noexcept {
    return {any_format(format), matrices, rows, cols};
  }

  /// The decode scale of matrix e (1 for formats without tensor scales).
  [[nodiscard]] TETROMINO_ABI constexpr float tensor_scale(std::size_t e) const noexcept {
    return tensor_scales.empty() ? 1.0f : tensor_scales[tensor_scales.size() == 1 ? 0 : e];
  }

  /// Where row r of matrix e starts.
  [[nodiscard]] TETROMINO_ABI constexpr Byte* row_codes(std::size_t e, std::size_t r) const noexcept {
    return codes.data() + (e * rows + r) * shape().code_bytes_per_row();
  }
  [[nodiscard]] TETROMINO_ABI constexpr Byte* row_scales(std::size_t e, std::size_t r) const noexcept {
    return scales.data() + (e * rows + r) * shape().blocks_per_row();
  }
  [[nodiscard]] TETROMINO_ABI constexpr Byte* row_macros(std::size_t e, std::size_t r) const noexcept {
    return macros.data() + (e * rows + r) * shape().macros_per_row();
  }

  /// One matrix of the batch.
  [[nodiscard]] TETROMINO_ABI constexpr packed_view operator[](std::size_t e) const noexcept {
    const packed_shape one{any_format(format), 1, rows, cols};
    return {format,
            1,
            rows,
            cols,
            codes.subspan(e * one.code_bytes(), one.code_bytes()),
            scales.subspan(e * one.scale_bytes(), one.scale_bytes()),
            macros.subspan(e * one.macro_bytes(), one.macro_bytes()),
            tensor_scales.size() <= 1 ? tensor_scales : tensor_scales.subspan(e, 1)};
  }

  /// A mutable view is also a read-only one, and every format can be seen as any_format.
  template <block_format Other, class OtherByte>
    requires((std::same_as<Other, Format> || std::same_as<Other, any_format>)&&(std::same_as<OtherByte, Byte> ||
                                                                                std::is_const_v<OtherByte>))
  TETROMINO_ABI constexpr operator packed_view<Other, OtherByte>() const noexcept {
    return {Other(format), matrices, rows, cols, codes, scales, macros, tensor_scales};
  }
};

/// Packed 4-bit storage that owns its bytes, in the linear layout of packed_shape.
template <block_format Format = any_format>
struct packed {
  [[no_unique_address]] Format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::vector<std::uint8_t> codes;
  std::vector<std::uint8_t> scales;
  std::vector<std::uint8_t> macros;
  std::vector<float> tensor_scales;

  TETROMINO_ABI packed() = default;
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI packed(const packed&) = default;
  TETROMINO_ABI packed(packed&&) noexcept = default;
  TETROMINO_ABI packed& operator=(const packed&) = default;
  TETROMINO_ABI packed& operator=(packed&&) noexcept = default;
  /// Zeroed storage for [matrices, rows, cols]; NVFP4 gets `tensor_scale_count` (1 or matrices) tensor scales.
  /// Throws shape_mismatch for more than 2^48 elements.
  TETROMINO_ABI packed(Format format_, std::size_t matrices_, std::size_t rows_, std::size_t cols_,
                       std::size_t tensor_scale_count = 1)
      : format(format_),
        matrices(matrices_),
        rows(rows_),
        cols((detail::check_sizes(matrices_, rows_, cols_).value(), cols_)),
        codes(shape().code_bytes()),
        scales(shape().scale_bytes()),
        macros(shape().macro_bytes()),
        tensor_scales(any_format(format).scale == scale_type::e4m3 ? tensor_scale_count : 0) {}

  [[nodiscard]] TETROMINO_ABI packed_shape shape() const noexcept { return {any_format(format), matrices, rows, cols}; }

  /// All bytes of the storage, tensor scales included.
  [[nodiscard]] TETROMINO_ABI std::size_t bytes() const noexcept {
    return codes.size() + scales.size() + macros.size() + tensor_scales.size() * sizeof(float);
  }

  // by pointers and sizes: a span of a vector takes compilers 15 ms for each type
  [[nodiscard]] TETROMINO_ABI packed_view<Format, std::uint8_t> view() noexcept {
    return {format,
            matrices,
            rows,
            cols,
            {codes.data(), codes.size()},
            {scales.data(), scales.size()},
            {macros.data(), macros.size()},
            {tensor_scales.data(), tensor_scales.size()}};
  }
  [[nodiscard]] TETROMINO_ABI packed_view<Format> view() const noexcept {
    return {format,
            matrices,
            rows,
            cols,
            {codes.data(), codes.size()},
            {scales.data(), scales.size()},
            {macros.data(), macros.size()},
            {tensor_scales.data(), tensor_scales.size()}};
  }
};

template <class Codes, class Scales, class... More>
TETROMINO_ABI constexpr auto packed_shape::view(Codes&& codes, Scales&& scales, More&&... more) const {
  using code = std::remove_pointer_t<decltype(std::data(codes))>;
  using scale = std::remove_pointer_t<decltype(std::data(scales))>;
  using byte = std::conditional_t<std::is_const_v<scale>, const code, code>;
  static_assert(std::is_same_v<const code, const std::uint8_t> && std::is_same_v<const scale, const std::uint8_t>,
                "codes and scales are std::uint8_t");
  packed_view<any_format, byte> out{format, matrices, rows, cols, codes, scales};
  [[maybe_unused]] const auto take = [&out](auto& buffer) {
    using element = std::remove_pointer_t<decltype(std::data(buffer))>;
    constexpr bool is_macro = std::is_same_v<const element, const std::uint8_t>;
    static_assert(is_macro || std::is_same_v<const element, const float>,
                  "behind codes and scales: macro bytes (std::uint8_t) or tensor scales (float)");
    if constexpr (is_macro) {
      out.macros = buffer;
    } else {
      out.tensor_scales = buffer;
    }
  };
  (take(more), ...);
  return out;
}

namespace detail::inline TETROMINO_ISA {

template <block_format Format, class Byte>
packed_view<any_format> as_packed(const packed_view<Format, Byte>& view) noexcept {
  return view;
}
template <block_format Format>
packed_view<any_format> as_packed(const packed<Format>& storage) noexcept {
  return storage.view();
}

/// Says why a format known at run time is none, if it is none.
TETROMINO_COLD inline result<void> unknown_format(const any_format& f) {
  return error(errc::invalid_argument,
               {"not a 4-bit block format: ", f.scale == scale_type::e8m0 ? "MX" : "NVFP4", " with block ", f.block,
                ", macro block ", f.macro_block, " of ", f.macro_bits, " bits"});
}
inline result<void> check_format(const any_format& f) {
  if (f.macro_bits != 8) {
    if (f == any_format(mbs<mxfp4, 8, 2>{}) || f == any_format(mbs<mxfp4, 16, 2>{})) return {};
    return unknown_format(f);
  }
  const bool has_block = f.block == 16 || (f.block == 32 && f.scale == scale_type::e8m0);
  const bool has_macro = f.macro_block == 32 || f.macro_block == 64 || f.macro_block == 128 || f.macro_block == 256;
  if (has_block && (f.macro_block == 0 || (has_macro && f.scale == scale_type::e8m0))) return {};
  return unknown_format(f);
}

TETROMINO_COLD inline error wrong_storage(const char* buffer, std::size_t expected, std::size_t got) {
  return error(errc::shape_mismatch, {"packed storage: ", buffer, " needs ", expected, " entries, got ", got});
}
/// Says which buffer of storage of this shape has not its size, if one has not.
inline result<void> check_storage(const packed_shape& shape, std::size_t codes, std::size_t scales, std::size_t macros,
                                  std::size_t tensor_scales) {
  if (auto known = check_format(shape.format); !known) return known;
  if (auto fits = check_sizes(shape.matrices, shape.rows, shape.cols); !fits) return fits;
  if (codes != shape.code_bytes()) return wrong_storage("codes", shape.code_bytes(), codes);
  if (scales != shape.scale_bytes()) return wrong_storage("scales", shape.scale_bytes(), scales);
  if (macros != shape.macro_bytes()) return wrong_storage("macros", shape.macro_bytes(), macros);
  const std::size_t wanted = shape.format.scale == scale_type::e8m0 ? 0 : 1;
  if (tensor_scales == wanted || (wanted == 1 && tensor_scales == shape.matrices)) return {};
  return wrong_storage("tensor_scales", wanted, tensor_scales);
}
/// The same of a view.
template <class View>
result<void> check_storage(const View& view) {
  return check_storage(view.shape(), view.codes.size(), view.scales.size(), view.macros.size(),
                       view.tensor_scales.size());
}

TETROMINO_COLD inline error wrong_shape(const packed_shape& shape, std::size_t matrices, std::size_t rows,
                                        std::size_t cols) {
  return error(errc::shape_mismatch, {"packed storage is [", shape.matrices, ", ", shape.rows, ", ", shape.cols,
                                      "], the matrices are [", matrices, ", ", rows, ", ", cols, "]"});
}
/// Says how a packed shape differs from the matrices it is meant for, if it does.
inline result<void> check_shape(const packed_shape& shape, std::size_t matrices, std::size_t rows, std::size_t cols) {
  if (shape.matrices == matrices && shape.rows == rows && shape.cols == cols) return {};
  return wrong_shape(shape, matrices, rows, cols);
}

}  // namespace detail::inline TETROMINO_ISA

/// Anything that can be read as packed 4-bit storage.
template <class Storage>
concept packed_like = requires(const Storage& storage) {
  detail::as_packed(storage);
};

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
