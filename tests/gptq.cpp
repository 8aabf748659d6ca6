#include "check.hpp"

#include <tetromino/dequantize.hpp>
#include <tetromino/gptq.hpp>
#include <tetromino/thread_executor.hpp>

#include <Eigen/Dense>

#include <algorithm>  // std::copy_n, std::sort
#include <cmath>      // std::isnan, std::fabs
#include <limits>     // std::numeric_limits
#include <numeric>    // std::iota
#include <random>     // std::mt19937_64
#include <string>     // std::string
#include <vector>     // std::vector

using namespace tetromino;

namespace {

/// Correlated activations: a few hidden causes and noise.
matrix<float> activations(std::mt19937_64& random, std::size_t rows, std::size_t cols) {
  std::normal_distribution<float> normal;
  const std::size_t causes = 8;
  matrix<float> mix(causes, cols), x(rows, cols);
  for (float& v : mix.data) v = normal(random);
  for (std::size_t r = 0; r < rows; ++r) {
    float cause[causes];
    for (float& c : cause) c = normal(random);
    for (std::size_t k = 0; k < cols; ++k) {
      x(r, k) = 0.3f * normal(random);
      for (std::size_t c = 0; c < causes; ++c) x(r, k) += cause[c] * mix(c, k);
    }
  }
  return x;
}

matrix<float> gaussian(std::mt19937_64& random, std::size_t rows, std::size_t cols) {
  std::normal_distribution<float> normal;
  matrix<float> w(rows, cols);
  for (float& v : w.data) v = normal(random);
  return w;
}

matrix_view<const float> view(const matrix<float>& m) { return {m.data.data(), m.rows, m.cols}; }

/// Squared error of the products x w^T.
double product_error(const matrix<float>& x, const matrix<float>& w, const matrix<float>& q) {
  const eigen_matrix<float> difference = eigen_map(view(w)) - eigen_map(view(q));
  return (eigen_map(view(x)) * difference.transpose()).cast<double>().squaredNorm();
}

calibration seen_in(const matrix<float>& x) {
  calibration seen(x.cols);
  seen.add(view(x));
  return seen;
}
calibration seen_in(const matrix<float>& x, const matrix<float>& met) {
  calibration seen(x.cols);
  seen.add(view(x), view(met));
  return seen;
}

/// What reaches a layer from packed layers before it: the activations mixed, shrunk and with noise.
matrix<float> drifted(std::mt19937_64& random, const matrix<float>& x) {
  std::normal_distribution<float> normal;
  matrix<float> mix(x.cols, x.cols), out(x.rows, x.cols);
  for (float& v : mix.data) v = 0.2f * normal(random) / std::sqrt(static_cast<float>(x.cols));
  for (std::size_t k = 0; k < x.cols; ++k) mix(k, k) += 0.9f;
  eigen_map(matrix_view<float>(out.data.data(), out.rows, out.cols)) = eigen_map(view(x)) * eigen_map(view(mix));
  for (float& v : out.data) v += 0.1f * normal(random);
  return out;
}

/// Squared error of the products met q^T, which should be x w^T.
double stream_error(const matrix<float>& x, const matrix<float>& met, const matrix<float>& w, const matrix<float>& q) {
  const Eigen::MatrixXd owed = eigen_map(view(x)).cast<double>() * eigen_map(view(w)).cast<double>().transpose();
  return (owed - eigen_map(view(met)).cast<double>() * eigen_map(view(q)).cast<double>().transpose()).squaredNorm();
}

/// The weights q of the least |x w^T - met q^T|^2 + damping · mean square column · |q - w|^2, by a decomposition of the
/// rows themselves, without their moments.
Eigen::MatrixXd least_squares(const matrix<float>& x, const matrix<float>& met, const matrix<float>& w,
                              double damping) {
  const Eigen::MatrixXd weights = eigen_map(view(w)).cast<double>(), rows = eigen_map(view(met)).cast<double>();
  const Eigen::Index n = rows.rows(), cols = rows.cols();
  const double ridge = std::sqrt(damping * rows.squaredNorm() / static_cast<double>(cols));
  Eigen::MatrixXd all(n + cols, cols), owed(n + cols, weights.rows());
  all << rows, ridge * Eigen::MatrixXd::Identity(cols, cols);
  owed << eigen_map(view(x)).cast<double>() * weights.transpose(), ridge * weights.transpose();
  return all.colPivHouseholderQr().solve(owed).transpose();
}

/// GPTQ in the textbook's words: the explicit inverse, one column at a time in the order given, scales given by the
/// library's packing.
matrix<float> textbook(const matrix<float>& w, const calibration& seen, double damping,
                       const packed<any_format>& scales, const std::vector<Eigen::Index>& order) {
  Eigen::MatrixXd h = seen.moments().selfadjointView<Eigen::Lower>();
  h.diagonal().array() += damping * h.diagonal().mean();
  Eigen::MatrixXd inverse = h.inverse(), weights = eigen_map(view(w)).cast<double>();
  matrix<float> out(w.rows, w.cols);
  for (const Eigen::Index j : order) {
    for (Eigen::Index i = 0; i < weights.rows(); ++i) {
      const auto scale = detail::scale_at(scales, static_cast<std::size_t>(i), static_cast<std::size_t>(j));
      const float q = scale.decode(scale.encode(static_cast<float>(weights(i, j))));
      out(static_cast<std::size_t>(i), static_cast<std::size_t>(j)) = q;
      weights.row(i) -= (weights(i, j) - static_cast<double>(q)) / inverse(j, j) * inverse.row(j);
    }
    const Eigen::VectorXd column = inverse.col(j);
    inverse -= column * column.transpose() / column(j);
  }
  return out;
}

}  // namespace

