#pragma once

#include "../../detail/macros_off.hpp"

#include "../loads.hpp"                // max_over_mean
#include "../place.hpp"                // balance_gpus
#include "../placement.hpp"            // placement
#include "../topology.hpp"             // topology, node_speeds
#include "../trace.hpp"                // trace_view
#include "copies/gpu_copies.hpp"       // gpu_copies
#include "copies/node_spread.hpp"      // node_spreader
#include "layers/layer_search.hpp"     // layer_search
#include "layers/node_mask.hpp"        // node_bit, node_count, first_node, without_first, lowest_node
#include "requests/assignment.hpp"     // request_assigner
#include "requests/clusters.hpp"       // cluster_requests
#include "requests/source_scores.hpp"  // source_scorer
#include "local_options.hpp"           // local_options, local_plan
#include "near_numbers.hpp"            // near_numbers, relative_costs
#include "sample.hpp"                  // take_sample
#include "workspaces.hpp"              // workspaces

#include <algorithm>  // std::copy, std::copy_n, std::fill, std::find, std::max, std::min, std::sort
#include <chrono>     // std::chrono::steady_clock
#include <cmath>      // std::llround, std::sqrt
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::int64_t, std::uint32_t, std::uint64_t
#include <memory>     // std::make_unique, std::unique_ptr
#include <span>       // std::span
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What the searches for one plan may do otherwise than its options. (Options themselves are not copied: their copy
/// constructor, which has no name of its own for each instruction set, can hold vector code.)
struct search_variation {
  explicit search_variation(const local_options& o) : start(o.start), seed(o.seed), max_proposals(o.max_proposals) {}

  const placement* start;
  std::uint64_t seed, max_proposals;
  bool is_watched = true;  // reports progress
};

/// One run of `local`; a Mask (node_mask.hpp) has a bit per node.
template <class Mask>
class local_search {
 public:
  local_search(const trace_view& calibration, const topology& t, const local_options& options,
               const search_variation& variation)
      : calibration_(calibration),
        topology_(t),
        options_(options),
        variation_(variation),
        random_(variation.seed),
        sample_(take_sample(calibration, options.served, options.sample_tokens, options.sample_requests, random_)),
        rules_(make_rules()),
        layers_(calibration.shape.layers),
        source_(sample_.requests.size(), 0),
        source_of_token_(sample_.tokens(), 0) {
    std::vector<bool> may_change(layers_.size(), options.layers.empty());
    for (const std::uint32_t l : options.layers) may_change[l] = true;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      random_of_layer_.emplace_back(random_.bits());
      (may_change[l] ? searched_ : kept_).push_back(l);
    }
    set_limits();
    node_costs_ = relative_costs(topology_);
    std::uint64_t largest = 0;
    for (const std::uint64_t n : sample_.tokens_of) largest = std::max(largest, n);
    room_ = token_room(sample_.tokens(), largest, rules_.speed, options.token_budget);
  }

  [[nodiscard]] local_plan run() {
    begin();
    const schedule plan = make_schedule();
    double heat = plan.hottest;
    for (std::size_t step = 0; step < plan.steps; ++step) {
      const double next_heat = heat * plan.ratio;
      const bool last = step + 1 == plan.steps;
      const std::size_t active = last ? sample_.tokens() : active_tokens(heat);
      for_each_searched([&](std::size_t l) {
        const layer_tokens<Mask> tokens = tokens_of(l);
        searches_.lend([&] { return std::make_unique<layer_search<Mask>>(rules_); },
                       [&](layer_search<Mask>& search) {
                         search.bind(tokens, layers_[l], active);
                         search.anneal(random_of_layer_[l], temperature(heat), temperature(next_heat), plan.proposals);
                       });
      });
      heat = next_heat;
      regroup(last ? 0.0 : heat);
      reached_.step = step + 1;
      reached_.steps = plan.steps;
      reached_.seconds = seconds();
      if (variation_.is_watched && options_.progress) {
        measure();
        if (!options_.progress(reached_)) break;
      }
      if (options_.time_limit_seconds > 0 && step + 2 < plan.steps) {
        // the coldest step alone makes a sound plan of any state, and takes about as long as this one took
        const double each = seconds() / static_cast<double>(step + 1);
        if (seconds() + 2 * each > options_.time_limit_seconds) {
          for (; step + 2 < plan.steps; ++step) heat = heat * plan.ratio;
        }
      }
    }
    measure();
    if (variation_.start == nullptr && exchange_nodes()) measure();
    reached_.seconds = seconds();
    return finish();
  }

 private:
  struct schedule {
    std::size_t steps;
    double hottest, ratio;  // in visits, or pairs, per token
    std::size_t proposals;  // per step and layer
  };
  static constexpr std::uint32_t nobody = layer_state<Mask>::nobody;

  // What scores requests, and what it has added up: [requests, nodes].
  struct score_sheet {
    source_scorer<Mask> scorer;
    std::vector<std::int64_t> scores;
  };

  template <class Work>
  void for_each_layer(const Work& work) const {
    options_.executor(layers_.size(), work);
  }
  // Those that may change.
  template <class Work>
  void for_each_searched(const Work& work) const {
    const auto task = [&](std::size_t i) { work(searched_[i]); };
    options_.executor(searched_.size(), task);
  }
  [[nodiscard]] std::unique_ptr<score_sheet> new_sheet() const {
    const source_scorer<Mask> scorer(rules_.nodes, rules_.experts_per_token, rules_.visit_price, rules_.pair_price);
    return std::make_unique<score_sheet>(score_sheet{scorer, {}});
  }

  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  [[nodiscard]] std::int64_t temperature(double heat) const {
    return static_cast<std::int64_t>(heat * static_cast<double>(sample_.tokens()) * 65536.0);
  }
  [[nodiscard]] static Mask bit(std::size_t node) { return node_bit<Mask>(node); }

  // What a node, and the fastest GPU of a node, may serve: its share by speed, and the limit above that.
  void set_limits() {
    double speeds = 0, gpu_speeds = 0;
    for (const double s : rules_.speed) speeds += s;
    std::vector<double> fastest(rules_.nodes, 0.0);
    for (std::size_t g = 0; g < topology_.gpus(); ++g) {
      if (topology_.slots_on_gpu(g) == 0) continue;
      gpu_speeds += topology_.speed(g);
      double& most = fastest[topology_.node_of_gpu(g)];
      most = std::max(most, topology_.speed(g));
    }
    for (const std::size_t pairs : sample_.pairs) {
      const auto all = static_cast<double>(pairs);
      for (std::size_t n = 0; n < rules_.nodes; ++n) {
        const bool open = options_.node_imbalance == 0 || rules_.speed[n] == 0;
        load_limits_.push_back(
            static_cast<std::int64_t>(open ? all : options_.node_imbalance * all / (speeds / rules_.speed[n])));
        if (options_.gpu_imbalance == 0) continue;
        expert_limits_.push_back(static_cast<std::int64_t>(
            fastest[n] == 0 ? all : options_.gpu_imbalance * all / (gpu_speeds / fastest[n])));
      }
    }
  }
  [[nodiscard]] std::span<const std::int64_t> limits_of(const std::vector<std::int64_t>& limits, std::size_t l) const {
    return limits.empty() ? std::span<const std::int64_t>() : std::span(limits).subspan(l * rules_.nodes, rules_.nodes);
  }

  [[nodiscard]] search_rules make_rules() const {
    search_rules r;
    r.experts = calibration_.shape.experts;
    r.experts_per_token = calibration_.shape.experts_per_token;
    r.nodes = topology_.nodes();
    r.speed = node_speeds(topology_);
    r.first_slot.assign(1, 0);
    for (std::size_t n = 0; n < r.nodes; ++n) {
      r.first_slot.push_back(r.first_slot.back() + std::min(topology_.slots_on_node(n), r.experts));
    }
    r.copies = options_.replicas && r.first_slot.back() > r.experts;
    r.least_nodes = static_cast<int>(options_.nodes_per_expert);
    const double both = options_.node_weight + options_.pair_weight;
    r.visit_price = std::llround(256.0 * (options_.node_weight / both));
    r.pair_price = 256 - r.visit_price;
    r.overload_price = 256;  // more would freeze the search where limits are tight
    r.move_price = std::llround(options_.price_per_move * static_cast<double>(sample_.tokens()) * 65.536);
    return r;
  }

  // Visits: few steps, each rebuilds the lists of tokens. Pairs: many, they cost little, and grouping cools down too.
  [[nodiscard]] schedule make_schedule() const {
    schedule s = rules_.visit_price > 0 ? schedule{12, 8e-3, 0.745, 0} : schedule{96, 1e-2, 0.93, 0};
    if (variation_.start != nullptr) {  // warm enough to mend a plan, not to forget it: what a move costs keeps it too
      while (s.hottest > (rules_.visit_price > 0 ? 5e-3 : 1.2e-3)) {
        s.hottest = s.hottest * s.ratio;
        --s.steps;
      }
    }
    double size = static_cast<double>(rules_.first_slot.back()) / 128.0;
    const double all = size * static_cast<double>(searched_.size());
    if (all > 16) size *= std::sqrt(16 / all);  // where there is much to place, a little less care for each expert
    s.proposals = static_cast<std::size_t>((rules_.visit_price > 0 ? 40'000.0 : 5'000.0) * size * options_.effort);
    if (variation_.max_proposals > 0) {
      s.proposals = std::min(s.proposals, static_cast<std::size_t>(variation_.max_proposals / s.steps));
    }
    for (; s.proposals == 0 && s.steps > 12; s.ratio *= s.ratio) s.steps /= 2;  // where only requests move, few will do
    return s;
  }
  // While it is hot, a part of the tokens tells a good change from a bad one as well as the temperature does.
  [[nodiscard]] std::size_t active_tokens(double heat) const {
    return static_cast<std::size_t>(std::max(512.0, std::min(4e6, 0.035 / (heat * heat))));
  }

  [[nodiscard]] layer_tokens<Mask> tokens_of(std::size_t l) const {
    return {sample_.layer(l), source_of_token_, sample_.layer_loads(l), limits_of(load_limits_, l),
            limits_of(expert_limits_, l)};
  }
  void spread_sources() {
    for (std::size_t t = 0; t < source_of_token_.size(); ++t)
      source_of_token_[t] = source_[sample_.request_of_token[t]];
  }

  void begin() {
    if (variation_.start == nullptr) {
      cluster();
    } else {
      for (std::size_t l = 0; l < layers_.size(); ++l) take_over(l);
      regroup(0.0);
    }
    spread_sources();
    for_each_searched([&](std::size_t l) { fill_layer(l); });
  }

  // Groups by use of experts, in at most 2,048 cells: all layers if they fit, else evenly chosen ones.
  void cluster() {
    const auto& [layers, experts, k] = sample_.shape;
    const std::size_t looked_at = std::max<std::size_t>(1, std::min(layers, 2'048 / experts));
    const std::size_t cells = looked_at * experts;
    std::vector<std::int32_t> counts(source_.size() * cells, 0);
    for (std::size_t i = 0; i < looked_at; ++i) {
      const std::span<const std::uint16_t> ids = sample_.layer(i * layers / looked_at);
      for (std::size_t t = 0; t < sample_.tokens(); ++t) {
        std::int32_t* const row = counts.data() + sample_.request_of_token[t] * cells + i * experts;
        for (std::size_t j = 0; j < k; ++j) {
          if (ids[t * k + j] < experts) ++row[ids[t * k + j]];
        }
      }
    }
    cluster_requests(counts, cells, sample_.tokens_of, room_, random_, source_);
  }

  void take_over(std::size_t l) {
    layer_state<Mask>& state = layers_[l];
    state.before.assign(rules_.experts + 1, Mask{0});
    const std::span<const std::int32_t> row = variation_.start->layer(l);
    for (std::size_t s = 0; s < row.size(); ++s) {
      if (row[s] != empty_slot) {
        Mask& held = state.before[static_cast<std::size_t>(row[s])];
        held = static_cast<Mask>(held | bit(topology_.node_of_slot(s)));
      }
    }
    state.holders = state.before;
    if (rules_.copies) return;
    for (Mask& held : state.holders) held = lowest_node(held);
  }

  // Where a plan to start from lacks experts and has no slot left for them, copies go: of whoever carries least per
  // copy, on the node that uses it least.
  void make_room(layer_state<Mask>& state, std::span<const std::int64_t> loads,
                 std::span<const std::int64_t> used) const {
    std::size_t held = 0, missing = 0;
    for (std::size_t e = 0; e < rules_.experts; ++e) {
      held += static_cast<std::size_t>(node_count(state.holders[e]));
      missing += state.holders[e] == 0 ? 1U : 0U;
    }
    for (; held + missing > rules_.first_slot.back(); --held) {
      std::size_t least = rules_.experts;
      for (std::size_t e = 0; e < rules_.experts; ++e) {
        if (node_count(state.holders[e]) < 2) continue;
        if (least == rules_.experts ||
            loads[e] * node_count(state.holders[least]) < loads[least] * node_count(state.holders[e])) {
          least = e;
        }
      }
      Mask& nodes = state.holders[least];
      std::size_t from = first_node(nodes);
      for (std::size_t n = from; n < rules_.nodes; ++n) {
        if ((nodes & bit(n)) != 0 && used[least * rules_.nodes + n] < used[least * rules_.nodes + from]) from = n;
      }
      nodes = static_cast<Mask>(nodes & ~bit(from));
    }
  }

  // Gives the layer its slots: experts that nobody holds yet where they are used and load allows, then copies.
  void fill_layer(std::size_t l) {
    const std::size_t nodes = rules_.nodes, k = rules_.experts_per_token, experts = rules_.experts;
    layer_state<Mask>& state = layers_[l];
    state.holders.resize(experts + 1, Mask{0});
    state.slots.assign(rules_.first_slot.back(), nobody);
    std::vector<std::size_t> next(rules_.first_slot.begin(), rules_.first_slot.end() - 1);
    std::vector<std::int64_t> load(nodes, 0), used((experts + 1) * nodes, 0);
    const std::span<const std::int64_t> loads = sample_.layer_loads(l);
    const std::span<const std::uint16_t> ids = sample_.layer(l);
    const std::span<const std::int64_t> limits = limits_of(load_limits_, l);
    for (std::size_t i = 0; i < ids.size(); ++i) ++used[ids[i] * nodes + source_of_token_[i / k]];
    make_room(state, loads, used);
    const auto put = [&](std::size_t e, std::size_t n) {
      state.slots[next[n]++] = static_cast<std::uint32_t>(e);
      state.holders[e] = static_cast<Mask>(state.holders[e] | bit(n));
    };
    for (std::size_t e = 0; e < experts; ++e) {
      const Mask held = state.holders[e];
      for (Mask m = held; m != 0; m = without_first(m)) {
        const std::size_t n = first_node(m);
        put(e, n);
        load[n] += loads[e] / node_count(held);
      }
    }
    std::vector<std::uint32_t> order(experts);
    for (std::size_t e = 0; e < experts; ++e) order[e] = static_cast<std::uint32_t>(e);
    std::sort(order.begin(), order.end(),
              [&](std::uint32_t a, std::uint32_t b) { return loads[a] != loads[b] ? loads[a] > loads[b] : a < b; });
    for (const std::uint32_t e : order) {
      if (state.holders[e] != 0) continue;
      std::size_t best = nodes;
      std::int64_t best_score = 0;
      for (std::size_t n = 0; n < nodes; ++n) {
        // room is kept in step with the other nodes, so that copies are left to choose from everywhere
        const std::size_t size = rules_.first_slot[n + 1] - rules_.first_slot[n];
        const std::size_t share = (size * experts + rules_.first_slot.back() - 1) / rules_.first_slot.back();
        if (next[n] - rules_.first_slot[n] >= share) continue;
        const std::int64_t score = used[e * nodes + n] - 2 * std::max<std::int64_t>(0, load[n] + loads[e] - limits[n]);
        if (best == nodes || score > best_score) {
          best = n;
          best_score = score;
        }
      }
      for (std::size_t n = 0; n < nodes && best == nodes; ++n) {
        if (next[n] < rules_.first_slot[n + 1]) best = n;
      }
      put(e, best);
      load[best] += loads[e];
    }
    if (!rules_.copies) return;
    for (std::size_t n = 0; n < nodes; ++n) {
      while (next[n] < rules_.first_slot[n + 1]) {
        std::size_t best = experts;
        for (std::size_t e = 0; e < experts; ++e) {
          if ((state.holders[e] & bit(n)) != 0) continue;
          if (best == experts || used[e * nodes + n] > used[best * nodes + n]) best = e;
        }
        put(best, n);
      }
    }
    if (options_.nodes_per_expert > 1) spread_over_nodes(l);
  }

  // Where copies have to be on several nodes; what finds no room there is told by whoever checks the plan.
  void spread_over_nodes(std::size_t l) {
    layer_state<Mask>& state = layers_[l];
    std::vector<std::int32_t> row(state.slots.size(), empty_slot);
    for (std::size_t s = 0; s < row.size(); ++s) {
      if (state.slots[s] != nobody) row[s] = static_cast<std::int32_t>(state.slots[s]);
    }
    const std::span<const std::int64_t> used = sample_.layer_loads(l);
    const std::vector<double> load(used.begin(), used.end());
    std::vector<std::size_t> slots;
    for (std::size_t n = 0; n < rules_.nodes; ++n) slots.push_back(rules_.first_slot[n + 1] - rules_.first_slot[n]);
    const topology nodes = topology::make(std::vector<std::size_t>(slots.size(), 1), slots);
    static_cast<void>(node_spreader(nodes, rules_.experts, options_.nodes_per_expert).spread(row, load));
    std::fill(state.holders.begin(), state.holders.end(), Mask{0});
    for (std::size_t s = 0; s < row.size(); ++s) {
      state.slots[s] = row[s] == empty_slot ? nobody : static_cast<std::uint32_t>(row[s]);
      if (row[s] == empty_slot) continue;
      Mask& held = state.holders[state.slots[s]];
      held = static_cast<Mask>(held | bit(nodes.node_of_slot(s)));
    }
  }

  // Scores each sampled request on each node under the present holders.
  void score_sample() {
    const std::size_t nodes = rules_.nodes, k = rules_.experts_per_token;
    sheets_.for_each([](score_sheet& sheet) { sheet.scores.clear(); });
    for_each_layer([&](std::size_t l) {
      const std::uint16_t* const ids = sample_.layer(l).data();
      sheets_.lend([&] { return new_sheet(); },
                   [&](score_sheet& sheet) {
                     sheet.scores.resize(source_.size() * nodes, 0);
                     sheet.scorer.score(
                         layers_[l].holders, rules_.copies, sample_.tokens(),
                         [&](std::size_t t) { return ids + t * k; },
                         [&](std::size_t t, std::size_t n, std::int64_t s) {
                           sheet.scores[sample_.request_of_token[t] * nodes + n] += 256 * s;
                         });
                   });
    });
    scores_.assign(source_.size() * nodes, 0);
    sheets_.for_each([&](const score_sheet& sheet) {
      for (std::size_t i = 0; i < sheet.scores.size(); ++i) scores_[i] += sheet.scores[i];
    });
  }
  void regroup(double heat) {
    score_sample();
    const assignment_problem p{scores_, sample_.tokens_of, room_};
    if (reached_.step == 0 && variation_.start != nullptr) {
      assigner_.assign(p, source_);
    } else if (heat > 0 && rules_.pair_price > 0) {
      // where pairs count, groups freeze together with placements; where visits count, they are better kept
      const std::int64_t pairs_heat = temperature(heat) * rules_.pair_price / 256;
      assigner_.shake(p, source_, random_, pairs_heat, 20 * source_.size());
    } else {
      assigner_.improve(p, source_);
    }
    spread_sources();
  }

  // Sets reached_ from the sample: visits from the scores' own rule, loads as tokens are served.
  void measure() {
    struct measured {
      std::int64_t visits = 0, remote = 0;
      double imbalance = 0;
      std::vector<std::int64_t> sent;
    };
    const std::size_t nodes = rules_.nodes, k = rules_.experts_per_token, tokens = sample_.tokens();
    loads_.assign(layers_.size() * nodes * rules_.experts, 0);
    std::vector<measured> of_layer(layers_.size());
    for_each_layer([&](std::size_t l) {
      measured& m = of_layer[l];
      std::vector<std::int64_t> load(nodes, 0);
      std::vector<Mask> held(k);
      m.sent.assign(node_costs_.size(), 0);
      std::int64_t* const of_expert = loads_.data() + l * nodes * rules_.experts;
      const std::uint16_t* e = sample_.layer(l).data();
      for (std::size_t t = 0; t < tokens; ++t, e += k) {
        for (std::size_t i = 0; i < k; ++i) held[i] = layers_[l].holders[e[i]];
        const Mask home = bit(source_of_token_[t]);
        const std::size_t from = source_of_token_[t] * nodes;
        const Mask seen =
            serve_token(held.data(), k, home, std::span(rules_.speed), load.data(), [&](std::size_t i, std::size_t n) {
              ++of_expert[e[i] * nodes + n];
              m.remote += n == source_of_token_[t] ? 0 : 1;
              if (!m.sent.empty()) m.sent[from + n] += rules_.pair_price;
            });
        m.visits += node_count(seen);
        for (Mask to = seen; !m.sent.empty() && to != 0; to = without_first(to)) {
          m.sent[from + first_node(to)] += rules_.visit_price;
        }
      }
      m.imbalance = max_over_mean(load, [&](std::size_t n) { return rules_.speed[n]; });
    });
    measured all;
    sent_.assign(node_costs_.size(), 0);
    for (const measured& m : of_layer) {
      for (std::size_t i = 0; i < sent_.size(); ++i) sent_[i] += m.sent[i];
    }
    std::size_t pairs = 0;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      all.visits += of_layer[l].visits;
      all.remote += of_layer[l].remote;
      all.imbalance += of_layer[l].imbalance;
      pairs += sample_.pairs[l];
    }
    const double layers = static_cast<double>(layers_.size());
    reached_.nodes_per_token = static_cast<double>(all.visits) / static_cast<double>(tokens) / layers;
    reached_.remote_pair_fraction =
        static_cast<double>(all.remote) / static_cast<double>(std::max<std::size_t>(pairs, 1));
    reached_.node_imbalance = all.imbalance / layers;
  }

  // Exchanges nodes that are alike, with all that they hold and run, so that those that send each other much are near.
  // Says whether any were.
  bool exchange_nodes() {
    if (node_costs_.empty()) return false;
    const std::vector<std::uint32_t> number = near_numbers(topology_, sent_, node_costs_);
    bool any = false;
    for (std::size_t n = 0; n < number.size(); ++n) any = any || number[n] != n;
    if (!any) return false;
    for (layer_state<Mask>& state : layers_) {
      const std::vector<std::uint32_t> slots = state.slots;
      for (std::size_t n = 0; n < number.size(); ++n) {
        std::copy(slots.begin() + static_cast<std::ptrdiff_t>(rules_.first_slot[n]),
                  slots.begin() + static_cast<std::ptrdiff_t>(rules_.first_slot[n + 1]),
                  state.slots.begin() + static_cast<std::ptrdiff_t>(rules_.first_slot[number[n]]));
      }
      for (Mask& held : state.holders) {
        Mask then{0};
        for (Mask m = held; m != 0; m = without_first(m)) then = static_cast<Mask>(then | bit(number[first_node(m)]));
        held = then;
      }
    }
    for (std::uint32_t& n : source_) n = number[n];
    spread_sources();
    return true;
  }

  [[nodiscard]] local_plan finish() {
    local_plan out{placement(layers_.size(), rules_.experts, topology_.slots()), {}, {}, 0};
    const bool keep = variation_.start != nullptr && options_.price_per_move > 0;
    for (const std::size_t l : searched_) {
      const std::span<std::int32_t> row = out.experts.layer(l);
      for (std::size_t n = 0; n < rules_.nodes; ++n) {
        std::vector<std::int32_t> here;
        for (std::size_t s = rules_.first_slot[n]; s < rules_.first_slot[n + 1]; ++s) {
          if (layers_[l].slots[s] != nobody) here.push_back(static_cast<std::int32_t>(layers_[l].slots[s]));
        }
        put_on_gpus(row, here, l, n, keep);
      }
      if (layers_[l].before.empty()) continue;
      for (std::size_t e = 0; e < rules_.experts; ++e) {
        out.copies_moved +=
            static_cast<std::size_t>(node_count(static_cast<Mask>(layers_[l].holders[e] & ~layers_[l].before[e])));
      }
    }
    if (!keep) balance_gpus(out.experts, topology_, slot_loads(out.experts));
    if (options_.gpu_imbalance > 0 && options_.replicas) {
      gpu_copies(topology_, options_.gpu_imbalance, options_.nodes_per_expert).relieve(out.experts, loads_);
    }
    for (const std::size_t l : kept_) {
      std::copy_n(variation_.start->layer(l).begin(), topology_.slots(), out.experts.layer(l).begin());
    }
    out.source_of_request = assign_all();
    out.reached = reached_;
    return out;
  }

  // Those that stay on a node keep their slot if moves have a price; the rest take what is free.
  void put_on_gpus(std::span<std::int32_t> row, std::vector<std::int32_t>& here, std::size_t l, std::size_t n,
                   bool keep) const {
    const std::size_t first = topology_.first_slot_of_node(n), slots = topology_.slots_on_node(n);
    if (keep) {
      const std::span<const std::int32_t> before = variation_.start->layer(l);
      for (std::size_t s = first; s < first + slots; ++s) {
        const auto found = std::find(here.begin(), here.end(), before[s]);
        if (found == here.end()) continue;
        row[s] = *found;
        here.erase(found);
      }
    }
    std::size_t s = first;
    for (const std::int32_t e : here) {
      while (row[s] != empty_slot) ++s;
      row[s] = e;
    }
  }

  [[nodiscard]] std::vector<double> slot_loads(const placement& p) const {
    std::vector<double> out(p.slot_to_expert().size(), 0.0);
    for (std::size_t l = 0; l < p.layers(); ++l) {
      for (std::size_t s = 0; s < p.slots(); ++s) {
        const std::int32_t e = p.layer(l)[s];
        if (e == empty_slot) continue;
        const std::size_t row = l * rules_.experts + static_cast<std::size_t>(e);
        out[l * p.slots() + s] = static_cast<double>(loads_[row * rules_.nodes + topology_.node_of_slot(s)]);
      }
    }
    return out;
  }

  // The sampled requests where they are, if those are all there is and weigh alike; else all of them by up to 64 tokens
  // each.
  [[nodiscard]] std::vector<std::uint32_t> assign_all() {
    std::vector<std::uint32_t> out(calibration_.requests.size(), 0);
    std::size_t with_tokens = 0;
    for (const request& r : calibration_.requests) with_tokens += r.range(options_.served).size() > 0 ? 1U : 0U;
    if (with_tokens == source_.size() && !sample_.is_weighted) {
      for (std::size_t i = 0; i < source_.size(); ++i) out[sample_.requests[i]] = source_[i];
      return out;
    }
    const std::size_t nodes = rules_.nodes, k = rules_.experts_per_token;
    std::vector<std::int64_t> scores(out.size() * nodes, 0);
    std::vector<std::uint64_t> tokens(out.size());
    std::uint64_t all = 0, largest = 0;
    for (std::size_t r = 0; r < out.size(); ++r) {
      tokens[r] = calibration_.requests[r].range(options_.served).size();
      all += tokens[r];
      largest = std::max(largest, tokens[r]);
    }
    struct looked_at {
      std::size_t request;
      std::uint64_t token;
      std::int64_t weight;
    };
    constexpr std::size_t together = 64;  // requests of one task, so that tokens of short ones are scored together too
    const auto work = [&](std::size_t piece) {
      std::vector<looked_at> tokens_of_piece;
      for (std::size_t r = piece * together; r < std::min(out.size(), (piece + 1) * together); ++r) {
        const token_range range = calibration_.requests[r].range(options_.served);
        const std::uint64_t count = std::min<std::uint64_t>(range.size(), 64);
        for (std::uint64_t i = 0; i < count; ++i) {
          tokens_of_piece.push_back(
              {r, range.first + i * range.size() / count, static_cast<std::int64_t>(256 * range.size() / count)});
        }
      }
      sheets_.lend([&] { return new_sheet(); },
                   [&](score_sheet& sheet) {
                     for (std::size_t l = 0; l < layers_.size(); ++l) {
                       sheet.scorer.score(
                           layers_[l].holders, rules_.copies, tokens_of_piece.size(),
                           [&](std::size_t i) { return calibration_.token(tokens_of_piece[i].token).data() + l * k; },
                           [&](std::size_t i, std::size_t n, std::int64_t s) {
                             scores[tokens_of_piece[i].request * nodes + n] += tokens_of_piece[i].weight * s;
                           });
                     }
                   });
    };
    options_.executor((out.size() + together - 1) / together, work);
    const std::vector<std::int64_t> room = token_room(all, largest, rules_.speed, options_.token_budget);
    assigner_.assign({scores, tokens, room}, out);
    return out;
  }

  const trace_view& calibration_;
  const topology& topology_;
  const local_options& options_;
  search_variation variation_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  search_random random_;
  search_sample sample_;
  search_rules rules_;
  std::vector<search_random> random_of_layer_;  // so that layers need not wait for each other
  workspaces<layer_search<Mask>> searches_;
  workspaces<score_sheet> sheets_;
  request_assigner assigner_;
  std::vector<layer_state<Mask>> layers_;
  std::vector<std::size_t> searched_, kept_;    // layers that may change, and that stay
  std::vector<std::uint32_t> source_;           // [sampled requests]
  std::vector<std::uint32_t> source_of_token_;  // [sampled tokens]
  std::vector<std::int64_t> room_;              // [nodes]
  std::vector<std::int64_t> scores_;            // [sampled requests, nodes]
  std::vector<std::int64_t> loads_;             // [layers, experts, nodes] pairs of the sample served there
  std::vector<std::int64_t> expert_limits_;     // [layers, nodes] pairs of an expert; empty: no limit
  std::vector<std::int64_t> load_limits_;       // [layers, nodes] pairs
  std::vector<std::int64_t> node_costs_;        // [nodes, nodes] in 1/256; empty: all the same
  std::vector<std::int64_t> sent_;              // [nodes, nodes] what the sample sends, where some are nearer
  local_progress reached_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
