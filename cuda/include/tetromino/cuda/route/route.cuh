#pragma once

#include <tetromino/cuda/moe.hpp>  // route_job

#include "token_per_warp.cuh"   // token_per_warp_kernel
#include "token_per_lane.cuh"   // token_per_lane_kernel
#include "token_per_lanes.cuh"  // token_per_lanes_kernel

#include <cstdint>  // std::uint32_t

/// Which kernel routes tokens.
namespace TETROMINO_NAMESPACE::cuda::detail {

template <int N>
result<void> launch_token_per_warp(const stream& s, const route_args& args) {
  token_per_warp_kernel<N><<<(args.tokens + 3) / 4, 128, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), "the launch of token_per_warp_kernel");
}

/// For tokens of up to K experts each.
template <int K, bool Sigmoid>
result<void> launch_token_per_lane(const stream& s, const route_args& args) {
  token_per_lane_kernel<K, Sigmoid><<<(args.tokens + 127) / 128, 128, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), "the launch of token_per_lane_kernel");
}

/// Lanes to a token, and fours of experts to a lane.
template <int Lanes, int Fours>
result<void> launch_token_per_lanes(const stream& s, const route_args& args) {
  const auto kernel = args.rule == moe::gating::sigmoid ? token_per_lanes_kernel<Lanes, Fours, true>
                                                        : token_per_lanes_kernel<Lanes, Fours, false>;
  constexpr std::uint32_t tokens = 4 * 32 / Lanes;
  kernel<<<(args.tokens + tokens - 1) / tokens, 128, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), "the launch of token_per_lanes_kernel");
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
      if (args.k <= 4)
        return is_sigmoid ? launch_token_per_lane<4, true>(s, args) : launch_token_per_lane<4, false>(s, args);
      return is_sigmoid ? launch_token_per_lane<8, true>(s, args) : launch_token_per_lane<8, false>(s, args);
    }
  } else if (args.tokens >= many && args.is_aligned && is_aligned(args.bias, 16) && args.k <= most_chosen &&
             (args.groups == 1 || (args.groups <= most_groups && args.group_size % 4 == 0))) {
    if (args.groups > 1) args.group_reciprocal = (65535 + args.group_size / 4) / (args.group_size / 4);
    if (job.experts <= 32) return launch_token_per_lanes<2, 4>(s, args);
    if (job.experts <= 64) return launch_token_per_lanes<4, 4>(s, args);
    if (job.experts <= 128) return launch_token_per_lanes<4, 8>(s, args);
    if (job.experts <= 160) return launch_token_per_lanes<8, 5>(s, args);
    if (job.experts <= 256) return launch_token_per_lanes<8, 8>(s, args);
    if (job.experts <= 384) return launch_token_per_lanes<16, 6>(s, args);
    if (job.experts <= 512) return launch_token_per_lanes<16, 8>(s, args);
    return launch_token_per_lanes<32, 8>(s, args);
  }
  if (job.experts <= 32) return launch_token_per_warp<1>(s, args);
  if (job.experts <= 64) return launch_token_per_warp<2>(s, args);
  if (job.experts <= 128) return launch_token_per_warp<4>(s, args);
  if (job.experts <= 256) return launch_token_per_warp<8>(s, args);
  if (job.experts <= 512) return launch_token_per_warp<16>(s, args);
  return launch_token_per_warp<32>(s, args);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
