#pragma once

#include "token_per_warp.cuh"   // route_args, sigmoid_of, refuse_bias
#include "token_per_lanes.cuh"  // quick_sigmoid

#include <cstdint>  // std::uint32_t

/// Routing many tokens among few experts: a lane routes a token, so that nothing crosses lanes.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// What a warp keeps beside its registers: 32 experts of its tokens, and what each token has found worth a second look
/// since its list was last brought up to date.
struct lane_room {
  static constexpr std::uint32_t pitch = 36, waiting = 16;
  float tile[32 * pitch];
  float score[waiting * 32];
  std::uint16_t expert[waiting * 32];
};

/// The best K experts that a lane has seen, best first. What is free holds NaN, which nothing is below.
template <int K>
struct best_of_lane {
  float score[K];
  std::uint32_t expert[K];

  __device__ best_of_lane() {
#pragma unroll
    for (int i = 0; i < K; ++i) score[i] = bit_cast<float>(0x7FC00000u), expert[i] = 0;
  }

  [[nodiscard]] __device__ bool wants(float s) const { return !(s <= score[K - 1]); }

  /// Experts come in ascending order, so that equal ones stay in it.
  __device__ void insert(float s, std::uint32_t e) {
#pragma unroll
    for (int i = K - 1; i >= 0; --i) {
      const bool above = !(s <= score[i]), above_next = i > 0 && !(s <= score[i > 0 ? i - 1 : 0]);
      score[i] = above_next ? score[i > 0 ? i - 1 : 0] : above ? s : score[i];
      expert[i] = above_next ? expert[i > 0 ? i - 1 : 0] : above ? e : expert[i];
    }
  }
};

/// Calls f(expert, four scores) for every four logits of the lane's token. Rows come through shared memory, so that
/// what a warp reads at once lies together; the next 32 experts are on their way while these are looked at.
template <class F>
__device__ void for_each_four(const route_args& args, std::uint32_t first_token, lane_room& room, const F& f) {
  const std::uint32_t lane = threadIdx.x % 32, col = lane % 8 * 4;
  float4 next[8];
  const auto fetch = [&](std::uint32_t first) {
#pragma unroll
    for (std::uint32_t i = 0; i < 8; ++i) {
      const std::uint32_t token = min(first_token + 4 * i + lane / 8, args.tokens - 1);
      next[i] = make_float4(0, 0, 0, 0);
      if (first + col < args.experts) {
        next[i] = __ldg(reinterpret_cast<const float4*>(args.logits + static_cast<std::size_t>(token) * args.experts +
                                                        first + col));
      }
    }
  };
  fetch(0);
  for (std::uint32_t first = 0; first < args.experts; first += 32) {
    __syncwarp();
#pragma unroll
    for (std::uint32_t i = 0; i < 8; ++i) {
      *reinterpret_cast<float4*>(room.tile + (4 * i + lane / 8) * lane_room::pitch + col) = next[i];
    }
    __syncwarp();
    if (first + 32 < args.experts) fetch(first + 32);
    const std::uint32_t end = min(32u, args.experts - first);
    for (std::uint32_t e = 0; e < end; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(room.tile + lane * lane_room::pitch + e);
      const float x[4] = {four.x, four.y, four.z, four.w};
      f(first + e, x);
    }
  }
}

/// What the sigmoid rule chooses by.
__device__ inline void choice_scores(const route_args& args, std::uint32_t e, const float (&x)[4], float (&score)[4]) {
  float4 bias = make_float4(0, 0, 0, 0);
  if (args.bias != nullptr)
    bias =
        make_float4(__ldg(args.bias + e), __ldg(args.bias + e + 1), __ldg(args.bias + e + 2), __ldg(args.bias + e + 3));
  const float add[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) score[i] = x[i] >= -largest_float ? quick_sigmoid(x[i]) + add[i] : x[i];
}

