#include "check.hpp"

#include <tetromino/options.hpp>
#include <tetromino/thread_executor.hpp>

#include <tetromino/dequantize.hpp>
#include <tetromino/quantize.hpp>

#include "support/fastest.hpp"
#include "support/oracle.hpp"

#include <array>    // std::array
#include <cmath>    // std::isnan, std::signbit
#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t
#include <limits>   // std::numeric_limits
#include <span>     // std::span
#include <string>   // std::string, std::to_string
#include <vector>   // std::vector

namespace {

using namespace tetromino;
using tetromino_test::contains;
using tetromino_test::difference;
using tetromino_test::fastest;
using tetromino_test::number;
using tetromino_test::sample;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float largest_float = std::numeric_limits<float>::max();

std::vector<recipe> recipes_of_every_rule() {
  std::vector<recipe> out = tetromino_test::plain_recipes();
  for (const char* name : {"mxfp4-32/oas/mbs-search", "mxfp4-16/floor/mbs-static@32",
                           "mxfp4-16/min-error/mbs-search@256", "mxfp4-32/even/mbs-static@64"}) {
    out.push_back(recipe::parse(name));
  }
  return out;
}

/// Puts NaN and infinities into a sample, seldom or often.
template <class T>
void spoil(sample<T>& x, reference::generator& random) {
  const std::size_t seldom = random.below(2) == 0 ? 200 : 10;
  const auto view = x.view;
  for (std::size_t e = 0; e < view.matrices; ++e) {
    for (std::size_t r = 0; r < view.rows; ++r) {
      for (std::size_t k = 0; k < view.cols; ++k) {
        if (random.below(seldom) != 0) continue;
        const std::array<float, 3> special{not_a_number, infinity, -infinity};
        view.row(e, r)[k] = number<T>(special[random.below(3)]);
      }
    }
  }
}

template <class T>
void compare_special_values(const recipe& r, special_values special, reference::generator& random) {
  sample<T> x(random, 1 + random.below(2), 1 + random.below(3), 1 + random.below(300));
  spoil(x, random);
  quantize_options options;
  options.special = special;
  options.scope = random.below(2) == 0 ? tensor_scale_scope::batch : tensor_scale_scope::per_matrix;
  std::vector<float> weights(x.view.cols);
  for (float& w : weights) w = static_cast<float>(random.uniform());
  if (random.below(3) == 0) options.column_weights = weights;
  if (random.below(3) == 0) {
    options.rounding = element_rounding::stochastic;
    options.seed = random.bits();
  }
  const reference::packed expected =
      reference::quantize(tetromino_test::oracle_of(r, options, tetromino_test::largest_finite<T>()), x.view.matrices,
                          x.view.rows, x.view.cols, x.values(), options.column_weights);
  INFO(r.name() << " of [" << x.view.matrices << ", " << x.view.rows << ", " << x.view.cols << "]");
  REQUIRE(difference(expected, quantize(scalar, x.view, r, options)) == "");
  REQUIRE(difference(expected, quantize(fastest, x.view, r, options)) == "");
}

/// Position of the first element that is not finite, counted through [matrices, rows, cols].
std::size_t first_special(const std::vector<float>& x) {
  std::size_t i = 0;
  while (i < x.size() && std::isfinite(x[i])) ++i;
  return i;
}

template <class T>
void expect_rejection(const recipe& r, reference::generator& random) {
  sample<T> x(random, 1 + random.below(2), 1 + random.below(4), 1 + random.below(300));
  spoil(x, random);
  const std::vector<float> values = x.values();
  const std::size_t position = first_special(values);
  INFO(r.name() << " of [" << x.view.matrices << ", " << x.view.rows << ", " << x.view.cols << "], special at "
                << position);
  const thread_executor threads(2);
  const auto check = [&](const result<packed<any_format>>& got) {
    REQUIRE(got.has_value() == (position == values.size()));
    if (got) return;
    CHECK(got.error().code() == errc::non_finite);
    const std::string message = got.error().what();
    const std::size_t row = position / x.view.cols;
    CHECK_THAT(message, contains("row " + std::to_string(row % x.view.rows) + ","));
    CHECK_THAT(message, contains("column " + std::to_string(position % x.view.cols)));
    CHECK_THAT(message, contains(std::isnan(values[position]) ? "NaN" : values[position] > 0 ? "+inf" : "-inf"));
    if (x.view.matrices > 1) CHECK_THAT(message, contains("matrix " + std::to_string(row / x.view.rows)));
  };
  check(try_quantize(scalar, x.view, r));
  check(try_quantize(fastest, x.view, r));
  check(try_quantize(fastest.on(threads), x.view, r));
  if (position != values.size()) {
    CHECK_THROWS_AS(quantize(fastest, x.view, r), tetromino::error);
    matrix<T> out(x.view.matrices, x.view.rows, x.view.cols);
    CHECK(!try_fake_quantize(fastest, x.view, r, out.view()));
  }
}

errc code_of(const recipe& r, const quantize_options& options) {
  const matrix<float> x(2, 3, 48);
  const auto packed = try_quantize(scalar, x, r, options);
  matrix<float> out(2, 3, 48);
  const auto round_trip = try_fake_quantize(scalar, x, r, out.view(), options);
  REQUIRE(!packed);
  REQUIRE(!round_trip);
  CHECK(packed.error().code() == round_trip.error().code());
  return packed.error().code();
}

}  // namespace

