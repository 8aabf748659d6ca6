/// Opens any bytes as an imatrix file. What it accepts must give weights, or say why not, for every tensor it names.

#include <tetromino/io/imatrix.hpp>

#include "fuzz/replay.hpp"

#include <sys/mman.h>  // ::memfd_create

#include <cstdint>      // std::uint8_t
#include <string>       // std::string
#include <string_view>  // std::string_view

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const tetromino::detail::file_descriptor memory(::memfd_create("imatrix", MFD_CLOEXEC));
  require(memory.is_open() && tetromino::detail::write_all(memory.number(), 0, {data, size}) == 0, "a file in memory");
  const auto read = tetromino::io::imatrix::try_open("/proc/self/fd/" + std::to_string(memory.number()));
  if (!read) {
    require(read.error().code() == tetromino::errc::malformed_file, "the kind of the error");
    require(std::string_view(read.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }
  require(read->size() > 0, "entries");
  for (const std::string_view name : read->tensors()) {
    for (const std::size_t cols : {std::size_t{1}, std::size_t{2}, std::size_t{3}, size}) {
      for (const std::size_t matrices : {std::size_t{1}, std::size_t{2}}) {
        const auto weights = read->try_column_weights(name, matrices - 1, matrices, cols);
        require(!weights || weights->size() == cols, "a weight for each column");
        for (std::size_t k = 0; weights && k < cols; ++k) require((*weights)[k] >= 0, "weights of at least 0");
      }
    }
  }
  return 0;
}
