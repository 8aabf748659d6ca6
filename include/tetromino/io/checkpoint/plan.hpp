#pragma once

#include "../../detail/macros_off.hpp"

#include "../pack_rule.hpp"  // pack_rule, matches
#include "inputs.hpp"        // input_knowledge
#include "layouts.hpp"       // checkpoint_layout, stored_weight
#include "parameters.hpp"    // parameter
#include "rows.hpp"          // detail::read_floats

#include <algorithm>      // std::any_of
#include <map>            // std::map
#include <optional>       // std::optional
#include <string>         // std::string
#include <unordered_map>  // std::unordered_map
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What to pack, and how.
struct plan_options {
  checkpoint_layout layout = checkpoint_layout::linear;
  std::vector<pack_rule> rules{};   ///< of those that match a weight, the last counts
  std::vector<std::string> keep{};  ///< patterns with * and ? for names of parameters that stay as they are
  std::vector<std::string> pack{};  ///< patterns for parameters to pack although their role is not known
  /// By name, before any rule: recipes of weights, nothing for those that stay. What plan_within chooses.
  std::unordered_map<std::string, std::optional<recipe>> chosen{};
  const input_knowledge* inputs = nullptr;  ///< weighs errors, and gives NVFP4 readers the scales of activations
  /// NVFP4: a tensor scale for each weight, also where readers take one for several; in layout linear also a recipe.
  bool separate_scales = false;
};

/// What happens to a parameter.
enum class pack_action : std::uint8_t {
  keep,    ///< it stays as it is
  decode,  ///< it is stored as BF16, because its FP8 or 4-bit form means nothing to readers of the layout
  pack,    ///< its values are packed
  copy,    ///< its 4-bit codes stay, with the names of the layout
  cast,    ///< MXFP4 becomes NVFP4: the same values, wherever their scales lie within 2^17 of the largest
};

/// What happens to a parameter, and the tensors that it becomes.
struct planned_parameter {
  const parameter* source = nullptr;
  pack_action action = pack_action::keep;
  recipe how{};
  std::string reason{};                 ///< why it is kept or decoded
  std::vector<stored_weight> stored{};  ///< where it is packed, cast or copied

  [[nodiscard]] TETROMINO_ABI bool is_packed() const noexcept {
    return action != pack_action::keep && action != pack_action::decode;
  }
};

/// What happens to all parameters of a model, in their order.
struct pack_plan {
  plan_options options;
  std::vector<planned_parameter> parameters;
  std::size_t sets = 0;  ///< parameter::set is less
};

