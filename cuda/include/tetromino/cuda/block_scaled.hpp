#pragma once

#include <tetromino/detail/macros_off.hpp>

#include "detail/checks.hpp"  // is_aligned
#include "matmul.hpp"         // activation
#include "stream.hpp"         // stream

#include <tetromino/block_scaled.hpp>  // block_scaled_view
#include <tetromino/error.hpp>         // error, result
#include <tetromino/matrix.hpp>        // matrix_view
#include <tetromino/packed.hpp>        // packed_view

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t
#include <span>     // std::span

/// Products of 4-bit activations and 4-bit weights (W4A4) on the block-scaled tensor cores of Blackwell: operands made
/// on the GPU by tetromino::repack_to, and a product of ours for compute capability 12.x behind tetromino::matmul.
/// <tetromino/cuda/cublaslt.hpp> multiplies through the toolkit's library, also on 10.x.
///
/// Compiled for sm_100a and sm_120a, and NOT RUN on such a GPU, for want of one. What has been run: making operands, on
/// the host and on an H200; the product's kernel on an H200, with a model of the one instruction that only sm_120a has.
namespace TETROMINO_NAMESPACE::cuda {

namespace detail {

struct block_scaled_job {
  block_scaled_view<> x;
  block_scaled_view<> w;
  std::size_t out_stride;
};

template <class Byte>
result<void> repack_block_scaled(const stream& s, const packed_view<any_format, Byte>& from,
                                 const block_scaled_view<std::uint8_t, float>& to);
template <activation T>
result<void> multiply_block_scaled(const stream& s, const block_scaled_job& job, T* out);
/// Writes the product of two factors (1 where null) and a zero.
template <class Float>
result<void> multiply_factors(const stream& s, const Float* x, const Float* w, Float* out);

/// Success, or an error that says which compute capability a call needs, and which the current device has.
[[nodiscard]] inline result<void> check_capability(const char* call, int least_major, int most_major,
                                                   const char* expected) {
  int device = 0, major = 0, minor = 0;
  if (auto done = status_of(cudaGetDevice(&device), "cudaGetDevice"); !done) return done;
  if (auto done = status_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                            "cudaDeviceGetAttribute");
      !done) {
    return done;
  }
  if (auto done = status_of(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                            "cudaDeviceGetAttribute");
      !done) {
    return done;
  }
  if (major >= least_major && major <= most_major) return {};
  return error(errc::device, {"CUDA: ", call, " needs compute capability ", expected, ", device ", device, " has ",
                              major, '.', minor});
}

/// Says why two operands have no product of that shape, if they have none.
[[nodiscard]] inline result<void> check_block_scaled_product(const block_scaled_view<>& x, const block_scaled_view<>& w,
                                                             std::size_t out_rows, std::size_t out_cols) {
  using tetromino::detail::text;
  for (const block_scaled_view<>* operand : {&x, &w}) {
    if (auto fits = tetromino::detail::check_block_scaled_sizes(*operand); !fits) return fits;
    if (operand->shape.matrices != 1) {
      return error(errc::shape_mismatch, {"block-scaled product: expected one matrix, got ", operand->shape.matrices,
                                          "; operator[] takes one of a batch"});
    }
    if (!is_aligned(operand->codes.data(), 16) || !is_aligned(operand->scales.data(), 16)) {
      return error(errc::invalid_argument, "block-scaled product: expected codes and scales at multiples of 16 bytes");
    }
  }
  if (x.shape.kind != w.shape.kind) {
    return error(errc::invalid_argument,
                 "block-scaled product: expected operands of one kind, got e4m3_16 and e8m0_32");
  }
  if (x.shape.cols != w.shape.cols) {
    return error(errc::shape_mismatch,
                 {"block-scaled product: the activations have ", x.shape.cols, " columns, the weights ", w.shape.cols});
  }
  if (out_rows != x.shape.rows || out_cols != w.shape.rows) {
    return error(errc::shape_mismatch, {"block-scaled product: it is [", x.shape.rows, ", ", w.shape.rows,
                                        "], the output [", out_rows, ", ", out_cols, "]"});
  }
  constexpr std::size_t most = std::size_t{1} << 31;
  if (x.shape.rows >= most || w.shape.rows >= most || x.shape.cols >= most) {
    return error(errc::shape_mismatch, "block-scaled product: expected fewer than 2^31 rows and columns");
  }
  return {};
}

}  // namespace detail

