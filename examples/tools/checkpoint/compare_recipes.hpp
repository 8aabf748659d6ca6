#pragma once

/// Recipes side by side on the weights of a model: bits, and the noise that each adds.

#include "../command_line.hpp"
#include "settings.hpp"

#include <cmath>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace checkpoint {

inline const std::vector<std::string> compared_recipes = {"mxfp4-32/floor",
                                                          "mxfp4-32/ceil",
                                                          "mxfp4-32/round-up",
                                                          "mxfp4-32/even",
                                                          "mxfp4-32/oas",
                                                          "mxfp4-32/min-error",
                                                          "mxfp4-32/oas/mbs-static",
                                                          "mxfp4-32/oas/mbs-search",
                                                          "mxfp4-32/min-error/mbs-search@16x2",
                                                          "mxfp4-32/min-error/mbs-search@8x2",
                                                          "mxfp4-16/floor",
                                                          "mxfp4-16/oas",
                                                          "mxfp4-16/min-error",
                                                          "mxfp4-16/oas/mbs-static",
                                                          "mxfp4-16/oas/mbs-search",
                                                          "mxfp4-16/oas/mbs-search@64",
                                                          "mxfp4-16/oas/mbs-search@32",
                                                          "nvfp4/amax",
                                                          "nvfp4/four-over-six",
                                                          "nvfp4/min-error"};
inline const std::vector<std::string> compared_with_statistics = {"mxfp4-32/oas/gptq",
                                                                  "mxfp4-32/min-error/mbs-search@8x2/gptq",
                                                                  "mxfp4-32/min-error/mbs-search@32",
                                                                  "mxfp4-32/min-error/mbs-search@32/gptq",
                                                                  "nvfp4/four-over-six/gptq",
                                                                  "nvfp4/min-error/gptq"};

/// Squares of products with the activations that statistics describe: of the weights, and of what packing errs. Weights
/// that make up for drift are not the nearest ones there, on purpose.
struct product_report {
  double signal = 0, noise = 0;

  void add(const tetromino::matrix<float>& x, const tetromino::matrix<float>& y, const tetromino::calibration& seen) {
    using map = Eigen::Map<const tetromino::eigen_matrix<float>>;
    const auto rows = static_cast<Eigen::Index>(x.rows), cols = static_cast<Eigen::Index>(x.cols);
    const tetromino::eigen_matrix<double> values = map(x.data.data(), rows, cols).cast<double>();
    const tetromino::eigen_matrix<double> errors = values - map(y.data.data(), rows, cols).cast<double>();
    const auto moments = seen.moments().selfadjointView<Eigen::Lower>();
    signal += (values * moments).cwiseProduct(values).sum() / seen.rows();
    noise += (errors * moments).cwiseProduct(errors).sum() / seen.rows();
  }
  [[nodiscard]] double qsnr() const { return 10 * std::log10(signal / noise); }
};

/// One matrix of a weight at a time, packed by every recipe.
class recipe_comparison {
 public:
  recipe_comparison(const io::checkpoint& model, std::span<const recipe> recipes, const gathered_inputs* inputs,
                    const tetromino::cpu_t& policy)
      : model_(model),
        recipes_(recipes),
        inputs_(inputs),
        policy_(policy),
        reports_(recipes.size()),
        products_(recipes.size()),
        bits_(recipes.size()) {}

  /// Weights that share their tensor scales.
  void add(std::span<const io::parameter* const> set) {
    for (std::size_t e = 0; e < set.front()->matrices; ++e) {
      std::map<std::size_t, float> amax;  // by rotation
      for (const recipe& r : recipes_) {
        if (r.format.scale != tetromino::scale_type::e4m3 || amax.contains(r.rotation)) continue;
        for (const auto* weight : set) {
          const float one = tetromino::amax(policy_, rotated(values_of(*weight, e), r.rotation));
          amax[r.rotation] = std::max(amax[r.rotation], one);
        }
      }
      for (const auto* weight : set) add(*weight, e, amax);
    }
  }

  void print() const {
    std::vector<std::string> header{"recipe", "bits/weight", "QSNR dB"};
    if (inputs_ != nullptr) header.emplace_back("of products dB");
    ui::table table(std::move(header));
    for (std::size_t i = 0; i < recipes_.size(); ++i) {
      std::vector<std::string> line{recipes_[i].name(), fmt::format("{:.3f}", bits_per_weight(i)),
                                    fmt::format("{:.3f}", reports_[i].qsnr())};
      if (inputs_ != nullptr) line.push_back(fmt::format("{:.3f}", products_[i].qsnr()));
      table.add(std::move(line));
    }
    table.print();
  }

