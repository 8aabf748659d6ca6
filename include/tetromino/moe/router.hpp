#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "trace.hpp"     // detail::text

#include <algorithm>  // std::min, std::max
#include <array>      // std::array
#include <cmath>      // std::abs, std::exp
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uint16_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span

namespace TETROMINO_NAMESPACE::moe {

/// How a token's router logits become experts and their weights.
enum class gating : std::uint8_t {
  softmax_topk,  ///< softmax over all experts, then the k largest (Mixtral, Qwen3)
  topk_softmax,  ///< the k largest logits, then softmax over those (gpt-oss)
  sigmoid,       ///< sigmoid of each logit; chosen by sigmoid + bias, weighted by sigmoid alone (DeepSeek-V3)
};

/// How tokens are routed.
struct router_options {
  gating rule = gating::softmax_topk;
  std::size_t experts_per_token = 1;
  bool renormalize = true;  ///< divide a token's weights by their sum (topk_softmax sums to 1 anyway)
  float scale = 1.0f;       ///< multiplies all weights, at the end ("routed scaling factor")
  /// sigmoid: what is added to each expert's score for the choice only, [experts]; empty: nothing.
  std::span<const float> bias{};
  /// sigmoid: the experts are cut into `groups` of equal size, and only those of the `groups_kept` best groups can be
  /// chosen; a group's score is the sum of the two best biased scores in it, so that one with fewer than two experts
  /// that are not masked comes after all others.
  std::size_t groups = 1;
  std::size_t groups_kept = 1;

  static constexpr std::size_t max_groups = 64;
};

namespace detail::inline TETROMINO_ISA {

/// Keeps the best `ids.size()` of the experts offered, best first; of equal scores, the lower expert comes first.
class best_experts {
 public:
  best_experts(std::span<std::uint16_t> ids, std::span<float> scores) : ids_(ids), scores_(scores) {}

  /// Offers experts in ascending order.
  void offer(std::size_t expert, float score) {
    if (used_ == ids_.size()) {
      if (!(score > scores_[used_ - 1])) return;
    } else {
      ++used_;
    }
    std::size_t at = used_ - 1;
    for (; at > 0 && score > scores_[at - 1]; --at) {
      scores_[at] = scores_[at - 1];
      ids_[at] = ids_[at - 1];
    }
    scores_[at] = score;
    ids_[at] = static_cast<std::uint16_t>(expert);
  }

