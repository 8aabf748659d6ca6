#include "check.hpp"

#include <tetromino/execution.hpp>
#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/trace_io.hpp>
#include <tetromino/thread_executor.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"
#include "reference/synthetic_routing.hpp"

#include <algorithm>  // std::count, std::max
#include <cmath>      // std::nan
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <limits>     // std::numeric_limits
#include <set>        // std::set
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

trace synthetic(std::uint64_t seed, std::size_t layers, std::size_t experts, std::size_t k, std::size_t requests,
                std::uint32_t prefill, std::uint32_t decode, bool labelled = false) {
  reference::synthetic_routing made = reference::make_routing(seed, layers, experts, k, requests, prefill, decode, 4);
  std::vector<request> list;
  for (std::size_t r = 0; r < requests; ++r) {
    list.push_back({r * (prefill + decode), prefill + decode, prefill, labelled ? made.topic[r] : 0});
  }
  return trace::make({layers, experts, k}, std::move(made.ids), std::move(list));
}

cost_report judge(const trace& t, const topology& cluster, const local_plan& plan) {
  cost_options options;
  options.replicas.choice = replica_choice::fewest_nodes;
  return evaluate(t.view(), plan.experts, cluster, plan.source_of_request, options);
}

std::size_t filled(const placement& p) {
  return p.slot_to_expert().size() -
         static_cast<std::size_t>(std::count(p.slot_to_expert().begin(), p.slot_to_expert().end(), empty_slot));
}

double token_spread(const trace& t, const local_plan& plan, std::size_t nodes) {
  std::vector<double> tokens(nodes, 0.0);
  double all = 0;
  for (std::size_t r = 0; r < plan.source_of_request.size(); ++r) {
    const auto n = static_cast<double>(t.requests()[r].range(phase::decode).size());
    tokens[plan.source_of_request[r]] += n;
    all += n;
  }
  return *std::max_element(tokens.begin(), tokens.end()) * static_cast<double>(nodes) / all;
}

}  // namespace

TEST_CASE("plans of one problem are compared by visits, pairs, overload and moves") {
  local_options o;
  o.node_weight = 1;
  o.pair_weight = 0.5;
  o.node_imbalance = 1.25;
  o.price_per_move = 10;
  local_plan plan{placement(2, 4, 4), {}, {}};
  plan.reached.nodes_per_token = 3;
  plan.reached.remote_pair_fraction = 0.5;
  plan.reached.node_imbalance = 1.5;
  plan.copies_moved = 8;
  // of 4 experts per token, half are remote; a pair above the limit costs a visit and a pair; 10 per 1000 for each move
  CHECK(detail::local_value(plan, o, {2, 4, 4}) == Approx(3 + 0.5 * 4 * 0.5 + 1.5 * (4 * 0.25 + 0.01 * 8 / 2)));
}

TEST_CASE("of few requests, domains' weights make the plan even for others") {
  const std::uint64_t seed = tetromino_test::seed();
  CAPTURE(seed);
  double labelled = 0, unlabelled = 0;
  const topology cluster = topology::uniform(4, 1, 8);
  for (std::uint64_t round = 0; round < 12; ++round) {
    const trace all = synthetic(seed + round, 2, 32, 4, 320, 0, 24, true);
    // as many of each domain, but not among the 40 that the plan is made from
    std::vector<request> known, others;
    std::vector<std::size_t> count(4, 0);
    for (const request& r : all.requests()) {
      if (known.size() < 40) {
        known.push_back(r);
      } else if (count[r.domain]++ < 40) {
        others.push_back(r);
      }
    }
    local_options options;
    options.pair_weight = 1;
    options.node_weight = 0;
    const auto imbalance = [&] {
      const local_plan plan = local(all.view().with(known), cluster, options);
      CHECK(token_spread(trace::make(all.shape(), all.view().ids, known), plan, 4) <= 1.05 + 1e-9);
      const std::vector<std::uint32_t> anywhere(others.size(), 0);
      return evaluate(all.view().with(others), plan.experts, cluster, anywhere).node_imbalance;
    };
    labelled += imbalance() - 1;
    for (request& r : known) r.domain = 0;
    unlabelled += imbalance() - 1;
  }
  CAPTURE(labelled, unlabelled);
  CHECK(labelled < 0.9 * unlabelled);
}

