#include "support/model_folder.hpp"

#include <tetromino/io/checkpoint.hpp>

/// Opening models, and the values of their parameters in every encoding.

namespace {

using namespace tetromino_test;
namespace io = tetromino::io;
using tetromino::errc;

const std::vector<model_tensor> two = {{"model.layers.0.mlp.up_proj.weight", {32, 64}},
                                       {"model.layers.0.mlp.down_proj.weight", {64, 32}}};

/// A safetensors file of given bytes.
struct raw_tensor {
  std::string name;
  io::dtype dtype;
  std::vector<std::size_t> shape;
  std::vector<std::uint8_t> bytes;
};
void write_raw(const fs::path& path, const std::vector<raw_tensor>& tensors) {
  fs::create_directories(path.parent_path());
  std::vector<io::tensor_declaration> declarations;
  for (const auto& t : tensors) declarations.push_back({t.name, t.dtype, t.shape});
  auto writer = io::safetensors_writer::create(path, io::aligned_order(declarations));
  for (const auto& t : tensors) writer.append(t.name, t.bytes);
  writer.finish();
}

std::vector<std::uint8_t> bytes_of(const std::vector<float>& values) {
  std::vector<std::uint8_t> out(values.size() * 4);
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}
std::vector<std::uint8_t> random_bytes(std::size_t count, unsigned least = 0, unsigned most = 255) {
  static std::mt19937 random(static_cast<unsigned>(seed()));
  std::uniform_int_distribution<unsigned> byte(least, most);
  std::vector<std::uint8_t> out(count);
  for (auto& b : out) b = static_cast<std::uint8_t>(byte(random));
  return out;
}

/// All values of a parameter as [matrices, rows, cols], read in slices of a few rows.
std::vector<float> values_of(const io::checkpoint& model, const io::parameter& p) {
  std::vector<float> out;
  io::row_buffers buffers;
  for (std::size_t e = 0; e < p.matrices; ++e) {
    for (std::size_t r = 0; r < p.rows; r += 5) {
      const std::size_t count = std::min<std::size_t>(5, p.rows - r);
      io::visit_rows(tetromino::scalar, model, p, {e, r, count}, buffers, [&](const auto& rows) {
        for (std::size_t i = 0; i < rows.rows; ++i) {
          for (std::size_t k = 0; k < rows.cols; ++k) out.push_back(tetromino::detail::to_float(rows(i, k)));
        }
      });
    }
  }
  return out;
}

const io::parameter& named(const std::vector<io::parameter>& all, std::string_view name) {
  INFO(name);
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& p) { return p.name == name; });
  REQUIRE(found != all.end());
  return *found;
}

}  // namespace

TEST_CASE("a directory, its index, a shard and a single file") {
  const temporary_directory folder;
  write_model(folder / "m", {{"hidden_size", 64}}, two);
  for (const char* path : {"m", "m/model.safetensors.index.json"}) {
    const auto model = io::checkpoint::open(folder / path);
    CHECK(model.file_count() == 2);
    CHECK(model.tensors().size() == 2);
    CHECK(model.config()["hidden_size"] == 64);
    CHECK(model.metadata().at("made") == "by hand");
    CHECK(model.find("nothing") == nullptr);
    CHECK_FALSE(model.is_single_file());
    for (const auto& t : two) CHECK(values_of(model, named(io::parameters_of(model), t.name)) == model_values(t));
  }
  const auto shard = io::checkpoint::open(folder / "m/model-00002-of-00002.safetensors");
  CHECK(shard.is_single_file());
  CHECK(shard.tensors().size() == 1);
  fs::remove(folder / "m/model.safetensors.index.json");
  CHECK(io::checkpoint::open(folder / "m").tensors().size() == 2);  // shards by their names
  const auto refused = [&](const std::string& message) {
    const auto opened = io::checkpoint::try_open(folder / "m");
    REQUIRE_FALSE(opened);
    CHECK(opened.error().code() == errc::io);
    CHECK_THAT(opened.error().what(), contains(message));
  };
  const auto shard_named = [&](const std::string& name) { return folder / ("m/" + name + ".safetensors"); };
  fs::copy_file(shard_named("model-00002-of-00002"), shard_named("model-00003-of-00002"));
  refused("expected model.safetensors.index.json or 2 shards, found 3 without an index");
  fs::remove(shard_named("model-00003-of-00002"));
  fs::rename(shard_named("model-00001-of-00002"), folder / "apart");
  refused("or 2 shards, found 1 without 'model-00001-of-00002.safetensors'");
  fs::remove(shard_named("model-00002-of-00002"));
  fs::rename(folder / "apart", shard_named("model-00001-of-00002"));
  refused("or 2 shards, found 1 without 'model-00002-of-00002.safetensors'");
  fs::rename(shard_named("model-00001-of-00002"), shard_named("end-of-part"));
  refused("expected shards named as model-00001-of-00002, found 'end-of-part'");
  write_model(folder / "one", nullptr, two, 1);
  CHECK(io::checkpoint::open(folder / "one").tensors().size() == 2);
}

