#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_HD, TETROMINO_INLINE, bit_cast
#include "e2m1.hpp"    // e2m1

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t, std::uint64_t

namespace TETROMINO_NAMESPACE {

/// How an element is rounded to E2M1. Scales are chosen as for nearest_even in either case.
enum class element_rounding : std::uint8_t {
  nearest_even,  ///< to the nearest value, ties to the even code
  stochastic,    ///< up or down with the probability that makes the rounding unbiased (values above 6 saturate)
};

/// Four 32-bit random words.
struct philox_words {
  std::uint32_t word[4];
};

inline namespace TETROMINO_ISA {

/// Philox4x32-10: four random words for a 128-bit counter (here its low 64 bits) under a 64-bit key.
/// (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
[[nodiscard]] TETROMINO_HD TETROMINO_INLINE constexpr philox_words philox4x32(std::uint64_t counter,
                                                                              std::uint64_t key) noexcept {
  std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32), c2 = 0,
                c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = static_cast<std::uint32_t>(p1), c2 = n2, c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

static_assert(philox4x32(0, 0).word[0] == 0x6627E8D5u);  // Random123's known answer

/// Of the four numbers that `words` hold, the one for element `index`; see below.
[[nodiscard]] TETROMINO_HD constexpr float uniform(const philox_words& words, std::uint64_t index) noexcept {
  return static_cast<float>(words.word[index % 4] >> 8) * 0x1p-24f;
}

/// A number in [0, 1), a multiple of 2^-24: element `index` of the stream `seed`, the same on every backend and for any
/// split of the work.
[[nodiscard]] TETROMINO_HD constexpr float uniform(std::uint64_t seed, std::uint64_t index) noexcept {
  return uniform(philox4x32(index / 4, seed), index);
}

/// Rounds y to one of its two E2M1 neighbours: away from zero where `u`, uniform in [0, 1), is below the share of the
/// gap that lies between the lower neighbour and |y|. Saturates at 6; keeps the sign; NaN becomes +6.
[[nodiscard]] TETROMINO_HD TETROMINO_INLINE constexpr e2m1 round_stochastic(float y, float u) noexcept {
  const std::uint32_t word = detail::bit_cast<std::uint32_t>(y);
  const float magnitude = detail::bit_cast<float>(word & 0x7FFFFFFFu);
  if (!(magnitude < e2m1::max)) return e2m1::encode(y);
  const std::uint8_t lower = static_cast<std::uint8_t>((magnitude >= 0.5f) + (magnitude >= 1.0f) + (magnitude >= 1.5f) +
                                                       (magnitude >= 2.0f) + (magnitude >= 3.0f) + (magnitude >= 4.0f));
  const float gaps_per_unit = lower < 4 ? 2.0f : lower < 6 ? 1.0f : 0.5f;
  const bool up = u < (magnitude - e2m1::from_bits(lower).value()) * gaps_per_unit;
  return e2m1::from_bits(static_cast<std::uint8_t>((word >> 31) << 3 | static_cast<std::uint32_t>(lower + up)));
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