TEST_CASE("two kinds of requests on two nodes end up with their experts") {
  // requests 0, 2, 4 … use experts 0 … 3, the others 4 … 7
  std::vector<std::uint16_t> ids;
  std::vector<request> list;
  for (std::uint16_t r = 0; r < 8; ++r) {
    list.push_back({r * 4U, 4, 0, 0});
    for (std::uint16_t token = 0; token < 4; ++token) {
      for (std::uint16_t i = 0; i < 2; ++i) {
        ids.push_back(static_cast<std::uint16_t>((r % 2) * 4 + (token + 2 * i) % 4));
      }
    }
  }
  const trace t = trace::make({1, 8, 2}, ids, list);
  const topology cluster = topology::uniform(2, 2, 2);
  for (const double pairs : {0.0, 0.5, 1.0}) {
    local_options options;
    options.node_weight = 1 - pairs;
    options.pair_weight = pairs;
    const local_plan plan = local(t.view(), cluster, options);
    try_validate(plan.experts, cluster).value();
    const cost_report cost = judge(t, cluster, plan);
    CHECK(cost.remote_visits == 0);
    CHECK(cost.node_imbalance == Approx(1.0));
    CHECK(plan.reached.nodes_per_token == 0);
    for (std::size_t r = 2; r < 8; ++r) CHECK(plan.source_of_request[r] == plan.source_of_request[r % 2]);
  }
}

TEST_CASE("plans are valid, within budget and limit, and better than contiguous ones") {
  const trace t = synthetic(3, 3, 32, 4, 64, 4, 16);
  for (const std::size_t nodes : {1u, 2u, 4u, 12u, 40u}) {
    for (const std::size_t extra : {0u, 2u}) {
      CAPTURE(nodes, extra);
      const topology cluster = topology::with_node_slots(nodes, 2, (32 + nodes - 1) / nodes + extra);
      local_options options;
      options.node_imbalance = nodes <= 4 ? 1.1 : 0;
      options.effort = 0.05;
      const local_plan plan = local(t.view(), cluster, options);
      try_validate(plan.experts, cluster).value();
      CHECK(filled(plan.experts) == 3 * std::min(cluster.slots(), 32 * nodes));
      CHECK(plan.source_of_request.size() == 64);
      if (64 % nodes == 0) CHECK(token_spread(t, plan, nodes) <= 1.05 + 1e-9);
      const cost_report cost = judge(t, cluster, plan);
      if (nodes <= 4 && extra == 0) CHECK(cost.node_imbalance <= 1.11);
      std::vector<std::uint32_t> turns(64);
      for (std::size_t r = 0; r < 64; ++r) turns[r] = static_cast<std::uint32_t>(r % nodes);
      const cost_report before = evaluate(t.view(), contiguous(3, 32, cluster), cluster, turns);
      CHECK((nodes == 1 || cost.nodes_per_token() < 0.95 * before.nodes_per_token()));
      CHECK(plan.reached.nodes_per_token == Approx(cost.nodes_per_token()).epsilon(0.03));
    }
  }
}

TEST_CASE("spare slots stay empty without replicas, and nodes need not be alike") {
  const trace t = synthetic(4, 2, 16, 2, 24, 0, 8);
  const std::vector<std::size_t> gpus{1, 2, 1}, slots{9, 3, 4, 0};
  const topology cluster = topology::make(gpus, slots);
  const topology roomy = topology::uniform(2, 2, 10);
  local_options options;
  options.node_imbalance = 0;
  const local_plan uneven = local(t.view(), cluster, options);
  try_validate(uneven.experts, cluster).value();
  CHECK(filled(uneven.experts) == 2 * 16);
  options.replicas = false;
  const local_plan single = local(t.view(), roomy, options);
  try_validate(single.experts, roomy).value();
  CHECK(filled(single.experts) == 2 * 16);
  options.replicas = true;
  const local_plan everywhere = local(t.view(), roomy, options);
  CHECK(filled(everywhere.experts) == 2 * 32);
  CHECK(judge(t, roomy, everywhere).remote_pairs == 0);
}

