#pragma once

#include <tetromino/cuda/moe.hpp>  // route_job

#include "../detail/values.cuh"  // full_warp, report_rejection

#include <cstdint>  // std::uint32_t

/// Routing where there are fewer tokens than lanes: a warp routes a token.
namespace TETROMINO_NAMESPACE::cuda::detail {

struct route_args {
  const float* logits;
  const float* bias;
  std::uint16_t* ids;
  float* weights;
  std::uint64_t* rejected;
  std::uint32_t tokens, experts, k, groups, groups_kept, group_size;
  std::uint32_t group_reciprocal;  ///< four experts n are in group n * this / 65536
  float scale;
  moe::gating rule;
  bool renormalize, is_aligned, is_output_aligned;
};

inline constexpr float largest_float = 0x1.FFFFFEp127f;

/// A score as an integer of the same order, above 0 for all that is not NaN; 0 counts as no expert.
[[nodiscard]] __device__ inline std::uint32_t order_of(float score) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(__fadd_rn(score, 0.0f));  // -0 is 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

[[nodiscard]] __device__ inline float score_of(std::uint32_t order) {
  return bit_cast<float>((order & 0x80000000u) != 0 ? order & 0x7FFFFFFFu : ~order);
}

[[nodiscard]] __device__ inline float sigmoid_of(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

/// A bias that is not finite refuses all tokens. Called by whole blocks before anything else, for the tokens that the
/// block routes; true if they are done with. Inlined, it would cost the kernels registers. (Where lanes hold the whole
/// bias, they see it themselves: a block of few tokens would wait for this longer than it needs for them.)
[[nodiscard]] __device__ __noinline__ inline bool refuse_bias(const route_args& args, std::uint32_t tokens_of_block) {
  if (args.bias == nullptr) return false;
  const auto is_bad = [&](std::uint32_t e) { return !(fabsf(__ldg(args.bias + e)) <= largest_float); };
  bool bad = false;
  for (std::uint32_t e = threadIdx.x; e < args.experts; e += blockDim.x) bad = bad || is_bad(e);
  if (__syncthreads_or(bad) == 0) return false;
  const std::uint32_t first_token = blockIdx.x * tokens_of_block;
  const std::uint32_t tokens = min(tokens_of_block, args.tokens - first_token);
  for (std::uint32_t i = threadIdx.x; i < tokens * args.k; i += blockDim.x) {
    const std::size_t to = static_cast<std::size_t>(first_token) * args.k + i;
    args.ids[to] = static_cast<std::uint16_t>(i % args.k), args.weights[to] = bit_cast<float>(0x7FC00000u);
  }
  if (threadIdx.x == 0) {
    std::uint32_t e = 0;
    while (!is_bad(e)) ++e;
    report_rejection(args.rejected, static_cast<std::uint64_t>(first_token) * args.experts + e);
  }
  return true;
}

[[nodiscard]] __device__ inline float sum_of_lanes(float x) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) x += __shfl_xor_sync(full_warp, x, n);
  return x;
}

/// One bit for each group of experts that a token may choose from, where lanes hold N scores in a row each.
template <int N>
[[nodiscard]] __device__ std::uint64_t kept_groups(const route_args& args, const float (&score)[N], float* scores,
                                                   float* group_scores) {
  const std::uint32_t lane = threadIdx.x % 32, size = args.group_size, lanes = size / N;
  const float none = -bit_cast<float>(0x7F800000u);
  __syncwarp();
  if (size == lanes * N && lanes <= 32 && (lanes & (lanes - 1)) == 0) {  // groups are aligned runs of lanes
    float first = none, second = none;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      second = fmaxf(second, fminf(first, score[i]));
      first = fmaxf(first, score[i]);
    }
    for (std::uint32_t n = 1; n < lanes; n *= 2) {
      const float other_first = __shfl_xor_sync(full_warp, first, static_cast<int>(n));
      const float other_second = __shfl_xor_sync(full_warp, second, static_cast<int>(n));
      second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
      first = fmaxf(first, other_first);
    }
    const std::uint32_t group = lane >> (__ffs(static_cast<int>(lanes)) - 1);
    if ((lane & (lanes - 1)) == 0 && group < args.groups) group_scores[group] = size == 1 ? first : first + second;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) scores[lane * N + i] = score[i];
    __syncwarp();
    for (std::uint32_t g = lane; g < args.groups; g += 32) {
      float first = none, second = none;
      for (std::uint32_t e = g * size; e < (g + 1) * size; ++e) {
        second = fmaxf(second, fminf(first, scores[e]));
        first = fmaxf(first, scores[e]);
      }
      group_scores[g] = size == 1 ? first : first + second;
    }
  }
  __syncwarp();
  std::uint64_t kept = 0;
  for (std::uint32_t g = lane; g < lane + args.groups; g += 32) {  // as often in all lanes
    std::uint32_t better = 0;
    for (std::uint32_t h = 0; g < args.groups && h < args.groups; ++h) {
      better += group_scores[h] > group_scores[g] || (group_scores[h] == group_scores[g] && h < g);
    }
    const std::uint64_t these = __ballot_sync(full_warp, g < args.groups && better < args.groups_kept);
    kept |= these << (g - lane);
  }
  return kept;
}

