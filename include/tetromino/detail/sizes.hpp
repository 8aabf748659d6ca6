#pragma once

#include "../error.hpp"  // error, result

#include <cstddef>  // std::size_t
#include <limits>   // std::numeric_limits

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// As many elements as a tensor may have: no product of sizes wraps, however layouts pad them.
inline constexpr std::size_t most_elements = (std::numeric_limits<std::size_t>::max() >> 16) + 1;

TETROMINO_COLD inline error too_many_elements(std::size_t matrices, std::size_t rows, std::size_t cols) {
  return error(errc::shape_mismatch,
               {"expected at most ", most_elements, " elements, got [", matrices, ", ", rows, ", ", cols, "]"});
}
/// Says that sizes are beyond any tensor's, if they are.
inline result<void> check_sizes(std::size_t matrices, std::size_t rows, std::size_t cols) {
  if (((matrices | rows | cols) >> 16) == 0) return {};  // nearly always, and without a division
  std::size_t room = most_elements;
  for (const std::size_t size : {matrices, rows, cols}) {
    if (size != 0) room /= size;
  }
  if (room != 0) return {};
  return too_many_elements(matrices, rows, cols);
}

/// How many elements storage of this shape has. Throws shape_mismatch for more than there can be.
inline std::size_t element_count(std::size_t matrices, std::size_t rows, std::size_t cols) {
  check_sizes(matrices, rows, cols).value();
  return matrices * rows * cols;
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
