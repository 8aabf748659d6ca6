#include "check.hpp"

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/replica.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"
#include "support/allocations.hpp"

#include <algorithm>  // std::max, std::min, std::sort
#include <array>      // std::array
#include <map>        // std::map
#include <set>        // std::set
#include <utility>    // std::pair
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

/// Each expert on one to three of the GPUs, none twice on one.
placement random_copies(generator& g, std::size_t layers, std::size_t experts, const topology& t) {
  placement p(layers, experts, t.slots());
  for (std::size_t l = 0; l < layers; ++l) {
    std::vector<std::size_t> held(t.gpus(), 0);
    for (std::size_t e = 0; e < experts; ++e) {
      std::set<std::size_t> gpus;
      for (std::size_t c = 1 + g.below(3); c > 0 || gpus.empty(); c -= c > 0 ? 1 : 0) gpus.insert(g.below(t.gpus()));
      for (const std::size_t gpu : gpus) {
        if (held[gpu] < t.slots_on_gpu(gpu)) {
          p.layer(l)[t.first_slot(gpu) + held[gpu]++] = static_cast<std::int32_t>(e);
        }
      }
    }
  }
  return p;
}

/// How long a GPU takes for one unit of work: 1024 for the fastest.
std::uint64_t time_of_unit(const topology& t, std::size_t gpu) {
  return static_cast<std::uint64_t>(1024 / t.speed(gpu));
}

