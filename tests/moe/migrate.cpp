#include "check.hpp"

#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/place.hpp>

#include "code_of.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::count, std::equal, std::max
#include <cmath>      // std::nan
#include <map>        // std::map
#include <set>        // std::set
#include <utility>    // std::swap
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;

std::multiset<std::int32_t> contents(const placement& p, std::size_t layer, std::size_t first, std::size_t count) {
  const auto row = p.layer(layer).subspan(first, count);
  return {row.begin(), row.end()};
}

std::vector<double> random_loads(generator& g, std::size_t count) {
  std::vector<double> out(count);
  for (double& x : out) x = g.uniform() * g.uniform();
  return out;
}

}  // namespace

TEST_CASE("nothing moves when nothing changes") {
  const topology t = topology::uniform(2, 2, 2);
  const placement p = contiguous(3, 8, t);
  const migration m = migrate(p, p, t, 100);
  CHECK(m.moves == 0);
  CHECK(m.layers.empty());
  CHECK(m.seconds == 0);
  // a change of slot on the same GPU moves no weights either
  placement q = p;
  std::swap(q.layer(1)[0], q.layer(1)[1]);
  CHECK(migrate(p, q, t, 100).moves == 0);
}

TEST_CASE("an exchange between two GPUs is one round") {
  const topology t = topology::uniform(2, 1, 1, {.inside = {100, 1}, .between = {10, 2}});
  const migration m = migrate(placement::make(1, 2, 2, {0, 1}), placement::make(1, 2, 2, {1, 0}), t, 50);
  CHECK(m.moves == 2);
  REQUIRE(m.layers.size() == 1);
  REQUIRE(m.layers[0].rounds.size() == 1);
  CHECK(m.layers[0].buffers_per_gpu == 1);
  CHECK(m.layers[0].rounds[0].moves[0] == expert_move{1, 1, 0, 0});
  CHECK(m.bytes_between_nodes == 100);
  CHECK(m.bytes_inside_nodes == 0);
  CHECK(m.seconds == Approx(2 + 5));
}

TEST_CASE("a copy on the same node is preferred, then the GPU that sends least") {
  const topology t = topology::uniform(2, 2, 1);
  // expert 0 on GPUs 0 and 2; GPU 3 wants it
  const migration near = migrate(placement::make(1, 2, 4, {0, 1, 0, 1}), placement::make(1, 2, 4, {0, 1, 1, 0}), t, 1);
  for (const expert_move& m : near.layers[0].rounds[0].moves) CHECK(m.from_gpu >= 2);
  CHECK(near.bytes_between_nodes == 0);
  // both copies elsewhere: each sends once
  const topology wide = topology::uniform(2, 2, 2);
  const migration even = migrate(placement::make(1, 3, 8, {0, -1, 0, -1, 1, -1, 2, -1}),
                                 placement::make(1, 3, 8, {0, -1, 0, -1, 1, 0, 2, 0}), wide, 1);
  REQUIRE(even.moves == 2);
  CHECK(even.layers[0].rounds.size() == 1);
}

TEST_CASE("an expert comes from the nearest node that has it, which is sooner there") {
  // expert 0 is on nodes 0 and 2; node 3, in the rack of node 2, is to have it
  const topology t = topology::uniform(4, 1, 1, {.inside = {100, 1}, .between = {10, 2}}).with_racks(2, 5);
  const placement now = placement::make(1, 2, 4, {0, 1, 0, 1}), next = placement::make(1, 2, 4, {0, 1, 0, 0});
  const migration way = migrate(now, next, t, 20);
  REQUIRE(way.moves == 1);
  CHECK(way.layers[0].rounds[0].moves[0].from_gpu == 2);
  CHECK(way.seconds == Approx(2 + 2.0));
  CHECK(migrate(placement::make(1, 2, 4, {0, 1, 1, 1}), next, t, 20).seconds == Approx(2 * (2 + 10.0)));
}

