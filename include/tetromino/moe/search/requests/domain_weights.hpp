#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../trace.hpp"  // request, phase
#include "clusters.hpp"     // integer_root

#include <algorithm>  // std::clamp, std::max, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int64_t, std::uint32_t, std::uint64_t
#include <map>        // std::map
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What a token counts if it is to count 1 without weights.
inline constexpr std::uint64_t weight_one = 256;

/// How much the tokens of each request count, in 1/256: [requests]. Of few requests, chance decides how many are of
/// each domain, and a plan that balances their experts exactly would balance that chance. So the domains' shares are
/// drawn towards equal ones: not at all where they differ by far more than chance explains, wholly where they differ
/// by less, and each by no more than its standard error (an estimate by moments, with limited translation as Efron and
/// Morris have it). All weigh 256 where there is one domain. Whole numbers: the same on every machine.
[[nodiscard]] inline std::vector<std::uint64_t> domain_weights(std::span<const request> requests, phase served) {
  struct domain {
    std::uint64_t share = 0;    // of the tokens, in 2⁻²⁴
    std::uint64_t squares = 0;  // sum over requests of their squared shares, in 2⁻⁴⁸
    std::int64_t error = 0;     // standard error of the share, in 2⁻¹⁶
    std::uint64_t weight = weight_one;
  };
  std::vector<std::uint64_t> out(requests.size(), weight_one);
  std::map<std::uint32_t, domain> domains;
  std::uint64_t tokens = 0, squares = 0;
  for (const request& r : requests) tokens += r.range(served).size();
  for (const request& r : requests) {
    const std::uint64_t size = r.range(served).size();
    if (size == 0) continue;
    const std::uint64_t share = (size << 24) / tokens;
    domain& d = domains[r.domain];
    d.share += share;
    d.squares += share * share;
    squares += share * share;
  }
  const auto kinds = static_cast<std::int64_t>(domains.size());
  if (kinds < 2) return out;

  const auto away = [&](const domain& d) {
    return std::int64_t{65536} / kinds - static_cast<std::int64_t>(d.share >> 8);
  };
  std::uint64_t by_chance = 0, seen = 0;  // variance of the shares, summed over domains, in 2⁻³²
  for (auto& [id, d] : domains) {
    const std::uint64_t in = d.share >> 12, others = 4096 - std::min<std::uint64_t>(in, 4096);
    const std::uint64_t variance =
        ((d.squares >> 16) * others * others + ((squares - d.squares) >> 16) * in * in) >> 24;
    d.error = static_cast<std::int64_t>(integer_root(variance));
    by_chance += variance;
    seen += static_cast<std::uint64_t>(away(d) * away(d));
  }
  if (seen == 0) return out;
  const auto part = static_cast<std::int64_t>(std::min(by_chance, seen) * 4096 / seen);
  for (auto& [id, d] : domains) {
    const std::int64_t share = std::max<std::int64_t>(1, static_cast<std::int64_t>(d.share >> 8));
    const std::int64_t drawn = share + std::clamp(away(d) * part / 4096, -d.error, d.error);
    d.weight = static_cast<std::uint64_t>(std::max<std::int64_t>(1, drawn * std::int64_t{weight_one} / share));
  }
  for (std::size_t r = 0; r < out.size(); ++r) {
    const auto found = domains.find(requests[r].domain);
    if (found != domains.end()) out[r] = found->second.weight;
  }
  return out;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