/// Routes a token a lane, for k <= K and experts in fours.
template <int K, bool Sigmoid>
__global__ void __launch_bounds__(128, Sigmoid ? 5 : 7) token_per_lane_kernel(const route_args args) {
  __shared__ lane_room rooms[4];
  if (Sigmoid && refuse_bias(args, 128)) return;
  lane_room& room = rooms[threadIdx.x / 32];
  const std::uint32_t lane = threadIdx.x % 32, first_token = (blockIdx.x * 4 + threadIdx.x / 32) * 32;
  if (first_token >= args.tokens) return;
  const std::uint32_t token = first_token + lane;

  best_of_lane<K> best;
  std::uint32_t waiting = 0;
  int positive = 0;  // the largest bits, as signed and as unsigned integers: NaN and infinity stand out
  std::uint32_t negative = 0;
  float largest = -bit_cast<float>(0x7F800000u), base = -largest_float, sum = 0;  // sum is in units of exp(base)
  const bool sums_all = !Sigmoid && args.rule == moe::gating::softmax_topk && !args.renormalize;
  const auto bring_up_to_date = [&] {
    for (std::uint32_t i = 0; __any_sync(full_warp, i < waiting); ++i) {
      const float s = room.score[i * 32 + lane];
      if (i < waiting && best.wants(s)) best.insert(s, room.expert[i * 32 + lane]);
    }
    waiting = 0;
  };
  for_each_four(args, first_token, room, [&](std::uint32_t e, const float(&x)[4]) {
    positive = max(max(max(positive, __float_as_int(x[0])), max(__float_as_int(x[1]), __float_as_int(x[2]))),
                   __float_as_int(x[3]));
    negative = max(max(max(negative, __float_as_uint(x[0])), max(__float_as_uint(x[1]), __float_as_uint(x[2]))),
                   __float_as_uint(x[3]));
    const float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    largest = fmaxf(largest, most);
    if (sums_all) {
      const float now = fmaxf(base, most);
      sum = sum * expf(base - now) + (expf(x[0] - now) + expf(x[1] - now)) + (expf(x[2] - now) + expf(x[3] - now));
      base = now;
    }
    float score[4] = {x[0], x[1], x[2], x[3]};
    if constexpr (Sigmoid) choice_scores(args, e, x, score);
#pragma unroll
    for (std::uint32_t i = 0; i < 4; ++i) {
      if (best.wants(score[i])) {
        room.score[waiting * 32 + lane] = score[i];
        room.expert[waiting * 32 + lane] = static_cast<std::uint16_t>(e + i);
        ++waiting;
      }
    }
    if (__any_sync(full_warp, waiting > lane_room::waiting - 4)) bring_up_to_date();
  });
  bring_up_to_date();
  if (token >= args.tokens) return;

  const float* const logits = args.logits + static_cast<std::size_t>(token) * args.experts;
  float weight[K], total = 0;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const bool is_one = static_cast<std::uint32_t>(i) < args.k;
    if constexpr (Sigmoid) {
      weight[i] = is_one ? sigmoid_of(logits[best.expert[i]]) : 0.0f;
    } else {
      weight[i] = is_one ? expf(best.score[i] - best.score[0]) : 0.0f;
    }
    total += weight[i];
  }
  float factor = args.scale;
  if (sums_all) {
    factor /= sum;
  } else if ((args.renormalize || !Sigmoid) && total > 0) {
    if (Sigmoid && total < 0x1p-64f) {
      total *= 0x1p64f;
#pragma unroll
      for (int i = 0; i < K; ++i) weight[i] *= 0x1p64f;
    }
    factor /= total;  // the sum over all experts cancels
  }
  const bool refused = positive >= 0x7F800000 || negative > 0xFF800000u;
  if (refused || !(largest >= -largest_float)) {
    factor = bit_cast<float>(0x7FC00000u);
    std::uint32_t bad = 0;
    while (refused && logits[bad] <= largest_float) ++bad;
    report_rejection(args.rejected, static_cast<std::uint64_t>(token) * args.experts + bad);
#pragma unroll
    for (int i = 0; i < K; ++i) best.expert[i] = static_cast<std::uint32_t>(i), weight[i] = 1.0f;
  }
  std::uint16_t* const ids = args.ids + static_cast<std::size_t>(token) * args.k;
  float* const weights = args.weights + static_cast<std::size_t>(token) * args.k;
  if (args.k % 4 == 0 && args.is_output_aligned) {
#pragma unroll
    for (std::uint32_t i = 0; i < K; i += 4) {
      if (i >= args.k) continue;
      *reinterpret_cast<uint2*>(ids + i) =
          make_uint2(best.expert[i] | best.expert[i + 1] << 16, best.expert[i + 2] | best.expert[i + 3] << 16);
      *reinterpret_cast<float4*>(weights + i) =
          make_float4(weight[i] * factor, weight[i + 1] * factor, weight[i + 2] * factor, weight[i + 3] * factor);
    }
  } else {
#pragma unroll
    for (std::uint32_t i = 0; i < K; ++i) {
      if (i < args.k) ids[i] = static_cast<std::uint16_t>(best.expert[i]), weights[i] = weight[i] * factor;
    }
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
