#pragma once

#include "../../../detail/macros_off.hpp"

#include "module_list.hpp"   // module_list
#include "packed_model.hpp"  // packed_model

#include <algorithm>  // std::any_of
#include <cstddef>    // std::size_t
#include <map>        // std::map
#include <string>     // std::string

/// What readers of a layout want of a packed model as a whole, besides the tensors of each weight.
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Every tensor belongs to a parameter of the original.
inline result<void> check_extra(const packed_model& model) {
  for (const auto& tensor : model.files().tensors()) {
    if (!model.is_used(tensor.name)) return model.wrong_tensor(tensor.name, "it is no part of the original");
  }
  return {};
}

/// The stored weight that holds a matrix, or the first of several.
inline std::size_t first_of(const found_parameter& one, std::size_t matrix) {
  for (std::size_t i = 0; i < one.stored.size(); ++i) {
    if (one.stored[i].matrix <= matrix && matrix < one.stored[i].matrix + one.stored[i].matrices) return i;
  }
  return 0;
}

/// Readers run the members of a set as one matrix, with the largest of their tensor scales.
inline result<void> check_sets(const packed_model& model) {
  if (model.layout() == io::checkpoint_layout::linear) return {};
  std::map<std::size_t, const found_parameter*> first;
  for (const auto& one : model.parameters()) {
    if (!one.source->is_weight()) continue;
    const found_parameter& other = *first.emplace(one.source->set, &one).first->second;
    if (one.stored.empty() != other.stored.empty()) {
      return model.wrong_tensor(one.source->name, "readers run it as one with ", printable(other.source->name),
                                ", but only one of them is packed");
    }
    for (std::size_t e = 0; e < one.source->matrices; ++e) {
      for (std::size_t i = 0; i < one.stored.size(); ++i) {
        if (one.stored[i].matrix != e || one.tensor_scales[i].empty()) continue;
        const float reference = other.tensor_scales[first_of(other, e)].front();
        if (one.tensor_scales[i].front() == reference) continue;
        return model.wrong_tensor(one.stored[i].tensor_scale.name, "readers run it as one with ",
                                  printable(other.stored[first_of(other, e)].codes.name),
                                  " and take one tensor scale for both, but they have ", one.tensor_scales[i].front(),
                                  " and ", reference);
      }
    }
  }
  return {};
}

/// The list of config.json that leaves modules alone names those that are kept, and none that is packed.
inline result<void> check_left_alone(const packed_model& model) {
  const bool is_gpt_oss = model.layout() == io::checkpoint_layout::gpt_oss;
  const bool modelopt = model.layout() == io::checkpoint_layout::modelopt;
  const char* const key = is_gpt_oss ? "modules_to_not_convert" : "ignore";
  const auto& config = model.config();
  const auto left_alone = module_list::try_read(config.is_object() ? config.value(key, nlohmann::json()) : nullptr);
  if (!left_alone) return model.wrong("quantization_config: \"", key, "\": ", left_alone.error().what());
  for (const auto& one : model.parameters()) {
    const io::parameter& p = *one.source;
    const bool is_module = one.stored.empty() && p.shape.size() == 2 && p.name.ends_with(".weight") && !is_gpt_oss &&
                           p.kind.role != io::tensor_role::embedding;
    if (is_module && !left_alone->names(module_of(p.name))) {
      return model.wrong_tensor(p.name, "it is not packed, but \"", key,
                                "\" in quantization_config does not name its module");
    }
    for (const auto& stored : one.stored) {
      const std::string& codes = stored.codes.name;
      const std::string module = codes.substr(0, codes.rfind('.'));
      if (left_alone->names(module)) {
        return model.wrong_tensor(codes, "it is packed, but \"", key, "\" in quantization_config names its module");
      }
      if (const auto* part = modelopt ? left_alone->name_within(module) : nullptr) {
        return model.wrong_tensor(codes, "it is packed, but vLLM leaves alone what has a name of \"", key,
                                  "\" in its own, here ", printable(*part));
      }
    }
  }
  return {};
}

/// config.json says whether activations are to be packed too, which needs a scale for each.
inline result<void> check_input_scales(const packed_model& model) {
  bool all = true, any = false, any_packed = false;
  for (const auto& one : model.parameters()) {
    any_packed = any_packed || !one.stored.empty();
    for (const auto& stored : one.stored) {
      all = all && !stored.input_scale.name.empty();
      any = any || !stored.input_scale.name.empty();
    }
  }
  const std::string algorithm = json_text(model.config(), "quant_algo");
  if (model.layout() == io::checkpoint_layout::modelopt && (algorithm == "NVFP4") != (all && any_packed)) {
    return model.wrong("quantization_config: quant_algo ", printable(algorithm), " needs ",
                       algorithm == "NVFP4" ? "an input_scale beside every weight" : "no input scales");
  }
  if (any != all && any_packed) return model.wrong("some packed weights have input scales, others none");
  return {};
}

/// config.json tells readers which modules are packed, and how they run them.
inline result<void> check_config(const packed_model& model) {
  if (model.layout() == io::checkpoint_layout::linear) return {};
  if (auto done = check_left_alone(model); !done) return done;
  if (auto done = check_input_scales(model); !done) return done;
  if (model.layout() == io::checkpoint_layout::compressed_tensors &&
      json_text(model.config(), "quantization_status") != "compressed") {
    return model.wrong("quantization_config: expected \"quantization_status\": \"compressed\"");
  }
  return {};
}

/// The model's own metadata and its config are as they were.
inline result<void> check_metadata(const packed_model& model) {
  const auto is_ours = [](const std::string& name) {
    return name == "format" || name == "quantization_config" || name.starts_with("tetromino.");
  };
  const auto &original = model.original().metadata(), &packed = model.files().metadata();
  for (const auto& entry : original) {
    if (is_ours(entry.first)) continue;
    const auto found = packed.find(entry.first);
    if (found != packed.end() && found->second == entry.second) continue;
    return model.wrong("metadata ", printable(entry.first), ": expected ", printable(entry.second),
                       " as in the original, found ",
                       found == packed.end() ? std::string("none") : printable(found->second));
  }
  for (const auto& entry : packed) {
    if (is_ours(entry.first) || original.contains(entry.first)) continue;
    return model.wrong("metadata ", printable(entry.first), ": the original has none");
  }
  if (model.files().is_single_file()) return {};
  auto before = model.original().config(), after = model.files().config();
  for (auto* config : {&before, &after}) {
    if (!config->is_object()) *config = nlohmann::json::object();
    config->erase("quantization_config");
    config->erase("compression_config");
  }
  if (before == after) return {};
  return model.wrong("config.json: expected what the original has, besides quantization_config");
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
