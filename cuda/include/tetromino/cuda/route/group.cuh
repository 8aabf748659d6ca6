#pragma once

#include <tetromino/cuda/moe.hpp>  // expert_groups

#include "../detail/checks.hpp"  // is_aligned
#include "../detail/values.cuh"  // full_warp

#include <cstddef>  // std::size_t, offsetof
#include <cstdint>  // std::uint16_t, std::uint32_t
#include <span>     // std::span

/// Grouping of calls by expert, and planning of the copies that travel to other ranks.
namespace TETROMINO_NAMESPACE::cuda::detail {

[[nodiscard]] __device__ inline std::uint32_t slot_of(std::uint16_t id) { return id; }
[[nodiscard]] __device__ inline std::uint32_t slot_of(const moe::expert_call& call) { return call.slot; }

/// What the threads of a block look at together: eight calls of each lane that follow each other, in chunks of a warp.
inline constexpr std::uint32_t calls_of_lane = 8, calls_of_chunk = 32 * calls_of_lane;

/// Slots of a lane's eight calls from `i` on, counted from the first slot; past the end they are no_slot.
template <class Call>
__device__ inline void load_slots(const Call* calls, std::uint32_t i, std::uint32_t end, std::uint32_t first_slot,
                                  std::uint32_t (&slot)[calls_of_lane]) {
#pragma unroll
  for (std::uint32_t j = 0; j < calls_of_lane; ++j) {
    slot[j] = i < end && j < end - i ? slot_of(calls[i + j]) - first_slot : moe::no_slot;
  }
}
/// The same for ids at a multiple of 16 bytes, none of them past the end.
__device__ inline void load_whole_slots(const std::uint16_t* ids, std::uint32_t i, std::uint32_t first_slot,
                                        std::uint32_t (&slot)[calls_of_lane]) {
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(ids + i));
  const std::uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (std::uint32_t j = 0; j < 4; ++j) {
    slot[2 * j] = (word[j] & 0xFFFFu) - first_slot, slot[2 * j + 1] = (word[j] >> 16) - first_slot;
  }
}
/// The same for expert calls.
__device__ inline void load_whole_slots(const moe::expert_call* calls, std::uint32_t i, std::uint32_t first_slot,
                                        std::uint32_t (&slot)[calls_of_lane]) {
  static_assert(sizeof(moe::expert_call) == 8 && offsetof(moe::expert_call, slot) == 0);
#pragma unroll
  for (std::uint32_t j = 0; j < calls_of_lane; j += 2) {
    const uint4 two = __ldg(reinterpret_cast<const uint4*>(calls + i + j));
    slot[j] = two.x - first_slot, slot[j + 1] = two.z - first_slot;
  }
}

/// A bit for each of a lane's calls: whether it is for `slot`.
[[nodiscard]] __device__ inline std::uint32_t calls_for(std::uint32_t slot, const std::uint32_t (&of)[calls_of_lane]) {
  std::uint32_t mask = 0;
#pragma unroll
  for (std::uint32_t j = 0; j < calls_of_lane; ++j) mask |= (of[j] == slot ? 1u : 0u) << j;
  return mask;
}

