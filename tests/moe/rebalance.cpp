#include "check.hpp"

#include <tetromino/moe/place.hpp>
#include <tetromino/moe/rebalance.hpp>
#include <tetromino/moe/trace_io.hpp>

#include "code_of.hpp"
#include "random_clusters.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::count, std::equal, std::find, std::max, std::min
#include <cmath>      // std::abs, std::nan
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t, std::uint64_t
#include <set>        // std::set
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using tetromino::errc;

/// Requests of one domain of the bundled trace, from the n-th on.
std::vector<request> of_domain(const trace& t, std::uint32_t domain, std::size_t first, std::size_t count) {
  std::vector<request> out;
  std::size_t seen = 0;
  for (const request& r : t.requests()) {
    if (r.domain == domain && seen++ >= first && out.size() < count) out.push_back(r);
  }
  return out;
}

rebalance_options quick() {
  rebalance_options o;
  o.plan.effort = 0.1;
  o.least_tokens = 500;
  o.node_imbalance = 1.6;  // of so few requests
  return o;
}

void carry_out(rebalancer& loop) {
  while (const layer_migration* layer = loop.next_layer()) {
    // at any time, what is served is a plan: each layer is the old one or the new one
    REQUIRE(try_validate(loop.current(), loop.cluster(), {.one_copy_per_gpu = false}).has_value());
    REQUIRE_FALSE(std::equal(loop.current().layer(layer->layer).begin(), loop.current().layer(layer->layer).end(),
                             loop.next().layer(layer->layer).begin()));
    loop.commit_layer();
  }
}

/// The nodes that requests are assigned to.
std::vector<std::uint32_t> homes_by(const node_affinity& affinity, const trace& t) {
  signature_builder builder = affinity.builder();
  std::vector<request_signature> signatures;
  std::vector<std::uint64_t> tokens;
  for (const request& r : t.requests()) {
    signatures.push_back(signature_of(t.view(), r, builder));
    tokens.push_back(r.range(phase::decode).size());
  }
  return group(affinity, signatures, tokens);
}

/// Serves each request once on its node, token by token: how often one goes to another node. Each expert has one copy.
double visits(const trace& t, const placement& p, const topology& cluster, const std::vector<std::uint32_t>& homes) {
  std::size_t out = 0;
  const trace_view calls = t.view();
  for (std::size_t r = 0; r < homes.size(); ++r) {
    const token_range range = t.requests()[r].range(phase::decode);
    for (std::uint64_t token = range.first; token < range.last; ++token) {
      for (std::size_t l = 0; l < p.layers(); ++l) {
        std::set<std::size_t> nodes;
        for (const std::uint16_t e : calls.experts_of(token, l)) {
          const auto slot = std::find(p.layer(l).begin(), p.layer(l).end(), e) - p.layer(l).begin();
          nodes.insert(cluster.node_of_slot(static_cast<std::size_t>(slot)));
        }
        nodes.erase(homes[r]);
        out += nodes.size();
      }
    }
  }
  return static_cast<double>(out);
}

}  // namespace

