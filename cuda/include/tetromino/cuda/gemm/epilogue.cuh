#pragma once

#include "../detail/values.cuh"  // round_to
#include "args.cuh"              // matmul_args

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// What all product kernels do with their sums: factors, bias, gating and rounding.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// x * sigmoid(x).
[[nodiscard]] __device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

/// What turns the sums of a lane's two rows of a tile, g and g + 8, into outputs.
struct row_pair {
  float factor[2];
  float bias[2];
  std::uint32_t output[2];  ///< columns of the output; the first alone where rows are gated
  bool exists[2];
};

/// The factor and the bias of row `row` of the tiles.
template <class T>
[[nodiscard]] __device__ inline float2 load_row(const matmul_args<T>& args, std::uint32_t matrix, std::uint32_t row) {
  const std::uint32_t source = source_row(row, args.weights.rows, args.weights.gating);
  if (source >= args.weights.rows) return make_float2(0.0f, 0.0f);
  return make_float2(
      args.weights.factors[static_cast<std::size_t>(matrix) * args.weights.row_tiles * 64 + row],
      args.out.bias == nullptr ? 0.0f : args.out.bias[static_cast<std::size_t>(matrix) * args.weights.rows + source]);
}

/// For row `row` of the tiles, with row % 16 < 8, and row + 8, from what load_row gave for them.
template <class T>
[[nodiscard]] __device__ inline row_pair pair_rows(const matmul_args<T>& args, std::uint32_t row, float2 low,
                                                   float2 high) {
  row_pair out;
#pragma unroll
  for (std::uint32_t i = 0; i < 2; ++i) {
    out.exists[i] = source_row(row + 8 * i, args.weights.rows, args.weights.gating) < args.weights.rows;
    out.factor[i] = i == 0 ? low.x : high.x, out.bias[i] = i == 0 ? low.y : high.y;
    out.output[i] = args.weights.gating == gating_rows::none ? row + 8 * i : row / 16 * 8 + row % 8;
  }
  return out;
}
template <class T>
[[nodiscard]] __device__ inline row_pair find_rows(const matmul_args<T>& args, std::uint32_t matrix,
                                                   std::uint32_t row) {
  return pair_rows(args, row, load_row(args, matrix, row), load_row(args, matrix, row + 8));
}

/// Finishes the sums of rows g and g + 8 for one row of x, and writes them; the caller says whether rows are gated.
template <bool IsGated, activation T>
__device__ inline void write_pair_as(const matmul_args<T>& args, const row_pair& rows, std::size_t out_row, float low,
                                     float high) {
  low = low * rows.factor[0] + rows.bias[0];
  high = high * rows.factor[1] + rows.bias[1];
  T* const to = args.out.data + out_row * args.out.stride;
  if constexpr (IsGated) {
    if (rows.exists[0]) to[rows.output[0]] = round_to<T>(silu(low) * high);
  } else {
    if (rows.exists[0]) to[rows.output[0]] = round_to<T>(low);
    if (rows.exists[1]) to[rows.output[1]] = round_to<T>(high);
  }
}
template <activation T>
__device__ inline void write_pair(const matmul_args<T>& args, const row_pair& rows, std::size_t out_row, float low,
                                  float high) {
  if (args.weights.gating != gating_rows::none) {
    write_pair_as<true>(args, rows, out_row, low, high);
  } else {
    write_pair_as<false>(args, rows, out_row, low, high);
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
