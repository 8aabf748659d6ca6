#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"     // tetromino::result, tetromino::error
#include "cost.hpp"         // evaluate, cost_options
#include "group.hpp"        // node_affinity, try_group
#include "loads.hpp"        // load_table
#include "migrate.hpp"      // migration, align
#include "place_local.hpp"  // local
#include "placement.hpp"    // placement, carry_over
#include "profile.hpp"      // try_divergence
#include "recorder.hpp"     // recorder
#include "topology.hpp"     // topology
#include "trace.hpp"        // trace_view

#include <algorithm>  // std::copy, std::equal, std::find_if, std::max, std::min
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uint32_t, std::uint64_t
#include <deque>      // std::deque
#include <limits>     // std::numeric_limits
#include <memory>     // std::shared_ptr
#include <optional>   // std::optional
#include <span>       // std::span
#include <string>     // std::string
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// When a plan is renewed, and what that may cost.
struct rebalance_options {
  local_options plan;                                            ///< how plans are made; its start is the plan in force
  group_options group;                                           ///< how requests are assigned
  replica_options replicas{replica_choice::fewest_nodes, 1.05};  ///< how copies are chosen while serving

  std::uint64_t least_tokens = 4096;  ///< decode tokens without which nothing is looked at
  double divergence = 0.02;  ///< bits between the loads planned for and those seen, from which on a new plan is sought
  double node_imbalance = 1.1;  ///< from which on a new plan is sought, and taken whatever it moves

  double bytes_per_expert = 44e6;     ///< weights of an expert in one layer; default: DeepSeek-V3 in FP8
  double bytes_per_visit = 7168 * 3;  ///< of a token's activation to another node and back
  double tokens_ahead = 1e7;          ///< tokens that will be served before the next look
  double least_return = 1;            ///< bytes that must be saved in that time for each byte moved between nodes
  double byte_budget =
      0;  ///< most bytes between nodes for one plan; layers that gain most per byte go first. 0: no limit
};

namespace detail::inline TETROMINO_ISA {

/// As copy_of(local_options).
[[nodiscard]] inline rebalance_options copy_of(const rebalance_options& o) {
  const auto& [plan, group, replicas, least_tokens, divergence, node_imbalance, bytes_per_expert, bytes_per_visit,
               tokens_ahead, least_return, byte_budget] = o;
  return {copy_of(plan),    group,           replicas,     least_tokens, divergence, node_imbalance,
          bytes_per_expert, bytes_per_visit, tokens_ahead, least_return, byte_budget};
}

}  // namespace detail::inline TETROMINO_ISA

/// What a look at the traffic has led to.
enum class rebalance_verdict : std::uint8_t {
  too_few_tokens,
  migrating,  ///< the plan before is still on its way
  steady,     ///< loads and balance are as planned for
  no_gain,    ///< the best plan found saves less than it moves
  new_plan,   ///< layers are to be migrated
};

/// What was seen, and what is expected of the new plan.
struct rebalance_report {
  rebalance_verdict verdict = rebalance_verdict::too_few_tokens;
  double divergence = 0;               ///< in bits
  double nodes_per_token = 0;          ///< of the plan in force, on the tokens seen
  double node_imbalance = 0;           ///< likewise
  double planned_nodes_per_token = 0;  ///< of the new plan, on the same tokens
  double planned_node_imbalance = 0;   ///< likewise
  double running_nodes_per_token = 0;  ///< of the new plan, on the nodes where requests run now; 0 if none do
  double bytes_saved = 0;              ///< activations between nodes that it saves before the next look; can be below 0
  migration way;                       ///< to the new plan, all layers together

  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI rebalance_report() = default;
  TETROMINO_ABI rebalance_report(const rebalance_report&) = default;
  TETROMINO_ABI rebalance_report(rebalance_report&&) = default;
  TETROMINO_ABI rebalance_report& operator=(const rebalance_report&) = default;
  TETROMINO_ABI rebalance_report& operator=(rebalance_report&&) = default;
};

/// Keeps a plan in step with the traffic. The user serves under `current()` and `affinity()`, lets `consider` look at
/// what a recorder has seen now and then, and carries out the layers that `next_layer` hands out while serving goes on:
/// after the rounds of a layer, `commit_layer` switches it, so that `current()` is a plan to serve at any time.
class rebalancer {
 public:
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI rebalancer(const rebalancer&) = default;
  TETROMINO_ABI rebalancer(rebalancer&&) = default;
  TETROMINO_ABI rebalancer& operator=(const rebalancer&) = default;
  TETROMINO_ABI rebalancer& operator=(rebalancer&&) = default;

