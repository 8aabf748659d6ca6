#pragma once

#include "../../../detail/macros_off.hpp"

#include "node_mask.hpp"    // node_bit, node_count, first_node, without_first
#include "node_visits.hpp"  // count_visits, visits_of, visited_nodes
#include "../random.hpp"    // search_random
#include "token_lanes.hpp"  // token_lanes

#include <algorithm>  // std::copy_n, std::fill, std::max, std::min
#include <bit>        // std::countr_zero
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What a search may do and what it pays. Costs are whole numbers: 65,536 is one visit (or pair) at full price.
struct search_rules {
  std::size_t experts = 0;
  std::size_t experts_per_token = 0;
  std::size_t nodes = 0;
  std::vector<std::size_t> first_slot;  // [nodes + 1] slots of nodes, no node with more than it can use
  std::vector<double> speed;            // [nodes]
  bool copies = false;                  // slots beyond one per expert hold copies
  int least_nodes = 1;                  // on which each expert has a copy
  std::int64_t visit_price = 0;         // of a visit to another node, in 1/256
  std::int64_t pair_price = 0;          // of a remote pair, in 1/256
  std::int64_t overload_price = 0;      // of a pair above a node's limit, in 1/256
  std::int64_t move_price = 0;          // of a copy where there was none, in 1/65,536
};

/// Where the experts of one layer are: expert or `nobody` per slot, and nodes per expert. One more expert, which is in
/// no slot, stands for choices that nobody serves.
template <class Mask>
struct layer_state {
  static constexpr std::uint32_t nobody = 0xFFFF'FFFF;

  std::vector<std::uint32_t> slots;  // [first_slot.back()]
  std::vector<Mask> holders;         // [experts + 1]
  std::vector<Mask> before;          // [experts] in the placement to start from; empty without one
};

/// Sampled tokens of one layer, with whom they belong to.
template <class Mask>
struct layer_tokens {
  std::span<const std::uint16_t> ids;           // [tokens, experts per token], in random order
  std::span<const std::uint32_t> source;        // [tokens] node
  std::span<const std::int64_t> loads;          // [experts] pairs, all together tokens × experts per token
  std::span<const std::int64_t> load_limits;    // [nodes] pairs
  std::span<const std::int64_t> expert_limits;  // [nodes] pairs of one expert, which a GPU has to serve; empty: none
};

/// Improves the placement of one layer for given sources by annealing: exchanges experts between nodes and replaces
/// copies. Each proposal is first judged by the visits that its halves (one expert each) added when last looked at, so
/// that few are worked out; those are exact. Keeps its buffers from layer to layer.
template <class Mask>
class layer_search {
 public:
  static constexpr std::uint32_t nobody = layer_state<Mask>::nobody;

  explicit layer_search(const search_rules& rules)
      : rules_(&rules),
        stride_(rules.nodes + 1),
        visits_added_(rules.visit_price > 0 ? rules.experts * stride_ * stride_ : 0),
        worked_out_(visits_added_.size(), 0),
        load_(rules.nodes, 0),
        correction_(rules.nodes, 0),
        lanes_(rules.nodes, rules.experts_per_token - 1) {
    for (std::size_t n = 0; n < rules.nodes; ++n) {
      node_of_slot_.resize(rules.first_slot[n + 1], static_cast<std::uint32_t>(n));
    }
  }

  /// Takes up a layer. The first `active` tokens stand for all of them where visits are counted.
  void bind(const layer_tokens<Mask>& tokens, layer_state<Mask>& state, std::size_t active) {
    tokens_ = &tokens;
    state_ = &state;
    count_ = tokens.source.size();
    active_ = std::min(active, count_);
    scale_ = static_cast<std::int64_t>(count_ * 256 / std::max<std::size_t>(active_, 1));
    now_ += 2 * oldest_;  // forgets what halves added in another layer
    count_pairs();
    count_loads();
    if (rules_->visit_price > 0) build_lists();
  }

  /// Proposes that many changes while the temperature falls from `hot` to `cold`.
  void anneal(search_random& random, std::int64_t hot, std::int64_t cold, std::size_t proposals) {
    constexpr std::size_t stages = 16;
    for (std::size_t s = 0; s < stages; ++s) {
      const std::int64_t temperature = hot + (cold - hot) * static_cast<std::int64_t>(s) / std::int64_t{stages};
      const std::size_t many = proposals * (s + 1) / stages - proposals * s / stages;
      for (std::size_t i = 0; i < many; ++i) propose(random, random.exponential(temperature));
    }
  }

