#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::max, std::max_element
#include <cmath>      // std::nan
#include <cstdint>    // std::uint16_t
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

/// Requests of `kinds` kinds in turn; kind i uses experts 4i … 4i + 3, two per token and layer.
trace kinds_of_requests(std::size_t kinds, std::size_t requests, std::uint32_t tokens) {
  generator g(1);
  std::vector<std::uint16_t> ids;
  std::vector<request> list;
  for (std::size_t r = 0; r < requests; ++r) {
    list.push_back({r * tokens, tokens, tokens / 2, static_cast<std::uint32_t>(r % kinds)});
    for (std::size_t row = 0; row < tokens * 2; ++row) {
      const std::size_t a = g.below(4), b = (a + 1 + g.below(3)) % 4;
      for (const std::size_t e : {a, b}) ids.push_back(static_cast<std::uint16_t>(4 * (r % kinds) + e));
    }
  }
  return trace::make({2, 4 * kinds, 2}, std::move(ids), std::move(list));
}

std::vector<request_signature> signatures(const trace& t, const node_affinity& affinity) {
  signature_builder builder = affinity.builder();
  std::vector<request_signature> out;
  for (const request& r : t.requests()) out.push_back(signature_of(t.view(), r, builder));
  return out;
}

}  // namespace

TEST_CASE("a signature counts uses, the last tokens most") {
  signature_builder builder({1, 8, 1});
  builder.begin(40);
  for (std::uint16_t i = 0; i < 40; ++i) {
    const std::uint16_t e = i < 8 ? 5 : 2;
    builder.add({&e, 1});
  }
  request_signature s;
  builder.write(s);
  REQUIRE(s.entries.size() == 2);
  CHECK(s.entries[0].cell == 2);
  CHECK(s.entries[0].weight == 32 * 16);
  CHECK(s.entries[1].cell == 5);
  CHECK(s.entries[1].weight == 8 * 8);
  builder.begin(1);
  builder.write(s);
  CHECK(s.entries.empty());
}

TEST_CASE("signatures can be cut down") {
  const std::vector<std::uint16_t> token{0, 1, 4, 5, 6, 7};
  signature_builder top({3, 8, 2}, {1, 0}), hashed({3, 8, 2}, {0, 1});
  request_signature s;
  top.begin(1);
  top.add(token);
  top.write(s);
  REQUIRE(s.entries.size() == 3);
  CHECK(s.entries[1].cell == 8 + 4);
  signature_builder most_used({1, 8, 1}, {1, 0});  // expert 6 twice, expert 3 once
  most_used.begin(3);
  for (const std::uint16_t e : {std::uint16_t{6}, std::uint16_t{3}, std::uint16_t{6}}) most_used.add({&e, 1});
  most_used.write(s);
  REQUIRE(s.entries.size() == 1);
  CHECK(s.entries[0].cell == 6);
  CHECK(hashed.buckets() == 1);
  hashed.begin(1);
  hashed.add(std::vector<std::int32_t>(token.begin(), token.end()));
  hashed.write(s);
  CHECK(s.entries.size() == 6);
  for (const auto& e : s.entries) CHECK(e.cell < 8);
  CHECK_THROWS_AS(top.add({}), tetromino_test::precondition_failed);
}

TEST_CASE("requests go where their experts are, within the budget") {
  const trace t = kinds_of_requests(4, 32, 6);
  const topology cluster = topology::uniform(4, 2, 2);
  const placement p = contiguous(2, 16, cluster);
  for (const double pairs : {0.0, 1.0}) {
    for (const signature_options cut : {signature_options{0, 0}, {2, 0}, {0, 1}}) {
      group_options options;
      options.node_weight = 1 - pairs;
      options.pair_weight = pairs;
      options.signature = cut;
      const node_affinity affinity = node_affinity::make(p, cluster, t.view(), options);
      const std::vector<request_signature> s = signatures(t, affinity);
      const std::vector<std::uint64_t> tokens(32, 3);
      const std::vector<std::uint32_t> batch = group(affinity, s, tokens);
      for (std::size_t r = 0; r < 32; ++r) CHECK(batch[r] == r % 4);
      CHECK(evaluate(t.view(), p, cluster, batch).remote_pairs == 0);
      online_grouper online(affinity);
      for (std::size_t r = 0; r < 32; ++r) CHECK(online.assign(s[r], 3) == r % 4);
    }
  }
}

