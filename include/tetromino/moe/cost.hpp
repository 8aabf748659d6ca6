#pragma once

#include "../error.hpp"   // tetromino::result, tetromino::error
#include "replica.hpp"    // replica_chooser, replica_choice
#include "placement.hpp"  // placement
#include "topology.hpp"   // topology
#include "trace.hpp"      // trace_view, phase

#include <algorithm>  // std::max
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t, std::uint64_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// How activations travel to other nodes.
enum class dispatch_copies : std::uint8_t {
  per_node,    ///< one copy per token and node, fanned out inside that node (DeepEP "normal")
  per_expert,  ///< one copy per token and expert (plain all-to-all, DeepEP "low latency")
};

/// What the sources of requests are numbers of.
enum class source_kind : std::uint8_t {
  node,  ///< attention is spread over a node; its GPUs send the node's tokens in turn
  gpu,   ///< attention runs on one GPU per request
};

/// How a placement is judged.
struct cost_options {
  phase tokens = phase::decode;  ///< which tokens are served
  replica_choice choice = replica_choice::nearest;
  double node_limit = 0;  ///< of `fewest_nodes`: load of a node, over the mean, above which copies elsewhere are used
  dispatch_copies copies = dispatch_copies::per_node;
  source_kind sources = source_kind::node;
  std::size_t hidden = 7168;              ///< values per activation
  double dispatch_bytes_per_value = 1.0;  ///< FP8; 0.53 for NVFP4 with its scales
  double combine_bytes_per_value = 2.0;   ///< BF16
  std::size_t tokens_per_step = 0;        ///< tokens served at once, for the latencies; 0: all in one step
};

/// Bytes that one direction of the exchange moves, all layers together.
struct exchange_bytes {
  double dispatch = 0;
  double combine = 0;

  [[nodiscard]] double total() const noexcept { return dispatch + combine; }
};

/// What serving a trace under a placement costs. "Pair" = (token, expert) in one layer.
struct cost_report {
  std::size_t layers = 0;
  std::size_t nodes = 0;
  std::size_t gpus = 0;
  std::uint64_t tokens = 0;         ///< tokens served
  std::uint64_t pairs = 0;          ///< tokens × layers × experts per token
  std::uint64_t remote_pairs = 0;   ///< pairs whose replica is on another node than the token
  std::uint64_t remote_visits = 0;  ///< (token, layer, other node) triples with at least one pair

  double node_imbalance = 0;        ///< max / mean of pairs per node, mean over layers; nodes without slots left out
  double worst_node_imbalance = 0;  ///< the same in the worst layer
  double gpu_imbalance = 0;         ///< max / mean of pairs per GPU, mean over layers; GPUs without slots left out
  double worst_gpu_imbalance = 0;   ///< the same in the worst layer

  exchange_bytes between_nodes;
  exchange_bytes inside_nodes;
  double dispatch_seconds = 0;  ///< Σ over layers of the busiest link, first between, then inside nodes, plus latencies
  double combine_seconds = 0;

  std::vector<std::uint64_t> pairs_on_gpu;    ///< [layers, gpus]
  std::vector<std::uint64_t> copies_between;  ///< [nodes, nodes] activations sent from row to column, all layers

  /// Remote pairs as a fraction of all pairs.
  [[nodiscard]] double remote_pair_fraction() const noexcept {
    return pairs == 0 ? 0 : static_cast<double>(remote_pairs) / static_cast<double>(pairs);
  }
  /// Other nodes that one token's activation goes to in one layer, on average.
  [[nodiscard]] double nodes_per_token() const noexcept {
    return tokens == 0 ? 0 : static_cast<double>(remote_visits) / static_cast<double>(tokens * layers);
  }
  /// Pairs per node of one layer: [nodes].
  [[nodiscard]] std::vector<std::uint64_t> pairs_on_nodes(std::size_t layer, const topology& t) const {
    std::vector<std::uint64_t> out(nodes, 0);
    for (std::size_t g = 0; g < gpus; ++g) out[t.node_of_gpu(g)] += pairs_on_gpu[layer * gpus + g];
    return out;
  }
};

