#pragma once

/// What fuzz targets share: `require`, and without libFuzzer a main that replays the files and directories named on its
/// command line.

#include <cstdint>     // std::uint8_t
#include <cstdio>      // std::fprintf, std::printf
#include <cstdlib>     // std::abort
#include <filesystem>  // std::filesystem::recursive_directory_iterator
#include <fstream>     // std::ifstream
#include <iterator>    // std::istreambuf_iterator
#include <vector>      // std::vector

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

/// Ends the program, as a crash does, if `holds` is false.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

#if !defined(TETROMINO_LIBFUZZER)
int main(int argc, char** argv) {
  std::size_t replayed = 0;
  const auto replay = [&](const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    const std::vector<char> contents(std::istreambuf_iterator<char>(in), {});
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(contents.data()), contents.size());
    ++replayed;
  };
  for (int i = 1; i < argc; ++i) {
    if (!std::filesystem::is_directory(argv[i])) {
      replay(argv[i]);
      continue;
    }
    for (const auto& file : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (file.is_regular_file()) replay(file.path());
    }
  }
  std::printf("%zu inputs replayed\n", replayed);
  return replayed == 0 ? 1 : 0;
}
#endif
