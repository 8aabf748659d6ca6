#pragma once

/// Sets of floats to try an encoder on, and a count of what goes wrong.

#include "numbers.hpp"  // ascending_rounder, float_of, bits_of, half_value, bfloat16_value

#include <cmath>    // std::isnan
#include <cstdint>  // std::uint32_t, std::uint64_t, std::int64_t
#include <ostream>  // std::ostream
#include <vector>   // std::vector

namespace reference {

/// How often a function under test disagreed with an oracle, and the first case.
struct disagreements {
  std::uint64_t tried = 0;
  std::uint64_t count = 0;
  std::uint32_t first_input = 0;
  std::uint32_t first_expected = 0;
  std::uint32_t first_got = 0;

  void compare(std::uint32_t input, std::uint32_t expected, std::uint32_t got) {
    ++tried;
    if (expected == got) return;
    if (count++ == 0) {
      first_input = input;
      first_expected = expected;
      first_got = got;
    }
  }
  [[nodiscard]] bool none() const { return tried != 0 && count == 0; }

  friend std::ostream& operator<<(std::ostream& out, const disagreements& d) {
    out << d.count << " of " << d.tried << " disagree";
    if (d.count == 0) return out;
    return out << "; first: input 0x" << std::hex << d.first_input << " expected 0x" << d.first_expected << " got 0x"
               << d.first_got << std::dec;
  }
};

inline constexpr std::uint32_t infinity_bits = 0x7F800000u;
inline constexpr std::uint32_t sign_bit = 0x80000000u;

/// Calls f(x) for the floats within `ulps` of a magnitude, of both signs.
template <class F>
void near(double magnitude, int ulps, F&& f) {
  const auto centre = static_cast<std::int64_t>(bits_of(static_cast<float>(magnitude)));
  for (std::int64_t bits = centre - ulps; bits <= centre + ulps; ++bits) {
    if (bits < 0 || bits > static_cast<std::int64_t>(infinity_bits)) continue;
    f(float_of(static_cast<std::uint32_t>(bits)));
    f(float_of(static_cast<std::uint32_t>(bits) | sign_bit));
  }
}

/// Calls f(x) for a sample of all floats: every 9973rd, and 64 ulps around each value of an ascending table and each
/// middle between two (long tables: around every 61st).
template <class F>
void sampled_floats(const std::vector<double>& table, F&& f) {
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 9973)
    f(float_of(static_cast<std::uint32_t>(bits)));
  const std::size_t step = table.size() > 1000 ? 61 : 1;
  for (std::size_t i = 0; i < table.size(); i += step) {
    near(table[i], 64, f);
    if (i + 1 < table.size()) near((table[i] + table[i + 1]) / 2, 64, f);
  }
  near(table.back(), 64, f);
  for (const std::uint32_t bits : {0u, 1u, 0x7FFFFFu, 0x800000u, 0x7F7FFFFFu, infinity_bits}) {
    f(float_of(bits));
    f(float_of(bits | sign_bit));
  }
}

/// Calls f(x) for the value of every half and of every bfloat16, NaNs included.
template <class F>
void sixteen_bit_floats(F&& f) {
  for (unsigned code = 0; code < 0x10000; ++code) {
    f(static_cast<float>(half_value(code)));
    f(static_cast<float>(bfloat16_value(code)));
  }
}

/// Compares encode(x) with a table for all 2^32 floats but the NaNs; codes of negative numbers carry `sign_code`.
template <class Encode>
disagreements every_float(std::vector<double> table, std::uint32_t sign_code, Encode&& encode) {
  disagreements found;
  ascending_rounder round(std::move(table));
  for (std::uint32_t bits = 0; bits <= infinity_bits; ++bits) {
    const unsigned expected = round(static_cast<double>(float_of(bits)));
    found.compare(bits, expected, encode(float_of(bits)));
    found.compare(bits | sign_bit, expected | sign_code, encode(float_of(bits | sign_bit)));
  }
  return found;
}

/// Calls f(x) for all NaNs (or a sample of them).
template <class F>
void every_nan(std::uint32_t step, F&& f) {
  for (std::uint64_t bits = infinity_bits + 1; bits < sign_bit; bits += step) {
    f(float_of(static_cast<std::uint32_t>(bits)));
    f(float_of(static_cast<std::uint32_t>(bits) | sign_bit));
  }
}

}  // namespace reference
