#include "check.hpp"

#include <tetromino/moe/place.hpp>

#include "code_of.hpp"
#include "random_clusters.hpp"
#include "reference/eplb.hpp"
#include "reference/generators.hpp"

#include <algorithm>   // std::count, std::max, std::sort
#include <cmath>       // std::floor, std::nan
#include <functional>  // std::greater
#include <numeric>     // std::accumulate
#include <set>         // std::set

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

/// Loads as routing shows them: a few experts carry much, many carry little; sometimes all alike, sometimes nothing.
std::vector<double> random_loads(generator& g, std::size_t layers, std::size_t experts) {
  std::vector<double> out(layers * experts);
  const std::size_t kind = g.below(6);
  for (double& x : out) {
    const double u = g.uniform();
    if (kind == 0) x = 0;
    if (kind == 1) x = 7;
    if (kind == 2) x = std::floor(5 * u);
    if (kind == 3) x = std::floor(1000 * u * u * u);
    if (kind == 4) x = 1e6 * u / (1 + 100 * g.uniform());
    if (kind == 5) x = g.below(4) == 0 ? 300 * u : 0;
  }
  return out;
}

topology random_topology(generator& g, std::size_t most_gpus, std::size_t most_slots) {
  std::vector<std::size_t> gpus, slots;
  const bool uniform = g.below(2) == 0;
  const std::size_t nodes = 1 + g.below(5), per_node = 1 + g.below(most_gpus), per_gpu = 1 + g.below(most_slots);
  for (std::size_t n = 0; n < nodes; ++n) {
    gpus.push_back(uniform ? per_node : 1 + g.below(most_gpus));
    for (std::size_t i = 0; i < gpus.back(); ++i) slots.push_back(uniform ? per_gpu : g.below(most_slots + 1));
  }
  if (std::accumulate(slots.begin(), slots.end(), std::size_t{0}) == 0) slots.back() = 1;
  return topology::make(gpus, slots);
}

/// Largest load of a GPU, when the copies of an expert share its load evenly.
double heaviest_gpu(const placement& p, std::size_t layer, const load_view& loads, const topology& t) {
  const replica_index where(p);
  std::vector<double> load(t.gpus(), 0.0);
  for (std::size_t s = 0; s < p.slots(); ++s) {
    const std::int32_t e = p.layer(layer)[s];
    if (e == empty_slot) continue;
    load[t.gpu_of_slot(s)] += loads.layer(layer)[static_cast<std::size_t>(e)] /
                              static_cast<double>(where.slots_of(layer, static_cast<std::size_t>(e)).size());
  }
  return *std::max_element(load.begin(), load.end());
}

void require_same(const index_tensors& ours, const reference::eplb_maps& theirs) {
  std::vector<std::int64_t> p, l, c;
  for (const auto& row : theirs.physical_to_logical) p.insert(p.end(), row.begin(), row.end());
  for (const auto& layer : theirs.logical_to_physical) {
    for (const auto& row : layer) l.insert(l.end(), row.begin(), row.end());
  }
  for (const auto& row : theirs.count) c.insert(c.end(), row.begin(), row.end());
  REQUIRE(ours.physical_to_logical == p);
  REQUIRE(ours.logical_to_physical == l);
  REQUIRE(ours.count == c);
}

/// How long the busiest GPU takes under the best choice of copies that there can be, for loads that can be divided: of
/// any set of GPUs, what is nowhere else is theirs to serve (Hall's theorem).
double least_time(const placement& p, const std::vector<double>& loads, const topology& t) {
  std::vector<unsigned> where(loads.size(), 0);  // GPUs of each expert, a bit each
  for (std::size_t s = 0; s < t.slots(); ++s) {
    const std::int32_t e = p.layer(0)[s];
    if (e != empty_slot) where[static_cast<std::size_t>(e)] |= 1u << t.gpu_of_slot(s);
  }
  double most = 0;
  for (unsigned set = 1; set < 1u << t.gpus(); ++set) {
    double speed = 0, theirs = 0;
    for (std::size_t gpu = 0; gpu < t.gpus(); ++gpu) speed += (set >> gpu & 1) != 0 ? t.speed(gpu) : 0;
    for (std::size_t e = 0; e < loads.size(); ++e) theirs += (where[e] & ~set) == 0 ? loads[e] : 0;
    most = std::max(most, theirs / speed);
  }
  return most;
}

}  // namespace

