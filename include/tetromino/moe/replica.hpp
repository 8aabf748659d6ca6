#pragma once

#include "../detail/macros_off.hpp"

#include "../config.hpp"                 // TETROMINO_EXPECTS
#include "ids.hpp"                       // id_array, no_expert
#include "placement.hpp"                 // placement
#include "search/copies/copy_table.hpp"  // detail::copy_table
#include "topology.hpp"                  // topology

#include <algorithm>  // std::fill, std::max, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint32_t, std::uint64_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// Which copy of a replicated expert serves a token: token by token (replica_chooser), or for all tokens of a step at
/// once (step_chooser).
enum class replica_choice : std::uint8_t {
  nearest,          ///< one on the token's node; else on a node the token visits anyway; else on the nearest node, of
                    ///< several the least loaded
  even,             ///< each copy in turn, wherever it is: what DeepSeek EPLB assumes
  least_loaded,     ///< the copy whose GPU has served least lately, wherever it is
  fewest_nodes,     ///< as `nearest`, but the next node visited is the one that holds most of what is still open, for
                    ///< what the way there costs
  step_pairs,       ///< so that the busiest GPU of the step gets the fewest (token, expert) pairs there can be, for its
                    ///< speed
  step_activation,  ///< so that the busiest GPU of the step reads the weights of the fewest experts there can be, for
                    ///< its speed: what decoding waits for (arXiv 2512.09277 approximates it)
};

inline namespace TETROMINO_ISA {

/// True where the choice is made for a whole step.
[[nodiscard]] constexpr bool is_step_choice(replica_choice c) noexcept {
  return c == replica_choice::step_pairs || c == replica_choice::step_activation;
}

}  // namespace TETROMINO_ISA

/// How copies are chosen.
struct replica_options {
  replica_choice choice = replica_choice::nearest;

  /// With `fewest_nodes`, a pair leaves a node that has served more than node_limit × the mean of its layer lately, for
  /// another copy on a node that the token visits anyway. 0: none does.
  double node_limit = 0;
  /// With `nearest` and `fewest_nodes`, the same for GPUs: a pair leaves one above gpu_limit × the mean for the one
  /// that served least of those on nodes visited anyway. 0: none does.
  double gpu_limit = 0;
  /// What "lately" is: after so many tokens of a layer, all that it served counts half. 0: nothing is ever forgotten,
  /// and a burst is hidden by the hours before it.
  std::size_t window_tokens = 4096;
};

/// What replica_chooser and step_chooser say where nobody serves.
inline constexpr std::uint32_t no_gpu = 0xFFFF'FFFF;

/// Chooses, token by token, the GPU that serves each (token, expert) pair, and counts the pairs per GPU. What "least
/// loaded" means follows from the tokens before, so the outcome depends on the order of tokens, and on nothing else.
class replica_chooser {
 public:
  /// Preconditions: `p` is valid on `t` (two copies on one GPU are fine); the choice is none of a whole step. Memory: 4
  /// bytes per copy and 16 per layer and GPU; nothing is allocated afterwards, but for ids of other types than
  /// uint16_t, which are kept as such: 2 bytes for each id of the largest call.
  TETROMINO_ABI replica_chooser(const placement& p, const topology& t, const replica_options& options = {})
      : options_(options), copies_(p, t), recent_on_gpu_(p.layers() * t.gpus(), 0) {
    TETROMINO_EXPECTS(!is_step_choice(options.choice), "replica_chooser: a choice for single tokens");
    pairs_on_gpu_.assign(recent_on_gpu_.size(), 0);
    recent_.assign(p.layers(), 0);
    tokens_.assign(p.layers(), 0);
    if (options.choice == replica_choice::even) turn_.assign(p.layers() * p.experts(), 0);
    if (options.choice == replica_choice::fewest_nodes) {
      recent_on_node_.assign(p.layers() * t.nodes(), 0);
      open_on_node_.assign(t.nodes(), 0);
    }
    node_costs_.assign(t.node_costs().begin(), t.node_costs().end());
    speed_of_node_ = detail::node_speeds(t);
    for (const double speed : speed_of_node_) speed_of_gpus_ += speed;
    visited_node_.assign(t.nodes(), 0);
    visited_gpu_.assign(t.gpus(), 0);
  }