  /// Pairs on each node, as `fewest_nodes` spreads them: [nodes].
  [[nodiscard]] std::span<const std::int64_t> loads() const noexcept { return load_; }

 private:
  // An expert and where it will be held; `from` and `to` are nodes, or rules.nodes for nowhere.
  struct half {
    std::uint32_t expert = nobody;
    std::size_t from = 0, to = 0;
    Mask then{};
  };

  static constexpr std::uint64_t oldest_ = 48;  // accepted changes after which a half is worked out anew

  [[nodiscard]] static Mask bit(std::size_t node) { return node_bit<Mask>(node); }
  [[nodiscard]] const std::uint16_t* ids(std::size_t token) const {
    return tokens_->ids.data() + token * rules_->experts_per_token;
  }

  // How often each expert is used from each node.
  void count_pairs() {
    const std::size_t nodes = rules_->nodes, k = rules_->experts_per_token;
    pairs_.assign((rules_->experts + 1) * nodes, 0);
    uses_.assign(rules_->experts + 1, 0);
    for (std::size_t t = 0; t < count_; ++t) {
      const std::uint16_t* const e = ids(t);
      for (std::size_t i = 0; i < k; ++i) {
        ++pairs_[e[i] * nodes + tokens_->source[t]];
        ++uses_[e[i]];
      }
    }
  }

  // Calls each(node, pairs) with what an expert held by `where` puts on each node: what is used there stays there, the
  // rest is shared evenly.
  template <class Each>
  void for_each_share(std::uint32_t expert, Mask where, const Each& each) const {
    if (where == 0) return;
    const std::int64_t all = tokens_->loads[expert];
    if (without_first(where) == 0) {
      each(first_node(where), all);
      return;
    }
    const std::int32_t* const local = pairs_.data() + expert * rules_->nodes;
    const std::int64_t used = std::max<std::int64_t>(uses_[expert], 1);
    std::int64_t rest = uses_[expert];
    for (Mask m = where; m != 0; m = without_first(m)) rest -= local[first_node(m)];
    rest = uses_[expert] == 0 ? 1 : rest;
    const std::int64_t even = rest * 256 / node_count(where);
    for (Mask m = where; m != 0; m = without_first(m)) {
      const std::size_t n = first_node(m);
      each(n, all * (local[n] * 256 + even) / (used * 256));
    }
  }
  void add_load(std::uint32_t expert, Mask where, std::int64_t sign, std::int64_t* load) const {
    for_each_share(expert, where, [&](std::size_t n, std::int64_t pairs) { load[n] += sign * pairs; });
  }
  // Pairs of one expert that are too many for a GPU of the node.
  [[nodiscard]] std::int64_t hot_pairs(std::uint32_t expert, Mask where) const {
    std::int64_t above = 0;
    for_each_share(expert, where, [&](std::size_t n, std::int64_t pairs) {
      above += std::max<std::int64_t>(0, pairs - tokens_->expert_limits[n]);
    });
    return above;
  }

  // Loads as the rule above has them, corrected by how tokens are in fact served now.
  void count_loads() {
    std::fill(load_.begin(), load_.end(), 0);
    for (std::uint32_t e = 0; e < rules_->experts; ++e) add_load(e, state_->holders[e], 1, load_.data());
    if (!rules_->copies) return;
    const std::size_t k = rules_->experts_per_token;
    std::fill(correction_.begin(), correction_.end(), 0);
    Mask held[cover_experts];
    for (std::size_t t = 0; t < count_; ++t) {
      const std::uint16_t* const e = ids(t);
      for (std::size_t i = 0; i < k; ++i) held[i] = state_->holders[e[i]];
      serve_token(held, k, bit(tokens_->source[t]), std::span(rules_->speed), correction_.data(),
                  [](std::size_t, std::size_t) {});
    }
    for (std::size_t n = 0; n < load_.size(); ++n) load_[n] = correction_[n];
  }

