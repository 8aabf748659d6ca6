#pragma once

/// Reading and writing safetensors files. Opt-in: needs nlohmann-json and a POSIX system.

#include "../config.hpp"                     // TETROMINO_EXPECTS
#include "detail/posix_file.hpp"          // file_mapping, pending_file
#include "detail/safetensors_header.hpp"  // parse_safetensors, write_safetensors_header
#include "../error.hpp"                      // error, result
#include "dtype.hpp"                         // dtype, dtype_of

#include <algorithm>    // std::sort, std::stable_sort, std::lower_bound
#include <bit>          // std::endian
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uintptr_t
#include <cstring>      // std::memcpy
#include <filesystem>   // std::filesystem::path
#include <limits>       // std::numeric_limits
#include <memory>       // std::unique_ptr
#include <numeric>      // std::iota
#include <optional>     // std::optional
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace tetromino::io {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian, and read in place");

/// A tensor of an open safetensors_file. It refers to the file: it must not outlive it.
class safetensors_tensor {
 public:
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] io::dtype dtype() const noexcept { return dtype_; }
  /// Row-major; empty for a scalar.
  [[nodiscard]] const std::vector<std::size_t>& shape() const noexcept { return shape_; }
  /// The product of the shape.
  [[nodiscard]] std::size_t elements() const noexcept { return bytes_.size() * 8 / bits_per_element(dtype_); }
  /// The elements as they are stored, mapped from the file.
  [[nodiscard]] std::span<const std::uint8_t> bytes() const noexcept { return bytes_; }

  /// The elements in place. Fails if the stored type is another one, or if the file puts them at an address that `T`
  /// cannot be read from; `copy_as` takes any address.
  template <tensor_element T>
  [[nodiscard]] std::span<const T> as() const {
    return try_as<T>().value();
  }
  template <tensor_element T>
  [[nodiscard]] result<std::span<const T>> try_as() const {
    if (auto same = check_type<T>(); !same) return same.error();
    if (bytes_.empty()) return std::span<const T>{};
    if (reinterpret_cast<std::uintptr_t>(bytes_.data()) % alignof(T) != 0) {
      return error(errc::malformed_file, detail::text(subject(), ": expected elements at a multiple of ", alignof(T),
                                                      " bytes, found them at byte ", offset_,
                                                      " of the file: copy_as reads them from anywhere"));
    }
    return std::span<const T>(reinterpret_cast<const T*>(bytes_.data()), bytes_.size() / sizeof(T));
  }

  /// A copy of the elements. Fails if the stored type is another one.
  template <tensor_element T>
  [[nodiscard]] std::vector<T> copy_as() const {
    return try_copy_as<T>().value();
  }
  template <tensor_element T>
  [[nodiscard]] result<std::vector<T>> try_copy_as() const {
    if (auto same = check_type<T>(); !same) return same.error();
    std::vector<T> copy(bytes_.size() / sizeof(T));
    if (!copy.empty()) std::memcpy(copy.data(), bytes_.data(), bytes_.size());
    return copy;
  }

 private:
  friend class safetensors_file;
  safetensors_tensor(detail::safetensors_entry&& entry, std::span<const std::uint8_t> file, std::size_t data_begin,
                     const std::string& path)
      : name_(std::move(entry.name)),
        dtype_(entry.type),
        shape_(std::move(entry.shape)),
        bytes_(file.subspan(data_begin + entry.begin, entry.end - entry.begin)),
        offset_(data_begin + entry.begin),
        path_(&path) {}

  [[nodiscard]] std::string subject() const { return detail::text(*path_, ": tensor ", detail::printable(name_)); }

  template <tensor_element T>
  [[nodiscard]] result<void> check_type() const {
    constexpr io::dtype asked = dtype_of<T>::value;
    static_assert(sizeof(T) * 8 == bits_per_element(asked), "dtype_of names a type of another size");
    if (asked == dtype_) return {};
    return error(errc::invalid_argument, detail::text(subject(), ": expected elements of type ", io::name(asked),
                                                      ", found ", io::name(dtype_)));
  }

  std::string name_;
  io::dtype dtype_;
  std::vector<std::size_t> shape_;
  std::span<const std::uint8_t> bytes_;
  std::size_t offset_;
  const std::string* path_;
};

/// A safetensors file, mapped into memory and read-only. Opening it checks the whole header and trusts none of it;
/// element values are not looked at. Errors are of kind errc::malformed_file or errc::io and name the file, the tensor,
/// what was expected and what was found. While it is open, nobody may make the file shorter: the system then ends a
/// process that reads the missing pages.
class safetensors_file {
 public:
  [[nodiscard]] static safetensors_file open(const std::filesystem::path& path) { return try_open(path).value(); }
  [[nodiscard]] static result<safetensors_file> try_open(const std::filesystem::path& path) {
    auto mapping = detail::file_mapping::try_open(path);
    if (!mapping) return mapping.error();
    auto header = detail::parse_safetensors(mapping->bytes(), path.string());
    if (!header) return header.error();
    return safetensors_file(path, std::move(*mapping), std::move(*header));
  }

