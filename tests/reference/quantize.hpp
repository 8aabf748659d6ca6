#pragma once

/// Whole tensors in and out of 4-bit blocks, for the tests.

#include "numbers.hpp"  // e2m1_encode, e2m1_value, e4m3_value, e8m0_value
#include "philox.hpp"   // uniform
#include "scaling.hpp"  // exponent, fine_choice, nv_scale, searched_macro, static_macro, under_factor

#include <algorithm>  // std::min, std::max
#include <cmath>      // std::isnan, std::isinf, std::isfinite, std::signbit, std::fabs
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t, std::uint64_t
#include <optional>   // std::optional
#include <span>       // std::span
#include <vector>     // std::vector

namespace reference {

struct recipe {
  bool nv = false;
  std::size_t block = 32;
  mx_rule mx = mx_rule::floor;
  nv_rule nvfp4 = nv_rule::amax;
  std::size_t macro = 0;                     ///< elements of a macro block, 0 without
  unsigned macro_steps = 0;                  ///< 0: static; 16 or 256: searched
  std::size_t fine = 0;                      ///< elements with a factor of 2 bits, of which a byte has four; 0 without
  bool poison = false;                       ///< a non-finite element poisons its block; else it is saturated
  double largest = 3.402823466385288598e38;  ///< what an infinity saturates to
  double overflow = 3.4028235677973366e38;   ///< the least number that is rounded to infinity
  unsigned least_scale = 0;                  ///< NVFP4: the least code of a block that is not zero
  bool scale_per_expert = true;              ///< NVFP4: one tensor scale an expert; else one for all
  std::vector<float> given_tensor_scales;    ///< none, one, or one an expert
  std::optional<std::uint64_t> seed;         ///< stochastic rounding of the elements
  std::uint64_t first_index = 0;             ///< where in the random stream the first element is
};

struct packed {
  std::size_t experts = 0, rows = 0, cols = 0;
  std::vector<std::uint8_t> codes;   ///< [experts, rows, blocks · block / 2]
  std::vector<std::uint8_t> scales;  ///< [experts, rows, blocks]
  std::vector<std::uint8_t> macros;  ///< [experts, rows, macro blocks]
  std::vector<float> tensor_scales;  ///< [experts] for NVFP4
};

/// Between its two neighbours up with the probability of its distance from the lower one.
inline unsigned stochastic_e2m1(float y, double u) {
  const std::vector<double>& grid = e2m1_table();
  const unsigned sign = std::signbit(y) ? 8u : 0u;
  const double magnitude = std::min(std::fabs(static_cast<double>(y)), 6.0);
  unsigned low = 0;
  while (low < 7 && grid[low + 1] <= magnitude) ++low;
  if (low == 7) return 7 | sign;
  const bool up = u < (magnitude - grid[low]) / (grid[low + 1] - grid[low]);
  return (up ? low + 1 : low) | sign;
}

/// The largest value that y >= 0 may become.
inline float largest_element(float y, bool stochastic) {
  if (!stochastic) return nearest_e2m1(y);
  for (const double value : e2m1_table()) {
    if (value >= static_cast<double>(y)) return static_cast<float>(value);
  }
  return 6;
}

inline std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

/// Packs x[experts, rows, cols]; `given_weights` is empty, [cols] or [experts, cols]. Those below 2^-100 count as 0.
inline packed quantize(const recipe& r, std::size_t experts, std::size_t rows, std::size_t cols, std::vector<float> x,
                       std::span<const float> given_weights = {}) {
  std::vector<float> counted(given_weights.begin(), given_weights.end());
  for (float& w : counted) w = w < std::ldexp(1.0, -100) ? 0.0f : w;
  const std::span<const float> weights(counted);
  const std::size_t blocks = ceil_div(cols, r.block);
  const std::size_t macros = r.macro == 0 ? 0 : ceil_div(cols, r.macro);
  packed out{experts, rows, cols, {}, {}, {}, {}};
  out.codes.resize(experts * rows * blocks * r.block / 2);
  out.scales.resize(experts * rows * blocks);
  out.macros.resize(experts * rows * macros);

  // What tensor scales come from: all that is finite, outside of poisoned blocks; what infinities saturate to where
  // that is all 0.
  std::vector<float> finite = x;
  for (float& v : finite) v = std::isfinite(v) ? v : 0.0f;

  // Special values first: afterwards x is finite, and poisoned blocks are zeros.
  std::vector<bool> poisoned(out.scales.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isfinite(x[i])) continue;
    if (r.poison) {
      poisoned[i / cols * blocks + i % cols / r.block] = true;
    } else {
      const auto limit = static_cast<float>(r.largest);
      x[i] = std::isnan(x[i]) ? 0.0f : std::signbit(x[i]) ? -limit : limit;
    }
  }
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (poisoned[i / cols * blocks + i % cols / r.block]) x[i] = finite[i] = 0;
  }

  if (r.nv) {
    for (std::size_t e = 0; e < experts; ++e) {
      const auto largest_of = [&](std::span<const float> all) {
        return amax(r.scale_per_expert ? all.subspan(e * rows * cols, rows * cols) : all);
      };
      const float a = largest_of(finite) > 0 ? largest_of(finite) : largest_of(x);
      const std::vector<float>& given = r.given_tensor_scales;
      out.tensor_scales.push_back(given.empty() ? tensor_scale(r.nvfp4, a) : given[given.size() == 1 ? 0 : e]);
    }
  }

  // Whether the largest of elements y decodes to what the input's type has no finite number for.
  const auto past = [&](const std::vector<float>& y, float f, int exponent) {
    return std::ldexp(static_cast<double>(quotient(largest_element(amax(y), r.seed.has_value()), f)), exponent) >=
           r.overflow;
  };
  for (std::size_t row = 0; row < experts * rows; ++row) {
    const std::span<const float> line = std::span<const float>(x).subspan(row * cols, cols);
    const auto row_weights = weights.size() > cols ? weights.subspan(row / rows * cols, cols) : weights;
    for (std::size_t m = 0; m < macros; ++m) {
      const std::size_t begin = m * r.macro;
      const std::size_t size = std::min(r.macro, cols - begin);
      const auto part = line.subspan(begin, size);
      if (r.fine != 0) continue;  // chosen with the scales
      out.macros[row * macros + m] = static_cast<std::uint8_t>(
          r.macro_steps == 0
              ? static_macro(amax(part))
              : searched_macro(r.mx, part, row_weights.empty() ? row_weights : row_weights.subspan(begin, size),
                               r.block, r.macro_steps));
    }
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::size_t begin = b * r.block;
      const std::size_t size = std::min(r.block, cols - begin);
      const auto part = line.subspan(begin, size);
      const auto part_weights = row_weights.empty() ? row_weights : row_weights.subspan(begin, size);
      std::uint8_t& scale = out.scales[row * blocks + b];
      if (poisoned[row * blocks + b]) {
        scale = r.nv ? 0x7F : 0xFF;
        continue;
      }
      if (amax(part) == 0) continue;
      std::vector<float> y;
      if (r.nv) {
        const float t = out.tensor_scales[row / rows];
        unsigned code = nv_scale(r.nvfp4, part, part_weights, t, r.least_scale);
        const auto decodes_past = [&](unsigned of) {
          const float unit = product(t, static_cast<float>(e4m3_value(of)));
          return static_cast<double>(product(largest_element(quotient(amax(part), unit), r.seed.has_value()), unit)) >=
                 r.overflow;
        };
        while (code > 1 && decodes_past(code)) --code;
        scale = static_cast<std::uint8_t>(code);
        if (code == 0) continue;
        const float unit = product(t, static_cast<float>(e4m3_value(code)));
        for (const float v : part) y.push_back(unit == 0 ? 0 : quotient(v, unit));
      } else if (r.fine != 0) {
        fine_block chosen = fine_choice(r.mx, part, part_weights, r.fine, r.macro_steps != 0);
        const auto decodes_past = [&](std::size_t first) {
          const auto group = part.subspan(first, std::min(r.fine, size - first));
          const unsigned m = chosen.m[first / r.fine];
          const float q = largest_element(fine_element(amax(group), chosen.exponent, m), r.seed.has_value());
          return std::ldexp(static_cast<double>(product(q, fine_factor(m))), chosen.exponent) >= r.overflow;
        };
        for (std::size_t first = 0; first < size; first += r.fine) {
          while (decodes_past(first)) --chosen.exponent;
        }
        scale = static_cast<std::uint8_t>(chosen.exponent + 127);
        for (std::size_t i = 0; i < size; ++i) {
          const unsigned m = chosen.m[i / r.fine];
          y.push_back(fine_element(part[i], chosen.exponent, m));
          const std::size_t factor = (begin + i) / r.fine;
          out.macros[row * macros + factor / 4] |= static_cast<std::uint8_t>(m << (factor % 4 * 2));
        }
      } else if (r.macro != 0) {
        const float f = macro_factor(out.macros[row * macros + begin / r.macro]);
        macro_block_part chosen = under_factor(r.mx, part, part_weights, f);
        while (past(chosen.y, f, chosen.exponent)) {
          --chosen.exponent;
          for (float& v : chosen.y) v = scaled(v, 1);
        }
        scale = static_cast<std::uint8_t>(chosen.exponent + 127);
        y = chosen.y;
      } else {
        int chosen = exponent(r.mx, part, part_weights);
        for (const float v : part) y.push_back(scaled(v, -chosen));
        for (; past(y, 1, chosen); --chosen) {
          for (float& v : y) v = scaled(v, 1);
        }
        scale = static_cast<std::uint8_t>(chosen + 127);
      }
      for (std::size_t i = 0; i < size; ++i) {
        const std::size_t k = begin + i;
        const unsigned code =
            r.seed ? stochastic_e2m1(y[i], uniform(*r.seed, r.first_index + row * cols + k)) : e2m1_encode(y[i]);
        out.codes[row * blocks * r.block / 2 + k / 2] |= static_cast<std::uint8_t>(code << (k % 2 * 4));
      }
    }
  }
  return out;
}