TEST_CASE("without correlations feedback changes nothing") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> w = gaussian(random, 69, 200);
  const calibration nothing(w.cols);
  std::vector<float> weights(w.cols);
  for (float& v : weights) v = std::uniform_real_distribution<float>(0.1f, 10)(random);
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/min-error/mbs-search@64", "mxfp4-32/min-error/mbs-search@16x2",
                           "mxfp4-32/oas/mbs-static@8x2", "nvfp4/four-over-six"}) {
    CAPTURE(name);
    recipe r = recipe::parse(name);
    const auto plain = quantize(scalar, w, r, {.column_weights = weights});
    r.error_feedback = true;
    for (const gptq_scales scales : {gptq_scales::fixed, gptq_scales::refreshed}) {
      const auto fed = gptq(scalar, view(w), r, nothing, {.column_weights = weights}, {.scales = scales});
      CHECK(fed.codes == plain.codes);
      CHECK(fed.scales == plain.scales);
      CHECK(fed.macros == plain.macros);
      CHECK(fed.tensor_scales == plain.tensor_scales);
    }
  }
}

TEST_CASE("fixed scales give the codes of the textbook's algorithm") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 600, 160), w = gaussian(random, 12, 160);
  const calibration seen = seen_in(x);
  const std::vector<float> ones(w.cols, 1.0f);
  const recipe r = recipe::parse("mxfp4-32/oas/mbs-search/gptq");
  std::vector<Eigen::Index> order(w.cols);
  std::iota(order.begin(), order.end(), Eigen::Index{0});
  for (const bool by_activation : {false, true}) {
    if (by_activation) {  // the columns that are largest on average first
      const Eigen::VectorXf squares = eigen_map(view(x)).colwise().squaredNorm();
      std::sort(order.begin(), order.end(), [&](Eigen::Index a, Eigen::Index b) { return squares(a) > squares(b); });
    }
    const auto fed = gptq(scalar, view(w), r, seen, {.column_weights = ones},
                          {.scales = gptq_scales::fixed, .by_activation = by_activation});
    const matrix<float> expected = textbook(w, seen, 0.01, fed, order);
    const matrix<float> got = dequantize<float>(scalar, fed);
    std::size_t different = 0;
    for (std::size_t i = 0; i < got.data.size(); ++i) different += got.data[i] != expected.data[i];
    CHECK(different < got.data.size() / 100);  // ties that float and double break differently, and what follows
    CHECK(product_error(x, w, got) < 1.05 * product_error(x, w, expected));
  }
}

