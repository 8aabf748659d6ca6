#pragma once

#include <tetromino/detail/macros_off.hpp>

/// The CUDA backend: include this header and pass tetromino::cuda::stream as the policy. It needs no CUDA compiler: the
/// kernels are linked from the target tetromino::cuda, or compiled into a .cu file that includes cuda/kernels.cuh.

#include "cuda/e4m3_activations.hpp"  // quantize_e4m3_on
#include "cuda/matmul.hpp"            // matmul_on
#include "cuda/stream.hpp"            // stream, rejections

#include <tetromino/dequantize.hpp>  // dequantize_to
#include <tetromino/hadamard.hpp>    // rotate_job
#include <tetromino/layout.hpp>      // swizzled_bytes
#include <tetromino/quantize.hpp>    // quantize_to

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t
#include <span>     // std::span

namespace TETROMINO_NAMESPACE::cuda {

/// Bytes of workspace that fake_quantize needs on a stream: the tensor scales of NVFP4, none for other formats.
[[nodiscard]] inline std::size_t fake_quantize_workspace_bytes(const any_format& format, std::size_t matrices,
                                                               const quantize_options& options = {}) noexcept {
  if (format.scale != scale_type::e4m3) return 0;
  const bool one = options.scope == tensor_scale_scope::batch && options.tensor_scales.size() <= 1;
  return (one ? 1 : matrices) * sizeof(float);
}

namespace detail {

/// How block scales lie: a row of them for each row, or in the 128x4 swizzle.
enum class scale_order : std::uint8_t { rows, swizzled };

template <real T>
result<void> quantize(const stream& s, const tetromino::detail::quantize_job<T>& job, scale_order order);
template <real T>
result<void> quantize_transposed(const stream& s, const tetromino::detail::quantize_job<T>& job);
template <real T>
result<void> fake_quantize(const stream& s, const tetromino::detail::fake_quantize_job<T>& job);
template <real T>
result<void> dequantize(const stream& s, const tetromino::detail::dequantize_job<T>& job);
template <real T>
result<void> rotate(const stream& s, const tetromino::detail::rotate_job<T>& job);
template <real T>
result<void> amax(const stream& s, const batch_view<const T>& x, special_values special, std::span<float> out);

}  // namespace detail

/// The hooks that tetromino::quantize_to, fake_quantize, dequantize_to, rotate and rotate_back find. All of them give
/// the bytes that the scalar backend gives. Column weights and tensor scales among the options are device memory, and
/// not looked at before the launch.
template <real T>
result<void> quantize_on(const stream& s, const tetromino::detail::quantize_job<T>& job) {
  return detail::quantize(s, job, detail::scale_order::rows);
}
template <real T>
result<void> fake_quantize_on(const stream& s, const tetromino::detail::fake_quantize_job<T>& job) {
  return detail::fake_quantize(s, job);
}
template <real T>
result<void> rotate_on(const stream& s, const tetromino::detail::rotate_job<T>& job) {
  return detail::rotate(s, job);
}
template <real T>
result<void> dequantize_on(const stream& s, const tetromino::detail::dequantize_job<T>& job) {
  return detail::dequantize(s, job);
}

/// The largest magnitude of x[matrices, rows, cols], or of each matrix, into out[1] or out[matrices] in device memory:
/// the first of NVFP4's two passes, for those who pack a tensor in slices. Blocks of 16 that hold NaN or an infinity
/// are left out, unless special_values is saturate. Errors: shape_mismatch; device.
template <matrix_like Input>
[[nodiscard]] result<void> try_amax_to(const stream& s, const Input& x, std::span<float> out,
                                       special_values special = special_values::poison) {
  const auto in = tetromino::detail::as_batch(x);
  if (out.size() != 1 && out.size() != in.matrices) {
    return error(errc::shape_mismatch,
                 {"amax: expected room for 1 magnitude or ", in.matrices, " (one for each matrix), got ", out.size()});
  }
  return detail::amax(s, in, special, out);
}

/// Packs as quantize_to does, with the block scales in the 128x4 swizzle of cuBLASLt and CUTLASS in place of rows:
/// out.scales has layout::swizzled_bytes(matrices, rows, blocks_per_row) bytes, of which those that pad are zeroed.
/// Errors: as try_quantize_to.
template <matrix_like Input, block_format Format>
[[nodiscard]] result<void> try_quantize_swizzled_to(const stream& s, const Input& x,
                                                    packed_view<Format, std::uint8_t> out,
                                                    const quantize_options& options = {}) {
  const auto in = tetromino::detail::as_batch(x);
  const packed_shape shape = out.shape();
  const std::size_t bytes = layout::swizzled_bytes(shape.matrices, shape.rows, shape.blocks_per_row());
  if (out.scales.size() != bytes) {
    return error(errc::shape_mismatch,
                 {"packed storage: swizzled scales need ", bytes, " entries, got ", out.scales.size()});
  }
  auto linear = out;
  linear.scales = out.scales.first(shape.scale_bytes());
  tetromino::detail::quantize_job<element_of<Input>> job{in, linear, options};
  if (auto valid = tetromino::detail::check_job(in.matrices, in.rows, in.cols, job.out, job.options,
                                                tetromino::detail::option_memory::device);
      !valid) {
    return valid;
  }
  job.out.scales = out.scales;
  if (auto done = detail::status_of(cudaMemsetAsync(out.scales.data(), 0, bytes, s.handle), "cudaMemsetAsync"); !done) {
    return done;
  }
  return detail::quantize(s, job, detail::scale_order::swizzled);
}

/// Packs the transpose of x[matrices, rows, cols] in the same pass: out is [matrices, cols, rows], with blocks down the
/// columns of x, which a rotation runs down too. Column weights belong to the rows of x; a rejected value is reported
/// where it lies in x. Errors: as try_quantize_to.
template <matrix_like Input, block_format Format>
[[nodiscard]] result<void> try_quantize_transposed_to(const stream& s, const Input& x,
                                                      packed_view<Format, std::uint8_t> out,
                                                      const quantize_options& options = {}) {
  const auto in = tetromino::detail::as_batch(x);
  const packed_shape shape = out.shape();
  if (auto fits = tetromino::detail::check_storage(out); !fits) return fits;
  if (shape.matrices != in.matrices || shape.rows != in.cols || shape.cols != in.rows) {
    return error(errc::shape_mismatch,
                 {"packed storage is [", shape.matrices, ", ", shape.rows, ", ", shape.cols,
                  "], the transpose of the input [", in.matrices, ", ", in.cols, ", ", in.rows, "]"});
  }
  tetromino::detail::quantize_job<element_of<Input>> job{in, out, options};
  if (auto valid = tetromino::detail::check_options(job.options, shape.format, in.matrices, in.rows,
                                                    tetromino::detail::option_memory::device);
      !valid) {
    return valid;
  }
  return detail::quantize_transposed(s, job);
}

/// try_amax_to, throwing its error.
template <matrix_like Input>
void amax_to(const stream& s, const Input& x, std::span<float> out, special_values special = special_values::poison) {
  try_amax_to(s, x, out, special).value();
}
/// try_quantize_swizzled_to, throwing its error.
template <matrix_like Input, block_format Format>
void quantize_swizzled_to(const stream& s, const Input& x, packed_view<Format, std::uint8_t> out,
                          const quantize_options& options = {}) {
  try_quantize_swizzled_to(s, x, out, options).value();
}
/// try_quantize_transposed_to, throwing its error.
template <matrix_like Input, block_format Format>
void quantize_transposed_to(const stream& s, const Input& x, packed_view<Format, std::uint8_t> out,
                            const quantize_options& options = {}) {
  try_quantize_transposed_to(s, x, out, options).value();
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
