#pragma once

/// What serving tokens under a placement costs, counted the plain way: sets per token, one rule after the other. An
/// oracle for moe/cost.hpp and moe/replica.hpp, from their description; nothing of tetromino.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace reference {

enum class copies_rule { nearest, even, least_loaded, fewest_nodes };

struct routing_world {
  std::vector<std::size_t> gpus_of_node;                      // number of GPUs per node
  std::vector<std::size_t> slots_of_gpu;                      // number of slots per GPU
  std::vector<std::vector<std::int32_t>> placement;           // [layers][slots], -1 = empty
  std::vector<std::vector<std::vector<std::size_t>>> tokens;  // [tokens][layers][k]
  std::vector<std::size_t> home_gpu;                          // [tokens]
  std::vector<std::vector<std::size_t>> way{};                // [nodes][nodes] what a copy sent there costs; none: 1

  [[nodiscard]] std::size_t cost(std::size_t from, std::size_t to) const { return way.empty() ? 1 : way[from][to]; }
};

struct routing_cost {
  std::size_t remote_pairs = 0;
  std::size_t remote_visits = 0;
  std::size_t copies_between = 0;
  std::size_t copies_inside = 0;
  std::map<std::pair<std::size_t, std::size_t>, std::size_t> node_to_node;
  std::vector<std::vector<std::size_t>> pairs_on_gpu;  // [layers][gpus]
};

/// GPUs of each node that have slots, or where none has any, all.
inline std::vector<std::vector<std::size_t>> running_gpus(const std::vector<std::size_t>& gpus_of_node,
                                                          const std::vector<std::size_t>& slots_of_gpu) {
  std::vector<std::vector<std::size_t>> out;
  std::size_t gpu = 0;
  for (const std::size_t gpus : gpus_of_node) {
    std::vector<std::size_t> all, with_slots;
    for (std::size_t i = 0; i < gpus; ++i, ++gpu) {
      all.push_back(gpu);
      if (slots_of_gpu[gpu] > 0) with_slots.push_back(gpu);
    }
    out.push_back(with_slots.empty() ? all : with_slots);
  }
  return out;
}

