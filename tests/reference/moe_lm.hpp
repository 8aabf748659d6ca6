#pragma once

/// The bundled mixture-of-experts language model, one document at a time and in double, from its description: an oracle
/// for the example model. Weights and activations can be rounded to 4 bits. It includes nothing of tetromino.

#include "numbers.hpp"             // bfloat16_value
#include "quantize.hpp"            // quantize, dequantize, recipe
#include "safetensors_reader.hpp"  // stored_file

#include <algorithm>   // std::max, std::stable_sort
#include <cmath>       // std::exp, std::log, std::sqrt, std::pow, std::cos, std::sin
#include <cstddef>     // std::size_t
#include <functional>  // std::function
#include <map>         // std::map
#include <optional>    // std::optional
#include <string>      // std::string
#include <vector>      // std::vector

namespace reference {

using rows = std::vector<std::vector<double>>;

class moe_lm {
 public:
  /// Experts and attention projections are rounded by `weights`, what goes into them by `activations`.
  moe_lm(const stored_file& file, const std::optional<recipe>& weights, const std::optional<recipe>& activations)
      : activations_(activations) {
    const auto number = [&](const char* key) { return std::stod(file.metadata.at(key)); };
    layers_ = static_cast<std::size_t>(number("layers"));
    heads_ = static_cast<std::size_t>(number("heads"));
    top_k_ = static_cast<std::size_t>(number("top_k"));
    epsilon_ = number("norm_eps");
    base_ = number("rope_base");
    for (const auto& [name, tensor] : file.tensors) {
      std::vector<float> x;
      for (std::size_t i = 0; i + 1 < tensor.bytes.size(); i += 2) {
        const unsigned code = tensor.bytes[i] | static_cast<unsigned>(tensor.bytes[i + 1]) << 8;
        x.push_back(static_cast<float>(bfloat16_value(code)));
      }
      const auto& shape = tensor.shape;
      const std::size_t experts = shape.size() == 3 ? shape[0] : 1;
      const std::size_t cols = shape.back(), count = shape.size() == 1 ? 1 : shape[shape.size() - 2];
      const bool is_packed = name.find(".attn.") != std::string::npos ||
                             (name.find(".moe.") != std::string::npos && name.find("router") == std::string::npos);
      if (weights && is_packed) x = dequantize(*weights, quantize(*weights, experts, count, cols, x));
      for (std::size_t e = 0; e < experts; ++e) {
        rows& matrix = weights_[name].emplace_back();
        for (std::size_t r = 0; r < count; ++r) {
          const auto first = x.begin() + static_cast<std::ptrdiff_t>((e * count + r) * cols);
          matrix.emplace_back(first, first + static_cast<std::ptrdiff_t>(cols));
        }
      }
    }
  }

  /// Called, if set, with the rows that are about to meet matrix `e` of a weight, rounded as they will be.
  std::function<void(const std::string& weight, std::size_t e, const rows& in)> saw;

  /// Puts other values in place of matrix `e` of a weight.
  void replace(const std::string& weight, std::size_t e, const rows& values) { weights_.at(weight)[e] = values; }

  /// −log p of tokens 1 … n − 1.
  [[nodiscard]] double loss(const std::vector<std::size_t>& tokens) const {
    const rows& embedding = weights_.at("embed.weight")[0];
    rows x;
    for (const std::size_t t : tokens) x.push_back(embedding[t]);
    for (std::size_t l = 0; l < layers_; ++l) {
      const std::string layer = "layers." + std::to_string(l) + ".";
      add(x, attention(layer, normed(x, layer + "attn_norm.weight")));
      add(x, experts(layer, normed(x, layer + "moe_norm.weight")));
    }
    x = normed(x, "norm.weight");
    double sum = 0;
    for (std::size_t t = 0; t + 1 < tokens.size(); ++t) {
      std::vector<double> logits;
      for (const auto& row : embedding) logits.push_back(dot(x[t], row));
      const double top = *std::max_element(logits.begin(), logits.end());
      double all = 0;
      for (const double v : logits) all += std::exp(v - top);
      sum += std::log(all) + top - logits[tokens[t + 1]];
    }
    return sum;
  }

