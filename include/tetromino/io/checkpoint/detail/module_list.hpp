#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../error.hpp"   // error, result
#include "../../pack_rule.hpp"  // match_of

#include <nlohmann/json.hpp>  // nlohmann::json

#include <regex.h>  // ::regcomp, ::regexec

#include <algorithm>      // std::any_of, std::find_if
#include <cctype>         // std::isdigit
#include <cstddef>        // std::size_t
#include <memory>         // std::unique_ptr
#include <string>         // std::string
#include <unordered_set>  // std::unordered_set
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The modules that a list in config.json leaves alone: names, patterns, and after "re:" regular expressions of how
/// their names begin. Nobody vouches for it, so that what would take long to compare is refused.
class module_list {
 public:
  [[nodiscard]] static result<module_list> try_read(const nlohmann::json& list) {
    constexpr std::size_t most = 1000;
    module_list out;
    for (const auto& entry : list) {
      if (!entry.is_string()) continue;
      const std::string pattern = entry.get<std::string>();
      if (pattern.starts_with("re:")) {
        auto compiled = compile(pattern.substr(3));
        if (!compiled) return compiled.error();
        out.expressions_.push_back(std::move(*compiled));
      } else if (pattern.find_first_of("*?") != std::string::npos) {
        out.patterns_.push_back(pattern);
      } else {
        out.names_.insert(pattern);
      }
    }
    if (out.patterns_.size() + out.expressions_.size() <= most) return out;
    return error(errc::malformed_file, {"expected at most ", most, " patterns"});
  }

  [[nodiscard]] bool names(const std::string& module) const {
    return names_.contains(module) || match_of(module, patterns_) != nullptr ||
           std::any_of(expressions_.begin(), expressions_.end(), [&](const auto& compiled) {
             return ::regexec(compiled.get(), module.c_str(), 0, nullptr, 0) == 0;
           });
  }

  /// A name of the list that stands somewhere in a module's, or null.
  [[nodiscard]] const std::string* name_within(const std::string& module) const {
    const auto found = std::find_if(names_.begin(), names_.end(),
                                    [&](const std::string& name) { return module.find(name) != std::string::npos; });
    return found == names_.end() ? nullptr : &*found;
  }

 private:
  struct free_expression {
    void operator()(::regex_t* compiled) const noexcept {
      ::regfree(compiled);
      delete compiled;
    }
  };
  using expression = std::unique_ptr<::regex_t, free_expression>;

  [[nodiscard]] static result<expression> compile(const std::string& written) {
    constexpr std::size_t longest = 500;
    // Counts take memory, and references to what a group has met take time, without bound.
    const auto is_reference = [&](std::size_t i) {
      return written[i] == '\\' && std::isdigit(static_cast<unsigned char>(written[i + 1])) != 0;
    };
    bool is_simple = written.size() <= longest && written.find('{') == std::string::npos;
    for (std::size_t i = 0; is_simple && i + 1 < written.size(); ++i) is_simple = !is_reference(i);
    auto compiled = std::make_unique<::regex_t>();
    if (!is_simple || ::regcomp(compiled.get(), ("^(" + written + ")").c_str(), REG_EXTENDED | REG_NOSUB) != 0) {
      return error(errc::malformed_file,
                   {"expected a regular expression without counts and references, found ", printable(written)});
    }
    return expression(compiled.release());
  }

  std::unordered_set<std::string> names_;
  std::vector<std::string> patterns_;
  std::vector<expression> expressions_;
};
}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
