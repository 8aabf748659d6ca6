#pragma once

/// Models of gigabytes, and what packing them costs beside a copy.

#include "check.hpp"

#include "examples/program.hpp"
#include "support/model_folder.hpp"
#include "support/safetensors_files.hpp"

#include <tetromino/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>   // std::max, std::min
#include <chrono>      // std::chrono::steady_clock
#include <cstdio>      // std::printf
#include <filesystem>  // std::filesystem
#include <random>      // std::mt19937_64
#include <string>      // std::string
#include <vector>      // std::vector

namespace tetromino_test {

/// A model of normal numbers in shards of 5 GB at most: matrices [8192, 8192], or stacks [16, 2880, 5760] as gpt-oss
/// has them, which are read against their grain.
inline void write_large_model(const std::filesystem::path& folder, std::size_t weights, bool is_stacked) {
  const std::vector<std::size_t> shape =
      is_stacked ? std::vector<std::size_t>{16, 2880, 5760} : std::vector<std::size_t>{8192, 8192};
  const std::string name = is_stacked ? ".mlp.experts.gate_up_proj" : ".mlp.fc1.weight";
  std::vector<tetromino::bfloat16> piece(2880 * 128);
  std::mt19937_64 random(tetromino_test::seed());
  std::normal_distribution<float> normal;
  for (auto& value : piece) value = tetromino::bfloat16(normal(random));
  std::filesystem::create_directories(folder);
  nlohmann::json map;
  const std::size_t in_shard = 5'000'000'000 / (2 * product(shape));
  for (std::size_t first = 0; first < weights; first += in_shard) {
    const std::string file = "model-" + std::to_string(first) + "-of-" + std::to_string(weights) + ".safetensors";
    std::vector<tetromino::io::tensor_declaration> declarations;
    for (std::size_t w = first; w < std::min(weights, first + in_shard); ++w) {
      declarations.push_back({"model.layers." + std::to_string(w) + name, tetromino::io::dtype::BF16, shape});
      map[declarations.back().name] = file;
    }
    auto writer = tetromino::io::safetensors_writer::create(folder / file, declarations);
    for (const auto& d : declarations) {
      for (std::size_t left = product(shape); left > 0;) {
        const std::size_t n = std::min(left, piece.size());
        writer.append_values<tetromino::bfloat16>(d.name, std::span(piece).first(n));
        left -= n;
      }
    }
    writer.finish();
  }
  store_text(folder / "config.json", is_stacked ? R"({"model_type": "gpt_oss", "hidden_size": 2880})" : "{}");
  store_text(folder / "model.safetensors.index.json", nlohmann::json{{"weight_map", map}}.dump());
}

/// What a command took.
struct cost {
  double wall = 1e9;  ///< seconds
  double cpu = 1e9;   ///< seconds, of all threads
  std::size_t peak_bytes = 0;
  std::string err{};  ///< of the last run
};

/// The least of so many runs of a command that makes `out`.
inline cost cost_of(const std::vector<std::string>& command, const std::filesystem::path& out, std::size_t runs) {
  cost best;
  for (std::size_t i = 0; i < runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const auto run = run_command(command, out.parent_path());
    best.wall = std::min(best.wall, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
    best.cpu = std::min(best.cpu, run.cpu_seconds);
    best.peak_bytes = std::max(best.peak_bytes, run.peak_bytes);
    best.err = run.err;
    std::filesystem::remove_all(out);
  }
  return best;
}

/// Packs a model by a recipe of each class, and says what that costs beside cp, the page cache warm where it fits.
inline void beside_cp(const temporary_directory& folder, bool is_stacked, std::size_t runs) {
  const std::string in = (folder / "in").string(), out = (folder / "out").string();
  const auto copied = cost_of({"cp", "-r", in, out}, out, 2);
  std::printf("%-24s %-19s %8s %8s %10s %9s\n", "recipe", "layout", "wall s", "CPU s", "cp's rate", "peak MiB");
  std::printf("%-24s %-19s %8.2f %8.2f\n", "cp -r", "", copied.wall, copied.cpu);
  const std::string fours = is_stacked ? "gpt-oss" : "compressed-tensors",
                    nines = is_stacked ? "modelopt" : "compressed-tensors";
  for (const auto& [recipe, layout] :
       std::vector<std::pair<std::string, std::string>>{{"mxfp4-32/floor", fours},
                                                        {"mxfp4-32/oas", fours},
                                                        {"nvfp4/amax", nines},
                                                        {"mxfp4-32/oas/mbs-static", "linear"},
                                                        {"nvfp4/four-over-six", nines},
                                                        {"mxfp4-32/min-error", fours}}) {
    const auto packed =
        cost_of({program_path("quantize_checkpoint"), in, out, "--recipe", recipe, "--layout", layout}, out, runs);
    std::printf("%-24s %-19s %8.2f %8.2f %9.0f%% %9zu\n", recipe.c_str(), layout.c_str(), packed.wall, packed.cpu,
                100 * copied.wall / packed.wall, packed.peak_bytes >> 20);
    std::fflush(stdout);
    if (tetromino_test::measures_memory) CHECK(packed.peak_bytes < (256u << 20));
    if (packed.wall > 10) CHECK_THAT(packed.err, contains("packing ") && contains(" s left"));
  }
}

}  // namespace tetromino_test
