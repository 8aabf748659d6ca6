#include "check.hpp"

#include <tetromino/quantize.hpp>

#include <tetromino/dequantize.hpp>

#include "reference/floats.hpp"
#include "support/oracle.hpp"

#include <algorithm>  // std::fill, std::count
#include <array>      // std::array
#include <cmath>      // std::ldexp, std::isnan
#include <cstdint>    // std::uint8_t, std::uint16_t
#include <limits>     // std::numeric_limits
#include <string>     // std::string, std::to_string
#include <vector>     // std::vector

namespace {

using namespace tetromino;
using tetromino_test::difference;
using tetromino_test::number;
using tetromino_test::sample;

/// The packed bytes of a recipe as the oracle has them.
template <class T>
reference::packed expected_bytes(const recipe& r, const quantize_options& options, const sample<T>& x) {
  const double largest = tetromino_test::largest_finite<T>();
  return reference::quantize(tetromino_test::oracle_of(r, options, largest), x.view.matrices, x.view.rows, x.view.cols,
                             x.values(), options.column_weights);
}

std::string describe(const recipe& r, std::size_t matrices, std::size_t rows, std::size_t cols) {
  return r.name() + " of [" + std::to_string(matrices) + ", " + std::to_string(rows) + ", " + std::to_string(cols) +
         "]";
}

/// Packs a random tensor of random options and compares every byte with the oracle's.
template <class T>
void compare_with_oracle(const recipe& r, std::size_t cols, reference::generator& random) {
  const std::size_t matrices = 1 + random.below(2) * random.below(3);
  const std::size_t rows = 1 + random.below(2);
  const sample<T> x(random, matrices, rows, cols);
  quantize_options options;
  std::vector<float> weights;
  std::vector<float> tensor_scales;
  if (random.below(3) == 0) {
    weights.resize(random.below(2) == 0 ? cols : matrices * cols);
    for (float& w : weights) w = random.below(8) == 0 ? 0.0f : static_cast<float>(random.uniform() / random.uniform());
    options.column_weights = weights;
  }
  if (random.below(4) == 0) {
    options.rounding = element_rounding::stochastic;
    options.seed = random.bits();
    options.first_index = random.below(2) * random.bits();
  }
  if (r.format.scale == scale_type::e4m3) {
    options.scope = random.below(2) == 0 ? tensor_scale_scope::batch : tensor_scale_scope::per_matrix;
    if (random.below(4) == 0) {
      tensor_scales.resize(random.below(2) == 0 ? 1 : matrices);
      for (float& t : tensor_scales) t = static_cast<float>(random.uniform() / 100);
      options.tensor_scales = tensor_scales;
    }
  }
  const reference::packed expected = expected_bytes(r, options, x);
  INFO(describe(r, matrices, rows, cols) << (weights.empty() ? "" : ", weighted")
                                         << (options.rounding == element_rounding::stochastic ? ", stochastic" : ""));
  REQUIRE(difference(expected, quantize(scalar, x.view, r, options)) == "");
  REQUIRE(difference(expected, quantize(automatic, x.view, r, options)) == "");
}

void compare_with_oracle(const recipe& r, std::size_t cols, reference::generator& random, std::size_t type) {
  if (type % 3 == 0) return compare_with_oracle<float>(r, cols, random);
  if (type % 3 == 1) return compare_with_oracle<half>(r, cols, random);
  compare_with_oracle<bfloat16>(r, cols, random);
}

}  // namespace

TEST_CASE("every recipe without macro blocks packs what the oracle packs, K = 0 ... 300") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : tetromino_test::plain_recipes()) {
    for (std::size_t cols = 0; cols <= 300; ++cols) compare_with_oracle(r, cols, random, cols);
  }
}

TEST_CASE("every macro-block recipe packs what the oracle packs, some K") {
  reference::generator random(tetromino_test::seed());
  for (const auto& [macro, sizes] :
       {std::pair{"mbs-static", 40}, std::pair{"mbs-search", 16}, std::pair{"mbs-search256", 2}}) {
    for (const recipe& r : tetromino_test::macro_recipes(macro)) {
      for (int i = 0; i < sizes; ++i) compare_with_oracle(r, random.below(301), random, random.below(3));
    }
  }
}

TEST_CASE("every recipe packs what the oracle packs, K = 0 ... 300, every input type", "[.slow]") {
  reference::generator random(tetromino_test::seed());
  std::vector<recipe> recipes = tetromino_test::plain_recipes();
  for (const std::string macro : {"mbs-static", "mbs-search", "mbs-search256"}) {
    for (const recipe& r : tetromino_test::macro_recipes(macro)) recipes.push_back(r);
  }
  for (const recipe& r : recipes) {
    const bool long_search = r.format.macro_block != 0 && r.macro == macro_rule::search_256;
    for (std::size_t cols = 0; cols <= 300; ++cols) {
      for (std::size_t type = 0; type < 3; ++type) {
        if (!long_search || (cols + type) % 7 == 0) compare_with_oracle(r, cols, random, type);
      }
    }
  }
}
