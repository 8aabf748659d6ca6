#include "check.hpp"

#include <tetromino/dequantize.hpp>
#include <tetromino/hadamard.hpp>
#include <tetromino/metrics.hpp>
#include <tetromino/quantize.hpp>

#include "support/fastest.hpp"

#include <cmath>
#include <random>

using namespace tetromino;
using tetromino_test::fastest;

namespace {

matrix<float> gaussian(std::size_t rows, std::size_t cols) {
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  matrix<float> x(rows, cols);
  for (float& v : x.data) v = normal(random);
  return x;
}

int bit_count(std::size_t n) { return n == 0 ? 0 : static_cast<int>(n & 1) + bit_count(n >> 1); }

}  // namespace

TEST_CASE("a rotation is the product with the Hadamard matrix of its size") {
  const matrix<float> x = gaussian(3, 300);
  for (const std::size_t size : {16u, 32u, 64u, 128u}) {
    CAPTURE(size);
    matrix<float> y(3, 300);
    rotate(scalar, x, {size}, y.view());
    for (std::size_t r = 0; r < x.rows; ++r) {
      for (std::size_t k = 0; k < x.cols; ++k) {
        const std::size_t block = k / size * size;
        double expected = static_cast<double>(x(r, k));  // a tail stays as it is
        if (block + size <= x.cols) {
          expected = 0;
          for (std::size_t i = 0; i < size; ++i) {  // H[i, j] = (-1)^(number of ones that i and j share)
            const double v = static_cast<double>(x(r, block + i));
            expected += bit_count(i & (k - block)) % 2 == 0 ? v : -v;
          }
          expected /= std::sqrt(static_cast<double>(size));
        }
        REQUIRE(std::abs(static_cast<double>(y(r, k)) - expected) < 1e-5);
      }
    }
  }
}

TEST_CASE("signs come from the seed, and the inverse takes everything back") {
  const matrix<float> x = gaussian(2, 256);
  matrix<float> plain(2, 256), signed_(2, 256), other(2, 256), back(2, 256);
  rotate(scalar, x, {64}, plain.view());
  rotate(scalar, x, {64, 1}, signed_.view());
  rotate(scalar, x, {64, 2}, other.view());
  CHECK(plain.data != signed_.data);
  CHECK(signed_.data != other.data);
  rotate_back(scalar, signed_, {64, 1}, back.view());
  CHECK(compare(x, back).relative_error() < 1e-6);
  rotate_back(scalar, signed_, {64, 2}, back.view());
  CHECK(compare(x, back).relative_error() > 0.1);
}

TEST_CASE("products of rotated weights and activations are what they were") {
  const matrix<float> x = gaussian(1, 512);
  matrix<float> w = x;
  std::reverse(w.data.begin(), w.data.end());
  const auto product = [](const matrix<float>& a, const matrix<float>& b) {
    double sum = 0;
    for (std::size_t k = 0; k < a.cols; ++k) sum += static_cast<double>(a(0, k)) * static_cast<double>(b(0, k));
    return sum;
  };
  matrix<float> xr(1, 512), wr(1, 512);
  rotate(scalar, x, {32, 5}, xr.view());
  rotate(scalar, w, {32, 5}, wr.view());
  CHECK(std::abs(product(x, w) - product(xr, wr)) < 1e-3);
}

TEST_CASE("packing with a rotation is rotating, then packing") {
  for (const std::size_t cols : {1u, 16u, 100u, 2048u, 2049u, 5000u}) {
    const matrix<float> x = gaussian(3, cols);
    for (const char* name : {"mxfp4-32/oas", "mxfp4-16/min-error/mbs-search@64", "nvfp4/four-over-six"}) {
      CAPTURE(cols, name);
      const recipe plain = recipe::parse(name), rotated = recipe::parse(std::string(name) + "/hadamard-64");
      matrix<float> first(3, cols), round_trip(3, cols);
      rotate(scalar, x, {64}, first.view());
      const auto expected = quantize(scalar, first, plain);
      const auto got = quantize(scalar, x, rotated);
      CHECK(got.codes == expected.codes);
      CHECK(got.scales == expected.scales);
      CHECK(got.macros == expected.macros);
      CHECK(got.tensor_scales == expected.tensor_scales);
      CHECK(quantize(fastest, x, rotated).codes == expected.codes);

      auto back = dequantize<float>(scalar, expected);
      rotate_back(scalar, back, {64}, back.view());
      fake_quantize(scalar, x, rotated, round_trip.view());
      CHECK(round_trip.data == back.data);
    }
  }
}

TEST_CASE("rows longer than the pieces they are packed in: rotated in one pass as in two, with signs") {
  const matrix<float> x = gaussian(2, 4096 + 200);
  const hadamard rotation{32, 7};
  matrix<float> rotated(2, 4096 + 200);
  rotate(scalar, x, rotation, rotated.view());
  const auto expected = quantize<mxfp4>(scalar, rotated);
  const auto got = quantize<mxfp4>(scalar, x, {.rotation = rotation});
  CHECK(got.codes == expected.codes);
  CHECK(got.scales == expected.scales);
}

TEST_CASE("special values under a rotation") {
  matrix<float> x = gaussian(2, 128);
  x(1, 70) = INFINITY;
  const recipe r = recipe::parse("mxfp4-32/oas/hadamard-64");
  CHECK_THAT(std::string(try_quantize(scalar, x, r).error().what()),
             tetromino_test::contains("+infinity at row 1, column 70"));

  const auto poisoned = dequantize<float>(scalar, quantize(scalar, x, r, {.special = special_values::poison}));
  CHECK(std::isfinite(poisoned(1, 63)));
  CHECK(std::isnan(poisoned(1, 64)));
  CHECK(std::isnan(poisoned(1, 127)));

  matrix<float> large = gaussian(2, 128);
  for (std::size_t k = 64; k < 128; ++k) large(1, k) = 0x1p127f;
  matrix<float> out = large;
  const char* const overflows = "one that overflows when rotated at row 1, column 64";
  CHECK_THAT(std::string(try_quantize(scalar, large, r).error().what()), tetromino_test::contains(overflows));
  CHECK_THAT(std::string(try_quantize(fastest, large, r).error().what()), tetromino_test::contains(overflows));
  CHECK_THAT(std::string(try_fake_quantize(fastest, large, r, out.view()).error().what()),
             tetromino_test::contains(overflows));
  CHECK(std::isnan(dequantize<float>(scalar, quantize(scalar, large, r, {.special = special_values::poison}))(1, 64)));

  x(1, 70) = NAN;
  matrix<float> zeroed = x;
  zeroed(1, 70) = 0.0f;
  CHECK(quantize(scalar, x, r, {.special = special_values::saturate}).codes == quantize(scalar, zeroed, r).codes);
}

TEST_CASE("other sizes are refused") {
  const matrix<float> x(1, 64);
  matrix<float> y(1, 64);
  CHECK(try_rotate(scalar, x, {48}, y.view()).error().what() ==
        std::string("expected a Hadamard rotation of 16, 32, 64 or 128, got 48"));
  CHECK(try_quantize<mxfp4>(scalar, x, {.rotation = hadamard{8}}).error().code() == errc::invalid_argument);
  CHECK(
      try_quantize(scalar, x, recipe::parse("nvfp4/amax/hadamard-16"), {.rotation = hadamard{32, 1}}).error().code() ==
      errc::invalid_argument);
  matrix<float> other(1, 32);
  CHECK(try_rotate(scalar, x, {32}, other.view()).error().code() == errc::shape_mismatch);
}
