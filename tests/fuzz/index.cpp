/// Opens a model directory whose index is any bytes, beside two shards that are whole. What is accepted must be the
/// tensors that the index names, each in the file that it names.

#include <tetromino/io/checkpoint/tensors.hpp>
#include <tetromino/io/safetensors.hpp>

#include "fuzz/model_directory.hpp"
#include "fuzz/replay.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>      // std::uint8_t
#include <string>       // std::string
#include <string_view>  // std::string_view

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const model_directory model({{"a.safetensors", {{"x", {2, 3}}, {"y", {}}}}, {"b.safetensors", {{"z", {1}}}}});
  const std::string_view index(reinterpret_cast<const char*>(data), size);
  model.store("model.safetensors.index.json", index);
  const auto opened = tetromino::io::checkpoint::try_open(model.path());
  if (!opened) {
    require(opened.error().code() == tetromino::errc::malformed_file, "the kind of the error");
    require(std::string_view(opened.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }
  const auto map = nlohmann::json::parse(index)["weight_map"];
  require(map.size() == opened->tensors().size(), "as many tensors as the index names");
  for (const auto& [name, file] : map.items()) {
    const auto* const tensor = opened->find(name);
    require(tensor != nullptr && opened->file(tensor->file).filename() == file.get<std::string>(), "each in its file");
  }
  return 0;
}
