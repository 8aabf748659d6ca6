#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../safetensors.hpp"          // safetensors_writer, tensor_declaration
#include "../../detail/tensor_names.hpp"  // is_one_of
#include "../tensors.hpp"                 // checkpoint

#include <sys/stat.h>  // ::mkdir

#include <array>          // std::array
#include <cstdio>         // std::snprintf, ::rename
#include <cstddef>        // std::size_t
#include <filesystem>     // std::filesystem
#include <functional>     // std::function
#include <map>            // std::map
#include <span>           // std::span
#include <string>         // std::string
#include <unordered_map>  // std::unordered_map
#include <utility>        // std::move
#include <vector>         // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// A directory under construction: it has a temporary name beside its final one until `try_commit`; without that, it is
/// removed with all that is in it. Nothing that exists is replaced, but an empty directory; a link stays, and what it
/// leads to is made or replaced.
class pending_directory {
 public:
  [[nodiscard]] static result<pending_directory> try_create(const std::filesystem::path& path) {
    namespace fs = std::filesystem;
    std::error_code problem;
    pending_directory pending;
    auto leads_to = followed(path.has_filename() ? path : path.parent_path());  // without a slash at the end
    if (!leads_to) return leads_to.error();
    pending.path_ = std::move(*leads_to);
    if (fs::exists(pending.path_, problem)) {
      if (!fs::is_directory(pending.path_, problem) || !fs::is_empty(pending.path_, problem)) {
        return error(errc::io, {path.string(), ": expected a directory that is new or empty to write to"});
      }
      pending.path_ = fs::canonical(pending.path_, problem);  // "." has no name that can be given to another
      const auto here = identity_of(pending.path_), above = identity_of(pending.path_ / "..");
      if (problem || !here || !above || here->device != above->device || *here == *above) {
        return error(errc::io, {path.string(), ": expected a directory that can be replaced, found a place where ",
                                "a file system is mounted; name one that is new within it"});
      }
    }
    constexpr std::size_t longest_stem = 200;
    const std::string stem = text(pending.path_.filename().string().substr(0, longest_stem), ".part-", ::getpid(), '-');
    for (int attempt = 0; attempt < 1000; ++attempt) {
      pending.temporary_ = pending.path_.parent_path() / text(stem, attempt);
      if (::mkdir(pending.temporary_.c_str(), 0777) == 0) {
        pending.owner_ = ::getpid();
        return pending;
      }
      if (errno != EEXIST) break;
    }
    return io_error(pending.path_, text("create the temporary directory ", pending.temporary_.filename().string()));
  }

  pending_directory(pending_directory&& other) noexcept
      : path_(std::move(other.path_)),
        temporary_(std::move(other.temporary_)),
        owner_(std::exchange(other.owner_, 0)) {}
  pending_directory& operator=(pending_directory&&) = delete;
  ~pending_directory() {
    std::error_code ignored;
    if (owner_ == ::getpid()) std::filesystem::remove_all(temporary_, ignored);
  }

  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  /// Where its files are until it is whole.
  [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return temporary_; }

  [[nodiscard]] result<void> try_commit() {
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) return io_error(path_, "rename the finished directory to it");
    owner_ = 0;
    return {};
  }

 private:
  pending_directory() = default;

  std::filesystem::path path_, temporary_;
  pid_t owner_ = 0;
};

/// Bytes of one piece of text, written whole.
inline result<void> write_text(const std::filesystem::path& path, std::string_view contents) {
  auto file = pending_file::try_create(path);
  if (!file) return file.error();
  const auto* const bytes = reinterpret_cast<const std::uint8_t*>(contents.data());
  if (auto written = file->try_write_at(0, {bytes, contents.size()}); !written) return written;
  return file->try_commit();
}