TEST_CASE("special values are refused by default, with the first one's place and kind") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : recipes_of_every_rule()) {
    for (int i = 0; i < 10; ++i) {
      expect_rejection<float>(r, random);
      expect_rejection<half>(r, random);
      expect_rejection<bfloat16>(r, random);
    }
  }
}

TEST_CASE("poisoned blocks and saturated values are packed as the oracle packs them") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : recipes_of_every_rule()) {
    for (int i = 0; i < 12; ++i) {
      for (const special_values special : {special_values::poison, special_values::saturate}) {
        compare_special_values<float>(r, special, random);
        compare_special_values<half>(r, special, random);
        compare_special_values<bfloat16>(r, special, random);
      }
    }
  }
}

TEST_CASE("a poisoned block decodes to NaN, its neighbours are untouched") {
  matrix<float> x(1, 100);
  for (std::size_t k = 0; k < 100; ++k) x(0, k) = 1.0f + static_cast<float>(k % 3);
  for (const recipe& r : recipes_of_every_rule()) {
    INFO(r.name());
    quantize_options options;
    options.special = special_values::poison;
    const matrix<float> clean = dequantize<float>(fastest, quantize(fastest, x, r, options));
    matrix<float> y = x;
    y(0, 97) = infinity;  // in the short last block
    y(0, 1) = not_a_number;
    const auto got = quantize(fastest, y, r, options);
    const matrix<float> back = dequantize<float>(fastest, got);
    for (std::size_t k = 0; k < 100; ++k) {
      const bool poisoned = k / r.format.block == 0 || k / r.format.block == 97 / r.format.block;
      CHECK(std::isnan(back(0, k)) == poisoned);
      const std::uint8_t pair = got.codes[k / 2];
      if (poisoned) CHECK(pair == 0);
      if (!poisoned && r.format.macro_block == 0) CHECK(back(0, k) == clean(0, k));
    }
  }
}

TEST_CASE("saturated infinities are the largest finite values of the input type") {
  quantize_options options;
  options.special = special_values::saturate;
  matrix<half> x(1, 32);
  x(0, 0) = number<half>(infinity);
  x(0, 1) = number<half>(-infinity);
  x(0, 2) = number<half>(not_a_number);
  const matrix<float> back =
      dequantize<float>(fastest, quantize(fastest, x, recipe::parse("mxfp4-32/round-up"), options));
  CHECK(back(0, 0) == 49152.0f);  // 6 · 2^13: under 2^14 the code of 65504 would decode to 65536, infinity as half
  CHECK(back(0, 1) == -49152.0f);
  CHECK(back(0, 2) == 0.0f);
}

TEST_CASE("a weight counts as often as the error it weighs") {
  reference::generator random(tetromino_test::seed());
  const sample<float> x(random, 2, 4, 96);
  const std::vector<float> ones(96, 1.0f);
  const std::vector<float> fours(96, 4.0f);
  for (const recipe& r : recipes_of_every_rule()) {
    INFO(r.name());
    quantize_options options;
    const auto plain = quantize(fastest, x.view, r, options);
    options.column_weights = ones;
    CHECK(quantize(fastest, x.view, r, options).scales == plain.scales);
    options.column_weights = fours;
    const auto weighted = quantize(fastest, x.view, r, options);
    CHECK(weighted.scales == plain.scales);
    CHECK(weighted.codes == plain.codes);
    CHECK(weighted.macros == plain.macros);
    options.column_weights = std::span<const float>(ones.data(), 0);  // no weights, though not a null pointer
    CHECK(quantize(fastest, x.view, r, options).codes == plain.codes);
  }
}

