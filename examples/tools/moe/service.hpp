#pragma once

/// Serving while domains change: experts' weights move between ranks where a better placement pays.

#include "engine_plan.hpp"

#include <tetromino/moe/group.hpp>
#include <tetromino/moe/rebalance.hpp>
#include <tetromino/moe/recorder.hpp>

#include <algorithm>
#include <array>

namespace moe_lm {

/// What came of a service: the documents, and the weights that moved meanwhile.
struct service_outcome {
  struct window {
    std::vector<std::size_t> which;  // of the chosen documents
    std::uint64_t tokens = 0;
    traffic measured;        // of activations
    std::size_t layers = 0;  // that switched to another placement
    moe::rebalance_report then;
    std::vector<std::size_t> documents_on_rank, experts_on_rank;  // [ranks], the latter at its end
  };
  std::vector<double> losses;  // of each chosen document, on all ranks
  std::vector<window> windows;
  std::size_t bytes_per_expert = 0;
  traffic planned, moved;  // weights, by the plans and over the links
};

/// Documents come domain by domain. After every few of them the ranks put together what their routers chose, and all
/// come to the same plan. Its layers migrate one by one, each between two steps of the documents that follow. A rank
/// that leaves gives away its documents at once, and its experts as these migrate.
class service {
 public:
  service(const workplace& w, const model& m, const moe::placement& start)
      : w_(w),
        engine_(w, m, start),
        seen_(moe::recorder::make(options_of(w))),
        loop_(rebalancer_of(start)),
        serving_(w.cluster) {}

  service_outcome run() {
    service_outcome out;
    out.losses.assign(w_.chosen.size(), 0.0);
    out.bytes_per_expert = engine_.bytes_of_expert();
    std::vector<std::size_t> order = w_.all();
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return domain(a) < domain(b); });
    for (std::span<const std::size_t> rest(order); !rest.empty();) {
      const auto which = rest.first(std::min(rest.size(), w_.options.rebalance));
      rest = rest.subspan(which.size());
      serve(which, out);
      change_ranks(!rest.empty() && rest.size() <= w_.options.rebalance, out);
      consider(rest.first(std::min(rest.size(), w_.options.rebalance)), out);
      out.windows.back().experts_on_rank = engine_.experts_on_ranks();
    }
    finish_migration(out);
    out.windows.back().experts_on_rank = engine_.experts_on_ranks();
    return out;
  }

 private:
  static moe::recorder_options options_of(const workplace& w) { return {routing_of(w.size), 16'384}; }

  [[nodiscard]] moe::rebalancer rebalancer_of(const moe::placement& start) {
    moe::rebalance_options options;
    options.plan.served = moe::phase::prefill;  // a document is one pass
    options.least_tokens = 512;
    options.bytes_per_expert = static_cast<double>(engine_.bytes_of_expert());
    options.bytes_per_visit = static_cast<double>(w_.size.hidden * 2 * sizeof(float));
    options.tokens_ahead = 0;
    for (std::size_t i = 0; i < w_.chosen.size(); ++i) {
      options.tokens_ahead += static_cast<double>(w_.tokens_of(i, std::string::npos).size());
    }
    return moe::rebalancer::make(start, w_.cluster, options);
  }

  [[nodiscard]] std::uint8_t domain(std::size_t i) const { return w_.text.domain[w_.chosen[i]]; }

  void serve(std::span<const std::size_t> which, service_outcome& out) {
    auto& window = out.windows.emplace_back();
    const auto source = sources_of(which);
    const auto migrate = [&] {
      if (loop_.next_layer() != nullptr) migrate_layer(out);
    };
    const outcome ran = engine_.run(which, source, std::string::npos, "serving", {migrate, &seen_});
    window.which.assign(which.begin(), which.end());
    window.tokens = ran.tokens;
    window.measured = ran.measured;
    window.documents_on_rank.assign(w_.mpi.ranks(), 0);
    for (const std::size_t i : which) {
      out.losses[i] = ran.losses[i];
      ++window.documents_on_rank[source[i]];
    }
  }

  // A rank leaves after the first documents, and may be back for the last.
  void change_ranks(bool last_are_next, service_outcome& out) {
    if (!w_.options.drain) return;
    if (out.windows.size() == 1) {
      const std::array<std::uint32_t, 1> gone{*w_.options.drain};
      loop_.drain(gone);
      serving_ = w_.cluster.without(gone);
    } else if (w_.options.rejoin && last_are_next) {
      finish_migration(out);
      loop_.drain({});
      serving_ = w_.cluster;
    }
  }

  // The documents after these run while layers switch, on the nodes that suit the plan before.
  void consider(std::span<const std::size_t> after, service_outcome& out) {
    auto& window = out.windows.back();
    moe::recorder all = moe::recorder::make({routing_of(w_.size), 16'384 * w_.mpi.ranks()});
    for (const auto& bytes : w_.mpi.gather(seen_.to_bytes())) all.merge(bytes);
    double running = 0;
    for (const std::size_t i : after) running += static_cast<double>(w_.tokens_of(i, std::string::npos).size());
    w_.mpi.together("moe_engine", [&] { window.then = loop_.consider(all, running); });
    if (window.then.verdict != moe::rebalance_verdict::new_plan) return;
    out.planned += {static_cast<std::uint64_t>(window.then.way.bytes_between_nodes),
                    static_cast<std::uint64_t>(window.then.way.bytes_inside_nodes)};
  }

  /// Documents to nodes by what the router chooses for their beginnings; in turn as long as there is no plan.
  [[nodiscard]] std::vector<std::uint32_t> sources_of(std::span<const std::size_t> which) {
    const moe::node_affinity* const affinity = loop_.affinity();
    const std::vector<std::uint32_t> in_turn = w_.in_turn(serving_);
    if (affinity == nullptr) return in_turn;
    const moe::trace beginnings = routing_of_beginnings(w_, engine_, which, in_turn);
    moe::signature_builder builder = affinity->builder();
    std::vector<moe::request_signature> signatures;
    std::vector<std::uint64_t> tokens;
    for (std::size_t r = 0; r < which.size(); ++r) {
      signatures.push_back(moe::signature_of(beginnings.view(), beginnings.requests()[r], builder));
      tokens.push_back(w_.tokens_of(which[r], std::string::npos).size());
    }
    const std::vector<std::uint32_t> nodes = moe::group(*affinity, signatures, tokens);
    std::vector<std::uint32_t> node_of_document(w_.chosen.size(), 0);
    for (std::size_t r = 0; r < which.size(); ++r) node_of_document[which[r]] = nodes[r];
    return ranks_of(w_, serving_, which, node_of_document);
  }

  void migrate_layer(service_outcome& out) {
    out.moved += engine_.migrate(*loop_.next_layer(), loop_.next());
    loop_.commit_layer();
    ++out.windows.back().layers;
  }
  void finish_migration(service_outcome& out) {
    while (loop_.next_layer() != nullptr) migrate_layer(out);
  }

  const workplace& w_;
  engine engine_;
  moe::recorder seen_;  // by this rank
  moe::rebalancer loop_;
  moe::topology serving_;  // ranks that take documents have slots in it
};

}  // namespace moe_lm
