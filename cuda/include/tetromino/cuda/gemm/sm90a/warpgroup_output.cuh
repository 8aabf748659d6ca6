#pragma once

#include "../../arch/sm90a.cuh"  // store_transposed, sync_threads
#include "../args.cuh"           // matmul_args, output_tile
#include "../epilogue.cuh"       // row_pair, write_pair

#include <cstdint>  // std::uint32_t

/// Writing what a warpgroup has summed up for 64 rows of weights: a lane's sums are those of lane_sums.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// What a warpgroup's outputs take on their way to memory: 64 rows of x at a time, padded against bank conflicts.
inline constexpr std::uint32_t staged_row_bytes = 64 * 2 + 16, staged_bytes = 64 * staged_row_bytes;

#if TETROMINO_CUDA_HOPPER

/// The scales of a tile's rows of x in E4M3, which a warpgroup's sums want in the end: every lane keeps a part.
template <int Rows>
struct row_scales {
  float mine[(Rows + 31) / 32];  ///< of rows lane, lane + 32, ...

  template <class T>
  __device__ void load(const matmul_args<T>& args, const output_tile& tile) {
#pragma unroll
    for (std::uint32_t i = 0; i < (Rows + 31) / 32; ++i) {
      const std::uint32_t m = i * 32 + threadIdx.x % 32;
      mine[i] = m < tile.rows ? args.x.scales[tile.first_row + m] : 0.0f;
    }
  }
  /// Multiplies the sums by them.
  __device__ void apply(float (&sums)[Rows / 2]) const {
    const int column = static_cast<int>(threadIdx.x % 4 * 2);
#pragma unroll
    for (int i = 0; i < Rows / 2; i += 4) {
      const int row = i * 2;  // the first of eight of x
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float scale = __shfl_sync(0xFFFFFFFFu, mine[row / 32], row % 32 + column + j);
        sums[i + j] *= scale, sums[i + j + 2] *= scale;
      }
    }
  }
};

/// Writes a tile straight from the lanes: little, or where the output's rows are not aligned.
template <class T, int Count>
__device__ inline void write_each(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows,
                                  const float (&sums)[Count]) {
  const std::uint32_t column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if (i % 4 >= 2) continue;
    const std::uint32_t m = static_cast<std::uint32_t>(i / 4 * 8 + i % 2) + column;
    if (m < tile.rows) write_pair(args, rows, tile.first_row + m, sums[i], sums[i + 2]);
  }
}

/// Stores them where the condition holds, without a branch: several in a row stay together.
__device__ inline void store_16_bytes_if(bool condition, void* to, const uint4& v) {
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "@p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<std::uint32_t>(condition))
      : "memory");
}

/// Writes a tile by way of shared memory, 64 rows of x at a time, in whole lines. `first_output`: the warpgroup's first
/// column; `staged`: its staged_bytes; `barrier`: the number of a barrier of its own.
template <bool IsGated, class T, int Count>
__device__ inline void write_staged_as(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows,
                                       const float (&sums)[Count], std::uint32_t first_output, unsigned char* staged,
                                       int barrier) {
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
  // The row of a matrix whose address this lane gives.
  const std::uint32_t matrix_row = shared_address(staged) + (lane % 8 + lane / 16 * 8) * staged_row_bytes +
                                   (IsGated ? warp * 16 : warp * 32 + lane / 8 % 2 * 16);
  constexpr std::uint32_t pieces = IsGated ? 4 : 8, rows_at_once = 128 / pieces;  // of a row, 16 bytes each
  const std::uint32_t piece = thread % pieces, row = thread / pieces;             // that this lane copies
  T* const to = args.out.data + (tile.first_row + row) * args.out.stride + first_output + piece * 8;
  const std::uint32_t end = first_output + piece * 8 < args.out.cols ? tile.rows : 0;
#pragma unroll
  for (int part = 0; part < (Count + 31) / 32; ++part) {
    if (part * 64 >= static_cast<int>(tile.rows)) break;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of eight rows of x
      if (part * 32 + pair * 8 >= Count) break;
      const float* const at = sums + part * 32 + pair * 8;
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = at[i] * rows.factor[i / 2 % 2] + rows.bias[i / 2 % 2];
      std::uint32_t matrices[4];
      if constexpr (IsGated) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) y[i] = silu(y[i]) * y[i + 2], y[i + 1] = silu(y[i + 1]) * y[i + 3];
        matrices[0] = pack_pair<T>(y[0], y[1]), matrices[2] = pack_pair<T>(y[4], y[5]);
        matrices[1] = matrices[0], matrices[3] = matrices[2];  // written twice, to the same place
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) matrices[i] = pack_pair<T>(y[2 * i], y[2 * i + 1]);
      }
      store_transposed(matrix_row + pair * 16 * staged_row_bytes, matrices);
    }
    sync_threads(barrier, 128);
    uint4 values[64 / rows_at_once];  // all are read before the first is written, so that no read waits for another
#pragma unroll
    for (std::uint32_t i = 0; i < 64 / rows_at_once; ++i) {
      values[i] = *reinterpret_cast<const uint4*>(staged + (row + i * rows_at_once) * staged_row_bytes + piece * 16);
    }
#pragma unroll
    for (std::uint32_t i = 0; i < 64 / rows_at_once; ++i) {
      const std::uint32_t m = static_cast<std::uint32_t>(part) * 64 + i * rows_at_once;
      store_16_bytes_if(m + row < end, to + m * args.out.stride, values[i]);
    }
    sync_threads(barrier, 128);
  }
}

/// The same, of either kind of weights.
template <class T, int Count>
__device__ inline void write_staged(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows,
                                    const float (&sums)[Count], std::uint32_t first_output, unsigned char* staged,
                                    int barrier) {
  if (args.weights.gating != gating_rows::none) {
    write_staged_as<true>(args, tile, rows, sums, first_output, staged, barrier);
  } else {
    write_staged_as<false>(args, tile, rows, sums, first_output, staged, barrier);
  }
}

#endif

}  // namespace TETROMINO_NAMESPACE::cuda::detail