TEST_CASE("a broken model says what was expected, and where") {
  const temporary_directory folder;
  const auto broken = [&](const std::string& message, errc code, const auto& change) {
    fs::remove_all(folder / "m");
    write_model(folder / "m", {{"hidden_size", 64}}, two);
    change(folder / "m");
    const auto opened = io::checkpoint::try_open(folder / "m");
    REQUIRE_FALSE(opened.has_value());
    CHECK_THAT(opened.error().what(), contains(message));
    CHECK(opened.error().code() == code);
  };
  const std::string index = "model.safetensors.index.json", first = "model-00001-of-00002.safetensors";
  const auto with_index = [&](const auto& change) {
    return [&, change](const fs::path& m) {
      auto json = read_json(m / index);
      change(json);
      store_text(m / index, json.dump());
    };
  };
  broken("shard 'model-00001-of-00002.safetensors'", errc::malformed_file,
         [&](const fs::path& m) { fs::remove(m / first); });
  broken("cut short", errc::malformed_file, [&](const fs::path& m) { fs::resize_file(m / first, 1000); });
  broken("expected JSON", errc::malformed_file, [&](const fs::path& m) { store_text(m / index, "{"); });
  broken("expected JSON", errc::malformed_file, [&](const fs::path& m) { store_text(m / "config.json", "{"); });
  broken("expected at most 16 levels", errc::malformed_file,
         [&](const fs::path& m) { store_text(m / "config.json", std::string(17, '[') + std::string(17, ']')); });
  broken("expected each key once, got 'a' twice", errc::malformed_file,
         [&](const fs::path& m) { store_text(m / "config.json", R"({"a": 1, "b": {"a": 2}, "a": 3})"); });
  for (const std::string& name : {std::string(300, 'x'), std::string("a\0b", 3)}) {
    broken("the name of a file beside it", errc::malformed_file,
           with_index([&](nlohmann::json& j) { j["weight_map"]["a"] = name; }));
  }
  broken("expected an object weight_map", errc::malformed_file, with_index([](nlohmann::json& j) { j = 3; }));
  broken("expected an object weight_map", errc::malformed_file,
         with_index([](nlohmann::json& j) { j["weight_map"] = 3; }));
  broken("the name of a file beside it", errc::malformed_file,
         with_index([](nlohmann::json& j) { j["weight_map"]["a"] = "../x.safetensors"; }));
  broken("the name of a file beside it", errc::malformed_file,
         with_index([](nlohmann::json& j) { j["weight_map"]["a"] = 1; }));
  broken("expected tensor 'a' in model-00001", errc::malformed_file,
         with_index([&](nlohmann::json& j) { j["weight_map"]["a"] = first; }));
  broken("but weight_map says nothing of it", errc::malformed_file, with_index([&](nlohmann::json& j) {
           j["weight_map"].erase(two[0].name);
           j["weight_map"]["a"] = first;
         }));
  broken("expected it in one file", errc::malformed_file, [&](const fs::path& m) {
    fs::remove(m / index);
    fs::copy_file(m / first, m / "model-00002-of-00002.safetensors", fs::copy_options::overwrite_existing);
  });
  broken("found 0 safetensors files", errc::io, [&](const fs::path& m) {
    for (const auto& file : std::vector<fs::path>{m / index, m / first, m / "model-00002-of-00002.safetensors"})
      fs::remove(file);
  });
  CHECK(io::checkpoint::try_open(folder / "none").error().code() == errc::io);
  CHECK(io::checkpoint::try_open(folder / "none.json").error().code() == errc::io);
}

