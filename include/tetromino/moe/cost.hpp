#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"   // tetromino::result, tetromino::error
#include "loads.hpp"      // max_over_mean
#include "placement.hpp"  // placement
#include "replica.hpp"    // replica_chooser, step_chooser
#include "topology.hpp"   // topology
#include "trace.hpp"      // trace_view, phase

#include <algorithm>  // std::all_of, std::fill, std::max, std::max_element, std::sort
#include <cmath>      // std::ceil, std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <optional>   // std::optional
#include <span>       // std::span
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// How activations travel to other nodes.
enum class dispatch_copies : std::uint8_t {
  per_node,    ///< one copy per token and node, fanned out inside that node (DeepEP "normal")
  per_expert,  ///< one copy per token and expert (plain all-to-all, DeepEP "low latency")
};

/// What the sources of requests are numbers of.
enum class source_kind : std::uint8_t {
  node,  ///< attention is spread over a node; its GPUs send the node's tokens in turn, those without slots none
  gpu,   ///< attention runs on one GPU per request
};

/// How a placement is judged.
struct cost_options {
  phase tokens = phase::decode;  ///< which tokens are served
  replica_options replicas{};    ///< which copies serve
  dispatch_copies copies = dispatch_copies::per_node;
  source_kind sources = source_kind::node;
  std::size_t hidden = 7168;                 ///< values per activation
  double dispatch_bytes_per_value = 1.0;     ///< FP8; 0.53 for NVFP4 with its scales
  double combine_bytes_per_value = 2.0;      ///< BF16
  std::size_t tokens_per_step = 0;           ///< tokens served at once, in the order of the view; 0: all in one step
  double bytes_per_expert = 0;               ///< weights that a GPU reads for each expert activated in a layer
  double memory_bytes_per_second = 3.35e12;  ///< how fast (H100)
};

/// A figure of each step, summed up.
struct step_figures {
  double mean = 0;
  double p99 = 0;  ///< what 99 of 100 steps stay within
  double worst = 0;
};

/// Bytes that one direction of the exchange moves, all layers together.
struct exchange_bytes {
  double dispatch = 0;
  double combine = 0;

  [[nodiscard]] TETROMINO_ABI double total() const noexcept { return dispatch + combine; }
};

/// What serving a trace under a placement costs. "Pair" = (token, expert) in one layer.
struct cost_report {
  std::size_t layers = 0;
  std::size_t nodes = 0;
  std::size_t gpus = 0;
  std::uint64_t tokens = 0;         ///< tokens served: those with an expert in some layer
  std::uint64_t pairs = 0;          ///< choices of experts by them
  std::uint64_t remote_pairs = 0;   ///< pairs whose replica is on another node than the token
  std::uint64_t remote_visits = 0;  ///< (token, layer, other node) triples with at least one pair

  double node_imbalance =
      0;  ///< max / mean of pairs per node by its speed, mean over layers; nodes without slots left out
  double worst_node_imbalance = 0;  ///< the same in the worst layer
  double gpu_imbalance =
      0;  ///< max / mean of pairs per GPU by its speed, mean over layers; GPUs without slots left out
  double worst_gpu_imbalance = 0;  ///< the same in the worst layer

  /// What each step pays, mean over layers. A last step of fewer tokens is left out, unless it is the only one.
  std::size_t steps = 0;
  step_figures step_node_imbalance;  ///< max / mean of pairs per node
  step_figures step_gpu_imbalance;   ///< max / mean of pairs per GPU
  step_figures step_activated;       ///< experts whose weights the busiest GPU reads

  /// Activations sent to other nodes, each at its topology::node_cost.
  double copies_cost = 0;

  exchange_bytes between_nodes;
  exchange_bytes inside_nodes;
  double dispatch_seconds = 0;  ///< Σ over layers of the busiest link, first between, then inside nodes, plus
                                ///< latencies; a byte to another node takes the ports of both by its node_cost
  double combine_seconds = 0;
  double weight_seconds = 0;  ///< Σ over steps and layers of what the busiest GPU reads of experts' weights

  std::vector<std::uint64_t> visits_of_layer;  ///< [layers] remote_visits
  std::vector<std::uint64_t> pairs_on_gpu;     ///< [layers, gpus]
  std::vector<std::uint64_t> copies_between;   ///< [nodes, nodes] activations sent from row to column, all layers

  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI cost_report() = default;
  TETROMINO_ABI cost_report(const cost_report&) = default;
  TETROMINO_ABI cost_report(cost_report&&) = default;
  TETROMINO_ABI cost_report& operator=(const cost_report&) = default;
  TETROMINO_ABI cost_report& operator=(cost_report&&) = default;

