#pragma once

#include "../arch/sm80.cuh"  // multiply_add
#include "args.cuh"          // matmul_args
#include "epilogue.cuh"      // write_pair
#include "macro_walk.cuh"    // macro_factors
#include "weight_tile.cuh"   // coded_tile

#include <cstdint>  // std::uint32_t

/// The product on every GPU from compute capability 8.0 on, for any alignment of x: right, and simple rather than fast.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Rows of x in a tile of the portable kernel.
inline constexpr std::uint32_t any_rows_tile = 32;

/// A block of four warps computes 64 rows of weights by 32 rows of x.
template <activation T, weight_kind Kind, bool HasMacros>
__global__ void __launch_bounds__(128) any_rows_kernel(const matmul_args<T> args) {
  constexpr std::uint32_t stride = 64 + 8;
  __shared__ std::uint16_t x[any_rows_tile * stride];
  extern __shared__ std::uint32_t tiles_before[];
  if (args.x.row_offsets != nullptr)
    count_row_tiles<any_rows_tile>(args.x.row_offsets, args.weights.matrices, tiles_before);
  const output_tile tile = find_tile<any_rows_tile>(args, tiles_before, blockIdx.x);
  if (tile.rows == 0) return;

  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const std::uint32_t row_tile = tile.feature_tile;
  const std::uint8_t* tile_at = args.weights.template tiles_of<Kind>(tile.matrix, row_tile);
  const std::uint8_t* macros = args.weights.macros_of(tile.matrix, row_tile) + g * 8 + warp * 2;
  macro_pair factor{1.0f, 1.0f};
  if constexpr (HasMacros) factor = macro_factors(load_macro_bytes(macros));
  float d[4][4] = {};
  for (std::uint32_t k = 0; k < args.weights.col_tiles; ++k, tile_at += weight_tile<Kind>::bytes) {
    __syncthreads();
    for (std::uint32_t i = threadIdx.x; i < any_rows_tile * 64; i += 128) {
      const std::uint32_t m = i / 64, column = k * 64 + i % 64;
      const bool exists = m < tile.rows && column < args.x.cols;
      x[m * stride + i % 64] =
          exists ? args.x.data[(tile.first_row + m) * args.x.stride + column].bits : std::uint16_t{0};
    }
    __syncthreads();
    coded_tile<Kind> coded;
    coded.read_global(tile_at + weight_tile<Kind>::codes_of(warp, lane),
                      tile_at + weight_tile<Kind>::scales_of(warp, lane));
#pragma unroll
    for (std::uint32_t s = 0; s < 4; ++s) {
      if constexpr (HasMacros) {
        const std::uint32_t column = k * 64 + s * 16;
        if (column != 0 && column % args.weights.macro_block == 0) {
          const macro_pair next = macro_factors(load_macro_bytes(macros + column / args.weights.macro_block * 64));
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

}  // namespace TETROMINO_NAMESPACE::cuda::detail
