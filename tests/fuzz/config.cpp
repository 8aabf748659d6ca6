/// Any bytes as config.json beside tensors of many kinds, and after a first zero byte as names of other tensors, a line
/// each. Whatever it says, a model gets roles and plans for every layout, or says why not; and what is no weight of a
/// matrix product by its own name is never packed.

#include <tetromino/io/checkpoint/detail/config.hpp>

#include "fuzz/model_directory.hpp"
#include "fuzz/replay.hpp"

#include <algorithm>    // std::min
#include <cstdint>      // std::uint8_t
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace {

namespace io = tetromino::io;

void require_sane(std::string_view name, std::size_t dimensions, const io::tensor_kind& kind) {
  require(static_cast<std::size_t>(kind.role) < io::tensor_role_names.size(), "a role that has a name");
  if (!kind.kept_because.empty()) return;
  require(dimensions == 2 || dimensions == 3, "packed matrices or stacks of them");
  const std::string last = tetromino::detail::tensor_path(name).lower_leaf;
  for (const char* kept : {"norm", "router", "embed", "conv1d", "_bias", "_scale", "a_log", "lm_head"}) {
    require(last.find(kept) == std::string::npos, "no packed router, embedding, norm, convolution, bias or scale");
  }
}

/// Lines as names; their shapes follow from their lengths.
void try_names(std::string_view lines, const nlohmann::json& config) {
  std::vector<io::tensor_facts> facts;
  for (std::size_t begin = 0; begin < lines.size();) {
    const std::size_t end = std::min(lines.find('\n', begin), lines.size());
    const std::string name(lines.substr(begin, end - begin));
    std::vector<std::size_t> shape(name.size() % 5, 32);
    if (!shape.empty()) shape.back() *= 1 + name.size() % 3;
    facts.push_back({name, std::move(shape)});
    begin = end + 1;
  }
  const auto kinds = io::roles_of(facts, config);
  require(kinds.size() == facts.size(), "a role for each tensor");
  for (std::size_t i = 0; i < facts.size(); ++i) require_sane(facts[i].name, facts[i].shape.size(), kinds[i]);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const model_directory model({{"model.safetensors",
                                       {{"model.embed_tokens.weight", {96, 64}},
                                        {"model.layers.0.self_attn.q_proj.weight", {64, 64}},
                                        {"model.layers.0.self_attn.q_proj.bias", {64}},
                                        {"model.layers.0.input_layernorm.weight", {64}},
                                        {"model.layers.0.mlp.router.weight", {4, 64}},
                                        {"model.layers.0.mlp.experts.gate_up_proj", {4, 64, 128}},
                                        {"model.layers.0.mlp.experts.down_proj", {4, 64, 64}},
                                        {"model.layers.1.mixer.in_proj.weight", {128, 64}},
                                        {"model.layers.1.mixer.conv1d.weight", {64, 1, 4}},
                                        {"model.layers.1.mixer.A_log", {64}}}}});
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = std::min(input.find('\0'), input.size());
  model.store("config.json", input.substr(0, zero));
  const auto opened = io::checkpoint::try_open(model.path());
  if (!opened) {
    require(opened.error().code() == tetromino::errc::malformed_file, "the kind of the error");
    require(std::string_view(opened.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }
  if (zero < size) try_names(input.substr(zero + 1), opened->config());
  const auto parameters = io::try_parameters_of(*opened);
  if (!parameters) {
    require(parameters.error().code() == tetromino::errc::invalid_argument, "a format that is refused by its name");
    require(std::string_view(parameters.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }
  require(parameters->size() == opened->tensors().size(), "each tensor a parameter");
  for (const auto& p : *parameters) require_sane(p.name, p.shape.size(), p.kind);
  for (std::size_t i = 0; i < io::checkpoint_layout_names.size(); ++i) {
    const auto layout = static_cast<io::checkpoint_layout>(i);
    io::plan_options options;
    options.layout = layout;
    options.rules.push_back(
        {"", tetromino::recipe::parse(layout == io::checkpoint_layout::gpt_oss ? "mxfp4-32/oas" : "nvfp4/amax")});
    const auto plan = io::try_plan(*opened, *parameters, std::move(options));
    if (!plan) {
      require(std::string_view(plan.error().what()).size() < 1000, "an error that fits on a screen");
      continue;
    }
    const auto config = tetromino::detail::quantization_config(*plan);
    require(config.is_null() == (layout == io::checkpoint_layout::linear), "a config for readers of other layouts");
    if (!config.is_null()) require(!config.dump().empty(), "a config that can be written");
  }
  return 0;
}
