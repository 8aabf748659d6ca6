#include "check.hpp"

/// Activations in E4M3 of the scalar backend against their definition, in double arithmetic: every code, every tie.

#include <tetromino/dequantize.hpp>
#include <tetromino/e4m3_activations.hpp>
#include <tetromino/quantize.hpp>

#include "reference/generators.hpp"
#include "reference/numbers.hpp"
#include "support/oracle.hpp"

#include <cmath>   // std::nextafter, std::ldexp, std::nanf
#include <span>    // std::span
#include <string>  // std::string
#include <vector>  // std::vector

namespace {

using namespace tetromino;
using tetromino_test::contains;
using tetromino_test::number;
using tetromino_test::sample;
using tetromino_test::seed;
using tetromino_test::value_of;

/// A row as it must lie in memory.
struct expected_row {
  std::vector<std::uint8_t> bytes;
  float scale = 0;

  explicit expected_row(const std::vector<float>& x) : bytes((x.size() + 127) / 128 * 128) {
    double amax = 0;
    for (const float v : x) amax = std::max(amax, std::fabs(static_cast<double>(v)));
    if (amax < std::ldexp(1.0, -117)) return;
    // quotients and products of two floats, rounded to double and then to float, are rounded but once
    scale = static_cast<float>(amax / 448);
    const auto inverse = static_cast<double>(static_cast<float>(448 / amax));
    for (std::size_t k = 0; k < x.size(); ++k) {
      const auto y = static_cast<float>(static_cast<double>(x[k]) * inverse);
      bytes[k] = static_cast<std::uint8_t>(reference::e4m3_encode(y));
    }
  }
};

/// Rounds x, and looks at each byte and what lies around them.
template <class T>
void check(const batch_view<T>& x) {
  constexpr std::size_t margin = 32;
  const std::size_t rows = x.matrices * x.rows, stride = (x.cols + 127) / 128 * 128;
  std::vector<std::uint8_t> values(rows * stride + 2 * margin, 77);
  std::vector<float> scales(rows + 2 * margin, 77.0f);
  const e4m3_view<std::uint8_t> out{rows, x.cols, std::span(values).subspan(margin, rows * stride),
                                    std::span(scales).subspan(margin, rows)};
  REQUIRE(out.stride() == stride);
  quantize_e4m3_to(scalar, x, out);
  for (std::size_t r = 0; r < rows; ++r) {
    const T* const row = x.row(r / x.rows, r % x.rows);
    const expected_row expected(tetromino_test::values_of(std::span<const T>(row, x.cols)));
    INFO("row " << r << " of " << x.matrices << " x " << x.rows << " x " << x.cols << ", " << sizeof(T) << " bytes");
    const auto bytes = out.values.subspan(r * stride, stride);
    CHECK(std::vector<std::uint8_t>(bytes.begin(), bytes.end()) == expected.bytes);
    CHECK(out.scales[r] == expected.scale);
  }
  for (std::size_t i = 0; i < margin; ++i) {
    CHECK((values[i] == 77 && values[values.size() - 1 - i] == 77));
    CHECK((scales[i] == 77.0f && scales[scales.size() - 1 - i] == 77.0f));
  }
}
template <class T>
void check_one(const std::vector<T>& x) {
  check(batch_view<const T>(x.data(), 1, 1, x.size()));
}

std::string message(const result<void>& done, errc expected = errc::shape_mismatch) {
  REQUIRE_FALSE(done);
  CHECK(done.error().code() == expected);
  return done.error().what();
}

/// Every number of 16 bits up to `most`, in one row.
template <class T>
void every_number(float most) {
  std::vector<T> x;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T v = T::from_bits(static_cast<std::uint16_t>(bits));
    if (std::fabs(value_of(v)) <= most) x.push_back(v);
  }
  INFO("up to " << most);
  check_one(x);
}

}  // namespace

TEST_CASE("e4m3 activations: every half and bfloat16 below an amax") {
  for (const float amax : {448.0f, 1.0f, 3.0f, 0x1p-14f, 1000.0f, 65504.0f}) {
    every_number<half>(amax);
    every_number<bfloat16>(amax);
  }
  every_number<bfloat16>(0x1.FEp127f);
  every_number<bfloat16>(0x1p-117f);
}

