#include "check.hpp"

/// What every solver owes, and what dispatch does, on thousands of random clusters and routings: each expert has a
/// slot, no slot is used twice, no node takes more tokens than its budget, no plan costs more than the one it started
/// from, dispatch is a permutation, and combine undoes it. (place.cpp says the same of the solvers that see loads
/// alone.)

#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/dispatch.hpp>
#include <tetromino/moe/place_exact.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/place.hpp>

#include "code_of.hpp"
#include "random_clusters.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::count, std::find, std::max, std::max_element, std::min, std::min_element, std::sort
#include <cmath>      // std::ceil
#include <cstdint>    // std::uint16_t, std::uint32_t
#include <vector>     // std::vector

namespace {

using namespace tetromino::moe;
using reference::generator;
using tetromino::errc;
using tetromino_test::random_cluster;
using tetromino_test::random_routing;

std::vector<std::uint64_t> decode_tokens(const trace& t) {
  std::vector<std::uint64_t> out;
  for (const request& r : t.requests()) out.push_back(r.range(phase::decode).size());
  return out;
}

/// Each request on a node, and no node above `budget` × its share by GPUs, but for what whole requests need: the budget
/// is rounded up to them, and where they are not alike the last one may cross it.
void require_within_budget(const topology& t, const std::vector<std::uint32_t>& source,
                           const std::vector<std::uint64_t>& tokens, double budget) {
  REQUIRE(source.size() == tokens.size());
  std::vector<std::uint64_t> used(t.nodes(), 0);
  std::uint64_t all = 0, largest = 0, smallest = ~std::uint64_t{0};
  for (std::size_t r = 0; r < source.size(); ++r) {
    REQUIRE(source[r] < t.nodes());
    used[source[r]] += tokens[r];
    all += tokens[r];
    largest = std::max(largest, tokens[r]);
    smallest = std::min(smallest, tokens[r]);
  }
  for (std::size_t n = 0; n < t.nodes(); ++n) {
    const double share = static_cast<double>(all) * t.speed_of_node(n) / static_cast<double>(t.gpus_with_slots());
    const auto whole = static_cast<double>(largest);
    const double room = std::max(share * budget, std::ceil(share * budget / whole) * whole);
    CAPTURE(n, used[n], share, largest, smallest);
    REQUIRE(static_cast<double>(used[n]) <= room + (smallest == largest ? 0.0 : whole) + 1e-6);
  }
}

/// What the options of `local` and `exact` weigh, counted from scratch.
double cost_of(const trace& t, const placement& p, const topology& cluster, const std::vector<std::uint32_t>& source,
               double node_weight, double pair_weight) {
  cost_options options;
  options.replicas.choice = replica_choice::fewest_nodes;
  const cost_report r = evaluate(t.view(), p, cluster, source, options);
  return node_weight * static_cast<double>(r.remote_visits) + pair_weight * static_cast<double>(r.remote_pairs);
}

/// What `local` owes on so many random clusters.
void check_local(int clusters) {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  std::size_t started = 0, better = 0;
  for (int i = 0; i < clusters; ++i) {
    const topology t = random_cluster(g, g.below(8) == 0 ? 20 : 5, 3, 4);
    const std::size_t experts = 1 + g.below(std::min<std::size_t>(t.slots(), 24)), layers = 1 + g.below(2);
    const std::size_t k = 1 + g.below(std::min<std::size_t>(experts, 4)), requests = 1 + g.below(12);
    const trace routing = random_routing(g, layers, experts, k, requests);
    local_options o;
    const std::size_t aim = g.below(3);
    o.node_weight = aim == 1 ? 0 : 1;
    o.pair_weight = aim == 0 ? 0 : 0.5;
    o.token_budget = 1 + g.uniform();
    o.replicas = g.below(2) == 0;
    o.seed = g.bits();
    o.effort = g.below(2) == 0 ? 0.05 : 0.005;  // little: where a search may well end above its start
    const placement before = contiguous(layers, experts, t);
    const bool from_start = g.below(2) == 0;
    if (from_start) {
      o.start = &before;
      o.node_imbalance = 0;
      o.price_per_move = g.below(2) == 0 ? 0 : 100 * g.uniform();
    } else {
      o.node_imbalance = g.below(2) == 0 ? 0 : 1 + g.uniform();
      o.gpu_imbalance = g.below(2) == 0 ? 0 : 1 + g.uniform();
    }
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), layers, experts, k, requests, o.replicas, from_start);

