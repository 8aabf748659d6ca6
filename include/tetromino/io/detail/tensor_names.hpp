#pragma once

#include "../../version.hpp"  // TETROMINO_NAMESPACE

#include <algorithm>         // std::find, std::all_of, std::min
#include <array>             // std::array
#include <cctype>            // std::isdigit, std::tolower
#include <cstddef>           // std::size_t
#include <initializer_list>  // std::initializer_list
#include <string>            // std::string
#include <string_view>       // std::string_view
#include <vector>            // std::vector

/// What the names of a model's tensors say. The lists are of published model definitions (transformers, vLLM,
/// llama.cpp); what they lack is not known, and is kept.
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

/// A tensor's name in pieces: "model.layers.0.mlp.gate.weight" has the module "model.layers.0.mlp.gate", whose last
/// piece is the leaf "gate", and the parameter "weight". Where a module owns a parameter of another name, such as
/// "experts.gate_up_proj", that name is the leaf and there is no parameter.
struct tensor_path {
  explicit tensor_path(std::string_view name) {
    for (std::size_t begin = 0; begin <= name.size();) {
      const std::size_t dot = std::min(name.find('.', begin), name.size());
      pieces.push_back(name.substr(begin, dot - begin));
      begin = dot + 1;
    }
    if (pieces.size() > 1 && (pieces.back() == "weight" || pieces.back() == "bias")) {
      parameter = pieces.back();
      pieces.pop_back();
    }
    std::size_t length = pieces.size() - 1;
    for (const auto piece : pieces) length += piece.size();
    module = name.substr(0, length);
    leaf = pieces.back();
    parent = name.substr(0, length - leaf.size());
    lower_leaf = lower(leaf);
  }

  std::vector<std::string_view> pieces;
  std::string_view module, parent, leaf, parameter;  // `parent` ends with its dot
  std::string lower_leaf;

  /// Whether a piece above the leaf passes a test.
  template <class Test>
  [[nodiscard]] bool any_above(const Test& test) const {
    return std::any_of(pieces.begin(), pieces.end() - 1, test);
  }
};

inline bool is_number(std::string_view piece) {
  return !piece.empty() &&
         std::all_of(piece.begin(), piece.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
}

template <std::size_t N>
bool is_one_of(std::string_view text, const std::array<std::string_view, N>& list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

/// Whether one of the words of "a_b_c" passes a test.
template <class Test>
bool any_word(std::string_view name, const Test& test) {
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('_', begin), name.size());
    if (test(name.substr(begin, end - begin))) return true;
    begin = end + 1;
  }
  return false;
}
inline bool has_word(std::string_view name, std::string_view wanted) {
  return any_word(name, [&](std::string_view word) { return word == wanted; });
}
inline std::string_view last_word(std::string_view name) { return name.substr(name.rfind('_') + 1); }

/// Modules that are known to multiply by their weight [outputs, K], from published model definitions.
inline constexpr std::array<std::string_view, 88> linear_leaves{
    // attention
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_proj", "key_proj", "value_proj", "query",
    "key", "value", "q_lin", "k_lin", "v_lin", "out_lin", "wq", "wk", "wv", "wo", "wqkv", "w_pack", "qkv",
    "query_key_value", "c_attn", "c_proj", "c_fc", "c_q", "c_k", "c_v", "linear_q", "linear_k", "linear_v",
    "linear_qkv", "linear_proj", "att_proj", "attn_out", "attn_proj", "to_q", "to_k", "to_v", "q_a_proj", "q_b_proj",
    "kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "wq_a", "wq_b", "wkv_a", "wkv_b", "in_proj", "in_proj_qkv",
    "in_proj_qkvz", "in_proj_z", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output",
    // feed-forward
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "w13", "fc1", "fc2", "fc_in", "fc_out", "wi",
    "wi_0", "wi_1", "dense_h_to_4h", "dense_4h_to_h", "linear_fc1", "linear_fc2", "ff_proj", "ff_out", "lin1", "lin2",
    "ffn", "ffn_output", "ffn_up", "ffn_down", "ffn_gate"};

/// Modules whose name alone says too little: they count where the module above them says the rest.
inline constexpr std::array<std::string_view, 9> short_leaves{"q",  "k",    "v",    "o",           "dense",
                                                              "up", "down", "gate", "intermediate"};

/// Stacks of experts by the name of the module or parameter that holds them.
inline constexpr std::array<std::string_view, 22> expert_leaves{
    "gate_up_proj", "gate_proj",    "up_proj",      "down_proj",
    "w1",           "w2",           "w3",           "w13",
    "w2_weight",    "w13_weight",   "wi",           "wi_0",
    "wi_1",         "wo",           "input_linear", "output_linear",
    "gate",         "up",           "down",         "ffn_gate_exps",
    "ffn_up_exps",  "ffn_down_exps"};

/// Those of them that lead out of the expert: their outputs are the hidden size, the others' K is.
inline constexpr std::array<std::string_view, 7> down_leaves{"down_proj",     "w2",   "w2_weight",    "wo",
                                                             "output_linear", "down", "ffn_down_exps"};

/// Parts of a model that readers of 4-bit layouts keep as they are, beside the language model.
inline constexpr std::array<std::string_view, 19> other_towers{
    "vision_tower", "vision_model",          "visual",       "vision_encoder", "vision_embed_tokens",
    "vision",       "audio_tower",           "audio_model",  "image_newline",  "audio_encoder",
    "mm_projector", "multi_modal_projector", "embed_vision", "embed_audio",    "vit",
    "aligner",      "img_processor",         "image_embed",  "audio_embed"};

inline constexpr std::array<std::string_view, 12> state_space_leaves{"a_log",  "d",          "dt_bias",   "dt_proj",
                                                                     "x_proj", "in_proj_ba", "in_proj_a", "in_proj_b",
                                                                     "b_proj", "a_proj",     "dt",        "a"};

/// Output heads, besides what calls itself one: "lm_head", "classification_head".
inline constexpr std::array<std::string_view, 7> head_pieces{"embed_out", "classifier", "score",      "qa_outputs",
                                                             "pooler",    "cls",        "predictions"};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