TEST_CASE("feedback lowers the error of products, on other activations too") {
  std::mt19937_64 random(tetromino_test::seed());
  matrix<float> all = activations(random, 1200, 256);
  matrix<float> x(600, 256), held_out(600, 256);
  std::copy_n(all.data.begin(), x.data.size(), x.data.begin());
  std::copy_n(all.data.begin() + static_cast<std::ptrdiff_t>(x.data.size()), x.data.size(), held_out.data.begin());
  const matrix<float> w = gaussian(random, 32, 256);
  const calibration seen = seen_in(x);
  for (const char* name : {"mxfp4-32/oas", "mxfp4-16/oas/mbs-search", "mxfp4-32/min-error/mbs-search@8x2", "nvfp4/amax",
                           "mxfp4-16/oas/hadamard-32"}) {
    CAPTURE(name);
    recipe r = recipe::parse(name);
    matrix<float> reference = w, judged = held_out;
    if (r.rotation != 0) {
      rotate(scalar, held_out, {r.rotation}, judged.view());
      rotate(scalar, w, {r.rotation}, reference.view());
    }
    const double plain = product_error(judged, reference, dequantize<float>(scalar, quantize(scalar, w, r)));
    r.error_feedback = true;
    const double fixed =
        product_error(judged, reference,
                      dequantize<float>(scalar, gptq(scalar, view(w), r, seen, {}, {.scales = gptq_scales::fixed})));
    const double ordered = product_error(
        judged, reference,
        dequantize<float>(scalar,
                          gptq(scalar, view(w), r, seen, {}, {.scales = gptq_scales::fixed, .by_activation = true})));
    const double refreshed =
        product_error(judged, reference, dequantize<float>(scalar, gptq(scalar, view(w), r, seen)));
    CHECK(fixed < 0.6 * plain);
    CHECK(ordered < 0.6 * plain);
    CHECK(refreshed < 0.6 * plain);
  }
}

TEST_CASE("the same bytes on every executor, and for ragged columns") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 300, 150), w = gaussian(random, 270, 150);
  const recipe r = recipe::parse("mxfp4-32/min-error/mbs-search@64/gptq");
  const thread_executor threads(4);
  for (const calibration& seen : {seen_in(x), seen_in(x, drifted(random, x))}) {
    const auto alone = gptq(scalar, view(w), r, seen), together = gptq(scalar.on(threads), view(w), r, seen);
    CHECK(alone.codes == together.codes);
    CHECK(alone.scales == together.scales);
    CHECK(alone.macros == together.macros);
  }
}

TEST_CASE("an expert that few tokens reach borrows its layer's moments") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 1000, 64);
  matrix<float> few(3, 64);
  std::copy_n(x.data.begin(), few.data.size(), few.data.begin());
  const calibration layer = seen_in(x), expert = seen_in(few);
  const matrix<float> w = gaussian(random, 16, 64);
  const recipe r = recipe::parse("mxfp4-32/oas/gptq");
  const auto error_with = [&](const calibration& seen) {
    return product_error(x, w, dequantize<float>(scalar, gptq(scalar, view(w), r, seen)));
  };
  const calibration blended = expert.blended(layer, 64);
  CHECK(blended.rows() == 67);
  const Eigen::MatrixXd sum = expert.moments() + layer.moments() * (64.0 / 1000);  // as of 64 rows of the layer
  CHECK((blended.moments() - sum).norm() < 1e-9 * sum.norm());
  CHECK(error_with(blended) < error_with(expert));
}

TEST_CASE("moments after a rotation are those of rotated activations") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 50, 300);  // two pieces and a tail that stays
  for (const hadamard& rotation : {hadamard{32}, hadamard{128, 5}}) {
    matrix<float> y = x;
    rotate(scalar, x, rotation, y.view());
    const calibration expected = seen_in(y), got = seen_in(x).rotated(rotation);
    CHECK(got.rows() == 50);
    const Eigen::MatrixXd a = expected.moments().selfadjointView<Eigen::Lower>();
    const Eigen::MatrixXd b = got.moments().selfadjointView<Eigen::Lower>();
    CHECK((a - b).norm() < 1e-5 * a.norm());
  }
}