TEST_CASE("a second copy on a GPU comes from the first, and a GPU sends one expert at a time") {
  const topology t = topology::uniform(2, 1, 2, {.inside = {100, 1}, .between = {10, 2}});
  CHECK(migrate(placement::make(1, 2, 4, {0, 1, -1, -1}), placement::make(1, 2, 4, {0, -1, 1, 1}), t, 1).moves == 1);
  const migration both =
      migrate(placement::make(1, 2, 4, {0, 1, -1, -1}), placement::make(1, 2, 4, {-1, -1, 0, 1}), t, 50);
  REQUIRE(both.moves == 2);
  CHECK(both.layers[0].rounds.size() == 2);
  CHECK(both.seconds == Approx(2 * (2 + 5)));
}

TEST_CASE("playing back any migration turns one placement into the other") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 2000; ++i) {
    std::vector<std::size_t> gpus(1 + g.below(4)), slots;
    for (auto& n : gpus) n = 1 + g.below(4);
    for (const std::size_t n : gpus) {
      for (std::size_t j = 0; j < n; ++j) slots.push_back(1 + g.below(4));
    }
    const topology t = topology::make(gpus, slots);
    const std::size_t layers = 1 + g.below(3), experts = 1 + g.below(t.slots());
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), experts);
    const placement from = balanced({layers, experts, random_loads(g, layers * experts)}, t);
    const placement to = balanced({layers, experts, random_loads(g, layers * experts)}, t);
    const migration plan = migrate(from, to, t, 8);

    placement now = from;
    std::size_t moves = 0;
    double bytes = 0;
    for (const layer_migration& layer : plan.layers) {
      std::map<std::uint32_t, std::int32_t> buffered;  // slot → expert
      std::map<std::size_t, std::size_t> ends, buffers;
      for (const migration_round& round : layer.rounds) {
        REQUIRE_FALSE(round.moves.empty());
        std::map<std::size_t, std::set<std::size_t>> peers;
        std::map<std::size_t, int> sends, receives;
        for (const expert_move& m : round.moves) {
          ++moves;
          bytes += 8;
          REQUIRE(m.from_gpu != m.to_gpu);
          REQUIRE(++sends[m.from_gpu] == 1);
          REQUIRE(++receives[m.to_gpu] == 1);
          peers[m.from_gpu].insert(m.to_gpu);
          peers[m.to_gpu].insert(m.from_gpu);
          ++ends[m.from_gpu];
          ++ends[m.to_gpu];
          ++buffers[m.to_gpu];
          // the sender holds it in the placement in use
          REQUIRE(contents(from, layer.layer, t.first_slot(m.from_gpu), t.slots_on_gpu(m.from_gpu))
                      .count(static_cast<std::int32_t>(m.expert)) > 0);
          REQUIRE(t.gpu_of_slot(m.to_slot) == m.to_gpu);
          buffered[m.to_slot] = static_cast<std::int32_t>(m.expert);
        }
        for (const auto& [gpu, others] : peers) REQUIRE(others.size() == 1);
      }
      std::size_t busiest = 0, most_buffers = 0;
      for (const auto& [gpu, n] : ends) busiest = std::max(busiest, n);
      for (const auto& [gpu, n] : buffers) most_buffers = std::max(most_buffers, n);
      REQUIRE(layer.rounds.size() < 2 * busiest);
      REQUIRE(layer.buffers_per_gpu == most_buffers);
      // the switch: what arrived is in place, the rest was on the GPU before
      for (std::size_t s = 0; s < t.slots(); ++s) {
        const std::int32_t e = to.layer(layer.layer)[s];
        const auto found = buffered.find(static_cast<std::uint32_t>(s));
        if (found != buffered.end()) {
          REQUIRE(found->second == e);
        } else if (e != empty_slot) {
          const std::size_t gpu = t.gpu_of_slot(s);
          REQUIRE(contents(from, layer.layer, t.first_slot(gpu), t.slots_on_gpu(gpu)).count(e) > 0);
        }
        now.layer(layer.layer)[s] = e;
      }
    }
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t gpu = 0; gpu < t.gpus(); ++gpu) {
        REQUIRE(contents(now, l, t.first_slot(gpu), t.slots_on_gpu(gpu)) ==
                contents(to, l, t.first_slot(gpu), t.slots_on_gpu(gpu)));
      }
    }
    REQUIRE(plan.moves == moves);
    REQUIRE(plan.bytes_between_nodes + plan.bytes_inside_nodes == bytes);

    const placement aligned = align(from, to, t);
    REQUIRE(try_validate(aligned, t).has_value());
    REQUIRE(migrate(from, aligned, t, 8).moves <= moves);
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t n = 0; n < t.nodes(); ++n) {
        REQUIRE(contents(aligned, l, t.first_slot_of_node(n), t.slots_on_node(n)) ==
                contents(to, l, t.first_slot_of_node(n), t.slots_on_node(n)));
      }
    }
  }
}

