#pragma once

#include <tetromino/cuda/moe.hpp>  // expert_groups

#include "../arch/sm90a.cuh"     // cluster_sync, load_from_rank
#include "../detail/checks.hpp"  // is_aligned
#include "../detail/launch.cuh"  // is_hopper_code, launch_overlapping
#include "../detail/values.cuh"  // full_warp

#include <algorithm>  // std::clamp

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
/// The same for ids at a multiple of 16 bytes, none of them past the end. (Not through __ldg: the kernel before may
/// still write them when one of the kernels here starts.)
__device__ inline void load_whole_slots(const std::uint16_t* ids, std::uint32_t i, std::uint32_t first_slot,
                                        std::uint32_t (&slot)[calls_of_lane]) {
  const uint4 four = *reinterpret_cast<const uint4*>(ids + i);
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
    const uint4 two = *reinterpret_cast<const uint4*>(calls + i + j);
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

/// The most slots among which group_in_clusters_kernel groups, the blocks of a cluster, and the warps of a block.
inline constexpr std::uint32_t most_clustered_slots = 512, cluster_blocks = 8, cluster_warps = 16;

/// Groups many calls in clusters of blocks, which see each other's counts. Each cluster counts all calls, its blocks a
/// chunk each, so that no cluster waits for another; of its chunk each block then puts a part in place, as many parts
/// as there are clusters, and each warp of the block `run` calls of that part, a multiple of 32. For up to
/// most_clustered_slots slots. `Whole`: calls lie at a multiple of 16 bytes.
template <class Call, bool Whole>
__global__ void __launch_bounds__(32 * cluster_warps)
    group_in_clusters_kernel(const Call* calls, std::uint32_t n, std::uint32_t k, std::uint32_t first_slot,
                             std::uint32_t slots, std::uint32_t run, std::uint32_t* offsets, std::uint32_t* rows,
                             std::uint32_t* pairs) {
#if TETROMINO_CUDA_HOPPER
  constexpr std::uint32_t warps = cluster_warps, threads = 32 * warps, most_slots = most_clustered_slots, at_once = 4;
  static_assert(threads == most_slots);
  constexpr std::uint32_t before = warps, after = warps + 1;  // what a chunk has before and after the block's part
  __shared__ std::uint32_t counts[warps + 2][most_slots];     // of calls in each run; later, where the next one goes
  __shared__ std::uint32_t of_chunk[most_slots], of_warp[warps];
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = cluster_rank();
  const std::uint32_t part = warps * run, chunk = gridDim.x / cluster_blocks * part;
  const std::uint32_t begin = min(rank * chunk, n), end = min(begin + chunk, n);
  const std::uint32_t mine = min(begin + blockIdx.x / cluster_blocks * part, n);
#pragma unroll
  for (std::uint32_t r = 0; r < warps + 2; ++r) counts[r][threadIdx.x] = 0;
  wait_for_last_kernel();
  __syncthreads();
  for (std::uint32_t i = begin + threadIdx.x * calls_of_lane; i < end; i += at_once * threads * calls_of_lane) {
    std::uint32_t of[at_once][calls_of_lane];
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::uint32_t first = i + u * threads * calls_of_lane;
      if constexpr (Whole) {
        if (first + calls_of_lane <= end) {
          load_whole_slots(calls, first, first_slot, of[u]);
          continue;
        }
      }
      load_slots(calls, first, end, first_slot, of[u]);
    }
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::uint32_t first = i + u * threads * calls_of_lane;
      const std::uint32_t row = first < mine ? before : first - mine >= part ? after : (first - mine) / run;
#pragma unroll
      for (std::uint32_t j = 0; j < calls_of_lane; ++j) {
        if (of[u][j] < slots) atomicAdd(&counts[row][of[u][j]], 1u);
      }
    }
  }
  __syncthreads();
  const std::uint32_t slot = threadIdx.x;  // this thread's, until calls are placed
  if (slot < slots) {
    std::uint32_t count = 0;
#pragma unroll
    for (std::uint32_t r = 0; r < warps + 2; ++r) count += counts[r][slot];
    of_chunk[slot] = count;
  }
  cluster_sync();
  std::uint32_t all = 0, in_earlier_chunks = 0;
  if (slot < slots) {
#pragma unroll
    for (std::uint32_t r = 0; r < cluster_blocks; ++r) {
      const std::uint32_t count = load_from_rank(shared_address(of_chunk + slot), r);
      all += count, in_earlier_chunks += r < rank ? count : 0;
    }
  }
  std::uint32_t up_to = all;  // calls for the warp's slots so far
