#pragma once

#include "../../error.hpp"       // error, result
#include "../gguf/types.hpp"     // io::ggml_type
#include "../gguf/metadata.hpp"  // io::gguf_metadata
#include "file_text.hpp"         // printable, shape_text, invalid_utf8, checked_product

#include <algorithm>    // std::sort, std::reverse
#include <bit>          // std::has_single_bit
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint32_t, std::uint64_t
#include <numeric>      // std::iota
#include <optional>     // std::optional
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::detail {

inline constexpr std::string_view gguf_magic = "GGUF";
inline constexpr std::uint32_t gguf_version = 3;
inline constexpr std::string_view gguf_alignment_key = "general.alignment";
inline constexpr std::size_t gguf_default_alignment = 32;
inline constexpr std::size_t gguf_most_dimensions = 4;
inline constexpr std::size_t gguf_longest_key = 65535;

inline namespace TETROMINO_ISA {

/// Bytes of a GGUF tensor of this row-major shape, or why there is no such number.
inline result<std::size_t> ggml_tensor_bytes(io::ggml_type type, std::span<const std::size_t> shape) {
  auto product = nonzero_product(shape);
  const std::size_t row = shape.empty() ? 1 : shape.back(), block = io::block_elements(type);
  if (row % block != 0) {
    return error(errc::malformed_file, {"expected rows of whole blocks of ", block, " elements, as ", io::name(type),
                                        " has them, found shape ", shape_text(shape)});
  }
  // An empty tensor's other dimensions need not be whole blocks.
  if (product) product = checked_product(*product / block + (*product % block != 0), io::block_bytes(type));
  if (!product) {
    return error(errc::malformed_file, {"expected a size in bytes that fits in 64 bits, found shape ",
                                        shape_text(shape), " of ", io::name(type)});
  }
  return is_empty(shape) ? 0 : *product;
}

/// The next multiple of `alignment`, a power of two. Pre: it fits.
constexpr std::size_t gguf_padded(std::size_t bytes, std::size_t alignment) noexcept {
  return (bytes + alignment - 1) & ~(alignment - 1);
}

}  // namespace TETROMINO_ISA

/// One tensor as the header describes it; `begin` and `end` count from the start of the data.
struct gguf_entry {
  std::string name;
  io::ggml_type type{};
  std::vector<std::size_t> shape;  ///< row-major: the reverse of what the file says
  std::size_t begin = 0;
  std::size_t end = 0;
};

/// A header that has been checked against its file: each tensor begins at the first aligned byte after the one before.
struct gguf_header {
  io::gguf_metadata metadata;
  std::vector<gguf_entry> tensors;
  std::size_t alignment = gguf_default_alignment;
  std::size_t data_begin = 0;
};

inline namespace TETROMINO_ISA {

/// Goes through the bytes of a header once, and stops at the first error, kept in `problem`. Nothing is allocated
/// before the file has been seen to hold what it is for.
class gguf_parser {
 public:
  /// `bytes` are a file, or its header alone; the file has `file_size` bytes.
  gguf_parser(std::span<const std::uint8_t> bytes, std::size_t file_size) : bytes_(bytes), file_size_(file_size) {}

  std::string problem;
  gguf_header header;

  [[nodiscard]] bool run() {
    std::uint64_t tensors = 0, entries = 0;
    if (!read_start() || !read(tensors, "the number of tensors") || !read(entries, "the number of metadata entries")) {
      return false;
    }
    // An entry takes at least a length, a letter, a type and a byte; a tensor a length, a letter and three numbers.
    if (!check_count(entries, 8 + 1 + 4 + 1, "metadata entries")) return false;
    for (std::uint64_t i = 0; i < entries; ++i) {
      if (!read_entry(i)) return false;
    }
    if (!check_keys() || !read_alignment()) return false;
    if (!check_count(tensors, 8 + 1 + 4 + 4 + 8, "tensors")) return false;
    for (std::uint64_t i = 0; i < tensors; ++i) {
      if (!read_tensor(i)) return false;
    }
    return check_names() && check_layout();
  }

 private:
  template <class... Pieces>
  bool fail(const Pieces&... what) {
    problem = text(subject_, subject_.empty() ? "" : ": ", what...);
    return false;
  }

  [[nodiscard]] std::size_t left() const noexcept { return bytes_.size() - at_; }

  /// Takes `count` bytes; `what` they are goes into the message.
  bool take(std::uint64_t count, std::string_view what, std::span<const std::uint8_t>& out) {
    if (count > left()) {
      return fail("expected ", count, " bytes for ", what, ", found ", left(), " (is the file cut short?)");
    }
    out = bytes_.subspan(at_, count);
    at_ += out.size();
    return true;
  }
  template <gguf_number T>
  bool read(T& out, std::string_view what) {
    std::span<const std::uint8_t> raw;
    if (!take(sizeof(T), what, raw)) return false;
    out = load_number<T>(raw.data());
    return true;
  }
  bool read(std::string_view& out, std::string_view what) {
    std::uint64_t size = 0;
    std::span<const std::uint8_t> raw;
    if (!read(size, what) || !take(size, what, raw)) return false;
    out = {reinterpret_cast<const char*>(raw.data()), raw.size()};
    return true;
  }

  bool read_start() {
    std::span<const std::uint8_t> magic;
    if (left() < gguf_magic.size() || !take(gguf_magic.size(), "", magic) ||
        !std::equal(magic.begin(), magic.end(), gguf_magic.begin())) {
      const std::string_view start(reinterpret_cast<const char*>(bytes_.data()),
                                   std::min<std::size_t>(bytes_.size(), 4));
      return fail("expected a file that begins with 'GGUF', found ", bytes_.empty() ? "no bytes" : printable(start));
    }
    std::uint32_t version = 0;
    if (!read(version, "the version")) return false;
    if (version >= 0x10000 && version % 0x10000 == 0) {
      return fail("expected a little-endian file, found a big-endian one: gguf_convert_endian.py converts it");
    }
    // Version 2 differs in its number alone; version 1 had 32-bit lengths.
    return version == 2 || version == gguf_version || fail("expected version 2 or 3, found version ", version);
  }

  bool check_count(std::uint64_t count, std::size_t least_bytes, std::string_view of_what) {
    subject_.clear();
    return count <= left() / least_bytes ||
           fail("expected at most ", left() / least_bytes, " ", of_what, " in the ", left(),
                " bytes that are left, found ", count, " (is the file cut short?)");
  }

  bool check_text(std::string_view name) {
    if (name.empty()) return fail("expected a name, found an empty one");
    if (name.size() > gguf_longest_key) {
      return fail("expected a name of at most ", gguf_longest_key, " bytes, found ", name.size());
    }
    if (invalid_utf8(name) || name.find('\0') != std::string_view::npos) {
      return fail("expected a name in UTF-8 without zero bytes, found ", printable(name));
    }
    return true;
  }

  bool read_type(io::gguf_type& out, std::string_view what) {
    std::uint32_t number = 0;
    if (!read(number, what)) return false;
    if (number >= gguf_type_facts.size()) {
      return fail("expected ", what, " from 0 to ", gguf_type_facts.size() - 1, ", found ", number);
    }
    out = static_cast<io::gguf_type>(number);
    return true;
  }

  bool read_entry(std::uint64_t index) {
    subject_ = text("metadata entry ", index);
    std::string_view key;
    if (!read(key, "its key") || !check_text(key)) return false;
    subject_ = text("key ", printable(key));
    io::gguf_type type{};
    if (!read_type(type, "a type of value")) return false;
    const std::size_t begin = at_;
    if (type == io::gguf_type::array) {
      io::gguf_type of{};
      std::uint64_t count = 0;
      if (!read_type(of, "a type of elements") || !read(count, "the number of elements")) return false;
      if (of == io::gguf_type::array) return fail("expected an array of numbers or strings, found one of arrays");
      if (!skip_values(of, count)) return false;
    } else if (!skip_values(type, 1)) {
      return false;
    }
    header.metadata.append(std::string(key), {type, bytes_.subspan(begin, at_ - begin)});
    return true;
  }

  bool skip_values(io::gguf_type type, std::uint64_t count) {
    if (type == io::gguf_type::string) {
      std::string_view ignored;
      for (std::uint64_t i = 0; i < count; ++i) {
        if (!read(ignored, "a string")) return false;
      }
      return true;
    }
    const std::size_t size = fact_of(type).bytes;
    if (count > left() / size) {
      return fail("expected ", count, " values of ", size, " bytes, found ", left(), " bytes (is the file cut short?)");
    }
    std::span<const std::uint8_t> values;
    if (!take(count * size, "", values)) return false;
    if (type != io::gguf_type::boolean) return true;
    for (const std::uint8_t value : values) {
      if (value > 1) return fail("expected a bool of 0 or 1, found ", static_cast<unsigned>(value));
    }
    return true;
  }

  /// A name that two of `names` share, or null.
  static const std::string* repeated(std::vector<const std::string*> names) {
    std::sort(names.begin(), names.end(), [](const auto* a, const auto* b) { return *a < *b; });
    for (std::size_t i = 1; i < names.size(); ++i) {
      if (*names[i] == *names[i - 1]) return names[i];
    }
    return nullptr;
  }

  bool check_keys() {
    std::vector<const std::string*> names;
    for (const auto& entry : header.metadata) names.push_back(&entry.key);
    const std::string* const twice = repeated(std::move(names));
    subject_.clear();
    return twice == nullptr || fail("key ", printable(*twice), ": expected each key once, found it twice");
  }
  bool check_names() {
    std::vector<const std::string*> names;
    for (const auto& entry : header.tensors) names.push_back(&entry.name);
    const std::string* const twice = repeated(std::move(names));
    subject_.clear();
    return twice == nullptr || fail("tensor ", printable(*twice), ": expected each name once, found it twice");
  }

  bool read_alignment() {
    const io::gguf_value* const value = header.metadata.find(gguf_alignment_key);
    if (value == nullptr) return true;
    subject_ = text("key ", printable(gguf_alignment_key));
    const auto number = value->try_as<std::uint32_t>();
    if (!number) return fail(number.error().what());
    if (!std::has_single_bit(*number)) return fail("expected a power of two, found ", *number);
    header.alignment = *number;
    return true;
  }

  bool read_tensor(std::uint64_t index) {
    subject_ = text("tensor ", index);
    gguf_entry entry;
    std::string_view name;
    if (!read(name, "its name") || !check_text(name)) return false;
    entry.name = name;
    subject_ = text("tensor ", printable(name));
    std::uint32_t dimensions = 0, type = 0;
    if (!read(dimensions, "the number of its dimensions")) return false;
    if (dimensions > gguf_most_dimensions) {
      return fail("expected at most ", gguf_most_dimensions, " dimensions, found ", dimensions);
    }
    for (std::uint32_t i = 0; i < dimensions; ++i) {
      std::uint64_t size = 0;
      if (!read(size, "a dimension")) return false;
      entry.shape.push_back(size);
    }
    std::reverse(entry.shape.begin(), entry.shape.end());
    std::uint64_t offset = 0;
    if (!read(type, "its type") || !read(offset, "its offset")) return false;
    if (find_ggml_fact(type) == nullptr) return fail("expected the number of one of ggml's types, found ", type);
    entry.type = static_cast<io::ggml_type>(type);
    const auto size = ggml_tensor_bytes(entry.type, entry.shape);
    if (!size) return fail(size.error().what());
    entry.begin = offset;
    entry.end = *size;  // check_layout makes it the end
    header.tensors.push_back(std::move(entry));
    return true;
  }

  /// Each tensor begins where llama.cpp expects it: at the first aligned byte after the one before.
  bool check_layout() {
    const std::size_t aligned = gguf_padded(at_, header.alignment);
    if (aligned > file_size_ && !header.tensors.empty()) {
      return fail("expected the data at byte ", aligned, ", found a file of ", file_size_,
                  " bytes (is the file cut short?)");
    }
    header.data_begin = std::min(aligned, file_size_);
    const std::size_t data_bytes = file_size_ - header.data_begin;
    std::size_t next = 0;
    for (gguf_entry& tensor : header.tensors) {
      subject_ = text("tensor ", printable(tensor.name));
      const std::size_t size = tensor.end;
      if (tensor.begin != next) {
        return fail("expected it at byte ", next, " of the data, after the tensor before it, found byte ",
                    tensor.begin);
      }
      // What follows may be padded beyond the end of the file, and then has no byte in it.
      if (size > data_bytes || tensor.begin > data_bytes - size) {
        return fail("expected ", size, " bytes at byte ", tensor.begin, " for ", io::name(tensor.type), " of shape ",
                    shape_text(tensor.shape), ", found ", data_bytes, " bytes of data (is the file cut short?)");
      }
      tensor.end = tensor.begin + size;
      next = gguf_padded(tensor.end, header.alignment);
    }
    subject_.clear();
    return data_bytes <= next ||
           fail("expected the file to end at byte ", header.data_begin + next, ", found ", file_size_, " bytes");
  }

  std::span<const std::uint8_t> bytes_;
  std::size_t file_size_;
  std::size_t at_ = 0;
  std::string subject_;
};

/// Reads and checks the header of a GGUF file held in `file`; `path` is for messages only.
inline result<gguf_header> parse_gguf(std::span<const std::uint8_t> file, std::string_view path) {
  gguf_parser parser(file, file.size());
  if (!parser.run()) return error(errc::malformed_file, {path, ": ", parser.problem});
  return std::move(parser.header);
}

/// A header, padded so that the data begins at a multiple of the alignment.
inline std::vector<std::uint8_t> write_gguf_header(const io::gguf_metadata& metadata,
                                                   std::span<const gguf_entry> tensors, std::size_t alignment) {
  std::vector<std::uint8_t> out(gguf_magic.begin(), gguf_magic.end());
  append_number(out, gguf_version);
  append_number(out, std::uint64_t{tensors.size()});
  append_number(out, std::uint64_t{metadata.size()});
  for (const auto& [key, value] : metadata) {
    append_string(out, key);
    append_number(out, static_cast<std::uint32_t>(value.type()));
    out.insert(out.end(), value.bytes().begin(), value.bytes().end());
  }
  for (const gguf_entry& tensor : tensors) {
    append_string(out, tensor.name);
    append_number(out, static_cast<std::uint32_t>(tensor.shape.size()));
    for (std::size_t i = tensor.shape.size(); i-- > 0;) append_number(out, std::uint64_t{tensor.shape[i]});
    append_number(out, static_cast<std::uint32_t>(tensor.type));
    append_number(out, std::uint64_t{tensor.begin});
  }
  out.resize(gguf_padded(out.size(), alignment));
  return out;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail
