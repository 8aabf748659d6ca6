#pragma once

/// The example model and its text: a mixture-of-experts language model read from safetensors, with the weights of its
/// experts and attention projections, and what goes into them, in float or in 4 bits. Who runs the experts is up to the
/// caller: `evaluator` hands them the routed rows of a layer.

#include "dense.hpp"
#include "../input_statistics.hpp"
#include "../ui.hpp"

#include <tetromino/cpu.hpp>
#include <tetromino/dequantize.hpp>
#include <tetromino/io/safetensors.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/moe/router.hpp>
#include <tetromino/quantize.hpp>

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace moe_lm {

namespace io = tetromino::io;
using tetromino::errc;
using tetromino::error;
using tetromino::recipe;

/// The name of what goes into a layer's weights: those that share an input have one name.
inline std::string input_of(std::size_t layer, std::string_view part) {
  const bool into_attention = part == "attn.q" || part == "attn.k" || part == "attn.v";
  const bool into_expert = part == "moe.gate" || part == "moe.up";
  return fmt::format("layers.{}.{}", layer, into_attention ? "attn.qkv" : into_expert ? "moe.gate_up" : part);
}
/// The name of a layer's tensor.
inline std::string tensor_name(std::size_t layer, std::string_view part) {
  return fmt::format("layers.{}.{}.weight", layer, part);
}

/// What weights and activations are rounded to. Without a recipe they stay float. Where the recipe of the weights
/// rotates, activations turn alike, in whatever precision.
struct precision {
  std::optional<recipe> weights;
  std::optional<recipe> activations;
  bool int8_activations = false;
  const input_statistics* seen = nullptr;  ///< weighs errors in searches; needed for error feedback
  /// By tensor, in place of `weights`: recipes without rotation; nothing where weights and their inputs stay in float.
  std::unordered_map<std::string, std::optional<recipe>> chosen{};
  tetromino::gptq_options feedback{};

  /// Reads "float32" or a recipe for weights; "float32", "int8" or a recipe for activations.
  static precision parse(const std::string& weights, const std::string& activations) {
    precision p;
    if (weights != "float32") p.weights = recipe::parse(weights);
    p.int8_activations = activations == "int8";
    if (activations != "float32" && !p.int8_activations) p.activations = recipe::parse(activations);
    if (!p.weights && activations != "float32") {
      throw error(errc::invalid_argument, fmt::format("activations in {} need weights in 4 bits, got float32 weights: "
                                                      "say --weights RECIPE too",
                                                      activations));
    }
    if (p.activations && p.activations->rotation != 0) {
      if (p.activations->rotation != p.weights->rotation) {
        throw error(errc::invalid_argument,
                    fmt::format("activations in {} need weights that are rotated alike, got {}", activations, weights));
      }
      p.activations->rotation = 0;  // done to the rows before they are rounded
    }
    if (p.activations && p.activations->error_feedback) {
      throw error(errc::invalid_argument, fmt::format("activations in {}: error feedback is for weights", activations));
    }
    return p;
  }
  [[nodiscard]] std::optional<recipe> recipe_of(const std::string& tensor) const {
    const auto found = chosen.find(tensor);
    return found == chosen.end() ? weights : found->second;
  }
  [[nodiscard]] std::size_t rotation() const { return weights ? weights->rotation : 0; }
  [[nodiscard]] std::string activation_name() const {
    return int8_activations ? "int8" : activations ? activations->name() : "float32";
  }
  [[nodiscard]] std::string weight_name() const { return weights ? weights->name() : "float32"; }
};

/// Rows that share a tensor scale where the format has one: group_of_row[rows] below `groups`. Where a group's rows are
/// spread over ranks, `agree` makes the largest magnitudes of all groups the same everywhere.
struct row_groups {
  std::span<const std::uint32_t> group_of_row;
  std::size_t groups = 1;
  std::function<void(std::span<float>)> agree{};
};

/// Rows on their way into a matrix product, rounded as the precision says.
class rounded_rows {
 public:
  void set(const precision& p, std::span<const float> x, std::size_t cols, const row_groups& groups) {
    cols_ = cols;
    given_ = plain_ = x;
    rotation_ = p.rotation();
    if (rotation_ != 0) {
      rotated_.assign(x.begin(), x.end());
      const tetromino::matrix_view<float> view(rotated_.data(), rows(), cols);
      tetromino::rotate(tetromino::cpu, view, {rotation_}, view);
      plain_ = rotated_;
    }
    kind_ = p.int8_activations ? kind::int8 : p.activations ? kind::packed : kind::plain;
    if (kind_ == kind::int8) {
      int8_ =
          tetromino::quantize_int8(tetromino::cpu, tetromino::matrix_view<const float>(plain_.data(), rows(), cols));
    } else if (kind_ == kind::packed) {
      // one matrix per row: so each row can have the tensor scale of its group
      const tetromino::batch_view<const float> each_row(plain_.data(), rows(), 1, cols);
      tetromino::quantize_options options;
      if (p.activations->format.scale == tetromino::scale_type::e4m3) {
        set_tensor_scales(*p.activations, groups);
        options.tensor_scales = tensor_scales_;
      }
      packed_ = {};
      if (rows() > 0) packed_ = tetromino::quantize(tetromino::cpu, each_row, *p.activations, options);
    }
  }

  [[nodiscard]] std::size_t rows() const { return plain_.size() / cols_; }
  [[nodiscard]] std::span<const float> plain() const { return plain_; }

  /// The rows as products have them: rounded, and turned back where they are rotated.
  [[nodiscard]] std::vector<float> met() const {
    if (kind_ == kind::plain) return {given_.begin(), given_.end()};
    std::vector<float> out(given_.size());
    if (kind_ == kind::packed && rows() > 0) {
      tetromino::dequantize_to(tetromino::cpu, packed_, tetromino::batch_view<float>(out.data(), rows(), 1, cols_));
    }
    for (std::size_t i = 0; kind_ == kind::int8 && i < out.size(); ++i) {
      const auto view = int8_.view();
      out[i] = static_cast<float>(view.values[i]) *
               view.scales[i / cols_ * view.blocks_per_row() + i % cols_ / tetromino::int8_view<>::block];
    }
    const tetromino::matrix_view<float> turned(out.data(), rows(), cols_);
    if (rotation_ != 0) tetromino::rotate_back(tetromino::cpu, turned, {rotation_}, turned);
    return out;
  }

  void multiply(const tetromino::packed<tetromino::any_format>& w, std::span<const std::uint32_t> row_offsets,
                std::span<float> y) const {
    if (rows() == 0) return;
    const tetromino::matrix_view<float> out(y.data(), rows(), w.rows);
    const auto& policy = tetromino::cpu;
    switch (kind_) {
      case kind::plain:
        return grouped_matmul(policy, tetromino::matrix_view<const float>(plain_.data(), rows(), cols_), w, row_offsets,
                              out);
      case kind::int8:
        return grouped_matmul(policy, int8_, w, row_offsets, out);
      case kind::packed:
        return grouped_matmul(policy, packed_, w, row_offsets, out);
    }
  }

 private:
  void set_tensor_scales(const recipe& r, const row_groups& groups) {
    amax_.assign(groups.groups, 0.0f);
    for (std::size_t i = 0; i < rows(); ++i) {
      float& amax = amax_[groups.group_of_row[i]];
      for (const float v : plain_.subspan(i * cols_, cols_)) amax = std::max(amax, std::abs(v));
    }
    if (groups.agree) groups.agree(amax_);
    tensor_scales_.resize(rows());
    for (std::size_t i = 0; i < rows(); ++i) {
      const float scale = tetromino::tensor_scale_for(amax_[groups.group_of_row[i]], r.rule);
      tensor_scales_[i] = scale > 0 ? scale : 1.0f;  // rows of zeros
    }
  }

  enum class kind { plain, int8, packed };
  kind kind_ = kind::plain;
  std::size_t cols_ = 1, rotation_ = 0;
  std::span<const float> given_, plain_;  // before and after rotation
  tetromino::int8_matrix int8_;
  tetromino::packed<tetromino::any_format> packed_;
  std::vector<float> rotated_, amax_, tensor_scales_;
};

/// Weight matrices [E, outputs, inputs] in float or packed, each with a tensor scale of its own.
class linear {
 public:
  linear() = default;
  /// Where the precision brings statistics, of the tensor `name`; `held` says which of its matrices these are, all
  /// unless given.
  linear(const precision& p, std::span<const float> weights, std::size_t matrices, std::size_t outputs,
         std::size_t inputs, const std::string& name, std::span<const std::int32_t> held = {},
         std::size_t all_matrices = 1)
      : outputs_(outputs) {
    if (const auto how = p.recipe_of(name); how && matrices > 0) {
      const tetromino::batch_view<const float> batch(weights.data(), matrices, outputs, inputs);
      tetromino::quantize_options options;
      options.scope = tetromino::tensor_scale_scope::per_matrix;
      const auto which = [&](std::size_t i) {  // an empty slot gets no rows: any statistics will do
        return held.empty() ? i : static_cast<std::size_t>(std::max(held[i], 0));
      };
      if (how->error_feedback) {
        if (p.seen == nullptr) throw error(errc::invalid_argument, "error feedback needs calibration");
        const auto seen = [&](std::size_t i) { return p.seen->of(name, which(i), all_matrices, inputs); };
        packed_ = tetromino::gptq(tetromino::cpu, batch, *how, seen, options, p.feedback);
        return;
      }
      std::vector<float> mean_squares;
      for (std::size_t i = 0; p.seen != nullptr && i < matrices; ++i) {
        const auto more = p.seen->column_weights(name, which(i), all_matrices, inputs, p.rotation());
        mean_squares.insert(mean_squares.end(), more.begin(), more.end());
      }
      options.column_weights = mean_squares;
      packed_ = tetromino::quantize(tetromino::cpu, batch, *how, options);
      return;
    }
    for (std::size_t e = 0; e < matrices; ++e) {
      plain_.emplace_back(weights.subspan(e * outputs * inputs, outputs * inputs), outputs, inputs);
    }
  }

  /// y[rows, outputs]: rows row_offsets[e] … row_offsets[e + 1] − 1 of x meet matrix e.
  void multiply(const rounded_rows& x, std::span<const std::uint32_t> row_offsets, std::vector<float>& y) const {
    y.resize(x.rows() * outputs_);
    if (packed_.matrices > 0) return x.multiply(packed_, row_offsets, y);
    for (std::size_t e = 0; e < plain_.size(); ++e) {
      plain_[e].multiply(x.plain().data() + row_offsets[e] * plain_[e].inputs(), row_offsets[e + 1] - row_offsets[e],
                         y.data() + row_offsets[e] * outputs_);
    }
  }
  /// What is kept of matrix e, whose bytes may be copied over those of another matrix of the same sizes and precision.
  [[nodiscard]] std::vector<std::span<std::byte>> parts(std::size_t e) {
    if (packed_.matrices == 0) return {std::as_writable_bytes(plain_.at(e).kept())};
    const auto one = packed_.view()[e];
    return {std::as_writable_bytes(one.codes), std::as_writable_bytes(one.scales), std::as_writable_bytes(one.macros),
            std::as_writable_bytes(one.tensor_scales)};
  }
  /// y = x · weightsᵀ for a single matrix.
  void multiply(const rounded_rows& x, std::vector<float>& y) const {
    multiply(x, std::array<std::uint32_t, 2>{0, static_cast<std::uint32_t>(x.rows())}, y);
  }

 private:
  std::size_t outputs_ = 0;
  std::vector<dense::matrix> plain_;
  tetromino::packed<tetromino::any_format> packed_;
};

/// The model's sizes, from the metadata of its file.
struct shape {
  std::size_t layers, heads, hidden, experts, top_k, expert_hidden, vocab;
  float norm_eps, rope_base;

  explicit shape(const io::safetensors_file& file) {
    const auto text = [&](const char* key) {
      for (const auto& [name, value] : file.metadata()) {
        if (name == key) return value;
      }
      throw error(errc::malformed_file,
                  fmt::format("{}: expected metadata \"{}\", found none: not a model of this form", file.path(), key));
    };
    const auto number = [&](const char* key, auto& out) {
      const std::string value = text(key);
      const auto [end, code] = std::from_chars(value.data(), value.data() + value.size(), out);
      if (code != std::errc() || end != value.data() + value.size() || !(out > 0) || out > 1000000) {
        throw error(errc::malformed_file, fmt::format("{}: metadata \"{}\": expected a positive number, got \"{}\"",
                                                      file.path(), key, ui::printable(value)));
      }
    };
    if (const std::string name = text("architecture"); name != "moe-lm") {
      throw error(errc::malformed_file, fmt::format("{}: expected the architecture \"moe-lm\", got \"{}\"", file.path(),
                                                    ui::printable(name)));
    }
    number("layers", layers);
    number("heads", heads);
    number("hidden", hidden);
    number("experts", experts);
    number("top_k", top_k);
    number("expert_hidden", expert_hidden);
    number("vocab", vocab);
    number("norm_eps", norm_eps);
    number("rope_base", rope_base);
    if (hidden % (2 * heads) != 0 || top_k > experts || experts > 65'535) {
      throw error(errc::malformed_file,
                  fmt::format("{}: expected an even head size and top_k ≤ experts ≤ 65535, got hidden {}, heads {}, "
                              "top_k {}, experts {}",
                              file.path(), hidden, heads, top_k, experts));
    }
  }
};

/// A tensor of the given shape as floats.
inline std::vector<float> read(const io::safetensors_file& file, const std::string& name,
                               const std::vector<std::size_t>& expected) {
  const io::safetensors_tensor& tensor = file[name];
  const auto list = [](const std::vector<std::size_t>& sizes) {
    std::string out;
    for (const std::size_t n : sizes) out += (out.empty() ? "" : ", ") + std::to_string(n);
    return out;
  };
  if (tensor.shape() != expected) {
    throw error(errc::malformed_file, fmt::format("{}: tensor {}: expected the shape [{}], got [{}]", file.path(), name,
                                                  list(expected), list(tensor.shape())));
  }
  if (tensor.dtype() == io::dtype::F32) return tensor.copy_as<float>();
  std::vector<float> out(tensor.elements());
  const auto widen = [&](const auto& values) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(values[i]);
  };
  if (tensor.dtype() == io::dtype::F16) {
    widen(tensor.copy_as<tetromino::half>());
  } else {
    widen(tensor.copy_as<tetromino::bfloat16>());
  }
  return out;
}