TEST_CASE("align undoes what is only a renaming") {
  generator g(tetromino_test::seed());
  const topology t = topology::uniform(2, 4, 3);
  const placement p = contiguous(1, 24, t);
  placement renamed = p;
  // GPUs 0 and 1 exchanged, then slots of GPU 2 turned round
  for (std::size_t s = 0; s < 3; ++s) std::swap(renamed.layer(0)[s], renamed.layer(0)[3 + s]);
  std::swap(renamed.layer(0)[6], renamed.layer(0)[8]);
  CHECK(migrate(p, renamed, t, 1).moves == 6);
  CHECK(align(p, renamed, t) == p);
  CHECK(code_of(try_align(contiguous(2, 24, t), renamed, t)) == errc::shape_mismatch);
  CHECK(code_of(try_align(p, renamed, topology::uniform(2, 4, 4))) == errc::shape_mismatch);
}

TEST_CASE("placements that do not belong together are errors") {
  const topology t = topology::uniform(2, 2, 2);
  const placement p = contiguous(1, 8, t);
  CHECK(code_of(try_migrate(p, contiguous(2, 8, t), t, 1)) == errc::shape_mismatch);
  CHECK(code_of(try_migrate(p, contiguous(1, 7, t), t, 1)) == errc::shape_mismatch);
  CHECK(code_of(try_migrate(p, placement(1, 8, 8), t, 1)) == errc::invalid_argument);
  CHECK(code_of(try_migrate(p, p, topology::uniform(2, 2, 3), 1)) == errc::shape_mismatch);
  CHECK(code_of(try_migrate(p, p, t, -1)) == errc::invalid_argument);
  CHECK(code_of(try_migrate(p, p, t, std::nan(""))) == errc::invalid_argument);
}

TEST_CASE("from four GPUs to six, and back") {
  const topology four = topology::uniform(2, 2, 3);
  const topology six = topology::make(std::vector<std::size_t>{3, 3}, std::vector<std::size_t>(6, 3));
  generator g(tetromino_test::seed());
  const placement before = balanced({2, 10, random_loads(g, 20)}, four);
  // GPUs 0 1 | 2 3 become 0 1 2 | 3 4 5, of which 2 and 5 are new
  const std::vector<std::uint32_t> were = {0, 1, new_gpu, 2, 3, new_gpu};
  const placement start = carry_over(before, four, six, were);
  CHECK(contents(start, 1, 9, 3) == contents(before, 1, 6, 3));
  CHECK(contents(start, 0, 6, 3) == std::multiset<std::int32_t>{-1, -1, -1});
  const placement after = balanced({2, 10, random_loads(g, 20)}, six);
  const migration grow = migrate(start, after, six, 1);
  CHECK(grow.missing.empty());
  for (const layer_migration& l : grow.layers) {
    for (const migration_round& r : l.rounds) {
      for (const expert_move& m : r.moves) CHECK((m.from_gpu != 2 && m.from_gpu != 5));
    }
  }
  // back: experts that only the new GPUs had are missing, and named
  const std::vector<std::uint32_t> kept = {0, 1, 3, 4};
  const placement shrunk = carry_over(after, six, four, kept);
  const migration back = migrate(shrunk, before, four, 1);
  std::size_t lost = 0;
  for (std::size_t l = 0; l < 2; ++l) {
    for (std::int32_t e = 0; e < 10; ++e) lost += contents(shrunk, l, 0, 12).count(e) == 0 ? 1U : 0U;
  }
  CHECK(back.missing.size() == lost);
  CHECK(code_of(try_carry_over(before, six, four)) == errc::shape_mismatch);
  CHECK(code_of(try_carry_over(before, four, six, kept)) == errc::shape_mismatch);
  CHECK(code_of(try_carry_over(before, four, four, std::vector<std::uint32_t>{0, 1, 2, 4})) == errc::invalid_argument);
}

