#pragma once

/// Seeded random numbers that are the same on every platform, for the tests and benchmarks.

#include <cmath>    // std::sqrt, std::log, std::cos
#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint64_t
#include <vector>   // std::vector

namespace reference {

/// SplitMix64. (Steele, Lea, Flood: Fast splittable pseudorandom number generators; OOPSLA 2014)
class generator {
 public:
  explicit generator(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    state_ += 0x9E3779B97F4A7C15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  /// Uniform in (0, 1].
  double uniform() { return (static_cast<double>(bits() >> 11) + 1.0) / 9007199254740992.0; }
  /// Uniform in 0 … n − 1.
  std::size_t below(std::size_t n) { return bits() % n; }
  /// Normal, mean 0, variance 1. (Box and Muller 1958)
  double normal() {
    constexpr double two_pi = 6.283185307179586477;
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return radius * std::cos(two_pi * uniform());
  }
  /// Student's t with four degrees of freedom: a normal over the root of a chi-squared divided by its degrees.
  double student_t4() {
    const double z = normal();
    const double chi_squared = -2 * (std::log(uniform()) + std::log(uniform()));
    return z / std::sqrt(chi_squared / 4);
  }

 private:
  std::uint64_t state_;
};

inline std::vector<float> normal_sample(std::uint64_t seed, std::size_t count) {
  generator g(seed);
  std::vector<float> out;
  for (std::size_t i = 0; i < count; ++i) out.push_back(static_cast<float>(g.normal()));
  return out;
}
inline std::vector<float> student_t4_sample(std::uint64_t seed, std::size_t count) {
  generator g(seed);
  std::vector<float> out;
  for (std::size_t i = 0; i < count; ++i) out.push_back(static_cast<float>(g.student_t4()));
  return out;
}

}  // namespace reference