  /// Writes into gpus[i] the GPU that serves ids[i], for one token in one layer; no_gpu for −1 (or the largest number
  /// of an unsigned type, such as no_expert). The token is on `home_gpu`. Preconditions: gpus.size() == ids.size();
  /// layer, ids and home_gpu in range.
  template <id_array Ids = std::span<const std::uint16_t>>
  TETROMINO_ABI void choose(std::size_t layer, const Ids& ids, std::uint32_t home_gpu, std::span<std::uint32_t> gpus) {
    const std::span<const std::uint16_t> experts =
        detail::narrow_ids(ids, copies_.experts(), "replica_chooser: expert number out of range", ids_);
    TETROMINO_EXPECTS(gpus.size() == experts.size() && home_gpu < copies_.gpus() && layer < copies_.layers(),
                      "replica_chooser: a GPU for each expert, layer and home GPU in range", gpus.size(),
                      experts.size(), home_gpu, copies_.gpus(), layer, copies_.layers());
    std::uint64_t* const load = recent_on_gpu_.data() + layer * copies_.gpus();
    ++now_;
    bool open = false;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (experts[i] == no_expert) {
        gpus[i] = no_gpu;
        continue;
      }
      const std::span<const std::uint32_t> from = copies_.gpus_of(layer, experts[i]);
      if (from.size() == 1) {
        gpus[i] = from[0];
        visit(gpus[i], load);
      } else {
        gpus[i] = undecided;
        open = true;
      }
    }
    if (open) choose_copies(layer, experts, home_gpu, gpus, load);
    count(layer, experts, gpus, load, open);
  }

  /// Pairs served so far: [layers, GPUs].
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint64_t> pairs_on_gpu() const noexcept { return pairs_on_gpu_; }

 private:
  static constexpr std::uint32_t undecided = no_gpu - 1;

  TETROMINO_ABI void visit(std::uint32_t gpu, std::uint64_t* load) {
    ++load[gpu];
    visited_gpu_[gpu] = now_;
    visited_node_[copies_.node_of(gpu)] = now_;
  }

  // Relieves what is above its limit, adds the token's pairs up, and forgets.
  TETROMINO_ABI void count(std::size_t layer, std::span<const std::uint16_t> experts, std::span<std::uint32_t> gpus,
                           std::uint64_t* load, bool open) {
    for (const std::uint32_t gpu : gpus) recent_[layer] += gpu == no_gpu ? 0U : 1U;
    const bool keeps_near =
        options_.choice == replica_choice::nearest || options_.choice == replica_choice::fewest_nodes;
    if (open && keeps_near && options_.gpu_limit > 0) relieve_gpus(layer, experts, gpus, load);
    if (options_.choice == replica_choice::fewest_nodes) {
      if (open && options_.node_limit > 0) relieve_nodes(layer, experts, gpus, load);
      for (const std::uint32_t gpu : gpus) {
        if (gpu != no_gpu) ++recent_on_node_[layer * visited_node_.size() + copies_.node_of(gpu)];
      }
    }
    for (const std::uint32_t gpu : gpus) {
      if (gpu != no_gpu) ++pairs_on_gpu_[layer * copies_.gpus() + gpu];
    }
    if (options_.window_tokens == 0 || ++tokens_[layer] < options_.window_tokens) return;
    tokens_[layer] = 0;
    recent_[layer] /= 2;
    const auto halve = [&](std::vector<std::uint64_t>& counts, std::size_t units) {
      for (std::size_t i = 0; i < units; ++i) counts[layer * units + i] /= 2;
    };
    halve(recent_on_gpu_, copies_.gpus());
    if (!recent_on_node_.empty()) halve(recent_on_node_, visited_node_.size());
  }

  TETROMINO_ABI void choose_copies(std::size_t layer, std::span<const std::uint16_t> experts, std::uint32_t home_gpu,
                                   std::span<std::uint32_t> gpus, std::uint64_t* load) {
    if (options_.choice == replica_choice::even || options_.choice == replica_choice::least_loaded) {
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (gpus[i] != undecided) continue;
        const std::span<const std::uint32_t> from = copies_.gpus_of(layer, experts[i]);
        if (options_.choice == replica_choice::even) {
          gpus[i] = from[turn_[layer * copies_.experts() + experts[i]]++ % from.size()];
        } else {
          gpus[i] = least_loaded(from, load, [](std::uint32_t) { return true; });
        }
        visit(gpus[i], load);
      }
      return;
    }
    const std::uint32_t home_node = copies_.node_of(home_gpu);
    const auto pass = [&](const auto& accepted) {
      bool open = false;
      for (std::size_t i = 0; i < experts.size(); ++i) {
        if (gpus[i] != undecided) continue;
        const std::uint32_t gpu = best_of(copies_.gpus_of(layer, experts[i]), home_gpu, load, accepted);
        if (gpu == undecided) {
          open = true;
          continue;
        }
        gpus[i] = gpu;
        visit(gpu, load);
      }
      return open;
    };
    const auto at_home = [&](std::uint32_t gpu) { return copies_.node_of(gpu) == home_node; };
    const auto on_visited_node = [&](std::uint32_t gpu) { return visited_node_[copies_.node_of(gpu)] == now_; };
    if (!pass(at_home) || !pass(on_visited_node)) return;
    if (options_.choice == replica_choice::fewest_nodes) {
      do {
        visited_node_[next_node(layer, experts, gpus, home_node)] = now_;
      } while (pass(on_visited_node));
      return;
    }
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (gpus[i] != undecided) continue;
      const std::span<const std::uint32_t> from = copies_.gpus_of(layer, experts[i]);
      std::uint32_t gpu = best_of(from, home_gpu, load, on_visited_node);
      if (gpu == undecided) gpu = nearest(from, home_node, load);
      gpus[i] = gpu;
      visit(gpu, load);
    }
  }

  // What the way from one node to another costs.
  [[nodiscard]] TETROMINO_ABI double way(std::size_t from, std::size_t to) const {
    return node_costs_.empty() ? 1.0 : node_costs_[from * visited_node_.size() + to];
  }

  // How long a node takes for what it serves; served[nodes].
  [[nodiscard]] TETROMINO_ABI double node_busy(std::size_t node, const std::uint64_t* served) const {
    return static_cast<double>(served[node]) / speed_of_node_[node];
  }

  // The node that holds most of the experts still open for what the way there costs; the one that is busy for the
  // shortest time among equals.
  [[nodiscard]] TETROMINO_ABI std::size_t next_node(std::size_t layer, std::span<const std::uint16_t> experts,
                                                    std::span<const std::uint32_t> gpus, std::size_t home_node) {
    std::fill(open_on_node_.begin(), open_on_node_.end(), 0);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (gpus[i] != undecided) continue;
      std::uint32_t last = undecided;  // copies are in order of slots, so those of a node follow each other
      for (const std::uint32_t gpu : copies_.gpus_of(layer, experts[i])) {
        if (copies_.node_of(gpu) != last) ++open_on_node_[copies_.node_of(gpu)];
        last = copies_.node_of(gpu);
      }
    }
    const std::uint64_t* const served = recent_on_node_.data() + layer * open_on_node_.size();
    std::size_t best = 0;
    while (open_on_node_[best] == 0) ++best;
    for (std::size_t n = best + 1; n < open_on_node_.size(); ++n) {
      const double worth = open_on_node_[n] * way(home_node, best), most = open_on_node_[best] * way(home_node, n);
      if (worth > most || (worth == most && node_busy(n, served) < node_busy(best, served))) best = n;
    }
    return best;
  }

  // Takes pairs off nodes above the limit, to the visited node with a copy that is busy for the shortest time.
  TETROMINO_ABI void relieve_nodes(std::size_t layer, std::span<const std::uint16_t> experts,
                                   std::span<std::uint32_t> gpus, std::uint64_t* load) {
    const std::uint64_t* const served = recent_on_node_.data() + layer * visited_node_.size();
    const double most = options_.node_limit * static_cast<double>(recent_[layer]) / speed_of_gpus_;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (gpus[i] == no_gpu || node_busy(copies_.node_of(gpus[i]), served) <= most) continue;
      const std::uint32_t from = copies_.node_of(gpus[i]);
      std::uint32_t best = gpus[i];
      for (const std::uint32_t gpu : copies_.gpus_of(layer, experts[i])) {
        const std::uint32_t node = copies_.node_of(gpu), chosen = copies_.node_of(best);
        if (visited_node_[node] != now_ || node == from) continue;
        if (node_busy(node, served) < node_busy(chosen, served) ||
            (node == chosen && busy(gpu, load) < busy(best, load))) {
          best = gpu;
        }
      }
      move(gpus[i], best, load);
    }
  }
  // Takes pairs off GPUs above the limit, to the GPU on a visited node that has served least of those with a copy.
  TETROMINO_ABI void relieve_gpus(std::size_t layer, std::span<const std::uint16_t> experts,
                                  std::span<std::uint32_t> gpus, std::uint64_t* load) {
    const double most = options_.gpu_limit * 1024 * static_cast<double>(recent_[layer]) / speed_of_gpus_;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (gpus[i] == no_gpu || static_cast<double>(busy(gpus[i], load)) <= most) continue;
      std::uint32_t best = gpus[i];
      for (const std::uint32_t gpu : copies_.gpus_of(layer, experts[i])) {
        if (visited_node_[copies_.node_of(gpu)] == now_ && busy(gpu, load) < busy(best, load)) best = gpu;
      }
      move(gpus[i], best, load);
    }
  }
  TETROMINO_ABI void move(std::uint32_t& gpu, std::uint32_t to, std::uint64_t* load) {
    if (to == gpu) return;
    --load[gpu];
    visit(to, load);
    gpu = to;
  }

  // The home GPU if it is among the accepted, else one the token visits anyway, else the least loaded.
  template <class Accepted>
  [[nodiscard]] TETROMINO_ABI std::uint32_t best_of(std::span<const std::uint32_t> from, std::uint32_t home_gpu,
                                                    const std::uint64_t* load, const Accepted& accepted) const {
    for (const std::uint32_t gpu : from) {
      if (gpu == home_gpu && accepted(gpu)) return gpu;
    }
    const std::uint32_t seen =
        least_loaded(from, load, [&](std::uint32_t gpu) { return accepted(gpu) && visited_gpu_[gpu] == now_; });
    return seen != undecided ? seen : least_loaded(from, load, accepted);
  }

  template <class Accepted>
  [[nodiscard]] TETROMINO_ABI std::uint32_t least_loaded(std::span<const std::uint32_t> from, const std::uint64_t* load,
                                                         const Accepted& accepted) const {
    std::uint32_t best = undecided;
    for (const std::uint32_t gpu : from) {
      if (accepted(gpu) && (best == undecided || busy(gpu, load) < busy(best, load))) best = gpu;
    }
    return best;
  }
  // The least loaded of those on the nearest nodes.
  [[nodiscard]] TETROMINO_ABI std::uint32_t nearest(std::span<const std::uint32_t> from, std::uint32_t home_node,
                                                    const std::uint64_t* load) const {
    if (node_costs_.empty()) return least_loaded(from, load, [](std::uint32_t) { return true; });
    double least = way(home_node, copies_.node_of(from[0]));
    for (const std::uint32_t gpu : from) least = std::min(least, way(home_node, copies_.node_of(gpu)));
    return least_loaded(from, load, [&](std::uint32_t gpu) { return !(way(home_node, copies_.node_of(gpu)) > least); });
  }
  // How long a GPU takes for what it serves.
  [[nodiscard]] TETROMINO_ABI std::uint64_t busy(std::uint32_t gpu, const std::uint64_t* load) const {
    return load[gpu] * copies_.time_of_pair(gpu);
  }

  replica_options options_;
  detail::copy_table copies_;
  std::vector<std::uint64_t> recent_on_gpu_;   // [layers, gpus] pairs, the older ones counting less
  std::vector<std::uint64_t> pairs_on_gpu_;    // [layers, gpus] pairs
  std::vector<std::uint64_t> recent_;          // [layers] pairs, the older ones counting less
  std::vector<std::size_t> tokens_;            // [layers] since pairs counted half
  std::vector<std::uint32_t> turn_;            // [layers, experts], for `even`
  std::vector<std::uint64_t> recent_on_node_;  // [layers, nodes], for `fewest_nodes`
  std::vector<std::uint32_t> open_on_node_;    // [nodes], for `fewest_nodes`
  std::vector<double> speed_of_node_;          // [nodes] 0 without slots
  double speed_of_gpus_ = 0;                   // of all that have slots
  std::vector<double> node_costs_;             // [nodes, nodes]; empty: all 1
  std::vector<std::uint64_t> visited_node_;    // [nodes] last `now_` at which the token went there
  std::vector<std::uint64_t> visited_gpu_;     // [gpus]
  std::vector<std::uint16_t> ids_;             // those of a token, where they come as another type
  std::uint64_t now_ = 0;
};

