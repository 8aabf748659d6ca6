#pragma once

/// A model in a directory of its own, which goes when the program ends: fuzz targets write one file of it anew.

#include <tetromino/io/safetensors.hpp>

#include <cstddef>       // std::size_t
#include <filesystem>    // std::filesystem::path
#include <fstream>       // std::ofstream
#include <map>           // std::map
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::error_code
#include <unistd.h>      // ::getpid
#include <vector>        // std::vector

class model_directory {
 public:
  using shapes = std::map<std::string, std::vector<std::size_t>>;

  /// Each file with its tensors, all of bfloat16 zeros.
  explicit model_directory(const std::map<std::string, shapes>& files)
      : path_(std::filesystem::temp_directory_path() / ("tetromino-fuzz-" + std::to_string(::getpid()))) {
    namespace io = tetromino::io;
    std::filesystem::create_directories(path_);
    for (const auto& [file, tensors] : files) {
      std::vector<io::tensor_declaration> declarations;
      for (const auto& [name, shape] : tensors) declarations.push_back({name, io::dtype::BF16, shape});
      auto writer = io::safetensors_writer::create(path_ / file, declarations);
      for (const auto& [name, shape] : tensors) {
        std::size_t elements = 1;
        for (const std::size_t dimension : shape) elements *= dimension;
        writer.append(name, std::vector<std::uint8_t>(2 * elements));
      }
      writer.finish();
    }
  }
  model_directory(const model_directory&) = delete;
  model_directory& operator=(const model_directory&) = delete;
  ~model_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }

  void store(const char* file, std::string_view contents) const {
    std::ofstream(path_ / file, std::ios::binary).write(contents.data(), static_cast<std::streamsize>(contents.size()));
  }

 private:
  std::filesystem::path path_;
};
