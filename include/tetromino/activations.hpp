#pragma once

#include "detail/macros_off.hpp"

#include "detail/for_each_row.hpp"  // for_each_row, shared_minimum
#include "detail/sizes.hpp"         // check_sizes, element_count
#include "error.hpp"                // error, result
#include "execution.hpp"            // scalar_t, attached, executor_ref
#include "matrix.hpp"               // matrix_like
#include "packed.hpp"               // packed_view, packed_like

#include <algorithm>    // std::clamp, std::min, std::max
#include <concepts>     // std::same_as
#include <cstddef>      // std::size_t
#include <cstdint>      // std::int8_t
#include <span>         // std::span
#include <type_traits>  // std::is_const_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE {

/// 8-bit activations [rows, cols] that somebody else owns: values[rows, cols] and one float scale for every 32 of them
/// along K, scales[rows, blocks_per_row]; the last block of a row may be short. Element [r, k] is
/// values[r, k] * scales[r, k / 32]. `Value` is const for a read-only view.
template <class Value = const std::int8_t>
struct int8_view {
  static constexpr std::size_t block = 32;
  using scale_value = std::conditional_t<std::is_const_v<Value>, const float, float>;

  std::size_t rows = 0;
  std::size_t cols = 0;
  std::span<Value> values{};
  std::span<scale_value> scales{};

  [[nodiscard]] TETROMINO_ABI constexpr std::size_t blocks_per_row() const noexcept {
    return cols / block + (cols % block != 0);
  }

  /// A mutable view is also a read-only one.
  template <class Other>
    requires(std::is_const_v<Other> && !std::is_const_v<Value>)
  TETROMINO_ABI constexpr operator int8_view<Other>() const noexcept { return {rows, cols, values, scales}; }
};

/// 8-bit activations [rows, cols] that own their elements; see int8_view.
struct int8_matrix {
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::vector<std::int8_t> values;
  std::vector<float> scales;

  TETROMINO_ABI int8_matrix() = default;
  TETROMINO_ABI int8_matrix(std::size_t rows_, std::size_t cols_)
      : rows(rows_), cols(cols_), values(detail::element_count(1, rows_, cols_)) {
    scales.resize(rows_ * view().blocks_per_row());
  }

  [[nodiscard]] TETROMINO_ABI int8_view<std::int8_t> view() noexcept { return {rows, cols, values, scales}; }
  [[nodiscard]] TETROMINO_ABI int8_view<> view() const noexcept { return {rows, cols, values, scales}; }
};

namespace detail::inline TETROMINO_ISA {

/// Rounds rows to 8 bits one element at a time: the reference.
struct scalar_int8 {
  /// Rounds x[cols] to values[cols] and a scale for each block; returns the first block that holds NaN or an infinity,
  /// or the number of blocks.
  template <real T>
  static std::size_t quantize_int8_row(const T* x, std::size_t cols, std::int8_t* values, float* scales) {
    constexpr std::size_t block = int8_view<>::block;
    std::size_t b = 0;
    for (std::size_t k = 0; k < cols; k += block, ++b) {
      if (!round_block(x + k, std::min(block, cols - k), values + k, scales[b])) break;
    }
    return b;
  }

 private:
  /// scale = amax / 127, values to nearest even of x * (127 / amax). Returns false where a value is not finite.
  template <real T>
  static bool round_block(const T* x, std::size_t n, std::int8_t* values, float& scale) {
    std::uint32_t largest_bits = 0;  // magnitudes compare as their bits do, and NaN and infinity come last
    for (std::size_t i = 0; i < n; ++i) {
      largest_bits = std::max(largest_bits, detail::bit_cast<std::uint32_t>(to_float(x[i])) & 0x7FFFFFFFu);
    }
    if (largest_bits >= 0x7F800000u) return false;
    const float amax = detail::bit_cast<float>(largest_bits);
    scale = amax / 127.0f;
    // 127 / amax overflows below 2^-121: such blocks become zero.
    const float inverse = amax < 0x1p-120f ? 0.0f : 127.0f / amax;
    if (inverse == 0.0f) scale = 0.0f;
    constexpr float shift = 0x1.8p23f;  // adding it leaves an integer, rounded to nearest even, in the low bits
    for (std::size_t i = 0; i < n; ++i) {
      const float y = rounded(to_float(x[i]) * inverse) + shift;
      values[i] = static_cast<std::int8_t>(static_cast<std::uint8_t>(detail::bit_cast<std::uint32_t>(y) & 0xFFu));
    }
    return true;
  }
};

/// Says which buffer of 8-bit activations does not fit their shape, if one does not.
template <class Value>
result<void> check_storage(const int8_view<Value>& view) {
  const auto expect = [](const char* buffer, std::size_t expected, std::size_t got) -> result<void> {
    if (expected == got) return {};
    return error(errc::shape_mismatch, {"int8 activations: ", buffer, " need ", expected, " entries, got ", got});
  };
  if (auto fits = check_sizes(1, view.rows, view.cols); !fits) return fits;
  if (auto fits = expect("values", view.rows * view.cols, view.values.size()); !fits) return fits;
  return expect("scales", view.rows * view.blocks_per_row(), view.scales.size());
}
template <class T>
result<void> check_storage(const batch_view<T>& x) {
  return check_sizes(x.matrices, x.rows, x.cols);
}

/// The views that matmul reads activations through.
template <matrix_like X>
auto as_activations(const X& x) noexcept {
  return as_batch(x);
}
template <packed_like X>
packed_view<any_format> as_activations(const X& x) noexcept {
  return as_packed(x);
}
template <class Value>
int8_view<> as_activations(const int8_view<Value>& x) noexcept {
  return x;
}
inline int8_view<> as_activations(const int8_matrix& x) noexcept { return x.view(); }

/// Rows of activations, counted through all matrices of a batch.
template <class X>
std::size_t row_count(const X& x) noexcept {
  if constexpr (requires { x.matrices; }) {
    return x.matrices * x.rows;
  } else {
    return x.rows;
  }
}

}  // namespace detail::inline TETROMINO_ISA

