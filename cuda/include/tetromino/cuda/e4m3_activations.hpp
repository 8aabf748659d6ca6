#pragma once

#include <tetromino/detail/macros_off.hpp>

#include "detail/checks.hpp"  // check_pieces, is_aligned
#include "stream.hpp"         // stream

#include <tetromino/e4m3_activations.hpp>  // quantize_e4m3_to
#include <tetromino/error.hpp>             // error, result

/// Activations in E4M3 with a scale for each row, on the GPU: one launch, which reads rows of up to 16,384 columns
/// once.
namespace TETROMINO_NAMESPACE::cuda {

namespace detail {

template <real T>
result<void> quantize_e4m3(const stream& s, const tetromino::detail::quantize_e4m3_job<T>& job);

}  // namespace detail

/// The hook that tetromino::quantize_e4m3_to finds; it gives the bytes and scales that the scalar backend gives. A row
/// with NaN or an infinity becomes zero with a NaN for a scale, and its first such value is noted in the stream's
/// rejections, if it has some. Errors: shape_mismatch; invalid_argument where values do not start at a multiple of 16
/// bytes; device.
template <real T>
result<void> quantize_e4m3_on(const stream& s, const tetromino::detail::quantize_e4m3_job<T>& job) {
  if (!detail::is_aligned(job.out.values.data(), 16)) {
    return error(errc::invalid_argument, "cuda: expected the values of e4m3 activations at a multiple of 16 bytes");
  }
  if (auto fits = detail::check_pieces(job.in.matrices, job.in.rows, job.out.stride() / 16); !fits) return fits;
  return detail::quantize_e4m3(s, job);
}

}  // namespace TETROMINO_NAMESPACE::cuda

#include <tetromino/detail/macros_back.hpp>
