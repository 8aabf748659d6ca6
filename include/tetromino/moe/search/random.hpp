#pragma once

#include "../../detail/macros_off.hpp"

#include "../../version.hpp"  // TETROMINO_NAMESPACE

#include <array>    // std::array
#include <cstddef>  // std::size_t
#include <cstdint>  // std::int64_t, std::uint32_t, std::uint64_t

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

// −ln((i + ½) / 1024) in units of 2⁻¹⁶, by repeated squaring in whole numbers, so that it is the same everywhere.
[[nodiscard]] constexpr std::array<std::uint32_t, 1024> make_exponential_table() {
  constexpr std::uint64_t ln2 = 2'977'044'472;  // ln 2 · 2³²
  std::array<std::uint32_t, 1024> out{};
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::uint64_t x = 2 * i + 1;  // the number is x / 2048
    std::uint64_t whole = 11;     // −log2, rounded up
    while ((x >> 31) == 0) {
      x <<= 1;
      ++whole;
    }
    // now x / 2³¹ is in 1 … 2, and the number is that times 2^(31 − whole); take log2 bit by bit
    std::uint64_t fraction = 0;
    for (int bit = 0; bit < 24; ++bit) {
      x = (x * x) >> 31;
      fraction <<= 1;
      if ((x >> 32) != 0) {
        x >>= 1;
        fraction |= 1;
      }
    }
    const std::uint64_t minus_log2 = ((whole - 31) << 24) - fraction;
    out[i] = static_cast<std::uint32_t>((minus_log2 * (ln2 >> 8)) >> 32);
  }
  return out;
}

inline constexpr std::array<std::uint32_t, 1024> exponential_table = make_exponential_table();

/// Random numbers of a search: whole numbers only, so that a seed gives the same search on every machine. (SplitMix64)
class search_random {
 public:
  explicit search_random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  /// Uniform in 0 … n − 1, for n < 2³².
  std::size_t below(std::size_t n) { return ((bits() >> 32) * n) >> 32; }
  /// Exponential with mean `temperature`: a worsening below it is accepted with the probability of Metropolis.
  std::int64_t exponential(std::int64_t temperature) {
    return (temperature * static_cast<std::int64_t>(exponential_table[bits() >> 54])) >> 16;
  }

 private:
  std::uint64_t state_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
