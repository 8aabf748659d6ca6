#include "check.hpp"

/// The parts of `local`'s search, each by itself.

#include <tetromino/moe/search/layers/node_mask.hpp>
#include <tetromino/moe/search/layers/node_visits.hpp>
#include <tetromino/moe/search/near_numbers.hpp>
#include <tetromino/moe/search/random.hpp>
#include <tetromino/moe/search/requests/domain_weights.hpp>
#include <tetromino/moe/search/sample.hpp>

#include "reference/generators.hpp"

#include <algorithm>  // std::max, std::min, std::next_permutation, std::swap
#include <bit>        // std::popcount
#include <cmath>      // std::abs, std::log, std::sqrt
#include <cstdint>    // std::int64_t, std::uint8_t, std::uint16_t, std::uint32_t, std::uint64_t
#include <set>        // std::set
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;

}  // namespace

TEST_CASE("the table of exponential numbers is that of the logarithm") {
  for (std::size_t i = 0; i < detail::exponential_table.size(); ++i) {
    const double expected = -std::log((static_cast<double>(i) + 0.5) / 1024) * 65536;
    CHECK(std::abs(static_cast<double>(detail::exponential_table[i]) - expected) < 2);
  }
}

TEST_CASE("visits of 64 tokens at once are those of each token, and never fewer than the least possible") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  constexpr std::size_t k = 5;
  for (std::size_t round = 0; round < 50; ++round) {
    const bool copies = round % 2 == 1;
    std::vector<std::uint8_t> rows(k * detail::cover_lanes), home(detail::cover_lanes), visits(detail::cover_lanes);
    const auto some_nodes = [&] {
      const auto one = static_cast<std::uint8_t>(1U << g.below(8));
      return copies && g.below(2) == 0 ? static_cast<std::uint8_t>(one | (1U << g.below(8))) : one;
    };
    for (std::uint8_t& m : rows) m = some_nodes();
    for (std::uint8_t& m : home) m = static_cast<std::uint8_t>(1U << g.below(8));
    const std::uint8_t last = some_nodes();
    if (copies) {
      detail::count_visits<std::uint8_t, true>(rows.data(), k, last, home.data(), visits.data());
    } else {
      detail::count_visits<std::uint8_t, false>(rows.data(), k, last, home.data(), visits.data());
    }
    for (std::size_t i = 0; i < detail::cover_lanes; ++i) {
      std::vector<std::uint8_t> held{last};
      for (std::size_t j = 0; j < k; ++j) held.push_back(rows[j * detail::cover_lanes + i]);
      CHECK(visits[i] == detail::visits_of(held.data(), held.size(), home[i]));
      int least = 8;
      for (unsigned chosen = 0; chosen < 256; ++chosen) {
        bool covers = true;
        for (const std::uint8_t m : held) covers = covers && (m & (chosen | home[i])) != 0;
        if (covers) least = std::min(least, std::popcount(chosen & ~static_cast<unsigned>(home[i])));
      }
      CHECK(visits[i] >= least);
      CHECK(visits[i] <= least + 1);  // the greedy choice is seldom off, and by little at this size
    }
  }
}

TEST_CASE("domains weigh as much as their numbers can be trusted") {
  const auto requests_of = [](std::vector<std::size_t> numbers) {
    std::vector<request> list;
    for (std::uint32_t d = 0; d < numbers.size(); ++d) {
      for (std::size_t i = 0; i < numbers[d]; ++i) list.push_back({list.size() * 12, 12, 4, 7 * d});
    }
    return list;
  };
  const auto weights = [&](std::vector<std::size_t> numbers) {
    std::vector<std::uint64_t> of_domain;
    const std::vector<std::uint64_t> all = detail::domain_weights(requests_of(numbers), phase::decode);
    for (std::size_t d = 0, r = 0; d < numbers.size(); r += numbers[d++]) of_domain.push_back(all[r]);
    return of_domain;
  };
  const std::vector<std::uint64_t> alike(4, 256);
  CHECK(weights({40}) == std::vector<std::uint64_t>{256});
  CHECK(weights({20, 20, 20, 20}) == alike);
  // less apart than chance explains: each domain counts a quarter
  const std::vector<std::uint64_t> drawn = weights({22, 18, 21, 19});
  const std::size_t numbers[] = {22, 18, 21, 19};
  for (std::size_t d = 0; d < 4; ++d)
    CHECK(static_cast<double>(drawn[d] * numbers[d]) == Approx(256 * 20).epsilon(0.01));
  // too far apart for chance, by one request or by many: next to nothing, and never beyond a standard error
  for (const std::uint64_t w : weights({20'000, 10'000})) CHECK(std::abs(static_cast<double>(w) - 256) <= 2);
  CHECK(weights({60, 1})[1] <= 2 * 256);
  // what is not served does not count
  std::vector<request> list = requests_of({20, 20});
  for (std::size_t r = 0; r < 10; ++r) list[r].prefill_length = 12;
  CHECK(detail::domain_weights(list, phase::decode)[0] > 256);
  CHECK(detail::domain_weights(list, phase::all) == std::vector<std::uint64_t>(40, 256));
}

