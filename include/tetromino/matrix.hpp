#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"        // TETROMINO_EXPECTS
#include "detail/sizes.hpp"  // element_count
#include "float16.hpp"       // half, bfloat16

#include <concepts>     // std::same_as
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint16_t, std::uintptr_t
#include <type_traits>  // std::remove_const_t, std::is_void_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE {

/// The number types that can be packed and unpacked into.
template <class T>
concept real = std::same_as<T, float> || std::same_as<T, half> || std::same_as<T, bfloat16>;

/// Whether memory of type Foreign holds elements of type T, bit for bit: void and 16-bit words hold what the caller
/// says, and compilers' own 16-bit floats (_Float16, __bf16, std::float16_t) what they are. Specialize it for types of
/// your own.
template <class Foreign, class T>
inline constexpr bool holds = std::is_void_v<Foreign> || (std::same_as<Foreign, std::uint16_t> && sizeof(T) == 2);

namespace detail::inline TETROMINO_ISA {

/// A 16-bit float of the compiler, which has the values of a T.
template <class Foreign, class T>
concept native_float = real<T> && sizeof(Foreign) == sizeof(T) && !std::is_integral_v<Foreign> &&
                       !std::is_enum_v<Foreign> && !std::is_class_v<Foreign> && !std::is_union_v<Foreign> &&
                       requires(Foreign x) {
  static_cast<float>(x);
}
&&static_cast<float>(bit_cast<Foreign>(T(1.0f))) == 1.0f;

/// The elements at `data`, which is aligned for them.
template <class T, class Foreign>
T* elements_at(Foreign* data) {
  using void_type = std::conditional_t<std::is_const_v<Foreign>, const void, void>;
  T* const elements = static_cast<T*>(static_cast<void_type*>(data));
  TETROMINO_EXPECTS(reinterpret_cast<std::uintptr_t>(elements) % alignof(T) == 0,
                    "a view's elements lie at multiples of their size");
  return elements;
}

template <class Foreign, class T>
concept keeps_const = std::is_const_v<T> || !std::is_const_v<Foreign>;
template <class Foreign, class T>
concept holds_elements = !std::same_as<Foreign, T> && (holds<Foreign, T> || native_float<Foreign, T>);
template <class Foreign, class T>
concept foreign_to = keeps_const<Foreign, T> && holds_elements<std::remove_const_t<Foreign>, std::remove_const_t<T>>;

}  // namespace detail::inline TETROMINO_ISA

/// A row-major matrix that somebody else owns: element [r, k] is data[r * row_stride + k]. Strides count elements.
template <class T>
struct matrix_view {
  T* data = nullptr;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::size_t row_stride = 0;

  TETROMINO_ABI constexpr matrix_view() = default;
  /// A dense matrix: rows follow each other without gaps.
  TETROMINO_ABI constexpr matrix_view(T* data_, std::size_t rows_, std::size_t cols_)
      : matrix_view(data_, rows_, cols_, cols_) {}
  /// Rows that start `row_stride` >= cols elements apart.
  TETROMINO_ABI constexpr matrix_view(T* data_, std::size_t rows_, std::size_t cols_, std::size_t row_stride_)
      : data(data_), rows(rows_), cols(cols_), row_stride(row_stride_) {
    TETROMINO_EXPECTS(rows_ <= 1 || row_stride_ >= cols_, "a row stride is at least the number of columns", rows_,
                      row_stride_, cols_);
  }
  /// Memory of another type that holds such elements: `matrix_view<const bfloat16>(words, rows, cols)`.
  template <detail::foreign_to<T> Foreign>
  TETROMINO_ABI matrix_view(Foreign* data_, std::size_t rows_, std::size_t cols_)
      : matrix_view(data_, rows_, cols_, cols_) {}
  template <detail::foreign_to<T> Foreign>
  TETROMINO_ABI matrix_view(Foreign* data_, std::size_t rows_, std::size_t cols_, std::size_t row_stride_)
      : matrix_view(detail::elements_at<T>(data_), rows_, cols_, row_stride_) {}
  /// A mutable view is also a read-only one.
  template <class U>
    requires(std::same_as<const U, T> && !std::same_as<U, T>)
  TETROMINO_ABI constexpr matrix_view(const matrix_view<U>& m) noexcept
      : matrix_view(m.data, m.rows, m.cols, m.row_stride) {}

  [[nodiscard]] TETROMINO_ABI constexpr T* row(std::size_t r) const noexcept { return data + r * row_stride; }
  [[nodiscard]] TETROMINO_ABI constexpr T& operator()(std::size_t r, std::size_t k) const noexcept { return row(r)[k]; }
};

/// A batch of equally shaped matrices, such as the experts of a layer [matrices, rows, cols]: element [e, r, k] is
/// data[e * matrix_stride + r * row_stride + k]. Strides count elements.
template <class T>
struct batch_view {
  T* data = nullptr;
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::size_t row_stride = 0;
  std::size_t matrix_stride = 0;

