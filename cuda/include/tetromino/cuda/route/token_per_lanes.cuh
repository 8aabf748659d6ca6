#pragma once

#include "token_per_warp.cuh"  // route_args, order_of, sigmoid_of

#include <cstdint>      // std::uint32_t
#include <type_traits>  // std::true_type

/// Routing where there are many tokens: a few lanes share a token, whose scores stay in their registers. The k-th best
/// of the bests of 16 sets of experts is no better than the k-th best expert; the dozen experts that are not below it
/// are compared with each other.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The most that these kernels take.
inline constexpr std::uint32_t most_candidates = 32, most_chosen = 10, most_groups = 16;

/// What lanes share of a token. It is an odd number of 16 bytes, so that the tokens of a warp lie in different banks.
template <int Fours>
struct alignas(16) route_room {
  float4 score[most_candidates / 4 + 1];  ///< of the candidates, or of groups
  std::uint16_t expert[most_candidates];  ///< the candidates, or groups
  std::uint16_t chosen[most_chosen];
  float chosen_score[most_chosen];
  float2 best_two[Fours];  ///< of every four experts
  __device__ void choose(std::uint32_t place, std::uint32_t e, float s) {
    chosen[place] = static_cast<std::uint16_t>(e), chosen_score[place] = s;
  }
  [[nodiscard]] __device__ float* scores() { return &score[0].x; }
  [[nodiscard]] __device__ const uint4* numbers() const { return reinterpret_cast<const uint4*>(expert); }
};

inline constexpr float no_score = -__builtin_huge_valf();

/// The sigmoid from the hardware's exponential and reciprocal, within a few units in the last place of 1.
[[nodiscard]] __device__ inline float quick_sigmoid(float x) {
  float power, out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(1.0f + power));
  return out;
}

/// The least of what the lanes of a token have.
template <int Lanes, class T>
[[nodiscard]] __device__ inline T least_of(T x) {
#pragma unroll
  for (int n = Lanes / 2; n > 0; n /= 2) x = min(x, __shfl_xor_sync(full_warp, x, n));
  return x;
}
template <int Lanes>
[[nodiscard]] __device__ inline float sum_of(float x) {
#pragma unroll
  for (int n = Lanes / 2; n > 0; n /= 2) x += __shfl_xor_sync(full_warp, x, n);
  return x;
}

/// Values v of lane l are values PerLane * l + v of a row of PerLane * Lanes, which is put in descending order.
template <int Lanes, int PerLane>
__device__ inline void sort_descending(float (&value)[PerLane], std::uint32_t own) {
  const auto exchange = [&](int partner) {  // each value with the one whose index differs in the bits of partner
    const int across = partner / PerLane, within = partner % PerLane;
    float other[PerLane];
#pragma unroll
    for (int v = 0; v < PerLane; ++v) {
      other[v] = value[v ^ within];
      if (across != 0) other[v] = __shfl_xor_sync(full_warp, other[v], across);
    }
#pragma unroll
    for (int v = 0; v < PerLane; ++v) {
      bool is_first = v < (v ^ within);
      if (across != 0) is_first = (own ^ static_cast<std::uint32_t>(across)) > own;
      value[v] = is_first ? fmaxf(value[v], other[v]) : fminf(value[v], other[v]);
    }
  };
#pragma unroll
  for (int size = 2; size <= PerLane * Lanes; size *= 2) {
    exchange(size - 1);
#pragma unroll
    for (int n = size / 4; n > 0; n /= 2) exchange(n);
  }
}

