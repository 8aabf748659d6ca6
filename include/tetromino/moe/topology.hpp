#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error

#include <algorithm>  // std::all_of
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

namespace detail {
using tetromino::detail::text;
}

/// One GPU's share of a fabric, in one direction.
struct link {
  double bytes_per_second;
  double latency_seconds;

  friend TETROMINO_ABI bool operator==(const link&, const link&) = default;
};

/// What connects the GPUs: `inside` a node (e.g. NVLink) and `between` nodes (e.g. one 400 Gb/s port per GPU). A node's
/// bandwidth to other nodes is its number of GPUs × `between`.
struct fabric {
  link inside{450e9, 2e-6};
  link between{50e9, 6e-6};

  friend TETROMINO_ABI bool operator==(const fabric&, const fabric&) = default;
};

/// Nodes, their GPUs and the expert slots of each GPU, in one numbering: GPUs are counted node after node, slots GPU
/// after GPU. The expert-parallel rank is the GPU. GPUs may differ in slots and nodes in GPUs; a GPU may have no slot.
class topology {
 public:
  static constexpr std::size_t max_gpus = 65'535;
  static constexpr std::size_t max_slots = std::size_t{1} << 24;
  static constexpr std::size_t max_nodes_with_costs = 4096;

  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI topology(const topology&) = default;
  TETROMINO_ABI topology(topology&&) = default;
  TETROMINO_ABI topology& operator=(const topology&) = default;
  TETROMINO_ABI topology& operator=(topology&&) = default;

  /// `nodes` × `gpus_per_node` GPUs of `slots_per_gpu` slots each. Errors: a count of zero, or too large.
  [[nodiscard]] TETROMINO_ABI static result<topology> try_uniform(std::size_t nodes, std::size_t gpus_per_node,
                                                                  std::size_t slots_per_gpu, fabric links = {}) {
    if (auto bad = check_counts(nodes, gpus_per_node); !bad) return bad.error();
    const std::vector<std::size_t> gpus(nodes, gpus_per_node);
    const std::vector<std::size_t> slots(nodes * gpus_per_node, slots_per_gpu);
    return try_make(gpus, slots, links);
  }
  [[nodiscard]] TETROMINO_ABI static topology uniform(std::size_t nodes, std::size_t gpus_per_node,
                                                      std::size_t slots_per_gpu, fabric links = {}) {
    return try_uniform(nodes, gpus_per_node, slots_per_gpu, links).value();
  }

  /// `nodes` × `gpus_per_node` GPUs where each node has `slots_per_node` slots, spread as evenly as they go (the first
  /// GPUs of a node have one more). Errors: a count of zero, or too large.
  [[nodiscard]] TETROMINO_ABI static result<topology> try_with_node_slots(std::size_t nodes, std::size_t gpus_per_node,
                                                                          std::size_t slots_per_node,
                                                                          fabric links = {}) {
    if (auto bad = check_counts(nodes, gpus_per_node); !bad) return bad.error();
    const std::vector<std::size_t> gpus(nodes, gpus_per_node);
    std::vector<std::size_t> slots(nodes * gpus_per_node);
    for (std::size_t g = 0; g < slots.size(); ++g) {
      slots[g] = slots_per_node / gpus_per_node + (g % gpus_per_node < slots_per_node % gpus_per_node ? 1 : 0);
    }
    return try_make(gpus, slots, links);
  }
  [[nodiscard]] TETROMINO_ABI static topology with_node_slots(std::size_t nodes, std::size_t gpus_per_node,
                                                              std::size_t slots_per_node, fabric links = {}) {
    return try_with_node_slots(nodes, gpus_per_node, slots_per_node, links).value();
  }