  TETROMINO_ABI constexpr batch_view() = default;
  /// A dense batch: [matrices, rows, cols] without gaps.
  TETROMINO_ABI constexpr batch_view(T* data_, std::size_t matrices_, std::size_t rows_, std::size_t cols_)
      : batch_view(data_, matrices_, rows_, cols_, cols_, rows_ * cols_) {}
  TETROMINO_ABI constexpr batch_view(T* data_, std::size_t matrices_, std::size_t rows_, std::size_t cols_,
                                     std::size_t row_stride_, std::size_t matrix_stride_)
      : data(data_),
        matrices(matrices_),
        rows(rows_),
        cols(cols_),
        row_stride(row_stride_),
        matrix_stride(matrix_stride_) {
    TETROMINO_EXPECTS(rows_ <= 1 || row_stride_ >= cols_, "a row stride is at least the number of columns", rows_,
                      row_stride_, cols_);
  }
  /// Memory of another type that holds such elements.
  template <detail::foreign_to<T> Foreign>
  TETROMINO_ABI batch_view(Foreign* data_, std::size_t matrices_, std::size_t rows_, std::size_t cols_)
      : batch_view(data_, matrices_, rows_, cols_, cols_, rows_ * cols_) {}
  template <detail::foreign_to<T> Foreign>
  TETROMINO_ABI batch_view(Foreign* data_, std::size_t matrices_, std::size_t rows_, std::size_t cols_,
                           std::size_t row_stride_, std::size_t matrix_stride_)
      : batch_view(detail::elements_at<T>(data_), matrices_, rows_, cols_, row_stride_, matrix_stride_) {}
  /// One matrix is a batch of one.
  template <class U>
    requires(std::same_as<const U, const T>)
  TETROMINO_ABI constexpr batch_view(const matrix_view<U>& m) noexcept
      : batch_view(m.data, 1, m.rows, m.cols, m.row_stride, m.rows * m.row_stride) {}
  /// A mutable view is also a read-only one.
  template <class U>
    requires(std::same_as<const U, T> && !std::same_as<U, T>)
  TETROMINO_ABI constexpr batch_view(const batch_view<U>& b) noexcept
      : batch_view(b.data, b.matrices, b.rows, b.cols, b.row_stride, b.matrix_stride) {}

  [[nodiscard]] TETROMINO_ABI constexpr T* row(std::size_t e, std::size_t r) const noexcept {
    return data + e * matrix_stride + r * row_stride;
  }
  [[nodiscard]] TETROMINO_ABI constexpr matrix_view<T> operator[](std::size_t e) const noexcept {
    return {data + e * matrix_stride, rows, cols, row_stride};
  }
};

/// A matrix, or a batch of them, that owns its elements [matrices, rows, cols].
template <real T>
struct matrix {
  std::vector<T> data;
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;

  TETROMINO_ABI matrix() = default;
  /// Zeros. Throws shape_mismatch for more than 2^48 of them.
  TETROMINO_ABI matrix(std::size_t rows_, std::size_t cols_) : matrix(1, rows_, cols_) {}
  TETROMINO_ABI matrix(std::size_t matrices_, std::size_t rows_, std::size_t cols_)
      : data(detail::element_count(matrices_, rows_, cols_)), matrices(matrices_), rows(rows_), cols(cols_) {}

  [[nodiscard]] TETROMINO_ABI batch_view<T> view() noexcept { return {data.data(), matrices, rows, cols}; }
  [[nodiscard]] TETROMINO_ABI batch_view<const T> view() const noexcept { return {data.data(), matrices, rows, cols}; }
  [[nodiscard]] TETROMINO_ABI T& operator()(std::size_t r, std::size_t k) noexcept { return data[r * cols + k]; }
  [[nodiscard]] TETROMINO_ABI const T& operator()(std::size_t r, std::size_t k) const noexcept {
    return data[r * cols + k];
  }
};

namespace detail::inline TETROMINO_ISA {

template <class T>
batch_view<const T> as_batch(const matrix_view<T>& m) noexcept {
  return m;
}
template <class T>
batch_view<const T> as_batch(const batch_view<T>& b) noexcept {
  return b;
}
template <class T>
batch_view<const T> as_batch(const matrix<T>& m) noexcept {
  return m.view();
}

/// Says how the output differs in shape from the input, if it does.
template <class T>
result<void> check_same_shape(const batch_view<const T>& in, const batch_view<T>& out) {
  if (in.matrices == out.matrices && in.rows == out.rows && in.cols == out.cols) return {};
  return error(errc::shape_mismatch, {"the input is [", in.matrices, ", ", in.rows, ", ", in.cols, "], the output [",
                                      out.matrices, ", ", out.rows, ", ", out.cols, "]"});
}

}  // namespace detail::inline TETROMINO_ISA

/// Anything that can be read as a batch of matrices of float, half or bfloat16.
template <class View>
concept matrix_like = requires(const View& view) {
  detail::as_batch(view);
  requires real<std::remove_const_t<std::remove_pointer_t<decltype(detail::as_batch(view).data)>>>;
};

/// The element type of a matrix_like.
template <matrix_like View>
using element_of =
    std::remove_const_t<std::remove_pointer_t<decltype(detail::as_batch(std::declval<const View&>()).data)>>;

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
