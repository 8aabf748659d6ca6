#include "check.hpp"

#include "../../examples/tools/input_statistics.hpp"
#include "examples/program.hpp"
#include "reference/numbers.hpp"
#include "reference/safetensors_reader.hpp"

#include <tetromino/io/safetensors.hpp>
#include <tetromino/tetromino.hpp>

#include <cmath>
#include <cstring>
#include <random>
#include <sstream>

namespace {

namespace io = tetromino::io;
using tetromino_test::contains;
using tetromino_test::data_file;
using tetromino_test::run_program;
using tetromino_test::temporary_directory;

const std::string model = data_file("moe-16x2.safetensors").string();

/// The value of a stored 4-bit element, from the description of the formats.
float element(std::uint8_t pair, std::size_t k) {
  static const float values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const int code = (pair >> (4 * (k % 2))) & 15;
  return code < 8 ? values[code] : -values[code - 8];
}

float e8m0_value(std::uint8_t b) { return std::ldexp(1.0f, b - 127); }
float e4m3_value(std::uint8_t b) {
  const int exponent = b >> 3, mantissa = b & 7;
  return exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                       : std::ldexp(1.0f + static_cast<float>(mantissa) / 8, exponent - 7);
}

float first_float(const reference::stored_tensor& tensor) {
  float value;
  std::memcpy(&value, tensor.bytes.data(), sizeof value);
  return value;
}

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
};

const std::vector<layout_case> layout_cases = {
    {"gpt-oss", "mxfp4-32/oas", "_blocks", "_scales", "", 32, "U8"},
    {"compressed-tensors", "mxfp4-32/even", ".weight_packed", ".weight_scale", "", 32, "U8"},
    {"compressed-tensors", "nvfp4/amax", ".weight_packed", ".weight_scale", ".weight_global_scale", 16, "F8_E4M3"},
    {"modelopt", "nvfp4/four-over-six", ".weight", ".weight_scale", ".weight_scale_2", 16, "F8_E4M3"},
    {"linear", "nvfp4/min-error", ".weight.codes", ".weight.scales", ".weight.tensor_scales", 16, "F8_E4M3"},
    {"linear", "mxfp4-16/floor", ".weight.codes", ".weight.scales", "", 16, "F8_E8M0"},
};

}  // namespace

TEST_CASE("each layout is read back by an independent reader") {
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
      const bool keep =
          name.find("norm") != name.npos || name.find("embed") != name.npos || name.find("router") != name.npos;
      if (keep) {
        const auto& copy = written.tensors.at(name);
        CHECK(copy.dtype == "BF16");
        CHECK(std::equal(copy.bytes.begin(), copy.bytes.end(), tensor.bytes().begin(), tensor.bytes().end()));
        ++kept;
        continue;
      }
      const std::string stem = name.substr(0, name.size() - std::string(".weight").size());
      const auto& codes = written.tensors.at(stem + c.codes);
      const auto& scales = written.tensors.at(stem + c.scales);
      CHECK(codes.dtype == "U8");
      CHECK(scales.dtype == c.scale_dtype);
      float factor = 1;
      std::vector<float> given;
      if (!c.tensor_scale.empty()) {
        const float stored = first_float(written.tensors.at(stem + c.tensor_scale));
        factor = c.layout == "compressed-tensors" ? 1.0f / stored : stored;
        given = {factor};
      }
      const auto expected = round_trip(tensor, c.recipe, given);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < expected.data.size(); ++i) {
        const std::uint8_t scale = scales.bytes[i / c.block];
        const float value =
            element(codes.bytes[i / 2], i) * (given.empty() ? e8m0_value(scale) : factor * e4m3_value(scale));
        wrong += tetromino::bfloat16(value) != expected.data[i];
      }
      CHECK(wrong == 0);
      ++packed;
    }
    CHECK(packed == 28);
    CHECK(kept == 14);

    const auto verified = run_program("verify_checkpoint", {model, out}, folder.path());
    INFO(verified.err);
    CHECK(verified.exit_code == 0);
    CHECK_THAT(verified.out, contains("28 tensors packed as " + c.recipe));
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
  CHECK_THAT(run.err, contains("tensor \""));
}

