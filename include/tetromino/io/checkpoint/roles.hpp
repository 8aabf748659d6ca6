#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"             // detail::text
#include "../detail/tensor_names.hpp"  // tensor_path, linear_leaves

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>      // std::any_of, std::count
#include <array>          // std::array
#include <cstddef>        // std::size_t
#include <cstdint>        // std::uint8_t
#include <optional>       // std::optional
#include <span>           // std::span
#include <string>         // std::string
#include <string_view>    // std::string_view
#include <unordered_map>  // std::unordered_map
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What a tensor is to the model that it belongs to.
enum class tensor_role : std::uint8_t {
  linear,              ///< a matrix product's weight [outputs, K]
  routed_expert,       ///< the same, of one expert among many
  fused_experts,       ///< the same for all experts of a layer [experts, outputs, K], or [experts, K, outputs]
  router,              ///< picks experts
  shared_expert_gate,  ///< weighs an expert that every token passes
  embedding,
  lm_head,  ///< the output head, and other heads
  norm,
  convolution,
  state_space,  ///< a parameter of a state-space or linear-attention layer that is no large product
  bias,
  scale,  ///< belongs to quantized values
  other,  ///< not known
};

inline constexpr std::array<std::string_view, 13> tensor_role_names{
    "linear",    "routed expert", "fused experts", "router",      "shared expert gate",
    "embedding", "lm_head",       "norm",          "convolution", "state space",
    "bias",      "scale",         "other"};

inline namespace TETROMINO_ISA {

/// The role's name for people: "routed expert".
[[nodiscard]] constexpr std::string_view name(tensor_role role) noexcept {
  return tensor_role_names[static_cast<std::size_t>(role)];
}

}  // namespace TETROMINO_ISA

/// What is known of a tensor before its role is.
struct tensor_facts {
  std::string name;                ///< "model.layers.0.self_attn.q_proj.weight"
  std::vector<std::size_t> shape;  ///< row-major, of the values that it stands for
  bool is_real = true;             ///< floating point, or 4-bit or FP8 codes that stand for it
};

/// The role of a tensor, and whether a packer may pack it.
struct tensor_kind {
  tensor_role role = tensor_role::other;
  bool is_transposed = false;  ///< stored [.., K, outputs]
  std::string kept_because;    ///< empty where it is a matrix product's weight that may be packed
};

