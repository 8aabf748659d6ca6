#pragma once

/// What the checkpoint programs share: which tensors of a file are packed, how each layout stores a packed tensor, and
/// walking through a tensor in slices that fit the cache.

#include "input_statistics.hpp"

#include <tetromino/cpu.hpp>
#include <tetromino/io/safetensors.hpp>
#include <tetromino/tetromino.hpp>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace checkpoint {

namespace io = tetromino::io;
using tetromino::errc;
using tetromino::error;

/// A tensor seen as weights [matrices, rows, cols], K = cols being the direction of reduction.
struct weights {
  const io::safetensors_tensor* tensor;
  std::size_t matrices;
  std::size_t rows;
  std::size_t cols;

  [[nodiscard]] std::size_t elements() const { return matrices * rows * cols; }
};

/// Tensors that stay as they are whatever their shape: routers, norms, embeddings and the output head.
inline const std::vector<std::string> always_kept = {"*router*",          "*norm*",  "*embed*", "*lm_head*", "*bias*",
                                                     "*.mlp.gate.weight", "*rotary*"};

inline bool matches(const std::string& name, std::span<const std::string> patterns) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [&](const std::string& pattern) { return fnmatch(pattern.c_str(), name.c_str(), 0) == 0; });
}

/// The expert and linear weights of a file: 2-D [rows, K] or 3-D [experts, rows, K], of a floating type, not kept.
inline std::vector<weights> find_weights(const io::safetensors_file& file, std::span<const std::string> keep) {
  std::vector<weights> found;
  for (const auto& tensor : file) {
    const auto& shape = tensor.shape();
    const bool floating =
        tensor.dtype() == io::dtype::F32 || tensor.dtype() == io::dtype::F16 || tensor.dtype() == io::dtype::BF16;
    if (!floating || (shape.size() != 2 && shape.size() != 3) || tensor.elements() == 0) continue;
    if (matches(tensor.name(), always_kept) || matches(tensor.name(), keep)) continue;
    found.push_back({&tensor, shape.size() == 3 ? shape[0] : 1, shape[shape.size() - 2], shape.back()});
  }
  return found;
}

/// Calls f(batch_view<const T>, first_row) for slices of whole rows, about 4 MiB each, or of whole matrices; rows count
/// through all matrices. A slice's pages leave memory once f is done with them.
template <class F>
void for_each_slice(const io::safetensors_file& file, const weights& w, const F& f, bool whole_matrices = false) {
  const auto walk = [&]<class T>(std::span<const T> values) {
    const std::size_t all_rows = w.matrices * w.rows;
    const std::size_t step =
        whole_matrices ? w.rows : std::clamp<std::size_t>((4u << 20) / (w.cols * sizeof(T)), 1, all_rows);
    for (std::size_t row = 0; row < all_rows; row += step) {
      const std::size_t rows = std::min(step, all_rows - row);
      const std::span<const T> slice = values.subspan(row * w.cols, rows * w.cols);
      f(tetromino::batch_view<const T>(slice.data(), 1, rows, w.cols), row);
      file.done_with({reinterpret_cast<const std::uint8_t*>(slice.data()), slice.size_bytes()});
    }
  };
  switch (w.tensor->dtype()) {
    case io::dtype::F32:
      return walk(w.tensor->as<float>());
    case io::dtype::F16:
      return walk(w.tensor->as<tetromino::half>());
    default:
      return walk(w.tensor->as<tetromino::bfloat16>());
  }
}

/// The largest magnitude of a tensor, after a Hadamard rotation unless its size is 0.
inline float amax_of(const io::safetensors_file& file, const weights& w, const tetromino::cpu_t& policy,
                     std::size_t rotation) {
  float largest = 0;
  for_each_slice(file, w, [&]<class T>(const tetromino::batch_view<const T>& slice, std::size_t) {
    if (rotation == 0) {
      largest = std::max(largest, tetromino::amax(policy, slice));
    } else {
      tetromino::matrix<float> rotated(slice.rows, slice.cols);
      for (std::size_t r = 0; r < slice.rows; ++r) {
        for (std::size_t k = 0; k < slice.cols; ++k) rotated(r, k) = tetromino::detail::to_float(slice.row(0, r)[k]);
      }
      tetromino::rotate(policy, rotated, {rotation}, rotated.view());
      largest = std::max(largest, tetromino::amax(policy, rotated));
    }
  });
  return largest;
}

