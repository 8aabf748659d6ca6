#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"                    // tetromino::result, tetromino::error
#include "search/requests/assignment.hpp"  // detail::token_room
#include "place.hpp"                       // detail::check_place_shape
#include "placement.hpp"                   // placement
#include "topology.hpp"                    // topology, detail::node_speeds
#include "trace.hpp"                       // trace_view, phase

#include <algorithm>  // std::fill, std::max, std::max_element, std::min, std::sort
#include <bit>        // std::countr_zero
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::uint32_t, std::uint64_t
#include <limits>     // std::numeric_limits
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What `exact` looks for: the objective and the limits of `local`, one copy of each expert.
struct exact_options {
  double node_weight = 1;             ///< of a visit to another node
  double pair_weight = 0;             ///< of a remote pair
  double node_imbalance = 0;          ///< max / mean of pairs over nodes, in each layer; 0: no limit
  phase served = phase::decode;       ///< whose traffic and load is counted
  double token_budget = 1.05;         ///< max / mean of tokens over source nodes, by the speed of their live GPUs
  std::uint64_t max_steps = 1 << 30;  ///< experts put on a node by way of trial, before the search gives up
};

/// The best plan there is.
struct exact_plan {
  placement experts;
  std::vector<std::uint32_t> source_of_request;  ///< [requests of the view] node
  double cost = 0;                               ///< node_weight × visits + pair_weight × remote pairs, of all tokens
  std::uint64_t steps = 0;                       ///< experts that were put on a node by way of trial
};

namespace detail::inline TETROMINO_ISA {

/// Branch and bound over sources of requests, and for each choice of them over the nodes of experts, layer by layer.
class exact_search {
 public:
  exact_search(const trace_view& served, const topology& t, const exact_options& options)
      : served_(served), topology_(t), options_(options), nodes_(t.nodes()) {
    std::uint64_t largest = 0;
    for (const request& r : served.requests) {
      tokens_of_.push_back(r.range(options.served).size());
      largest = std::max(largest, tokens_of_.back());
      for (std::uint64_t i = 0; i < tokens_of_.back(); ++i) {
        token_.push_back(r.range(options.served).first + i);
        request_of_token_.push_back(tokens_of_.size() - 1);
      }
    }
    const std::vector<double> speeds = node_speeds(t);
    room_ = token_room(token_.size(), largest, speeds, options.token_budget);
    const std::size_t pairs = token_.size() * served.shape.experts_per_token;
    double speed = 0;
    for (const double s : speeds) speed += s;
    for (const double s : speeds) {
      load_limits_.push_back(
          options.node_imbalance == 0 || s == 0
              ? pairs
              : static_cast<std::size_t>(options.node_imbalance * static_cast<double>(pairs) / (speed / s)));
    }
    source_.assign(tokens_of_.size(), 0);
    seen_.assign(token_.size(), 0);
    make_layers();
    held_.assign(layers_.size(), std::vector<std::uint32_t>(served.shape.experts, 0));
  }

  /// False if the steps ran out.
  [[nodiscard]] bool run() {
    assign(0, 0);
    return steps_ <= options_.max_steps;
  }
  [[nodiscard]] bool found() const noexcept { return best_ < infinity; }

  [[nodiscard]] exact_plan plan() const {
    exact_plan out{placement(layers_.size(), served_.shape.experts, topology_.slots()), best_source_, best_, steps_};
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      std::vector<std::size_t> next;
      for (std::size_t n = 0; n < nodes_; ++n) next.push_back(topology_.first_slot_of_node(n));
      for (std::size_t e = 0; e < served_.shape.experts; ++e) {
        out.experts.layer(l)[next[best_held_[l][e]]++] = static_cast<std::int32_t>(e);
      }
    }
    return out;
  }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();

  struct layer {
    std::vector<std::uint32_t> order;                // experts, the most used first
    std::vector<std::vector<std::uint32_t>> tokens;  // [experts] that use it
    std::vector<double> least_pairs;                 // [experts + 1] remote pairs of those from here on in `order`
    std::vector<std::size_t> load, held;             // [nodes]
  };

