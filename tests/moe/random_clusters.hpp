#pragma once

#include <tetromino/moe/topology.hpp>
#include <tetromino/moe/trace.hpp>

#include "reference/generators.hpp"

#include <algorithm>  // std::find
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <utility>    // std::move
#include <vector>     // std::vector

namespace tetromino_test {

/// Nodes of any size; GPUs with any number of slots, some with none.
inline tetromino::moe::topology random_cluster(reference::generator& g, std::size_t most_nodes, std::size_t most_gpus,
                                               std::size_t most_slots) {
  std::vector<std::size_t> gpus, slots;
  const bool uniform = g.below(3) == 0;
  const std::size_t nodes = 1 + g.below(most_nodes), per_node = 1 + g.below(most_gpus),
                    per_gpu = 1 + g.below(most_slots);
  for (std::size_t n = 0; n < nodes; ++n) {
    gpus.push_back(uniform ? per_node : 1 + g.below(most_gpus));
    for (std::size_t i = 0; i < gpus.back(); ++i) slots.push_back(uniform ? per_gpu : g.below(most_slots + 1));
  }
  slots[g.below(slots.size())] += 1;
  return tetromino::moe::topology::make(gpus, slots);
}

/// Requests of 0 … 6 prefill and 1 … 6 decode tokens, all alike or not; each prefers some experts.
inline tetromino::moe::trace random_routing(reference::generator& g, std::size_t layers, std::size_t experts,
                                            std::size_t k, std::size_t requests) {
  const bool alike = g.below(2) == 0;
  auto prefill = static_cast<std::uint32_t>(g.below(7)), decode = static_cast<std::uint32_t>(1 + g.below(6));
  std::vector<std::uint16_t> ids;
  std::vector<tetromino::moe::request> list;
  std::uint64_t first = 0;
  for (std::size_t r = 0; r < requests; ++r) {
    if (!alike) {
      prefill = static_cast<std::uint32_t>(g.below(7));
      decode = static_cast<std::uint32_t>(1 + g.below(6));
    }
    list.push_back({first, prefill + decode, prefill, 0});
    first += prefill + decode;
    const std::size_t liked = g.below(experts);
    for (std::size_t row = 0; row < (prefill + decode) * layers; ++row) {
      std::vector<std::uint16_t> chosen;
      while (chosen.size() < k) {
        const std::size_t e = g.below(3) == 0 ? g.below(experts) : (liked + g.below(k + 1)) % experts;
        const auto id = static_cast<std::uint16_t>(e);
        if (std::find(chosen.begin(), chosen.end(), id) == chosen.end()) chosen.push_back(id);
      }
      ids.insert(ids.end(), chosen.begin(), chosen.end());
    }
  }
  return tetromino::moe::trace::make({layers, experts, k}, std::move(ids), std::move(list));
}

}  // namespace tetromino_test
