#pragma once

/// Number formats written down from their standards, for the tests: tables of values and searches in them, in double
/// arithmetic. (OCP MX v1.0, sec. 5; OCP OFP8 v1.0; IEEE 754-2008 binary16; bfloat16 = the upper half of binary32)

#include <algorithm>  // std::lower_bound, std::clamp, std::min
#include <bit>        // std::bit_cast
#include <cmath>      // std::ldexp, std::frexp, std::fabs, std::signbit, std::isnan
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uint16_t, std::uint32_t
#include <limits>     // std::numeric_limits
#include <vector>     // std::vector

namespace reference {

inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

/// A binary format with a sign bit, `exponent_bits` and `mantissa_bits`, read without any special codes.
struct binary_format {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  unsigned codes;  ///< how many magnitudes take part in rounding, from 0 up

  [[nodiscard]] unsigned sign_bit() const { return 1u << (exponent_bits + mantissa_bits); }

  /// The value of a magnitude code.
  [[nodiscard]] double magnitude(unsigned code) const {
    const int exponent = static_cast<int>(code >> mantissa_bits);
    const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
    const int hidden = exponent == 0 ? 0 : 1 << mantissa_bits;
    return std::ldexp(hidden + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
  }

  /// The values of the codes 0, 1, 2 … that take part in rounding, ascending.
  [[nodiscard]] std::vector<double> table() const {
    std::vector<double> values;
    for (unsigned code = 0; code < codes; ++code) values.push_back(magnitude(code));
    return values;
  }
};

// The tables of half and bfloat16 end with the code of infinity, which reads as the power of two that would follow the
// largest number: rounding to nearest treats it as such. (IEEE 754-2008, sec. 4.3.1)
inline constexpr binary_format e2m1_format{2, 1, 1, 8};
inline constexpr binary_format e4m3_format{4, 3, 7, 0x7F};
inline constexpr binary_format half_format{5, 10, 15, 0x7C01};
inline constexpr binary_format bfloat16_format{8, 7, 127, 0x7F81};

/// The code in an ascending table whose value is nearest to `magnitude`, ties to the even code, the last one beyond.
inline unsigned nearest_even(const std::vector<double>& table, double magnitude) {
  const auto above = std::lower_bound(table.begin(), table.end(), magnitude);
  const auto high = static_cast<unsigned>(above - table.begin());
  if (above == table.end()) return high - 1;
  if (*above == magnitude) return high;
  const unsigned low = high - 1;
  const double to_low = magnitude - table[low];
  const double to_high = table[high] - magnitude;
  if (to_low == to_high) return low % 2 == 0 ? low : high;
  return to_low < to_high ? low : high;
}

inline const std::vector<double>& e2m1_table() {
  static const std::vector<double> table = e2m1_format.table();
  return table;
}
inline const std::vector<double>& e4m3_table() {
  static const std::vector<double> table = e4m3_format.table();
  return table;
}
inline const std::vector<double>& half_table() {
  static const std::vector<double> table = half_format.table();
  return table;
}
inline const std::vector<double>& bfloat16_table() {
  static const std::vector<double> table = bfloat16_format.table();
  return table;
}

/// Round to nearest even, saturate, keep the sign of zero; NaN becomes +6.
inline unsigned e2m1_encode(float x) {
  if (std::isnan(x)) return 7;
  return nearest_even(e2m1_table(), std::fabs(static_cast<double>(x))) | (std::signbit(x) ? 8u : 0u);
}
/// Round to nearest even, saturate at 448, NaN 0x7F, all with the sign.
inline unsigned e4m3_encode(float x) {
  const unsigned sign = std::signbit(x) ? 0x80u : 0u;
  if (std::isnan(x)) return 0x7Fu | sign;
  return nearest_even(e4m3_table(), std::fabs(static_cast<double>(x))) | sign;
}
/// Round to nearest even, infinity beyond. `x` is not NaN.
inline unsigned half_encode(double x) {
  return nearest_even(half_table(), std::fabs(x)) | (std::signbit(x) ? 0x8000u : 0u);
}
/// Round to nearest even, infinity beyond. `x` is not NaN.
inline unsigned bfloat16_encode(double x) {
  return nearest_even(bfloat16_table(), std::fabs(x)) | (std::signbit(x) ? 0x8000u : 0u);
}

inline double signed_value(const binary_format& format, unsigned code) {
  const double magnitude = format.magnitude(code & (format.sign_bit() - 1));
  return (code & format.sign_bit()) != 0 ? -magnitude : magnitude;
}
inline double e2m1_value(unsigned code) { return signed_value(e2m1_format, code); }
inline double e4m3_value(unsigned code) {
  if ((code & 0x7F) == 0x7F) return std::numeric_limits<double>::quiet_NaN();
  return signed_value(e4m3_format, code);
}
/// The value of an IEEE-like 16-bit code: infinities and NaNs where all exponent bits are set.
inline double value16(const binary_format& format, unsigned code) {
  const unsigned magnitude = code & 0x7FFF;
  const unsigned infinity = format.codes - 1;
  if (magnitude > infinity) return std::numeric_limits<double>::quiet_NaN();
  if (magnitude == infinity) {
    return (code & 0x8000) != 0 ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
  }
  return signed_value(format, code);
}
inline double half_value(unsigned code) { return value16(half_format, code); }
inline double bfloat16_value(unsigned code) { return value16(bfloat16_format, code); }
inline double e8m0_value(unsigned code) {
  return code == 0xFF ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, static_cast<int>(code) - 127);
}

/// Rounds ascending magnitudes one after the other: the same answers as nearest_even, fast enough for every float.
class ascending_rounder {
 public:
  explicit ascending_rounder(std::vector<double> table) : table_(std::move(table)) {}

  unsigned operator()(double magnitude) {
    while (code_ + 1 < table_.size()) {
      const double middle = (table_[code_] + table_[code_ + 1]) / 2;
      if (magnitude < middle || (magnitude == middle && code_ % 2 == 0)) break;
      ++code_;
    }
    return code_;
  }

 private:
  std::vector<double> table_;
  unsigned code_ = 0;
};

/// floor(log2(a)) of a positive number.
inline int floor_log2(double a) {
  int exponent = 0;
  std::frexp(a, &exponent);  // a = f · 2^exponent with f in [0.5, 1)
  return exponent - 1;
}
/// ceil(log2(a)) of a positive number.
inline int ceil_log2(double a) { return std::ldexp(1.0, floor_log2(a)) == a ? floor_log2(a) : floor_log2(a) + 1; }

}  // namespace reference
