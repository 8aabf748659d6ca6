#pragma once

#include "../../detail/macros_off.hpp"

#include "pack.hpp"  // file_metadata's names, cast_rows, storable_scale

#include <regex.h>  // ::regcomp, ::regexec

#include <algorithm>      // std::any_of, std::find_if
#include <cctype>         // std::isdigit
#include <cmath>          // std::isfinite
#include <cstddef>        // std::size_t
#include <map>            // std::map
#include <memory>         // std::unique_ptr
#include <mutex>          // std::mutex
#include <optional>       // std::optional
#include <string>         // std::string
#include <string_view>    // std::string_view
#include <unordered_set>  // std::unordered_set
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What a caller may choose about verifying.
struct verify_options {
  const input_knowledge* inputs = nullptr;  ///< what the model was packed with, to pack it again
  std::size_t slice_bytes = 2u << 20;
  std::function<bool(std::size_t)> progress{};  ///< as in pack_options
};

/// What verifying has seen.
struct verify_report {
  checkpoint_layout layout = checkpoint_layout::linear;
  std::string recipes;        ///< as the files say; empty if they do not
  std::size_t packed = 0;     ///< parameters
  std::size_t kept = 0;       ///< parameters, decoded ones among them
  error_report errors{};      ///< of all packed values, as readers decode them
  bool packed_again = false;  ///< all of them gave the same bytes again
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// How one parameter of the original is stored in the packed model.
struct found_parameter {
  const io::parameter* source = nullptr;
  any_format format{};
  std::optional<recipe> how{};
  std::vector<io::stored_weight> stored{};          ///< empty: kept
  std::vector<std::vector<float>> tensor_scales{};  ///< for each stored weight, as stored
};

/// The modules that a list in config.json leaves alone: names, patterns, and after "re:" regular expressions of how
/// their names begin. Nobody vouches for it, so that what would take long to compare is refused.
class module_list {
 public:
  [[nodiscard]] static result<module_list> try_read(const nlohmann::json& list) {
    constexpr std::size_t most = 1000;
    module_list out;
    for (const auto& entry : list) {
      if (!entry.is_string()) continue;
      const std::string pattern = entry.get<std::string>();
      if (pattern.starts_with("re:")) {
        auto compiled = compile(pattern.substr(3));
        if (!compiled) return compiled.error();
        out.expressions_.push_back(std::move(*compiled));
      } else if (pattern.find_first_of("*?") != std::string::npos) {
        out.patterns_.push_back(pattern);
      } else {
        out.names_.insert(pattern);
      }
    }
    if (out.patterns_.size() + out.expressions_.size() <= most) return out;
    return error(errc::malformed_file, text("expected at most ", most, " patterns"));
  }

  [[nodiscard]] bool names(const std::string& module) const {
    return names_.contains(module) || match_of(module, patterns_) != nullptr ||
           std::any_of(expressions_.begin(), expressions_.end(), [&](const auto& compiled) {
             return ::regexec(compiled.get(), module.c_str(), 0, nullptr, 0) == 0;
           });
  }

  /// A name of the list that stands somewhere in a module's, or null.
  [[nodiscard]] const std::string* name_within(const std::string& module) const {
    const auto found = std::find_if(names_.begin(), names_.end(),
                                    [&](const std::string& name) { return module.find(name) != std::string::npos; });
    return found == names_.end() ? nullptr : &*found;
  }

 private:
  struct free_expression {
    void operator()(::regex_t* compiled) const noexcept {
      ::regfree(compiled);
      delete compiled;
    }
  };
  using expression = std::unique_ptr<::regex_t, free_expression>;

  [[nodiscard]] static result<expression> compile(const std::string& written) {
    constexpr std::size_t longest = 500;
    // Counts take memory, and references to what a group has met take time, without bound.
    const auto is_reference = [&](std::size_t i) {
      return written[i] == '\\' && std::isdigit(static_cast<unsigned char>(written[i + 1])) != 0;
    };
    bool is_simple = written.size() <= longest && written.find('{') == std::string::npos;
    for (std::size_t i = 0; is_simple && i + 1 < written.size(); ++i) is_simple = !is_reference(i);
    auto compiled = std::make_unique<::regex_t>();
    if (!is_simple || ::regcomp(compiled.get(), ("^(" + written + ")").c_str(), REG_EXTENDED | REG_NOSUB) != 0) {
      return error(errc::malformed_file,
                   text("expected a regular expression without counts and references, found ", printable(written)));
    }
    return expression(compiled.release());
  }