  void make_layers() {
    const auto& [layers, experts, k] = served_.shape;
    layers_.resize(layers);
    for (std::size_t l = 0; l < layers; ++l) {
      layer& here = layers_[l];
      here.tokens.resize(experts);
      for (std::size_t t = 0; t < token_.size(); ++t) {
        for (const std::uint16_t e : served_.experts_of(token_[t], l)) {
          if (e != no_expert) here.tokens[e].push_back(static_cast<std::uint32_t>(t));
        }
      }
      for (std::size_t e = 0; e < experts; ++e) here.order.push_back(static_cast<std::uint32_t>(e));
      std::sort(here.order.begin(), here.order.end(), [&](std::uint32_t a, std::uint32_t b) {
        const std::size_t x = here.tokens[a].size(), y = here.tokens[b].size();
        return x != y ? x > y : a < b;
      });
      here.least_pairs.assign(experts + 1, 0.0);
      here.load.assign(nodes_, 0);
      here.held.assign(nodes_, 0);
    }
  }

  // Tries all nodes for request r and those after it; of nodes that are alike, only the first untouched one.
  void assign(std::size_t r, std::size_t touched) {
    if (steps_ > options_.max_steps) return;
    if (r == tokens_of_.size()) {
      bound_pairs();
      descend(0, 0, 0.0);
      return;
    }
    const std::size_t last = topology_.is_uniform() ? std::min(nodes_, touched + 1) : nodes_;
    for (std::size_t n = 0; n < last; ++n) {
      const auto tokens = static_cast<std::int64_t>(tokens_of_[r]);
      if (room_[n] < tokens) continue;
      room_[n] -= tokens;
      source_[r] = static_cast<std::uint32_t>(n);
      assign(r + 1, std::max(touched, n + 1));
      room_[n] += tokens;
    }
  }

  // Remote pairs that experts cannot do without for these sources: a bound that adds up over experts and layers.
  void bound_pairs() {
    double later = 0;
    std::vector<std::size_t> used(nodes_);
    for (std::size_t l = layers_.size(); l-- > 0;) {
      layer& here = layers_[l];
      here.least_pairs.back() = later;
      for (std::size_t i = here.order.size(); i-- > 0;) {
        std::fill(used.begin(), used.end(), 0);
        const std::vector<std::uint32_t>& tokens = here.tokens[here.order[i]];
        for (const std::uint32_t t : tokens) ++used[source_[request_of_token_[t]]];
        later +=
            options_.pair_weight * static_cast<double>(tokens.size() - *std::max_element(used.begin(), used.end()));
        here.least_pairs[i] = later;
      }
    }
  }

  // Puts expert `i` (in order) of a layer on each node, and goes on.
  void descend(std::size_t l, std::size_t i, double cost) {
    if (l == layers_.size()) {
      best_ = cost;
      best_source_ = source_;
      best_held_ = held_;
      return;
    }
    layer& here = layers_[l];
    if (i == here.order.size()) {
      const std::vector<std::uint64_t> seen = seen_;
      seen_.assign(seen_.size(), 0);
      descend(l + 1, 0, cost);
      seen_ = seen;
      return;
    }
    const std::vector<std::uint32_t>& tokens = here.tokens[here.order[i]];
    for (std::size_t n = 0; n < nodes_; ++n) {
      if (here.held[n] == topology_.slots_on_node(n) || here.load[n] + tokens.size() > load_limits_[n]) continue;
      if (++steps_ > options_.max_steps) return;
      const std::uint64_t bit = std::uint64_t{1} << n;
      std::size_t pairs = 0, visits = 0;
      std::uint64_t fresh = 0;  // tokens whose first expert on this node this is, by place in the list
      for (std::size_t j = 0; j < tokens.size(); ++j) {
        if (source_[request_of_token_[tokens[j]]] == n) continue;
        ++pairs;
        if ((seen_[tokens[j]] & bit) != 0) continue;
        ++visits;
        seen_[tokens[j]] |= bit;
        fresh |= std::uint64_t{1} << j;
      }
      const double now =
          cost + options_.node_weight * static_cast<double>(visits) + options_.pair_weight * static_cast<double>(pairs);
      if (now + here.least_pairs[i + 1] < best_ - 1e-9) {
        ++here.held[n];
        here.load[n] += tokens.size();
        held_[l][here.order[i]] = static_cast<std::uint32_t>(n);
        descend(l, i + 1, now);
        --here.held[n];
        here.load[n] -= tokens.size();
      }
      for (; fresh != 0; fresh &= fresh - 1) seen_[tokens[static_cast<std::size_t>(std::countr_zero(fresh))]] &= ~bit;
    }
  }

