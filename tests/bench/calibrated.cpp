/// What searched scales, calibration, rotation and error feedback gain one after the other: perplexity of the bundled
/// model with 4-bit weights and activations (W4A4) or weights alone (W4A16). Calibrated on half of the held-out
/// documents and judged on the other half, then the other way around; figures are the mean of both. The share is of
/// what OCP MXFP4 (mxfp4-32/floor, uncalibrated) adds to the perplexity of float32 in the same run.
///
///   bench_calibrated [steps | rotation | cost] [THREADS [DOCUMENTS [DATA-FOLDER]]]

#include "../../examples/tools/moe/calibrate.hpp"
#include "bench/bench.hpp"
#include "support/perplexity.hpp"

#include <array>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <random>

namespace {

using namespace tetromino_test;

/// Both halves of the documents, and what each says to weights that are judged on the other.
class judge {
 public:
  judge(const std::filesystem::path& folder, std::size_t threads, std::size_t documents)
      : file_(moe_lm::io::safetensors_file::open(folder / "moe-16x2.safetensors")),
        text_(moe_lm::io::safetensors_file::open(folder / "moe-16x2.heldout.safetensors"), moe_lm::shape(file_).vocab),
        threads_(threads) {
    const std::size_t all = text_.count(), wanted = documents == 0 ? all : std::min(documents, all);
    for (std::size_t i = 0; i < wanted; ++i) halves_[i % 2].push_back(i * all / wanted);
    const double begin = bench::wall_seconds();
    std::vector<std::thread> helpers;
    for (std::size_t h = 0; h < 2; ++h) {
      helpers.emplace_back(
          [&, h] { statistics_[h] = moe_lm::gather_statistics(file_, text_, halves_[h], [](std::size_t) {}); });
    }
    for (auto& helper : helpers) helper.join();
    std::printf("calibrated on %zu and %zu documents in %.1f s\n", halves_[0].size(), halves_[1].size(),
                bench::wall_seconds() - begin);
    const std::string none = "float32", ocp = "mxfp4-32/floor";
    least_ = of(none, none, false).perplexity;
    most_w4a4_ = of(ocp, ocp, false).perplexity;
    most_w4a16_ = of(ocp, none, false).perplexity;
    std::printf("float32: %.3f; %s: W4A4 %.3f, W4A16 %.3f\n\n", least_, ocp.c_str(), most_w4a4_, most_w4a16_);
  }

  struct verdict {
    double perplexity = 0;
    double pack_seconds = 0;  ///< for each half, all weights
  };

  [[nodiscard]] verdict of(const std::string& weights, const std::string& activations, bool calibrated) const {
    verdict out;
    for (std::size_t h = 0; h < 2; ++h) {
      auto rounding = moe_lm::precision::parse(weights, activations);
      if (calibrated) rounding.seen = &statistics_[1 - h];
      const double begin = bench::thread_seconds();
      const whole_model model(file_, rounding);
      out.pack_seconds += (bench::thread_seconds() - begin) / 2;
      out.perplexity += perplexities(text_, halves_[h], model.losses(text_, halves_[h], threads_)).back() / 2;
    }
    return out;
  }

  [[nodiscard]] double share_w4a4(double perplexity) const { return (perplexity - least_) / (most_w4a4_ - least_); }
  [[nodiscard]] double share_w4a16(double perplexity) const { return (perplexity - least_) / (most_w4a16_ - least_); }

