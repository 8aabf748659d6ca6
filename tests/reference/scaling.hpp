#pragma once

/// How block scales and macro-block scales are chosen, for the tests: definitions, loops and tables, no shortcuts.
/// Where the rules say "float", a double result is rounded to float: with 53 bits against 24 that equals the float
/// operation for one product, sum or quotient. (Figueroa, When is double rounding innocuous?, 1995)

#include "numbers.hpp"  // e2m1_encode, e2m1_value, e4m3_encode, e4m3_value, floor_log2, ceil_log2, bits_of

#include <algorithm>  // std::clamp, std::max, std::min, std::none_of
#include <array>      // std::array
#include <cmath>      // std::fabs, std::ldexp
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span
#include <vector>     // std::vector

namespace reference {

inline float product(float a, float b) {
  // Volatile: a compiler may see through the double and fuse the product into a sum that follows.
  const volatile float rounded = static_cast<float>(static_cast<double>(a) * static_cast<double>(b));
  return rounded;
}
inline float quotient(float a, float b) { return static_cast<float>(static_cast<double>(a) / static_cast<double>(b)); }
inline float sum(float a, float b) { return static_cast<float>(static_cast<double>(a) + static_cast<double>(b)); }
inline float difference(float a, float b) {
  return static_cast<float>(static_cast<double>(a) - static_cast<double>(b));
}
inline float scaled(float x, int exponent) { return static_cast<float>(std::ldexp(static_cast<double>(x), exponent)); }
inline float nearest_e2m1(float y) { return static_cast<float>(e2m1_value(e2m1_encode(y))); }

inline float amax(std::span<const float> x) {
  float largest = 0;
  for (const float v : x) largest = std::max(largest, std::fabs(v));
  return largest;
}

/// The error of a span of elements, whose order of summation is part of the specification: sixteen strided partial
/// sums, then halves onto halves.
class error_sum {
 public:
  void add(float error, float weight = 1) {
    float& partial = partial_[count_++ % 16];
    partial = sum(partial, product(weight, product(error, error)));
  }
  [[nodiscard]] float total() const {
    std::array<float, 16> s = partial_;
    for (std::size_t half : {8u, 4u, 2u, 1u}) {
      for (std::size_t i = 0; i < half; ++i) s[i] = sum(s[i], s[i + half]);
    }
    return s[0];
  }

 private:
  std::array<float, 16> partial_{};
  std::size_t count_ = 0;
};

enum class mx_rule { floor, ceil, round_up, even, oas, min_error };
enum class nv_rule { amax, four_over_six, min_error };

/// The least exponent E with a ≤ limit · 2^E.
inline int least_exponent(double a, double limit) {
  int exponent = floor_log2(a) - 4;  // a > 8 · 2^exponent: too small for every limit here
  while (a > std::ldexp(limit, exponent)) ++exponent;
  return exponent;
}

/// The block exponent of one of the rules that look at the largest magnitude a > 0 only; not clamped.
inline int exponent_of_amax(mx_rule rule, double a) {
  switch (rule) {
    case mx_rule::floor:
      return floor_log2(a) - 2;
    case mx_rule::ceil:
      return ceil_log2(a) - 2;
    case mx_rule::round_up:
      return least_exponent(a, 6);
    case mx_rule::even: {
      // One mantissa bit is left: 1, 1.5 or 2 times the power of two, ties to the even one of them (1 or 2).
      const double mantissa = a / std::ldexp(1.0, floor_log2(a));
      return (mantissa >= 1.75 ? floor_log2(a) + 1 : floor_log2(a)) - 2;
    }
    default:
      return least_exponent(a, 7);
  }
}

inline int clamp_exponent(int exponent) { return std::clamp(exponent, -127, 127); }

enum class ties { first_wins, last_wins };

/// The candidate of least error. Weights count unless they leave all candidates with the
/// same error: then `error(candidate, weights)` is looked at without them.
template <class Candidates, class Error>
int least_error(ties tie, const Candidates& candidates, std::span<const float> weights, const Error& error) {
  std::vector<float> errors;
  for (const int candidate : candidates) errors.push_back(error(candidate, weights));
  const auto differs = [&](float e) { return e < errors[0] || e > errors[0]; };
  if (!weights.empty() && std::none_of(errors.begin(), errors.end(), differs)) {
    return least_error(tie, candidates, std::span<const float>{}, error);
  }
  std::size_t best = 0;
  for (std::size_t i = 1; i < errors.size(); ++i) {
    if (errors[i] < errors[best] || (tie == ties::last_wins && errors[i] == errors[best])) best = i;
  }
  return candidates[best];
}

/// The block exponent of x · 2^k, not all zero, clamped. `weights` is empty or as long as x.
inline int exponent(mx_rule rule, std::span<const float> x, std::span<const float> weights = {}, int k = 0) {
  const auto a = static_cast<double>(amax(x));
  if (rule != mx_rule::min_error) return clamp_exponent(k + exponent_of_amax(rule, a));

  // Of four exponents the one with the least squared error, the larger one on ties.
  const int up = clamp_exponent(k + exponent_of_amax(mx_rule::round_up, a));
  const std::array<int, 4> candidates{clamp_exponent(up + 1), up, clamp_exponent(up - 1), clamp_exponent(up - 2)};
  return least_error(ties::first_wins, candidates, weights, [&](int exponent, std::span<const float> by) {
    error_sum errors;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const float y = scaled(x[i], k - exponent);
      errors.add(difference(y, nearest_e2m1(y)), by.empty() ? 1.0f : by[i]);
    }
    return scaled(errors.total(), 2 * (exponent - up));
  });
}

