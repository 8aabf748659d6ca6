/// Reads any bytes as statistics of weights' inputs. What is accepted must give weights of columns, or say why not, for
/// every weight it names.

#include "../../examples/tools/input_statistics.hpp"
#include "fuzz/replay.hpp"

#include <sys/mman.h>  // ::memfd_create

#include <cstdint>      // std::uint8_t
#include <string>       // std::string
#include <string_view>  // std::string_view

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const tetromino::detail::file_descriptor memory(::memfd_create("statistics", MFD_CLOEXEC));
  require(memory.is_open() && tetromino::detail::write_all(memory.number(), 0, {data, size}) == 0, "a file in memory");
  const std::string path = "/proc/self/fd/" + std::to_string(memory.number());
  const auto refused = [](const tetromino::error& e) {
    require(std::string_view(e.what()).size() < 1000, "an error that fits on a screen");
  };
  try {
    const auto read = input_statistics::load(path);
    const auto file = tetromino::io::safetensors_file::open(path);
    for (const auto& [tensor, input] : file.metadata()) {
      const auto& shape = file[input + ".moments"].shape();
      require(read.knows(tensor), "every weight that it names");
      for (const std::size_t rotation : {std::size_t{0}, std::size_t{16}}) {
        try {
          const auto weights = read.column_weights(tensor, shape[0] - 1, shape[0], shape[1], rotation);
          require(weights.size() == shape[1], "a weight for each column");
          for (const float weight : weights) require(weight >= 0, "weights of at least 0");
        } catch (const tetromino::error& e) {
          refused(e);
        }
      }
      const auto largest = read.amax(tensor, shape[0] - 1);
      require(!largest || *largest * 0 == 0, "finite magnitudes");
    }
  } catch (const tetromino::error& e) {
    refused(e);
  }
  return 0;
}
