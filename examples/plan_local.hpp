#pragma once

/// Documents and experts brought together: those that use the same experts run on one node, which holds these experts.
/// A short heuristic that is enough for a small model: both halves are improved in turn, each given the other.

#include <tetromino/moe/placement.hpp>
#include <tetromino/moe/topology.hpp>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace plan_local {

namespace moe = tetromino::moe;

/// What is known of the documents: how often each used each expert, [documents][layers · experts], and its tokens.
struct workload {
  std::size_t layers, experts;
  std::vector<std::vector<double>> uses;
  std::vector<double> tokens;
};

struct plan {
  moe::placement placement;
  std::vector<std::uint32_t> rank_of_document;
};

class solver {
 public:
  solver(const workload& w, const moe::topology& t) : w_(w), t_(t), node_(w.uses.size()) {
    for (std::size_t d = 0; d < node_.size(); ++d) node_[d] = d % t.nodes();
  }

  /// The best of a few rounds; the first experts follow documents in turn.
  plan solve() {
    double best = -1;
    plan out{{}, std::vector<std::uint32_t>(node_.size())};
    for (int round = 0; round < 20; ++round) {
      const std::vector<std::vector<bool>> holds = experts_to_nodes();
      const double kept = documents_to_nodes(holds);
      if (kept <= best) continue;
      best = kept;
      out.placement = experts_to_ranks(experts_to_nodes());
      out.rank_of_document = documents_to_ranks();
    }
    return out;
  }

 private:
  /// Uses of each expert by the documents of each node: [nodes][layers · experts].
  [[nodiscard]] std::vector<std::vector<double>> demand() const {
    std::vector<std::vector<double>> out(t_.nodes(), std::vector<double>(w_.layers * w_.experts));
    for (std::size_t d = 0; d < node_.size(); ++d) {
      for (std::size_t i = 0; i < out[0].size(); ++i) out[node_[d]][i] += w_.uses[d][i];
    }
    return out;
  }

  /// Which experts each node holds, [nodes][layers · experts]: the strongest wishes first, each expert once; then
  /// copies where there is room.
  [[nodiscard]] std::vector<std::vector<bool>> experts_to_nodes() const {
    const auto wish = demand();
    std::vector<std::vector<bool>> holds(t_.nodes(), std::vector<bool>(w_.layers * w_.experts));
    struct pair {
      double uses;
      std::size_t node, expert;
    };
    for (std::size_t l = 0; l < w_.layers; ++l) {
      std::vector<std::size_t> room(t_.nodes());
      for (std::size_t n = 0; n < room.size(); ++n) room[n] = t_.slots_on_node(n);
      std::vector<pair> wishes;
      for (std::size_t e = l * w_.experts; e < (l + 1) * w_.experts; ++e) {
        for (std::size_t n = 0; n < room.size(); ++n) wishes.push_back({wish[n][e], n, e});
      }
      std::stable_sort(wishes.begin(), wishes.end(), [](const pair& a, const pair& b) { return a.uses > b.uses; });
      std::vector<bool> placed(w_.layers * w_.experts);
      for (const bool copies : {false, true}) {
        for (const pair& p : wishes) {
          if (room[p.node] == 0 || holds[p.node][p.expert] || placed[p.expert] != copies) continue;
          holds[p.node][p.expert] = placed[p.expert] = true;
          --room[p.node];
        }
      }
    }
    return holds;
  }

  /// Each document to the node that holds most of what it uses, within a budget of tokens; those that have most to lose
  /// choose first. Returns the uses that stay on their node.
  double documents_to_nodes(const std::vector<std::vector<bool>>& holds) {
    const std::size_t nodes = t_.nodes();
    std::vector<std::vector<double>> kept(node_.size(), std::vector<double>(nodes));
    std::vector<std::size_t> order(node_.size());
    std::vector<double> stake(node_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t d = 0; d < node_.size(); ++d) {
      for (std::size_t n = 0; n < nodes; ++n) {
        for (std::size_t i = 0; i < holds[n].size(); ++i) kept[d][n] += holds[n][i] ? w_.uses[d][i] : 0.0;
      }
      std::vector<double> sorted = kept[d];
      std::sort(sorted.rbegin(), sorted.rend());
      stake[d] = nodes > 1 ? sorted[0] - sorted[1] : 0;
    }
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return stake[a] > stake[b]; });
    const double all = std::accumulate(w_.tokens.begin(), w_.tokens.end(), 0.0);
    std::vector<double> left(nodes, 1.03 * all / static_cast<double>(nodes));
    double sum = 0;
    for (const std::size_t d : order) {
      std::size_t best = static_cast<std::size_t>(std::max_element(left.begin(), left.end()) - left.begin());
      for (std::size_t n = 0; n < nodes; ++n) {
        if (left[n] >= w_.tokens[d] && kept[d][n] > kept[d][best]) best = n;
      }
      node_[d] = best;
      left[best] -= w_.tokens[d];
      sum += kept[d][best];
    }
    return sum;
  }

  /// A node's experts over its ranks, the most used first, each to the rank that carries least and has a slot.
  [[nodiscard]] moe::placement experts_to_ranks(const std::vector<std::vector<bool>>& holds) const {
    const auto uses = demand();
    moe::placement out(w_.layers, w_.experts, t_.slots());
    for (std::size_t l = 0; l < w_.layers; ++l) {
      for (std::size_t n = 0; n < t_.nodes(); ++n) {
        std::vector<std::size_t> experts;
        for (std::size_t e = 0; e < w_.experts; ++e) {
          if (holds[n][l * w_.experts + e]) experts.push_back(e);
        }
        const auto load = [&](std::size_t e) {
          double sum = 0;
          for (const auto& node : uses) sum += node[l * w_.experts + e];
          return sum;
        };
        std::stable_sort(experts.begin(), experts.end(),
                         [&](std::size_t a, std::size_t b) { return load(a) > load(b); });
        std::vector<double> carries(t_.gpus_on_node(n));
        std::vector<std::size_t> used(t_.gpus_on_node(n));
        for (const std::size_t e : experts) {
          std::size_t best = carries.size();
          for (std::size_t g = 0; g < carries.size(); ++g) {
            if (used[g] == t_.slots_on_gpu(t_.first_gpu(n) + g)) continue;
            if (best == carries.size() || carries[g] < carries[best]) best = g;
          }
          out.layer(l)[t_.first_slot(t_.first_gpu(n) + best) + used[best]++] = static_cast<std::int32_t>(e);
          carries[best] += load(e);
        }
      }
    }
    return out;
  }

  /// A node's documents over its ranks, the longest first, each to the rank with the fewest tokens.
  [[nodiscard]] std::vector<std::uint32_t> documents_to_ranks() const {
    std::vector<std::uint32_t> out(node_.size());
    std::vector<std::size_t> order(node_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return w_.tokens[a] > w_.tokens[b]; });
    std::vector<double> tokens(t_.gpus());
    for (const std::size_t d : order) {
      const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(t_.first_gpu(node_[d]));
      const auto last = first + static_cast<std::ptrdiff_t>(t_.gpus_on_node(node_[d]));
      const auto lightest = std::min_element(first, last);
      *lightest += w_.tokens[d];
      out[d] = static_cast<std::uint32_t>(lightest - tokens.begin());
    }
    return out;
  }

  const workload& w_;
  const moe::topology& t_;
  std::vector<std::size_t> node_;  // of each document
};

}  // namespace plan_local
