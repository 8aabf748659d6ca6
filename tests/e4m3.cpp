#include "check.hpp"

#include <tetromino/e4m3.hpp>

#include "reference/floats.hpp"

#include <cmath>    // std::fabs, std::signbit, std::isnan
#include <cstdint>  // std::uint8_t, std::uint32_t
#include <limits>   // std::numeric_limits

namespace {

using reference::bits_of;
using tetromino::e4m3;

std::uint32_t encode(float x) { return e4m3::encode(x).bits; }

}  // namespace

TEST_CASE("every E4M3 code has its value and comes back from it") {
  for (unsigned code = 0; code < 256; ++code) {
    const float value = e4m3::from_bits(static_cast<std::uint8_t>(code)).value();
    if ((code & 0x7F) == e4m3::nan_bits) {
      CHECK(std::isnan(value));
    } else {
      CHECK(static_cast<double>(value) == reference::e4m3_value(code));
      CHECK(std::signbit(value) == (code >= 0x80));
      CHECK(encode(value) == code);
    }
  }
  CHECK(e4m3::from_bits(e4m3::max_finite_bits).value() == e4m3::max);
}

TEST_CASE("E4M3 saturates, infinities too") {
  CHECK(encode(448.0f) == 0x7E);
  CHECK(encode(480.0f) == 0x7E);
  CHECK(encode(std::numeric_limits<float>::infinity()) == 0x7E);
  CHECK(encode(-std::numeric_limits<float>::infinity()) == 0xFE);
}

TEST_CASE("E4M3 rounds like a search in its table: sampled floats, halves, bfloat16s") {
  reference::disagreements found;
  const auto compare = [&](float x) { found.compare(bits_of(x), reference::e4m3_encode(x), encode(x)); };
  reference::sampled_floats(reference::e4m3_table(), compare);
  reference::sixteen_bit_floats(compare);
  reference::every_nan(99991, compare);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("E4M3 rounds like a search in its table: every float", "[.slow]") {
  const reference::disagreements found = reference::every_float(reference::e4m3_table(), 0x80, encode);
  INFO(found);
  CHECK(found.none());
  reference::disagreements nans;
  reference::every_nan(1, [&](float x) { nans.compare(bits_of(x), reference::e4m3_encode(x), encode(x)); });
  INFO(nans);
  CHECK(nans.none());
}
