#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"  // text

#include <nlohmann/json.hpp>  // nlohmann::json

#include <cstddef>        // std::size_t
#include <cstdint>        // std::uint64_t
#include <string>         // std::string
#include <string_view>    // std::string_view
#include <unordered_set>  // std::unordered_set
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

using tetromino::detail::text;

/// Parses JSON that nobody vouches for into `out`: linear in time, with at most `most_values` values and 16 levels in
/// memory, and each key once per object. Says what is wrong, or nothing.
[[nodiscard]] inline std::string parse_json(std::string_view written, nlohmann::json& out,
                                            std::size_t most_values = std::size_t{1} << 23) {
  constexpr std::size_t most_levels = 16;
  std::string problem;
  std::size_t values = 0;
  std::vector<std::unordered_set<std::string>> keys(most_levels + 1);
  const auto keep = [&](int level, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using event_t = nlohmann::json::parse_event_t;
    if (!problem.empty()) return false;
    const auto at = static_cast<std::size_t>(level);
    if (event == event_t::object_start || event == event_t::array_start) {
      if (at >= most_levels) problem = text("expected at most ", most_levels, " levels of JSON");
      if (problem.empty()) keys[at + 1].clear();
    } else if (event == event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys[at].insert(key).second) problem = text("expected each key once, got \"", key.substr(0, 40), "\" twice");
    } else if (event == event_t::value && ++values > most_values) {
      problem = text("expected at most ", most_values, " values");
    }
    return problem.empty();
  };
  out = nlohmann::json::parse(written.begin(), written.end(), keep, /*allow_exceptions=*/false);
  if (!problem.empty()) return problem;
  return out.is_discarded() ? "expected JSON, got something else" : std::string();
}

/// A whole number from 0 to `most`; false if the value is none.
[[nodiscard]] inline bool whole_number(const nlohmann::json& j, std::uint64_t most, std::uint64_t& out) {
  const auto* n = j.get_ptr<const nlohmann::json::number_unsigned_t*>();
  if (n == nullptr || *n > most) return false;
  out = *n;
  return true;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