inline namespace TETROMINO_ISA {

/// What a parameter takes in the files of a plan, in bits, the scale of its activations aside.
[[nodiscard]] inline std::size_t stored_bits(const planned_parameter& planned) {
  if (planned.action == pack_action::decode) return 16 * planned.source->elements();
  if (!planned.is_packed()) return 8 * planned.source->values->bytes;
  std::size_t bits = 0;
  for (const auto& stored : planned.stored) {
    for (const auto* part : stored.parts()) {
      if (part != &stored.input_scale) bits += 8 * detail::tensor_bytes(part->dtype, part->shape).value();
    }
  }
  return bits;
}

/// Decides what happens to each parameter. Weights that readers run as one matrix are packed alike or kept together.
/// `parameters` are those of `from`, and must outlive the plan. Errors: invalid_argument for recipes that the layout
/// cannot hold, for patterns that match nothing or ask to pack what is no matrix, and for two recipes within one
/// reader's matrix.
[[nodiscard]] result<pack_plan> try_plan(const checkpoint& from, const std::vector<parameter>& parameters,
                                         plan_options options);
[[nodiscard]] inline pack_plan plan(const checkpoint& from, const std::vector<parameter>& parameters,
                                    plan_options options) {
  return try_plan(from, parameters, std::move(options)).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline bool rule_matches(const io::pack_rule& rule, const io::parameter& p) {
  const bool is_experts =
      p.kind.role == io::tensor_role::routed_expert || p.kind.role == io::tensor_role::fused_experts;
  return is_for(rule, p.name, is_experts, p.kind.role == io::tensor_role::linear);
}

class planner {
 public:
  planner(const io::checkpoint& from, const std::vector<io::parameter>& parameters, io::plan_options&& options)
      : from_(from), parameters_(parameters) {
    plan_.options = std::move(options);
  }

  [[nodiscard]] result<io::pack_plan> make() {
    if (auto fits = check_options(); !fits) return fits.error();
    for (const auto& p : parameters_) {
      auto planned = decide(p);
      if (!planned) return planned.error();
      plan_.parameters.push_back(std::move(*planned));
      plan_.sets = std::max(plan_.sets, p.set + 1);
    }
    if (auto together = join_sets(); !together) return together.error();
    for (auto& planned : plan_.parameters) {
      if (auto done = finish(planned); !done) return done.error();
    }
    name_input_scales();
    if (std::none_of(plan_.parameters.begin(), plan_.parameters.end(), [](const auto& p) { return p.is_packed(); })) {
      return error(errc::invalid_argument,
                   {from_.path().string(), ": expected a weight to pack, found none in ", parameters_.size(),
                    " tensors (--dry-run says why each is kept, --pack packs by name)"});
    }
    return std::move(plan_);
  }

 private:
  using action = io::pack_action;
  using encoding = io::value_encoding;

  [[nodiscard]] const io::plan_options& options() const noexcept { return plan_.options; }
  [[nodiscard]] bool is_ours() const noexcept { return options().layout == io::checkpoint_layout::linear; }

  [[nodiscard]] result<void> check_options() const {
    const recipe* first = nullptr;
    for (const auto& rule : options().rules) {
      if (auto fits = io::try_fit(options().layout, rule.how); !fits) return fits;
      if (first != nullptr && first->format != rule.how.format && options().layout == io::checkpoint_layout::modelopt) {
        return error(errc::invalid_argument, "layout modelopt holds one format");
      }
      first = &rule.how;
      if (rule.pattern.empty()) continue;
      if (std::none_of(parameters_.begin(), parameters_.end(),
                       [&](const io::parameter& p) { return rule_matches(rule, p); })) {
        return unmatched("recipe", rule.pattern, parameters_, name_of);
      }
    }
    if (auto all = all_match("keep", options().keep, parameters_, name_of); !all) return all;
    return all_match("pack", options().pack, parameters_, name_of);
  }
  static std::string_view name_of(const io::parameter& p) noexcept { return p.name; }

  static io::planned_parameter kept(const io::parameter& p, std::string reason) {
    return {&p, action::keep, {}, std::move(reason)};
  }

  [[nodiscard]] result<io::planned_parameter> decide(const io::parameter& p) const {
    if (const auto* pattern = match_of(p.name, options().keep)) return kept(p, text("--keep ", *pattern));
    if (const auto* pattern = match_of(p.name, options().pack)) {
      if (p.rows == 0 || p.elements() == 0 || p.kind.role == io::tensor_role::scale || !can_read(p)) {
        return error(errc::invalid_argument,
                     {"--pack ", *pattern, ": expected matrices of BF16, F16, F32, FP8 or 4 ", "bits, got tensor ",
                      printable(p.name), ", ", io::name(p.values->dtype), ' ', shape_text(p.shape)});
      }
    } else if (!p.is_weight()) {
      return kept(p, p.kind.kept_because);
    }
    const recipe* how = nullptr;
    for (const auto& rule : options().rules) {
      if (rule_matches(rule, p)) how = &rule.how;
    }
    if (const auto found = options().chosen.find(p.name); found != options().chosen.end()) {
      if (!found->second) return kept(p, "chosen, within the budget of bits");
      how = &*found->second;
    }
    if (how == nullptr) return kept(p, "no recipe is for it");
    if (options().layout == io::checkpoint_layout::gpt_oss && p.kind.role != io::tensor_role::fused_experts) {
      return kept(p, "readers of layout gpt-oss take packed experts alone");
    }
    if (!is_ours() && p.cols % how->format.block != 0) {
      return kept(p, text("K = ", p.cols, " is not whole blocks of ", how->format.block));
    }
    if (!is_ours() && p.shape.size() == 2 && p.kind.is_transposed) {
      return kept(
          p, text("stored [K, outputs], which readers of layout ", io::name(options().layout), " do not take packed"));
    }
    return io::planned_parameter{&p, action_for(p, *how), *how};
  }

  static bool can_read(const io::parameter& p) {
    const io::dtype type = p.values->dtype;
    return p.encoding != encoding::plain || type == io::dtype::F32 || type == io::dtype::F16 || type == io::dtype::BF16;
  }

  /// Codes stay where the recipe wants the format that they have.
  static action action_for(const io::parameter& p, const recipe& how) {
    if (how.rotation != 0 || how.error_feedback) return action::pack;
    if (p.encoding == encoding::mxfp4 && how.format == any_format(mxfp4{})) return action::copy;
    if (p.encoding == encoding::mxfp4 && how.format == any_format(nvfp4{})) return action::cast;
    if (p.encoding == encoding::nvfp4 && how.format == any_format(nvfp4{})) return action::copy;
    return action::pack;
  }

  /// What readers run as one matrix is packed by one recipe, in one way, or kept.
  [[nodiscard]] result<void> join_sets() {
    if (is_ours() && options().separate_scales) return {};
    std::map<std::size_t, std::vector<io::planned_parameter*>> sets;
    for (auto& planned : plan_.parameters) {
      if (planned.source->is_weight()) sets[planned.source->set].push_back(&planned);
    }
    for (auto& [number, members] : sets) {
      if (members.size() < 2) continue;
      const io::planned_parameter* aside = nullptr;
      for (const auto* member : members) {
        if (!member->is_packed()) aside = member;
      }
      if (aside != nullptr) {
        for (auto* member : members) {
          if (!member->is_packed() || is_ours()) continue;
          *member = kept(*member->source, text("readers run it as one with ", aside->source->name, ", which is kept"));
        }
        continue;
      }
      for (auto* member : members) {
        if (member->how == members.front()->how) continue;
        return error(errc::invalid_argument,
                     {"tensors ", printable(members.front()->source->name), " and ", printable(member->source->name),
                      ": expected one recipe, since readers run them as one ", "matrix, got ",
                      members.front()->how.name(), " and ", member->how.name()});
      }
      if (auto done = join_actions(members); !done) return done;
    }
    return {};
  }

  /// NVFP4 codes stay where the members of a set have one tensor scale already.
  [[nodiscard]] result<void> join_actions(std::vector<io::planned_parameter*>& members) const {
    bool alike = true;
    std::vector<float> first;
    for (const auto* member : members) {
      alike = alike && member->action == members.front()->action;
      if (!alike || member->action != action::copy || member->source->tensor_scales == nullptr) continue;
      auto scales = read_floats(from_, *member->source->tensor_scales);
      if (!scales) return scales.error();
      if (first.empty()) first = *scales;
      alike = options().separate_scales || *scales == first;
    }
    for (auto* member : members) {
      if (!alike) member->action = action::pack;
    }
    return {};
  }

  [[nodiscard]] result<void> finish(io::planned_parameter& planned) const {
    const io::parameter& p = *planned.source;
    if (planned.is_packed()) {
      planned.stored = stored_in(options().layout, planned.how.format, p, from_.config());
      return {};
    }
    if (p.encoding == encoding::plain) return {};
    planned.action = action::decode;
    if (p.scales->name.ends_with("_scales")) {
      return error(errc::invalid_argument,
                   {"tensor ", printable(p.name), ": expected a weight that is packed, since what gpt-oss stores ",
                    "in 4 bits cannot be kept as it is beside others (", planned.reason, ')'});
    }
    return {};
  }

  /// Readers pack activations where every weight has the scale of its input; one without it, and none does.
  void name_input_scales() {
    const auto where = options().layout;
    const bool has_room =
        where == io::checkpoint_layout::compressed_tensors || where == io::checkpoint_layout::modelopt;
    const auto knows = [&](const io::planned_parameter& planned) {
      const io::parameter& p = *planned.source;
      if (!planned.is_packed()) return true;
      if (planned.how.format.scale != scale_type::e4m3) return false;
      for (std::size_t e = 0; e < p.matrices; ++e) {
        const bool known = options().inputs != nullptr && options().inputs->input_amax(p, e);
        if (!known && p.input_scale == nullptr) return false;
      }
      return true;
    };
    if (!has_room || !std::all_of(plan_.parameters.begin(), plan_.parameters.end(), knows)) return;
    const bool divides = where == io::checkpoint_layout::compressed_tensors;
    for (auto& planned : plan_.parameters) {
      for (auto& stored : planned.stored) {
        const std::string& scale = stored.scales.name;  // MODULE.weight_scale
        const std::string module = scale.substr(0, scale.size() - std::string_view("weight_scale").size());
        stored.input_scale = {module + (divides ? "input_global_scale" : "input_scale"), io::dtype::F32,
                              divides ? std::vector<std::size_t>{1} : std::vector<std::size_t>{}};
      }
    }
  }

  const io::checkpoint& from_;
  const std::vector<io::parameter>& parameters_;
  io::pack_plan plan_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

inline result<pack_plan> try_plan(const checkpoint& from, const std::vector<parameter>& parameters,
                                  plan_options options) {
  return detail::planner(from, parameters, std::move(options)).make();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
