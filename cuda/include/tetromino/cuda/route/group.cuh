#pragma once

#include <tetromino/cuda/moe.hpp>  // expert_groups

#include "../detail/values.cuh"  // full_warp

#include <cstdint>  // std::uint32_t

/// Grouping of calls by expert.
namespace TETROMINO_NAMESPACE::cuda::detail {

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

}  // namespace tetromino::cuda::detail