inline routing_cost count_cost(const routing_world& w, copies_rule rule, bool one_copy_per_node) {
  std::vector<std::size_t> node_of, gpu_of_slot, first_gpu;
  for (std::size_t n = 0; n < w.gpus_of_node.size(); ++n) {
    first_gpu.push_back(node_of.size());
    for (std::size_t i = 0; i < w.gpus_of_node[n]; ++i) node_of.push_back(n);
  }
  for (std::size_t g = 0; g < w.slots_of_gpu.size(); ++g) {
    for (std::size_t i = 0; i < w.slots_of_gpu[g]; ++i) gpu_of_slot.push_back(g);
  }
  std::vector<std::size_t> working(w.gpus_of_node.size(), 0);  // GPUs of each node that have slots
  for (std::size_t g = 0; g < w.slots_of_gpu.size(); ++g) working[node_of[g]] += w.slots_of_gpu[g] > 0 ? 1U : 0U;
  const std::vector<std::vector<std::size_t>> running = running_gpus(w.gpus_of_node, w.slots_of_gpu);
  routing_cost out;
  out.pairs_on_gpu.assign(w.placement.size(), std::vector<std::size_t>(node_of.size(), 0));
  std::map<std::pair<std::size_t, std::size_t>, std::size_t> turn;
  std::map<std::pair<std::size_t, std::size_t>, std::size_t> served_by_node;  // (layer, node)

  for (std::size_t t = 0; t < w.tokens.size(); ++t) {
    const std::size_t home = w.home_gpu[t], home_node = node_of[home];
    for (std::size_t l = 0; l < w.placement.size(); ++l) {
      std::vector<std::size_t>& load = out.pairs_on_gpu[l];
      const std::vector<std::size_t>& experts = w.tokens[t][l];
      std::vector<std::vector<std::size_t>> holders;  // GPUs that hold each expert, in slot order
      for (const std::size_t e : experts) {
        std::vector<std::size_t> gpus;
        for (std::size_t s = 0; s < w.placement[l].size(); ++s) {
          if (w.placement[l][s] == static_cast<std::int32_t>(e)) gpus.push_back(gpu_of_slot[s]);
        }
        holders.push_back(gpus);
      }
      std::set<std::size_t> gpus_visited, nodes_visited;
      std::vector<std::pair<std::size_t, std::size_t>> served;  // (which expert, GPU)
      std::vector<bool> done(experts.size(), false);
      const auto serve = [&](std::size_t i, std::size_t gpu) {
        done[i] = true;
        ++load[gpu];
        gpus_visited.insert(gpu);
        nodes_visited.insert(node_of[gpu]);
        served.emplace_back(i, gpu);
      };
      // the least loaded, the first of equals
      const auto lightest = [&](const std::vector<std::size_t>& of) {
        return *std::min_element(of.begin(), of.end(), [&](std::size_t a, std::size_t b) { return load[a] < load[b]; });
      };
      const auto among = [&](const std::vector<std::size_t>& of, const auto& accepted) {
        std::vector<std::size_t> left;
        for (const std::size_t g : of) {
          if (accepted(g)) left.push_back(g);
        }
        return left;
      };
      // of acceptable GPUs: the token's own, else one that it visits already, else the lightest
      const auto serve_by = [&](std::size_t i, const auto& accepted) {
        const auto left = among(holders[i], accepted);
        if (left.empty()) return;
        const auto seen = among(left, [&](std::size_t g) { return gpus_visited.count(g) > 0; });
        if (std::count(left.begin(), left.end(), home) > 0) {
          serve(i, home);
        } else {
          serve(i, lightest(seen.empty() ? left : seen));
        }
      };

      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (holders[i].size() == 1) serve(i, holders[i][0]);
      }
      const auto on_visited = [&](std::size_t g) { return nodes_visited.count(node_of[g]) > 0; };
      if (rule == copies_rule::nearest || rule == copies_rule::fewest_nodes) {
        for (std::size_t i = 0; i < experts.size(); ++i) {
          if (!done[i]) serve_by(i, [&](std::size_t g) { return node_of[g] == home_node; });
        }
        for (std::size_t i = 0; i < experts.size(); ++i) {
          if (!done[i]) serve_by(i, on_visited);
        }
      }
      while (rule == copies_rule::fewest_nodes && std::count(done.begin(), done.end(), false) > 0) {
        // go to the node that holds most of what is open for what the way costs, of equals the one with least to do for
        // each of its GPUs, and take what it has
        std::size_t next = 0, most = 0;
        for (std::size_t n = 0; n < w.gpus_of_node.size(); ++n) {
          std::size_t has = 0;
          for (std::size_t i = 0; i < experts.size(); ++i) {
            if (!done[i] && !among(holders[i], [&](std::size_t g) { return node_of[g] == n; }).empty()) ++has;
          }
          const bool less_busy = served_by_node[{l, n}] * working[next] < served_by_node[{l, next}] * working[n];
          const std::size_t worth = has * w.cost(home_node, next), best = most * w.cost(home_node, n);
          if (has > 0 && (most == 0 || worth > best || (worth == best && less_busy))) next = n, most = has;
        }
        nodes_visited.insert(next);
        for (std::size_t i = 0; i < experts.size(); ++i) {
          if (!done[i]) serve_by(i, on_visited);
        }
      }
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (done[i]) continue;
        if (rule == copies_rule::even) {
          serve(i, holders[i][turn[{l, experts[i]}]++ % holders[i].size()]);
          continue;
        }
        if (rule == copies_rule::nearest) serve_by(i, on_visited);
        if (done[i]) continue;
        std::size_t least = ~std::size_t{0};  // of the nearest copies, the lightest
        for (const std::size_t g : holders[i]) least = std::min(least, w.cost(home_node, node_of[g]));
        const bool anywhere = rule == copies_rule::least_loaded;
        serve(i, lightest(among(holders[i],
                                [&](std::size_t g) { return anywhere || w.cost(home_node, node_of[g]) == least; })));
      }

      for (const auto& [i, gpu] : served) ++served_by_node[{l, node_of[gpu]}];
      // a token lands on the GPU whose place among those of its node that work is its home's
      const std::vector<std::size_t>& mates = running[home_node];
      const auto at = std::find(mates.begin(), mates.end(), home);
      const auto number =
          at == mates.end() ? home - first_gpu[home_node] : static_cast<std::size_t>(at - mates.begin());
      std::set<std::size_t> other_nodes;
      std::set<std::pair<std::size_t, std::size_t>> fanned_out;  // (where it landed, GPU)
      for (const auto& [i, gpu] : served) {
        const std::size_t node = node_of[gpu];
        if (node != home_node) {
          ++out.remote_pairs;
          other_nodes.insert(node);
          if (!one_copy_per_node) {
            ++out.copies_between;
            ++out.node_to_node[{home_node, node}];
            continue;
          }
        }
        const std::size_t landed = node == home_node ? home : running[node][number % running[node].size()];
        if (gpu == landed) continue;
        if (one_copy_per_node) {
          fanned_out.insert({landed, gpu});
        } else {
          ++out.copies_inside;
        }
      }
      out.copies_inside += fanned_out.size();
      out.remote_visits += other_nodes.size();
      if (one_copy_per_node) {
        out.copies_between += other_nodes.size();
        for (const std::size_t n : other_nodes) ++out.node_to_node[{home_node, n}];
      }
    }
  }
  return out;
}

}  // namespace reference
