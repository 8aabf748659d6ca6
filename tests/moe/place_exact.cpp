#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/place_exact.hpp>
#include <tetromino/moe/place_local.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"
#include "reference/synthetic_routing.hpp"

#include <algorithm>  // std::count, std::max, std::min
#include <cmath>      // std::ceil, std::floor, std::nan
#include <cstdint>    // std::uint32_t
#include <cstdio>     // std::printf
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

/// Of one domain: plans are compared on the very requests that they are made from.
trace small_trace(std::uint64_t seed, std::size_t layers, std::size_t experts, std::size_t requests,
                  std::uint32_t decode) {
  reference::synthetic_routing made = reference::make_routing(seed, layers, experts, 2, requests, 0, decode, 3);
  std::vector<request> list;
  for (std::size_t r = 0; r < requests; ++r) list.push_back({r * decode, decode, 0, 0});
  return trace::make({layers, experts, 2}, std::move(made.ids), std::move(list));
}

struct weights {
  double node, pair;
};

double cost_of(const trace& t, const placement& p, const topology& cluster, const std::vector<std::uint32_t>& sources,
               weights w) {
  const cost_report r = evaluate(t.view(), p, cluster, sources);
  return w.node * static_cast<double>(r.remote_visits) + w.pair * static_cast<double>(r.remote_pairs);
}

/// Tries every plan: sources within the room, experts within slots and load. For very small cases.
double least_by_trying(const trace& t, const topology& cluster, double imbalance, weights w) {
  const std::size_t nodes = cluster.nodes(), experts = t.shape().experts, requests = t.requests().size();
  const auto digits = [&](std::size_t number, std::size_t count) {
    std::vector<std::uint32_t> out;
    for (; count > 0; --count, number /= nodes) out.push_back(static_cast<std::uint32_t>(number % nodes));
    return out;
  };
  const auto power = [&](std::size_t count) {
    std::size_t out = 1;
    for (; count > 0; --count) out *= nodes;
    return out;
  };
  // requests that a node may take: 5 % above its share by speed, in whole ones rounded down, or up if so too few go
  double speeds = 0, all = 0;
  for (std::size_t n = 0; n < nodes; ++n) speeds += cluster.speed_of_node(n);
  const auto share = [&](std::size_t n) {
    return 1.05 * static_cast<double>(requests) * cluster.speed_of_node(n) / speeds;
  };
  for (std::size_t n = 0; n < nodes; ++n) all += std::floor(share(n));
  const bool up = all < static_cast<double>(requests);
  double best = 1e300;
  for (std::size_t s = 0; s < power(requests); ++s) {
    const std::vector<std::uint32_t> sources = digits(s, requests);
    bool roomy = true;
    for (std::size_t n = 0; n < nodes; ++n) {
      const auto here = static_cast<double>(std::count(sources.begin(), sources.end(), n));
      roomy = roomy && here <= (up ? std::ceil(share(n)) : std::floor(share(n)));
    }
    if (!roomy) continue;
    for (std::size_t p = 0; p < power(experts); ++p) {
      const std::vector<std::uint32_t> held = digits(p, experts);
      placement plan(1, experts, cluster.slots());
      std::vector<std::size_t> next(nodes, 0);
      bool fits = true;
      for (std::size_t e = 0; e < experts && fits; ++e) {
        fits = next[held[e]] < cluster.slots_on_node(held[e]);
        if (fits) {
          plan.layer(0)[cluster.first_slot_of_node(held[e]) + next[held[e]]++] = static_cast<std::int32_t>(e);
        }
      }
      if (!fits) continue;
      if (imbalance > 0) {
        const cost_report r = evaluate(t.view(), plan, cluster, sources);
        if (r.node_imbalance > imbalance + 1e-9) continue;
      }
      best = std::min(best, cost_of(t, plan, cluster, sources, w));
    }
  }
  return best;
}

}  // namespace

