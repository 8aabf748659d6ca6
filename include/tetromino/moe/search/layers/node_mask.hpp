#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../version.hpp"  // TETROMINO_NAMESPACE

#include <bit>          // std::countr_zero, std::popcount
#include <concepts>     // std::integral, std::unsigned_integral
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint64_t
#include <type_traits>  // std::is_same_v

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// A number of 256 bits, where nodes are more than the bits of any number that the language has. It has the operators
/// that searches use.
class wide_mask {
 public:
  constexpr wide_mask() = default;
  template <std::integral Number>
  constexpr explicit wide_mask(Number x) : word_{static_cast<std::uint64_t>(x), 0, 0, 0} {}

  friend constexpr bool operator==(const wide_mask&, const wide_mask&) = default;
  friend constexpr bool operator==(const wide_mask& a, int x) { return a == wide_mask(x); }
  friend constexpr wide_mask operator|(const wide_mask& a, const wide_mask& b) {
    wide_mask out;
    for (std::size_t i = 0; i < words; ++i) out.word_[i] = a.word_[i] | b.word_[i];
    return out;
  }
  friend constexpr wide_mask operator&(const wide_mask& a, const wide_mask& b) {
    wide_mask out;
    for (std::size_t i = 0; i < words; ++i) out.word_[i] = a.word_[i] & b.word_[i];
    return out;
  }
  constexpr wide_mask operator~() const {
    wide_mask out;
    for (std::size_t i = 0; i < words; ++i) out.word_[i] = ~word_[i];
    return out;
  }
  friend constexpr wide_mask operator-(const wide_mask& a, const wide_mask& b) {
    wide_mask out;
    std::uint64_t borrow = 0;
    for (std::size_t i = 0; i < words; ++i) {
      out.word_[i] = a.word_[i] - b.word_[i] - borrow;
      borrow = a.word_[i] < b.word_[i] || (a.word_[i] == b.word_[i] && borrow != 0) ? 1U : 0U;
    }
    return out;
  }

  /// The number 2ⁿ. Precondition: n < 256.
  [[nodiscard]] static constexpr wide_mask power(std::size_t n) {
    wide_mask out;
    out.word_[n / 64] = std::uint64_t{1} << (n % 64);
    return out;
  }
  [[nodiscard]] constexpr int popcount() const {
    int sum = 0;
    for (const std::uint64_t w : word_) sum += std::popcount(w);
    return sum;
  }
  [[nodiscard]] constexpr int countr_zero() const {
    std::size_t i = 0;
    while (i + 1 < words && word_[i] == 0) ++i;
    return static_cast<int>(64 * i) + std::countr_zero(word_[i]);
  }

 private:
  static constexpr std::size_t words = 4;
  std::uint64_t word_[words] = {0, 0, 0, 0};
};

/// Most nodes that a search can tell apart.
inline constexpr std::size_t most_nodes = 256;

/// Calls work.template operator()<Mask>() with the narrowest Mask of two that has a bit for each node.
template <class Work>
decltype(auto) with_mask_for(std::size_t nodes, const Work& work) {
  return nodes <= 64 ? work.template operator()<std::uint64_t>() : work.template operator()<wide_mask>();
}

/// The mask of one node.
template <class Mask>
[[nodiscard]] constexpr Mask node_bit(std::size_t node) {
  if constexpr (std::is_same_v<Mask, wide_mask>) {
    return wide_mask::power(node);
  } else {
    return static_cast<Mask>(Mask{1} << node);
  }
}
/// How many nodes a mask has.
template <class Mask>
[[nodiscard]] constexpr int node_count(Mask m) {
  if constexpr (std::is_same_v<Mask, wide_mask>) {
    return m.popcount();
  } else {
    return std::popcount(m);
  }
}
/// The lowest node of a mask that has one.
template <class Mask>
[[nodiscard]] constexpr std::size_t first_node(Mask m) {
  if constexpr (std::is_same_v<Mask, wide_mask>) {
    return static_cast<std::size_t>(m.countr_zero());
  } else {
    return static_cast<std::size_t>(std::countr_zero(m));
  }
}
template <class Mask>
[[nodiscard]] constexpr Mask without_first(Mask m) {
  return static_cast<Mask>(m & (m - Mask{1}));
}
template <class Mask>
[[nodiscard]] constexpr Mask lowest_node(Mask m) {
  return static_cast<Mask>(m & (Mask{0} - m));
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