TEST_CASE("a mask of 256 bits gives the plan that one of 64 gives") {
  const trace t = synthetic(11, 2, 16, 2, 16, 1, 6);
  const placement before = contiguous(2, 16, topology::uniform(7, 2, 2));
  const topology clusters[] = {topology::uniform(2, 3, 4), topology::uniform(7, 2, 2), topology::uniform(20, 1, 2)};
  for (const topology& cluster : clusters) {
    for (const double pairs : {0.0, 0.4}) {
      for (const bool warm : {false, true}) {
        if (warm && cluster.nodes() != 7) continue;
        local_options options;
        options.node_weight = 1 - pairs;
        options.pair_weight = pairs;
        options.max_proposals = 1'500;
        options.start = warm ? &before : nullptr;
        CAPTURE(cluster.nodes(), pairs, warm);
        const local_plan narrow = detail::search_local<std::uint64_t>(t.view(), cluster, options);
        const local_plan wide = detail::search_local<detail::wide_mask>(t.view(), cluster, options);
        CHECK(wide.experts == narrow.experts);
        CHECK(wide.source_of_request == narrow.source_of_request);
        CHECK(wide.copies_moved == narrow.copies_moved);
        CHECK(wide.reached.nodes_per_token == narrow.reached.nodes_per_token);
      }
    }
  }
}

TEST_CASE("clusters of more nodes than a machine word has bits") {
  const trace t = synthetic(12, 1, 96, 2, 256, 0, 4);
  for (const std::size_t nodes : {65u, 256u}) {
    const topology cluster = topology::uniform(nodes, 1, nodes == 65 ? 3 : 2);
    CAPTURE(nodes);
    local_options options;
    options.node_imbalance = 0;
    options.max_proposals = 6'000;
    const local_plan plan = local(t.view(), cluster, options);
    try_validate(plan.experts, cluster).value();
    const cost_report cost = judge(t, cluster, plan);
    std::vector<std::uint32_t> turns(256);
    for (std::size_t r = 0; r < 256; ++r) turns[r] = static_cast<std::uint32_t>(r % nodes);
    const cost_report contiguous_cost = evaluate(t.view(), contiguous(1, 96, cluster), cluster, turns);
    CHECK(cost.nodes_per_token() < 0.9 * contiguous_cost.nodes_per_token());
    CHECK(plan.reached.nodes_per_token == Approx(cost.nodes_per_token()).epsilon(0.03));
    std::set<std::uint32_t> used(plan.source_of_request.begin(), plan.source_of_request.end());
    CHECK(*used.rbegin() >= 64);  // requests run on nodes beyond the first word too
  }
}

TEST_CASE("in racks, less goes far; nodes that are all as far apart change nothing") {
  double before = 0, after = 0;
  for (const std::uint64_t seed : {std::uint64_t{3}, std::uint64_t{4}, std::uint64_t{5}}) {
    const trace t = synthetic(seed, 3, 32, 4, 60, 8, 24);
    for (const double pair_weight : {0.0, 1.0}) {
      for (const std::size_t slots : {std::size_t{8}, std::size_t{10}}) {
        const topology even = topology::uniform(4, 1, slots), racks = even.with_racks(2, 4);
        local_options options;
        options.node_weight = 1 - pair_weight;
        options.pair_weight = pair_weight;
        options.effort = 0.2;
        const local_plan plan = local(t.view(), even, options), near = local(t.view(), racks, options);
        const local_plan alike = local(t.view(), even.with_node_costs(std::vector<double>(16, 3.0)), options);
        CHECK(alike.experts == plan.experts);
        CHECK(alike.source_of_request == plan.source_of_request);
        validate(near.experts, racks);
        CHECK(token_spread(t, near, 4) < 1.1);
        before += judge(t, racks, plan).cost_per_token();
        after += judge(t, racks, near).cost_per_token();
      }
    }
  }
  CHECK(after < 0.99 * before);
}