TEST_CASE("contiguous puts expert e into slot e") {
  const topology t = topology::uniform(2, 2, 2);
  CHECK(contiguous(1, 8, t) == placement::make(1, 8, 8, {0, 1, 2, 3, 4, 5, 6, 7}));
  CHECK(round_robin(1, 8, t) == placement::make(1, 8, 8, {0, 4, 1, 5, 2, 6, 3, 7}));
  // more slots than experts: each GPU its share
  CHECK(contiguous(1, 6, t) == placement::make(1, 6, 8, {0, -1, 1, 2, 3, -1, 4, 5}));
  CHECK(round_robin(1, 6, t) == placement::make(1, 6, 8, {0, 4, 1, 5, 2, -1, 3, -1}));
}

TEST_CASE("contiguous and round_robin are valid on any topology with enough slots") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 3000; ++i) {
    const topology t = random_topology(g, 4, 5);
    const std::size_t experts = 1 + g.below(t.slots());
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), experts);
    REQUIRE(try_validate(contiguous(2, experts, t), t).has_value());
    REQUIRE(try_validate(round_robin(2, experts, t), t).has_value());
    REQUIRE(code_of(try_contiguous(1, t.slots() + 1, t)) == errc::infeasible);
    REQUIRE(code_of(try_round_robin(1, t.slots() + 1, t)) == errc::infeasible);
  }
}

TEST_CASE("balanced_eplb gives the index tensors of the README of EPLB") {
  const std::vector<double> loads = {90, 132, 40,  61, 104, 165, 39,  4,   73,  56, 183, 86,
                                     20, 107, 104, 64, 19,  197, 187, 157, 172, 86, 16,  27};
  const index_tensors maps = balanced_eplb({2, 12, loads}, {.replicas = 16, .groups = 4, .nodes = 2, .gpus = 8});
  // as printed there
  CHECK(maps.physical_to_logical == std::vector<std::int64_t>{5, 6,  5, 7, 8, 4,  3, 4, 10, 9, 10, 2, 0, 1, 11, 1,
                                                              7, 10, 6, 8, 6, 11, 8, 9, 2,  4, 5,  1, 5, 0, 3,  1});
  CHECK(maps.max_copies == 2);
  CHECK(maps.count ==
        std::vector<std::int64_t>{1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1});
  // as the published code returns them, run once
  CHECK(maps.logical_to_physical == std::vector<std::int64_t>{12, -1, 15, 13, 11, -1, 6,  -1, 7, 5,  0,  2,
                                                              1,  -1, 3,  -1, 4,  -1, 9,  -1, 8, 10, 14, -1,
                                                              13, -1, 15, 11, 8,  -1, 14, -1, 9, -1, 10, 12,
                                                              2,  4,  0,  -1, 6,  3,  7,  -1, 1, -1, 5,  -1});
  CHECK(try_validate(to_placement(maps), topology::uniform(2, 4, 2)).has_value());
}

TEST_CASE("balanced_eplb equals the published algorithm on random loads") {
  generator g(tetromino_test::seed());
  std::size_t hierarchical = 0, duplicates = 0;
  for (int i = 0; i < 2000; ++i) {
    const std::size_t nodes = std::size_t{1} << g.below(4), gpus = nodes << g.below(4);
    const std::size_t groups = g.below(3) == 0 ? 3 + 2 * g.below(3) : nodes << g.below(3);
    const std::size_t experts = groups * (1 + g.below(8)), layers = 1 + g.below(4);
    const std::size_t replicas = ((experts + gpus - 1) / gpus + g.below(3)) * gpus;
    CAPTURE(i, layers, experts, replicas, groups, nodes, gpus);
    std::vector<double> loads = random_loads(g, layers, experts);
    std::vector<std::vector<float>> rows(layers);
    for (std::size_t j = 0; j < loads.size(); ++j) rows[j / experts].push_back(static_cast<float>(loads[j]));

    const index_tensors maps = balanced_eplb({layers, experts, loads}, {replicas, groups, nodes, gpus});
    require_same(maps, reference::eplb(rows, replicas, groups, nodes, gpus));
    hierarchical += groups % nodes == 0 ? 1U : 0U;
    const topology t = topology::uniform(1, gpus, replicas / gpus);
    REQUIRE(try_validate(to_placement(maps), t, {.one_copy_per_gpu = false}).has_value());
    duplicates += try_validate(to_placement(maps), t).has_value() ? 0U : 1U;
  }
  CHECK(hierarchical > 400);
  CHECK(hierarchical < 1600);
  CHECK(duplicates > 0);  // what the strict mode is for
}