TEST_CASE("recipes side by side: one line each, with bits and QSNR") {
  const temporary_directory folder;
  const auto run = run_program("quantize_checkpoint",
                               {model, "--compare", "--recipe", "mxfp4-32/floor", "--recipe", "nvfp4/amax", "--recipe",
                                "mxfp4-16/oas/mbs-search"},
                               folder.path());
  REQUIRE(run.exit_code == 0);
  std::istringstream lines(run.out);
  std::map<std::string, std::pair<double, double>> rows;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    double bits = 0, qsnr = 0;
    if (words >> name >> bits >> qsnr) rows[name] = {bits, qsnr};
  }
  // Figures of an independent implementation.
  CHECK(rows.at("mxfp4-32/floor").first == 4.25);
  CHECK(std::abs(rows.at("mxfp4-32/floor").second - 18.66) < 0.03);
  CHECK(std::abs(rows.at("nvfp4/amax").second - 20.46) < 0.03);
  CHECK(std::abs(rows.at("mxfp4-16/oas/mbs-search").second - 20.12) < 0.03);
}

TEST_CASE("what cannot be done is said in one line, and leaves no file") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  const auto fails = [&](const std::vector<std::string>& arguments, const std::string& message) {
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(run.out, run.err);
    CHECK(run.exit_code == 1);
    CHECK_THAT(run.err, contains(message));
    CHECK_FALSE(std::filesystem::exists(out));
  };
  fails({model, out, "--recipe", "mxfp4-64/oas"}, "unknown format \"mxfp4-64\"");
  fails({model, out, "--recipe", "mxfp4-16/oas", "--layout", "gpt-oss"},
        "layout gpt-oss stores mxfp4-32, not mxfp4-16");
  fails({model, out, "--layout", "gguf"}, "unknown layout \"gguf\"; there are linear, gpt-oss");
  fails({model}, "expected OUT.safetensors");

  const std::string bad = (folder / "bad.safetensors").string();
  std::vector<float> values(64 * 32, 1.0f);
  values[5 * 32 + 7] = NAN;
  auto writer =
      io::safetensors_writer::create(bad, std::vector<io::tensor_declaration>{{"w", io::dtype::F32, {64, 32}}});
  writer.append_values<float>("w", values);
  writer.finish();
  fails({bad, out}, "tensor \"w\": expected finite values, got NaN at row 5, column 7");
}

