#pragma once

#include "../../detail/macros_off.hpp"

#include "../../packed.hpp"    // packed_shape
#include "../../scaling.hpp"   // recipe, name_of
#include "../safetensors.hpp"  // tensor_declaration
#include "parameters.hpp"      // parameter
#include "rows.hpp"            // row_range

#include <algorithm>    // std::min, std::max
#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::pair
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::io {

/// How the files of a packed model hold its weights, so that a reader finds them.
enum class checkpoint_layout : std::uint8_t {
  linear,              ///< ours, for every recipe: NAME.codes, .scales, .macros, .tensor_scales
  gpt_oss,             ///< transformers' Mxfp4: experts alone, NAME_blocks and NAME_scales
  compressed_tensors,  ///< transformers, vLLM: weight_packed, weight_scale, weight_global_scale (the inverse)
  modelopt,            ///< ModelOpt, vLLM, TensorRT-LLM: weight, weight_scale, weight_scale_2
};

inline constexpr std::array<std::string_view, 4> checkpoint_layout_names{"linear", "gpt-oss", "compressed-tensors",
                                                                         "modelopt"};

inline namespace TETROMINO_ISA {

[[nodiscard]] constexpr std::string_view name(checkpoint_layout layout) noexcept {
  return checkpoint_layout_names[static_cast<std::size_t>(layout)];
}

/// The layout of that name. Fails with errc::unknown_name, listing what exists.
[[nodiscard]] inline result<checkpoint_layout> try_checkpoint_layout_named(std::string_view wanted) {
  std::string known;
  for (std::size_t i = 0; i < checkpoint_layout_names.size(); ++i) {
    if (checkpoint_layout_names[i] == wanted) return static_cast<checkpoint_layout>(i);
    known += detail::text(i == 0 ? "" : ", ", checkpoint_layout_names[i]);
  }
  return error(errc::unknown_name, {"unknown layout \"", wanted, "\"; there are ", known});
}
[[nodiscard]] inline checkpoint_layout checkpoint_layout_named(std::string_view wanted) {
  return try_checkpoint_layout_named(wanted).value();
}

/// Says why a layout cannot hold what a recipe makes, if it cannot.
[[nodiscard]] inline result<void> try_fit(checkpoint_layout where, const recipe& r) {
  if (where == checkpoint_layout::linear) return {};
  if (r.rotation != 0) {
    return error(errc::invalid_argument,
                 {"readers of layout ", name(where), " do not rotate activations, as recipe ", r.name(), " needs"});
  }
  const bool is_mx = r.format == any_format(mxfp4{}), is_nvfp4 = r.format == any_format(nvfp4{});
  const std::string_view takes = where == checkpoint_layout::gpt_oss    ? "mxfp4-32"
                                 : where == checkpoint_layout::modelopt ? "nvfp4"
                                                                        : "mxfp4-32 and nvfp4";
  if ((is_mx && where != checkpoint_layout::modelopt) || (is_nvfp4 && where != checkpoint_layout::gpt_oss)) return {};
  return error(errc::invalid_argument, {"layout ", name(where), " stores ", takes, ", not ", name_of(r.format),
                                        r.format.macro_block == 0 ? "" : " with macro blocks"});
}

}  // namespace TETROMINO_ISA

/// Rows of a weight that a layout stores as one matrix, or one stack of them: rows first_row, first_row + row_step, ...
/// of matrices [matrix, matrix + matrices); and the tensors that hold them. An empty name: there is no such part.
struct stored_weight {
  std::size_t matrix = 0;
  std::size_t matrices = 1;
  std::size_t first_row = 0;
  std::size_t row_step = 1;
  std::size_t rows = 0;
  tensor_declaration codes{}, scales{}, macros{}, tensor_scale{}, input_scale{};

  [[nodiscard]] TETROMINO_ABI std::vector<const tensor_declaration*> parts() const {
    std::vector<const tensor_declaration*> all;
    for (const auto* part : {&codes, &scales, &macros, &tensor_scale, &input_scale}) {
      if (!part->name.empty()) all.push_back(part);
    }
    return all;
  }
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The name of the module that a weight belongs to.
inline std::string module_of(std::string_view name) {
  constexpr std::string_view suffix = ".weight";
  return std::string(name.ends_with(suffix) ? name.substr(0, name.size() - suffix.size()) : name);
}

/// The modules that a stack of experts becomes where readers want one module for each expert.
struct expert_modules {
  std::string before;               ///< "model.layers.0.mlp.experts."; a number and a leaf follow
  std::vector<std::string> leaves;  ///< two where a stack holds gate and up
};

inline expert_modules expert_modules_of(const io::parameter& p) {
  const tensor_path path(p.name);
  expert_modules out{std::string(path.parent), {std::string(path.leaf)}};
  const bool says_experts = std::any_of(path.pieces.begin(), path.pieces.end(),
                                        [](std::string_view piece) { return has_word(lower(piece), "experts"); });
  if (!says_experts) out.before += "experts.";
  constexpr std::array<std::pair<std::string_view, std::array<std::string_view, 2>>, 4> split{{
      {"gate_up_proj", {"gate_proj", "up_proj"}},
      {"w13", {"w1", "w3"}},
      {"w13_weight", {"w1", "w3"}},
      {"input_linear", {"w1", "w3"}},
  }};
  for (const auto& [stacked, halves] : split) {
    if (path.leaf == stacked && p.rows % 2 == 0) out.leaves.assign(halves.begin(), halves.end());
  }
  if (path.leaf == "w2_weight" || path.leaf == "output_linear") out.leaves = {"w2"};
  return out;
}

/// gpt-oss has gate and up in turn, row by row; all others have gate above up.
inline bool has_rows_in_turn(const io::parameter& p, const nlohmann::json& config) {
  const bool says = config.is_object() && config.contains("model_type") && config["model_type"].is_string();
  if (says) return config["model_type"].get<std::string>().starts_with("gpt_oss");
  return p.values->name.ends_with("_blocks");
}

/// Names and shapes of the tensors that hold one stored weight [.., rows, K].
inline void name_parts(io::stored_weight& out, io::checkpoint_layout where, const any_format& format,
                       const std::string& weight, const std::vector<std::size_t>& outer, std::size_t cols) {
  using io::dtype;
  const packed_shape shape{format, out.matrices, out.rows, cols};
  const bool is_nvfp4 = format.scale == scale_type::e4m3;
  const auto sized = [&](std::initializer_list<std::size_t> row) {
    std::vector<std::size_t> dims = outer;
    dims.push_back(out.rows);
    dims.insert(dims.end(), row);
    return dims;
  };
  const std::size_t code_bytes = shape.code_bytes_per_row(), blocks = shape.blocks_per_row();
  const std::string module = module_of(weight);
  switch (where) {
    case io::checkpoint_layout::linear:
      out.codes = {weight + ".codes", dtype::U8, sized({code_bytes})};
      out.scales = {weight + ".scales", is_nvfp4 ? dtype::F8_E4M3 : dtype::F8_E8M0, sized({blocks})};
      if (format.macro_block != 0) out.macros = {weight + ".macros", dtype::U8, sized({shape.macros_per_row()})};
      if (is_nvfp4) out.tensor_scale = {weight + ".tensor_scales", dtype::F32, {out.matrices}};
      break;
    case io::checkpoint_layout::gpt_oss:
      out.codes = {module + "_blocks", dtype::U8, sized({blocks, 16})};
      out.scales = {module + "_scales", dtype::U8, sized({blocks})};
      break;
    case io::checkpoint_layout::compressed_tensors:
      out.codes = {module + ".weight_packed", dtype::U8, sized({code_bytes})};
      out.scales = {module + ".weight_scale", is_nvfp4 ? dtype::F8_E4M3 : dtype::U8, sized({blocks})};
      if (is_nvfp4) out.tensor_scale = {module + ".weight_global_scale", dtype::F32, {1}};
      break;
    case io::checkpoint_layout::modelopt:
      out.codes = {module + ".weight", dtype::U8, sized({code_bytes})};
      out.scales = {module + ".weight_scale", dtype::F8_E4M3, sized({blocks})};
      out.tensor_scale = {module + ".weight_scale_2", dtype::F32, {}};
      break;
  }
}

/// Where a layout puts a weight.
inline std::vector<io::stored_weight> stored_in(io::checkpoint_layout where, const any_format& format,
                                                const io::parameter& p, const nlohmann::json& config) {
  const bool is_split = p.shape.size() == 3 && (where == io::checkpoint_layout::compressed_tensors ||
                                                where == io::checkpoint_layout::modelopt);
  if (!is_split) {
    io::stored_weight whole{0, p.matrices, 0, 1, p.rows};
    const std::vector<std::size_t> outer(p.shape.size() == 3 ? 1 : 0, p.matrices);
    name_parts(whole, where, format, p.name, outer, p.cols);
    return {whole};
  }
  const expert_modules modules = expert_modules_of(p);
  const std::size_t halves = modules.leaves.size();
  const bool in_turn = halves > 1 && has_rows_in_turn(p, config);
  std::vector<io::stored_weight> out;
  for (std::size_t e = 0; e < p.matrices; ++e) {
    for (std::size_t h = 0; h < halves; ++h) {
      const std::size_t rows = p.rows / halves;
      io::stored_weight one{e, 1, in_turn ? h : h * rows, in_turn ? halves : 1, rows};
      name_parts(one, where, format, text(modules.before, e, '.', modules.leaves[h], ".weight"), {}, p.cols);
      out.push_back(std::move(one));
    }
  }
  return out;
}

/// The rows of a range that a stored weight holds: `first` of the weight's matrix, every row_step-th, `count` of them,
/// which are rows `at` and on of the stored tensor.
struct rows_of_stored {
  std::size_t first = 0;
  std::size_t at = 0;
  std::size_t count = 0;
};
inline rows_of_stored rows_within(const io::stored_weight& stored, const io::row_range& range) {
  if (range.matrix < stored.matrix || range.matrix >= stored.matrix + stored.matrices) return {};
  rows_of_stored out;
  out.first = std::max(range.first, stored.first_row);
  out.first += (stored.row_step - (out.first - stored.first_row) % stored.row_step) % stored.row_step;
  const std::size_t end = std::min(range.first + range.count, stored.first_row + stored.row_step * stored.rows);
  if (out.first >= end) return {};
  out.count = (end - out.first + stored.row_step - 1) / stored.row_step;
  out.at = (range.matrix - stored.matrix) * stored.rows + (out.first - stored.first_row) / stored.row_step;
  return out;
}

/// A tensor scale as a layout stores it: compressed-tensors keeps the inverse.
inline float stored_scale(io::checkpoint_layout where, float scale) {
  return where == io::checkpoint_layout::compressed_tensors ? 1.0f / scale : scale;
}
inline float loaded_scale(io::checkpoint_layout where, float stored) { return stored_scale(where, stored); }

/// The scale nearest to one that a layout gives back: compressed-tensors needs 1 / (1 / scale) to be scale.
inline float storable_scale(io::checkpoint_layout where, float scale) {
  constexpr float least = 0x1p-126f, most = 0x1p126f;  // scales whose inverses are normal floats
  scale = std::min(std::max(scale, least), most);
  return where == io::checkpoint_layout::compressed_tensors ? 1.0f / (1.0f / scale) : scale;
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