  [[nodiscard]] nlohmann::ordered_json json() const {
    nlohmann::ordered_json out = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < recipes_.size(); ++i) {
      out.push_back({{"recipe", recipes_[i].name()}, {"bits", bits_per_weight(i)}, {"qsnr_db", reports_[i].qsnr()}});
      if (inputs_ != nullptr) out.back()["products_qsnr_db"] = products_[i].qsnr();
    }
    return out;
  }

 private:
  [[nodiscard]] double bits_per_weight(std::size_t i) const {
    return static_cast<double>(bits_[i]) / static_cast<double>(reports_[i].count);
  }
  [[nodiscard]] tetromino::matrix<float> values_of(const io::parameter& weight, std::size_t e) {
    tetromino::matrix<float> out(weight.rows, weight.cols);
    io::visit_rows(policy_, model_, weight, {e, 0, weight.rows}, buffers_, [&](const auto& rows) {
      for (std::size_t i = 0; i < out.data.size(); ++i) {
        out.data[i] = static_cast<float>(rows.data[i]);
      }
    });
    return out;
  }
  [[nodiscard]] tetromino::matrix<float> rotated(tetromino::matrix<float> values, std::size_t rotation) const {
    if (rotation != 0) tetromino::rotate(policy_, values, {rotation}, values.view());
    return values;
  }

  void add(const io::parameter& weight, std::size_t e, const std::map<std::size_t, float>& amax) {
    const auto values = values_of(weight, e);
    for (std::size_t i = 0; i < recipes_.size(); ++i) {
      const recipe& r = recipes_[i];
      tetromino::quantize_options options;
      float scale = 1.0f;
      if (r.format.scale == tetromino::scale_type::e4m3) {
        if (amax.at(r.rotation) > 0) scale = tetromino::tensor_scale_for(amax.at(r.rotation), r.rule);
        options.tensor_scales = {&scale, 1};
      }
      std::vector<float> weights;
      if (inputs_ != nullptr && !r.error_feedback) {
        weights = inputs_->column_weights(weight, e, r.rotation).value();
        options.column_weights = weights;
      }
      const tetromino::matrix_view<const float> rows(values.data.data(), values.rows, values.cols);
      const auto packed = r.error_feedback ? inputs_->feed_back(rows, weight, e, r, options).value()
                                           : tetromino::quantize(policy_, rows, r, options);
      auto back = tetromino::dequantize<float>(policy_, packed);
      if (r.rotation != 0) tetromino::rotate_back(policy_, back, {r.rotation}, back.view());
      reports_[i].add(tetromino::compare(values, back));
      bits_[i] += 8 * packed.bytes();
      if (inputs_ == nullptr) continue;
      products_[i].add(values, back, inputs_->statistics().of(weight.name, e, weight.matrices, weight.cols));
    }
  }

  const io::checkpoint& model_;
  std::span<const recipe> recipes_;
  const gathered_inputs* inputs_;
  tetromino::cpu_t policy_;
  io::row_buffers buffers_;
  std::vector<tetromino::error_report> reports_;
  std::vector<product_report> products_;
  std::vector<std::size_t> bits_;
};

/// The recipes of the names given, or those to compare where none is.
inline std::vector<recipe> recipes_to_compare(const std::vector<std::string>& named, bool with_statistics) {
  std::vector<recipe> out;
  usage([&] {
    for (const auto& name : named.empty() ? compared_recipes : named) out.push_back(recipe::parse(name));
    for (const auto& name : compared_with_statistics) {
      if (with_statistics && named.empty()) out.push_back(recipe::parse(name));
    }
    return 0;
  });
  for (const recipe& r : out) {
    if (r.error_feedback && !with_statistics) {
      throw ui::usage_error(fmt::format("recipe {} needs --statistics FILE", r.name()));
    }
  }
  return out;
}

/// What to compare, and how to print it.
struct comparison_job {
  std::string input;
  std::vector<recipe> recipes;
  const gathered_inputs* inputs = nullptr;
  ui::output_options print;
};

/// Prints recipes side by side, over all weights that would be packed.
inline int compare_recipes(const comparison_job& job, const io::checkpoint& model,
                           const std::vector<io::parameter>& parameters, io::plan_options options,
                           const tetromino::cpu_t& policy) {
  options.layout = io::checkpoint_layout::linear;
  options.rules.assign(1, {"", job.recipes.front()});
  const auto plan = usage([&] { return io::plan(model, parameters, std::move(options)); });
  std::map<std::size_t, std::vector<const io::parameter*>> sets;
  std::size_t tensors = 0, weights = 0;
  for (const auto& planned : plan.parameters) {
    if (!planned.is_packed()) continue;
    sets[planned.source->set].push_back(planned.source);
    ++tensors;
    weights += planned.source->elements();
  }
  recipe_comparison comparison(model, job.recipes, job.inputs, policy);
  {
    ui::progress progress("comparing", weights, job.print.quiet);
    for (const auto& [number, set] : sets) {
      try {
        comparison.add(set);
      } catch (const error& e) {
        throw error(e.code(), fmt::format("tensor \"{}\": {}", ui::printable(set.front()->name), e.what()));
      }
      for (const auto* weight : set) progress.add(weight->elements());
    }
  }
  if (job.print.quiet) return 0;
  if (job.print.json) {
    const nlohmann::ordered_json out = {
        {"input", job.input}, {"tensors", tensors}, {"weights", weights}, {"recipes", comparison.json()}};
    ui::print_json(out);
    return 0;
  }
  comparison.print();
  fmt::print("{} tensors, {} weights\n", tensors, weights);
  return 0;
}

}  // namespace checkpoint
