#pragma once

#include "../../detail/macros_off.hpp"

#include "roles.hpp"    // tensor_role, roles_of
#include "tensors.hpp"  // checkpoint, checkpoint_tensor

#include <cstddef>        // std::size_t
#include <map>            // std::map
#include <string>         // std::string
#include <string_view>    // std::string_view
#include <unordered_set>  // std::unordered_set
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::io {

/// How a checkpoint stores the values of a parameter.
enum class value_encoding : std::uint8_t {
  plain,  ///< as numbers of the tensor's own type
  fp8,    ///< E4M3 codes times scales for blocks of rows and columns, such as 128 x 128 (DeepSeek-V3)
  mxfp4,  ///< E2M1 codes, an E8M0 scale for each 32 along K (gpt-oss, compressed-tensors)
  nvfp4,  ///< E2M1 codes, an E4M3 scale for each 16 along K, a float for each matrix (compressed-tensors, ModelOpt)
};

/// What the unquantized model has under a name, however the checkpoint stores it: weights as [matrices, rows, cols]
/// with K = cols, the direction that a product sums over.
struct parameter {
  std::string name;                ///< as without quantization: "model.layers.0.self_attn.q_proj.weight"
  std::vector<std::size_t> shape;  ///< as without quantization
  tensor_kind kind;
  std::size_t matrices = 1;  ///< experts in a stack
  std::size_t rows = 0;      ///< outputs; 0 for what has fewer than two dimensions
  std::size_t cols = 0;      ///< K
  value_encoding encoding = value_encoding::plain;
  const checkpoint_tensor* values = nullptr;         ///< numbers, or codes
  const checkpoint_tensor* scales = nullptr;         ///< of blocks; null for plain values
  const checkpoint_tensor* tensor_scales = nullptr;  ///< of NVFP4: one, or one for each matrix
  bool tensor_scales_divide = false;                 ///< compressed-tensors keeps the inverse
  const checkpoint_tensor* input_scale = nullptr;    ///< of the activations that NVFP4 weights meet
  /// Weights with the same number are one matrix to their readers, such as q, k and v, and share a tensor scale: one
  /// for all of them, or one for each expert.
  std::size_t set = 0;

  [[nodiscard]] TETROMINO_ABI bool is_weight() const noexcept { return kind.kept_because.empty(); }
  [[nodiscard]] TETROMINO_ABI std::size_t elements() const noexcept {
    std::size_t n = 1;
    for (const std::size_t size : shape) n *= size;
    return n;
  }
};

inline namespace TETROMINO_ISA {

/// All parameters of a checkpoint with their roles, in the order of their bytes. Every tensor is a parameter or a part
/// of one. Fails with errc::invalid_argument for formats that cannot be read, by their names: GPTQ, AWQ and other
/// integer formats; and with errc::malformed_file for parts that do not fit together.
[[nodiscard]] result<std::vector<parameter>> try_parameters_of(const checkpoint& from);
[[nodiscard]] inline std::vector<parameter> parameters_of(const checkpoint& from) {
  return try_parameters_of(from).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {

/// Weights that readers run as one matrix: siblings by the last piece of their modules' names.
inline constexpr std::array<std::array<std::string_view, 3>, 18> fused_leaves{{
    {"q_proj", "k_proj", "v_proj"},
    {"q", "k", "v"},
    {"query", "key", "value"},
    {"query_proj", "key_proj", "value_proj"},
    {"q_lin", "k_lin", "v_lin"},
    {"wq", "wk", "wv"},
    {"to_q", "to_k", "to_v"},
    {"linear_q", "linear_k", "linear_v"},
    {"attn_q", "attn_k", "attn_v"},
    {"q_a_proj", "kv_a_proj_with_mqa", ""},
    {"wq_a", "wkv_a", ""},
    {"in_proj_qkv", "in_proj_z", ""},
    {"gate_proj", "up_proj", ""},
    {"gate", "up", ""},
    {"w1", "w3", ""},
    {"wi_0", "wi_1", ""},
    {"ffn_gate", "ffn_up", ""},
    {"ffn_gate_exps", "ffn_up_exps", ""},
}};

inline namespace TETROMINO_ISA {

/// The name of the set that a weight belongs to; its own where it stands alone.
inline std::string fused_name(const io::parameter& weight) {
  const tensor_path path(weight.name);
  for (const auto& leaves : fused_leaves) {
    if (is_one_of(path.lower_leaf, leaves)) return text(path.parent, leaves.front(), '.', weight.matrices);
  }
  return weight.name;
}

/// Finds the tensors that stand for one parameter together.
class parameter_finder {
 public:
  explicit parameter_finder(const io::checkpoint& from) : from_(from) {}

  [[nodiscard]] result<std::vector<io::parameter>> find() {
    if (auto readable = refuse_integers(); !readable) return readable.error();
    for (const auto& tensor : from_.tensors()) {
      if (auto added = add_packed(tensor); !added) return added.error();
    }
    for (const auto& tensor : from_.tensors()) {
      if (!used_.contains(&tensor)) add_plain(tensor);
    }
    const auto place = [](const io::parameter& p) { return std::pair(p.values->file, p.values->begin); };
    std::sort(found_.begin(), found_.end(),
              [&](const io::parameter& a, const io::parameter& b) { return place(a) < place(b); });
    give_roles();
    give_sets();
    return std::move(found_);
  }

 private:
  using tensor_pointer = const io::checkpoint_tensor*;

  /// Integer formats, by what their tensors are called, and by what config.json says.
  [[nodiscard]] result<void> refuse_integers() const {
    const auto refuse = [&](std::string_view what, std::string_view format) {
      return error(errc::invalid_argument,
                   {from_.path().string(), ": expected values in BF16, F16, F32, FP8, MXFP4 or NVFP4, found ", what,
                    ", of the format ", format, ", which cannot be read: start from the original checkpoint"});
    };
    if (const auto ours = from_.metadata().find("tetromino.layout");
        ours != from_.metadata().end() && ours->second == "linear") {
      return refuse("metadata tetromino.layout", "linear of this library");
    }
    for (const auto& tensor : from_.tensors()) {
      const std::string quoted = printable(tensor.name);
      if (tensor.name.ends_with(".qweight")) {
        const std::string stem = tensor.name.substr(0, tensor.name.size() - 8);
        const bool is_gptq = from_.find(stem + ".g_idx") != nullptr;
        return refuse(quoted, is_gptq ? "GPTQ (int4)" : "AWQ or GPTQ (int4)");
      }
      if (tensor.name.ends_with(".weight_packed") && tensor.dtype != io::dtype::U8) {
        return refuse(quoted, "compressed-tensors pack-quantized (integers)");
      }
      if (tensor.name.find(".quant_state.bitsandbytes") != std::string::npos) return refuse(quoted, "bitsandbytes");
      if (tensor.name.ends_with(".weight") && tensor.dtype == io::dtype::I8) return refuse(quoted, "int8");
    }
    const auto& config = from_.config();
    const auto quantization = config.is_object() ? config.find("quantization_config") : config.end();
    if (quantization == config.end() || !quantization->is_object()) return {};
    const std::string method = json_text(*quantization, "quant_method");
    for (const char* integer : {"gptq", "awq", "bitsandbytes", "hqq", "aqlm", "eetq", "quanto", "torchao", "bitnet",
                                "higgs", "spqr", "vptq"}) {
      if (method == integer) return refuse("quant_method in config.json", method);
    }
    return {};
  }

  [[nodiscard]] error broken(const io::checkpoint_tensor& tensor, const std::string& expected) const {
    return error(errc::malformed_file, {from_.path().string(), ": tensor ", printable(tensor.name), ": expected ",
                                        expected, ", found ", io::name(tensor.dtype), " ", shape_text(tensor.shape)});
  }

  tensor_pointer part(const std::string& name) {
    const auto* found = from_.find(name);
    if (found != nullptr) used_.insert(found);
    return found;
  }

  /// Tensors that are codes under scales.
  [[nodiscard]] result<void> add_packed(const io::checkpoint_tensor& tensor) {
    const std::string& name = tensor.name;
    const auto stem = [&](std::size_t end) { return name.substr(0, name.size() - end); };
    if (name.ends_with("_blocks") && tensor.dtype == io::dtype::U8 && from_.find(stem(7) + "_scales") != nullptr) {
      return add_gpt_oss(tensor, stem(7));
    }
    if (name.ends_with(".weight_packed")) {
      io::parameter p;
      p.tensor_scales = part(stem(7) + "_global_scale");
      p.tensor_scales_divide = true;
      p.input_scale = part(stem(14) + ".input_global_scale");
      return add_codes(tensor, stem(7), std::move(p));
    }
    if (name.ends_with(".weight") && tensor.dtype == io::dtype::U8 && from_.find(name + "_scale") != nullptr) {
      io::parameter p;
      p.tensor_scales = part(name + "_scale_2");
      p.input_scale = part(stem(7) + ".input_scale");
      return add_codes(tensor, name, std::move(p));
    }
    if (tensor.dtype == io::dtype::F8_E4M3 && tensor.shape.size() == 2) return add_fp8(tensor);
    return {};
  }

  /// blocks [E, rows, K / 32, 16] and scales [E, rows, K / 32].
  [[nodiscard]] result<void> add_gpt_oss(const io::checkpoint_tensor& blocks, const std::string& name) {
    const auto& shape = blocks.shape;
    io::parameter p;
    p.name = name;
    p.encoding = io::value_encoding::mxfp4;
    p.scales = part(name + "_scales");
    if (shape.size() != 4 || shape[3] != 16) return broken(blocks, "U8 [experts, rows, K / 32, 16]");
    if (p.scales->dtype != io::dtype::U8 || p.scales->shape != std::vector(shape.begin(), shape.end() - 1)) {
      return broken(*p.scales, text("U8 ", shape_text(std::vector(shape.begin(), shape.end() - 1))));
    }
    p.shape = {shape[0], shape[1], shape[2] * 32};
    add(blocks, std::move(p));
    return {};
  }

  /// Codes [rows, K / 2] with the scales that compressed-tensors and ModelOpt have beside them.
  [[nodiscard]] result<void> add_codes(const io::checkpoint_tensor& codes, const std::string& name, io::parameter p) {
    p.name = name;
    p.scales = part(name + "_scale");
    if (p.scales == nullptr) return broken(codes, text("a tensor ", printable(name + "_scale"), " beside it"));
    const bool nvfp4 = p.scales->dtype == io::dtype::F8_E4M3;
    p.encoding = nvfp4 ? io::value_encoding::nvfp4 : io::value_encoding::mxfp4;
    if (codes.shape.size() < 2) return broken(codes, "U8 [rows, K / 2]");
    p.shape = codes.shape;
    p.shape.back() *= 2;
    auto blocks = p.shape;
    blocks.back() /= nvfp4 ? 16 : 32;
    const bool is_mx_scale = p.scales->dtype == io::dtype::U8 || p.scales->dtype == io::dtype::F8_E8M0;
    if ((!nvfp4 && !is_mx_scale) || p.scales->shape != blocks || p.shape.back() % (nvfp4 ? 16 : 32) != 0) {
      return broken(*p.scales, text(nvfp4 ? "F8_E4M3 " : "U8 ", shape_text(blocks)));
    }
    const std::size_t matrices = p.shape.size() == 3 ? p.shape[0] : 1;
    if (nvfp4 && (p.tensor_scales == nullptr || p.tensor_scales->dtype != io::dtype::F32 ||
                  (p.tensor_scales->elements() != 1 && p.tensor_scales->elements() != matrices))) {
      return broken(p.tensor_scales == nullptr ? codes : *p.tensor_scales, "one F32 tensor scale beside the codes");
    }
    add(codes, std::move(p));
    return {};
  }

  [[nodiscard]] result<void> add_fp8(const io::checkpoint_tensor& codes) {
    tensor_pointer scales = part(codes.name + "_scale_inv");
    if (scales == nullptr) scales = part(codes.name + "_scale");
    if (scales == nullptr) return {};
    io::parameter p;
    p.name = codes.name;
    p.shape = codes.shape;
    p.encoding = io::value_encoding::fp8;
    p.scales = scales;
    p.input_scale = nullptr;  // of FP8 products: no use to 4-bit ones
    for (const char* unused : {"input_scale", "activation_scale"}) {
      if (codes.name.ends_with("weight")) part(codes.name.substr(0, codes.name.size() - 6) + unused);
    }
    const auto& grid = scales->shape;
    const bool is_real = scales->dtype == io::dtype::F32 || scales->dtype == io::dtype::BF16 ||
                         scales->dtype == io::dtype::F16 || scales->dtype == io::dtype::F8_E8M0;
    const bool fits =
        scales->elements() == 1 ||
        (grid.size() == 2 && grid[0] != 0 && grid[1] != 0 && grid[0] <= p.shape[0] && grid[1] <= p.shape[1]) ||
        (grid.size() == 1 && grid[0] == p.shape[0]);
    if (!is_real || !fits) return broken(*scales, "scales for blocks of rows and columns");
    add(codes, std::move(p));
    return {};
  }

  void add_plain(const io::checkpoint_tensor& tensor) {
    io::parameter p;
    p.name = tensor.name;
    p.shape = tensor.shape;
    add(tensor, std::move(p));
  }

  void add(const io::checkpoint_tensor& values, io::parameter p) {
    used_.insert(&values);
    p.values = &values;
    found_.push_back(std::move(p));
  }

  static bool is_real(const io::parameter& p) {
    const io::dtype type = p.values->dtype;
    return p.encoding != io::value_encoding::plain || type == io::dtype::F32 || type == io::dtype::F16 ||
           type == io::dtype::BF16;
  }

  void give_roles() {
    std::vector<io::tensor_facts> facts;
    facts.reserve(found_.size());
    for (const auto& p : found_) facts.push_back({p.name, p.shape, is_real(p)});
    auto kinds = io::roles_of(facts, from_.config());
    for (std::size_t i = 0; i < found_.size(); ++i) {
      io::parameter& p = found_[i];
      p.kind = std::move(kinds[i]);
      if (p.encoding == io::value_encoding::mxfp4 || p.encoding == io::value_encoding::nvfp4) {
        p.kind.is_transposed = false;  // packed along K already
        if (p.kind.role == io::tensor_role::fused_experts) p.kind.kept_because.clear();
      }
      if (p.values->dtype == io::dtype::F8_E4M3 && p.encoding == io::value_encoding::plain) {
        p.kind.kept_because = "FP8 without scales that are known";
      }
      if (p.shape.size() != 2 && p.shape.size() != 3) continue;
      p.matrices = p.shape.size() == 3 ? p.shape[0] : 1;
      p.rows = p.shape[p.shape.size() - 2];
      p.cols = p.shape.back();
      if (p.kind.is_transposed) std::swap(p.rows, p.cols);
      if (p.is_weight() && p.elements() == 0) p.kind.kept_because = "empty";
      if (p.encoding == io::value_encoding::fp8 && p.kind.is_transposed)
        p.kind.kept_because = "FP8 stored [K, outputs]";
    }
  }

  void give_sets() {
    std::map<std::pair<std::string, std::size_t>, std::size_t> sets;  // siblings with the same K
    for (auto& p : found_) {
      p.set = sets.try_emplace({p.is_weight() ? fused_name(p) : p.name, p.cols}, sets.size()).first->second;
    }
  }

  const io::checkpoint& from_;
  std::unordered_set<tensor_pointer> used_;
  std::vector<io::parameter> found_;
};

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

inline result<std::vector<parameter>> try_parameters_of(const checkpoint& from) {
  return detail::parameter_finder(from).find();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
