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

/// A row for each blockIdx.x; blockIdx.y and its kin share the row's pieces. A row is read once, and written as often
/// as it is called.
template <real T, bool Whole>
__global__ void __launch_bounds__(256) permute_kernel(const move_job<T> job) {
  using word = typename piece<T, Whole>::word;
  const std::size_t width = job.width / piece<T, Whole>::elements;
  const auto* from = reinterpret_cast<const word*>(job.from) + blockIdx.x * width;
  const std::uint32_t* pairs = job.pair_of_call + blockIdx.x * job.calls_per_row;
  for (std::size_t c = blockIdx.y * blockDim.x + threadIdx.x; c < width; c += blockDim.x * gridDim.y) {
    const word x = from[c];
    for (std::uint32_t i = 0; i < job.calls_per_row; ++i) {
      const std::uint32_t pair = __ldg(pairs + i);
      if (pair != moe::no_slot) reinterpret_cast<word*>(job.to)[pair * width + c] = x;
    }
  }
}

template <real T, bool Whole>
__global__ void __launch_bounds__(256) combine_kernel(const move_job<T> job) {
  const std::size_t width = job.width / piece<T, Whole>::elements;
  const std::uint32_t* pairs = job.pair_of_call + blockIdx.x * job.calls_per_row;
  const float* weights = job.weights + blockIdx.x * job.calls_per_row * job.weight_stride;
  const auto k = static_cast<std::uint32_t>(job.calls_per_row);
  for (std::size_t c = blockIdx.y * blockDim.x + threadIdx.x; c < width; c += blockDim.x * gridDim.y) {
    if constexpr (Whole) {
      float sum[16 / sizeof(T)] = {};
      const auto* from = reinterpret_cast<const uint4*>(job.from) + c;
      for (std::uint32_t first = 0; first < k; first += 8) {  // eight loads on their way at a time
        uint4 x[8];
        float weight[8];
        bool is_there[8];
#pragma unroll
        for (std::uint32_t i = 0; i < 8; ++i) {
          const std::uint32_t pair = first + i < k ? __ldg(pairs + first + i) : moe::no_slot;
          is_there[i] = pair != moe::no_slot;
          weight[i] = is_there[i] ? __ldg(weights + (first + i) * job.weight_stride) : 0.0f;
          if (is_there[i]) x[i] = __ldcs(from + pair * width);
        }
#pragma unroll
        for (std::uint32_t i = 0; i < 8; ++i) {
          if (is_there[i]) add_weighted<T>(sum, x[i], weight[i]);
        }
      }
      reinterpret_cast<uint4*>(job.to)[blockIdx.x * width + c] = stored<T>(sum);
    } else {
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

/// How rows are shared out among threads.
struct move_launch {
  dim3 blocks;
  unsigned threads;
};
/// Rows by as many thread blocks each as have work, where there are few rows. The threads of a row's blocks are as many
/// as its pieces, in whole warps: 256 threads would leave the second block of 360 pieces (2880 elements) half idle.
[[nodiscard]] inline move_launch plan_move(std::size_t rows, std::size_t pieces) {
  const std::size_t shares = std::min<std::size_t>((pieces + 255) / 256, rows < 1024 ? 64 : 4);
  const std::size_t warps = std::min<std::size_t>(((pieces + shares - 1) / shares + 31) / 32, 8);
  return {dim3(static_cast<unsigned>(rows), static_cast<unsigned>(shares)), static_cast<unsigned>(32 * warps)};
}

template <real T>
[[nodiscard]] bool is_whole(const move_job<T>& job) {
  return job.width * sizeof(T) % 16 == 0 && is_aligned(job.from, 16) && is_aligned(job.to, 16);
}

template <real T>
result<void> permute(const stream& s, const move_job<T>& job) {
  if (job.rows == 0) return {};
  if (is_whole(job)) {
    const move_launch plan = plan_move(job.rows, job.width * sizeof(T) / 16);
    permute_kernel<T, true><<<plan.blocks, plan.threads, 0, s.handle>>>(job);
  } else {
    const move_launch plan = plan_move(job.rows, job.width);
    permute_kernel<T, false><<<plan.blocks, plan.threads, 0, s.handle>>>(job);
  }
  return status_of(cudaGetLastError(), "the launch of permute_kernel");
}

template <real T>
result<void> combine(const stream& s, const move_job<T>& job) {
  if (job.rows == 0) return {};
  if (is_whole(job)) {
    const move_launch plan = plan_move(job.rows, job.width * sizeof(T) / 16);
    combine_kernel<T, true><<<plan.blocks, plan.threads, 0, s.handle>>>(job);
  } else {
    const move_launch plan = plan_move(job.rows, job.width);
    combine_kernel<T, false><<<plan.blocks, plan.threads, 0, s.handle>>>(job);
  }
  return status_of(cudaGetLastError(), "the launch of combine_kernel");
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
