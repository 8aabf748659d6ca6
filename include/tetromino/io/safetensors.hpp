#pragma once

#include "../detail/macros_off.hpp"

/// Reading and writing safetensors files. Opt-in: needs nlohmann-json and a POSIX system.

#include "../error.hpp"                   // error, result
#include "detail/mapped_tensors.hpp"      // stored_tensor, mapped_tensors
#include "detail/pending_tensors.hpp"     // pending_tensors
#include "detail/safetensors_header.hpp"  // parse_safetensors, write_safetensors_header
#include "dtype.hpp"                      // dtype

#include <algorithm>   // std::stable_sort
#include <cstddef>     // std::size_t
#include <cstdint>     // std::uint8_t
#include <filesystem>  // std::filesystem::path
#include <limits>      // std::numeric_limits
#include <span>        // std::span
#include <string>      // std::string
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::io {

/// A tensor of an open safetensors_file. It refers to the file: it must not outlive it.
class safetensors_tensor : public detail::stored_tensor {
 public:
  [[nodiscard]] TETROMINO_ABI io::dtype dtype() const noexcept { return dtype_; }

 private:
  friend class safetensors_file;
  TETROMINO_ABI safetensors_tensor(detail::safetensors_entry&& entry, std::span<const std::uint8_t> file,
                                   std::size_t data_begin, const std::string& path)
      : stored_tensor(std::move(entry.name), io::name(entry.type), std::move(entry.shape),
                      file.subspan(data_begin + entry.begin, entry.end - entry.begin), data_begin + entry.begin, path),
        dtype_(entry.type) {}

  io::dtype dtype_;
};

/// A safetensors file, mapped into memory and read-only. Opening it checks the whole header and trusts none of it;
/// element values are not looked at. Errors are of kind errc::malformed_file or errc::io and name the file, the tensor,
/// what was expected and what was found. While it is open, nobody may make the file shorter: the system then ends a
/// process that reads the missing pages.
class safetensors_file : public detail::mapped_tensors<safetensors_tensor> {
 public:
  [[nodiscard]] TETROMINO_ABI static safetensors_file open(const std::filesystem::path& path) {
    return try_open(path).value();
  }
  [[nodiscard]] TETROMINO_ABI static result<safetensors_file> try_open(const std::filesystem::path& path) {
    auto mapping = detail::file_mapping::try_open(path);
    if (!mapping) return mapping.error();
    auto header = detail::parse_safetensors(mapping->bytes(), mapping->bytes().size(), path.string());
    if (!header) return header.error();
    return safetensors_file(path, std::move(*mapping), std::move(*header));
  }

  [[nodiscard]] TETROMINO_ABI const safetensors_metadata& metadata() const noexcept { return metadata_; }

 private:
  TETROMINO_ABI safetensors_file(const std::filesystem::path& path, detail::file_mapping&& mapping,
                                 detail::safetensors_header&& header)
      : mapped_tensors(path, std::move(mapping)), metadata_(std::move(header.metadata)) {
    std::vector<safetensors_tensor> tensors;
    tensors.reserve(header.tensors.size());
    for (auto& entry : header.tensors) {
      tensors.push_back(safetensors_tensor(std::move(entry), contents(), header.data_begin, this->path()));
    }
    set_tensors(std::move(tensors));
  }

  safetensors_metadata metadata_;
};

/// A tensor that a safetensors_writer is going to write.
struct tensor_declaration {
  std::string name;
  io::dtype dtype{};
  std::vector<std::size_t> shape;
};

inline namespace TETROMINO_ISA {

/// The declarations with the types of strictest alignment first, otherwise in the same order: so each tensor begins
/// where readers that use it in place need it.
[[nodiscard]] inline std::vector<tensor_declaration> aligned_order(std::vector<tensor_declaration> tensors) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const tensor_declaration& a, const tensor_declaration& b) {
    return alignment(a.dtype) > alignment(b.dtype);
  });
  return tensors;
}

}  // namespace TETROMINO_ISA