/// Adds how many of a row's n scores come before each of mine: those above it and, if ByExpert, equal ones of lower
/// experts. What follows them up to a multiple of 8 is -infinity; none is NaN, and none of mine is -0. (The difference
/// of infinities is a NaN without a sign.)
template <bool ByExpert, int N>
__device__ inline void count_before(const float4* row, const uint4* row_experts, std::uint32_t n,
                                    const float (&mine)[N], const std::uint32_t (&my_expert)[N],
                                    std::uint32_t (&before)[N]) {
#pragma unroll 1
  for (std::uint32_t c = 0; c < n; c += 8) {
    const float4 a = row[c / 4], b = row[c / 4 + 1];
    const float other[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8 * N; ++i) {
      before[i / 8] += bit_cast<std::uint32_t>(__fsub_rn(mine[i / 8], other[i % 8])) >> 31;
    }
    if constexpr (ByExpert) {
      const uint4 pairs = row_experts[c / 8];
      const std::uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int i = 0; i < 8 * N; ++i) {
        const std::uint32_t expert = i % 2 == 0 ? pair[i % 8 / 2] & 0xFFFF : pair[i % 8 / 2] >> 16;
        before[i / 8] += mine[i / 8] == other[i % 8] && expert < my_expert[i / 8];
      }
    }
  }
}

/// The expert whose score i a lane holds.
template <int Lanes>
[[nodiscard]] __device__ inline std::uint32_t expert_at(std::uint32_t i, std::uint32_t own) {
  return i / 4 * (4 * Lanes) + 4 * own + i % 4;
}

inline constexpr std::uint32_t all_fine = ~0u;

/// What is to be done about logits that are not all finite: the first expert of NaN or infinity, or 0 where none is
/// finite, for which a token is refused; and which of them are -infinity.
template <int Lanes, int Held>
[[nodiscard]] __device__ inline std::uint32_t look_closer(const float (&logit)[Held], std::uint32_t offered,
                                                          std::uint32_t& masked, std::uint32_t own) {
  std::uint32_t at = Held;
  float most = no_score;
#pragma unroll
  for (int i = Held - 1; i >= 0; --i) {
    const float x = (offered >> i & 1) != 0 ? logit[i] : no_score;
    if (!(x <= largest_float)) at = i;
    most = fmaxf(most, x);
    masked |= x < -largest_float ? 1u << i : 0;
  }
  const std::uint32_t bad = least_of<Lanes>(at < Held ? expert_at<Lanes>(at, own) : all_fine);
  most = -least_of<Lanes>(-most);
  return bad == all_fine && most < -largest_float ? 0 : bad;
}

/// Whether some bias is not finite, if there is one: each lane of a warp looks at its share of up to Most experts.
template <std::uint32_t Most>
[[nodiscard]] __device__ inline bool has_odd_bias(const route_args& args) {
  if (args.bias == nullptr) return false;
  float odd = 0;  // NaN where the bias is not finite
#pragma unroll
  for (std::uint32_t first = 0; first < Most; first += 128) {
    const std::uint32_t e = first + threadIdx.x % 32 * 4;
    if (e >= args.experts) break;
    const float4 four = __ldg(reinterpret_cast<const float4*>(args.bias + e));
    odd = __fmaf_rn(four.x, 0.0f, __fmaf_rn(four.y, 0.0f, __fmaf_rn(four.z, 0.0f, __fmaf_rn(four.w, 0.0f, odd))));
  }
  return __any_sync(full_warp, !(odd == 0));
}

