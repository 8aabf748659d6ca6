#pragma once

#include "detail/macros_off.hpp"

#include "activations.hpp"           // activations_like
#include "detail/cpu_matmul.hpp"     // matmul_job, matmul_cpu
#include "detail/scalar_matmul.hpp"  // scalar_matmul_kernels
#include "execution.hpp"             // scalar_t, attached
#include "options.hpp"               // device_policy

#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint32_t
#include <limits>       // std::numeric_limits
#include <span>         // std::span
#include <type_traits>  // std::remove_const_t, std::remove_pointer_t
#include <utility>      // std::declval

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

template <class Policy, class X, class Out>
concept has_matmul_on = requires(const Policy& policy,
                                 const matmul_job<decltype(as_activations(std::declval<const X&>())), Out>& job) {
  { matmul_on(policy, job) } -> std::same_as<result<void>>;
};

/// The one matrix of a batch that a product goes to.
template <class T>
result<matrix_view<T>> one_product(const batch_view<T>& out) {
  if (out.matrices == 1) return out[0];
  return error(errc::shape_mismatch, {"matmul: the product is one matrix, got room for ", out.matrices});
}
template <real T>
result<matrix_view<T>> one_product(matrix<T>& out) {
  return one_product(out.view());
}
template <class Product>
concept batch_of_products = requires(Product&& out) {
  one_product(out);
};
template <batch_of_products Product>
using product_element = std::remove_pointer_t<decltype(one_product(std::declval<Product&>()).value().data)>;

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA {

/// The hook of the scalar backend. A backend attaches by declaring matmul_on for its policy in the policy's namespace;
/// the calls below check sizes first. X is batch_view<const T> of float, half or bfloat16, int8_view<>, or
/// packed_view<any_format>.
template <class X, real Out>
result<void> matmul_on(const scalar_t& policy, const detail::matmul_job<X, Out>& job) {
  detail::matmul_cpu<detail::scalar_matmul_kernels>(policy.executor, job);
  return {};
}

/// Anything that matmul takes as weights: packed storage, or the same bytes in the order of repack.
template <class Weights>
concept weights_like = packed_like<Weights> || repacked_like<Weights>;

/// A policy whose backend multiplies activations of this kind into elements of type Out.
template <class Policy, class X, class Out>
concept can_matmul =
    activations_like<X> && real<Out> && detail::attached<Policy, detail::has_matmul_on<Policy, X, Out>>::value;

/// Multiplies activations by the packed weights of experts: row m of `x` [M, K] belongs to the expert e with
/// row_offsets[e] <= m < row_offsets[e + 1], and out[m, n] = Σ_k x[m, k] · w[e, n, k] for w [E, N, K]. `row_offsets`
/// has E + 1 entries that ascend from 0 to M. Activations are float, half or bfloat16 (W4A16), int8 (W4A8), or packed
/// themselves (W4A4), then with a tensor scale for each matrix of their batch. Any K; each side has its own format.
///
/// Sums run in float; those over a block are exact where both sides are integers, and a macro-block factor is one
/// multiplication of a partial sum or of a block's scale. An output depends on its own row of x and of w alone: not on
/// M, on other rows, on threads, or on whether w is repacked, so it does not matter on which rank a row is computed.
/// With int8 or packed activations all policies of the CPU give the same bits (but for a NaN's); with the others, a
/// policy gives the same for an instruction set, and with AVX512_BF16 denormal bfloat16 numbers and sums of a block
/// that are as small count as 0. A NaN block scale makes the outputs that meet it NaN. Errors: shape_mismatch.
template <class Policy, activations_like X, weights_like Weights, class Out>
  requires(can_matmul<Policy, X, Out>)
result<void> try_grouped_matmul(const Policy& policy, const X& x, const Weights& w,
                                std::span<const std::uint32_t> row_offsets, matrix_view<Out> out) {
  const auto in = detail::as_activations(x);
  const detail::weights_view weights = detail::as_weights(w);
  if (auto fits = detail::check_storage(in); !fits) return fits;
  if (auto fits = detail::check_storage(weights); !fits) return fits;
  const std::size_t rows = detail::row_count(in);
  if (in.cols != weights.cols) {
    return error(errc::shape_mismatch,
                 {"matmul: the activations have ", in.cols, " columns, the weights ", weights.cols});
  }
  if (out.rows != rows || out.cols != weights.rows) {
    return error(errc::shape_mismatch, {"matmul: the product is [", rows, ", ", weights.rows, "], the output [",
                                        out.rows, ", ", out.cols, "]"});
  }
  if (row_offsets.size() != weights.matrices + 1 || row_offsets.front() != 0 || row_offsets.back() != rows) {
    return error(errc::shape_mismatch,
                 {"matmul: expected ", weights.matrices + 1, " row offsets from 0 to ", rows, ", got ",
                  row_offsets.size(), " of them",
                  row_offsets.empty() ? detail::text("")
                                      : detail::text(" from ", row_offsets.front(), " to ", row_offsets.back())});
  }
  for (std::size_t e = 0; e < weights.matrices; ++e) {
    if (row_offsets[e] > row_offsets[e + 1]) {
      return error(errc::shape_mismatch, {"matmul: expected ascending row offsets, got ", row_offsets[e], " before ",
                                          row_offsets[e + 1], " for matrix ", e});
    }
  }
  return matmul_on(policy, detail::matmul_job<std::remove_const_t<decltype(in)>, Out>{in, weights, row_offsets, out});
}

/// Multiplies activations [M, K] by packed weights [N, K]: out[m, n] = Σ_k x[m, k] · w[n, k]. See try_grouped_matmul.
template <class Policy, activations_like X, weights_like Weights, class Out>
  requires(can_matmul<Policy, X, Out>)
result<void> try_matmul(const Policy& policy, const X& x, const Weights& w, matrix_view<Out> out) {
  const std::size_t matrices = detail::as_weights(w).matrices, rows = detail::row_count(detail::as_activations(x));
  if (matrices != 1) {
    return error(errc::shape_mismatch,
                 {"matmul: expected one weight matrix, got ", matrices, "; grouped_matmul takes a batch"});
  }
  if (rows > std::numeric_limits<std::uint32_t>::max()) {
    return error(errc::shape_mismatch, {"matmul: expected fewer than 2^32 rows, got ", rows});
  }
  const std::array<std::uint32_t, 2> all{0, static_cast<std::uint32_t>(rows)};
  return try_grouped_matmul(policy, x, w, all, out);
}

/// The same two on a device: operands and row offsets are memory of the device, w is what repack_to has put in order,
/// and `options` are those of the policy's backend, such as cuda::matmul_options. A backend attaches by declaring
/// matmul_on and grouped_matmul_on. Errors: shape_mismatch; those of the backend.
template <class Policy, class X, class Weights, class Out, class... Options>
  requires(device_policy<Policy>)
[[nodiscard]] result<void> try_grouped_matmul(const Policy& policy, const X& x, const Weights& w,
                                              std::span<const std::uint32_t> row_offsets, matrix_view<Out> out,
                                              const Options&... options) {
  static_assert(
      requires { grouped_matmul_on(policy, x, w, row_offsets, out, options...); },
      "no header that is included multiplies these operands, with these options, on this device");
  return grouped_matmul_on(policy, x, w, row_offsets, out, options...);
}
template <class Policy, class X, class Weights, class Out, class... Options>
  requires(device_policy<Policy>)
[[nodiscard]] result<void> try_matmul(const Policy& policy, const X& x, const Weights& w, matrix_view<Out> out,
                                      const Options&... options) {
  static_assert(
      requires { matmul_on(policy, x, w, out, options...); },
      "no header that is included multiplies these operands, with these options, on this device");
  return matmul_on(policy, x, w, out, options...);
}
template <class Policy, class X, class Weights, class Out, class... Options>
  requires(device_policy<Policy>)
void grouped_matmul(const Policy& policy, const X& x, const Weights& w, std::span<const std::uint32_t> row_offsets,
                    matrix_view<Out> out, const Options&... options) {
  try_grouped_matmul(policy, x, w, row_offsets, out, options...).value();
}
template <class Policy, class X, class Weights, class Out, class... Options>
  requires(device_policy<Policy>)
void matmul(const Policy& policy, const X& x, const Weights& w, matrix_view<Out> out, const Options&... options) {
  try_matmul(policy, x, w, out, options...).value();
}

/// try_grouped_matmul, throwing its error.
template <class Policy, activations_like X, weights_like Weights, class Out>
  requires(can_matmul<Policy, X, Out>)
void grouped_matmul(const Policy& policy, const X& x, const Weights& w, std::span<const std::uint32_t> row_offsets,
                    matrix_view<Out> out) {
  try_grouped_matmul(policy, x, w, row_offsets, out).value();
}

/// try_matmul, throwing its error.
template <class Policy, activations_like X, weights_like Weights, class Out>
  requires(can_matmul<Policy, X, Out>)
void matmul(const Policy& policy, const X& x, const Weights& w, matrix_view<Out> out) {
  try_matmul(policy, x, w, out).value();
}

/// The same four into a batch of one matrix, or a matrix that owns its elements.
template <class Policy, activations_like X, weights_like Weights, detail::batch_of_products Product>
  requires(can_matmul<Policy, X, detail::product_element<Product>>)
result<void> try_grouped_matmul(const Policy& policy, const X& x, const Weights& w,
                                std::span<const std::uint32_t> row_offsets, Product&& out) {
  const auto one = detail::one_product(out);
  return one ? try_grouped_matmul(policy, x, w, row_offsets, *one) : one.error();
}
template <class Policy, activations_like X, weights_like Weights, detail::batch_of_products Product>
  requires(can_matmul<Policy, X, detail::product_element<Product>>)
result<void> try_matmul(const Policy& policy, const X& x, const Weights& w, Product&& out) {
  const auto one = detail::one_product(out);
  return one ? try_matmul(policy, x, w, *one) : one.error();
}
template <class Policy, activations_like X, weights_like Weights, detail::batch_of_products Product>
  requires(can_matmul<Policy, X, detail::product_element<Product>>)
void grouped_matmul(const Policy& policy, const X& x, const Weights& w, std::span<const std::uint32_t> row_offsets,
                    Product&& out) {
  try_grouped_matmul(policy, x, w, row_offsets, detail::one_product(out).value()).value();
}
template <class Policy, activations_like X, weights_like Weights, detail::batch_of_products Product>
  requires(can_matmul<Policy, X, detail::product_element<Product>>)
void matmul(const Policy& policy, const X& x, const Weights& w, Product&& out) {
  try_matmul(policy, x, w, detail::one_product(out).value()).value();
}

}  // namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA

#include "detail/macros_back.hpp"