TEST_CASE("files that change while they are read") {
  const temporary_directory folder;
  write_model(folder / "m", nullptr, two, 1);
  const auto model = io::checkpoint::open(folder / "m");
  CHECK(model.try_unchanged());
  std::vector<std::uint8_t> bytes(model.tensors()[0].bytes);
  model.read(model.tensors()[0], 0, bytes);
  fs::resize_file(folder / "m/model.safetensors", 300);
  const auto cut = model.try_read(model.tensors()[1], 0, bytes);
  REQUIRE_FALSE(cut.has_value());
  CHECK_THAT(cut.error().what(), contains("cut short"));
  CHECK_THAT(cut.error().what(), contains(model.tensors()[1].name));
  CHECK_THROWS_WITH(model.unchanged(), contains("nobody changes while it is read"));
  CHECK_THROWS_AS(model.read(model.tensors()[0], bytes.size(), bytes), precondition_failed);
  io::row_buffers buffers;
  const auto parameters = io::parameters_of(model);
  CHECK_THROWS_AS(io::visit_rows(tetromino::scalar, model, parameters[0], {1, 0, 1}, buffers, [](const auto&) {}),
                  precondition_failed);
}

TEST_CASE("FP8 under block scales") {
  const temporary_directory folder;
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  constexpr std::size_t rows = 200, cols = 300;  // 2 x 3 blocks of 128 x 128, the last ones short
  auto codes = random_bytes(rows * cols);
  for (auto& code : codes) code = (code & 0x7F) == 0x7F ? 0 : code;
  const std::vector<float> scales{0.5f, 1.0f, 0.25f, 3.0f, 0.125f, 2.0f};
  write_raw(folder / "m.safetensors",
            {{name, io::dtype::F8_E4M3, {rows, cols}, codes},
             {name + "_scale_inv", io::dtype::F32, {2, 3}, bytes_of(scales)},
             {"model.layers.0.mlp.down_proj.weight", io::dtype::F8_E4M3, {64, 32}, random_bytes(64 * 32, 0, 100)},
             {"model.layers.0.mlp.down_proj.weight_scale", io::dtype::F32, {}, bytes_of({0.75f})},
             {"model.layers.0.mlp.gate_proj.weight", io::dtype::F8_E4M3, {64, 32}, random_bytes(64 * 32)}});
  const auto model = io::checkpoint::open(folder / "m.safetensors");
  const auto parameters = io::parameters_of(model);
  CHECK(parameters.size() == 3);
  const auto& p = named(parameters, name);
  CHECK(p.is_weight());
  CHECK(p.encoding == io::value_encoding::fp8);
  const auto values = values_of(model, p);
  std::size_t wrong = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t k = 0; k < cols; ++k) {
      wrong += values[r * cols + k] != e4m3_value(codes[r * cols + k]) * scales[r / 128 * 3 + k / 128];
    }
  }
  CHECK(wrong == 0);
  const auto& whole = named(parameters, "model.layers.0.mlp.down_proj.weight");
  CHECK(values_of(model, whole)[7] == e4m3_value([&] {
                                        std::vector<std::uint8_t> bytes(whole.values->bytes);
                                        model.read(*whole.values, 0, bytes);
                                        return bytes[7];
                                      }()) *
                                          0.75f);
  CHECK(named(parameters, "model.layers.0.mlp.gate_proj.weight").kind.kept_because ==
        "FP8 without scales that are known");
}

