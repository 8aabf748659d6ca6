#pragma once

#include <tetromino/cuda/matmul.hpp>  // matmul_job

#include "weight_tile.cuh"  // weight_tile

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// What the product kernels are told, and how they share out the work.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Repacked weights.
struct weight_args {
  const std::uint8_t* tiles;
  const float* factors;
  const std::uint8_t* macros;
  std::uint32_t matrices, rows;
  std::uint32_t row_tiles, col_tiles;
  std::uint32_t macro_block, macros_per_row;
  std::uint32_t macro_shift;  ///< a macro block has 64 << macro_shift columns, if it has more than 32
  gating_rows gating;
  bool are_settled;

  /// The first tile of 64 rows of a matrix, and their first macro bytes.
  template <weight_kind Kind>
  [[nodiscard]] __device__ const std::uint8_t* tiles_of(std::uint32_t matrix, std::uint32_t row_tile) const {
    return tiles + (static_cast<std::size_t>(matrix) * row_tiles + row_tile) * col_tiles * weight_tile<Kind>::bytes;
  }
  [[nodiscard]] __device__ const std::uint8_t* macros_of(std::uint32_t matrix, std::uint32_t row_tile) const {
    return macros + (static_cast<std::size_t>(matrix) * row_tiles + row_tile) * macros_per_row * 64;
  }
};

/// Activations [rows, cols].
template <activation T>
struct input_args {
  const T* data;
  std::size_t stride;
  std::uint32_t rows, cols;
  const std::uint32_t* row_offsets;  ///< of experts, or null for one matrix
  const float* scales;               ///< of rows, of activations in E4M3
};

/// Where the product goes, [rows of x, cols].
template <activation T>
struct output_args {
  T* data;
  std::size_t stride;
  const float* bias;
  std::uint32_t cols;
  bool is_aligned;  ///< rows are made of whole 16 bytes
};

template <activation T>
struct matmul_args {
  weight_args weights;
  input_args<T> x;
  output_args<T> out;
  std::uint32_t feature_tiles;  ///< columns of the grid of output tiles
  std::uint32_t parts;          ///< blocks that share the columns of a tile
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

/// Some row tiles, of the same matrix: their first row of x, the one after the last, how many they are, and which of
/// them is meant.
struct row_tile_place {
  std::uint32_t matrix, first, last, tiles, index;
};
/// Where row tile `row_tile` lies, counted through all matrices, if there is such a tile; of one matrix, all do.
template <class T>
[[nodiscard]] __device__ inline bool find_row_tile(const matmul_args<T>& args, const std::uint32_t* tiles_before,
                                                   std::uint32_t row_tile, row_tile_place& out) {
  out = {0, 0, args.x.rows, 0, row_tile};
  if (args.x.row_offsets == nullptr) return true;
  if (row_tile >= tiles_before[args.weights.matrices]) return false;
  std::uint32_t low = 0, high = args.weights.matrices;  // the matrix lies in [low, high)
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    (tiles_before[middle] <= row_tile ? low : high) = middle;
  }
  out.matrix = low, out.index = row_tile - tiles_before[low], out.tiles = tiles_before[low + 1] - tiles_before[low];
  out.first = args.x.row_offsets[low], out.last = args.x.row_offsets[low + 1];
  return true;
}

/// Tile `number` of the output; tiles of the same rows follow each other. Past the last one, `rows` is 0.
template <std::uint32_t Rows, class T>
[[nodiscard]] __device__ inline output_tile find_tile(const matmul_args<T>& args, const std::uint32_t* tiles_before,
                                                      std::uint32_t number) {
  output_tile out{};
  const std::uint32_t row_tile = number / args.feature_tiles;
  out.feature_tile = number - row_tile * args.feature_tiles;
  row_tile_place place;
  if (!find_row_tile(args, tiles_before, row_tile, place)) return out;
  out.matrix = place.matrix;
  out.first_row = place.first + place.index * Rows;
  out.rows = out.first_row < place.last ? min(place.last - out.first_row, Rows) : 0;
  return out;
}

/// The same where a matrix's rows are shared out evenly, by sixteens, among its row tiles; there are row offsets.
template <class T>
[[nodiscard]] __device__ inline output_tile find_fitted_tile(const matmul_args<T>& args,
                                                             const std::uint32_t* tiles_before, std::uint32_t number) {
  output_tile out{};
  const std::uint32_t row_tile = number / args.feature_tiles;
  out.feature_tile = number - row_tile * args.feature_tiles;
  row_tile_place place;
  if (!find_row_tile(args, tiles_before, row_tile, place)) return out;
  const std::uint32_t height = ((place.last - place.first + place.tiles - 1) / place.tiles + 15) / 16 * 16;
  out.matrix = place.matrix;
  out.first_row = place.first + place.index * height;
  out.rows = out.first_row < place.last ? min(place.last - out.first_row, height) : 0;
  return out;
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
