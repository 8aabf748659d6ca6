#pragma once

#include "detail/macros_off.hpp"

#include "detail/for_each_row.hpp"  // for_each_row, shared_minimum
#include "detail/sizes.hpp"         // check_sizes, element_count
#include "e4m3.hpp"                 // e4m3
#include "error.hpp"                // error, result
#include "execution.hpp"            // scalar_t, attached, executor_ref
#include "matrix.hpp"               // matrix_like
#include "options.hpp"              // device_policy

#include <algorithm>    // std::clamp, std::fill, std::max
#include <concepts>     // std::same_as
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint32_t
#include <span>         // std::span
#include <type_traits>  // std::conditional_t, std::is_const_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE {

/// Activations in E4M3 [rows, cols] that somebody else owns: values[rows, stride()] and one float scale for each row,
/// scales[rows]. Element [r, k] is the E4M3 code values[r * stride() + k] times scales[r]. `Value` is const for a
/// read-only view.
///
/// This is what the tensor cores' 8-bit products read beside repacked weights, so whoever writes it without
/// quantize_e4m3, such as a kernel that normalizes rows, keeps to two things: rows start stride() bytes apart, the
/// first one at a multiple of 16 bytes; and bytes behind the last column are zero.
template <class Value = const std::uint8_t>
struct e4m3_view {
  using scale_value = std::conditional_t<std::is_const_v<Value>, const float, float>;

  std::size_t rows = 0;
  std::size_t cols = 0;
  std::span<Value> values{};
  std::span<scale_value> scales{};

  /// Bytes from one row to the next: cols, rounded up to a multiple of 128.
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t stride() const noexcept {
    return cols / 128 * 128 + (cols % 128 != 0 ? 128 : 0);
  }

  /// A mutable view is also a read-only one.
  template <class Other>
    requires(std::is_const_v<Other> && !std::is_const_v<Value>)
  TETROMINO_ABI constexpr operator e4m3_view<Other>() const noexcept { return {rows, cols, values, scales}; }
};

/// Activations in E4M3 [rows, cols] that own their elements; see e4m3_view.
struct e4m3_matrix {
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::vector<std::uint8_t> values;
  std::vector<float> scales;

  TETROMINO_ABI e4m3_matrix() = default;
  /// Zeros. Throws shape_mismatch for more than 2^48 of them.
  TETROMINO_ABI e4m3_matrix(std::size_t rows_, std::size_t cols_) : rows(rows_), cols(cols_) {
    static_cast<void>(detail::element_count(1, rows_, cols_));
    values.resize(rows_ * view().stride());
    scales.resize(rows_);
  }

  [[nodiscard]] TETROMINO_ABI e4m3_view<std::uint8_t> view() noexcept { return {rows, cols, values, scales}; }
  [[nodiscard]] TETROMINO_ABI e4m3_view<> view() const noexcept { return {rows, cols, values, scales}; }
};

namespace detail::inline TETROMINO_ISA {

/// A row whose largest magnitude is below this becomes zero: its scale would not be a normal float.
inline constexpr float least_e4m3_amax = 0x1p-117f;

/// Rounds rows to E4M3 one element at a time: the reference.
struct scalar_e4m3 {
  /// Rounds x[cols] to the codes of a row and its scale, zeros behind them; returns the first column that holds NaN or
  /// an infinity, or the number of columns.
  template <real T>
  static std::size_t quantize_e4m3_row(const T* x, std::size_t cols, std::uint8_t* values, float& scale) {
    float amax = 0.0f;
    for (std::size_t k = 0; k < cols; ++k) {
      const std::uint32_t magnitude = detail::bit_cast<std::uint32_t>(to_float(x[k])) & 0x7FFFFFFFu;
      if (magnitude >= 0x7F800000u) return k;
      amax = std::max(amax, detail::bit_cast<float>(magnitude));
    }
    const bool is_zero = amax < least_e4m3_amax;
    const float inverse = is_zero ? 0.0f : e4m3::max / amax;
    scale = is_zero ? 0.0f : amax / e4m3::max;
    for (std::size_t k = 0; k < cols; ++k) {
      values[k] = is_zero ? std::uint8_t{0} : e4m3::encode(rounded(to_float(x[k]) * inverse)).bits;
    }
    for (std::size_t k = cols; k % 128 != 0; ++k) values[k] = 0;
    return cols;
  }
};

/// Says which buffer of activations in E4M3 does not fit their shape, if one does not.
template <class Value>
result<void> check_storage(const e4m3_view<Value>& view) {
  const auto expect = [](const char* buffer, std::size_t expected, std::size_t got) -> result<void> {
    if (expected == got) return {};
    return error(errc::shape_mismatch, {"e4m3 activations: ", buffer, " need ", expected, " entries, got ", got});
  };
  if (auto fits = check_sizes(1, view.rows, view.cols); !fits) return fits;
  if (auto fits = expect("values", view.rows * view.stride(), view.values.size()); !fits) return fits;
  return expect("scales", view.rows, view.scales.size());
}

}  // namespace detail::inline TETROMINO_ISA

