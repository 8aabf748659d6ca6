#include "support/model_folder.hpp"

#include "examples/program.hpp"
#include "reference/numbers.hpp"
#include "support/safetensors_files.hpp"

#include <tetromino/io/safetensors.hpp>
#include <tetromino/tetromino.hpp>

#include <cstring>

/// What is written, tensor by tensor.

namespace {

namespace io = tetromino::io;
using namespace tetromino_test;

const std::string model = data_file("moe-16x2.safetensors").string();

/// What packing makes of the original tensor, by the library's own round trip.
tetromino::matrix<tetromino::bfloat16> round_trip(const io::safetensors_tensor& tensor, const std::string& name,
                                                  std::span<const float> tensor_scales) {
  const auto& shape = tensor.shape();
  const tetromino::batch_view<const tetromino::bfloat16> in(
      tensor.as<tetromino::bfloat16>().data(), shape.size() == 3 ? shape[0] : 1, shape[shape.size() - 2], shape.back());
  tetromino::matrix<tetromino::bfloat16> out(in.matrices, in.rows, in.cols);
  tetromino::fake_quantize(tetromino::scalar, in, tetromino::recipe::parse(name), out.view(),
                           {.tensor_scales = tensor_scales});
  return out;
}

struct layout_case {
  std::string layout, recipe;
  std::string codes, scales, tensor_scale;  // how the names of the parts end, in place of ".weight"
  std::size_t block;
  std::string scale_dtype;
  std::size_t fine = 0;  // elements with a factor of 2 bits
};

const std::vector<layout_case> layout_cases = {
    {"gpt-oss", "mxfp4-32/oas", "_blocks", "_scales", "", 32, "U8"},
    {"compressed-tensors", "mxfp4-32/even", ".weight_packed", ".weight_scale", "", 32, "U8"},
    {"compressed-tensors", "nvfp4/amax", ".weight_packed", ".weight_scale", ".weight_global_scale", 16, "F8_E4M3"},
    {"modelopt", "nvfp4/four-over-six", ".weight", ".weight_scale", ".weight_scale_2", 16, "F8_E4M3"},
    {"linear", "nvfp4/min-error", ".weight.codes", ".weight.scales", ".weight.tensor_scales", 16, "F8_E4M3"},
    {"linear", "mxfp4-16/floor", ".weight.codes", ".weight.scales", "", 16, "F8_E8M0"},
    {"linear", "mxfp4-32/floor/mbs-search@8x2", ".weight.codes", ".weight.scales", "", 32, "F8_E8M0", 8},
    {"linear", "mxfp4-32/floor/mbs-static@16x2", ".weight.codes", ".weight.scales", "", 32, "F8_E8M0", 16},
};

/// The modules that hold a weight: one for each expert, where readers of a layout want that.
std::vector<std::string> modules_of(const io::safetensors_tensor& tensor, const std::string& layout) {
  const std::string module = tensor.name().substr(0, tensor.name().size() - std::string(".weight").size());
  if (tensor.shape().size() == 2 || layout == "linear" || layout == "gpt-oss") return {module};
  const std::size_t dot = module.rfind('.');
  std::vector<std::string> out;
  for (std::size_t e = 0; e < tensor.shape()[0]; ++e) {
    out.push_back(module.substr(0, dot) + ".experts." + std::to_string(e) + module.substr(dot));
  }
  return out;
}

}  // namespace