/// Writes a safetensors file piece by piece: the header first, from declarations, then bytes of any tensor at any time,
/// each tensor from its first byte to its last. Nothing is buffered. The file has a temporary name in the same
/// directory until `finish`; without it, or after a write that fails, nothing appears under the final name. The same
/// declarations and bytes always give the same file.
class safetensors_writer : public detail::pending_tensors {
 public:
  /// Starts a file with `tensors` in the given order. Fails if they make no valid file, if the path cannot be written,
  /// or if it leads to the file that `source` (optional) is reading.
  [[nodiscard]] TETROMINO_ABI static safetensors_writer create(const std::filesystem::path& path,
                                                               std::span<const tensor_declaration> tensors,
                                                               const safetensors_metadata& metadata = {},
                                                               const safetensors_file* source = nullptr) {
    return try_create(path, tensors, metadata, source).value();
  }
  [[nodiscard]] TETROMINO_ABI static result<safetensors_writer> try_create(const std::filesystem::path& path,
                                                                           std::span<const tensor_declaration> tensors,
                                                                           const safetensors_metadata& metadata = {},
                                                                           const safetensors_file* source = nullptr) {
    auto entries = lay_out(path, tensors, metadata);
    if (!entries) return entries.error();
    const std::string header = detail::write_safetensors_header(*entries, metadata);
    if (header.size() - 8 > detail::safetensors_header_limit) {
      return error(errc::invalid_argument,
                   {path.string(), ": expected a header of at most ", detail::safetensors_header_limit,
                    " bytes, got one of ", header.size() - 8});
    }
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(header.data());
    auto file = try_begin(path, std::span(bytes, header.size()), source);
    if (!file) return file.error();
    std::vector<detail::pending_tensor> slots;
    for (const auto& entry : *entries) {
      slots.push_back({entry.name, io::name(entry.type), header.size() + entry.begin, entry.end - entry.begin});
    }
    return safetensors_writer(std::move(*file), std::move(slots));
  }

 private:
  TETROMINO_ABI safetensors_writer(detail::pending_file&& file, std::vector<detail::pending_tensor>&& tensors)
      : pending_tensors(std::move(file), std::move(tensors)) {}

  /// Gives each tensor its place in the data, after checking everything that a reader would.
  [[nodiscard]] TETROMINO_ABI static result<std::vector<detail::safetensors_entry>> lay_out(
      const std::filesystem::path& path, std::span<const tensor_declaration> tensors,
      const safetensors_metadata& metadata) {
    const auto bad = [&](const auto&... what) { return error(errc::invalid_argument, {path.string(), ": ", what...}); };
    for (const auto& [key, value] : metadata) {
      if (detail::invalid_utf8(key) || detail::invalid_utf8(value)) {
        return bad("metadata key ", detail::printable(key), ": expected UTF-8");
      }
    }
    constexpr auto largest = static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max() / 2);
    std::vector<detail::safetensors_entry> entries;
    std::size_t end = 0;
    for (const tensor_declaration& tensor : tensors) {
      const std::string subject = detail::text("tensor ", detail::printable(tensor.name));
      if (tensor.name == detail::safetensors_metadata_key) return bad(subject, ": the format reserves this name");
      if (detail::invalid_utf8(tensor.name)) return bad(subject, ": expected a name in UTF-8");
      const auto bytes = detail::tensor_bytes(tensor.dtype, tensor.shape);
      if (!bytes) return bad(subject, ": ", bytes.error().what());
      if (*bytes > largest - end) return bad(subject, ": expected a file of less than 2^62 bytes");
      if (*bytes > 0 && end % alignment(tensor.dtype) != 0) {
        return bad(subject, ": expected ", name(tensor.dtype), " at a multiple of ", alignment(tensor.dtype),
                   " bytes, got byte ", end, " of the data: declare the tensors in aligned_order");
      }
      detail::safetensors_entry& entry = entries.emplace_back();
      entry.name = tensor.name;
      entry.type = tensor.dtype;
      entry.shape = tensor.shape;
      entry.begin = end;
      entry.end = end + *bytes;
      end += *bytes;
    }
    std::vector<detail::safetensors_entry> in_order = entries;
    const std::string problem = detail::check_safetensors_entries(in_order, end);
    if (!problem.empty()) return bad(problem);
    return entries;
  }
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../detail/macros_back.hpp"
