/// What searched scales, calibration, rotation and error feedback gain one after the other: perplexity of the bundled
/// model with 4-bit weights and activations (W4A4) or weights alone (W4A16). Calibrated on half of the held-out
/// documents and judged on the other half, then the other way around; figures are the mean of both. The share is of
/// what OCP MXFP4 (mxfp4-32/floor, uncalibrated) adds to the perplexity of float32 in the same run.
///
///   bench_calibrated [steps | averages | tokens | rotation | cost] [THREADS [DOCUMENTS [DATA-FOLDER]]]

#include "../../examples/tools/checkpoint/settings.hpp"
#include "../../examples/tools/moe/calibrate.hpp"
#include "bench/bench.hpp"
#include "support/perplexity.hpp"

#include <tetromino/thread_executor.hpp>

#include <array>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <random>

namespace {

using namespace tetromino_test;

/// How weights are calibrated: not at all, on the float model's inputs, or on those of the model as packed so far too.
enum class streams { none, one, two };

/// Both halves of the documents, and what each says to weights that are judged on the other.
class judge {
 public:
  judge(const std::filesystem::path& folder, std::size_t threads, std::size_t documents)
      : file_(moe_lm::io::safetensors_file::open(folder / "moe-16x2.safetensors")),
        text_(moe_lm::io::safetensors_file::open(folder / "moe-16x2.heldout.safetensors"), moe_lm::shape(file_).vocab),
        threads_(threads) {
    const std::size_t all = text_.count(), wanted = documents == 0 ? all : std::min(documents, all);
    for (std::size_t i = 0; i < wanted; ++i) halves_[i % 2].push_back(i * all / wanted);
    const std::string none = "float32", ocp = "mxfp4-32/floor";
    least_ = of(none, none, streams::none).perplexity;
    most_w4a4_ = of(ocp, ocp, streams::none).perplexity;
    most_w4a16_ = of(ocp, none, streams::none).perplexity;
    std::printf("%zu and %zu documents; float32: %.3f; %s: W4A4 %.3f, W4A16 %.3f\n\n", halves_[0].size(),
                halves_[1].size(), least_, ocp.c_str(), most_w4a4_, most_w4a16_);
  }

  /// Perplexity, mean of both halves, and seconds of one core for each: to calibrate, and then to pack all weights.
  struct verdict {
    double perplexity = 0, calibrate_seconds = 0, pack_seconds = 0;
  };

  /// Calibrated on at most so many documents of a half.
  [[nodiscard]] verdict of(const std::string& weights, const std::string& activations, streams how,
                           std::size_t at_most = std::string::npos) const {
    return of_both(
        [&](std::size_t h) { return of_half(h, moe_lm::precision::parse(weights, activations), how, at_most); });
  }

  /// Every weight by one of several recipes, or in 16 bits: what loses least within so many bits on average, by noise
  /// over signal of the products with the inputs of the other half. `input_noise` is what packed activations add to it.
  [[nodiscard]] verdict within(double bits, std::span<const char* const> candidates, const std::string& activations,
                               double input_noise) const {
    moe_lm::io::bit_budget budget{bits, {}, true, input_noise};
    for (const char* name : candidates) budget.candidates.push_back(tetromino::recipe::parse(name));
    const auto model = moe_lm::io::checkpoint::open(file_.path());
    const auto parameters = moe_lm::io::parameters_of(model);
    return of_both([&](std::size_t h) {
      const checkpoint::gathered_inputs inputs(
          moe_lm::calibrator(file_, text_, halves_[1 - h], {}, {}).run([](std::size_t) {}));
      moe_lm::io::plan_options options;
      options.inputs = &inputs;
      options.separate_scales = true;
      const auto made = moe_lm::io::plan_within(tetromino::cpu, model, parameters, std::move(options), budget);
      auto rounding = moe_lm::precision::parse(candidates.front(), activations);
      rounding.chosen = made.plan.options.chosen;
      return of_half(h, rounding, streams::one, std::string::npos);
    });
  }

  [[nodiscard]] double share_w4a4(double perplexity) const { return (perplexity - least_) / (most_w4a4_ - least_); }
  [[nodiscard]] double share_w4a16(double perplexity) const { return (perplexity - least_) / (most_w4a16_ - least_); }

