#pragma once

/// What readers and writers of every file format need to check sizes and to write messages.

#include "../../error.hpp"  // text

#include <algorithm>    // std::partial_sort, std::min, std::max, std::find
#include <cstddef>      // std::size_t, std::ptrdiff_t
#include <optional>     // std::optional
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::pair
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Text out of a file, fit for a message: in quotes, control characters escaped, long text cut.
inline std::string printable(std::string_view raw, std::size_t longest = 100) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string out = "'";
  for (const char c : raw.substr(0, longest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x";
      out += digits[byte / 16];
      out += digits[byte % 16];
    } else {
      out += c;
    }
  }
  if (raw.size() > longest) out += "...";
  return out += '\'';
}

/// "[2, 3]", cut after a few dimensions.
inline std::string shape_text(std::span<const std::size_t> shape) {
  constexpr std::size_t most_shown = 8;
  std::string out = "[";
  for (std::size_t i = 0; i < std::min(shape.size(), most_shown); ++i) out += text(i == 0 ? "" : ", ", shape[i]);
  if (shape.size() > most_shown) out += text(", ... ", shape.size(), " dimensions");
  return out += ']';
}

/// The position of the first byte that breaks UTF-8; nothing if none does.
inline std::optional<std::size_t> invalid_utf8(std::string_view s) noexcept {
  const auto at = [&](std::size_t i) { return i < s.size() ? static_cast<unsigned char>(s[i]) : 0u; };
  const auto in = [](unsigned byte, unsigned low, unsigned high) { return byte >= low && byte <= high; };
  for (std::size_t i = 0; i < s.size();) {
    const unsigned lead = at(i);
    std::size_t length = 1;
    if (lead >= 0x80) {
      length = in(lead, 0xC2, 0xDF) ? 2 : in(lead, 0xE0, 0xEF) ? 3 : in(lead, 0xF0, 0xF4) ? 4 : 0;
      // The second byte is narrower where overlong forms, surrogates or values past U+10FFFF would begin.
      const unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
      const unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
      if (length == 0 || !in(at(i + 1), low, high)) return i;
      for (std::size_t k = 2; k < length; ++k) {
        if (!in(at(i + k), 0x80, 0xBF)) return i;
      }
    }
    i += length;
  }
  return std::nullopt;
}

/// a * b, or nothing if it does not fit.
inline std::optional<std::size_t> checked_product(std::size_t a, std::size_t b) noexcept {
  if (a != 0 && b > static_cast<std::size_t>(-1) / a) return std::nullopt;
  return a * b;
}

/// Elements of a shape, its dimensions of zero taken as one, since they do not excuse an overflow of the others;
/// nothing where that does not fit.
inline std::optional<std::size_t> nonzero_product(std::span<const std::size_t> shape) noexcept {
  std::optional<std::size_t> product = 1;
  for (const std::size_t dimension : shape) {
    if (product) product = checked_product(*product, std::max<std::size_t>(1, dimension));
  }
  return product;
}
inline bool is_empty(std::span<const std::size_t> shape) noexcept {
  return std::find(shape.begin(), shape.end(), std::size_t{0}) != shape.end();
}

/// The names nearest to one that does not exist, as the end of a message. Two names are as far apart as what is left of
/// the longer one without their common beginning and end.
template <class Entries, class NameOf>
std::string nearest_names(std::string_view wanted, const Entries& entries, const NameOf& name_of) {
  constexpr std::size_t most_shown = 3;
  std::vector<std::pair<std::size_t, std::string_view>> nearest;
  for (const auto& entry : entries) {
    const std::string_view name = name_of(entry);
    const std::size_t common = std::min(wanted.size(), name.size());
    std::size_t front = 0;
    while (front < common && wanted[front] == name[front]) ++front;
    std::size_t back = 0;
    while (back < common - front && wanted[wanted.size() - 1 - back] == name[name.size() - 1 - back]) ++back;
    nearest.emplace_back(std::max(wanted.size(), name.size()) - front - back, name);
  }
  const auto shown = nearest.begin() + static_cast<std::ptrdiff_t>(std::min(most_shown, nearest.size()));
  std::partial_sort(nearest.begin(), shown, nearest.end());
  std::string out;
  for (auto it = nearest.begin(); it != shown; ++it) out += text(out.empty() ? "" : ", ", printable(it->second));
  return nearest.empty() ? "there are no tensors" : text("the nearest names are ", out);
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