/// Whether all work can be done within a time: no set of GPUs has more that only they can do than fits into it.
bool can_be_done(const std::map<std::uint16_t, std::size_t>& units, const placement& p, const topology& t,
                 std::uint64_t time) {
  for (std::size_t set = 1; set < std::size_t{1} << t.gpus(); ++set) {
    std::size_t work = 0, room = 0;
    for (std::size_t g = 0; g < t.gpus(); ++g) room += (set >> g & 1) == 0 ? 0 : time / time_of_unit(t, g);
    for (const auto& [expert, n] : units) {
      bool only_here = true;
      for (std::size_t s = 0; s < p.slots(); ++s) {
        if (p.layer(0)[s] == expert && (set >> t.gpu_of_slot(s) & 1) == 0) only_here = false;
      }
      if (only_here) work += n;
    }
    if (work > room) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("choices for whole steps are as even as copies allow") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  for (int i = 0; i < 1000; ++i) {
    topology t = topology::uniform(1 + g.below(2), 1 + g.below(3), 12);
    if (i % 2 == 1) {
      std::vector<double> speeds;
      for (std::size_t gpu = 0; gpu < t.gpus(); ++gpu) speeds.push_back(0.2 + g.uniform());
      t = t.with_speeds(speeds);
    }
    const std::size_t experts = 1 + g.below(12), k = 1 + g.below(std::min<std::size_t>(experts, 4));
    const placement p = random_copies(g, 1, experts, t);
    std::vector<std::uint16_t> ids(k * (1 + g.below(20)));
    std::map<std::uint16_t, std::size_t> pairs, once;
    for (auto& id : ids) {
      id = g.below(8) == 0 ? no_expert : static_cast<std::uint16_t>(g.below(experts));
      if (id != no_expert) ++pairs[id], once[id] = 1;
    }
    std::vector<std::uint32_t> gpus(ids.size());
    for (const replica_choice choice : {replica_choice::step_pairs, replica_choice::step_activation}) {
      step_chooser chooser(p, t, choice);
      for (int again = 0; again < 2; ++again) {
        const std::size_t busiest = chooser.choose(0, ids, gpus);
        std::map<std::uint32_t, std::size_t> load;
        std::set<std::pair<std::uint32_t, std::uint16_t>> active;
        for (std::size_t j = 0; j < ids.size(); ++j) {
          REQUIRE((gpus[j] == no_gpu) == (ids[j] == no_expert));
          if (gpus[j] == no_gpu) continue;
          const auto slots = p.layer(0).subspan(t.first_slot(gpus[j]), t.slots_on_gpu(gpus[j]));
          REQUIRE(std::count(slots.begin(), slots.end(), ids[j]) == 1);
          const bool counts = choice == replica_choice::step_pairs || active.insert({gpus[j], ids[j]}).second;
          load[gpus[j]] += counts ? 1 : 0;
        }
        std::uint64_t longest = 0;
        for (const auto& [gpu, n] : load) longest = std::max(longest, n * time_of_unit(t, gpu));
        bool is_of_busiest = longest == 0 && busiest == 0;
        for (const auto& [gpu, n] : load) {
          if (n == busiest && n * time_of_unit(t, gpu) == longest) is_of_busiest = true;
        }
        REQUIRE(is_of_busiest);
        const auto& units = choice == replica_choice::step_pairs ? pairs : once;
        REQUIRE(can_be_done(units, p, t, longest));
        if (longest > 0) REQUIRE_FALSE(can_be_done(units, p, t, longest - 1));
      }
    }
  }
}

TEST_CASE("choosing copies allocates nothing") {
  generator g(tetromino_test::seed());
  const topology t = topology::uniform(2, 4, 8);
  const placement p = random_copies(g, 1, 16, t);
  std::vector<std::uint16_t> ids(128);
  for (auto& id : ids) id = static_cast<std::uint16_t>(g.below(16));
  std::vector<std::uint32_t> gpus(ids.size());
  step_chooser steps(p, t, replica_choice::step_activation);
  replica_chooser tokens(p, t, {replica_choice::fewest_nodes, 1.05, 1.1});
  static_cast<void>(steps.choose(0, ids, gpus));
  const std::size_t before = tetromino_test::allocations;
  for (int i = 0; i < 100; ++i) static_cast<void>(steps.choose(0, ids, gpus));
  for (std::size_t i = 0; i < ids.size(); i += 4) {
    tokens.choose(0, std::span(ids).subspan(i, 1), 0, std::span(gpus).subspan(i, 1));
  }
  if (tetromino_test::counts_allocations) CHECK(tetromino_test::allocations == before);
}

TEST_CASE("a burst counts as much as what was served lately") {
  // two copies of expert 0; expert 1 loads GPU 0 for a long time, then nobody asks for it any more
  const topology t = topology::uniform(1, 2, 2);
  const placement p = placement::make(1, 2, 4, {0, 1, 0, -1});
  const std::vector<std::uint16_t> old_days = {1}, burst = {0};
  const auto served_of_burst = [&](std::size_t window) {
    replica_chooser chooser(p, t, {replica_choice::least_loaded, 0, 0, window});
    std::vector<std::uint32_t> gpu(1);
    for (int i = 0; i < 10'000; ++i) chooser.choose(0, old_days, 0, gpu);
    std::size_t on_0 = 0;
    for (int i = 0; i < 1000; ++i) {
      chooser.choose(0, burst, 0, gpu);
      on_0 += gpu[0] == 0 ? 1U : 0U;
    }
    CHECK(chooser.pairs_on_gpu()[0] == 10'000 + on_0);
    return on_0;
  };
  CHECK(served_of_burst(0) == 0);  // GPU 1 alone, while GPU 0 idles
  CHECK(served_of_burst(64) > 430);
}

TEST_CASE("with a GPU limit, pairs leave a busy GPU for a copy on the same node") {
  // both GPUs of a node hold expert 0; tokens are all on GPU 0, which serves expert 1 too
  const topology t = topology::uniform(1, 2, 2);
  const placement p = placement::make(1, 3, 4, {0, 1, 0, 2});
  replica_chooser near(p, t, {replica_choice::nearest});
  const std::vector<std::uint16_t> ids = {0, 1};
  std::vector<std::uint32_t> gpus(2);
  for (int i = 0; i < 1000; ++i) near.choose(0, ids, 0, gpus);
  CHECK(near.pairs_on_gpu()[0] == 2000);
  for (const std::size_t window : {0u, 64u}) {  // what is forgotten is forgotten of the mean too
    replica_chooser limited(p, t, {replica_choice::nearest, 0, 1.05, window});
    for (int i = 0; i < 1000; ++i) limited.choose(0, ids, 0, gpus);
    CHECK(limited.pairs_on_gpu()[0] < 1070);
    CHECK(limited.pairs_on_gpu()[0] > 1030);  // what left does not count any more: up to the limit, pairs stay
  }
}

TEST_CASE("with a node limit, pairs that no other visited node can take stay on their GPU") {
  // both GPUs of node 0 hold expert 0, which the tokens of GPU 0 ask for; node 1 has no copy
  const topology t = topology::uniform(2, 2, 1);
  const placement p = placement::make(1, 3, 4, {0, 0, 1, 2});
  replica_chooser limited(p, t, {replica_choice::fewest_nodes, 1.05});
  const std::vector<std::uint16_t> ids = {0};
  std::vector<std::uint32_t> gpus(1);
  for (int i = 0; i < 1000; ++i) limited.choose(0, ids, 0, gpus);
  CHECK(limited.pairs_on_gpu()[0] == 1000);
}

TEST_CASE("a node of half the speed serves half as much of what no node is nearer to") {
  // tokens start on node 2, which holds nothing that they ask for
  const std::vector<double> speeds = {1, 1, 0.5, 0.5, 1, 1};
  const topology t = topology::uniform(3, 2, 1).with_speeds(speeds);
  const placement p = placement::make(1, 5, 6, {0, 1, 0, 2, 3, 4});
  const auto served = [&](double node_limit, const std::vector<std::uint16_t>& ids) {
    replica_chooser chooser(p, t, {replica_choice::fewest_nodes, node_limit, 0, 0});
    std::vector<std::uint32_t> gpus(ids.size());
    for (int i = 0; i < 3000; ++i) chooser.choose(0, ids, 4, gpus);
    const std::span<const std::uint64_t> on_gpu = chooser.pairs_on_gpu();
    return std::vector<std::uint64_t>(on_gpu.begin(), on_gpu.end());
  };
  CHECK(served(0, {0}) == std::vector<std::uint64_t>{2000, 0, 1000, 0, 0, 0});
  // Each token visits nodes 0 and 1. In proportion to speed, node 0 may serve 2/5 of 3 × 3000 pairs: 600 of expert 0.
  const std::vector<std::uint64_t> limited = served(1, {1, 2, 0});
  CHECK(limited[1] == 3000);
  CHECK(limited[3] == 3000);
  CHECK(limited[0] + limited[2] == 3000);
  CHECK(limited[0] >= 2990);  // for node 1, of half the speed, is above its own share already
}

TEST_CASE("figures of steps equal the plain count") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 300; ++i) {
    const topology t = topology::uniform(1 + g.below(3), 1 + g.below(3), 8);
    const std::size_t layers = 1 + g.below(3), experts = 2 + g.below(7), k = 1 + g.below(2);
    const placement p = random_copies(g, layers, experts, t);
    const std::size_t tokens = 1 + g.below(30), step = 1 + g.below(12);
    std::vector<std::uint16_t> ids;
    for (std::size_t row = 0; row < tokens * layers; ++row) {
      const std::size_t first = g.below(experts);
      for (std::size_t j = 0; j < k; ++j) ids.push_back(static_cast<std::uint16_t>((first + j) % experts));
    }
    const trace tr = trace::make({layers, experts, k}, ids, {{0, static_cast<std::uint32_t>(tokens), 0, 0}});
    cost_options options;
    options.tokens_per_step = step;
    options.bytes_per_expert = 2;
    options.memory_bytes_per_second = 4;
    options.replicas.choice = replica_choice::even;
    const std::vector<std::uint32_t> sources = {0};
    if (!try_validate(p, t)) continue;
    const cost_report got = evaluate(tr.view(), p, t, sources, options);

    replica_chooser chooser(p, t, options.replicas);
    std::vector<double> node_figures, gpu_figures, active_figures;
    double read = 0;
    for (std::size_t first = 0; first < tokens; first += step) {
      const std::size_t last = std::min(tokens, first + step);
      double node_sum = 0, gpu_sum = 0, active_sum = 0;
      for (std::size_t l = 0; l < layers; ++l) {
        std::vector<double> on_gpu(t.gpus(), 0), on_node(t.nodes(), 0);
        std::vector<std::set<std::uint16_t>> active(t.gpus());
        for (std::size_t token = first; token < last; ++token) {
          std::vector<std::uint32_t> gpus(k);
          chooser.choose(l, tr.view().experts_of(token, l), static_cast<std::uint32_t>(token % t.gpus_on_node(0)),
                         gpus);
          for (std::size_t j = 0; j < k; ++j) {
            on_gpu[gpus[j]] += 1;
            on_node[t.node_of_gpu(gpus[j])] += 1;
            active[gpus[j]].insert(tr.view().experts_of(token, l)[j]);
          }
        }
        const double all = static_cast<double>((last - first) * k);
        node_sum += *std::max_element(on_node.begin(), on_node.end()) * static_cast<double>(t.nodes()) / all;
        gpu_sum += *std::max_element(on_gpu.begin(), on_gpu.end()) * static_cast<double>(t.gpus()) / all;
        std::size_t most = 0;
        for (const auto& a : active) most = std::max(most, a.size());
        active_sum += static_cast<double>(most);
        read += static_cast<double>(most) * 2 / 4;
      }
      if (last - first < step && first > 0) continue;
      node_figures.push_back(node_sum / static_cast<double>(layers));
      gpu_figures.push_back(gpu_sum / static_cast<double>(layers));
      active_figures.push_back(active_sum / static_cast<double>(layers));
    }
    REQUIRE(got.steps == node_figures.size());
    REQUIRE(got.weight_seconds == Approx(read));
    const auto same = [](const step_figures& a, std::vector<double> b) {
      double mean = 0;
      for (const double x : b) mean += x / static_cast<double>(b.size());
      std::sort(b.begin(), b.end());
      REQUIRE(a.mean == Approx(mean));
      REQUIRE(a.worst == Approx(b.back()));
      REQUIRE(a.p99 == Approx(b.back()));  // of fewer than a hundred steps
    };
    same(got.step_node_imbalance, node_figures);
    same(got.step_gpu_imbalance, gpu_figures);
    same(got.step_activated, active_figures);
  }
}

TEMPLATE_TEST_CASE("choosers take ids of any integers, -1 for nobody", "", std::uint8_t, std::int8_t, std::int32_t,
                   std::uint32_t, std::int64_t, std::uint64_t) {
  const topology t = topology::uniform(2, 2, 8);
  generator g(tetromino_test::seed());
  const placement p = random_copies(g, 1, 8, t);
  constexpr std::size_t k = 3;
  std::vector<std::uint16_t> narrow;
  std::vector<TestType> wide;
  for (std::size_t token = 0; token < 40; ++token) {
    const auto first = static_cast<std::uint16_t>(g.below(8));
    for (std::uint16_t i = 0; i < k; ++i) {
      const bool nobody = g.below(8) == 0;
      narrow.push_back(nobody ? no_expert : static_cast<std::uint16_t>((first + i) % 8));
      wide.push_back(nobody ? static_cast<TestType>(-1) : static_cast<TestType>((first + i) % 8));
    }
  }
  std::vector<std::uint32_t> expected(narrow.size()), got(narrow.size());
  replica_chooser one(p, t), other(p, t);
  for (std::size_t i = 0; i < narrow.size(); i += k) {
    one.choose(0, std::span(narrow).subspan(i, k), 1, std::span(expected).subspan(i, k));
    other.choose(0, std::span(wide).subspan(i, k), 1, std::span(got).subspan(i, k));
  }
  CHECK(got == expected);
  step_chooser of_step(p, t, replica_choice::step_pairs), again(p, t, replica_choice::step_pairs);
  CHECK(of_step.choose(0, narrow, expected) == again.choose(0, wide, got));
  CHECK(got == expected);
  const std::array<TestType, 1> outside{8};
  std::vector<std::uint32_t> gpu(1);
  CHECK_THROWS_AS(other.choose(0, outside, 0, gpu), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(again.choose(0, outside, gpu), tetromino_test::precondition_failed);
}

TEST_CASE("choices are of tokens or of steps") {
  const topology t = topology::uniform(1, 2, 2);
  const placement p = contiguous(1, 4, t);
  CHECK_THROWS_AS(replica_chooser(p, t, {replica_choice::step_pairs}), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(step_chooser(p, t, replica_choice::nearest), tetromino_test::precondition_failed);
  step_chooser chooser(p, t, replica_choice::step_pairs);
  std::vector<std::uint32_t> gpus(1);
  const std::vector<std::uint16_t> outside = {4}, inside = {1};
  CHECK_THROWS_AS(chooser.choose(0, outside, gpus), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(chooser.choose(1, inside, gpus), tetromino_test::precondition_failed);
  replica_chooser by_token(p, t);
  CHECK_THROWS_AS(by_token.choose(0, outside, 0, gpus), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(by_token.choose(1, inside, 0, gpus), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(by_token.choose(0, inside, 2, gpus), tetromino_test::precondition_failed);
  const trace tr = trace::make({1, 4, 1}, {0}, {{0, 1, 0, 0}});
  const std::vector<std::uint32_t> sources = {0};
  cost_options options;
  options.replicas.choice = replica_choice::step_pairs;
  CHECK(code_of(try_evaluate(tr.view(), p, t, sources, options)) == errc::invalid_argument);
  options.tokens_per_step = 1;
  CHECK(evaluate(tr.view(), p, t, sources, options).pairs == 1);
  options.bytes_per_expert = -1;
  CHECK(code_of(try_evaluate(tr.view(), p, t, sources, options)) == errc::invalid_argument);
}

TEST_CASE("nobody is served nowhere and costs nothing") {
  const topology t = topology::uniform(2, 1, 2);
  const placement p = contiguous(1, 4, t);
  const trace tr = trace::make({1, 4, 2}, {3, no_expert, no_expert, no_expert, 0, 1}, {{0, 3, 0, 0}});
  const std::vector<std::uint32_t> sources = {0};
  const cost_report r = evaluate(tr.view(), p, t, sources);
  CHECK(r.tokens == 2);
  CHECK(r.pairs == 3);
  CHECK(r.remote_pairs == 1);
  CHECK(r.pairs_on_gpu == std::vector<std::uint64_t>{2, 1});
}

TEST_CASE("a GPU of half the speed serves half as much, and counts for it") {
  const std::vector<double> speeds = {1, 0.5};
  const topology t = topology::uniform(1, 2, 1).with_speeds(speeds);
  const placement p = placement::make(1, 1, 2, {0, 0});
  const trace tr = trace::make({1, 1, 1}, std::vector<std::uint16_t>(300, 0), {{0, 300, 0, 0}});
  const std::vector<std::uint32_t> sources = {0};
  cost_options options;
  options.replicas = {replica_choice::least_loaded, 0, 0, 0};
  const cost_report r = evaluate(tr.view(), p, t, sources, options);
  CHECK(r.pairs_on_gpu == std::vector<std::uint64_t>{200, 100});
  CHECK(r.gpu_imbalance == Approx(1));
  options.replicas.choice = replica_choice::even;
  CHECK(evaluate(tr.view(), p, t, sources, options).gpu_imbalance == Approx(1.5));
}