TEST_CASE("domains' weights are those of the formula") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  for (std::size_t round = 0; round < 200; ++round) {
    const std::size_t kinds = 2 + g.below(6);
    std::vector<request> list;
    for (std::size_t d = 0; d < kinds; ++d) {
      for (std::size_t i = 1 + g.below(30); i > 0; --i) {
        list.push_back({0, static_cast<std::uint32_t>(20 + g.below(200)), 10, static_cast<std::uint32_t>(d)});
      }
    }
    double tokens = 0, by_chance = 0, seen = 0;
    for (const request& r : list) tokens += r.tokens - 10;
    std::vector<double> share(kinds, 0.0), variance(kinds, 0.0);
    for (const request& r : list) share[r.domain] += (r.tokens - 10) / tokens;
    for (std::size_t d = 0; d < kinds; ++d) {
      for (const request& r : list) {
        const double of_request = (r.tokens - 10) / tokens * ((r.domain == d ? 1 : 0) - share[d]);
        variance[d] += of_request * of_request;
      }
      by_chance += variance[d];
      seen += (share[d] - 1.0 / static_cast<double>(kinds)) * (share[d] - 1.0 / static_cast<double>(kinds));
    }
    const std::vector<std::uint64_t> weights = detail::domain_weights(list, phase::decode);
    for (std::size_t r = 0; r < list.size(); ++r) {
      const double mine = share[list[r].domain], error = std::sqrt(variance[list[r].domain]);
      const double move = (1.0 / static_cast<double>(kinds) - mine) * std::min(1.0, by_chance / seen);
      const double expected = 1 + std::min(error, std::max(-error, move)) / mine;
      CHECK(std::abs(static_cast<double>(weights[r]) / 256 - expected) < 0.01 + 0.02 * expected);
    }
  }
}

TEST_CASE("a sample has tokens and loads by the weights of domains") {
  // 22 requests of domain 0 use experts 0 and 1, 18 of domain 1 the others
  std::vector<std::uint16_t> ids;
  std::vector<request> list;
  for (std::uint32_t r = 0; r < 40; ++r) {
    list.push_back({r * 5U, 5, 0, r < 22 ? 0U : 1U});
    for (std::size_t token = 0; token < 5; ++token) {
      for (std::uint16_t i = 0; i < 2; ++i) ids.push_back(static_cast<std::uint16_t>((r < 22 ? 0 : 2) + i));
    }
  }
  const trace t = trace::make({1, 4, 2}, ids, list);
  detail::search_random random(1);
  const detail::search_sample sample = detail::take_sample(t.view(), phase::decode, 1000, 1000, random);
  CHECK(sample.is_weighted);
  std::size_t tokens[] = {0, 0};
  for (const std::uint32_t r : sample.request_of_token) ++tokens[list[sample.requests[r]].domain];
  CHECK(tokens[0] + tokens[1] <= 200);
  CHECK(tokens[0] + tokens[1] >= 199);
  for (const std::size_t n : tokens) CHECK(static_cast<double>(n) == Approx(100).margin(2));
  for (const std::int64_t load : sample.loads) CHECK(static_cast<double>(load) == Approx(100).margin(2));
}