TEST_CASE("e4m3 activations: floats around every tie between codes") {
  std::vector<float> amaxes = {448.0f, 0x1.FFFFFEp127f, 1.0f, 3.0f, 0x1p-117f, 447.99997f};
  reference::generator random(seed());
  for (int i = 0; i < 30; ++i) {
    amaxes.push_back(std::ldexp(static_cast<float>(random.uniform()) + 1, static_cast<int>(random.below(240)) - 116));
  }
  const std::vector<double>& table = reference::e4m3_table();
  for (const float amax : amaxes) {
    std::vector<float> x{-amax};
    for (std::size_t code = 0; code < table.size(); ++code) {
      for (const double y : {table[code], (table[code] + table[std::min(code + 1, table.size() - 1)]) / 2}) {
        auto v = static_cast<float>(y * static_cast<double>(amax) / 448);
        for (int i = 0; i < 4; ++i) v = std::nextafter(v, 0.0f);
        for (int i = 0; i < 9; ++i, v = std::nextafter(v, HUGE_VALF)) {
          x.push_back(std::min(v, amax));
          x.push_back(-x.back());
        }
      }
    }
    INFO("amax " << amax);
    check_one(x);
  }
}

TEST_CASE("e4m3 activations: every width to past two stages, strides, batches") {
  reference::generator random(seed());
  for (std::size_t cols = 0; cols <= 300; ++cols) {
    const std::size_t matrices = 1 + random.below(2), rows = random.below(4);
    check(sample<float>(random, matrices, rows, cols).view);
    check(sample<half>(random, matrices, rows, cols).view);
    check(sample<bfloat16>(random, matrices, rows, cols).view);
  }
}

TEST_CASE("e4m3 activations: rows of zeros, of the least and of the largest magnitudes") {
  const float edge = 0x1p-117f;
  for (const float amax : {0.0f, -0.0f, 0x1p-149f, 0x1p-126f, std::nextafter(edge, 0.0f), -std::nextafter(edge, 0.0f),
                           edge, std::nextafter(edge, 1.0f), 0x1.FFFFFEp127f}) {
    INFO("amax " << amax);
    check_one(std::vector<float>{amax, -0.0f, amax / 2, -amax / 3, 0x1p-149f > std::fabs(amax) ? 0.0f : 0x1p-149f});
  }
  const e4m3_matrix zeros = quantize_e4m3(scalar, matrix<float>(3, 200));
  CHECK(zeros.values == std::vector<std::uint8_t>(3 * 256));
  CHECK(zeros.scales == std::vector<float>(3));
  float scale = 7;
  quantize_e4m3_to(scalar, matrix<float>(1, 0), e4m3_view<std::uint8_t>{1, 0, {}, std::span(&scale, 1)});
  CHECK(scale == 0.0f);
}

TEST_CASE("e4m3 activations: the first value that is not finite is an error that names its place") {
  for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    std::vector<float> x(3 * 40, 1.0f);
    x[2 * 40 + 33] = bad;
    const auto refused = try_quantize_e4m3(scalar, matrix_view<const float>(x.data(), 3, 40));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code() == errc::non_finite);
    CHECK_THAT(refused.error().what(), contains("row 2, column 33"));
    x[1 * 40 + 39] = x[2 * 40] = bad;
    e4m3_matrix out(3, 40);
    const batch_view<const float> batch(x.data(), 3, 1, 40);
    CHECK_THAT(message(try_quantize_e4m3_to(scalar, batch, out.view()), errc::non_finite),
               contains("row 1, column 39"));
    CHECK_THROWS_AS(quantize_e4m3(scalar, batch), error);
  }
  const std::vector<half> infinite(200, number<half>(HUGE_VALF));
  e4m3_matrix out(1, 200);
  CHECK_THAT(message(try_quantize_e4m3_to(scalar, matrix_view<const half>(infinite.data(), 1, 200), out.view()),
                     errc::non_finite),
             contains("row 0, column 0"));
}