 private:
  /// The mean of verdict_of(half) for both halves, side by side.
  template <class VerdictOf>
  [[nodiscard]] verdict of_both(const VerdictOf& verdict_of) const {
    std::array<verdict, 2> found;
    tetromino::thread_executor both(threads_ > 1 ? 2 : 1);
    both(2, [&](std::size_t h) { found[h] = verdict_of(h); });
    return {(found[0].perplexity + found[1].perplexity) / 2,
            (found[0].calibrate_seconds + found[1].calibrate_seconds) / 2,
            (found[0].pack_seconds + found[1].pack_seconds) / 2};
  }

  [[nodiscard]] verdict of_half(std::size_t h, moe_lm::precision rounding, streams how, std::size_t at_most) const {
    verdict out;
    std::vector<std::size_t> calibrating;  // of all domains alike
    const std::size_t other = halves_[1 - h].size(), n = std::min(at_most, other);
    for (std::size_t i = 0; i < n; ++i) calibrating.push_back(halves_[1 - h][i * other / n]);
    std::optional<input_statistics> seen;
    const double begin = bench::thread_seconds();
    if (how != streams::none) {
      const moe_lm::precision of_streams = how == streams::two ? rounding : moe_lm::precision{};
      seen = moe_lm::calibrator(file_, text_, calibrating, of_streams, {}).run([](std::size_t) {});
      rounding.seen = &*seen;
    }
    const double calibrated = bench::thread_seconds();
    const whole_model model(file_, rounding);
    out.calibrate_seconds = calibrated - begin;
    out.pack_seconds = bench::thread_seconds() - calibrated;
    const auto losses = model.losses(text_, halves_[h], std::max<std::size_t>(1, threads_ / 2));
    out.perplexity = perplexities(text_, halves_[h], losses).back();
    return out;
  }

