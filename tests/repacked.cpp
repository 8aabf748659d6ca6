#include "check.hpp"

#include <tetromino/repacked.hpp>

#include "support/fastest.hpp"
#include "support/matmul_cases.hpp"

namespace {

using namespace tetromino_test;
using tetromino::errc;
using tetromino::matrix;
using tetromino::scalar;

TEST_CASE("repacked weights have their bytes where the layout says, and the way back is exact") {
  reference::generator random(seed());
  for (const any_format& format : all_formats()) {
    for (int round = 0; round < 8; ++round) {
      const std::size_t matrices = 1 + random.below(3), rows = 1 + random.below(50), cols = 1 + random.below(400);
      const auto w = random_packed(random, format, matrices, rows, cols);
      const tetromino::thread_executor threads(3);
      const auto fast = round % 2 == 0 ? tetromino::repack(scalar, w) : tetromino::repack(fastest.on(threads), w);
      const auto view = fast.view();
      const std::size_t blocks = (cols + format.block - 1) / format.block, bytes = blocks * format.block / 2;
      const std::size_t panels = (cols + 31) / 32, groups = (rows + 15) / 16, per_panel = 32 / format.block;
      const std::size_t macros = format.macro_block == 0 ? 0 : (cols + format.macro_block - 1) / format.macro_block;
      REQUIRE(view.codes.size() == matrices * groups * panels * 256);
      REQUIRE(view.scales.size() == matrices * groups * panels * per_panel * 16);
      REQUIRE(view.macros.size() == matrices * groups * macros * 16);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < matrices * rows; ++i) {
        const std::size_t group = i / rows * groups + i % rows / 16, lane = i % rows % 16;
        for (std::size_t b = 0; b < bytes; ++b) {
          const std::size_t at = ((group * panels + b / 16) * 4 + b % 16 / 4) * 64 + lane * 4 + b % 4;
          wrong += view.codes[at] != w.codes[i * bytes + b];
        }
        for (std::size_t b = 0; b < blocks; ++b) {
          wrong += view.scales[(group * panels * per_panel + b) * 16 + lane] != w.scales[i * blocks + b];
        }
        for (std::size_t b = 0; b < macros; ++b) {
          wrong += view.macros[(group * macros + b) * 16 + lane] != w.macros[i * macros + b];
        }
      }
      CHECK(wrong == 0);
      const auto back = tetromino::to_packed(fastest.on(threads), fast);
      CHECK(back.shape() == w.shape());
      CHECK(back.codes == w.codes);
      CHECK(back.scales == w.scales);
      CHECK(back.macros == w.macros);
      CHECK(back.tensor_scales == w.tensor_scales);
    }
  }
}

TEST_CASE("repacked weights of experts give the bits of packed ones") {
  reference::generator random(seed());
  for (int round = 0; round < 20; ++round) {
    const any_format format = all_formats()[random.below(all_formats().size())];
    const std::size_t experts = 1 + random.below(5), cols = 1 + random.below(700), outputs = 1 + random.below(150);
    std::vector<std::uint32_t> offsets{0};
    for (std::size_t e = 0; e < experts; ++e) {
      offsets.push_back(offsets.back() + static_cast<std::uint32_t>(random.below(2) * random.below(20)));
    }
    const std::size_t rows = offsets.back();
    const auto w = random_packed(random, format, experts, outputs, cols);
    const auto fast = tetromino::repack(fastest, w);
    const auto check = [&](const auto& policy, const auto& x) {
      std::vector<float> expected(rows * outputs), got(rows * outputs);
      grouped_matmul(policy, x, w, offsets, matrix_view<float>(expected.data(), rows, outputs));
      grouped_matmul(policy, x, fast, offsets, matrix_view<float>(got.data(), rows, outputs));
      CHECK(same_bits(expected, got));
      grouped_matmul(policy, x, fast.view(), offsets, matrix_view<float>(got.data(), rows, outputs));
      CHECK(same_bits(expected, got));
    };
    const std::vector<float> x = reference::normal_sample(random.bits(), rows * cols);
    const tetromino::thread_executor threads(2);
    check(fastest.on(threads), matrix_view<const float>(x.data(), rows, cols));
    check(fastest.on(threads), random_int8(random, rows, cols));
    check(fastest, random_packed(random, all_formats()[random.below(all_formats().size())], rows, 1, cols));
    check(scalar, random_int8(random, rows, cols));
  }
}

