#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"   // tetromino::result, tetromino::error
#include "placement.hpp"  // placement, replica_index
#include "topology.hpp"   // topology

#include <algorithm>  // std::copy, std::fill, std::find, std::max, std::max_element, std::stable_sort, std::swap_ranges
#include <cmath>      // std::isfinite
#include <cstddef>    // std::ptrdiff_t, std::size_t
#include <cstdint>    // std::int32_t, std::uint32_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <utility>    // std::move, std::swap
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// One expert's weights on their way to a GPU that lacks them.
struct expert_move {
  std::uint32_t expert;
  std::uint32_t from_gpu;
  std::uint32_t to_gpu;
  std::uint32_t to_slot;

  friend TETROMINO_ABI bool operator==(const expert_move&, const expert_move&) = default;
};

/// Moves that run at the same time: each GPU sends at most once, receives at most once, and talks to one peer only.
struct migration_round {
  std::vector<expert_move> moves;
};

/// What one layer has to do. Its rounds fill buffers beside the slots in use; when they are done, the layer switches to
/// the next placement at once. So no round waits for another layer, and tokens are served all the while.
struct layer_migration {
  std::size_t layer = 0;
  std::size_t buffers_per_gpu = 0;  ///< most experts that one GPU receives
  std::vector<migration_round> rounds;
};

/// An expert that no GPU holds any more: its weights come from elsewhere (host memory, disk).
struct missing_expert {
  std::uint32_t layer;
  std::uint32_t expert;
  std::uint32_t to_gpu;
  std::uint32_t to_slot;

  friend TETROMINO_ABI bool operator==(const missing_expert&, const missing_expert&) = default;
};

/// How to get from one placement to the next.
struct migration {
  std::vector<layer_migration> layers;  ///< those with anything to move
  std::vector<missing_expert> missing;  ///< where each expert without any copy goes first; further copies are moves
  std::size_t moves = 0;
  double bytes_between_nodes = 0;
  double bytes_inside_nodes = 0;
  double seconds = 0;  ///< all rounds of all layers one after the other, each as long as its slowest move

  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI migration() = default;
  TETROMINO_ABI migration(const migration&) = default;
  TETROMINO_ABI migration(migration&&) = default;
  TETROMINO_ABI migration& operator=(const migration&) = default;
  TETROMINO_ABI migration& operator=(migration&&) = default;
};

