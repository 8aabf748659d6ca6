#pragma once

#include <tetromino/error.hpp>   // error, result
#include <tetromino/matrix.hpp>  // batch_view

#include "divider.hpp"  // divider

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t, std::uintptr_t

namespace TETROMINO_NAMESPACE::cuda::detail {

/// Whether the rows of a batch follow each other without gaps.
template <class T>
[[nodiscard]] bool is_dense(const batch_view<T>& x) noexcept {
  return (x.rows == 1 || x.row_stride == x.cols) && (x.matrices == 1 || x.matrix_stride == x.rows * x.cols);
}

[[nodiscard]] inline bool is_aligned(const void* p, std::size_t bytes) noexcept {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

/// Whether every row starts at a multiple of 16 bytes.
template <class T>
[[nodiscard]] bool has_aligned_rows(const batch_view<T>& x) noexcept {
  return is_aligned(x.data, 16) && (x.rows == 1 || x.row_stride * sizeof(T) % 16 == 0) &&
         (x.matrices == 1 || x.matrix_stride * sizeof(T) % 16 == 0);
}

/// Packed codes are read and written eight bytes at a time.
[[nodiscard]] inline result<void> check_packed_pointers(const void* codes) {
  if (is_aligned(codes, 8)) return {};
  return error(errc::invalid_argument, "cuda: expected packed codes at a multiple of 8 bytes");
}

/// Says so where a batch has more rows, or more pieces of rows, than a kernel can count.
[[nodiscard]] inline result<void> check_pieces(std::size_t matrices, std::size_t rows, std::size_t pieces_per_row) {
  constexpr std::size_t most = std::size_t{1} << 31;
  if (rows < most && matrices < most && pieces_per_row < most && rows * matrices < most &&
      rows * matrices * pieces_per_row < most) {
    return {};
  }
  return error(errc::shape_mismatch, {"cuda: expected fewer than 2^35 elements in one call, got [", matrices, ", ",
                                      rows, ", ", pieces_per_row * 16, "]"});
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
