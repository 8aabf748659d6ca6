#include "support/model_folder.hpp"

#include "../../examples/tools/input_statistics.hpp"
#include "examples/program.hpp"
#include "support/safetensors_files.hpp"

#include <tetromino/io/safetensors.hpp>

#include <cmath>
#include <random>
#include <set>
#include <sstream>

/// Weights packed for their inputs, of which a file has statistics.

namespace {

namespace io = tetromino::io;
using namespace tetromino_test;

const std::string model = data_file("moe-16x2.safetensors").string();

}  // namespace

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
  for (std::size_t e = 0; e < experts; ++e) seen.input("moe", experts, cols).add(e, inputs(e == 0 ? 0 : 300));
  const std::vector<float> original = inputs(300);
  std::vector<float> met = original;  // the layers before are packed
  for (float& v : met) v *= 0.995f;
  seen.input("attn", 1, cols).add(0, original, met);
  seen.save(path("statistics"));
  const auto read = input_statistics::load(path("statistics"));
  CHECK(read.column_weights("moe.up.weight", 1, experts, cols, 16) ==
        seen.column_weights("moe.up.weight", 1, experts, cols, 16));
  CHECK(read.of("attn.o.weight", 0, 1, cols).drift() == seen.of("attn.o.weight", 0, 1, cols).drift());
  CHECK(read.of("moe.up.weight", 0, experts, cols).drift().size() == 0);
  CHECK(read.of("moe.up.weight", 0, experts, cols).rows() == input_statistics::borrowed_rows(cols));

  for (const char* name : {"mxfp4-32/min-error/mbs-search@32/gptq", "nvfp4/min-error/hadamard-16"}) {
    CAPTURE(name);
    const auto run = run_program(
        "quantize_checkpoint",
        {path("in"), path("out.safetensors"), "--recipe", name, "--statistics", path("statistics")}, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    const auto again = run_program(
        "verify_checkpoint", {path("in"), path("out.safetensors"), "--statistics", path("statistics")}, folder.path());
    CHECK_THAT(again.out, contains("packing again gives the same bytes"));
    CHECK(run_program("verify_checkpoint", {path("in"), path("out.safetensors")}, folder.path()).exit_code == 0);
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
    CHECK(run.exit_code != 0);
    CHECK_THAT(run.err, contains(message));
  };
  fails({path("in"), path("none"), "--recipe", "mxfp4-32/oas/gptq"}, "needs --statistics FILE");
  fails({path("in"), path("statistics"), "--statistics", path("statistics")},
        "expected another file than the statistics");
  fails({model, path("none"), "--statistics", path("statistics")},
        "no calibration statistics for the weights layers.0");
  fails({path("in"), path("none"), "--statistics", path("in")}, "no statistics in it");
}