/// The tensor scale of NVFP4, in the sense of decoding; never subnormal.
inline float tensor_scale(nv_rule rule, float tensor_amax) {
  const float scale = quotient(tensor_amax, rule == nv_rule::four_over_six ? 1536.0f : 2688.0f);
  return tensor_amax == 0 ? 0 : std::max(scale, std::numeric_limits<float>::min());
}

inline float nv_error(std::span<const float> x, std::span<const float> weights, float t, unsigned code) {
  const auto s = static_cast<float>(e4m3_value(code));
  error_sum errors;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float y = quotient(x[i], product(t, s));
    errors.add(difference(y, nearest_e2m1(y)), weights.empty() ? 1.0f : weights[i]);
  }
  return product(product(s, s), errors.total());
}

/// The E4M3 code of an NVFP4 block scale, which is at least `least` unless the block is zero.
inline unsigned nv_scale(nv_rule rule, std::span<const float> x, std::span<const float> weights, float t,
                         unsigned least = 0) {
  const float a = amax(x);
  if (a == 0 || t == 0) return 0;
  const unsigned code6 = std::max(least, e4m3_encode(quotient(a, product(6, t))));
  if (rule == nv_rule::amax) return code6;
  const auto error_of = [&](ties tie, const std::vector<int>& candidates) {
    return static_cast<unsigned>(least_error(tie, candidates, weights, [&](int code, std::span<const float> by) {
      return nv_error(x, by, t, static_cast<unsigned>(code));
    }));
  };
  if (rule == nv_rule::four_over_six) {
    const unsigned code4 = std::max(least, e4m3_encode(quotient(a, product(4, t))));
    if (code6 == 0) return code4;
    return error_of(ties::first_wins, {static_cast<int>(code6), static_cast<int>(code4)});
  }
  if (code6 == 0) return 0;
  std::vector<int> candidates;
  for (int step = -8; step <= 8; ++step) candidates.push_back(std::clamp(static_cast<int>(code6) + step, 1, 126));
  return error_of(ties::last_wins, candidates);
}

/// What the macro-block factor belongs to: f = 1 + m/256.
inline float macro_factor(unsigned m) { return static_cast<float>(1.0 + static_cast<double>(m) / 256.0); }

/// The eight upper mantissa bits of 6 / amax.
inline unsigned static_macro(float macro_amax) {
  return macro_amax == 0 ? 0 : (bits_of(quotient(6, macro_amax)) >> 15) & 0xFF;
}

/// A block under a macro-block factor: its exponent and the values y that become elements.
struct macro_block_part {
  int exponent = -127;
  std::vector<float> y;
};

/// Block x, not all zero, under factor f.
inline macro_block_part under_factor(mx_rule rule, std::span<const float> x, std::span<const float> weights, float f) {
  const int k = std::clamp(floor_log2(static_cast<double>(amax(x))), -126, 126);
  std::vector<float> g;
  for (const float v : x) g.push_back(product(f, scaled(v, -k)));
  macro_block_part part;
  part.exponent = exponent(rule, g, weights, k);
  for (const float v : g) part.y.push_back(scaled(v, k - part.exponent));
  return part;
}

/// The error of a macro block under factor f: x holds its blocks one after the other.
inline float macro_error(mx_rule rule, std::span<const float> x, std::span<const float> weights, std::size_t block,
                         float f) {
  const int reference_exponent = std::clamp(floor_log2(static_cast<double>(amax(x))), -126, 126);
  error_sum errors;
  for (std::size_t begin = 0; begin < x.size(); begin += block) {
    const std::size_t size = std::min(block, x.size() - begin);
    const auto part_x = x.subspan(begin, size);
    const auto part_weights = weights.empty() ? weights : weights.subspan(begin, size);
    const bool zero = amax(part_x) == 0;
    const macro_block_part part = zero ? macro_block_part{} : under_factor(rule, part_x, part_weights, f);
    for (std::size_t i = 0; i < size; ++i) {
      const float e =
          zero ? 0 : scaled(difference(part.y[i], nearest_e2m1(part.y[i])), part.exponent - reference_exponent);
      errors.add(e, weights.empty() ? 1.0f : weights[begin + i]);
    }
  }
  return quotient(errors.total(), product(f, f));
}