namespace detail::inline TETROMINO_ISA {

[[nodiscard]] inline result<void> check_shapes(const char* verb, const placement& current, const placement& next,
                                               const topology& t) {
  if (current.layers() != next.layers() || current.experts() != next.experts() || current.slots() != next.slots()) {
    return error(errc::shape_mismatch, {verb, ": expected placements of one shape, got ", current.layers(),
                                        " layers × ", current.experts(), " experts in ", current.slots(),
                                        " slots, then ", next.layers(), " × ", next.experts(), " in ", next.slots()});
  }
  if (next.slots() != t.slots()) {
    return error(errc::shape_mismatch,
                 {verb, ": expected placements of ", t.slots(), " slots as in the topology, got ", next.slots()});
  }
  return {};
}

[[nodiscard]] inline result<void> check_migration(const placement& current, const placement& next, const topology& t) {
  if (auto ok = check_shapes("migrate", current, next, t); !ok) return ok;
  if (auto ok = try_validate(current, t, {.one_copy_per_gpu = false, .each_expert = false}); !ok) return ok;
  return try_validate(next, t, {.one_copy_per_gpu = false});
}

// Experts of both rows, as multisets.
[[nodiscard]] inline std::size_t common_experts(std::span<const std::int32_t> a, std::span<const std::int32_t> b,
                                                std::vector<std::int32_t>& scratch) {
  scratch.assign(b.begin(), b.end());
  std::size_t common = 0;
  for (const std::int32_t e : a) {
    const auto found = e == empty_slot ? scratch.end() : std::find(scratch.begin(), scratch.end(), e);
    if (found == scratch.end()) continue;
    *found = empty_slot;
    ++common;
  }
  return common;
}

// Splits the moves of a layer into rounds: again and again as many as can run at once, those of the busiest GPUs first.
[[nodiscard]] inline std::vector<migration_round> into_rounds(std::vector<expert_move> moves, std::size_t gpus) {
  constexpr std::uint32_t alone = 0xFFFF'FFFF;
  std::vector<std::size_t> left(gpus, 0);
  for (const expert_move& m : moves) {
    ++left[m.from_gpu];
    ++left[m.to_gpu];
  }
  std::vector<migration_round> rounds;
  std::vector<std::uint32_t> peer(gpus), sends(gpus), receives(gpus);
  std::vector<expert_move> later;
  while (!moves.empty()) {
    std::stable_sort(moves.begin(), moves.end(), [&](const expert_move& a, const expert_move& b) {
      const std::size_t busy_a = std::max(left[a.from_gpu], left[a.to_gpu]);
      const std::size_t busy_b = std::max(left[b.from_gpu], left[b.to_gpu]);
      if (busy_a != busy_b) return busy_a > busy_b;
      return left[a.from_gpu] + left[a.to_gpu] > left[b.from_gpu] + left[b.to_gpu];
    });
    std::fill(peer.begin(), peer.end(), alone);
    std::fill(sends.begin(), sends.end(), 0);
    std::fill(receives.begin(), receives.end(), 0);
    migration_round round;
    later.clear();
    for (const expert_move& m : moves) {
      const bool strangers = peer[m.from_gpu] == alone && peer[m.to_gpu] == alone;
      const bool partners = peer[m.from_gpu] == m.to_gpu && sends[m.from_gpu] == 0 && receives[m.to_gpu] == 0;
      if (!strangers && !partners) {
        later.push_back(m);
        continue;
      }
      peer[m.from_gpu] = m.to_gpu;
      peer[m.to_gpu] = m.from_gpu;
      sends[m.from_gpu] = receives[m.to_gpu] = 1;
      round.moves.push_back(m);
    }
    for (const expert_move& m : round.moves) {
      --left[m.from_gpu];
      --left[m.to_gpu];
    }
    rounds.push_back(std::move(round));
    moves.swap(later);
  }
  return rounds;
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// `next` with what it leaves open renamed so that it looks like `current`: GPUs of a node that have equally many slots
/// are exchanged, and experts change slots on a GPU, where that lets more experts stay where they are. No expert
/// changes its node, and what shares a GPU goes on to. Errors: placements of different shapes, or not of `t`'s slots.
[[nodiscard]] inline result<placement> try_align(const placement& current, placement next, const topology& t) {
  if (auto ok = detail::check_shapes("align", current, next, t); !ok) return ok.error();
  std::vector<std::int32_t> scratch;
  for (std::size_t l = 0; l < next.layers(); ++l) {
    const std::span<std::int32_t> row = next.layer(l);
    const std::span<const std::int32_t> old = current.layer(l);
    const auto of_gpu = [&](auto r, std::size_t g) { return r.subspan(t.first_slot(g), t.slots_on_gpu(g)); };
    const auto stay = [&](std::size_t x, std::size_t y) {
      return detail::common_experts(of_gpu(std::span<const std::int32_t>(row), x), of_gpu(old, y), scratch);
    };
    const auto exchange_where_better = [&](std::size_t a, std::size_t b) {
      if (t.slots_on_gpu(a) != t.slots_on_gpu(b) || stay(a, b) + stay(b, a) <= stay(a, a) + stay(b, b)) return false;
      const std::span<std::int32_t> on_a = of_gpu(row, a), on_b = of_gpu(row, b);
      std::swap_ranges(on_a.begin(), on_a.end(), on_b.begin());
      return true;
    };
    for (std::size_t n = 0; n < t.nodes(); ++n) {
      const std::size_t first = t.first_gpu(n), last = first + t.gpus_on_node(n);
      for (bool better = true; better;) {  // each exchange adds experts that stay, so this ends
        better = false;
        for (std::size_t a = first; a < last; ++a) {
          for (std::size_t b = a + 1; b < last; ++b) better = exchange_where_better(a, b) || better;
        }
      }
    }
    for (std::size_t g = 0; g < t.gpus(); ++g) {
      const std::span<std::int32_t> mine = of_gpu(row, g);
      const std::span<const std::int32_t> before = of_gpu(old, g);
      for (std::size_t s = 0; s < mine.size(); ++s) {
        if (before[s] == empty_slot || mine[s] == before[s]) continue;
        for (std::size_t other = 0; other < mine.size(); ++other) {
          if (mine[other] == before[s] && mine[other] != before[other]) {
            std::swap(mine[s], mine[other]);
            break;
          }
        }
      }
    }
  }
  return next;
}
[[nodiscard]] inline placement align(const placement& current, placement next, const topology& t) {
  return try_align(current, std::move(next), t).value();
}

}  // namespace TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

/// Finds out which weights have to get where, layer by layer.
class move_planner {
 public:
  move_planner(const placement& current, const placement& next, const topology& t)
      : current_(current), next_(next), topology_(t), where_(current), sends_(t.gpus()), receives_(t.gpus()) {}