TEST_CASE("two streams: weights move to where the rows that they meet give the products of the float model") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 700, 130), met = drifted(random, x), w = gaussian(random, 150, 130);
  const calibration seen = seen_in(x, met);
  for (const double damping : {0.001, 0.01, 1.0}) {
    CAPTURE(damping);
    matrix<float> moved = w;
    detail::correct_weights(scalar, seen, damping, moved);
    const Eigen::MatrixXd expected = least_squares(x, met, w, damping);
    CHECK((eigen_map(view(moved)).cast<double>() - expected).norm() < 1e-5 * expected.norm());
  }
}

TEST_CASE("two streams: the bytes are those of the moved weights in one stream") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 500, 128), met = drifted(random, x), w = gaussian(random, 9, 128);
  matrix<float> moved(w.rows, w.cols);
  eigen_map(matrix_view<float>(moved.data.data(), moved.rows, moved.cols)) =
      least_squares(x, met, w, 0.3).cast<float>();
  for (const char* name : {"mxfp4-32/oas/gptq", "mxfp4-16/min-error/mbs-search@32/gptq", "nvfp4/min-error/gptq"}) {
    CAPTURE(name);
    const recipe r = recipe::parse(name);
    const auto got = dequantize<float>(scalar, gptq(scalar, view(w), r, seen_in(x, met)));
    const auto expected = dequantize<float>(scalar, gptq(scalar, view(moved), r, seen_in(met)));
    std::size_t different = 0;
    for (std::size_t i = 0; i < got.data.size(); ++i) {
      different += std::fabs(got.data[i] - expected.data[i]) > 1e-5f * std::fabs(expected.data[i]);
    }
    CHECK(different < got.data.size() / 20);  // ties that the last bit of a float breaks, and what follows them
    CHECK(stream_error(x, met, w, got) < 1.02 * stream_error(x, met, w, expected));
  }
}

TEST_CASE("two streams: products come nearer to those of the float model, on other activations too") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> all = activations(random, 1600, 256), all_met = drifted(random, all),
                      w = gaussian(random, 32, 256);
  const auto part = [](const matrix<float>& from, std::size_t first) {
    matrix<float> out(800, from.cols);
    std::copy_n(from.data.begin() + static_cast<std::ptrdiff_t>(first * from.cols), out.data.size(), out.data.begin());
    return out;
  };
  const matrix<float> x = part(all, 0), met = part(all_met, 0);
  for (const char* name : {"mxfp4-32/oas/gptq", "nvfp4/min-error/gptq", "mxfp4-16/oas/hadamard-32/gptq"}) {
    CAPTURE(name);
    const recipe r = recipe::parse(name);
    const auto weights = [&](const calibration& seen) {
      matrix<float> q = dequantize<float>(scalar, gptq(scalar, view(w), r, seen));
      if (r.rotation != 0) rotate_back(scalar, q, {r.rotation}, q.view());
      return q;
    };
    const matrix<float> both = weights(seen_in(x, met)), as_met = weights(seen_in(met)), as_float = weights(seen_in(x));
    for (const std::size_t first : {std::size_t{0}, std::size_t{800}}) {
      const auto error_of = [&](const matrix<float>& q) {
        return stream_error(part(all, first), part(all_met, first), w, q);
      };
      CHECK(error_of(both) < 0.7 * error_of(as_met));
      CHECK(error_of(both) < 0.7 * error_of(as_float));
    }
  }
}

TEST_CASE("two streams that do not differ are one") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 300, 96), w = gaussian(random, 7, 96);
  const calibration one = seen_in(x), two = seen_in(x, x);
  CHECK(one.drift().size() == 0);
  CHECK(two.drift() == Eigen::MatrixXd::Zero(96, 96));
  CHECK(two.moments() == one.moments());
  for (const char* name : {"mxfp4-32/min-error/gptq", "nvfp4/amax/hadamard-16/gptq"}) {
    const auto a = gptq(scalar, view(w), recipe::parse(name), one), b = gptq(scalar, view(w), recipe::parse(name), two);
    CHECK(a.codes == b.codes);
    CHECK(a.scales == b.scales);
  }
}

