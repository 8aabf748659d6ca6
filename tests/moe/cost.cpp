#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/trace_io.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"
#include "reference/routing_cost.hpp"

#include <algorithm>  // std::max
#include <cmath>      // std::nan
#include <numeric>    // std::accumulate
#include <utility>    // std::swap
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;
using tetromino_test::contains;

trace random_trace(generator& g, const routing_shape& shape, std::size_t requests) {
  std::vector<std::uint16_t> ids, deck(shape.experts);
  std::vector<request> list;
  std::uint64_t tokens = 0;
  for (std::size_t r = 0; r < requests; ++r) {
    const auto n = static_cast<std::uint32_t>(g.below(5));
    list.push_back({tokens, n, static_cast<std::uint32_t>(g.below(n + 1)), static_cast<std::uint32_t>(g.below(2))});
    tokens += n;
  }
  for (std::size_t e = 0; e < deck.size(); ++e) deck[e] = static_cast<std::uint16_t>(e);
  for (std::size_t row = 0; row < tokens * shape.layers; ++row) {
    for (std::size_t i = 0; i < shape.experts_per_token; ++i) {
      std::swap(deck[i], deck[i + g.below(deck.size() - i)]);
      ids.push_back(deck[i]);
    }
  }
  return trace::make(shape, std::move(ids), std::move(list));
}

/// Any valid placement, also with two copies on one GPU.
placement random_placement(generator& g, std::size_t layers, std::size_t experts, std::size_t slots) {
  placement p(layers, experts, slots);
  std::vector<std::size_t> order(slots);
  for (std::size_t s = 0; s < slots; ++s) order[s] = s;
  for (std::size_t l = 0; l < layers; ++l) {
    for (std::size_t s = 0; s < slots; ++s) {
      std::swap(order[s], order[s + g.below(slots - s)]);
      const bool extra = s >= experts;
      p.layer(l)[order[s]] = extra ? static_cast<std::int32_t>(g.below(experts + 1)) - 1 : static_cast<std::int32_t>(s);
    }
  }
  return p;
}

}  // namespace

TEST_CASE("a case counted by hand") {
  // nodes {0, 1} of two GPUs with one slot each; experts 0 1 | 2 3; one request of two tokens on node 0
  const topology t = topology::uniform(2, 2, 1, {.inside = {100, 1}, .between = {10, 2}});
  const placement p = contiguous(1, 4, t);
  const trace tr = trace::make({1, 4, 2}, {0, 1, 2, 3}, {{0, 2, 0, 0}});
  const std::vector<std::uint32_t> sources = {0};
  cost_options options;
  options.hidden = 10;
  options.dispatch_bytes_per_value = 1;
  options.combine_bytes_per_value = 2;
  const cost_report r = evaluate(tr.view(), p, t, sources, options);
  CHECK(r.tokens == 2);
  CHECK(r.pairs == 4);
  CHECK(r.remote_pairs == 2);
  CHECK(r.remote_visits == 1);
  CHECK(r.remote_pair_fraction() == 0.5);
  CHECK(r.nodes_per_token() == 0.5);
  CHECK(r.pairs_on_gpu == std::vector<std::uint64_t>{1, 1, 1, 1});
  CHECK(r.pairs_on_nodes(0, t) == std::vector<std::uint64_t>{2, 2});
  CHECK(r.copies_between == std::vector<std::uint64_t>{0, 1, 0, 0});
  CHECK(r.node_imbalance == 1);
  CHECK(r.gpu_imbalance == 1);
  CHECK(r.between_nodes.dispatch == 10);
  CHECK(r.between_nodes.combine == 20);
  // token 0 is on GPU 0 and fans out to GPU 1; token 1 is on GPU 1, lands on GPU 3 and fans out to GPU 2
  CHECK(r.inside_nodes.dispatch == 20);
  CHECK(r.inside_nodes.combine == 40);
  // one copy of 10 bytes over two ports of 10 bytes/s, then one of 10 bytes at 100 bytes/s, and both latencies
  CHECK(r.dispatch_seconds == Approx(0.5 + 2 + 0.1 + 1));
  CHECK(r.combine_seconds == Approx(1.0 + 2 + 0.2 + 1));

  options.copies = dispatch_copies::per_expert;
  options.tokens_per_step = 1;
  const cost_report e = evaluate(tr.view(), p, t, sources, options);
  CHECK(e.copies_between == std::vector<std::uint64_t>{0, 2, 0, 0});
  CHECK(e.inside_nodes.dispatch == 10);
  CHECK(e.dispatch_seconds == Approx(1.0 + 2 * 2 + 0.1 + 2 * 1));
}

