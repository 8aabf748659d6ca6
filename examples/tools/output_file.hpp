#pragma once

/// Files that the example programs write beside models: whole or not at all, and never over one that is read.

#include "ui.hpp"

#include <tetromino/io/files.hpp>

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace ui {

/// A file and the option that names it; an empty path is none.
struct named_file {
  std::string option, path;
};

/// Refuses, before the work, outputs that are inputs, or each other, or that cannot be created. Errors: usage_error;
/// tetromino::error.
inline void check_outputs(const std::vector<named_file>& outputs, const std::vector<named_file>& inputs) {
  namespace fs = std::filesystem;
  const auto are_same = [](const std::string& a, const std::string& b) {
    std::error_code ignored;
    return fs::equivalent(a, b, ignored) || fs::weakly_canonical(a, ignored) == fs::weakly_canonical(b, ignored);
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const named_file& out = outputs[i];
    if (out.path.empty()) continue;
    std::vector<named_file> others = inputs;
    others.insert(others.end(), outputs.begin(), outputs.begin() + static_cast<std::ptrdiff_t>(i));
    for (const named_file& other : others) {
      if (other.path.empty() || !are_same(out.path, other.path)) continue;
      throw usage_error(fmt::format("{} {}: expected another file than {}", out.option, out.path, other.option));
    }
    tetromino::io::pending_file::try_create(out.path).value();  // and away with it: nothing is left if we are killed
  }
}

/// Writes a text file in one step, which signals to stop wait for.
inline void write_file(const std::string& path, const std::string& content) {
  const stop_signals signals;
  auto file = tetromino::io::pending_file::try_create(path).value();
  file.try_write_at(0, {reinterpret_cast<const std::uint8_t*>(content.data()), content.size()}).value();
  file.try_commit().value();
}

}  // namespace ui