#pragma unroll
  for (unsigned lanes = 1; lanes < 32; lanes *= 2) {
    const std::uint32_t below = __shfl_up_sync(full_warp, up_to, lanes);
    if (lane >= lanes) up_to += below;
  }
  if (lane == 31) of_warp[warp] = up_to;
  __syncthreads();
  cluster_arrive();  // the other blocks' counts have been read
  up_to += __reduce_add_sync(full_warp, lane < warp ? of_warp[lane] : 0);
  if (slot < slots) {
    if (blockIdx.x == 0) {
      if (slot == 0) offsets[0] = 0;
      offsets[slot + 1] = up_to;
    }
    std::uint32_t next = up_to - all + in_earlier_chunks + counts[before][slot];
#pragma unroll
    for (std::uint32_t w = 0; w < warps; ++w) {
      const std::uint32_t count = counts[w][slot];
      counts[w][slot] = next, next += count;
    }
  }
  __syncthreads();
  const std::uint32_t from = mine + warp * run, to = min(from + run, end);
  for (std::uint32_t i = from + lane; i - lane < to; i += 32) {
    const std::uint32_t of = i < to ? slot_of(calls[i]) - first_slot : moe::no_slot;
    const bool is_served = of < slots;
    const std::uint32_t same = __match_any_sync(full_warp, is_served ? of : moe::no_slot);
    const std::uint32_t earlier = same & ((1u << lane) - 1);
    const std::uint32_t pair =
        is_served ? counts[warp][of] + static_cast<std::uint32_t>(__popc(earlier)) : moe::no_slot;
    __syncwarp();
    if (is_served && earlier == 0) counts[warp][of] = pair + static_cast<std::uint32_t>(__popc(same));
    __syncwarp();
    if (i < to) pairs[i] = pair;
    if (is_served) rows[pair] = i / k;
  }
  cluster_wait();  // until the others have read this block's counts
#endif
}

template <class Call, bool Whole>
result<void> launch_group(const stream& s, std::span<const Call> calls, std::uint32_t first_slot, std::uint32_t slots,
                          const expert_groups& out) {
  const auto n = static_cast<std::uint32_t>(calls.size()), k = static_cast<std::uint32_t>(out.calls_per_row);
  std::uint32_t *const offsets = out.expert_offsets.data(), *const rows = out.expert_rows.data(),
                       *const pairs = out.pair_of_call.data();
  // From there on group_kernel reads calls in another round, or more blocks than Hopper has multiprocessors.
  if (slots <= most_clustered_slots && (n > 16'384 || slots > 132)) {
    auto* const kernel = group_in_clusters_kernel<Call, Whole>;
    auto has_code = is_hopper_code(kernel);
    if (!has_code) return has_code.error();
    if (*has_code) {
      constexpr std::uint32_t at_once = cluster_blocks * cluster_warps * 32;
      const std::uint32_t clusters = std::clamp((n + at_once - 1) / at_once, 1u, 8u);
      const std::uint32_t run = (n + clusters * at_once - 1) / (clusters * at_once) * 32;
      return launch_overlapping(kernel, "the launch of group_in_clusters_kernel", s, clusters * cluster_blocks,
                                32 * cluster_warps, 0, cluster_blocks, calls.data(), n, k, first_slot, slots, run,
                                offsets, rows, pairs);
    }
  }
  group_kernel<Call, Whole><<<slots, 512, 0, s.handle>>>(calls.data(), n, k, first_slot, slots, offsets, rows, pairs);
  return status_of(cudaGetLastError(), "the launch of group_kernel");
}

template <class Call>
result<void> group(const stream& s, std::span<const Call> calls, std::size_t first_slot, const expert_groups& out) {
  const auto first = static_cast<std::uint32_t>(first_slot);
  const auto slots = static_cast<std::uint32_t>(out.expert_offsets.size() - 1);
  return is_aligned(calls.data(), 16) ? launch_group<Call, true>(s, calls, first, slots, out)
                                      : launch_group<Call, false>(s, calls, first, slots, out);
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