  /// Errors: a placement that is not valid on the topology, weights, limits or sizes out of range, as of local, group
  /// and evaluate; a choice of copies for whole steps.
  [[nodiscard]] TETROMINO_ABI static result<rebalancer> try_make(placement current, topology t,
                                                                 const rebalance_options& options) {
    if (auto ok = try_validate(current, t, {.one_copy_per_gpu = false}); !ok) return ok.error();
    const auto usable = [](double x) { return std::isfinite(x) && x >= 0; };
    if (!usable(options.divergence) || !usable(options.node_imbalance) || !usable(options.bytes_per_expert) ||
        !usable(options.bytes_per_visit) || !usable(options.tokens_ahead) || !usable(options.least_return) ||
        !usable(options.byte_budget)) {
      return error(errc::invalid_argument, "rebalance: expected limits, sizes and counts to be finite and 0 or more");
    }
    if (auto ok = detail::check_local_options(current.layers(), current.experts(), t, options.plan); !ok) {
      return ok.error();
    }
    if (auto ok = detail::check_group_options(options.group); !ok) return ok.error();
    if (auto ok = detail::check_limits(options.replicas); !ok) return ok.error();
    if (is_step_choice(options.replicas.choice)) {
      return error(errc::invalid_argument, "rebalance: expected a choice of copies for single tokens");
    }
    return rebalancer(std::move(current), std::move(t), options);
  }
  [[nodiscard]] TETROMINO_ABI static rebalancer make(placement current, topology t, const rebalance_options& options) {
    return try_make(std::move(current), std::move(t), options).value();
  }

  /// The plan to serve under now: the layers committed are new, the others as before.
  [[nodiscard]] TETROMINO_ABI const placement& current() const noexcept { return current_; }
  [[nodiscard]] TETROMINO_ABI const topology& cluster() const noexcept { return topology_; }
  /// What assigns requests under it: none before the first plan. Stays where it is until a plan's last layer is
  /// committed, and is then replaced (online_grouper::use).
  [[nodiscard]] TETROMINO_ABI const node_affinity* affinity() const noexcept {
    return affinity_ ? &*affinity_ : nullptr;
  }
  [[nodiscard]] TETROMINO_ABI const rebalance_options& options() const noexcept { return *options_; }

  /// Looks at tokens served lately and decides. `tokens_running` are those that requests which run now will still
  /// generate, on all nodes together: such requests stay where their KV cache is, so a new plan serves these tokens
  /// from the nodes that suited the plan before, and saves less by them, or nothing. Those beyond
  /// `options().tokens_ahead` do not count. Errors: of local, for routing that does not fit the placement; a count that
  /// is negative or not finite.
  [[nodiscard]] TETROMINO_ABI result<rebalance_report> try_consider(const trace_view& seen, double tokens_running = 0) {
    if (!std::isfinite(tokens_running) || tokens_running < 0) {
      return error(errc::invalid_argument,
                   {"rebalance: expected 0 or more tokens of running requests, got ", tokens_running});
    }
    rebalance_report out;
    if (!layers_.empty()) {
      out.verdict = rebalance_verdict::migrating;
      return out;
    }
    if (seen.tokens(options_->plan.served) < std::max<std::uint64_t>(options_->least_tokens, 1)) return out;
    load_table loads = loads_of(seen);
    const placement here = carry_over(current_, topology_, planned_);
    const bool whole = try_validate(here, planned_, {.one_copy_per_gpu = false}).has_value();
    std::optional<outlook> before;
    if (whole && carry_over(here, planned_, topology_) == current_) {  // nothing is left where GPUs shall leave
      auto looked = look(here, seen, tokens_running);
      if (!looked) return looked.error();
      before = std::move(*looked);
      out.nodes_per_token = before->now.nodes_per_token();
      out.node_imbalance = before->now.node_imbalance;
      out.divergence = 1;
      if (!loads_.values.empty()) {
        const auto bits = try_divergence(loads_.view(), loads.view());
        if (!bits) return bits.error();
        out.divergence = *bits;
      }
      if (out.divergence < options_->divergence && out.node_imbalance < options_->node_imbalance) {
        out.verdict = rebalance_verdict::steady;
        return out;
      }
    }
    auto found = find(here, seen, before);
    if (!found) return found.error();
    found->experts = carry_over(found->experts, planned_, topology_);
    auto way = try_migrate(current_, found->experts, topology_, options_->bytes_per_expert);
    if (!way) return way.error();
    out.way = std::move(*way);
    out.planned_nodes_per_token = found->cost.nodes_per_token();
    out.planned_node_imbalance = found->cost.node_imbalance;
    out.running_nodes_per_token = found->running.nodes_per_token();
    for (const double bytes : found->saved_in_layer) out.bytes_saved += bytes;
    if (before && !pays(out)) {
      out.verdict = rebalance_verdict::no_gain;
      if (!affinity_) {  // what is there is what to serve under
        affinity_ = node_affinity::make(here, planned_, seen, options_->group);
        keep_loads(std::move(loads));
      }
      return out;
    }
    out.verdict = rebalance_verdict::new_plan;
    begin(std::move(*found), std::move(loads), out.way);
    return out;
  }
  TETROMINO_ABI rebalance_report consider(const trace_view& seen, double tokens_running = 0) {
    return try_consider(seen, tokens_running).value();
  }
  /// The same, with what a recorder has kept.
  [[nodiscard]] TETROMINO_ABI result<rebalance_report> try_consider(const recorder& seen, double tokens_running = 0) {
    const trace recorded = seen.to_trace();
    return try_consider(recorded.view(), tokens_running);
  }
  TETROMINO_ABI rebalance_report consider(const recorder& seen, double tokens_running = 0) {
    return try_consider(seen, tokens_running).value();
  }