inline namespace TETROMINO_ISA {

/// The roles of all tensors of a model, from their names, their neighbours, their shapes and config.json. What is not
/// known to be a matrix product's weight says so in `kept_because`: an unknown name never counts as one.
[[nodiscard]] std::vector<tensor_kind> roles_of(std::span<const tensor_facts> tensors,
                                                const nlohmann::json& config = nullptr);

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {

/// Which way the matrices of a module lie: [.., outputs, K] or [.., K, outputs].
enum class direction : std::uint8_t { unknown, straight, transposed };

inline namespace TETROMINO_ISA {

/// Sizes that config.json gives, at the top or in the part for the language model; 0 where it gives none.
inline std::size_t config_size(const nlohmann::json& config, std::initializer_list<const char*> keys) {
  if (!config.is_object()) return 0;
  for (const char* key : keys) {
    const auto found = config.find(key);
    if (found != config.end() && found->is_number_unsigned()) return found->get<std::size_t>();
  }
  for (const char* part : {"text_config", "llm_config", "language_config", "thinker_config"}) {
    if (const auto found = config.find(part); found != config.end()) {
      if (const std::size_t size = config_size(*found, keys); size != 0) return size;
    }
  }
  return 0;
}

/// Decides the roles of a model's tensors; see io::roles_of.
class role_finder {
 public:
  role_finder(std::span<const io::tensor_facts> tensors, const nlohmann::json& config)
      : tensors_(tensors),
        hidden_(config_size(config, {"hidden_size", "d_model", "n_embd", "dim", "model_dim"})),
        experts_(config_size(config, {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"})) {
    paths_.reserve(tensors.size());
    for (const auto& tensor : tensors) {
      paths_.emplace_back(tensor.name);
      shapes_.emplace(tensor.name, tensor.shape);
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {  // one module that shows its direction shows its siblings'
      const direction shown = shown_direction(i);
      if (shown == direction::unknown) continue;
      auto& known = directions_[direction_key(i)];
      known = known == direction::transposed ? known : shown;
    }
  }

  [[nodiscard]] io::tensor_kind kind_of(std::size_t i) const {
    using role = io::tensor_role;
    const io::tensor_facts& tensor = tensors_[i];
    const tensor_path& path = paths_[i];
    if (!tensor.is_real) return {role::other, false, "not floating point"};
    if (is_scale(path)) return {role::scale, false, "a scale"};
    const bool names_bias = path.lower_leaf.ends_with("bias");
    if (path.parameter == "bias" || (names_bias && path.parameter.empty())) return {role::bias, false, "a bias"};
    if (names_bias) return {role::embedding, false, "a table of biases"};
    if (is_state_space(path)) return {role::state_space, false, "a state-space parameter"};
    if (auto aside = kept_by_name(i)) return *aside;
    if (tensor.shape.size() == 3) return stack(i);
    if (tensor.shape.size() < 2) return {role::other, false, "a vector"};
    if (tensor.shape.size() > 3) return {role::other, false, "more than three dimensions"};
    return matrix(i);
  }

 private:
  static bool is_scale(const tensor_path& path) {
    const auto named = [](std::string_view name) {
      return name == "scale" || name == "scales" || name == "zero_point" || name.ends_with("_scale") ||
             name.ends_with("_scales") || name.ends_with("_scale_inv") || name.ends_with("_scale_2") ||
             name.ends_with("_zero_point") || name.ends_with("_absmax") || name == "absmax";
    };
    return named(path.lower_leaf);
  }

  static bool is_state_space(const tensor_path& path) {
    return is_one_of(path.lower_leaf, state_space_leaves) || path.lower_leaf.starts_with("ssm_");
  }

  static bool is_norm_name(std::string_view piece) {
    const std::string name = lower(piece);
    return name.find("norm") != std::string::npos ||
           any_word(name, [](std::string_view word) { return word == "ln" || word == "rms"; });
  }
  static bool is_convolution_name(std::string_view piece) {
    return any_word(lower(piece), [](std::string_view word) {
      if (word.starts_with("dw")) word.remove_prefix(2);
      if (!word.starts_with("conv")) return false;
      word.remove_prefix(4);
      return word.empty() || word == "s" || std::isdigit(static_cast<unsigned char>(word.front())) != 0;
    });
  }
  static bool is_embedding_name(std::string_view piece) {
    const std::string name = lower(piece);
    return name == "wte" || name == "wpe" || name == "codebook" || any_word(name, [](std::string_view word) {
             return word.starts_with("emb") || word == "embd" || word == "rotary" || word.starts_with("patch");
           });
  }
  static bool is_router_name(std::string_view piece) {
    const std::string name = lower(piece);
    return name == "gate" || name == "wg" || name == "switch" || name == "gate_inp" || name == "ffn_gate_inp" ||
           name == "ffn_gate_inp_shexp" || name == "moe_gate" || name == "gate_network" ||
           any_word(name,
                    [](std::string_view word) { return word == "router" || word == "routing" || word == "gating"; });
  }
  static bool is_head_name(std::string_view piece) {
    const std::string name = lower(piece);
    return is_one_of(name, head_pieces) || last_word(name) == "head" || last_word(name) == "heads";
  }
  /// What gates whole outputs rather than multiplying by K: "shared_expert_gate", "attn_gate".
  static bool is_other_gate(std::string_view piece) {
    const std::string name = lower(piece);
    return (name.ends_with("_gate") || name.starts_with("gate_")) && !is_one_of(name, linear_leaves);
  }

  static bool is_known_leaf(std::string_view leaf) {
    return is_one_of(leaf, linear_leaves) || is_one_of(leaf, short_leaves) || is_one_of(leaf, expert_leaves);
  }

  /// Where the path leads through a stack or list of routed experts: the piece that says so.
  static std::optional<std::size_t> experts_piece(const tensor_path& path) {
    for (std::size_t i = 0; i + 1 < path.pieces.size(); ++i) {
      const std::string piece = lower(path.pieces[i]);
      if (has_word(piece, "shared")) return std::nullopt;
      if (has_word(piece, "experts") || has_word(piece, "expert")) return i;
    }
    return std::nullopt;
  }
  /// "experts.3.w1", or "experts.expert_3.wi".
  static bool has_expert_number(const tensor_path& path, std::size_t experts) {
    return experts + 1 < path.pieces.size() && is_number(last_word(path.pieces[experts + 1]));
  }

  [[nodiscard]] const std::vector<std::size_t>* shape_of(const std::string& name) const {
    const auto found = shapes_.find(name);
    return found == shapes_.end() ? nullptr : &found->second;
  }

  /// A gate that multiplies has a neighbour `up` of its own shape; a gate that routes has none.
  [[nodiscard]] bool multiplies(std::size_t i) const {
    const tensor_path& path = paths_[i];
    for (const char* sibling : {"up", "up_proj", "w3", "linear_v"}) {
      std::string name = text(path.parent, sibling);
      if (!path.parameter.empty()) name += text('.', path.parameter);
      if (const auto* shape = shape_of(name); shape != nullptr && *shape == tensors_[i].shape) return true;
    }
    return false;
  }

  /// Norms, convolutions, embeddings, heads and routers, by what they are called.
  [[nodiscard]] std::optional<io::tensor_kind> kept_by_name(std::size_t i) const {
    using role = io::tensor_role;
    using kind = io::tensor_kind;
    const tensor_path& path = paths_[i];
    const std::size_t dimensions = tensors_[i].shape.size();
    const bool known = is_known_leaf(path.lower_leaf);
    if (is_norm_name(path.leaf) || (!known && path.any_above(is_norm_name))) {
      return kind{dimensions < 2 ? role::norm : role::other, false,
                  dimensions < 2 ? "a norm" : "named as a norm, shaped as a matrix"};
    }
    if (is_convolution_name(path.leaf) || (!known && path.any_above(is_convolution_name)) || dimensions > 3) {
      return kind{role::convolution, false, "a convolution"};
    }
    if (dimensions == 3 && tensors_[i].shape[1] == 1) return kind{role::convolution, false, "shaped as a convolution"};
    // "embedder.layers.0.q_proj" is a model of its own: above a layer's number, the name says nothing of the layer.
    const auto layer = std::find_if(path.pieces.rbegin(), path.pieces.rend(), is_number);
    const auto from = layer.base();
    const auto within = [&](const auto& test) { return std::any_of(from, path.pieces.end(), test); };
    const bool in_layer = layer != path.pieces.rend();
    if (path.any_above(is_router_name)) return kind{role::router, false, "a router"};
    if (within(is_head_name) || (!in_layer && (path.lower_leaf == "output" || path.lower_leaf == "decoder"))) {
      return kind{role::lm_head, false, "an output head"};
    }
    if (within(is_embedding_name) || (path.leaf == "shared" && path.pieces.size() <= 2)) {
      return kind{role::embedding, false, "an embedding"};
    }
    if (path.lower_leaf == "gate" && multiplies(i)) return std::nullopt;
    if (has_word(path.lower_leaf, "shared") && has_word(path.lower_leaf, "gate")) {
      return kind{role::shared_expert_gate, false, "a gate of shared experts"};
    }
    if (is_router_name(path.leaf)) return kind{role::router, false, "a router"};
    if (std::any_of(path.pieces.begin(), path.pieces.end(), is_other_gate)) return kind{role::other, false, "a gate"};
    return std::nullopt;
  }

  /// Modules whose direction is one question: the experts of a layer, or all modules of that name.
  [[nodiscard]] std::string direction_key(std::size_t i) const {
    return tensors_[i].shape.size() == 3 ? std::string(paths_[i].parent) : text("* ", paths_[i].lower_leaf);
  }

  [[nodiscard]] direction shown_direction(std::size_t i) const {
    const auto& shape = tensors_[i].shape;
    if (shape.size() == 2 && paths_[i].parameter == "weight") {
      const auto* bias = shape_of(text(paths_[i].module, ".bias"));
      return bias == nullptr || bias->size() != 1 ? direction::unknown : by_outputs(shape[0], shape[1], bias->back());
    }
    if (shape.size() != 3 || !is_one_of(paths_[i].lower_leaf, expert_leaves)) return direction::unknown;
    for (const auto& name : {text(tensors_[i].name, "_bias"), text(paths_[i].module, ".bias")}) {
      const auto* bias = shape_of(name);
      if (bias == nullptr || bias->size() != 2) continue;
      if (const direction shown = by_outputs(shape[1], shape[2], bias->back()); shown != direction::unknown) {
        return shown;
      }
    }
    const bool leads_out = is_one_of(paths_[i].lower_leaf, down_leaves);
    if (hidden_ != 0 && shape[1] != shape[2]) {
      const direction shown = by_outputs(shape[leads_out ? 1 : 2], shape[leads_out ? 2 : 1], hidden_);
      if (shown != direction::unknown) return shown;
    }
    return leads_out ? direction::unknown : by_partner(i);
  }

  static direction by_outputs(std::size_t rows, std::size_t cols, std::size_t outputs) {
    if (rows == cols || (rows != outputs && cols != outputs)) return direction::unknown;
    return rows == outputs ? direction::straight : direction::transposed;
  }

  /// gate_up [E, 2 I, H] beside down [E, H, I], or [E, H, 2 I] beside [E, I, H].
  [[nodiscard]] direction by_partner(std::size_t i) const {
    const auto& up = tensors_[i].shape;
    for (const auto leaf : down_leaves) {
      std::string name = text(paths_[i].parent, leaf);
      if (!paths_[i].parameter.empty()) name += text('.', paths_[i].parameter);
      const auto* down = shape_of(name);
      if (down == nullptr || down->size() != 3) continue;
      const bool straight = up[2] == (*down)[1] && up[1] == 2 * (*down)[2];
      const bool transposed = up[1] == (*down)[2] && up[2] == 2 * (*down)[1];
      if (straight != transposed) return straight ? direction::straight : direction::transposed;
    }
    return direction::unknown;
  }

  /// [experts, a, b], or not known.
  [[nodiscard]] io::tensor_kind stack(std::size_t i) const {
    using role = io::tensor_role;
    const tensor_path& path = paths_[i];
    const bool in_experts = experts_piece(path) || path.lower_leaf.ends_with("_exps") ||
                            path.any_above([](std::string_view piece) { return has_word(lower(piece), "moe"); }) ||
                            (experts_ > 1 && tensors_[i].shape[0] == experts_);
    if (!in_experts || !is_one_of(path.lower_leaf, expert_leaves)) {
      return {role::other, false, "a stack of matrices that is not known"};
    }
    const auto known = directions_.find(direction_key(i));
    if (known != directions_.end()) return {role::fused_experts, known->second == direction::transposed, {}};
    if (path.parameter == "weight") return {role::fused_experts, false, {}};  // as torch's linear modules have it
    return {role::fused_experts, false, "which way its matrices lie is not known"};
  }

  /// [a, b], or not known.
  [[nodiscard]] io::tensor_kind matrix(std::size_t i) const {
    using role = io::tensor_role;
    const tensor_path& path = paths_[i];
    const auto experts = experts_piece(path);
    const auto above = [&](std::initializer_list<std::string_view> words) {
      return path.any_above([&](std::string_view piece) {
        const std::string name = lower(piece);
        return std::any_of(words.begin(), words.end(),
                           [&](std::string_view word) { return name.find(word) != std::string::npos; });
      });
    };
    const std::string& leaf = path.lower_leaf;
    bool known = is_one_of(leaf, linear_leaves);
    if (leaf.size() == 1) known = is_one_of(leaf, short_leaves) && above({"attn", "attention"});
    if (leaf == "dense") known = above({"attn", "attention", "intermediate", "output", "mlp"});
    if (leaf == "up" || leaf == "down") known = above({"mlp", "ffn", "feed_forward", "moe", "expert"});
    if (leaf == "gate") known = multiplies(i);
    if (!known || path.parameter.empty()) {
      return {role::other, false, "not known to be the weight of a matrix product"};
    }
    if (experts && !has_expert_number(path, *experts)) {
      return {role::other, false, "experts stacked in one matrix"};
    }
    const auto found = directions_.find(direction_key(i));
    const bool transposed = found != directions_.end() && found->second == direction::transposed;
    io::tensor_kind out{experts ? role::routed_expert : role::linear, transposed, {}};
    const auto is_tower = [](std::string_view piece) { return is_one_of(lower(piece), other_towers); };
    if (path.any_above(is_tower)) out.kept_because = "in a vision or audio tower";
    return out;
  }

  std::span<const io::tensor_facts> tensors_;
  std::size_t hidden_, experts_;
  std::vector<tensor_path> paths_;
  std::unordered_map<std::string, std::vector<std::size_t>> shapes_;
  std::unordered_map<std::string, direction> directions_;
};

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

inline std::vector<tensor_kind> roles_of(std::span<const tensor_facts> tensors, const nlohmann::json& config) {
  const detail::role_finder finder(tensors, config);
  std::vector<tensor_kind> out;
  out.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) out.push_back(finder.kind_of(i));
  return out;
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
