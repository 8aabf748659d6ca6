#pragma once

#include "../../detail/rejection.hpp"  // rejection_of
#include "../../error.hpp"             // error
#include "../../float16.hpp"           // to_float

#include <cstddef>  // std::size_t

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The error that packing rows from the `first` on of one of several matrices gave, with the row as the whole counts.
template <class Rows>
TETROMINO_COLD error in_whole(const error& e, const Rows& rows, std::size_t matrices, std::size_t matrix,
                              std::size_t first) {
  if (e.code() != errc::non_finite) return e;
  for (std::size_t r = 0; r < rows.rows; ++r) {
    for (std::size_t k = 0; k < rows.cols; ++k) {
      const float value = to_float(rows(r, k));
      if (!is_finite(value)) return rejection_of(value, matrices, matrix, first + r, k);
    }
  }
  const auto from = matrices > 1 ? text(" of matrix ", matrix) : "";  // a sum of finite values that overflows
  return error(e.code(), {e.what(), " (counting from row ", first, from, ')'});
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