  const trace_view& served_;
  const topology& topology_;
  const exact_options& options_;
  std::size_t nodes_;
  std::vector<std::uint64_t> tokens_of_;  // [requests]
  std::vector<std::uint64_t> token_;      // [served tokens] number in the trace
  std::vector<std::size_t> request_of_token_;
  std::vector<std::int64_t> room_;        // [nodes] tokens that still fit
  std::vector<std::size_t> load_limits_;  // [nodes] pairs
  std::vector<layer> layers_;
  std::vector<std::uint32_t> source_, best_source_;           // [requests]
  std::vector<std::vector<std::uint32_t>> held_, best_held_;  // [layers, experts] node
  std::vector<std::uint64_t> seen_;                           // [served tokens] nodes visited in this layer
  double best_ = infinity;
  std::uint64_t steps_ = 0;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The plan of least traffic that there is, one copy per expert, by branch and bound: to tell how far `local` is from
/// it on small cases. All other nodes count alike, whatever topology::node_cost says. The time grows as
/// nodes^(experts + requests). Errors: more than 8 nodes, 12 experts, 12 requests
/// or 64 served tokens, fewer slots than experts, no served token, options out of range, limits that no plan keeps,
/// more steps than `max_steps`. Precondition: the view is valid (a trace made it).
[[nodiscard]] inline result<exact_plan> try_exact(const trace_view& served, const topology& t,
                                                  const exact_options& options = {}) {
  if (auto ok = detail::check_place_shape(served.shape.layers, served.shape.experts, t); !ok) return ok.error();
  const std::uint64_t tokens = served.tokens(options.served);
  if (t.nodes() > 8 || served.shape.experts > 12 || served.requests.size() > 12 || tokens > 64) {
    return error(
        errc::invalid_argument,
        detail::text("exact: expected at most 8 nodes, 12 experts, 12 requests and 64 tokens (else: local), got ",
                     t.nodes(), ", ", served.shape.experts, ", ", served.requests.size(), " and ", tokens));
  }
  if (tokens == 0) {
    return error(errc::invalid_argument, "exact: expected tokens of the phase that options.served names, got none");
  }
  const auto weight = [](double x) { return std::isfinite(x) && x >= 0; };
  if (!weight(options.node_weight) || !weight(options.pair_weight) ||
      !(options.node_weight + options.pair_weight > 0)) {
    return error(errc::invalid_argument, {"exact: expected weights of 0 or more, not both 0, got ", options.node_weight,
                                          " and ", options.pair_weight});
  }
  if ((options.node_imbalance != 0 && !(std::isfinite(options.node_imbalance) && options.node_imbalance >= 1)) ||
      !(std::isfinite(options.token_budget) && options.token_budget >= 1)) {
    return error(errc::invalid_argument,
                 {"exact: expected a limit of 1 or more (or 0) and a token budget of 1 or more, got ",
                  options.node_imbalance, " and ", options.token_budget});
  }
  detail::exact_search search(served, t, options);
  if (!search.run()) {
    return error(errc::invalid_argument, {"exact: expected to end within ", options.max_steps, " steps, and did not"});
  }
  if (!search.found()) {
    return error(errc::infeasible, {"exact: expected limits that some plan keeps, got a node imbalance of ",
                                    options.node_imbalance, " and a token budget of ", options.token_budget});
  }
  return search.plan();
}
[[nodiscard]] inline exact_plan exact(const trace_view& served, const topology& t, const exact_options& options = {}) {
  return try_exact(served, t, options).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
