#pragma once

/// Philox4x32-10, for the tests. (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011)

#include <array>    // std::array
#include <cstdint>  // std::uint32_t, std::uint64_t

namespace reference {

inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t right = std::uint64_t{0xCD9E8D57} * counter[2];
    const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x / 4294967296u); };
    const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x % 4294967296u); };
    counter = {high(right) ^ counter[1] ^ key[0], low(right), high(left) ^ counter[3] ^ key[1], low(left)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

/// The uniform number in [0, 1) that belongs to element `index` of a tensor: 24 bits.
inline double uniform(std::uint64_t seed, std::uint64_t index) {
  const std::uint64_t group = index / 4;
  const auto words = philox({static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(group >> 32), 0, 0},
                            {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  return static_cast<double>(words[index % 4] >> 8) / 16777216.0;
}

}  // namespace reference