/// Chooses copies for all tokens of a step at once, so that the GPU that is busy for longest, by its load and its
/// speed, is done as soon as can be: exact, by moving work along chains of copies from that GPU to ones that are done
/// sooner even with one more, until there are none. The outcome depends on the step's tokens and their order alone.
/// Deterministic; nothing is allocated after the first steps.
class step_chooser {
 public:
  /// Preconditions: `p` is valid on `t` (two copies on one GPU are fine); the choice is one of a whole step.
  TETROMINO_ABI step_chooser(const placement& p, const topology& t, replica_choice choice)
      : choice_(choice),
        copies_(p, t),
        units_(p.experts(), 0),
        on_copy_(copies_.copies(), 0),
        taken_(copies_.copies(), 0),
        load_(t.gpus(), 0),
        came_by_(t.gpus(), link{unseen, unseen}),
        first_on_gpu_(p.layers() * t.gpus() + 1, 0),
        copy_on_gpu_(copies_.copies()),
        expert_of_copy_(copies_.copies()) {
    TETROMINO_EXPECTS(is_step_choice(choice), "step_chooser: a choice for whole steps");
    reached_.reserve(t.gpus());
    for (std::size_t l = 0; l < p.layers(); ++l) {
      for (std::size_t e = 0; e < p.experts(); ++e) {
        for (std::size_t c = copies_.first_copy(l, e); c < copies_.last_copy(l, e); ++c) {
          expert_of_copy_[c] = static_cast<std::uint32_t>(e);
          ++first_on_gpu_[l * t.gpus() + copies_.gpu_of_copy(c) + 1];
        }
      }
    }
    for (std::size_t i = 1; i < first_on_gpu_.size(); ++i) first_on_gpu_[i] += first_on_gpu_[i - 1];
    std::vector<std::size_t> next(first_on_gpu_.begin(), first_on_gpu_.end() - 1);
    for (std::size_t l = 0; l < p.layers(); ++l) {
      for (std::size_t c = copies_.first_copy(l, 0); c < copies_.last_copy(l, p.experts() - 1); ++c) {
        copy_on_gpu_[next[l * t.gpus() + copies_.gpu_of_copy(c)]++] = static_cast<std::uint32_t>(c);
      }
    }
  }