TEST_CASE("balanced_eplb equals the published algorithm on DeepSeek-V3's shape") {
  generator g(tetromino_test::seed());
  std::vector<double> loads(58 * 256);
  for (double& x : loads) x = std::floor(20000 * g.uniform() * g.uniform() * g.uniform());
  std::vector<std::vector<float>> rows(58);
  for (std::size_t j = 0; j < loads.size(); ++j) rows[j / 256].push_back(static_cast<float>(loads[j]));
  // prefill as in its report: 32 GPUs of 9 slots; and 64 GPUs of 5
  require_same(balanced_eplb({58, 256, loads}, {288, 8, 4, 32}), reference::eplb(rows, 288, 8, 4, 32));
  require_same(balanced_eplb({58, 256, loads}, {320, 1, 8, 64}), reference::eplb(rows, 320, 1, 8, 64));
}

TEST_CASE("balanced places each expert, at most once per GPU, within capacity, on any topology") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 4000; ++i) {
    const topology t = random_topology(g, 4, 6);
    const std::size_t experts = 1 + g.below(t.slots()), layers = 1 + g.below(3);
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), experts);
    const std::vector<double> loads = random_loads(g, layers, experts);
    const load_view view{layers, experts, loads};
    const placement p = balanced(view, t);
    const auto ok = try_validate(p, t);
    if (!ok) FAIL(ok.error().what());
    // a slot stays empty only where nothing fits: each expert is on that GPU already
    const bool full = std::count(p.slot_to_expert().begin(), p.slot_to_expert().end(), empty_slot) == 0;
    bool could_fill = true;
    for (std::size_t gpu = 0; gpu < t.gpus(); ++gpu) could_fill &= t.slots_on_gpu(gpu) <= experts;
    REQUIRE((full || !could_fill));
    REQUIRE(p == balanced(view, t));
  }
}

TEST_CASE("balanced keeps groups on one node") {
  generator g(tetromino_test::seed());
  std::size_t solved = 0;
  for (int i = 0; i < 3000; ++i) {
    const topology t = random_topology(g, 4, 6);
    const std::size_t groups = 1 + g.below(8), group_size = 1 + g.below(5), experts = groups * group_size;
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), groups, group_size);
    const std::vector<double> loads = random_loads(g, 1, experts);
    std::size_t room = 0;
    for (std::size_t n = 0; n < t.nodes(); ++n) room += t.slots_on_node(n) / group_size;
    const auto p = try_balanced({1, experts, loads}, t, {groups});
    if (groups > 1 && room < groups) {
      REQUIRE(code_of(p) == errc::infeasible);
      continue;
    }
    if (!p) {
      REQUIRE(t.slots() < experts);
      continue;
    }
    ++solved;
    REQUIRE(try_validate(*p, t).has_value());
    if (groups == 1) continue;
    std::vector<std::set<std::size_t>> nodes_of_group(groups);
    for (std::size_t s = 0; s < t.slots(); ++s) {
      const std::int32_t e = p->layer(0)[s];
      if (e != empty_slot) nodes_of_group[static_cast<std::size_t>(e) / group_size].insert(t.node_of_slot(s));
    }
    for (const auto& nodes : nodes_of_group) REQUIRE(nodes.size() == 1);
  }
  CHECK(solved > 600);
}

TEST_CASE("balanced is at least as even as EPLB") {
  generator g(tetromino_test::seed());
  double ours = 0, theirs = 0;
  for (int i = 0; i < 60; ++i) {
    const std::size_t nodes = std::size_t{1} << g.below(4), gpus = nodes * (std::size_t{1} << g.below(4));
    const std::size_t experts = std::size_t{32} << g.below(4), replicas = ((experts + gpus - 1) / gpus + 1) * gpus;
    std::vector<double> loads(experts);
    for (double& x : loads) x = std::floor(1000 * g.uniform() * g.uniform() * g.uniform());
    const load_view view{1, experts, loads};
    const topology t = topology::uniform(nodes, gpus / nodes, replicas / gpus);
    const double mean = std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(gpus);
    const double strict = heaviest_gpu(balanced(view, t), 0, view, t) / mean;
    const double eplb = heaviest_gpu(to_placement(balanced_eplb(view, {replicas, 1, 1, gpus})), 0, view, t) / mean;
    CAPTURE(i, experts, replicas, gpus);
    CHECK(strict <= eplb * 1.02);
    ours += strict / 60;
    theirs += eplb / 60;
  }
  CAPTURE(ours, theirs);
  CHECK(ours <= theirs);
}

