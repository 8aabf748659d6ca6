#pragma once

#include <tetromino/cuda/e4m3_activations.hpp>  // stream, quantize_e4m3_job

#include "../arch/sm90a.cuh"     // start_next_kernel, wait_for_last_kernel
#include "../detail/checks.hpp"  // has_aligned_rows
#include "../detail/launch.cuh"  // is_hopper_code, launch_overlapping
#include "args.cuh"              // row_map
#include "chunk.cuh"             // chunk
#include "encode.cuh"            // encode_e4m3_pair

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uint32_t, std::uint64_t

/// Activations in E4M3: a row's largest magnitude, then its codes. Some warps of a block share a row and hold it in
/// registers meanwhile, or read it twice where it is too long or not made of whole chunks.
namespace TETROMINO_NAMESPACE::cuda::detail {

template <real T>
struct e4m3_rows_args {
  const T* in;
  row_map rows;          ///< chunks_per_row: those of a row as it is written, zeros behind it among them
  bool are_whole;        ///< every row starts at a multiple of 16 bytes, and ends with a chunk
  std::uint8_t* values;  ///< [rows, 16 * chunks_per_row]
  float* scales;         ///< [rows]
  std::uint64_t* rejected;
  std::uint32_t threads;  ///< of a row: a block's, or a warp, whose rows are as many as the block's warps
};

/// The most threads that share a row.
inline constexpr std::uint32_t most_e4m3_threads = 512;

/// The row of x that the threads of a block, or of a warp, share.
template <real T>
struct e4m3_row {
  const e4m3_rows_args<T>& args;
  std::uint32_t row, thread;

  __device__ explicit e4m3_row(const e4m3_rows_args<T>& args_) : args(args_), row(blockIdx.x), thread(threadIdx.x) {
    if (args.threads != 32) return;
    row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, thread = threadIdx.x % 32;
  }

  [[nodiscard]] __device__ bool exists() const { return row < args.rows.rows; }

  /// Reads chunk c, zeros past the end of the row. Not through the read-only path: the kernel before this one may have
  /// written x while this one was running.
  template <bool Whole>
  __device__ void load(std::uint32_t c, chunk<T>& x) const {
    const std::uint32_t col = c * chunk_size;
    if (!exists() || col >= args.rows.cols) return x.clear();
    const T* const from = args.in + args.rows.offset(row) + col;
    if (Whole || args.are_whole) {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_words<T> / 4; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>(from)[i];
        x.word[4 * i] = four.x, x.word[4 * i + 1] = four.y, x.word[4 * i + 2] = four.z, x.word[4 * i + 3] = four.w;
      }
    } else {
      x.load_some(from, min(chunk_size, args.rows.cols - col));
    }
  }
  /// Notes the first value of chunk c that is not finite.
  __device__ void report(std::uint32_t c, const chunk<T>& x) const {
    report_rejection(args.rejected,
                     static_cast<std::uint64_t>(row) * args.rows.cols + c * chunk_size + x.first_special());
  }
  /// Writes chunk c as codes; zeros if `inverse` is zero.
  __device__ void store(std::uint32_t c, const chunk<T>& x, float inverse) const {
    if (!exists() || c >= args.rows.chunks_per_row) return;
    std::uint32_t word[4] = {};
    if (inverse != 0.0f) {
#pragma unroll
      for (std::uint32_t w = 0; w < 4; ++w) {
        const auto pair = [&](std::uint32_t i) {
          return encode_e4m3_pair(__fmul_rn(x.value(i), inverse), __fmul_rn(x.value(i + 1), inverse));
        };
        word[w] = pair(4 * w) | pair(4 * w + 2) << 16;
      }
    }
    const std::size_t at = static_cast<std::size_t>(row) * args.rows.chunks_per_row + c;
    reinterpret_cast<uint4*>(args.values)[at] = make_uint4(word[0], word[1], word[2], word[3]);
  }
  /// Writes the scale of a row with this largest magnitude, and returns what its elements are multiplied by: 0 for what
  /// becomes zero. All threads of a block call it together, with the largest magnitude that each has seen.
  [[nodiscard]] __device__ float scale_of(std::uint32_t most) const {
    most = __reduce_max_sync(full_warp, most);
    if (args.threads > 32) {
      __shared__ std::uint32_t of_warp[most_e4m3_threads / 32];
      const std::uint32_t lane = threadIdx.x % 32;
      if (lane == 0) of_warp[threadIdx.x / 32] = most;
      __syncthreads();
      most = __reduce_max_sync(full_warp, lane < args.threads / 32 ? of_warp[lane] : 0u);
    }
    float scale = 0.0f, inverse = 0.0f;
    if (most >= infinity_bits<T>) {
      scale = bit_cast<float>(0x7FC00000u);
    } else if (const float amax = magnitude_value<T>(most); amax >= tetromino::detail::least_e4m3_amax) {
      scale = __fdiv_rn(amax, e4m3::max), inverse = __fdiv_rn(e4m3::max, amax);
    }
    if (thread == 0 && exists()) args.scales[row] = scale;
    return inverse;
  }
};