TEST_CASE("256 bits reckon as 64 do") {
  using tetromino::moe::detail::first_node, tetromino::moe::detail::lowest_node, tetromino::moe::detail::node_bit;
  using tetromino::moe::detail::node_count, tetromino::moe::detail::wide_mask, tetromino::moe::detail::without_first;
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  for (int i = 0; i < 2000; ++i) {
    std::set<std::size_t> nodes, others;  // what the masks stand for
    for (std::size_t n = g.below(12); n > 0; --n) nodes.insert(g.below(256));
    for (std::size_t n = g.below(12); n > 0; --n) others.insert(g.below(256));
    const auto mask = [](const std::set<std::size_t>& of) {
      wide_mask out;
      for (const std::size_t n : of) out = out | node_bit<wide_mask>(n);
      return out;
    };
    const wide_mask m = mask(nodes), other = mask(others);
    REQUIRE(node_count(m) == static_cast<int>(nodes.size()));
    REQUIRE((m == 0) == nodes.empty());
    REQUIRE((m == other) == (nodes == others));
    for (std::size_t n = 0; n < 256; ++n) {
      const bool in = nodes.count(n) != 0, in_other = others.count(n) != 0;
      REQUIRE(((m & node_bit<wide_mask>(n)) != 0) == in);
      REQUIRE((((m & other) & node_bit<wide_mask>(n)) != 0) == (in && in_other));
      REQUIRE((((m & ~other) & node_bit<wide_mask>(n)) != 0) == (in && !in_other));
    }
    if (nodes.empty()) continue;
    REQUIRE(first_node(m) == *nodes.begin());
    REQUIRE(lowest_node(m) == node_bit<wide_mask>(*nodes.begin()));
    nodes.erase(nodes.begin());
    REQUIRE(without_first(m) == mask(nodes));
    const std::uint64_t a = g.bits(), b = g.below(2) == 0 ? g.bits() : 0;
    if (a >= b) REQUIRE(wide_mask(a) - wide_mask(b) == wide_mask(a - b));
  }
}

namespace {

/// Nodes that are near or far from each other, each of one GPU with one slot or with two.
topology random_distances(generator& g, std::size_t nodes) {
  std::vector<std::size_t> slots(nodes);
  for (std::size_t& s : slots) s = 1 + g.below(5) / 4;
  std::vector<double> costs(nodes * nodes, 0.0);
  for (std::size_t a = 0; a < nodes; ++a) {
    for (std::size_t b = 0; b < a; ++b)
      costs[a * nodes + b] = costs[b * nodes + a] = static_cast<double>(1 + g.below(3));
  }
  return topology::make(std::vector<std::size_t>(nodes, 1), slots).with_node_costs(costs);
}

}  // namespace

TEST_CASE("nodes that are alike change places until no two of them save by it, and near the best there is") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  std::size_t cases = 0, best_found = 0;
  for (int round = 0; round < 400; ++round) {
    const std::size_t nodes = 2 + g.below(5);
    const topology t = random_distances(g, nodes);
    const std::vector<std::int64_t> costs = detail::relative_costs(t);
    if (costs.empty()) continue;
    std::vector<std::int64_t> sent(nodes * nodes);
    for (std::int64_t& s : sent) s = static_cast<std::int64_t>(g.below(1000));
    const auto total = [&](const std::vector<std::uint32_t>& number) {
      std::int64_t sum = 0;
      for (std::size_t a = 0; a < nodes; ++a) {
        for (std::size_t b = 0; b < nodes; ++b) {
          if (a != b) sum += sent[a * nodes + b] * costs[number[a] * nodes + number[b]];
        }
      }
      return sum;
    };
    const auto fits = [&](const std::vector<std::uint32_t>& number) {
      for (std::size_t n = 0; n < nodes; ++n) {
        if (t.slots_on_node(n) != t.slots_on_node(number[n])) return false;
      }
      return true;
    };
    std::vector<std::uint32_t> number(nodes);
    for (std::size_t n = 0; n < nodes; ++n) number[n] = static_cast<std::uint32_t>(n);
    std::int64_t least = total(number);
    const std::int64_t before = least;
    do {
      if (fits(number)) least = std::min(least, total(number));
    } while (std::next_permutation(number.begin(), number.end()));
    number = detail::near_numbers(t, sent, costs);
    REQUIRE(std::set<std::uint32_t>(number.begin(), number.end()).size() == nodes);
    REQUIRE(fits(number));
    const std::int64_t found = total(number);
    REQUIRE(found <= before);
    ++cases;
    best_found += found == least ? 1U : 0U;
    for (std::size_t a = 0; a < nodes; ++a) {
      for (std::size_t b = 0; b < a; ++b) {
        std::swap(number[a], number[b]);
        if (fits(number)) REQUIRE(total(number) >= found);
        std::swap(number[a], number[b]);
      }
    }
  }
  CHECK(best_found * 10 > cases * 7);
}
