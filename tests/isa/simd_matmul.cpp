#include "check.hpp"

/// Matrix products of the simd backend against sums in double. Run for each backend of tetromino::cpu.

#include <tetromino/matmul.hpp>

#include "isa/backend.hpp"
#include "support/matmul_cases.hpp"

#include <algorithm>  // std::fill_n, std::equal
#include <array>      // std::array
#include <cmath>      // std::ldexp
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <span>       // std::span
#include <vector>     // std::vector

#if !TETROMINO_TEST_VECTORS
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

namespace {

using namespace tetromino_test;

TEST_CASE("simd matmul: all formats, all kinds of activation, sizes around tiles and chunks") {
  reference::generator random(seed());
  for (const any_format& weights : all_formats()) {
    for (const std::size_t rows : {1u, 2u, 8u, 63u, 70u}) {
      const any_format activations = all_formats()[random.below(all_formats().size())];
      const std::size_t outputs = 1 + random.below(90), cols = 1 + random.below(rows > 8 ? 80 : 600);
      multiply_every_kind(vectors, weights, activations, rows, outputs, cols, random.bits(),
                          [&](double worst, bool results_agree, const char* what) {
                            INFO(what << ", " << rows << " x " << outputs << " x " << cols << ", weights "
                                      << weights.block << '/' << weights.macro_block << ", activations "
                                      << activations.block << '/' << activations.macro_block);
                            CHECK(worst <= static_cast<double>(cols) + 16);
                            CHECK(results_agree);
                          });
    }
  }
}

TEST_CASE("simd matmul: more columns than are taken at once") {
  reference::generator random(seed());
  for (const auto& shape : {std::array<std::size_t, 3>{64, 5, 1100}, {9, 18, 4000}, {1, 3, 33000}}) {
    const std::size_t rows = shape[0], outputs = shape[1], cols = shape[2];
    for (int round = 0; round < 2; ++round) {
      const any_format weights = all_formats()[random.below(all_formats().size())];
      multiply_every_kind(vectors, weights, all_formats()[random.below(all_formats().size())], rows, outputs,
                          cols - random.below(40), random.bits(),
                          [&](double worst, bool results_agree, const char* what) {
                            INFO(what << ", " << rows << " x " << outputs << " x " << cols << ", weights "
                                      << weights.block << '/' << weights.macro_block);
                            CHECK(worst <= static_cast<double>(cols) + 16);
                            CHECK(results_agree);
                          });
    }
  }
}

TEST_CASE("simd matmul: scales at the ends of their range give one row what they give many") {
  reference::generator random(seed());
  for (const std::size_t block : {16u, 32u}) {
    const std::array<unsigned, 10> bytes{0, 1, 2, 3, 127, 251, 252, 253, 254, 255};
    auto w = random_packed(random, {tetromino::scale_type::e8m0, block, 0}, 1, bytes.size() * 16, 96);
    const std::size_t blocks = w.shape().blocks_per_row();
    for (std::size_t n = 0; n < w.rows; ++n) {  // one block of each row, and all of them in the last
      const auto byte = static_cast<std::uint8_t>(bytes[n / 16]);
      std::fill_n(w.scales.begin() + static_cast<std::ptrdiff_t>(n * blocks), blocks, byte);
      for (std::size_t b = 0; b < blocks && n % 16 != 15; ++b) {
        if (b != n % blocks) w.scales[n * blocks + b] = 127;
      }
    }
    std::vector<float> x(2 * 96), one(w.rows), two(2 * w.rows);
    for (float& v : x) v = static_cast<float>(random.normal()) * 0x1p-6f;
    matmul(vectors, matrix_view<const float>(x.data(), 1, 96), w, matrix_view<float>(one.data(), 1, w.rows));
    matmul(vectors, matrix_view<const float>(x.data(), 2, 96), w, matrix_view<float>(two.data(), 2, w.rows));
    const std::vector<double> x_values(x.begin(), x.begin() + 96), w_values = meaning(w);
    for (std::size_t n = 0; n < w.rows; ++n) {
      INFO("block " << block << ", row " << n << ", scale " << bytes[n / 16]);
      CHECK((same_bits(std::span(one).subspan(n, 1), std::span(two).subspan(n, 1)) ||
             (one[n] != one[n] && two[n] != two[n])));
      if (bytes[n / 16] == 255) {
        CHECK(one[n] != one[n]);
      } else if (bytes[n / 16] < 253) {  // greater ones can be infinite
        CHECK(error_of(one[n], x_values, std::span(w_values).subspan(n * 96, 96)) <= 96 + 16);
      }
    }
  }
}

TEST_CASE("simd matmul: integers give scalar's bits with scales at the ends of their range") {
  reference::generator random(seed());
  const auto agree = [](float a, float b) { return same_bits({&a, 1}, {&b, 1}) || (a != a && b != b); };
  for (const unsigned byte : {0u, 1u, 2u, 20u, 100u, 127u, 128u, 140u, 200u, 237u, 238u, 253u, 254u, 255u}) {
    // Near what the products of scales, and of sums with them, just are or are not normal floats.
    for (const int product : {-150, -149, -128, -127, -126, -125, 0, 108, 109, 110, 111, 112, 113, 126, 127, 128}) {
      const int exponent = product - (static_cast<int>(byte) - 127);
      if (exponent < -149 || exponent > 127) continue;
      auto w = random_packed(random, {tetromino::scale_type::e8m0, 32, 0}, 1, 18, 96);
      for (auto& scale : w.scales) scale = static_cast<std::uint8_t>(byte);
      auto x = random_int8(random, 15, 96);
      for (auto& scale : x.scales) {
        scale = std::ldexp(1 + static_cast<float>(random.below(1024)) / 1024, exponent);
        if (random.below(400) == 0) scale = -scale;
      }
      std::vector<float> got(15 * 18), expected(15 * 18);
      matmul(vectors, x, w, matrix_view<float>(got.data(), 15, 18));
      matmul(tetromino::scalar, x, w, matrix_view<float>(expected.data(), 15, 18));
      INFO("E8M0 " << byte << ", scales of rows 2^" << exponent);
      CHECK(std::equal(got.begin(), got.end(), expected.begin(), agree));
    }
  }
}

}  // namespace

#endif
