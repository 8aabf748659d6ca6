#pragma once

/// Operands for the tests of block-scaled products, and what the products must be.

#include "harness.hpp"

#include <tetromino/block_scaled.hpp>

#include "../reference/block_scaled.hpp"
#include "../reference/layouts.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace harness {

using tetromino::any_format;
using tetromino::block_scaled_kind;
using tetromino::block_scaled_shape;

/// Operands in device memory.
struct device_operands {
  block_scaled_shape shape;
  device<std::uint8_t> codes, scales;
  device<float> factors;

  explicit device_operands(const block_scaled_shape& s)
      : shape(s), codes(s.code_bytes()), scales(s.scale_bytes()), factors(s.factor_count()) {}
  explicit device_operands(const tetromino::block_scaled& host)
      : shape(host.shape), codes(host.codes), scales(host.scales), factors(host.factors) {}

  [[nodiscard]] tetromino::block_scaled_view<std::uint8_t, float> view() const {
    return {shape, codes, scales, factors};
  }
  [[nodiscard]] bool is_intact() const { return codes.is_intact() && scales.is_intact() && factors.is_intact(); }
};

/// Packed storage with random codes and with scale bytes from `low` to `high`.
inline tetromino::packed<any_format> random_packed(const tetromino::packed_shape& shape, unsigned low, unsigned high,
                                                   std::uint64_t seed) {
  const numbers random{seed};
  tetromino::packed<any_format> out(shape.format, shape.matrices, shape.rows, shape.cols, shape.matrices);
  for (std::size_t i = 0; i < out.codes.size(); ++i) out.codes[i] = static_cast<std::uint8_t>(random.bits(i));
  for (std::size_t i = 0; i < out.scales.size(); ++i) {
    out.scales[i] = static_cast<std::uint8_t>(low + (random.bits(i) >> 32) % (high - low + 1));
  }
  for (std::size_t i = 0; i < out.tensor_scales.size(); ++i) {
    out.tensor_scales[i] = 1e-3f * (1.0f + random.uniform(i));
  }
  if (shape.cols % shape.format.block != 0) {  // packed storage has zeros past the last column
    const std::size_t row_bytes = shape.code_bytes_per_row();
    for (std::size_t i = 0; i < out.codes.size(); ++i) {
      const std::size_t k = i % row_bytes * 2;
      if (k >= shape.cols) out.codes[i] = 0;
      if (k + 1 == shape.cols) out.codes[i] &= 15;
    }
  }
  return out;
}

/// What one operand stands for, [rows, padded_cols], from the documents' layout.
inline std::vector<double> values(const tetromino::block_scaled& op) {
  const block_scaled_shape& s = op.shape;
  const std::size_t cols = s.padded_cols(), per_row = (s.scales_per_row() + 3) / 4 * 4;
  std::vector<double> out(s.rows * cols);
  for (std::size_t r = 0; r < s.rows; ++r) {
    for (std::size_t k = 0; k < cols; ++k) {
      const unsigned code = op.codes[r * s.code_bytes_per_row() + k / 2] >> (k % 2 * 4) & 15u;
      const std::uint8_t scale = op.scales[reference::swizzled_scale(r, k / s.block(), per_row)];
      const double unit =
          s.kind == block_scaled_kind::e4m3_16 ? reference::e4m3_value(scale) : reference::e8m0_value(scale);
      const double factor = op.factors.empty() ? 1.0 : static_cast<double>(op.factors[0]);
      out[r * cols + k] = code % 8 == 0 ? 0.0 : factor * unit * reference::e2m1_value(code);
    }
  }
  return out;
}

/// Two operands and their product in double.
struct product_case {
  std::string name;
  tetromino::block_scaled x, w;
  std::vector<double> sums, sizes;  ///< of the terms, and of their magnitudes

  product_case(block_scaled_kind kind, std::size_t rows, std::size_t outputs, std::size_t cols) {
    const bool is_nv = kind == block_scaled_kind::e4m3_16;
    const any_format format = is_nv ? any_format(tetromino::nvfp4{}) : any_format(tetromino::mxfp4{});
    const unsigned low = is_nv ? 0 : 110, high = is_nv ? 0x7E : 124;  // sums that half can hold
    name = std::string(is_nv ? "e4m3_16 [" : "e8m0_32 [") + std::to_string(rows) + ", " + std::to_string(outputs) +
           "] over " + std::to_string(cols);
    x = tetromino::repack(tetromino::scalar, random_packed({format, 1, rows, cols}, low, high, rows * 31 + cols), kind);
    w = tetromino::repack(tetromino::scalar, random_packed({format, 1, outputs, cols}, low, high, outputs * 17 + cols),
                          kind);
    const std::vector<double> of_x = values(x), of_w = values(w);
    const std::size_t k_count = x.shape.padded_cols();
    sums.resize(rows * outputs), sizes.resize(rows * outputs);
    for (std::size_t m = 0; m < rows; ++m) {
      for (std::size_t n = 0; n < outputs; ++n) {
        for (std::size_t k = 0; k < k_count; ++k) {
          const double product = of_x[m * k_count + k] * of_w[n * k_count + k];
          sums[m * outputs + n] += product;
          sizes[m * outputs + n] += std::fabs(product);
        }
      }
    }
  }

  /// Compares an output whose rows are `stride` apart; what lies between must be the poison.
  template <class T>
  void check(const std::vector<T>& out, std::size_t stride) const {
    const std::size_t outputs = w.shape.rows;
    const double rounding = std::is_same_v<T, half> ? 0x1p-11 : 0x1p-8;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const std::size_t m = i / stride, n = i % stride;
      if (n >= outputs) {
        if (!expect(out[i].bits == 0xA5A5, "%s: wrote past row %zu", name.c_str(), m)) return;
        continue;
      }
      const double want = sums[m * outputs + n], got = static_cast<double>(tetromino::detail::to_float(out[i]));
      const double allowed = rounding * std::fabs(want) + 1e-6 * sizes[m * outputs + n] + 1e-7;
      if (!expect(std::fabs(got - want) <= allowed, "%s: [%zu, %zu] is %g, expected %g", name.c_str(), m, n, got,
                  want)) {
        return;
      }
    }
  }
};

/// The shapes that the tests multiply: ragged, one row, several tiles.
inline std::vector<product_case> product_cases(block_scaled_kind kind) {
  std::vector<product_case> out;
  out.emplace_back(kind, 1, 8, 64);
  out.emplace_back(kind, 16, 8, 128);
  out.emplace_back(kind, 3, 136, 2880);
  out.emplace_back(kind, 130, 200, 192);
  if (!is_short()) {
    out.emplace_back(kind, 257, 264, 448);
    out.emplace_back(kind, 100, 304, 96);
    out.emplace_back(kind, 64, 128, 4096);
  }
  return out;
}

inline int device_major() {
  int major = 0;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
  return major;
}

inline void expect_error(const tetromino::result<void>& done, tetromino::errc code, const char* says) {
  if (!expect(!done, "expected an error that says: %s", says)) return;
  const std::string what = done.error().what();
  expect(done.error().code() == code && what.find(says) != std::string::npos, "expected: %s, got: %s", says,
         what.c_str());
}

}  // namespace harness
