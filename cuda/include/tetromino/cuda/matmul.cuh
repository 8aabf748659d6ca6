#pragma once

#include "matmul_args.cuh"  // matmul_args
#include "prepare.cuh"      // prepare

#include <cstdint>  // std::uint32_t

namespace TETROMINO_NAMESPACE::cuda::detail {

/// The kernels of one kind of weights; see matmul_launch.cuh. `Macros`: macro blocks that a tile of 64 columns touches.
template <activation T, weight_kind Kind, int Macros>
result<void> matmul_of_kind(const stream& s, const matmul_job<T>& job, const matmul_args<T>& args);

template <activation T>
result<void> matmul(const stream& s, const matmul_job<T>& job) {
  const prepared_shape& shape = job.shape;
  if (job.row_count == 0 || shape.rows == 0 || shape.matrices == 0) return {};
  const auto* const bytes = reinterpret_cast<const std::uint8_t*>(job.weights);
  matmul_args<T> args{};
  args.tiles = bytes;
  args.factors = reinterpret_cast<const float*>(bytes + shape.factors_at());
  args.macros = bytes + shape.macros_at();
  args.bias = job.options.bias.empty() ? nullptr : job.options.bias.data();
  args.row_offsets = job.row_offsets;
  args.x = job.x.data, args.x_stride = job.x.row_stride;
  args.out = job.out.data, args.out_stride = job.out.row_stride;
  args.rows = static_cast<std::uint32_t>(job.x.rows);
  args.matrices = static_cast<std::uint32_t>(shape.matrices);
  args.weight_rows = static_cast<std::uint32_t>(shape.rows);
  args.outputs = static_cast<std::uint32_t>(shape.outputs());
  args.cols = static_cast<std::uint32_t>(shape.cols);
  args.row_tiles = static_cast<std::uint32_t>(shape.row_tiles());
  args.col_tiles = static_cast<std::uint32_t>(shape.col_tiles());
  args.tile_bytes = static_cast<std::uint32_t>(shape.tile_bytes());
  args.macro_block = static_cast<std::uint32_t>(shape.stored_macro_block());
  args.macro_shift = args.macro_block == 256 ? 2 : 1;
  args.macros_per_row = static_cast<std::uint32_t>(shape.macros_per_row());
  args.gating = shape.gating;
  args.has_settled_weights = job.options.settled_weights;
  args.is_out_aligned = is_aligned(job.out.data, 16) && job.out.row_stride % 8 == 0 && args.outputs % 8 == 0;
  if (shape.format.scale == scale_type::e4m3) return matmul_of_kind<T, weight_kind::nv, 0>(s, job, args);
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

}  // namespace tetromino::cuda::detail