  /// Any shape: `gpus_per_node[nodes]`, and `slots_per_gpu[GPUs]` counted node after node. Errors: no node, a node
  /// without GPU, lengths that disagree, no slot at all, more than max_gpus or max_slots, a bandwidth that is not
  /// positive and finite, a latency that is negative or not finite.
  [[nodiscard]] TETROMINO_ABI static result<topology> try_make(std::span<const std::size_t> gpus_per_node,
                                                               std::span<const std::size_t> slots_per_gpu,
                                                               fabric links = {}) {
    if (gpus_per_node.empty()) return error(errc::invalid_argument, "topology: expected at least one node, got none");
    topology t;
    t.links_ = links;
    t.first_gpu_.assign(1, 0);
    for (std::size_t n = 0; n < gpus_per_node.size(); ++n) {
      if (gpus_per_node[n] == 0 || gpus_per_node[n] > max_gpus - t.first_gpu_.back()) {
        return error(errc::invalid_argument,
                     {"topology: expected 1 to ", max_gpus, " GPUs in all and one at least per node, got ",
                      gpus_per_node[n], " on node ", n});
      }
      t.first_gpu_.push_back(t.first_gpu_.back() + static_cast<std::uint32_t>(gpus_per_node[n]));
      t.node_of_gpu_.insert(t.node_of_gpu_.end(), gpus_per_node[n], static_cast<std::uint32_t>(n));
    }
    if (slots_per_gpu.size() != t.gpus()) {
      return error(errc::shape_mismatch,
                   {"topology: expected slots for ", t.gpus(), " GPUs, got ", slots_per_gpu.size(), " entries"});
    }
    t.first_slot_.assign(1, 0);
    for (std::size_t g = 0; g < slots_per_gpu.size(); ++g) {
      if (slots_per_gpu[g] > max_slots - t.first_slot_.back()) {
        return error(errc::invalid_argument, {"topology: expected at most ", max_slots, " slots in all, got ",
                                              slots_per_gpu[g], " on GPU ", g});
      }
      t.first_slot_.push_back(t.first_slot_.back() + static_cast<std::uint32_t>(slots_per_gpu[g]));
      t.gpu_of_slot_.insert(t.gpu_of_slot_.end(), slots_per_gpu[g], static_cast<std::uint32_t>(g));
    }
    if (t.slots() == 0) return error(errc::invalid_argument, "topology: expected at least one expert slot, got none");
    for (const link& l : {links.inside, links.between}) {
      if (!std::isfinite(l.bytes_per_second) || l.bytes_per_second <= 0) {
        return error(errc::invalid_argument,
                     {"topology: expected a bandwidth above 0 bytes/s, got ", l.bytes_per_second});
      }
      if (!std::isfinite(l.latency_seconds) || l.latency_seconds < 0) {
        return error(errc::invalid_argument, {"topology: expected a latency of 0 s or more, got ", l.latency_seconds});
      }
    }
    return t;
  }
  [[nodiscard]] TETROMINO_ABI static topology make(std::span<const std::size_t> gpus_per_node,
                                                   std::span<const std::size_t> slots_per_gpu, fabric links = {}) {
    return try_make(gpus_per_node, slots_per_gpu, links).value();
  }

  /// The same GPUs, with no slot on those named: what is left to plan for when they are dead or shall leave. A node
  /// that has no other takes no requests. GPUs keep their numbers, slots do not (see carry_over). Errors: a GPU that is
  /// not there, no slot left.
  [[nodiscard]] TETROMINO_ABI result<topology> try_without(std::span<const std::uint32_t> gone) const {
    std::vector<std::size_t> gpus_per_node, slots_per_gpu;
    for (std::size_t n = 0; n < nodes(); ++n) gpus_per_node.push_back(gpus_on_node(n));
    for (std::size_t g = 0; g < gpus(); ++g) slots_per_gpu.push_back(slots_on_gpu(g));
    for (const std::uint32_t g : gone) {
      if (g >= gpus()) {
        return error(errc::invalid_argument, {"topology: expected GPUs below ", gpus(), ", got ", g});
      }
      slots_per_gpu[g] = 0;
    }
    auto left = try_make(gpus_per_node, slots_per_gpu, links_);
    if (left) {
      left->speeds_ = speeds_;
      left->node_costs_ = node_costs_;
    }
    return left;
  }
  [[nodiscard]] TETROMINO_ABI topology without(std::span<const std::uint32_t> gone) const {
    return try_without(gone).value();
  }