TEST_CASE("each layout is read back by an independent reader, bit for bit") {
  const auto original = io::safetensors_file::open(model);
  for (const auto& c : layout_cases) {
    CAPTURE(c.layout, c.recipe);
    const temporary_directory folder;
    const std::string out = (folder / "out.safetensors").string();
    const auto run =
        run_program("quantize_checkpoint", {model, out, "--recipe", c.recipe, "--layout", c.layout}, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const auto written = reference::read_safetensors(out);
    CHECK(written.metadata.at("format") == "pt");
    CHECK(written.metadata.at("tetromino.recipe") == c.recipe);
    CHECK(written.metadata.count("quantization_config") == (c.layout == "linear" ? 0 : 1));

    std::size_t packed = 0, kept = 0;
    for (const auto& tensor : original) {
      const std::string& name = tensor.name();
      const bool keep = name.find("norm") != name.npos || name.find("embed") != name.npos ||
                        name.find("router") != name.npos || (c.layout == "gpt-oss" && name.find("attn") != name.npos);
      if (keep) {
        const auto& copy = written.tensors.at(name);
        CHECK(copy.dtype == "BF16");
        CHECK(std::equal(copy.bytes.begin(), copy.bytes.end(), tensor.bytes().begin(), tensor.bytes().end()));
        ++kept;
        continue;
      }
      std::vector<float> scales, decoded;
      for (const auto& module : modules_of(tensor, c.layout)) {
        const auto& codes = written.tensors.at(module + c.codes);
        const auto& block_scales = written.tensors.at(module + c.scales);
        CHECK(codes.dtype == "U8");
        CHECK(block_scales.dtype == c.scale_dtype);
        std::vector<float> own;
        if (!c.tensor_scale.empty()) {
          const auto& stored = written.tensors.at(module + c.tensor_scale);
          own.resize(stored.bytes.size() / 4);
          std::memcpy(own.data(), stored.bytes.data(), stored.bytes.size());
          for (float& scale : own) scale = c.layout == "compressed-tensors" ? 1.0f / scale : scale;
        }
        const auto factor = [&](std::size_t i) {  // rows are whole bytes of factors
          if (c.fine == 0) return 1.0f;
          const unsigned four = written.tensors.at(module + ".weight.macros").bytes[i / c.fine / 4];
          return 1.0f + static_cast<float>(four >> (i / c.fine % 4 * 2) & 3) / 4.0f;
        };
        for (std::size_t i = 0; i < codes.bytes.size() * 2; ++i) {
          const std::uint8_t scale = block_scales.bytes[i / c.block];
          decoded.push_back(
              e2m1_value(codes.bytes[i / 2], i) * factor(i) *
              (own.empty() ? e8m0_value(scale) : own[i / (codes.bytes.size() * 2 / own.size())] * e4m3_value(scale)));
        }
        scales.insert(scales.end(), own.begin(), own.end());
      }
      const auto expected = round_trip(tensor, c.recipe, scales);
      std::size_t wrong = 0;
      REQUIRE(decoded.size() == expected.data.size());
      for (std::size_t i = 0; i < decoded.size(); ++i) {
        wrong += tetromino::bfloat16(decoded[i]) != expected.data[i];
      }
      CHECK(wrong == 0);
      ++packed;
    }
    CHECK(packed == (c.layout == "gpt-oss" ? 12 : 28));
    CHECK(packed + kept == 42);

    const auto verified = run_program("verify_checkpoint", {model, out}, folder.path());
    INFO(verified.err);
    CHECK(verified.exit_code == 0);
    CHECK_THAT(verified.out, contains(std::to_string(packed) + " tensors packed as " + c.recipe));
  }
}

TEST_CASE("the second program finds a changed byte") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  REQUIRE(run_program("quantize_checkpoint", {model, out, "--recipe", "mxfp4-16/oas/mbs-search"}, folder.path())
              .exit_code == 0);
  const auto size = static_cast<long>(std::filesystem::file_size(out));
  for (const long position : {size / 3, size - 1}) {
    std::fstream file(out, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(position);
    const char byte = static_cast<char>(file.get() ^ 0x11);
    file.seekp(position);
    file.put(byte);
  }
  const auto run = run_program("verify_checkpoint", {model, out}, folder.path());
  CHECK(run.exit_code == 1);
  CHECK_THAT(run.err, contains("tensor '"));
}

TEST_CASE("a tensor of the least magnitudes has a scale that its reader can invert") {
  const temporary_directory folder;
  const std::string in = (folder / "in.safetensors").string(), name = "layers.0.mlp.up_proj.weight";
  std::vector<float> values(64 * 32, 1e-43f);
  auto writer =
      io::safetensors_writer::create(in, std::vector<io::tensor_declaration>{{name, io::dtype::F32, {64, 32}}});
  writer.append_values<float>(name, values);
  writer.finish();
  for (const std::string layout : {"linear", "modelopt", "compressed-tensors"}) {
    const std::string out = (folder / layout).string();
    const auto run =
        run_program("quantize_checkpoint", {in, out, "--recipe", "nvfp4/amax", "--layout", layout}, folder.path());
    INFO(run.err);
    CHECK(run.exit_code == 0);
  }
  const auto written = read_model(folder / "compressed-tensors");
  CHECK(first_float(written.at("layers.0.mlp.up_proj.weight_global_scale")) == 0x1p126f);
}

TEST_CASE("valid files that are unusual pack as usual ones do: data at odd places, metadata that are null") {
  const temporary_directory folder;
  const std::string name = "layers.0.mlp.up_proj.weight";
  const auto values = model_values({name, {64, 32}});
  std::string weights;
  for (const float value : values) {
    const auto bits = tetromino::bfloat16(value).bits;
    weights += {static_cast<char>(bits & 0xFF), static_cast<char>(bits >> 8)};
  }
  const auto tensor = [&](std::size_t begin) {
    return '"' + name + R"(":{"dtype":"BF16","shape":[64,32],"data_offsets":[)" + std::to_string(begin) + ',' +
           std::to_string(begin + weights.size()) + "]}";
  };
  const std::string flag = R"("flag":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]},)";
  const auto save = [&](const char* file, std::string header, const std::string& data, std::size_t multiple) {
    while ((8 + header.size()) % 8 != multiple) header += ' ';
    store_text(folder / file, length_prefix(header.size()) + header + data);
    return (folder / file).string();
  };
  const auto packed = [&](const std::string& in, const std::string& recipe) {
    const std::string out = in + "." + recipe.substr(0, recipe.find('/'));
    for (const auto& [program, arguments] : std::vector<std::pair<std::string, std::vector<std::string>>>{
             {"quantize_checkpoint", {in, out, "--recipe", recipe}}, {"verify_checkpoint", {in, out}}}) {
      const auto run = run_program(program, arguments, folder.path());
      INFO(in << ": " << run.err);
      CHECK(run.exit_code == 0);
    }
    auto tensors = read_model(out);
    tensors.erase("flag");
    return tensors;
  };
  for (const std::string recipe : {"mxfp4-32/oas", "nvfp4/min-error"}) {
    const auto bytes_of = [&](const std::string& in) {
      std::map<std::string, std::vector<std::uint8_t>> out;
      for (const auto& [part, stored] : packed(in, recipe)) out[part] = stored.bytes;
      return out;
    };
    const auto expected = bytes_of(save("usual", "{" + tensor(0) + "}", weights, 0));
    CHECK(expected.size() >= 2);
    CHECK(bytes_of(save("header_of_74", "{" + tensor(0) + "}", weights, 2)) == expected);
    CHECK(bytes_of(save("header_of_75", "{" + tensor(0) + "}", weights, 3)) == expected);
    CHECK(bytes_of(save("after_a_flag", "{" + flag + tensor(1) + "}", "\1" + weights, 0)) == expected);
    CHECK(bytes_of(save("null", R"({"__metadata__":null,)" + tensor(0) + "}", weights, 0)) == expected);
  }
}