TEST_CASE("drift is added, joined, borrowed and rotated as moments are") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 700, 200), met = drifted(random, x);
  const auto some = [](const matrix<float>& m, std::size_t first, std::size_t n) {
    return matrix_view<const float>(m.data.data() + first * m.cols, n, m.cols);
  };
  const calibration whole = seen_in(x, met);
  const Eigen::MatrixXd mine = eigen_map(view(met)).cast<double>();
  const Eigen::MatrixXd expected = (eigen_map(view(x)).cast<double>() - mine).transpose() * mine;
  const auto near = [](const Eigen::MatrixXd& a, const Eigen::MatrixXd& b) { return (a - b).norm() < 1e-9 * b.norm(); };
  CHECK(near(whole.drift(), expected));

  calibration a(200), b(200), c(200);
  a.add(some(x, 0, 300), some(met, 0, 300));
  b.add(some(x, 300, 400), some(met, 300, 400));
  c.merge(a);
  c.merge(b);
  CHECK(near(c.drift(), whole.drift()));
  c.merge(seen_in(x));  // of one stream: it has not drifted
  CHECK(near(c.drift(), whole.drift()));
  CHECK(near(a.blended(whole, 70).drift(), a.drift() + 0.1 * whole.drift()));
  CHECK(near(seen_in(x).blended(whole, 70).drift(), 0.1 * whole.drift()));

  matrix<float> y = x, turned = met;
  rotate(scalar, x, {32}, y.view());
  rotate(scalar, met, {32}, turned.view());
  const Eigen::MatrixXd rotated = whole.rotated({32}).drift(), owed = seen_in(y, turned).drift();
  CHECK((rotated - owed).norm() < 1e-5 * owed.norm());
}

TEST_CASE("a batch is packed matrix by matrix, each with its own calibration") {
  std::mt19937_64 random(tetromino_test::seed());
  constexpr std::size_t experts = 3, rows = 5, cols = 96;
  const matrix<float> w = gaussian(random, experts * rows, cols);
  const batch_view<const float> batch(w.data.data(), experts, rows, cols);
  std::vector<calibration> seen;
  std::vector<float> weights, tensor_scales{0.002f, 0.004f, 0.003f};
  for (std::size_t e = 0; e < experts; ++e) {
    seen.push_back(seen_in(activations(random, 200, cols)));
    const auto more = seen.back().column_weights();
    weights.insert(weights.end(), more.rbegin(), more.rend());
  }
  const auto calibration_of = [&](std::size_t e) -> const calibration& { return seen[e]; };
  for (const char* name : {"mxfp4-32/min-error/mbs-search@64/gptq", "nvfp4/min-error/hadamard-16/gptq"}) {
    CAPTURE(name);
    const recipe r = recipe::parse(name);
    const bool scaled = r.format.scale == scale_type::e4m3;
    const std::span<const float> scales(tensor_scales.data(), scaled ? experts : 0);
    const auto together = gptq(scalar, batch, r, calibration_of, {.column_weights = weights, .tensor_scales = scales});
    const auto own = gptq(scalar, batch, r, calibration_of);
    CHECK(own.tensor_scales.size() == scales.size());
    for (std::size_t e = 0; e < experts; ++e) {
      const auto equal = [](const auto& a, const auto& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end());
      };
      const auto alone = gptq(scalar, batch[e], r, seen[e],
                              {.column_weights = std::span(weights).subspan(e * cols, cols),
                               .tensor_scales = scales.empty() ? scales : scales.subspan(e, 1)});
      CHECK(equal(together.view()[e].codes, alone.codes));
      CHECK(equal(together.view()[e].scales, alone.scales));
      CHECK(equal(together.view()[e].macros, alone.macros));
      CHECK(equal(together.view()[e].tensor_scales, alone.tensor_scales));
      const auto unweighted = gptq(scalar, batch[e], r, seen[e]);
      CHECK(equal(own.view()[e].codes, unweighted.codes));
      CHECK(equal(own.view()[e].tensor_scales, unweighted.tensor_scales));
    }
  }
  const recipe nv = recipe::parse("nvfp4/amax/gptq");
  CHECK(try_gptq(scalar, batch, nv, calibration_of, {.tensor_scales = std::span(tensor_scales).first(2)})
            .error()
            .code() == errc::shape_mismatch);
  CHECK(try_gptq(scalar, batch, nv, calibration_of, {.column_weights = std::span(weights).first(2 * cols)})
            .error()
            .code() == errc::shape_mismatch);
  CHECK(try_gptq(scalar, batch, nv, [](std::size_t) { return calibration(32); }).error().code() ==
        errc::shape_mismatch);
}

