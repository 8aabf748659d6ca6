#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../placement.hpp"  // placement
#include "../../topology.hpp"   // topology

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int32_t, std::int64_t
#include <span>     // std::span
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Gives experts that overload their GPU a second slot on the same node, so that no token travels further: an empty
/// slot, or the slot of a copy that is served elsewhere too and carries least.
class gpu_copies {
 public:
  gpu_copies(const topology& t, double limit, std::size_t nodes_per_expert)
      : topology_(t), limit_(limit), least_nodes_(nodes_per_expert) {}

  /// load_of[layers, experts, nodes]: pairs of each expert served on each node.
  void relieve(placement& p, std::span<const std::int64_t> load_of) {
    const std::size_t nodes = topology_.nodes();
    for (std::size_t l = 0; l < p.layers(); ++l) {
      const std::span<const std::int64_t> load = load_of.subspan(l * p.experts() * nodes, p.experts() * nodes);
      for (std::size_t turn = 0; turn < topology_.gpus(); ++turn) {
        if (!relieve_heaviest(p.layer(l), load)) break;
      }
    }
  }

 private:
  static constexpr std::size_t none = ~std::size_t{0};

  [[nodiscard]] std::size_t copies(std::span<const std::int32_t> row, std::int32_t expert, std::size_t first,
                                   std::size_t last) const {
    std::size_t n = 0;
    for (std::size_t s = first; s < last; ++s) n += row[s] == expert ? 1U : 0U;
    return n;
  }
  [[nodiscard]] bool gpu_holds(std::span<const std::int32_t> row, std::size_t gpu, std::int32_t expert) const {
    return copies(row, expert, topology_.first_slot(gpu), topology_.first_slot(gpu) + topology_.slots_on_gpu(gpu)) > 0;
  }

  // Whether the expert in a slot is served elsewhere too, and on enough nodes without this copy.
  [[nodiscard]] bool can_go(std::span<const std::int32_t> row, std::size_t slot) const {
    std::size_t nodes = 0;
    for (std::size_t n = 0; n < topology_.nodes(); ++n) {
      const std::size_t first = topology_.first_slot_of_node(n);
      const std::size_t here = copies(row, row[slot], first, first + topology_.slots_on_node(n));
      nodes += here > (topology_.node_of_slot(slot) == n ? 1U : 0U) ? 1U : 0U;
    }
    return nodes >= least_nodes_;
  }

  // True if the heaviest GPU was above the limit and one of its experts got a second slot.
  bool relieve_heaviest(std::span<std::int32_t> row, std::span<const std::int64_t> load_of) {
    const std::size_t nodes = topology_.nodes();
    slot_load_.assign(row.size(), 0.0);
    gpu_load_.assign(topology_.gpus(), 0.0);
    double all = 0;
    double speeds = 0;
    std::size_t heaviest = 0;
    const auto busy = [&](std::size_t g) { return gpu_load_[g] / topology_.speed(g); };
    for (std::size_t g = 0; g < gpu_load_.size(); ++g) {
      const std::size_t n = topology_.node_of_gpu(g), first = topology_.first_slot_of_node(n);
      speeds += topology_.slots_on_gpu(g) > 0 ? topology_.speed(g) : 0;
      for (std::size_t s = topology_.first_slot(g); s < topology_.first_slot(g) + topology_.slots_on_gpu(g); ++s) {
        if (row[s] == empty_slot) continue;
        const std::size_t here = copies(row, row[s], first, first + topology_.slots_on_node(n));
        slot_load_[s] =
            static_cast<double>(load_of[static_cast<std::size_t>(row[s]) * nodes + n]) / static_cast<double>(here);
        gpu_load_[g] += slot_load_[s];
      }
      all += gpu_load_[g];
      if (busy(g) > busy(heaviest)) heaviest = g;
    }
    if (busy(heaviest) * speeds <= limit_ * all) return false;

    const std::size_t from = topology_.first_slot(heaviest), node = topology_.node_of_gpu(heaviest);
    std::size_t hot = none;
    for (std::size_t s = from; s < from + topology_.slots_on_gpu(heaviest); ++s) {
      if (row[s] != empty_slot && (hot == none || slot_load_[s] > slot_load_[hot])) hot = s;
    }
    if (hot == none) return false;
    const std::size_t first = topology_.first_slot_of_node(node), last = first + topology_.slots_on_node(node);
    const auto here = static_cast<double>(copies(row, row[hot], first, last));
    const double share = slot_load_[hot] * here / (here + 1);
    std::size_t best = none;
    for (std::size_t s = first; s < last; ++s) {
      const std::size_t g = topology_.gpu_of_slot(s);
      if (g == heaviest || gpu_holds(row, g, row[hot])) continue;
      if (row[s] != empty_slot && !can_go(row, s)) continue;
      if ((gpu_load_[g] - slot_load_[s] + share) / topology_.speed(g) >= busy(heaviest)) continue;
      if (best == none || slot_load_[s] < slot_load_[best]) best = s;
    }
    // a copy that carries more than what it would make room for is worth more where it is
    if (best == none || slot_load_[best] >= slot_load_[hot] - share) return false;
    row[best] = row[hot];
    return true;
  }

  const topology& topology_;
  double limit_;
  std::size_t least_nodes_;
  std::vector<double> slot_load_;  // [slots]
  std::vector<double> gpu_load_;   // [gpus]
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