/// A warp routes a token: lane i holds experts N i ... N i + N - 1, and puts them in order. Then k times the best of
/// the lanes' first experts is chosen, in the lowest lane where several are as good.
template <int N>
__global__ void __launch_bounds__(128) token_per_warp_kernel(const route_args args) {
  __shared__ float scores[4][32 * N];
  __shared__ float group_scores[4][moe::router_options::max_groups];
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t token = blockIdx.x * 4 + warp;
  if (refuse_bias(args, 4)) return;
  if (token >= args.tokens) return;
  const float* const logits = args.logits + static_cast<std::size_t>(token) * args.experts;

  float logit[N];
  const std::uint32_t first = lane * N;
  if (N % 4 == 0 && args.is_aligned) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float4 four = make_float4(0, 0, 0, 0);
      if (first + i < args.experts) four = __ldg(reinterpret_cast<const float4*>(logits + first + i));
      logit[i] = four.x;
      if constexpr (N % 4 == 0) logit[i + 1] = four.y, logit[i + 2] = four.z, logit[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) logit[i] = first + i < args.experts ? __ldg(logits + first + i) : 0.0f;
  }
  bool below_infinity = true, any_finite = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i >= args.experts) continue;
    below_infinity = below_infinity && logit[i] <= largest_float;  // false for NaN too
    any_finite = any_finite || logit[i] >= -largest_float;
  }
  std::uint16_t* const ids = args.ids + static_cast<std::size_t>(token) * args.k;
  float* const weights = args.weights + static_cast<std::size_t>(token) * args.k;
  const std::uint32_t refused = __ballot_sync(full_warp, !below_infinity);
  if (refused != 0 || !__any_sync(full_warp, any_finite)) {
    if (lane < args.k) ids[lane] = static_cast<std::uint16_t>(lane), weights[lane] = bit_cast<float>(0x7FC00000u);
    std::uint32_t bad = 0;
    if (refused != 0 && !below_infinity) {
#pragma unroll
      for (int i = N - 1; i >= 0; --i) {
        if (first + i < args.experts && !(logit[i] <= largest_float)) bad = first + i;
      }
    }
    if (!below_infinity || (refused == 0 && lane == 0)) {
      report_rejection(args.rejected, static_cast<std::uint64_t>(token) * args.experts + bad);
    }
    return;
  }

  float score[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    score[i] = logit[i];
    if (args.rule == moe::gating::sigmoid && first + i < args.experts && logit[i] >= -largest_float) {
      score[i] = sigmoid_of(logit[i]) + (args.bias != nullptr ? __ldg(args.bias + first + i) : 0.0f);
    }
  }
  std::uint64_t kept = ~std::uint64_t{0};
  std::uint32_t group = 0, group_end = args.experts;  // of the expert that the loop below is at
  if (args.groups > 1) {
    kept = kept_groups<N>(args, score, scores[warp], group_scores[warp]);
    group = first / args.group_size, group_end = (group + 1) * args.group_size;
  }
  // the lane's experts, best first; of equal ones the lower first
  std::uint32_t order[N], expert[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i == group_end) ++group, group_end += args.group_size;
    const bool offered = first + i < args.experts && (kept >> group & 1) != 0;
    order[i] = offered ? order_of(score[i]) : 0;
    expert[i] = first + i;
  }
#pragma unroll
  for (int end = N - 1; end > 0; --end) {
#pragma unroll
    for (int i = 0; i < N - 1; ++i) {
      if (i >= end || order[i] >= order[i + 1]) continue;
      const std::uint32_t o = order[i], e = expert[i];
      order[i] = order[i + 1], expert[i] = expert[i + 1];
      order[i + 1] = o, expert[i + 1] = e;
    }
  }
  std::uint32_t mine = 0, top = 0;
  for (std::uint32_t r = 0; r < args.k; ++r) {
    const std::uint32_t best = __reduce_max_sync(full_warp, order[0]);
    const int winner = __ffs(static_cast<int>(__ballot_sync(full_warp, order[0] == best))) - 1;
    const std::uint32_t chosen = __shfl_sync(full_warp, expert[0], winner);
    if (lane == r) mine = chosen;
    if (r == 0) top = best;
    if (static_cast<int>(lane) == winner) {
#pragma unroll
      for (int i = 0; i + 1 < N; ++i) order[i] = order[i + 1], expert[i] = expert[i + 1];
      order[N - 1] = 0;
    }
  }

  const bool has_one = lane < args.k;
  float weight = has_one ? logits[mine] : 0.0f;
  if (args.rule == moe::gating::sigmoid) {
    weight = has_one ? sigmoid_of(weight) : 0.0f;
  } else {
    const float largest = score_of(top);
    weight = has_one ? expf(weight - largest) : 0.0f;
    float sum = weight;
    if (args.rule == moe::gating::softmax_topk) {
      sum = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (first + i < args.experts) sum += expf(logit[i] - largest);
      }
    }
    weight /= sum_of_lanes(sum);
  }
  float factor = args.scale;
  if (args.renormalize && args.rule != moe::gating::topk_softmax) {
    float sum = sum_of_lanes(weight);
    if (sum < 0x1p-64f) weight *= 0x1p64f, sum *= 0x1p64f;
    if (sum > 0) factor /= sum;
  }
  if (has_one) ids[lane] = static_cast<std::uint16_t>(mine), weights[lane] = weight * factor;
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