/// The weights "gate", "up" or "down" of the experts `held` by one rank in one layer, in the order of their slots; −1
/// for an empty slot, which must get no rows.
inline linear read_experts(const io::safetensors_file& file, const shape& s, const precision& p, std::size_t layer,
                           std::string_view part, std::span<const std::int32_t> held) {
  const bool is_down = part == "moe.down";
  const std::size_t outputs = is_down ? s.hidden : s.expert_hidden, inputs = is_down ? s.expert_hidden : s.hidden;
  const std::string name = tensor_name(layer, part);
  const auto all = read(file, name, {s.experts, outputs, inputs});
  std::vector<float> mine(held.size() * outputs * inputs);
  for (std::size_t i = 0; i < held.size(); ++i) {
    if (held[i] < 0) continue;
    const auto e = static_cast<std::size_t>(held[i]);
    std::copy_n(all.data() + e * outputs * inputs, outputs * inputs, mine.data() + i * outputs * inputs);
  }
  return {p, mine, held.size(), outputs, inputs, name, held, s.experts};
}

/// The experts that one rank holds in one layer.
struct expert_weights {
  linear gate, up, down;
  std::size_t hidden = 0, expert_hidden = 0;

  expert_weights() = default;
  expert_weights(const io::safetensors_file& file, const shape& s, const precision& p, std::size_t layer,
                 std::span<const std::int32_t> held)
      : gate(read_experts(file, s, p, layer, "moe.gate", held)),
        up(read_experts(file, s, p, layer, "moe.up", held)),
        down(read_experts(file, s, p, layer, "moe.down", held)),
        hidden(s.hidden),
        expert_hidden(s.expert_hidden) {}