  moe_lm::io::safetensors_file file_;
  moe_lm::documents text_;
  std::size_t threads_;
  std::array<std::vector<std::size_t>, 2> halves_;
  double least_ = 0, most_w4a4_ = 1, most_w4a16_ = 1;
};

struct step {
  const char* what;
  const char* weights;
  const char* activations;
  streams how = streams::none;
};

constexpr step steps[] = {
    {"MXFP4-32: floor", "mxfp4-32/floor", "mxfp4-32/floor"},
    {"  OAS", "mxfp4-32/oas", "mxfp4-32/oas"},
    {"  + MBS, hybrid", "mxfp4-32/oas/mbs-search", "mxfp4-32/oas/mbs-static"},
    {"  + joint search, M = 128", "mxfp4-32/min-error/mbs-search256", "mxfp4-32/min-error/mbs-search"},
    {"  M = 64", "mxfp4-32/min-error/mbs-search256@64", "mxfp4-32/min-error/mbs-search@64"},
    {"  M = 32", "mxfp4-32/min-error/mbs-search256@32", "mxfp4-32/min-error/mbs-search@32"},
    {"  + weighted", "mxfp4-32/min-error/mbs-search256@32", "mxfp4-32/min-error/mbs-search@32", streams::one},
    {"  + rotation", "mxfp4-32/min-error/mbs-search256@32/hadamard-128", "mxfp4-32/min-error/mbs-search@32",
     streams::one},
    {"  + GPTQ", "mxfp4-32/min-error/mbs-search256@32/hadamard-128/gptq", "mxfp4-32/min-error/mbs-search@32",
     streams::one},
    {"  GPTQ, not rotated", "mxfp4-32/min-error/mbs-search256@32/gptq", "mxfp4-32/min-error/mbs-search@32",
     streams::one},
    {"  GPTQ in two streams", "mxfp4-32/min-error/mbs-search256@32/gptq", "mxfp4-32/min-error/mbs-search@32",
     streams::two},
    {"  the same, rotated", "mxfp4-32/min-error/mbs-search256@32/hadamard-128/gptq", "mxfp4-32/min-error/mbs-search@32",
     streams::two},
    {"  GPTQ, M = 64", "mxfp4-32/min-error/mbs-search256@64/gptq", "mxfp4-32/min-error/mbs-search@64", streams::one},
    {"  the same, M = 128", "mxfp4-32/min-error/mbs-search256/gptq", "mxfp4-32/min-error/mbs-search", streams::one},
    {"  2 bits for 16", "mxfp4-32/min-error/mbs-search@16x2", "mxfp4-32/min-error/mbs-search@16x2"},
    {"  GPTQ", "mxfp4-32/min-error/mbs-search@16x2/gptq", "mxfp4-32/min-error/mbs-search@16x2", streams::one},
    {"  in two streams", "mxfp4-32/min-error/mbs-search@16x2/gptq", "mxfp4-32/min-error/mbs-search@16x2", streams::two},
    {"  2 bits for 8", "mxfp4-32/min-error/mbs-search@8x2", "mxfp4-32/min-error/mbs-search@8x2"},
    {"  + weighted", "mxfp4-32/min-error/mbs-search@8x2", "mxfp4-32/min-error/mbs-search@8x2", streams::one},
    {"  GPTQ", "mxfp4-32/min-error/mbs-search@8x2/gptq", "mxfp4-32/min-error/mbs-search@8x2", streams::one},
    {"  in two streams", "mxfp4-32/min-error/mbs-search@8x2/gptq", "mxfp4-32/min-error/mbs-search@8x2", streams::two},
    {"  the same, rotated", "mxfp4-32/min-error/mbs-search@8x2/hadamard-128/gptq", "mxfp4-32/min-error/mbs-search@8x2",
     streams::two},
    {"  GPTQ on OAS alone", "mxfp4-32/oas/gptq", "mxfp4-32/oas", streams::one},
    {"  in two streams", "mxfp4-32/oas/gptq", "mxfp4-32/oas", streams::two},
    {"  GPTQ on min-error alone", "mxfp4-32/min-error/gptq", "mxfp4-32/min-error", streams::one},
    {"  in two streams", "mxfp4-32/min-error/gptq", "mxfp4-32/min-error", streams::two},

    {"MXFP4-16: floor", "mxfp4-16/floor", "mxfp4-16/floor"},
    {"  OAS", "mxfp4-16/oas", "mxfp4-16/oas"},
    {"  + MBS, hybrid", "mxfp4-16/oas/mbs-search", "mxfp4-16/oas/mbs-static"},
    {"  + joint search, M = 128", "mxfp4-16/min-error/mbs-search256", "mxfp4-16/min-error/mbs-search"},
    {"  + weighted", "mxfp4-16/min-error/mbs-search256", "mxfp4-16/min-error/mbs-search", streams::one},
    {"  + rotation", "mxfp4-16/min-error/mbs-search256/hadamard-128", "mxfp4-16/min-error/mbs-search", streams::one},
    {"  + GPTQ", "mxfp4-16/min-error/mbs-search256/hadamard-128/gptq", "mxfp4-16/min-error/mbs-search", streams::one},
    {"  GPTQ, not rotated", "mxfp4-16/min-error/mbs-search256/gptq", "mxfp4-16/min-error/mbs-search", streams::one},
    {"  GPTQ in two streams", "mxfp4-16/min-error/mbs-search256/gptq", "mxfp4-16/min-error/mbs-search", streams::two},

    {"NVFP4: amax", "nvfp4/amax", "nvfp4/amax"},
    {"  four over six", "nvfp4/four-over-six", "nvfp4/four-over-six"},
    {"  search of E4M3 codes", "nvfp4/min-error", "nvfp4/min-error"},
    {"  + weighted", "nvfp4/min-error", "nvfp4/min-error", streams::one},
    {"  + rotation", "nvfp4/min-error/hadamard-16", "nvfp4/min-error", streams::one},
    {"  + GPTQ", "nvfp4/min-error/hadamard-16/gptq", "nvfp4/min-error", streams::one},
    {"  GPTQ, not rotated", "nvfp4/min-error/gptq", "nvfp4/min-error", streams::one},
    {"  GPTQ in two streams", "nvfp4/min-error/gptq", "nvfp4/min-error", streams::two},
    {"  the same, rotated", "nvfp4/min-error/hadamard-16/gptq", "nvfp4/min-error", streams::two},
    {"  GPTQ on amax alone", "nvfp4/amax/gptq", "nvfp4/amax", streams::one},
    {"  in two streams", "nvfp4/amax/gptq", "nvfp4/amax", streams::two},
};

void show_steps(const judge& j) {
  std::printf("%-26s %-53s %-32s %5s %8s %6s %8s %6s %9s %9s\n", "step", "weights", "activations", "bits", "W4A4",
              "share", "W4A16", "share", "pack s/M", "calibr. s");
  for (const step& s : steps) {
    const auto both = j.of(s.weights, s.activations, s.how), alone = j.of(s.weights, "float32", s.how);
    const auto bits = bits_per_weight(tetromino::recipe::parse(s.weights).format);
    std::printf("%-26s %-53s %-32s %5.2f %8.3f %4.0f %% %8.3f %4.0f %% %9.3f %9.1f\n", s.what, s.weights, s.activations,
                bits, both.perplexity, 100 * j.share_w4a4(both.perplexity), alone.perplexity,
                100 * j.share_w4a16(alone.perplexity), std::min(both.pack_seconds, alone.pack_seconds) / 3.407872,
                both.calibrate_seconds);
    std::fflush(stdout);
  }
}

/// A recipe for each weight, or 16 bits, within an average. Activations of packed weights are NVFP4, or stay in float.
void show_averages(const judge& j) {
  constexpr std::array candidates = {"nvfp4/min-error/gptq", "mxfp4-32/min-error/mbs-search/gptq",
                                     "mxfp4-32/min-error/gptq"};
  constexpr double input_noise = 0.0066;  // 21.8 dB, of nvfp4/min-error
  for (const char* name : candidates) std::printf("%s, ", name);
  std::printf("or 16 bits\n%12s %8s %6s %8s %6s\n", "average bits", "W4A4", "share", "W4A16", "share");
  for (const double bits : {4.5, 4.375, 5.0}) {
    const double both = j.within(bits, candidates, "nvfp4/min-error", input_noise).perplexity;
    const double alone = j.within(bits, candidates, "float32", 0).perplexity;
    std::printf("%12.3f %8.3f %4.0f %% %8.3f %4.0f %%\n", bits, both, 100 * j.share_w4a4(both), alone,
                100 * j.share_w4a16(alone));
    std::fflush(stdout);
  }
}

/// What one stream and two make of little calibration text.
void show_tokens(const judge& j) {
  std::printf("%-24s %-16s %10s %11s %12s\n", "weights", "activations", "documents", "one stream", "two streams");
  for (const auto& [weights, activations] :
       {std::pair{"nvfp4/min-error/gptq", "nvfp4/min-error"}, std::pair{"nvfp4/min-error/gptq", "float32"}}) {
    for (const std::size_t documents : {2u, 8u, 24u, 96u}) {
      std::printf("%-24s %-16s %10zu %11.3f %12.3f\n", weights, activations, documents,
                  j.of(weights, activations, streams::one, documents).perplexity,
                  j.of(weights, activations, streams::two, documents).perplexity);
      std::fflush(stdout);
    }
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
      std::printf(" %8.3f", j.of(std::string(name) + rotation, name, streams::none).perplexity);
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
  calibration drifted(n);
  timed("moments and drift of two streams of them", static_cast<double>(rows * n) / 1e6, [&] {
    drifted.add(matrix_view<const float>(x.data.data(), rows, n), matrix_view<const float>(w.data.data(), rows, n));
  });
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
                           "mxfp4-32/min-error/mbs-search@16x2/gptq", "mxfp4-32/min-error/mbs-search@8x2/gptq",
                           "mxfp4-16/min-error/mbs-search256/gptq", "nvfp4/amax/gptq", "nvfp4/min-error/gptq",
                           "nvfp4/min-error/hadamard-16/gptq"}) {
    const matrix_view<const float> view(w.data.data(), n, n);
    timed(name, millions, [&] { static_cast<void>(gptq(cpu, view, recipe::parse(name), seen)); });
    const std::string two_streams = std::string(name) + ", two streams";
    timed(two_streams.c_str(), millions, [&] { static_cast<void>(gptq(cpu, view, recipe::parse(name), drifted)); });
  }
}

int run(const std::string& part, std::size_t threads, std::size_t documents, const std::filesystem::path& folder) {
  if (part == "cost") {
    show_costs();
    return 0;
  }
  if (part != "steps" && part != "averages" && part != "tokens" && part != "rotation") {
    std::fprintf(stderr, "bench_calibrated: expected steps, averages, tokens, rotation or cost, got %s\n",
                 part.c_str());
    return 1;
  }
  const double begin = bench::wall_seconds();
  const judge j(folder, threads, documents);
  part == "steps"      ? show_steps(j)
  : part == "averages" ? show_averages(j)
  : part == "tokens"   ? show_tokens(j)
                       : show_rotations(j);
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
