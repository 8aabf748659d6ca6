#pragma once

#include "../../../detail/macros_off.hpp"

#include "assignment.hpp"  // request_assigner
#include "../random.hpp"   // search_random

#include <algorithm>  // std::max, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::int64_t, std::uint32_t, std::uint64_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

[[nodiscard]] constexpr std::uint64_t integer_root(std::uint64_t x) {
  std::uint64_t root = 0;
  for (std::uint64_t bit = std::uint64_t{1} << 31; bit != 0; bit >>= 1) {
    if ((root | bit) * (root | bit) <= x) root |= bit;
  }
  return root;
}

/// Groups requests by what experts they use, within the room of nodes: k-means by cosine, in whole numbers.
/// counts[requests, cells] is changed into directions of length about 2¹⁴.
inline void cluster_requests(std::span<std::int32_t> counts, std::size_t cells, std::span<const std::uint64_t> tokens,
                             std::span<const std::int64_t> room, search_random& random,
                             std::span<std::uint32_t> sources) {
  const std::size_t requests = sources.size(), nodes = room.size();
  const auto row = [&](std::size_t r) { return counts.subspan(r * cells, cells); };
  const auto normalize = [](auto values, std::span<std::int32_t> out) {
    std::uint64_t squares = 0;
    for (const auto v : values) squares += static_cast<std::uint64_t>(static_cast<std::int64_t>(v) * v);
    const auto length = static_cast<std::int64_t>(std::max<std::uint64_t>(integer_root(squares), 1));
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<std::int32_t>(static_cast<std::int64_t>(values[i]) * 16384 / length);
    }
  };
  const auto alike = [](std::span<const std::int32_t> a, std::span<const std::int32_t> b) {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<std::int64_t>(a[i]) * b[i];
    return sum >> 12;  // 2¹⁶ where the directions are the same
  };
  for (std::size_t r = 0; r < requests; ++r) normalize(row(r), row(r));

  // first centres distance apart: each next one with probability by the square of its distance (k-means++)
  std::vector<std::int32_t> centres(nodes * cells, 0);
  const auto centre = [&](std::size_t n) { return std::span(centres).subspan(n * cells, cells); };
  std::vector<std::int64_t> nearest(requests, 0), scores(requests * nodes);
  std::size_t next = random.below(requests);
  for (std::size_t n = 0; n < nodes; ++n) {
    for (std::size_t i = 0; i < cells; ++i) centre(n)[i] = row(next)[i];
    std::uint64_t all = 0;
    for (std::size_t r = 0; r < requests; ++r) {
      nearest[r] = std::max(nearest[r], alike(row(r), centre(n)));
      const auto distance = static_cast<std::uint64_t>(std::max<std::int64_t>(0, 65536 - nearest[r])) >> 4;
      all += distance * distance;
    }
    std::uint64_t at = all == 0 ? 0 : random.bits() % all;
    next = random.below(requests);
    for (std::size_t r = 0; r < requests && all > 0; ++r) {
      const auto distance = static_cast<std::uint64_t>(std::max<std::int64_t>(0, 65536 - nearest[r])) >> 4;
      if (at < distance * distance) {
        next = r;
        break;
      }
      at -= distance * distance;
    }
  }

  request_assigner assigner;
  std::vector<std::int64_t> sums(nodes * cells);
  for (std::size_t round = 0; round < 8; ++round) {
    for (std::size_t r = 0; r < requests; ++r) {
      for (std::size_t n = 0; n < nodes; ++n) scores[r * nodes + n] = alike(row(r), centre(n));
    }
    assigner.assign({scores, tokens, room}, sources);
    std::fill(sums.begin(), sums.end(), 0);
    for (std::size_t r = 0; r < requests; ++r) {
      for (std::size_t i = 0; i < cells; ++i) sums[sources[r] * cells + i] += row(r)[i];
    }
    for (std::size_t n = 0; n < nodes; ++n) {
      normalize(std::span<const std::int64_t>(sums).subspan(n * cells, cells), centre(n));
    }
  }
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
