#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../version.hpp"  // TETROMINO_VERSION_MAJOR
#include "../plan.hpp"           // pack_plan

#include <nlohmann/json.hpp>  // nlohmann::ordered_json

#include <string>         // std::string
#include <unordered_set>  // std::unordered_set
#include <utility>        // std::pair
#include <vector>         // std::vector

/// What readers of each layout look for in config.json and beside it. (compressed-tensors 0.20, transformers 5.24,
/// vLLM's ModelOptNvFp4Config, ModelOpt's export)
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

using nlohmann::ordered_json;

/// The modules with a weight of two or more dimensions that stay as they are.
inline std::vector<std::string> kept_modules(const io::pack_plan& plan) {
  std::vector<std::string> out;
  std::unordered_set<std::string> seen;
  for (const auto& planned : plan.parameters) {
    const io::parameter& p = *planned.source;
    if (planned.is_packed() || p.shape.size() < 2 || p.kind.role == io::tensor_role::norm ||
        p.kind.role == io::tensor_role::bias || p.kind.role == io::tensor_role::scale) {
      continue;
    }
    std::string module = module_of(p.name);
    if (p.kind.role == io::tensor_role::fused_experts && module == p.name) {  // the stack's owner is the module
      module.resize(tensor_path(p.name).parent.size() - 1);
    }
    if (seen.insert(module).second) out.push_back(std::move(module));
  }
  return out;
}

/// Whether every packed weight has the scale of its input, so that activations may be packed too.
inline bool has_input_scales(const io::pack_plan& plan) {
  bool any = false;
  for (const auto& planned : plan.parameters) {
    for (const auto& stored : planned.stored) {
      if (stored.input_scale.name.empty()) return false;
      any = true;
    }
  }
  return any;
}

inline ordered_json compressed_tensors_group(const any_format& format, bool packs_inputs) {
  const bool is_nvfp4 = format.scale == scale_type::e4m3;
  const auto numbers = [&](ordered_json dynamic) {
    ordered_json out = {{"num_bits", 4},
                        {"type", "float"},
                        {"symmetric", true},
                        {"dynamic", std::move(dynamic)},
                        {"group_size", format.block},
                        {"strategy", is_nvfp4 ? "tensor_group" : "group"}};
    out["scale_dtype"] = is_nvfp4 ? "torch.float8_e4m3fn" : "torch.uint8";
    return out;
  };
  ordered_json group = {{"format", is_nvfp4 ? "nvfp4-pack-quantized" : "mxfp4-pack-quantized"},
                        {"input_activations", nullptr},
                        {"output_activations", nullptr},
                        {"targets", {"Linear"}},
                        {"weights", numbers(false)}};
  if (is_nvfp4 && packs_inputs) group["input_activations"] = numbers("local");
  return group;
}

/// One group for each format: the first, with the experts if there are any, is for all modules that no other names.
inline ordered_json compressed_tensors_config(const io::pack_plan& plan) {
  std::vector<std::pair<any_format, std::vector<std::string>>> groups;
  const auto group_of = [&](const any_format& format) -> std::vector<std::string>& {
    for (auto& [known, modules] : groups) {
      if (known == format) return modules;
    }
    return groups.emplace_back(format, std::vector<std::string>{}).second;
  };
  const auto is_expert = [](const io::planned_parameter& planned) {
    return planned.source->kind.role == io::tensor_role::routed_expert ||
           planned.source->kind.role == io::tensor_role::fused_experts;
  };
  for (const bool experts : {true, false}) {
    for (const auto& planned : plan.parameters) {
      if (!planned.is_packed() || is_expert(planned) != experts) continue;
      auto& modules = group_of(planned.how.format);
      for (const auto& stored : planned.stored) {
        modules.push_back(stored.codes.name.substr(0, stored.codes.name.size() - std::string(".weight_packed").size()));
      }
    }
  }
  const bool packs_inputs = has_input_scales(plan);
  ordered_json config_groups = ordered_json::object();
  for (std::size_t i = 0; i < groups.size(); ++i) {
    ordered_json group = compressed_tensors_group(groups[i].first, packs_inputs);
    if (i > 0) group["targets"] = groups[i].second;
    config_groups[text("group_", i)] = std::move(group);
  }
  const ordered_json format = groups.size() == 1 ? config_groups["group_0"]["format"] : ordered_json("mixed-precision");
  return {{"quant_method", "compressed-tensors"}, {"format", format},
          {"quantization_status", "compressed"},  {"global_compression_ratio", nullptr},
          {"kv_cache_scheme", nullptr},           {"config_groups", std::move(config_groups)},
          {"ignore", kept_modules(plan)}};
}

inline ordered_json producer() {
  return {{"name", "tetromino"},
          {"version", text(TETROMINO_VERSION_MAJOR, '.', TETROMINO_VERSION_MINOR, '.', TETROMINO_VERSION_PATCH)}};
}

inline ordered_json modelopt_config(const io::pack_plan& plan) {
  const bool packs_inputs = has_input_scales(plan);
  const ordered_json numbers = {{"dynamic", false}, {"num_bits", 4}, {"type", "float"}, {"group_size", 16}};
  ordered_json group = {{"weights", numbers}, {"targets", {"Linear"}}};
  if (packs_inputs) group["input_activations"] = numbers;
  return {{"config_groups", {{"group_0", std::move(group)}}},
          {"ignore", kept_modules(plan)},
          {"quant_algo", packs_inputs ? "NVFP4" : "W4A16_NVFP4"},
          {"group_size", 16},
          {"producer", producer()},
          {"quant_method", "modelopt"}};
}

/// What stands in config.json as "quantization_config"; null for the linear layout, whose facts are in the files.
inline ordered_json quantization_config(const io::pack_plan& plan) {
  switch (plan.options.layout) {
    case io::checkpoint_layout::gpt_oss:
      return {{"quant_method", "mxfp4"}, {"modules_to_not_convert", kept_modules(plan)}};
    case io::checkpoint_layout::compressed_tensors:
      return compressed_tensors_config(plan);
    case io::checkpoint_layout::modelopt:
      return modelopt_config(plan);
    case io::checkpoint_layout::linear:
      break;
  }
  return nullptr;
}

/// hf_quant_config.json, which readers of ModelOpt's checkpoints look for first.
inline ordered_json modelopt_file(const io::pack_plan& plan) {
  const ordered_json config = modelopt_config(plan);
  return {{"producer", producer()},
          {"quantization",
           {{"quant_algo", config["quant_algo"]},
            {"kv_cache_quant_algo", nullptr},
            {"group_size", 16},
            {"exclude_modules", config["ignore"]}}}};
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
