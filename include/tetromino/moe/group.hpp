#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"                    // tetromino::result, tetromino::error
#include "search/layers/node_mask.hpp"     // detail::with_mask_for, detail::node_bit, detail::most_nodes
#include "search/layers/node_visits.hpp"   // detail::visits_of
#include "search/requests/assignment.hpp"  // detail::request_assigner, detail::token_room
#include "placement.hpp"                   // placement, try_validate
#include "topology.hpp"                    // topology
#include "trace.hpp"                       // trace_view, phase, id_array

#include <algorithm>  // std::fill, std::max, std::min, std::sort
#include <cmath>      // std::isfinite, std::llround
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t
#include <iterator>   // std::data, std::size
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What a signature keeps of the experts that a prompt used. Less is smaller and faster, and tells nodes apart less.
struct signature_options {
  std::size_t top_experts = 0;    ///< the most used experts of each layer; 0: all
  std::size_t layer_buckets = 0;  ///< layers are hashed into so many and added up; 0: each layer by itself

  friend TETROMINO_ABI bool operator==(const signature_options&, const signature_options&) = default;
};

/// What experts a prompt used, by layer (or bucket of layers), as a short list.
struct request_signature {
  /// One expert, and how much it was used.
  struct entry {
    std::uint32_t cell;    ///< bucket × experts + expert
    std::uint32_t weight;  ///< uses, the later ones counting more
  };
  std::vector<entry> entries;
};

/// Collects the signature of one prompt at a time while it is prefilled. The last 32 tokens of the prompt count 16
/// times, the 32 before 8 times, and so on down to once: what comes next resembles what came last.
class signature_builder {
 public:
  /// Preconditions: a shape without zero, of fewer than 2^32 experts in all rows.
  TETROMINO_ABI explicit signature_builder(const routing_shape& shape, const signature_options& options = {})
      : shape_(shape), options_(options), weights_(buckets() * shape.experts, 0) {
    TETROMINO_EXPECTS(shape.layers > 0 && shape.experts > 0 && shape.experts_per_token > 0 &&
                          buckets() <= 0xFFFF'FFFF / shape.experts,
                      "signature_builder: a shape without zero, and not too large", shape.layers, shape.experts,
                      shape.experts_per_token);
  }

  [[nodiscard]] TETROMINO_ABI const routing_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] TETROMINO_ABI const signature_options& options() const noexcept { return options_; }
  /// Rows of layers that are told apart.
  [[nodiscard]] TETROMINO_ABI std::size_t buckets() const noexcept {
    return options_.layer_buckets == 0 ? shape_.layers : std::min(options_.layer_buckets, shape_.layers);
  }
  /// The bucket of a layer.
  [[nodiscard]] TETROMINO_ABI std::size_t bucket(std::size_t layer) const noexcept {
    if (buckets() == shape_.layers) return layer;
    return (((layer + 1) * 0x9E3779B97F4A7C15u) >> 33) % buckets();
  }

  /// Starts a prompt of that many tokens; forgets what was collected.
  TETROMINO_ABI void begin(std::uint64_t prompt_tokens) {
    for (const std::uint32_t c : touched_) weights_[c] = 0;
    touched_.clear();
    left_ = prompt_tokens;
  }
  /// Adds the next token of the prompt: ids[layers, experts per token], integers of any type. Preconditions: that many
  /// ids, each below `experts` or −1 (or the largest number of an unsigned type, such as no_expert) for nobody.
  template <id_array Ids = std::span<const std::uint16_t>>
  TETROMINO_ABI void add(const Ids& ids) {
    TETROMINO_EXPECTS(std::size(ids) == shape_.ids_per_token(), "signature_builder: the ids of one token",
                      std::size(ids), shape_.ids_per_token());
    if (left_ > 0) --left_;
    const std::uint32_t weight = left_ >= 128 ? 1U : 16U >> (left_ / 32);
    const auto* next = std::data(ids);
    for (std::size_t l = 0; l < shape_.layers; ++l) {
      const std::size_t row = bucket(l) * shape_.experts;
      for (std::size_t i = 0; i < shape_.experts_per_token; ++i, ++next) {
        const std::uint32_t e = detail::to_id(*next, shape_.experts);
        if (e == no_expert) continue;
        TETROMINO_EXPECTS(e != detail::no_id, "signature_builder: expert number out of range", *next, shape_.experts);
        std::uint32_t& w = weights_[row + e];
        if (w == 0) touched_.push_back(static_cast<std::uint32_t>(row + e));
        w += weight;
      }
    }
  }
  /// Writes what was collected, cells ascending. Reuses the memory of `out`.
  TETROMINO_ABI void write(request_signature& out) {
    out.entries.clear();
    std::sort(touched_.begin(), touched_.end());
    for (std::size_t i = 0; i < touched_.size();) {
      const std::size_t row = touched_[i] / shape_.experts, first = out.entries.size();
      for (; i < touched_.size() && touched_[i] / shape_.experts == row; ++i) {
        out.entries.push_back({touched_[i], weights_[touched_[i]]});
      }
      if (options_.top_experts == 0 || out.entries.size() - first <= options_.top_experts) continue;
      std::sort(
          out.entries.begin() + static_cast<std::ptrdiff_t>(first), out.entries.end(),
          [](const auto& a, const auto& b) { return a.weight != b.weight ? a.weight > b.weight : a.cell < b.cell; });
      out.entries.resize(first + options_.top_experts);
    }
  }

 private:
  routing_shape shape_;
  signature_options options_;
  std::vector<std::uint32_t> weights_;  // [buckets, experts]
  std::vector<std::uint32_t> touched_;
  std::uint64_t left_ = 0;
};

