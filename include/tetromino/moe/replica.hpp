#pragma once

#include "../config.hpp"  // TETROMINO_EXPECTS
#include "placement.hpp"  // placement, replica_index
#include "topology.hpp"   // topology

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint16_t, std::uint32_t, std::uint64_t
#include <span>     // std::span
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// Which copy of a replicated expert serves a token.
enum class replica_choice : std::uint8_t {
  nearest,       ///< one on the token's node; else on a node the token visits anyway; else the least loaded
  even,          ///< each copy in turn, wherever it is: what DeepSeek EPLB assumes
  least_loaded,  ///< the copy whose GPU has served least so far, wherever it is
  fewest_nodes,  ///< as `nearest`, but the next node visited is the one that holds most of what is still open
};

/// Chooses, token by token, the GPU that serves each (token, expert) pair, and counts the pairs per GPU. The counts
/// are what "least loaded" means, so the outcome depends on the order of tokens, and on nothing else.
class replica_chooser {
 public:
  /// With `fewest_nodes`, a pair may leave a node that has served more than node_limit × the mean of its layer so far
  /// for another copy on a node that the token visits anyway; 0: none does. Precondition: `p` is valid on `t` (two
  /// copies on one GPU are fine). Memory: 4 bytes per copy and 8 per layer and GPU; nothing is allocated afterwards.
  replica_chooser(const placement& p, const topology& t, replica_choice choice, double node_limit = 0)
      : choice_(choice), node_limit_(node_limit), experts_(p.experts()), gpus_(t.gpus()) {
    const replica_index where(p);
    first_.reserve(p.layers() * experts_ + 1);
    for (std::size_t l = 0; l < p.layers(); ++l) {
      for (std::size_t e = 0; e < experts_; ++e) {
        first_.push_back(static_cast<std::uint32_t>(gpu_of_copy_.size()));
        for (const std::uint32_t s : where.slots_of(l, e)) {
          gpu_of_copy_.push_back(static_cast<std::uint32_t>(t.gpu_of_slot(s)));
        }
      }
    }
    first_.push_back(static_cast<std::uint32_t>(gpu_of_copy_.size()));
    for (std::size_t g = 0; g < gpus_; ++g) node_of_gpu_.push_back(static_cast<std::uint32_t>(t.node_of_gpu(g)));
    pairs_on_gpu_.assign(p.layers() * gpus_, 0);
    if (choice == replica_choice::even) turn_.assign(p.layers() * experts_, 0);
    if (choice == replica_choice::fewest_nodes) {
      pairs_on_node_.assign(p.layers() * t.nodes(), 0);
      open_on_node_.assign(t.nodes(), 0);
      served_.assign(p.layers(), 0);
      for (std::size_t n = 0; n < t.nodes(); ++n) nodes_with_slots_ += t.slots_on_node(n) > 0 ? 1U : 0U;
    }
    visited_node_.assign(t.nodes(), 0);
    visited_gpu_.assign(gpus_, 0);
  }

