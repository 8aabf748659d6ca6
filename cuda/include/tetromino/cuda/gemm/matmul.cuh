#pragma once

#include "args.cuh"    // matmul_args
#include "repack.cuh"  // repack

#include <concepts>  // std::same_as
#include <cstdint>   // std::uint8_t, std::uint32_t

namespace TETROMINO_NAMESPACE::cuda::detail {

/// The kernels of one kind of weights; see launch.cuh. `Macros`: macro blocks that a tile of 64 columns touches.
template <activation T, weight_kind Kind, int Macros>
result<void> matmul_of_kind(const stream& s, const matmul_job<T>& job, const matmul_args<T>& args);

/// The same for activations in E4M3; see e4m3_launch.cuh.
template <weight_kind Kind>
result<void> e4m3_matmul_of_kind(const stream& s, const matmul_job<e4m3>& job, const matmul_args<bfloat16>& args);

/// What a kernel is told of all but the activations themselves.
template <activation T>
[[nodiscard]] matmul_args<T> args_of(const matmul_job_base& job, const matrix_view<T>& out) {
  const repacked_shape& shape = job.shape;
  const auto* const bytes = reinterpret_cast<const std::uint8_t*>(job.weights);
  matmul_args<T> args{};
  args.weights.tiles = bytes;
  args.weights.factors = reinterpret_cast<const float*>(bytes + shape.factors_at());
  args.weights.macros = bytes + shape.macros_at();
  args.out.bias = job.options.bias.empty() ? nullptr : job.options.bias.data();
  args.x.row_offsets = job.row_offsets;
  args.out.data = out.data, args.out.stride = out.row_stride;
  args.x.rows = static_cast<std::uint32_t>(job.row_count);
  args.weights.matrices = static_cast<std::uint32_t>(shape.matrices);
  args.weights.rows = static_cast<std::uint32_t>(shape.rows);
  args.out.cols = static_cast<std::uint32_t>(shape.outputs());
  args.x.cols = static_cast<std::uint32_t>(shape.cols);
  args.weights.row_tiles = static_cast<std::uint32_t>(shape.row_tiles());
  args.weights.col_tiles = static_cast<std::uint32_t>(shape.col_tiles());
  args.weights.macro_block = static_cast<std::uint32_t>(shape.stored_macro_block());
  args.weights.macro_shift = args.weights.macro_block == 256 ? 2 : 1;
  args.weights.macros_per_row = static_cast<std::uint32_t>(shape.macros_per_row());
  args.weights.gating = shape.gating;
  args.weights.are_settled = job.options.settled_weights;
  args.out.is_aligned = is_aligned(out.data, 16) && out.row_stride % 8 == 0 && args.out.cols % 8 == 0;
  return args;
}

/// A product of half or bfloat16 activations, of the kind that the weights are.
template <activation T>
result<void> matmul_of_shape(const stream& s, const matmul_job<T>& job, const matmul_args<T>& args) {
  const repacked_shape& shape = job.shape;
  if (shape.format.scale == scale_type::e4m3) return matmul_of_kind<T, weight_kind::nv, 0>(s, job, args);
  if (shape.format.macro_bits == 2) return matmul_of_kind<T, weight_kind::mx32_fine, 0>(s, job, args);
  if (shape.format.macro_block == 0) {
    if (shape.format.block == 16) return matmul_of_kind<T, weight_kind::mx16, 0>(s, job, args);
    return matmul_of_kind<T, weight_kind::mx32, 0>(s, job, args);
  }
  if (shape.stored_macro_block() == 32) {
    if (shape.format.block == 16) return matmul_of_kind<T, weight_kind::mx16, 2>(s, job, args);
    return matmul_of_kind<T, weight_kind::mx32, 2>(s, job, args);
  }
  if (shape.format.block == 16) return matmul_of_kind<T, weight_kind::mx16, 1>(s, job, args);
  return matmul_of_kind<T, weight_kind::mx32, 1>(s, job, args);
}

template <class X>
result<void> matmul(const stream& s, const matmul_job<X>& job) {
  if (job.row_count == 0 || job.shape.rows == 0 || job.shape.matrices == 0) return {};
  auto args = args_of(job, job.out);
  if constexpr (std::same_as<X, e4m3>) {
    args.x.scales = job.x.scales.data();
    return e4m3_matmul_of_kind<weight_kind::mx32>(s, job, args);
  } else {
    args.x.data = job.x.data, args.x.stride = job.x.row_stride;
    return matmul_of_shape(s, job, args);
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
