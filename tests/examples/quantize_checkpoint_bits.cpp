#include "check.hpp"

#include "examples/program.hpp"

#include <nlohmann/json.hpp>

#include <set>

/// Recipes within a budget of bits.

namespace {

using namespace tetromino_test;

const std::string model = data_file("moe-16x2.safetensors").string();

}  // namespace

TEST_CASE("bits where they matter: candidates for every weight within a budget") {
  const temporary_directory folder;
  const auto run = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), model);
    const auto ran = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(ran.err);
    REQUIRE(ran.exit_code == 0);
    return ran.out;
  };
  double before = 1e300;
  for (const std::string bits : {"4.26", "4.4", "4.6", "5"}) {
    CAPTURE(bits);
    const std::string out = (folder / (bits + ".safetensors")).string();
    const std::vector<std::string> wanted = {out, "--bits", bits, "--candidates", "mxfp4-32/oas,nvfp4/amax,keep"};
    auto dry = wanted;
    dry.insert(dry.end(), {"--dry-run", "--json", "--threads", "1"});
    const auto planned = nlohmann::json::parse(run(dry));
    CHECK_FALSE(std::filesystem::exists(out));
    auto as_json = wanted;
    as_json.push_back("--json");
    const auto written = nlohmann::json::parse(run(as_json));
    CHECK(planned["budget"] == written["budget"]);
    CHECK(written["budget"]["bits"] == std::stod(bits));
    CHECK(written["budget"]["candidates"] == nlohmann::json{"mxfp4-32/oas", "nvfp4/amax", "keep"});
    CHECK(written["budget"]["weights"] == 3407872);
    CHECK(written["budget"]["noise_to_signal"].get<double>() < before);
    before = written["budget"]["noise_to_signal"].get<double>();

    std::set<std::string> recipes;
    std::size_t stored = 0, weights = 0;
    for (std::size_t i = 0; i < written["tensors"].size(); ++i) {
      const auto &tensor = written["tensors"][i], &plan = planned["tensors"][i];
      for (const char* key : {"packed", "recipe", "why", "bits"})
        CHECK(tensor.value(key, nlohmann::json()) == plan.value(key, nlohmann::json()));
      const bool is_chosen = tensor["packed"].get<bool>() || tensor["why"] == "chosen, within the budget of bits";
      if (!is_chosen) continue;
      recipes.insert(tensor.value("recipe", "keep"));
      stored += tensor["bits"].get<std::size_t>();
      std::size_t elements = 1;
      for (const auto& size : tensor["shape"]) elements *= size.get<std::size_t>();
      weights += elements;
    }
    CHECK(weights == 3407872);
    CHECK(static_cast<double>(stored) / static_cast<double>(weights) == written["budget"]["reached"].get<double>());
    CHECK(static_cast<double>(stored) <= std::stod(bits) * static_cast<double>(weights));
    CHECK(recipes.size() > 1);
    const auto verified = run_program("verify_checkpoint", {model, out}, folder.path());
    CAPTURE(verified.err);
    CHECK(verified.exit_code == 0);
    CHECK_THAT(verified.out, contains("packing again gives the same bytes"));
  }
  const auto factors = nlohmann::json::parse(
      run({"--dry-run", "--json", "--bits", "4.4", "--candidates", "mxfp4-32/floor,mxfp4-32/floor/mbs-search@8x2"}));
  CHECK(factors["budget"]["reached"].get<double>() <= 4.4);
  CHECK(factors["budget"]["reached"].get<double>() > 4.35);
  const auto table = run({"--dry-run", "--bits", "5", "--candidates", "mxfp4-32/oas,keep"});
  CHECK_THAT(table, contains("--bits 5: 4.9"));
  CHECK_THAT(table, contains("kept       13   212992       16.000"));
}

TEST_CASE("bits where they matter: what cannot be chosen is said before any work") {
  const temporary_directory folder;
  const std::string out = (folder / "out").string();
  const auto fails = [&](std::vector<std::string> arguments, const std::string& message) {
    arguments.insert(arguments.begin(), {model, out});
    const auto run = run_program("quantize_checkpoint", arguments, folder.path());
    CAPTURE(run.out, run.err);
    CHECK(run.exit_code == 2);
    CHECK_THAT(run.err, contains(message));
    CHECK_FALSE(std::filesystem::exists(out));
  };
  fails({"--bits", "4.2", "--candidates", "mxfp4-32/oas,nvfp4/amax"},
        "--bits 4.2: expected a budget of at least 4.25 bits for each weight");
  fails({"--bits", "4.5"}, "--bits requires --candidates");
  fails({"--candidates", "mxfp4-32/oas"}, "--candidates requires --bits");
  fails({"--bits", "0", "--candidates", "mxfp4-32/oas"}, "--bits");
  fails({"--bits", "4.5", "--candidates", "keep"}, "--candidates: expected a recipe besides keep");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas,nvfp5"}, "unknown format \"nvfp5\"");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas,nvfp4/amax", "--layout", "modelopt"},
        "layout modelopt stores nvfp4, not mxfp4-32");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas,nvfp4/amax", "--layout", "gpt-oss"},
        "layout gpt-oss stores mxfp4-32, not nvfp4");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas/mbs-search@8x2", "--layout", "gpt-oss"},
        "layout gpt-oss stores mxfp4-32, not mxfp4-32 with macro blocks");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas/gptq,nvfp4/amax"}, "needs --statistics FILE");
  fails({"--bits", "4.5", "--candidates", "mxfp4-32/oas", "--recipe", "nvfp4/amax"},
        "--recipe nvfp4/amax is for all weights: with --bits, give it to --candidates");
  const auto compared = run_program(
      "quantize_checkpoint", {model, "--compare", "--bits", "4.5", "--candidates", "mxfp4-32/oas"}, folder.path());
  CHECK(compared.exit_code == 2);
  CHECK_THAT(compared.err, contains("excludes"));
  const auto gguf = run_program("quantize_checkpoint",
                                {"in.gguf", out, "--bits", "4.5", "--candidates", "mxfp4-32/oas"}, folder.path());
  CHECK(gguf.exit_code == 2);
  CHECK_THAT(gguf.err, contains("--bits is for safetensors"));
}