TEST_CASE("dead GPUs send and receive nothing") {
  // GPU 0 of node 0 and GPU 4 of node 1 are dead: tokens are on GPUs 1 and 2, and land on 3 and 5
  const topology t =
      topology::uniform(2, 3, 1, {.inside = {100, 1}, .between = {10, 2}}).without(std::vector<std::uint32_t>{0, 4});
  const placement p = placement::make(1, 2, 4, {-1, -1, 0, 1});
  const trace tr = trace::make({1, 2, 1}, {0, 0, 1, 1}, {{0, 4, 0, 0}});
  const std::vector<std::uint32_t> sources = {0};
  cost_options options;
  options.hidden = 10;
  const cost_report r = evaluate(tr.view(), p, t, sources, options);
  CHECK(r.inside_nodes.dispatch == 20);                    // of two tokens that want the other GPU
  CHECK(r.dispatch_seconds == Approx(2.0 + 2 + 0.1 + 1));  // four copies from two ports, one to each GPU inside
}

TEST_CASE("GPUs of unequal speed with as many slots are as even as their experts allow, with slots by speed wholly") {
  // experts of equal loads: a quarter of them each, where the slow ones can do a tenth
  const std::vector<double> speeds = {1, 1, 4, 4};
  const std::vector<std::uint32_t> source = {0};
  const auto imbalance = [&](const std::vector<std::size_t>& slots, std::size_t experts = 20) {
    std::vector<std::uint16_t> ids(200 * experts);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::uint16_t>(i % experts);
    const trace served = trace::make({1, experts, 1}, ids, {{0, static_cast<std::uint32_t>(ids.size()), 0, 0}});
    const topology t = topology::make(std::vector<std::size_t>{2, 2}, slots).with_speeds(speeds);
    const std::vector<double> loads(experts, 1.0);
    cost_options options;
    options.replicas.choice = replica_choice::least_loaded;
    return evaluate(served.view(), balanced({1, experts, loads}, t), t, source, options).gpu_imbalance;
  };
  CHECK(imbalance({5, 5, 5, 5}) == Approx(2.5));
  CHECK(imbalance({2, 2, 8, 8}) == Approx(1));
  // with spare slots, copies on slow GPUs serve less than those on fast ones
  for (const std::size_t experts : {10u, 11u, 12u}) CHECK(imbalance({5, 5, 5, 5}, experts) < 1.01);
}

TEST_CASE("what goes to another rack takes ports for longer") {
  // racks {0, 1} and {2}; a token on node 0 is sent to both others
  const topology near = topology::uniform(3, 1, 1, {.inside = {100, 1}, .between = {10, 2}});
  const topology t = near.with_racks(2, 4);
  const placement p = contiguous(1, 3, t);
  const trace tr = trace::make({1, 3, 3}, {0, 1, 2}, {{0, 1, 0, 0}});
  const std::vector<std::uint32_t> sources = {0};
  cost_options options;
  options.hidden = 10;
  const cost_report r = evaluate(tr.view(), p, t, sources, options);
  CHECK(r.nodes_per_token() == 2);
  CHECK(r.cost_per_token() == 5);
  CHECK(r.between_nodes.dispatch == 20);
  CHECK(r.dispatch_seconds == Approx(5.0 + 2));
  CHECK(evaluate(tr.view(), p, near, sources, options).cost_per_token() == 2);
}

TEST_CASE("copies come from the nearest node that has one") {
  // expert 0 is on nodes 1 and 2; node 2 is in the token's rack
  const topology t = topology::uniform(4, 1, 1).with_node_costs(std::vector<double>{0, 3, 1, 3,  //
                                                                                    3, 0, 3, 1,  //
                                                                                    1, 3, 0, 3,  //
                                                                                    3, 1, 3, 0});
  const placement p = placement::make(1, 2, 4, {1, 0, 0, 1});
  const trace tr = trace::make({1, 2, 1}, {0, 0}, {{0, 1, 0, 0}, {1, 1, 0, 0}});
  const std::vector<std::uint32_t> sources = {0, 3};
  for (const replica_choice choice : {replica_choice::nearest, replica_choice::fewest_nodes}) {
    cost_options options;
    options.replicas.choice = choice;
    const cost_report r = evaluate(tr.view(), p, t, sources, options);
    CHECK(r.copies_between == std::vector<std::uint64_t>{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0});
    CHECK(r.cost_per_token() == 1);
  }
}

