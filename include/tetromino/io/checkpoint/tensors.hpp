#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"                   // error, result
#include "../detail/file_text.hpp"           // printable
#include "../detail/json.hpp"                // json_document, parse_json, json_text
#include "../detail/posix_file.hpp"          // file_reader
#include "../detail/safetensors_header.hpp"  // parse_safetensors, safetensors_metadata
#include "../dtype.hpp"                      // dtype

#include <nlohmann/json.hpp>  // nlohmann::json

#include <algorithm>    // std::sort, std::lower_bound, std::find, std::max, std::min
#include <charconv>     // std::from_chars
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint64_t
#include <filesystem>   // std::filesystem::path
#include <map>          // std::map
#include <memory>       // std::unique_ptr
#include <numeric>      // std::iota
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// A whole JSON file, or one as Python writes it, of at most 256 MB, which is more than an index of a million tensors.
template <class Json = nlohmann::json>
result<json_document<Json>> read_json(const std::filesystem::path& path) {
  constexpr std::uint64_t largest = 256'000'000;
  const auto file = file_reader::try_open(path);
  if (!file) return file.error();
  if (file->size() > largest) {
    return error(errc::malformed_file,
                 {path.string(), ": expected at most ", largest, " bytes of JSON, found ", file->size()});
  }
  std::string bytes(file->size(), '\0');
  if (auto read = file->try_read_at(0, {reinterpret_cast<std::uint8_t*>(bytes.data()), bytes.size()}); !read) {
    return read.error();
  }
  json_document<Json> json;
  if (const std::string bad = parse_json(without_python_numbers(bytes), *json); !bad.empty()) {
    return error(errc::malformed_file, {path.string(), ": ", bad});
  }
  return json;
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io {

/// A tensor of a checkpoint, and where its bytes lie.
struct checkpoint_tensor {
  std::string name;
  io::dtype dtype{};
  std::vector<std::size_t> shape;  ///< row-major; empty for a scalar
  std::size_t file = 0;            ///< which of checkpoint::files()
  std::uint64_t begin = 0;         ///< its first byte in that file
  std::size_t bytes = 0;

  [[nodiscard]] TETROMINO_ABI std::size_t elements() const noexcept { return bytes * 8 / bits_per_element(dtype); }
};

/// A model as Hugging Face saves it, seen as one set of named tensors: a directory with config.json and
/// model.safetensors, or with shards and their index; or an index; or a single safetensors file. Opening reads the
/// headers and trusts none of them; tensors are read piece by piece, from any thread, and a file that gets shorter
/// meanwhile gives an error. Errors are of kind errc::malformed_file or errc::io and name the file and the tensor.
class checkpoint {
 public:
  [[nodiscard]] TETROMINO_ABI static checkpoint open(const std::filesystem::path& path) {
    return try_open(path).value();
  }
  [[nodiscard]] TETROMINO_ABI static result<checkpoint> try_open(const std::filesystem::path& path) {
    checkpoint out;
    out.path_ = path;
    std::error_code ignored;
    const bool folder = std::filesystem::is_directory(path, ignored);
    out.folder_ = folder ? path : path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
    out.is_single_file_ = !folder && path.extension() != ".json";
    if (const auto config = out.folder_ / "config.json"; std::filesystem::exists(config, ignored)) {
      auto json = detail::read_json(config);
      if (!json && !out.is_single_file_) return json.error();
      if (json) out.config_ = std::move(*json);  // beside a single file, it is a help and no more
    }
    auto opened = out.is_single_file_ ? out.add_file(path) : out.add_files(folder ? path / index_name : path);
    if (!opened) return opened.error();
    if (auto unique = out.check_names(); !unique) return unique.error();
    return out;
  }

  /// What `open` was given.
  [[nodiscard]] TETROMINO_ABI const std::filesystem::path& path() const noexcept { return path_; }
  /// Where config.json and the other files of the model are.
  [[nodiscard]] TETROMINO_ABI const std::filesystem::path& folder() const noexcept { return folder_; }
  [[nodiscard]] TETROMINO_ABI bool is_single_file() const noexcept { return is_single_file_; }
  /// config.json; null if there is none.
  [[nodiscard]] TETROMINO_ABI const nlohmann::json& config() const noexcept { return *config_; }
  /// Free text of the files' headers, together.
  [[nodiscard]] TETROMINO_ABI const safetensors_metadata& metadata() const noexcept { return metadata_; }

  /// Free text of one file's header.
  [[nodiscard]] TETROMINO_ABI const safetensors_metadata& metadata(std::size_t file) const noexcept {
    return file_metadata_[file];
  }

  /// All tensors, by file and then by their place in it.
  [[nodiscard]] TETROMINO_ABI std::span<const checkpoint_tensor> tensors() const noexcept { return tensors_; }
  /// The files that hold them.
  [[nodiscard]] TETROMINO_ABI std::size_t file_count() const noexcept { return files_.size(); }
  [[nodiscard]] TETROMINO_ABI const std::filesystem::path& file(std::size_t i) const noexcept {
    return files_[i].path();
  }
  [[nodiscard]] TETROMINO_ABI detail::file_identity identity(std::size_t i) const noexcept {
    return files_[i].identity();
  }

  /// The tensor of that name, or null.
  [[nodiscard]] TETROMINO_ABI const checkpoint_tensor* find(std::string_view name) const noexcept {
    const auto found = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                        [&](std::size_t i, std::string_view n) { return tensors_[i].name < n; });
    return found != by_name_.end() && tensors_[*found].name == name ? &tensors_[*found] : nullptr;
  }

  /// Reads `to.size()` bytes of a tensor, from its byte `offset` on. Pre: they lie within it.
  [[nodiscard]] TETROMINO_ABI result<void> try_read(const checkpoint_tensor& tensor, std::size_t offset,
                                                    std::span<std::uint8_t> to) const {
    TETROMINO_EXPECTS(offset <= tensor.bytes && to.size() <= tensor.bytes - offset, "a read lies within its tensor",
                      offset, tensor.bytes, to.size(), tensor.bytes - offset);
    auto read = files_[tensor.file].try_read_at(tensor.begin + offset, to);
    if (read) return read;
    return error(read.error().code(), {"tensor ", detail::printable(tensor.name), ": ", read.error().what()});
  }
  TETROMINO_ABI void read(const checkpoint_tensor& tensor, std::size_t offset, std::span<std::uint8_t> to) const {
    try_read(tensor, offset, to).value();
  }

  /// Fails if a file has changed since it was opened: what was read may be of two models.
  [[nodiscard]] TETROMINO_ABI result<void> try_unchanged() const {
    for (const auto& file : files_) {
      if (auto same = file.try_unchanged(); !same) return same;
    }
    return {};
  }
  TETROMINO_ABI void unchanged() const { try_unchanged().value(); }

 private:
  static constexpr const char* index_name = "model.safetensors.index.json";

  /// The shards that an index names; without an index, the one file there is, or all files named as shards.
  [[nodiscard]] TETROMINO_ABI result<void> add_files(const std::filesystem::path& index) {
    std::error_code ignored;
    if (std::filesystem::exists(index, ignored)) return add_indexed(index);
    if (index.filename() != index_name) return detail::io_error(index, "open", ENOENT);
    std::vector<std::filesystem::path> shards, others;
    for (const auto& entry : std::filesystem::directory_iterator(folder_, ignored)) {
      if (entry.path().extension() != ".safetensors") continue;
      const bool is_shard = entry.path().stem().string().find("-of-") != std::string::npos;
      (is_shard ? shards : others).push_back(entry.path());
    }
    const auto whole = folder_ / "model.safetensors";
    if (std::find(others.begin(), others.end(), whole) != others.end()) return add_file(whole);
    if (shards.empty() && others.size() == 1) return add_file(others.front());
    if (shards.empty() || !others.empty()) {
      return error(errc::io, {path_.string(), ": expected model.safetensors, ", index_name,
                              " or one safetensors file, found ", shards.size() + others.size(), " safetensors files"});
    }
    std::sort(shards.begin(), shards.end());
    if (auto whole_set = check_shards(shards); !whole_set) return whole_set;
    for (const auto& shard : shards) {
      if (auto added = add_file(shard); !added) return added;
    }
    return {};
  }

  /// Shards without an index are NAME-00001-of-00003.safetensors and so on, all of them.
  [[nodiscard]] TETROMINO_ABI result<void> check_shards(std::span<const std::filesystem::path> shards) const {
    const std::string last = shards.back().stem().string();
    const std::size_t of = last.rfind("-of-"), dash = of == 0 ? std::string::npos : last.rfind('-', of - 1);
    const std::string total = last.substr(of + 4);
    std::size_t count = 0;
    const auto [end, problem] = std::from_chars(total.data(), total.data() + total.size(), count);
    if (dash == std::string::npos || problem != std::errc() || end != total.data() + total.size() || count == 0) {
      return error(errc::io, {path_.string(), ": expected shards named as model-00001-of-00002, found ",
                              detail::printable(last)});
    }
    const std::size_t digits = of - dash - 1;
    for (std::size_t i = 0; i < std::max(count, shards.size()); ++i) {
      const std::string number = std::to_string(i + 1), zeros(digits - std::min(digits, number.size()), '0');
      const std::string name = detail::text(last.substr(0, dash + 1), zeros, number, last.substr(of), ".safetensors");
      if (i < count && i < shards.size() && shards[i].filename() == name) continue;
      return error(errc::io, {path_.string(), ": expected ", index_name, " or ", count, " shards, found ",
                              shards.size(), " without ", i < count ? detail::printable(name) : "an index"});
    }
    return {};
  }

  [[nodiscard]] TETROMINO_ABI result<void> add_indexed(const std::filesystem::path& index) {
    auto read = detail::read_json(index);
    if (!read) return read.error();
    nlohmann::json& json = **read;
    const auto malformed = [&](const auto&... what) {
      return error(errc::malformed_file, {index.string(), ": ", what...});
    };
    const auto map = json.is_object() ? json.find("weight_map") : json.end();
    if (map == json.end() || !map->is_object()) return malformed("expected an object weight_map");
    std::map<std::string, std::size_t> shards;  // how many tensors each is said to have
    for (const auto& [tensor, shard] : map->items()) {
      const std::string name = shard.is_string() ? shard.get<std::string>() : std::string();
      constexpr std::size_t longest = 255;
      const bool is_name = !name.empty() && name.size() <= longest && name.find('\0') == std::string::npos;
      if (!is_name || std::filesystem::path(name).filename() != name || name == "..") {
        return malformed("weight_map: tensor ", detail::printable(tensor), ": expected the name of a file beside it");
      }
      ++shards[name];
    }
    for (const auto& [shard, count] : shards) {
      if (auto added = add_file(folder_ / shard); !added) {
        return malformed("it names the shard ", detail::printable(shard), ": ", added.error().what());
      }
    }
    if (auto unique = check_names(); !unique) return unique;
    for (const auto& tensor : tensors_) {
      const auto found = map->find(tensor.name);
      if (found == map->end() || found->get<std::string>() != files_[tensor.file].path().filename()) {
        return malformed("tensor ", detail::printable(tensor.name), " is in ",
                         files_[tensor.file].path().filename().string(), ", but weight_map says ",
                         found == map->end() ? std::string("nothing of it") : found->get<std::string>());
      }
    }
    if (map->size() != tensors_.size()) {
      for (const auto& [name, shard] : map->items()) {
        if (find(name) == nullptr) {
          return malformed("expected tensor ", detail::printable(name), " in ", shard.get<std::string>(),
                           ", found none there");
        }
      }
    }
    return {};
  }

  [[nodiscard]] TETROMINO_ABI result<void> add_file(const std::filesystem::path& path) {
    auto file = detail::file_reader::try_open(path);
    if (!file) return file.error();
    std::vector<std::uint8_t> head(std::min<std::uint64_t>(file->size(), detail::safetensors_prefix));
    if (auto read = file->try_read_at(0, head); !read) return read;
    const auto length = detail::safetensors_header_bytes(head, file->size(), path.string());
    if (!length) return length.error();
    head.resize(detail::safetensors_prefix + *length);
    if (auto read = file->try_read_at(0, head); !read) return read;
    auto header = detail::parse_safetensors(head, file->size(), path.string());
    if (!header) return header.error();
    for (auto& entry : header->tensors) {
      tensors_.push_back({std::move(entry.name), entry.type, std::move(entry.shape), files_.size(),
                          header->data_begin + entry.begin, entry.end - entry.begin});
    }
    for (const auto& [key, value] : header->metadata) metadata_.insert_or_assign(key, value);
    file_metadata_.push_back(std::move(header->metadata));
    files_.push_back(std::move(*file));
    return {};
  }

  /// Each name once, also across files.
  [[nodiscard]] TETROMINO_ABI result<void> check_names() {
    by_name_.resize(tensors_.size());
    std::iota(by_name_.begin(), by_name_.end(), std::size_t{0});
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return tensors_[a].name < tensors_[b].name; });
    for (std::size_t i = 1; i < by_name_.size(); ++i) {
      const auto &a = tensors_[by_name_[i - 1]], &b = tensors_[by_name_[i]];
      if (a.name != b.name) continue;
      return error(errc::malformed_file,
                   {"tensor ", detail::printable(a.name), ": expected it in one file, found it in ",
                    files_[a.file].path().string(), " and ", files_[b.file].path().string()});
    }
    return {};
  }

  std::filesystem::path path_;
  std::filesystem::path folder_;
  bool is_single_file_ = false;
  detail::json_document<nlohmann::json> config_;
  safetensors_metadata metadata_;
  std::vector<safetensors_metadata> file_metadata_;
  std::vector<detail::file_reader> files_;
  std::vector<checkpoint_tensor> tensors_;
  std::vector<std::size_t> by_name_;
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../../detail/macros_back.hpp"
