#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"                     // tetromino::result, tetromino::error
#include "search/balance/bin_packer.hpp"    // detail::bin_packer
#include "search/balance/eplb.hpp"          // detail::eplb_solver
#include "search/balance/load_balance.hpp"  // detail::load_balancer
#include "search/copies/node_spread.hpp"    // detail::node_spreader, detail::has_room_for
#include "loads.hpp"                        // load_view
#include "placement.hpp"                    // placement, index_tensors
#include "topology.hpp"                     // topology

#include <algorithm>  // std::all_of, std::make_heap, std::max, std::min, std::pop_heap, std::push_heap, std::stable_sort
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::int64_t, std::uint32_t
#include <span>       // std::span
#include <utility>    // std::pair
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

namespace detail::inline TETROMINO_ISA {

[[nodiscard]] inline result<void> check_place_shape(std::size_t layers, std::size_t experts, const topology& t) {
  if (layers == 0 || experts == 0 || experts > placement::max_experts) {
    return error(errc::invalid_argument, {"place: expected at least 1 layer and 1 to ", placement::max_experts,
                                          " experts, got ", layers, " and ", experts});
  }
  if (!can_be_array({layers, t.slots()})) {
    return error(errc::invalid_argument,
                 {"place: expected fewer slots, got ", layers, " layers × ", t.slots(), " slots"});
  }
  if (t.slots() < experts) {
    return error(errc::infeasible,
                 {"place: expected a slot for each of ", experts, " experts, got ", t.slots(), " slots"});
  }
  return {};
}

[[nodiscard]] inline std::vector<std::uint32_t> first_slots(const topology& t) {
  std::vector<std::uint32_t> out;
  out.reserve(t.gpus() + 1);
  for (std::size_t g = 0; g < t.gpus(); ++g) out.push_back(static_cast<std::uint32_t>(t.first_slot(g)));
  out.push_back(static_cast<std::uint32_t>(t.slots()));
  return out;
}

/// Speeds of GPUs; none where all are alike.
[[nodiscard]] inline std::vector<double> speeds_of(const topology& t) {
  std::vector<double> out;
  for (std::size_t g = 0; g < t.gpus(); ++g) out.push_back(t.speed(g));
  const bool alike = std::all_of(out.begin(), out.end(), [](double s) { return s == 1; });
  return alike ? std::vector<double>() : out;
}

/// What the busiest GPU of a layer has to do at least, over the mean, with 0, 1, 2 … further copies of the experts that
/// carry most.
[[nodiscard]] inline std::vector<double> least_imbalances(std::span<const double> load, const topology& t) {
  double all = 0;
  for (const double x : load) all += x;
  std::vector<std::pair<double, std::uint32_t>> heap;  // load of a copy, copies
  for (const double x : load) heap.emplace_back(x, 1);
  std::make_heap(heap.begin(), heap.end());
  std::vector<double> out;
  const auto gpus = static_cast<double>(t.gpus_with_slots());
  for (std::size_t c = 0; c + load.size() <= t.slots(); ++c) {
    out.push_back(all > 0 ? std::max(1.0, heap.front().first * gpus / all) : 1.0);
    std::pop_heap(heap.begin(), heap.end());
    auto& [share, copies] = heap.back();
    share = copies < t.gpus_with_slots() ? share * copies / (copies + 1) : share;
    ++copies;
    std::push_heap(heap.begin(), heap.end());
  }
  return out;
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Expert e in slot e; where there are more slots than experts, each GPU gets its share of neighbouring experts and
/// leaves the rest of its slots empty. What engines do by default. Errors: fewer slots than experts.
[[nodiscard]] inline result<placement> try_contiguous(std::size_t layers, std::size_t experts, const topology& t) {
  if (auto ok = detail::check_place_shape(layers, experts, t); !ok) return ok.error();
  placement out(layers, experts, t.slots());
  for (std::size_t l = 0; l < layers; ++l) {
    const std::span<std::int32_t> row = out.layer(l);
    for (std::size_t g = 0; g < t.gpus(); ++g) {
      const std::size_t first = experts * t.first_slot(g) / t.slots();
      const std::size_t last = experts * (t.first_slot(g) + t.slots_on_gpu(g)) / t.slots();
      for (std::size_t e = first; e < last; ++e) row[t.first_slot(g) + e - first] = static_cast<std::int32_t>(e);
    }
  }
  return out;
}
[[nodiscard]] inline placement contiguous(std::size_t layers, std::size_t experts, const topology& t) {
  return try_contiguous(layers, experts, t).value();
}

/// Experts dealt to GPUs in turn; a GPU without a free slot is passed over. Errors: fewer slots than experts.
[[nodiscard]] inline result<placement> try_round_robin(std::size_t layers, std::size_t experts, const topology& t) {
  if (auto ok = detail::check_place_shape(layers, experts, t); !ok) return ok.error();
  std::vector<std::size_t> held(t.gpus(), 0);
  std::vector<std::size_t> slot_of_expert(experts);
  std::size_t gpu = 0;
  for (std::size_t e = 0; e < experts; ++e) {
    while (held[gpu] == t.slots_on_gpu(gpu)) gpu = (gpu + 1) % t.gpus();
    slot_of_expert[e] = t.first_slot(gpu) + held[gpu]++;
    gpu = (gpu + 1) % t.gpus();
  }
  placement out(layers, experts, t.slots());
  for (std::size_t l = 0; l < layers; ++l) {
    for (std::size_t e = 0; e < experts; ++e) out.layer(l)[slot_of_expert[e]] = static_cast<std::int32_t>(e);
  }
  return out;
}
[[nodiscard]] inline placement round_robin(std::size_t layers, std::size_t experts, const topology& t) {
  return try_round_robin(layers, experts, t).value();
}

}  // namespace TETROMINO_ISA

/// The sizes that DeepSeek EPLB is called with.
struct eplb_options {
  std::size_t replicas = 0;  ///< slots per layer: a multiple of `gpus`, and at least the number of experts
  std::size_t groups = 1;    ///< groups of experts that routing treats as one; divides the number of experts
  std::size_t nodes = 1;     ///< count only where they divide `groups`: else copies go anywhere, as in the original
  std::size_t gpus = 1;      ///< a multiple of `nodes`
};

inline namespace TETROMINO_ISA {

/// The index tensors that DeepSeek EPLB computes for the same input: hierarchical (groups to nodes, copies within
/// nodes, copies to GPUs) when `nodes` divides `groups`, global otherwise. Two copies of an expert may meet on one GPU;
/// `balanced` avoids that. Loads are rounded to float32 and computed with as such, as published. Equal weights are
/// packed in ascending order of index (a stable sort); the published code sorts with torch, which leaves the order of
/// equal weights open. Errors: sizes that do not divide as above, bad loads.
/// (github.com/deepseek-ai/EPLB)
[[nodiscard]] inline result<index_tensors> try_balanced_eplb(const load_view& loads, const eplb_options& options) {
  if (auto ok = try_validate(loads); !ok) return ok.error();
  detail::eplb_shape shape{loads.experts, options.replicas, options.groups, options.nodes, options.gpus};
  if (shape.groups == 0 || shape.nodes == 0 || shape.gpus == 0 || shape.replicas > topology::max_slots ||
      loads.experts > placement::max_experts) {
    return error(errc::invalid_argument,
                 {"eplb: expected at least 1 group, node and GPU, at most ", topology::max_slots, " replicas of ",
                  placement::max_experts, " experts, got ", shape.groups, ", ", shape.nodes, ", ", shape.gpus, ", ",
                  shape.replicas, " and ", loads.experts});
  }
  if (shape.groups % shape.nodes != 0) shape.groups = shape.nodes = 1;
  if (shape.experts % shape.groups != 0 || shape.gpus % shape.nodes != 0 || shape.replicas % shape.gpus != 0) {
    return error(errc::shape_mismatch,
                 {"eplb: expected groups to divide experts, nodes to divide GPUs and GPUs to divide "
                  "replicas, got ",
                  shape.experts, " experts in ", shape.groups, " groups, ", shape.replicas, " replicas on ", shape.gpus,
                  " GPUs of ", options.nodes, " nodes"});
  }
  if (shape.replicas < shape.experts) {
    return error(errc::infeasible,
                 {"eplb: expected at least ", shape.experts, " replicas, one per expert, got ", shape.replicas});
  }

  index_tensors out{loads.layers, loads.experts, shape.replicas, 0, {}, {}, {}};
  detail::eplb_solver solver(shape);
  std::vector<float> load(loads.experts);
  std::vector<std::uint32_t> expert_of_slot(shape.replicas), count(loads.experts);
  std::vector<std::uint32_t> copy_of_slot(loads.layers * shape.replicas);
  out.physical_to_logical.reserve(copy_of_slot.size());
  out.count.reserve(loads.values.size());
  for (std::size_t l = 0; l < loads.layers; ++l) {
    for (std::size_t e = 0; e < loads.experts; ++e) load[e] = static_cast<float>(loads.layer(l)[e]);
    solver.solve_layer(load, expert_of_slot, std::span(copy_of_slot).subspan(l * shape.replicas, shape.replicas),
                       count);
    out.physical_to_logical.insert(out.physical_to_logical.end(), expert_of_slot.begin(), expert_of_slot.end());
    out.count.insert(out.count.end(), count.begin(), count.end());
    for (const std::uint32_t c : count) out.max_copies = std::max<std::size_t>(out.max_copies, c);
  }
  out.logical_to_physical.assign(loads.values.size() * out.max_copies, -1);
  for (std::size_t i = 0; i < out.physical_to_logical.size(); ++i) {
    const std::size_t row = i / shape.replicas * loads.experts + static_cast<std::size_t>(out.physical_to_logical[i]);
    out.logical_to_physical[row * out.max_copies + copy_of_slot[i]] = static_cast<std::int64_t>(i % shape.replicas);
  }
  return out;
}
[[nodiscard]] inline index_tensors balanced_eplb(const load_view& loads, const eplb_options& options) {
  return try_balanced_eplb(loads, options).value();
}

}  // namespace TETROMINO_ISA

/// What `balanced` keeps together.
struct balanced_options {
  /// Experts fall into this many groups of neighbours, each kept on one node (for routing that picks groups first);
  /// 1 leaves experts free.
  std::size_t groups = 1;
  /// Each expert gets copies on at least so many nodes, so that none is lost with a node. Needs groups == 1.
  std::size_t nodes_per_expert = 1;
  /// Copies of each layer beyond one per expert, as copies_by_gain counts them: the rest of its slots stays empty.
  /// None: as many as there are slots.
  std::span<const std::size_t> copies_per_layer{};
};

namespace detail::inline TETROMINO_ISA {

/// The groups of so many experts that nodes have room for, counted on: node n has those from its own entry to the next.
[[nodiscard]] inline std::vector<std::uint32_t> first_groups(const topology& t, std::size_t group_size) {
  std::vector<std::uint32_t> first(1, 0);
  for (std::size_t n = 0; n < t.nodes(); ++n) {
    first.push_back(first.back() + static_cast<std::uint32_t>(t.slots_on_node(n) / group_size));
  }
  return first;
}

[[nodiscard]] inline result<void> check_balanced(const load_view& loads, const topology& t,
                                                 const balanced_options& options) {
  if (auto ok = try_validate(loads); !ok) return ok;
  if (auto ok = check_place_shape(loads.layers, loads.experts, t); !ok) return ok;
  if (options.groups == 0 || loads.experts % options.groups != 0) {
    return error(errc::invalid_argument,
                 {"balanced: expected groups that divide ", loads.experts, " experts, got ", options.groups});
  }
  const std::size_t group_size = loads.experts / options.groups, room = first_groups(t, group_size).back();
  if (options.groups > 1 && room < options.groups) {
    return error(errc::infeasible, {"balanced: expected nodes with slots for ", options.groups, " whole groups of ",
                                    group_size, " experts, got slots for ", room});
  }
  if (!options.copies_per_layer.empty() && (options.copies_per_layer.size() != loads.layers || options.groups > 1)) {
    return error(errc::shape_mismatch,
                 {"balanced: expected copies for each of ", loads.layers, " layers, without groups, got ",
                  options.copies_per_layer.size(), " and ", options.groups, " groups"});
  }
  if (options.nodes_per_expert == 0 || (options.nodes_per_expert > 1 && options.groups > 1)) {
    return error(errc::invalid_argument,
                 {"balanced: expected copies on at least 1 node, and no groups for more than 1, got ",
                  options.nodes_per_expert, " nodes and ", options.groups, " groups"});
  }
  if (!has_room_for(t, loads.experts, options.nodes_per_expert)) {
    return error(errc::infeasible,
                 {"balanced: expected room for ", loads.experts, " experts on ", options.nodes_per_expert,
                  " nodes each, got ", t.slots(), " slots on ", t.nodes(), " nodes"});
  }
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Spreads load evenly over GPUs, and as far as that leaves a choice over nodes, with copies of the experts that carry
/// most, and never two copies of one expert on a GPU; takes any shape. All slots are used, but those of a GPU beyond
/// the number of experts. A layer without any load is spread as if all experts were used alike. Errors: fewer slots
/// than experts, bad loads, groups that do not divide the experts or do not fit on the nodes, no room for copies on
/// that many nodes.
[[nodiscard]] inline result<placement> try_balanced(const load_view& loads, const topology& t,
                                                    const balanced_options& options = {}) {
  if (auto ok = detail::check_balanced(loads, t, options); !ok) return ok.error();
  const std::size_t group_size = loads.experts / options.groups;
  const std::vector<std::uint32_t> first_group = detail::first_groups(t, group_size);
  placement out(loads.layers, loads.experts, t.slots());
  const std::vector<std::uint32_t> first_slot = detail::first_slots(t);
  const std::vector<double> speeds = detail::speeds_of(t);
  detail::load_balancer balancer(first_slot, speeds);
  detail::node_spreader spreader(t, loads.experts, options.nodes_per_expert);
  detail::bin_packer group_packer;
  std::vector<double> load(loads.experts);
  std::vector<detail::pack_item> group_items(options.groups);
  std::vector<std::uint32_t> group_of_room(first_group.back());
  std::vector<std::uint32_t> experts;
  std::vector<double> gpu_load;
  for (std::size_t l = 0; l < loads.layers; ++l) {
    double heaviest = 0;
    for (const double value : loads.layer(l)) heaviest = std::max(heaviest, value);
    // as shares of the heaviest, so that no sum of them overflows
    for (std::size_t e = 0; e < load.size(); ++e) load[e] = heaviest > 0 ? loads.layer(l)[e] / heaviest : 1.0;
    if (options.groups == 1) {
      experts.resize(loads.experts);
      for (std::size_t e = 0; e < loads.experts; ++e) experts[e] = static_cast<std::uint32_t>(e);
      balancer.solve(load, experts, 0, t.gpus(), out.layer(l),
                     options.copies_per_layer.empty() ? ~std::size_t{0} : options.copies_per_layer[l]);
      gpu_load.assign(balancer.gpu_loads().begin(), balancer.gpu_loads().end());
      detail::level_nodes(t, gpu_load, out.layer(l));
      if (!spreader.spread(out.layer(l), load)) {
        return error(errc::infeasible, {"balanced: expected room for copies of each expert on ",
                                        options.nodes_per_expert, " nodes, found none in layer ", l});
      }
      continue;
    }
    for (std::size_t g = 0; g < options.groups; ++g) {
      group_items[g] = {0.0, static_cast<std::uint32_t>(g)};
      for (std::size_t i = 0; i < group_size; ++i) group_items[g].weight += load[g * group_size + i];
    }
    group_packer.pack(group_items, first_group, group_of_room, 4 * t.nodes());
    for (std::size_t n = 0; n < t.nodes(); ++n) {
      experts.clear();
      for (std::size_t r = first_group[n]; r < first_group[n + 1]; ++r) {
        if (group_of_room[r] == detail::bin_packer::nothing) continue;
        for (std::size_t i = 0; i < group_size; ++i) {
          experts.push_back(static_cast<std::uint32_t>(group_of_room[r] * group_size + i));
        }
      }
      if (!experts.empty()) {
        balancer.solve(load, experts, t.first_gpu(n), t.first_gpu(n) + t.gpus_on_node(n), out.layer(l));
      }
    }
  }
  return out;
}
[[nodiscard]] inline placement balanced(const load_view& loads, const topology& t,
                                        const balanced_options& options = {}) {
  return try_balanced(loads, t, options).value();
}

/// How to share `copies` beyond one per expert out among layers, where memory and not slots is what is short: each to
/// the layer in which the busiest GPU gains most by it. Returns copies[layers], for balanced_options. Errors: bad
/// loads, fewer slots than experts. (CRAFT, expert replication by marginal gain)
[[nodiscard]] inline result<std::vector<std::size_t>> try_copies_by_gain(const load_view& loads, const topology& t,
                                                                         std::size_t copies) {
  if (auto ok = try_validate(loads); !ok) return ok.error();
  if (auto ok = detail::check_place_shape(loads.layers, loads.experts, t); !ok) return ok.error();
  struct step {
    double gain;  // per copy
    std::size_t layer, from, to;
  };
  std::vector<step> steps;
  for (std::size_t l = 0; l < loads.layers; ++l) {
    const std::vector<double> reached = detail::least_imbalances(loads.layer(l), t);
    for (std::size_t c = 0; c + 1 < reached.size();) {  // several at once, where one alone gains nothing
      std::size_t best = c + 1;
      const auto gain = [&](std::size_t to) { return (reached[c] - reached[to]) / static_cast<double>(to - c); };
      for (std::size_t to = c + 2; to < reached.size(); ++to) best = gain(to) > gain(best) ? to : best;
      if (!(gain(best) > 0)) break;
      steps.push_back({gain(best), l, c, best});
      c = best;
    }
  }
  std::stable_sort(steps.begin(), steps.end(), [](const step& a, const step& b) { return a.gain > b.gain; });
  std::vector<std::size_t> out(loads.layers, 0);
  for (const step& s : steps) {
    if (out[s.layer] != s.from || s.to - s.from > copies) continue;  // a layer's steps gain less and less
    out[s.layer] = s.to;
    copies -= s.to - s.from;
  }
  return out;
}
[[nodiscard]] inline std::vector<std::size_t> copies_by_gain(const load_view& loads, const topology& t,
                                                             std::size_t copies) {
  return try_copies_by_gain(loads, t, copies).value();
}

/// Rearranges the experts of each node over its GPUs so that GPUs carry alike for their speed, given what each slot of
/// `p` carries: load_of_slot[layers, slots]; no expert changes its node. A node whose copies cannot be kept apart stays
/// as it was. Preconditions: `p` is valid on `t`, loads are finite and 0 or more.
inline void balance_gpus(placement& p, const topology& t, std::span<const double> load_of_slot) {
  TETROMINO_EXPECTS(p.slots() == t.slots() && load_of_slot.size() == p.slot_to_expert().size(),
                    "balance_gpus: the placement's slots are the topology's, with a load for each slot of each layer",
                    p.slots(), t.slots(), load_of_slot.size(), p.slot_to_expert().size());
  const std::vector<std::uint32_t> first_slot = detail::first_slots(t);
  const std::vector<double> speeds = detail::speeds_of(t);
  detail::bin_packer packer;
  std::vector<detail::pack_item> items;
  std::vector<std::uint32_t> item_of_slot;
  for (std::size_t l = 0; l < p.layers(); ++l) {
    for (std::size_t n = 0; n < t.nodes(); ++n) {
      const std::size_t first = t.first_slot_of_node(n), slots = t.slots_on_node(n);
      const std::span<std::int32_t> row = p.layer(l).subspan(first, slots);
      items.clear();
      for (std::size_t s = 0; s < slots; ++s) {
        if (row[s] != empty_slot) {
          items.push_back({load_of_slot[l * p.slots() + first + s], static_cast<std::uint32_t>(row[s])});
        }
      }
      item_of_slot.resize(slots);
      const std::size_t gpus = t.gpus_on_node(n);
      const auto bins = std::span<const std::uint32_t>(first_slot).subspan(t.first_gpu(n), gpus + 1);
      const std::span<const double> here =
          speeds.empty() ? std::span<const double>() : std::span(speeds).subspan(t.first_gpu(n), gpus);
      if (!packer.pack(items, bins, item_of_slot, 4 * gpus, here).empty()) continue;
      for (std::size_t s = 0; s < slots; ++s) {
        const std::uint32_t item = item_of_slot[s];
        row[s] = item == detail::bin_packer::nothing ? empty_slot : static_cast<std::int32_t>(items[item].expert);
      }
    }
  }
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