  /// The same GPUs, as fast as `speeds` says: [GPUs], in any unit (a GPU of speed 2 serves twice as many pairs in the
  /// same time). `balanced`, `local`, nodes' shares of requests, choices of copies for single tokens and the imbalances
  /// of the cost go by it. Give a slow GPU fewer slots, or all some to spare: else it has to hold as many experts.
  /// Errors: another number of GPUs, a speed outside 1/64 to 64 times the fastest's.
  [[nodiscard]] TETROMINO_ABI result<topology> try_with_speeds(std::span<const double> speeds) const {
    if (speeds.size() != gpus()) {
      return error(errc::shape_mismatch,
                   {"topology: expected a speed for each of ", gpus(), " GPUs, got ", speeds.size()});
    }
    double fastest = 0;
    for (const double s : speeds) fastest = s > fastest ? s : fastest;
    topology t = *this;
    t.speeds_.clear();
    for (std::size_t g = 0; g < speeds.size(); ++g) {
      if (!std::isfinite(speeds[g]) || !(speeds[g] * 64 >= fastest) || !(speeds[g] > 0)) {
        return error(errc::invalid_argument, {"topology: expected speeds above 0, none below 1/64 of the "
                                              "fastest, got ",
                                              speeds[g], " of GPU ", g});
      }
      t.speeds_.push_back(speeds[g] / fastest);
    }
    return t;
  }
  [[nodiscard]] TETROMINO_ABI topology with_speeds(std::span<const double> speeds) const {
    return try_with_speeds(speeds).value();
  }
  /// Speed of a GPU over that of the fastest.
  [[nodiscard]] TETROMINO_ABI double speed(std::size_t gpu) const {
    TETROMINO_EXPECTS(gpu < gpus(), "topology: node, GPU or slot number out of range");
    return speeds_.empty() ? 1.0 : speeds_[gpu];
  }
  /// Sum over the GPUs of a node that have slots.
  [[nodiscard]] TETROMINO_ABI double speed_of_node(std::size_t node) const {
    double sum = 0;
    for (std::size_t g = first_gpu(node); g < first_gpu(node) + gpus_on_node(node); ++g) {
      sum += slots_on_gpu(g) > 0 ? speed(g) : 0;
    }
    return sum;
  }

  /// The same GPUs, on nodes that are near to some and far from others: a byte from one node to another takes its ports
  /// `costs` times as long as `fabric::between` says. [nodes, nodes], the same both ways, since what is sent comes
  /// back; the diagonal is not looked at. Cost, choices of copies for single tokens, migration and `local` go by it.
  /// Errors: another number of costs, one outside 1/1000 to 1000, one that differs from that of the way back, more than
  /// max_nodes_with_costs nodes.
  [[nodiscard]] TETROMINO_ABI result<topology> try_with_node_costs(std::span<const double> costs) const {
    if (nodes() > max_nodes_with_costs || costs.size() != nodes() * nodes()) {
      return error(errc::shape_mismatch, {"topology: expected a cost for each pair of at most ", max_nodes_with_costs,
                                          " nodes, got ", costs.size(), " for ", nodes(), " nodes"});
    }
    topology t = *this;
    t.node_costs_.assign(costs.begin(), costs.end());
    for (std::size_t from = 0; from < nodes(); ++from) {
      t.node_costs_[from * nodes() + from] = 1;
      for (std::size_t to = 0; to < from; ++to) {
        const double there = costs[from * nodes() + to], back = costs[to * nodes() + from];
        if (!(there >= 1e-3) || !(there <= 1e3) || there != back) {
          return error(errc::invalid_argument, {"topology: expected costs of 0.001 to 1000, the same both ways, got ",
                                                there, " from node ", from, " to ", to, " and ", back, " back"});
        }
      }
    }
    const auto one = [](double c) { return c == 1; };
    if (std::all_of(t.node_costs_.begin(), t.node_costs_.end(), one)) t.node_costs_.clear();
    return t;
  }
  [[nodiscard]] TETROMINO_ABI topology with_node_costs(std::span<const double> costs) const {
    return try_with_node_costs(costs).value();
  }
  /// The same for racks (or pods) of `nodes_per_rack` nodes, counted from the first: between nodes of two of them a
  /// byte costs `cost`, inside one 1. Errors: racks of no node, and as try_with_node_costs.
  [[nodiscard]] TETROMINO_ABI result<topology> try_with_racks(std::size_t nodes_per_rack, double cost) const {
    if (nodes_per_rack == 0 || nodes() > max_nodes_with_costs) {
      return error(errc::invalid_argument, {"topology: expected racks of 1 node or more and at most ",
                                            max_nodes_with_costs, " nodes, got ", nodes_per_rack, " of ", nodes()});
    }
    std::vector<double> costs(nodes() * nodes(), 1.0);
    for (std::size_t i = 0; i < costs.size(); ++i) {
      if (i / nodes() / nodes_per_rack != i % nodes() / nodes_per_rack) costs[i] = cost;
    }
    return try_with_node_costs(costs);
  }
  [[nodiscard]] TETROMINO_ABI topology with_racks(std::size_t nodes_per_rack, double cost) const {
    return try_with_racks(nodes_per_rack, cost).value();
  }
  /// [nodes, nodes], 1 from a node to itself; empty where all are 1.
  [[nodiscard]] TETROMINO_ABI std::span<const double> node_costs() const noexcept { return node_costs_; }
  /// What a byte from one node to another costs; 1 from a node to itself.
  [[nodiscard]] TETROMINO_ABI double node_cost(std::size_t from, std::size_t to) const {
    TETROMINO_EXPECTS(from < nodes() && to < nodes(), "topology: node, GPU or slot number out of range");
    return node_costs_.empty() ? 1.0 : node_costs_[from * nodes() + to];
  }

