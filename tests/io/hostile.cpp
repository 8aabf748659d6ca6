#include "support/memory_in_use.hpp"
#include "support/model_folder.hpp"
#include "support/sanitized.hpp"

#include "../../examples/tools/input_statistics.hpp"

#include <tetromino/io/checkpoint/verify.hpp>

#include <ctime>
#include <sstream>

/// Models whose index, config.json, headers or statistics cost as much as half a megabyte can: readers are done with
/// them in a second and 128 MiB. Files of their own are in worst_cases.cpp.

namespace {

using namespace tetromino_test;
namespace io = tetromino::io;

constexpr std::size_t most_bytes = 500'000;

/// "{"a0": VALUE, "a1": VALUE, ...}" of half a megabyte.
std::string many(const std::string& value) {
  std::string out = "{";
  for (std::size_t i = 0; out.size() + value.size() + 30 < most_bytes; ++i) {
    out += (i == 0 ? "\"a" : ",\"a") + std::to_string(i) + "\":" + value;
  }
  return out + "}";
}
std::string repeated(const std::string& piece) {
  std::string out;
  while (out.size() + piece.size() < most_bytes) out += piece;
  return out;
}
template <class T>
std::string bytes(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
std::string with_length(const std::string& header) { return bytes(std::uint64_t{header.size()}) + header; }

/// Runs a reader, and fails where that takes too long or too much memory.
template <class Read>
void in_time(const std::string& what, const Read& read) {
  INFO(what);
  const std::size_t before = most_memory_in_use = memory_in_use.load();
  const std::clock_t start = std::clock();
  read();
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  if (!measures_memory) return;  // instrumented programs are slower
  CHECK(seconds < 1);
  CHECK(most_memory_in_use - before < std::size_t{128} << 20);
}

}  // namespace

TEST_CASE("no file of half a megabyte takes long, or much memory") {
  const temporary_directory folder;
  write_model(folder / "m", {{"hidden_size", 64}}, {{"model.layers.0.mlp.up_proj.weight", {32, 64}}}, 1);
  fs::rename(folder / "m/model.safetensors", folder / "m/a.safetensors");
  const auto open = [&] {
    const auto model = io::checkpoint::try_open(folder / "m");
    if (!model) {
      CHECK(std::string(model.error().what()).size() < 1000);
    } else if (const auto parameters = io::try_parameters_of(*model)) {
      CHECK(parameters->size() == model->tensors().size());
    }
  };
  const std::string index = "{\"weight_map\":{\"model.layers.0.mlp.up_proj.weight\":\"a.safetensors\"}}";
  const std::vector<std::string> texts = {repeated("["),
                                          repeated("{\"a\":"),
                                          "\"" + repeated("x") + "\"",
                                          "[" + repeated("0,") + "0]",
                                          many("{}"),
                                          many("[[]]"),
                                          many("\"\""),
                                          many("1e308"),
                                          many("NaN"),
                                          repeated("{\"weight_map\":{\"a\":")};
  for (const auto& text : texts) {
    store_text(folder / "m/model.safetensors.index.json", index);
    for (const std::string key : {"text_config", "hidden_size", "quantization_config", "architectures"}) {
      store_text(folder / "m/config.json", "{\"" + key + "\":" + text + "}");
      in_time("config " + key + " " + text.substr(0, 10), open);
    }
    store_text(folder / "m/config.json", "{}");
    for (const std::string& whole : {text, "{\"weight_map\":" + text + "}"}) {
      store_text(folder / "m/model.safetensors.index.json", whole);
      in_time("index " + text.substr(0, 10), open);
    }
  }
  for (const std::string shard : {"a.safetensors", "b.safetensors"}) {
    store_text(folder / "m/model.safetensors.index.json", "{\"weight_map\":" + many("\"" + shard + "\"") + "}");
    in_time("index of " + shard, open);
  }
  fs::remove(folder / "m/model.safetensors.index.json");
  for (const std::string& header :
       {many("{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[0,0]}"), "{\"__metadata__\":" + many("\"\"") + "}",
        "{\"" + repeated(".") + "\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[0,0]}}",
        "{\"" + repeated("experts.1_") + "\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[0,0]}}",
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[" + repeated("0,") + "0],\"data_offsets\":[0,0]}}"}) {
    store_text(folder / "m/a.safetensors", with_length(header));
    in_time("header " + header.substr(0, 20), open);
    in_time("statistics " + header.substr(0, 20),
            [&] { CHECK_THROWS_AS(input_statistics::load((folder / "m/a.safetensors").string()), tetromino::error); });
  }
}

TEST_CASE("what config.json leaves alone is compared in bounded time") {
  using tetromino::detail::module_list;
  const auto refused = [](const nlohmann::json& list) { return !module_list::try_read(list).has_value(); };
  nlohmann::json patterns = nlohmann::json::array();
  for (std::size_t i = 0; i < 1001; ++i) patterns.push_back("*" + std::to_string(i));
  CHECK(refused(patterns));
  for (const char* costly : {"re:((a{1,255}){1,255}){1,255}", "re:(a*)*\\1", "re:("}) CHECK(refused({costly}));
  CHECK(refused({"re:" + std::string(1000, '.')}));
  const auto list = module_list::try_read({"lm_head", "*.gate", "re:model\\.layers\\.[0-9]+\\.mlp$", 7});
  REQUIRE(list.has_value());
  for (const char* named : {"lm_head", "model.layers.3.mlp.gate", "model.layers.12.mlp"}) CHECK(list->names(named));
  for (const char* other : {"lm_head2", "gate", "model.layers.x.mlp", "model.layers.1.mlp.up"}) {
    CHECK_FALSE(list->names(other));
  }
  in_time("many of Python's numbers, there and back", [] {
    std::string numbers = "[0";
    while (numbers.size() < 1'000'000) numbers += ",NaN,-Infinity,Infinity";
    CHECK(tetromino::detail::with_python_numbers(tetromino::detail::without_python_numbers(numbers)) == numbers);
  });
  in_time("a pattern of stars", [] {
    const std::string text(100'000, 'a');
    CHECK_FALSE(tetromino::detail::matches(text, "*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b"));
  });
}