  /// Writes into gpus[i] the GPU that serves experts[i], for one token in one layer. The token is on `home_gpu`.
  /// Preconditions: gpus.size() == experts.size(); layer, experts and home_gpu in range.
  void choose(std::size_t layer, std::span<const std::uint16_t> experts, std::uint32_t home_gpu,
              std::span<std::uint32_t> gpus) {
    TETROMINO_EXPECTS(gpus.size() == experts.size() && home_gpu < gpus_ && (layer + 1) * gpus_ <= pairs_on_gpu_.size(),
                      "replica_chooser: a GPU for each expert, layer and home GPU in range", gpus.size(),
                      experts.size(), home_gpu, gpus_, (layer + 1) * gpus_, pairs_on_gpu_.size());
    std::uint64_t* const load = pairs_on_gpu_.data() + layer * gpus_;
    const std::uint32_t* const first = first_.data() + layer * experts_;
    ++now_;
    bool open = false;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      TETROMINO_EXPECTS(experts[i] < experts_, "replica_chooser: expert number out of range", experts[i], experts_);
      const std::uint32_t begin = first[experts[i]];
      if (first[experts[i] + 1] - begin == 1) {
        gpus[i] = gpu_of_copy_[begin];
        visit(gpus[i], load);
      } else {
        gpus[i] = undecided;
        open = true;
      }
    }
    if (open) choose_copies(layer, experts, home_gpu, gpus, load);
    if (choice_ == replica_choice::fewest_nodes) {
      served_[layer] += gpus.size();
      if (open && node_limit_ > 0) relieve(layer, experts, gpus, load);
      for (const std::uint32_t gpu : gpus) ++pairs_on_node_[layer * visited_node_.size() + node_of_gpu_[gpu]];
    }
  }

  /// Pairs served so far: [layers, GPUs].
  [[nodiscard]] std::span<const std::uint64_t> pairs_on_gpu() const noexcept { return pairs_on_gpu_; }

 private:
  static constexpr std::uint32_t undecided = 0xFFFF'FFFF;

  void visit(std::uint32_t gpu, std::uint64_t* load) {
    ++load[gpu];
    visited_gpu_[gpu] = now_;
    visited_node_[node_of_gpu_[gpu]] = now_;
  }

  [[nodiscard]] std::span<const std::uint32_t> copies(std::size_t layer, std::size_t expert) const {
    const std::size_t i = layer * experts_ + expert;
    return std::span(gpu_of_copy_).subspan(first_[i], first_[i + 1] - first_[i]);
  }

  void choose_copies(std::size_t layer, std::span<const std::uint16_t> experts, std::uint32_t home_gpu,
                     std::span<std::uint32_t> gpus, std::uint64_t* load) {
    if (choice_ == replica_choice::even || choice_ == replica_choice::least_loaded) {
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (gpus[i] != undecided) continue;
        const std::span<const std::uint32_t> from = copies(layer, experts[i]);
        if (choice_ == replica_choice::even) {
          gpus[i] = from[turn_[layer * experts_ + experts[i]]++ % from.size()];
        } else {
          gpus[i] = least_loaded(from, load, [](std::uint32_t) { return true; });
        }
        visit(gpus[i], load);
      }
      return;
    }
    const std::uint32_t home_node = node_of_gpu_[home_gpu];
    const auto pass = [&](const auto& accepted) {
      bool open = false;
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (gpus[i] != undecided) continue;
        const std::uint32_t gpu = best_of(copies(layer, experts[i]), home_gpu, load, accepted);
        if (gpu == undecided) {
          open = true;
          continue;
        }
        gpus[i] = gpu;
        visit(gpu, load);
      }
      return open;
    };
    const auto at_home = [&](std::uint32_t gpu) { return node_of_gpu_[gpu] == home_node; };
    const auto on_visited_node = [&](std::uint32_t gpu) { return visited_node_[node_of_gpu_[gpu]] == now_; };
    if (!pass(at_home) || !pass(on_visited_node)) return;
    if (choice_ == replica_choice::fewest_nodes) {
      do {
        visited_node_[busiest_open_node(layer, experts, gpus)] = now_;
      } while (pass(on_visited_node));
      return;
    }
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (gpus[i] != undecided) continue;
      const std::span<const std::uint32_t> from = copies(layer, experts[i]);
      std::uint32_t gpu = best_of(from, home_gpu, load, on_visited_node);
      if (gpu == undecided) gpu = least_loaded(from, load, [](std::uint32_t) { return true; });
      gpus[i] = gpu;
      visit(gpu, load);
    }
  }

  // The node that holds most of the experts still open; the one that served least so far among equals.
  [[nodiscard]] std::size_t busiest_open_node(std::size_t layer, std::span<const std::uint16_t> experts,
                                              std::span<const std::uint32_t> gpus) {
    std::fill(open_on_node_.begin(), open_on_node_.end(), 0);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (gpus[i] != undecided) continue;
      std::uint32_t last = undecided;  // copies are in order of slots, so those of a node follow each other
      for (const std::uint32_t gpu : copies(layer, experts[i])) {
        if (node_of_gpu_[gpu] != last) ++open_on_node_[node_of_gpu_[gpu]];
        last = node_of_gpu_[gpu];
      }
    }
    const std::uint64_t* const served = pairs_on_node_.data() + layer * open_on_node_.size();
    std::size_t best = 0;
    for (std::size_t n = 1; n < open_on_node_.size(); ++n) {
      if (open_on_node_[n] > open_on_node_[best] ||
          (open_on_node_[n] == open_on_node_[best] && served[n] < served[best])) {
        best = n;
      }
    }
    return best;
  }

  // Takes pairs off nodes above the limit, to the visited node that has served least of those that hold a copy.
  void relieve(std::size_t layer, std::span<const std::uint16_t> experts, std::span<std::uint32_t> gpus,
               std::uint64_t* load) {
    const std::uint64_t* const served = pairs_on_node_.data() + layer * visited_node_.size();
    const double most = node_limit_ * static_cast<double>(served_[layer]) / static_cast<double>(nodes_with_slots_);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      const std::uint32_t from = node_of_gpu_[gpus[i]];
      if (static_cast<double>(served[from]) <= most) continue;
      std::uint32_t best = gpus[i];
      for (const std::uint32_t gpu : copies(layer, experts[i])) {
        const std::uint32_t node = node_of_gpu_[gpu], chosen = node_of_gpu_[best];
        if (visited_node_[node] != now_ || node == from) continue;
        if (served[node] < served[chosen] || (node == chosen && load[gpu] < load[best])) best = gpu;
      }
      if (best == gpus[i]) continue;
      --load[gpus[i]];
      visit(best, load);
      gpus[i] = best;
    }
  }

  // The home GPU if it is among the accepted, else one the token visits anyway, else the least loaded.
  template <class Accepted>
  [[nodiscard]] std::uint32_t best_of(std::span<const std::uint32_t> from, std::uint32_t home_gpu,
                                      const std::uint64_t* load, const Accepted& accepted) const {
    for (const std::uint32_t gpu : from) {
      if (gpu == home_gpu && accepted(gpu)) return gpu;
    }
    const std::uint32_t seen =
        least_loaded(from, load, [&](std::uint32_t gpu) { return accepted(gpu) && visited_gpu_[gpu] == now_; });
    return seen != undecided ? seen : least_loaded(from, load, accepted);
  }

  template <class Accepted>
  [[nodiscard]] static std::uint32_t least_loaded(std::span<const std::uint32_t> from, const std::uint64_t* load,
                                                  const Accepted& accepted) {
    std::uint32_t best = undecided;
    for (const std::uint32_t gpu : from) {
      if (accepted(gpu) && (best == undecided || load[gpu] < load[best])) best = gpu;
    }
    return best;
  }

  replica_choice choice_;
  double node_limit_;
  std::size_t experts_;
  std::size_t gpus_;
  std::vector<std::uint32_t> first_;          // [layers × experts + 1] into gpu_of_copy_
  std::vector<std::uint32_t> gpu_of_copy_;    // [copies]
  std::vector<std::uint32_t> node_of_gpu_;    // [gpus]
  std::vector<std::uint64_t> pairs_on_gpu_;   // [layers, gpus]
  std::vector<std::uint32_t> turn_;           // [layers, experts], for `even`
  std::vector<std::uint64_t> pairs_on_node_;  // [layers, nodes], for `fewest_nodes`
  std::vector<std::uint32_t> open_on_node_;   // [nodes], for `fewest_nodes`
  std::vector<std::uint64_t> served_;         // [layers] pairs so far, for `fewest_nodes`
  std::size_t nodes_with_slots_ = 0;
  std::vector<std::uint64_t> visited_node_;  // [nodes] last `now_` at which the token went there
  std::vector<std::uint64_t> visited_gpu_;   // [gpus]
  std::uint64_t now_ = 0;
};

}  // namespace TETROMINO_NAMESPACE::moe
