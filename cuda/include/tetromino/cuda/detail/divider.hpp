#pragma once

#include <tetromino/config.hpp>  // TETROMINO_HD

#include <cstdint>  // std::uint32_t, std::uint64_t

namespace TETROMINO_NAMESPACE::cuda::detail {

/// Division of numbers below 2^31 by a divisor known before the launch: a multiplication and a shift.
/// (Granlund and Montgomery: "Division by invariant integers using multiplication", PLDI 1994)
struct divider {
  std::uint32_t divisor = 1;
  std::uint32_t multiplier = 1;
  std::uint32_t shift = 0;

  constexpr divider() = default;
  constexpr explicit divider(std::uint32_t d) noexcept : divisor(d) {
    while (shift < 31 && (std::uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<std::uint32_t>((((std::uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  [[nodiscard]] TETROMINO_HD constexpr std::uint32_t quotient(std::uint32_t n) const noexcept {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * multiplier >> 32) + n) >> shift;
  }
};

static_assert(divider(1).quotient(77) == 77 && divider(3).quotient(2147483645) == 715827881);
static_assert(divider(7).quotient(48) == 6 && divider(7).quotient(49) == 7 && divider(64).quotient(6400) == 100);

}  // namespace TETROMINO_NAMESPACE::cuda::detail
