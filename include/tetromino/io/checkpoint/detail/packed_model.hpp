#pragma once

#include "../../../detail/macros_off.hpp"

#include "../layouts.hpp"     // checkpoint_layout, stored_weight
#include "../options.hpp"     // verify_options
#include "../parameters.hpp"  // parameter
#include "../plan.hpp"        // rule_matches
#include "../rows.hpp"        // read_floats

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>      // std::none_of
#include <cmath>          // std::isfinite
#include <cstddef>        // std::size_t
#include <map>            // std::map
#include <optional>       // std::optional
#include <string>         // std::string
#include <string_view>    // std::string_view
#include <unordered_set>  // std::unordered_set
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// How one parameter of the original is stored in the packed model.
struct found_parameter {
  const io::parameter* source = nullptr;
  any_format format{};
  std::optional<recipe> how{};
  std::vector<io::stored_weight> stored{};          ///< empty: kept
  std::vector<std::vector<float>> tensor_scales{};  ///< for each stored weight, as stored
};
/// What a reader of its layout finds in a packed model, beside the original's parameters.
class packed_model {
 public:
  packed_model(const io::checkpoint& original, const io::checkpoint& packed) : original_(original), packed_(packed) {}

  /// Finds the layout and every parameter. Errors: malformed_file where one is missing, has another type or shape, or
  /// is packed although it must not be.
  [[nodiscard]] result<void> try_find() {
    auto parameters = io::try_parameters_of(original_);
    if (!parameters) return parameters.error();
    parameters_ = std::move(*parameters);
    if (auto done = find_layout(); !done) return done;
    return find_all();
  }

  [[nodiscard]] const io::checkpoint& original() const noexcept { return original_; }
  [[nodiscard]] const io::checkpoint& files() const noexcept { return packed_; }
  [[nodiscard]] io::checkpoint_layout layout() const noexcept { return layout_; }
  /// quantization_config, or null.
  [[nodiscard]] const nlohmann::json& config() const noexcept { return config_; }
  /// In the order of the original.
  [[nodiscard]] const std::vector<found_parameter>& parameters() const noexcept { return found_; }
  [[nodiscard]] bool is_used(const std::string& tensor) const { return used_.contains(tensor); }
  /// The recipes that the files name, for people; empty if they name none.
  [[nodiscard]] const std::string& recipes() const noexcept { return recipes_; }

  template <class... Pieces>
  [[nodiscard]] error wrong(const Pieces&... what) const {
    return error(errc::malformed_file, {packed_.path().string(), ": ", what...});
  }
  template <class... Pieces>
  [[nodiscard]] error wrong_tensor(const std::string& name, const Pieces&... what) const {
    return wrong("tensor ", printable(name), ": ", what...);
  }

 private:
  /// The layout, as readers find it: in config.json, or else in the metadata of the file.
  [[nodiscard]] result<void> find_layout() {
    const auto& metadata = packed_.metadata();
    if (packed_.config().is_object() && packed_.config().contains("quantization_config")) {
      config_ = packed_.config()["quantization_config"];
    }
    if (const auto found = metadata.find("quantization_config"); packed_.is_single_file() && found != metadata.end()) {
      if (const auto bad = parse_json(found->second, config_); !bad.empty()) {
        return wrong("metadata quantization_config: ", bad);
      }
    }
    const std::string method = json_text(config_, "quant_method");
    const std::string by_method = method == "mxfp4" ? "gpt-oss" : method;
    const auto named = metadata.find("tetromino.layout");
    if (by_method.empty() && named == metadata.end()) {
      return wrong("expected a model that was packed, but neither config.json nor the files' metadata say so");
    }
    if (!by_method.empty() && named != metadata.end() && by_method != named->second) {
      return wrong("quantization_config says ", printable(by_method), ", the files' metadata ",
                   printable(named->second));
    }
    const auto layout = io::try_checkpoint_layout_named(by_method.empty() ? named->second : by_method);
    if (!layout) return layout.error();
    layout_ = *layout;
    if (const auto found = metadata.find("tetromino.recipe"); found != metadata.end()) {
      auto how = recipe::try_parse(found->second);
      if (!how) return how.error();
      rules_.push_back({"", *how});
      recipes_ = found->second;
    } else if (const auto several = metadata.find("tetromino.recipes"); several != metadata.end()) {
      if (auto read = read_rules(several->second); !read) return read;
    }
    return read_weights();
  }