inline namespace TETROMINO_ISA {

/// The signature of one recorded request, from its prompt.
[[nodiscard]] inline request_signature signature_of(const trace_view& from, const request& r,
                                                    signature_builder& builder) {
  const token_range range = r.range(phase::prefill);
  builder.begin(range.size());
  for (std::uint64_t t = range.first; t < range.last; ++t) builder.add(from.token(t));
  request_signature out;
  builder.write(out);
  return out;
}

}  // namespace TETROMINO_ISA

/// How grouping weighs traffic and spreads tokens; the weights as in `local_options`.
struct group_options {
  double node_weight = 1;
  double pair_weight = 0;
  double token_budget = 1.05;     ///< max / mean of tokens over nodes, by the speed of their live GPUs
  signature_options signature{};  ///< what is kept of a prompt
};

namespace detail::inline TETROMINO_ISA {

[[nodiscard]] inline result<void> check_group_options(const group_options& o) {
  const double both = o.node_weight + o.pair_weight;
  if (!(o.node_weight >= 0) || !(o.pair_weight >= 0) || !(both > 0) || !std::isfinite(both)) {
    return error(errc::invalid_argument,
                 {"group: expected weights of 0 or more, not both 0, got ", o.node_weight, " and ", o.pair_weight});
  }
  if (!std::isfinite(o.token_budget) || o.token_budget < 1) {
    return error(errc::invalid_argument, {"group: expected a token budget of 1 or more, got ", o.token_budget});
  }
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

/// What running a request on each node is worth, by its signature: a number per cell and node, learnt from recorded
/// tokens under a placement. Whole numbers, so the same everywhere.
class node_affinity {
 public:
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI node_affinity(const node_affinity&) = default;
  TETROMINO_ABI node_affinity(node_affinity&&) = default;
  TETROMINO_ABI node_affinity& operator=(const node_affinity&) = default;
  TETROMINO_ABI node_affinity& operator=(node_affinity&&) = default;

  /// Learns from at most 16,384 evenly spaced tokens of the view, prompts and answers alike. Errors: a placement that
  /// does not fit view or topology, more than 256 nodes or 64 experts per token, options out of range.
  [[nodiscard]] TETROMINO_ABI static result<node_affinity> try_make(const placement& p, const topology& t,
                                                                    const trace_view& recorded,
                                                                    const group_options& options = {}) {
    const routing_shape& s = recorded.shape;
    if (p.layers() != s.layers || p.experts() != s.experts) {
      return error(errc::shape_mismatch, {"group: expected a placement of ", s.layers, " layers × ", s.experts,
                                          " experts as in the trace, got ", p.layers(), " × ", p.experts()});
    }
    if (auto ok = try_validate(p, t, {.one_copy_per_gpu = false}); !ok) return ok.error();
    if (t.nodes() > detail::most_nodes || s.experts_per_token == 0 || s.experts_per_token > 64) {
      return error(errc::invalid_argument, {"group: expected at most ", detail::most_nodes,
                                            " nodes and 1 to 64 experts per "
                                            "token, got ",
                                            t.nodes(), " and ", s.experts_per_token});
    }
    if (auto ok = detail::check_group_options(options); !ok) return ok.error();
    node_affinity out(t, s, options);
    detail::with_mask_for(t.nodes(), [&]<class Mask>() { out.learn<Mask>(p, t, recorded); });
    return out;
  }
  [[nodiscard]] TETROMINO_ABI static node_affinity make(const placement& p, const topology& t,
                                                        const trace_view& recorded, const group_options& options = {}) {
    return try_make(p, t, recorded, options).value();
  }

  [[nodiscard]] TETROMINO_ABI std::size_t nodes() const noexcept { return speeds_.size(); }
  /// What nodes' shares of the tokens go by, [nodes]: topology::speed_of_node; 0 for one that takes none.
  [[nodiscard]] TETROMINO_ABI std::span<const double> speeds_of_nodes() const noexcept { return speeds_; }
  [[nodiscard]] TETROMINO_ABI const group_options& options() const noexcept { return options_; }
  /// A builder of the signatures that this reads.
  [[nodiscard]] TETROMINO_ABI signature_builder builder() const {
    return signature_builder(shape_, options_.signature);
  }

  /// Writes what each node is worth: scores[nodes]; more is better. Preconditions: a signature of `builder()`,
  /// scores.size() == nodes().
  TETROMINO_ABI void score(const request_signature& signature, std::span<std::int64_t> scores) const {
    TETROMINO_EXPECTS(scores.size() == nodes(), "node_affinity: a score for each node", scores.size(), nodes());
    std::fill(scores.begin(), scores.end(), 0);
    for (const request_signature::entry& e : signature.entries) {
      const std::size_t row = e.cell * nodes();
      TETROMINO_EXPECTS(row + nodes() <= value_.size(), "node_affinity: a signature of the same shape", row + nodes(),
                        value_.size());
      const std::int32_t* const value = value_.data() + row;
      for (std::size_t n = 0; n < scores.size(); ++n) scores[n] += static_cast<std::int64_t>(e.weight) * value[n];
    }
  }

 private:
  TETROMINO_ABI node_affinity(const topology& t, const routing_shape& shape, const group_options& options)
      : shape_(shape), options_(options), speeds_(detail::node_speeds(t)) {}

  struct prices {
    std::int64_t visit, pair;
  };
  struct sums {
    std::vector<std::int64_t> value;  // [buckets, experts, nodes]
    std::vector<std::int64_t> uses;   // [buckets, experts]
  };

  template <class Mask>
  TETROMINO_ABI void learn(const placement& p, const topology& t, const trace_view& recorded) {
    const std::size_t k = shape_.experts_per_token, experts = shape_.experts;
    const signature_builder rows(shape_, options_.signature);
    prices price{};
    price.visit = std::llround(256.0 * (options_.node_weight / (options_.node_weight + options_.pair_weight)));
    price.pair = 256 - price.visit;
    sums learnt{std::vector<std::int64_t>(rows.buckets() * experts * nodes(), 0),
                std::vector<std::int64_t>(rows.buckets() * experts, 0)};
    const std::uint64_t step = std::max<std::uint64_t>(1, recorded.tokens() / 16'384);
    std::vector<Mask> holders(experts);
    for (std::size_t l = 0; l < shape_.layers; ++l) {
      std::fill(holders.begin(), holders.end(), Mask{0});
      for (std::size_t s = 0; s < p.slots(); ++s) {
        const std::int32_t e = p.layer(l)[s];
        if (e == empty_slot) continue;
        Mask& held = holders[static_cast<std::size_t>(e)];
        held = held | detail::node_bit<Mask>(t.node_of_slot(s));
      }
      const std::size_t row = rows.bucket(l) * experts;
      for (std::size_t e = 0; e < experts; ++e) {  // as one use would have it, so that unseen experts count too
        ++learnt.uses[row + e];
        for (std::size_t n = 0; n < nodes(); ++n) {
          if ((holders[e] & detail::node_bit<Mask>(n)) != 0)
            learnt.value[(row + e) * nodes() + n] += 256 * (price.pair + price.visit / 2);
        }
      }
      std::uint64_t number = 0;
      for (const request& r : recorded.requests) {
        for (std::uint64_t token = r.first_token; token < r.first_token + r.tokens; ++token) {
          if (number++ % step == 0) learn_token(recorded.token(token).subspan(l * k, k), holders, price, row, learnt);
        }
      }
    }
    value_.resize(learnt.value.size());
    for (std::size_t i = 0; i < value_.size(); ++i) {
      value_[i] = static_cast<std::int32_t>(learnt.value[i] / std::max<std::int64_t>(learnt.uses[i / nodes()], 1));
    }
  }

  // An expert saves a visit to a node that holds it, shared with the token's other experts there.
  template <class Mask>
  TETROMINO_ABI void learn_token(std::span<const std::uint16_t> ids, const std::vector<Mask>& holders,
                                 const prices& price, std::size_t row, sums& learnt) const {
    Mask held[64];
    for (std::size_t i = 0; i < ids.size(); ++i) {
      held[i] = ids[i] == no_expert ? Mask{0} : holders[ids[i]];
      if (ids[i] != no_expert) ++learnt.uses[row + ids[i]];
    }
    const auto visits_from = [&](Mask home) {
      return price.visit == 0 ? 0 : detail::visits_of<Mask>(held, ids.size(), home);
    };
    const std::int64_t away = visits_from(Mask{0});
    for (std::size_t n = 0; n < nodes(); ++n) {
      const Mask home = detail::node_bit<Mask>(n);
      std::int64_t sharers = 0;
      for (std::size_t i = 0; i < ids.size(); ++i) sharers += (held[i] & home) != 0 ? 1 : 0;
      if (sharers == 0) continue;
      const std::int64_t each = 256 * (price.pair + price.visit * (away - visits_from(home)) / sharers);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        if ((held[i] & home) != 0) learnt.value[(row + ids[i]) * nodes() + n] += each;
      }
    }
  }

  routing_shape shape_;
  group_options options_;
  std::vector<double> speeds_;       // [nodes]
  std::vector<std::int32_t> value_;  // [buckets, experts, nodes]
};

inline namespace TETROMINO_ISA {

/// Assigns a batch of requests to nodes within the token budget, none to a node without live GPUs. tokens[i] is what
/// request i counts. Errors: lengths that disagree. A budget that whole requests cannot meet is exceeded by less than
/// one request.
[[nodiscard]] inline result<std::vector<std::uint32_t>> try_group(const node_affinity& affinity,
                                                                  std::span<const request_signature> signatures,
                                                                  std::span<const std::uint64_t> tokens) {
  if (signatures.size() != tokens.size()) {
    return error(errc::shape_mismatch,
                 {"group: expected tokens for each of ", signatures.size(), " signatures, got ", tokens.size()});
  }
  std::vector<std::int64_t> scores(signatures.size() * affinity.nodes());
  std::uint64_t all = 0, largest = 0;
  for (std::size_t r = 0; r < signatures.size(); ++r) {
    affinity.score(signatures[r], std::span(scores).subspan(r * affinity.nodes(), affinity.nodes()));
    all += tokens[r];
    largest = std::max(largest, tokens[r]);
  }
  const std::vector<std::int64_t> room =
      detail::token_room(all, largest, affinity.speeds_of_nodes(), affinity.options().token_budget);
  std::vector<std::uint32_t> out(signatures.size(), 0);
  detail::request_assigner().assign({scores, tokens, room}, out);
  return out;
}
[[nodiscard]] inline std::vector<std::uint32_t> group(const node_affinity& affinity,
                                                      std::span<const request_signature> signatures,
                                                      std::span<const std::uint64_t> tokens) {
  return try_group(affinity, signatures, tokens).value();
}

}  // namespace TETROMINO_ISA

/// How requests are taken in one by one.
struct online_options {
  /// Tokens in flight that the budget is reckoned for while fewer are: lets the first requests choose freely.
  std::uint64_t expected_tokens = 0;
  /// By which share of a score another node must be better for a request to leave the node it was on.
  double stickiness = 0.1;
};

/// Assigns requests as they arrive and forgets them when they end. Assigning allocates nothing.
class online_grouper {
 public:
  static constexpr std::uint32_t anywhere = 0xFFFF'FFFF;

  /// Precondition: the affinity outlives this; stickiness is 0 or more.
  TETROMINO_ABI explicit online_grouper(const node_affinity& affinity, const online_options& options = {})
      : affinity_(&affinity), options_(options), used_(affinity.nodes(), 0), scores_(affinity.nodes(), 0) {
    TETROMINO_EXPECTS(options.stickiness >= 0, "online_grouper: stickiness of 0 or more", options.stickiness);
    for (const double s : affinity.speeds_of_nodes()) speed_ += s;
  }

  /// The node for a request that counts `tokens`: the best one within budget, `previous` (where an earlier turn of it
  /// ran) unless another is clearly better; where no node is within budget, the one with the fewest tokens for its
  /// speed, of several the best. Never one without live GPUs.
  TETROMINO_ABI std::uint32_t assign(const request_signature& signature, std::uint64_t tokens,
                                     std::uint32_t previous = anywhere) {
    TETROMINO_EXPECTS(previous == anywhere || previous < used_.size(), "online_grouper: previous node out of range",
                      previous, used_.size());
    affinity_->score(signature, scores_);
    if (previous != anywhere) {
      std::int64_t most = scores_[0];
      for (const std::int64_t s : scores_) most = std::max(most, s);
      scores_[previous] += static_cast<std::int64_t>(options_.stickiness * static_cast<double>(most));
    }
    const std::span<const double> speeds = affinity_->speeds_of_nodes();
    const auto reckoned = static_cast<double>(std::max(all_ + tokens, options_.expected_tokens));
    const double by_speed = affinity_->options().token_budget * reckoned / speed_;
    std::size_t best = used_.size(), lightest = used_.size();
    for (std::size_t n = 0; n < used_.size(); ++n) {
      if (!(speeds[n] > 0)) continue;
      if (lightest == used_.size()) lightest = n;
      const double here = static_cast<double>(used_[n]) * speeds[lightest],
                   there = static_cast<double>(used_[lightest]) * speeds[n];
      if (here < there || (here == there && scores_[n] > scores_[lightest])) lightest = n;
      if (static_cast<double>(used_[n] + tokens) > by_speed * speeds[n]) continue;
      if (best == used_.size() || scores_[n] > scores_[best]) best = n;
    }
    if (best == used_.size()) best = lightest;
    used_[best] += tokens;
    all_ += tokens;
    return static_cast<std::uint32_t>(best);
  }
  /// Goes on with what is known of another placement, which outlives this; requests in flight keep their nodes.
  /// Precondition: as many nodes.
  TETROMINO_ABI void use(const node_affinity& affinity) {
    TETROMINO_EXPECTS(affinity.nodes() == used_.size(), "online_grouper: an affinity of as many nodes",
                      affinity.nodes(), used_.size());
    affinity_ = &affinity;
    speed_ = 0;
    for (const double s : affinity.speeds_of_nodes()) speed_ += s;
  }
  /// A request has ended. Precondition: the node had that many tokens.
  TETROMINO_ABI void release(std::uint32_t node, std::uint64_t tokens) {
    TETROMINO_EXPECTS(node < used_.size() && used_[node] >= tokens, "online_grouper: tokens that the node had", node,
                      used_.size(), used_[node], tokens);
    used_[node] -= tokens;
    all_ -= tokens;
  }
  /// Tokens in flight: [nodes].
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint64_t> tokens_on_node() const noexcept { return used_; }

 private:
  const node_affinity* affinity_;
  online_options options_;
  std::vector<std::uint64_t> used_;   // [nodes]
  std::vector<std::int64_t> scores_;  // [nodes]
  std::uint64_t all_ = 0;
  double speed_ = 0;  // of all nodes
};

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
