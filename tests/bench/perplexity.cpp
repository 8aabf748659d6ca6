/// The perplexity table: what each recipe makes of the bundled model on all its held-out documents, beside the values
/// that another implementation computed. Exits with 1 if the perplexity over all documents is further from its
/// reference than half a percent.
///
///   bench_perplexity [DATA-FOLDER [THREADS]]

#include "support/perplexity.hpp"

#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>

namespace {

using namespace tetromino_test;

int run(const std::filesystem::path& folder, std::size_t threads) {
  const auto file = moe_lm::io::safetensors_file::open(folder / "moe-16x2.safetensors");
  const moe_lm::documents text(moe_lm::io::safetensors_file::open(folder / "moe-16x2.heldout.safetensors"),
                               moe_lm::shape(file).vocab);
  std::vector<std::size_t> chosen(text.count());
  std::iota(chosen.begin(), chosen.end(), std::size_t{0});

  std::printf("%-25s %-25s", "weights", "activations");
  for (const auto& name : text.domain_names) std::printf(" %15s", name.c_str());
  std::printf(" %15s %8s\n", "all", "seconds");
  bool close = true;
  for (const auto& row : perplexity_table) {
    const whole_model model(file, moe_lm::precision::parse(row.weights, row.activations));
    const auto start = std::chrono::steady_clock::now();
    const auto got = perplexities(text, chosen, model.losses(text, chosen, threads));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-25s %-25s", row.weights, row.activations);
    for (std::size_t g = 0; g < got.size(); ++g) {
      if (row.expected[g] == 0) {
        std::printf(" %7.3f        ", got[g]);
      } else {
        std::printf(" %7.3f %+6.2f%%", got[g], 100 * (got[g] / row.expected[g] - 1));
      }
    }
    std::printf(" %8.2f\n", seconds);
    close = close && std::abs(got.back() / row.expected[4] - 1) <= 0.005;
  }
  std::printf("percentages: difference from the reference; over all documents at most 0.50 %% is %s\n",
              close ? "kept" : "NOT kept");
  return close ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::size_t threads = argc > 2 ? std::stoul(argv[2]) : std::max(1u, std::thread::hardware_concurrency());
    return run(argc > 1 ? argv[1] : "examples/data", threads);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_perplexity: %s\n", e.what());
    return 1;
  }
}