TEST_CASE("the loop plans, migrates layer by layer, rests, and plans again when the traffic changes") {
  const trace t = read_trace(tetromino_test::data_file("routing-16x2.safetensors"));
  const topology cluster = topology::uniform(4, 1, 5);
  rebalancer loop = rebalancer::make(contiguous(4, 16, cluster), cluster, quick());
  CHECK(loop.affinity() == nullptr);
  CHECK(loop.consider(t.view().with({})).verdict == rebalance_verdict::too_few_tokens);
  CHECK_THROWS_AS(loop.commit_layer(), tetromino_test::precondition_failed);

  const std::vector<request> first = of_domain(t, 0, 0, 25);
  const rebalance_report plan = loop.consider(t.view().with(first));
  CHECK(plan.verdict == rebalance_verdict::new_plan);
  CHECK(plan.divergence == 1);
  CHECK(plan.planned_nodes_per_token < plan.nodes_per_token);
  CHECK(plan.way.moves > 0);
  CHECK(loop.next_layer() != nullptr);
  CHECK(loop.affinity() == nullptr);
  CHECK(loop.consider(t.view().with(first)).verdict == rebalance_verdict::migrating);
  carry_out(loop);
  REQUIRE(loop.affinity() != nullptr);
  CHECK(loop.current() == loop.next());

  const rebalance_report same = loop.consider(t.view().with(first));
  CHECK(same.verdict == rebalance_verdict::steady);
  CHECK(same.divergence == 0);
  CHECK(same.nodes_per_token == Approx(plan.planned_nodes_per_token));

  const rebalance_report other = loop.consider(t.view().with(of_domain(t, 1, 0, 25)));
  CHECK(other.verdict == rebalance_verdict::new_plan);
  CHECK(other.divergence > 0.02);
  CHECK(other.planned_nodes_per_token < other.nodes_per_token);
  carry_out(loop);

  // an online grouper goes on with the new affinity
  online_grouper grouper(*loop.affinity());
  const node_affinity next = node_affinity::make(loop.current(), cluster, t.view());
  grouper.use(next);
  CHECK_THROWS_AS(grouper.use(node_affinity::make(contiguous(4, 16, topology::uniform(2, 1, 8)),
                                                  topology::uniform(2, 1, 8), t.view())),
                  tetromino_test::precondition_failed);
}

TEST_CASE("moves must pay, and stay within their budget") {
  const trace t = read_trace(tetromino_test::data_file("routing-16x2.safetensors"));
  const topology cluster = topology::uniform(4, 1, 4);
  const std::vector<request> seen = of_domain(t, 2, 0, 25);
  rebalance_options o = quick();
  o.tokens_ahead = 10;
  o.node_imbalance = 100;
  rebalancer dear = rebalancer::make(contiguous(4, 16, cluster), cluster, o);
  CHECK(dear.consider(t.view().with(seen)).verdict == rebalance_verdict::no_gain);
  CHECK(dear.next_layer() == nullptr);
  CHECK(dear.affinity() != nullptr);
  CHECK(dear.current() == contiguous(4, 16, cluster));

  o = quick();
  o.bytes_per_expert = 1;
  rebalancer free = rebalancer::make(contiguous(4, 16, cluster), cluster, o);
  const double all = free.consider(t.view().with(seen)).way.bytes_between_nodes;
  REQUIRE(all > 8);
  for (const double budget : {all / 4, all / 2, all}) {
    o.byte_budget = budget;
    rebalancer thrifty = rebalancer::make(contiguous(4, 16, cluster), cluster, o);
    const rebalance_report r = thrifty.consider(t.view().with(seen));
    CHECK(r.way.bytes_between_nodes <= budget);
    CHECK(r.planned_nodes_per_token <= r.nodes_per_token);
    rebalancer busy = rebalancer::make(contiguous(4, 16, cluster), cluster, o);
    CHECK(busy.consider(t.view().with(seen), o.tokens_ahead / 2).way.bytes_between_nodes <= budget);
  }
}