TEST_CASE("requests find their experts among more nodes than a machine word has bits") {
  const std::size_t kinds = 100;
  const trace t = kinds_of_requests(kinds, 2 * kinds, 12);
  const topology cluster = topology::uniform(kinds, 1, 4);
  const node_affinity affinity = node_affinity::make(contiguous(2, 4 * kinds, cluster), cluster, t.view());
  const auto where = group(affinity, signatures(t, affinity), std::vector<std::uint64_t>(2 * kinds, 1));
  for (std::size_t r = 0; r < where.size(); ++r) CHECK(where[r] == r % kinds);
}

TEST_CASE("the budget holds when all requests want one node") {
  const trace t = kinds_of_requests(4, 32, 6);
  const topology cluster = topology::uniform(4, 2, 2);
  const node_affinity affinity = node_affinity::make(contiguous(2, 16, cluster), cluster, t.view());
  const std::vector<request_signature> s(40, signatures(t, affinity)[0]);
  const std::vector<std::uint64_t> tokens(40, 7);
  std::vector<int> on_node(4, 0);
  for (const std::uint32_t n : group(affinity, s, tokens)) ++on_node[n];
  CHECK(on_node == std::vector<int>{10, 10, 10, 10});
  online_grouper free_start(affinity, {40 * 7, 0.1});
  for (std::size_t r = 0; r < 40; ++r) {
    const std::uint32_t n = free_start.assign(s[r], 7);
    CHECK((r >= 10 || n == 0));
  }
  for (const std::uint64_t n : free_start.tokens_on_node()) CHECK(n == 70);
}

TEST_CASE("nodes take tokens by their GPUs") {
  const trace t = kinds_of_requests(2, 8, 4);
  const std::vector<std::size_t> gpus{3, 1}, slots{2, 1, 1, 4};
  const topology cluster = topology::make(gpus, slots);
  const node_affinity affinity = node_affinity::make(contiguous(2, 8, cluster), cluster, t.view());
  const std::vector<request_signature> s(40, signatures(t, affinity)[0]);
  std::vector<int> on_node(2, 0);
  for (const std::uint32_t n : group(affinity, s, std::vector<std::uint64_t>(40, 1))) ++on_node[n];
  CHECK(on_node == std::vector<int>{31, 9});
}