/// Packs a slice that begins at `row`: where there are statistics, it is a whole matrix, whose errors they weigh or
/// feed back.
template <class T>
tetromino::result<tetromino::packed<>> pack_slice(const tetromino::cpu_t& policy,
                                                  const tetromino::batch_view<const T>& slice, std::size_t row,
                                                  const weights& w, const tetromino::recipe& r,
                                                  std::span<const float> tensor_scales, const input_statistics* seen) {
  tetromino::quantize_options options{.tensor_scales = tensor_scales};
  if (seen == nullptr) return tetromino::try_quantize(policy, slice, r, options);
  const std::string& name = w.tensor->name();
  const std::size_t matrix = row / w.rows;
  if (r.error_feedback) {
    return tetromino::try_gptq(policy, slice[0], r, seen->of(name, matrix, w.matrices, w.cols), options);
  }
  const auto mean_squares = seen->column_weights(name, matrix, w.matrices, w.cols, r.rotation);
  options.column_weights = mean_squares;
  return tetromino::try_quantize(policy, slice, r, options);
}

/// Unpacked values in the columns of the original: a rotation is taken back.
template <class Packed>
tetromino::matrix<float> unpacked(const tetromino::cpu_t& policy, const Packed& packed, const tetromino::recipe& r) {
  auto values = tetromino::dequantize<float>(policy, packed);
  if (r.rotation != 0) tetromino::rotate_back(policy, values, {r.rotation}, values.view());
  return values;
}

/// Runs `body` and names the tensor in the error that it may throw; a rejected value is named by its own row.
template <class F>
void naming(const weights& w, const F& body) {
  try {
    body();
  } catch (const error& e) {
    throw error(e.code(), fmt::format("tensor \"{}\": {}", w.tensor->name(), e.what()));
  }
}

/// How a file stores packed tensors.
enum class layout { linear, gpt_oss, compressed_tensors, modelopt };

inline constexpr std::array<std::pair<std::string_view, layout>, 4> layouts = {{
    {"linear", layout::linear},
    {"gpt-oss", layout::gpt_oss},
    {"compressed-tensors", layout::compressed_tensors},
    {"modelopt", layout::modelopt},
}};

inline std::string_view name_of(layout wanted) {
  return std::find_if(layouts.begin(), layouts.end(), [&](const auto& entry) { return entry.second == wanted; })->first;
}

inline layout layout_named(std::string_view name) {
  for (const auto& [known, value] : layouts) {
    if (known == name) return value;
  }
  throw error(errc::unknown_name, fmt::format("unknown layout \"{}\"; there are {}", name, [] {
                std::vector<std::string_view> names;
                for (const auto& entry : layouts) names.push_back(entry.first);
                return fmt::format("{}", fmt::join(names, ", "));
              }()));
}

/// The tensors that hold one packed tensor in a layout. An empty name: the layout and format have no such part.
struct stored {
  io::tensor_declaration codes, scales, macros, tensor_scale;

  [[nodiscard]] std::vector<io::tensor_declaration> parts() const {
    std::vector<io::tensor_declaration> all;
    for (const auto* part : {&codes, &scales, &macros, &tensor_scale}) {
      if (!part->name.empty()) all.push_back(*part);
    }
    return all;
  }
};

/// Says why a recipe's format cannot be stored in a layout, if it cannot.
inline void expect_fit(layout where, const tetromino::recipe& r) {
  const tetromino::any_format& format = r.format;
  if (where != layout::linear && r.rotation != 0) {
    throw error(
        errc::invalid_argument,
        fmt::format("readers of layout {} do not rotate activations, as recipe {} needs", name_of(where), r.name()));
  }
  const bool plain_mx32 = format == tetromino::any_format(tetromino::mxfp4{});
  const bool nvfp4 = format.scale == tetromino::scale_type::e4m3;
  const auto refuse = [&](std::string_view takes) {
    throw error(errc::invalid_argument,
                fmt::format("layout {} stores {}, not {}{}", name_of(where), takes, tetromino::name_of(format),
                            format.macro_block == 0 ? "" : " with macro blocks"));
  };
  if (where == layout::gpt_oss && !plain_mx32) refuse("mxfp4-32");
  if (where == layout::compressed_tensors && !plain_mx32 && !nvfp4) refuse("mxfp4-32 and nvfp4");
  if (where == layout::modelopt && !nvfp4) refuse("nvfp4");
}

