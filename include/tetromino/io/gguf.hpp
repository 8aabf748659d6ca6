#pragma once

#include "../detail/macros_off.hpp"

/// Reading and writing GGUF files, the format of ggml and llama.cpp. Opt-in: needs a POSIX system.

#include "../error.hpp"                // error, result
#include "detail/gguf_header.hpp"      // parse_gguf, write_gguf_header
#include "detail/mapped_tensors.hpp"   // stored_tensor, mapped_tensors
#include "detail/pending_tensors.hpp"  // pending_tensors
#include "gguf/types.hpp"              // ggml_type
#include "gguf/metadata.hpp"           // gguf_metadata

#include <cstddef>     // std::size_t
#include <cstdint>     // std::uint8_t
#include <filesystem>  // std::filesystem::path
#include <limits>      // std::numeric_limits
#include <span>        // std::span
#include <string>      // std::string
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::io {

/// A tensor of an open gguf_file. It refers to the file: it must not outlive it. Its shape is row-major, the last
/// dimension along rows, which GGUF itself names first.
class gguf_tensor : public detail::stored_tensor {
 public:
  [[nodiscard]] TETROMINO_ABI ggml_type type() const noexcept { return type_; }

 private:
  friend class gguf_file;
  TETROMINO_ABI gguf_tensor(detail::gguf_entry&& entry, std::span<const std::uint8_t> file, std::size_t data_begin,
                            const std::string& path)
      : stored_tensor(std::move(entry.name), io::name(entry.type), std::move(entry.shape),
                      file.subspan(data_begin + entry.begin, entry.end - entry.begin), data_begin + entry.begin, path),
        type_(entry.type) {}

  ggml_type type_;
};

/// A GGUF file of version 2 or 3, mapped into memory and read-only. Opening it checks the whole header and trusts none
/// of it, in time linear in its size; element values are not looked at. Errors are of kind errc::malformed_file or
/// errc::io and name the file, the key or tensor, what was expected and what was found.
class gguf_file : public detail::mapped_tensors<gguf_tensor> {
 public:
  [[nodiscard]] TETROMINO_ABI static gguf_file open(const std::filesystem::path& path) {
    return try_open(path).value();
  }
  [[nodiscard]] TETROMINO_ABI static result<gguf_file> try_open(const std::filesystem::path& path) {
    auto mapping = detail::file_mapping::try_open(path);
    if (!mapping) return mapping.error();
    auto header = detail::parse_gguf(mapping->bytes(), path.string());
    if (!header) return header.error();
    return gguf_file(path, std::move(*mapping), std::move(*header));
  }

  /// Refers to the file: its values must not outlive it.
  [[nodiscard]] TETROMINO_ABI const gguf_metadata& metadata() const noexcept { return metadata_; }

 private:
  TETROMINO_ABI gguf_file(const std::filesystem::path& path, detail::file_mapping&& mapping,
                          detail::gguf_header&& header)
      : mapped_tensors(path, std::move(mapping)), metadata_(std::move(header.metadata)) {
    std::vector<gguf_tensor> tensors;
    tensors.reserve(header.tensors.size());
    for (auto& entry : header.tensors) {
      tensors.push_back(gguf_tensor(std::move(entry), contents(), header.data_begin, this->path()));
    }
    set_tensors(std::move(tensors));
  }

  gguf_metadata metadata_;
};

/// A tensor that a gguf_writer is going to write; the shape is row-major.
struct gguf_declaration {
  std::string name;
  ggml_type type{};
  std::vector<std::size_t> shape;
};

/// Writes a GGUF file of version 3 piece by piece: the header first, from declarations, then bytes of any tensor at any
/// time, each tensor from its first byte to its last. Tensors lie in the order of their declarations, at multiples of
/// the metadata's general.alignment (32 without it); what lies between them is zero. Nothing is buffered. The file has
/// a temporary name in the same directory until `finish`; without it, or after a write that fails, nothing appears
/// under the final name. The same metadata, declarations and bytes always give the same file.
class gguf_writer : public detail::pending_tensors {
 public:
  /// Starts a file. Fails if metadata and declarations make no valid file, if a tensor's name is longer than the 63
  /// bytes that llama.cpp reads, if the path cannot be written, or if it leads to the file that `source` (optional) is
  /// reading.
  [[nodiscard]] TETROMINO_ABI static gguf_writer create(const std::filesystem::path& path,
                                                        const gguf_metadata& metadata,
                                                        std::span<const gguf_declaration> tensors,
                                                        const gguf_file* source = nullptr) {
    return try_create(path, metadata, tensors, source).value();
  }
  [[nodiscard]] TETROMINO_ABI static result<gguf_writer> try_create(const std::filesystem::path& path,
                                                                    const gguf_metadata& metadata,
                                                                    std::span<const gguf_declaration> tensors,
                                                                    const gguf_file* source = nullptr) {
    const auto plan = lay_out(metadata, tensors);
    if (!plan) return error(errc::invalid_argument, {path.string(), ": ", plan.error().what()});
    auto file = try_begin(path, plan->header, source);
    if (!file) return file.error();
    if (plan->file_size > plan->header.size()) {  // the padding behind the last tensor, and the size of the whole
      const std::uint8_t zero = 0;
      if (auto written = file->try_write_at(plan->file_size - 1, {&zero, 1}); !written) return written.error();
    }
    std::vector<detail::pending_tensor> slots;
    for (const auto& entry : plan->tensors) {
      slots.push_back({entry.name, io::name(entry.type), plan->header.size() + entry.begin, entry.end - entry.begin});
    }
    return gguf_writer(std::move(*file), std::move(slots));
  }

 private:
  TETROMINO_ABI gguf_writer(detail::pending_file&& file, std::vector<detail::pending_tensor>&& tensors)
      : pending_tensors(std::move(file), std::move(tensors)) {}

  struct plan {
    std::vector<detail::gguf_entry> tensors;
    std::vector<std::uint8_t> header;
    std::size_t file_size = 0;
  };

  /// Gives each tensor its place, and reads the header back as a reader would.
  [[nodiscard]] TETROMINO_ABI static result<plan> lay_out(const gguf_metadata& metadata,
                                                          std::span<const gguf_declaration> declarations) {
    constexpr std::size_t longest_name = 63;
    constexpr auto largest = static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max() / 2);
    const auto bad = [](const auto&... what) { return error(errc::invalid_argument, {what...}); };
    std::size_t alignment = detail::gguf_default_alignment;
    if (const auto* const value = metadata.find(detail::gguf_alignment_key)) {
      const auto number = value->try_as<std::uint32_t>();
      if (number && std::has_single_bit(*number)) alignment = *number;  // else the parser says what is wrong
    }
    plan out;
    std::size_t end = 0;
    for (const gguf_declaration& tensor : declarations) {
      const std::string subject = detail::text("tensor ", detail::printable(tensor.name));
      if (tensor.name.size() > longest_name) {
        return bad(subject, ": expected a name of at most ", longest_name, " bytes, got ", tensor.name.size());
      }
      const auto bytes = detail::ggml_tensor_bytes(tensor.type, tensor.shape);
      if (!bytes) return bad(subject, ": ", bytes.error().what());
      if (*bytes > largest - end) return bad(subject, ": expected a file of less than 2^62 bytes");
      out.tensors.push_back({tensor.name, tensor.type, tensor.shape, end, end + *bytes});
      end = detail::gguf_padded(end + *bytes, alignment);
    }
    out.header = detail::write_gguf_header(metadata, out.tensors, alignment);
    out.file_size = out.header.size() + end;
    detail::gguf_parser parser(out.header, out.file_size);
    if (!parser.run()) return bad(parser.problem);
    return out;
  }
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../detail/macros_back.hpp"