TEST_CASE("what a plan saves is what serving would show, requests that run staying where they are") {
  CAPTURE(tetromino_test::seed());
  reference::generator g(tetromino_test::seed());
  std::size_t plans = 0, dearer = 0;
  for (int i = 0; i < 200; ++i) {
    const topology cluster = tetromino_test::random_cluster(g, 4, 2, 4);
    const std::size_t experts = 1 + g.below(std::min<std::size_t>(cluster.slots(), 12)), layers = 1 + g.below(2);
    const std::size_t k = 1 + g.below(std::min<std::size_t>(experts, 3));
    const auto routing = [&] { return tetromino_test::random_routing(g, layers, experts, k, 4 + g.below(12)); };
    const trace before = routing(), now = routing();
    const auto tokens = static_cast<double>(now.view().tokens(phase::decode));
    rebalance_options o;
    o.plan.effort = 0.05;
    o.plan.replicas = false;
    o.least_tokens = 1;
    o.divergence = 0;
    o.node_imbalance = 1000;
    o.bytes_per_expert = 1 + static_cast<double>(g.below(5));
    o.bytes_per_visit = 1 + static_cast<double>(g.below(9));
    const std::size_t times = 1 + g.below(12);  // as often as now's requests come before the next look
    o.tokens_ahead = tokens * static_cast<double>(times);
    rebalancer loop = rebalancer::make(contiguous(layers, experts, cluster), cluster, o);
    if (g.below(4) != 0) static_cast<void>(loop.consider(before.view()));
    while (loop.next_layer() != nullptr) loop.commit_layer();

    rebalancer free = loop;  // what it plans where nobody runs, for the sake of knowing the plan
    const rebalance_report alone = free.consider(now.view());
    if (alone.verdict != rebalance_verdict::new_plan) continue;
    ++plans;
    while (free.next_layer() != nullptr) free.commit_layer();
    const placement& old_plan = loop.current();
    const std::vector<std::uint32_t> new_homes = homes_by(*free.affinity(), now);
    std::vector<std::uint32_t> old_homes = homes_by(
        loop.affinity() == nullptr ? node_affinity::make(old_plan, cluster, now.view()) : *loop.affinity(), now);
    const double assigned = visits(now, old_plan, cluster, old_homes);
    if (loop.affinity() == nullptr) {  // requests run anywhere
      std::vector<std::uint32_t> live;
      for (std::uint32_t n = 0; n < cluster.nodes(); ++n) {
        if (cluster.slots_on_node(n) > 0) live.push_back(n);
      }
      for (std::size_t r = 0; r < old_homes.size(); ++r) old_homes[r] = live[r % live.size()];
    }
    const double stayed = visits(now, old_plan, cluster, old_homes),
                 kept = visits(now, free.current(), cluster, old_homes),
                 renewed = visits(now, free.current(), cluster, new_homes);

    for (std::size_t run = 0; run <= times + 1; ++run) {  // requests that run have so many times now's tokens to go
      const auto running = static_cast<double>(std::min(run, times)), come = static_cast<double>(times) - running;
      const double saved = o.bytes_per_visit * (come * (assigned - renewed) + running * (stayed - kept));
      rebalancer asked = loop;
      const rebalance_report r = asked.consider(now.view(), static_cast<double>(run) * tokens);
      CAPTURE(i, run, times, saved, r.bytes_saved, r.way.bytes_between_nodes);
      REQUIRE(std::abs(r.bytes_saved - saved) < 1e-6 * std::max(1.0, assigned * static_cast<double>(times)));
      REQUIRE(r.way.bytes_between_nodes == alone.way.bytes_between_nodes);
      REQUIRE(r.running_nodes_per_token ==
              Approx(run == 0 ? 0 : kept / tokens / static_cast<double>(layers)).margin(1e-9));
      const bool pays = r.bytes_saved > o.least_return * r.way.bytes_between_nodes;
      REQUIRE(r.verdict == (pays ? rebalance_verdict::new_plan : rebalance_verdict::no_gain));
      dearer += pays ? 0U : 1U;
    }
  }
  CHECK(plans > 15);
  CHECK(dearer > 15);
}

TEST_CASE("a GPU dies, a node dies, and both come back") {
  const trace t = read_trace(tetromino_test::data_file("routing-16x2.safetensors"));
  const topology cluster = topology::uniform(3, 2, 6);
  const std::vector<request> seen = of_domain(t, 0, 0, 25);
  rebalance_options o = quick();
  rebalancer loop = rebalancer::make(contiguous(4, 16, cluster), cluster, o);
  for (const std::vector<std::uint32_t>& dead :
       {std::vector<std::uint32_t>{1}, std::vector<std::uint32_t>{1, 2, 3}, std::vector<std::uint32_t>{}}) {
    loop.change_cluster(cluster.without(dead));
    const rebalance_report r = loop.consider(t.view().with(seen));
    std::size_t lost = 0;
    for (std::size_t l = 0; l < 4; ++l) {
      for (std::int32_t e = 0; e < 16; ++e) {
        const auto row = loop.current().layer(l);
        lost += std::find(row.begin(), row.end(), e) == row.end() ? 1U : 0U;
      }
    }
    CHECK(r.way.missing.size() == lost);
    if (lost > 0) CHECK(r.verdict == rebalance_verdict::new_plan);
    while (loop.next_layer() != nullptr) loop.commit_layer();
    CHECK(try_validate(loop.current(), loop.cluster(), {.one_copy_per_gpu = false}).has_value());
    for (const std::uint32_t gpu : dead) CHECK(loop.cluster().slots_on_gpu(gpu) == 0);
  }
  CHECK(code_of(loop.try_change_cluster(topology::uniform(1, 1, 15))) == errc::infeasible);
}