    const local_plan plan = local(routing.view(), t, o);
    const auto ok = try_validate(plan.experts, t);
    if (!ok) FAIL(ok.error().what());
    for (std::size_t l = 0; l < layers; ++l) {
      const std::span<const std::int32_t> row = plan.experts.layer(l);
      const auto filled = row.size() - static_cast<std::size_t>(std::count(row.begin(), row.end(), empty_slot));
      REQUIRE(filled >= experts);
      if (!o.replicas) REQUIRE(filled == experts);
    }
    require_within_budget(t, plan.source_of_request, decode_tokens(routing), o.token_budget);
    if (!from_start) continue;

    ++started;
    local_options still = o;
    still.max_proposals = 1;  // too few for the placement to change: requests alone are grouped
    still.price_per_move = std::max(o.price_per_move, 1e-6);  // at no price it might start anew
    const local_plan start = local(routing.view(), t, still);
    const auto tokens = static_cast<double>(routing.view().tokens(phase::decode));
    const auto cost = [&](const local_plan& p) {
      return cost_of(routing, p.experts, t, p.source_of_request, o.node_weight, o.pair_weight) +
             (o.node_weight + o.pair_weight) * o.price_per_move / 1000 * tokens * static_cast<double>(p.copies_moved);
    };
    const double was = cost(start), is = cost(plan);
    REQUIRE(is <= was + 1e-9);
    better += is < was - 1e-9 ? 1U : 0U;
  }
  CHECK(started > static_cast<std::size_t>(clusters) / 3);
  CHECK(better > started / 4);
}

}  // namespace

TEST_CASE("local: valid, full, within the token budget, and never dearer than its start") { check_local(1200); }

TEST_CASE("local: the same on more clusters", "[.slow]") { check_local(3000); }

TEST_CASE("exact: valid, within the token budget, and never dearer than other plans of one copy") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  std::size_t solved = 0;
  for (int i = 0; i < 3000; ++i) {
    const topology t = random_cluster(g, 3, 2, 3);
    const std::size_t experts = 1 + g.below(std::min<std::size_t>(t.slots(), 6)), layers = 1 + g.below(2);
    const trace routing =
        random_routing(g, layers, experts, 1 + g.below(std::min<std::size_t>(experts, 3)), 1 + g.below(4));
    exact_options o;
    o.pair_weight = g.below(2) == 0 ? 0 : 0.5;
    o.token_budget = 1 + g.uniform();
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), layers, experts);
    const auto best = try_exact(routing.view(), t, o);
    if (!best) {  // requests of different sizes may fit into no budget
      REQUIRE(code_of(best) == errc::infeasible);
      const std::vector<std::uint64_t> tokens = decode_tokens(routing);
      REQUIRE(*std::min_element(tokens.begin(), tokens.end()) < *std::max_element(tokens.begin(), tokens.end()));
      continue;
    }
    ++solved;
    REQUIRE(try_validate(best->experts, t).has_value());
    require_within_budget(t, best->source_of_request, decode_tokens(routing), o.token_budget);
    const auto cost = [&](const placement& p, const std::vector<std::uint32_t>& source) {
      return cost_of(routing, p, t, source, o.node_weight, o.pair_weight);
    };
    REQUIRE(best->cost == Approx(cost(best->experts, best->source_of_request)));
    REQUIRE(best->cost <= cost(contiguous(layers, experts, t), best->source_of_request) + 1e-9);
    REQUIRE(best->cost <= cost(round_robin(layers, experts, t), best->source_of_request) + 1e-9);
  }
  CHECK(solved > 2000);
}

