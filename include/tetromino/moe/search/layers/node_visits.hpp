#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../version.hpp"  // TETROMINO_NAMESPACE
#include "node_mask.hpp"         // wide_mask, node_bit, node_count, first_node, without_first, lowest_node

#include <cstddef>      // std::size_t
#include <cstdint>      // std::int64_t, std::uint8_t
#include <span>         // std::span
#include <type_traits>  // std::is_same_v

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Tokens that are looked at together; one lane each. A Mask has a bit per node.
inline constexpr std::size_t cover_lanes = 64;

/// Most experts of one token, and one more row.
inline constexpr std::size_t cover_experts = 65;

template <class Mask>
[[nodiscard]] constexpr std::uint8_t lane_popcount(Mask x) {
  if constexpr (std::is_same_v<Mask, wide_mask>) {
    return static_cast<std::uint8_t>(node_count(x));
  } else if constexpr (sizeof(Mask) == 1) {  // in steps that compilers turn into vector code
    x = static_cast<Mask>(x - ((x >> 1) & 0x55));
    x = static_cast<Mask>((x & 0x33) + ((x >> 2) & 0x33));
    return static_cast<std::uint8_t>((x + (x >> 4)) & 0x0F);
  } else if constexpr (sizeof(Mask) == 2) {
    x = static_cast<Mask>(x - ((x >> 1) & 0x5555));
    x = static_cast<Mask>((x & 0x3333) + ((x >> 2) & 0x3333));
    x = static_cast<Mask>((x + (x >> 4)) & 0x0F0F);
    return static_cast<std::uint8_t>((x + (x >> 8)) & 0x1F);
  } else if constexpr (sizeof(Mask) == 4) {
    x = x - ((x >> 1) & 0x5555'5555u);
    x = (x & 0x3333'3333u) + ((x >> 2) & 0x3333'3333u);
    x = (x + (x >> 4)) & 0x0F0F'0F0Fu;
    x = x + (x >> 8);
    return static_cast<std::uint8_t>((x + (x >> 16)) & 0x3Fu);
  } else {
    x = x - ((x >> 1) & 0x5555'5555'5555'5555u);
    x = (x & 0x3333'3333'3333'3333u) + ((x >> 2) & 0x3333'3333'3333'3333u);
    x = (x + (x >> 4)) & 0x0F0F'0F0F'0F0F'0F0Fu;
    x = x + (x >> 8);
    x = x + (x >> 16);
    return static_cast<std::uint8_t>((x + (x >> 32)) & 0x7Fu);
  }
}

/// Nodes that 64 tokens visit besides their home, under replica_choice::fewest_nodes with ties to the lower node: a
/// home bit each (or none), and the nodes that hold each of their experts: `rows` × 64 lanes in holders, and `last` for
/// one more expert that all of them share. With copies == false each mask has one bit.
template <class Mask, bool Copies>
void count_visits(const Mask* holders, std::size_t rows, Mask last, const Mask* home, std::uint8_t* visits) {
  constexpr std::size_t lanes = cover_lanes;
  Mask seen[lanes];
  if constexpr (!Copies) {
    for (std::size_t i = 0; i < lanes; ++i) seen[i] = last;
    for (std::size_t j = 0; j < rows; ++j) {
      const Mask* const row = holders + j * lanes;
      for (std::size_t i = 0; i < lanes; ++i) seen[i] = static_cast<Mask>(seen[i] | row[i]);
    }
    for (std::size_t i = 0; i < lanes; ++i) visits[i] = lane_popcount(static_cast<Mask>(seen[i] & ~home[i]));
  } else {
    // a select by arithmetic: with ?: some compilers branch here, and do not vectorize
    const auto all_if = [](bool x) { return static_cast<Mask>(Mask{0} - static_cast<Mask>(x)); };
    Mask open[cover_experts][lanes];
    for (std::size_t i = 0; i < lanes; ++i) seen[i] = home[i];
    const auto prepare = [&](Mask* row, const auto& mask_of) {  // experts at home are done, single copies decide
      for (std::size_t i = 0; i < lanes; ++i) {
        Mask m = mask_of(i);
        const auto at_home = static_cast<Mask>(m & home[i]);
        m = static_cast<Mask>(m & all_if(at_home == 0));
        const Mask others = without_first(m);
        const auto only = static_cast<Mask>(m & all_if(others == 0));
        seen[i] = static_cast<Mask>(seen[i] | only);
        row[i] = m;
      }
    };
    for (std::size_t j = 0; j < rows; ++j) {
      const Mask* const row = holders + j * lanes;
      prepare(open[j], [&](std::size_t i) { return row[i]; });
    }
    prepare(open[rows], [&](std::size_t) { return last; });
    while (true) {
      // nodes that hold at least one, two, three of what is still open: enough to tell a good next node
      Mask one[lanes] = {}, two[lanes] = {}, three[lanes] = {};
      for (std::size_t j = 0; j <= rows; ++j) {
        Mask* const row = open[j];
        for (std::size_t i = 0; i < lanes; ++i) {
          Mask m = row[i];
          const auto covered = static_cast<Mask>(m & seen[i]);
          m = static_cast<Mask>(m & all_if(covered == 0));
          row[i] = m;
          three[i] = static_cast<Mask>(three[i] | (two[i] & m));
          two[i] = static_cast<Mask>(two[i] | (one[i] & m));
          one[i] = static_cast<Mask>(one[i] | m);
        }
      }
      Mask any{};
      for (std::size_t i = 0; i < lanes; ++i) any = static_cast<Mask>(any | one[i]);
      if (any == 0) break;
      for (std::size_t i = 0; i < lanes; ++i) {
        Mask best = two[i] != 0 ? two[i] : one[i];
        best = three[i] != 0 ? three[i] : best;
        seen[i] = static_cast<Mask>(seen[i] | lowest_node(best));
      }
    }
    for (std::size_t i = 0; i < lanes; ++i) visits[i] = lane_popcount(static_cast<Mask>(seen[i] & ~home[i]));
  }
}

/// The same for one token, whose experts are held by holders[count]. `prefer(candidates)` picks one bit of a mask.
template <class Mask, class Prefer>
[[nodiscard]] Mask visited_nodes(const Mask* holders, std::size_t count, Mask home, const Prefer& prefer) {
  Mask open[cover_experts];
  Mask seen = home;
  std::size_t left = 0;
  for (std::size_t j = 0; j < count; ++j) {
    if ((holders[j] & home) != 0) continue;
    if (without_first(holders[j]) == 0) {
      seen = static_cast<Mask>(seen | holders[j]);
    } else {
      open[left++] = holders[j];
    }
  }
  while (true) {
    Mask one{}, two{}, three{};
    std::size_t kept = 0;
    for (std::size_t j = 0; j < left; ++j) {
      const Mask m = open[j];
      if ((m & seen) != 0) continue;
      open[kept++] = m;
      three = static_cast<Mask>(three | (two & m));
      two = static_cast<Mask>(two | (one & m));
      one = static_cast<Mask>(one | m);
    }
    left = kept;
    if (left == 0) return static_cast<Mask>(seen & ~home);
    seen = static_cast<Mask>(seen | prefer(three != 0 ? three : two != 0 ? two : one));
  }
}

template <class Mask>
[[nodiscard]] std::int64_t visits_of(const Mask* holders, std::size_t count, Mask home) {
  return node_count(visited_nodes(holders, count, home, [](Mask m) { return lowest_node(m); }));
}

/// Serves one token, whose expert i is held by the nodes holders[i] (nobody, where they are none), as
/// replica_choice::fewest_nodes does: at home, else on a node that it visits, of several the one that is busy for the
/// shortest time with what it served so far, by speed[nodes]. Adds its pairs to load[nodes], calls each(i,
/// node), and returns the other nodes visited.
template <class Mask, class Each>
Mask serve_token(const Mask* holders, std::size_t count, Mask home, std::span<const double> speed, std::int64_t* load,
                 const Each& each) {
  const auto busy = [&](std::size_t n) { return static_cast<double>(load[n]) / speed[n]; };
  const auto least_loaded = [&](Mask m) {
    std::size_t best = first_node(m);
    for (m = without_first(m); m != 0; m = without_first(m)) {
      const std::size_t n = first_node(m);
      if (busy(n) < busy(best)) best = n;
    }
    return node_bit<Mask>(best);
  };
  const Mask seen = visited_nodes(holders, count, home, least_loaded);
  for (std::size_t i = 0; i < count; ++i) {
    if (holders[i] == 0) continue;
    const Mask at = (holders[i] & home) != 0 ? home : least_loaded(static_cast<Mask>(holders[i] & seen));
    const std::size_t node = first_node(at);
    ++load[node];
    each(i, node);
  }
  return seen;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