TEST_CASE("exact finds what trying every plan finds") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  std::size_t infeasible = 0;
  for (std::size_t round = 0; round < 40; ++round) {
    const std::size_t nodes = 2 + g.below(2), experts = 4 + g.below(nodes == 2 ? 3 : 1), requests = 3;
    const trace t = small_trace(g.bits(), 1, experts, requests, 3);
    topology cluster = topology::uniform(nodes, 1, (experts + nodes - 1) / nodes + g.below(2));
    if (round % 4 == 3) {  // the limit goes by what nodes can do
      std::vector<double> speeds(nodes, 1.0);
      speeds[g.below(nodes)] = 1.5;
      cluster = cluster.with_speeds(speeds);
    } else if (nodes == 3 && g.below(2) == 0) {  // nobody lives on a dead node
      cluster = cluster.without(std::vector<std::uint32_t>{static_cast<std::uint32_t>(g.below(3))});
    }
    const weights w = round % 3 == 0 ? weights{1, 0} : round % 3 == 1 ? weights{0, 1} : weights{0.5, 0.25};
    const double imbalance = round % 2 == 0 ? 0 : 1.2;
    CAPTURE(round, nodes, experts);
    const auto found =
        try_exact(t.view(), cluster, {.node_weight = w.node, .pair_weight = w.pair, .node_imbalance = imbalance});
    const double least = least_by_trying(t, cluster, imbalance, w);
    if (!found.has_value()) {
      CHECK(found.error().code() == errc::infeasible);
      CHECK(least > 1e299);
      ++infeasible;
      continue;
    }
    CHECK(found->cost == Approx(least));
    CHECK(try_validate(found->experts, cluster).has_value());
    CHECK(cost_of(t, found->experts, cluster, found->source_of_request, w) == Approx(found->cost));
  }
  CHECK(infeasible < 30);
}

TEST_CASE("local is close to exact on 200 random small cases") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  double sum = 0, worst = 0;
  std::size_t optimal = 0, compared = 0;
  constexpr std::size_t cases = 200;
  for (std::size_t round = 0; round < cases; ++round) {
    const std::size_t nodes = 2 + g.below(2), experts = 4 + g.below(5), layers = 1 + g.below(2);
    const trace t = small_trace(g.bits(), layers, experts, 3 + g.below(4), static_cast<std::uint32_t>(4 + g.below(5)));
    const topology cluster = topology::uniform(nodes, 1, (experts + nodes - 1) / nodes + g.below(2));
    const weights w = round % 2 == 0 ? weights{1, 0} : weights{0, 1};
    CAPTURE(round, nodes, experts, layers);
    const exact_plan best = exact(t.view(), cluster, {.node_weight = w.node, .pair_weight = w.pair});
    local_options options;
    options.node_weight = w.node;
    options.pair_weight = w.pair;
    options.node_imbalance = 0;
    options.replicas = false;
    const local_plan found = local(t.view(), cluster, options);
    const double reached = cost_of(t, found.experts, cluster, found.source_of_request, w);
    REQUIRE(reached >= best.cost - 1e-9);
    const double gap = best.cost > 0 ? reached / best.cost - 1 : reached > 0 ? 1.0 : 0.0;
    sum += gap;
    worst = std::max(worst, gap);
    optimal += gap < 1e-9 ? 1U : 0U;
    ++compared;
  }
  const double mean = sum / static_cast<double>(compared);
  std::printf("local above exact, %zu random small cases: mean %.2f %%, worst %.1f %%, optimal in %zu\n", compared,
              100 * mean, 100 * worst, optimal);
  CHECK(mean < 0.03);
  CHECK(worst < 0.6);
}

TEST_CASE("what exact cannot do is an error") {
  const trace t = small_trace(3, 1, 6, 4, 4);
  const topology cluster = topology::uniform(2, 1, 3);
  const auto refused = [](const trace& what, const topology& on) { return code_of(try_exact(what.view(), on)); };
  const auto code = [&](const exact_options& o) { return code_of(try_exact(t.view(), cluster, o)); };
  CHECK(refused(small_trace(3, 1, 13, 4, 4), topology::uniform(2, 1, 7)) == errc::invalid_argument);
  CHECK(refused(small_trace(3, 1, 6, 13, 4), cluster) == errc::invalid_argument);
  CHECK(refused(small_trace(3, 1, 6, 5, 13), cluster) == errc::invalid_argument);
  CHECK(code_of(try_exact(t.view(), topology::uniform(9, 1, 1))) == errc::invalid_argument);
  CHECK(code_of(try_exact(t.view(), topology::uniform(2, 1, 2))) == errc::infeasible);
  CHECK(refused(trace::make({1, 6, 2}, {}, {}), cluster) == errc::invalid_argument);
  CHECK(code({.max_steps = 3}) == errc::invalid_argument);
  CHECK(code({.node_weight = 0}) == errc::invalid_argument);
  CHECK(code({.pair_weight = std::nan("")}) == errc::invalid_argument);
  CHECK(code({.node_imbalance = 0.5}) == errc::invalid_argument);
  CHECK(code({.token_budget = 0.5}) == errc::invalid_argument);
  const trace lopsided = trace::make({1, 4, 1}, {0, 0, 0, 0}, {{0, 2, 0, 0}, {2, 2, 0, 0}});
  CHECK(code_of(try_exact(lopsided.view(), topology::uniform(2, 1, 2), {.node_imbalance = 1.5})) == errc::infeasible);
  const exact_plan one = exact(lopsided.view(), topology::uniform(2, 1, 2));
  CHECK(one.cost == 2);  // two requests on two nodes, one expert
}
