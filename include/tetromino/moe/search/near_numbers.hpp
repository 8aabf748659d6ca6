#pragma once

#include "../../detail/macros_off.hpp"

#include "../topology.hpp"  // topology

#include <algorithm>  // std::max, std::min
#include <cmath>      // std::llround
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int64_t, std::uint32_t
#include <span>       // std::span
#include <utility>    // std::swap
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What the way between two nodes costs, over the dearest, in 1/256: [nodes, nodes]. Empty where all cost the same.
[[nodiscard]] inline std::vector<std::int64_t> relative_costs(const topology& t) {
  double least = 1e3, most = 1e-3;
  for (std::size_t i = 0; i < t.node_costs().size(); ++i) {
    if (i / t.nodes() == i % t.nodes()) continue;
    least = std::min(least, t.node_costs()[i]);
    most = std::max(most, t.node_costs()[i]);
  }
  std::vector<std::int64_t> out;
  if (!(least < most)) return out;
  for (const double c : t.node_costs()) out.push_back(std::llround(256 * (c / most)));
  return out;
}

/// Whether two nodes can change places: as many GPUs, and these of as many slots and as fast.
[[nodiscard]] inline bool are_alike(const topology& t, std::size_t a, std::size_t b) {
  if (t.gpus_on_node(a) != t.gpus_on_node(b)) return false;
  for (std::size_t i = 0; i < t.gpus_on_node(a); ++i) {
    const std::size_t x = t.first_gpu(a) + i, y = t.first_gpu(b) + i;
    if (t.slots_on_gpu(x) != t.slots_on_gpu(y) || t.speed(x) != t.speed(y)) return false;
  }
  return true;
}

/// Which node each shall become, so that what they send (sent[nodes, nodes], from row to column) costs less by
/// costs[nodes, nodes], the same both ways: [nodes]. Two nodes that are alike change places as long as that saves
/// anything.
[[nodiscard]] inline std::vector<std::uint32_t> near_numbers(const topology& t, std::span<const std::int64_t> sent,
                                                             std::span<const std::int64_t> costs) {
  const std::size_t nodes = t.nodes();
  std::vector<std::uint32_t> number(nodes);
  for (std::size_t n = 0; n < nodes; ++n) number[n] = static_cast<std::uint32_t>(n);
  const auto saved = [&](std::size_t a, std::size_t b) {
    std::int64_t sum = 0;
    for (std::size_t m = 0; m < nodes; ++m) {
      if (m == a || m == b) continue;
      const std::int64_t more = sent[a * nodes + m] + sent[m * nodes + a] - sent[b * nodes + m] - sent[m * nodes + b];
      sum += more * (costs[number[a] * nodes + number[m]] - costs[number[b] * nodes + number[m]]);
    }
    return sum;
  };
  for (bool again = true; again;) {
    again = false;
    for (std::size_t a = 0; a < nodes; ++a) {
      for (std::size_t b = a + 1; b < nodes; ++b) {
        if (!are_alike(t, a, b) || saved(a, b) <= 0) continue;
        std::swap(number[a], number[b]);
        again = true;
      }
    }
  }
  return number;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