/// The hook that tetromino::repack_to finds: packed storage as operands, with the bytes that the CPU makes; how many
/// blocks lost low bits is not counted. Codes start at a multiple of 8 bytes. Errors: invalid_argument for macro blocks
/// and for kind e8m0_32 of another format than mxfp4-32; shape_mismatch; device.
[[nodiscard]] inline result<void> repack_on(const stream& s, const packed_view<any_format>& w,
                                            const block_scaled_view<std::uint8_t, float>& out) {
  if (auto fits = tetromino::detail::check_block_scaled(w.shape(), out.shape); !fits) return fits;
  if (auto fits = tetromino::detail::check_block_scaled_sizes(out); !fits) return fits;
  return detail::repack_block_scaled(s, w, out);
}

/// What try_quantize_swizzled_to packed, as operands, without a copy: nvfp4 or mxfp4-32 of one matrix, K a multiple of
/// 64. So activations become operands in the pass that packs them. Errors: invalid_argument for other formats;
/// shape_mismatch.
template <block_format Format, class Byte>
[[nodiscard]] result<block_scaled_view<>> try_as_block_scaled(const packed_view<Format, Byte>& swizzled) {
  using tetromino::detail::text;
  const any_format format(swizzled.format);
  const bool is_nv = format == any_format(nvfp4{});
  if (!is_nv && format != any_format(mxfp4{})) {
    return error(errc::invalid_argument, {"block-scaled operand: expected packed nvfp4 or mxfp4-32, got ",
                                          name_of(format), format.macro_block == 0 ? "" : " with macro blocks"});
  }
  if (swizzled.matrices != 1 || swizzled.cols % 64 != 0) {
    return error(errc::shape_mismatch, {"block-scaled operand: expected one matrix with K a multiple of 64, got ",
                                        swizzled.matrices, " with K = ", swizzled.cols});
  }
  const block_scaled_kind kind = is_nv ? block_scaled_kind::e4m3_16 : block_scaled_kind::e8m0_32;
  const block_scaled_view<> out{
      {kind, 1, swizzled.rows, swizzled.cols}, swizzled.codes, swizzled.scales, swizzled.tensor_scales};
  if (auto fits = tetromino::detail::check_block_scaled_sizes(out); !fits) return fits.error();
  return out;
}

/// The hook that tetromino::matmul finds for two operands of one kind, each one matrix: out[m, n] = Σ_k x[m, k] ·
/// w[n, k], with sums in float. Needs compute capability 12.x, and kernels that were compiled for it (120a). Errors:
/// invalid_argument; shape_mismatch; device, also where the GPU or what the kernels were compiled for does not fit.
template <class XByte, class XFloat, class WByte, class WFloat, activation T>
[[nodiscard]] result<void> matmul_on(const stream& s, const block_scaled_view<XByte, XFloat>& x,
                                     const block_scaled_view<WByte, WFloat>& w, const matrix_view<T>& out) {
  if (auto fits = detail::check_block_scaled_product(x, w, out.rows, out.cols); !fits) return fits;
  if (auto fits = detail::check_capability("matmul of block-scaled operands without a library", 12, 12,
                                           "12.x (cuBLASLt multiplies on 10.x too, kind e4m3_16)");
      !fits) {
    return fits;
  }
  return detail::multiply_block_scaled(s, {x, w, out.row_stride}, out.data);
}

/// try_as_block_scaled, throwing its error.
template <block_format Format, class Byte>
[[nodiscard]] block_scaled_view<> as_block_scaled(const packed_view<Format, Byte>& swizzled) {
  return try_as_block_scaled(swizzled).value();
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