TEST_CASE("e4m3 activations: storage of another shape is an error that says what was expected") {
  const matrix<float> x(3, 130);
  e4m3_matrix out(3, 130);
  CHECK(out.values.size() == 3 * 256);
  CHECK(try_quantize_e4m3_to(scalar, x, out.view()));
  const auto refused = [&](const e4m3_view<std::uint8_t>& view) {
    return message(try_quantize_e4m3_to(scalar, x, view));
  };
  auto view = out.view();
  view.values = view.values.first(3 * 130);
  CHECK_THAT(refused(view), contains("e4m3 activations: values need 768 entries, got 390"));
  view = out.view(), view.scales = view.scales.first(2);
  CHECK_THAT(refused(view), contains("e4m3 activations: scales need 3 entries, got 2"));
  e4m3_matrix other(2, 130), narrow(3, 129);
  CHECK_THAT(refused(other.view()), contains("the input is [3, 130]") && contains("the e4m3 activations are [2, 130]"));
  CHECK_THAT(refused(narrow.view()), contains("[3, 129]"));
}

TEST_CASE("e4m3 activations: views that only read") {
  e4m3_matrix x(2, 128);
  CHECK(x.view().stride() == 128);
  const e4m3_view<> read_only = x.view();
  CHECK(read_only.values.data() == x.values.data());
  CHECK(read_only.scales.data() == x.scales.data());
}

namespace {

/// x[rows, cols] rounded to E4M3 with one scale for each `span` columns.
std::vector<double> rounded_by(const std::vector<float>& x, std::size_t span) {
  std::vector<double> out;
  for (std::size_t first = 0; first < x.size(); first += span) {
    const e4m3_matrix part = quantize_e4m3(scalar, matrix_view<const float>(x.data() + first, 1, span));
    for (std::size_t k = 0; k < span; ++k) {
      out.push_back(reference::e4m3_value(part.values[k]) * static_cast<double>(part.scales[0]));
    }
  }
  return out;
}
std::vector<double> as_doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }

/// The products of all rows of x and of w.
std::vector<double> products(const std::vector<double>& x, const std::vector<double>& w, std::size_t cols) {
  std::vector<double> out;
  for (std::size_t m = 0; m < x.size(); m += cols) {
    for (std::size_t n = 0; n < w.size(); n += cols) {
      double sum = 0;
      for (std::size_t k = 0; k < cols; ++k) sum += x[m + k] * w[n + k];
      out.push_back(sum);
    }
  }
  return out;
}
double relative_error(const std::vector<double>& got, const std::vector<double>& expected) {
  double errors = 0, squares = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    errors += (got[i] - expected[i]) * (got[i] - expected[i]), squares += expected[i] * expected[i];
  }
  return std::sqrt(errors / squares);
}

}  // namespace

TEST_CASE("e4m3 activations: beside packed weights, one scale for a row is as good as one for 128 columns") {
  const std::size_t rows = 16, outputs = 48, cols = 4096;
  const std::vector<float> w = reference::normal_sample(seed() + 1, outputs * cols);
  const matrix_view<const float> weights(w.data(), outputs, cols);
  for (const float outlier : {1.0f, 30.0f, 1000.0f}) {
    std::vector<float> x = reference::normal_sample(seed(), rows * cols);
    reference::generator random(seed());
    for (int channel = 0; channel < 41; ++channel) {  // one of a hundred
      for (std::size_t m = 0, k = random.below(cols); m < rows; ++m) x[m * cols + k] *= outlier;
    }
    const std::vector<double> expected = products(as_doubles(x), as_doubles(w), cols);
    const auto errors = [&](const std::vector<double>& of) {
      return std::array{relative_error(products(rounded_by(x, cols), of, cols), expected),
                        relative_error(products(rounded_by(x, 128), of, cols), expected),
                        relative_error(products(as_doubles(x), of, cols), expected)};
    };
    const auto exact = errors(as_doubles(w));
    INFO("outliers x " << outlier << ", exact weights: " << exact[0] << ", by 128 columns " << exact[1]);
    CHECK(exact[0] < 0.03);  // what rounding to three bits costs, outliers or not
    for (const char* name : {"mxfp4-32/floor", "nvfp4/min-error"}) {
      const auto packed = errors(as_doubles(dequantize<float>(scalar, quantize(scalar, weights, name)).data));
      INFO(name << ": " << packed[0] << ", by 128 columns " << packed[1] << ", exact activations " << packed[2]);
      CHECK(packed[0] < 1.06 * packed[1]);
    }
  }
}
