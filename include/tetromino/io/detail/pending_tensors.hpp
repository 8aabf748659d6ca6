#pragma once

#include "../../error.hpp"  // error, result
#include "../dtype.hpp"     // io::dtype_of
#include "file_text.hpp"    // printable, nearest_names
#include "posix_file.hpp"   // pending_file

#include <algorithm>    // std::sort, std::lower_bound, std::max
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <filesystem>   // std::filesystem::path
#include <iterator>     // std::next, std::prev
#include <map>          // std::map
#include <memory>       // std::unique_ptr
#include <mutex>        // std::mutex
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::detail {

/// Where a tensor's bytes go in a file under construction.
struct pending_tensor {
  std::string name;
  std::string_view type_name;                  ///< what an io::dtype of the same elements is called, if any is
  std::size_t begin;                           ///< byte of the file
  std::size_t size;                            ///< bytes
  std::size_t written = 0;                     ///< bytes from its first on
  std::map<std::size_t, std::size_t> apart{};  ///< further ranges that are written, where each begins and ends

  TETROMINO_ABI pending_tensor(std::string tensor, std::string_view type, std::size_t first, std::size_t bytes)
      : name(std::move(tensor)), type_name(type), begin(first), size(bytes) {}
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI pending_tensor(pending_tensor&&) = default;
  TETROMINO_ABI pending_tensor& operator=(pending_tensor&&) = default;

  /// Notes a range: in order, that takes no memory.
  TETROMINO_ABI void note(std::size_t first, std::size_t last) {
    if (first > written) {
      auto next = apart.upper_bound(first);
      if (next != apart.begin() && std::prev(next)->second >= first) {
        --next;
        next->second = std::max(next->second, last);
      } else {
        next = apart.emplace_hint(next, first, last);
      }
      for (auto after = std::next(next); after != apart.end() && after->first <= next->second;) {
        next->second = std::max(next->second, after->second);
        after = apart.erase(after);
      }
      return;
    }
    written = std::max(written, last);
    while (!apart.empty() && apart.begin()->first <= written) {
      written = std::max(written, apart.begin()->second);
      apart.erase(apart.begin());
    }
  }
};

/// A file that is written piece by piece, whatever its format: the header is there, then bytes of any tensor may come
/// at any time, each tensor from its first byte to its last. Nothing is buffered. The file has a temporary name in the
/// same directory until `finish`; without it, or after a write that fails, nothing appears under the final name.
class pending_tensors {
 public:
  /// Adds the next bytes of a tensor. Fails if it does not exist, if there are more bytes than it has left, or if the
  /// file cannot be written; the file is then gone.
  TETROMINO_ABI void append(std::string_view name, std::span<const std::uint8_t> bytes) {
    try_append(name, bytes).value();
  }
  [[nodiscard]] TETROMINO_ABI result<void> try_append(std::string_view name, std::span<const std::uint8_t> bytes) {
    const auto found = find(name);
    if (!found) return found.error();
    return append_to(**found, bytes);
  }

  /// Adds the next elements of a tensor. Fails as `append` does, and if the tensor was declared with another type.
  template <io::tensor_element T>
  TETROMINO_ABI void append_values(std::string_view name, std::span<const T> values) {
    try_append_values<T>(name, values).value();
  }
  template <io::tensor_element T>
  [[nodiscard]] TETROMINO_ABI result<void> try_append_values(std::string_view name, std::span<const T> values) {
    const auto found = find(name);
    if (!found) return found.error();
    constexpr std::string_view got = io::name(io::dtype_of<T>::value);
    if ((**found).type_name != got) {
      return error(errc::invalid_argument,
                   {subject(**found), ": expected elements of type ", (**found).type_name, ", got ", got});
    }
    return append_to(**found, {reinterpret_cast<const std::uint8_t*>(values.data()), values.size_bytes()});
  }

  /// Writes bytes of a tensor from its byte `offset` on: for those who write pieces of their own, in any order and from
  /// any threads, as long as no two write the same byte at a time. Fails as `append` does, and leaves the file open.
  TETROMINO_ABI void write_at(std::string_view name, std::size_t offset, std::span<const std::uint8_t> bytes) {
    try_write_at(name, offset, bytes).value();
  }
  [[nodiscard]] TETROMINO_ABI result<void> try_write_at(std::string_view name, std::size_t offset,
                                                        std::span<const std::uint8_t> bytes) {
    const auto found = find(name);
    if (!found) return found.error();
    pending_tensor& tensor = **found;
    if (offset > tensor.size || bytes.size() > tensor.size - offset) {
      return error(errc::shape_mismatch,
                   {subject(tensor), ": expected bytes up to ", tensor.size, ", got ", bytes.size(), " at ", offset});
    }
    auto written = file_.try_fill_at(tensor.begin + offset, bytes);
    if (!written || bytes.empty()) return written;
    const std::lock_guard lock(*noting_);
    tensor.note(offset, offset + bytes.size());
    return written;
  }

  /// Makes the file durable and gives it its final name, replacing what was there. Fails if bytes are missing (then
  /// they can still be added), or if the system refuses.
  TETROMINO_ABI void finish() { try_finish().value(); }
  [[nodiscard]] TETROMINO_ABI result<void> try_finish() {
    for (const pending_tensor& tensor : tensors_) {
      if (file_.is_open() && tensor.written != tensor.size) {
        std::size_t got = tensor.written;
        for (const auto& range : tensor.apart) got += range.second - range.first;
        return error(errc::shape_mismatch,
                     {subject(tensor), ": expected ", tensor.size, " bytes before the file is finished, got ", got});
      }
    }
    return file_.try_commit();
  }

 protected:
  TETROMINO_ABI pending_tensors(pending_file&& file, std::vector<pending_tensor>&& tensors)
      : file_(std::move(file)), tensors_(std::move(tensors)) {
    std::sort(tensors_.begin(), tensors_.end(),
              [](const pending_tensor& a, const pending_tensor& b) { return a.name < b.name; });
  }

  /// Starts a file with its header, unless the path leads to the file that `source` (optional) is reading.
  template <class Source>
  [[nodiscard]] TETROMINO_ABI static result<pending_file> try_begin(const std::filesystem::path& path,
                                                                    std::span<const std::uint8_t> header,
                                                                    const Source* source) {
    if (source != nullptr && identity_of(path) == source->identity()) {
      return error(errc::invalid_argument,
                   {path.string(), ": expected another file than the one being read, ", source->path()});
    }
    auto file = pending_file::try_create(path);
    if (!file) return file;
    if (auto written = file->try_write_at(0, header); !written) return written.error();
    return file;
  }

 private:
  [[nodiscard]] TETROMINO_ABI std::string subject(const pending_tensor& tensor) const {
    return text(file_.path().string(), ": tensor ", printable(tensor.name));
  }

  [[nodiscard]] TETROMINO_ABI result<pending_tensor*> find(std::string_view name) {
    const auto found =
        std::lower_bound(tensors_.begin(), tensors_.end(), name,
                         [](const pending_tensor& tensor, std::string_view n) { return tensor.name < n; });
    if (found != tensors_.end() && found->name == name) return &*found;
    const auto name_of = [](const pending_tensor& tensor) -> std::string_view { return tensor.name; };
    return error(errc::unknown_name, {file_.path().string(), ": expected a declared tensor, got ", printable(name),
                                      "; ", nearest_names(name, tensors_, name_of)});
  }

  [[nodiscard]] TETROMINO_ABI result<void> append_to(pending_tensor& tensor, std::span<const std::uint8_t> bytes) {
    if (bytes.size() > tensor.size - tensor.written) {
      return error(errc::shape_mismatch, {subject(tensor), ": expected at most ", tensor.size - tensor.written,
                                          " more bytes of ", tensor.size, ", got ", bytes.size()});
    }
    auto written = file_.try_write_at(tensor.begin + tensor.written, bytes);
    if (written) tensor.note(tensor.written, tensor.written + bytes.size());
    return written;
  }

  pending_file file_;
  std::vector<pending_tensor> tensors_;  // by name
  std::unique_ptr<std::mutex> noting_ = std::make_unique<std::mutex>();
};

}  // namespace TETROMINO_NAMESPACE::detail