TEST_CASE("GPUs that leave give all away before, and no expert is ever missing") {
  CAPTURE(tetromino_test::seed());
  reference::generator g(tetromino_test::seed());
  std::size_t drained = 0;
  for (int i = 0; i < 100; ++i) {
    const topology cluster = tetromino_test::random_cluster(g, 4, 3, 4);
    std::vector<std::uint32_t> leaving;
    for (std::uint32_t gpu = 0; gpu < cluster.gpus(); ++gpu) {
      if (g.below(3) == 0) leaving.push_back(gpu);
    }
    const auto left = cluster.try_without(leaving);
    if (!left.has_value() || leaving.empty()) continue;
    const std::size_t experts = 1 + g.below(std::min<std::size_t>(left->slots(), 12)), layers = 1 + g.below(3);
    const std::size_t k = 1 + g.below(std::min<std::size_t>(experts, 3));
    const trace t = tetromino_test::random_routing(g, layers, experts, k, 4 + g.below(12));
    rebalance_options o = quick();
    o.least_tokens = 1;
    rebalancer loop = rebalancer::make(contiguous(layers, experts, cluster), cluster, o);
    if (g.below(2) == 0) static_cast<void>(loop.consider(t.view()));  // given up where it has only begun
    if (loop.next_layer() != nullptr && g.below(2) == 0) loop.commit_layer();
    loop.drain(leaving);
    CAPTURE(i, leaving);
    REQUIRE(loop.next_layer() == nullptr);
    const placement before = loop.current();
    const auto is_on = [&](const placement& p, std::size_t gpu) {
      std::size_t count = 0;
      for (std::size_t l = 0; l < layers; ++l) {
        for (std::size_t s = 0; s < cluster.slots_on_gpu(gpu); ++s) {
          count += p.layer(l)[cluster.first_slot(gpu) + s] != empty_slot ? 1U : 0U;
        }
      }
      return count;
    };
    std::size_t held = 0;
    for (const std::uint32_t gpu : leaving) held += is_on(before, gpu);
    const rebalance_report r = loop.consider(t.view());
    if (held > 0) {
      REQUIRE(r.verdict == rebalance_verdict::new_plan);
      ++drained;
    }
    REQUIRE(r.way.missing.empty());
    // GPUs hold what they held, and what the rounds bring them from one that holds it
    std::set<std::vector<std::size_t>> weights;  // layer, GPU, expert
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t s = 0; s < cluster.slots(); ++s) {
        if (const std::int32_t e = before.layer(l)[s]; e != empty_slot) {
          weights.insert({l, cluster.gpu_of_slot(s), static_cast<std::size_t>(e)});
        }
      }
    }
    while (const layer_migration* layer = loop.next_layer()) {
      for (const migration_round& round : layer->rounds) {
        for (const expert_move& m : round.moves) {
          REQUIRE(weights.count({layer->layer, m.from_gpu, m.expert}) == 1);
          REQUIRE(std::find(leaving.begin(), leaving.end(), m.to_gpu) == leaving.end());
          weights.insert({layer->layer, m.to_gpu, m.expert});
        }
      }
      loop.commit_layer();
      REQUIRE(try_validate(loop.current(), cluster, {.one_copy_per_gpu = false}).has_value());
      for (std::size_t l = 0; l < layers; ++l) {
        for (std::size_t s = 0; s < cluster.slots(); ++s) {
          const std::int32_t e = loop.current().layer(l)[s];
          if (e != empty_slot) {
            REQUIRE(weights.count({l, cluster.gpu_of_slot(s), static_cast<std::size_t>(e)}) == 1);
          }
        }
      }
    }
    if (loop.affinity() != nullptr) {
      for (const std::uint32_t home : homes_by(*loop.affinity(), t)) REQUIRE(left->slots_on_node(home) > 0);
    }
    static_cast<void>(loop.consider(t.view()));  // plans to come leave them out too
    carry_out(loop);
    for (const std::uint32_t gpu : leaving) REQUIRE(is_on(loop.current(), gpu) == 0);
    rebalancer gone = loop, back = loop;
    gone.change_cluster(*left);
    REQUIRE(try_validate(gone.current(), *left, {.one_copy_per_gpu = false}).has_value());
    back.drain({});  // they stay: as a loop that begins with this plan
    rebalancer fresh = rebalancer::make(loop.current(), cluster, o);
    REQUIRE(back.consider(t.view()).verdict == fresh.consider(t.view()).verdict);
    REQUIRE(back.next() == fresh.next());
  }
  CHECK(drained > 20);
  rebalancer loop = rebalancer::make(contiguous(1, 4, topology::uniform(3, 1, 2)), topology::uniform(3, 1, 2), {});
  CHECK(code_of(loop.try_drain(std::vector<std::uint32_t>{0, 1})) == errc::infeasible);
  CHECK(code_of(loop.try_drain(std::vector<std::uint32_t>{3})) == errc::invalid_argument);
}

