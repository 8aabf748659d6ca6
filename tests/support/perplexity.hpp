#pragma once

/// The example model on its documents in one process, and the table of perplexities that it must reproduce.

#include "../../examples/tools/moe/model.hpp"

#include <tetromino/comm/dispatcher.hpp>

#include <cmath>    // std::exp
#include <cstddef>  // std::size_t
#include <numeric>  // std::iota
#include <string>   // std::string
#include <thread>   // std::thread
#include <vector>   // std::vector

namespace tetromino_test {

/// Perplexity of each domain (code, math, chat, general) and of all documents; the first four may be unknown: 0.
struct perplexity_row {
  const char* weights;
  const char* activations;
  double expected[5];
};

/// All 192 documents, computed with another implementation.
inline constexpr perplexity_row perplexity_table[] = {
    {"float32", "float32", {4.081, 5.986, 14.315, 38.015, 10.900}},
    {"mxfp4-32/floor", "mxfp4-32/floor", {4.785, 7.016, 16.097, 44.149, 12.630}},
    {"mxfp4-16/floor", "mxfp4-16/floor", {4.816, 6.972, 15.973, 44.546, 12.644}},
    {"mxfp4-16/oas", "mxfp4-16/oas", {4.691, 6.814, 15.832, 43.730, 12.399}},
    {"mxfp4-16/oas/mbs-static", "mxfp4-16/oas/mbs-static", {4.542, 6.679, 15.576, 42.906, 12.127}},
    {"mxfp4-16/oas/mbs-search", "mxfp4-16/oas/mbs-static", {4.528, 6.696, 15.545, 42.240, 12.065}},
    {"mxfp4-32/oas/mbs-search", "mxfp4-32/oas/mbs-static", {4.568, 6.668, 15.730, 42.727, 12.153}},
    {"nvfp4/amax", "nvfp4/amax", {4.439, 6.434, 15.331, 42.083, 11.842}},
    {"nvfp4/four-over-six", "nvfp4/four-over-six", {4.388, 6.370, 15.134, 41.377, 11.689}},
    {"mxfp4-32/floor", "float32", {0, 0, 0, 0, 11.527}},
    {"mxfp4-16/oas", "float32", {0, 0, 0, 0, 11.489}},
    {"mxfp4-16/oas/mbs-search", "float32", {0, 0, 0, 0, 11.344}},
    {"nvfp4/amax", "float32", {0, 0, 0, 0, 11.328}},
    {"nvfp4/min-error", "float32", {0, 0, 0, 0, 11.223}},
};

/// The model whole, with all its experts, on one rank.
class whole_model {
 public:
  whole_model(const moe_lm::io::safetensors_file& file, const moe_lm::precision& p) : model_(file, p) {
    std::vector<std::int32_t> all(model_.size.experts);
    std::iota(all.begin(), all.end(), 0);
    for (std::size_t l = 0; l < model_.size.layers; ++l) experts_.emplace_back(file, model_.size, p, l, all);
  }

  /// −log p of each of the chosen documents, which are shared out over `threads`.
  [[nodiscard]] std::vector<double> losses(const moe_lm::documents& text, const std::vector<std::size_t>& chosen,
                                           std::size_t threads) const {
    std::vector<double> out(chosen.size());
    std::vector<std::thread> helpers;
    for (std::size_t t = 0; t < threads; ++t) {
      helpers.emplace_back([&, t] {
        for (std::size_t i = t; i < chosen.size(); i += threads) out[i] = loss(text.tokens_of(chosen[i]));
      });
    }
    for (auto& h : helpers) h.join();
    return out;
  }

  [[nodiscard]] double loss(std::span<const std::uint32_t> document) const {
    namespace moe = tetromino::moe;
    namespace comm = tetromino::comm;
    const std::size_t experts = model_.size.experts, width = model_.size.hidden;
    const auto cluster = moe::topology::uniform(1, 1, experts);
    const comm::local_exchange alone;
    comm::dispatcher<comm::local_exchange> dispatcher(alone, cluster, model_.size.top_k);
    moe_lm::evaluator evaluate(model_);
    moe_lm::expert_runner run;
    std::vector<moe::expert_call> calls;
    std::vector<float> rows;
    std::vector<std::uint32_t> groups;
    const std::vector<std::uint32_t> tags(document.size());
    double nll = 0;
    const auto layer = [&](std::size_t l, std::span<const float> x, std::span<const std::uint16_t> ids,
                           std::span<const float> weights, std::span<float> y) {
      calls.clear();
      for (std::size_t i = 0; i < ids.size(); ++i) calls.push_back({ids[i], weights[i]});
      dispatcher.try_dispatch<float>(calls, x, tags, width).value();
      const moe::dispatch_plan& plan = dispatcher.plan();
      rows.resize(plan.expert_rows().size() * width);
      moe::gather_rows(plan.expert_rows(), dispatcher.received_rows<float>(), std::span(rows), width);
      groups.clear();
      for (std::size_t e = 0; e < experts; ++e) {
        groups.insert(groups.end(), plan.expert_offsets()[e + 1] - plan.expert_offsets()[e],
                      static_cast<std::uint32_t>(e));
      }
      const auto answers = run(experts_[l], model_.rounding, rows, plan.expert_offsets(), {groups, experts});
      dispatcher.try_combine(answers, y, width).value();
    };
    evaluate(std::span(&document, 1), layer, std::span(&nll, 1));
    return nll;
  }

  [[nodiscard]] const moe_lm::shape& size() const { return model_.size; }

 private:
  moe_lm::model model_;
  std::vector<moe_lm::expert_weights> experts_;
};

/// Perplexity of each domain and of all: exp of summed losses over predicted tokens.
inline std::vector<double> perplexities(const moe_lm::documents& text, const std::vector<std::size_t>& chosen,
                                        const std::vector<double>& losses) {
  const std::size_t domains = text.domain_names.size();
  std::vector<double> loss(domains + 1), tokens(domains + 1);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    for (const std::size_t g : {std::size_t{text.domain[chosen[i]]}, domains}) {
      loss[g] += losses[i];
      tokens[g] += static_cast<double>(text.tokens_of(chosen[i]).size() - 1);
    }
  }
  for (std::size_t g = 0; g <= domains; ++g) loss[g] = std::exp(loss[g] / tokens[g]);
  return loss;
}

}  // namespace tetromino_test
