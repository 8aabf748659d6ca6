#pragma once

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "trace.hpp"     // detail::text

#include <cmath>    // std::isfinite
#include <cstddef>  // std::size_t
#include <span>     // std::span

namespace TETROMINO_NAMESPACE::moe {

/// How much each expert is used: values[layers, experts], pairs counted or any measure in proportion to them.
struct load_view {
  std::size_t layers = 0;
  std::size_t experts = 0;
  std::span<const double> values;

  [[nodiscard]] std::span<const double> layer(std::size_t l) const {
    TETROMINO_EXPECTS(l < layers && values.size() == layers * experts, "load_view: layer number or size out of range",
                      l, layers, values.size(), layers * experts);
    return values.subspan(l * experts, experts);
  }
};

/// Checks loads: at least one layer and expert, sizes that agree, each value finite and 0 or more.
[[nodiscard]] inline result<void> try_validate(const load_view& loads) {
  if (loads.layers == 0 || loads.experts == 0) {
    return error(errc::invalid_argument, detail::text("loads: expected at least 1 layer and 1 expert, got ",
                                                      loads.layers, " and ", loads.experts));
  }
  if (loads.values.size() % loads.experts != 0 || loads.values.size() / loads.experts != loads.layers) {
    return error(errc::shape_mismatch, detail::text("loads: expected ", loads.layers, " × ", loads.experts,
                                                    " values, got ", loads.values.size()));
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

}  // namespace TETROMINO_NAMESPACE::moe
