#pragma once

#include "matmul.hpp"   // matmul_job
#include "prepare.cuh"  // weight_kind

#include <cstdint>  // std::uint32_t

/// What the product kernels are told, and how they share out the work.
namespace TETROMINO_NAMESPACE::cuda::detail {

template <activation T>
struct matmul_args {
  const std::uint8_t* tiles;
  const float* factors;
  const std::uint8_t* macros;
  const float* bias;
  const std::uint32_t* row_offsets;
  const T* x;
  T* out;
  std::size_t x_stride, out_stride;
  std::uint32_t rows;  ///< of x
  std::uint32_t matrices, weight_rows, outputs, cols;
  std::uint32_t row_tiles, col_tiles, tile_bytes;
  std::uint32_t macro_block, macros_per_row;
  std::uint32_t feature_tiles;  ///< columns of the grid of output tiles
  gating_rows gating;
  bool is_out_aligned;
  bool has_settled_weights;
  std::uint32_t parts;        ///< blocks that share the columns of a tile
  std::uint32_t macro_shift;  ///< a macro block has 64 << macro_shift columns, if it has more than 32
};

/// One tile of the output: some rows of one matrix's part of x, by some tiles of its weights.
struct output_tile {
  std::uint32_t matrix, first_row, rows, feature_tile;
};

/// How many row tiles the matrices before each one have, in shared memory, from the row offsets. All threads of a block
/// call it together.
template <std::uint32_t Rows>
__device__ inline void count_row_tiles(const std::uint32_t* row_offsets, std::uint32_t matrices,
                                       std::uint32_t* tiles_before) {
  if (threadIdx.x < 32) {
    std::uint32_t carried = 0;
    for (std::uint32_t first = 0; first < matrices; first += 32) {
      const std::uint32_t e = first + threadIdx.x;
      std::uint32_t sum = e < matrices ? (row_offsets[e + 1] - row_offsets[e] + Rows - 1) / Rows : 0;
#pragma unroll
      for (unsigned n = 1; n < 32; n *= 2) {
        const std::uint32_t below = __shfl_up_sync(full_warp, sum, n);
        if (threadIdx.x >= n) sum += below;
      }
      if (e < matrices) tiles_before[e + 1] = carried + sum;
      carried += __shfl_sync(full_warp, sum, 31);
    }
    if (threadIdx.x == 0) tiles_before[0] = 0;
  }
  __syncthreads();
}

/// Tile `number` of the output; tiles of the same rows follow each other. Past the last one, `rows` is 0.
template <std::uint32_t Rows, class T>
[[nodiscard]] __device__ inline output_tile find_tile(const matmul_args<T>& args, const std::uint32_t* tiles_before,
                                                      std::uint32_t number) {
  output_tile out{};
  std::uint32_t row_tile = number / args.feature_tiles;
  out.feature_tile = number - row_tile * args.feature_tiles;
  std::uint32_t first = 0, last = args.rows;
  if (args.row_offsets != nullptr) {
    if (row_tile >= tiles_before[args.matrices]) return out;
    std::uint32_t low = 0, high = args.matrices;  // the matrix lies in [low, high)
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      (tiles_before[middle] <= row_tile ? low : high) = middle;
    }
    out.matrix = low;
    row_tile -= tiles_before[low];
    first = args.row_offsets[low], last = args.row_offsets[low + 1];
  }
  out.first_row = first + row_tile * Rows;
  out.rows = out.first_row < last ? min(last - out.first_row, Rows) : 0;
  return out;
}

/// x * sigmoid(x).
[[nodiscard]] __device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

/// What turns the sums of a lane's two rows of a tile, g and g + 8, into outputs.
struct row_pair {
  float factor[2];
  float bias[2];
  std::uint32_t output[2];  ///< columns of the output; the first alone where rows are gated
  bool exists[2];
};

/// For row `row` of the tiles, with row % 16 < 8, and row + 8.
template <class T>
[[nodiscard]] __device__ inline row_pair find_rows(const matmul_args<T>& args, std::uint32_t matrix,
                                                   std::uint32_t row) {
  row_pair out;
#pragma unroll
  for (std::uint32_t i = 0; i < 2; ++i) {
    const std::uint32_t tile_row = row + 8 * i, source = source_row(tile_row, args.weight_rows, args.gating);
    out.exists[i] = source < args.weight_rows;
    out.factor[i] =
        out.exists[i] ? args.factors[static_cast<std::size_t>(matrix) * args.row_tiles * 64 + tile_row] : 0.0f;
    out.bias[i] = out.exists[i] && args.bias != nullptr
                      ? args.bias[static_cast<std::size_t>(matrix) * args.weight_rows + source]
                      : 0.0f;
    out.output[i] = args.gating == gating_rows::none ? tile_row : row / 16 * 8 + row % 8;
  }
  return out;
}

/// The factor and the bias of row `row` of the tiles.
template <class T>
[[nodiscard]] __device__ inline float2 load_row(const matmul_args<T>& args, std::uint32_t matrix, std::uint32_t row) {
  const std::uint32_t source = source_row(row, args.weight_rows, args.gating);
  if (source >= args.weight_rows) return make_float2(0.0f, 0.0f);
  return make_float2(
      args.factors[static_cast<std::size_t>(matrix) * args.row_tiles * 64 + row],
      args.bias == nullptr ? 0.0f : args.bias[static_cast<std::size_t>(matrix) * args.weight_rows + source]);
}

/// Finishes the sums of rows g and g + 8 for one row of x, and writes them; the caller says whether rows are gated.
template <bool IsGated, activation T>
__device__ inline void write_pair_as(const matmul_args<T>& args, const row_pair& rows, std::size_t out_row, float low,
                                     float high) {
  low = low * rows.factor[0] + rows.bias[0];
  high = high * rows.factor[1] + rows.bias[1];
  T* const to = args.out + out_row * args.out_stride;
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
  if (args.gating != gating_rows::none) {
    write_pair_as<true>(args, rows, out_row, low, high);
  } else {
    write_pair_as<false>(args, rows, out_row, low, high);
  }
}

/// The same for row `row` of the tiles, with row % 16 < 8, and row + 8; `loaded` is what load_row gave for them.
template <activation T>
__device__ inline void write_loaded(const matmul_args<T>& args, const float2* loaded, std::uint32_t row,
                                    std::size_t out_row, float low, float high) {
  row_pair rows;
#pragma unroll
  for (std::uint32_t i = 0; i < 2; ++i) {
    rows.exists[i] = source_row(row + 8 * i, args.weight_rows, args.gating) < args.weight_rows;
    rows.factor[i] = loaded[8 * i].x, rows.bias[i] = loaded[8 * i].y;
    rows.output[i] = args.gating == gating_rows::none ? row + 8 * i : row / 16 * 8 + row % 8;
  }
  write_pair(args, rows, out_row, low, high);
}

/// The macro-block factors 1 + m / 256 of rows g and g + 8 of a warp's tile.
struct macro_pair {
  float low, high;
};
/// Their bytes. Kept as they are until they are needed, so that nobody waits for them before.
[[nodiscard]] __device__ inline std::uint32_t load_macro_bytes(const std::uint8_t* at) {
  return __ldg(reinterpret_cast<const std::uint16_t*>(at));
}
[[nodiscard]] __device__ inline macro_pair macro_factors(std::uint32_t both) {
  return {bit_cast<float>(0x3F800000u + (both & 0xFFu) * 0x8000u),
          bit_cast<float>(0x3F800000u + (both >> 8) * 0x8000u)};
}

}  // namespace tetromino::cuda::detail
