#pragma once

#include "matmul_args.cuh"  // matmul_args
#include "matmul_tile.cuh"  // multiply_add

#include <cstdint>  // std::uint32_t

/// The product on every GPU from compute capability 8.0 on, for any alignment of x: right, and simple rather than fast.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Rows of x in a tile of the portable kernel.
inline constexpr std::uint32_t portable_rows = 32;

/// A block of four warps computes 64 rows of weights by 32 rows of x.
template <activation T, weight_kind Kind, bool HasMacros>
__global__ void __launch_bounds__(128) portable_kernel(const matmul_args<T> args) {
  constexpr std::uint32_t block = block_of<Kind>, tile_bytes = 2048 + 4096 / block, stride = 64 + 8;
  __shared__ std::uint16_t x[portable_rows * stride];
  extern __shared__ std::uint32_t tiles_before[];
  if (args.row_offsets != nullptr) count_row_tiles<portable_rows>(args.row_offsets, args.matrices, tiles_before);
  const output_tile tile = find_tile<portable_rows>(args, tiles_before, blockIdx.x);
  if (tile.rows == 0) return;

  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const std::uint32_t row_tile = tile.feature_tile;
  const std::uint8_t* tile_at =
      args.tiles + (static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile) * args.col_tiles * tile_bytes;
  const std::uint8_t* macros =
      args.macros + (static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile) * args.macros_per_row * 64 +
      g * 8 + warp * 2;
  macro_pair factor{1.0f, 1.0f};
  if constexpr (HasMacros) factor = macro_factors(load_macro_bytes(macros));
  float d[4][4] = {};
  for (std::uint32_t k = 0; k < args.col_tiles; ++k, tile_at += tile_bytes) {
    __syncthreads();
    for (std::uint32_t i = threadIdx.x; i < portable_rows * 64; i += 128) {
      const std::uint32_t m = i / 64, column = k * 64 + i % 64;
      const bool exists = m < tile.rows && column < args.cols;
      x[m * stride + i % 64] = exists ? args.x[(tile.first_row + m) * args.x_stride + column].bits : std::uint16_t{0};
    }
    __syncthreads();
    coded_tile<Kind> coded;
    coded.read_global(tile_at + (warp * 32 + lane) * 16, tile_at + 2048 + (g * 4 + warp) * (2 * 64 / block));
#pragma unroll
    for (std::uint32_t s = 0; s < 4; ++s) {
      if constexpr (HasMacros) {
        const std::uint32_t column = k * 64 + s * 16;
        if (column != 0 && column % args.macro_block == 0) {
          const macro_pair next = macro_factors(load_macro_bytes(macros + column / args.macro_block * 64));
          const float low = __fdividef(next.low, factor.low), high = __fdividef(next.high, factor.high);
#pragma unroll
          for (int n = 0; n < 4; ++n) d[n][0] *= low, d[n][1] *= low, d[n][2] *= high, d[n][3] *= high;
          factor = next;
        }
      }
      std::uint32_t a[4];
      coded.template decode<T>(static_cast<int>(s), a);
#pragma unroll
      for (std::uint32_t n = 0; n < 4; ++n) {
        const auto* const at = reinterpret_cast<const std::uint32_t*>(x + (n * 8 + g) * stride + s * 16 + t * 2);
        multiply_add<T>(d[n], a, at[0], at[4]);
      }
    }
  }
  constexpr float missing = scale_decoding<T, Kind>::missing;
  const float low = __fdividef(missing, factor.low), high = __fdividef(missing, factor.high);
  const row_pair rows = find_rows(args, tile.matrix, row_tile * 64 + warp * 16 + g);
#pragma unroll
  for (std::uint32_t n = 0; n < 4; ++n) {
#pragma unroll
    for (std::uint32_t i = 0; i < 2; ++i) {
      const std::uint32_t m = n * 8 + t * 2 + i;
      if (m < tile.rows) write_pair(args, rows, tile.first_row + m, d[n][i] * low, d[n][i + 2] * high);
    }
  }
}

}  // namespace tetromino::cuda::detail
