#pragma once

#include "../error.hpp"  // error, text
#include "row.hpp"       // is_finite

#include <cstddef>  // std::size_t

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The error for an element of x[matrices, rows, cols] that special_values::reject refuses.
TETROMINO_COLD inline error rejection_of(float value, std::size_t matrices, std::size_t matrix, std::size_t row,
                                         std::size_t col) {
  const char* what = is_finite(value) ? "one that overflows when rotated"
                     : value != value ? "NaN"
                     : value > 0      ? "+infinity"
                                      : "-infinity";
  return error(errc::non_finite, {"expected finite values, got ", what, " at ",
                                  matrices > 1 ? text("matrix ", matrix, ", ") : "", "row ", row, ", column ", col});
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
