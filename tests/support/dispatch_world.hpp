#pragma once

/// A small cluster with experts and routed tokens, made from a seed, alike on all ranks; and what serving its tokens
/// must give. For tests of dispatch, in memory and over MPI.

#include <tetromino/comm/dispatcher.hpp>
#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/dispatch.hpp>

#include "reference/generators.hpp"

#include <algorithm>  // std::find
#include <cmath>      // std::abs
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t
#include <span>       // std::span
#include <string>     // std::string
#include <vector>     // std::vector

namespace tetromino_test {

namespace comm = tetromino::comm;
namespace moe = tetromino::moe;

struct dispatch_world {
  moe::topology cluster = moe::topology::uniform(1, 1, 1);
  moe::placement placement;
  std::size_t experts = 1, k = 1, width = 1;
  std::vector<std::size_t> tokens;                // [ranks]
  std::vector<std::vector<std::uint16_t>> ids;    // [ranks][tokens, k]
  std::vector<std::vector<float>> weights, rows;  // [ranks][tokens, k], [ranks][tokens, width]

  /// Ranks on so many nodes of about the same size, or for 0 on up to four of any size; some without slots, experts
  /// with or without replicas.
  dispatch_world(std::size_t ranks, std::uint64_t seed, std::size_t nodes = 0) {
    reference::generator random(seed);
    std::vector<std::size_t> gpus_per_node;
    for (std::size_t n = 0; n < nodes; ++n) gpus_per_node.push_back(ranks / nodes + (n < ranks % nodes ? 1 : 0));
    for (std::size_t left = nodes == 0 ? ranks : 0; left > 0; left -= gpus_per_node.back()) {
      gpus_per_node.push_back(gpus_per_node.size() == 3 ? left : 1 + random.below(left));
    }
    std::vector<std::size_t> slots(ranks);
    std::size_t sum = 0;
    for (std::size_t& n : slots) sum += n = random.below(5);
    if (sum == 0) sum = slots[random.below(ranks)] = 1;
    cluster = moe::topology::make(gpus_per_node, slots);

    experts = 1 + random.below(sum);
    k = 1 + random.below(std::min<std::size_t>(experts, 4));
    width = 1 + random.below(9);
    placement = moe::placement(1, experts, sum);
    std::vector<std::int32_t> row(sum, moe::empty_slot);
    for (std::size_t s = 0; s < sum; ++s) {
      if (s < experts) {
        row[s] = static_cast<std::int32_t>(s);
      } else if (random.below(3) != 0) {
        row[s] = static_cast<std::int32_t>(random.below(experts));
      }
    }
    for (std::size_t s = sum; s > 1; --s) std::swap(row[s - 1], row[random.below(s)]);
    std::copy(row.begin(), row.end(), placement.layer(0).begin());

    for (std::size_t r = 0; r < ranks; ++r) {
      tokens.push_back(random.below(3) == 0 ? 0 : random.below(40));
      ids.emplace_back();
      weights.emplace_back();
      for (std::size_t t = 0; t < tokens[r]; ++t) {
        std::vector<std::uint16_t> chosen;
        while (chosen.size() < k) {
          const auto e = static_cast<std::uint16_t>(random.below(experts));
          if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
        }
        ids[r].insert(ids[r].end(), chosen.begin(), chosen.end());
        for (std::size_t i = 0; i < k; ++i) weights[r].push_back(static_cast<float>(random.uniform()));
      }
      rows.push_back(reference::normal_sample(random.bits(), tokens[r] * width));
    }
  }

  /// The tokens of one rank, and all experts with them on one GPU.
  [[nodiscard]] dispatch_world alone(std::size_t rank) const {
    dispatch_world out = *this;
    out.cluster = moe::topology::uniform(1, 1, cluster.slots());
    out.tokens = {tokens[rank]};
    out.ids = {ids[rank]};
    out.weights = {weights[rank]};
    out.rows = {rows[rank]};
    return out;
  }

  /// What expert e makes of column c of a row.
  static double expert(std::size_t e, std::size_t c, double x) {
    return x * static_cast<double>(e + 1) + static_cast<double>(c) / 2;
  }

  /// Σ weight · expert(row) for the tokens of a rank.
  [[nodiscard]] std::vector<double> expected(std::size_t rank) const {
    std::vector<double> out(tokens[rank] * width);
    for (std::size_t t = 0; t < tokens[rank]; ++t) {
      for (std::size_t i = t * k; i < (t + 1) * k; ++i) {
        for (std::size_t c = 0; c < width; ++c) {
          out[t * width + c] += static_cast<double>(weights[rank][i]) *
                                expert(ids[rank][i], c, static_cast<double>(rows[rank][t * width + c]));
        }
      }
    }
    return out;
  }