TEST_CASE("statistics of a directory weigh errors and give activations their scales, expert by expert") {
  constexpr std::size_t cols = 64;
  const temporary_directory folder;
  const auto path = [&](const char* name) { return (folder / name).string(); };
  const std::string layer = "model.layers.0.", experts = layer + "mlp.experts.";
  std::vector<model_tensor> tensors = {{layer + "self_attn.q_proj.weight", {32, cols}},
                                       {layer + "mlp.gate.weight", {2, cols}}};
  for (const std::string expert : {"0.", "1."}) {
    for (const char* part : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {
      tensors.push_back({experts + expert + part, {cols, cols}});
    }
  }
  write_model(folder / "in", {{"hidden_size", cols}, {"num_experts", 2}}, tensors);
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  input_statistics seen;
  const auto add = [&](const std::string& input, std::size_t which, std::size_t matrices, float largest) {
    std::vector<float> rows(cols * 100);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = (i % cols < 4 ? 0.1f : 0.001f) * normal(random);
    rows.front() = -largest;
    seen.input(input, matrices, cols).add(which, rows);
  };
  seen.name(layer + "self_attn.q_proj.weight", "q");
  add("q", 0, 1, 3.0f);
  for (const char* part : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) {  // of the stack
    seen.name(experts + part, std::string(part) == "down_proj.weight" ? "down" : "in");
  }
  for (std::size_t e = 0; e < 2; ++e) {
    add("in", e, 2, 5.0f + static_cast<float>(e));
    add("down", e, 2, 7.0f + static_cast<float>(e));
  }
  seen.save(path("statistics"));
  const std::map<std::string, float> largest = {{layer + "self_attn.q_proj", 3.0f},
                                                {experts + "0.gate_proj", 5.0f},
                                                {experts + "1.up_proj", 6.0f},
                                                {experts + "0.down_proj", 7.0f},
                                                {experts + "1.down_proj", 8.0f}};
  for (const auto& [layout, end] : std::map<std::string, std::string>{{"modelopt", ".input_scale"},
                                                                      {"compressed-tensors", ".input_global_scale"}}) {
    CAPTURE(layout);
    const std::string out = layout, fed = layout + "-fed";
    const auto pack = [&](const char* to, const std::string& recipe) {
      return run_program(
          "quantize_checkpoint",
          {path("in"), path(to), "--recipe", recipe, "--layout", out, "--statistics", path("statistics")},
          folder.path());
    };
    for (const auto& [to, recipe] :
         std::map<std::string, std::string>{{out, "nvfp4/min-error"}, {fed, "nvfp4/min-error/gptq"}}) {
      const auto run = pack(to.c_str(), recipe);
      INFO(run.err);
      REQUIRE(run.exit_code == 0);
      const auto verified = run_program(
          "verify_checkpoint", {path("in"), path(to.c_str()), "--statistics", path("statistics")}, folder.path());
      CAPTURE(verified.err);
      CHECK_THAT(verified.out, contains("packing again gives the same bytes"));
    }
    const auto written = read_model(folder / out);
    for (const auto& [module, amax] : largest) {
      CAPTURE(module);
      const float stored = first_float(written.at(module + end));
      const float scale = layout == "modelopt" ? stored : 1.0f / stored;
      CHECK(std::abs(scale / (amax / (6.0f * 448.0f)) - 1) < 1e-6f);
    }
    CHECK(written.count(layer + "mlp.gate.input_scale") == 0);
    const std::string codes = layout == "modelopt" ? ".weight" : ".weight_packed";
    CHECK(written.at(experts + "1.up_proj" + codes).bytes !=
          read_model(folder / fed).at(experts + "1.up_proj" + codes).bytes);
  }
  CHECK(read_json(folder / "modelopt/config.json")["quantization_config"]["quant_algo"] == "NVFP4");

  const auto chosen =
      run_program("quantize_checkpoint",
                  {path("in"), path("chosen"), "--bits", "5.5", "--candidates", "nvfp4/amax,nvfp4/amax/gptq,keep",
                   "--layout", "modelopt", "--statistics", path("statistics"), "--json"},
                  folder.path());
  INFO(chosen.err);
  REQUIRE(chosen.exit_code == 0);
  // by products with the inputs, error feedback wins wherever a weight is packed
  const auto tensors_chosen = nlohmann::json::parse(chosen.out).at("tensors");
  std::set<std::string> recipes;
  for (const auto& tensor : tensors_chosen) {
    if (tensor["packed"].get<bool>()) recipes.insert(tensor["recipe"].get<std::string>());
  }
  CHECK(recipes == std::set<std::string>{"nvfp4/amax/gptq"});
  const auto again =
      run_program("verify_checkpoint", {path("in"), path("chosen"), "--statistics", path("statistics")}, folder.path());
  CHECK_THAT(again.out, contains("packing again gives the same bytes"));

  rewrite(folder / "statistics",
          [](reference::stored_file& f) { f.metadata.erase("model.layers.0.self_attn.q_proj.weight"); });
  const auto unknown = run_program(
      "quantize_checkpoint",
      {path("in"), path("none"), "--recipe", "nvfp4/amax", "--layout", "modelopt", "--statistics", path("statistics")},
      folder.path());
  CHECK(unknown.exit_code == 1);
  CHECK_THAT(unknown.err, contains("no calibration statistics for the weights model.layers.0.self_attn.q_proj.weight"));
  CHECK_FALSE(std::filesystem::exists(folder / "none"));
}