/// The floats that packed blocks stand for.
inline std::vector<float> dequantize(const recipe& r, const packed& p) {
  const std::size_t blocks = ceil_div(p.cols, r.block);
  const std::size_t macros = r.macro == 0 ? 0 : ceil_div(p.cols, r.macro);
  std::vector<float> out;
  for (std::size_t row = 0; row < p.experts * p.rows; ++row) {
    for (std::size_t k = 0; k < p.cols; ++k) {
      const unsigned byte = p.codes[row * blocks * r.block / 2 + k / 2];
      const auto q = static_cast<float>(e2m1_value(byte >> (k % 2 * 4) & 0xF));
      const unsigned scale = p.scales[row * blocks + k / r.block];
      if (r.nv) {
        out.push_back(product(q, product(p.tensor_scales[row / p.rows], static_cast<float>(e4m3_value(scale)))));
        continue;
      }
      if (r.fine != 0) {
        const unsigned m = p.macros[row * macros + k / r.macro] >> (k / r.fine % 4 * 2) & 3;
        out.push_back(static_cast<float>(static_cast<double>(product(q, fine_factor(m))) * e8m0_value(scale)));
        continue;
      }
      const float f = macros == 0 ? 1.0f : macro_factor(p.macros[row * macros + k / r.macro]);
      out.push_back(static_cast<float>(static_cast<double>(quotient(q, f)) * e8m0_value(scale)));
    }
  }
  return out;
}

}  // namespace reference