  [[nodiscard]] result<void> read_rules(const std::string& text_of_rules) {
    nlohmann::json list;
    if (const auto bad = parse_json(text_of_rules, list); !bad.empty() || !list.is_array()) {
      return wrong("metadata tetromino.recipes: expected a JSON list");
    }
    for (const auto& rule : list) {
      if (!rule.is_object()) return wrong("metadata tetromino.recipes: expected objects");
      auto how = recipe::try_parse(json_text(rule, "recipe"));
      if (!how) return how.error();
      rules_.push_back({json_text(rule, "weights"), *how});
      const std::string& pattern = rules_.back().pattern;
      recipes_ += text(recipes_.empty() ? "" : ", ", pattern, pattern.empty() ? "" : "=", how->name());
    }
    return {};
  }

  /// Which weights are packed, and how, where the files list them.
  [[nodiscard]] result<void> read_weights() {
    for (std::size_t f = 0; f < packed_.file_count(); ++f) {
      const auto found = packed_.metadata(f).find("tetromino.weights");
      if (found == packed_.metadata(f).end()) continue;
      nlohmann::json weights;
      if (const auto bad = parse_json(found->second, weights); !bad.empty() || !weights.is_object()) {
        return wrong("metadata tetromino.weights: expected a JSON object");
      }
      for (const auto& [name, facts] : weights.items()) weights_[name] = facts;
    }
    return {};
  }

  [[nodiscard]] result<void> find_all() {
    for (const auto& p : parameters_) {
      auto one = find(p);
      if (!one) return one.error();
      found_.push_back(std::move(*one));
    }
    std::unordered_set<std::string_view> names;
    for (const auto& p : parameters_) names.insert(p.name);
    for (const auto& entry : weights_) {
      if (names.contains(entry.first)) continue;
      return wrong("metadata tetromino.weights names ", printable(entry.first), ", which the original does not have");
    }
    return {};
  }

  /// The format of a weight in the packed model; nothing where it is not packed.
  [[nodiscard]] result<std::optional<any_format>> format_of(const io::parameter& p) const {
    if (layout_ == io::checkpoint_layout::linear) {
      const auto found = weights_.find(p.name);
      if (found == weights_.end()) return std::optional<any_format>();
      const auto how = recipe::try_parse(json_text(found->second, "recipe"));
      if (!how) return how.error();
      const nlohmann::json shape =
          p.shape.size() == 3 ? nlohmann::json{p.matrices, p.rows, p.cols} : nlohmann::json{p.rows, p.cols};
      const nlohmann::json given = found->second.contains("shape") ? found->second["shape"] : nlohmann::json();
      if (given != shape) {
        return wrong_tensor(p.name, "the packed file gives it another shape than the original: expected ", shape.dump(),
                            ", found ", given.dump());
      }
      return std::optional<any_format>(how->format);
    }
    if (p.rows == 0) return std::optional<any_format>();
    const auto parts = stored_in(layout_, mxfp4{}, p, original_.config());
    const auto* codes = packed_.find(parts.front().codes.name);
    const auto* scales = packed_.find(parts.front().scales.name);
    if (codes == nullptr || scales == nullptr || codes->dtype != io::dtype::U8) return std::optional<any_format>();
    return std::optional<any_format>(scales->dtype == io::dtype::F8_E4M3 ? any_format(nvfp4{}) : any_format(mxfp4{}));
  }

