#pragma once

/// What the checkpoint programs share: statistics as the packer wants them, and settings that both take.

#include "../input_statistics.hpp"
#include "../ui.hpp"

#include <tetromino/cpu.hpp>
#include <tetromino/io/checkpoint.hpp>
#include <tetromino/io/checkpoint/pack.hpp>
#include <tetromino/io/checkpoint/plan_within.hpp>
#include <tetromino/version.hpp>

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

namespace checkpoint {

namespace io = tetromino::io;
using tetromino::errc;
using tetromino::error;
using tetromino::recipe;

/// Statistics from a file, as the packer asks for them.
class gathered_inputs final : public io::input_knowledge {
 public:
  explicit gathered_inputs(input_statistics&& seen) : seen_(std::move(seen)) {}

  [[nodiscard]] const input_statistics& statistics() const noexcept { return seen_; }

  [[nodiscard]] tetromino::result<std::vector<float>> column_weights(const io::parameter& weight, std::size_t matrix,
                                                                     std::size_t rotation) const override {
    try {
      return seen_.column_weights(weight.name, matrix, weight.matrices, weight.cols, rotation);
    } catch (const error& e) {
      return e;
    }
  }
  [[nodiscard]] tetromino::result<double> squared_products(const tetromino::matrix_view<const float>& rows,
                                                           const io::parameter& weight,
                                                           std::size_t matrix) const override {
    try {
      return seen_.squared_products(weight.name, matrix, weight.matrices, rows);
    } catch (const error& e) {
      return e;
    }
  }
  [[nodiscard]] std::optional<float> input_amax(const io::parameter& weight, std::size_t matrix) const override {
    return seen_.amax(weight.name, matrix);
  }
  [[nodiscard]] tetromino::result<tetromino::packed<>> feed_back(
      const tetromino::matrix_view<const float>& rows, const io::parameter& weight, std::size_t matrix,
      const recipe& how, const tetromino::quantize_options& options) const override {
    try {
      const auto moments = seen_.of(weight.name, matrix, weight.matrices, weight.cols);
      return tetromino::try_gptq(tetromino::cpu, rows, how, moments, options);
    } catch (const error& e) {
      return e;
    }
  }

 private:
  input_statistics seen_;
};

/// A call whose failure is the user's: exit status 2.
template <class F>
auto usage(const F& f) {
  try {
    return f();
  } catch (const error& e) {
    throw ui::usage_error(e.what());
  }
}

/// "RECIPE", "WEIGHTS=RECIPE", or a JSON file with a list of {"weights": .., "recipe": ..}.
inline void add_rules(const std::string& text, std::vector<io::pack_rule>& rules) {
  if (text.ends_with(".json")) {
    std::ifstream file(text);
    if (!file.is_open()) {
      throw ui::usage_error(fmt::format("--recipe {}: could not open it: {}", text, std::strerror(errno)));
    }
    const auto list = nlohmann::json::parse(file, nullptr, false);
    if (!list.is_array() || list.empty()) {
      throw ui::usage_error(fmt::format("--recipe {}: expected a JSON list of {{\"weights\", \"recipe\"}}{}", text,
                                        list.is_array() ? ", found none in it" : ""));
    }
    for (const auto& entry : list) {
      if (!entry.is_object() || !entry.contains("recipe") || !entry["recipe"].is_string() ||
          !entry.value("weights", nlohmann::json("")).is_string()) {
        throw ui::usage_error(fmt::format("--recipe {}: expected {{\"weights\": .., \"recipe\": ..}}, got {}", text,
                                          ui::printable(entry.dump())));
      }
      rules.push_back({entry.value("weights", ""), recipe::parse(entry["recipe"].get<std::string>())});
    }
    return;
  }
  const std::size_t sign = text.find('=');
  if (sign == std::string::npos) {
    rules.push_back({"", recipe::parse(text)});
  } else {
    rules.push_back({text.substr(0, sign), recipe::parse(text.substr(sign + 1))});
  }
}

/// How one row of a table calls a weight that was packed.
inline std::string shape_of(const io::parameter& p) {
  return p.matrices == 1 ? fmt::format("{}x{}", p.rows, p.cols) : fmt::format("{}x{}x{}", p.matrices, p.rows, p.cols);
}

}  // namespace checkpoint
