#include "check.hpp"

#include <tetromino/rounding.hpp>

#include "reference/floats.hpp"
#include "reference/generators.hpp"
#include "reference/quantize.hpp"

#include <algorithm>  // std::max
#include <cmath>      // std::sqrt, std::fabs, std::nextafter
#include <cstdint>    // std::uint32_t, std::uint64_t
#include <limits>     // std::numeric_limits

namespace {

using tetromino::e2m1;
using tetromino::philox4x32;
using tetromino::round_stochastic;

// The grid again, at compile time: u decides, and the largest u still rounds up just below the upper neighbour.
static_assert(round_stochastic(0.75f, 0.0f).value() == 1.0f);
static_assert(round_stochastic(0.75f, 0.5f).value() == 0.5f);
static_assert(round_stochastic(-5.5f, 0.74f).value() == -6.0f);

}  // namespace

TEST_CASE("Philox4x32-10 gives Random123's known answers") {
  // Both halves of the counter and of the key; the upper 64 bits of the library's counter are always zero.
  const auto zeros = philox4x32(0, 0);
  CHECK(zeros.word[0] == 0x6627E8D5u);
  CHECK(zeros.word[1] == 0xE169C58Du);
  CHECK(zeros.word[2] == 0xBC57AC4Cu);
  CHECK(zeros.word[3] == 0x9B00DBD8u);

  constexpr std::uint32_t all = 0xFFFFFFFFu;
  CHECK(reference::philox({0, 0, 0, 0}, {0, 0}) ==
        std::array<std::uint32_t, 4>{0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u});
  CHECK(reference::philox({all, all, all, all}, {all, all}) ==
        std::array<std::uint32_t, 4>{0x408F276Du, 0x41C83B0Eu, 0xA20BC7C6u, 0x6D5451FDu});
  CHECK(reference::philox({0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u}, {0xA4093822u, 0x299F31D0u}) ==
        std::array<std::uint32_t, 4>{0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u});
}

TEST_CASE("the random stream is that of the oracle") {
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 20000; ++i) {
    const std::uint64_t seed = i % 3 == 0 ? random.below(5) : random.bits();
    const std::uint64_t index = i % 2 == 0 ? random.below(100) : random.bits();
    const auto words = philox4x32(index, seed);
    const auto expected =
        reference::philox({static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32), 0, 0},
                          {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
    for (unsigned w = 0; w < 4; ++w) REQUIRE(words.word[w] == expected[w]);
    const float u = tetromino::uniform(seed, index);
    REQUIRE(static_cast<double>(u) == reference::uniform(seed, index));
    REQUIRE((u >= 0 && u < 1));
  }
}

TEST_CASE("stochastic rounding picks the neighbour that the oracle picks") {
  reference::disagreements found;
  reference::generator random(tetromino_test::seed());
  const auto compare = [&](float y) {
    const double u = static_cast<double>(random.bits() >> 40) / 16777216.0;
    for (const double chosen : {u, 0.0, 0.5, 16777215.0 / 16777216.0}) {
      const float v = static_cast<float>(chosen);
      const std::uint32_t expected = std::isnan(y) ? 7 : reference::stochastic_e2m1(y, chosen);
      found.compare(reference::bits_of(y), expected, round_stochastic(y, v).bits);
    }
  };
  reference::sampled_floats(reference::e2m1_table(), compare);
  reference::sixteen_bit_floats(compare);
  for (int i = 0; i < 200000; ++i) compare(static_cast<float>(random.normal() * 3));
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("stochastic rounding at every step of u near its threshold") {
  // y = low + share · gap with share a multiple of 2^-24 where y is a float: up for exactly share · 2^24 values of u.
  for (const float y : {0.125f, 0.3f, 0.6f, 0.9999999f, 1.2f, 1.75f, 2.1f, 3.9f, 4.0000005f, 5.9f}) {
    unsigned low = 0;
    while (low < 7 && reference::e2m1_table()[low + 1] <= static_cast<double>(y)) ++low;
    const double gap = reference::e2m1_table()[low + 1] - reference::e2m1_table()[low];
    const double threshold = (static_cast<double>(y) - reference::e2m1_table()[low]) / gap * 16777216.0;
    for (int step = -3; step <= 3; ++step) {
      const double u = std::floor(threshold) + step;
      if (u < 0 || u >= 16777216.0) continue;
      const auto code = round_stochastic(y, static_cast<float>(u / 16777216.0)).bits;
      CHECK(code == (u < threshold ? low + 1 : low));
    }
  }
}

TEST_CASE("stochastic rounding is unbiased within five sigma") {
  constexpr std::uint64_t draws = 1 << 18;
  const std::uint64_t seed = tetromino_test::seed();
  for (const float y :
       {0.0f, 0.01f, 0.2f, 0.25f, 0.6f, 1.1f, 1.5f, 1.9f, 2.7f, 3.3f, 4.2f, 5.0f, 5.97f, -0.4f, -2.2f, -4.9f}) {
    double sum = 0;
    double largest_step = 0;
    for (std::uint64_t i = 0; i < draws; ++i) {
      const auto q = static_cast<double>(round_stochastic(y, tetromino::uniform(seed, i)).value());
      sum += q;
      largest_step = std::max(largest_step, std::fabs(q - static_cast<double>(y)));
    }
    CHECK(largest_step < 2.0);  // one of the two neighbours, never further
    const double magnitude = std::fabs(static_cast<double>(y));
    unsigned low = 0;
    while (low < 7 && reference::e2m1_table()[low + 1] <= magnitude) ++low;
    const double below = magnitude - reference::e2m1_table()[low];
    const double above = (low == 7 ? magnitude : reference::e2m1_table()[low + 1]) - magnitude;
    const double sigma = std::sqrt(below * above / static_cast<double>(draws));  // of the mean of a two-point variable
    INFO("y = " << y);
    CHECK(std::fabs(sum / static_cast<double>(draws) - static_cast<double>(y)) <= 5 * sigma);
  }
}

TEST_CASE("the 24-bit uniform numbers fill [0, 1) evenly") {
  constexpr unsigned bins = 64;
  constexpr std::uint64_t draws = 1 << 18;
  double counts[bins] = {};
  for (std::uint64_t i = 0; i < draws; ++i) {
    counts[static_cast<unsigned>(tetromino::uniform(tetromino_test::seed(), i) * static_cast<float>(bins))] += 1;
  }
  const double expected = static_cast<double>(draws) / bins;
  double chi_squared = 0;
  for (const double count : counts) chi_squared += (count - expected) * (count - expected) / expected;
  CHECK(chi_squared < 63 + 6 * std::sqrt(2.0 * 63));  // mean and standard deviation of chi-squared with 63 degrees
}

TEST_CASE("stochastic rounding saturates, keeps the sign of zero, leaves codes alone") {
  for (const float u : {0.0f, 0.5f, 0.99999994f}) {
    for (std::uint8_t code = 0; code < 16; ++code)
      CHECK(round_stochastic(e2m1::from_bits(code).value(), u).bits == code);
    CHECK(round_stochastic(6.5f, u).value() == 6.0f);
    CHECK(round_stochastic(-1e30f, u).value() == -6.0f);
    CHECK(round_stochastic(std::numeric_limits<float>::infinity(), u).value() == 6.0f);
    CHECK(round_stochastic(std::numeric_limits<float>::quiet_NaN(), u).bits == 7);
  }
}
