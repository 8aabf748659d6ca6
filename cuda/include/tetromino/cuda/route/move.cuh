#pragma once

#include <tetromino/cuda/moe.hpp>  // move_job

#include "../detail/checks.hpp"  // is_aligned
#include "../detail/values.cuh"  // pack_pair

#include <algorithm>    // std::min
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint32_t
#include <type_traits>  // std::conditional_t

/// Copying rows to their experts, and adding the outputs of experts up.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// What one thread moves at a time: sixteen bytes, or one element where rows are not made of those.
template <real T, bool Whole>
struct piece {
  static constexpr std::uint32_t elements = Whole ? 16 / sizeof(T) : 1;
  using word = std::conditional_t<Whole, uint4, T>;
};

/// Adds weight * value to sums of floats, and stores them as T.
template <real T>
__device__ inline void add_weighted(float (&sum)[16 / sizeof(T)], const uint4& from, float weight) {
  const std::uint32_t word[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, bit_cast<float>(word[i])));
    } else {
      float2 two;
      if constexpr (std::same_as<T, bfloat16>) {
        two = make_float2(bit_cast<float>(word[i] << 16), bit_cast<float>(word[i] & 0xFFFF0000u));
      } else {
        two = __half22float2(as_half_pair(word[i]));
      }
      sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(weight, two.x));
      sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], __fmul_rn(weight, two.y));
    }
  }
}
template <real T>
[[nodiscard]] __device__ inline uint4 stored(const float (&sum)[16 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(bit_cast<std::uint32_t>(sum[0]), bit_cast<std::uint32_t>(sum[1]), bit_cast<std::uint32_t>(sum[2]),
                      bit_cast<std::uint32_t>(sum[3]));
  } else {
    return make_uint4(pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3]), pack_pair<T>(sum[4], sum[5]),
                      pack_pair<T>(sum[6], sum[7]));
  }
}

/// A row for each blockIdx.x; blockIdx.y and its kin share the row's pieces, of which a thread has `Pieces` on their
/// way at a time, a block's threads apart. A row is read once, and written as often as it is called.
template <real T, bool Whole, std::uint32_t Pieces>
__global__ void __launch_bounds__(256) permute_kernel(const move_job<T> job) {
  using word = typename piece<T, Whole>::word;
  const std::size_t width = job.width / piece<T, Whole>::elements, apart = blockDim.x;
  const auto* from = reinterpret_cast<const word*>(job.from) + blockIdx.x * width;
  const std::uint32_t* pairs = job.pair_of_call + blockIdx.x * job.calls_per_row;
  for (std::size_t c = blockIdx.y * apart * Pieces + threadIdx.x; c < width; c += apart * Pieces * gridDim.y) {
    word x[Pieces];
#pragma unroll
    for (std::uint32_t p = 0; p < Pieces; ++p) x[p] = from[min(c + p * apart, width - 1)];
    for (std::uint32_t i = 0; i < job.calls_per_row; ++i) {
      const std::uint32_t pair = __ldg(pairs + i);
      if (pair == moe::no_slot) continue;
      word* const to = reinterpret_cast<word*>(job.to) + pair * width;
#pragma unroll
      for (std::uint32_t p = 0; p < Pieces; ++p) {
        if (c + p * apart < width) to[c + p * apart] = x[p];
      }
    }
  }
}

/// A bit for each of up to 32 calls: whether it has a pair.
[[nodiscard]] __device__ inline std::uint32_t answered_calls(const std::uint32_t* pairs, std::uint32_t count) {
  std::uint32_t mask = 0;
#pragma unroll 8
  for (std::uint32_t i = 0; i < count; ++i) mask |= (__ldg(pairs + i) != moe::no_slot ? 1u : 0u) << i;
  return mask;
}

