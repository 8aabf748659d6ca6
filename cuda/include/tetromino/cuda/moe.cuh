#pragma once

#include <tetromino/cuda/moe.hpp>  // route_job, expert_groups

#include "elements.cuh"    // full_warp, pack_pair
#include "route.cuh"       // route_kernel
#include "route_few.cuh"   // route_few_kernel
#include "route_many.cuh"  // route_many_kernel

#include <algorithm>  // std::min
#include <cstdint>    // std::uint32_t

/// Routing, grouping and moving of tokens, one launch each.
namespace TETROMINO_NAMESPACE::cuda::detail {

template <int N>
result<void> launch_route(const stream& s, const route_args& args) {
  route_kernel<N><<<(args.tokens + 3) / 4, 128, 0, s.handle>>>(args);
  return check(cudaGetLastError(), "the launch of route_kernel");
}

/// For tokens of up to K experts each.
template <int K, bool Sigmoid>
result<void> launch_route_few(const stream& s, const route_args& args) {
  route_few_kernel<K, Sigmoid><<<(args.tokens + 127) / 128, 128, 0, s.handle>>>(args);
  return check(cudaGetLastError(), "the launch of route_few_kernel");
}

/// Lanes to a token, and fours of experts to a lane.
template <int Lanes, int Fours>
result<void> launch_route_many(const stream& s, const route_args& args) {
  const auto kernel = args.rule == moe::gating::sigmoid ? route_many_kernel<Lanes, Fours, true>
                                                        : route_many_kernel<Lanes, Fours, false>;
  constexpr std::uint32_t tokens = 4 * 32 / Lanes;
  kernel<<<(args.tokens + tokens - 1) / tokens, 128, 0, s.handle>>>(args);
  return check(cudaGetLastError(), "the launch of route_many_kernel");
}

template <class Logit>
result<void> route(const stream& s, const route_job<Logit>& job) {
  if (job.tokens == 0) return {};
  const moe::router_options& o = job.options;
  route_args args{};
  args.logits = job.logits, args.ids = job.ids, args.weights = job.weights, args.rejected = s.rejected;
  args.bias = o.bias.empty() ? nullptr : o.bias.data();
  args.tokens = job.tokens, args.experts = job.experts, args.k = static_cast<std::uint32_t>(o.experts_per_token);
  args.groups = static_cast<std::uint32_t>(o.groups), args.groups_kept = static_cast<std::uint32_t>(o.groups_kept);
  args.group_size = args.experts / args.groups;
  args.scale = o.scale, args.rule = o.rule, args.renormalize = o.renormalize;
  args.is_aligned = job.experts % 4 == 0 && is_aligned(job.logits, 16);
  args.is_output_aligned = is_aligned(job.ids, 8) && is_aligned(job.weights, 16);
  const bool is_sigmoid = args.rule == moe::gating::sigmoid;
  const std::uint32_t many = job.experts <= 64 ? 132 * 128 : 4096;  // tokens fill the GPU
  if (job.experts <= 16 && args.groups == 1) {
    if (args.tokens >= many && args.is_aligned && args.k <= 8) {
      if (args.k <= 4) return is_sigmoid ? launch_route_few<4, true>(s, args) : launch_route_few<4, false>(s, args);
      return is_sigmoid ? launch_route_few<8, true>(s, args) : launch_route_few<8, false>(s, args);
    }
  } else if (args.tokens >= many && args.is_aligned && is_aligned(args.bias, 16) && args.k <= most_chosen &&
             (args.groups == 1 || (args.groups <= most_groups && args.group_size % 4 == 0))) {
    if (args.groups > 1) args.group_reciprocal = (65535 + args.group_size / 4) / (args.group_size / 4);
    if (job.experts <= 32) return launch_route_many<2, 4>(s, args);
    if (job.experts <= 64) return launch_route_many<4, 4>(s, args);
    if (job.experts <= 128) return launch_route_many<4, 8>(s, args);
    if (job.experts <= 160) return launch_route_many<8, 5>(s, args);
    if (job.experts <= 256) return launch_route_many<8, 8>(s, args);
    if (job.experts <= 384) return launch_route_many<16, 6>(s, args);
    if (job.experts <= 512) return launch_route_many<16, 8>(s, args);
    return launch_route_many<32, 8>(s, args);
  }
  if (job.experts <= 32) return launch_route<1>(s, args);
  if (job.experts <= 64) return launch_route<2>(s, args);
  if (job.experts <= 128) return launch_route<4>(s, args);
  if (job.experts <= 256) return launch_route<8>(s, args);
  if (job.experts <= 512) return launch_route<16>(s, args);
  return launch_route<32>(s, args);
}

[[nodiscard]] __device__ inline std::uint32_t slot_of(std::uint16_t id) { return id; }
[[nodiscard]] __device__ inline std::uint32_t slot_of(const moe::expert_call& call) { return call.slot; }

/// One thread block for each slot counts the calls for lower slots and for its own, and numbers the latter in order.
/// All blocks read all calls, which come from the cache: no block waits for another, and one launch is enough.
template <class Call>
__global__ void __launch_bounds__(512)
    group_kernel(const Call* calls, std::uint32_t n, std::uint32_t k, std::uint32_t first_slot, std::uint32_t slots,
                 std::uint32_t* offsets, std::uint32_t* rows, std::uint32_t* pairs) {
  __shared__ std::uint32_t equal_of[16], lower_of[16];
  const std::uint32_t slot = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr std::uint32_t at_once = 8;
  const std::uint32_t per_warp = (n + 16 * 32 - 1) / (16 * 32) * 32;  // each warp has a run of calls
  const std::uint32_t begin = min(warp * per_warp, n), end = min(begin + per_warp, n);
  std::uint32_t equal = 0, lower = 0;
  for (std::uint32_t first = begin; first < end; first += 32 * at_once) {
    std::uint32_t found[at_once];
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::uint32_t i = first + 32 * u + lane;
      found[u] = i < end ? slot_of(calls[i]) - first_slot : moe::no_slot;
    }
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      equal += found[u] == slot, lower += found[u] < slot;
      const std::uint32_t i = first + 32 * u + lane;
      if (slot == 0 && found[u] >= slots && i < end) pairs[i] = moe::no_slot;
    }
  }
  equal = __reduce_add_sync(full_warp, equal), lower = __reduce_add_sync(full_warp, lower);
  if (lane == 0) equal_of[warp] = equal, lower_of[warp] = lower;
  __syncthreads();
  std::uint32_t next = 0, all = 0;
  for (std::uint32_t w = 0; w < 16; ++w) {
    next += lower_of[w] + (w < warp ? equal_of[w] : 0);
    all += lower_of[w] + equal_of[w];
  }
  if (threadIdx.x == 0) {
    if (slot == 0) offsets[0] = 0;
    offsets[slot + 1] = all;
  }
  if (equal == 0) return;
  for (std::uint32_t first = begin; first < end; first += 32 * at_once) {
    bool is_mine[at_once];
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::uint32_t i = first + 32 * u + lane;
      is_mine[u] = i < end && slot_of(calls[i]) - first_slot == slot;
    }
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::uint32_t mask = __ballot_sync(full_warp, is_mine[u]);
      const std::uint32_t i = first + 32 * u + lane;
      if (is_mine[u]) {
        const std::uint32_t pair = next + static_cast<std::uint32_t>(__popc(mask & ((1u << lane) - 1)));
        rows[pair] = i / k;
        pairs[i] = pair;
      }
      next += static_cast<std::uint32_t>(__popc(mask));
    }
  }
}

