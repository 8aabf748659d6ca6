#pragma once

/// Error measures from their definitions, for the tests.

#include <cmath>    // std::log10
#include <cstddef>  // std::size_t
#include <span>     // std::span

namespace reference {

/// 10·log10(Σx² / Σ(x − y)²) in dB.
inline double qsnr(std::span<const float> x, std::span<const float> y) {
  long double signal = 0;
  long double noise = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double e = static_cast<long double>(x[i]) - static_cast<long double>(y[i]);
    signal += static_cast<long double>(x[i]) * static_cast<long double>(x[i]);
    noise += e * e;
  }
  return static_cast<double>(10 * std::log10(signal / noise));
}

}  // namespace reference