TEST_CASE("balanced finds the optimum where exchanges are needed") {
  // heaviest first into the lightest bin gives 9 + 4 + 3 = 16; 15 is possible
  const std::vector<double> loads = {9, 8, 5, 4, 3, 1};
  const topology t = topology::uniform(1, 2, 3);
  CHECK(heaviest_gpu(balanced({1, 6, loads}, t), 0, {1, 6, loads}, t) == 15);
}

TEST_CASE("balanced exchanges GPUs between nodes where that evens the nodes out") {
  const std::vector<double> loads = {4, 3, 2, 1};  // one to a GPU; in that order nodes would carry 7 and 3
  const topology t = topology::uniform(2, 2, 1);
  const placement p = balanced({1, 4, loads}, t);
  double first = 0;
  for (std::size_t s = 0; s < 2; ++s) first += loads[static_cast<std::size_t>(p.layer(0)[s])];
  CHECK(first == 5);
}

TEST_CASE("bad loads and sizes are errors") {
  const topology t = topology::uniform(2, 2, 2);
  std::vector<double> loads(8, 1.0);
  CHECK(code_of(try_balanced({0, 8, {}}, t)) == errc::invalid_argument);
  CHECK(code_of(try_contiguous(std::size_t{1} << 62, 8, t)) == errc::invalid_argument);
  CHECK(code_of(try_round_robin(std::size_t{1} << 62, 8, t)) == errc::invalid_argument);
  CHECK(code_of(try_balanced({1, 7, loads}, t)) == errc::shape_mismatch);
  CHECK(code_of(try_balanced({1, 8, loads}, t, {3})) == errc::invalid_argument);
  CHECK(code_of(try_balanced({1, 8, loads}, t, {0})) == errc::invalid_argument);
  CHECK(code_of(try_balanced({1, 8, loads}, topology::uniform(1, 1, 7))) == errc::infeasible);
  CHECK(code_of(try_balanced_eplb({1, 8, loads}, {7, 1, 1, 1})) == errc::infeasible);
  CHECK(code_of(try_balanced_eplb({1, 8, loads}, {9, 1, 1, 2})) == errc::shape_mismatch);
  CHECK(code_of(try_balanced_eplb({1, 8, loads}, {8, 4, 2, 3})) == errc::shape_mismatch);
  CHECK(code_of(try_balanced_eplb({1, 8, loads}, {8, 3, 1, 1})) == errc::shape_mismatch);
  CHECK(code_of(try_balanced_eplb({1, 8, loads}, {8, 0, 1, 1})) == errc::invalid_argument);
  for (const double bad : {std::nan(""), HUGE_VAL, -1.0}) {
    loads[3] = bad;
    CHECK_FALSE(try_balanced({1, 8, loads}, t).has_value());
    CHECK_FALSE(try_balanced_eplb({1, 8, loads}, {8, 1, 1, 4}).has_value());
  }
  CHECK_THROWS_WITH(balanced({1, 8, loads}, t), tetromino_test::contains("got -1 in layer 0, expert 3"));
}

TEST_CASE("zero loads, tiny and huge loads give a plan that uses all GPUs alike") {
  const topology t = topology::uniform(2, 2, 3);
  for (const double x : {0.0, 1e-320, 1e308}) {
    const std::vector<double> loads(6, x);
    const placement p = balanced({1, 6, loads}, t);
    REQUIRE(try_validate(p, t).has_value());
    CHECK(std::count(p.slot_to_expert().begin(), p.slot_to_expert().end(), empty_slot) == 0);
    for (const std::int64_t n : to_index_tensors(p).count) CHECK(n == 2);
  }
  // more slots than any copies can fill: each expert once on each GPU, the rest empty
  const placement p = balanced({1, 2, std::vector<double>{3, 1}}, t);
  REQUIRE(try_validate(p, t).has_value());
  CHECK(std::count(p.slot_to_expert().begin(), p.slot_to_expert().end(), empty_slot) == 4);
}