/// Shared out like permute_kernel. Calls without a pair, which are many on a rank that holds some of the experts, are
/// left out first: they take no place among the eight loads that a thread has on their way at a time.
template <real T, bool Whole, std::uint32_t Pieces>
__global__ void __launch_bounds__(256) combine_kernel(const move_job<T> job) {
  const std::size_t width = job.width / piece<T, Whole>::elements, apart = blockDim.x;
  const std::uint32_t* pairs = job.pair_of_call + blockIdx.x * job.calls_per_row;
  const float* weights = job.weights + blockIdx.x * job.calls_per_row * job.weight_stride;
  const auto k = static_cast<std::uint32_t>(job.calls_per_row);
  for (std::size_t c = blockIdx.y * apart * Pieces + threadIdx.x; c < width; c += apart * Pieces * gridDim.y) {
    if constexpr (Whole) {
      constexpr std::uint32_t at_once = 8 / Pieces;
      float sum[Pieces][16 / sizeof(T)] = {};
      for (std::uint32_t begin = 0; begin < k; begin += 32) {
        std::uint32_t left = answered_calls(pairs + begin, min(k - begin, 32u));
        while (left != 0) {
          uint4 x[at_once][Pieces];
          float weight[at_once];
          bool is_there[at_once];
#pragma unroll
          for (std::uint32_t i = 0; i < at_once; ++i) {
            is_there[i] = left != 0;
            if (!is_there[i]) continue;
            const std::uint32_t call = begin + static_cast<std::uint32_t>(__ffs(static_cast<int>(left))) - 1;
            left &= left - 1;
            weight[i] = __ldg(weights + call * job.weight_stride);
            const auto* const from = reinterpret_cast<const uint4*>(job.from) + __ldg(pairs + call) * width;
#pragma unroll
            for (std::uint32_t p = 0; p < Pieces; ++p) x[i][p] = __ldcs(from + min(c + p * apart, width - 1));
          }
#pragma unroll
          for (std::uint32_t i = 0; i < at_once; ++i) {
            if (!is_there[i]) continue;
#pragma unroll
            for (std::uint32_t p = 0; p < Pieces; ++p) add_weighted<T>(sum[p], x[i][p], weight[i]);
          }
        }
      }
      auto* const to = reinterpret_cast<uint4*>(job.to) + blockIdx.x * width;
#pragma unroll
      for (std::uint32_t p = 0; p < Pieces; ++p) {
        if (c + p * apart < width) to[c + p * apart] = stored<T>(sum[p]);
      }
    } else {
      static_assert(Pieces == 1);
      float sum = 0;
      for (std::uint32_t i = 0; i < k; ++i) {
        const std::uint32_t pair = __ldg(pairs + i);
        if (pair == moe::no_slot) continue;
        const float x = tetromino::detail::to_float(job.from[pair * width + c]);
        sum = __fadd_rn(sum, __fmul_rn(__ldg(weights + i * job.weight_stride), x));
      }
      job.to[blockIdx.x * width + c] = tetromino::detail::from_float<T>(sum);
    }
  }
}

/// From so many rows on, rows alone fill the GPU.
inline constexpr std::size_t many_rows_moved = 1024;

/// How rows are shared out among threads.
struct move_launch {
  dim3 blocks;
  unsigned threads;
};
/// Rows by as many thread blocks each as have work, where there are few rows. The threads of a row's blocks are as many
/// as its pieces need, in whole warps: 256 threads would leave the second block of 360 pieces (2880 elements) half
/// idle.
[[nodiscard]] inline move_launch plan_move(std::size_t rows, std::size_t pieces, std::size_t of_thread) {
  const auto parts = [](std::size_t n, std::size_t size) { return (n + size - 1) / size; };
  const std::size_t shares = std::min<std::size_t>(parts(pieces, 256 * of_thread), rows < many_rows_moved ? 64 : 4);
  const std::size_t warps = std::min<std::size_t>(parts(pieces, shares * of_thread * 32), 8);
  return {dim3(static_cast<unsigned>(rows), static_cast<unsigned>(shares)), static_cast<unsigned>(32 * warps)};
}

template <real T>
[[nodiscard]] bool is_whole(const move_job<T>& job) {
  return job.width * sizeof(T) % 16 == 0 && is_aligned(job.from, 16) && is_aligned(job.to, 16);
}

template <bool Whole, std::uint32_t Pieces, real T>
result<void> launch_permute(const stream& s, const move_job<T>& job) {
  const move_launch plan = plan_move(job.rows, job.width / piece<T, Whole>::elements, Pieces);
  permute_kernel<T, Whole, Pieces><<<plan.blocks, plan.threads, 0, s.handle>>>(job);
  return status_of(cudaGetLastError(), "the launch of permute_kernel");
}
template <bool Whole, std::uint32_t Pieces, real T>
result<void> launch_combine(const stream& s, const move_job<T>& job) {
  const move_launch plan = plan_move(job.rows, job.width / piece<T, Whole>::elements, Pieces);
  combine_kernel<T, Whole, Pieces><<<plan.blocks, plan.threads, 0, s.handle>>>(job);
  return status_of(cudaGetLastError(), "the launch of combine_kernel");
}

template <real T>
result<void> permute(const stream& s, const move_job<T>& job) {
  if (job.rows == 0) return {};
  if (!is_whole(job)) return launch_permute<false, 1>(s, job);
  return job.rows < many_rows_moved ? launch_permute<true, 1>(s, job) : launch_permute<true, 4>(s, job);
}

template <real T>
result<void> combine(const stream& s, const move_job<T>& job) {
  if (job.rows == 0) return {};
  if (!is_whole(job)) return launch_combine<false, 1>(s, job);
  return job.rows < many_rows_moved ? launch_combine<true, 1>(s, job) : launch_combine<true, 2>(s, job);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