 private:
  moe_lm::io::safetensors_file file_;
  moe_lm::documents text_;
  std::size_t threads_;
  std::array<std::vector<std::size_t>, 2> halves_;
  std::array<input_statistics, 2> statistics_;
  double least_ = 0, most_w4a4_ = 1, most_w4a16_ = 1;
};

struct step {
  const char* what;
  const char* weights;
  const char* activations;
  bool calibrated = false;
};

constexpr step steps[] = {
    {"MXFP4-32: floor", "mxfp4-32/floor", "mxfp4-32/floor"},
    {"  OAS", "mxfp4-32/oas", "mxfp4-32/oas"},
    {"  + MBS, hybrid", "mxfp4-32/oas/mbs-search", "mxfp4-32/oas/mbs-static"},
    {"  + joint search, M = 128", "mxfp4-32/min-error/mbs-search256", "mxfp4-32/min-error/mbs-search"},
    {"  M = 64", "mxfp4-32/min-error/mbs-search256@64", "mxfp4-32/min-error/mbs-search@64"},
    {"  M = 32", "mxfp4-32/min-error/mbs-search256@32", "mxfp4-32/min-error/mbs-search@32"},
    {"  + weighted", "mxfp4-32/min-error/mbs-search256@32", "mxfp4-32/min-error/mbs-search@32", true},
    {"  + rotation", "mxfp4-32/min-error/mbs-search256@32/hadamard-128", "mxfp4-32/min-error/mbs-search@32", true},
    {"  + GPTQ", "mxfp4-32/min-error/mbs-search256@32/hadamard-128/gptq", "mxfp4-32/min-error/mbs-search@32", true},
    {"  GPTQ, not rotated", "mxfp4-32/min-error/mbs-search256@32/gptq", "mxfp4-32/min-error/mbs-search@32", true},
    {"  the same, M = 64", "mxfp4-32/min-error/mbs-search256@64/gptq", "mxfp4-32/min-error/mbs-search@64", true},
    {"  the same, M = 128", "mxfp4-32/min-error/mbs-search256/gptq", "mxfp4-32/min-error/mbs-search", true},
    {"  GPTQ on OAS alone", "mxfp4-32/oas/gptq", "mxfp4-32/oas", true},

    {"MXFP4-16: floor", "mxfp4-16/floor", "mxfp4-16/floor"},
    {"  OAS", "mxfp4-16/oas", "mxfp4-16/oas"},
    {"  + MBS, hybrid", "mxfp4-16/oas/mbs-search", "mxfp4-16/oas/mbs-static"},
    {"  + joint search, M = 128", "mxfp4-16/min-error/mbs-search256", "mxfp4-16/min-error/mbs-search"},
    {"  + weighted", "mxfp4-16/min-error/mbs-search256", "mxfp4-16/min-error/mbs-search", true},
    {"  + rotation", "mxfp4-16/min-error/mbs-search256/hadamard-128", "mxfp4-16/min-error/mbs-search", true},
    {"  + GPTQ", "mxfp4-16/min-error/mbs-search256/hadamard-128/gptq", "mxfp4-16/min-error/mbs-search", true},
    {"  GPTQ, not rotated", "mxfp4-16/min-error/mbs-search256/gptq", "mxfp4-16/min-error/mbs-search", true},

    {"NVFP4: amax", "nvfp4/amax", "nvfp4/amax"},
    {"  four over six", "nvfp4/four-over-six", "nvfp4/four-over-six"},
    {"  search of E4M3 codes", "nvfp4/min-error", "nvfp4/min-error"},
    {"  + weighted", "nvfp4/min-error", "nvfp4/min-error", true},
    {"  + rotation", "nvfp4/min-error/hadamard-16", "nvfp4/min-error", true},
    {"  + GPTQ", "nvfp4/min-error/hadamard-16/gptq", "nvfp4/min-error", true},
    {"  GPTQ, not rotated", "nvfp4/min-error/gptq", "nvfp4/min-error", true},
    {"  GPTQ on amax alone", "nvfp4/amax/gptq", "nvfp4/amax", true},
};

void show_steps(const judge& j) {
  std::printf("%-26s %-58s %-34s %5s %8s %6s %8s %6s %9s\n", "step", "weights", "activations", "bits", "W4A4", "share",
              "W4A16", "share", "pack s/M");
  for (const step& s : steps) {
    const auto both = j.of(s.weights, s.activations, s.calibrated);
    const auto alone = j.of(s.weights, "float32", s.calibrated);
    const auto bits = bits_per_weight(tetromino::recipe::parse(s.weights).format);
    std::printf("%-26s %-58s %-34s %5.2f %8.3f %4.0f %% %8.3f %4.0f %% %9.3f\n", s.what, s.weights, s.activations, bits,
                both.perplexity, 100 * j.share_w4a4(both.perplexity), alone.perplexity,
                100 * j.share_w4a16(alone.perplexity), std::min(both.pack_seconds, alone.pack_seconds) / 3.407872);
    std::fflush(stdout);
  }
}

/// Rotations of all sizes under recipes without calibration: W4A4.
void show_rotations(const judge& j) {
  std::printf("%-36s", "W4A4, weights and activations");
  for (const char* size : {"none", "16", "32", "64", "128"}) std::printf(" %8s", size);
  std::printf("\n");
  for (const char* name : {"mxfp4-32/floor", "mxfp4-32/round-up", "mxfp4-32/oas", "mxfp4-32/oas/mbs-search",
                           "mxfp4-32/min-error/mbs-search@32", "mxfp4-16/oas", "mxfp4-16/oas/mbs-search", "nvfp4/amax",
                           "nvfp4/four-over-six", "nvfp4/min-error"}) {
    std::printf("%-36s", name);
    for (const char* rotation : {"", "/hadamard-16", "/hadamard-32", "/hadamard-64", "/hadamard-128"}) {
      std::printf(" %8.3f", j.of(std::string(name) + rotation, name, false).perplexity);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
}

/// Seconds on one core for a matrix of 4096 x 4096 normal numbers.
void show_costs() {
  using namespace tetromino;
  constexpr std::size_t n = 4096, rows = 1024;
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  matrix<float> w(n, n), x(rows, n);
  for (float& v : w.data) v = normal(random);
  for (float& v : x.data) v = normal(random);
  const double millions = static_cast<double>(n * n) / 1e6;
  const auto timed = [&](const char* what, double million_values, const auto& work) {
    const double begin = bench::thread_seconds();
    work();
    const double seconds = bench::thread_seconds() - begin;
    std::printf("%-60s %8.2f s %10.4f s/million\n", what, seconds, seconds / million_values);
    std::fflush(stdout);
  };
  calibration seen(n);
  timed("moments of 1024 activations of 4096", static_cast<double>(rows * n) / 1e6,
        [&] { seen.add(matrix_view<const float>(x.data.data(), rows, n)); });
  timed("moments rotated by 128", millions, [&] { static_cast<void>(seen.rotated({128})); });
  const std::vector<float> mean_squares = seen.column_weights();
  for (const char* name :
       {"mxfp4-32/floor", "mxfp4-32/oas", "mxfp4-32/oas/mbs-search", "mxfp4-32/min-error/mbs-search",
        "mxfp4-32/min-error/mbs-search256", "mxfp4-32/min-error/mbs-search256@64",
        "mxfp4-32/min-error/mbs-search256@32", "mxfp4-16/min-error/mbs-search256", "nvfp4/amax", "nvfp4/four-over-six",
        "nvfp4/min-error", "mxfp4-32/oas/hadamard-32", "mxfp4-32/oas/hadamard-128"}) {
    const recipe r = recipe::parse(name);
    timed(name, millions, [&] { static_cast<void>(quantize(cpu, w, r)); });
    const std::string weighted = std::string(name) + ", weighted";
    if (r.rule != scale_rule::min_error) continue;
    timed(weighted.c_str(), millions,
          [&] { static_cast<void>(quantize(cpu, w, r, {.column_weights = mean_squares})); });
  }
  for (const char* name : {"mxfp4-32/oas/gptq", "mxfp4-32/oas/mbs-search/gptq", "mxfp4-32/min-error/mbs-search@32/gptq",
                           "mxfp4-32/min-error/mbs-search256/gptq", "mxfp4-32/min-error/mbs-search256@32/gptq",
                           "mxfp4-16/min-error/mbs-search256/gptq", "nvfp4/amax/gptq", "nvfp4/min-error/gptq",
                           "nvfp4/min-error/hadamard-16/gptq"}) {
    const matrix_view<const float> view(w.data.data(), n, n);
    timed(name, millions, [&] { static_cast<void>(gptq(cpu, view, recipe::parse(name), seen)); });
  }
}

int run(const std::string& part, std::size_t threads, std::size_t documents, const std::filesystem::path& folder) {
  if (part == "cost") {
    show_costs();
    return 0;
  }
  if (part != "steps" && part != "rotation") {
    std::fprintf(stderr, "bench_calibrated: expected steps, rotation or cost, got %s\n", part.c_str());
    return 1;
  }
  const double begin = bench::wall_seconds();
  const judge j(folder, threads, documents);
  part == "steps" ? show_steps(j) : show_rotations(j);
  std::printf("%.0f s in all\n", bench::wall_seconds() - begin);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "steps",
               argc > 2 ? std::stoul(argv[2]) : std::max(1u, std::thread::hardware_concurrency()),
               argc > 3 ? std::stoul(argv[3]) : 0, argc > 4 ? argv[4] : "examples/data");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_calibrated: %s\n", e.what());
    return 1;
  }
}