 private:
  static double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }
  static void add(rows& x, const rows& y) {
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t c = 0; c < x[t].size(); ++c) x[t][c] += y[t][c];
    }
  }

  [[nodiscard]] rows normed(const rows& x, const std::string& name) const {
    const std::vector<double>& weight = weights_.at(name)[0][0];
    rows out = x;
    for (auto& row : out) {
      const double root = std::sqrt(dot(row, row) / static_cast<double>(row.size()) + epsilon_);
      for (std::size_t c = 0; c < row.size(); ++c) row[c] = row[c] / root * weight[c];
    }
    return out;
  }

  /// x · matrixᵀ, of rounded rows: all rows of x share a tensor scale.
  [[nodiscard]] rows product(const rows& x, const std::string& weight, std::size_t e) const {
    rows in = x;
    if (activations_ && !x.empty()) {
      std::vector<float> flat;
      for (const auto& row : x) {
        for (const double v : row) flat.push_back(static_cast<float>(v));
      }
      const std::size_t cols = x[0].size();
      const auto rounded = dequantize(*activations_, quantize(*activations_, 1, x.size(), cols, flat));
      for (std::size_t i = 0; i < rounded.size(); ++i) in[i / cols][i % cols] = static_cast<double>(rounded[i]);
    }
    if (saw) saw(weight, e, in);
    rows out;
    for (const auto& row : in) {
      out.emplace_back();
      for (const auto& w : weights_.at(weight)[e]) out.back().push_back(dot(row, w));
    }
    return out;
  }

  void turn(std::vector<double>& row, std::size_t position) const {
    const std::size_t size = row.size() / heads_, half = size / 2;
    for (std::size_t h = 0; h < heads_; ++h) {
      for (std::size_t i = 0; i < half; ++i) {
        const double exponent = -static_cast<double>(i) / static_cast<double>(half);
        const double angle = static_cast<double>(position) * std::pow(base_, exponent);
        double &a = row[h * size + i], &b = row[h * size + half + i];
        const double turned_a = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = turned_a;
      }
    }
  }

  [[nodiscard]] rows attention(const std::string& layer, const rows& x) const {
    const auto projected = [&](const char* name, const rows& in) {
      return product(in, layer + "attn." + name + ".weight", 0);
    };
    rows q = projected("q", x), k = projected("k", x), v = projected("v", x), mixed = v;
    const std::size_t size = q[0].size() / heads_;
    for (std::size_t t = 0; t < x.size(); ++t) {
      turn(q[t], t);
      turn(k[t], t);
    }
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t first = 0; first < q[t].size(); first += size) {
        std::vector<double> p;
        double all = 0;
        for (std::size_t s = 0; s <= t; ++s) {
          double score = 0;
          for (std::size_t c = first; c < first + size; ++c) score += q[t][c] * k[s][c];
          p.push_back(std::exp(score / std::sqrt(static_cast<double>(size))));
          all += p.back();
        }
        for (std::size_t c = first; c < first + size; ++c) {
          mixed[t][c] = 0;
          for (std::size_t s = 0; s <= t; ++s) mixed[t][c] += p[s] / all * v[s][c];
        }
      }
    }
    return projected("o", mixed);
  }

  [[nodiscard]] rows experts(const std::string& layer, const rows& x) const {
    const rows& router = weights_.at(layer + "moe.router.weight")[0];
    const auto& gate = weights_.at(layer + "moe.gate.weight");
    std::vector<std::map<std::size_t, double>> tokens_of(gate.size());  // token → weight
    for (std::size_t t = 0; t < x.size(); ++t) {
      std::vector<std::size_t> order;
      std::vector<double> p;
      for (std::size_t e = 0; e < router.size(); ++e) {
        order.push_back(e);
        p.push_back(std::exp(dot(x[t], router[e])));
      }
      std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
      double picked = 0;
      for (std::size_t i = 0; i < top_k_; ++i) picked += p[order[i]];
      for (std::size_t i = 0; i < top_k_; ++i) tokens_of[order[i]][t] = p[order[i]] / picked;
    }
    rows out(x.size(), std::vector<double>(x[0].size()));
    for (std::size_t e = 0; e < gate.size(); ++e) {
      rows mine;
      for (const auto& [t, weight] : tokens_of[e]) mine.push_back(x[t]);
      if (mine.empty()) continue;
      rows hidden = product(mine, layer + "moe.gate.weight", e);
      const rows up = product(mine, layer + "moe.up.weight", e);
      for (std::size_t t = 0; t < hidden.size(); ++t) {
        for (std::size_t c = 0; c < hidden[t].size(); ++c) hidden[t][c] *= up[t][c] / (1 + std::exp(-hidden[t][c]));
      }
      const rows answer = product(hidden, layer + "moe.down.weight", e);
      std::size_t i = 0;
      for (const auto& [t, weight] : tokens_of[e]) {
        for (std::size_t c = 0; c < out[t].size(); ++c) out[t][c] += weight * answer[i][c];
        ++i;
      }
    }
    return out;
  }

  std::map<std::string, std::vector<rows>> weights_;  // name → matrices
  std::optional<recipe> activations_;
  std::size_t layers_ = 0, heads_ = 1, top_k_ = 1;
  double epsilon_ = 0, base_ = 1;
};

}  // namespace reference
