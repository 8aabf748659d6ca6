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
  std::vector<named_file> others = inputs;
  for (const named_file& out : outputs) {
    if (out.path.empty()) continue;
    const auto refuse_same = [&](const std::string& path) {
      for (const named_file& other : others) {
        if (other.path.empty() || !are_same(path, other.path)) continue;
        throw usage_error(fmt::format("{} {}: expected another file than {}", out.option, out.path, other.option));
      }
    };
    refuse_same(out.path);
    // created and away with it: nothing is left if we are killed; it knows where a link leads that leads to nothing yet
    const std::string place = tetromino::io::pending_file::try_create(out.path).value().path().string();
    refuse_same(place);
    others.push_back({out.option, place});
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