TEST_CASE("the same seed gives the same plan, another seed another") {
  const trace t = synthetic(5, 2, 32, 4, 40, 0, 12);
  const topology cluster = topology::uniform(4, 2, 5);
  local_options options;
  options.effort = 0.2;
  for (const double pairs : {0.0, 1.0}) {
    options.node_weight = 1 - pairs;
    options.pair_weight = pairs;
    options.seed = 7;
    const local_plan a = local(t.view(), cluster, options), b = local(t.view(), cluster, options);
    CHECK(a.experts == b.experts);
    CHECK(a.source_of_request == b.source_of_request);
    options.seed = 8;
    CHECK_FALSE(local(t.view(), cluster, options).experts == a.experts);
  }
}

TEST_CASE("the plan is the same on any number of threads") {
  const trace t = synthetic(12, 5, 32, 4, 90, 0, 12, true);
  const topology cluster = topology::uniform(4, 2, 5);
  const tetromino::thread_executor threads(3);
  const auto backwards = [](std::size_t count, tetromino::task_ref task) {
    while (count > 0) task(--count);
  };
  for (const double pairs : {0.0, 1.0}) {
    local_options options;
    options.node_weight = 1 - pairs;
    options.pair_weight = pairs;
    options.effort = 0.2;
    options.sample_requests = 20;  // those that are not sampled are assigned in pieces
    const local_plan alone = local(t.view(), cluster, options);
    for (const tetromino::executor_ref e : {tetromino::executor_ref(threads), tetromino::executor_ref(backwards)}) {
      options.executor = e;
      const local_plan shared = local(t.view(), cluster, options);
      CHECK(shared.experts == alone.experts);
      CHECK(shared.source_of_request == alone.source_of_request);
      CHECK(shared.reached.nodes_per_token == alone.reached.nodes_per_token);
      CHECK(shared.reached.remote_pair_fraction == alone.reached.remote_pair_fraction);
      CHECK(shared.reached.node_imbalance == alone.reached.node_imbalance);
      options.start = &alone.experts;
      options.price_per_move = 1;
      const local_plan warm = local(t.view(), cluster, options);
      options.executor = {};
      CHECK(warm.experts == local(t.view(), cluster, options).experts);
      options.price_per_move = 0;
      options.start = nullptr;
    }
  }
}

TEST_CASE("layers that may not change stay as they are, and the others still get better") {
  const trace t = synthetic(13, 4, 32, 4, 40, 0, 16);
  const std::vector<std::uint32_t> even = {2, 0, 2}, second = {1}, too_many = {1, 4};
  for (const std::size_t slots : {4u, 5u}) {
    const topology cluster = topology::uniform(4, 2, slots);
    const placement start = contiguous(4, 32, cluster);
    local_options options;
    options.start = &start;
    options.layers = even;
    options.gpu_imbalance = 1.2;
    const local_plan some = local(t.view(), cluster, options);
    try_validate(some.experts, cluster).value();
    const cost_report cost = judge(t, cluster, some);
    local_plan none{start, some.source_of_request, {}, 0};
    const cost_report before = judge(t, cluster, none);
    for (const std::size_t l : {0u, 1u, 2u, 3u}) {
      CAPTURE(l);
      const bool same = std::equal(start.layer(l).begin(), start.layer(l).end(), some.experts.layer(l).begin());
      CHECK(same == (l % 2 == 1));
      CHECK((l % 2 == 1 || cost.visits_of_layer[l] < before.visits_of_layer[l]));
    }
    CHECK(some.reached.nodes_per_token == Approx(cost.nodes_per_token()).epsilon(0.03));
    CHECK(some.copies_moved == detail::copies_moved(start, some.experts, cluster));
  }

  const topology cluster = topology::uniform(4, 2, 5);
  const placement start = contiguous(4, 32, cluster);
  local_options options;
  options.layers = second;
  CHECK(code_of(try_local(t.view(), cluster, options)) == errc::invalid_argument);  // nothing to stay as
  options.start = &start;
  options.replicas = false;
  CHECK(code_of(try_local(t.view(), cluster, options)) == errc::invalid_argument);
  options.replicas = true;
  options.layers = too_many;
  CHECK(code_of(try_local(t.view(), cluster, options)) == errc::invalid_argument);
  options.layers = second;
  placement lost = start;
  for (std::int32_t& e : lost.layer(3)) e = e == 7 ? empty_slot : e;
  options.start = &lost;
  CHECK_FALSE(try_local(t.view(), cluster, options).has_value());
}

