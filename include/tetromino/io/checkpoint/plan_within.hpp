#pragma once

#include "../../detail/macros_off.hpp"

#include "../../allocate.hpp"            // try_allocate
#include "../../detail/float_state.hpp"  // default_float_state
#include "detail/loss_meter.hpp"         // loss_meter
#include "options.hpp"                   // pack_options
#include "plan.hpp"                      // pack_plan

#include <algorithm>      // std::all_of, std::any_of, std::max, std::min
#include <cmath>          // std::ceil, std::isfinite
#include <cstddef>        // std::size_t
#include <cstdint>        // std::uint64_t
#include <deque>          // std::deque
#include <string>         // std::string
#include <unordered_map>  // std::unordered_map
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What may be chosen for weights, and how many bits that may take.
struct bit_budget {
  double bits = 4.5;                 ///< for each weight on average
  std::vector<recipe> candidates{};  ///< one of them for each weight, or for all that readers run as one
  bool may_keep = false;             ///< weights may also stay as they are
  /// Noise over signal that packing its inputs adds to a product with packed weights, as W4A4 does; inputs of weights
  /// that stay are not packed. 0.0066 is NVFP4's (21.8 dB).
  double input_noise = 0;
};

/// A plan that keeps a budget.
struct budgeted_plan {
  pack_plan plan;
  std::size_t weights = 0;  ///< values that the budget is for
  std::size_t bits = 0;     ///< that they take
  double error = 0;         ///< noise over signal, the mean over products
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline bool is_expert(const io::parameter& p) {
  return p.kind.role == io::tensor_role::routed_expert || p.kind.role == io::tensor_role::fused_experts;
}

/// What the names of a layer's experts begin with.
inline std::string experts_of(const io::parameter& p) {
  const tensor_path path(p.name);
  std::string module;
  for (std::size_t i = 0; i + 1 < path.pieces.size(); ++i) {
    module += text(path.pieces[i], '.');
    if (has_word(lower(path.pieces[i]), "experts")) return module;
  }
  return std::string(path.parent);
}

/// What must share a recipe: sets, and in layouts of others, whose readers run all experts of a layer in one way,
/// these. In ours, sets are apart where their tensor scales are.
inline std::string choice_of(const io::parameter& p, const io::plan_options& options) {
  const bool is_ours = options.layout == io::checkpoint_layout::linear;
  if (is_ours && options.separate_scales) return p.name;
  return !is_ours && is_expert(p) ? experts_of(p) : text("set ", p.set);
}

/// The product that a weight belongs to: all experts of a layer make one, to which each token brings a few of them.
inline std::string product_of(const io::parameter& p) {
  return is_expert(p) ? text(experts_of(p), ' ', tensor_path(p.name).leaf) : p.name;
}

template <class Policy>
class budget_planner {
 public:
  budget_planner(const Policy& policy, const io::checkpoint& from, const std::vector<io::parameter>& parameters,
                 io::plan_options&& options, const io::bit_budget& budget, const io::pack_options& how)
      : policy_(policy),
        from_(from),
        parameters_(parameters),
        options_(std::move(options)),
        budget_(budget),
        how_(how) {}

  [[nodiscard]] result<io::budgeted_plan> make() {
    if (auto planned = plan_candidates(); !planned) return planned.error();
    find_choices();
    // in doubles of 53 bits, which is exact for models of up to 2^47 weights
    const auto most = static_cast<std::uint64_t>(budget_.bits * static_cast<double>(weights_));
    if (auto fits = check_least(most); !fits) return fits.error();
    if (auto measured = measure(); !measured) return measured.error();
    std::vector<std::vector<allocation_candidate>> matrices;
    for (const auto& one : choices_) {
      auto& candidates = matrices.emplace_back();
      for (const way& w : one.ways) candidates.push_back({w.bits, loss_of(one, w)});
    }
    auto found = try_allocate(matrices, most);
    if (!found) return found.error();
    return finish(*found);
  }

 private:
  static constexpr std::size_t keep = static_cast<std::size_t>(-1);

  struct way {
    std::size_t candidate = keep;
    std::uint64_t bits = 0;
  };
  struct choice {
    std::vector<std::size_t> members;  // parameters
    std::vector<way> ways;
  };