TEST_CASE("an earlier turn keeps a request on its node, and ended requests make room") {
  const trace t = kinds_of_requests(2, 8, 4);
  const topology cluster = topology::uniform(2, 1, 4);
  const node_affinity affinity = node_affinity::make(contiguous(2, 8, cluster), cluster, t.view());
  const std::vector<request_signature> s = signatures(t, affinity);
  online_grouper sticky(affinity, {1'000, 2.0}), fickle(affinity, {1'000, 0.0});
  CHECK(sticky.assign(s[0], 1, 1) == 1);
  CHECK(fickle.assign(s[0], 1, 1) == 0);
  CHECK(sticky.tokens_on_node()[1] == 1);
  sticky.release(1, 1);
  CHECK(sticky.tokens_on_node()[1] == 0);
  // nor do they count in the budget: the next request is judged as if it were the first
  for (std::size_t i = 0; i < 2; ++i) {
    online_grouper again(affinity);
    const std::uint32_t wanted = again.assign(s[i], 1'000);
    CHECK(wanted == i % 2);
    again.release(wanted, 1'000);
    CHECK(again.assign(s[i], 10) == wanted);      // over the budget anywhere: where it belongs
    CHECK(again.assign(s[i], 10) == 1 - wanted);  // 20 on one node of two would be above 1.05 × the mean
  }
  CHECK_THROWS_AS(sticky.release(1, 1), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(sticky.assign(s[0], 1, 9), tetromino_test::precondition_failed);
}

TEST_CASE("exchanges find the best assignment of small batches") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  double lost = 0;
  for (std::size_t round = 0; round < 200; ++round) {
    std::vector<std::int64_t> scores(18);
    for (std::int64_t& x : scores) x = static_cast<std::int64_t>(g.below(1000));
    const std::vector<std::uint64_t> tokens(6, 1);
    const std::vector<std::int64_t> room(3, 2);
    std::vector<std::uint32_t> sources(6);
    detail::request_assigner().assign({scores, tokens, room}, sources);
    std::int64_t best = 0, found = 0;
    std::vector<int> on_node(3, 0);
    for (std::size_t r = 0; r < 6; ++r) {
      found += scores[r * 3 + sources[r]];
      ++on_node[sources[r]];
    }
    CHECK(*std::max_element(on_node.begin(), on_node.end()) == 2);
    for (std::size_t code = 0; code < 729; ++code) {
      std::int64_t sum = 0;
      std::vector<int> used(3, 0);
      for (std::size_t r = 0, c = code; r < 6; ++r, c /= 3) {
        sum += scores[r * 3 + c % 3];
        ++used[c % 3];
      }
      if (*std::max_element(used.begin(), used.end()) == 2) best = std::max(best, sum);
    }
    CHECK(found <= best);
    lost += 1 - static_cast<double>(found) / static_cast<double>(best);
  }
  CHECK(lost / 200 < 0.01);
}

TEST_CASE("nodes take requests by the speed of their live GPUs, and dead ones none") {
  const trace t = kinds_of_requests(2, 60, 4);
  const topology whole = topology::uniform(3, 2, 4);
  const auto on_nodes = [&](const topology& cluster) {
    const node_affinity affinity = node_affinity::make(balanced(to_loads(2, 8, std::vector<int>(16, 1)), cluster),
                                                       cluster, t.view(), {.token_budget = 1});
    std::vector<request_signature> of = signatures(t, affinity);
    std::vector<std::vector<int>> counts(2, std::vector<int>(cluster.nodes(), 0));
    for (const std::uint32_t n : group(affinity, of, std::vector<std::uint64_t>(of.size(), 1))) ++counts[0][n];
    online_grouper online(affinity);
    for (const request_signature& s : of) ++counts[1][online.assign(s, 1)];
    CHECK(counts[0] == counts[1]);
    // nor those without tokens, which all nodes suit alike
    const std::vector<std::uint32_t> idle =
        group(affinity, std::vector<request_signature>(3), std::vector<std::uint64_t>(3, 0));
    for (const std::uint32_t n : idle) CHECK(cluster.slots_on_node(n) > 0);
    CHECK(cluster.slots_on_node(online_grouper(affinity).assign({}, 0)) > 0);
    return counts[0];
  };
  CHECK(on_nodes(whole) == std::vector<int>{20, 20, 20});
  CHECK(on_nodes(whole.without(std::vector<std::uint32_t>{2, 3})) == std::vector<int>{30, 0, 30});
  CHECK(on_nodes(whole.without(std::vector<std::uint32_t>{0, 1})) == std::vector<int>{0, 30, 30});
  CHECK(on_nodes(whole.without(std::vector<std::uint32_t>{2})) == std::vector<int>{24, 12, 24});
  CHECK(on_nodes(whole.with_speeds(std::vector<double>{1, 1, 2, 2, 3, 3})) == std::vector<int>{10, 20, 30});
  // whole requests fit nowhere: they go where most room is left, which is no dead node
  const std::vector<std::int64_t> scores(6, 0), room{-1, 3, 1};
  const std::vector<std::uint64_t> tokens(2, 9);
  std::vector<std::uint32_t> sources(2);
  detail::request_assigner().assign({scores, tokens, room}, sources);
  CHECK(sources == std::vector<std::uint32_t>{1, 2});
}

TEST_CASE("bad input to grouping is told apart") {
  const trace t = kinds_of_requests(2, 4, 4);
  const topology cluster = topology::uniform(2, 1, 4);
  const placement p = contiguous(2, 8, cluster);
  const auto code = [&](const placement& q, const group_options& o) {
    return code_of(node_affinity::try_make(q, cluster, t.view(), o));
  };
  CHECK(code(placement(1, 8, 8), {}) == errc::shape_mismatch);
  group_options o;
  o.node_weight = std::nan("");
  CHECK(code(p, o) == errc::invalid_argument);
  o = {};
  o.token_budget = 0.9;
  CHECK(code(p, o) == errc::invalid_argument);
  const node_affinity affinity = node_affinity::make(p, cluster, t.view());
  const std::vector<request_signature> s(2);
  CHECK(code_of(try_group(affinity, s, std::vector<std::uint64_t>(3, 1))) == errc::shape_mismatch);
  CHECK(group(affinity, {}, {}).empty());

  std::vector<std::int64_t> scores(2), too_many(3);
  CHECK_THROWS_AS(affinity.score(s[0], too_many), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(affinity.score({{{16, 1}}}, scores),
                  tetromino_test::precondition_failed);  // cells go up to 2 layers × 8 experts
  CHECK_THROWS_AS(online_grouper(affinity, {0, -1.0}), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(signature_builder({2, 0, 1}), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(signature_builder({std::size_t{1} << 62, 4, 1}), tetromino_test::precondition_failed);
  signature_builder builder({1, 8, 1});
  const std::uint16_t eighth = 8;
  CHECK_THROWS_AS(builder.add({&eighth, 1}), tetromino_test::precondition_failed);
}