TEST_CASE("a plan in force is kept where moves cost more than they save") {
  const trace t = synthetic(6, 2, 32, 4, 40, 0, 16);
  const topology cluster = topology::uniform(4, 2, 4);
  const placement start = contiguous(2, 32, cluster);
  local_options options;
  options.start = &start;
  options.node_imbalance = 0;
  std::size_t moved_before = 1'000;
  for (const double price : {0.0, 20.0, 1e6}) {
    options.price_per_move = price;
    const local_plan plan = local(t.view(), cluster, options);
    CHECK(plan.copies_moved <= moved_before);
    moved_before = plan.copies_moved;
    if (price == 1e6) CHECK(plan.experts == start);
    if (price == 0) CHECK(plan.copies_moved > 8);
  }
}

TEST_CASE("a limit per GPU is met with spare slots") {
  // one expert serves half of all pairs
  generator g(9);
  std::vector<std::uint16_t> ids;
  std::vector<request> list;
  for (std::uint32_t r = 0; r < 32; ++r) {
    list.push_back({r * 8U, 8, 0, 0});
    for (std::size_t token = 0; token < 8; ++token) {
      ids.push_back(0);
      ids.push_back(static_cast<std::uint16_t>(1 + g.below(15)));
    }
  }
  const trace t = trace::make({1, 16, 2}, ids, list);
  const topology cluster = topology::uniform(2, 4, 3);
  local_options options;
  const double without = judge(t, cluster, local(t.view(), cluster, options)).gpu_imbalance;
  options.gpu_imbalance = 1.3;
  const local_plan plan = local(t.view(), cluster, options);
  try_validate(plan.experts, cluster).value();
  CHECK(judge(t, cluster, plan).gpu_imbalance < 0.75 * without);
}

TEST_CASE("nodes get pairs by what their GPUs can do") {
  const trace t = synthetic(14, 2, 32, 4, 60, 0, 16);
  const std::vector<double> speeds = {1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5};
  const std::vector<std::size_t> gpus = {1, 1, 2}, slots = {14, 14, 14, 14};
  const topology clusters[] = {topology::uniform(4, 2, 8).with_speeds(speeds), topology::make(gpus, slots)};
  for (const topology& cluster : clusters) {
    const topology alike = topology::with_node_slots(cluster.nodes(), 1, cluster.slots_on_node(0));
    local_options options;
    options.node_imbalance = 1.05;
    const local_plan plan = local(t.view(), cluster, options);
    CAPTURE(cluster.nodes());
    const cost_report cost = judge(t, cluster, plan);
    CHECK(cost.node_imbalance < 1.15);
    CHECK(plan.reached.node_imbalance == Approx(cost.node_imbalance).epsilon(0.05));
    if (cluster.slots() != alike.slots()) continue;
    // the same nodes taken for equals: the slow ones are the bottleneck
    CHECK(judge(t, cluster, local(t.view(), alike, options)).node_imbalance > 1.25);
  }
}