  /// The weights of the expert in a slot as bytes, which `put` takes into a slot of another rank.
  [[nodiscard]] std::vector<std::byte> take(std::size_t slot) {
    std::vector<std::byte> out;
    for (linear* const weights : {&gate, &up, &down}) {
      for (const std::span<std::byte> part : weights->parts(slot)) out.insert(out.end(), part.begin(), part.end());
    }
    return out;
  }
  void put(std::size_t slot, std::span<const std::byte> bytes) {
    for (linear* const weights : {&gate, &up, &down}) {
      for (const std::span<std::byte> part : weights->parts(slot)) {
        std::copy_n(bytes.begin(), part.size(), part.begin());
        bytes = bytes.subspan(part.size());
      }
    }
  }
};

/// Runs experts on rows that are grouped by expert; keeps its buffers.
class expert_runner {
 public:
  /// down(silu(gate · x) ⊙ up · x) for x[pairs, hidden]; the result stays valid until the next call.
  std::span<const float> operator()(const expert_weights& w, const precision& p, std::span<const float> x,
                                    std::span<const std::uint32_t> row_offsets, const row_groups& groups) {
    activate(w, p, x, row_offsets, groups);
    w.down.multiply(rows_, row_offsets, out_);
    return out_;
  }

  /// The first half of that: silu(gate · x) ⊙ up · x on its way into `down`.
  const rounded_rows& activate(const expert_weights& w, const precision& p, std::span<const float> x,
                               std::span<const std::uint32_t> row_offsets, const row_groups& groups) {
    rows_.set(p, x, w.hidden, groups);
    w.gate.multiply(rows_, row_offsets, gate_);
    w.up.multiply(rows_, row_offsets, up_);
    for (std::size_t i = 0; i < gate_.size(); ++i) gate_[i] = gate_[i] / (1.0f + std::exp(-gate_[i])) * up_[i];
    rows_.set(p, gate_, w.expert_hidden, groups);
    return rows_;
  }