  // For each expert its tokens, in chunks of 64 lanes: their homes, then the holders of their other experts. So one
  // pass over contiguous memory tells what holding the expert elsewhere would cost.
  void build_lists() {
    const std::size_t k = rules_->experts_per_token, experts = rules_->experts + 1;
    first_.assign(experts + 1, 0);
    for (std::size_t i = 0; i < active_ * k; ++i) ++first_[tokens_->ids[i] + 1];
    first_chunk_.assign(experts + 1, 0);
    for (std::size_t e = 0; e < experts; ++e) {
      first_chunk_[e + 1] = first_chunk_[e] + (first_[e + 1] + cover_lanes - 1) / cover_lanes;
      first_[e + 1] += first_[e];
    }
    lanes_.clear(first_chunk_.back());
    list_.resize(active_ * k);
    choice_.resize(active_ * k);
    place_.resize(active_ * k);
    words_ = (active_ + 63) / 64;
    uses_token_.assign(experts * words_, 0);
    cursor_.assign(first_.begin(), first_.end() - 1);
    Mask held[cover_experts];
    for (std::size_t t = 0; t < active_; ++t) {
      const std::uint16_t* const e = ids(t);
      for (std::size_t i = 0; i < k; ++i) held[i] = state_->holders[e[i]];
      const Mask home = bit(tokens_->source[t]);
      for (std::size_t i = 0; i < k; ++i) {
        const std::size_t at = cursor_[e[i]]++, position = at - first_[e[i]];
        list_[at] = static_cast<std::uint32_t>(t);
        choice_[at] = static_cast<std::uint8_t>(i);
        const std::size_t lane = lane_of(e[i], position);
        place_[t * k + i] = static_cast<std::uint32_t>(lane);
        uses_token_[e[i] * words_ + t / 64] |= std::uint64_t{1} << (t % 64);
        lanes_.set(lane, home);
        for (std::size_t j = 0, row = 1; j < k; ++j) {
          if (j != i) lanes_.set(lane + cover_lanes * row++, held[j]);
        }
      }
    }
    visits_.assign(active_, 0);
    list_visits_.assign(experts, 0);
    new_visits_.resize(active_ + cover_lanes);
    for (std::uint32_t e = 0; e < experts; ++e) {
      list_visits_[e] = visits_if(e, state_->holders[e], new_visits_.data());
      for (std::size_t i = first_[e]; i < first_[e + 1]; ++i) visits_[list_[i]] = new_visits_[i - first_[e]];
    }
  }

  [[nodiscard]] std::size_t lane_of(std::size_t expert, std::size_t position) const {
    return lanes_.lane(first_chunk_[expert] + position / cover_lanes, position % cover_lanes);
  }

  // Visits of all tokens of an expert if it were held by `where`; of each token, if `each` is given.
  std::int64_t visits_if(std::size_t expert, Mask where, std::uint8_t* each = nullptr) const {
    std::int64_t sum = 0;
    std::uint8_t visits[cover_lanes];
    std::size_t left = first_[expert + 1] - first_[expert];
    for (std::size_t c = first_chunk_[expert]; c < first_chunk_[expert + 1]; ++c) {
      lanes_.count(c, where, rules_->copies, visits);
      const std::size_t here = std::min(left, cover_lanes);
      unsigned of_chunk = 0;
      for (std::size_t i = 0; i < here; ++i) of_chunk += visits[i];
      sum += of_chunk;
      left -= here;
      if (each != nullptr) each = std::copy_n(visits, here, each);
    }
    return sum;
  }

  [[nodiscard]] std::size_t added_index(const half& h) const { return (h.expert * stride_ + h.from) * stride_ + h.to; }
  // By how much visits grow through one half alone, as it is now or as it was not long ago.
  std::int64_t visits_added(const half& h, std::uint64_t not_before) {
    if (h.expert == nobody) return 0;
    const std::size_t i = added_index(h);
    if (worked_out_[i] < not_before) {
      visits_added_[i] = static_cast<std::int32_t>(visits_if(h.expert, h.then) - list_visits_[h.expert]);
      worked_out_[i] = now_;
    }
    return visits_added_[i];
  }

  // What two halves do together, beyond what each does alone, to tokens that use both experts.
  [[nodiscard]] std::int64_t interplay(const half& x, const half& y) const {
    if (x.expert == nobody || y.expert == nobody) return 0;
    const std::size_t k = rules_->experts_per_token;
    const std::uint64_t* const a = uses_token_.data() + x.expert * words_;
    const std::uint64_t* const b = uses_token_.data() + y.expert * words_;
    std::int64_t sum = 0;
    Mask held[cover_experts];
    for (std::size_t w = 0; w < words_; ++w) {
      for (std::uint64_t both = a[w] & b[w]; both != 0; both &= both - 1) {
        const std::size_t t = w * 64 + static_cast<std::size_t>(std::countr_zero(both));
        const std::uint16_t* const e = ids(t);
        std::size_t at_x = 0, at_y = 0;
        for (std::size_t i = 0; i < k; ++i) {
          held[i] = state_->holders[e[i]];
          if (e[i] == x.expert) at_x = i;
          if (e[i] == y.expert) at_y = i;
        }
        const Mask home = bit(tokens_->source[t]), now = held[at_x];
        held[at_x] = x.then;
        sum -= visits_of(held, k, home);
        held[at_y] = y.then;
        sum += visits_of(held, k, home);
        held[at_x] = now;
        sum += static_cast<std::int64_t>(visits_[t]) - visits_of(held, k, home);
      }
    }
    return sum;
  }