TEST_CASE("nodes get requests by the speed of their live GPUs, and dead ones none") {
  const trace t = synthetic(7, 2, 16, 2, 60, 3, 10);
  const auto plan_on = [&](const topology& cluster) { return local(t.view(), cluster, {.node_imbalance = 1.02}); };
  const auto requests_on = [](const local_plan& plan, std::size_t node) {
    return std::count(plan.source_of_request.begin(), plan.source_of_request.end(), node);
  };
  const topology whole = topology::uniform(3, 2, 8);
  for (const std::uint32_t dead : {0u, 1u}) {
    const topology left = whole.without(std::vector<std::uint32_t>{2 * dead, 2 * dead + 1});
    const local_plan plan = plan_on(left);
    CHECK(requests_on(plan, dead) == 0);
    CHECK(std::max(requests_on(plan, 2), requests_on(plan, 1 - dead)) <= 32);  // 1.05 × 30, rounded up
    local_options warm;
    warm.start = &plan.experts;
    CHECK(requests_on(local(t.view(), left, warm), dead) == 0);
  }
  CHECK(requests_on(plan_on(whole.without(std::vector<std::uint32_t>{2})), 1) <= 13);  // one of five GPUs: 1.05 × 12
  // each node holds all experts, so that pairs are served where requests are
  const topology fast = topology::uniform(2, 2, 8).with_speeds(std::vector<double>{1, 1, 4, 4});
  const local_plan plan = plan_on(fast);
  CHECK(requests_on(plan, 0) <= 13);
  CHECK(requests_on(plan, 1) <= 51);
  CHECK(plan.reached.node_imbalance < 1.1);
  CHECK(judge(t, fast, plan).node_imbalance < 1.1);
}

TEST_CASE("GPUs of a node share its pairs by their speed") {
  const trace t = synthetic(15, 2, 32, 4, 32, 0, 16);
  const std::vector<double> speeds = {1, 1, 0.25, 0.25, 1, 1, 0.25, 0.25};
  const topology alike = topology::uniform(2, 4, 5), cluster = alike.with_speeds(speeds);
  for (const double limit : {0.0, 1.2}) {
    local_options options;
    options.gpu_imbalance = limit;
    const double found = judge(t, cluster, local(t.view(), cluster, options)).gpu_imbalance;
    const double taken_for_equals = judge(t, cluster, local(t.view(), alike, options)).gpu_imbalance;
    CAPTURE(limit, found, taken_for_equals);
    CHECK(found < 0.85 * taken_for_equals);
  }
}

TEST_CASE("a search can be watched, ended and limited") {
  const trace t = synthetic(7, 2, 32, 4, 40, 0, 16);
  const topology cluster = topology::uniform(4, 2, 4);
  local_options options;
  std::vector<local_progress> seen;
  options.progress = [&](const local_progress& p) {
    seen.push_back(p);
    return true;
  };
  const local_plan whole = local(t.view(), cluster, options);
  REQUIRE(seen.size() > 2);
  CHECK(seen.back().step == seen.back().steps);
  CHECK(seen.back().nodes_per_token <= seen.front().nodes_per_token);
  CHECK(seen.back().nodes_per_token == whole.reached.nodes_per_token);
  options.progress = [&](const local_progress& p) { return p.step < 2; };
  const local_plan ended = local(t.view(), cluster, options);
  CHECK(ended.reached.step == 2);
  try_validate(ended.experts, cluster).value();
  options.progress = nullptr;
  options.max_proposals = 100;
  try_validate(local(t.view(), cluster, options).experts, cluster).value();
  options.max_proposals = 0;
  options.time_limit_seconds = 1e-6;
  const local_plan hurried = local(t.view(), cluster, options);
  try_validate(hurried.experts, cluster).value();
  CHECK(hurried.reached.step == hurried.reached.steps);
}

TEST_CASE("requests that were not sampled get a node too") {
  const trace t = synthetic(8, 2, 32, 4, 200, 0, 8);
  const topology cluster = topology::uniform(4, 2, 4);
  local_options options;
  options.sample_requests = 50;
  options.sample_tokens = 300;
  const local_plan plan = local(t.view(), cluster, options);
  CHECK(plan.source_of_request.size() == 200);
  CHECK(token_spread(t, plan, 4) <= 1.05 + 1e-9);
  CHECK(judge(t, cluster, plan).nodes_per_token() < 2.2);
}