 private:
  rounded_rows rows_;
  std::vector<float> gate_, up_, out_;
};

/// The weights "attn.q", "attn.k", "attn.v" or "attn.o" of a layer.
inline linear read_projection(const io::safetensors_file& file, const shape& s, const precision& p, std::size_t layer,
                              std::string_view part) {
  const std::string name = tensor_name(layer, part);
  return {p, read(file, name, {s.hidden, s.hidden}), 1, s.hidden, s.hidden, name};
}

/// Everything but the experts, which every rank holds.
struct model {
  struct layer {
    std::vector<float> attention_norm, expert_norm;
    linear q, k, v, o;
    dense::matrix router;
  };

  shape size;
  precision rounding;
  std::vector<float> embedding;  // [vocab, hidden]
  dense::matrix to_logits;
  std::vector<float> norm;
  std::vector<layer> layers;

  model(const io::safetensors_file& file, const precision& p) : size(file), rounding(p) {
    const std::size_t h = size.hidden;
    embedding = read(file, "embed.weight", {size.vocab, h});
    to_logits = dense::matrix(embedding, size.vocab, h);
    norm = read(file, "norm.weight", {h});
    for (std::size_t l = 0; l < size.layers; ++l) {
      const auto name = [&](const char* part) { return tensor_name(l, part); };
      const auto projection = [&](const char* part) { return read_projection(file, size, p, l, part); };
      layers.push_back({read(file, name("attn_norm"), {h}), read(file, name("moe_norm"), {h}), projection("attn.q"),
                        projection("attn.k"), projection("attn.v"), projection("attn.o"),
                        dense::matrix(read(file, name("moe.router"), {size.experts, h}), size.experts, h)});
    }
  }
};

