#pragma once

#include <tetromino/detail/macros_off.hpp>

#include "repacked.hpp"  // repacked_view
#include "stream.hpp"    // stream

#include <tetromino/activations.hpp>       // as_activations
#include <tetromino/e4m3.hpp>              // e4m3
#include <tetromino/e4m3_activations.hpp>  // e4m3_view
#include <tetromino/error.hpp>             // error, result
#include <tetromino/float16.hpp>           // half, bfloat16
#include <tetromino/matmul.hpp>            // matmul, grouped_matmul
#include <tetromino/matrix.hpp>            // matrix_view

#include <concepts>     // std::convertible_to, std::same_as
#include <cstddef>      // std::size_t, std::byte
#include <cstdint>      // std::uint32_t
#include <span>         // std::span
#include <type_traits>  // std::conditional_t, std::remove_cvref_t

/// Activations of 16 or 8 bits times packed 4-bit weights (W4A16, W4A8) through tetromino::matmul and grouped_matmul:
/// weights are decoded in registers on their way into the tensor cores, so that a product reads 4-bit weights from
/// memory and nothing else of their size.
namespace TETROMINO_NAMESPACE::cuda {

/// What a product on the GPU can be told beside its operands.
struct matmul_options {
  /// Added to each output before anything else, in device memory: [matrices, rows] of the weights. Empty: nothing.
  std::span<const float> bias{};
  /// Whether nothing that may still run in the stream writes the weights: then a product of one matrix starts to read
  /// them while the kernel before it ends. (CUDA Programming Guide, "Programmatic Dependent Launch")
  bool settled_weights = false;
};

namespace detail {

struct matmul_job_base {
  repacked_shape shape;
  const std::byte* weights;
  const std::uint32_t* row_offsets;  ///< device memory [matrices + 1], or null for one matrix
  std::size_t row_count;
  matmul_options options;
  bool portable;  ///< the kernel for every GPU, also where there is a faster one
};

/// A product of activations of type X.
template <class X>
struct matmul_job;
template <activation T>
struct matmul_job<T> : matmul_job_base {
  matrix_view<const T> x;
  matrix_view<T> out;
};
template <>
struct matmul_job<e4m3> : matmul_job_base {
  e4m3_view<> x;
  matrix_view<bfloat16> out;
};

template <class X>
result<void> matmul(const stream& s, const matmul_job<X>& job);

/// `x`: whatever has rows and columns.
template <class Weights, class X, class Out>
[[nodiscard]] result<void> check_product(const Weights& w, const X& x, const matrix_view<Out>& out,
                                         const matmul_options& options) {
  using tetromino::detail::text;
  if (x.cols != w.shape.cols) {
    return error(errc::shape_mismatch,
                 {"matmul: the activations have ", x.cols, " columns, the weights ", w.shape.cols});
  }
  if (out.rows != x.rows || out.cols != w.shape.outputs()) {
    return error(errc::shape_mismatch, {"matmul: the product is [", x.rows, ", ", w.shape.outputs(), "], the output [",
                                        out.rows, ", ", out.cols, "]"});
  }
  if (auto fits = check_repacked(w); !fits) return fits;
  if (const std::size_t n = options.bias.size(); n != 0 && n != w.shape.matrices * w.shape.rows) {
    return error(errc::shape_mismatch, {"matmul: the bias needs ", w.shape.matrices * w.shape.rows,
                                        " entries, one for each row of the weights, got ", n});
  }
  if (x.rows >= std::size_t{1} << 31 || w.shape.rows >= std::size_t{1} << 31 || x.cols >= std::size_t{1} << 31) {
    return error(errc::shape_mismatch, "matmul: expected fewer than 2^31 rows and columns");
  }
  return {};
}

/// What products with activations in E4M3 ask for beside that.
[[nodiscard]] inline result<void> check_e4m3_product(const repacked_shape& w, const e4m3_view<>& x) {
  if (auto fits = check_e4m3_format("matmul", w.format); !fits) return fits;
  if (auto fits = tetromino::detail::check_storage(x); !fits) return fits;
  if (is_aligned(x.values.data(), 16)) return {};
  return error(errc::invalid_argument, "cuda: expected the values of e4m3 activations at a multiple of 16 bytes");
}

/// Activations as one matrix. Errors: shape_mismatch where the rows of a batch are not evenly apart.
template <class X>
[[nodiscard]] auto as_rows(const X& x) {
  const auto in = tetromino::detail::as_activations(x);
  using view = std::remove_const_t<decltype(in)>;
  static_assert(std::same_as<view, batch_view<const half>> || std::same_as<view, batch_view<const bfloat16>>,
                "on a cuda::stream the activations of matmul are half, bfloat16 or an e4m3_view");
  using T = std::remove_cvref_t<decltype(*in.data)>;
  if (in.matrices > 1 && in.matrix_stride != in.rows * in.row_stride) {
    return result<matrix_view<const T>>(
        error(errc::shape_mismatch, {"matmul: expected rows that are evenly apart, got matrices ", in.matrix_stride,
                                     " elements apart with ", in.rows, " rows ", in.row_stride, " apart"}));
  }
  return result<matrix_view<const T>>(matrix_view<const T>(in.data, in.matrices * in.rows, in.cols, in.row_stride));
}

template <class Weights>
inline constexpr bool is_repacked = false;
template <class T, class Byte>
inline constexpr bool is_repacked<repacked_view<T, Byte>> = true;

/// What the weights of a product of activations X that writes `Out` are repacked for.
template <class X, class Out>
using repacked_for = std::conditional_t<std::convertible_to<X, e4m3_view<>>, e4m3, Out>;

/// Weights as such products read them.
template <class X, class Out, class Weights>
[[nodiscard]] repacked_view<repacked_for<X, Out>> as_weights(const Weights& w) {
  using T = repacked_for<X, Out>;
  static_assert(
      is_repacked<Weights>,
      "on a cuda::stream the weights of matmul are a cuda::repacked_view that tetromino::repack_to has filled");
  static_assert(std::same_as<Weights, repacked_view<T>> || std::same_as<Weights, repacked_view<T, std::byte>>,
                "on a cuda::stream the activations of matmul have the type that the weights were repacked for");
  return w;
}

/// One product, for both hooks; `row_offsets` is null for one matrix.
template <class X, class Out>
[[nodiscard]] result<void> multiply(const stream& s, const X& x, const repacked_view<repacked_for<X, Out>>& w,
                                    const std::uint32_t* row_offsets, const matrix_view<Out>& out,
                                    const matmul_options& options) {
  if constexpr (std::convertible_to<X, e4m3_view<>>) {
    static_assert(std::same_as<Out, bfloat16>, "on a cuda::stream e4m3 activations give bfloat16 outputs");
    if (auto fits = check_product(w, x, out, options); !fits) return fits;
    if (auto fits = check_e4m3_product(w.shape, x); !fits) return fits;
    return detail::matmul(s, matmul_job<e4m3>{{w.shape, w.data.data(), row_offsets, x.rows, options, false}, x, out});
  } else {
    const auto rows = as_rows(x);
    static_assert(std::same_as<decltype(rows), const result<matrix_view<const Out>>>,
                  "on a cuda::stream the activations and the output of matmul have one type");
    if (!rows) return rows.error();
    if (auto fits = check_product(w, *rows, out, options); !fits) return fits;
    return detail::matmul(
        s, matmul_job<Out>{{w.shape, w.data.data(), row_offsets, rows->rows, options, false}, *rows, out});
  }
}

}  // namespace detail

/// The hooks that tetromino::matmul and grouped_matmul find, with what the GPU alone has as a last argument: half or
/// bfloat16 activations by weights that were repacked for them. The outputs of gated weights are silu(gate) · up, [M,
/// n]. Sums run in float, in an order that depends on the shapes and the GPU alone, so that results repeat; a
/// macro-block factor of 8 bits multiplies partial sums, one of 2 bits is part of the weights. `row_offsets` is device
/// memory, and not looked at before the launch. Errors: shape_mismatch; device.
///
/// Activations may also be an e4m3_view in device memory, with bfloat16 outputs and weights that were repacked for
/// E4M3, of mxfp4-32 without macro blocks. Then weights become E4M3 too: where a block's scale is more than a factor of
/// 2^14 below the largest of its row, they are rounded to multiples of 2^-15 of that largest scale, to nearest even. A
/// row's scale multiplies its finished sums; where it is NaN, so are the row's outputs. The tensor cores add such
/// products up with fewer bits than float has: 32 of them and the sum so far are aligned to the largest, and lose what
/// lies 13 bits below it. Random signs make that small beside the rounding of outputs; sums of one sign come out too
/// small, by 1 % where 1024 products are equal and by 15 % of 7168, since one sum goes through all columns. (Of few
/// rows, blocks may share the columns and add up in float, which loses less.) This needs Hopper; one
/// row of one matrix takes as long as with bfloat16, more rows and experts take less.
/// Errors: also invalid_argument, for other weights, and for values that do not start at a multiple of 16 bytes.
template <class X, class Weights, class Out>
[[nodiscard]] result<void> matmul_on(const stream& s, const X& x, const Weights& w, const matrix_view<Out>& out,
                                     const matmul_options& options = {}) {
  const auto weights = detail::as_weights<X, Out>(w);
  if (weights.shape.matrices != 1) {
    return error(errc::shape_mismatch, {"matmul: expected one weight matrix, got ", weights.shape.matrices,
                                        "; grouped_matmul takes a batch"});
  }
  return detail::multiply(s, x, weights, nullptr, out, options);
}
template <class X, class Weights, class Out>
[[nodiscard]] result<void> grouped_matmul_on(const stream& s, const X& x, const Weights& w,
                                             std::span<const std::uint32_t> row_offsets, const matrix_view<Out>& out,
                                             const matmul_options& options = {}) {
  const auto weights = detail::as_weights<X, Out>(w);
  if (row_offsets.size() != weights.shape.matrices + 1) {
    return error(errc::shape_mismatch,
                 {"matmul: expected ", weights.shape.matrices + 1, " row offsets, got ", row_offsets.size()});
  }
  return detail::multiply(s, x, weights, row_offsets.data(), out, options);
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