  void propose(search_random& random, std::int64_t tolerated) {
    const std::size_t slots = rules_->first_slot.back(), nodes = rules_->nodes;
    const std::size_t slot_x = random.below(slots);
    const std::size_t a = node_of_slot_[slot_x];
    const std::uint32_t ex = state_->slots[slot_x];
    half x{ex, a, nodes, Mask{0}}, y{};
    std::size_t slot_y = slots;
    const Mask held_x = ex == nobody ? Mask{0} : state_->holders[ex];
    if (rules_->copies && ex != nobody && node_count(held_x) > rules_->least_nodes && (random.bits() >> 63) != 0) {
      // this copy makes room for a copy of another expert
      const auto ey = static_cast<std::uint32_t>(random.below(rules_->experts));
      if ((state_->holders[ey] & bit(a)) != 0) return;
      x.then = static_cast<Mask>(held_x & ~bit(a));
      y = {ey, nodes, a, static_cast<Mask>(state_->holders[ey] | bit(a))};
    } else {
      slot_y = random.below(slots);
      const std::size_t b = node_of_slot_[slot_y];
      const std::uint32_t ey = state_->slots[slot_y];
      if (a == b || ex == ey) return;
      const Mask held_y = ey == nobody ? Mask{0} : state_->holders[ey];
      if ((held_y & bit(a)) != 0 || (held_x & bit(b)) != 0) return;
      x.to = b;
      x.then = static_cast<Mask>((held_x & ~bit(a)) | bit(b));
      y = {ey, b, a, static_cast<Mask>((held_y & ~bit(b)) | bit(a))};
    }
    consider(x, y, slot_x, slot_y, tolerated);
  }

  void consider(const half& x, const half& y, std::size_t slot_x, std::size_t slot_y, std::int64_t tolerated) {
    std::int64_t known = 256 * (pair_cost(x) + pair_cost(y)) + move_cost(x) + move_cost(y);
    // relief of overloaded nodes and GPUs is what could still speak for a change
    const std::int64_t hot = hot_cost(x, held_now(x)) + hot_cost(y, held_now(y));
    const std::int64_t most = tolerated + 256 * (overload_cost(load_.data()) + hot);
    const std::int64_t price = rules_->visit_price * scale_;
    const bool visits = price > 0;
    if (visits) {
      const std::uint64_t not_before = now_ - oldest_;
      if (known + price * (visits_added(x, not_before) + visits_added(y, not_before)) > most) return;
    } else if (known > most) {
      return;
    }
    changed_.assign(load_.begin(), load_.end());
    shift_load(x);
    shift_load(y);
    known += 256 * (overload_cost(changed_.data()) - overload_cost(load_.data()) + hot_cost(x, x.then) +
                    hot_cost(y, y.then) - hot);
    if (visits) {
      known += price * (visits_added(x, now_) + visits_added(y, now_));
      if (known > tolerated) return;
      known += price * interplay(x, y);
    }
    if (known > tolerated) return;
    load_.swap(changed_);
    hold(x);
    hold(y);
    state_->slots[slot_x] = y.expert;
    if (slot_y < state_->slots.size()) state_->slots[slot_y] = x.expert;
    ++now_;
  }

  [[nodiscard]] std::int64_t pair_cost(const half& h) const {
    if (h.expert == nobody || rules_->pair_price == 0) return 0;
    const std::int32_t* const used = pairs_.data() + h.expert * rules_->nodes;
    std::int64_t more = 0;
    if (h.from < rules_->nodes) more += used[h.from];
    if (h.to < rules_->nodes) more -= used[h.to];
    return rules_->pair_price * more;
  }
  [[nodiscard]] std::int64_t move_cost(const half& h) const {
    if (h.expert == nobody || state_->before.empty()) return 0;
    const Mask before = state_->before[h.expert];
    std::int64_t moves = 0;
    if (h.to < rules_->nodes && (before & bit(h.to)) == 0) ++moves;
    if (h.from < rules_->nodes && (before & bit(h.from)) == 0) --moves;
    return moves * rules_->move_price;
  }
  [[nodiscard]] std::int64_t overload_cost(const std::int64_t* load) const {
    std::int64_t above = 0;
    for (std::size_t n = 0; n < rules_->nodes; ++n) {
      above += std::max<std::int64_t>(0, load[n] - tokens_->load_limits[n]);
    }
    return above * rules_->overload_price;
  }
  [[nodiscard]] Mask held_now(const half& h) const { return h.expert == nobody ? Mask{0} : state_->holders[h.expert]; }
  [[nodiscard]] std::int64_t hot_cost(const half& h, Mask where) const {
    if (h.expert == nobody || tokens_->expert_limits.empty()) return 0;
    return rules_->overload_price * hot_pairs(h.expert, where);
  }
  void shift_load(const half& h) {
    if (h.expert == nobody) return;
    add_load(h.expert, state_->holders[h.expert], -1, changed_.data());
    add_load(h.expert, h.then, 1, changed_.data());
  }