  /// Remote pairs as a fraction of all pairs.
  [[nodiscard]] TETROMINO_ABI double remote_pair_fraction() const noexcept {
    return pairs == 0 ? 0 : static_cast<double>(remote_pairs) / static_cast<double>(pairs);
  }
  /// Other nodes that one token's activation goes to in one layer, on average.
  [[nodiscard]] TETROMINO_ABI double nodes_per_token() const noexcept {
    return tokens == 0 ? 0 : static_cast<double>(remote_visits) / static_cast<double>(tokens * layers);
  }
  /// What sending one token's activation to other nodes costs in one layer, on average, by topology::node_cost: with
  /// costs of 1 and one copy per node, nodes_per_token().
  [[nodiscard]] TETROMINO_ABI double cost_per_token() const noexcept {
    return tokens == 0 ? 0 : copies_cost / static_cast<double>(tokens * layers);
  }
  /// Pairs per node of one layer: [nodes].
  [[nodiscard]] TETROMINO_ABI std::vector<std::uint64_t> pairs_on_nodes(std::size_t layer, const topology& t) const {
    std::vector<std::uint64_t> out(nodes, 0);
    for (std::size_t g = 0; g < gpus; ++g) out[t.node_of_gpu(g)] += pairs_on_gpu[layer * gpus + g];
    return out;
  }
};

namespace detail::inline TETROMINO_ISA {

// Activations that cross each kind of link in one layer. Combine sends the same ones back.
struct link_counts {
  std::vector<double> node_out, node_in;       // [nodes] to and from other nodes, each at its node_cost
  std::vector<std::uint64_t> gpu_out, gpu_in;  // [gpus] to and from GPUs of the same node
  std::uint64_t between = 0, inside = 0;

  link_counts(std::size_t nodes, std::size_t gpus) : node_out(nodes), node_in(nodes), gpu_out(gpus), gpu_in(gpus) {}

