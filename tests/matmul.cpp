#include "check.hpp"

#include <tetromino/dequantize.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/thread_executor.hpp>

#include "support/fastest.hpp"
#include "support/matmul_cases.hpp"
#include "support/oracle.hpp"

#include <algorithm>
#include <array>

namespace {

using namespace tetromino_test;
using tetromino::errc;
using tetromino::matrix;
using tetromino::scalar;

TEST_CASE("a product goes into a matrix as into its view") {
  const std::vector<float> numbers(64, 0.5f);
  const auto w = quantize(scalar, matrix_view(numbers.data(), 2, 32), "mxfp4");
  const matrix_view x(numbers.data(), 2, 32);
  matrix<float> out(2, 2), viewed(2, 2), two(2, 1, 2);
  matmul(scalar, x, w, out);
  matmul(scalar, x, w, viewed.view()[0]);
  CHECK(out.data == viewed.data);
  CHECK(out(1, 1) == 8.0f);
  CHECK(try_matmul(scalar, x, w, two).error().code() == errc::shape_mismatch);
  CHECK(try_matmul(scalar, x, w, two.view()).error().code() == errc::shape_mismatch);

  matrix<float> batch(1, 2, 2), grouped(2, 2);
  matmul(scalar, x, w, batch.view());
  CHECK(batch.data == out.data);
  const std::array<std::uint32_t, 2> all{0, 2};
  grouped_matmul(scalar, x, w, all, grouped);
  CHECK(grouped.data == out.data);
  grouped.data.assign(4, 0.0f);
  grouped_matmul(scalar, x, w, all, grouped.view());
  CHECK(grouped.data == out.data);
}

TEST_CASE("matmul: every pair of formats and every kind of activation, at ragged sizes") {
  reference::generator random(seed());
  for (const any_format& weights : all_formats()) {
    for (const any_format& activations : all_formats()) {
      const std::size_t rows = 1 + random.below(4), outputs = 1 + random.below(6), cols = 1 + random.below(300);
      const auto check = [&](double worst, bool results_agree, const char* what) {
        INFO(what << ", K " << cols << ", weights " << weights.block << '/' << weights.macro_block << ", activations "
                  << activations.block << '/' << activations.macro_block);
        CHECK(worst <= static_cast<double>(cols) / 16 + 40);
        CHECK(results_agree);
      };
      const std::uint64_t s = random.bits();
      multiply_every_kind(scalar, weights, activations, rows, outputs, cols, s, check);
      multiply_every_kind(fastest, weights, activations, rows, outputs, cols, s,
                          [&](double worst, bool agree, const char* what) {
                            check(worst <= static_cast<double>(cols) + 16 ? 0 : worst, agree, what);
                          });
    }
  }
}

TEST_CASE("matmul: sums of one block are exact where both sides are integers") {
  reference::generator random(seed());
  for (const std::size_t block : {16u, 32u}) {
    const any_format format{scale_type::e8m0, block, 0};
    for (std::size_t cols = 1; cols <= block; ++cols) {
      const auto w = random_packed(random, format, 1, 3, cols), x = random_packed(random, format, 5, 1, cols);
      std::vector<float> out;
      const std::array<std::uint32_t, 2> all{0, 5};
      CHECK(worst_error(scalar, x, meaning(x), w, all, out) == 0);
      CHECK(worst_error(fastest, x, meaning(x), w, all, out) == 0);
    }
  }
}

TEST_CASE("matmul: rows meet the matrix of their expert, whichever are empty") {
  reference::generator random(seed());
  for (int round = 0; round < 20; ++round) {
    const any_format format = all_formats()[random.below(all_formats().size())];
    const std::size_t experts = 1 + random.below(6), cols = 1 + random.below(150), outputs = 1 + random.below(40);
    std::vector<std::uint32_t> offsets{0};
    for (std::size_t e = 0; e < experts; ++e) {
      offsets.push_back(offsets.back() + static_cast<std::uint32_t>(random.below(2) * random.below(90)));
    }
    const auto w = random_packed(random, format, experts, outputs, cols);
    const auto x = random_packed(random, format, offsets.back(), 1, cols);
    std::vector<float> plain, fast, threaded(offsets.back() * outputs);
    CHECK(worst_error(scalar, x, meaning(x), w, offsets, plain) <= static_cast<double>(cols) / 16 + 40);
    CHECK(worst_error(fastest, x, meaning(x), w, offsets, fast) <= static_cast<double>(cols) + 16);

    tetromino::thread_executor threads(3);
    grouped_matmul(fastest.on(threads), x, w, offsets, matrix_view<float>(threaded.data(), offsets.back(), outputs));
    CHECK(same_bits(fast, threaded));
    for (std::size_t e = 0; e < experts; ++e) {
      const std::size_t first = offsets[e], count = offsets[e + 1] - first;
      std::vector<float> alone(count * outputs);
      matmul(fastest, some_rows(x, first, count), w.view()[e], matrix_view<float>(alone.data(), count, outputs));
      CHECK(same_bits(alone, std::span(fast).subspan(first * outputs, count * outputs)));
    }
  }
}

TEST_CASE("matmul: more rows and outputs than a tile has") {
  reference::generator random(seed());
  for (const std::size_t rows : {65u, 130u}) {
    for (const std::size_t outputs : {63u, 64u, 65u, 256u}) {
      const auto w = random_packed(random, all_formats()[1], 1, outputs, 40);
      const auto x = random_packed(random, all_formats()[1], rows, 1, 40);
      const std::array<std::uint32_t, 2> all{0, static_cast<std::uint32_t>(rows)};
      std::vector<float> out;
      CHECK(worst_error(scalar, x, meaning(x), w, all, out) <= 43);
      CHECK(worst_error(fastest, x, meaning(x), w, all, out) <= 56);
    }
  }
}

/// An executor of this many threads, as it says; all tasks run on the caller's.
struct counted_executor {
  std::size_t threads;
  std::size_t tasks = 0;