  /// The next layer to migrate, with its rounds; null when there is none. The slots of its experts are those of `next`.
  [[nodiscard]] TETROMINO_ABI const layer_migration* next_layer() const noexcept {
    return layers_.empty() ? nullptr : &layers_.front();
  }
  /// The plan that is on its way; the one in force when there is none.
  [[nodiscard]] TETROMINO_ABI const placement& next() const noexcept { return layers_.empty() ? current_ : next_; }
  /// The weights of next_layer() are where they shall be: it is served as planned from now on. Precondition: there is
  /// such a layer.
  TETROMINO_ABI void commit_layer() {
    TETROMINO_EXPECTS(!layers_.empty(), "rebalancer: a layer that is being migrated");
    const std::size_t l = layers_.front().layer;
    std::copy(next_.layer(l).begin(), next_.layer(l).end(), current_.layer(l).begin());
    layers_.pop_front();
    if (layers_.empty()) affinity_ = std::move(next_affinity_);
  }

  /// The cluster is another one from now on: what GPUs of `t` hold is what gpu_before says they held (see carry_over).
  /// A plan on its way is given up. Experts may be missing then; the next `consider` makes a whole plan, whatever it
  /// moves. Errors: as carry_over; a cluster with fewer slots than experts.
  [[nodiscard]] TETROMINO_ABI result<void> try_change_cluster(topology t,
                                                              std::span<const std::uint32_t> gpu_before = {}) {
    if (auto ok = check_room(t); !ok) return ok;
    auto carried = try_carry_over(current_, topology_, t, gpu_before);
    if (!carried) return carried.error();
    current_ = std::move(*carried);
    planned_ = t;
    topology_ = std::move(t);
    start_anew();
    return {};
  }
  TETROMINO_ABI void change_cluster(topology t, std::span<const std::uint32_t> gpu_before = {}) {
    try_change_cluster(std::move(t), gpu_before).value();
  }

  /// These GPUs shall leave, and no others: the next `consider` makes a plan without them, whatever it moves. They hold
  /// and serve what they have until its layers are committed, and weights come from them too; after that nothing is
  /// left on them. A plan on its way is given up. With none, those that were to leave stay, and may get experts again.
  /// Errors: a GPU that is not there, fewer slots than experts on the others.
  [[nodiscard]] TETROMINO_ABI result<void> try_drain(std::span<const std::uint32_t> gpus) {
    auto left = topology_.try_without(gpus);
    if (!left) return left.error();
    if (auto ok = check_room(*left); !ok) return ok;
    planned_ = std::move(*left);
    start_anew();
    return {};
  }
  TETROMINO_ABI void drain(std::span<const std::uint32_t> gpus) { try_drain(gpus).value(); }

 private:
  using sources = std::vector<std::uint32_t>;  // [requests] nodes