/// One thread block for each slot counts the calls for lower slots and for its own, and numbers the latter in order.
/// All blocks read all calls, which come from the cache: no block waits for another, and one launch is enough. `Whole`:
/// calls lie at a multiple of 16 bytes.
template <class Call, bool Whole>
__global__ void __launch_bounds__(512)
    group_kernel(const Call* calls, std::uint32_t n, std::uint32_t k, std::uint32_t first_slot, std::uint32_t slots,
                 std::uint32_t* offsets, std::uint32_t* rows, std::uint32_t* pairs) {
  constexpr std::uint32_t warps = 16, at_once = 4;
  constexpr std::uint32_t kept = 64;  // chunks of a warp whose masks are kept for the second pass: 262,144 calls
  __shared__ std::uint32_t equal_of[warps], lower_of[warps];
  __shared__ std::uint8_t masks[kept][32 * warps];
  const std::uint32_t slot = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t chunks = (n + warps * calls_of_chunk - 1) / (warps * calls_of_chunk);  // each warp has a run
  const std::uint32_t begin = min(warp * chunks * calls_of_chunk, n), end = min(begin + chunks * calls_of_chunk, n);
  const std::uint32_t mine = begin + lane * calls_of_lane;
  std::uint32_t equal = 0, lower = 0;
  for (std::uint32_t c = 0; c < chunks; c += at_once) {
    std::uint32_t of[at_once][calls_of_lane];
    bool is_whole = false;
    if constexpr (Whole) {
      is_whole = begin + (c + at_once) * calls_of_chunk <= end;
      if (is_whole) {
#pragma unroll
        for (std::uint32_t u = 0; u < at_once; ++u) {
          load_whole_slots(calls, mine + (c + u) * calls_of_chunk, first_slot, of[u]);
        }
      }
    }
    if (!is_whole) {
#pragma unroll
      for (std::uint32_t u = 0; u < at_once; ++u) {
        const std::uint32_t first = mine + (c + u) * calls_of_chunk;
        if constexpr (Whole) {
          if (begin + (c + u + 1) * calls_of_chunk <= end) {
            load_whole_slots(calls, first, first_slot, of[u]);
            continue;
          }
        }
        load_slots(calls, first, end, first_slot, of[u]);
      }
    }
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::uint32_t mask = calls_for(slot, of[u]);
      if (c + u < kept) masks[c + u][threadIdx.x] = static_cast<std::uint8_t>(mask);
      equal += static_cast<std::uint32_t>(__popc(mask));
#pragma unroll
      for (std::uint32_t j = 0; j < calls_of_lane; ++j) lower += of[u][j] < slot ? 1 : 0;
      if (slot != 0) continue;
#pragma unroll
      for (std::uint32_t j = 0; j < calls_of_lane; ++j) {
        const std::uint32_t i = mine + (c + u) * calls_of_chunk + j;
        if (of[u][j] >= slots && i < end) pairs[i] = moe::no_slot;
      }
    }
  }
  equal = __reduce_add_sync(full_warp, equal), lower = __reduce_add_sync(full_warp, lower);
  if (lane == 0) equal_of[warp] = equal, lower_of[warp] = lower;
  __syncthreads();
  std::uint32_t next = 0, all = 0;
  for (std::uint32_t w = 0; w < warps; ++w) {
    next += lower_of[w] + (w < warp ? equal_of[w] : 0);
    all += lower_of[w] + equal_of[w];
  }
  if (threadIdx.x == 0) {
    if (slot == 0) offsets[0] = 0;
    offsets[slot + 1] = all;
  }
  if (equal == 0) return;
  for (std::uint32_t c = 0; c < chunks; ++c) {
    const std::uint32_t first = mine + c * calls_of_chunk;
    std::uint32_t mask;
    if (c < kept) {
      mask = masks[c][threadIdx.x];
    } else {
      std::uint32_t of[calls_of_lane];
      load_slots(calls, first, end, first_slot, of);
      mask = calls_for(slot, of);
    }
    if (__any_sync(full_warp, mask != 0) == 0) continue;
    const auto count = static_cast<std::uint32_t>(__popc(mask));
    std::uint32_t up_to = count;
#pragma unroll
    for (unsigned lanes = 1; lanes < 32; lanes *= 2) {
      const std::uint32_t below = __shfl_up_sync(full_warp, up_to, lanes);
      if (lane >= lanes) up_to += below;
    }
    std::uint32_t pair = next + up_to - count;
    for (; mask != 0; mask &= mask - 1, ++pair) {
      const std::uint32_t i = first + static_cast<std::uint32_t>(__ffs(static_cast<int>(mask))) - 1;
      rows[pair] = i / k;
      pairs[i] = pair;
    }
    next += __shfl_sync(full_warp, up_to, 31);
  }
}

template <class Call>
result<void> group(const stream& s, std::span<const Call> calls, std::size_t first_slot, const expert_groups& out) {
  const std::size_t slots = out.expert_offsets.size() - 1;
  auto* const kernel = is_aligned(calls.data(), 16) ? group_kernel<Call, true> : group_kernel<Call, false>;
  kernel<<<static_cast<unsigned>(slots), 512, 0, s.handle>>>(
      calls.data(), static_cast<std::uint32_t>(calls.size()), static_cast<std::uint32_t>(out.calls_per_row),
      static_cast<std::uint32_t>(first_slot), static_cast<std::uint32_t>(slots), out.expert_offsets.data(),
      out.expert_rows.data(), out.pair_of_call.data());
  return status_of(cudaGetLastError(), "the launch of group_kernel");
}

/// A thread for each call. The calls of a row before it come from the cache.
template <class Id, bool PerExpert>
__global__ void __launch_bounds__(256) copies_kernel(const copies_job<Id> job) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= job.count) return;
  const std::uint32_t id = job.ids[i];
  if (id >= job.experts) {
    job.calls[i] = {moe::no_slot, 0.0f};
    job.ranks[i] = no_rank;
    return;
  }
  const std::uint32_t slot = __ldg(job.slot_of_expert + id);
  std::uint32_t rank = __ldg(job.rank_of_slot + slot);
  job.calls[i] = {slot, job.weights == nullptr ? 1.0f : __ldg(job.weights + i)};
  if constexpr (!PerExpert) {
    const std::uint32_t mine = rank;
    for (std::uint32_t j = i - i % job.calls_per_row; j < i; ++j) {
      const std::uint32_t other = job.ids[j];
      if (other < job.experts && __ldg(job.rank_of_slot + __ldg(job.slot_of_expert + other)) == mine) rank = no_rank;
    }
  }
  job.ranks[i] = static_cast<std::uint16_t>(rank);
}

template <class Id>
result<void> plan_copies(const stream& s, const copies_job<Id>& job) {
  if (job.count == 0) return {};
  const unsigned blocks = (job.count + 255) / 256;
  if (job.copies == moe::row_copies::per_expert) {
    copies_kernel<Id, true><<<blocks, 256, 0, s.handle>>>(job);
  } else {
    copies_kernel<Id, false><<<blocks, 256, 0, s.handle>>>(job);
  }
  return status_of(cudaGetLastError(), "the launch of copies_kernel");
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