namespace detail {

/// What a backend is asked to round to 8 bits; already checked.
template <real T>
struct quantize_int8_job {
  batch_view<const T> in;
  int8_view<std::int8_t> out;
};

}  // namespace detail

namespace detail::inline TETROMINO_ISA {

/// Rounds rows on the CPU with the kernels of one backend.
template <class Kernels, real T>
result<void> quantize_int8_cpu(executor_ref executor, const quantize_int8_job<T>& job, const Kernels& kernels = {}) {
  const auto& in = job.in;
  const auto& out = job.out;
  const std::size_t blocks = out.blocks_per_row();
  // Little work for an element: few of them make a task while there are few, so that each of many threads has some.
  const std::size_t elements_per_task = std::clamp<std::size_t>(out.rows * out.cols / 256, 1 << 12, 1 << 16);
  shared_minimum rejected;
  for_each_row(
      executor, out.rows, out.cols,
      [&](std::size_t r) {
        const T* row = in.row(r / in.rows, r % in.rows);
        const std::size_t b =
            kernels.quantize_int8_row(row, out.cols, out.values.data() + r * out.cols, out.scales.data() + r * blocks);
        if (b < blocks) rejected.offer(r * blocks + b);
      },
      elements_per_task);
  if (rejected.value() == shared_minimum::none) return {};
  const std::size_t r = rejected.value() / blocks, k = rejected.value() % blocks * out.block;
  return error(errc::non_finite, {"expected finite values, got NaN or infinity in row ", r, ", columns ", k, " to ",
                                  std::min(k + out.block, out.cols) - 1});
}

template <class Policy, class T>
concept has_quantize_int8_on = requires(const Policy& policy, const quantize_int8_job<T>& job) {
  { quantize_int8_on(policy, job) } -> std::same_as<result<void>>;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Anything that matmul takes as activations: matrices of float, half or bfloat16, int8 activations, packed storage.
template <class X>
concept activations_like = requires(const X& x) {
  detail::as_activations(x);
};

/// The hook of the scalar backend; see quantize.hpp.
template <real T>
result<void> quantize_int8_on(const scalar_t& policy, const detail::quantize_int8_job<T>& job) {
  return detail::quantize_int8_cpu<detail::scalar_int8>(policy.executor, job);
}

/// A policy whose backend can round elements of type T to 8 bits.
template <class Policy, class T>
concept can_quantize_int8 = real<T> && detail::attached<Policy, detail::has_quantize_int8_on<Policy, T>>::value;

/// Rounds x[matrices, rows, cols] to 8-bit activations [matrices * rows, cols], storage that the caller provides:
/// blocks of 32 along K with scale amax / 127, elements to nearest even. A block below 2^-120 becomes zero.
/// Errors: shape_mismatch; non_finite.
template <class Policy, matrix_like Input>
  requires(can_quantize_int8<Policy, element_of<Input>>)
result<void> try_quantize_int8_to(const Policy& policy, const Input& x, int8_view<std::int8_t> out) {
  const auto in = detail::as_batch(x);
  if (auto fits = detail::check_storage(out); !fits) return fits;
  if (out.rows != in.matrices * in.rows || out.cols != in.cols) {
    return error(errc::shape_mismatch, {"the input is [", in.matrices * in.rows, ", ", in.cols,
                                        "], the int8 activations are [", out.rows, ", ", out.cols, "]"});
  }
  return quantize_int8_on(policy, detail::quantize_int8_job<element_of<Input>>{in, out});
}

/// try_quantize_int8_to, throwing its error.
template <class Policy, matrix_like Input>
  requires(can_quantize_int8<Policy, element_of<Input>>)
void quantize_int8_to(const Policy& policy, const Input& x, int8_view<std::int8_t> out) {
  try_quantize_int8_to(policy, x, out).value();
}

/// try_quantize_int8_to into storage of its own.
template <class Policy, matrix_like Input>
  requires(can_quantize_int8<Policy, element_of<Input>>)
result<int8_matrix> try_quantize_int8(const Policy& policy, const Input& x) {
  const auto in = detail::as_batch(x);
  if (auto fits = detail::check_storage(in); !fits) return fits.error();
  int8_matrix out(in.matrices * in.rows, in.cols);
  if (auto done = try_quantize_int8_to(policy, x, out.view()); !done) return done.error();
  return out;
}

/// try_quantize_int8, throwing its error.
template <class Policy, matrix_like Input>
  requires(can_quantize_int8<Policy, element_of<Input>>)
[[nodiscard]] int8_matrix quantize_int8(const Policy& policy, const Input& x) {
  return try_quantize_int8(policy, x).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
