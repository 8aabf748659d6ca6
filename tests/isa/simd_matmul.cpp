#include "check.hpp"

/// Matrix products of the simd backend against sums in double. This file is built once for each instruction set.

#include <tetromino/matmul.hpp>

#include "support/matmul_cases.hpp"

#include <array>  // std::array

#if !TETROMINO_SIMD
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
      multiply_every_kind(tetromino::simd, weights, activations, rows, outputs, cols, random.bits(),
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
      multiply_every_kind(tetromino::simd, weights, all_formats()[random.below(all_formats().size())], rows, outputs,
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

}  // namespace

#endif