  /// Writes into gpus[tokens, k] the GPUs that serve ids[tokens, k] of one layer; no_gpu for −1 (or the largest number
  /// of an unsigned type, such as no_expert). Returns the pairs, or experts, of the GPU that is busy for longest.
  /// Preconditions: as many GPUs as ids; layer and ids in range.
  template <id_array Ids = std::span<const std::uint16_t>>
  TETROMINO_ABI std::size_t choose(std::size_t layer, const Ids& ids, std::span<std::uint32_t> gpus) {
    const std::span<const std::uint16_t> experts =
        detail::narrow_ids(ids, copies_.experts(), "step_chooser: expert number out of range", ids_);
    TETROMINO_EXPECTS(gpus.size() == experts.size() && layer < copies_.layers(),
                      "step_chooser: a GPU for each expert, layer in range", gpus.size(), experts.size(), layer,
                      copies_.layers());
    active_.clear();
    for (const std::uint16_t e : experts) {
      if (e == no_expert) continue;
      if (units_[e]++ == 0) active_.push_back(e);
    }
    begin(layer);
    while (relieve_busiest(layer)) {
    }
    for (std::size_t i = 0; i < experts.size(); ++i) {
      gpus[i] = experts[i] == no_expert ? no_gpu : take(layer, experts[i]);
    }
    for (const std::uint16_t e : active_) units_[e] = 0;
    return load_[busiest_];
  }