/// Where a layout puts a packed tensor. The foreign layouts need whole blocks along K.
inline stored store_as(layout where, const tetromino::any_format& format, const weights& w) {
  using io::dtype;
  const tetromino::packed_shape shape{format, w.matrices, w.rows, w.cols};
  const std::string& name = w.tensor->name();
  const bool nvfp4 = format.scale == tetromino::scale_type::e4m3;
  if (where != layout::linear && w.cols % format.block != 0) {
    throw error(errc::shape_mismatch, fmt::format("tensor \"{}\": layout {} needs K in whole blocks of {}, got K = {}",
                                                  name, name_of(where), format.block, w.cols));
  }
  const auto sized = [&](std::initializer_list<std::size_t> row) {
    std::vector<std::size_t> dims(w.tensor->shape().begin(), w.tensor->shape().end() - 1);
    dims.insert(dims.end(), row);
    return dims;
  };
  const std::size_t code_bytes = shape.code_bytes_per_row(), blocks = shape.blocks_per_row();
  stored out;
  switch (where) {
    case layout::linear:
      out.codes = {name + ".codes", dtype::U8, sized({code_bytes})};
      out.scales = {name + ".scales", nvfp4 ? dtype::F8_E4M3 : dtype::F8_E8M0, sized({blocks})};
      if (format.macro_block != 0) out.macros = {name + ".macros", dtype::U8, sized({shape.macros_per_row()})};
      if (nvfp4) out.tensor_scale = {name + ".tensor_scales", dtype::F32, {1}};
      break;
    case layout::gpt_oss: {
      const bool suffixed = name.size() > 7 && name.ends_with(".weight");
      const std::string stem = suffixed ? name.substr(0, name.size() - 7) : name;
      out.codes = {stem + "_blocks", dtype::U8, sized({blocks, 16})};
      out.scales = {stem + "_scales", dtype::U8, sized({blocks})};
      break;
    }
    case layout::compressed_tensors:
      out.codes = {name + "_packed", dtype::U8, sized({code_bytes})};
      out.scales = {name + "_scale", nvfp4 ? dtype::F8_E4M3 : dtype::U8, sized({blocks})};
      if (nvfp4) out.tensor_scale = {name + "_global_scale", dtype::F32, {1}};
      break;
    case layout::modelopt:
      out.codes = {name, dtype::U8, sized({code_bytes})};
      out.scales = {name + "_scale", dtype::F8_E4M3, sized({blocks})};
      out.tensor_scale = {name + "_scale_2", dtype::F32, {}};
      break;
  }
  return out;
}

/// The tensor scale as a layout stores it. compressed-tensors keeps the encode sense, the inverse.
inline float stored_scale(layout where, float tensor_scale) {
  return where == layout::compressed_tensors ? 1.0f / tensor_scale : tensor_scale;
}
inline float loaded_scale(layout where, float stored) {
  return where == layout::compressed_tensors ? 1.0f / stored : stored;
}

/// The tensor scale to pack with: the one that readers of the layout will get back.
inline float tensor_scale_for(layout where, float amax, tetromino::scale_rule rule) {
  if (amax == 0) return 1.0f;
  const float scale = tetromino::tensor_scale_for(amax, rule);
  return where == layout::compressed_tensors ? tetromino::layout::invertible(scale) : scale;
}

/// What the layout's readers look for in config.json under "quantization_config".
inline nlohmann::json quantization_config(layout where, const tetromino::any_format& format,
                                          const std::vector<std::string>& kept_modules) {
  switch (where) {
    case layout::gpt_oss:
      return {{"quant_method", "mxfp4"}, {"modules_to_not_convert", kept_modules}};
    case layout::compressed_tensors: {
      const bool nvfp4 = format.scale == tetromino::scale_type::e4m3;
      const nlohmann::json numbers = {{"num_bits", 4},
                                      {"type", "float"},
                                      {"symmetric", true},
                                      {"dynamic", false},
                                      {"group_size", format.block},
                                      {"strategy", nvfp4 ? "tensor_group" : "group"}};
      return {{"quant_method", "compressed-tensors"},
              {"format", nvfp4 ? "nvfp4-pack-quantized" : "mxfp4-pack-quantized"},
              {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", numbers}}}}},
              {"ignore", kept_modules}};
    }
    case layout::modelopt:
      return {{"quant_method", "modelopt"},
              {"quant_algo", "NVFP4"},
              {"group_size", 16},
              {"kv_cache_quant_algo", nullptr},
              {"exclude_modules", kept_modules}};
    default:
      return nullptr;
  }
}

}  // namespace checkpoint
