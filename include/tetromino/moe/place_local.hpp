#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"                   // tetromino::result, tetromino::error
#include "search/copies/node_spread.hpp"  // detail::has_room_for
#include "search/layers/node_mask.hpp"    // detail::with_mask_for, detail::most_nodes
#include "search/local_search.hpp"        // detail::local_search
#include "search/local_options.hpp"       // local_options, local_plan
#include "place.hpp"                      // detail::check_place_shape
#include "placement.hpp"                  // try_validate
#include "topology.hpp"                   // topology
#include "trace.hpp"                      // trace_view, phase

#include <algorithm>  // std::fill, std::max
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::uint64_t
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

namespace detail::inline TETROMINO_ISA {

/// Options that can be told to be wrong before there is a trace.
[[nodiscard]] inline result<void> check_local_options(std::size_t layers, std::size_t experts, const topology& t,
                                                      const local_options& o) {
  if (auto ok = check_place_shape(layers, experts, t); !ok) return ok;
  if (t.nodes() > most_nodes) {
    return error(errc::invalid_argument, {"local: expected at most ", most_nodes, " nodes, got ", t.nodes()});
  }
  const auto weight = [](double x) { return std::isfinite(x) && x >= 0; };
  if (!weight(o.node_weight) || !weight(o.pair_weight) || !(o.node_weight + o.pair_weight > 0) ||
      !std::isfinite(o.node_weight + o.pair_weight)) {
    return error(errc::invalid_argument,
                 {"local: expected weights of 0 or more, not both 0, got ", o.node_weight, " and ", o.pair_weight});
  }
  const auto limit = [](double x) { return x == 0 || (std::isfinite(x) && x >= 1); };
  if (!limit(o.node_imbalance) || !limit(o.gpu_imbalance)) {
    return error(errc::invalid_argument, {"local: expected limits of 1 or more, or 0 for none, got ", o.node_imbalance,
                                          " per node and ", o.gpu_imbalance, " per GPU"});
  }
  if (!std::isfinite(o.token_budget) || o.token_budget < 1) {
    return error(errc::invalid_argument, {"local: expected a token budget of 1 or more, got ", o.token_budget});
  }
  if (!weight(o.price_per_move) || !weight(o.effort) || !weight(o.time_limit_seconds) || o.effort > 1e4 ||
      o.price_per_move > 1e9) {
    return error(errc::invalid_argument, "local: expected price, effort and time limit to be finite and 0 or more");
  }
  if (o.sample_tokens == 0 || o.sample_tokens > (std::size_t{1} << 22) || o.sample_requests == 0) {
    return error(errc::invalid_argument, {"local: expected a sample of 1 to 4194304 tokens of at least 1 request, "
                                          "got ",
                                          o.sample_tokens, " of ", o.sample_requests});
  }
  if (o.nodes_per_expert == 0 || (o.nodes_per_expert > 1 && !o.replicas)) {
    return error(errc::invalid_argument,
                 {"local: expected copies on at least 1 node, and replicas for more, got ", o.nodes_per_expert});
  }
  if (!has_room_for(t, experts, o.nodes_per_expert)) {
    return error(errc::infeasible, {"local: expected room for ", experts, " experts on ", o.nodes_per_expert,
                                    " nodes each, got ", t.slots(), " slots on ", t.nodes(), " nodes"});
  }
  for (const std::uint32_t l : o.layers) {
    if (l >= layers) {
      return error(errc::invalid_argument, {"local: expected layers below ", layers, ", got ", l});
    }
  }
  return {};
}

[[nodiscard]] inline result<void> check_local(const trace_view& calibration, const topology& t,
                                              const local_options& o) {
  const routing_shape& s = calibration.shape;
  if (auto ok = check_local_options(s.layers, s.experts, t, o); !ok) return ok;
  if (s.experts_per_token == 0 || s.experts_per_token > 64) {
    return error(errc::invalid_argument, {"local: expected 1 to 64 experts per token, got ", s.experts_per_token});
  }
  if (calibration.tokens(o.served) == 0) {
    return error(errc::invalid_argument, "local: expected tokens of the phase that options.served names, got none");
  }
  if (o.start != nullptr) {
    if (o.start->layers() != s.layers || o.start->experts() != s.experts) {
      return error(errc::shape_mismatch, {"local: expected a start of ", s.layers, " layers × ", s.experts,
                                          " experts, got ", o.start->layers(), " × ", o.start->experts()});
    }
    if (auto ok = try_validate(*o.start, t, {.one_copy_per_gpu = false, .each_expert = !o.layers.empty()}); !ok)
      return ok;
  }
  if (!o.layers.empty() && (o.start == nullptr || !o.replicas)) {
    return error(errc::invalid_argument, "local: expected a start, with replicas, where only some layers may change");
  }
  return {};
}

/// Copies of `to` on nodes that have none of their expert in `from`.
[[nodiscard]] inline std::size_t copies_moved(const placement& from, const placement& to, const topology& t) {
  std::size_t moved = 0;
  std::vector<bool> had(from.experts() * t.nodes());
  for (std::size_t l = 0; l < from.layers(); ++l) {
    std::fill(had.begin(), had.end(), false);
    const auto cell = [&](std::int32_t e, std::size_t s) {
      return static_cast<std::size_t>(e) * t.nodes() + t.node_of_slot(s);
    };
    for (std::size_t s = 0; s < t.slots(); ++s) {
      if (from.layer(l)[s] != empty_slot) had[cell(from.layer(l)[s], s)] = true;
    }
    for (std::size_t s = 0; s < t.slots(); ++s) {
      if (to.layer(l)[s] == empty_slot || had[cell(to.layer(l)[s], s)]) continue;
      had[cell(to.layer(l)[s], s)] = true;  // a second copy on the node comes from the first
      ++moved;
    }
  }
  return moved;
}

/// What a plan costs for the weights given, overload and moves included: to compare plans of one problem.
[[nodiscard]] inline double local_value(const local_plan& plan, const local_options& o, const routing_shape& shape) {
  const auto k = static_cast<double>(shape.experts_per_token);
  const double over = o.node_imbalance == 0 ? 0 : std::max(0.0, plan.reached.node_imbalance - o.node_imbalance);
  const double moves = o.price_per_move / 1000 * static_cast<double>(plan.copies_moved);
  return o.node_weight * plan.reached.nodes_per_token + o.pair_weight * k * plan.reached.remote_pair_fraction +
         (o.node_weight + o.pair_weight) * (k * over + moves / static_cast<double>(shape.layers));
}

/// Whether a plan keeps each expert, and on enough nodes.
[[nodiscard]] inline bool is_whole(const local_plan& plan, const topology& t, const local_options& o) {
  return try_validate(plan.experts, t, {.one_copy_per_gpu = false, .nodes_per_expert = o.nodes_per_expert}).has_value();
}

/// The best of a search from the plan in force, that plan with requests grouped for it, and where moves cost nothing,
/// of a search that forgets it.
template <class Mask>
[[nodiscard]] local_plan search_from_start(const trace_view& calibration, const topology& t,
                                           const local_options& options) {
  const auto value = [&](const local_plan& p) { return local_value(p, options, calibration.shape); };
  local_plan best = local_search<Mask>(calibration, t, options, search_variation(options)).run();
  search_variation still(options);
  still.max_proposals = 1;  // less than one per step: only requests move
  still.is_watched = false;
  local_plan kept = local_search<Mask>(calibration, t, options, still).run();
  if (is_whole(kept, t, options) && !(value(best) < value(kept))) best = std::move(kept);
  if (options.price_per_move > 0 || !options.layers.empty()) return best;
  search_variation cold(options);
  cold.start = nullptr;
  local_plan anew = local_search<Mask>(calibration, t, options, cold).run();
  if (value(anew) < value(best)) {
    anew.copies_moved = copies_moved(*options.start, anew.experts, t);
    best = std::move(anew);
  }
  return best;
}

/// One search, or where a problem is so small that a search may miss what is near, the best of eight.
template <class Mask>
[[nodiscard]] local_plan search_local(const trace_view& calibration, const topology& t, const local_options& options) {
  if (options.start != nullptr) return search_from_start<Mask>(calibration, t, options);
  local_plan best = local_search<Mask>(calibration, t, options, search_variation(options)).run();
  if (calibration.tokens(options.served) * calibration.shape.layers > 256 || t.slots() > 32 || options.progress ||
      options.time_limit_seconds > 0 || options.max_proposals > 0) {
    return best;
  }
  search_variation again(options);
  for (int i = 1; i < 8; ++i) {
    again.seed = again.seed * 6364136223846793005u + 1442695040888963407u;
    local_plan other = local_search<Mask>(calibration, t, options, again).run();
    if (local_value(other, options, calibration.shape) < local_value(best, options, calibration.shape))
      best = std::move(other);
  }
  return best;
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Places experts and groups requests together so that tokens stay near, within an imbalance limit: grouping and layers
/// are improved in turns, layers by annealing on exact counts of a sample of tokens. Requests that were not sampled are
/// assigned to the placement found. Where some nodes are nearer than others (topology::with_node_costs), nodes that are
/// alike change places in the end, so that those that send each other much are near; the search itself counts all other
/// nodes alike. Where requests are of several domains, their tokens are weighed so that the part which chance has in
/// the domains' shares is taken out; give them one domain to plan for just these requests. From a plan in force at no
/// price, the plan is never worse than without one, if all layers may change. Each thread of the executor keeps 12
/// bytes × experts × (nodes + 1)²: 13 MB for 256 experts on 64 nodes, 200 MB on 256. Errors: fewer slots than experts,
/// no room for copies on that many nodes, more than 256 nodes, no token of the served phase, options out of range, a
/// start of another shape. Precondition: the view is valid (a trace made it). (arXiv 2604.23150)
[[nodiscard]] inline result<local_plan> try_local(const trace_view& calibration, const topology& t,
                                                  const local_options& options = {}) {
  if (auto ok = detail::check_local(calibration, t, options); !ok) return ok.error();
  local_plan plan = detail::with_mask_for(
      t.nodes(), [&]<class Mask>() { return detail::search_local<Mask>(calibration, t, options); });
  if (!detail::is_whole(plan, t, options)) {
    return error(errc::infeasible, {"local: expected room for copies of each expert on ", options.nodes_per_expert,
                                    " nodes, found none"});
  }
  return plan;
}
[[nodiscard]] inline local_plan local(const trace_view& calibration, const topology& t,
                                      const local_options& options = {}) {
  return try_local(calibration, t, options).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