template <class Call>
result<void> group(const stream& s, std::span<const Call> calls, std::size_t first_slot, const expert_groups& out) {
  const std::size_t slots = out.expert_offsets.size() - 1;
  group_kernel<<<static_cast<unsigned>(slots), 512, 0, s.handle>>>(
      calls.data(), static_cast<std::uint32_t>(calls.size()), static_cast<std::uint32_t>(out.calls_per_row),
      static_cast<std::uint32_t>(first_slot), static_cast<std::uint32_t>(slots), out.expert_offsets.data(),
      out.expert_rows.data(), out.pair_of_call.data());
  return check(cudaGetLastError(), "the launch of group_kernel");
}

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
  for (std::size_t c = blockIdx.y * 256 + threadIdx.x; c < width; c += 256 * gridDim.y) {
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
  for (std::size_t c = blockIdx.y * 256 + threadIdx.x; c < width; c += 256 * gridDim.y) {
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

/// Rows by as many thread blocks each as have work, where there are few rows.
[[nodiscard]] inline dim3 move_grid(std::size_t rows, std::size_t pieces) {
  const std::size_t shares = std::min<std::size_t>((pieces + 255) / 256, rows < 1024 ? 64 : 4);
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(shares));
}

template <real T>
[[nodiscard]] bool is_whole(const move_job<T>& job) {
  return job.width * sizeof(T) % 16 == 0 && is_aligned(job.from, 16) && is_aligned(job.to, 16);
}

template <real T>
result<void> permute(const stream& s, const move_job<T>& job) {
  if (job.rows == 0) return {};
  if (is_whole(job)) {
    permute_kernel<T, true><<<move_grid(job.rows, job.width * sizeof(T) / 16), 256, 0, s.handle>>>(job);
  } else {
    permute_kernel<T, false><<<move_grid(job.rows, job.width), 256, 0, s.handle>>>(job);
  }
  return check(cudaGetLastError(), "the launch of permute_kernel");
}

template <real T>
result<void> combine(const stream& s, const move_job<T>& job) {
  if (job.rows == 0) return {};
  if (is_whole(job)) {
    combine_kernel<T, true><<<move_grid(job.rows, job.width * sizeof(T) / 16), 256, 0, s.handle>>>(job);
  } else {
    combine_kernel<T, false><<<move_grid(job.rows, job.width), 256, 0, s.handle>>>(job);
  }
  return check(cudaGetLastError(), "the launch of combine_kernel");
}

}  // namespace tetromino::cuda::detail