  [[nodiscard]] double seconds(const topology& t, const live_gpus& live, double bytes_per_copy, double steps) const {
    double busiest_node = 0, busiest_gpu = 0;
    for (std::size_t n = 0; n < node_out.size(); ++n) {
      busiest_node = std::max(busiest_node, std::max(node_out[n], node_in[n]) / static_cast<double>(live.of(n).size()));
    }
    for (std::size_t g = 0; g < gpu_out.size(); ++g) {
      busiest_gpu = std::max(busiest_gpu, static_cast<double>(std::max(gpu_out[g], gpu_in[g])));
    }
    const fabric& f = t.links();
    return busiest_node * bytes_per_copy / f.between.bytes_per_second +
           (between > 0 ? steps * f.between.latency_seconds : 0) +
           busiest_gpu * bytes_per_copy / f.inside.bytes_per_second +
           (inside > 0 ? steps * f.inside.latency_seconds : 0);
  }
};

[[nodiscard]] inline result<void> check_limits(const replica_options& r) {
  const auto usable = [](double x) { return std::isfinite(x) && x >= 0; };
  if (usable(r.node_limit) && usable(r.gpu_limit)) return {};
  return error(errc::invalid_argument,
               {"cost: expected limits of 0 or more per node and GPU, got ", r.node_limit, " and ", r.gpu_limit});
}

[[nodiscard]] inline result<void> check_cost_input(const trace_view& served, const placement& p, const topology& t,
                                                   std::span<const std::uint32_t> source_of_request,
                                                   const cost_options& options) {
  const routing_shape& s = served.shape;
  if (p.layers() != s.layers || p.experts() != s.experts) {
    return error(errc::shape_mismatch, {"cost: expected a placement of ", s.layers, " layers × ", s.experts,
                                        " experts as in the trace, got ", p.layers(), " × ", p.experts()});
  }
  if (auto ok = try_validate(p, t, {.one_copy_per_gpu = false}); !ok) return ok;
  if (source_of_request.size() != served.requests.size()) {
    return error(errc::shape_mismatch, {"cost: expected a source for each of ", served.requests.size(),
                                        " requests, got ", source_of_request.size()});
  }
  const std::size_t sources = options.sources == source_kind::node ? t.nodes() : t.gpus();
  for (std::size_t r = 0; r < source_of_request.size(); ++r) {
    if (source_of_request[r] >= sources) {
      return error(errc::invalid_argument,
                   {"cost: expected sources below ", sources, ", got ", source_of_request[r], " for request ", r});
    }
  }
  const auto usable = [](double x) { return std::isfinite(x) && x >= 0; };
  if (auto ok = check_limits(options.replicas); !ok) return ok;
  if (is_step_choice(options.replicas.choice) && options.tokens_per_step == 0) {
    return error(errc::invalid_argument,
                 "cost: expected tokens per step where copies are chosen for whole steps, got 0");
  }
  if (!usable(options.bytes_per_expert) ||
      !(usable(options.memory_bytes_per_second) && options.memory_bytes_per_second > 0)) {
    return error(errc::invalid_argument, {"cost: expected 0 or more bytes per expert at more than 0 bytes/s, got ",
                                          options.bytes_per_expert, " at ", options.memory_bytes_per_second});
  }
  if (!usable(options.dispatch_bytes_per_value) || !usable(options.combine_bytes_per_value)) {
    return error(errc::invalid_argument, {"cost: expected 0 or more bytes per value, got ",
                                          options.dispatch_bytes_per_value, " and ", options.combine_bytes_per_value});
  }
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

/// Serves tokens step by step, and adds up what that costs.
class cost_counter {
 public:
  cost_counter(const trace_view& served, const placement& p, const topology& t, const cost_options& options)
      : served_(served),
        topology_(t),
        node_costs_(t.node_costs()),
        live_(t),
        options_(options),
        links_(p.layers(), link_counts(t.nodes(), t.gpus())),
        node_seen_(t.nodes(), 0),
        gpu_seen_(t.gpus(), 0),
        activated_(p.experts() * t.gpus(), 0),
        step_pairs_(t.gpus(), 0),
        step_experts_(t.gpus(), 0) {
    if (is_step_choice(options.replicas.choice)) {
      by_step_.emplace(p, t, options.replicas.choice);
    } else {
      by_token_.emplace(p, t, options.replicas);
    }
    report_.layers = p.layers();
    report_.nodes = t.nodes();
    report_.gpus = t.gpus();
    report_.visits_of_layer.assign(p.layers(), 0);
    report_.pairs_on_gpu.assign(p.layers() * t.gpus(), 0);
    report_.copies_between.assign(t.nodes() * t.nodes(), 0);
    for (std::size_t g = 0; g < t.gpus(); ++g) node_of_gpu_.push_back(static_cast<std::uint32_t>(t.node_of_gpu(g)));
  }

  [[nodiscard]] cost_report run(std::span<const std::uint32_t> source_of_request) {
    const bool on_node = options_.sources == source_kind::node;
    // without steps, tokens are still taken up in pieces, to need little memory
    const std::size_t piece = options_.tokens_per_step == 0 ? 4096 : options_.tokens_per_step;
    for (std::size_t r = 0; r < served_.requests.size(); ++r) {
      const std::uint32_t source = source_of_request[r];
      const std::size_t node = on_node ? source : node_of_gpu_[source];
      const std::span<const std::uint32_t> gpus = live_.of(node);
      const token_range range = served_.requests[r].range(options_.tokens);
      for (std::uint64_t token = range.first; token < range.last; ++token) {
        const std::span<const std::uint16_t> ids = served_.token(token);
        if (std::all_of(ids.begin(), ids.end(), [](std::uint16_t e) { return e == no_expert; })) continue;
        step_.push_back({ids.data(), on_node ? gpus[token % gpus.size()] : source});
        if (step_.size() == piece) serve();
      }
    }
    if (!step_.empty()) serve();
    return finish();
  }

 private:
  struct step_token {
    const std::uint16_t* ids;
    std::uint32_t home_gpu;
  };

  void serve() {
    const std::size_t k = served_.shape.experts_per_token, layers = report_.layers;
    chosen_.resize(step_.size() * k);
    double node_imbalance = 0, gpu_imbalance = 0, activated = 0;
    for (std::size_t l = 0; l < layers; ++l) {
      choose(l);
      if (options_.tokens_per_step != 0) clear_step();
      for (std::size_t i = 0; i < step_.size(); ++i) {
        add(l, step_[i], std::span<const std::uint32_t>(chosen_).subspan(i * k, k));
      }
      if (options_.tokens_per_step == 0) continue;
      node_imbalance += max_over_mean(on_nodes(step_pairs_), [&](std::size_t n) { return topology_.speed_of_node(n); });
      gpu_imbalance += max_over_mean(
          step_pairs_, [&](std::size_t g) { return topology_.slots_on_gpu(g) > 0 ? topology_.speed(g) : 0; });
      const auto most = static_cast<double>(*std::max_element(step_experts_.begin(), step_experts_.end()));
      activated += most;
      report_.weight_seconds += most * options_.bytes_per_expert / options_.memory_bytes_per_second;
    }
    report_.tokens += step_.size();
    const auto n = static_cast<double>(layers);
    if (options_.tokens_per_step != 0 && (step_.size() == options_.tokens_per_step || node_imbalance_.empty())) {
      node_imbalance_.push_back(node_imbalance / n);
      gpu_imbalance_.push_back(gpu_imbalance / n);
      activated_experts_.push_back(activated / n);
    }
    step_.clear();
  }

  void choose(std::size_t l) {
    const std::size_t k = served_.shape.experts_per_token;
    if (by_token_) {
      for (std::size_t i = 0; i < step_.size(); ++i) {
        by_token_->choose(l, {step_[i].ids + l * k, k}, step_[i].home_gpu, std::span(chosen_).subspan(i * k, k));
      }
      return;
    }
    ids_.clear();
    for (const step_token& t : step_) ids_.insert(ids_.end(), t.ids + l * k, t.ids + (l + 1) * k);
    by_step_->choose(l, ids_, chosen_);
  }
  void clear_step() {
    ++step_number_;
    std::fill(step_pairs_.begin(), step_pairs_.end(), 0);
    std::fill(step_experts_.begin(), step_experts_.end(), 0);
  }

  // One token in one layer.
  void add(std::size_t l, const step_token& token, std::span<const std::uint32_t> gpus) {
    const std::size_t nodes = report_.nodes, k = gpus.size();
    const std::uint32_t home_node = node_of_gpu_[token.home_gpu];
    const bool per_node = options_.copies == dispatch_copies::per_node;
    link_counts& link = links_[l];
    ++now_;
    for (std::size_t i = 0; i < k; ++i) {
      const std::uint32_t gpu = gpus[i];
      if (gpu == no_gpu) continue;
      const std::uint32_t node = node_of_gpu_[gpu];
      const bool remote = node != home_node;
      const bool new_node = node_seen_[node] != now_;
      const bool new_gpu = gpu_seen_[gpu] != now_;
      node_seen_[node] = now_;
      gpu_seen_[gpu] = now_;
      ++report_.pairs;
      ++report_.pairs_on_gpu[l * report_.gpus + gpu];
      report_.remote_pairs += remote ? 1U : 0U;
      report_.visits_of_layer[l] += remote && new_node ? 1U : 0U;
      if (remote && (new_node || !per_node)) {
        ++report_.copies_between[home_node * nodes + node];
        const double way = node_costs_.empty() ? 1.0 : node_costs_[home_node * nodes + node];
        link.node_out[home_node] += way;
        link.node_in[node] += way;
        ++link.between;
      }
      // inside a node, an activation starts where it is or where it landed (the GPU of the same local number)
      const std::uint32_t landed = remote ? live_.counterpart(token.home_gpu, node) : token.home_gpu;
      if (gpu != landed && (per_node ? new_gpu : !remote)) {
        ++link.gpu_out[landed];
        ++link.gpu_in[gpu];
        ++link.inside;
      }
      if (options_.tokens_per_step == 0) continue;
      ++step_pairs_[gpu];
      std::uint64_t& read_in = activated_[token.ids[l * k + i] * report_.gpus + gpu];
      step_experts_[gpu] += read_in == step_number_ ? 0U : 1U;
      read_in = step_number_;
    }
  }

  [[nodiscard]] std::vector<std::uint64_t> on_nodes(std::span<const std::uint64_t> gpus) const {
    std::vector<std::uint64_t> out(report_.nodes, 0);
    for (std::size_t g = 0; g < gpus.size(); ++g) out[node_of_gpu_[g]] += gpus[g];
    return out;
  }

  [[nodiscard]] static step_figures summed_up(std::vector<double>& of_steps) {
    if (of_steps.empty()) return {};
    std::sort(of_steps.begin(), of_steps.end());
    step_figures out;
    for (const double x : of_steps) out.mean += x / static_cast<double>(of_steps.size());
    out.p99 = of_steps[(of_steps.size() * 99 + 99) / 100 - 1];
    out.worst = of_steps.back();
    return out;
  }

  [[nodiscard]] cost_report finish() {
    const double dispatch_bytes = static_cast<double>(options_.hidden) * options_.dispatch_bytes_per_value;
    const double combine_bytes = static_cast<double>(options_.hidden) * options_.combine_bytes_per_value;
    const double steps =
        options_.tokens_per_step == 0
            ? 1.0
            : std::ceil(static_cast<double>(report_.tokens) / static_cast<double>(options_.tokens_per_step));
    const auto layers = static_cast<double>(report_.layers);
    for (std::size_t l = 0; l < report_.layers; ++l) {
      report_.remote_visits += report_.visits_of_layer[l];
      const auto between = static_cast<double>(links_[l].between), inside = static_cast<double>(links_[l].inside);
      report_.between_nodes.dispatch += between * dispatch_bytes;
      report_.between_nodes.combine += between * combine_bytes;
      report_.inside_nodes.dispatch += inside * dispatch_bytes;
      report_.inside_nodes.combine += inside * combine_bytes;
      report_.dispatch_seconds += links_[l].seconds(topology_, live_, dispatch_bytes, steps);
      report_.combine_seconds += links_[l].seconds(topology_, live_, combine_bytes, steps);

      const auto on_gpus = std::span<const std::uint64_t>(report_.pairs_on_gpu).subspan(l * report_.gpus, report_.gpus);
      const double gpu =
          max_over_mean(on_gpus, [&](std::size_t g) { return topology_.slots_on_gpu(g) > 0 ? topology_.speed(g) : 0; });
      const double node = max_over_mean(on_nodes(on_gpus), [&](std::size_t n) { return topology_.speed_of_node(n); });
      report_.gpu_imbalance += gpu / layers;
      report_.node_imbalance += node / layers;
      report_.worst_gpu_imbalance = std::max(report_.worst_gpu_imbalance, gpu);
      report_.worst_node_imbalance = std::max(report_.worst_node_imbalance, node);
    }
    for (std::size_t i = 0; i < report_.copies_between.size(); ++i) {
      report_.copies_cost +=
          static_cast<double>(report_.copies_between[i]) * (node_costs_.empty() ? 1.0 : node_costs_[i]);
    }
    report_.steps = node_imbalance_.size();
    report_.step_node_imbalance = summed_up(node_imbalance_);
    report_.step_gpu_imbalance = summed_up(gpu_imbalance_);
    report_.step_activated = summed_up(activated_experts_);
    return std::move(report_);
  }

  const trace_view& served_;
  const topology& topology_;
  std::span<const double> node_costs_;
  live_gpus live_;
  const cost_options& options_;
  std::optional<replica_chooser> by_token_;
  std::optional<step_chooser> by_step_;
  cost_report report_;
  std::vector<link_counts> links_;                                          // [layers]
  std::vector<std::uint32_t> node_of_gpu_;                                  // [gpus]
  std::vector<step_token> step_;                                            // tokens waiting to be served
  std::vector<std::uint16_t> ids_;                                          // [step, experts per token] of one layer
  std::vector<std::uint32_t> chosen_;                                       // [step, experts per token] GPUs
  std::vector<std::uint64_t> node_seen_;                                    // [nodes] last `now_`
  std::vector<std::uint64_t> gpu_seen_;                                     // [gpus] last `now_`
  std::vector<std::uint64_t> activated_;                                    // [experts, gpus] last step_number_
  std::vector<std::uint64_t> step_pairs_;                                   // [gpus]
  std::vector<std::uint64_t> step_experts_;                                 // [gpus]
  std::vector<double> node_imbalance_, gpu_imbalance_, activated_experts_;  // [steps] mean over layers
  std::uint64_t now_ = 0, step_number_ = 0;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Serves the requests of a trace under a placement and adds up what that costs; source_of_request[i] is where request
/// i of the view runs. Exact: each token is routed in the order of the view. Precondition: the view is valid (a trace
/// made it). Errors: shapes that disagree, an invalid placement (two copies on one GPU are accepted), a source out of
/// range, options out of range.
[[nodiscard]] inline result<cost_report> try_evaluate(const trace_view& served, const placement& p, const topology& t,
                                                      std::span<const std::uint32_t> source_of_request,
                                                      const cost_options& options = {}) {
  if (auto ok = detail::check_cost_input(served, p, t, source_of_request, options); !ok) return ok.error();
  return detail::cost_counter(served, p, t, options).run(source_of_request);
}
[[nodiscard]] inline cost_report evaluate(const trace_view& served, const placement& p, const topology& t,
                                          std::span<const std::uint32_t> source_of_request,
                                          const cost_options& options = {}) {
  return try_evaluate(served, p, t, source_of_request, options).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