  /// What the cost model counts for a rank's tokens: copies between nodes and inside them.
  [[nodiscard]] moe::carried_rows predicted(std::size_t rank, comm::dispatch_route route) const {
    const std::vector<moe::request> one{{0, static_cast<std::uint32_t>(tokens[rank]), 0, 0}};
    const std::vector<std::uint32_t> source{static_cast<std::uint32_t>(rank)};
    moe::cost_options options;
    options.tokens = moe::phase::all;
    options.copies =
        route == comm::dispatch_route::per_node ? moe::dispatch_copies::per_node : moe::dispatch_copies::per_expert;
    options.sources = moe::source_kind::gpu;
    options.hidden = 1;
    options.dispatch_bytes_per_value = 1;
    const auto cost = moe::evaluate({{1, experts, k}, ids[rank], one}, placement, cluster, source, options);
    return {static_cast<std::uint64_t>(cost.between_nodes.dispatch),
            static_cast<std::uint64_t>(cost.inside_nodes.dispatch)};
  }
};

/// What serving a world's tokens gave on one rank.
struct dispatch_outcome {
  std::vector<float> out;                  // [tokens, width]
  std::vector<moe::carried_rows> carried;  // by hop
  std::string problem;                     // what is wrong with what arrived; empty if nothing
};

/// Serves the tokens of one rank; all ranks call it together. `through` is kept for several batches by the caller.
template <class Exchange>
dispatch_outcome serve(const dispatch_world& w, comm::dispatcher<Exchange>& through, std::size_t rank) {
  dispatch_outcome result;
  const std::vector<std::uint16_t>& ids = w.ids[rank];
  moe::replica_chooser chooser(w.placement, w.cluster);
  std::vector<std::uint32_t> gpus(ids.size()), tags(w.tokens[rank]);
  for (std::size_t t = 0; t < w.tokens[rank]; ++t) {
    chooser.choose(0, std::span(ids).subspan(t * w.k, w.k), static_cast<std::uint32_t>(rank),
                   std::span(gpus).subspan(t * w.k, w.k));
    tags[t] = static_cast<std::uint32_t>(rank * 1000 + t);
  }
  std::vector<moe::expert_call> calls(ids.size());
  moe::make_calls(moe::replica_index(w.placement), w.cluster, 0, ids, w.weights[rank], gpus, calls);
  through.template try_dispatch<float>(calls, w.rows[rank], tags, w.width).value();
  for (std::size_t i = 0; i < through.hops(); ++i) {
    result.carried.push_back(moe::rows_carried(through.plan(i), w.cluster, rank));
  }

  const moe::dispatch_plan& plan = through.plan();
  std::vector<float> y(plan.expert_rows().size() * w.width);
  const auto rows = through.template received_rows<float>();
  const std::size_t first = w.cluster.first_slot(rank), slots = w.cluster.slots_on_gpu(rank);
  if (plan.expert_offsets().size() != slots + 1 || plan.expert_offsets()[slots] != plan.expert_rows().size()) {
    result.problem = "expert_offsets do not cover the slots";
    return result;
  }
  for (std::size_t s = 0; s < slots; ++s) {
    const std::int32_t e = w.placement.layer(0)[first + s];
    for (std::size_t i = plan.expert_offsets()[s]; i < plan.expert_offsets()[s + 1]; ++i) {
      const std::uint32_t row = plan.expert_rows()[i], tag = through.received_tags()[row];
      const std::size_t source = tag / 1000, t = tag % 1000;
      if (e == moe::empty_slot) result.problem = "rows for an empty slot";
      for (std::size_t c = 0; c < w.width; ++c) {
        const float x = rows[row * w.width + c];
        if (x != w.rows[source][t * w.width + c]) result.problem = "a row does not belong to its tag";
        y[i * w.width + c] =
            static_cast<float>(dispatch_world::expert(static_cast<std::size_t>(e), c, static_cast<double>(x)));
      }
    }
  }
  result.out.assign(w.tokens[rank] * w.width, -1.0f);
  through.try_combine(y, result.out, w.width).value();
  return result;
}

/// The largest difference of an outcome from what is expected, relative to 1.
inline double worst_difference(const dispatch_world& w, std::size_t rank, const dispatch_outcome& got) {
  const std::vector<double> expected = w.expected(rank);
  if (expected.size() != got.out.size()) return HUGE_VAL;
  double worst = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(expected[i] - static_cast<double>(got.out[i])) / (1 + std::abs(expected[i]));
    if (!(difference <= worst)) worst = difference;
  }
  return worst;
}

/// Rows of all hops together.
inline moe::carried_rows total(const dispatch_outcome& o) {
  moe::carried_rows sum;
  for (const moe::carried_rows& hop : o.carried) {
    sum.between_nodes += hop.between_nodes;
    sum.inside_nodes += hop.inside_nodes;
  }
  return sum;
}

}  // namespace tetromino_test
