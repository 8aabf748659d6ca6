#pragma once

#include "../../../detail/macros_off.hpp"

#include "../options.hpp"  // pack_options
#include "config.hpp"      // quantization_config
#include "shards.hpp"      // shard_writer

#include <filesystem>     // std::filesystem
#include <map>            // std::erase_if
#include <span>           // std::span
#include <string>         // std::string
#include <unordered_map>  // std::unordered_map
#include <utility>        // std::move, std::pair
#include <vector>         // std::vector

/// What a packed model has besides the bytes of its weights.
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The metadata of one file: that of the source, what was asked for, and the shape [matrices, rows, K] and the recipe
/// of each packed weight in it where nothing else says them: in the linear layout, and where recipes were chosen one by
/// one.
class file_metadata {
 public:
  /// `is_alone`: one file is written, without config.json.
  file_metadata(const io::checkpoint& from, const io::pack_plan& plan, const io::pack_options& options, bool is_alone)
      : common_(from.metadata()) {
    std::erase_if(common_, [](const auto& entry) {  // what the source was packed with, if it was
      return entry.first.starts_with("tetromino.") || entry.first == "quantization_config";
    });
    common_["format"] = "pt";
    common_["tetromino.layout"] = std::string(io::name(plan.options.layout));
    const auto& rules = plan.options.rules;
    if (rules.size() == 1 && rules.front().pattern.empty()) {
      common_["tetromino.recipe"] = rules.front().how.name();
    } else {
      ordered_json all = ordered_json::array();
      for (const auto& rule : rules) all.push_back({{"weights", rule.pattern}, {"recipe", rule.how.name()}});
      common_["tetromino.recipes"] = all.dump();
    }
    if (options.special == special_values::poison) common_["tetromino.special"] = "poison";
    if (options.special == special_values::saturate) common_["tetromino.special"] = "saturate";
    for (const auto& [key, value] : options.metadata) common_[key] = value;
    if (const auto config = quantization_config(plan); !config.is_null() && (is_alone || from.is_single_file())) {
      common_["quantization_config"] = config.dump();
    }
    if (plan.options.layout != io::checkpoint_layout::linear && plan.options.chosen.empty()) return;
    for (const auto& planned : plan.parameters) {
      if (!planned.is_packed()) continue;
      shapes_[planned.stored.front().codes.name] = {
          planned.source->name,
          {{"shape", planned.source->shape.size() == 3
                         ? ordered_json{planned.source->matrices, planned.source->rows, planned.source->cols}
                         : ordered_json{planned.source->rows, planned.source->cols}},
           {"recipe", planned.how.name()}}};
    }
  }

  [[nodiscard]] io::safetensors_metadata of(std::span<const shard_writer::declared> tensors) const {
    io::safetensors_metadata out = common_;
    if (shapes_.empty()) return out;
    ordered_json weights = ordered_json::object();
    for (const auto& one : tensors) {
      if (const auto found = shapes_.find(one.tensor.name); found != shapes_.end()) {
        weights[found->second.first] = found->second.second;
      }
    }
    out["tetromino.weights"] = weights.dump();
    return out;
  }

 private:
  io::safetensors_metadata common_;
  std::unordered_map<std::string, std::pair<std::string, ordered_json>> shapes_;  // by the tensor of the codes
};

/// All tensors that will be written, in the order of the source.
inline std::vector<shard_writer::declared> declared_tensors(const io::pack_plan& plan) {
  std::vector<shard_writer::declared> out;
  std::size_t group = 0;
  for (const auto& planned : plan.parameters) {
    const io::parameter& p = *planned.source;
    if (planned.action == io::pack_action::keep) {
      out.push_back({{p.name, p.values->dtype, p.values->shape}, group++});
    } else if (planned.action == io::pack_action::decode) {
      out.push_back({{p.name, io::dtype::BF16, p.shape}, group++});
    }
    for (const auto& stored : planned.stored) {
      for (const auto* part : stored.parts()) out.push_back({*part, group});
      ++group;
    }
  }
  return out;
}

/// config.json with what readers of the layout need, and what else belongs beside the weights.
inline result<std::vector<std::string>> write_beside(const io::checkpoint& from, const io::pack_plan& plan,
                                                     const std::filesystem::path& folder) {
  std::vector<std::string> left;
  if (!from.is_single_file()) {
    auto copied = copy_other_files(from.folder(), folder, from);
    if (!copied) return copied;
    left = std::move(*copied);
  }
  ordered_json config = ordered_json::object();
  const auto path = from.folder() / "config.json";
  if (!from.config().is_null()) {
    auto again = read_json<ordered_json>(path);  // for the order of its keys
    if (!again) return again.error();
    config = std::move(**again);
    if (!config.is_object()) return error(errc::malformed_file, path.string() + ": expected a JSON object");
  }
  config.erase("quantization_config");
  config.erase("compression_config");
  if (auto quantization = quantization_config(plan); !quantization.is_null()) {
    config["quantization_config"] = std::move(quantization);
  }
  const std::string as_python = with_python_numbers(config.dump(2));
  if (auto written = write_text(folder / "config.json", as_python + "\n"); !written) return written.error();
  if (plan.options.layout == io::checkpoint_layout::modelopt) {
    auto written = write_text(folder / "hf_quant_config.json", modelopt_file(plan).dump(2) + "\n");
    if (!written) return written.error();
  }
  return left;
}
}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
