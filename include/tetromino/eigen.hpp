#pragma once

#include "detail/macros_off.hpp"

/// Opt-in: sees dense Eigen matrices as the library's views, and the library's matrices as Eigen maps, without copies.

#include "matrix.hpp"  // matrix_view

#include <Eigen/Core>  // Eigen::PlainObjectBase, Eigen::Map

#include <cstddef>      // std::size_t
#include <type_traits>  // std::is_const_v

namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA {

/// Eigen's row-major matrix of T, the order in which packing reads: K is contiguous.
template <class T>
using eigen_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A row-major Eigen matrix, map or block [rows, cols] of float as a view; it must outlive the view. Pass the transpose
/// of a column-major one: its columns are the rows.
template <class Derived>
[[nodiscard]] auto view_of(Eigen::DenseBase<Derived>& m) {
  static_assert(Derived::IsRowMajor,
                "packing reads rows: give a row-major matrix, or the transpose of a column-major one");
  using T = std::remove_pointer_t<decltype(m.derived().data())>;
  TETROMINO_EXPECTS(m.derived().innerStride() == 1, "the elements of a row have to be contiguous",
                    m.derived().innerStride());
  return matrix_view<T>(m.derived().data(), static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols()),
                        static_cast<std::size_t>(m.derived().outerStride()));
}
template <class Derived>
[[nodiscard]] auto view_of(const Eigen::DenseBase<Derived>& m) {
  static_assert(Derived::IsRowMajor,
                "packing reads rows: give a row-major matrix, or the transpose of a column-major one");
  using T = std::remove_pointer_t<decltype(m.derived().data())>;
  TETROMINO_EXPECTS(m.derived().innerStride() == 1, "the elements of a row have to be contiguous",
                    m.derived().innerStride());
  return matrix_view<const T>(m.derived().data(), static_cast<std::size_t>(m.rows()),
                              static_cast<std::size_t>(m.cols()), static_cast<std::size_t>(m.derived().outerStride()));
}

/// A view as an Eigen map of the same elements [rows, cols].
[[nodiscard]] inline auto eigen_map(const matrix_view<float>& m) {
  return Eigen::Map<eigen_matrix<float>, 0, Eigen::OuterStride<>>(
      m.data, static_cast<Eigen::Index>(m.rows), static_cast<Eigen::Index>(m.cols),
      Eigen::OuterStride<>(static_cast<Eigen::Index>(m.row_stride)));
}
[[nodiscard]] inline auto eigen_map(const matrix_view<const float>& m) {
  return Eigen::Map<const eigen_matrix<float>, 0, Eigen::OuterStride<>>(
      m.data, static_cast<Eigen::Index>(m.rows), static_cast<Eigen::Index>(m.cols),
      Eigen::OuterStride<>(static_cast<Eigen::Index>(m.row_stride)));
}

}  // namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA

#include "detail/macros_back.hpp"
