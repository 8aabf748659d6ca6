#pragma once

/// What layouts share: checks of shapes and scales, and bytes as numbers.

#include "../error.hpp"    // error, result
#include "../format.hpp"   // any_format, mxfp4, nvfp4
#include "../packed.hpp"   // packed_shape, check_format
#include "../scaling.hpp"  // name_of
#include "sizes.hpp"       // check_sizes

#include <algorithm>         // std::find
#include <bit>               // std::endian
#include <cstddef>           // std::size_t
#include <cstdint>           // std::uint8_t, std::uint64_t
#include <cstring>           // std::memcpy
#include <initializer_list>  // std::initializer_list
#include <span>              // std::span
#include <string>            // std::string
#include <string_view>       // std::string_view

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline error layout_error(errc code, std::string_view layout, std::string_view what) {
  return error(code, {"layout ", layout, ": ", what});
}

inline result<void> check_layout_size(std::string_view layout, std::string_view buffer, std::size_t expected,
                                      std::size_t got) {
  if (expected == got) return {};
  return layout_error(errc::shape_mismatch, layout, text(buffer, " needs ", expected, " entries, got ", got));
}

/// Says why a shape cannot be stored in a layout that stores `formats` (all, where none is named) in rows of a multiple
/// of so many elements, if it cannot.
inline result<void> check_layout_shape(std::string_view layout, const packed_shape& shape,
                                       std::initializer_list<any_format> formats, std::size_t multiple) {
  if (auto known = check_format(shape.format); !known) return known;
  if (formats.size() > 0 && std::find(formats.begin(), formats.end(), shape.format) == formats.end()) {
    std::string stored;
    for (const any_format& f : formats) stored += text(stored.empty() ? "" : " and ", name_of(f));
    return layout_error(errc::invalid_argument, layout,
                        text("it stores ", stored, ", got ", name_of(shape.format),
                             shape.format.macro_block == 0 ? "" : " with macro blocks"));
  }
  if (shape.cols % multiple != 0) {
    return layout_error(errc::shape_mismatch, layout,
                        text("it stores rows of whole blocks of ", multiple, ", got K = ", shape.cols));
  }
  const auto fits = check_sizes(shape.matrices, shape.rows, shape.cols);
  return fits ? fits : layout_error(fits.error().code(), layout, fits.error().what());
}

/// Says where the first block scale above `largest` is, if there is one.
inline result<void> check_layout_scales(std::string_view layout, const packed_shape& shape,
                                        std::span<const std::uint8_t> scales, std::uint8_t largest) {
  std::size_t at = 0;
  while (at < scales.size() && scales[at] <= largest) ++at;
  if (at == scales.size()) return {};
  const std::size_t per_row = shape.blocks_per_row();
  return layout_error(
      errc::non_finite, layout,
      text("expected finite, non-negative block scales, codes up to ", largest, "; got code ", scales[at],
           " in matrix ", at / per_row / shape.rows, ", row ", at / per_row % shape.rows, ", block ", at % per_row));
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

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