TEST_CASE("balance_gpus moves experts inside nodes only") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 2000; ++i) {
    const topology t = random_topology(g, 4, 5);
    const std::size_t experts = 1 + g.below(t.slots());
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), experts);
    const std::vector<double> loads = random_loads(g, 2, experts);
    const placement before = g.below(2) == 0 ? contiguous(2, experts, t) : balanced({2, experts, loads}, t);
    placement after = before;
    std::vector<double> load_of_slot(2 * t.slots());
    for (double& x : load_of_slot) x = std::floor(100 * g.uniform());
    balance_gpus(after, t, load_of_slot);
    REQUIRE(try_validate(after, t).has_value());
    for (std::size_t l = 0; l < 2; ++l) {
      for (std::size_t n = 0; n < t.nodes(); ++n) {
        const auto contents = [&](const placement& p) {
          const auto row = p.layer(l).subspan(t.first_slot_of_node(n), t.slots_on_node(n));
          return std::multiset<std::int32_t>(row.begin(), row.end());
        };
        REQUIRE(contents(before) == contents(after));
      }
    }
  }
  const topology t = topology::uniform(2, 2, 2);
  placement p = contiguous(1, 8, t);
  balance_gpus(p, t, std::vector<double>{5, 5, 1, 1, 1, 1, 1, 1});
  CHECK(p.layer(0)[0] + p.layer(0)[1] != 1);  // 0 and 1 carry five each: apart now
  CHECK_THROWS_AS(balance_gpus(p, t, std::vector<double>(3)), tetromino_test::precondition_failed);
}

TEST_CASE("balanced keeps copies on as many nodes as it is told, and uses all slots") {
  generator g(tetromino_test::seed());
  std::size_t planned = 0;
  for (int i = 0; i < 1000; ++i) {
    std::vector<std::size_t> gpus(1 + g.below(4)), slots;
    for (auto& n : gpus) n = 1 + g.below(3);
    for (const std::size_t n : gpus) {
      for (std::size_t j = 0; j < n; ++j) slots.push_back(g.below(5));
    }
    slots[0] += 1;
    const topology t = topology::make(gpus, slots);
    const std::size_t experts = 1 + g.below(t.slots()), nodes = 1 + g.below(3);
    std::vector<double> loads(2 * experts);
    for (double& x : loads) x = g.below(4) == 0 ? 5e-324 : g.uniform() * g.uniform();
    const auto p = try_balanced({2, experts, loads}, t, {1, nodes});
    if (!p) {
      REQUIRE(p.error().code() == errc::infeasible);
      continue;
    }
    ++planned;
    CAPTURE(i, experts, nodes, t.slots());
    REQUIRE(try_validate(*p, t, {.nodes_per_expert = nodes}).has_value());
    std::size_t usable = 0, used = 0;
    for (const std::size_t n : slots) usable += std::min(n, experts);
    for (const std::int32_t e : p->layer(0)) used += e != empty_slot ? 1U : 0U;
    REQUIRE(used == usable);
  }
  CHECK(planned > 400);
  const topology t = topology::uniform(2, 1, 4);
  const std::vector<double> loads(4, 1.0);
  CHECK(try_balanced({1, 4, loads}, t, {1, 2}).has_value());
  CHECK(code_of(try_balanced({1, 4, loads}, t, {1, 0})) == errc::invalid_argument);
  CHECK(code_of(try_balanced({1, 4, loads}, t, {2, 2})) == errc::invalid_argument);
  CHECK(code_of(try_balanced({1, 4, loads}, t, {1, 3})) == errc::infeasible);
}

TEST_CASE("GPUs are exchanged between nodes for what the busiest node has to do, not for what it has") {
  // node 0 has 5 for 1.25 GPUs, node 1 has 6 for 2
  const std::vector<double> speeds = {1, 0.25, 1, 1};
  const topology t = topology::uniform(2, 2, 1).with_speeds(speeds);
  std::vector<double> load = {4, 1, 3, 3};
  std::vector<std::int32_t> row = {0, 1, 2, 3};
  detail::level_nodes(t, load, row);
  CHECK(row == std::vector<std::int32_t>{2, 1, 0, 3});
  CHECK(load == std::vector<double>{3, 1, 4, 3});
}