  /// The moves of a layer; experts without a copy are added to `missing`.
  [[nodiscard]] std::vector<expert_move> moves(std::size_t l, std::vector<missing_expert>& missing) {
    std::fill(sends_.begin(), sends_.end(), 0);
    std::fill(receives_.begin(), receives_.end(), 0);
    arrived_at_.assign(current_.experts(), nowhere);
    std::vector<expert_move> moves;
    for (std::size_t g = 0; g < topology_.gpus(); ++g) {
      const std::size_t first = topology_.first_slot(g), count = topology_.slots_on_gpu(g);
      const auto before = current_.layer(l).subspan(first, count);
      held_.assign(before.begin(), before.end());
      for (std::size_t s = first; s < first + count; ++s) {
        const std::int32_t e = next_.layer(l)[s];
        if (e == empty_slot || std::find(held_.begin(), held_.end(), e) != held_.end()) continue;
        held_.push_back(e);  // a second copy on this GPU comes from the first
        const auto expert = static_cast<std::uint32_t>(e);
        const auto to = static_cast<std::uint32_t>(g), slot = static_cast<std::uint32_t>(s);
        const std::uint32_t from = source(l, expert, to);
        if (from == nowhere) {
          arrived_at_[expert] = to;
          missing.push_back({static_cast<std::uint32_t>(l), expert, to, slot});
          continue;
        }
        ++sends_[from];
        ++receives_[to];
        moves.push_back({expert, from, to, slot});
      }
    }
    return moves;
  }
  /// Most experts that one GPU receives.
  [[nodiscard]] std::size_t most_received() const { return *std::max_element(receives_.begin(), receives_.end()); }

 private:
  static constexpr std::uint32_t nowhere = 0xFFFF'FFFF;

  // A GPU of the same node if one has it, else of the nearest; among several, the one that sends least.
  [[nodiscard]] std::uint32_t source(std::size_t l, std::uint32_t expert, std::uint32_t to) const {
    const std::size_t node = topology_.node_of_gpu(to);
    const auto distance = [&](std::uint32_t gpu) {
      const std::size_t other = topology_.node_of_gpu(gpu);
      return other == node ? 0.0 : topology_.node_cost(other, node);
    };
    std::uint32_t from = arrived_at_[expert];
    for (const std::uint32_t slot : where_.slots_of(l, expert)) {
      const auto candidate = static_cast<std::uint32_t>(topology_.gpu_of_slot(slot));
      if (from == nowhere) {
        from = candidate;
        continue;
      }
      const double there = distance(candidate), now = distance(from);
      if (there != now ? there < now : sends_[candidate] < sends_[from]) from = candidate;
    }
    return from;
  }

