#include "check.hpp"

#include <tetromino/metrics.hpp>

#include "reference/metrics.hpp"
#include "support/oracle.hpp"

#include <cmath>    // std::fabs, std::sqrt, std::isnan, std::isinf
#include <cstddef>  // std::size_t
#include <limits>   // std::numeric_limits
#include <vector>   // std::vector

namespace {

using namespace tetromino;

bool close(double a, double b) { return std::fabs(a - b) <= 1e-12 * std::fabs(b); }

}  // namespace

TEST_CASE("the error report is what its definitions say, for any element types and strides") {
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 100; ++i) {
    const std::size_t matrices = 1 + random.below(3), rows = 1 + random.below(4), cols = 1 + random.below(200);
    tetromino_test::sample<float> x(random, matrices, rows, cols);
    tetromino_test::sample<bfloat16> y(random, matrices, rows, cols);
    x.fill([&] { return static_cast<float>(random.normal()); });
    y.fill([&] { return tetromino_test::number<bfloat16>(static_cast<float>(random.normal())); });
    const std::vector<float> a = x.values();
    const std::vector<float> b = y.values();
    long double squares = 0, squared_errors = 0, abs_errors = 0, largest = 0;
    for (std::size_t k = 0; k < a.size(); ++k) {
      const long double e = std::fabs(static_cast<long double>(a[k]) - static_cast<long double>(b[k]));
      squares += static_cast<long double>(a[k]) * static_cast<long double>(a[k]);
      squared_errors += e * e;
      abs_errors += e;
      largest = std::max(largest, e);
    }
    const auto n = static_cast<long double>(a.size());
    const error_report report = compare(x.view, y.view);
    CHECK(report.count == a.size());
    CHECK(close(report.sum_squares, static_cast<double>(squares)));
    CHECK(close(report.sum_squared_errors, static_cast<double>(squared_errors)));
    CHECK(close(report.sum_abs_errors, static_cast<double>(abs_errors)));
    CHECK(report.max_abs_error == static_cast<double>(largest));
    CHECK(close(report.mse(), static_cast<double>(squared_errors / n)));
    CHECK(close(report.mae(), static_cast<double>(abs_errors / n)));
    CHECK(close(report.relative_error(), static_cast<double>(std::sqrt(squared_errors / squares))));
    CHECK(std::fabs(report.qsnr() - reference::qsnr(a, b)) < 1e-9);
    CHECK(qsnr(x.view, y.view) == report.qsnr());
  }
}

TEST_CASE("reports of parts join to the report of the whole") {
  reference::generator random(tetromino_test::seed());
  const tetromino_test::sample<half> x(random, 3, 4, 50);
  const tetromino_test::sample<half> y(random, 3, 4, 50);
  error_report joined;
  for (std::size_t e = 0; e < 3; ++e) joined.add(compare(x.view[e], y.view[e]));
  const error_report whole = compare(x.view, y.view);
  CHECK(joined.count == whole.count);
  CHECK(close(joined.sum_squares, whole.sum_squares));
  CHECK(close(joined.sum_squared_errors, whole.sum_squared_errors));
  CHECK(close(joined.sum_abs_errors, whole.sum_abs_errors));
  CHECK(joined.max_abs_error == whole.max_abs_error);
}

TEST_CASE("no error, no signal, nothing at all") {
  matrix<float> x(2, 3);
  const matrix<float> zeros(2, 3);
  x(1, 1) = 2.0f;
  CHECK(compare(x, x).qsnr() == std::numeric_limits<double>::infinity());
  CHECK(compare(x, x).relative_error() == 0);
  CHECK(compare(zeros, zeros).qsnr() == std::numeric_limits<double>::infinity());
  CHECK(compare(zeros, x).qsnr() == -std::numeric_limits<double>::infinity());
  CHECK(compare(x, zeros).qsnr() == 0);
  const error_report none = compare(matrix<float>(0, 3), matrix<float>(0, 3));
  CHECK(none.count == 0);
  CHECK(none.mse() == 0);
  CHECK(none.mae() == 0);
}

TEST_CASE("a NaN anywhere shows in every figure") {
  for (const std::size_t where : {0u, 4u, 11u}) {
    matrix<float> x(3, 4);
    matrix<float> y(3, 4);
    for (float& v : x.data) v = 1;
    y.data[where] = std::numeric_limits<float>::quiet_NaN();
    const error_report report = compare(x, y);
    INFO("at " << where);
    CHECK(std::isnan(report.qsnr()));
    CHECK(std::isnan(report.mse()));
    CHECK(std::isnan(report.mae()));
    CHECK(std::isnan(report.relative_error()));
    CHECK(std::isnan(report.max_abs_error));
  }
}

TEST_CASE("matrices of other shapes cannot be compared") {
  const auto report = try_compare(matrix<float>(2, 3), matrix<half>(3, 2));
  REQUIRE(!report);
  CHECK(report.error().code() == errc::shape_mismatch);
  CHECK_THROWS_WITH(compare(matrix<float>(2, 3), matrix<float>(2, 4)), tetromino_test::contains("[1, 2, 4]"));
}