  [[nodiscard]] const std::string& path() const noexcept { return *path_; }
  [[nodiscard]] const safetensors_metadata& metadata() const noexcept { return metadata_; }
  /// All tensors, in the order of their data in the file.
  [[nodiscard]] std::span<const safetensors_tensor> tensors() const noexcept { return tensors_; }
  [[nodiscard]] auto begin() const noexcept { return tensors_.begin(); }
  [[nodiscard]] auto end() const noexcept { return tensors_.end(); }
  [[nodiscard]] std::size_t size() const noexcept { return tensors_.size(); }

  /// The tensor of that name, or null.
  [[nodiscard]] const safetensors_tensor* find(std::string_view name) const noexcept {
    const auto found = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                        [&](std::size_t i, std::string_view n) { return tensors_[i].name() < n; });
    return found != by_name_.end() && tensors_[*found].name() == name ? &tensors_[*found] : nullptr;
  }

  /// The tensor of that name. Fails with errc::unknown_name and the names nearest to it.
  [[nodiscard]] const safetensors_tensor& operator[](std::string_view name) const { return *try_get(name).value(); }
  [[nodiscard]] result<const safetensors_tensor*> try_get(std::string_view name) const {
    if (const auto* tensor = find(name)) return tensor;
    const auto name_of = [](const safetensors_tensor& t) -> std::string_view { return t.name(); };
    return error(errc::unknown_name, detail::text(*path_, ": expected a tensor ", detail::printable(name), "; ",
                                                  detail::nearest_names(name, tensors_, name_of)));
  }

  /// Says that `part` of some tensor's bytes has been read: its pages leave this process's memory, so that streaming
  /// through a file of any size needs no more than the parts in use. The bytes stay valid; reading them again fetches
  /// them again. Pre: `part` lies in the bytes of this file.
  void done_with(std::span<const std::uint8_t> part) const {
    TETROMINO_EXPECTS(part.empty() || mapping_.holds(part), "done_with needs bytes of this file");
    mapping_.drop(part);
  }

  /// Which file this is, whatever name it was opened by.
  [[nodiscard]] const detail::file_identity& identity() const noexcept { return mapping_.identity(); }

 private:
  safetensors_file(const std::filesystem::path& path, detail::file_mapping&& mapping,
                   detail::safetensors_header&& header)
      : path_(std::make_unique<const std::string>(path.string())),
        mapping_(std::move(mapping)),
        metadata_(std::move(header.metadata)) {
    tensors_.reserve(header.tensors.size());
    for (auto& entry : header.tensors) {
      tensors_.push_back(safetensors_tensor(std::move(entry), mapping_.bytes(), header.data_begin, *path_));
    }
    by_name_.resize(tensors_.size());
    std::iota(by_name_.begin(), by_name_.end(), std::size_t{0});
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return tensors_[a].name() < tensors_[b].name(); });
  }

  std::unique_ptr<const std::string> path_;  // the tensors point at it, also after a move
  detail::file_mapping mapping_;
  safetensors_metadata metadata_;
  std::vector<safetensors_tensor> tensors_;
  std::vector<std::size_t> by_name_;
};

/// A tensor that a safetensors_writer is going to write.
struct tensor_declaration {
  std::string name;
  io::dtype dtype{};
  std::vector<std::size_t> shape;
};

/// The declarations with the types of strictest alignment first, otherwise in the same order: so each tensor begins
/// where readers that use it in place need it.
[[nodiscard]] inline std::vector<tensor_declaration> aligned_order(std::vector<tensor_declaration> tensors) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const tensor_declaration& a, const tensor_declaration& b) {
    return alignment(a.dtype) > alignment(b.dtype);
  });
  return tensors;
}

/// Writes a safetensors file piece by piece: the header first, from declarations, then bytes of any tensor at any time,
/// each tensor from its first byte to its last. Nothing is buffered. The file has a temporary name in the same
/// directory until `finish`; without it, or after a write that fails, nothing appears under the final name. The same
/// declarations and bytes always give the same file.
class safetensors_writer {
 public:
  /// Starts a file with `tensors` in the given order. Fails if they make no valid file, if the path cannot be written,
  /// or if it leads to the file that `source` (optional) is reading.
  [[nodiscard]] static safetensors_writer create(const std::filesystem::path& path,
                                                 std::span<const tensor_declaration> tensors,
                                                 const safetensors_metadata& metadata = {},
                                                 const safetensors_file* source = nullptr) {
    return try_create(path, tensors, metadata, source).value();
  }
  [[nodiscard]] static result<safetensors_writer> try_create(const std::filesystem::path& path,
                                                             std::span<const tensor_declaration> tensors,
                                                             const safetensors_metadata& metadata = {},
                                                             const safetensors_file* source = nullptr) {
    auto entries = lay_out(path, tensors, metadata);
    if (!entries) return entries.error();
    const std::string header = detail::write_safetensors_header(*entries, metadata);
    if (header.size() - 8 > detail::safetensors_header_limit) {
      return error(errc::invalid_argument,
                   detail::text(path.string(), ": expected a header of at most ", detail::safetensors_header_limit,
                                " bytes, got one of ", header.size() - 8));
    }
    if (source != nullptr && detail::identity_of(path) == source->identity()) {
      return error(errc::invalid_argument,
                   detail::text(path.string(), ": expected another file than the one being read, ", source->path()));
    }
    auto file = detail::pending_file::try_create(path);
    if (!file) return file.error();
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(header.data());
    if (auto written = file->try_write_at(0, {bytes, header.size()}); !written) return written.error();
    return safetensors_writer(std::move(*file), std::move(*entries), header.size());
  }

