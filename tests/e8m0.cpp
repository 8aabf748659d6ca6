#include "check.hpp"

#include <tetromino/e8m0.hpp>

#include "reference/floats.hpp"

#include <cmath>    // std::fabs, std::signbit, std::isnan
#include <cstdint>  // std::uint8_t, std::uint32_t
#include <limits>   // std::numeric_limits

namespace {

using reference::bits_of;
using tetromino::e8m0;

/// The largest power of two not above |x| within the format's range.
std::uint32_t expected_code(float x) {
  if (std::isnan(x)) return 0xFF;
  std::uint32_t code = 0;
  while (code < 254 && std::ldexp(1.0, static_cast<int>(code) + 1 - 127) <= std::fabs(static_cast<double>(x))) ++code;
  return code;
}

std::uint32_t encode(float x) { return e8m0::encode(x).bits; }

}  // namespace

TEST_CASE("every E8M0 code has its value and comes back from it") {
  for (unsigned code = 0; code < 255; ++code) {
    const e8m0 scale = e8m0::from_bits(static_cast<std::uint8_t>(code));
    CHECK(static_cast<double>(scale.value()) == reference::e8m0_value(code));
    CHECK(scale.exponent() == static_cast<int>(code) - 127);
    CHECK(!scale.is_nan());
    CHECK(encode(scale.value()) == code);
    CHECK(e8m0::from_exponent(scale.exponent()).bits == code);
  }
  CHECK(e8m0::from_bits(e8m0::nan_bits).is_nan());
  CHECK(std::isnan(e8m0::from_bits(e8m0::nan_bits).value()));
}

TEST_CASE("E8M0 exponents are clamped") {
  CHECK(e8m0::from_exponent(-128).bits == 0);
  CHECK(e8m0::from_exponent(-100000).bits == 0);
  CHECK(e8m0::from_exponent(128).bits == 254);
  CHECK(e8m0::from_exponent(100000).bits == 254);
}

TEST_CASE("E8M0 takes the power of two below") {
  reference::disagreements found;
  const auto compare = [&](float x) { found.compare(bits_of(x), expected_code(x), encode(x)); };
  for (int exponent = -149; exponent < 128; ++exponent) {
    for (const double mantissa : {1.0, 1.5}) reference::near(std::ldexp(mantissa, exponent), 64, compare);
  }
  reference::sixteen_bit_floats(compare);
  reference::every_nan(99991, compare);
  compare(0.0f);
  compare(-0.0f);
  compare(std::numeric_limits<float>::infinity());
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("E8M0 takes the power of two below: every float", "[.slow]") {
  reference::disagreements found;
  std::uint32_t expected = 0;
  for (std::uint32_t bits = 0; bits <= reference::infinity_bits; ++bits) {
    const double x = static_cast<double>(reference::float_of(bits));
    while (expected < 254 && std::ldexp(1.0, static_cast<int>(expected) - 126) <= x) ++expected;
    found.compare(bits, expected, encode(reference::float_of(bits)));
    found.compare(bits | reference::sign_bit, expected, encode(reference::float_of(bits | reference::sign_bit)));
  }
  INFO(found);
  CHECK(found.none());
}