  [[nodiscard]] result<found_parameter> find(const io::parameter& p) {
    found_parameter out{&p};
    const auto format = format_of(p);
    if (!format) return format.error();
    if (!*format) {
      const auto* kept = packed_.find(p.name);
      if (kept == nullptr) return wrong_tensor(p.name, "it is missing, in every form that its layout has");
      const bool decoded = p.encoding != io::value_encoding::plain;
      const io::dtype type = decoded ? io::dtype::BF16 : p.values->dtype;
      if (kept->dtype != type || kept->shape != p.shape) {
        return wrong_tensor(p.name, "expected ", io::name(type), ' ', shape_text(p.shape), ", found ",
                            io::name(kept->dtype), ' ', shape_text(kept->shape));
      }
      used_.insert(p.name);
      return out;
    }
    out.format = **format;
    if (auto packs = check_role(p); !packs) return packs.error();
    if (const auto listed = weights_.find(p.name); listed != weights_.end()) {
      const auto how = recipe::try_parse(json_text(listed->second, "recipe"));
      if (!how) return how.error();
      if (!rules_.empty() && std::none_of(rules_.begin(), rules_.end(), [&](const io::pack_rule& rule) {
            return rule.how == *how && rule_matches(rule, p);
          })) {
        return wrong_tensor(p.name, "metadata tetromino.weights says it is packed as ", how->name(),
                            ", but the recipes that the files name for it are others: ", printable(recipes_));
      }
      out.how = *how;
    } else {
      for (const auto& rule : rules_) {
        if (rule_matches(rule, p)) out.how = rule.how;
      }
    }
    if (out.how && out.how->format != out.format) {
      return wrong_tensor(p.name, "expected ", name_of(out.how->format), ", found ", name_of(out.format));
    }
    out.stored = stored_in(layout_, out.format, p, original_.config());
    for (auto& stored : out.stored) {
      if (auto fits = check_parts(stored, out); !fits) return fits.error();
    }
    return out;
  }

  /// What routes, normalizes, convolves or embeds is never packed; by --pack, other things may be.
  [[nodiscard]] result<void> check_role(const io::parameter& p) const {
    using role = io::tensor_role;
    for (const role never : {role::router, role::shared_expert_gate, role::norm, role::convolution, role::state_space,
                             role::bias, role::scale, role::embedding}) {
      if (p.kind.role == never) {
        return wrong_tensor(p.name, "it is packed, but it is ", p.kind.kept_because, ", which readers take as it was");
      }
    }
    if (layout_ == io::checkpoint_layout::gpt_oss && p.kind.role != role::fused_experts) {
      return wrong_tensor(p.name, "readers of layout gpt-oss take packed experts alone");
    }
    return {};
  }

  /// All tensors of a stored weight are there with their types and shapes.
  [[nodiscard]] result<void> check_parts(io::stored_weight& stored, found_parameter& out) {
    const std::string& scale = stored.scales.name;
    if (scale.ends_with(".weight_scale")) {
      const std::string module = scale.substr(0, scale.size() - std::string_view("weight_scale").size());
      const bool divides = layout_ == io::checkpoint_layout::compressed_tensors;
      const std::string input = module + (divides ? "input_global_scale" : "input_scale");
      if (packed_.find(input) != nullptr) {
        stored.input_scale = {input, io::dtype::F32,
                              divides ? std::vector<std::size_t>{1} : std::vector<std::size_t>{}};
      }
    }
    for (const auto* part : stored.parts()) {
      const auto* tensor = packed_.find(part->name);
      if (tensor == nullptr) return wrong_tensor(part->name, "it is missing");
      if (tensor->dtype != part->dtype || tensor->shape != part->shape) {
        return wrong_tensor(part->name, "expected ", io::name(part->dtype), ' ', shape_text(part->shape), ", found ",
                            io::name(tensor->dtype), ' ', shape_text(tensor->shape));
      }
      used_.insert(part->name);
    }
    std::vector<float> scales;
    if (!stored.tensor_scale.name.empty()) {
      auto read = read_floats(packed_, *packed_.find(stored.tensor_scale.name));
      if (!read) return read.error();
      scales = std::move(*read);
      for (float& value : scales) {
        value = loaded_scale(layout_, value);
        if (!(value > 0.0f && std::isfinite(value))) {
          return wrong_tensor(stored.tensor_scale.name, "expected a positive, finite tensor scale, found ", value);
        }
      }
    }
    out.tensor_scales.push_back(std::move(scales));
    return {};
  }

  const io::checkpoint& original_;
  const io::checkpoint& packed_;
  std::vector<io::parameter> parameters_;
  io::checkpoint_layout layout_ = io::checkpoint_layout::linear;
  nlohmann::json config_;
  std::string recipes_;
  std::vector<io::pack_rule> rules_;
  std::map<std::string, nlohmann::json> weights_;
  std::vector<found_parameter> found_;
  std::unordered_set<std::string> used_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
