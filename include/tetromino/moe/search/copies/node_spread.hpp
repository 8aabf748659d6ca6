#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../placement.hpp"  // empty_slot
#include "../../topology.hpp"   // topology

#include <algorithm>  // std::fill, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Gives each expert of a layer copies on at least so many nodes, so that none is lost with a node: in place of copies
/// that experts have beyond that, those that carry least first.
class node_spreader {
 public:
  node_spreader(const topology& t, std::size_t experts, std::size_t least_nodes)
      : topology_(t), least_(least_nodes), on_node_(experts * t.nodes(), 0), nodes_(experts, 0), copies_(experts, 0) {}

  /// load[experts]. False if there is no way by replacing one copy, or two, for some expert.
  [[nodiscard]] bool spread(std::span<std::int32_t> row, std::span<const double> load) {
    count(row);
    for (std::size_t e = 0; e < nodes_.size(); ++e) {
      while (nodes_[e] < least_) {
        const std::size_t slot = cheapest(row, load, [&](std::size_t s) { return takes(s, e) && spare(row, s); });
        if (slot != none) {
          put(row, slot, e);
        } else if (!by_exchange(row, load, e)) {
          return false;
        }
      }
    }
    return true;
  }

 private:
  static constexpr std::size_t none = ~std::size_t{0};

  void count(std::span<const std::int32_t> row) {
    std::fill(on_node_.begin(), on_node_.end(), 0);
    std::fill(nodes_.begin(), nodes_.end(), 0);
    std::fill(copies_.begin(), copies_.end(), 0);
    for (std::size_t s = 0; s < row.size(); ++s) add(s, row[s]);
  }
  [[nodiscard]] std::size_t& on_node(std::size_t expert, std::size_t slot) {
    return on_node_[expert * topology_.nodes() + topology_.node_of_slot(slot)];
  }
  void add(std::size_t slot, std::int32_t expert) {
    if (expert == empty_slot) return;
    const auto e = static_cast<std::size_t>(expert);
    nodes_[e] += on_node(e, slot)++ == 0 ? 1U : 0U;
    ++copies_[e];
  }
  void put(std::span<std::int32_t> row, std::size_t slot, std::size_t expert) {
    if (row[slot] != empty_slot) {
      const auto old = static_cast<std::size_t>(row[slot]);
      nodes_[old] -= --on_node(old, slot) == 0 ? 1U : 0U;
      --copies_[old];
    }
    row[slot] = static_cast<std::int32_t>(expert);
    add(slot, row[slot]);
  }

  // Whether the slot is on a node where the expert is missing; its GPU then lacks it too.
  [[nodiscard]] bool takes(std::size_t slot, std::size_t expert) { return on_node(expert, slot) == 0; }
  // Whether what is in the slot can do without it.
  [[nodiscard]] bool spare(std::span<const std::int32_t> row, std::size_t slot) {
    if (row[slot] == empty_slot) return true;
    const auto e = static_cast<std::size_t>(row[slot]);
    return on_node(e, slot) > 1 || nodes_[e] > least_;
  }
  template <class Accepted>
  [[nodiscard]] std::size_t cheapest(std::span<const std::int32_t> row, std::span<const double> load,
                                     const Accepted& accepted) {
    std::size_t best = none;
    double best_load = 0;
    for (std::size_t s = 0; s < row.size(); ++s) {
      if (!accepted(s)) continue;
      const auto e = static_cast<std::size_t>(row[s] == empty_slot ? 0 : row[s]);
      const double carried = row[s] == empty_slot ? 0 : load[e] / static_cast<double>(copies_[e]);
      if (best == none || carried < best_load) {
        best = s;
        best_load = carried;
      }
    }
    return best;
  }
  // A spare slot is where the expert is already: another expert moves there, and this one takes its place.
  bool by_exchange(std::span<std::int32_t> row, std::span<const double> load, std::size_t expert) {
    const std::size_t free = cheapest(row, load, [&](std::size_t s) { return spare(row, s); });
    if (free == none) return false;
    const std::size_t taken = cheapest(row, load, [&](std::size_t s) {
      return row[s] != empty_slot && takes(s, expert) && on_node(static_cast<std::size_t>(row[s]), free) == 0;
    });
    if (taken == none) return false;
    const auto other = static_cast<std::size_t>(row[taken]);
    put(row, free, other);
    put(row, taken, expert);
    return true;
  }

  const topology& topology_;
  std::size_t least_;
  std::vector<std::size_t> on_node_;         // [experts, nodes] copies
  std::vector<std::size_t> nodes_, copies_;  // [experts]
};

/// Whether a cluster has room for copies of each expert on so many nodes.
[[nodiscard]] inline bool has_room_for(const topology& t, std::size_t experts, std::size_t least_nodes) {
  std::size_t room = 0, nodes = 0;
  for (std::size_t n = 0; n < t.nodes(); ++n) {
    room += std::min(t.slots_on_node(n), experts);
    nodes += t.slots_on_node(n) > 0 ? 1U : 0U;
  }
  return least_nodes <= nodes && room / least_nodes >= experts;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
