#pragma once

/// Matrix products against sums in double, for any backend: what tests/matmul.cpp and tests/isa/simd_matmul.cpp share.

#include <tetromino/matmul.hpp>
#include <tetromino/repacked.hpp>

#include "reference/generators.hpp"
#include "reference/numbers.hpp"

#include <cmath>    // std::abs, std::ldexp
#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t
#include <cstring>  // std::memcmp
#include <limits>   // std::numeric_limits
#include <span>     // std::span
#include <vector>   // std::vector

namespace tetromino_test {

using tetromino::any_format;
using tetromino::matrix_view;
using tetromino::packed;
using tetromino::scale_type;

inline const std::vector<any_format>& all_formats() {
  static const std::vector<any_format> formats = [] {
    std::vector<any_format> out{{scale_type::e4m3, 16, 0}};
    for (const std::size_t block : {16u, 32u}) {
      for (const std::size_t macro : {0u, 32u, 64u, 128u, 256u}) out.push_back({scale_type::e8m0, block, macro});
    }
    for (const std::size_t macro : {32u, 64u}) out.push_back({scale_type::e8m0, 32, macro, 2});
    return out;
  }();
  return formats;
}

/// Storage of random codes, of scales around 1, and of any macro bytes; a tensor scale for each matrix.
inline packed<any_format> random_packed(reference::generator& random, const any_format& format, std::size_t matrices,
                                        std::size_t rows, std::size_t cols) {
  packed<any_format> out(format, matrices, rows, cols, matrices);
  for (auto& byte : out.codes) byte = static_cast<std::uint8_t>(random.bits());
  for (auto& byte : out.scales) {
    byte = static_cast<std::uint8_t>(format.scale == scale_type::e8m0 ? 120 + random.below(14) : 1 + random.below(126));
  }
  for (auto& byte : out.macros) byte = static_cast<std::uint8_t>(random.bits());
  for (auto& scale : out.tensor_scales) scale = static_cast<float>(random.uniform());
  return out;
}

/// The numbers that packed storage stands for: q / f · scale · tensor scale, or q · f · scale where factors have 2
/// bits. [matrices · rows, cols]
inline std::vector<double> meaning(const packed<any_format>& p) {
  std::vector<double> out;
  const std::size_t blocks = (p.cols + p.format.block - 1) / p.format.block;
  for (std::size_t row = 0; row < p.matrices * p.rows; ++row) {
    for (std::size_t k = 0; k < p.cols; ++k) {
      const unsigned byte = p.codes[row * blocks * p.format.block / 2 + k / 2];
      double x = reference::e2m1_value(k % 2 == 0 ? byte & 15 : byte >> 4);
      const unsigned scale = p.scales[row * blocks + k / p.format.block];
      if (p.format.scale == scale_type::e4m3) {
        x *= reference::e4m3_value(scale) * static_cast<double>(p.tensor_scales[row / p.rows]);
      } else {
        x *= reference::e8m0_value(scale);
      }
      if (const std::size_t macro = p.format.macro_block; macro != 0) {
        const unsigned m = p.macros[row * ((p.cols + macro - 1) / macro) + k / macro];
        if (p.format.macro_bits == 8) {
          x /= 1.0 + m / 256.0;
        } else {
          x *= 1.0 + (m >> (k / (macro / 4) % 4 * 2) & 3) / 4.0;
        }
      }
      out.push_back(x);
    }
  }
  return out;
}

inline tetromino::int8_matrix random_int8(reference::generator& random, std::size_t rows, std::size_t cols) {
  tetromino::int8_matrix out(rows, cols);
  for (auto& v : out.values) v = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
  for (auto& s : out.scales) s = static_cast<float>(random.uniform());
  return out;
}
inline std::vector<double> meaning(const tetromino::int8_matrix& x) {
  std::vector<double> out;
  const std::size_t blocks = (x.cols + 31) / 32;
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    out.push_back(x.values[i] * static_cast<double>(x.scales[i / x.cols * blocks + i % x.cols / 32]));
  }
  return out;
}

/// Says how far an output is from Σ x · w, in units of 2^-24 Σ |x · w|; infinitely far if nothing was written there.
inline double error_of(float got, std::span<const double> x, std::span<const double> w) {
  double sum = 0, magnitudes = 0;
  for (std::size_t k = 0; k < x.size(); ++k) {
    sum += x[k] * w[k];
    magnitudes += std::abs(x[k] * w[k]);
  }
  if (got != got && sum == sum) return std::numeric_limits<double>::infinity();
  const double difference = std::abs(static_cast<double>(got) - sum);
  return difference == 0 ? 0 : difference / (magnitudes * 0x1p-24);
}

/// The largest error of x[rows] · w[e][cols]ᵀ where rows row_offsets[e] … meet matrix e.
template <class Policy, class X>
double worst_error(const Policy& policy, const X& x, const std::vector<double>& x_values, const packed<any_format>& w,
                   std::span<const std::uint32_t> row_offsets, std::vector<float>& out) {
  const std::size_t rows = row_offsets.back(), k = w.cols;
  out.assign(rows * w.rows, std::nanf(""));
  grouped_matmul(policy, x, w, row_offsets, matrix_view<float>(out.data(), rows, w.rows));
  const std::vector<double> w_values = meaning(w);
  double worst = 0;
  for (std::size_t e = 0; e < w.matrices; ++e) {
    for (std::size_t m = row_offsets[e]; m < row_offsets[e + 1]; ++m) {
      for (std::size_t n = 0; n < w.rows; ++n) {
        const double error = error_of(out[m * w.rows + n], std::span(x_values).subspan(m * k, k),
                                      std::span(w_values).subspan((e * w.rows + n) * k, k));
        if (!(error <= worst)) worst = error;
      }
    }
  }
  return worst;
}

