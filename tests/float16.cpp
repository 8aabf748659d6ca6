#include "check.hpp"

#include <tetromino/float16.hpp>

#include "reference/floats.hpp"

#include <cmath>    // std::fabs, std::signbit, std::isnan
#include <cstdint>  // std::uint8_t, std::uint32_t

namespace {

using reference::bits_of;
using tetromino::bfloat16;
using tetromino::half;

std::uint32_t encode_half(float x) { return half::encode(x).bits; }
std::uint32_t encode_bfloat16(float x) { return bfloat16::encode(x).bits; }

/// A NaN must stay a quiet NaN of the same sign; which payload it has is left open.
template <class T>
std::uint32_t quiet_nan(float x, std::uint32_t infinity, std::uint32_t quiet_bit) {
  const std::uint32_t code = T::encode(x).bits;
  const bool is_quiet = (code & infinity) == infinity && (code & quiet_bit) != 0;
  return is_quiet && (code >= 0x8000) == std::signbit(x) && std::isnan(T::encode(x).value()) ? 1 : 0;
}

}  // namespace

TEST_CASE("every half has its value and comes back from it") {
  reference::disagreements found;
  for (unsigned code = 0; code < 0x10000; ++code) {
    const float value = half{static_cast<std::uint16_t>(code)}.value();
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
    const float value = bfloat16{static_cast<std::uint16_t>(code)}.value();
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