namespace detail {

// Max over units of load / mean over units, leaving out units without slots.
template <class HasSlots>
[[nodiscard]] double max_over_mean(std::span<const std::uint64_t> loads, const HasSlots& has_slots) {
  std::uint64_t sum = 0, most = 0;
  std::size_t units = 0;
  for (std::size_t i = 0; i < loads.size(); ++i) {
    if (!has_slots(i)) continue;
    ++units;
    sum += loads[i];
    most = std::max(most, loads[i]);
  }
  return sum == 0 ? 1.0 : static_cast<double>(most) * static_cast<double>(units) / static_cast<double>(sum);
}

// Activations that cross each kind of link in one layer. Combine sends the same ones back.
struct link_counts {
  std::vector<std::uint64_t> node_out, node_in;  // [nodes] to and from other nodes
  std::vector<std::uint64_t> gpu_out, gpu_in;    // [gpus] to and from GPUs of the same node
  std::uint64_t between = 0, inside = 0;

  link_counts(std::size_t nodes, std::size_t gpus) : node_out(nodes), node_in(nodes), gpu_out(gpus), gpu_in(gpus) {}

  [[nodiscard]] double seconds(const topology& t, double bytes_per_copy, double steps) const {
    double busiest_node = 0, busiest_gpu = 0;
    for (std::size_t n = 0; n < node_out.size(); ++n) {
      busiest_node = std::max(busiest_node, static_cast<double>(std::max(node_out[n], node_in[n])) /
                                                static_cast<double>(t.gpus_on_node(n)));
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

[[nodiscard]] inline result<void> check_cost_input(const trace_view& served, const placement& p, const topology& t,
                                                   std::span<const std::uint32_t> source_of_request,
                                                   const cost_options& options) {
  const routing_shape& s = served.shape;
  if (p.layers() != s.layers || p.experts() != s.experts) {
    return error(errc::shape_mismatch, text("cost: expected a placement of ", s.layers, " layers × ", s.experts,
                                            " experts as in the trace, got ", p.layers(), " × ", p.experts()));
  }
  if (auto ok = try_validate(p, t, {.one_copy_per_gpu = false}); !ok) return ok;
  if (source_of_request.size() != served.requests.size()) {
    return error(errc::shape_mismatch, text("cost: expected a source for each of ", served.requests.size(),
                                            " requests, got ", source_of_request.size()));
  }
  const std::size_t sources = options.sources == source_kind::node ? t.nodes() : t.gpus();
  for (std::size_t r = 0; r < source_of_request.size(); ++r) {
    if (source_of_request[r] >= sources) {
      return error(errc::invalid_argument,
                   text("cost: expected sources below ", sources, ", got ", source_of_request[r], " for request ", r));
    }
  }
  if (!std::isfinite(options.node_limit) || options.node_limit < 0) {
    return error(errc::invalid_argument, text("cost: expected a node limit of 0 or more, got ", options.node_limit));
  }
  const auto usable = [](double bytes) { return std::isfinite(bytes) && bytes >= 0; };
  if (!usable(options.dispatch_bytes_per_value) || !usable(options.combine_bytes_per_value)) {
    return error(errc::invalid_argument,
                 text("cost: expected 0 or more bytes per value, got ", options.dispatch_bytes_per_value, " and ",
                      options.combine_bytes_per_value));
  }
  return {};
}

}  // namespace detail

/// Serves the requests of a trace under a placement and adds up what that costs; source_of_request[i] is where request
/// i of the view runs. Exact: each token is routed in the order of the view. Precondition: the view is valid (a trace
/// made it). Errors: shapes that disagree, an invalid placement (two copies on one GPU are accepted), a source out of
/// range.
[[nodiscard]] inline result<cost_report> try_evaluate(const trace_view& served, const placement& p, const topology& t,
                                                      std::span<const std::uint32_t> source_of_request,
                                                      const cost_options& options = {}) {
  if (auto ok = detail::check_cost_input(served, p, t, source_of_request, options); !ok) return ok.error();
  const std::size_t layers = p.layers(), nodes = t.nodes(), gpus = t.gpus(), k = served.shape.experts_per_token;

  cost_report out;
  out.layers = layers;
  out.nodes = nodes;
  out.gpus = gpus;
  out.copies_between.assign(nodes * nodes, 0);
  replica_chooser chooser(p, t, options.choice, options.node_limit);
  std::vector<detail::link_counts> links(layers, detail::link_counts(nodes, gpus));
  std::vector<std::uint64_t> node_seen(nodes, 0), gpu_seen(gpus, 0);
  std::vector<std::uint32_t> chosen(k);
  std::vector<std::uint32_t> node_of_gpu(gpus);
  for (std::size_t g = 0; g < gpus; ++g) node_of_gpu[g] = static_cast<std::uint32_t>(t.node_of_gpu(g));
  const bool per_node = options.copies == dispatch_copies::per_node;
  std::uint64_t now = 0;

  for (std::size_t r = 0; r < served.requests.size(); ++r) {
    const bool on_node = options.sources == source_kind::node;
    const std::uint32_t home_node = on_node ? source_of_request[r] : node_of_gpu[source_of_request[r]];
    const std::size_t first_home = t.first_gpu(home_node), home_gpus = t.gpus_on_node(home_node);
    const token_range range = served.requests[r].range(options.tokens);
    out.tokens += range.size();
    for (std::uint64_t token = range.first; token < range.last; ++token) {
      const std::size_t local = on_node ? token % home_gpus : source_of_request[r] - first_home;
      const std::size_t home_gpu = first_home + local;
      const std::uint16_t* ids = served.token(token).data();
      for (std::size_t l = 0; l < layers; ++l, ids += k) {
        chooser.choose(l, {ids, k}, static_cast<std::uint32_t>(home_gpu), chosen);
        detail::link_counts& link = links[l];
        ++now;
        for (std::size_t i = 0; i < k; ++i) {
          const std::uint32_t gpu = chosen[i], node = node_of_gpu[gpu];
          const bool remote = node != home_node;
          const bool new_node = node_seen[node] != now;
          const bool new_gpu = gpu_seen[gpu] != now;
          node_seen[node] = now;
          gpu_seen[gpu] = now;
          out.remote_pairs += remote ? 1U : 0U;
          out.remote_visits += remote && new_node ? 1U : 0U;
          if (remote && (new_node || !per_node)) {
            ++out.copies_between[home_node * nodes + node];
            ++link.node_out[home_node];
            ++link.node_in[node];
            ++link.between;
          }
          // inside a node, an activation starts where it is or where it landed (the GPU of the same local number)
          const std::size_t landed = remote ? t.first_gpu(node) + local % t.gpus_on_node(node) : home_gpu;
          if (gpu != landed && (per_node ? new_gpu : !remote)) {
            ++link.gpu_out[landed];
            ++link.gpu_in[gpu];
            ++link.inside;
          }
        }
      }
    }
  }

  out.pairs = out.tokens * layers * k;
  out.pairs_on_gpu.assign(chooser.pairs_on_gpu().begin(), chooser.pairs_on_gpu().end());
  const double dispatch_bytes = static_cast<double>(options.hidden) * options.dispatch_bytes_per_value;
  const double combine_bytes = static_cast<double>(options.hidden) * options.combine_bytes_per_value;
  const double steps = options.tokens_per_step == 0
                           ? 1.0
                           : std::ceil(static_cast<double>(out.tokens) / static_cast<double>(options.tokens_per_step));
  for (std::size_t l = 0; l < layers; ++l) {
    const auto between = static_cast<double>(links[l].between), inside = static_cast<double>(links[l].inside);
    out.between_nodes.dispatch += between * dispatch_bytes;
    out.between_nodes.combine += between * combine_bytes;
    out.inside_nodes.dispatch += inside * dispatch_bytes;
    out.inside_nodes.combine += inside * combine_bytes;
    out.dispatch_seconds += links[l].seconds(t, dispatch_bytes, steps);
    out.combine_seconds += links[l].seconds(t, combine_bytes, steps);

    const double gpu = detail::max_over_mean(std::span(out.pairs_on_gpu).subspan(l * gpus, gpus),
                                             [&](std::size_t g) { return t.slots_on_gpu(g) > 0; });
    const double node =
        detail::max_over_mean(out.pairs_on_nodes(l, t), [&](std::size_t n) { return t.slots_on_node(n) > 0; });
    out.gpu_imbalance += gpu / static_cast<double>(layers);
    out.node_imbalance += node / static_cast<double>(layers);
    out.worst_gpu_imbalance = std::max(out.worst_gpu_imbalance, gpu);
    out.worst_node_imbalance = std::max(out.worst_node_imbalance, node);
  }
  return out;
}
[[nodiscard]] inline cost_report evaluate(const trace_view& served, const placement& p, const topology& t,
                                          std::span<const std::uint32_t> source_of_request,
                                          const cost_options& options = {}) {
  return try_evaluate(served, p, t, source_of_request, options).value();
}

}  // namespace tetromino::moe