TEST_CASE("weights without a preference keep the larger scale, overflowing ones too") {
  reference::generator random(tetromino_test::seed());
  for (const recipe& r : recipes_of_every_rule()) {
    for (const float weight : {0.0f, 1e-45f, 1e30f, largest_float}) {
      sample<float> x(random, 1, 2, 80);
      x.fill([&] { return static_cast<float>(random.normal() * 1e3); });
      const std::vector<float> weights(80, weight);
      quantize_options options;
      options.column_weights = weights;
      INFO(r.name() << ", weight " << weight);
      const reference::packed expected =
          reference::quantize(tetromino_test::oracle_of(r, options, tetromino_test::largest_finite<float>()), 1, 2, 80,
                              x.values(), weights);
      REQUIRE(difference(expected, quantize(scalar, x.view, r, options)) == "");
      REQUIRE(difference(expected, quantize(fastest, x.view, r, options)) == "");
    }
  }
}

TEST_CASE("weights pull the scale to the columns that matter") {
  reference::generator random(tetromino_test::seed());
  for (const char* name : {"mxfp4-32/min-error", "mxfp4-32/oas/mbs-search", "nvfp4/min-error", "nvfp4/four-over-six"}) {
    INFO(name);
    sample<float> x(random, 1, 64, 128);
    x.fill([&] { return static_cast<float>(random.normal()); });
    std::vector<float> weights(128, 0.01f);
    for (std::size_t k = 0; k < 128; k += 16) weights[k] = 1.0f;
    const auto weighted_error = [&](const quantize_options& options) {
      const matrix<float> back = dequantize<float>(fastest, quantize(fastest, x.view, recipe::parse(name), options));
      double error = 0;
      for (std::size_t r = 0; r < 64; ++r) {
        for (std::size_t k = 0; k < 128; ++k) {
          const double e = static_cast<double>(back(r, k)) - static_cast<double>(x.view.row(0, r)[k]);
          error += static_cast<double>(weights[k]) * e * e;
        }
      }
      return error;
    };
    quantize_options options;
    const double plain = weighted_error(options);
    options.column_weights = weights;
    CHECK(weighted_error(options) < plain);
  }
}