TEST_CASE("a node that many send to is the busiest by what comes in") {
  // requests on nodes 0 and 1, all experts on node 2: two copies leave each, four arrive
  const topology t = topology::uniform(3, 1, 2, {.inside = {100, 1}, .between = {10, 2}});
  const placement p = placement::make(1, 2, 6, {-1, -1, -1, -1, 0, 1});
  const trace tr = trace::make({1, 2, 1}, {0, 1, 1, 0}, {{0, 2, 0, 0}, {2, 2, 0, 0}});
  cost_options options;
  options.hidden = 10;
  const std::vector<std::uint32_t> sources = {0, 1};
  CHECK(evaluate(tr.view(), p, t, sources, options).dispatch_seconds == Approx(4.0 + 2));
  CHECK(evaluate(tr.view(), p, t.with_racks(2, 4), sources, options).dispatch_seconds == Approx(4 * 4.0 + 2));
}

TEST_CASE("a GPU that others of its node send to is the busiest by what comes in") {
  // requests on GPUs 0 and 1, all experts on GPU 2: two copies leave each, four arrive
  const topology t = topology::uniform(1, 3, 2, {.inside = {100, 1}, .between = {10, 2}});
  const placement p = placement::make(1, 2, 6, {-1, -1, -1, -1, 0, 1});
  const trace tr = trace::make({1, 2, 1}, {0, 1, 1, 0}, {{0, 2, 0, 0}, {2, 2, 0, 0}});
  cost_options options;
  options.hidden = 10;
  options.sources = source_kind::gpu;
  const std::vector<std::uint32_t> sources = {0, 1};
  CHECK(evaluate(tr.view(), p, t, sources, options).dispatch_seconds == Approx(0.4 + 1));
}

TEST_CASE("of a hundred steps, one may be above the 99th percentile") {
  const topology t = topology::uniform(1, 2, 1);
  const placement p = placement::make(1, 2, 2, {0, 1});
  std::vector<std::uint16_t> ids;
  for (std::uint16_t i = 0; i < 200; ++i) ids.push_back(i == 1 ? 0 : i % 2);  // both tokens of the first step alike
  const trace tr = trace::make({1, 2, 1}, ids, {{0, 200, 0, 0}});
  cost_options options;
  options.tokens_per_step = 2;
  const std::vector<std::uint32_t> sources = {0};
  const step_figures got = evaluate(tr.view(), p, t, sources, options).step_gpu_imbalance;
  CHECK(got.p99 == 1);
  CHECK(got.worst == 2);
  CHECK(got.mean == Approx(1.01));
}