  const placement& current_;
  const placement& next_;
  const topology& topology_;
  replica_index where_;
  std::vector<std::size_t> sends_, receives_;  // [gpus]
  std::vector<std::uint32_t> arrived_at_;      // [experts] GPU that gets a missing one from elsewhere
  std::vector<std::int32_t> held_;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Plans the way from `current` to `next`, layer by layer. An expert that its GPU holds already, in whatever slot, does
/// not move. Each other comes from a GPU of the same node if one has it, else of the nearest node; among several, from
/// the one that sends least. `current` may lack experts (see carry_over): those are named, to be had from elsewhere
/// before the rounds of their layer. A GPU without an expert in `current` is never a source, one without in `next`
/// never a target. `bytes_per_expert` is the size of one expert's weights in one layer. Rounds are packed greedily:
/// never more than twice as many as the busiest GPU has moves. Errors: placements of different shapes or not valid on
/// `t` (two copies on one GPU are accepted), a size that is negative or not finite.
[[nodiscard]] inline result<migration> try_migrate(const placement& current, const placement& next, const topology& t,
                                                   double bytes_per_expert) {
  if (auto ok = detail::check_migration(current, next, t); !ok) return ok.error();
  if (!std::isfinite(bytes_per_expert) || bytes_per_expert < 0) {
    return error(errc::invalid_argument, {"migrate: expected 0 or more bytes per expert, got ", bytes_per_expert});
  }
  migration out;
  detail::move_planner planner(current, next, t);
  for (std::size_t l = 0; l < current.layers(); ++l) {
    std::vector<expert_move> moves = planner.moves(l, out.missing);
    if (moves.empty()) continue;
    out.moves += moves.size();
    layer_migration layer;
    layer.layer = l;
    layer.buffers_per_gpu = planner.most_received();
    layer.rounds = detail::into_rounds(std::move(moves), t.gpus());
    for (const migration_round& round : layer.rounds) {
      double slowest = 0;
      for (const expert_move& m : round.moves) {
        const std::size_t source = t.node_of_gpu(m.from_gpu), target = t.node_of_gpu(m.to_gpu);
        const bool inside = source == target;
        const link& way = inside ? t.links().inside : t.links().between;
        (inside ? out.bytes_inside_nodes : out.bytes_between_nodes) += bytes_per_expert;
        slowest = std::max(slowest,
                           way.latency_seconds + bytes_per_expert * t.node_cost(source, target) / way.bytes_per_second);
      }
      out.seconds += slowest;
    }
    out.layers.push_back(std::move(layer));
  }
  return out;
}
[[nodiscard]] inline migration migrate(const placement& current, const placement& next, const topology& t,
                                       double bytes_per_expert) {
  return try_migrate(current, next, t, bytes_per_expert).value();
}

}  // namespace TETROMINO_ISA

/// What a migration may move, in bytes. A way between nodes costs more than one inside, so each has its own limit.
struct migration_budget {
  double bytes_between_nodes = std::numeric_limits<double>::infinity();
  double bytes_inside_nodes = std::numeric_limits<double>::infinity();
};

/// What a budget buys of the way from one placement to the next.
struct partial_migration {
  placement reached;                     ///< to serve under when `way` is done: each layer is that of either placement
  migration way;                         ///< from the current placement to `reached`
  std::vector<std::size_t> layers_left;  ///< that differ from the next placement still, in the order of their worth
  migration_budget least_left{0, 0};     ///< what the layer left takes that takes least: a budget that moves something