  /// One plan for each candidate, as if it were the only one.
  [[nodiscard]] result<void> plan_candidates() {
    if (!(budget_.input_noise >= 0 && std::isfinite(budget_.input_noise))) {
      return error(errc::invalid_argument, {"expected a finite input noise of at least 0, got ", budget_.input_noise});
    }
    for (const auto& rule : options_.rules) {
      if (!rule.pattern.empty()) continue;
      return error(errc::invalid_argument, {"recipe ", rule.how.name(), " is for all weights: where bits are ",
                                            "limited, it belongs to the candidates"});
    }
    if (budget_.candidates.empty()) {
      return error(errc::invalid_argument, "expected a recipe among the candidates, got none");
    }
    for (const recipe& candidate : budget_.candidates) {
      io::plan_options options = options_;
      options.rules.insert(options.rules.begin(), {"", candidate});
      auto plan = io::try_plan(from_, parameters_, std::move(options));
      if (!plan) return plan.error();
      plans_.push_back(std::move(*plan));
    }
    return {};
  }

  [[nodiscard]] bool is_packed(std::size_t i) const {
    return std::any_of(plans_.begin(), plans_.end(), [&](const auto& plan) { return plan.parameters[i].is_packed(); });
  }
  [[nodiscard]] bool has_rule(std::size_t i) const {
    return std::any_of(options_.rules.begin(), options_.rules.end(),
                       [&](const auto& rule) { return rule_matches(rule, parameters_[i]); });
  }

  void find_choices() {
    std::unordered_map<std::string, std::size_t> number;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (!is_packed(i)) continue;
      const auto at = number.try_emplace(choice_of(parameters_[i], options_), choices_.size()).first->second;
      if (at == choices_.size()) choices_.emplace_back();
      choices_[at].members.push_back(i);
      weights_ += parameters_[i].elements();
    }
    for (auto& one : choices_) {
      const bool is_given =
          std::any_of(one.members.begin(), one.members.end(), [&](std::size_t i) { return has_rule(i); });
      for (std::size_t c = 0; c < plans_.size() && !(is_given && !one.ways.empty()); ++c) {
        const bool packs_all = std::all_of(one.members.begin(), one.members.end(),
                                           [&](std::size_t i) { return plans_[c].parameters[i].is_packed(); });
        if (packs_all) one.ways.push_back({c, bits_of(one, c)});
      }
      if (budget_.may_keep && !is_given) one.ways.push_back({keep, bits_of(one, keep)});
    }
  }

  [[nodiscard]] std::uint64_t bits_of(const choice& one, std::size_t candidate) const {
    std::uint64_t bits = 0;
    for (const std::size_t i : one.members) {
      if (candidate == keep) {
        const io::parameter& p = parameters_[i];
        const bool is_plain = p.encoding == io::value_encoding::plain;
        bits += io::stored_bits({&p, is_plain ? io::pack_action::keep : io::pack_action::decode});
      } else {
        bits += io::stored_bits(plans_[candidate].parameters[i]);
      }
    }
    return bits;
  }

  [[nodiscard]] result<void> check_least(std::uint64_t most) const {
    std::uint64_t least = 0;
    for (const auto& one : choices_) {
      std::uint64_t fewest = one.ways.front().bits;
      for (const way& w : one.ways) fewest = std::min(fewest, w.bits);
      least += fewest;
    }
    if (least <= most) return {};
    const double average = static_cast<double>(least) / static_cast<double>(weights_);
    return error(errc::infeasible, {"expected a budget of at least ", std::ceil(average * 1e4) / 1e4,
                                    " bits for each weight, the least that the candidates allow, got ", budget_.bits});
  }

  /// What each candidate loses of each parameter: batch by batch, so that what is read again is still in the page
  /// cache.
  [[nodiscard]] result<void> measure() {
    std::vector<std::vector<bool>> wanted(plans_.size(), std::vector<bool>(parameters_.size(), false));
    for (const auto& one : choices_) {
      for (const way& w : one.ways) {
        if (w.candidate == keep) continue;
        for (const std::size_t i : one.members) wanted[w.candidate][i] = true;
      }
    }
    losses_.assign(plans_.size(), std::vector<double>(parameters_.size(), 0.0));
    std::vector<double> signal_of(parameters_.size(), 0.0);
    slice_memory memory;
    std::deque<loss_meter<Policy>> meters;
    std::size_t batches = 0;
    for (const auto& plan : plans_) {
      meters.emplace_back(policy_, from_, plan, how_, memory);
      batches = std::max(batches, meters.back().batches());
    }
    for (std::size_t b = 0; b < batches; ++b) {
      for (std::size_t c = 0; c < plans_.size(); ++c) {
        if (b >= meters[c].batches()) continue;
        if (auto done = meters[c].run(b, wanted[c], signal_of, losses_[c]); !done) return done;
      }
    }
    find_losses(signal_of);
    return from_.try_unchanged();
  }