TEST_CASE("integer products are the same bits on scalar and vectors, NaN scales included") {
  reference::generator random(seed());
  for (int round = 0; round < 30; ++round) {
    const any_format format = all_formats()[random.below(all_formats().size())];
    const std::size_t rows = 1 + random.below(20), cols = 1 + random.below(900), outputs = 1 + random.below(40);
    auto w = random_packed(random, format, 1, outputs, cols);
    for (auto& scale : w.scales) {
      if (random.below(60) == 0) scale = static_cast<std::uint8_t>(random.bits());
    }
    const auto check = [&](const auto& x) {
      std::vector<float> expected(rows * outputs), got(rows * outputs);
      matmul(scalar, x, w, matrix_view<float>(expected.data(), rows, outputs));
      matmul(fastest, x, w, matrix_view<float>(got.data(), rows, outputs));
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < got.size(); ++i) {
        const bool are_nan = std::isnan(got[i]) && std::isnan(expected[i]);
        wrong += !are_nan && !same_bits(std::span(got).subspan(i, 1), std::span(expected).subspan(i, 1));
      }
      CHECK(wrong == 0);
    };
    check(random_int8(random, rows, cols));
    check(random_packed(random, all_formats()[random.below(all_formats().size())], rows, 1, cols));
  }
}

TEST_CASE("integer products of blocks of zeros, which have the least scale, and of other blocks that have it") {
  reference::generator random(seed());
  for (const std::size_t block : {16u, 32u}) {
    const any_format format{scale_type::e8m0, block, block == 16 ? 64u : 0u};
    auto x = random_packed(random, format, 5, 1, 200), w = random_packed(random, all_formats()[3], 1, 20, 200);
    for (std::size_t b = 0; b < x.scales.size(); ++b) {
      if (random.below(2) == 0) continue;
      x.scales[b] = 0;
      for (std::size_t i = 0; i < block / 2; ++i) x.codes[b * block / 2 + i] = static_cast<std::uint8_t>(b % 3 << 3);
    }
    for (auto& scale : w.scales) scale = static_cast<std::uint8_t>(random.below(256));
    std::vector<float> expected(5 * 20), got(5 * 20);
    matmul(scalar, x, w, matrix_view<float>(expected.data(), 5, 20));
    matmul(fastest, x, w, matrix_view<float>(got.data(), 5, 20));
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK((std::isnan(got[i]) ? std::isnan(expected[i]) : got[i] == expected[i]));
    }
  }
}

TEST_CASE("repacked storage that does not have its size is an error that says so") {
  reference::generator random(seed());
  auto broken = random_packed(random, tetromino::mxfp4{}, 1, 3, 64);
  const auto whole = tetromino::repack(scalar, broken);
  const auto x = random_int8(random, 2, 64);
  matrix<float> out(2, 3);
  const auto check = [&](const tetromino::repacked& w, const char* what) {
    const auto result = tetromino::try_matmul(fastest, x, w, out.view()[0]);
    REQUIRE_FALSE(result);
    CHECK(result.error().code() == errc::shape_mismatch);
    CHECK_THAT(result.error().what(), contains(what));
    CHECK(tetromino::try_to_packed(scalar, w).error().code() == errc::shape_mismatch);
    CHECK_THROWS_AS(tetromino::to_packed(scalar, w), tetromino::error);
  };
  auto w = whole;
  w.codes.pop_back();
  check(w, "codes needs 512 entries, got 448");
  w = whole;
  w.scales.pop_back();
  check(w, "scales needs 32 entries, got 31");
  w = whole;
  w.macros.resize(16);
  check(w, "macros needs 0 entries, got 16");
  w = whole;
  w.tensor_scales.resize(1);
  check(w, "tensor_scales needs 0 entries, got 1");
  w = tetromino::repack(scalar, random_packed(random, tetromino::nvfp4{}, 1, 3, 64));
  w.tensor_scales.clear();
  check(w, "tensor_scales needs 1 entries, got 0");
  broken.scales.pop_back();
  CHECK(tetromino::try_repack(scalar, broken).error().code() == errc::shape_mismatch);
  CHECK_THROWS_AS(tetromino::repack(scalar, broken), tetromino::error);
  const tetromino::repacked empty = tetromino::repack(scalar, packed<any_format>(tetromino::mxfp4{}, 1, 0, 32));
  CHECK(empty.bytes() == 0);
  CHECK(tetromino::to_packed(scalar, empty).rows == 0);
}

static_assert(tetromino::repacked_like<tetromino::repacked> && tetromino::repacked_like<tetromino::repacked_view>);
static_assert(!tetromino::packed_like<tetromino::repacked>);
static_assert(tetromino::weights_like<tetromino::repacked> && tetromino::weights_like<packed<tetromino::nvfp4>>);

}  // namespace
