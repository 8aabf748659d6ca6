#pragma once

/// Plans compared on requests they were not made from.

#include "../ui.hpp"

#include <tetromino/execution.hpp>
#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/topology.hpp>
#include <tetromino/moe/trace_io.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
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
  return d < t.domain_names().size() ? ui::printable(t.domain_names()[d], 40) : fmt::format("domain {}", d);
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

/// What a plan is made for.
struct aim {
  std::uint64_t seed = 1;
  double limit = 1.01;  ///< most load of a node, over the mean
  bool pairs = false;   ///< few remote pairs, instead of few nodes per token

  friend bool operator==(const aim&, const aim&) = default;
};

enum class experts_by { contiguous, eplb, local };
enum class requests_by { turn, prefill };

struct contender {
  std::string name;
  experts_by experts;
  requests_by requests;
  aim to{};
};

inline placement place(const contender& c, const trace_view& calibration, const topology& t) {
  const routing_shape& s = calibration.shape;
  if (c.experts == experts_by::contiguous) return contiguous(s.layers, s.experts, t);
  if (c.experts == experts_by::eplb) {
    const std::vector<double> loads = decode_loads(calibration);
    const load_view view{s.layers, s.experts, loads};
    // where its sizes do not divide, the balancer that takes any; each expert a group of its own, so that nodes balance
    if (!t.is_uniform() || s.experts % t.nodes() != 0) return balanced(view, t);
    return to_placement(balanced_eplb(view, {t.slots(), s.experts, t.nodes(), t.gpus()}));
  }
  local_options options;
  options.seed = c.to.seed;
  options.node_imbalance = c.to.limit;
  options.node_weight = c.to.pairs ? 0 : 1;
  options.pair_weight = c.to.pairs ? 1 : 0;
  return local(calibration, t, options).experts;
}

/// A node for each judged request: in turn, or the one whose experts its prefill calls for, with equal shares of the
/// decode tokens up to 5 %.
inline std::vector<std::uint32_t> assign(const contender& c, const placement& p, const trace_view& calibration,
                                         const trace_view& judged, const topology& t) {
  if (c.requests == requests_by::turn) {
    std::vector<std::uint32_t> out(judged.requests.size());
    for (std::size_t r = 0; r < out.size(); ++r) out[r] = static_cast<std::uint32_t>(r % t.nodes());
    return out;
  }
  group_options options;
  options.node_weight = c.to.pairs ? 0 : 1;
  options.pair_weight = c.to.pairs ? 1 : 0;
  const node_affinity affinity = node_affinity::make(p, t, calibration, options);
  signature_builder builder = affinity.builder();
  std::vector<request_signature> signatures;
  std::vector<std::uint64_t> tokens;
  for (const request& r : judged.requests) {
    signatures.push_back(signature_of(judged, r, builder));
    tokens.push_back(r.range(phase::decode).size());
  }
  return group(affinity, signatures, tokens);
}

/// Copies on other visited nodes relieve a node above `node_limit` × the mean.
inline cost_report judge(const placement& p, const std::vector<std::uint32_t>& sources, const trace_view& judged,
                         const topology& t, double node_limit) {
  cost_options options;
  options.replicas.choice = replica_choice::fewest_nodes;
  options.replicas.node_limit = node_limit;
  return evaluate(judged, p, t, sources, options);
}

/// A contender on one part of the requests; what it refers to outlives it.
struct experiment {
  const contender* plan;
  const half* calibration;
  const half* judged;
  const topology* cluster;
};
struct finding {
  cost_report cost;
  double seconds_to_place = 0;
};

/// What a contender costs, over all splits.
struct outcome {
  statistic remote_pairs, nodes_per_token, node_imbalance, gpu_imbalance, cost_per_token, bytes_per_token,
      seconds_to_place;

  void add(const finding& f) {
    const cost_report& r = f.cost;
    if (r.tokens == 0) return;
    remote_pairs.add(r.remote_pair_fraction());
    nodes_per_token.add(r.nodes_per_token());
    node_imbalance.add(r.node_imbalance);
    gpu_imbalance.add(r.gpu_imbalance);
    cost_per_token.add(r.cost_per_token());
    bytes_per_token.add(r.between_nodes.total() / static_cast<double>(r.tokens));
    seconds_to_place.add(f.seconds_to_place);
  }
};

[[nodiscard]] inline bool same_placement(const experiment& a, const experiment& b) {
  return a.calibration == b.calibration && a.cluster == b.cluster && a.plan->experts == b.plan->experts &&
         a.plan->to == b.plan->to;
}

/// Plans and judges every experiment, each placement once, on the threads given. Experiments without decode tokens to
/// plan from, or without requests to judge, find nothing. `done` is called after each, from any thread.
template <class Done>
[[nodiscard]] std::vector<finding> run(const std::vector<experiment>& list, tetromino::executor_ref threads,
                                       const Done& done) {
  std::vector<std::vector<std::size_t>> groups;  // experiments of one placement
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto group = std::find_if(groups.begin(), groups.end(),
                                    [&](const auto& g) { return same_placement(list[g.front()], list[i]); });
    if (group == groups.end()) {
      groups.push_back({i});
    } else {
      group->push_back(i);
    }
  }
  std::vector<finding> out(list.size());
  const auto work = [&](std::size_t g) {
    const experiment& first = list[groups[g].front()];
    if (first.calibration->view().tokens(phase::decode) == 0) return done(groups[g].size());
    const auto start = std::chrono::steady_clock::now();
    const placement experts = place(*first.plan, first.calibration->view(), *first.cluster);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    for (const std::size_t i : groups[g]) {
      const experiment& e = list[i];
      const contender& c = *e.plan;
      if (!e.judged->requests.empty()) {
        // relief costs no visit, but remote pairs: none of it where those are the aim
        const double node_limit = c.to.pairs ? 0 : std::max(c.to.limit, 1.05);
        const trace_view judged = e.judged->view();
        const std::vector<std::uint32_t> sources = assign(c, experts, e.calibration->view(), judged, *e.cluster);
        out[i] = {judge(experts, sources, judged, *e.cluster, node_limit), took.count()};
      }
      done(1);
    }
  };
  threads(groups.size(), work);
  return out;
}

/// What engines do by default, and today's balancer.
inline const contender by_default{"contiguous, requests in turn", experts_by::contiguous, requests_by::turn};
inline const contender by_load{"balanced (EPLB), requests in turn", experts_by::eplb, requests_by::turn};

}  // namespace study
