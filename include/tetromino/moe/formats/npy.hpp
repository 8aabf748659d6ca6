#pragma once

#include "../../detail/macros_off.hpp"

/// Arrays as NumPy writes them: one in an .npy file, several in an .npz archive (uncompressed).

#include "../../error.hpp"                // result, error
#include "../../io/detail/file_text.hpp"  // checked_product, printable
#include "number_array.hpp"               // number_array

#include <algorithm>     // std::min
#include <charconv>      // std::from_chars
#include <cstddef>       // std::size_t
#include <cstdint>       // std::uint8_t, std::uint32_t
#include <cstring>       // std::memcpy
#include <iterator>      // std::size
#include <optional>      // std::optional
#include <span>          // std::span
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::errc
#include <utility>       // std::move
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

inline constexpr std::string_view npy_magic = "\x93NUMPY";
inline constexpr std::string_view zip_magic = "PK\x03\x04";

/// What stands behind `'key':` in the header of an .npy, without blanks before it; empty if the key is missing.
[[nodiscard]] inline std::string_view npy_entry(std::string_view header, std::string_view key) {
  const std::size_t at = header.find(key);
  if (at == std::string_view::npos) return {};
  std::string_view rest = header.substr(at + key.size());
  while (!rest.empty() && (rest.front() == ' ' || rest.front() == ':')) rest.remove_prefix(1);
  return rest;
}

[[nodiscard]] inline std::optional<number_type> npy_type(std::string_view descr) {
  if (descr.size() < 5 || (descr[0] != '\'' && descr[0] != '"') || descr[4] != descr[0]) return std::nullopt;
  const std::string_view name = descr.substr(2, 2);
  if (descr[1] != '<' && !(descr[1] == '|' && name[1] == '1')) return std::nullopt;
  constexpr std::string_view names[] = {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"};
  for (std::size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) return static_cast<number_type>(i);
  }
  return std::nullopt;
}

/// `(112, 8, 8)` as a shape; nothing if it is none.
[[nodiscard]] inline std::optional<std::vector<std::size_t>> npy_shape(std::string_view written) {
  if (written.empty() || written.front() != '(') return std::nullopt;
  written = written.substr(1, written.find(')') - 1);
  std::vector<std::size_t> shape;
  while (true) {
    while (!written.empty() && (written.front() == ' ' || written.front() == ',')) written.remove_prefix(1);
    if (written.empty()) return shape;
    std::size_t n = 0;
    const auto [end, code] = std::from_chars(written.data(), written.data() + written.size(), n);
    if (code != std::errc() || shape.size() == 8) return std::nullopt;
    shape.push_back(n);
    written.remove_prefix(static_cast<std::size_t>(end - written.data()));
  }
}

/// The array in the bytes of an .npy. Errors begin with `subject`.
[[nodiscard]] inline result<number_array> try_read_npy(std::span<const std::uint8_t> file, const std::string& subject) {
  const auto bad = [&](const auto&... what) { return error(errc::malformed_file, {subject, ": ", what...}); };
  const std::string_view all(reinterpret_cast<const char*>(file.data()), file.size());
  if (!all.starts_with(npy_magic) || all.size() < 10) return bad("expected an .npy array, got something else");
  const std::size_t version = file[6];
  std::size_t length = file[8] + (std::size_t{file[9]} << 8), begin = 10;
  if (version > 1) {
    if (all.size() < 12) return bad("expected an .npy header, got ", all.size(), " bytes");
    length += (std::size_t{file[10]} << 16) + (std::size_t{file[11]} << 24);
    begin = 12;
  }
  if (version == 0 || version > 3 || length > all.size() - begin) {
    return bad("expected an .npy header of version 1 to 3 inside ", all.size(), " bytes, got version ", version,
               " and ", length, " bytes");
  }
  const std::string_view header = all.substr(begin, length);
  number_array out;
  const auto type = npy_type(npy_entry(header, "'descr'"));
  if (!type) {
    return bad("expected little-endian integers or floats, got ",
               tetromino::detail::printable(npy_entry(header, "'descr'"), 20));
  }
  if (!npy_entry(header, "'fortran_order'").starts_with("False")) {
    return bad("expected rows first: save np.ascontiguousarray(x)");
  }
  auto shape = npy_shape(npy_entry(header, "'shape'"));
  if (!shape) return bad("expected a shape, got ", tetromino::detail::printable(npy_entry(header, "'shape'"), 20));
  std::optional<std::size_t> bytes = bytes_of(*type);
  for (const std::size_t n : *shape) bytes = bytes ? tetromino::detail::checked_product(*bytes, n) : bytes;
  if (!bytes || *bytes != all.size() - begin - length) {
    return bad("expected the bytes of ", tetromino::detail::shape_text(*shape), ", got ", all.size() - begin - length);
  }
  out.type = *type;
  out.shape = std::move(*shape);
  out.bytes = file.subspan(begin + length);
  return out;
}

/// A file in an archive.
struct zip_entry {
  std::string name;
  std::span<const std::uint8_t> bytes;
};

/// The files of an uncompressed zip archive of less than 4 GiB. Errors begin with `subject`.
[[nodiscard]] inline result<std::vector<zip_entry>> try_read_zip(std::span<const std::uint8_t> file,
                                                                 const std::string& subject) {
  const auto bad = [&](const auto&... what) { return error(errc::malformed_file, {subject, ": ", what...}); };
  const auto number = [&](std::size_t at, std::size_t bytes) {
    std::size_t value = 0;
    for (std::size_t i = 0; i < bytes; ++i) value |= std::size_t{file[at + i]} << (8 * i);
    return value;
  };
  constexpr std::size_t end_bytes = 22, entry_bytes = 46, local_bytes = 30;
  if (file.size() < end_bytes) return bad("expected a zip archive, got ", file.size(), " bytes");
  std::size_t end = file.size() - end_bytes;
  const std::size_t first_end = file.size() - std::min<std::size_t>(file.size(), end_bytes + 0xFFFF);
  while (number(end, 4) != 0x0605'4B50 && end > first_end) --end;
  if (number(end, 4) != 0x0605'4B50) return bad("expected the directory of a zip archive at the end, found none");
  const std::size_t count = number(end + 10, 2);
  std::size_t at = number(end + 16, 4), left = file.size();
  std::vector<zip_entry> out;
  for (std::size_t i = 0; i < count; ++i) {
    if (at > end || end - at < entry_bytes || number(at, 4) != 0x0201'4B50) {
      return bad("expected ", count, " files in the zip archive, got ", i);
    }
    const std::size_t method = number(at + 10, 2), packed = number(at + 20, 4), size = number(at + 24, 4);
    const std::size_t name = number(at + 28, 2), more = number(at + 30, 2) + number(at + 32, 2);
    const std::size_t local = number(at + 42, 4);
    if (end - at - entry_bytes < name + more) return bad("expected a whole directory of the zip archive");
    const std::string title(reinterpret_cast<const char*>(file.data()) + at + entry_bytes, name);
    if (method != 0 || packed != size) {
      return bad("expected an archive without compression (np.savez), got one with it (np.savez_compressed)");
    }
    if (local > end || end - local < local_bytes)
      return bad("expected ", tetromino::detail::printable(title, 40), " inside the archive");
    const std::size_t data = local + local_bytes + number(local + 26, 2) + number(local + 28, 2);
    if (data > end || size > end - data)
      return bad("expected ", tetromino::detail::printable(title, 40), " inside the archive");
    if (size > left) return bad("expected files of the archive that do not overlap");
    left -= size;
    out.push_back({title, file.subspan(data, size)});
    at += entry_bytes + name + more;
  }
  return out;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