/// Keeps the best groups: those of other experts are no longer offered. Returns the least of what is second best in a
/// group that is kept, so that twice as many experts as groups are kept are not below it.
template <int Lanes, int Held, class Room>
[[nodiscard]] __device__ inline float keep_groups(const route_args& args, std::uint32_t own, const float (&score)[Held],
                                                  std::uint32_t& offered, Room& room) {
  constexpr std::uint32_t lanes = Lanes, per_lane = lanes < most_groups ? most_groups / lanes : 1;
  const std::uint32_t size = args.group_size / 4;  // in fours
#pragma unroll
  for (int j = 0; j < Held / 4; ++j) {
    const float* const x = score + 4 * j;
    const float a = fmaxf(x[0], x[1]), b = fminf(x[0], x[1]), c = fmaxf(x[2], x[3]), d = fminf(x[2], x[3]);
    room.best_two[j * lanes + own] = make_float2(fmaxf(a, c), fmaxf(fminf(a, c), fmaxf(b, d)));
  }
  __syncwarp();
  float second_best[per_lane];
#pragma unroll
  for (std::uint32_t i = 0; i < per_lane; ++i) {
    if (i * lanes >= (args.groups + 7) / 8 * 8) break;  // what count_before reads
    const std::uint32_t g = i * lanes + own;
    const float2* const two = room.best_two + min(g, args.groups - 1) * size;
    float first = no_score, second = no_score;
#pragma unroll 4
    for (std::uint32_t n = 0; n < size; ++n) {
      second = fmaxf(fmaxf(second, two[n].y), fminf(first, two[n].x));
      first = fmaxf(first, two[n].x);
    }
    room.expert[g] = static_cast<std::uint16_t>(g);
    room.scores()[g] = g < args.groups ? first + second + 0.0f : no_score;  // -0 is 0
    second_best[i] = second;
  }
  __syncwarp();
  std::uint32_t kept = 0;
  const auto find_kept = [&](auto by_group) {
    kept = 0;
#pragma unroll
    for (std::uint32_t i = 0; i < per_lane; ++i) {
      if (i * lanes >= args.groups) break;
      const std::uint32_t g = i * lanes + own;
      const float mine[1] = {room.scores()[g]};
      const std::uint32_t my_group[1] = {g};
      std::uint32_t better[1] = {};
      count_before<decltype(by_group)::value>(room.score, room.numbers(), args.groups, mine, my_group, better);
      const std::uint32_t these = __ballot_sync(full_warp, g < args.groups && better[0] < args.groups_kept);
      kept |= (these >> (threadIdx.x % 32 - own) & (~0u >> (32 - lanes))) << i * lanes;
    }
  };
  find_kept(std::false_type{});
  if (__any_sync(full_warp, __popc(kept) != args.groups_kept)) find_kept(std::true_type{});  // some are as good
  __syncwarp();
  float least = -no_score;
#pragma unroll
  for (std::uint32_t i = 0; i < per_lane; ++i) {
    if (i * lanes >= args.groups) break;
    if ((kept >> (i * lanes + own) & 1) != 0) least = fminf(least, second_best[i]);
  }
#pragma unroll
  for (int j = 0; j < Held / 4; ++j) {
    const std::uint32_t group = (j * lanes + own) * args.group_reciprocal >> 16;
    offered &= (kept >> group % 32 & 1) != 0 ? ~0u : ~(15u << 4 * j);
  }
  return least_of<Lanes>(least);
}

/// The k-th best of what is best in each of 16 sets of experts or more, and the best of all.
template <int Lanes, bool Sigmoid, int Held>
[[nodiscard]] __device__ inline float best_of_sets(const float (&score)[Held], std::uint32_t offered, std::uint32_t k,
                                                   std::uint32_t own, float& largest) {
  constexpr int sets = Lanes < 16 ? 16 / Lanes : 1, piece = Held / sets < 4 ? Held / sets : 4;
  float best_of_set[sets];
#pragma unroll
  for (int i = 0; i < Held; i += piece) {
    float best = score[i];
#pragma unroll
    for (int n = 1; n < piece; ++n) best = fmaxf(best, score[i + n]);
    if (Sigmoid && (offered >> i & 1) == 0) best = no_score;
    best_of_set[i / piece % sets] = i / piece < sets ? best : fmaxf(best_of_set[i / piece % sets], best);
  }
  sort_descending<Lanes>(best_of_set, own);
  largest = __shfl_sync(full_warp, best_of_set[0], 0, Lanes);
  float kth = best_of_set[0];
#pragma unroll
  for (int i = 1; i < sets; ++i) kth = (k - 1) % sets == i ? best_of_set[i] : kth;
  return __shfl_sync(full_warp, kth, static_cast<int>((k - 1) / sets), Lanes);
}