TEST_CASE("grouping: each request on one node, within the token budget") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  for (int i = 0; i < 3000; ++i) {
    const topology t = random_cluster(g, 6, 3, 4);
    const std::size_t experts = 1 + g.below(t.slots()), layers = 1 + g.below(2);
    const trace routing =
        random_routing(g, layers, experts, 1 + g.below(std::min<std::size_t>(experts, 4)), 1 + g.below(20));
    const placement p = g.below(2) == 0 ? contiguous(layers, experts, t) : round_robin(layers, experts, t);
    group_options o;
    o.pair_weight = g.below(2) == 0 ? 0 : 1;
    o.token_budget = 1 + g.uniform();
    CAPTURE(i, t.nodes(), t.gpus(), t.slots(), layers, experts);
    const node_affinity affinity = node_affinity::make(p, t, routing.view(), o);
    signature_builder builder = affinity.builder();
    std::vector<request_signature> signatures;
    for (const request& r : routing.requests()) signatures.push_back(signature_of(routing.view(), r, builder));
    const std::vector<std::uint64_t> tokens = decode_tokens(routing);
    require_within_budget(t, group(affinity, signatures, tokens), tokens, o.token_budget);

    // one by one: nobody is put above the budget while a node has room
    online_grouper online(affinity);
    std::uint64_t all = 0;
    std::vector<std::uint64_t> used(t.nodes(), 0);
    for (std::size_t r = 0; r < tokens.size(); ++r) {
      all += tokens[r];
      const auto limit = [&](std::size_t n) {
        return o.token_budget * static_cast<double>(all) / static_cast<double>(t.gpus_with_slots()) *
                   t.speed_of_node(n) +
               1e-6;
      };
      bool room = false;
      for (std::size_t n = 0; n < t.nodes(); ++n) room |= static_cast<double>(used[n] + tokens[r]) < limit(n) - 2e-6;
      const std::uint32_t node = online.assign(signatures[r], tokens[r]);
      REQUIRE(node < t.nodes());
      used[node] += tokens[r];
      if (room) REQUIRE(static_cast<double>(used[node]) <= limit(node));
      REQUIRE(online.tokens_on_node()[node] == used[node]);
    }
  }
}

namespace {

using rows_of_ranks = std::vector<std::vector<float>>;  // [ranks][rows, width]

/// Exchanges the counts and calls of one hop between plans that stand for ranks.
void meet(std::vector<dispatch_plan>& plans) {
  for (std::size_t to = 0; to < plans.size(); ++to) {
    std::vector<std::int32_t> counts;
    for (const dispatch_plan& from : plans) counts.push_back(from.send_counts()[to]);
    plans[to].plan_receive(counts);
    const std::size_t k = plans[to].calls_per_row();
    for (std::size_t from = 0; from < plans.size(); ++from) {
      const auto sent = plans[from].send_calls().subspan(static_cast<std::size_t>(plans[from].send_offsets()[to]) * k,
                                                         static_cast<std::size_t>(counts[from]) * k);
      std::copy(
          sent.begin(), sent.end(),
          plans[to].receive_calls().subspan(static_cast<std::size_t>(plans[to].receive_offsets()[from]) * k).begin());
    }
  }
}

/// rows[ranks][rows, width] → received[ranks][received, width]
rows_of_ranks carry(const std::vector<dispatch_plan>& plans, const rows_of_ranks& rows, std::size_t width) {
  rows_of_ranks sent(plans.size()), received(plans.size());
  for (std::size_t r = 0; r < plans.size(); ++r) {
    sent[r].resize(plans[r].sent() * width);
    gather_rows(plans[r].send_rows(), std::span<const float>(rows[r]), std::span(sent[r]), width);
  }
  for (std::size_t to = 0; to < plans.size(); ++to) {
    for (std::size_t from = 0; from < plans.size(); ++from) {
      const auto begin = sent[from].begin() + plans[from].send_offsets()[to] * static_cast<std::ptrdiff_t>(width);
      received[to].insert(received[to].end(), begin,
                          begin + plans[from].send_counts()[to] * static_cast<std::ptrdiff_t>(width));
    }
  }
  return received;
}

/// answers[ranks][received, width] → out[ranks][rows, width]
rows_of_ranks carry_back(const std::vector<dispatch_plan>& plans, const rows_of_ranks& answers, std::size_t width) {
  rows_of_ranks out(plans.size());
  for (std::size_t r = 0; r < plans.size(); ++r) {
    std::vector<float> back;
    for (std::size_t from = 0; from < plans.size(); ++from) {
      const auto begin = answers[from].begin() + plans[from].receive_offsets()[r] * static_cast<std::ptrdiff_t>(width);
      back.insert(back.end(), begin, begin + plans[from].receive_counts()[r] * static_cast<std::ptrdiff_t>(width));
    }
    out[r].resize(plans[r].rows() * width);
    plans[r].add_copies(back, out[r], width);
  }
  return out;
}

}  // namespace

