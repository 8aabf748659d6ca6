#pragma once

#include "../error.hpp"  // error, result

#include <cstddef>  // std::size_t
#include <limits>   // std::numeric_limits

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Says that sizes are beyond any tensor's, if they are. Below, no product of them wraps, however layouts pad them.
inline result<void> check_sizes(std::size_t matrices, std::size_t rows, std::size_t cols) {
  constexpr std::size_t most = (std::numeric_limits<std::size_t>::max() >> 16) + 1;
  std::size_t room = most;
  for (const std::size_t size : {matrices, rows, cols}) {
    if (size != 0) room /= size;
  }
  if (room != 0) return {};
  return error(errc::shape_mismatch,
               text("expected at most ", most, " elements, got [", matrices, ", ", rows, ", ", cols, "]"));
}

/// How many elements storage of this shape has. Throws shape_mismatch for more than there can be.
inline std::size_t element_count(std::size_t matrices, std::size_t rows, std::size_t cols) {
  check_sizes(matrices, rows, cols).value();
  return matrices * rows * cols;
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