/// Whether a path, which need not exist, leads into a directory or to it.
inline bool is_within(const std::filesystem::path& path, const std::filesystem::path& folder) {
  std::error_code problem;
  const auto leads_to = followed(path);
  const auto inner = std::filesystem::weakly_canonical(leads_to ? *leads_to : path, problem),
             outer = std::filesystem::canonical(folder, problem);
  if (problem) return false;
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

/// Files that hold weights of the model in another form: they do not belong beside a packed one.
inline bool is_weight_file(const std::filesystem::path& path) {
  const std::string name = path.filename().string(), extension = path.extension().string();
  constexpr std::array<std::string_view, 11> kinds{".safetensors", ".bin", ".pt",   ".pth",     ".ckpt",     ".gguf",
                                                   ".h5",          ".ot",  ".onnx", ".msgpack", ".onnx_data"};
  return is_one_of(extension, kinds) || name.ends_with(".index.json");
}

/// Copies all that is in a model's directory but its weights and their indices, config.json, what begins with a dot,
/// and what is no file: links to directories, to nothing or in a circle, pipes. Returns the names of weight files that
/// stayed behind, other than those of `read`.
inline result<std::vector<std::string>> copy_other_files(const std::filesystem::path& from,
                                                         const std::filesystem::path& to, const io::checkpoint& read) {
  namespace fs = std::filesystem;
  std::vector<std::string> left;
  std::error_code problem;
  for (auto entry = fs::recursive_directory_iterator(from, problem); !problem && entry != fs::end(entry);
       entry.increment(problem)) {
    const fs::path relative = entry->path().lexically_relative(from);
    if (relative.begin()->string().starts_with(".")) {
      entry.disable_recursion_pending();
      continue;
    }
    std::error_code leads_nowhere;
    if (relative == "config.json" || relative == "hf_quant_config.json" || !entry->is_regular_file(leads_nowhere)) {
      continue;
    }
    if (is_weight_file(entry->path())) {
      bool is_read = relative.string().ends_with(".index.json");
      for (std::size_t i = 0; i < read.file_count(); ++i) {
        is_read = is_read || identity_of(entry->path()) == read.identity(i);
      }
      if (!is_read) left.push_back(relative.string());
      continue;
    }
    fs::create_directories((to / relative).parent_path(), problem);
    if (!problem) fs::copy_file(entry->path(), to / relative, fs::copy_options::none, problem);
    if (problem) return io_error(to / relative, "copy it", problem.value());
  }
  if (problem) return io_error(from, "list it", problem.value());
  return left;
}

/// The tensors of a model under construction: one file, or shards of bounded size with their index.
class shard_writer {
 public:
  /// Tensors with the same number of `group` stay in one shard.
  struct declared {
    io::tensor_declaration tensor;
    std::size_t group = 0;
  };

  /// Writes `path` itself if `is_file`, or files in the directory `path`.
  [[nodiscard]] static result<shard_writer> try_create(
      const std::filesystem::path& path, bool is_file, std::vector<declared> tensors, std::size_t shard_bytes,
      const std::function<io::safetensors_metadata(std::span<const declared>)>& metadata) {
    shard_writer out;
    out.folder_ = path;
    const auto bytes_of = [](const declared& d) { return tensor_bytes(d.tensor.dtype, d.tensor.shape).value(); };
    std::vector<std::size_t> begins{0};  // of shards
    std::size_t shard = 0;
    for (std::size_t i = 0; i < tensors.size();) {
      std::size_t end = i, group = 0;
      for (; end < tensors.size() && tensors[end].group == tensors[i].group; ++end) group += bytes_of(tensors[end]);
      if (!is_file && shard != 0 && shard + group > shard_bytes) {
        begins.push_back(i);
        shard = 0;
      }
      shard += group;
      out.total_bytes_ += group;
      i = end;
    }
    begins.push_back(tensors.size());
    const std::size_t count = begins.size() - 1;
    for (std::size_t s = 0; s < count; ++s) {
      const std::span<const declared> part(tensors.data() + begins[s], begins[s + 1] - begins[s]);
      std::vector<io::tensor_declaration> declarations;
      for (const auto& one : part) {
        declarations.push_back(one.tensor);
        if (!out.shard_of_.emplace(one.tensor.name, s).second) {
          return error(errc::invalid_argument, {"tensor ", printable(one.tensor.name),
                                                ": expected each name once in what is written, got it twice"});
        }
      }
      char name[64] = "model.safetensors";
      if (count > 1) std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", s + 1, count);
      out.names_.emplace_back(name);
      auto writer = io::safetensors_writer::try_create(is_file ? path : path / name,
                                                       io::aligned_order(std::move(declarations)), metadata(part));
      if (!writer) return writer.error();
      out.shards_.push_back(std::move(*writer));
    }
    return out;
  }

  [[nodiscard]] std::size_t total_bytes() const noexcept { return total_bytes_; }
  [[nodiscard]] std::size_t shard_count() const noexcept { return shards_.size(); }

  /// From any thread.
  [[nodiscard]] result<void> try_write(const std::string& name, std::size_t offset,
                                       std::span<const std::uint8_t> bytes) {
    return shards_[shard_of_.at(name)].try_write_at(name, offset, bytes);
  }

  /// Makes all files durable, and writes the index where there are several.
  [[nodiscard]] result<void> try_finish() {
    for (auto& shard : shards_) {
      if (auto done = shard.try_finish(); !done) return done;
    }
    if (shards_.size() < 2) return {};
    std::map<std::string, std::string> weight_map;
    for (const auto& [name, shard] : shard_of_) weight_map.emplace(name, names_[shard]);
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", weight_map}};
    return write_text(folder_ / "model.safetensors.index.json", index.dump(2) + "\n");
  }

 private:
  shard_writer() = default;

  std::filesystem::path folder_;
  std::vector<io::safetensors_writer> shards_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, std::size_t> shard_of_;
  std::size_t total_bytes_ = 0;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