  /// Noise over the signal of the product that a weight is in, of which it has its share.
  void find_losses(const std::vector<double>& signal_of) {
    struct product {
      double signal = 0, weights = 0;
    };
    std::unordered_map<std::string, product> products;
    for (const auto& one : choices_) {
      for (const std::size_t i : one.members) {
        product& whole = products[product_of(parameters_[i])];
        whole.signal += signal_of[i];
        whole.weights += static_cast<double>(parameters_[i].elements());
      }
    }
    products_ = products.size();
    for (std::size_t c = 0; c < plans_.size(); ++c) {
      for (std::size_t i = 0; i < parameters_.size(); ++i) {
        if (!plans_[c].parameters[i].is_packed()) continue;
        const product& whole = products.at(product_of(parameters_[i]));
        double& loss = losses_[c][i];
        loss = whole.signal > 0 ? loss / whole.signal : 0;
        loss += budget_.input_noise * static_cast<double>(parameters_[i].elements()) / whole.weights;
      }
    }
  }

  [[nodiscard]] double loss_of(const choice& one, const way& w) const {
    double loss = 0;
    for (const std::size_t i : one.members) loss += w.candidate == keep ? 0 : losses_[w.candidate][i];
    return loss;
  }

  [[nodiscard]] result<io::budgeted_plan> finish(const allocation& found) {
    options_.rules.clear();  // every weight has its own: what recipes there are, for those who read the files
    for (std::size_t c = 0; c < choices_.size(); ++c) {
      const std::size_t candidate = choices_[c].ways[found.chosen[c]].candidate;
      for (const std::size_t i : choices_[c].members) {
        auto& to = options_.chosen[parameters_[i].name];
        if (candidate == keep) continue;
        to = plans_[candidate].parameters[i].how;
        const bool is_known = std::any_of(options_.rules.begin(), options_.rules.end(),
                                          [&](const io::pack_rule& rule) { return rule.how == *to; });
        if (!is_known) options_.rules.push_back({"", *to});
      }
    }
    auto plan = io::try_plan(from_, parameters_, std::move(options_));
    if (!plan) return plan.error();
    return io::budgeted_plan{std::move(*plan), weights_, static_cast<std::size_t>(found.bits),
                             found.error / static_cast<double>(products_)};
  }

  const Policy& policy_;
  const io::checkpoint& from_;
  const std::vector<io::parameter>& parameters_;
  io::plan_options options_;
  const io::bit_budget& budget_;
  const io::pack_options& how_;
  std::vector<io::pack_plan> plans_;  // of each candidate
  std::vector<choice> choices_;
  std::size_t weights_ = 0, products_ = 0;
  std::vector<std::vector<double>> losses_;  // [candidates][parameters]
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// A plan whose recipes are chosen so that the whole loses least within a budget of bits. Candidates are chosen among
/// for every weight that one of them would pack, and that no rule of `options` names; weights that must share a recipe
/// choose together: what readers run as one matrix, and in layouts other than linear all experts of a layer. What a
/// candidate loses is measured by packing with it, slice by slice as try_pack does, in the same memory: noise over
/// signal of each matrix, times the number of its weights. Noise and signal are squares of the weights, or where
/// options.inputs are given of the products with them (whole matrices at a time, then). The average counts all that is
/// stored for weights, those that may be kept as they are and those that rules name included; not what `keep` names and
/// what is never packed. Errors: those of try_plan for each candidate; invalid_argument for a rule for all weights;
/// infeasible for a budget below the least possible, which the message names; those of the tensors' values and files.
template <class Policy>
[[nodiscard]] result<budgeted_plan> try_plan_within(const Policy& policy, const checkpoint& from,
                                                    const std::vector<parameter>& parameters, plan_options options,
                                                    const bit_budget& budget, const pack_options& how = {}) {
  const detail::default_float_state usual;
  return detail::budget_planner(policy, from, parameters, std::move(options), budget, how).make();
}

/// try_plan_within, throwing its error.
template <class Policy>
[[nodiscard]] budgeted_plan plan_within(const Policy& policy, const checkpoint& from,
                                        const std::vector<parameter>& parameters, plan_options options,
                                        const bit_budget& budget, const pack_options& how = {}) {
  return try_plan_within(policy, from, parameters, std::move(options), budget, how).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