TEST_CASE("copies on GPUs of unequal speed serve as evenly as slots allow, where tokens go to whoever is free first") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  double sum = 0;
  std::size_t cases = 0;
  for (int i = 0; i < 300; ++i) {
    const bool alike = g.below(2) == 0;  // all experts carry as much, and GPUs are slow or fast
    const topology cluster =
        alike ? topology::uniform(2, 2, 3 + g.below(6)) : tetromino_test::random_cluster(g, 3, 3, 6);
    if (cluster.slots() < 2) continue;
    std::vector<double> speeds;
    for (std::size_t gpu = 0; gpu < cluster.gpus(); ++gpu) {
      speeds.push_back(alike ? (gpu / 2 == 0 ? 0.25 : 1.0) : 0.2 + g.uniform());
    }
    const topology t = cluster.with_speeds(speeds);
    const std::size_t half = (t.slots() + 1) / 2, experts = half + g.below(t.slots() - half + 1);
    std::vector<double> loads(experts, 1.0);
    for (double& x : loads) x = alike ? x : 0.1 + 10 * g.uniform() * g.uniform();
    const placement p = balanced({1, experts, loads}, t);
    REQUIRE(try_validate(p, t).has_value());
    std::vector<double> falling = loads;
    std::sort(falling.begin(), falling.end(), std::greater<>());
    // of any set of GPUs, what finds no slot elsewhere is theirs to serve, whoever plans
    double least = 0;
    for (unsigned set = 1; set < 1u << t.gpus(); ++set) {
      double speed = 0, theirs = 0;
      std::size_t elsewhere = 0;
      for (std::size_t gpu = 0; gpu < t.gpus(); ++gpu) {
        const bool is_in = (set >> gpu & 1) != 0;
        speed += is_in && t.slots_on_gpu(gpu) > 0 ? t.speed(gpu) : 0;
        elsewhere += is_in ? 0 : t.slots_on_gpu(gpu);
      }
      for (std::size_t e = elsewhere; e < experts; ++e) theirs += falling[e];
      if (speed > 0) least = std::max(least, theirs / speed);
    }
    const double reached = least_time(p, loads, t);
    CAPTURE(i, alike, t.gpus(), t.slots(), experts);
    REQUIRE(reached >= least * (1 - 1e-9));
    if (alike) REQUIRE(reached <= 1.15 * least);
    sum += reached / least;
    ++cases;
  }
  CHECK(sum / static_cast<double>(cases) < 1.06);
}

TEST_CASE("fast GPUs get more to do, and copies go to the layers that gain by them") {
  generator g(tetromino_test::seed());
  const std::vector<double> speeds = {2, 1, 1, 2};
  const topology alike = topology::uniform(2, 2, 8), t = alike.with_speeds(speeds);
  for (int i = 0; i < 100; ++i) {
    std::vector<double> loads(24);
    for (double& x : loads) x = 1 + g.uniform();
    const placement p = balanced({1, 24, loads}, t);
    REQUIRE(try_validate(p, t).has_value());
    // eight copies are enough for all GPUs to be done at the same time, nearly
    REQUIRE(least_time(p, loads, t) < 1.02 * std::accumulate(loads.begin(), loads.end(), 0.0) / 3);
  }

  // layer 0 is even, layer 1 has one hot expert, layer 2 two that are alike
  const std::vector<double> loads = {1, 1, 1, 1, 9, 1, 1, 1, 4, 4, 1, 1};
  const topology four = topology::uniform(1, 4, 2);
  CHECK(copies_by_gain({3, 4, loads}, four, 0) == std::vector<std::size_t>{0, 0, 0});
  CHECK(copies_by_gain({3, 4, loads}, four, 1) == std::vector<std::size_t>{0, 1, 0});
  const auto shared = copies_by_gain({3, 4, loads}, four, 4);
  CHECK(shared[0] == 0);
  CHECK(shared[1] + shared[2] <= 4);
  CHECK(shared[2] == 2);
  balanced_options options;
  options.copies_per_layer = shared;
  const placement p = balanced({3, 4, loads}, four, options);
  for (std::size_t l = 0; l < 3; ++l) {
    const auto row = p.layer(l);
    CHECK(static_cast<std::size_t>(std::count(row.begin(), row.end(), empty_slot)) == 4 - shared[l]);
  }
  options.copies_per_layer = std::span(shared).first(2);
  CHECK(code_of(try_balanced({3, 4, loads}, four, options)) == errc::shape_mismatch);
  CHECK(code_of(try_copies_by_gain({3, 4, loads}, topology::uniform(1, 1, 3), 1)) == errc::infeasible);
}