TEST_CASE("a loop that cannot be is an error") {
  const topology cluster = topology::uniform(2, 1, 2);
  CHECK(code_of(rebalancer::try_make(placement(1, 4, 4), cluster, {})) == errc::invalid_argument);
  CHECK(code_of(rebalancer::try_make(contiguous(1, 4, cluster), topology::uniform(1, 1, 5), {})) ==
        errc::shape_mismatch);
  rebalance_options o;
  o.byte_budget = std::nan("");
  CHECK(code_of(rebalancer::try_make(contiguous(1, 4, cluster), cluster, o)) == errc::invalid_argument);
  const auto with = [&](const auto& change) {
    rebalance_options changed;
    change(changed);
    return code_of(rebalancer::try_make(contiguous(1, 4, cluster), cluster, changed));
  };
  using options = rebalance_options;
  CHECK(with([](options& x) { x.plan.node_imbalance = std::nan(""); }) == errc::invalid_argument);
  CHECK(with([](options& x) { x.plan.pair_weight = -1; }) == errc::invalid_argument);
  static constexpr std::uint32_t second = 1;
  CHECK(with([](options& x) { x.plan.layers = {&second, 1}; }) == errc::invalid_argument);
  CHECK(with([](options& x) { x.plan.nodes_per_expert = 2; }) == errc::infeasible);
  CHECK(with([](options& x) { x.group.token_budget = 0; }) == errc::invalid_argument);
  CHECK(with([](options& x) { x.group.node_weight = std::nan(""); }) == errc::invalid_argument);
  CHECK(with([](options& x) { x.replicas.node_limit = -1; }) == errc::invalid_argument);
  CHECK(with([](options& x) { x.replicas.gpu_limit = std::nan(""); }) == errc::invalid_argument);
  CHECK(with([](options& x) { x.replicas.choice = replica_choice::step_pairs; }) == errc::invalid_argument);
  const trace t = read_trace(tetromino_test::data_file("routing-16x2.safetensors"));
  rebalancer loop = rebalancer::make(contiguous(1, 4, cluster), cluster, {});
  CHECK(code_of(loop.try_consider(t.view())) == errc::shape_mismatch);
  CHECK(code_of(loop.try_consider(t.view(), -1)) == errc::invalid_argument);
  recorder empty = recorder::make({{1, 4, 1}});
  CHECK(code_of(loop.try_consider(empty, std::nan(""))) == errc::invalid_argument);
  CHECK(loop.consider(empty).verdict == rebalance_verdict::too_few_tokens);
}