 private:
  static constexpr std::uint32_t unseen = 0xFFFF'FFFF;

  // Copies of one expert between which work can move.
  struct link {
    std::uint32_t from, to;
  };

  // How long a GPU takes for what it has and `more`.
  [[nodiscard]] TETROMINO_ABI std::uint64_t busy(std::size_t gpu, std::uint64_t more = 0) const {
    return (load_[gpu] + more) * copies_.time_of_pair(gpu);
  }

  // Gives each expert's work to its copy on the GPU that is done with it first; those without a choice come first.
  TETROMINO_ABI void begin(std::size_t layer) {
    std::fill(load_.begin(), load_.end(), 0);
    for (const bool choice : {false, true}) {
      for (const std::uint16_t e : active_) {
        const std::size_t first = copies_.first_copy(layer, e), last = copies_.last_copy(layer, e);
        if ((last - first > 1) != choice) continue;
        const std::uint64_t work = choice_ == replica_choice::step_activation ? 1 : units_[e];
        std::size_t best = first;
        for (std::size_t c = first; c < last; ++c) {
          on_copy_[c] = taken_[c] = 0;
          if (busy(copies_.gpu_of_copy(c), work) < busy(copies_.gpu_of_copy(best), work)) best = c;
        }
        on_copy_[best] = work;
        load_[copies_.gpu_of_copy(best)] += on_copy_[best];
      }
    }
  }

