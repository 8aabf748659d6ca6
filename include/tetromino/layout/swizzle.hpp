#pragma once

#include "../detail/macros_off.hpp"

#include "../detail/layout.hpp"  // check_layout_shape
#include "../packed.hpp"         // packed, packed_view, packed_like

#include <algorithm>    // std::copy_n, std::fill, std::min
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <limits>       // std::numeric_limits
#include <span>         // std::span
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

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

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

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

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

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

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA

#include "../detail/macros_back.hpp"