TEST_CASE("dispatch: each call meets its expert once, and combine undoes dispatch, in one hop and in two") {
  CAPTURE(tetromino_test::seed());
  generator g(tetromino_test::seed());
  constexpr std::size_t width = 2;
  for (int i = 0; i < 3000; ++i) {
    const topology t = random_cluster(g, 4, 3, 4);
    const std::size_t ranks = t.gpus(), k = 1 + g.below(std::min<std::size_t>(t.slots(), 5));
    const bool two_hops = g.below(2) == 0, leader = g.below(2) == 0;
    const row_copies copies = g.below(2) == 0 ? row_copies::per_expert : row_copies::per_rank;
    CAPTURE(i, t.nodes(), ranks, t.slots(), k, two_hops, leader, copies == row_copies::per_expert);

    // row `number` holds its number; its weights 1/2, 1/4 … add up to 1, and experts hand back what they get
    rows_of_ranks rows(ranks);
    std::vector<std::vector<expert_call>> calls(ranks);
    std::vector<std::vector<std::uint32_t>> expected(t.slots()), met(t.slots());  // numbers of rows
    std::uint32_t number = 0;
    for (std::size_t r = 0; r < ranks; ++r) {
      for (std::size_t row = g.below(9); row > 0; --row, ++number) {
        rows[r].insert(rows[r].end(), {static_cast<float>(number), -static_cast<float>(number)});
        float weight = 1;
        std::vector<std::uint32_t> slots;
        while (slots.size() < k) {
          const auto s = static_cast<std::uint32_t>(g.below(t.slots()));
          if (std::find(slots.begin(), slots.end(), s) != slots.end()) continue;
          slots.push_back(s);
          if (slots.size() < k) weight /= 2;
          calls[r].push_back({s, weight});
          expected[s].push_back(number);
        }
      }
    }

    std::vector<dispatch_plan> first, second;
    std::vector<std::uint32_t> rank_of_slot(t.slots());
    for (std::size_t r = 0; r < ranks; ++r) {
      if (two_hops) {
        entry_ranks(t, r, leader ? entry_rule::leader : entry_rule::same_local_number, rank_of_slot);
      } else {
        ranks_of_slots(t, rank_of_slot);
      }
      first.emplace_back(ranks, k);
      first.back().plan_send(calls[r], rank_of_slot, two_hops ? row_copies::per_rank : copies);
    }
    meet(first);
    rows_of_ranks received = carry(first, rows, width);
    if (two_hops) {
      ranks_of_slots(t, rank_of_slot);
      for (std::size_t r = 0; r < ranks; ++r) {
        second.emplace_back(ranks, k);
        second.back().plan_send(first[r].receive_calls(), rank_of_slot, copies);
      }
      meet(second);
      received = carry(second, received, width);
    }
    std::vector<dispatch_plan>& last = two_hops ? second : first;

    rows_of_ranks answers(ranks);
    for (std::size_t r = 0; r < ranks; ++r) {
      dispatch_plan& plan = last[r];
      plan.group_by_expert(t.first_slot(r), t.slots_on_gpu(r));
      std::vector<float> y(plan.expert_rows().size() * width);
      gather_rows(plan.expert_rows(), std::span<const float>(received[r]), std::span(y), width);
      for (std::size_t s = 0; s < t.slots_on_gpu(r); ++s) {
        for (std::uint32_t pair = plan.expert_offsets()[s]; pair < plan.expert_offsets()[s + 1]; ++pair) {
          met[t.first_slot(r) + s].push_back(static_cast<std::uint32_t>(y[pair * width]));
        }
      }
      answers[r].resize(plan.received() * width);
      plan.add_expert_outputs(y, answers[r], width);
    }
    for (std::size_t s = 0; s < t.slots(); ++s) {
      std::sort(met[s].begin(), met[s].end());
      REQUIRE(met[s] == expected[s]);
    }
    if (two_hops) answers = carry_back(second, answers, width);
    REQUIRE(carry_back(first, answers, width) == rows);
  }
}