  [[nodiscard]] TETROMINO_ABI std::size_t nodes() const noexcept { return first_gpu_.size() - 1; }
  [[nodiscard]] TETROMINO_ABI std::size_t gpus() const noexcept { return first_gpu_.back(); }
  [[nodiscard]] TETROMINO_ABI std::size_t slots() const noexcept { return gpu_of_slot_.size(); }
  [[nodiscard]] TETROMINO_ABI const fabric& links() const noexcept { return links_; }

  /// GPUs of `node`: first_gpu(node) … first_gpu(node) + gpus_on_node(node) − 1.
  [[nodiscard]] TETROMINO_ABI std::size_t first_gpu(std::size_t node) const { return at(first_gpu_, node); }
  [[nodiscard]] TETROMINO_ABI std::size_t gpus_on_node(std::size_t node) const {
    return at(first_gpu_, node + 1) - first_gpu(node);
  }
  [[nodiscard]] TETROMINO_ABI std::size_t node_of_gpu(std::size_t gpu) const { return at(node_of_gpu_, gpu); }

  /// Slots of `gpu`: first_slot(gpu) … first_slot(gpu) + slots_on_gpu(gpu) − 1.
  [[nodiscard]] TETROMINO_ABI std::size_t first_slot(std::size_t gpu) const { return at(first_slot_, gpu); }
  [[nodiscard]] TETROMINO_ABI std::size_t slots_on_gpu(std::size_t gpu) const {
    return at(first_slot_, gpu + 1) - first_slot(gpu);
  }
  [[nodiscard]] TETROMINO_ABI std::size_t gpu_of_slot(std::size_t slot) const { return at(gpu_of_slot_, slot); }
  [[nodiscard]] TETROMINO_ABI std::size_t node_of_slot(std::size_t slot) const {
    return node_of_gpu(gpu_of_slot(slot));
  }
  [[nodiscard]] TETROMINO_ABI std::size_t first_slot_of_node(std::size_t node) const {
    return at(first_slot_, first_gpu(node));
  }
  [[nodiscard]] TETROMINO_ABI std::size_t slots_on_node(std::size_t node) const {
    return at(first_slot_, at(first_gpu_, node + 1)) - first_slot_of_node(node);
  }

