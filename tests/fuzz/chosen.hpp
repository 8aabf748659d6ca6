#pragma once

/// Several fuzz targets in one program (groups.cmake): the environment variable TETROMINO_FUZZ_TARGET names the one
/// that runs.

#include "fuzz/replay.hpp"

#include <cstdint>      // std::uint8_t
#include <cstdio>       // std::fprintf
#include <cstdlib>      // std::getenv, std::exit
#include <string_view>  // std::string_view
#include <vector>       // std::vector

struct fuzz_target {
  std::string_view name;
  int (*run)(const std::uint8_t* data, std::size_t size);
};

extern const std::vector<fuzz_target> fuzz_targets;  // those of this program

inline const fuzz_target& chosen_target() {
  const char* const name = std::getenv("TETROMINO_FUZZ_TARGET");
  for (const fuzz_target& target : fuzz_targets) {
    if (name != nullptr && target.name == name) return target;
  }
  std::fprintf(stderr, "TETROMINO_FUZZ_TARGET: expected the name of a fuzz target, one of:\n");
  for (const fuzz_target& target : fuzz_targets) std::fprintf(stderr, "  %s\n", target.name.data());
  std::exit(1);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fuzz_target& target = chosen_target();
  return target.run(data, size);
}
