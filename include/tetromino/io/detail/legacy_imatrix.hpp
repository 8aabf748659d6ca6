#pragma once

#include "../../error.hpp"       // error, result
#include "../gguf/metadata.hpp"  // load_number
#include "file_text.hpp"         // printable

#include <algorithm>    // std::sort
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::int32_t
#include <optional>     // std::optional
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Sums of one tensor in an imatrix file of the form before GGUF.
struct legacy_imatrix_entry {
  std::string name;
  std::int32_t calls = 0;              ///< what the sums are divided by, unless it is 0
  std::span<const std::uint8_t> sums;  ///< floats, at any address
};

struct legacy_imatrix {
  std::vector<legacy_imatrix_entry> entries;  ///< by name
  std::string dataset;
  std::int32_t chunks = 0;
};

/// Reads an imatrix file of the form before GGUF: a number of entries; for each a name, a number of calls, a number of
/// sums and the sums; then, if there is more, a number of chunks and the name of the text. All numbers have 32 bits.
/// (llama.cpp, common/imatrix-loader.cpp)
class legacy_imatrix_parser {
 public:
  explicit legacy_imatrix_parser(std::span<const std::uint8_t> file) : rest_(file) {}

  std::string problem;
  legacy_imatrix found;

  [[nodiscard]] bool run() {
    std::int32_t count = 0;
    if (!read_count(count, 1, "the number of entries")) return false;
    for (std::int32_t i = 0; i < count; ++i) {
      subject_ = text("entry ", i, ": ");
      if (!read_entry()) return false;
    }
    subject_.clear();
    auto& entries = found.entries;
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    for (std::size_t i = 1; i < entries.size(); ++i) {
      if (entries[i].name == entries[i - 1].name) {
        return fail("tensor ", printable(entries[i].name), ": expected each name once, found it twice");
      }
    }
    if (rest_.empty()) return true;
    if (!read_count(found.chunks, 0, "the number of chunks")) return false;
    if (rest_.empty()) return true;
    std::int32_t length = 0;
    std::span<const std::uint8_t> dataset;
    if (!read_count(length, 0, "the length of the dataset's name") || !take(length, "the dataset's name", dataset)) {
      return false;
    }
    found.dataset.assign(dataset.begin(), dataset.end());
    return rest_.empty() || fail("expected the file to end after the dataset's name, found ", rest_.size(), " bytes");
  }

 private:
  template <class... Pieces>
  bool fail(const Pieces&... what) {
    problem = text(subject_, what...);
    return false;
  }

  template <class Count>
  bool take(Count count, std::string_view what, std::span<const std::uint8_t>& out) {
    const auto bytes = static_cast<std::size_t>(count);
    if (bytes > rest_.size()) {
      return fail("expected ", bytes, " bytes for ", what, ", found ", rest_.size(), " (is the file cut short?)");
    }
    out = rest_.first(bytes);
    rest_ = rest_.subspan(bytes);
    return true;
  }

  bool read_count(std::int32_t& out, std::int32_t least, std::string_view what) {
    std::span<const std::uint8_t> raw;
    if (!take(sizeof out, what, raw)) return false;
    out = load_number<std::int32_t>(raw.data());
    return out >= least ||
           fail("expected ", what, " to be at least ", least, ", found ", out, " (is it an imatrix file?)");
  }

  bool read_entry() {
    std::int32_t length = 0, sums = 0;
    std::span<const std::uint8_t> name;
    legacy_imatrix_entry entry;
    if (!read_count(length, 1, "the length of its name") || !take(length, "its name", name)) return false;
    entry.name.assign(name.begin(), name.end());
    subject_ = text("tensor ", printable(entry.name), ": ");
    if (!read_count(entry.calls, 0, "the number of calls") || !read_count(sums, 1, "the number of sums")) return false;
    if (!take(std::int64_t{sums} * 4, "its sums", entry.sums)) return false;
    found.entries.push_back(std::move(entry));
    return true;
  }

  std::span<const std::uint8_t> rest_;
  std::string subject_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