TEST_CASE("given tensor scales, also those that are far off") {
  reference::generator random(tetromino_test::seed());
  for (const char* name : {"nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    const recipe r = recipe::parse(name);
    for (const float scale : {1e-45f, 1e-38f, 1e-10f, 1e-3f, 1.0f, 37.5f, 1e10f, 6e37f, 1e38f, largest_float}) {
      sample<float> x(random, 2, 2, 100);
      const std::array<float, 2> scales{scale, scale / 3};
      quantize_options options;
      options.tensor_scales = scales[1] > 0 ? std::span<const float>(scales) : std::span<const float>(scales.data(), 1);
      INFO(name << ", tensor scale " << scale);
      const reference::packed expected = reference::quantize(
          tetromino_test::oracle_of(r, options, tetromino_test::largest_finite<float>()), 2, 2, 100, x.values());
      REQUIRE(difference(expected, quantize(scalar, x.view, r, options)) == "");
      REQUIRE(difference(expected, quantize(fastest, x.view, r, options)) == "");
    }
  }
}

TEST_CASE("NVFP4 blocks at the bottom of the float range") {
  // Tensor scales are subnormal here, products with block scales may vanish.
  reference::generator random(tetromino_test::seed());
  for (const char* name : {"nvfp4/amax", "nvfp4/four-over-six", "nvfp4/min-error"}) {
    const recipe r = recipe::parse(name);
    for (int exponent = -149; exponent < -120; ++exponent) {
      for (int i = 0; i < 6; ++i) {
        sample<float> x(random, 1, 2, 64);
        std::size_t n = 0;
        x.fill([&] {
          const int e = n++ / 16 % 2 == 0 ? exponent : -149 + static_cast<int>(random.below(4));
          return std::ldexp(static_cast<float>(random.uniform()) * 2 - 1, e);
        });
        INFO(name << ", 2^" << exponent);
        const reference::packed expected = reference::quantize(
            tetromino_test::oracle_of(r, {}, tetromino_test::largest_finite<float>()), 1, 2, 64, x.values());
        REQUIRE(difference(expected, quantize(scalar, x.view, r)) == "");
        REQUIRE(difference(expected, quantize(fastest, x.view, r)) == "");
      }
    }
  }
}

TEST_CASE("options that do not fit are refused") {
  const recipe mx_recipe = recipe::parse("mxfp4-32/min-error");
  const recipe nv_recipe = recipe::parse("nvfp4/amax");
  quantize_options options;

  const std::vector<float> weights(47, 1.0f);
  options.column_weights = weights;
  CHECK(code_of(mx_recipe, options) == errc::shape_mismatch);
  for (const float bad : {-1.0f, -1e-45f, infinity, not_a_number}) {
    std::vector<float> with_bad(48, 1.0f);
    with_bad[13] = bad;
    options.column_weights = with_bad;
    CHECK(code_of(mx_recipe, options) == errc::invalid_argument);
    CHECK_THROWS_WITH(quantize(scalar, matrix<float>(1, 48), mx_recipe, options), contains("column_weights[13]"));
  }

  options = {};
  const std::array<float, 3> scales{1, 1, 1};
  options.tensor_scales = scales;
  CHECK(code_of(nv_recipe, options) == errc::shape_mismatch);
  options.tensor_scales = {scales.data(), 1};
  CHECK(code_of(mx_recipe, options) == errc::invalid_argument);
  for (const float bad : {0.0f, -1.0f, infinity, not_a_number}) {
    options.tensor_scales = {&bad, 1};
    CHECK(code_of(nv_recipe, options) == errc::invalid_argument);
  }

  // A rule of another format, and formats that are none.
  options = {};
  CHECK(code_of({mxfp4{}, scale_rule::amax, macro_rule::search}, options) == errc::invalid_argument);
  CHECK(code_of({nvfp4{}, scale_rule::floor, macro_rule::search}, options) == errc::invalid_argument);
  for (const any_format& format : {any_format{scale_type::e8m0, 0, 0}, any_format{scale_type::e8m0, 48, 0},
                                   any_format{scale_type::e8m0, 32, 16}, any_format{scale_type::e8m0, 32, 512}}) {
    CHECK(code_of({format, scale_rule::floor, macro_rule::search}, options) == errc::invalid_argument);
  }
  for (const any_format& format : {any_format{scale_type::e4m3, 32, 0}, any_format{scale_type::e4m3, 16, 128}}) {
    CHECK(code_of({format, scale_rule::amax, macro_rule::search}, options) == errc::invalid_argument);
  }
}

TEST_CASE("storage that does not fit is refused") {
  const matrix<float> x(2, 3, 48);
  quantize_options options;
  const auto code = [&](auto storage) {
    const auto done = try_quantize_to(scalar, x, storage.view(), options);
    REQUIRE(!done);
    return done.error().code();
  };
  CHECK(code(packed<mxfp4>({}, 2, 3, 47)) == errc::shape_mismatch);
  CHECK(code(packed<mxfp4>({}, 1, 3, 48)) == errc::shape_mismatch);
  packed<mbs<mxfp4>> broken({}, 2, 3, 48);
  broken.macros.pop_back();
  CHECK(code(broken) == errc::shape_mismatch);
  broken = packed<mbs<mxfp4>>({}, 2, 3, 48);
  broken.codes.push_back(0);
  CHECK(code(broken) == errc::shape_mismatch);
  packed<mxfp4> short_scales({}, 2, 3, 48);
  short_scales.scales.pop_back();
  CHECK(code(short_scales) == errc::shape_mismatch);
  const std::array<float, 2> two{1, 1};
  options.tensor_scales = two;
  CHECK(code(packed<nvfp4>({}, 2, 3, 48, 1)) == errc::shape_mismatch);
  options = {};
  packed<nvfp4> no_tensor_scale({}, 2, 3, 48, 0);
  CHECK(code(no_tensor_scale) == errc::shape_mismatch);
}

TEST_CASE("the default rules") {
  reference::generator random(tetromino_test::seed());
  const sample<float> x(random, 1, 3, 70);
  CHECK(quantize<mxfp4>(scalar, x.view).scales == quantize(scalar, x.view, recipe::parse("mxfp4-32/oas")).scales);
  CHECK(quantize<nvfp4>(scalar, x.view).scales == quantize(scalar, x.view, recipe::parse("nvfp4/amax")).scales);
  CHECK(quantize<nvfp4>(scalar, x.view).tensor_scales.size() == 1);
}

TEST_CASE("a recipe packs into storage of its format, and into no other") {
  using namespace tetromino;
  const std::vector<float> x(3 * 100, 1.25f);
  const matrix_view in(x.data(), 3, 100);
  const recipe r = recipe::parse("mxfp4-16/ceil/mbs-static@64/hadamard-16");
  packed<any_format> out(r.format, 1, 3, 100);
  quantize_to(scalar, in, r, out.view());
  const auto expected = quantize(scalar, in, r);
  CHECK(out.codes == expected.codes);
  CHECK(out.scales == expected.scales);
  CHECK(out.macros == expected.macros);
  packed<mxfp4_16> other({}, 1, 3, 100);
  CHECK(try_quantize_to(scalar, in, r, other.view()).error().code() == errc::invalid_argument);
}
