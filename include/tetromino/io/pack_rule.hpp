#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"          // error, result
#include "../scaling.hpp"        // recipe
#include "detail/file_text.hpp"  // nearest_names, printable

#include <cstddef>      // std::size_t
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::io {

/// A recipe for some weights of a model.
struct pack_rule {
  /// Which: a pattern with * and ? for their names; or a word: "experts" and "linear" are roles, any other word stands
  /// in the name, such as "attn". Empty: all.
  std::string pattern;
  recipe how;
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Whether a pattern with * and ? describes all of a text; in at most the product of their lengths.
inline bool matches(std::string_view text, std::string_view pattern) noexcept {
  std::size_t t = 0, p = 0, star = std::string_view::npos, resumed = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resumed = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      ++p, ++t;
    } else if (star != std::string_view::npos) {  // the last star takes one more
      p = star + 1;
      t = ++resumed;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

/// The first of the patterns that describes a name, or null.
inline const std::string* match_of(std::string_view name, const std::vector<std::string>& patterns) noexcept {
  for (const auto& pattern : patterns) {
    if (matches(name, pattern)) return &pattern;
  }
  return nullptr;
}

/// Whether a rule is for a weight of that name, and of one of the two roles that rules know.
inline bool is_for(const io::pack_rule& rule, std::string_view name, bool is_experts, bool is_linear) noexcept {
  if (rule.pattern.empty()) return true;
  if (rule.pattern == "experts") return is_experts;
  if (rule.pattern == "linear") return is_linear;
  if (rule.pattern.find_first_of("*?") != std::string::npos) return matches(name, rule.pattern);
  return name.find(rule.pattern) != std::string_view::npos;
}

/// The error of a pattern, given to the option `what`, that no entry fits.
template <class Entries, class NameOf>
error unmatched(std::string_view what, const std::string& pattern, const Entries& entries, const NameOf& name_of) {
  return error(errc::invalid_argument, {"--", what, ' ', printable(pattern), ": it matches no tensor; ",
                                        nearest_names(pattern, entries, name_of)});
}

/// Fails with the first pattern that no entry fits.
template <class Entries, class NameOf>
result<void> all_match(std::string_view what, const std::vector<std::string>& patterns, const Entries& entries,
                       const NameOf& name_of) {
  for (const auto& pattern : patterns) {
    bool any = false;
    for (const auto& entry : entries) any = any || matches(name_of(entry), pattern);
    if (!any) return unmatched(what, pattern, entries, name_of);
  }
  return {};
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../detail/macros_back.hpp"