/// Text to evaluate: documents of tokens, each from a domain.
struct documents {
  std::vector<std::int64_t> offsets;  // [documents + 1]
  std::vector<std::uint32_t> tokens;
  std::vector<std::uint8_t> domain;
  std::vector<float> reference_nll;  // [documents]: what float32 arithmetic gives
  std::vector<std::string> domain_names;

  documents(const io::safetensors_file& file, std::size_t vocab)
      : offsets(file["document_offsets"].copy_as<std::int64_t>()),
        domain(file["domain"].copy_as<std::uint8_t>()),
        reference_nll(file["reference_nll"].copy_as<float>()) {
    const auto bad = [&](const std::string& what) {
      return error(errc::malformed_file, fmt::format("{}: {}", file.path(), what));
    };
    for (const std::int16_t token : file["tokens"].copy_as<std::int16_t>()) {
      if (token < 0 || static_cast<std::size_t>(token) >= vocab) {
        throw bad(fmt::format("expected tokens from 0 to {}, got {}: text of another model?", vocab - 1, token));
      }
      tokens.push_back(static_cast<std::uint32_t>(token));
    }
    for (const auto& [key, value] : file.metadata()) {
      for (std::size_t at = 0; key == "domains" && at < value.size();) {
        const std::size_t end = std::min(value.find(',', at), value.size());
        domain_names.push_back(ui::printable(value.substr(at, end - at), 40));
        at = end + 1;
      }
    }
    if (offsets.size() < 2 || offsets.front() != 0 || offsets.back() != static_cast<std::int64_t>(tokens.size()) ||
        domain.size() != count() || reference_nll.size() != count()) {
      throw bad("expected document offsets from 0 to the number of tokens, and a domain and reference_nll for each");
    }
    for (std::size_t d = 0; d < count(); ++d) {
      if (offsets[d + 1] - offsets[d] < 2 || domain[d] >= domain_names.size()) {
        throw bad(fmt::format("document {}: expected 2 tokens at least and a domain below {}, got {} and {}", d,
                              domain_names.size(), offsets[d + 1] - offsets[d], domain[d]));
      }
    }
  }