 private:
  std::span<std::uint16_t> ids_;
  std::span<float> scores_;
  std::size_t used_ = 0;
};

[[nodiscard]] inline bool is_finite(float x) { return std::abs(x) <= std::numeric_limits<float>::max(); }

[[nodiscard]] inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

/// What the sigmoid rule chooses by.
[[nodiscard]] inline float choice_score(std::span<const float> logits, const router_options& options, std::size_t e) {
  if (logits[e] < std::numeric_limits<float>::lowest()) return logits[e];  // masked
  return sigmoid(logits[e]) + (options.bias.empty() ? 0.0f : options.bias[e]);
}

/// Which groups of experts a token may choose from.
inline std::array<bool, router_options::max_groups> kept_groups(std::span<const float> logits,
                                                                const router_options& options) {
  std::array<float, router_options::max_groups> score{};
  const std::size_t size = logits.size() / options.groups;
  for (std::size_t g = 0; g < options.groups; ++g) {
    float first = -std::numeric_limits<float>::infinity(), second = first;
    for (std::size_t e = g * size; e < (g + 1) * size; ++e) {
      const float s = choice_score(logits, options, e);
      second = std::max(second, std::min(first, s));
      first = std::max(first, s);
    }
    score[g] = size == 1 ? first : first + second;
  }
  std::array<bool, router_options::max_groups> kept{};
  for (std::size_t g = 0; g < options.groups; ++g) {
    std::size_t better = 0;
    for (std::size_t h = 0; h < options.groups; ++h) better += score[h] > score[g] || (score[h] == score[g] && h < g);
    kept[g] = better < options.groups_kept;
  }
  return kept;
}

inline void route_token(std::span<const float> logits, const router_options& options, std::span<std::uint16_t> ids,
                        std::span<float> weights) {
  best_experts best(ids, weights);
  if (options.rule == gating::sigmoid) {
    const std::size_t size = logits.size() / options.groups;
    std::array<bool, router_options::max_groups> kept{true};
    if (options.groups > 1) kept = kept_groups(logits, options);
    for (std::size_t e = 0; e < logits.size(); ++e) {
      if (kept[e / size]) best.offer(e, choice_score(logits, options, e));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) weights[i] = sigmoid(logits[ids[i]]);
  } else {
    for (std::size_t e = 0; e < logits.size(); ++e) best.offer(e, logits[e]);
    const float top = weights[0];
    float sum = 0;
    if (options.rule == gating::softmax_topk) {
      for (const float logit : logits) sum += std::exp(logit - top);
    } else {
      for (const float logit : weights) sum += std::exp(logit - top);
    }
    for (float& w : weights) w = std::exp(w - top) / sum;
  }
  float factor = options.scale;
  if (options.renormalize && options.rule != gating::topk_softmax) {
    float sum = 0;
    for (const float w : weights) sum += w;
    if (sum < 0x1p-64f) {  // whose inverse may be none
      sum *= 0x1p64f;
      for (float& w : weights) w *= 0x1p64f;
    }
    if (sum > 0) factor /= sum;
  }
  for (float& w : weights) w *= factor;
}

inline result<void> check_router(std::size_t logits, std::size_t experts, const router_options& options,
                                 std::size_t ids, std::size_t weights) {
  const std::size_t k = options.experts_per_token;
  if (experts == 0 || experts > no_expert || k == 0 || k > experts) {
    return error(errc::invalid_argument,
                 {"route: expected 1 ≤ experts per token ≤ experts ≤ ", no_expert, ", got ", k, " of ", experts});
  }
  if (!is_finite(options.scale)) {
    return error(errc::non_finite, {"route: expected a finite scale, got ", options.scale});
  }
  if (logits % experts != 0) {
    return error(errc::shape_mismatch, {"route: expected a multiple of ", experts, " logits, got ", logits});
  }
  if (const std::size_t n = logits / experts * k; ids != n || weights != n) {
    return error(errc::shape_mismatch,
                 {"route: expected room for ", n, " ids and weights, got ", ids, " and ", weights});
  }
  if (!options.bias.empty() && options.bias.size() != experts) {
    return error(errc::shape_mismatch,
                 {"route: expected a bias for each of ", experts, " experts, got ", options.bias.size()});
  }
  if (options.groups == 0 || options.groups > options.max_groups || experts % options.groups != 0 ||
      options.groups_kept == 0 || options.groups_kept > options.groups) {
    return error(errc::invalid_argument,
                 {"route: expected 1 to ", router_options::max_groups, " groups that divide ", experts,
                  " experts, and at least one of them kept, got ", options.groups, " and ", options.groups_kept});
  }
  if (options.groups_kept * (experts / options.groups) < k) {
    return error(errc::invalid_argument, {"route: expected ", k, " experts in the groups kept, got ",
                                          options.groups_kept, " × ", experts / options.groups});
  }
  if (options.rule != gating::sigmoid && (!options.bias.empty() || options.groups != 1)) {
    return error(errc::invalid_argument, "route: a bias and groups belong to the sigmoid rule");
  }
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Routes tokens: logits[tokens, experts] to ids[tokens, k], best first, and their weights[tokens, k], which the caller
/// provides; nothing is allocated. Of equal scores the lower expert comes first; softmax rules compare logits. Sums run
/// in float over ascending experts. A logit of −infinity masks an expert: it is chosen last of those in the groups
/// kept, with weight 0. Leave padding rows out, and give them no_expert as ids. Errors: sizes or options that do not
/// fit; a bias or a scale that is not finite; NaN or +infinity among the logits, or a token without a finite one.
[[nodiscard]] inline result<void> try_route(std::span<const float> logits, std::size_t experts,
                                            const router_options& options, std::span<std::uint16_t> ids,
                                            std::span<float> weights) {
  if (auto ok = detail::check_router(logits.size(), experts, options, ids.size(), weights.size()); !ok) return ok;
  for (std::size_t e = 0; e < options.bias.size(); ++e) {
    if (detail::is_finite(options.bias[e])) continue;
    return error(errc::non_finite, {"route: expected a finite bias, got ", options.bias[e], " for expert ", e});
  }
  const std::size_t k = options.experts_per_token;
  for (std::size_t t = 0; t < logits.size() / experts; ++t) {
    const std::span<const float> row = logits.subspan(t * experts, experts);
    bool below_infinity = true, any_finite = false;
    for (const float logit : row) {
      below_infinity = below_infinity && logit <= std::numeric_limits<float>::max();  // false for NaN too
      any_finite = any_finite || logit >= std::numeric_limits<float>::lowest();
    }
    if (!below_infinity || !any_finite) {
      return error(errc::non_finite, {"route: expected logits below infinity and one finite at least, got ",
                                      below_infinity ? "none that is finite" : "NaN or infinity", " for token ", t});
    }
    detail::route_token(row, options, ids.subspan(t * k, k), weights.subspan(t * k, k));
  }
  return {};
}
inline void route(std::span<const float> logits, std::size_t experts, const router_options& options,
                  std::span<std::uint16_t> ids, std::span<float> weights) {
  try_route(logits, experts, options, ids, weights).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