  // Tags on these two are for what compilers add: moves of several counts at once are vector code.
  // What the tokens seen cost under the plan in force.
  struct TETROMINO_ABI outlook {
    cost_report now;      // each request on the node that it is assigned to
    sources homes;        // where such requests run at present
    cost_report running;  // on those; empty where none are said to run
    double tokens_running = 0;

    // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
    TETROMINO_ABI outlook() = default;
    TETROMINO_ABI outlook(outlook&&) = default;
    TETROMINO_ABI outlook& operator=(outlook&&) = default;
  };
  struct TETROMINO_ABI candidate {
    placement experts;
    node_affinity affinity;
    cost_report cost;
    cost_report running;                 // with the homes of the outlook
    std::vector<double> saved_in_layer;  // bytes between nodes before the next look

    // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
    TETROMINO_ABI candidate(placement p, node_affinity a, cost_report c)
        : experts(std::move(p)), affinity(std::move(a)), cost(std::move(c)) {}
    TETROMINO_ABI candidate(candidate&&) = default;
    TETROMINO_ABI candidate& operator=(candidate&&) = default;
  };

  TETROMINO_ABI rebalancer(placement current, topology t, const rebalance_options& options)
      : current_(std::move(current)),
        topology_(t),
        planned_(std::move(t)),
        options_(new rebalance_options(detail::copy_of(options))) {}

  [[nodiscard]] TETROMINO_ABI result<void> check_room(const topology& t) const {
    if (t.slots() >= current_.experts()) return {};
    return error(errc::infeasible,
                 {"rebalance: expected a slot for each of ", current_.experts(), " experts, got ", t.slots()});
  }
  // The next `consider` knows of no traffic before.
  TETROMINO_ABI void start_anew() {
    layers_.clear();
    affinity_.reset();
    keep_loads({});
  }

  [[nodiscard]] TETROMINO_ABI load_table loads_of(const trace_view& seen) const {
    const routing_shape& s = seen.shape;
    load_table out{s.layers, s.experts, std::vector<double>(s.layers * s.experts, 0.0)};
    for (const request& r : seen.requests) {
      const token_range range = r.range(options_->plan.served);
      for (std::uint64_t t = range.first; t < range.last; ++t) {
        const std::span<const std::uint16_t> ids = seen.token(t);
        for (std::size_t i = 0; i < ids.size(); ++i) {
          if (ids[i] != no_expert) out.values[i / s.experts_per_token * s.experts + ids[i]] += 1;
        }
      }
    }
    return out;
  }

  // The node that each request seen would be assigned to.
  [[nodiscard]] TETROMINO_ABI result<sources> assigned(const node_affinity& affinity, const trace_view& seen) const {
    signature_builder builder = affinity.builder();
    std::vector<request_signature> signatures;
    std::vector<std::uint64_t> tokens;
    for (const request& r : seen.requests) {
      signatures.push_back(signature_of(seen, r, builder));
      tokens.push_back(r.range(options_->plan.served).size());
    }
    return try_group(affinity, signatures, tokens);
  }
  [[nodiscard]] TETROMINO_ABI result<cost_report> judge(const placement& p, const trace_view& seen,
                                                        const sources& homes) const {
    cost_options cost;
    cost.tokens = options_->plan.served;
    cost.replicas = options_->replicas;
    return try_evaluate(seen, p, planned_, homes, cost);
  }

  [[nodiscard]] TETROMINO_ABI result<outlook> look(const placement& here, const trace_view& seen,
                                                   double tokens_running) const {
    std::optional<node_affinity> learnt;
    if (!affinity_) {
      auto made = node_affinity::try_make(here, planned_, seen, options_->group);
      if (!made) return made.error();
      learnt.emplace(std::move(*made));
    }
    auto homes = assigned(affinity_ ? *affinity_ : *learnt, seen);
    if (!homes) return homes.error();
    auto now = judge(here, seen, *homes);
    if (!now) return now.error();
    outlook out;
    out.now = std::move(*now);
    out.homes = std::move(*homes);
    out.tokens_running = std::min(tokens_running, options_->tokens_ahead);
    if (out.tokens_running == 0) return out;
    if (affinity_) {
      out.running = out.now;
      return out;
    }
    // nothing has assigned requests yet, so they run anywhere
    std::vector<std::uint32_t> live;
    for (std::size_t n = 0; n < planned_.nodes(); ++n) {
      if (planned_.slots_on_node(n) > 0) live.push_back(static_cast<std::uint32_t>(n));
    }
    for (std::size_t r = 0; r < out.homes.size(); ++r) out.homes[r] = live[r % live.size()];
    auto running = judge(here, seen, out.homes);
    if (!running) return running.error();
    out.running = std::move(*running);
    return out;
  }