TEST_CASE("cost equals the plain count on random clusters, placements and traces") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 2000; ++i) {
    std::vector<std::size_t> gpus(1 + g.below(4)), slots;
    for (auto& n : gpus) n = 1 + g.below(3);
    for (std::size_t j = std::accumulate(gpus.begin(), gpus.end(), std::size_t{0}); j > 0; --j) {
      slots.push_back(g.below(4));
    }
    slots[0] += 1;
    topology t = topology::make(gpus, slots);
    std::vector<std::vector<std::size_t>> ways;  // what a copy from node to node costs
    if (g.below(2) == 0) {
      ways.assign(gpus.size(), std::vector<std::size_t>(gpus.size(), 1));
      std::vector<double> costs(gpus.size() * gpus.size(), std::nan(""));
      for (std::size_t a = 0; a < gpus.size(); ++a) {
        for (std::size_t b = 0; b < a; ++b) {
          ways[a][b] = ways[b][a] = 1 + g.below(3);
          costs[a * gpus.size() + b] = costs[b * gpus.size() + a] = static_cast<double>(ways[a][b]);
        }
      }
      t = t.with_node_costs(costs);
    }
    const routing_shape shape{1 + g.below(3), 1 + g.below(t.slots()), 1};
    const routing_shape full{shape.layers, shape.experts, 1 + g.below(std::min<std::size_t>(shape.experts, 5))};
    const trace tr = random_trace(g, full, 1 + g.below(6));
    const placement p = random_placement(g, full.layers, full.experts, t.slots());

    cost_options options;
    options.sources = g.below(2) == 0 ? source_kind::node : source_kind::gpu;
    options.copies = g.below(2) == 0 ? dispatch_copies::per_node : dispatch_copies::per_expert;
    options.replicas.choice = static_cast<replica_choice>(g.below(4));
    options.tokens = static_cast<phase>(g.below(3));
    options.hidden = 1;
    const bool on_node = options.sources == source_kind::node;
    std::vector<std::uint32_t> sources(tr.requests().size());
    for (auto& s : sources) s = static_cast<std::uint32_t>(g.below(on_node ? t.nodes() : t.gpus()));
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), full.layers, full.experts, full.experts_per_token);

    reference::routing_world world{gpus, slots, {}, {}, {}, ways};
    const auto running = reference::running_gpus(gpus, slots);
    for (std::size_t l = 0; l < full.layers; ++l) world.placement.emplace_back(p.layer(l).begin(), p.layer(l).end());
    for (std::size_t r = 0; r < sources.size(); ++r) {
      const token_range range = tr.requests()[r].range(options.tokens);
      for (std::uint64_t token = range.first; token < range.last; ++token) {
        world.tokens.emplace_back();
        for (std::size_t l = 0; l < full.layers; ++l) {
          const auto ids = tr.view().experts_of(token, l);
          world.tokens.back().emplace_back(ids.begin(), ids.end());
        }
        const std::vector<std::size_t>& runs = running[on_node ? sources[r] : t.node_of_gpu(sources[r])];
        world.home_gpu.push_back(on_node ? runs[token % runs.size()] : sources[r]);
      }
    }
    const auto expected = reference::count_cost(world, static_cast<reference::copies_rule>(options.replicas.choice),
                                                options.copies == dispatch_copies::per_node);
    const cost_report got = evaluate(tr.view(), p, t, sources, options);
    REQUIRE(got.tokens == world.tokens.size());
    REQUIRE(got.remote_pairs == expected.remote_pairs);
    REQUIRE(got.remote_visits == expected.remote_visits);
    REQUIRE(got.between_nodes.dispatch == static_cast<double>(expected.copies_between));
    REQUIRE(got.between_nodes.combine == 2 * static_cast<double>(expected.copies_between));
    REQUIRE(got.inside_nodes.dispatch == static_cast<double>(expected.copies_inside));
    for (std::size_t a = 0; a < t.nodes(); ++a) {
      for (std::size_t b = 0; b < t.nodes(); ++b) {
        const auto found = expected.node_to_node.find({a, b});
        REQUIRE(got.copies_between[a * t.nodes() + b] == (found == expected.node_to_node.end() ? 0 : found->second));
      }
    }
    std::size_t cost = 0;
    for (const auto& [way, copies] : expected.node_to_node) cost += copies * world.cost(way.first, way.second);
    REQUIRE(got.copies_cost == static_cast<double>(cost));
    double imbalance = 0, worst = 0;
    for (std::size_t l = 0; l < full.layers; ++l) {
      double most = 0, sum = 0, units = 0;
      for (std::size_t gpu = 0; gpu < t.gpus(); ++gpu) {
        const auto pairs = static_cast<double>(expected.pairs_on_gpu[l][gpu]);
        REQUIRE(static_cast<double>(got.pairs_on_gpu[l * t.gpus() + gpu]) == pairs);
        most = std::max(most, pairs);
        sum += pairs;
        units += slots[gpu] > 0 ? 1 : 0;
      }
      const double ratio = sum > 0 ? most * units / sum : 1;
      imbalance += ratio / static_cast<double>(full.layers);
      worst = std::max(worst, ratio);
    }
    REQUIRE(got.gpu_imbalance == Approx(imbalance));
    REQUIRE(got.worst_gpu_imbalance == Approx(worst));
  }
}

TEST_CASE("the bundled routing under a contiguous placement, requests dealt in turn") {
  const trace tr = read_trace(tetromino_test::data_file("routing-128x8.safetensors"));
  const topology t = topology::with_node_slots(8, 8, 16);
  std::vector<std::uint32_t> sources(tr.requests().size());
  for (std::size_t r = 0; r < sources.size(); ++r) sources[r] = static_cast<std::uint32_t>(r % 8);
  const cost_report r = evaluate(tr.view(), contiguous(8, 128, t), t, sources);
  // one node in eight is the token's own
  CHECK(r.remote_pair_fraction() == Approx(7.0 / 8).margin(0.005));
  CHECK(r.nodes_per_token() == Approx(4.63).margin(0.03));
  CHECK(r.node_imbalance == Approx(1.24).margin(0.03));
  // each row of the traffic matrix adds up to what its node sent
  CHECK(std::accumulate(r.copies_between.begin(), r.copies_between.end(), std::uint64_t{0}) == r.remote_visits);
  // one node: nothing leaves it
  const topology one = topology::uniform(1, 8, 16);
  const cost_report alone = evaluate(tr.view(), contiguous(8, 128, one), one, std::vector<std::uint32_t>(480, 0));
  CHECK(alone.remote_pairs == 0);
  CHECK(alone.between_nodes.total() == 0);
  CHECK(alone.inside_nodes.total() > 0);
}

