#pragma once

/// DeepSeek's expert-parallelism load balancer, restated from its published algorithm (github.com/deepseek-ai/EPLB) as
/// an oracle: plain loops, one layer at a time, nothing of tetromino.
///
/// All arithmetic is float32, as there. Where values tie:
/// - items are packed in descending order of weight, equal weights in ascending order of index (a stable sort);
/// - an item goes to the lightest pack that has room, the lowest-numbered among equals;
/// - a copy goes to the expert with the largest load per copy, the lowest-numbered among equals.
/// Loads of a group are added in ascending order; the published code leaves that order to its tensor library, so that
/// group sums agree for certain where they are exact (whole numbers below 2^24).

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <algorithm>
#include <vector>

namespace reference {

struct eplb_maps {
  std::vector<std::vector<std::int64_t>> physical_to_logical;               // [layers][replicas]
  std::vector<std::vector<std::vector<std::int64_t>>> logical_to_physical;  // [layers][experts][largest count]
  std::vector<std::vector<std::int64_t>> count;                             // [layers][experts]
};

struct eplb_packing {
  std::vector<std::size_t> pack;  // of each item
  std::vector<std::size_t> rank;  // of each item in its pack
};

inline eplb_packing eplb_pack(const std::vector<float>& weight, std::size_t packs) {
  const std::size_t n = weight.size();
  const std::size_t room = n / packs;
  eplb_packing out{std::vector<std::size_t>(n), std::vector<std::size_t>(n)};
  if (room == 1) {
    for (std::size_t i = 0; i < n; ++i) out.pack[i] = i, out.rank[i] = 0;
    return out;
  }
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return weight[a] > weight[b]; });
  std::vector<float> total(packs, 0.0f);
  std::vector<std::size_t> held(packs, 0);
  for (const std::size_t item : order) {
    std::size_t lightest = packs;
    for (std::size_t p = 0; p < packs; ++p) {
      if (held[p] < room && (lightest == packs || total[p] < total[lightest])) lightest = p;
    }
    out.pack[item] = lightest;
    out.rank[item] = held[lightest]++;
    total[lightest] += weight[item];
  }
  return out;
}

inline eplb_maps eplb(const std::vector<std::vector<float>>& loads, std::size_t replicas, std::size_t groups,
                      std::size_t nodes, std::size_t gpus) {
  if (groups % nodes != 0) groups = nodes = 1;  // no hierarchy: one group on one node
  const std::size_t experts = loads.front().size();
  const std::size_t group_size = experts / groups, node_experts = experts / nodes, node_slots = replicas / nodes;
  const std::size_t node_gpus = gpus / nodes, gpu_slots = replicas / gpus;

  eplb_maps out;
  std::int64_t most = 0;
  std::vector<std::vector<std::int64_t>> copy_number;  // [layers][replicas]
  for (const std::vector<float>& load : loads) {
    // groups to nodes; `order` lists the experts node after node
    std::vector<float> group_load(groups, 0.0f);
    for (std::size_t e = 0; e < experts; ++e) group_load[e / group_size] += load[e];
    const eplb_packing on_node = eplb_pack(group_load, nodes);
    std::vector<std::size_t> order(experts);
    for (std::size_t e = 0; e < experts; ++e) {
      const std::size_t g = e / group_size;
      order[(on_node.pack[g] * (groups / nodes) + on_node.rank[g]) * group_size + e % group_size] = e;
    }

    std::vector<std::int64_t> phys(replicas), copy(replicas), count(experts);
    for (std::size_t node = 0; node < nodes; ++node) {
      // copies within the node
      std::vector<float> mine(node_experts);
      for (std::size_t i = 0; i < node_experts; ++i) mine[i] = load[order[node * node_experts + i]];
      std::vector<std::int64_t> copies(node_experts, 1);
      std::vector<std::size_t> who(node_slots);
      std::vector<std::int64_t> nth(node_slots, 0);
      for (std::size_t s = 0; s < node_slots; ++s) {
        std::size_t best = s;
        if (s >= node_experts) {
          best = 0;
          for (std::size_t i = 1; i < node_experts; ++i) {
            if (mine[i] / static_cast<float>(copies[i]) > mine[best] / static_cast<float>(copies[best])) best = i;
          }
          nth[s] = copies[best]++;
        }
        who[s] = best;
      }
      // copies to GPUs
      std::vector<float> share(node_slots);
      for (std::size_t s = 0; s < node_slots; ++s) share[s] = mine[who[s]] / static_cast<float>(copies[who[s]]);
      const eplb_packing on_gpu = eplb_pack(share, node_gpus);
      for (std::size_t s = 0; s < node_slots; ++s) {
        const std::size_t slot = node * node_slots + on_gpu.pack[s] * gpu_slots + on_gpu.rank[s];
        phys[slot] = static_cast<std::int64_t>(order[node * node_experts + who[s]]);
        copy[slot] = nth[s];
      }
      for (std::size_t i = 0; i < node_experts; ++i) {
        count[order[node * node_experts + i]] = copies[i];
        most = std::max(most, copies[i]);
      }
    }
    out.physical_to_logical.push_back(phys);
    out.count.push_back(count);
    copy_number.push_back(copy);
  }
  for (std::size_t l = 0; l < loads.size(); ++l) {
    std::vector<std::vector<std::int64_t>> inverse(experts,
                                                   std::vector<std::int64_t>(static_cast<std::size_t>(most), -1));
    for (std::size_t s = 0; s < replicas; ++s) {
      inverse[static_cast<std::size_t>(out.physical_to_logical[l][s])][static_cast<std::size_t>(copy_number[l][s])] =
          static_cast<std::int64_t>(s);
    }
    out.logical_to_physical.push_back(inverse);
  }
  return out;
}

}  // namespace reference