  std::unordered_set<std::string> names_;
  std::vector<std::string> patterns_;
  std::vector<expression> expressions_;
};

/// Reads a packed model by its layout, beside the original: what a reader would not find, or would decode wrongly, is
/// an error.
template <class Policy>
class verifier {
 public:
  verifier(const Policy& policy, const io::checkpoint& original, const io::checkpoint& packed,
           const io::verify_options& options)
      : executor_(policy.executor), policy_(policy.on({})), original_(original), packed_(packed), options_(options) {}

  [[nodiscard]] result<io::verify_report> run() {
    auto parameters = io::try_parameters_of(original_);
    if (!parameters) return parameters.error();
    parameters_ = std::move(*parameters);
    if (auto done = find_layout(); !done) return done.error();
    if (auto done = find_all(); !done) return done.error();
    if (auto done = check_extra(); !done) return done.error();
    if (auto done = check_sets(); !done) return done.error();
    if (auto done = check_config(); !done) return done.error();
    if (auto done = check_metadata(); !done) return done.error();
    if (auto done = compare_all(); !done) return done.error();
    return report_;
  }

 private:
  template <class... Pieces>
  [[nodiscard]] error wrong(const Pieces&... what) const {
    return error(errc::malformed_file, text(packed_.path().string(), ": ", what...));
  }
  template <class... Pieces>
  [[nodiscard]] error wrong_tensor(const std::string& name, const Pieces&... what) const {
    return wrong("tensor ", printable(name), ": ", what...);
  }

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
      return wrong("config.json says ", printable(by_method), ", the files' metadata ", printable(named->second));
    }
    const auto layout = io::try_checkpoint_layout_named(by_method.empty() ? named->second : by_method);
    if (!layout) return layout.error();
    report_.layout = *layout;
    if (const auto found = metadata.find("tetromino.recipe"); found != metadata.end()) {
      auto how = recipe::try_parse(found->second);
      if (!how) return how.error();
      rules_.push_back({"", *how});
      report_.recipes = found->second;
    } else if (const auto several = metadata.find("tetromino.recipes"); several != metadata.end()) {
      if (auto read = read_rules(several->second); !read) return read;
    }
    report_.packed_again =
        !rules_.empty() && (!metadata.contains("tetromino.statistics") || options_.inputs != nullptr);
    return report_.layout == io::checkpoint_layout::linear ? read_linear() : result<void>();
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
      report_.recipes += text(report_.recipes.empty() ? "" : ", ", rules_.back().pattern, '=', how->name());
    }
    return {};
  }

  /// Which weights of the linear layout are packed, and how.
  [[nodiscard]] result<void> read_linear() {
    for (std::size_t f = 0; f < packed_.file_count(); ++f) {
      const auto found = packed_.metadata(f).find("tetromino.weights");
      if (found == packed_.metadata(f).end()) continue;
      nlohmann::json weights;
      if (const auto bad = parse_json(found->second, weights); !bad.empty() || !weights.is_object()) {
        return wrong("metadata tetromino.weights: expected a JSON object");
      }
      for (const auto& [name, facts] : weights.items()) linear_[name] = facts;
    }
    return {};
  }

  [[nodiscard]] result<void> find_all() {
    for (const auto& p : parameters_) {
      auto one = find(p);
      if (!one) return one.error();
      (one->stored.empty() ? report_.kept : report_.packed) += 1;
      found_.push_back(std::move(*one));
    }
    std::unordered_set<std::string_view> names;
    for (const auto& p : parameters_) names.insert(p.name);
    for (const auto& entry : linear_) {
      if (names.contains(entry.first)) continue;
      return wrong("metadata tetromino.weights names ", printable(entry.first), ", which the original does not have");
    }
    return {};
  }

  /// The format of a weight in the packed model; nothing where it is not packed.
  [[nodiscard]] result<std::optional<any_format>> format_of(const io::parameter& p, found_parameter& out) const {
    if (report_.layout == io::checkpoint_layout::linear) {
      const auto found = linear_.find(p.name);
      if (found == linear_.end()) return std::optional<any_format>();
      const auto how = recipe::try_parse(json_text(found->second, "recipe"));
      if (!how) return how.error();
      const nlohmann::json shape =
          p.shape.size() == 3 ? nlohmann::json{p.matrices, p.rows, p.cols} : nlohmann::json{p.rows, p.cols};
      const nlohmann::json given = found->second.contains("shape") ? found->second["shape"] : nlohmann::json();
      if (given != shape) {
        return wrong_tensor(p.name, "the packed file gives it another shape than the original: expected ", shape.dump(),
                            ", found ", given.dump());
      }
      out.how = *how;
      return std::optional<any_format>(how->format);
    }
    if (p.rows == 0) return std::optional<any_format>();
    const auto parts = stored_in(report_.layout, mxfp4{}, p, original_.config());
    const auto* codes = packed_.find(parts.front().codes.name);
    const auto* scales = packed_.find(parts.front().scales.name);
    if (codes == nullptr || scales == nullptr || codes->dtype != io::dtype::U8) return std::optional<any_format>();
    return std::optional<any_format>(scales->dtype == io::dtype::F8_E4M3 ? any_format(nvfp4{}) : any_format(mxfp4{}));
  }

  [[nodiscard]] result<found_parameter> find(const io::parameter& p) {
    found_parameter out{&p};
    const auto format = format_of(p, out);
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
    for (const auto& rule : rules_) {
      if (!out.how || report_.layout != io::checkpoint_layout::linear) {
        if (rule_matches(rule, p)) out.how = rule.how;
      }
    }
    if (out.how && out.how->format != out.format) {
      return wrong_tensor(p.name, "expected ", name_of(out.how->format), ", found ", name_of(out.format));
    }
    out.stored = stored_in(report_.layout, out.format, p, original_.config());
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
    if (report_.layout == io::checkpoint_layout::gpt_oss && p.kind.role != role::fused_experts) {
      return wrong_tensor(p.name, "readers of layout gpt-oss take packed experts alone");
    }
    return {};
  }

  /// All tensors of a stored weight are there with their types and shapes.
  [[nodiscard]] result<void> check_parts(io::stored_weight& stored, found_parameter& out) {
    const std::string& scale = stored.scales.name;
    if (scale.ends_with(".weight_scale")) {
      const std::string module = scale.substr(0, scale.size() - std::string_view("weight_scale").size());
      const bool divides = report_.layout == io::checkpoint_layout::compressed_tensors;
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
        value = loaded_scale(report_.layout, value);
        if (!(value > 0.0f && std::isfinite(value))) {
          return wrong_tensor(stored.tensor_scale.name, "expected a positive, finite tensor scale, found ", value);
        }
      }
    }
    out.tensor_scales.push_back(std::move(scales));
    return {};
  }

  [[nodiscard]] result<void> check_extra() const {
    for (const auto& tensor : packed_.tensors()) {
      if (!used_.contains(tensor.name)) return wrong_tensor(tensor.name, "it is no part of the original");
    }
    return {};
  }

  /// Readers run the members of a set as one matrix, with the largest of their tensor scales.
  [[nodiscard]] result<void> check_sets() const {
    if (report_.layout == io::checkpoint_layout::linear) return {};
    std::map<std::size_t, const found_parameter*> first;
    for (const auto& one : found_) {
      if (!one.source->is_weight()) continue;
      const auto [entry, is_new] = first.emplace(one.source->set, &one);
      const found_parameter& other = *entry->second;
      if (one.stored.empty() != other.stored.empty()) {
        return wrong_tensor(one.source->name, "readers run it as one with ", printable(other.source->name),
                            ", but only one of them is packed");
      }
      for (std::size_t e = 0; e < one.source->matrices; ++e) {
        for (std::size_t i = 0; i < one.stored.size(); ++i) {
          if (one.stored[i].matrix != e || one.tensor_scales[i].empty()) continue;
          const float reference = other.tensor_scales[first_of(other, e)].front();
          if (one.tensor_scales[i].front() == reference) continue;
          return wrong_tensor(one.stored[i].tensor_scale.name, "readers run it as one with ",
                              printable(other.stored[first_of(other, e)].codes.name),
                              " and take one tensor scale for both, but they have ", one.tensor_scales[i].front(),
                              " and ", reference);
        }
      }
    }
    return {};
  }
  static std::size_t first_of(const found_parameter& one, std::size_t matrix) {
    for (std::size_t i = 0; i < one.stored.size(); ++i) {
      if (one.stored[i].matrix <= matrix && matrix < one.stored[i].matrix + one.stored[i].matrices) return i;
    }
    return 0;
  }

  /// config.json tells readers which modules are packed, and whether activations are to be packed too.
  [[nodiscard]] result<void> check_config() const {
    if (report_.layout == io::checkpoint_layout::linear) return {};
    const bool is_gpt_oss = report_.layout == io::checkpoint_layout::gpt_oss;
    const bool modelopt = report_.layout == io::checkpoint_layout::modelopt;
    const char* const key = is_gpt_oss ? "modules_to_not_convert" : "ignore";
    const auto left_alone = module_list::try_read(config_.is_object() ? config_.value(key, nlohmann::json()) : nullptr);
    if (!left_alone) return wrong("config.json: \"", key, "\": ", left_alone.error().what());
    bool all_inputs = true, any_input = false;
    for (const auto& one : found_) {
      const io::parameter& p = *one.source;
      if (one.stored.empty()) {
        const bool is_module = p.shape.size() == 2 && p.name.ends_with(".weight") && !is_gpt_oss &&
                               p.kind.role != io::tensor_role::embedding;
        if (is_module && !left_alone->names(module_of(p.name))) {
          return wrong_tensor(p.name, "it is not packed, but \"", key, "\" in config.json does not name its module");
        }
        continue;
      }
      for (const auto& stored : one.stored) {
        all_inputs = all_inputs && !stored.input_scale.name.empty();
        any_input = any_input || !stored.input_scale.name.empty();
        const std::size_t dot = stored.codes.name.rfind('.');
        if (left_alone->names(stored.codes.name.substr(0, dot))) {
          return wrong_tensor(stored.codes.name, "it is packed, but \"", key, "\" in config.json names its module");
        }
        const auto* const part = modelopt ? left_alone->name_within(stored.codes.name.substr(0, dot)) : nullptr;
        if (part != nullptr) {
          return wrong_tensor(stored.codes.name, "it is packed, but vLLM leaves alone what has a name of \"", key,
                              "\" in its own, here ", printable(*part));
        }
      }
    }
    const std::string algorithm = json_text(config_, "quant_algo");
    if (modelopt && (algorithm == "NVFP4") != (all_inputs && report_.packed > 0)) {
      return wrong("config.json: quant_algo ", printable(algorithm), " needs ",
                   algorithm == "NVFP4" ? "an input_scale beside every weight" : "no input scales");
    }
    if (any_input != all_inputs && report_.packed > 0)
      return wrong("some packed weights have input scales, others none");
    if (report_.layout == io::checkpoint_layout::compressed_tensors &&
        json_text(config_, "quantization_status") != "compressed") {
      return wrong("config.json: expected \"quantization_status\": \"compressed\"");
    }
    return {};
  }

  /// The model's own metadata, its config and its other files are as they were.
  [[nodiscard]] result<void> check_metadata() const {
    for (const auto& [name, value] : original_.metadata()) {
      if (name == "format" || name == "quantization_config" || name.starts_with("tetromino.")) continue;
      const auto found = packed_.metadata().find(name);
      if (found == packed_.metadata().end() || found->second != value) {
        return wrong("metadata ", printable(name), ": expected ", printable(value), " as in the original, found ",
                     found == packed_.metadata().end() ? std::string("none") : printable(found->second));
      }
    }
    for (const auto& [name, value] : packed_.metadata()) {
      if (name == "format" || name == "quantization_config" || name.starts_with("tetromino.")) continue;
      if (!original_.metadata().contains(name)) return wrong("metadata ", printable(name), ": the original has none");
    }
    if (packed_.is_single_file()) return {};
    auto before = original_.config(), after = packed_.config();
    for (auto* config : {&before, &after}) {
      if (!config->is_object()) *config = nlohmann::json::object();
      config->erase("quantization_config");
      config->erase("compression_config");
    }
    if (before != after) return wrong("config.json: expected what the original has, besides quantization_config");
    return {};
  }

  struct slice {
    std::size_t parameter = 0;
    io::row_range rows{};
  };

  [[nodiscard]] result<void> compare_all() {
    std::vector<slice> slices;
    for (std::size_t i = 0; i < found_.size(); ++i) {
      const io::parameter& p = *found_[i].source;
      if (found_[i].stored.empty() && p.encoding == io::value_encoding::plain) {
        for (std::size_t at = 0; at < p.values->bytes; at += options_.slice_bytes) slices.push_back({i, {0, at, 0}});
        continue;
      }
      const bool whole = found_[i].how && found_[i].how->error_feedback;
      const std::size_t step = whole ? p.rows : std::clamp<std::size_t>(options_.slice_bytes / (p.cols * 4), 1, p.rows);
      for (std::size_t e = 0; e < p.matrices; ++e) {
        for (std::size_t r = 0; r < p.rows; r += step) slices.push_back({i, {e, r, std::min(step, p.rows - r)}});
      }
    }
    errors_.resize(found_.size());
    shared_failure failure;
    executor_(slices.size(), [&](std::size_t s) {
      if (failure.is_set()) return;
      auto buffers = pool_.take();
      if (auto done = compare_slice(slices[s], *buffers); !done) failure.set(done.error());
      pool_.give(std::move(buffers));
    });
    if (auto done = failure.outcome(); !done) return done;
    for (std::size_t i = 0; i < found_.size(); ++i) {
      constexpr double least = 6;  // dB; every recipe is above 12 on weights of any shape
      report_.errors.add(errors_[i]);
      if (errors_[i].sum_squared_errors == 0 || errors_[i].qsnr() >= least) continue;
      return wrong_tensor(found_[i].source->name, "what readers decode is not the original: QSNR ", errors_[i].qsnr(),
                          " dB (another axis, other scales or other weights?)");
    }
    return {};
  }

  [[nodiscard]] result<void> compare_slice(const slice& s, pack_buffers& buffers) {
    const io::parameter& p = *found_[s.parameter].source;
    std::size_t bytes = 0;
    if (found_[s.parameter].stored.empty()) {
      auto same = p.encoding == io::value_encoding::plain ? same_bytes(p, s.rows.first, buffers, bytes)
                                                          : same_decoded(p, s.rows, buffers);
      if (!same) return same;
    } else if (auto done = compare_packed(s, buffers); !done) {
      return done;
    }
    if (bytes == 0) bytes = p.values->bytes / (p.matrices * p.rows) * s.rows.count;
    if (options_.progress && !options_.progress(bytes)) return error(errc::io, "stopped");
    return {};
  }

  [[nodiscard]] result<void> same_bytes(const io::parameter& p, std::size_t at, pack_buffers& buffers,
                                        std::size_t& bytes) const {
    bytes = std::min(options_.slice_bytes, p.values->bytes - at);
    buffers.rows.bytes.resize(bytes);
    buffers.gathered.resize(bytes);
    if (auto read = original_.try_read(*p.values, at, buffers.rows.bytes); !read) return read;
    if (auto read = packed_.try_read(*packed_.find(p.name), at, buffers.gathered); !read) return read;
    if (buffers.rows.bytes == buffers.gathered) return {};
    return wrong_tensor(p.name, "it was kept, but differs from the original");
  }

  [[nodiscard]] result<void> same_decoded(const io::parameter& p, const io::row_range& rows,
                                          pack_buffers& buffers) const {
    return io::try_visit_rows(policy_, original_, p, rows, buffers.rows, [&](const auto& values) -> result<void> {
      const std::size_t count = values.rows * values.cols;
      buffers.gathered.resize(count * sizeof(bfloat16));
      const std::size_t at = (rows.matrix * p.rows + rows.first) * p.cols * sizeof(bfloat16);
      if (auto read = packed_.try_read(*packed_.find(p.name), at, buffers.gathered); !read) return read;
      const auto* const stored = reinterpret_cast<const bfloat16*>(buffers.gathered.data());
      for (std::size_t i = 0; i < count; ++i) {
        if (stored[i] == bfloat16(to_float(values.data[i]))) continue;
        return wrong_tensor(p.name, "it was decoded, but differs from the original's values");
      }
      return {};
    });
  }

  /// Gathers packed rows from the tensors that hold them.
  [[nodiscard]] result<float> read_packed(const found_parameter& one, const io::row_range& range,
                                          pack_buffers& buffers) const {
    const packed_shape shape{one.format, 1, range.count, one.source->cols};
    buffers.codes.resize(shape.code_bytes());
    buffers.scales.resize(shape.scale_bytes());
    buffers.macros.resize(shape.macro_bytes());
    float tensor_scale = 1.0f;
    for (std::size_t i = 0; i < one.stored.size(); ++i) {
      const io::stored_weight& stored = one.stored[i];
      const auto part = rows_within(stored, range);
      if (part.count == 0) continue;
      const auto get = [&](const io::tensor_declaration& tensor, std::size_t per_row, std::vector<std::uint8_t>& to) {
        if (tensor.name.empty()) return result<void>();
        buffers.gathered.resize(part.count * per_row);
        auto read = packed_.try_read(*packed_.find(tensor.name), part.at * per_row, buffers.gathered);
        if (!read) return read;
        for (std::size_t r = 0; r < part.count; ++r) {
          std::copy_n(buffers.gathered.data() + r * per_row, per_row,
                      to.data() + (part.first - range.first + r * stored.row_step) * per_row);
        }
        return read;
      };
      if (auto done = get(stored.codes, shape.code_bytes_per_row(), buffers.codes); !done) return done.error();
      if (auto done = get(stored.scales, shape.blocks_per_row(), buffers.scales); !done) return done.error();
      if (auto done = get(stored.macros, shape.macros_per_row(), buffers.macros); !done) return done.error();
      const auto& scales = one.tensor_scales[i];
      if (!scales.empty()) tensor_scale = scales[scales.size() == 1 ? 0 : range.matrix - stored.matrix];
    }
    return tensor_scale;
  }

  [[nodiscard]] result<void> compare_packed(const slice& s, pack_buffers& buffers) {
    const found_parameter& one = found_[s.parameter];
    const auto scale = read_packed(one, s.rows, buffers);
    if (!scale) return scale.error();
    const bool is_nvfp4 = one.format.scale == scale_type::e4m3;
    const packed_view<any_format> stored{one.format,     1,
                                         s.rows.count,   one.source->cols,
                                         buffers.codes,  buffers.scales,
                                         buffers.macros, {&*scale, is_nvfp4 ? 1u : 0u}};
    buffers.values.resize(s.rows.count * one.source->cols);
    const batch_view<float> values(buffers.values.data(), 1, s.rows.count, one.source->cols);
    if (auto done = try_dequantize_to(policy_, stored, values); !done) return done;
    const std::size_t rotation = one.how ? one.how->rotation : 0;
    if (rotation != 0) rotate_back(policy_, values, {rotation}, values);
    std::vector<float> decoded(buffers.values);
    return io::try_visit_rows(
        policy_, original_, *one.source, s.rows, buffers.rows, [&](const auto& rows) -> result<void> {
          error_report seen;
          if (auto done = add_errors(one, rows, decoded, s.rows, seen); !done) return done;
          {
            const std::lock_guard lock(mutex_);
            errors_[s.parameter].add(seen);
          }
          return report_.packed_again && one.how ? pack_again(one, rows, s.rows, stored, *scale) : result<void>();
        });
  }

  /// Values that were finite must decode to finite ones; others do not count.
  template <class Rows>
  [[nodiscard]] result<void> add_errors(const found_parameter& one, const Rows& rows, const std::vector<float>& decoded,
                                        const io::row_range& range, error_report& seen) const {
    for (std::size_t r = 0; r < rows.rows; ++r) {
      error_report row;
      bool all_finite = true, decodes = true;
      for (std::size_t k = 0; k < rows.cols; ++k) {
        const float value = to_float(rows(r, k)), back = decoded[r * rows.cols + k];
        all_finite = all_finite && is_finite(value);
        decodes = decodes && is_finite(back);
        if (!is_finite(value) || !is_finite(back)) continue;
        const double difference = std::abs(static_cast<double>(value) - static_cast<double>(back));
        ++row.count;
        row.sum_squares += static_cast<double>(value) * static_cast<double>(value);
        row.sum_squared_errors += difference * difference;
        row.sum_abs_errors += difference;
        row.keep_largest(difference);
      }
      if (all_finite && !decodes) {
        return wrong_tensor(one.source->name, "row ", range.first + r, " of matrix ", range.matrix,
                            " decodes to NaN or infinity");
      }
      seen.add(row);
    }
    return {};
  }

  /// What the recipe makes of the original has the same bytes.
  template <class Rows>
  [[nodiscard]] result<void> pack_again(const found_parameter& one, const Rows& rows, const io::row_range& range,
                                        const packed_view<any_format>& stored, float scale) const {
    const io::parameter& p = *one.source;
    if (p.encoding == io::value_encoding::mxfp4 || p.encoding == io::value_encoding::nvfp4) return {};  // values decide
    quantize_options options;
    const bool is_nvfp4 = one.format.scale == scale_type::e4m3;
    if (is_nvfp4) options.tensor_scales = {&scale, 1};
    if (const auto special = packed_.metadata().find("tetromino.special"); special != packed_.metadata().end()) {
      options.special = special->second == "poison" ? special_values::poison : special_values::saturate;
    }
    std::vector<float> weights;
    result<packed<>> again = packed<>();
    if (one.how->error_feedback) {
      std::vector<float> floats(rows.rows * rows.cols);
      for (std::size_t i = 0; i < floats.size(); ++i) floats[i] = to_float(rows.data[i]);
      again = options_.inputs->feed_back(matrix_view<const float>(floats.data(), rows.rows, rows.cols), p, range.matrix,
                                         *one.how, options);
    } else {
      if (options_.inputs != nullptr) {
        auto known = options_.inputs->column_weights(p, range.matrix, one.how->rotation);
        if (!known) return known.error();
        weights = std::move(*known);
        options.column_weights = weights;
      }
      again = try_quantize(policy_, rows, *one.how, options);
    }
    if (!again) return again.error();
    if (std::ranges::equal(again->codes, stored.codes) && std::ranges::equal(again->scales, stored.scales) &&
        std::ranges::equal(again->macros, stored.macros)) {
      return {};
    }
    return wrong_tensor(p.name, "rows ", range.first, " to ", range.first + range.count - 1, " of matrix ",
                        range.matrix, " do not hold what ", one.how->name(), " makes of the original");
  }

  executor_ref executor_;
  Policy policy_;
  const io::checkpoint& original_;
  const io::checkpoint& packed_;
  const io::verify_options& options_;
  std::vector<io::parameter> parameters_;
  nlohmann::json config_;
  std::vector<io::pack_rule> rules_;
  std::map<std::string, nlohmann::json> linear_;
  std::vector<found_parameter> found_;
  std::unordered_set<std::string> used_;
  std::vector<error_report> errors_;
  buffer_pool pool_;
  std::mutex mutex_;
  io::verify_report report_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// Reads a packed model as readers of its layout do, by names, types, scales and config.json alone, beside the
/// original: every value is decoded with the tensor scale that readers take, and where the files say by which recipe,
/// packed again to the same bytes. Errors: malformed_file with the first tensor that is missing, additional, changed,
/// of another shape, packed although it must not be, packed along another axis, or under a scale that readers do not
/// take.
template <class Policy>
[[nodiscard]] result<verify_report> try_verify(const Policy& policy, const checkpoint& original,
                                               const checkpoint& packed, const verify_options& options = {}) {
  const detail::default_float_state usual;
  return detail::verifier(policy, original, packed, options).run();
}

/// try_verify, throwing its error.
template <class Policy>
verify_report verify(const Policy& policy, const checkpoint& original, const checkpoint& packed,
                     const verify_options& options = {}) {
  return try_verify(policy, original, packed, options).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
