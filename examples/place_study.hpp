#pragma once

/// Plans compared on requests they were not made from.

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/local.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/topology.hpp>
#include <tetromino/moe/trace_io.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace study {

using namespace tetromino::moe;

/// Mean and sample deviation of a few numbers.
class statistic {
 public:
  void add(double x) { values_.push_back(x); }
  [[nodiscard]] std::size_t count() const { return values_.size(); }
  [[nodiscard]] double mean() const {
    double sum = 0;
    for (const double x : values_) sum += x;
    return values_.empty() ? 0 : sum / static_cast<double>(values_.size());
  }
  [[nodiscard]] double deviation() const {
    double sum = 0;
    for (const double x : values_) sum += (x - mean()) * (x - mean());
    return values_.size() < 2 ? 0 : std::sqrt(sum / static_cast<double>(values_.size() - 1));
  }

 private:
  std::vector<double> values_;
};

inline std::size_t domains_of(const trace& t) {
  std::size_t n = std::max<std::size_t>(1, t.domain_names().size());
  for (const request& r : t.requests()) n = std::max<std::size_t>(n, r.domain + 1);
  return n;
}
inline std::string domain_name(const trace& t, std::size_t d) {
  return d < t.domain_names().size() ? t.domain_names()[d] : fmt::format("domain {}", d);
}

/// Requests to make a plan from, and requests to judge it on; both refer to their trace.
struct half {
  const trace* from;
  std::vector<request> requests;

  [[nodiscard]] trace_view view() const { return from->view().with(requests); }
  [[nodiscard]] half of_domain(std::size_t domain) const {
    half out{from, {}};
    for (const request& r : requests) {
      if (r.domain == domain) out.requests.push_back(r);
    }
    return out;
  }
};
struct split {
  half calibration, judged;
};

/// A number that follows from the seed alone, on every machine. (SplitMix64)
inline std::uint64_t mixed(std::uint64_t& state) {
  std::uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/// Random halves of the requests.
inline std::vector<split> random_halves(const trace& t, std::size_t count, std::uint64_t seed) {
  std::vector<split> out;
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<request> order(t.requests().begin(), t.requests().end());
    std::uint64_t state = seed + i;
    for (std::size_t j = 0; j < order.size(); ++j) std::swap(order[j], order[j + mixed(state) % (order.size() - j)]);
    const auto middle = order.begin() + static_cast<std::ptrdiff_t>(order.size() / 2);
    out.push_back({{&t, {order.begin(), middle}}, {&t, {middle, order.end()}}});
  }
  return out;
}

/// Decode loads of some requests: [layers, experts].
inline std::vector<double> decode_loads(const trace_view& of) {
  profile p = profile::make({of.shape, 0, 0, false, false});
  p.add(of);
  const load_view loads = p.loads(phase::decode);
  return {loads.values.begin(), loads.values.end()};
}

/// Where experts are, and where each judged request runs.
struct plan {
  placement experts;
  std::vector<std::uint32_t> sources;
  replica_choice choice = replica_choice::nearest;
};
using planner = std::function<plan(const trace_view& calibration, const trace_view& judged, const topology&)>;

struct contender {
  std::string name;
  planner make;
};

/// What a contender costs, over all splits.
struct outcome {
  statistic remote_pairs, nodes_per_token, node_imbalance, gpu_imbalance, bytes_per_token, seconds_to_plan;

  void add(const cost_report& r, double seconds) {
    remote_pairs.add(r.remote_pair_fraction());
    nodes_per_token.add(r.nodes_per_token());
    node_imbalance.add(r.node_imbalance);
    gpu_imbalance.add(r.gpu_imbalance);
    bytes_per_token.add(r.tokens == 0 ? 0 : r.between_nodes.total() / static_cast<double>(r.tokens));
    seconds_to_plan.add(seconds);
  }
};

inline cost_report judge(const plan& p, const trace_view& judged, const topology& t) {
  cost_options options;
  options.choice = p.choice;
  return evaluate(judged, p.experts, t, p.sources, options);
}

/// Plans and judges once.
inline void run(const contender& c, const half& calibration, const half& judged, const topology& t, outcome& to) {
  const auto start = std::chrono::steady_clock::now();
  const plan p = c.make(calibration.view(), judged.view(), t);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  to.add(judge(p, judged.view(), t), took.count());
}

/// Requests dealt to nodes in turn.
inline std::vector<std::uint32_t> in_turn(const trace_view& judged, const topology& t) {
  std::vector<std::uint32_t> out(judged.requests.size());
  for (std::size_t r = 0; r < out.size(); ++r) out[r] = static_cast<std::uint32_t>(r % t.nodes());
  return out;
}

