#pragma once

#include "elements.cuh"  // chunk
#include "rows.cuh"      // pack_args

#include <cstdint>  // std::uint32_t

/// Reading a tensor along its columns, to pack its transpose in the same pass.
namespace tetromino::cuda::detail {

/// The elements of a thread block that packs the transpose: `cols` of the output by 4096 / cols rows, read along the
/// rows of the input. The output's element [row, col] is the input's [col, row].
template <real T>
struct transposed_tile {
  static constexpr std::uint32_t room = 4096 + 512;
  T of[room];

  /// Reads the tile at [first_row, first_col] of the output, and gives a thread its chunk, at [row, col] in the tile.
  __device__ void load(const pack_args<T>& args, std::uint32_t cols, std::uint32_t first_row, std::uint32_t first_col,
                       std::uint32_t row, std::uint32_t col, chunk<T>& x) {
    const std::uint32_t rows = 4096 / cols, pitch = rows + 1;
    const std::uint32_t matrix = args.rows.by_rows.quotient(first_row);
    const std::uint32_t in_matrix = first_row - matrix * args.rows.by_rows.divisor;
    const T* from = args.in + matrix * args.rows.matrix_stride + first_col * args.rows.row_stride + in_matrix;
    constexpr std::uint32_t at_once = 16 / sizeof(T);
    const bool is_whole = args.is_aligned && in_matrix % at_once == 0;
    for (std::uint32_t i = threadIdx.x; i < 4096 / at_once; i += 256) {
      const std::uint32_t c = i / (rows / at_once), r = i % (rows / at_once) * at_once;
      const bool exists = first_col + c < args.rows.cols;
      const T* const there = from + c * args.rows.row_stride + r;
      T* const to = of + c * pitch + r;
      if (is_whole && exists && in_matrix + r + at_once <= args.rows.by_rows.divisor) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(there));
        const std::uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (std::uint32_t k = 0; k < at_once; ++k) {
          if constexpr (sizeof(T) == 4) {
            to[k] = bit_cast<float>(word[k]);
          } else {
            to[k] = T{static_cast<std::uint16_t>(word[k / 2] >> (16 * (k % 2)))};
          }
        }
      } else {
#pragma unroll
        for (std::uint32_t k = 0; k < at_once; ++k) {
          to[k] = exists && in_matrix + r + k < args.rows.by_rows.divisor ? there[k] : T{};
        }
      }
    }
    __syncthreads();
    const T* const own = of + col * pitch + row;
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; ++i) {
      if constexpr (sizeof(T) == 4) {
        x.word[i] = bit_cast<std::uint32_t>(own[i * pitch]);
      } else if (i % 2 == 0) {
        x.word[i / 2] = own[i * pitch].bits | static_cast<std::uint32_t>(own[(i + 1) * pitch].bits) << 16;
      }
    }
  }
};

}  // namespace tetromino::cuda::detail
