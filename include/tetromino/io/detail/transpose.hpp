#pragma once

#include "../../version.hpp"  // TETROMINO_NAMESPACE

#include <algorithm>    // std::min
#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint16_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::conditional_t
#include <utility>      // std::index_sequence

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TETROMINO_HAS_SHUFFLE
#endif
#endif

#if defined(TETROMINO_HAS_SHUFFLE)

/// As many values as 16 bytes hold.
template <class T>
struct value_vector {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  using word = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
  using type [[gnu::vector_size(16)]] = word;
  static constexpr std::size_t count = 16 / sizeof(T);
};

/// A square of as many rows as a vector has values, transposed: each pass zips rows of the upper half with the lower
/// half's, and there are as many passes as halvings of a vector.
template <class T>
void transpose_square(const T* from, std::size_t from_stride, T* to, std::size_t to_stride) noexcept {
  using vector = typename value_vector<T>::type;
  constexpr std::size_t n = value_vector<T>::count;
  std::array<vector, n> rows, zipped;
  for (std::size_t i = 0; i < n; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(vector));
  for (std::size_t halving = 1; halving < n; halving *= 2) {
    for (std::size_t i = 0; i < n / 2; ++i) {
      [&]<std::size_t... J>(std::index_sequence<J...>) {
        zipped[2 * i] = __builtin_shufflevector(rows[i], rows[i + n / 2], (J % 2 * n + J / 2)...);
        zipped[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + n / 2], (J % 2 * n + (n + J) / 2)...);
      }
      (std::make_index_sequence<n>());
    }
    rows = zipped;
  }
  for (std::size_t i = 0; i < n; ++i) std::memcpy(static_cast<void*>(to + i * to_stride), &rows[i], sizeof(vector));
}

#endif

/// [rows, cols], whose rows begin from_stride values apart, to [cols, rows]; by squares of a cache line.
template <class T>
void transpose(const T* from, std::size_t from_stride, std::size_t rows, std::size_t cols, T* to) noexcept {
  constexpr std::size_t line = 64 / sizeof(T);
  for (std::size_t r0 = 0; r0 < rows; r0 += line) {
    const std::size_t r1 = std::min(rows, r0 + line);
    for (std::size_t c0 = 0; c0 < cols; c0 += line) {
      const std::size_t c1 = std::min(cols, c0 + line);
#if defined(TETROMINO_HAS_SHUFFLE)
      if (r1 - r0 == line && c1 - c0 == line) {
        for (std::size_t c = c0; c < c1; c += value_vector<T>::count) {
          for (std::size_t r = r0; r < r1; r += value_vector<T>::count) {
            transpose_square(from + r * from_stride + c, from_stride, to + c * rows + r, rows);
          }
        }
        continue;
      }
#endif
      for (std::size_t c = c0; c < c1; ++c) {
        for (std::size_t r = r0; r < r1; ++r) to[c * rows + r] = from[r * from_stride + c];
      }
    }
  }
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#undef TETROMINO_HAS_SHUFFLE
