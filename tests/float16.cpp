#include "check.hpp"

#include <tetromino/float16.hpp>

#include "reference/floats.hpp"
#include "reference/generators.hpp"

#include <algorithm>  // std::min
#include <bit>        // std::bit_cast
#include <cmath>      // std::fabs, std::signbit, std::isnan
#include <cstdint>    // std::uint8_t, std::uint32_t, std::uint64_t
#include <limits>     // std::numeric_limits

namespace {

using reference::bits_of;
using tetromino::bfloat16;
using tetromino::half;

std::uint32_t encode_half(float x) { return half(x).bits; }
std::uint32_t encode_bfloat16(float x) { return bfloat16(x).bits; }

/// A NaN must stay a quiet NaN of the same sign; which payload it has is left open.
template <class T>
std::uint32_t quiet_nan(float x, std::uint32_t infinity, std::uint32_t quiet_bit) {
  const std::uint32_t code = T(x).bits;
  const bool is_quiet = (code & infinity) == infinity && (code & quiet_bit) != 0;
  return is_quiet && (code >= 0x8000) == std::signbit(x) && std::isnan(static_cast<float>(T(x))) ? 1 : 0;
}

}  // namespace

TEST_CASE("every half has its value and comes back from it") {
  reference::disagreements found;
  for (unsigned code = 0; code < 0x10000; ++code) {
    const float value = static_cast<float>(half::from_bits(static_cast<std::uint16_t>(code)));
    const auto expected = static_cast<float>(reference::half_value(code));
    if (std::isnan(expected)) {
      found.compare(code, 1, std::isnan(value) ? 1 : 0);
    } else {
      found.compare(code, bits_of(expected), bits_of(value));
      found.compare(code, code, encode_half(value));
    }
  }
  INFO(found);
  CHECK(found.none());
  CHECK(static_cast<double>(half::max) == reference::half_value(0x7BFF));
}

TEST_CASE("every bfloat16 has its value and comes back from it") {
  reference::disagreements found;
  for (unsigned code = 0; code < 0x10000; ++code) {
    const float value = static_cast<float>(bfloat16::from_bits(static_cast<std::uint16_t>(code)));
    const auto expected = static_cast<float>(reference::bfloat16_value(code));
    if (std::isnan(expected)) {
      found.compare(code, 1, std::isnan(value) ? 1 : 0);
    } else {
      found.compare(code, bits_of(expected), bits_of(value));
      found.compare(code, code, encode_bfloat16(value));
    }
  }
  INFO(found);
  CHECK(found.none());
  CHECK(static_cast<double>(bfloat16::max) == reference::bfloat16_value(0x7F7F));
}

TEST_CASE("half rounds like a search in its table: sampled floats, bfloat16s") {
  reference::disagreements found;
  const auto compare = [&](float x) {
    if (!std::isnan(x)) found.compare(bits_of(x), reference::half_encode(x), encode_half(x));
  };
  reference::sampled_floats(reference::half_table(), compare);
  reference::sixteen_bit_floats(compare);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("bfloat16 rounds like a search in its table: sampled floats, halves") {
  reference::disagreements found;
  const auto compare = [&](float x) {
    if (!std::isnan(x)) found.compare(bits_of(x), reference::bfloat16_encode(x), encode_bfloat16(x));
  };
  reference::sampled_floats(reference::bfloat16_table(), compare);
  reference::sixteen_bit_floats(compare);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("doubles are rounded once: within two ulps of every code and of every middle between two, and at random") {
  reference::disagreements found;
  const auto compare = [&](double x) {
    for (const double y : {x, -x}) {
      found.compare(bits_of(static_cast<float>(y)), reference::half_encode(y), half(y).bits);
      found.compare(bits_of(static_cast<float>(y)), reference::bfloat16_encode(y), bfloat16(y).bits);
    }
  };
  for (const auto& table : {reference::half_table(), reference::bfloat16_table()}) {
    for (std::size_t i = 0; i + 1 < table.size(); ++i) {
      for (const double x : {table[i], (table[i] + table[i + 1]) / 2}) {
        const std::uint64_t word = std::bit_cast<std::uint64_t>(x), first = word - std::min<std::uint64_t>(word, 2);
        for (std::uint64_t near = first; near <= word + 2; ++near) compare(std::bit_cast<double>(near));
      }
    }
  }
  reference::generator random(tetromino_test::seed());
  for (int i = 0; i < 200000; ++i) {
    const std::uint64_t exponent =
        1023 - 160 + random.below(320);  // from below the least bfloat16 to above the largest
    compare(std::bit_cast<double>((random.bits() >> 12) | exponent << 52));
  }
  for (const double x : {std::numeric_limits<double>::max(), std::numeric_limits<double>::denorm_min()}) compare(x);
  INFO("seed " << tetromino_test::seed() << ": " << found);
  CHECK(found.none());

  const double infinity = std::numeric_limits<double>::infinity();
  CHECK((half(infinity).bits == 0x7C00 && half(-infinity).bits == 0xFC00 && bfloat16(-infinity).bits == 0xFF80));
  for (const double nan : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::signaling_NaN()}) {
    CHECK((half(nan).bits & 0x7E00) == 0x7E00);
    CHECK((bfloat16(nan).bits & 0x7FC0) == 0x7FC0);
    CHECK(std::isnan(static_cast<double>(half(nan))));
    CHECK(std::isnan(static_cast<double>(bfloat16(nan))));
  }
}

TEST_CASE("NaNs stay quiet NaNs in half and bfloat16") {
  reference::disagreements found;
  reference::every_nan(997, [&](float x) {
    found.compare(bits_of(x), 1, quiet_nan<half>(x, 0x7C00, 0x0200));
    found.compare(bits_of(x), 1, quiet_nan<bfloat16>(x, 0x7F80, 0x0040));
  });
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("half rounds like a search in its table: every float", "[.slow]") {
  const reference::disagreements found = reference::every_float(reference::half_table(), 0x8000, encode_half);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("bfloat16 rounds like a search in its table: every float", "[.slow]") {
  const reference::disagreements found = reference::every_float(reference::bfloat16_table(), 0x8000, encode_bfloat16);
  INFO(found);
  CHECK(found.none());
}