TEST_CASE("little or odd input gives a sensible plan") {
  const topology cluster = topology::uniform(2, 2, 3);
  // one request of one token, and experts that nobody used
  const trace one = trace::make({1, 8, 2}, {5, 3}, {{0, 1, 0, 0}});
  const local_plan balanced = local(one.view(), cluster);
  try_validate(balanced.experts, cluster).value();
  CHECK(judge(one, cluster, balanced).remote_pairs <= 1);  // the limit keeps its two experts on different nodes
  local_options unlimited;
  unlimited.node_imbalance = 0;
  CHECK(judge(one, cluster, local(one.view(), cluster, unlimited)).remote_pairs == 0);
  // a request without decode tokens beside one that has some
  const trace two = trace::make({1, 8, 2}, {5, 3, 1, 2}, {{0, 1, 1, 0}, {1, 1, 0, 0}});
  CHECK(local(two.view(), cluster).source_of_request.size() == 2);
}

TEST_CASE("bad input is told apart") {
  const trace t = synthetic(10, 1, 8, 2, 4, 2, 2);
  const topology cluster = topology::uniform(2, 2, 2);
  const auto code = [&](const trace& from, const topology& on, const local_options& o) {
    return code_of(try_local(from.view(), on, o));
  };
  CHECK(code(t, topology::uniform(2, 1, 3), {}) == errc::infeasible);
  CHECK(code(t, topology::uniform(257, 1, 1), {}) == errc::invalid_argument);
  CHECK(code(trace::make({1, 8, 2}, {}, {}), cluster, {}) == errc::invalid_argument);
  const auto with = [&](const auto& change) {
    local_options o;
    change(o);
    return code(t, cluster, o);
  };
  CHECK(with([](local_options& o) { o.node_weight = 0; }) == errc::invalid_argument);
  CHECK(with([](local_options& o) { o.pair_weight = std::nan(""); }) == errc::invalid_argument);
  CHECK(with([](local_options& o) { o.node_weight = std::numeric_limits<double>::infinity(); }) ==
        errc::invalid_argument);
  CHECK(with([](local_options& o) { o.node_imbalance = 0.9; }) == errc::invalid_argument);
  CHECK(with([](local_options& o) { o.gpu_imbalance = std::nan(""); }) == errc::invalid_argument);
  CHECK(with([](local_options& o) { o.token_budget = 0.5; }) == errc::invalid_argument);
  CHECK(with([](local_options& o) { o.price_per_move = -1; }) == errc::invalid_argument);
  CHECK(with([](local_options& o) { o.sample_tokens = 0; }) == errc::invalid_argument);
  const placement other(1, 9, cluster.slots());
  CHECK(with([&](local_options& o) { o.start = &other; }) == errc::shape_mismatch);
}

TEST_CASE("a start without some or all of its experts is filled") {
  const trace t = synthetic(10, 1, 8, 2, 4, 2, 2);
  const topology cluster = topology::uniform(2, 2, 2);
  const placement nothing(1, 8, cluster.slots());
  local_options o;
  o.start = &nothing;
  const local_plan plan = local(t.view(), cluster, o);
  CHECK(try_validate(plan.experts, cluster).has_value());
}

TEST_CASE("recorded routing: far less traffic on the requests it was made from", "[.slow]") {
  const trace t = read_trace(tetromino_test::data_file("routing-128x8.small.safetensors"));
  const topology cluster = topology::uniform(8, 8, 2);
  const local_plan plan = local(t.view(), cluster);
  const cost_report cost = judge(t, cluster, plan);
  CHECK(cost.nodes_per_token() < 3.4);
  CHECK(cost.node_imbalance < 1.06);
}

