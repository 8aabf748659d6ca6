#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "ids.hpp"       // detail::text, number_array

#include <algorithm>  // std::max, std::transform
#include <cmath>      // std::isfinite
#include <cstddef>    // std::size_t
#include <iterator>   // std::data, std::size
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// How much each expert is used: values[layers, experts], pairs counted or any measure in proportion to them.
struct load_view {
  std::size_t layers = 0;
  std::size_t experts = 0;
  std::span<const double> values;

  [[nodiscard]] TETROMINO_ABI std::span<const double> layer(std::size_t l) const {
    TETROMINO_EXPECTS(l < layers && values.size() == layers * experts, "load_view: layer number or size out of range",
                      l, layers, values.size(), layers * experts);
    return values.subspan(l * experts, experts);
  }
};

inline namespace TETROMINO_ISA {

/// Checks loads: at least one layer and expert, sizes that agree, each value finite and 0 or more.
[[nodiscard]] inline result<void> try_validate(const load_view& loads) {
  if (loads.layers == 0 || loads.experts == 0) {
    return error(errc::invalid_argument,
                 {"loads: expected at least 1 layer and 1 expert, got ", loads.layers, " and ", loads.experts});
  }
  if (loads.values.size() % loads.experts != 0 || loads.values.size() / loads.experts != loads.layers) {
    return error(errc::shape_mismatch,
                 {"loads: expected ", loads.layers, " × ", loads.experts, " values, got ", loads.values.size()});
  }
  for (std::size_t i = 0; i < loads.values.size(); ++i) {
    if (!std::isfinite(loads.values[i]) || loads.values[i] < 0) {
      return error(std::isfinite(loads.values[i]) ? errc::invalid_argument : errc::non_finite,
                   detail::text("loads: expected finite values of 0 or more, got ", loads.values[i], " in layer ",
                                i / loads.experts, ", expert ", i % loads.experts));
    }
  }
  return {};
}

inline void validate(const load_view& loads) { try_validate(loads).value(); }

}  // namespace TETROMINO_ISA

/// Loads that own their values: values[layers, experts].
struct load_table {
  std::size_t layers = 0;
  std::size_t experts = 0;
  std::vector<double> values;

  [[nodiscard]] TETROMINO_ABI load_view view() const& { return {layers, experts, values}; }
  load_view view() const&& = delete;  // would dangle
  /// What solvers take, also of loads made for one call: balanced(to_loads(1, 64, counts), cluster).
  TETROMINO_ABI operator load_view() const noexcept { return {layers, experts, values}; }

  friend TETROMINO_ABI bool operator==(const load_table&, const load_table&) = default;
};

namespace detail::inline TETROMINO_ISA {

/// Max over units of load by speed, over what it would be if all were equally busy; 1 without any load. speed(i) is 0
/// for units that cannot serve.
template <class Load, class Speed>
[[nodiscard]] double max_over_mean(std::span<const Load> loads, const Speed& speed) {
  double sum = 0, most = 0, speeds = 0;
  for (std::size_t i = 0; i < loads.size(); ++i) {
    const double s = speed(i);
    if (!(s > 0)) continue;
    speeds += s;
    sum += static_cast<double>(loads[i]);
    most = std::max(most, static_cast<double>(loads[i]) / s);
  }
  return sum == 0 ? 1.0 : most * speeds / sum;
}
template <class Load, class Speed>
[[nodiscard]] double max_over_mean(const std::vector<Load>& loads, const Speed& speed) {
  return max_over_mean(std::span<const Load>(loads), speed);
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Loads from counts of any kind that an engine keeps, counts[layers, experts]: a vector, span or array of float,
/// double or integers. Errors: as try_validate.
template <number_array Counts>
[[nodiscard]] result<load_table> try_to_loads(std::size_t layers, std::size_t experts, const Counts& counts) {
  load_table out{layers, experts, std::vector<double>(std::size(counts))};
  std::transform(std::data(counts), std::data(counts) + std::size(counts), out.values.begin(),
                 [](auto count) { return static_cast<double>(count); });
  if (auto ok = try_validate(out.view()); !ok) return ok.error();
  return out;
}
template <number_array Counts>
[[nodiscard]] load_table to_loads(std::size_t layers, std::size_t experts, const Counts& counts) {
  return try_to_loads(layers, experts, counts).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