TEST_CASE("dead GPUs are no source, leaving ones no target, and what is lost is named") {
  generator g(tetromino_test::seed());
  for (int i = 0; i < 1000; ++i) {
    const topology t = topology::uniform(1 + g.below(3), 1 + g.below(3), 2 + g.below(3));
    const std::size_t experts = 1 + g.below(t.slots());
    const placement before = balanced({1, experts, random_loads(g, experts)}, t);
    std::vector<std::uint32_t> gone;
    for (std::uint32_t gpu = 0; gpu < t.gpus(); ++gpu) {
      if (g.below(3) == 0) gone.push_back(gpu);
    }
    const auto left = t.try_without(gone);
    if (!left || left->slots() < experts) continue;
    const placement planned = balanced({1, experts, random_loads(g, experts)}, *left);
    const placement after = carry_over(planned, *left, t);
    const bool dead = g.below(2) == 0;
    const placement now = dead ? carry_over(carry_over(before, t, *left), *left, t) : before;
    const migration way = migrate(now, after, t, 1);
    const auto is_gone = [&](std::uint32_t gpu) { return std::count(gone.begin(), gone.end(), gpu) > 0; };
    std::multiset<std::int32_t> held = contents(now, 0, 0, t.slots());
    for (const missing_expert& m : way.missing) {
      REQUIRE(held.count(static_cast<std::int32_t>(m.expert)) == 0);
      REQUIRE(after.layer(0)[m.to_slot] == static_cast<std::int32_t>(m.expert));
      held.insert(static_cast<std::int32_t>(m.expert));
    }
    for (std::size_t e = 0; e < experts; ++e) REQUIRE(held.count(static_cast<std::int32_t>(e)) > 0);
    if (!dead) REQUIRE(way.missing.empty());
    for (const layer_migration& l : way.layers) {
      for (const migration_round& r : l.rounds) {
        for (const expert_move& m : r.moves) {
          REQUIRE_FALSE(is_gone(m.to_gpu));
          if (dead) REQUIRE_FALSE(is_gone(m.from_gpu));
        }
      }
    }
  }
  const topology t = topology::uniform(1, 2, 1);
  CHECK(code_of(t.try_without(std::vector<std::uint32_t>{2})) == errc::invalid_argument);
  CHECK(code_of(t.try_without(std::vector<std::uint32_t>{0, 1})) == errc::invalid_argument);
}