  [[nodiscard]] std::size_t count() const { return offsets.size() - 1; }
  [[nodiscard]] std::span<const std::uint32_t> tokens_of(std::size_t d) const {
    return std::span(tokens).subspan(static_cast<std::size_t>(offsets[d]),
                                     static_cast<std::size_t>(offsets[d + 1] - offsets[d]));
  }
};

/// Runs documents through the model, a batch at a time; keeps its buffers.
class evaluator {
 public:
  explicit evaluator(const model& m) : model_(m), rotary_(0, 2, 1) {}

  /// Adds up −log p of tokens 1 … n − 1 of each document into nll[documents]; documents may be cut-off text. In each
  /// layer, experts(layer, rows, ids, weights, out) has to write Σ weight · expert(row) for rows [tokens, hidden], ids
  /// and weights [tokens, top_k]. Every call makes the same number of calls to `experts`, also without documents.
  template <class Experts>
  void operator()(std::span<const std::span<const std::uint32_t>> batch, Experts&& experts, std::span<double> nll) {
    start(batch);
    for (std::size_t l = 0; l < model_.size.layers; ++l) {
      enter_attention(l);
      mix(l);
      leave_attention(l);
      enter_experts(l);
      y_.resize(x_.size());
      experts(l, std::span<const float>(normed_), ids(), weights(), std::span<float>(y_));
      leave_experts(y_);
    }
    dense::rmsnorm(x_, model_.norm, model_.size.norm_eps, normed_);
    add_losses(nll);
  }

  /// The same step by step. A batch starts with its embeddings; what a step left may be put back later, in residual()
  /// and mixed(), to go on from there.
  void start(std::span<const std::span<const std::uint32_t>> batch) {
    batch_.assign(batch.begin(), batch.end());
    document_of_row_.clear();
    position_.clear();
    x_.clear();
    std::size_t longest = 0;
    for (std::size_t d = 0; d < batch.size(); ++d) {
      longest = std::max(longest, batch[d].size());
      for (std::size_t t = 0; t < batch[d].size(); ++t) {
        document_of_row_.push_back(static_cast<std::uint32_t>(d));
        position_.push_back(t);
        const auto row = model_.embedding.begin() + static_cast<std::ptrdiff_t>(batch[d][t] * model_.size.hidden);
        x_.insert(x_.end(), row, row + static_cast<std::ptrdiff_t>(model_.size.hidden));
      }
    }
    if (longest > positions_) {
      rotary_ = dense::rotary(positions_ = longest, model_.size.hidden / model_.size.heads, model_.size.rope_base);
    }
    normed_.resize(x_.size());
    mixed_.resize(x_.size());
  }
  /// Rows [tokens, hidden] that layers add to.
  [[nodiscard]] std::vector<float>& residual() { return x_; }