  // Makes one half happen, and tells the lists of the experts that share a token with it.
  void hold(const half& h) {
    if (h.expert == nobody) return;
    state_->holders[h.expert] = h.then;
    if (rules_->visit_price == 0) return;
    const std::size_t k = rules_->experts_per_token;
    visits_if(h.expert, h.then, new_visits_.data());
    const std::size_t first = first_[h.expert], count = first_[h.expert + 1] - first;
    told_.resize(count * (k - 1));
    std::uint32_t* told = told_.data();
    for (std::size_t i = first; i < first + count; ++i) {
      const std::uint32_t* const lane = place_.data() + list_[i] * k;
      const std::size_t mine = choice_[i];
      const auto row = static_cast<std::uint32_t>(cover_lanes * mine);
      for (std::size_t j = 0; j < mine; ++j) *told++ = lane[j] + row;
      for (std::size_t j = mine + 1; j < k; ++j) *told++ = lane[j] + row + std::uint32_t{cover_lanes};
    }
    lanes_.set(told_, h.then);

    // those with other visits are listed first: a branch for each of them would cost more than the list
    changed_tokens_.resize(count + 1);
    std::size_t changed = 0;
    for (std::size_t i = 0; i < count; ++i) {
      changed_tokens_[changed] = static_cast<std::uint32_t>(i);
      changed += new_visits_[i] != visits_[list_[first + i]] ? 1U : 0U;
    }
    for (std::size_t c = 0; c < changed; ++c) {
      const std::size_t i = changed_tokens_[c], t = list_[first + i];
      const std::int64_t more = static_cast<std::int64_t>(new_visits_[i]) - static_cast<std::int64_t>(visits_[t]);
      visits_[t] = new_visits_[i];
      const std::uint16_t* const e = ids(t);
      for (std::size_t j = 0; j < k; ++j) list_visits_[e[j]] += more;
    }
  }

  const search_rules* rules_;
  const layer_tokens<Mask>* tokens_ = nullptr;
  layer_state<Mask>* state_ = nullptr;
  std::size_t count_ = 0, active_ = 0, words_ = 0;
  std::int64_t scale_ = 256;  // what a visit of an active token stands for, in 1/256

  std::vector<std::uint32_t> node_of_slot_;  // [slots]

  std::size_t stride_;                      // nodes and nowhere
  std::vector<std::int32_t> visits_added_;  // [experts, stride, stride] more visits, when last worked out
  std::vector<std::uint64_t> worked_out_;   // [experts, stride, stride] when that was
  std::uint64_t now_ = 0;                   // changes accepted so far

  std::vector<std::int32_t> pairs_;       // [experts, nodes] uses from each node
  std::vector<std::int64_t> uses_;        // [experts]
  std::vector<std::int64_t> load_;        // [nodes]
  std::vector<std::int64_t> changed_;     // [nodes]
  std::vector<std::int64_t> correction_;  // [nodes]

  std::vector<std::size_t> first_, first_chunk_, cursor_;  // [experts + 2] where lists begin
  std::vector<std::uint32_t> list_;                        // tokens of each expert, ascending
  std::vector<std::uint8_t> choice_;                       // which of the token's choices it is
  std::vector<std::uint32_t> place_;                       // [active, experts per token] lane of a token in those lists
  token_lanes<Mask> lanes_;                                // of each expert's tokens, their homes and other experts
  std::vector<std::uint64_t> uses_token_;                  // [experts, words] a bit per token
  std::vector<std::uint8_t> visits_;                       // [active]
  std::vector<std::int64_t> list_visits_;                  // [experts] sum over the tokens of each
  std::vector<std::uint8_t> new_visits_;
  std::vector<std::uint32_t> told_;            // lanes that hear of a change
  std::vector<std::uint32_t> changed_tokens_;  // in the list of an expert, by a change
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