/// The m with the least error among 16 or 256; the smaller one on ties.
inline unsigned searched_macro(mx_rule rule, std::span<const float> x, std::span<const float> weights,
                               std::size_t block, unsigned steps) {
  if (amax(x) == 0) return 0;
  std::vector<int> candidates;
  for (unsigned m = 0; m < 256; m += 256 / steps) candidates.push_back(static_cast<int>(m));
  return static_cast<unsigned>(
      least_error(ties::first_wins, candidates, weights, [&](int m, std::span<const float> by) {
        return macro_error(rule, x, by, block, macro_factor(static_cast<unsigned>(m)));
      }));
}

/// What a factor of 2 bits is: f = 1 + m/4, by which elements are multiplied when they are decoded.
inline float fine_factor(unsigned m) { return static_cast<float>(1.0 + static_cast<double>(m) / 4.0); }

/// What becomes an element, under block exponent E and factor m.
inline float fine_element(float x, int exponent, unsigned m) {
  return product(scaled(x, -exponent), quotient(1, fine_factor(m)));
}
/// How far an element is from what it decodes to, in units of 2^E.
inline float fine_difference(float x, int exponent, unsigned m) {
  return difference(scaled(x, -exponent), product(nearest_e2m1(fine_element(x, exponent, m)), fine_factor(m)));
}
inline float fine_error(std::span<const float> x, std::span<const float> weights, int exponent, unsigned m) {
  error_sum errors;
  for (std::size_t i = 0; i < x.size(); ++i) {
    errors.add(fine_difference(x[i], exponent, m), weights.empty() ? 1.0f : weights[i]);
  }
  return errors.total();
}

/// A block with factors of 2 bits: its exponent, the m of each group, and the error in units of 2^exponent.
struct fine_block {
  int exponent = -127;
  std::array<unsigned, 4> m{};
  float error = 0;
};

/// The factors of block x under an exponent, one for each so many elements: by the largest element of each, or by
/// search.
inline fine_block fine_under(std::span<const float> x, std::span<const float> weights, std::size_t elements,
                             bool search, int exponent) {
  fine_block out{exponent, {}, 0};
  std::array<float, 4> errors{};
  const std::array<int, 4> candidates{0, 1, 2, 3};
  for (std::size_t g = 0; g * elements < x.size(); ++g) {
    const std::size_t size = std::min(elements, x.size() - g * elements);
    const auto group = x.subspan(g * elements, size);
    const auto by = weights.empty() ? weights : weights.subspan(g * elements, size);
    const float largest = amax(group);
    out.m[g] = static_cast<unsigned>(
        search
            ? least_error(ties::first_wins, candidates, by,
                          [&](int m, std::span<const float> w) {
                            return fine_error(group, w, exponent, static_cast<unsigned>(m));
                          })
            : least_error(ties::first_wins, candidates, std::span<const float>{}, [&](int m, std::span<const float>) {
                return std::fabs(fine_difference(largest, exponent, static_cast<unsigned>(m)));
              }));
    errors[g] = fine_error(group, by, exponent, out.m[g]);
  }
  out.error = elements == 8 ? sum(sum(errors[0], errors[2]), sum(errors[1], errors[3])) : sum(errors[0], errors[1]);
  return out;
}

/// Block x, not all zero: the exponent that the rule gives it without factors, or of four that with the least error.
inline fine_block fine_choice(mx_rule rule, std::span<const float> x, std::span<const float> weights,
                              std::size_t elements, bool search) {
  const auto under = [&](int exponent, std::span<const float> by) {
    return fine_under(x, by, elements, search, exponent);
  };
  if (rule != mx_rule::min_error) return under(exponent(rule, x), weights);
  const int up = clamp_exponent(exponent_of_amax(mx_rule::round_up, static_cast<double>(amax(x))));
  const std::array<int, 4> candidates{clamp_exponent(up + 1), up, clamp_exponent(up - 1), clamp_exponent(up - 2)};
  std::span<const float> counted;
  const int best = least_error(ties::first_wins, candidates, weights, [&](int exponent, std::span<const float> by) {
    counted = by;  // none where weights leave all exponents with the same error
    return scaled(under(exponent, by).error, 2 * (exponent - up));
  });
  return under(best, counted);
}

}  // namespace reference
