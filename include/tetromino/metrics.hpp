#pragma once

#include "detail/macros_off.hpp"

#include "error.hpp"   // error
#include "matrix.hpp"  // matrix_like

#include <cstddef>  // std::size_t
#include <cstdlib>  // std::abs
#include <limits>   // std::numeric_limits

#if !defined(__GNUC__)
#include <cmath>  // std::log10, std::sqrt
#endif

namespace TETROMINO_NAMESPACE {

namespace detail::inline TETROMINO_ISA {

// Two functions of <cmath>, which compilers take longer to read than all headers that packing needs.
#if defined(__GNUC__)
inline double log10_of(double x) noexcept { return __builtin_log10(x); }
inline double root_of(double x) noexcept { return __builtin_sqrt(x); }
#else
inline double log10_of(double x) noexcept { return std::log10(x); }
inline double root_of(double x) noexcept { return std::sqrt(x); }
#endif

}  // namespace detail::inline TETROMINO_ISA

/// What packing did to values x that came back as y. Sums run in double, row after row; add() reports to join them.
struct error_report {
  std::size_t count = 0;
  double sum_squares = 0;         ///< of x
  double sum_squared_errors = 0;  ///< of x - y
  double sum_abs_errors = 0;
  double max_abs_error = 0;

  /// Signal to quantization noise in dB: 10 log10(sum x^2 / sum (x - y)^2); infinite without errors.
  [[nodiscard]] TETROMINO_ABI double qsnr() const noexcept {
    if (sum_squared_errors == 0) return std::numeric_limits<double>::infinity();
    return 10.0 * detail::log10_of(sum_squares / sum_squared_errors);
  }
  /// Mean squared error.
  [[nodiscard]] TETROMINO_ABI double mse() const noexcept {
    return count == 0 ? 0 : sum_squared_errors / static_cast<double>(count);
  }
  /// Mean absolute error.
  [[nodiscard]] TETROMINO_ABI double mae() const noexcept {
    return count == 0 ? 0 : sum_abs_errors / static_cast<double>(count);
  }
  /// Root of the error energy over the signal energy, the relative error in the Frobenius norm.
  [[nodiscard]] TETROMINO_ABI double relative_error() const noexcept {
    return sum_squared_errors == 0 ? 0 : detail::root_of(sum_squared_errors / sum_squares);
  }

  /// Counts one more absolute error for max_abs_error, which stays NaN once there was one.
  TETROMINO_ABI void keep_largest(double abs_error) noexcept {
    if (abs_error > max_abs_error || abs_error != abs_error) max_abs_error = abs_error;
  }
  /// Joins another report to this one.
  TETROMINO_ABI void add(const error_report& other) noexcept {
    count += other.count;
    sum_squares += other.sum_squares;
    sum_squared_errors += other.sum_squared_errors;
    sum_abs_errors += other.sum_abs_errors;
    keep_largest(other.max_abs_error);
  }
};

inline namespace TETROMINO_ISA {

/// Compares x[matrices, rows, cols] with y of the same shape, of any element types. Errors: shape_mismatch.
template <matrix_like X, matrix_like Y>
result<error_report> try_compare(const X& x, const Y& y) {
  const auto a = detail::as_batch(x);
  const auto b = detail::as_batch(y);
  if (a.matrices != b.matrices || a.rows != b.rows || a.cols != b.cols) {
    return error(errc::shape_mismatch, {"cannot compare [", a.matrices, ", ", a.rows, ", ", a.cols, "] with [",
                                        b.matrices, ", ", b.rows, ", ", b.cols, "]"});
  }
  error_report report;
  for (std::size_t e = 0; e < a.matrices; ++e) {
    for (std::size_t r = 0; r < a.rows; ++r) {
      const auto* const row_a = a.row(e, r);
      const auto* const row_b = b.row(e, r);
      error_report row;
      row.count = a.cols;
      for (std::size_t k = 0; k < a.cols; ++k) {
        const double value = static_cast<double>(detail::to_float(row_a[k]));
        const double difference = std::abs(value - static_cast<double>(detail::to_float(row_b[k])));
        row.sum_squares += value * value;
        row.sum_squared_errors += difference * difference;
        row.sum_abs_errors += difference;
        row.keep_largest(difference);
      }
      report.add(row);
    }
  }
  return report;
}

/// try_compare, throwing its error.
template <matrix_like X, matrix_like Y>
[[nodiscard]] error_report compare(const X& x, const Y& y) {
  return try_compare(x, y).value();
}

/// Signal to quantization noise of y against x, in dB. Errors: as try_compare.
template <matrix_like X, matrix_like Y>
result<double> try_qsnr(const X& x, const Y& y) {
  const auto report = try_compare(x, y);
  if (!report) return report.error();
  return report->qsnr();
}

/// try_qsnr, throwing its error.
template <matrix_like X, matrix_like Y>
[[nodiscard]] double qsnr(const X& x, const Y& y) {
  return try_qsnr(x, y).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