  [[nodiscard]] std::size_t count() const { return threads; }
  void operator()(std::size_t n, tetromino::task_ref task) {
    tasks = n;
    for (std::size_t i = 0; i < n; ++i) task(i);
  }
};

TEST_CASE("matmul: tiles cover a product once, and none is more than a thread's share, whoever has the rows") {
  constexpr std::size_t depth = 4096, outputs = 1000;
  using offsets = std::vector<std::uint32_t>;
  for (const offsets& rows :
       {offsets{0, 0, 64, 64, 64}, offsets{0, 16}, offsets{0, 1}, offsets{0, 1, 2, 3, 300, 301}, offsets{0, 40, 80}}) {
    for (const std::size_t threads : {1u, 2u, 4u, 8u, 16u}) {
      counted_executor executor{threads};
      const tetromino::detail::tiling tiles(64, 128, depth, outputs, rows, executor);
      INFO(threads << " threads, " << rows.back() << " rows of " << rows.size() - 1 << " experts");
      std::vector<int> seen(rows.back() * outputs);
      std::size_t largest = 0;
      for (std::size_t i = 0; i < tiles.count(); ++i) {
        const tetromino::detail::matmul_tile t = tiles.tile(i);
        REQUIRE(t.first_row >= rows[t.matrix]);
        REQUIRE(t.last_row <= rows[t.matrix + 1]);
        REQUIRE(t.first_col % 32 == 0);
        for (std::size_t m = t.first_row; m < t.last_row; ++m) {
          for (std::size_t n = t.first_col; n < t.last_col; ++n) ++seen[m * outputs + n];
        }
        largest = std::max(largest, (t.last_row - t.first_row) * (t.last_col - t.first_col));
      }
      CHECK(std::count(seen.begin(), seen.end(), 1) == static_cast<std::ptrdiff_t>(seen.size()));
      CHECK(largest * threads <= seen.size() * 11 / 10);
      if (threads > 1) continue;
      std::size_t expected = 0;  // rows of one tile by columns, of which few rows have a power of two as many
      for (std::size_t e = 1; e < rows.size(); ++e) {
        const std::size_t at_once = std::min<std::size_t>(64, rows[e] - rows[e - 1]);
        std::size_t cols = 128;
        while (2 * cols * at_once <= std::size_t{64} * 128 && at_once > 0) cols *= 2;
        expected = std::max(expected, at_once * std::min(cols, outputs));
      }
      CHECK(largest == expected);
    }
  }
}

TEST_CASE("matmul: however finely a product is cut, its bits are the same") {
  constexpr std::size_t experts = 3, rows = 70, outputs = 130, cols = 8192;
  const std::vector<float> numbers = reference::normal_sample(seed(), (rows + experts * outputs) * cols);
  const matrix_view<const float> x(numbers.data(), rows, cols);
  const auto w = quantize(
      fastest, tetromino::batch_view<const float>(numbers.data() + rows * cols, experts, outputs, cols), "mxfp4");
  const std::vector<std::uint32_t> all_in_one{0, 0, rows, rows};
  const auto compare = [&](const auto& activations) {
    matrix<float> expected(rows, outputs), got(rows, outputs);
    grouped_matmul(fastest, activations, w, all_in_one, expected);
    std::size_t tasks = 0;
    for (const std::size_t threads : {1u, 2u, 5u, 16u, 64u}) {
      counted_executor executor{threads};
      grouped_matmul(fastest.on(executor), activations, w, all_in_one, got);
      CHECK(same_bits(expected.data, got.data));
      CHECK(executor.tasks >= std::max(tasks, std::min<std::size_t>(threads, 15)));
      tasks = executor.tasks;
    }
  };
  compare(x);
  compare(quantize_int8(scalar, x));
}

TEST_CASE("matmul: what quantize packs is multiplied as what dequantize gives") {
  const std::size_t rows = 9, outputs = 11, cols = 200;
  const std::vector<float> x = reference::normal_sample(seed(), rows * cols);
  const std::vector<float> w = reference::normal_sample(seed() + 1, outputs * cols);
  for (const char* name : {"mxfp4-32/floor", "mxfp4-16/oas/mbs-search", "nvfp4/four-over-six"}) {
    const auto r = tetromino::recipe::parse(name);
    const auto packed_w = quantize(scalar, matrix_view<const float>(w.data(), outputs, cols), r);
    const auto packed_x = quantize(scalar, matrix_view<const float>(x.data(), rows, cols), r);
    const auto plain_w = tetromino::dequantize<float>(scalar, packed_w);
    const auto plain_x = tetromino::dequantize<float>(scalar, packed_x);
    matrix<float> out(rows, outputs);
    matmul(fastest, packed_x, packed_w, out.view()[0]);
    for (std::size_t m = 0; m < rows; ++m) {
      for (std::size_t n = 0; n < outputs; ++n) {
        double sum = 0, magnitudes = 0;
        for (std::size_t k = 0; k < cols; ++k) {
          const double product = static_cast<double>(plain_x(m, k)) * static_cast<double>(plain_w(n, k));
          sum += product;
          magnitudes += std::abs(product);
        }
        CHECK(std::abs(static_cast<double>(out(m, n)) - sum) <= 1e-5 * magnitudes);
      }
    }
  }
}

TEST_CASE("matmul: outputs of 16 bits are the rounded float outputs") {
  reference::generator random(seed());
  const auto w = random_packed(random, tetromino::nvfp4{}, 1, 21, 50);
  const auto x = random_int8(random, 6, 50);
  const auto compare = [&]<class T>(const auto& policy, T) {
    matrix<float> wide(6, 21);
    matrix<T> narrow(6, 21);
    matmul(policy, x, w, wide.view()[0]);
    matmul(policy, x, w, narrow.view()[0]);
    for (std::size_t i = 0; i < wide.data.size(); ++i) CHECK(narrow.data[i] == number<T>(wide.data[i]));
  };
  compare(scalar, tetromino::half{});
  compare(scalar, tetromino::bfloat16{});
  compare(fastest, tetromino::half{});
  compare(fastest, tetromino::bfloat16{});
}

TEST_CASE("matmul: the output may have gaps between its rows, which stay as they are") {
  reference::generator random(seed());
  const auto w = random_packed(random, tetromino::mxfp4{}, 1, 17, 64);
  const auto x = random_packed(random, tetromino::mxfp4{}, 1, 5, 64);
  std::vector<float> dense(5 * 17), spaced(5 * 20, -1.0f);
  matmul(fastest, x, w, matrix_view<float>(dense.data(), 5, 17));
  matmul(fastest, x, w, matrix_view<float>(spaced.data(), 5, 17, 20));
  for (std::size_t m = 0; m < 5; ++m) {
    for (std::size_t n = 0; n < 20; ++n) CHECK(spaced[m * 20 + n] == (n < 17 ? dense[m * 17 + n] : -1.0f));
  }
}

TEST_CASE("matmul: a NaN scale reaches the outputs that meet it, and no others") {
  reference::generator random(seed());
  for (const any_format& format : {any_format(tetromino::mxfp4{}), any_format(tetromino::nvfp4{})}) {
    auto w = random_packed(random, format, 1, 19, 100);
    auto x = random_packed(random, format, 4, 1, 100);
    const std::uint8_t nan = format.scale == scale_type::e4m3 ? 0x7F : 0xFF;
    w.scales[2 * w.shape().blocks_per_row() + 1] = nan;  // row 2
    x.scales[3 * x.shape().blocks_per_row()] = nan;      // row 3
    const auto check = [&](const auto& policy) {
      matrix<float> out(4, 19);
      matmul(policy, x, w, out.view()[0]);
      for (std::size_t m = 0; m < 4; ++m) {
        for (std::size_t n = 0; n < 19; ++n) CHECK(std::isnan(out(m, n)) == (m == 3 || n == 2));
      }
    };
    check(scalar);
    check(fastest);
  }
}

TEST_CASE("matmul: the smallest and largest scales") {
  for (const auto& [w_scale, x_scale, expected] :
       {std::array{0.0, 254.0, 1.0}, std::array{254.0, 0.0, 1.0}, std::array{127.0, 0.0, 0x1p-127}}) {
    packed<any_format> w(tetromino::mxfp4{}, 1, 1, 1), x(tetromino::mxfp4{}, 1, 1, 1);
    w.codes[0] = x.codes[0] = 2;  // 1.0
    w.scales[0] = static_cast<std::uint8_t>(w_scale);
    x.scales[0] = static_cast<std::uint8_t>(x_scale);
    matrix<float> out(1, 1);
    matmul(scalar, x, w, out.view()[0]);
    CHECK(static_cast<double>(out(0, 0)) == expected);
    matmul(fastest, x, w, out.view()[0]);
    CHECK(static_cast<double>(out(0, 0)) == expected);
  }
}

TEST_CASE("matmul: nothing to multiply") {
  const packed<any_format> w(tetromino::mxfp4{}, 1, 3, 0), none(tetromino::mxfp4{}, 1, 0, 32);
  std::vector<float> x(64, 1.0f);
  matrix<float> out(2, 3);
  out.data.assign(6, 5.0f);
  matmul(fastest, matrix_view<const float>(x.data(), 2, 0), w, out.view()[0]);
  CHECK(out.data == std::vector<float>(6, 0.0f));  // sums of nothing
  matrix<float> empty(2, 0);
  matmul(fastest, matrix_view<const float>(x.data(), 2, 32), none, empty.view()[0]);
  matrix<float> no_rows(0, 3);
  matmul(fastest, matrix_view<const float>(x.data(), 0, 0), w, no_rows.view()[0]);
}

TEST_CASE("matmul: sizes that do not fit are errors that say so") {
  reference::generator random(seed());
  const auto w = random_packed(random, tetromino::mxfp4{}, 2, 3, 64);
  const auto one = random_packed(random, tetromino::mxfp4{}, 1, 3, 64);
  const std::vector<float> x(5 * 64);
  matrix<float> out(5, 3);
  const matrix_view<const float> in(x.data(), 5, 64);
  const auto message = [](const tetromino::result<void>& r) {
    REQUIRE_FALSE(r);
    CHECK(r.error().code() == errc::shape_mismatch);
    return std::string(r.error().what());
  };
  using offsets = std::vector<std::uint32_t>;
  CHECK_THAT(message(try_matmul(scalar, in, w, out.view()[0])), contains("expected one weight matrix, got 2"));
  CHECK_THAT(message(try_matmul(scalar, matrix_view<const float>(x.data(), 5, 63), one, out.view()[0])),
             contains("63 columns, the weights 64"));
  CHECK_THAT(message(try_matmul(scalar, in, one, matrix_view<float>(out.data.data(), 5, 2))),
             contains("the product is [5, 3], the output [5, 2]"));
  CHECK_THAT(message(try_grouped_matmul(scalar, in, w, offsets{0, 5}, out.view()[0])),
             contains("expected 3 row offsets from 0 to 5, got 2"));
  CHECK_THAT(message(try_grouped_matmul(scalar, in, w, offsets{}, out.view()[0])), contains("got 0"));
  CHECK_THAT(message(try_grouped_matmul(scalar, in, w, offsets{0, 2, 4}, out.view()[0])), contains("from 0 to 4"));
  CHECK_THAT(message(try_grouped_matmul(scalar, in, w, offsets{0, 7, 5}, out.view()[0])),
             contains("ascending row offsets, got 7 before 5 for matrix 1"));
  auto broken = w;
  broken.scales.pop_back();
  CHECK_THAT(message(try_grouped_matmul(scalar, in, broken, offsets{0, 2, 5}, out.view()[0])), contains("scales need"));
  auto x8 = random_int8(random, 5, 64);
  x8.scales.pop_back();
  CHECK_THAT(message(try_matmul(scalar, x8, one, out.view()[0])), contains("int8 activations: scales need 10"));
  CHECK_THROWS_AS(matmul(scalar, in, w, out.view()[0]), tetromino::error);
}

TEST_CASE("int8 activations: scale amax / 127, elements to nearest even") {
  reference::generator random(seed());
  for (int round = 0; round < 30; ++round) {
    const std::size_t rows = 1 + random.below(3), cols = 1 + random.below(100);
    std::vector<float> x(rows * cols);
    awkward_numbers numbers(random.bits());
    for (float& v : x) v = numbers();
    const auto packed_x = tetromino::quantize_int8(scalar, matrix_view<const float>(x.data(), rows, cols));
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::size_t b = 0; b < (cols + 31) / 32; ++b) {
        const std::size_t first = r * cols + b * 32, n = std::min<std::size_t>(32, cols - b * 32);
        float amax = 0;
        for (std::size_t i = 0; i < n; ++i) amax = std::max(amax, std::abs(x[first + i]));
        const float scale = packed_x.scales[r * ((cols + 31) / 32) + b];
        if (amax < 0x1p-120f) {
          CHECK(scale == 0.0f);
        } else {
          CHECK(scale == amax / 127.0f);
        }
        for (std::size_t i = 0; i < n; ++i) {
          const int q = packed_x.values[first + i];
          if (amax < 0x1p-120f) {
            CHECK(q == 0);
          } else {
            const float y = x[first + i] * (127.0f / amax);
            CHECK(q == static_cast<int>(std::nearbyint(y)));
          }
        }
      }
    }
  }
}

TEST_CASE("int8 activations: values that are not finite are errors that name the place") {
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    std::vector<float> x(3 * 40, 1.0f);
    x[2 * 40 + 33] = bad;
    const auto r = tetromino::try_quantize_int8(scalar, matrix_view<const float>(x.data(), 3, 40));
    REQUIRE_FALSE(r);
    CHECK(r.error().code() == errc::non_finite);
    CHECK_THAT(r.error().what(), contains("row 2, columns 32 to 39"));
  }
  tetromino::int8_matrix small(2, 40);
  const std::vector<float> x(3 * 40);
  CHECK(
      tetromino::try_quantize_int8_to(scalar, matrix_view<const float>(x.data(), 3, 40), small.view()).error().code() ==
      errc::shape_mismatch);
}

}  // namespace