  [[nodiscard]] TETROMINO_ABI result<candidate> find(const placement& here, const trace_view& seen,
                                                     const std::optional<outlook>& before) const {
    local_options how = detail::copy_of(options_->plan);
    how.start = &here;
    auto plan = try_local(seen, planned_, how);
    if (!plan) return plan.error();
    placement next = align(here, std::move(plan->experts), planned_);
    for (int pass = 0;; ++pass) {
      auto affinity = node_affinity::try_make(next, planned_, seen, options_->group);
      if (!affinity) return affinity.error();
      const auto homes = assigned(*affinity, seen);
      if (!homes) return homes.error();
      auto cost = judge(next, seen, *homes);
      if (!cost) return cost.error();
      candidate out(std::move(next), std::move(*affinity), std::move(*cost));
      if (!before) return out;
      if (before->tokens_running > 0) {
        auto running = judge(out.experts, seen, before->homes);
        if (!running) return running.error();
        out.running = std::move(*running);
      }
      out.saved_in_layer = saved(*before, out);
      if (pass > 0 || options_->byte_budget == 0 || !keep_within_budget(here, out)) return out;
      next = std::move(out.experts);
    }
  }

  // Bytes between nodes before the next look, by layer: tokens of requests to come are assigned anew, those of requests
  // that run are not.
  [[nodiscard]] TETROMINO_ABI std::vector<double> saved(const outlook& before, const candidate& next) const {
    std::vector<double> out;
    const auto fewer = [](const cost_report& from, const cost_report& to, std::size_t l) {  // visits per token
      if (from.tokens == 0) return 0.0;
      return (static_cast<double>(from.visits_of_layer[l]) - static_cast<double>(to.visits_of_layer[l])) /
             static_cast<double>(from.tokens);
    };
    for (std::size_t l = 0; l < current_.layers(); ++l) {
      out.push_back(options_->bytes_per_visit *
                    ((options_->tokens_ahead - before.tokens_running) * fewer(before.now, next.cost, l) +
                     before.tokens_running * fewer(before.running, next.running, l)));
    }
    return out;
  }

  // Gives up the layers that gain least for what they move; true if there are any.
  [[nodiscard]] TETROMINO_ABI bool keep_within_budget(const placement& here, candidate& next) const {
    auto part = migrate_within(here, std::move(next.experts), planned_, options_->bytes_per_expert,
                               {.bytes_between_nodes = options_->byte_budget}, next.saved_in_layer);
    next.experts = std::move(part.reached);
    return !part.layers_left.empty();
  }

  [[nodiscard]] TETROMINO_ABI bool pays(const rebalance_report& r) const {
    if (r.way.moves == 0) return false;
    if (r.node_imbalance >= options_->node_imbalance && r.planned_node_imbalance < r.node_imbalance) return true;
    return r.bytes_saved > options_->least_return * r.way.bytes_between_nodes;
  }

  // Member by member: objects for different instruction sets share the assignment that compilers add to load_table, and
  // with -O1 clang calls it.
  TETROMINO_ABI void keep_loads(load_table&& loads) {
    loads_.layers = loads.layers, loads_.experts = loads.experts, loads_.values = std::move(loads.values);
  }
  TETROMINO_ABI void begin(candidate found, load_table loads, const migration& way) {
    next_ = std::move(found.experts);
    next_affinity_ = std::move(found.affinity);
    keep_loads(std::move(loads));
    for (std::size_t l = 0; l < current_.layers(); ++l) {
      if (std::equal(current_.layer(l).begin(), current_.layer(l).end(), next_.layer(l).begin())) continue;
      const auto moved =
          std::find_if(way.layers.begin(), way.layers.end(), [&](const layer_migration& m) { return m.layer == l; });
      layers_.push_back(moved == way.layers.end() ? layer_migration{l, 0, {}} : *moved);
    }
    if (layers_.empty()) affinity_ = std::move(next_affinity_);
  }

  placement current_, next_;
  topology topology_;
  topology planned_;  // without the GPUs that shall leave: plans are made, and judged, on this
  std::shared_ptr<const rebalance_options> options_;  // which copies share
  std::optional<node_affinity> affinity_, next_affinity_;
  load_table loads_;                    // that the plan in force was made for
  std::deque<layer_migration> layers_;  // still to be migrated
};

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