  // Moves work along a shortest chain of copies from the busiest GPU to one that is done sooner even with one more. If
  // there is no chain, what the GPUs within reach carry cannot leave them; were the busiest to have one less, another
  // would be busy for as long.
  TETROMINO_ABI bool relieve_busiest(std::size_t layer) {
    busiest_ = 0;
    for (std::size_t g = 1; g < load_.size(); ++g) {
      if (busy(g) > busy(busiest_)) busiest_ = g;
    }
    std::fill(came_by_.begin(), came_by_.end(), link{unseen, unseen});
    reached_.assign(1, static_cast<std::uint32_t>(busiest_));
    for (std::size_t i = 0; i < reached_.size(); ++i) {
      const std::size_t row = layer * load_.size() + reached_[i];
      for (std::size_t j = first_on_gpu_[row]; j < first_on_gpu_[row + 1]; ++j) {
        const std::uint32_t from = copy_on_gpu_[j], e = expert_of_copy_[from];
        if (units_[e] == 0 || on_copy_[from] == 0) continue;
        for (std::size_t to = copies_.first_copy(layer, e); to < copies_.last_copy(layer, e); ++to) {
          const std::uint32_t gpu = copies_.gpu_of_copy(to);
          if (gpu == busiest_ || came_by_[gpu].from != unseen) continue;
          came_by_[gpu] = {from, static_cast<std::uint32_t>(to)};
          reached_.push_back(gpu);
          if (busy(gpu, 1) < busy(busiest_)) {
            shift(gpu);
            return true;
          }
        }
      }
    }
    return false;
  }

  // As much as the chain lets through, and no more than makes both ends alike, but for the last one.
  TETROMINO_ABI void shift(std::uint32_t target) {
    const std::uint64_t both = copies_.time_of_pair(busiest_) + copies_.time_of_pair(target);
    std::uint64_t amount = std::max<std::uint64_t>(1, (busy(busiest_) - busy(target)) / both);
    for (std::uint32_t gpu = target; gpu != busiest_; gpu = copies_.gpu_of_copy(came_by_[gpu].from)) {
      amount = std::min(amount, on_copy_[came_by_[gpu].from]);
    }
    for (std::uint32_t gpu = target; gpu != busiest_; gpu = copies_.gpu_of_copy(came_by_[gpu].from)) {
      on_copy_[came_by_[gpu].from] -= amount;
      on_copy_[came_by_[gpu].to] += amount;
    }
    load_[busiest_] -= amount;
    load_[target] += amount;
  }

  [[nodiscard]] TETROMINO_ABI std::uint32_t take(std::size_t layer, std::uint16_t expert) {
    std::size_t c = copies_.first_copy(layer, expert);
    if (choice_ == replica_choice::step_activation) {
      while (on_copy_[c] == 0) ++c;
    } else {
      while (taken_[c] == on_copy_[c]) ++c;
      ++taken_[c];
    }
    return copies_.gpu_of_copy(c);
  }

  replica_choice choice_;
  detail::copy_table copies_;
  std::vector<std::uint64_t> units_;           // [experts] pairs of the step
  std::vector<std::uint16_t> active_;          // experts of the step
  std::vector<std::uint64_t> on_copy_;         // [copies] pairs, or 1 for an expert that is read there
  std::vector<std::uint64_t> taken_;           // [copies] pairs given out
  std::vector<std::uint64_t> load_;            // [gpus]
  std::vector<link> came_by_;                  // [gpus] how a chain reaches it
  std::vector<std::uint32_t> reached_;         // GPUs that chains reach
  std::vector<std::uint16_t> ids_;             // those of a step, where they come as another type
  std::size_t busiest_ = 0;                    // a GPU
  std::vector<std::size_t> first_on_gpu_;      // [layers × gpus + 1] into copy_on_gpu_
  std::vector<std::uint32_t> copy_on_gpu_;     // [copies]
  std::vector<std::uint32_t> expert_of_copy_;  // [copies]
};

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
