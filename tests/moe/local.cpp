#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/local.hpp>
#include <tetromino/moe/trace_io.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::max
#include <numeric>    // std::iota

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

/// Requests that each prefer some experts; any sizes.
trace random_trace(generator& g, routing_shape shape, std::size_t requests) {
  std::vector<std::uint16_t> ids;
  std::vector<request> list;
  std::vector<std::uint16_t> experts(shape.experts);
  std::iota(experts.begin(), experts.end(), std::uint16_t{0});
  std::uint64_t first = 0;
  for (std::size_t r = 0; r < requests; ++r) {
    const auto tokens = static_cast<std::uint32_t>(2 + g.below(20));
    const std::size_t favourite = g.below(shape.experts);
    for (std::size_t row = 0; row < tokens * shape.layers; ++row) {
      for (std::size_t i = 0; i < shape.experts_per_token; ++i) {
        const std::size_t rest = shape.experts - i;
        std::swap(experts[i], experts[i + (g.below(2) != 0 ? g.below(rest) : favourite % rest)]);
      }
      ids.insert(ids.end(), experts.begin(), experts.begin() + static_cast<std::ptrdiff_t>(shape.experts_per_token));
    }
    list.push_back({first, tokens, tokens / 2, 0});
    first += tokens;
  }
  return trace::make(shape, std::move(ids), std::move(list));
}

std::vector<std::uint32_t> in_turn(std::size_t requests, std::size_t nodes) {
  std::vector<std::uint32_t> sources(requests);
  for (std::size_t r = 0; r < requests; ++r) sources[r] = static_cast<std::uint32_t>(r % nodes);
  return sources;
}

}  // namespace

TEST_CASE("any shape gets a valid placement and a source for each request") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 200; ++i) {
    const std::size_t nodes = 1 + g.below(9), gpus = 1 + g.below(3), experts = 2 + g.below(30);
    const std::size_t needed = (experts + nodes * gpus - 1) / (nodes * gpus);
    const topology t = topology::uniform(nodes, gpus, needed + g.below(3));
    const routing_shape shape{1 + g.below(3), experts, 1 + g.below(std::min<std::size_t>(4, experts))};
    const trace from = random_trace(g, shape, 1 + g.below(12));
    CAPTURE(i, nodes, gpus, experts, t.slots(), shape.layers, shape.experts_per_token);
    local_options options;
    options.max_proposals = 300;
    options.seed = g.below(1000);
    options.replicas = g.below(2) != 0;
    options.pair_weight = static_cast<double>(g.below(2));
    const local_plan plan = local(from.view(), t, options);
    const auto valid = try_validate(plan.experts, t);
    if (!valid) FAIL(valid.error().what());
    REQUIRE(plan.source_of_request.size() == from.requests().size());
    for (const std::uint32_t source : plan.source_of_request) REQUIRE(source < nodes);
    const local_plan again = local(from.view(), t, options);
    REQUIRE(again.experts == plan.experts);
    REQUIRE(again.source_of_request == plan.source_of_request);
  }
}

TEST_CASE("recorded routing stays nearer than with experts in order, within the balance") {
  const trace recorded = read_trace(tetromino_test::data_file("routing-128x8.small.safetensors"));
  const topology t = topology::with_node_slots(8, 8, 16);
  const auto cost = [&](const placement& p, const std::vector<std::uint32_t>& sources) {
    return evaluate(recorded.view(), p, t, sources, {});
  };
  const cost_report plain = cost(contiguous(8, 128, t), in_turn(recorded.requests().size(), 8));
  const local_plan plan = local(recorded.view(), t);
  const cost_report near = cost(plan.experts, plan.source_of_request);
  CHECK(plain.nodes_per_token() > 4.4);
  CHECK(near.nodes_per_token() < 0.75 * plain.nodes_per_token());
  CHECK(near.node_imbalance < 1.10);

  local_options pairs;
  pairs.node_weight = 0;
  pairs.pair_weight = 1;
  const local_plan by_pairs = local(recorded.view(), t, pairs);
  CHECK(cost(by_pairs.experts, by_pairs.source_of_request).remote_pair_fraction() <
        0.85 * plain.remote_pair_fraction());
}

TEST_CASE("a price on moves keeps copies where they are") {
  const trace recorded = read_trace(tetromino_test::data_file("routing-128x8.small.safetensors"));
  const topology t = topology::with_node_slots(8, 8, 16);
  const placement start = contiguous(8, 128, t);
  local_options options;
  options.start = &start;
  options.max_proposals = 4000;
  const local_plan free = local(recorded.view(), t, options);
  options.price_per_move = 30;
  const local_plan priced = local(recorded.view(), t, options);
  CHECK(free.copies_moved > 200);
  CHECK(priced.copies_moved < free.copies_moved);
}

TEST_CASE("bad input is said") {
  generator g(tetromino_test::seed());
  const trace from = random_trace(g, {2, 16, 2}, 4);
  const topology t = topology::uniform(2, 2, 4);
  CHECK(code_of(try_local(from.view(), topology::uniform(2, 2, 3))) != errc::io);
  CHECK(code_of(try_local(from.view().with({}), t)) == errc::invalid_argument);
  CHECK(code_of(try_local(from.view(), topology::uniform(65, 1, 4))) == errc::invalid_argument);
  local_options options;
  options.node_weight = options.pair_weight = 0;
  CHECK(code_of(try_local(from.view(), t, options)) == errc::invalid_argument);
  options = {};
  options.node_imbalance = 0.5;
  CHECK(code_of(try_local(from.view(), t, options)) == errc::invalid_argument);
  const placement other = contiguous(1, 16, t);
  options = {};
  options.start = &other;
  CHECK(code_of(try_local(from.view(), t, options)) == errc::shape_mismatch);
}
