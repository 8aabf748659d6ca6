#pragma once

/// Gathers the statistics of a model's inputs: the example model in float over calibration documents, in one process.

#include "model.hpp"

#include <numeric>

namespace moe_lm {

/// Experts of a layer on rows in the order of tokens: Σ weight · expert(row), without any exchange.
class experts_here {
 public:
  experts_here(const io::safetensors_file& file, const shape& s) : size_(s) {
    std::vector<std::int32_t> all(s.experts);
    std::iota(all.begin(), all.end(), 0);
    for (std::size_t l = 0; l < s.layers; ++l) layers_.emplace_back(file, s, precision{}, l, all);
  }

  row_observer& observe() { return run_.observe; }

  void operator()(std::size_t layer, std::span<const float> x, std::span<const std::uint16_t> ids,
                  std::span<const float> weights, std::span<float> y) {
    const std::size_t width = size_.hidden, k = size_.top_k;
    offsets_.assign(size_.experts + 1, 0);
    for (const std::uint16_t e : ids) ++offsets_[e + 1u];
    std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
    std::vector<std::uint32_t> next(offsets_.begin(), offsets_.end() - 1);
    place_.resize(ids.size());
    rows_.resize(ids.size() * width);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      place_[i] = next[ids[i]]++;
      std::copy_n(x.data() + i / k * width, width, rows_.data() + place_[i] * width);
    }
    const auto answers = run_(layers_[layer], precision{}, rows_, offsets_, {});
    std::fill(y.begin(), y.end(), 0.0f);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      for (std::size_t c = 0; c < width; ++c) y[i / k * width + c] += weights[i] * answers[place_[i] * width + c];
    }
  }

 private:
  shape size_;
  std::vector<expert_weights> layers_;
  expert_runner run_;
  std::vector<std::uint32_t> offsets_, place_;
  std::vector<float> rows_;
};

/// What goes into each weight of the model on the chosen documents; `done(document)` is called after each.
template <class Done>
input_statistics gather_statistics(const io::safetensors_file& file, const documents& text,
                                   std::span<const std::size_t> chosen, const Done& done) {
  const model whole(file, precision{});
  const shape& s = whole.size;
  input_statistics out;
  for (std::size_t l = 0; l < s.layers; ++l) {
    for (const char* part : {"attn.q", "attn.k", "attn.v", "attn.o", "moe.gate", "moe.up", "moe.down"}) {
      out.name(tensor_name(l, part), input_of(l, part));
    }
  }
  evaluator run(whole);
  experts_here experts(file, s);
  run.observe = [&](const std::string& input, std::size_t which, std::span<const float> rows, std::size_t cols) {
    out.add(input, which, 1, rows, cols);
  };
  experts.observe() = [&](const std::string& input, std::size_t which, std::span<const float> rows, std::size_t cols) {
    out.add(input, which, s.experts, rows, cols);
  };
  for (const std::size_t d : chosen) {
    const auto tokens = text.tokens_of(d);
    double loss = 0;
    run(std::span(&tokens, 1), experts, std::span(&loss, 1));
    done(d);
  }
  return out;
}

}  // namespace moe_lm