/// Stores the scores and the experts of a lane's candidates, from place `begin` on. Scores cannot be indexed where they
/// are, so that each is looked at; predicates keep that to three instructions.
template <int Lanes, int Held, class Room>
__device__ inline void note_candidates(const float (&score)[Held], std::uint32_t candidates, std::uint32_t begin,
                                       std::uint32_t own, Room& room) {
  auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(room.scores() + begin));
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.f32 [%0], %1; @p add.u32 %0, %0, 4; }"
                 : "+r"(to)
                 : "f"(score[i]), "r"(candidates & 1u << i)
                 : "memory");
  }
  for (std::uint16_t* e = room.expert + begin; candidates != 0; candidates &= candidates - 1) {
    *e++ = static_cast<std::uint16_t>(expert_at<Lanes>(__ffs(static_cast<int>(candidates)) - 1, own));
  }
}

/// Puts the best k of the candidates in order: how many come before a candidate is its place.
template <int Lanes, class Room>
__device__ inline void choose_among(std::uint32_t found, std::uint32_t most_found, std::uint32_t k, std::uint32_t own,
                                    Room& room) {
  constexpr std::uint32_t lanes = Lanes, at_once = lanes < 16 ? 16 / lanes : 1;
  constexpr std::uint32_t rounds = most_candidates / (lanes * at_once);
  float mine[rounds][at_once];
  std::uint32_t expert[rounds][at_once], before[rounds][at_once];
  const auto at = [&](std::uint32_t round, std::uint32_t n) { return (round * at_once + n) * lanes + own; };
  const auto count = [&](auto by_expert) {
    std::uint32_t missing = own == 0 ? found * (found - 1) / 2 : 0;
#pragma unroll
    for (std::uint32_t round = 0; round < rounds; ++round) {
      if (at(round, 0) - own >= most_found) break;
#pragma unroll
      for (std::uint32_t n = 0; n < at_once; ++n) {
        mine[round][n] = room.scores()[at(round, n)] + 0.0f;  // -0 is 0
        expert[round][n] = room.expert[at(round, n)];
        before[round][n] = 0;
      }
      count_before<decltype(by_expert)::value>(room.score, room.numbers(), most_found, mine[round], expert[round],
                                               before[round]);
#pragma unroll
      for (std::uint32_t n = 0; n < at_once; ++n) missing -= at(round, n) < found ? before[round][n] : 0;
    }
    return __reduce_add_sync(full_warp, missing);  // how many pairs are as good as each other
  };
  if (count(std::false_type{}) != 0) count(std::true_type{});
#pragma unroll
  for (std::uint32_t round = 0; round < rounds; ++round) {
    if (at(round, 0) - own >= most_found) break;
#pragma unroll
    for (std::uint32_t n = 0; n < at_once; ++n) {
      if (at(round, n) < found && before[round][n] < k) {
        room.choose(before[round][n], expert[round][n], mine[round][n]);
      }
    }
  }
}

/// The same among all experts, one after another.
template <int Lanes, int Held, class Room>
__device__ inline void choose_one_by_one(const float (&score)[Held], std::uint32_t offered, std::uint32_t k,
                                         std::uint32_t own, Room& room) {
  std::uint32_t order[Held];
#pragma unroll
  for (int i = 0; i < Held; ++i) order[i] = (offered >> i & 1) != 0 ? order_of(score[i]) : 0;
#pragma unroll 1
  for (std::uint32_t r = 0; r < k; ++r) {
    std::uint32_t best = 0, at = Held;
#pragma unroll
    for (int i = 0; i < Held; ++i) best = max(best, order[i]);
    best = ~least_of<Lanes>(~best);
#pragma unroll
    for (int i = Held - 1; i >= 0; --i) at = order[i] == best ? i : at;
    const std::uint32_t mine = at < Held ? expert_at<Lanes>(at, own) : ~0u;
    const std::uint32_t expert = least_of<Lanes>(mine);
    if (mine != expert) at = Held;
#pragma unroll
    for (int i = 0; i < Held; ++i) order[i] = at == i ? 0 : order[i];
    if (own == 0) room.choose(r, expert, score_of(best));
  }
}