  /// Adds the next bytes of a tensor. Fails if it does not exist, if there are more bytes than it has left, or if the
  /// file cannot be written; the file is then gone.
  void append(std::string_view name, std::span<const std::uint8_t> bytes) { try_append(name, bytes).value(); }
  [[nodiscard]] result<void> try_append(std::string_view name, std::span<const std::uint8_t> bytes) {
    const auto found = find(name);
    if (!found) return found.error();
    return append_to(**found, bytes);
  }

  /// Adds the next elements of a tensor. Fails as `append` does, and if the tensor was declared with another type.
  template <tensor_element T>
  void append_values(std::string_view name, std::span<const T> values) {
    try_append_values<T>(name, values).value();
  }
  template <tensor_element T>
  [[nodiscard]] result<void> try_append_values(std::string_view name, std::span<const T> values) {
    const auto found = find(name);
    if (!found) return found.error();
    if ((**found).entry.type != dtype_of<T>::value) {
      return error(errc::invalid_argument,
                   detail::text(subject(**found), ": expected elements of type ", io::name((**found).entry.type),
                                ", got ", io::name(dtype_of<T>::value)));
    }
    return append_to(**found, {reinterpret_cast<const std::uint8_t*>(values.data()), values.size_bytes()});
  }

  /// Makes the file durable and gives it its final name, replacing what was there. Fails if bytes are missing (then
  /// they can still be added), or if the system refuses.
  void finish() { try_finish().value(); }
  [[nodiscard]] result<void> try_finish() {
    for (const slot& tensor : tensors_) {
      if (file_.is_open() && tensor.written != tensor.size()) {
        return error(errc::shape_mismatch, detail::text(subject(tensor), ": expected ", tensor.size(),
                                                        " bytes before the file is finished, got ", tensor.written));
      }
    }
    return file_.try_commit();
  }

 private:
  struct slot {
    detail::safetensors_entry entry;
    std::size_t written = 0;
    [[nodiscard]] std::size_t size() const noexcept { return entry.end - entry.begin; }
  };

  safetensors_writer(detail::pending_file&& file, std::vector<detail::safetensors_entry>&& entries,
                     std::size_t data_begin)
      : file_(std::move(file)), data_begin_(data_begin) {
    for (auto& entry : entries) tensors_.push_back({std::move(entry)});
    std::sort(tensors_.begin(), tensors_.end(),
              [](const slot& a, const slot& b) { return a.entry.name < b.entry.name; });
  }

  /// Gives each tensor its place in the data, after checking everything that a reader would.
  [[nodiscard]] static result<std::vector<detail::safetensors_entry>> lay_out(
      const std::filesystem::path& path, std::span<const tensor_declaration> tensors,
      const safetensors_metadata& metadata) {
    const auto bad = [&](const auto&... what) {
      return error(errc::invalid_argument, detail::text(path.string(), ": ", what...));
    };
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
      entries.push_back({tensor.name, tensor.dtype, tensor.shape, end, end + *bytes});
      end += *bytes;
    }
    std::vector<detail::safetensors_entry> in_order = entries;
    const std::string problem = detail::check_safetensors_entries(in_order, end);
    if (!problem.empty()) return bad(problem);
    return entries;
  }

  [[nodiscard]] std::string subject(const slot& tensor) const {
    return detail::text(file_.path().string(), ": tensor ", detail::printable(tensor.entry.name));
  }

  [[nodiscard]] result<slot*> find(std::string_view name) {
    const auto found = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                        [](const slot& tensor, std::string_view n) { return tensor.entry.name < n; });
    if (found != tensors_.end() && found->entry.name == name) return &*found;
    const auto name_of = [](const slot& tensor) -> std::string_view { return tensor.entry.name; };
    return error(errc::unknown_name,
                 detail::text(file_.path().string(), ": expected a declared tensor, got ", detail::printable(name),
                              "; ", detail::nearest_names(name, tensors_, name_of)));
  }

  [[nodiscard]] result<void> append_to(slot& tensor, std::span<const std::uint8_t> bytes) {
    if (bytes.size() > tensor.size() - tensor.written) {
      return error(errc::shape_mismatch,
                   detail::text(subject(tensor), ": expected at most ", tensor.size() - tensor.written,
                                " more bytes of ", tensor.size(), ", got ", bytes.size()));
    }
    auto written = file_.try_write_at(data_begin_ + tensor.entry.begin + tensor.written, bytes);
    if (written) tensor.written += bytes.size();
    return written;
  }

  detail::pending_file file_;
  std::vector<slot> tensors_;  // by name
  std::size_t data_begin_;
};

}  // namespace tetromino::io