  /// True when all nodes have equally many GPUs, and all GPUs equally many slots and one speed.
  [[nodiscard]] TETROMINO_ABI bool is_uniform() const {
    for (std::size_t n = 0; n < nodes(); ++n) {
      if (gpus_on_node(n) != gpus_on_node(0)) return false;
    }
    for (std::size_t g = 0; g < gpus(); ++g) {
      if (slots_on_gpu(g) != slots_on_gpu(0) || speed(g) != speed(0)) return false;
    }
    return true;
  }

  /// Most copies that one expert can have when no GPU holds it twice: the GPUs that have a slot.
  [[nodiscard]] TETROMINO_ABI std::size_t gpus_with_slots() const {
    std::size_t count = 0;
    for (std::size_t g = 0; g < gpus(); ++g) count += slots_on_gpu(g) > 0 ? 1U : 0U;
    return count;
  }

  friend TETROMINO_ABI bool operator==(const topology&, const topology&) = default;

 private:
  TETROMINO_ABI topology() = default;

  TETROMINO_ABI static result<void> check_counts(std::size_t nodes, std::size_t gpus_per_node) {
    if (nodes == 0 || gpus_per_node == 0 || nodes > max_gpus || gpus_per_node > max_gpus / nodes) {
      return error(errc::invalid_argument,
                   {"topology: expected 1 to ", max_gpus, " GPUs, got ", nodes, " nodes × ", gpus_per_node, " GPUs"});
    }
    return {};
  }
  TETROMINO_ABI static std::uint32_t at(const std::vector<std::uint32_t>& values, std::size_t i) {
    TETROMINO_EXPECTS(i < values.size(), "topology: node, GPU or slot number out of range", i, values.size());
    return values[i];
  }

  fabric links_;
  std::vector<std::uint32_t> first_gpu_;    // [nodes + 1]
  std::vector<std::uint32_t> node_of_gpu_;  // [gpus]
  std::vector<std::uint32_t> first_slot_;   // [gpus + 1]
  std::vector<std::uint32_t> gpu_of_slot_;  // [slots]
  std::vector<double> speeds_;              // [gpus]; empty: all alike
  std::vector<double> node_costs_;          // [nodes, nodes]; empty: all 1
};

namespace detail::inline TETROMINO_ISA {

/// Speed of each node's GPUs together, 0 without slots: [nodes].
[[nodiscard]] inline std::vector<double> node_speeds(const topology& t) {
  std::vector<double> out;
  for (std::size_t n = 0; n < t.nodes(); ++n) out.push_back(t.speed_of_node(n));
  return out;
}

/// The GPUs of each node that have slots, or all of a node's where none has any: those that run its tokens and send and
/// receive what it exchanges with others.
class live_gpus {
 public:
  explicit live_gpus(const topology& t) : first_(1, 0), number_(t.gpus(), 0) {
    for (std::size_t n = 0; n < t.nodes(); ++n) {
      const std::size_t first = t.first_gpu(n);
      for (std::size_t g = first; g < first + t.gpus_on_node(n); ++g) {
        number_[g] = g - first;
        if (t.slots_on_gpu(g) == 0 && t.slots_on_node(n) > 0) continue;
        number_[g] = gpus_.size() - first_.back();
        gpus_.push_back(static_cast<std::uint32_t>(g));
      }
      first_.push_back(gpus_.size());
    }
  }

  [[nodiscard]] std::span<const std::uint32_t> of(std::size_t node) const {
    return std::span(gpus_).subspan(first_[node], first_[node + 1] - first_[node]);
  }
  /// A GPU's place among them; of one that is none of them, among all of its node.
  [[nodiscard]] std::size_t number(std::size_t gpu) const { return number_[gpu]; }
  /// The one of another node that a GPU sends to: of its own number, and so on from the first.
  [[nodiscard]] std::uint32_t counterpart(std::size_t gpu, std::size_t node) const {
    return of(node)[number(gpu) % of(node).size()];
  }

 private:
  std::vector<std::size_t> first_;   // [nodes + 1] into gpus_
  std::vector<std::uint32_t> gpus_;  // by node
  std::vector<std::size_t> number_;  // [gpus]
};

}  // namespace detail::inline TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
