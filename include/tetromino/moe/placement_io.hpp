#pragma once

#include "../detail/macros_off.hpp"

/// Placements as files: ours, and those of engines. Opt-in: needs nlohmann-json.

#include "../error.hpp"            // tetromino::result, tetromino::error
#include "formats/json.hpp"        // detail::parse_json, detail::whole_number
#include "formats/slot_lists.hpp"  // detail::slot_lists, detail::read_yaml_lists
#include "placement.hpp"           // placement
#include "topology.hpp"            // topology

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>    // std::adjacent_find, std::find, std::min
#include <cstddef>      // std::size_t
#include <cstdint>      // std::int32_t, std::uint32_t, std::uint64_t
#include <functional>   // std::greater_equal
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe {
inline namespace TETROMINO_ISA {

/// A placement as one line of JSON: `{"experts":E,"layers":L,"slot_to_expert":[[…],…],"slots":S}`, −1 for empty slots.
[[nodiscard]] inline std::string to_json(const placement& p) {
  nlohmann::json rows = nlohmann::json::array();
  for (std::size_t l = 0; l < p.layers(); ++l) {
    rows.push_back(std::vector<std::int32_t>(p.layer(l).begin(), p.layer(l).end()));
  }
  const nlohmann::json out = {
      {"layers", p.layers()}, {"experts", p.experts()}, {"slots", p.slots()}, {"slot_to_expert", std::move(rows)}};
  return out.dump();
}

}  // namespace TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

[[nodiscard]] inline result<placement> placement_of_json(const nlohmann::json& j) {
  std::size_t sizes[3] = {};
  constexpr const char* keys[3] = {"layers", "experts", "slots"};
  for (std::size_t i = 0; i < 3; ++i) {
    const auto found = j.find(keys[i]);
    std::uint64_t n = 0;
    if (found == j.end() || !whole_number(*found, ~std::uint64_t{0}, n)) {
      return error(errc::malformed_file, {"placement: expected ", keys[i], ", a whole number"});
    }
    sizes[i] = n;
  }
  if (sizes[1] == 0 || sizes[1] > placement::max_experts) {
    return error(errc::malformed_file,
                 {"placement: expected 1 to ", placement::max_experts, " experts, got ", sizes[1]});
  }
  const auto rows = j.find("slot_to_expert");
  if (rows == j.end() || !rows->is_array() || rows->size() != sizes[0]) {
    return error(errc::malformed_file, {"placement: expected slot_to_expert, a list of ", sizes[0], " lists"});
  }
  slot_lists lists;
  for (std::size_t l = 0; l < rows->size(); ++l) {
    const nlohmann::json& row = (*rows)[l];
    if (!row.is_array() || row.size() != sizes[2]) {
      return error(errc::malformed_file,
                   {"placement: expected slot_to_expert of layer ", l, ", a list of ", sizes[2], " entries"});
    }
    if (std::string bad = lists.add(row); !bad.empty()) {
      return error(errc::malformed_file, {"placement: ", bad, " in layer ", l});
    }
  }
  return lists.finish(sizes[1]);
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Reads what `to_json` wrote; other keys are ignored. Errors say which key is missing or wrong.
[[nodiscard]] inline result<placement> try_placement_from_json(std::string_view written) {
  detail::json_document<nlohmann::json> document;
  nlohmann::json& j = *document;
  if (std::string bad = detail::parse_json(written, j); !bad.empty() || !j.is_object()) {
    return error(errc::malformed_file, {"placement: ", bad.empty() ? "expected a JSON object" : bad});
  }
  return detail::placement_of_json(j);
}
[[nodiscard]] inline placement placement_from_json(std::string_view written) {
  return try_placement_from_json(written).value();
}

}  // namespace TETROMINO_ISA

/// How engines write down where experts live.
enum class plan_format : std::uint8_t {
  physical_to_logical_json,  ///< SGLang (--init-expert-location), vLLM: `{"physical_to_logical_map": [[…], …]}`
  tensorrt_llm_yaml,         ///< MoE load balancer: num_slots, initial_global_assignments, layer_updates_per_iter
  vllm_ascend_json,          ///< expert_map.json: layer_list, device_list, device_expert
};

/// What the engines want to know besides.
struct plan_write_options {
  /// Numbers in the model of the placement's layers, ascending, below 65,536: dense layers come before, or between. For
  /// SGLang and TensorRT-LLM; vLLM and vllm-ascend count layers with experts alone. Empty: 0, 1, …
  std::vector<std::uint32_t> layers{};
  std::size_t layer_updates_per_iter = 0;  ///< TensorRT-LLM: 0 keeps the plan as it is
  /// SGLang: layers of the model, up to 65,536, where the last are dense; 0: none of them.
  std::size_t model_layers = 0;
};

inline namespace TETROMINO_ISA {

/// A plan as an engine reads it. In physical_to_logical_map, which has a row for each layer of the model, dense layers
/// have what SGLang gives them: experts 0, 1, …, and again from 0. Errors: slots that are empty (see fill_empty_slots),
/// since no engine takes those; a placement for another topology; layer numbers out of order, or beyond the model's.
[[nodiscard]] inline result<std::string> try_to_plan(const placement& p, const topology& t, plan_format format,
                                                     const plan_write_options& options = {}) {
  if (p.slots() != t.slots()) {
    return error(errc::shape_mismatch, {"plan: expected ", t.slots(), " slots as in the topology, got ", p.slots()});
  }
  for (std::size_t l = 0; l < p.layers(); ++l) {
    const auto row = p.layer(l);
    if (const auto empty = std::find(row.begin(), row.end(), empty_slot); empty != row.end()) {
      return error(errc::invalid_argument,
                   {"plan: expected an expert in each slot (fill_empty_slots), got none in slot ", empty - row.begin(),
                    " of layer ", l});
    }
  }
  const std::vector<std::uint32_t>& numbers = options.layers;
  if (!numbers.empty() &&
      (numbers.size() != p.layers() || numbers.back() > 65'535 ||
       std::adjacent_find(numbers.begin(), numbers.end(), std::greater_equal<>()) != numbers.end())) {
    return error(errc::invalid_argument,
                 {"plan: expected ", p.layers(), " numbers of layers, ascending and below 65536, got ", numbers.size(),
                  numbers.size() == p.layers() ? " others" : ""});
  }
  const auto number_of = [&](std::size_t l) { return numbers.empty() ? l : numbers[l]; };
  if (const std::size_t all = options.model_layers;
      all != 0 && (all > 65'536 || (p.layers() > 0 && all <= number_of(p.layers() - 1)))) {
    return error(
        errc::invalid_argument,
        detail::text("plan: expected a model of at most 65536 layers, the last one of the plan among them, got ", all));
  }
  const auto list = [&](std::size_t l, std::size_t first, std::size_t count) {
    const auto row = p.layer(l).subspan(first, count);
    return std::vector<std::int32_t>(row.begin(), row.end());
  };
  if (format == plan_format::tensorrt_llm_yaml) {
    std::string out = detail::text("num_slots: ", p.slots(), "\ninitial_global_assignments:\n");
    for (std::size_t l = 0; l < p.layers(); ++l) {
      out += detail::text("  ", number_of(l), ": [");
      for (std::size_t s = 0; s < p.slots(); ++s) out += detail::text(s == 0 ? "" : ", ", p.layer(l)[s]);
      out += "]\n";
    }
    return out + detail::text("layer_updates_per_iter: ", options.layer_updates_per_iter, "\n");
  }
  std::vector<std::size_t> dense(p.slots());
  for (std::size_t s = 0; s < dense.size(); ++s) dense[s] = s % p.experts();
  nlohmann::json layers = nlohmann::json::array();
  for (std::size_t l = 0; l < p.layers(); ++l) {
    if (format == plan_format::physical_to_logical_json) {
      while (layers.size() < number_of(l)) layers.push_back(dense);
      layers.push_back(list(l, 0, p.slots()));
      continue;
    }
    nlohmann::json devices = nlohmann::json::array();
    for (std::size_t g = 0; g < t.gpus(); ++g) {
      devices.push_back({{"device_id", g}, {"device_expert", list(l, t.first_slot(g), t.slots_on_gpu(g))}});
    }
    layers.push_back({{"layer_id", l}, {"device_count", t.gpus()}, {"device_list", std::move(devices)}});
  }
  if (format == plan_format::physical_to_logical_json) {
    while (layers.size() < options.model_layers) layers.push_back(dense);
    return nlohmann::json{{"physical_to_logical_map", std::move(layers)}}.dump();
  }
  return nlohmann::json{{"moe_layer_count", p.layers()}, {"layer_list", std::move(layers)}}.dump();
}
[[nodiscard]] inline std::string to_plan(const placement& p, const topology& t, plan_format format,
                                         const plan_write_options& options = {}) {
  return try_to_plan(p, t, format, options).value();
}

}  // namespace TETROMINO_ISA

/// A placement out of a file, and whose file it is.
struct plan_file {
  std::string format;
  placement experts;
  std::vector<std::uint32_t> layers;  ///< numbers in the model; none where the file counts layers with experts alone
};

namespace detail::inline TETROMINO_ISA {

/// Says where `key`, if it is there, is another number than the list that is read says, or nothing. `rule`: what lists
/// and their numbers owe each other.
[[nodiscard]] inline std::string check_number(const nlohmann::json& j, const char* key, std::size_t expected,
                                              std::string_view rule) {
  const auto found = j.find(key);
  std::uint64_t n = 0;
  if (found == j.end() || (whole_number(*found, ~std::uint64_t{0}, n) && n == expected)) return {};
  return text("expected ", rule, ": ", key, " ", expected, ", got ",
              found->is_number_integer() ? found->dump() : found->type_name());
}
/// Lists of layers and devices are read in their order, as vllm-ascend reads them.
[[nodiscard]] inline std::string check_place(const nlohmann::json& j, const char* key, std::size_t place) {
  return check_number(j, key, place, "lists in the order of their numbers, from 0");
}
[[nodiscard]] inline std::string check_count(const nlohmann::json& j, const char* key, std::size_t listed) {
  return check_number(j, key, listed, "counts of what is listed");
}

[[nodiscard]] inline result<plan_file> plan_of_json(const nlohmann::json& j, std::size_t experts) {
  if (j.contains("slot_to_expert")) {
    auto p = placement_of_json(j);
    return p ? result<plan_file>(plan_file{"placement (JSON)", std::move(*p), {}}) : p.error();
  }
  slot_lists lists;
  std::vector<std::uint32_t> numbers;
  const bool by_device = j.contains("layer_list");
  const nlohmann::json& layers = by_device ? j["layer_list"] : j["physical_to_logical_map"];
  if (!layers.is_array()) return error(errc::malformed_file, "plan: expected a list of layers");
  if (std::string bad = by_device ? check_count(j, "moe_layer_count", layers.size()) : ""; !bad.empty()) {
    return error(errc::malformed_file, {"plan: ", bad});
  }
  for (std::size_t l = 0; l < layers.size(); ++l) {
    nlohmann::json row = nlohmann::json::array();
    std::string bad;
    if (by_device) {
      const auto devices = layers[l].is_object() ? layers[l].find("device_list") : layers[l].end();
      if (devices == layers[l].end() || !devices->is_array()) bad = "expected device_list, a list";
      if (bad.empty()) bad = check_place(layers[l], "layer_id", l);
      if (bad.empty()) bad = check_count(layers[l], "device_count", devices->size());
      for (std::size_t d = 0; bad.empty() && d < devices->size(); ++d) {
        const nlohmann::json& device = (*devices)[d];
        const auto held = device.is_object() ? device.find("device_expert") : device.end();
        if (held == device.end() || !held->is_array()) {
          bad = "expected device_expert, a list";
        } else if (bad = check_place(device, "device_id", d); bad.empty()) {
          row.insert(row.end(), held->begin(), held->end());
        }
      }
    }
    if (bad.empty()) bad = lists.add(by_device ? row : layers[l]);
    if (!bad.empty()) return error(errc::malformed_file, {"plan: ", bad, " in layer ", l});
    if (!by_device) numbers.push_back(static_cast<std::uint32_t>(l));
  }
  auto p = lists.finish(experts);
  if (!p) return p.error();
  return plan_file{by_device ? "vllm-ascend expert map (JSON)" : "physical_to_logical_map (JSON)", std::move(*p),
                   std::move(numbers)};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Reads a plan in any of the formats that are written here, `to_json` and `to_text` included, and says which it is.
/// `written` is what a file holds, and not its path. `experts` is how many there are; 0: the largest number + 1. GPUs
/// are not in it, so that slots count: a topology of as many slots goes with it. Errors: something else, lists of
/// different lengths, numbers that are no experts, lists of vllm-ascend out of the order of their ids, counts of what
/// is listed that are others.
[[nodiscard]] inline result<plan_file> try_read_plan(std::string_view written, std::size_t experts = 0) {
  const std::size_t begin = written.find_first_not_of(" \t\r\n");
  const std::string_view rest = begin == std::string_view::npos ? std::string_view() : written.substr(begin);
  if (rest.starts_with("placement ")) {
    auto p = try_placement_from_text(rest);
    return p ? result<plan_file>(plan_file{"placement (text)", std::move(*p), {}}) : p.error();
  }
  if (rest.starts_with('{')) {
    detail::json_document<nlohmann::json> document;
    nlohmann::json& j = *document;
    if (std::string bad = detail::parse_json(rest, j); !bad.empty()) {
      return error(errc::malformed_file, {"plan: ", bad});
    }
    if (j.contains("slot_to_expert") || j.contains("physical_to_logical_map") || j.contains("layer_list")) {
      return detail::plan_of_json(j, experts);
    }
  } else if (rest.find("initial_global_assignments:") != std::string_view::npos) {
    detail::slot_lists lists;
    std::vector<std::uint32_t> layers;
    if (std::string bad = detail::read_yaml_lists(rest, lists, layers); !bad.empty()) {
      return error(errc::malformed_file, {"plan: ", bad});
    }
    auto p = lists.finish(experts);
    if (!p) return p.error();
    if (const auto slots = detail::yaml_number(rest, "num_slots:"); slots && *slots != p->slots()) {
      return error(errc::malformed_file,
                   {"plan: expected num_slots to be what is listed, ", p->slots(), ", got ", *slots});
    }
    return plan_file{"TensorRT-LLM load balancer (YAML)", std::move(*p), std::move(layers)};
  }
  constexpr std::size_t shown = 60;  // characters that a message repeats
  const std::string_view line = rest.substr(0, std::min(rest.find_first_of("\r\n"), shown));
  return error(
      errc::malformed_file,
      {"plan: expected the contents of a file with slot_to_expert, physical_to_logical_map, "
       "layer_list or initial_global_assignments, got ",
       rest.empty() ? "an empty text" : "a text without them that starts with \"", line, rest.empty() ? "" : "\""});
}
[[nodiscard]] inline plan_file read_plan(std::string_view written, std::size_t experts = 0) {
  return try_read_plan(written, experts).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