  TETROMINO_ABI partial_migration(placement where, migration from_current, std::vector<std::size_t> left = {},
                                  const migration_budget& least = {0, 0})
      : reached(std::move(where)), way(std::move(from_current)), layers_left(std::move(left)), least_left(least) {}
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI partial_migration(const partial_migration&) = default;
  TETROMINO_ABI partial_migration(partial_migration&&) = default;
  TETROMINO_ABI partial_migration& operator=(const partial_migration&) = default;
  TETROMINO_ABI partial_migration& operator=(partial_migration&&) = default;
};

inline namespace TETROMINO_ISA {

/// The part of the way from `current` to `next` that a budget allows. A layer is migrated whole or not at all, those
/// first that gain most for each byte between nodes: `gain_of_layer` [layers] is what a layer is worth, such as the
/// visits of other nodes that it saves (cost_report::visits_of_layer before, less those after); without it all are
/// worth the same, so that most layers are reached. Layers in which `current` lacks experts are migrated whatever that
/// takes. A second call from `reached` goes on. A budget below `least_left` moves nothing, however often it is given:
/// save it up, or give at least that. Errors: as try_migrate; a budget that is negative or NaN, gains of
/// another number or not finite.
[[nodiscard]] inline result<partial_migration> try_migrate_within(const placement& current, placement next,
                                                                  const topology& t, double bytes_per_expert,
                                                                  const migration_budget& budget,
                                                                  std::span<const double> gain_of_layer = {}) {
  auto whole = try_migrate(current, next, t, bytes_per_expert);
  if (!whole) return whole.error();
  if (!(budget.bytes_between_nodes >= 0) || !(budget.bytes_inside_nodes >= 0)) {
    return error(errc::invalid_argument,
                 {"migrate: expected a budget of 0 or more bytes, got ", budget.bytes_between_nodes, " between and ",
                  budget.bytes_inside_nodes, " inside nodes"});
  }
  if (!gain_of_layer.empty() && gain_of_layer.size() != current.layers()) {
    return error(errc::shape_mismatch,
                 {"migrate: expected a gain for each of ", current.layers(), " layers, got ", gain_of_layer.size()});
  }
  struct of_layer {
    std::size_t layer;
    double between, inside, gain;
    bool must;
    double worth;  // gain for each byte between nodes; without any, without bound, but for those that gain nothing
  };
  std::vector<of_layer> order;
  for (const layer_migration& l : whole->layers) {
    of_layer cost{l.layer, 0, 0, gain_of_layer.empty() ? 1 : gain_of_layer[l.layer], false, 0};
    if (!std::isfinite(cost.gain)) {
      return error(errc::invalid_argument, {"migrate: expected finite gains, got ", cost.gain, " of layer ", l.layer});
    }
    for (const migration_round& round : l.rounds) {
      for (const expert_move& m : round.moves) {
        (t.node_of_gpu(m.from_gpu) == t.node_of_gpu(m.to_gpu) ? cost.inside : cost.between) += bytes_per_expert;
      }
    }
    if (cost.gain != 0) cost.worth = cost.gain / cost.between;
    for (const missing_expert& m : whole->missing) cost.must = cost.must || m.layer == l.layer;
    order.push_back(cost);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const of_layer& a, const of_layer& b) { return a.must != b.must ? a.must : a.worth > b.worth; });
  double between = 0, inside = 0;
  std::vector<std::size_t> left;
  migration_budget least;
  for (const of_layer& l : order) {
    if (l.must ||
        (between + l.between <= budget.bytes_between_nodes && inside + l.inside <= budget.bytes_inside_nodes)) {
      between += l.between;
      inside += l.inside;
      continue;
    }
    std::copy(current.layer(l.layer).begin(), current.layer(l.layer).end(), next.layer(l.layer).begin());
    left.push_back(l.layer);
    if (l.between < least.bytes_between_nodes ||
        (l.between == least.bytes_between_nodes && l.inside < least.bytes_inside_nodes)) {
      least = {l.between, l.inside};
    }
  }
  if (left.empty()) return partial_migration(std::move(next), std::move(*whole));
  auto way = try_migrate(current, next, t, bytes_per_expert);
  if (!way) return way.error();
  return partial_migration(std::move(next), std::move(*way), std::move(left), least);
}
[[nodiscard]] inline partial_migration migrate_within(const placement& current, placement next, const topology& t,
                                                      double bytes_per_expert, const migration_budget& budget,
                                                      std::span<const double> gain_of_layer = {}) {
  return try_migrate_within(current, std::move(next), t, bytes_per_expert, budget, gain_of_layer).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
