#pragma once

/// Between the library's types and those of the oracles in tests/reference.

#include <tetromino/float16.hpp>
#include <tetromino/matrix.hpp>
#include <tetromino/options.hpp>
#include <tetromino/packed.hpp>
#include <tetromino/scaling.hpp>

#include "reference/generators.hpp"
#include "reference/quantize.hpp"

#include <algorithm>  // std::clamp
#include <cmath>      // std::ldexp, std::isnan, std::nanf
#include <concepts>   // std::same_as
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint16_t, std::uint64_t
#include <span>       // std::span
#include <string>     // std::string
#include <vector>     // std::vector

namespace tetromino_test {

/// x rounded to an input type, by the oracle; NaN stays NaN.
template <class T>
[[nodiscard]] T number(float x) {
  if constexpr (std::same_as<T, float>) {
    return x;
  } else if constexpr (std::same_as<T, tetromino::half>) {
    return tetromino::half::from_bits(static_cast<std::uint16_t>(std::isnan(x) ? 0x7E00 : reference::half_encode(x)));
  } else {
    return tetromino::bfloat16::from_bits(
        static_cast<std::uint16_t>(std::isnan(x) ? 0x7FC0 : reference::bfloat16_encode(x)));
  }
}
/// The float value of an input type, by the oracle.
[[nodiscard]] inline float value_of(float x) { return x; }
[[nodiscard]] inline float value_of(tetromino::half x) { return static_cast<float>(reference::half_value(x.bits)); }
[[nodiscard]] inline float value_of(tetromino::bfloat16 x) {
  return static_cast<float>(reference::bfloat16_value(x.bits));
}

template <class T>
[[nodiscard]] std::vector<float> values_of(std::span<const T> x) {
  std::vector<float> out;
  for (const T v : x) out.push_back(value_of(v));
  return out;
}

/// What an infinity saturates to, by the standards.
template <class T>
[[nodiscard]] double largest_finite() {
  if constexpr (std::same_as<T, float>) return static_cast<double>(reference::float_of(0x7F7FFFFF));
  if constexpr (std::same_as<T, tetromino::half>) return reference::half_value(0x7BFF);
  return reference::bfloat16_value(0x7F7F);
}

/// The recipes without macro blocks.
[[nodiscard]] inline std::vector<tetromino::recipe> plain_recipes() {
  std::vector<tetromino::recipe> out;
  for (const std::string format : {"mxfp4-32/", "mxfp4-16/"}) {
    for (const std::string rule : {"floor", "ceil", "round-up", "even", "oas", "min-error"}) {
      out.push_back(tetromino::recipe::parse(format + rule));
    }
  }
  for (const std::string rule : {"amax", "four-over-six", "min-error"}) {
    out.push_back(tetromino::recipe::parse("nvfp4/" + rule));
  }
  return out;
}
/// The recipes with one of the macro-block rules, in all sizes.
[[nodiscard]] inline std::vector<tetromino::recipe> macro_recipes(const std::string& macro) {
  std::vector<tetromino::recipe> out;
  for (const tetromino::recipe& plain : plain_recipes()) {
    if (plain.format.scale == tetromino::scale_type::e4m3) continue;
    for (const std::string size : {"@32", "@64", "@128", "@256"}) {
      out.push_back(tetromino::recipe::parse(plain.name() + "/" + macro + size));
    }
    if (plain.format.block != 32 || macro == "mbs-search256") continue;
    for (const std::string size : {"@8x2", "@16x2"}) {
      out.push_back(tetromino::recipe::parse(plain.name() + "/" + macro + size));
    }
  }
  return out;
}

/// The same recipe and options for the oracle; `largest` is what infinities saturate to.
[[nodiscard]] inline reference::recipe oracle_of(const tetromino::recipe& r, const tetromino::quantize_options& options,
                                                 double largest) {
  using tetromino::scale_rule;
  reference::recipe out;
  out.nv = r.format.scale == tetromino::scale_type::e4m3;
  out.block = r.format.block;
  switch (r.rule) {
    case scale_rule::floor:
      out.mx = reference::mx_rule::floor;
      break;
    case scale_rule::ceil:
      out.mx = reference::mx_rule::ceil;
      break;
    case scale_rule::round_up:
      out.mx = reference::mx_rule::round_up;
      break;
    case scale_rule::even:
      out.mx = reference::mx_rule::even;
      break;
    case scale_rule::oas:
      out.mx = reference::mx_rule::oas;
      break;
    case scale_rule::amax:
      out.nvfp4 = reference::nv_rule::amax;
      break;
    case scale_rule::four_over_six:
      out.nvfp4 = reference::nv_rule::four_over_six;
      break;
    case scale_rule::min_error:
      out.mx = reference::mx_rule::min_error;
      out.nvfp4 = reference::nv_rule::min_error;
      break;
  }
  out.macro = r.format.macro_block;
  out.fine = r.format.macro_bits == 2 ? tetromino::elements_per_factor(r.format) : 0;
  out.macro_steps = r.macro == tetromino::macro_rule::from_amax ? 0
                    : r.macro == tetromino::macro_rule::search  ? 16
                                                                : 256;
  out.poison = options.special == tetromino::special_values::poison;
  out.largest = largest;
  out.overflow = largest + std::ldexp(1.0, largest < 1e5 ? 4 : largest < 3.4e38 ? 119 : 103);  // half a unit more
  out.least_scale = options.tiny_blocks == tetromino::tiny_block_scale::least ? 1 : 0;
  out.scale_per_expert = options.scope == tetromino::tensor_scale_scope::per_matrix;
  out.given_tensor_scales.assign(options.tensor_scales.begin(), options.tensor_scales.end());
  if (options.rounding == tetromino::element_rounding::stochastic) out.seed = options.seed;
  out.first_index = options.first_index;
  return out;
}

/// Values for a test tensor, in runs of a few of one kind, so that blocks of all sorts lie next to each other: normal,
/// on ties and thresholds, zeros of both signs; in every third tensor also tiny, huge, and wide in exponent.
class awkward_numbers {
 public:
  explicit awkward_numbers(std::uint64_t seed) : random_(seed), kinds_(random_.below(3) == 0 ? 10 : 7) {}