__device__ inline void begin_after_last_kernel() {
#if TETROMINO_CUDA_HOPPER
  start_next_kernel();
  wait_for_last_kernel();
#endif
}

/// Rows of up to Chunks chunks for each thread, all of them whole.
template <real T, std::uint32_t Chunks>
__global__ void __launch_bounds__(most_e4m3_threads) e4m3_rows_kernel(const e4m3_rows_args<T> args) {
  begin_after_last_kernel();
  const e4m3_row<T> row{args};
  chunk<T> x[Chunks];
  std::uint32_t most = 0;
#pragma unroll
  for (std::uint32_t i = 0; i < Chunks; ++i) row.template load<true>(i * args.threads + row.thread, x[i]);
#pragma unroll
  for (std::uint32_t i = 0; i < Chunks; ++i) {
    const std::uint32_t largest = x[i].largest();
    if (largest >= infinity_bits<T>) row.report(i * args.threads + row.thread, x[i]);
    most = max(most, largest);
  }
  const float inverse = row.scale_of(most);
#pragma unroll
  for (std::uint32_t i = 0; i < Chunks; ++i) row.store(i * args.threads + row.thread, x[i], inverse);
}

/// Any rows, read twice.
template <real T>
__global__ void __launch_bounds__(most_e4m3_threads) any_e4m3_rows_kernel(const e4m3_rows_args<T> args) {
  begin_after_last_kernel();
  const e4m3_row<T> row{args};
  chunk<T> x;
  std::uint32_t most = 0;
  for (std::uint32_t c = row.thread; c < args.rows.chunks_per_row; c += args.threads) {
    row.template load<false>(c, x);
    const std::uint32_t largest = x.largest();
    if (largest >= infinity_bits<T>) row.report(c, x);
    most = max(most, largest);
  }
  const float inverse = row.scale_of(most);
  for (std::uint32_t c = row.thread; c < args.rows.chunks_per_row; c += args.threads) {
    row.template load<false>(c, x);
    row.store(c, x, inverse);
  }
}

template <real T>
result<void> launch_e4m3_rows(void (*kernel)(e4m3_rows_args<T>), const stream& s, const e4m3_rows_args<T>& args) {
  constexpr std::uint32_t short_rows = 4;  // of a block, a warp each
  const std::uint32_t rows_of_block = args.threads == 32 ? short_rows : 1, threads = rows_of_block * args.threads;
  const std::uint32_t blocks = (args.rows.rows + rows_of_block - 1) / rows_of_block;
  const char* const what = "the launch of e4m3_rows_kernel";
  auto waits_by_itself = is_hopper_code(kernel);
  if (!waits_by_itself) return waits_by_itself.error();
  if (*waits_by_itself) return launch_overlapping(kernel, what, s, blocks, static_cast<int>(threads), 0, 1, args);
  kernel<<<blocks, threads, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), what);
}

template <real T>
result<void> quantize_e4m3(const stream& s, const tetromino::detail::quantize_e4m3_job<T>& job) {
  const auto& x = job.in;
  if (job.out.rows == 0) return {};
  if (x.cols == 0) {
    return status_of(cudaMemsetAsync(job.out.scales.data(), 0, job.out.scales.size_bytes(), s.handle),
                     "cudaMemsetAsync");
  }
  e4m3_rows_args<T> args{};
  auto rows = map_rows(x, job.out.stride() / chunk_size);
  if (!rows) return rows.error();
  args.in = x.data, args.rows = *rows;
  args.are_whole = has_aligned_rows(x) && x.cols % chunk_size == 0;
  args.values = job.out.values.data(), args.scales = job.out.scales.data(), args.rejected = s.rejected;
  const std::uint32_t chunks = args.rows.chunks_per_row, most = most_e4m3_threads;
  const std::uint32_t of_thread = chunks <= most ? 1 : 2;
  args.threads = std::min(((chunks + of_thread - 1) / of_thread + 31) / 32 * 32, most);
  if (!args.are_whole || chunks > 2 * most) return launch_e4m3_rows(any_e4m3_rows_kernel<T>, s, args);
  return launch_e4m3_rows(of_thread == 1 ? e4m3_rows_kernel<T, 1> : e4m3_rows_kernel<T, 2>, s, args);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