  /// Makes rows() those that meet q, k and v.
  void enter_attention(std::size_t l) {
    dense::rmsnorm(x_, model_.layers[l].attention_norm, model_.size.norm_eps, normed_);
    rows_.set(model_.rounding, normed_, model_.size.hidden, {document_of_row_, batch_.size()});
  }
  /// From those, mixed(), which meet o.
  void mix(std::size_t l) {
    const std::size_t width = model_.size.hidden;
    const model::layer& layer = model_.layers[l];
    layer.q.multiply(rows_, q_);
    layer.k.multiply(rows_, k_);
    layer.v.multiply(rows_, v_);
    for (std::size_t t = 0; t < position_.size(); ++t) {
      rotary_.turn(std::span(q_).subspan(t * width, width), position_[t]);
      rotary_.turn(std::span(k_).subspan(t * width, width), position_[t]);
    }
    for (std::size_t d = 0, at = 0; d < batch_.size(); at += batch_[d].size() * width, ++d) {
      attention_(q_.data() + at, k_.data() + at, v_.data() + at, batch_[d].size(), model_.size.heads, width,
                 mixed_.data() + at);
    }
  }
  [[nodiscard]] std::vector<float>& mixed() { return mixed_; }  // [tokens, hidden]
  /// Makes rows() those of mixed().
  void meet_output() { rows_.set(model_.rounding, mixed_, model_.size.hidden, {document_of_row_, batch_.size()}); }
  /// Does so, and adds to residual() what o makes of them.
  void leave_attention(std::size_t l) {
    meet_output();
    model_.layers[l].o.multiply(rows_, y_);
    for (std::size_t i = 0; i < x_.size(); ++i) x_[i] += y_[i];
  }
  /// Makes normed(), ids() and weights() those of the experts.
  void enter_experts(std::size_t l) {
    const shape& s = model_.size;
    dense::rmsnorm(x_, model_.layers[l].expert_norm, s.norm_eps, normed_);
    logits_.resize(std::max(logits_.size(), position_.size() * s.experts));
    model_.layers[l].router.multiply(normed_.data(), position_.size(), logits_.data());
    ids_.resize(position_.size() * s.top_k);
    weights_.resize(position_.size() * s.top_k);
    const tetromino::moe::router_options options{.experts_per_token = s.top_k};
    tetromino::moe::route(std::span(logits_).first(position_.size() * s.experts), s.experts, options, ids_, weights_);
  }
  /// Adds what experts have written, y[tokens, hidden].
  void leave_experts(std::span<const float> y) {
    for (std::size_t i = 0; i < x_.size(); ++i) x_[i] += y[i];
  }

  [[nodiscard]] const rounded_rows& rows() const { return rows_; }
  [[nodiscard]] std::span<const float> normed() const { return normed_; }    // [tokens, hidden]
  [[nodiscard]] std::span<const std::uint16_t> ids() const { return ids_; }  // [tokens, top_k]
  [[nodiscard]] std::span<const float> weights() const { return weights_; }  // [tokens, top_k]

 private:
  static constexpr std::size_t rows_of_logits = 48;

  void add_losses(std::span<double> nll) {
    const std::size_t vocab = model_.size.vocab, width = model_.size.hidden;
    logits_.resize(std::max(logits_.size(), rows_of_logits * vocab));
    for (std::size_t d = 0, first = 0; d < batch_.size(); first += batch_[d].size(), ++d) {
      for (std::size_t t = 0; t + 1 < batch_[d].size(); t += rows_of_logits) {
        const std::size_t rows = std::min(rows_of_logits, batch_[d].size() - 1 - t);
        model_.to_logits.multiply(normed_.data() + (first + t) * width, rows, logits_.data());
        for (std::size_t r = 0; r < rows; ++r) {
          nll[d] += dense::negative_log_likelihood(std::span(logits_).subspan(r * vocab, vocab), batch_[d][t + r + 1]);
        }
      }
    }
  }

  const model& model_;
  dense::rotary rotary_;
  std::size_t positions_ = 0;
  dense::attention attention_;
  rounded_rows rows_;
  std::vector<std::span<const std::uint32_t>> batch_;
  std::vector<std::uint32_t> document_of_row_;
  std::vector<std::size_t> position_;
  std::vector<float> x_, normed_, q_, k_, v_, mixed_, y_, logits_, weights_;
  std::vector<std::uint16_t> ids_;
};

}  // namespace moe_lm