/// Lanes lanes route a token: of every 4 * Lanes experts in a row, each lane holds four in a row. For k <= most_chosen,
/// up to 4 * Lanes * Fours experts, their number and the size of groups in fours, and up to most_groups groups.
template <int Lanes, int Fours, bool Sigmoid>
__global__ void __launch_bounds__(128, Sigmoid ? 8 : 9) token_per_lanes_kernel(const route_args args) {
  constexpr std::uint32_t lanes = Lanes;
  constexpr int held = 4 * Fours;
  using room_type = route_room<Sigmoid ? Lanes * Fours : 4>;
  static_assert(sizeof(room_type) / 16 % 2 == 1);
  __shared__ room_type rooms[128 / lanes];
  room_type& room = rooms[threadIdx.x / lanes];
  const std::uint32_t own = threadIdx.x % lanes, place = blockIdx.x * (128 / lanes) + threadIdx.x / lanes;
  if ((blockIdx.x * 4 + threadIdx.x / 32) * (32 / lanes) >= args.tokens) return;
  const std::uint32_t token = min(place, args.tokens - 1);
  const float* const logits = args.logits + static_cast<std::size_t>(token) * args.experts;

  float score[held];  // logits at first
  const bool is_full = args.experts == 4 * lanes * Fours;
  const int fours = static_cast<int>(args.experts / 4 - own);
  const auto read_four = [&](const float* from, int j) {
    return __ldg(reinterpret_cast<const float4*>(from) + own + j * Lanes);
  };
  const auto set_four = [&](int j, const float4& four) {
    score[4 * j] = four.x, score[4 * j + 1] = four.y, score[4 * j + 2] = four.z, score[4 * j + 3] = four.w;
  };
  if (is_full) {
#pragma unroll
    for (int j = 0; j < Fours; ++j) set_four(j, read_four(logits, j));
  } else {
#pragma unroll
    for (int j = 0; j < Fours; ++j) set_four(j, j * Lanes < fours ? read_four(logits, j) : make_float4(0, 0, 0, 0));
  }
  std::uint32_t offered = ~0u >> (32 - held), masked = 0;  // bit i: score i
  if (!is_full) {
#pragma unroll
    for (int j = 0; j < Fours; ++j) offered &= j * Lanes < fours ? ~0u : ~(15u << 4 * j);
    masked = ~offered;
  }
  float poison[4] = {};  // not finite where a logit is not, or where two are vast: a closer look finds nothing then
#pragma unroll
  for (int i = 0; i < held; i += 2) poison[i / 2 % 4] = __fmaf_rn(score[i], score[i + 1], poison[i / 2 % 4]);
  const bool is_odd = !(fabsf(poison[0] + poison[1] + (poison[2] + poison[3])) <= largest_float);
  const bool is_bias_odd = Sigmoid && has_odd_bias<4 * lanes * Fours>(args);  // then all tokens are refused
  bool refused = false;
  if (__any_sync(full_warp, is_bias_odd || is_odd)) {
    std::uint32_t bad = look_closer<Lanes>(score, offered, masked, own);
    if (is_bias_odd) {
      std::uint32_t e = 0;
      while (fabsf(__ldg(args.bias + e)) <= largest_float) ++e;
      bad = min(bad, e);
    }
    refused = bad != all_fine;
    if (refused) {
      if (own == 0 && place == token)
        report_rejection(args.rejected, static_cast<std::uint64_t>(token) * args.experts + bad);
      masked = ~offered;
#pragma unroll
      for (int i = 0; i < held; ++i) score[i] = 0;
    }
  }

  const auto choice_of = [&](float x, float add) { return Sigmoid ? quick_sigmoid(x) + add : x; };
  if constexpr (Sigmoid) {
    const bool has_bias = args.bias != nullptr && !is_bias_odd;
    const auto become_scores = [&](auto whole) {
#pragma unroll
      for (int j = 0; j < Fours; ++j) {
        float4 add = make_float4(0, 0, 0, 0);
        if (decltype(whole)::value || (has_bias && j * Lanes < fours)) add = read_four(args.bias, j);
        set_four(j, make_float4(choice_of(score[4 * j], add.x), choice_of(score[4 * j + 1], add.y),
                                choice_of(score[4 * j + 2], add.z), choice_of(score[4 * j + 3], add.w)));
      }
    };
    if (is_full && has_bias) {
      become_scores(std::true_type{});
    } else {
      become_scores(std::false_type{});
    }
  }
  if (__any_sync(full_warp, masked != 0)) {
#pragma unroll
    for (int i = 0; i < held; ++i) score[i] = (masked >> i & 1) != 0 ? no_score : score[i];
  }

  float threshold = 0, largest = 0;
  if (Sigmoid && args.groups > 1) threshold = keep_groups<Lanes>(args, own, score, offered, room);
  if (!Sigmoid || args.groups == 1 || 2 * args.groups_kept < args.k) {
    threshold = best_of_sets<Lanes, Sigmoid>(score, offered, args.k, own, largest);
  }
  if (threshold == 0) threshold = -0.0f;  // so that no difference from it is -0

  float sum_of_all = 0;
  if (!Sigmoid && args.rule == moe::gating::softmax_topk && !args.renormalize) {
#pragma unroll
    for (int i = 0; i < held; ++i) sum_of_all += __expf(score[i] - largest);
    sum_of_all = sum_of<Lanes>(sum_of_all);
  }

  std::uint32_t candidates = 0;
#pragma unroll
  for (int i = held - 1; i >= 0; --i) {
    candidates = __funnelshift_l(bit_cast<std::uint32_t>(__fsub_rn(score[i], threshold)), candidates, 1);
  }
  candidates = ~candidates & offered;
  const std::uint32_t count = static_cast<std::uint32_t>(__popc(candidates));
  std::uint32_t end = count;
#pragma unroll
  for (std::uint32_t n = 1; n < lanes; n *= 2) {
    const std::uint32_t before = __shfl_up_sync(full_warp, end, n, Lanes);
    if (own >= n) end += before;
  }
  const std::uint32_t found = __shfl_sync(full_warp, end, Lanes - 1, Lanes);
  if (__all_sync(full_warp, !refused && threshold >= -largest_float && found >= args.k && found <= most_candidates)) {
    const std::uint32_t most_found = __reduce_max_sync(full_warp, found);
    note_candidates<Lanes>(score, candidates, end - count, own, room);
#pragma unroll 1
    for (std::uint32_t c = found + own; c < (most_found + 7) / 8 * 8; c += lanes) room.scores()[c] = no_score;
    __syncwarp();
    choose_among<Lanes>(found, most_found, args.k, own, room);
  } else {  // many are as good as the k-th, or few are not masked
    choose_one_by_one<Lanes>(score, offered, args.k, own, room);
  }
  __syncwarp();

  constexpr std::uint32_t per_lane = (most_chosen + lanes - 1) / lanes;
  float weight[per_lane], sum = 0;
  std::uint32_t expert[per_lane];
#pragma unroll
  for (std::uint32_t n = 0; n < per_lane; ++n) {
    const std::uint32_t r = own + n * lanes;
    weight[n] = 0;
    if (r >= args.k) continue;
    expert[n] = refused ? r : room.chosen[r];
    weight[n] = Sigmoid ? sigmoid_of(__ldg(logits + expert[n])) : expf(room.chosen_score[r] - largest);
    sum += weight[n];
  }
  float factor = args.scale;
  if (Sigmoid ? args.renormalize : sum_of_all == 0) {
    sum = sum_of<Lanes>(sum);
    if (Sigmoid && sum < 0x1p-64f) {
      sum *= 0x1p64f;
#pragma unroll
      for (std::uint32_t n = 0; n < per_lane; ++n) weight[n] *= 0x1p64f;
    }
    if (sum > 0) factor = __fdividef(factor, sum);  // the sum over all experts cancels
  } else if (!Sigmoid) {
    factor = __fdividef(factor, sum_of_all);
  }
  if (place != token) return;
#pragma unroll
  for (std::uint32_t n = 0; n < per_lane; ++n) {
    const std::uint32_t r = own + n * lanes;
    if (r >= args.k) continue;
    const std::size_t to = static_cast<std::size_t>(token) * args.k + r;
    args.ids[to] = static_cast<std::uint16_t>(expert[n]);
    args.weights[to] = refused ? bit_cast<float>(0x7FC00000u) : weight[n] * factor;
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
