#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"   // result, error
#include "../loads.hpp"      // load_table
#include "json.hpp"          // nlohmann::json
#include "number_array.hpp"  // number_array

#include <algorithm>     // std::copy_n, std::find, std::max, std::min
#include <array>         // std::array
#include <charconv>      // std::from_chars
#include <cmath>         // std::isfinite
#include <cstddef>       // std::ptrdiff_t, std::size_t
#include <cstdint>       // std::uint32_t, std::uint64_t
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::errc
#include <utility>       // std::exchange
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// How often experts were used, added up as a file tells it.
class count_table {
 public:
  static constexpr std::size_t most_cells = std::size_t{1} << 22;

  /// Adds to one expert's count; says what is wrong, or nothing.
  [[nodiscard]] std::string add(std::size_t layer, std::size_t expert, double count) {
    if (layer > 65'535 || expert >= 65'535)
      return text("expected layers and experts below 65535, got ", layer, " and ", expert);
    if (!std::isfinite(count) || count < 0) return text("expected a count of 0 or more, got ", count);
    if (expert >= experts_ || layer >= layers_) {
      const std::size_t layers = std::max(layers_, layer + 1), experts = std::max(experts_, expert + 1);
      if (layers > most_cells / experts)
        return text("expected at most ", most_cells, " counts, got ", layers, " × ", experts);
      grow(layers, experts);
    }
    values_[layer * stride_ + expert] += count;
    counted_[layer] = true;
    return {};
  }

  /// All counts of the layers that have any, with rows of at least `experts`, and the numbers of these layers.
  [[nodiscard]] result<load_table> finish(std::size_t experts, std::vector<std::uint32_t>& layers) const {
    if (layers_ == 0) return error(errc::malformed_file, "expected at least one count, got none");
    if (experts != 0 && experts < experts_) {
      return error(errc::malformed_file, {"expected experts below ", experts, ", got ", experts_ - 1});
    }
    layers.clear();
    for (std::size_t l = 0; l < layers_; ++l) {
      if (counted_[l]) layers.push_back(static_cast<std::uint32_t>(l));
    }
    load_table out{layers.size(), std::max(experts, experts_), {}};
    out.values.assign(out.layers * out.experts, 0.0);
    for (std::size_t l = 0; l < out.layers; ++l) {
      const double* const row = values_.data() + layers[l] * stride_;
      std::copy_n(row, experts_, out.values.begin() + static_cast<std::ptrdiff_t>(l * out.experts));
    }
    return out;
  }

 private:
  void grow(std::size_t layers, std::size_t experts) {
    if (experts > stride_) {  // by doubling, so that counts in any order take linear time
      const std::size_t stride = std::max(experts, std::min(2 * stride_, most_cells / layers));
      std::vector<double> wider(layers * stride, 0.0);
      for (std::size_t l = 0; l < layers_; ++l) {
        for (std::size_t e = 0; e < experts_; ++e) wider[l * stride + e] = values_[l * stride_ + e];
      }
      values_ = std::move(wider);
      stride_ = stride;
    }
    values_.resize(layers * stride_, 0.0);
    counted_.resize(layers, false);
    layers_ = layers;
    experts_ = experts;
  }

  std::size_t layers_ = 0, experts_ = 0, stride_ = 0;
  std::vector<double> values_;  // [layers, stride]
  std::vector<bool> counted_;   // [layers]
};

/// Adds counts[layers][experts], or [steps][layers][experts]; says what is wrong, or nothing.
[[nodiscard]] inline std::string add_counts(const nlohmann::json& counts, count_table& to) {
  if (!counts.is_array() || counts.empty()) return "expected logical_count, a list of layers";
  if (counts[0].is_array() && !counts[0].empty() && counts[0][0].is_array()) {
    for (const nlohmann::json& step : counts) {
      if (std::string bad = add_counts(step, to); !bad.empty()) return bad;
    }
    return {};
  }
  for (std::size_t l = 0; l < counts.size(); ++l) {
    if (!counts[l].is_array()) return text("expected logical_count of layer ", l, ", a list");
    if (counts[l].size() != counts[0].size()) {
      return text("expected ", counts[0].size(), " counts in layer ", l, " as in layer 0, got ", counts[l].size());
    }
    for (std::size_t e = 0; e < counts[l].size(); ++e) {
      if (!counts[l][e].is_number()) return text("expected a count of layer ", l, ", expert ", e);
      if (std::string bad = to.add(l, e, counts[l][e].get<double>()); !bad.empty()) return bad;
    }
  }
  return {};
}

/// Adds counts[layers, experts], or [steps, layers, experts]; says what is wrong, or nothing.
[[nodiscard]] inline std::string add_counts(const number_array& counts, count_table& to) {
  const std::size_t ranks = counts.shape.size();
  if (ranks != 2 && ranks != 3)
    return text("expected [layers, experts] or [steps, layers, experts], got ", ranks, " dimensions");
  const std::size_t experts = counts.shape[ranks - 1], layers = counts.shape[ranks - 2];
  std::string problem;
  std::size_t i = 0;
  counts.for_each([&](auto value) {
    problem = to.add(i / experts % layers, i % experts, static_cast<double>(value));
    ++i;
    return problem.empty();
  });
  return problem;
}

/// Adds the lines of a table with the columns layer, expert and count, in any order, named by its first line; says what
/// is wrong, and where, or nothing.
[[nodiscard]] inline std::string add_csv(std::string_view table, count_table& to) {
  std::array<std::size_t, 3> column{};
  std::array<std::string_view, 3> cell;
  bool is_head = true;
  for (std::size_t number = 1; !table.empty(); ++number) {
    std::string_view line = table.substr(0, table.find('\n'));
    table.remove_prefix(std::min(table.size(), line.size() + 1));
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.empty()) continue;
    std::size_t cells = 0;
    for (std::string_view rest = line;; ++cells) {
      const std::size_t comma = rest.find(',');
      if (cells < cell.size()) cell[cells] = rest.substr(0, comma);
      if (comma == std::string_view::npos) break;
      rest.remove_prefix(comma + 1);
    }
    if (++cells != cell.size()) return text("line ", number, ": expected 3 cells, got ", cells);
    constexpr std::string_view names[] = {"layer", "expert", "count"};
    std::array<std::uint64_t, 3> value{};
    for (std::size_t i = 0; i < 3; ++i) {
      if (is_head) {
        const auto found = std::find(cell.begin(), cell.end(), names[i]);
        if (found == cell.end()) return text("line ", number, ": expected a column ", names[i]);
        column[i] = static_cast<std::size_t>(found - cell.begin());
        continue;
      }
      const std::string_view digits = cell[column[i]];
      const auto [end, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value[i]);
      if (code != std::errc() || end != digits.data() + digits.size() || digits.empty()) {
        return text("line ", number, ": expected ", names[i], " to be a whole number");
      }
    }
    if (std::exchange(is_head, false)) continue;
    if (std::string bad = to.add(value[0], value[1], static_cast<double>(value[2])); !bad.empty()) {
      return text("line ", number, ": ", bad);
    }
  }
  return {};
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
