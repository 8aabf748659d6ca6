#pragma once

#include "../../../detail/macros_off.hpp"

/// The algorithm of DeepSeek EPLB (github.com/deepseek-ai/EPLB), one layer at a time, on float32 as published.

#include "../../../version.hpp"  // TETROMINO_NAMESPACE

#include <algorithm>  // std::sort, std::pop_heap, std::push_heap, std::make_heap
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

struct eplb_shape {
  std::size_t experts, replicas, groups, nodes, gpus;
};

class eplb_solver {
 public:
  explicit eplb_solver(const eplb_shape& shape)
      : shape_(shape),
        group_load_(shape.groups),
        order_(shape.experts),
        copies_(shape.experts / shape.nodes),
        expert_of_(shape.replicas / shape.nodes),
        nth_(shape.replicas / shape.nodes),
        share_(shape.replicas / shape.nodes) {
    const std::size_t most = std::max(shape.groups, shape.replicas / shape.nodes);
    pack_.resize(most);
    rank_.resize(most);
  }

  /// load[experts] → the expert and the number of its copy in each slot [replicas], and copies per expert [experts].
  void solve_layer(std::span<const float> load, std::span<std::uint32_t> expert_of_slot,
                   std::span<std::uint32_t> copy_of_slot, std::span<std::uint32_t> count) {
    const auto& [experts, replicas, groups, nodes, gpus] = shape_;
    const std::size_t group_size = experts / groups, groups_per_node = groups / nodes;
    const std::size_t node_experts = experts / nodes, node_slots = replicas / nodes, gpu_slots = replicas / gpus;

    for (std::size_t g = 0; g < groups; ++g) {
      group_load_[g] = 0.0f;
      for (std::size_t i = 0; i < group_size; ++i) group_load_[g] += load[g * group_size + i];
    }
    pack(group_load_, nodes);
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t first = (pack_[g] * groups_per_node + rank_[g]) * group_size;
      for (std::size_t i = 0; i < group_size; ++i) order_[first + i] = static_cast<std::uint32_t>(g * group_size + i);
    }
    for (std::size_t n = 0; n < nodes; ++n) {
      const std::span<const std::uint32_t> mine = std::span(order_).subspan(n * node_experts, node_experts);
      replicate(load, mine);
      for (std::size_t s = 0; s < node_slots; ++s) {
        share_[s] = load[mine[expert_of_[s]]] / static_cast<float>(copies_[expert_of_[s]]);
      }
      pack(share_, gpus / nodes);
      for (std::size_t s = 0; s < node_slots; ++s) {
        const std::size_t slot = n * node_slots + pack_[s] * gpu_slots + rank_[s];
        expert_of_slot[slot] = mine[expert_of_[s]];
        copy_of_slot[slot] = nth_[s];
      }
      for (std::size_t i = 0; i < node_experts; ++i) count[mine[i]] = copies_[i];
    }
  }

 private:
  struct weighed {
    float weight;
    std::uint32_t index;
  };
  // Heap order: the top is the heaviest, respectively the lightest; the lowest index among equals.
  static bool below_heaviest(const weighed& a, const weighed& b) {
    return a.weight < b.weight || (a.weight == b.weight && a.index > b.index);
  }
  static bool below_lightest(const weighed& a, const weighed& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.index > b.index);
  }

  // Into pack_ and rank_: equally many items per pack, heaviest first into the lightest pack.
  void pack(std::span<const float> weight, std::size_t packs) {
    const std::size_t n = weight.size(), room = n / packs;
    if (room == 1) {
      for (std::size_t i = 0; i < n; ++i) {
        pack_[i] = static_cast<std::uint32_t>(i);
        rank_[i] = 0;
      }
      return;
    }
    items_.clear();
    for (std::size_t i = 0; i < n; ++i) items_.push_back({weight[i], static_cast<std::uint32_t>(i)});
    std::sort(items_.begin(), items_.end(), [](const weighed& a, const weighed& b) { return below_heaviest(b, a); });
    heap_.clear();
    for (std::size_t p = 0; p < packs; ++p) heap_.push_back({0.0f, static_cast<std::uint32_t>(p)});
    held_.assign(packs, 0);
    for (const weighed& item : items_) {
      std::pop_heap(heap_.begin(), heap_.end(), below_lightest);
      weighed& lightest = heap_.back();
      pack_[item.index] = lightest.index;
      rank_[item.index] = held_[lightest.index]++;
      lightest.weight += item.weight;
      if (held_[lightest.index] < room) {
        std::push_heap(heap_.begin(), heap_.end(), below_lightest);
      } else {
        heap_.pop_back();
      }
    }
  }

  // Into expert_of_, nth_ and copies_: one copy each, then one more for whoever has the largest load per copy.
  void replicate(std::span<const float> load, std::span<const std::uint32_t> mine) {
    heap_.clear();
    for (std::size_t i = 0; i < mine.size(); ++i) {
      expert_of_[i] = static_cast<std::uint32_t>(i);
      nth_[i] = 0;
      copies_[i] = 1;
      heap_.push_back({load[mine[i]], static_cast<std::uint32_t>(i)});
    }
    std::make_heap(heap_.begin(), heap_.end(), below_heaviest);
    for (std::size_t s = mine.size(); s < expert_of_.size(); ++s) {
      std::pop_heap(heap_.begin(), heap_.end(), below_heaviest);
      weighed& heaviest = heap_.back();
      expert_of_[s] = heaviest.index;
      nth_[s] = copies_[heaviest.index]++;
      heaviest.weight = load[mine[heaviest.index]] / static_cast<float>(copies_[heaviest.index]);
      std::push_heap(heap_.begin(), heap_.end(), below_heaviest);
    }
  }

  eplb_shape shape_;
  std::vector<float> group_load_;         // [groups]
  std::vector<std::uint32_t> order_;      // [experts] node after node
  std::vector<std::uint32_t> copies_;     // [experts of a node]
  std::vector<std::uint32_t> expert_of_;  // [slots of a node] index into its experts
  std::vector<std::uint32_t> nth_;        // [slots of a node] number of the copy
  std::vector<float> share_;              // [slots of a node] load per copy
  std::vector<std::uint32_t> pack_, rank_, held_;
  std::vector<weighed> items_, heap_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