TEST_CASE("a budget buys whole layers, those of most worth first, and the next call goes on") {
  generator g(tetromino_test::seed());
  const topology t = topology::uniform(3, 2, 4);
  const std::size_t layers = 9, experts = 20;
  for (int i = 0; i < 100; ++i) {
    const auto random = [&] { return balanced({layers, experts, random_loads(g, layers * experts)}, t); };
    const placement current = random(), next = random();
    const migration whole = migrate(current, next, t, 10);
    std::vector<double> gains(layers);
    for (double& gain : gains) gain = g.uniform();
    const migration_budget budget{whole.bytes_between_nodes / 3, whole.bytes_inside_nodes / 2};
    placement at = current;
    std::size_t steps = 0;
    for (std::vector<std::size_t> left{0}; !left.empty() && steps < 20; ++steps) {
      const partial_migration part = migrate_within(at, next, t, 10, budget, gains);
      REQUIRE(part.way.bytes_between_nodes <= budget.bytes_between_nodes);
      REQUIRE(part.way.bytes_inside_nodes <= budget.bytes_inside_nodes);
      validate(part.reached, t, {.one_copy_per_gpu = false});
      for (std::size_t l = 0; l < layers; ++l) {
        const bool is_left = std::count(part.layers_left.begin(), part.layers_left.end(), l) > 0;
        const auto expected = is_left ? at.layer(l) : next.layer(l), got = part.reached.layer(l);
        REQUIRE(std::equal(got.begin(), got.end(), expected.begin()));
      }
      at = part.reached;
      left = part.layers_left;
    }
    REQUIRE(at == next);
    REQUIRE(steps > 2);
  }

  const placement current = contiguous(2, 12, t);
  placement next = current;
  std::swap(next.layer(0)[0], next.layer(0)[20]);  // one expert each way between nodes
  std::swap(next.layer(1)[0], next.layer(1)[20]);
  const auto reached = [&](double bytes, std::vector<double> gains) {
    return migrate_within(current, next, t, 10, {.bytes_between_nodes = bytes}, gains).layers_left;
  };
  CHECK(reached(20, {1, 2}) == std::vector<std::size_t>{0});
  CHECK(reached(20, {2, 1}) == std::vector<std::size_t>{1});
  CHECK(reached(40, {1, 2}).empty());
  CHECK(reached(19, {1, 2}) == std::vector<std::size_t>{1, 0});

  std::swap(next.layer(0)[1], next.layer(0)[21]);
  const auto none = migrate_within(current, next, t, 10, {.bytes_between_nodes = 19});
  CHECK(none.way.layers.empty());
  CHECK(none.least_left.bytes_between_nodes == 20);  // of layer 1; layer 0 takes 40
  CHECK(none.least_left.bytes_inside_nodes == 0);
  const auto one = migrate_within(current, next, t, 10, none.least_left);
  CHECK(one.layers_left == std::vector<std::size_t>{0});
  CHECK(one.least_left.bytes_between_nodes == 40);
  CHECK(migrate_within(one.reached, next, t, 10, one.least_left).least_left.bytes_between_nodes == 0);

  placement other = current;  // the same between nodes in both layers, more inside in the first
  for (std::size_t l = 0; l < 2; ++l) std::swap(other.layer(l)[0], other.layer(l)[20]);
  std::swap(other.layer(0)[1], other.layer(0)[5]);
  const auto cheaper = migrate_within(current, other, t, 10, {0, 0});
  CHECK(cheaper.layers_left == std::vector<std::size_t>{0, 1});
  CHECK(cheaper.least_left.bytes_between_nodes == 20);
  CHECK(cheaper.least_left.bytes_inside_nodes == 0);
  CHECK(migrate_within(current, other, t, 10, cheaper.least_left).layers_left == std::vector<std::size_t>{0});

  // a layer that gains nothing, for nothing between nodes, is worth no more and no less than others that gain nothing
  const topology four = topology::uniform(2, 2, 1);
  const placement start = placement::make(4, 4, 4, {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3});
  const placement goal = placement::make(4, 4, 4, {2, 1, 0, 3, 2, 1, 0, 3, 1, 0, 2, 3, 2, 1, 0, 3});
  const auto left_of = [&](double bytes, std::vector<double> gains) {
    return migrate_within(start, goal, four, 1, {.bytes_between_nodes = bytes}, gains).layers_left;
  };
  CHECK(left_of(4, {50, 1, 0, 10}) == std::vector<std::size_t>{1});
  CHECK(left_of(2, {50, 1, 0, 10}) == std::vector<std::size_t>{3, 1});
  CHECK(left_of(2, {-1, 0, 0, 10}) == std::vector<std::size_t>{1, 0});
  CHECK(left_of(2, {1, 0, -1, 10}) == std::vector<std::size_t>{0, 1});
  // within a budget inside nodes too, a free layer is the first or the last by the sign of its gain
  const auto order_of = [&](std::vector<double> gains) {
    return migrate_within(start, goal, four, 1, {0, 0}, gains).layers_left;
  };
  CHECK(order_of({50, 1, 2, 10}) == std::vector<std::size_t>{2, 0, 3, 1});
  CHECK(order_of({50, 1, 0, -1}) == std::vector<std::size_t>{0, 1, 2, 3});
  CHECK(order_of({50, 1, -1, -2}) == std::vector<std::size_t>{0, 1, 3, 2});

  placement lacking = current;
  lacking.layer(0)[0] = empty_slot;
  const auto must = migrate_within(lacking, next, t, 10, {0, 0});
  CHECK(must.layers_left == std::vector<std::size_t>{1});
  CHECK(must.way.missing.size() == 1);

  CHECK(code_of(try_migrate_within(current, next, t, 10, {-1, 0})) == errc::invalid_argument);
  CHECK(code_of(try_migrate_within(current, next, t, 10, {0, std::nan("")})) == errc::invalid_argument);
  CHECK(code_of(try_migrate_within(current, next, t, 10, {}, std::vector<double>{1})) == errc::shape_mismatch);
  CHECK(code_of(try_migrate_within(current, next, t, 10, {}, std::vector<double>{1, std::nan("")})) ==
        errc::invalid_argument);
  CHECK(code_of(try_migrate_within(current, next, t, -1, {})) == errc::invalid_argument);
}