TEST_CASE("bad input is said") {
  const matrix<float> w(4, 64);
  calibration seen(32);
  const recipe r = recipe::parse("mxfp4-32/oas/gptq");
  CHECK(try_gptq(scalar, view(w), r, seen).error().what() ==
        std::string("gptq: the weights have 64 columns, the calibration 32"));
  CHECK(try_gptq(scalar, view(w), r, calibration(64), {}, {.by_activation = true}).error().code() ==
        errc::invalid_argument);
  for (const double share : {-1.0, std::nan(""), HUGE_VAL}) {
    CHECK(try_gptq(scalar, view(w), r, calibration(64), {}, {.damping = share}).error().code() ==
          errc::invalid_argument);
    CHECK(try_gptq(scalar, view(w), r, calibration(64), {}, {.drift_damping = share}).error().code() ==
          errc::invalid_argument);
  }
  matrix<float> huge(1, 64);
  huge(0, 7) = 3e38f;
  calibration overflowing(64);
  overflowing.add(view(huge));
  CHECK_THAT(std::string(try_gptq(scalar, view(w), r, overflowing).error().what()),
             tetromino_test::contains("column 7"));
  matrix<float> x(2, 32);
  x(1, 3) = INFINITY;
  CHECK_THAT(std::string(seen.try_add(view(x)).error().what()), tetromino_test::contains("row 1, column 3"));
  CHECK(seen.try_add(view(w)).error().code() == errc::shape_mismatch);
  CHECK_THROWS_AS(seen.merge(calibration(64)), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(seen.blended(calibration(64), 1.0), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(seen.rotated({48}), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(calibration(Eigen::MatrixXd::Zero(2, 3), 1.0), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(calibration(Eigen::MatrixXd::Zero(2, 2), 1.0, Eigen::MatrixXd::Zero(3, 3)),
                  tetromino_test::precondition_failed);
  CHECK(seen.try_add(view(x), view(w)).error().what() ==
        std::string("calibration: expected the same rows of two streams, got 2 x 32 and 4 x 64"));
  CHECK_THAT(std::string(seen.try_add(view(x), view(matrix<float>(2, 32))).error().what()),
             tetromino_test::contains("row 1, column 3"));
  CHECK(try_quantize(scalar, w, r).error().code() == errc::invalid_argument);
}

TEST_CASE("special values stay in their block, and feed nothing back") {
  std::mt19937_64 random(tetromino_test::seed());
  const matrix<float> x = activations(random, 400, 128);
  const matrix<float> w = gaussian(random, 6, 128);
  const calibration seen = seen_in(x);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const char* name : {"mxfp4-32/oas/gptq", "mxfp4-16/oas/mbs-search@64/gptq", "nvfp4/amax/gptq"}) {
    const recipe r = recipe::parse(name);
    const std::size_t block = r.format.block;
    for (const gptq_scales scales : {gptq_scales::fixed, gptq_scales::refreshed}) {
      CAPTURE(name, scales);
      matrix<float> poisoned = w;
      poisoned(2, 40) = std::numeric_limits<float>::quiet_NaN();
      poisoned(4, 3) = -infinity;
      const auto got = dequantize<float>(
          scalar, gptq(scalar, view(poisoned), r, seen, {.special = special_values::poison}, {.scales = scales}));
      for (std::size_t i = 0; i < w.rows; ++i) {
        for (std::size_t k = 0; k < w.cols; ++k) {
          const bool is_owed = (i == 2 && k / block == 40 / block) || (i == 4 && k / block == 3 / block);
          CHECK(std::isnan(got(i, k)) == is_owed);
          if (!is_owed) CHECK(std::fabs(got(i, k) - w(i, k)) < 3);
        }
      }
      matrix<float> zeroed = w;
      poisoned = w;
      zeroed(2, 40) = 0;
      poisoned(2, 40) = std::numeric_limits<float>::quiet_NaN();
      const auto saturate = [&](const matrix<float>& m) {
        return gptq(scalar, view(m), r, seen, {.special = special_values::saturate}, {.scales = scales});
      };
      CHECK(saturate(poisoned).codes == saturate(zeroed).codes);
      CHECK(saturate(poisoned).scales == saturate(zeroed).scales);
    }
  }
}

TEST_CASE("an infinity of halves counts as the largest half") {
  std::mt19937_64 random(tetromino_test::seed());
  const calibration seen = seen_in(activations(random, 200, 64));
  std::vector<half> w(64, half(1.0f)), largest = w;
  w[5] = half::from_bits(0x7C00), largest[5] = half::from_bits(0x7BFF);
  const recipe r = recipe::parse("mxfp4-32/floor/gptq");
  const auto pack = [&](const std::vector<half>& from) {
    return gptq(scalar, matrix_view<const half>(from.data(), 1, 64), r, seen, {.special = special_values::saturate});
  };
  CHECK(pack(w).codes == pack(largest).codes);
  CHECK(pack(w).scales == pack(largest).scales);
}

TEST_CASE("moments that are not finite are refused") {
  const matrix<float> w(1, 32);
  Eigen::MatrixXd moments = Eigen::MatrixXd::Identity(32, 32);
  const auto refused = [&](double value, Eigen::Index i, Eigen::Index j, double rows) {
    moments(i, j) = value;
    const auto out = try_gptq(scalar, view(w), recipe::parse("mxfp4-32/oas/gptq"), calibration(moments, rows));
    moments(i, j) = i == j ? 1 : 0;
    return out ? std::string() : std::string(out.error().what());
  };
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(refused(infinity, 3, 3, 10) == "gptq: expected finite moments of the activations, got inf for columns 3 and 3");
  CHECK(refused(std::nan(""), 9, 2, 10) ==
        "gptq: expected finite moments of the activations, got nan for columns 9 and 2");
  CHECK(refused(-1, 4, 4, 10) == "gptq: expected finite moments of the activations, got -1 for columns 4 and 4");
  Eigen::MatrixXd drift = Eigen::MatrixXd::Zero(32, 32);
  drift(2, 9) = infinity;
  CHECK(try_gptq(scalar, view(w), recipe::parse("mxfp4-32/oas/gptq"), calibration(moments, 10, drift)).error().what() ==
        std::string("gptq: expected finite moments of the activations, got inf for columns 2 and 9"));
  CHECK(refused(1, 4, 4, infinity) == "gptq: expected moments of a number of rows, got inf");
}

TEST_CASE("an infinity that saturates leaves the tensor scale to the other weights") {
  std::mt19937_64 random(tetromino_test::seed());
  const calibration seen = seen_in(activations(random, 200, 64));
  matrix<float> w = gaussian(random, 4, 64);
  for (const char* name : {"nvfp4/amax/gptq", "nvfp4/amax/hadamard-16/gptq"}) {
    CAPTURE(name);
    w(1, 7) = 0;
    const auto pack = [&] {
      return gptq(scalar, view(w), recipe::parse(name), seen, {.special = special_values::saturate});
    };
    const float expected = pack().tensor_scales[0];
    w(1, 7) = std::numeric_limits<float>::infinity();
    CHECK(pack().tensor_scales[0] == expected);
  }
}