TEST_CASE("4-bit codes as gpt-oss, compressed-tensors and ModelOpt store them") {
  const temporary_directory folder;
  const auto codes = random_bytes(2 * 32 * 32);
  const auto powers = random_bytes(2 * 32 * 2, 100, 140), fractions = random_bytes(32 * 4, 1, 126);
  const std::vector<std::uint8_t> half(codes.begin(), codes.begin() + 32 * 32);
  const std::string experts = "model.layers.0.mlp.experts.down_proj", q = "model.layers.0.self_attn.q_proj",
                    k = "model.layers.0.self_attn.k_proj", v = "model.layers.0.self_attn.v_proj";
  const std::vector<std::uint8_t> half_powers(powers.begin(), powers.begin() + 64);
  write_raw(folder / "m.safetensors", {{experts + "_blocks", io::dtype::U8, {2, 32, 2, 16}, codes},
                                       {experts + "_scales", io::dtype::U8, {2, 32, 2}, powers},
                                       {q + ".weight_packed", io::dtype::U8, {32, 32}, half},
                                       {q + ".weight_scale", io::dtype::F8_E4M3, {32, 4}, fractions},
                                       {q + ".weight_global_scale", io::dtype::F32, {1}, bytes_of({8.0f})},
                                       {q + ".input_global_scale", io::dtype::F32, {1}, bytes_of({4.0f})},
                                       {k + ".weight", io::dtype::U8, {32, 32}, half},
                                       {k + ".weight_scale", io::dtype::F8_E4M3, {32, 4}, fractions},
                                       {k + ".weight_scale_2", io::dtype::F32, {}, bytes_of({0.125f})},
                                       {v + ".weight_packed", io::dtype::U8, {32, 32}, half},
                                       {v + ".weight_scale", io::dtype::U8, {32, 2}, half_powers}});
  const auto model = io::checkpoint::open(folder / "m.safetensors");
  const auto parameters = io::parameters_of(model);
  CHECK(parameters.size() == 4);
  CHECK(values_of(model, named(parameters, experts)) == decode(codes, powers, 0));
  CHECK(values_of(model, named(parameters, q + ".weight")) == decode(half, fractions, 0.125f));
  CHECK(values_of(model, named(parameters, k + ".weight")) == decode(half, fractions, 0.125f));
  CHECK(values_of(model, named(parameters, v + ".weight")) == decode(half, half_powers, 0));
  CHECK(named(parameters, experts).kind.role == io::tensor_role::fused_experts);
  CHECK(named(parameters, q + ".weight").input_scale != nullptr);
  CHECK(named(parameters, q + ".weight").set == named(parameters, k + ".weight").set);
}

TEST_CASE("integers are refused by the name of their format, and broken parts by their shapes") {
  const temporary_directory folder;
  const auto refused = [&](const std::vector<raw_tensor>& tensors, const std::string& message) {
    write_raw(folder / "m.safetensors", tensors);
    const auto found = io::try_parameters_of(io::checkpoint::open(folder / "m.safetensors"));
    REQUIRE_FALSE(found.has_value());
    CHECK_THAT(found.error().what(), contains(message));
  };
  const std::string q = "model.layers.0.self_attn.q_proj";
  const std::vector<std::uint8_t> bytes(64, 1);
  refused({{q + ".qweight", io::dtype::I32, {4, 4}, bytes}, {q + ".g_idx", io::dtype::I32, {1}, bytes_of({0})}},
          "GPTQ");
  refused({{q + ".qweight", io::dtype::I32, {4, 4}, bytes}}, "AWQ");
  refused({{q + ".weight_packed", io::dtype::I32, {4, 4}, bytes}}, "pack-quantized");
  refused({{q + ".weight.quant_state.bitsandbytes__nf4", io::dtype::U8, {64}, bytes}}, "bitsandbytes");
  refused({{q + ".weight", io::dtype::I8, {8, 8}, bytes}}, "int8");
  refused({{q + ".weight_packed", io::dtype::U8, {4, 16}, bytes}}, "weight_scale' beside it");
  refused({{q + ".weight_packed", io::dtype::U8, {4, 16}, bytes},
           {q + ".weight_scale", io::dtype::U8, {4, 2}, std::vector<std::uint8_t>(8)}},
          "expected U8 [4, 1], found U8 [4, 2]");
  refused({{q + ".weight", io::dtype::U8, {4, 16}, bytes},
           {q + ".weight_scale", io::dtype::F8_E4M3, {4, 2}, std::vector<std::uint8_t>(8)}},
          "expected one F32 tensor scale beside the codes");
  refused({{"e_blocks", io::dtype::U8, {4, 16}, bytes}, {"e_scales", io::dtype::U8, {4}, std::vector<std::uint8_t>(4)}},
          "expected U8 [experts, rows, K / 32, 16]");
  refused({{q + ".weight", io::dtype::F8_E4M3, {8, 8}, bytes},
           {q + ".weight_scale_inv", io::dtype::I32, {2, 2}, std::vector<std::uint8_t>(16)}},
          "scales for blocks");
  write_model(folder / "gptq", {{"quantization_config", {{"quant_method", "gptq"}}}}, two);
  CHECK_THAT(io::try_parameters_of(io::checkpoint::open(folder / "gptq")).error().what(), contains("format gptq"));
}
