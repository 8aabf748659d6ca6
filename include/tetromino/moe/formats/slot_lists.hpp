#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"   // result, error
#include "../placement.hpp"  // placement

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>     // std::count, std::max, std::min
#include <charconv>      // std::from_chars
#include <cstddef>       // std::ptrdiff_t, std::size_t
#include <cstdint>       // std::int32_t, std::int64_t, std::uint32_t, std::uint64_t
#include <optional>      // std::optional, std::nullopt
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::errc
#include <utility>       // std::exchange
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// The slots of a plan, layer by layer, as a file lists them.
class slot_lists {
 public:
  /// The next slot of the layer that is open; −1 is an empty one.
  [[nodiscard]] std::string add_slot(std::int64_t expert) {
    if (expert < empty_slot || expert >= static_cast<std::int64_t>(placement::max_experts)) {
      return text("expected experts from -1 (empty) to ", placement::max_experts - 1, ", got ", expert);
    }
    entries_.push_back(static_cast<std::int32_t>(expert));
    largest_ = std::max(largest_, entries_.back());
    return {};
  }
  /// Closes the layer; says what is wrong, or nothing.
  [[nodiscard]] std::string end_layer() {
    ++layers_;
    if (layers_ == 1) slots_ = entries_.size();
    return entries_.size() == layers_ * slots_ ? "" : text("expected ", slots_, " slots as in the layers before");
  }
  /// A whole layer; says what is wrong, or nothing.
  [[nodiscard]] std::string add(const nlohmann::json& layer) {
    if (!layer.is_array()) return "expected a list of experts";
    for (const nlohmann::json& e : layer) {
      if (!e.is_number_integer() || (e.is_number_unsigned() && e.get<std::uint64_t>() >= placement::max_experts)) {
        return text("expected experts from -1 (empty) to ", placement::max_experts - 1, ", got ",
                    e.is_structured() ? e.type_name()
                                      : e.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace).substr(0, 40));
      }
      if (std::string bad = add_slot(e.get<std::int64_t>()); !bad.empty()) return bad;
    }
    return end_layer();
  }
  [[nodiscard]] std::size_t layers() const noexcept { return layers_; }

  /// `experts` 0: the largest number + 1.
  [[nodiscard]] result<placement> finish(std::size_t experts) {
    return placement::try_make(layers_, experts != 0 ? experts : static_cast<std::size_t>(largest_ + 1), slots_,
                               entries_);
  }

 private:
  std::vector<std::int32_t> entries_;
  std::size_t layers_ = 0, slots_ = 0;
  std::int32_t largest_ = empty_slot;
};

/// The number after a key that begins a line; nothing where there is no such line.
[[nodiscard]] inline std::optional<std::uint64_t> yaml_number(std::string_view written, std::string_view key) {
  for (std::size_t at = written.find(key); at != std::string_view::npos; at = written.find(key, at + 1)) {
    if (at > 0 && written[at - 1] != '\n') continue;
    std::string_view rest = written.substr(at + key.size());
    rest.remove_prefix(std::min(rest.size(), rest.find_first_not_of(' ')));
    std::uint64_t n = 0;
    if (std::from_chars(rest.data(), rest.data() + rest.size(), n).ec == std::errc()) return n;
  }
  return std::nullopt;
}

/// Numbers of `initial_global_assignments`, a mapping from layer to list, in flow or block style, as YAML writers put
/// it; layers are expected in ascending order, and their numbers are added to `layers`. Says what is wrong, and on
/// which line, or nothing.
[[nodiscard]] inline std::string read_yaml_lists(std::string_view written, slot_lists& to,
                                                 std::vector<std::uint32_t>& layers) {
  constexpr std::string_view start = "initial_global_assignments:";
  const std::size_t at = written.find(start);
  std::size_t line = 1 + static_cast<std::size_t>(
                             std::count(written.begin(), written.begin() + static_cast<std::ptrdiff_t>(at), '\n'));
  std::string_view rest = written.substr(at + start.size());
  bool open = false, at_line_start = false;
  std::int64_t last_layer = -1;
  const auto close = [&]() -> std::string { return std::exchange(open, false) ? to.end_layer() : ""; };
  while (!rest.empty()) {
    const char c = rest.front();
    if (c == '\n') {
      ++line;
      at_line_start = true;
      rest.remove_prefix(1);
      continue;
    }
    if (c == '#') {
      rest.remove_prefix(std::min(rest.size(), rest.find('\n')));
      continue;
    }
    const bool is_digit = c >= '0' && c <= '9';
    if (at_line_start && c != ' ' && c != '-' && c != '}' && c != '\r') break;  // the next key of the file
    at_line_start = false;
    const bool is_number = is_digit || (c == '-' && rest.size() > 1 && rest[1] >= '0' && rest[1] <= '9');
    if (!is_number) {
      if (std::string_view(" \t\r,[]{}-\"'").find(c) == std::string_view::npos) {
        return text("expected lists of experts by layer, got something else on line ", line);
      }
      rest.remove_prefix(1);
      continue;
    }
    std::int64_t n = 0;
    const auto [end, code] = std::from_chars(rest.data(), rest.data() + rest.size(), n);
    if (code != std::errc()) return text("expected a number on line ", line);
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
    std::size_t skip = 0;
    while (skip < rest.size() && (rest[skip] == '"' || rest[skip] == '\'' || rest[skip] == ' ')) ++skip;
    std::string bad;
    if (skip < rest.size() && rest[skip] == ':') {
      rest.remove_prefix(skip + 1);
      bad = close();
      if (bad.empty() && (n <= last_layer || n > 65'535)) {
        bad = text("expected layers in ascending order, below 65536, got ", n);
      }
      last_layer = n;
      layers.push_back(static_cast<std::uint32_t>(n));
      open = true;
    } else {
      bad = open ? to.add_slot(n) : "expected a layer before its experts";
    }
    if (!bad.empty()) return text(bad, " on line ", line);
  }
  if (std::string bad = close(); !bad.empty()) return text(bad, " on line ", line);
  return to.layers() == 0 ? "expected at least one layer" : "";
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
