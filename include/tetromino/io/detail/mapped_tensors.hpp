#pragma once

#include "../../config.hpp"  // TETROMINO_EXPECTS
#include "../../error.hpp"   // error, result
#include "../dtype.hpp"      // io::dtype, io::dtype_of
#include "file_text.hpp"     // printable, nearest_names
#include "posix_file.hpp"    // file_mapping

#include <algorithm>    // std::sort, std::lower_bound
#include <bit>          // std::endian
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uintptr_t
#include <cstring>      // std::memcpy
#include <filesystem>   // std::filesystem::path
#include <memory>       // std::unique_ptr
#include <numeric>      // std::iota
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::detail {

static_assert(std::endian::native == std::endian::little, "the files are little-endian, and read in place");

/// A tensor of an open file, whatever its format. It refers to the file: it must not outlive it.
class stored_tensor {
 public:
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI stored_tensor(const stored_tensor&) = default;
  TETROMINO_ABI stored_tensor(stored_tensor&&) = default;
  TETROMINO_ABI stored_tensor& operator=(const stored_tensor&) = default;
  TETROMINO_ABI stored_tensor& operator=(stored_tensor&&) = default;

  [[nodiscard]] TETROMINO_ABI const std::string& name() const noexcept { return name_; }
  /// Row-major; empty for a scalar.
  [[nodiscard]] TETROMINO_ABI const std::vector<std::size_t>& shape() const noexcept { return shape_; }
  /// The product of the shape.
  [[nodiscard]] TETROMINO_ABI std::size_t elements() const noexcept {
    std::size_t product = 1;
    for (const std::size_t dimension : shape_) product *= dimension;
    return product;
  }
  /// The elements as they are stored, mapped from the file.
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint8_t> bytes() const noexcept { return bytes_; }

  /// The elements in place. Fails if the stored type is another one, or if the file puts them at an address that `T`
  /// cannot be read from; `copy_as` takes any address.
  template <io::tensor_element T>
  [[nodiscard]] TETROMINO_ABI std::span<const T> as() const {
    return try_as<T>().value();
  }
  template <io::tensor_element T>
  [[nodiscard]] TETROMINO_ABI result<std::span<const T>> try_as() const {
    if (auto same = check_type<T>(); !same) return same.error();
    if (bytes_.empty()) return std::span<const T>{};
    if (reinterpret_cast<std::uintptr_t>(bytes_.data()) % alignof(T) != 0) {
      return error(errc::malformed_file,
                   {subject(), ": expected elements at a multiple of ", alignof(T), " bytes, found them at byte ",
                    offset_, " of the file: copy_as reads them from anywhere"});
    }
    return std::span<const T>(reinterpret_cast<const T*>(bytes_.data()), bytes_.size() / sizeof(T));
  }

  /// A copy of the elements. Fails if the stored type is another one.
  template <io::tensor_element T>
  [[nodiscard]] TETROMINO_ABI std::vector<T> copy_as() const {
    return try_copy_as<T>().value();
  }
  template <io::tensor_element T>
  [[nodiscard]] TETROMINO_ABI result<std::vector<T>> try_copy_as() const {
    if (auto same = check_type<T>(); !same) return same.error();
    std::vector<T> copy(bytes_.size() / sizeof(T));
    if (!copy.empty()) std::memcpy(copy.data(), bytes_.data(), bytes_.size());
    return copy;
  }

 protected:
  /// `bytes` begin at `offset` of the file; `type_name` is what an io::dtype of the same elements is called, if any is.
  TETROMINO_ABI stored_tensor(std::string&& name, std::string_view type_name, std::vector<std::size_t>&& shape,
                              std::span<const std::uint8_t> bytes, std::size_t offset, const std::string& path)
      : name_(std::move(name)),
        type_name_(type_name),
        shape_(std::move(shape)),
        bytes_(bytes),
        offset_(offset),
        path_(&path) {}

 private:
  [[nodiscard]] TETROMINO_ABI std::string subject() const { return text(*path_, ": tensor ", printable(name_)); }

  template <io::tensor_element T>
  [[nodiscard]] TETROMINO_ABI result<void> check_type() const {
    constexpr io::dtype asked = io::dtype_of<T>::value;
    static_assert(sizeof(T) * 8 == bits_per_element(asked), "dtype_of names a type of another size");
    if (io::name(asked) == type_name_) return {};
    return error(errc::invalid_argument,
                 {subject(), ": expected elements of type ", io::name(asked), ", found ", type_name_});
  }

  std::string name_;
  std::string_view type_name_;
  std::vector<std::size_t> shape_;
  std::span<const std::uint8_t> bytes_;
  std::size_t offset_;
  const std::string* path_;
};

/// The tensors of an open file, whatever its format: found by name, mapped into memory and read-only. While it is open,
/// nobody may make the file shorter: the system then ends a process that reads the missing pages.
template <class Tensor>
class mapped_tensors {
 public:
  /// The path that it was opened by; empty after a move, as all the rest is.
  [[nodiscard]] TETROMINO_ABI const std::string& path() const noexcept {
    static const std::string none;
    return path_ ? *path_ : none;
  }
  /// All tensors, in the order of their data in the file.
  [[nodiscard]] TETROMINO_ABI std::span<const Tensor> tensors() const noexcept { return tensors_; }
  [[nodiscard]] TETROMINO_ABI auto begin() const noexcept { return tensors_.begin(); }
  [[nodiscard]] TETROMINO_ABI auto end() const noexcept { return tensors_.end(); }
  [[nodiscard]] TETROMINO_ABI std::size_t size() const noexcept { return tensors_.size(); }

  /// The tensor of that name, or null.
  [[nodiscard]] TETROMINO_ABI const Tensor* find(std::string_view name) const noexcept {
    const auto found = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                        [&](std::size_t i, std::string_view n) { return tensors_[i].name() < n; });
    return found != by_name_.end() && tensors_[*found].name() == name ? &tensors_[*found] : nullptr;
  }

  /// The tensor of that name. Fails with errc::unknown_name and the names nearest to it.
  [[nodiscard]] TETROMINO_ABI const Tensor& operator[](std::string_view name) const { return *try_get(name).value(); }
  [[nodiscard]] TETROMINO_ABI result<const Tensor*> try_get(std::string_view name) const {
    if (const auto* tensor = find(name)) return tensor;
    const auto name_of = [](const Tensor& t) -> std::string_view { return t.name(); };
    return error(errc::unknown_name,
                 {path(), ": expected a tensor ", printable(name), "; ", nearest_names(name, tensors_, name_of)});
  }

  /// Says that `part` of some tensor's bytes has been read: its pages leave this process's memory, so that streaming
  /// through a file of any size needs no more than the parts in use. The bytes stay valid; reading them again fetches
  /// them again. Pre: `part` lies in the bytes of this file.
  TETROMINO_ABI void done_with(std::span<const std::uint8_t> part) const {
    TETROMINO_EXPECTS(part.empty() || mapping_.holds(part), "done_with needs bytes of this file");
    mapping_.drop(part);
  }

  /// Which file this is, whatever name it was opened by.
  [[nodiscard]] TETROMINO_ABI const file_identity& identity() const noexcept { return mapping_.identity(); }

 protected:
  TETROMINO_ABI mapped_tensors(const std::filesystem::path& path, file_mapping&& mapping)
      : path_(std::make_unique<const std::string>(path.string())), mapping_(std::move(mapping)) {}

  /// The whole file.
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint8_t> contents() const noexcept { return mapping_.bytes(); }

  /// Pre: no two have one name.
  TETROMINO_ABI void set_tensors(std::vector<Tensor>&& tensors) {
    tensors_ = std::move(tensors);
    by_name_.resize(tensors_.size());
    std::iota(by_name_.begin(), by_name_.end(), std::size_t{0});
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return tensors_[a].name() < tensors_[b].name(); });
  }

 private:
  std::unique_ptr<const std::string> path_;  // the tensors point at it, also after a move
  file_mapping mapping_;
  std::vector<Tensor> tensors_;
  std::vector<std::size_t> by_name_;
};

}  // namespace TETROMINO_NAMESPACE::detail
