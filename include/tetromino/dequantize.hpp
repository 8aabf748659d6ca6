#pragma once

#include "detail/macros_off.hpp"

#include "detail/cpu_backend.hpp"      // dequantize_cpu
#include "detail/scalar_quantize.hpp"  // scalar_kernels
#include "execution.hpp"               // scalar_t, attached
#include "options.hpp"                 // dequantize_job

#include <type_traits>  // std::is_const_v

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

template <class Policy, class T>
concept has_dequantize_on = requires(const Policy& policy, const dequantize_job<T>& job) {
  { dequantize_on(policy, job) } -> std::same_as<result<void>>;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA {

/// The hook of the scalar backend; see quantize.hpp.
template <real T>
result<void> dequantize_on(const scalar_t& policy, const detail::dequantize_job<T>& job) {
  return detail::dequantize_cpu<detail::scalar_kernels>(policy.executor, job);
}

/// A policy whose backend can unpack into elements of type T.
template <class Policy, class T>
concept can_dequantize = real<T> && detail::attached<Policy, detail::has_dequantize_on<Policy, T>>::value;

/// Unpacks storage [matrices, rows, cols] into `out` of the same shape: float, half or bfloat16 (rounded to nearest
/// even). A value is q * 2^E for MX formats, float(q / f) * 2^E with a macro-block factor f = 1 + m / 256 of 8 bits,
/// q * f * 2^E with f = 1 + m / 4 of 2 bits, and q * float(t * s) for NVFP4 with tensor scale t and block scale s.
/// Errors: shape_mismatch.
template <class Policy, packed_like Packed, class T>
  requires(can_dequantize<Policy, T>)
result<void> try_dequantize_to(const Policy& policy, const Packed& in, batch_view<T> out) {
  const packed_view<any_format> from = detail::as_packed(in);
  if (auto fits = detail::check_storage(from); !fits) return fits;
  if (auto fits = detail::check_shape(from.shape(), out.matrices, out.rows, out.cols); !fits) return fits;
  return dequantize_on(policy, detail::dequantize_job<T>{from, out});
}

template <class Policy, packed_like Packed, class T>
  requires(can_dequantize<Policy, T>)
result<void> try_dequantize_to(const Policy& policy, const Packed& in, matrix_view<T> out) {
  return try_dequantize_to(policy, in, batch_view<T>(out));
}

/// try_dequantize_to, throwing its error.
template <class Policy, packed_like Packed, class T>
  requires(can_dequantize<Policy, T>)
void dequantize_to(const Policy& policy, const Packed& in, batch_view<T> out) {
  try_dequantize_to(policy, in, out).value();
}
template <class Policy, packed_like Packed, class T>
  requires(can_dequantize<Policy, T>)
void dequantize_to(const Policy& policy, const Packed& in, matrix_view<T> out) {
  try_dequantize_to(policy, in, out).value();
}

/// Unpacks storage into a matrix of its own: `dequantize<float>(simd, packed)`.
template <real T, class Policy, packed_like Packed>
  requires(can_dequantize<Policy, T> && !device_policy<Policy>)
result<matrix<T>> try_dequantize(const Policy& policy, const Packed& in) {
  const packed_view<any_format> from = detail::as_packed(in);
  if (auto fits = detail::check_storage(from); !fits) return fits.error();
  matrix<T> out(from.matrices, from.rows, from.cols);
  if (auto done = dequantize_on(policy, detail::dequantize_job<T>{from, out.view()}); !done) return done.error();
  return out;
}

/// try_dequantize, throwing its error.
template <real T, class Policy, packed_like Packed>
  requires(can_dequantize<Policy, T> && !device_policy<Policy>)
[[nodiscard]] matrix<T> dequantize(const Policy& policy, const Packed& in) {
  return try_dequantize<T>(policy, in).value();
}

/// Unpacking writes: a view of const elements cannot be its output.
template <class Policy, packed_like Packed, class T>
auto dequantize_to(const Policy&, const Packed&, matrix_view<const T>) {
  static_assert(detail::never<T>, "unpacking writes: its output is a view of elements that are not const");
}
template <class Policy, packed_like Packed, class T>
auto dequantize_to(const Policy&, const Packed&, batch_view<const T>) {
  static_assert(detail::never<T>, "unpacking writes: its output is a view of elements that are not const");
}
template <class Policy, packed_like Packed, class T>
auto try_dequantize_to(const Policy&, const Packed&, batch_view<const T>) {
  static_assert(detail::never<T>, "unpacking writes: its output is a view of elements that are not const");
}

}  // namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA

#include "detail/macros_back.hpp"