  float operator()() {
    if (left_ == 0) {
      left_ = 1 + random_.below(40);
      kind_ = random_.below(kinds_);
      exponent_ = static_cast<int>(random_.below(20)) - 10;
    }
    --left_;
    const float sign = random_.below(2) == 0 ? 1.0f : -1.0f;
    const auto u = static_cast<float>(random_.uniform());
    switch (kind_) {
      case 0:
        return sign * 0.0f;
      case 1:
        return sign * std::ldexp(static_cast<float>(random_.below(65)) / 8, exponent_);
      case 2:
        return random_.below(4) == 0 ? sign * std::ldexp(u, exponent_) : sign * 0.0f;
      case 3:
        return sign * std::ldexp(1.75f, exponent_ + static_cast<int>(random_.below(3)));
      case 7:
        return sign * std::ldexp(1.0f + u / 2, static_cast<int>(random_.below(270)) - 145);
      case 8:
        return sign * std::ldexp(u, static_cast<int>(random_.below(24)) - 149);
      case 9:
        return sign * std::ldexp(u * 0.999f, 128);
      default:
        return static_cast<float>(random_.normal()) * std::ldexp(1.0f, exponent_);
    }
  }

 private:
  reference::generator random_;
  std::size_t kinds_;
  std::size_t left_ = 0;
  std::size_t kind_ = 0;
  int exponent_ = 0;
};

/// A batch [matrices, rows, cols] in memory, at a random offset, with random strides and NaN in the gaps.
template <class T>
struct sample {
  std::vector<T> memory;
  tetromino::batch_view<T> view;

  sample(reference::generator& random, std::size_t matrices, std::size_t rows, std::size_t cols) {
    const std::size_t offset = random.below(20);
    const std::size_t row_stride = cols + random.below(2) * random.below(20);
    const std::size_t matrix_stride = rows * row_stride + random.below(2) * random.below(20);
    memory.assign(offset + matrices * matrix_stride + row_stride, number<T>(std::nanf("")));
    view = {memory.data() + offset, matrices, rows, cols, row_stride, matrix_stride};
    awkward_numbers numbers(random.bits());
    const auto largest = static_cast<float>(largest_finite<T>());
    fill([&] { return number<T>(std::clamp(numbers(), -largest, largest)); });
  }

  template <class F>
  void fill(F&& next) {
    for (std::size_t e = 0; e < view.matrices; ++e) {
      for (std::size_t r = 0; r < view.rows; ++r) {
        for (std::size_t k = 0; k < view.cols; ++k) view.row(e, r)[k] = next();
      }
    }
  }
  /// The values [matrices, rows, cols], without gaps.
  [[nodiscard]] std::vector<float> values() const {
    std::vector<float> out;
    for (std::size_t e = 0; e < view.matrices; ++e) {
      for (std::size_t r = 0; r < view.rows; ++r) {
        for (std::size_t k = 0; k < view.cols; ++k) out.push_back(value_of(view.row(e, r)[k]));
      }
    }
    return out;
  }
};

/// Where two sequences differ first, in words; empty where they do not.
template <class A, class B>
[[nodiscard]] std::string first_difference(const char* what, const A& expected, const B& got) {
  if (expected.size() != got.size()) {
    return std::string(what) + ": expected " + std::to_string(expected.size()) + " entries, got " +
           std::to_string(got.size());
  }
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const bool both_nan = expected[i] != expected[i] && got[i] != got[i];
    if (expected[i] == got[i] || both_nan) continue;
    return std::string(what) + "[" + std::to_string(i) + "]: expected " + std::to_string(expected[i]) + ", got " +
           std::to_string(got[i]);
  }
  return {};
}

/// Where packed storage differs from the oracle's, in words; empty where it does not.
template <class Format>
[[nodiscard]] std::string difference(const reference::packed& expected, const tetromino::packed<Format>& got) {
  std::vector<float> tensor_scales;
  for (std::size_t e = 0; e < expected.tensor_scales.size(); ++e) tensor_scales.push_back(got.view().tensor_scale(e));
  for (const std::string& found : {first_difference("tensor scales", expected.tensor_scales, tensor_scales),
                                   first_difference("macros", expected.macros, got.macros),
                                   first_difference("scales", expected.scales, got.scales),
                                   first_difference("codes", expected.codes, got.codes)}) {
    if (!found.empty()) return found;
  }
  return {};
}

}  // namespace tetromino_test