/// What engines do by default, and today's balancer.
inline std::vector<contender> baselines(std::uint64_t) {
  return {{"contiguous, requests in turn",
           [](const trace_view& calibration, const trace_view& judged, const topology& t) -> plan {
             const routing_shape& s = calibration.shape;
             return {contiguous(s.layers, s.experts, t), in_turn(judged, t), replica_choice::nearest};
           }},
          {"balanced (EPLB), requests in turn",
           [](const trace_view& calibration, const trace_view& judged, const topology& t) -> plan {
             const routing_shape& s = calibration.shape;
             const std::vector<double> loads = decode_loads(calibration);
             // EPLB itself where its sizes divide: each expert a group of its own, so that nodes are balanced too
             const bool divides = t.is_uniform() && s.experts % t.nodes() == 0;
             const load_view view{s.layers, s.experts, loads};
             return {divides ? to_placement(balanced_eplb(view, {t.slots(), s.experts, t.nodes(), t.gpus()}))
                             : balanced(view, t),
                     in_turn(judged, t), replica_choice::nearest};
           }}};
}

/// A node for each judged request, from its prefill alone: the one whose experts it calls for most, as long as the
/// node's share of tokens, with 5 % to spare, lasts. Long requests choose first.
inline std::vector<std::uint32_t> by_prefill(const trace_view& judged, const placement& p, const topology& t,
                                             bool pairs) {
  const routing_shape& s = judged.shape;
  const std::size_t nodes = t.nodes();
  std::vector<std::uint8_t> on_node(s.layers * s.experts * nodes);
  for (std::size_t l = 0; l < s.layers; ++l) {
    for (std::size_t slot = 0; slot < p.slots(); ++slot) {
      const std::int32_t e = p.layer(l)[slot];
      const std::size_t node = t.node_of_gpu(t.gpu_of_slot(slot));
      if (e != empty_slot) on_node[(l * s.experts + static_cast<std::size_t>(e)) * nodes + node] = 1;
    }
  }
  std::vector<std::size_t> order(judged.requests.size());
  std::vector<std::vector<double>> saved(order.size(), std::vector<double>(nodes));
  double tokens = 0;
  for (std::size_t r = 0; r < order.size(); ++r) {
    order[r] = r;
    tokens += judged.requests[r].tokens;
    const token_range prefill = judged.requests[r].range(phase::prefill);
    for (std::uint64_t token = prefill.first; token < prefill.last; ++token) {
      for (std::size_t l = 0; l < s.layers; ++l) {
        std::vector<std::uint32_t> here(nodes);
        for (const std::uint16_t e : judged.experts_of(token, l)) {
          for (std::size_t n = 0; n < nodes; ++n) here[n] += on_node[(l * s.experts + e) * nodes + n];
        }
        for (std::size_t n = 0; n < nodes; ++n) saved[r][n] += pairs ? here[n] : here[n] > 0;
      }
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return judged.requests[a].tokens > judged.requests[b].tokens; });
  std::vector<double> room(nodes, 1.05 * tokens / static_cast<double>(nodes));
  std::vector<std::uint32_t> sources(order.size());
  for (const std::size_t r : order) {
    const double size = judged.requests[r].tokens;
    std::size_t best = nodes;
    for (std::size_t n = 0; n < nodes; ++n) {
      if (room[n] >= size && (best == nodes || saved[r][n] > saved[r][best])) best = n;
    }
    if (best == nodes) best = static_cast<std::size_t>(std::max_element(room.begin(), room.end()) - room.begin());
    room[best] -= size;
    sources[r] = static_cast<std::uint32_t>(best);
  }
  return sources;
}

struct joint_settings {
  std::uint64_t seed = 1;
  double limit = 1.05;
  bool pairs = false;
};
/// Experts placed by `local`, requests grouped by their prefill.
inline contender joint(const std::string& name, const joint_settings& s) {
  return {name, [s](const trace_view& calibration, const trace_view& judged, const topology& t) -> plan {
            local_options options;
            options.seed = s.seed;
            options.node_imbalance = s.limit;
            options.node_weight = s.pairs ? 0 : 1;
            options.pair_weight = s.pairs ? 1 : 0;
            placement experts = local(calibration, t, options).experts;
            std::vector<std::uint32_t> sources = by_prefill(judged, experts, t, s.pairs);
            return {std::move(experts), std::move(sources), replica_choice::fewest_nodes};
          }};
}

}  // namespace study
