#include "check.hpp"

#include <tetromino/e2m1.hpp>

#include "reference/floats.hpp"

#include <cmath>    // std::fabs, std::signbit, std::isnan
#include <cstdint>  // std::uint8_t, std::uint32_t

namespace {

using reference::bits_of;
using tetromino::e2m1;

std::uint32_t encode(float x) { return e2m1::encode(x).bits; }

}  // namespace

TEST_CASE("every E2M1 code has its value and comes back from it") {
  constexpr float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (std::uint8_t code = 0; code < 16; ++code) {
    const float value = e2m1::from_bits(code).value();
    CHECK(std::fabs(value) == magnitudes[code % 8]);
    CHECK(std::signbit(value) == (code >= 8));
    CHECK(static_cast<double>(value) == reference::e2m1_value(code));
    CHECK(e2m1::encode(value).bits == code);
  }
}

TEST_CASE("E2M1 ties go to the even code") {
  CHECK(e2m1::encode(0.25f).value() == 0.0f);
  CHECK(e2m1::encode(0.75f).value() == 1.0f);
  CHECK(e2m1::encode(1.25f).value() == 1.0f);
  CHECK(e2m1::encode(1.75f).value() == 2.0f);
  CHECK(e2m1::encode(2.5f).value() == 2.0f);
  CHECK(e2m1::encode(3.5f).value() == 4.0f);
  CHECK(e2m1::encode(5.0f).value() == 4.0f);
  CHECK(e2m1::encode(-0.1f).bits == 8);
}

TEST_CASE("E2M1 rounds like a search in its table: sampled floats, halves, bfloat16s") {
  reference::disagreements found;
  const auto compare = [&](float x) { found.compare(bits_of(x), reference::e2m1_encode(x), encode(x)); };
  reference::sampled_floats(reference::e2m1_table(), compare);
  reference::sixteen_bit_floats(compare);
  reference::every_nan(99991, compare);
  INFO(found);
  CHECK(found.none());
}

TEST_CASE("E2M1 rounds like a search in its table: every float", "[.slow]") {
  const reference::disagreements found = reference::every_float(reference::e2m1_table(), 8, encode);
  INFO(found);
  CHECK(found.none());
  reference::disagreements nans;
  reference::every_nan(1, [&](float x) { nans.compare(bits_of(x), 7, encode(x)); });
  INFO(nans);
  CHECK(nans.none());
}