TEST_CASE("local keeps copies on as many nodes as it is told, also from a plan that lost a node") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 20; ++i) {
    const topology t = topology::uniform(2 + g.below(3), 1 + g.below(2), 3 + g.below(4));
    const std::size_t experts = 1 + g.below(t.slots() / 2);
    const auto made = reference::make_routing(g.bits(), 2, experts, 1, 8, 0, 6, 2);
    std::vector<request> requests;
    for (std::uint64_t r = 0; r < 8; ++r) requests.push_back({r * 6, 6, 0, 0});
    const trace tr = trace::make({2, experts, 1}, made.ids, requests);
    local_options options;
    options.nodes_per_expert = 2;
    options.gpu_imbalance = g.below(2) == 0 ? 0 : 1.05;
    const auto plan = try_local(tr.view(), t, options);
    if (!plan) {
      REQUIRE(plan.error().code() == errc::infeasible);
      continue;
    }
    REQUIRE(try_validate(plan->experts, t, {.one_copy_per_gpu = false, .nodes_per_expert = 2}).has_value());
    // the last node dies; what it had is on another, and a plan for the rest starts from there
    std::vector<std::uint32_t> dead;
    for (std::size_t gpu = t.first_gpu(t.nodes() - 1); gpu < t.gpus(); ++gpu)
      dead.push_back(static_cast<std::uint32_t>(gpu));
    const topology left = t.without(dead);
    const placement start = carry_over(plan->experts, t, left);
    REQUIRE(try_validate(start, left, {.one_copy_per_gpu = false}).has_value());
    options.nodes_per_expert = 1;
    options.start = &start;
    REQUIRE(try_validate(local(tr.view(), left, options).experts, left, {.one_copy_per_gpu = false}).has_value());
  }
  const trace tr = trace::make({1, 2, 1}, {0, 1}, {{0, 2, 0, 0}});
  const topology t = topology::uniform(2, 1, 2);
  local_options options;
  options.nodes_per_expert = 3;
  CHECK(code_of(try_local(tr.view(), t, options)) == errc::infeasible);
  options.nodes_per_expert = 0;
  CHECK(code_of(try_local(tr.view(), t, options)) == errc::invalid_argument);
  options.nodes_per_expert = 2;
  options.replicas = false;
  CHECK(code_of(try_local(tr.view(), t, options)) == errc::invalid_argument);
  // a start that lacks experts
  const placement nothing(1, 2, 4);
  options = {};
  options.start = &nothing;
  CHECK(try_validate(local(tr.view(), t, options).experts, t).has_value());
}

TEST_CASE("local plans around choices that nobody serves") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 8; ++i) {
    auto made = reference::make_routing(g.bits(), 2, 8, 2, 12, 2, 8, 3);
    for (auto& id : made.ids) id = g.below(4) == 0 ? no_expert : id;
    std::vector<request> requests;
    for (std::uint64_t r = 0; r < 12; ++r) requests.push_back({r * 10, 10, 2, 0});
    const trace tr = trace::make({2, 8, 2}, made.ids, requests);
    const topology t = topology::uniform(3, 1, 4);
    const local_plan plan = local(tr.view(), t);
    REQUIRE(try_validate(plan.experts, t).has_value());
    cost_options options;
    options.replicas.choice = replica_choice::fewest_nodes;
    const cost_report r = evaluate(tr.view(), plan.experts, t, plan.source_of_request, options);
    CHECK(static_cast<double>(r.remote_visits) <= plan.reached.nodes_per_token * 12 * 8 * 2 + 1e-6);
  }
}

TEST_CASE("a warm start at no price is never worse than a cold one") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 10; ++i) {
    const topology t = topology::uniform(3, 1, 5);
    const auto trace_of = [&] {
      const auto made = reference::make_routing(g.bits(), 2, 12, 2, 30, 0, 12, 3);
      std::vector<request> requests;
      for (std::uint64_t r = 0; r < 30; ++r) requests.push_back({r * 12, 12, 0, 0});
      return trace::make({2, 12, 2}, made.ids, requests);
    };
    const trace before = trace_of(), now = trace_of();
    const placement start = local(before.view(), t).experts;
    local_options warm, cold;
    warm.start = &start;
    const auto value = [&](const local_plan& p) { return detail::local_value(p, cold, now.shape()); };
    CHECK(value(local(now.view(), t, warm)) <= value(local(now.view(), t, cold)) + 1e-12);
  }
}
