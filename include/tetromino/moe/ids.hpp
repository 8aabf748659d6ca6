#pragma once

#include "../detail/macros_off.hpp"

/// Expert ids and counts as engines hold them: numbers of any type that follow each other in memory.

#include "../config.hpp"        // TETROMINO_EXPECTS
#include "../detail/sizes.hpp"  // tetromino::detail::most_elements
#include "../error.hpp"         // tetromino::detail::text

#include <concepts>          // std::integral
#include <cstddef>           // std::size_t
#include <cstdint>           // std::uint16_t, std::uint32_t
#include <initializer_list>  // std::initializer_list
#include <iterator>          // std::data, std::size
#include <span>              // std::span
#include <type_traits>       // std::is_arithmetic_v, std::is_same_v, std::remove_cvref_t
#include <utility>           // std::cmp_greater_equal, std::cmp_less
#include <vector>            // std::vector

namespace TETROMINO_NAMESPACE::moe {

namespace detail {
using tetromino::detail::text;
}

/// Stands where an expert id could: nobody serves that choice, as in padding rows or layers without experts (-1 in what
/// engines record).
inline constexpr std::uint16_t no_expert = 0xFFFF;

/// Numbers that follow each other in memory: a span, vector or array of integers, float or double.
template <class Numbers>
concept number_array = requires(const Numbers& numbers) {
  requires std::is_arithmetic_v<std::remove_cvref_t<decltype(*std::data(numbers))>>;
  std::size(numbers);
};
/// The same of integers, as expert ids are: −1 (or the largest number of an unsigned type) is nobody, as in padding.
template <class Ids>
concept id_array = number_array<Ids> && requires(const Ids& ids) {
  requires std::integral<std::remove_cvref_t<decltype(*std::data(ids))>>;
};

namespace detail::inline TETROMINO_ISA {

/// Whether there can be an array of these extents: neither their product nor its size in bytes wraps.
[[nodiscard]] constexpr bool can_be_array(std::initializer_list<std::size_t> extents) noexcept {
  std::size_t room = tetromino::detail::most_elements;
  for (const std::size_t n : extents) {
    if (n != 0) room /= n;
  }
  return room != 0;
}

/// The id as traces and recorders keep it; `no_id` where it is neither nobody nor one that could be an expert.
inline constexpr std::uint32_t no_id = 0x10000;
template <std::integral Id>
[[nodiscard]] constexpr std::uint32_t to_id(Id id, std::size_t experts) noexcept {
  if (id == static_cast<Id>(-1)) return no_expert;
  return std::cmp_less(id, 0) || std::cmp_greater_equal(id, experts) ? no_id : static_cast<std::uint32_t>(id);
}

// Ids of any type as the library keeps them: those of its own type as they lie, others in `room`, which grows to the
// largest call. `what` names who is given ids that are neither −1 nor below `experts`, a broken precondition.
template <class Ids>
[[nodiscard]] std::span<const std::uint16_t> narrow_ids(const Ids& ids, [[maybe_unused]] std::size_t experts,
                                                        [[maybe_unused]] const char* what,
                                                        [[maybe_unused]] std::vector<std::uint16_t>& room) {
  const std::span given(std::data(ids), std::size(ids));
  if constexpr (std::is_same_v<typename decltype(given)::value_type, std::uint16_t>) {
    for ([[maybe_unused]] const std::uint16_t id : given) {
      TETROMINO_EXPECTS(id < experts || id == no_expert, what, id, experts);
    }
    return given;
  } else {
    room.resize(given.size());
    for (std::size_t i = 0; i < given.size(); ++i) {
      const std::uint32_t id = to_id(given[i], experts);
      TETROMINO_EXPECTS(id != no_id, what, given[i], experts);
      room[i] = static_cast<std::uint16_t>(id);
    }
    return room;
  }
}

}  // namespace detail::inline TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"
