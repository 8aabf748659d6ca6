#pragma once

#include "../../detail/macros_off.hpp"

#include "../../version.hpp"  // TETROMINO_NAMESPACE

#include <algorithm>  // std::find, std::min

#include <cstddef>           // std::size_t
#include <initializer_list>  // std::initializer_list
#include <span>              // std::span
#include <string_view>       // std::string_view

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// "blk.3.ffn_up_exps.weight" in its parts.
struct gguf_name {
  std::string_view tower;   ///< "enc", "dec", "v", "mm" ...; empty for the language model itself
  bool in_layer = false;    ///< whether there is a "blk.N."
  std::string_view module;  ///< "ffn_up_exps"
  bool is_weight = false;   ///< whether it ends with ".weight"
};

inline gguf_name split_gguf_name(std::string_view name) noexcept {
  gguf_name out;
  constexpr std::string_view weight = ".weight", block = "blk.";
  if (name.ends_with(weight)) {
    out.is_weight = true;
    name.remove_suffix(weight.size());
  }
  if (const auto at = name.find(block); at == 0 || (at != std::string_view::npos && name[at - 1] == '.')) {
    if (at > 0) out.tower = name.substr(0, at - 1);
    name.remove_prefix(at + block.size());
    name.remove_prefix(std::min(name.find('.'), name.size() - 1) + 1);
    out.in_layer = true;
  }
  out.module = name;
  return out;
}

inline bool is_one_of(std::string_view name, std::initializer_list<std::string_view> names) noexcept {
  return std::find(names.begin(), names.end(), name) != names.end();
}

inline bool is_gguf_experts(std::string_view module) noexcept {
  return is_one_of(module, {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"});
}

/// Why a tensor of llama.cpp's naming stays as it is; empty for the weight of a matrix product. A name that is not
/// known never counts as one. (llama.cpp, src/llama-arch.cpp)
inline std::string_view gguf_kept_because(std::string_view name, std::span<const std::size_t> shape) noexcept {
  const gguf_name parts = split_gguf_name(name);
  const std::string_view module = parts.module;
  const auto has = [&](std::string_view piece) { return module.find(piece) != std::string_view::npos; };
  if (!parts.is_weight) return "not a weight";
  if (has("norm")) return "a norm";
  if (has("gate_inp")) return "a router";
  if (has("conv")) return "a convolution";
  if (has("embd") || has("embed") || has("token_types")) return "an embedding";
  if (!parts.in_layer && is_one_of(module, {"output", "cls", "cls.output"})) return "an output head";
  if (shape.size() < 2) return "a vector";
  if (!parts.tower.empty() && !is_one_of(parts.tower, {"enc", "dec"})) return "in a vision or audio tower";
  if (parts.in_layer && is_gguf_experts(module)) {
    return shape.size() == 3 ? std::string_view() : "experts, but not a stack of matrices";
  }
  const bool is_known = is_one_of(
      module, {"attn_q",       "attn_k",         "attn_v",    "attn_qkv",     "attn_output",  "attn_q_a",
               "attn_q_b",     "attn_kv_a_mqa",  "attn_kv_b", "cross_attn_q", "cross_attn_k", "cross_attn_v",
               "cross_attn_o", "attn_o",         "ffn_gate",  "ffn_up",       "ffn_down",     "ffn_gate_shexp",
               "ffn_up_shexp", "ffn_down_shexp", "ssm_in",    "ssm_out"});
  if (parts.in_layer && is_known && shape.size() == 2) return {};
  if (module.starts_with("ssm_")) return "a state-space parameter";
  if (has("gate")) return "a gate";
  return "not known to be the weight of a matrix product";
}

/// Whether llama.cpp multiplies what comes out of this NVFP4 weight by the tensor MODULE.scale. It reads one beside
/// most weights, but the graphs of most architectures leave it out; and where the module has a bias, some apply it too
/// late. A weight without it is packed with a tensor scale of 1. (llama.cpp of 2026-10: load_tensors in
/// src/llama-model.cpp, the graphs in src/models, build_ffn in src/llama-graph.cpp)
inline bool gguf_scale_applies(std::string_view family, std::string_view name, bool has_bias) noexcept {
  const gguf_name parts = split_gguf_name(name);
  if (!parts.in_layer || !parts.tower.empty() || !parts.is_weight) return false;
  if (!is_one_of(family, {"llama", "qwen3", "qwen3moe", "qwen35", "qwen35moe", "mistral3", "nemotron_h",
                          "nemotron_h_moe", "cohere2", "cohere2moe", "mellum", "nanbeige"})) {
    return false;
  }
  if (is_one_of(parts.module, {"ffn_gate", "ffn_up", "ffn_down", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"})) {
    return !has_bias;
  }
  return is_one_of(parts.module, {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate_exps",
                                  "ffn_up_exps", "ffn_down_exps"});
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