TEST_CASE("fewest_nodes visits fewer nodes than nearest") {
  // expert 0 is on nodes 1 and 2, expert 1 on nodes 2 and 3: node 2 has both, node 1 comes first
  const topology t = topology::uniform(4, 1, 3);
  const placement p = placement::make(1, 4, 12, {2, -1, -1, 0, 3, -1, 0, 1, -1, 1, -1, -1});
  const trace tr = trace::make({1, 4, 2}, {0, 1}, {{0, 1, 0, 0}});
  const std::vector<std::uint32_t> home = {0};
  cost_options options;
  CHECK(evaluate(tr.view(), p, t, home, options).remote_visits == 2);
  options.replicas.choice = replica_choice::fewest_nodes;
  CHECK(evaluate(tr.view(), p, t, home, options).remote_visits == 1);
}

TEST_CASE("no tokens cost nothing") {
  const topology t = topology::uniform(2, 1, 2);
  const trace empty = trace::make({1, 4, 2}, {}, {});
  const cost_report r = evaluate(empty.view(), contiguous(1, 4, t), t, {});
  CHECK(r.tokens == 0);
  CHECK(r.remote_pair_fraction() == 0);
  CHECK(r.nodes_per_token() == 0);
  CHECK(r.node_imbalance == 1);
  CHECK(r.dispatch_seconds == 0);
}

TEST_CASE("with a node limit, pairs leave a busy node for another that the token visits anyway") {
  const topology t = topology::uniform(2, 1, 2);
  const placement p = placement::make(1, 3, 4, {0, 1, 0, 2});
  std::vector<std::uint16_t> ids;
  for (std::uint16_t token = 0; token < 100; ++token) {
    ids.push_back(0);
    ids.push_back(token % 2 == 0 ? 1 : 2);
  }
  const trace tr = trace::make({1, 3, 2}, ids, {{0, 100, 0, 0}});
  const std::vector<std::uint32_t> at_0 = {0};
  cost_options options;
  options.replicas.choice = replica_choice::fewest_nodes;
  const cost_report without = evaluate(tr.view(), p, t, at_0, options);
  options.replicas.node_limit = 1.05;
  const cost_report with = evaluate(tr.view(), p, t, at_0, options);
  CHECK(without.node_imbalance == Approx(1.5));
  CHECK(with.node_imbalance < 1.07);
  CHECK(with.remote_visits == without.remote_visits);
  CHECK(with.remote_pairs > without.remote_pairs);
  CHECK(with.pairs_on_gpu[0] + with.pairs_on_gpu[1] == 200);
  options.replicas.node_limit = -1;
  CHECK(code_of(try_evaluate(tr.view(), p, t, at_0, options)) == errc::invalid_argument);
}

TEST_CASE("inputs that do not fit together are errors") {
  const topology t = topology::uniform(2, 1, 2);
  const placement p = contiguous(1, 4, t);
  const trace tr = trace::make({1, 4, 2}, {0, 1}, {{0, 1, 0, 0}});
  const std::vector<std::uint32_t> sources = {1};
  CHECK(try_evaluate(tr.view(), p, t, sources).has_value());
  CHECK(code_of(try_evaluate(tr.view(), contiguous(2, 4, t), t, sources)) == errc::shape_mismatch);
  CHECK(code_of(try_evaluate(tr.view(), contiguous(1, 3, t), t, sources)) == errc::shape_mismatch);
  CHECK(code_of(try_evaluate(tr.view(), placement(1, 4, 4), t, sources)) == errc::invalid_argument);
  CHECK(code_of(try_evaluate(tr.view(), p, topology::uniform(2, 1, 3), sources)) == errc::shape_mismatch);
  CHECK(code_of(try_evaluate(tr.view(), p, t, {})) == errc::shape_mismatch);
  CHECK_THROWS_WITH(evaluate(tr.view(), p, t, std::vector<std::uint32_t>{2}),
                    contains("expected sources below 2, got 2 for request 0"));
  cost_options bad;
  bad.dispatch_bytes_per_value = std::nan("");
  CHECK(code_of(try_evaluate(tr.view(), p, t, sources, bad)) == errc::invalid_argument);
  replica_chooser chooser(p, t);
  std::vector<std::uint32_t> gpus(2);
  const std::vector<std::uint16_t> ids = {0, 9};
  CHECK_THROWS_AS(chooser.choose(0, ids, 0, gpus), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(chooser.choose(1, ids, 0, gpus), tetromino_test::precondition_failed);
}