namespace detail {

/// What a backend is asked to round to E4M3; already checked.
template <real T>
struct quantize_e4m3_job {
  batch_view<const T> in;
  e4m3_view<std::uint8_t> out;
};

}  // namespace detail

namespace detail::inline TETROMINO_ISA {

/// Rounds rows on the CPU with the kernels of one backend.
template <class Kernels, real T>
result<void> quantize_e4m3_cpu(executor_ref executor, const quantize_e4m3_job<T>& job, const Kernels& kernels = {}) {
  const auto& in = job.in;
  const auto& out = job.out;
  if (out.cols == 0) std::fill(out.scales.begin(), out.scales.end(), 0.0f);
  // As quantize_int8_cpu does: few elements make a task while there are few.
  const std::size_t elements_per_task = std::clamp<std::size_t>(out.rows * out.cols / 256, 1 << 12, 1 << 16);
  shared_minimum rejected;
  for_each_row(
      executor, out.rows, out.cols,
      [&](std::size_t r) {
        const T* row = in.row(r / in.rows, r % in.rows);
        const std::size_t k =
            kernels.quantize_e4m3_row(row, out.cols, out.values.data() + r * out.stride(), out.scales[r]);
        if (k < out.cols) rejected.offer(r * out.cols + k);
      },
      elements_per_task);
  if (rejected.value() == shared_minimum::none) return {};
  return error(errc::non_finite, {"expected finite values, got NaN or infinity in row ", rejected.value() / out.cols,
                                  ", column ", rejected.value() % out.cols});
}

template <class Policy, class T>
concept has_quantize_e4m3_on = requires(const Policy& policy, const quantize_e4m3_job<T>& job) {
  { quantize_e4m3_on(policy, job) } -> std::same_as<result<void>>;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The hook of the scalar backend; see quantize.hpp.
template <real T>
result<void> quantize_e4m3_on(const scalar_t& policy, const detail::quantize_e4m3_job<T>& job) {
  return detail::quantize_e4m3_cpu<detail::scalar_e4m3>(policy.executor, job);
}

/// A policy whose backend can round elements of type T to E4M3.
template <class Policy, class T>
concept can_quantize_e4m3 = real<T> && detail::attached<Policy, detail::has_quantize_e4m3_on<Policy, T>>::value;

/// Rounds x[matrices, rows, cols] to activations in E4M3 [matrices * rows, cols], storage that the caller provides: a
/// row's scale is amax / 448, its elements are x * (448 / amax), each a float, to nearest even. A row below 2^-117
/// becomes zero, with a scale of 0. Errors: shape_mismatch; non_finite, the output's contents are then unspecified. On
/// a device, a row with NaN or an infinity becomes zero with a NaN for a scale, and its place is noted where the policy
/// says, such as cuda::rejections.
template <class Policy, matrix_like Input>
  requires(can_quantize_e4m3<Policy, element_of<Input>>)
result<void> try_quantize_e4m3_to(const Policy& policy, const Input& x, e4m3_view<std::uint8_t> out) {
  const auto in = detail::as_batch(x);
  if (auto fits = detail::check_storage(out); !fits) return fits;
  if (out.rows != in.matrices * in.rows || out.cols != in.cols) {
    return error(errc::shape_mismatch, {"the input is [", in.matrices * in.rows, ", ", in.cols,
                                        "], the e4m3 activations are [", out.rows, ", ", out.cols, "]"});
  }
  return quantize_e4m3_on(policy, detail::quantize_e4m3_job<element_of<Input>>{in, out});
}

/// try_quantize_e4m3_to, throwing its error.
template <class Policy, matrix_like Input>
  requires(can_quantize_e4m3<Policy, element_of<Input>>)
void quantize_e4m3_to(const Policy& policy, const Input& x, e4m3_view<std::uint8_t> out) {
  try_quantize_e4m3_to(policy, x, out).value();
}

/// try_quantize_e4m3_to into storage of its own.
template <class Policy, matrix_like Input>
  requires(can_quantize_e4m3<Policy, element_of<Input>> && !device_policy<Policy>)
result<e4m3_matrix> try_quantize_e4m3(const Policy& policy, const Input& x) {
  const auto in = detail::as_batch(x);
  if (auto fits = detail::check_sizes(in.matrices, in.rows, in.cols); !fits) return fits.error();
  e4m3_matrix out(in.matrices * in.rows, in.cols);
  if (auto done = try_quantize_e4m3_to(policy, x, out.view()); !done) return done.error();
  return out;
}

/// try_quantize_e4m3, throwing its error.
template <class Policy, matrix_like Input>
  requires(can_quantize_e4m3<Policy, element_of<Input>> && !device_policy<Policy>)
[[nodiscard]] e4m3_matrix quantize_e4m3(const Policy& policy, const Input& x) {
  return try_quantize_e4m3(policy, x).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