/// Rows first … first + count − 1 of activations.
template <class T>
tetromino::batch_view<const T> some_rows(const tetromino::batch_view<const T>& x, std::size_t first,
                                         std::size_t count) {
  return {x.data + first * x.row_stride, 1, count, x.cols, x.row_stride, 0};
}
inline tetromino::int8_view<> some_rows(const tetromino::int8_matrix& x, std::size_t first, std::size_t count) {
  const std::size_t blocks = (x.cols + 31) / 32;
  return {count, x.cols, std::span(x.values).subspan(first * x.cols, count * x.cols),
          std::span(x.scales).subspan(first * blocks, count * blocks)};
}
/// Of packed activations with one row to a matrix.
inline tetromino::packed_view<any_format> some_rows(const packed<any_format>& x, std::size_t first, std::size_t count) {
  const tetromino::packed_shape one{x.format, 1, 1, x.cols};
  const auto part = [&](const auto& all, std::size_t each) {
    return std::span(all).subspan(first * each, count * each);
  };
  return {x.format,
          count,
          1,
          x.cols,
          part(x.codes, one.code_bytes()),
          part(x.scales, one.scale_bytes()),
          part(x.macros, one.macro_bytes()),
          x.tensor_scales.empty() ? std::span<const float>{} : part(x.tensor_scales, 1)};
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

/// Whether pieces of a product, of any number of rows, are the bits of the whole.
template <class Policy, class X>
bool pieces_are_the_whole(const Policy& policy, const X& x, const packed<any_format>& w, std::size_t rows,
                          std::span<const float> whole, reference::generator& random) {
  std::vector<float> piece;
  for (std::size_t first = 0; first < rows;) {
    const std::size_t count = std::min(rows - first, random.below(3) == 0 ? 1 : 1 + random.below(20));
    piece.assign(count * w.rows, 0.0f);
    matmul(policy, some_rows(x, first, count), w, matrix_view<float>(piece.data(), count, w.rows));
    if (!same_bits(piece, whole.subspan(first * w.rows, count * w.rows))) return false;
    first += count;
  }
  return true;
}

/// Whether repacked weights give the bits of packed ones.
template <class Policy, class X>
bool repacked_gives(const Policy& policy, const X& x, const packed<any_format>& w, std::size_t rows,
                    std::span<const float> expected) {
  std::vector<float> out(rows * w.rows, std::nanf(""));
  matmul(policy, x, tetromino::repack(tetromino::scalar, w), matrix_view<float>(out.data(), rows, w.rows));
  return same_bits(out, expected);
}

/// Runs one shape through every kind of activation; `check(worst error, whether results agree, what)` is told. Those
/// that must agree bit by bit: pieces of a product, the same with repacked weights, and integers on any other backend.
template <class Policy, class Check>
void multiply_every_kind(const Policy& policy, const any_format& weights, const any_format& activations,
                         std::size_t rows, std::size_t outputs, std::size_t cols, std::uint64_t seed,
                         const Check& check) {
  reference::generator random(seed);
  const packed<any_format> w = random_packed(random, weights, 1, outputs, cols);
  const std::vector<std::uint32_t> all{0, static_cast<std::uint32_t>(rows)};
  std::vector<float> out;
  const auto run = [&]<class X>(const char* what, const X& x, const std::vector<double>& values) {
    const double worst = worst_error(policy, x, values, w, all, out);
    bool agrees = pieces_are_the_whole(policy, x, w, rows, out, random) && repacked_gives(policy, x, w, rows, out);
    if constexpr (!tetromino::matrix_like<X>) {
      std::vector<float> reference(out.size());
      matmul(tetromino::scalar, x, w, matrix_view<float>(reference.data(), rows, outputs));
      agrees = agrees && same_bits(out, reference);
    }
    check(worst, agrees, what);
  };
  const auto real = [&]<class T>(const char* what, T) {
    const std::size_t stride = cols + random.below(5);
    std::vector<T> memory(rows * stride + 1);
    std::vector<double> values;
    for (std::size_t i = 0; i < rows * stride; ++i) {
      memory[i] = tetromino::detail::from_float<T>(static_cast<float>(random.normal()));
      if (i % stride < cols) values.push_back(static_cast<double>(tetromino::detail::to_float(memory[i])));
    }
    run(what, tetromino::batch_view<const T>(memory.data(), 1, rows, cols, stride, 0), values);
  };
  real("float", float{});
  real("half", tetromino::half{});
  real("bfloat16", tetromino::bfloat16{});
  const tetromino::int8_matrix x8 = random_int8(random, rows, cols);
  run("int8", x8, meaning(x8));
  const packed<any_format> x4 = random_packed(random, activations, rows, 1, cols);
  run("packed", x4, meaning(x4));
}

}  // namespace tetromino_test