TEST_CASE("statistics of the weights' inputs make products err less") {
  const temporary_directory folder;
  const auto path = [&](const char* name) { return (folder / name).string(); };
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  const auto numbers = [&](std::size_t n) {
    std::vector<float> out(n);
    for (float& v : out) v = normal(random);
    return out;
  };
  constexpr std::size_t experts = 3, rows = 32, cols = 64;
  auto writer = io::safetensors_writer::create(
      path("in"), std::vector<io::tensor_declaration>{{"moe.up.weight", io::dtype::F32, {experts, rows, cols}},
                                                      {"attn.o.weight", io::dtype::F32, {rows, cols}}});
  writer.append_values<float>("moe.up.weight", numbers(experts * rows * cols));
  writer.append_values<float>("attn.o.weight", numbers(rows * cols));
  writer.finish();

  input_statistics seen;
  seen.name("moe.up.weight", "moe");
  seen.name("attn.o.weight", "attn");
  const std::vector<float> mix = numbers(8 * cols);
  const auto inputs = [&](std::size_t n) {  // eight causes and noise
    std::vector<float> x = numbers(n * cols);
    for (std::size_t r = 0; r < n; ++r) {
      for (std::size_t c = 0; c < 8; ++c) {
        const float cause = normal(random);
        for (std::size_t k = 0; k < cols; ++k) x[r * cols + k] += 2 * cause * mix[c * cols + k];
      }
    }
    return x;
  };
  for (std::size_t e = 0; e < experts; ++e) seen.add("moe", e, experts, inputs(e == 0 ? 0 : 300), cols);
  seen.add("attn", 0, 1, inputs(300), cols);
  seen.save(path("statistics"));
  const auto read = input_statistics::load(path("statistics"));
  CHECK(read.column_weights("moe.up.weight", 1, experts, cols, 16) ==
        seen.column_weights("moe.up.weight", 1, experts, cols, 16));
  CHECK(read.of("moe.up.weight", 0, experts, cols).rows() == input_statistics::borrowed_rows(cols));

  for (const char* name : {"mxfp4-32/min-error/mbs-search@32/gptq", "nvfp4/min-error/hadamard-16"}) {
    CAPTURE(name);
    const auto run =
        run_program("quantize_checkpoint",
                    {path("in"), path("out"), "--recipe", name, "--statistics", path("statistics")}, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const auto again =
        run_program("verify_checkpoint", {path("in"), path("out"), "--statistics", path("statistics")}, folder.path());
    CHECK_THAT(again.out, contains("packing again gives the same bytes"));
    CHECK(run_program("verify_checkpoint", {path("in"), path("out")}, folder.path()).exit_code == 0);
  }

  // weights and products, in dB
  const auto compared = run_program("quantize_checkpoint",
                                    {path("in"), "--compare", "--statistics", path("statistics"), "--recipe",
                                     "mxfp4-32/oas", "--recipe", "mxfp4-32/oas/gptq"},
                                    folder.path());
  std::istringstream lines(compared.out);
  std::map<std::string, double> products;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string recipe;
    double bits = 0, qsnr = 0;
    if (words >> recipe >> bits >> qsnr) words >> products[recipe];
  }
  CHECK(products.at("mxfp4-32/oas/gptq") > products.at("mxfp4-32/oas") + 3);

  const auto fails = [&](const std::vector<std::string>& arguments, const std::string& message) {
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CHECK(run.exit_code == 1);
    CHECK_THAT(run.err, contains(message));
  };
  fails({path("in"), path("none"), "--recipe", "mxfp4-32/oas/gptq"}, "needs --statistics FILE");
  fails({model, path("none"), "--statistics", path("statistics")},
        "no calibration statistics for the weights layers.0");
  fails({path("in"), path("none"), "--statistics", path("in")}, "no statistics in it");
}

TEST_CASE("patterns keep tensors as they are") {
  const temporary_directory folder;
  const std::string out = (folder / "out.safetensors").string();
  REQUIRE(run_program("quantize_checkpoint", {model, out, "--keep", "*.attn.*"}, folder.path()).exit_code == 0);
  const auto written = reference::read_safetensors(out);
  CHECK(written.tensors.count("layers.0.attn.q.weight") == 1);
  CHECK(written.tensors.count("layers.0.moe.up.weight") == 0);
}

TEST_CASE("a gigabyte passes through bounded memory") {
  const temporary_directory folder;
  const std::string in = (folder / "in.safetensors").string(), out = (folder / "out.safetensors").string();
  constexpr std::size_t rows = 1 << 14, cols = 1 << 14, tensors = 2;  // 512 MiB of bfloat16 each
  {
    std::vector<io::tensor_declaration> declarations;
    for (std::size_t t = 0; t < tensors; ++t)
      declarations.push_back({"w" + std::to_string(t), io::dtype::BF16, {rows, cols}});
    auto writer = io::safetensors_writer::create(in, declarations);
    std::vector<tetromino::bfloat16> piece(cols * 128);
    std::uint64_t state = tetromino_test::seed();
    for (auto& value : piece) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      value = tetromino::bfloat16(static_cast<float>(static_cast<std::int64_t>(state) >> 40) * 0x1p-23f);
    }
    for (const auto& d : declarations) {
      for (std::size_t r = 0; r < rows; r += 128) writer.append_values<tetromino::bfloat16>(d.name, piece);
    }
    writer.finish();
  }
  const auto run = run_program("quantize_checkpoint", {in, out, "--recipe", "mxfp4-32/oas"}, folder.path());
  INFO(run.err);
  REQUIRE(run.exit_code == 0);
  constexpr std::size_t slice = 4u << 20;  // what the program converts at a time
  CAPTURE(run.peak_bytes);
  if (tetromino_test::measures_memory) CHECK(run.peak_bytes < (64u << 20) + 2 * slice);
  CHECK(std::filesystem::file_size(out) > (tensors * rows * cols) * 17 / 32);
}
