/// The signal-to-noise table of all recipes: what packing leaves of the bundled model's weights, of normal and of
/// Student-t(4) numbers, beside reference values that were measured with another implementation. Exits with 1 if a
/// value is further from its reference than the tolerance in the table's last line.
///
///   bench_recipes [MODEL.safetensors]

#include <tetromino/cpu.hpp>
#include <tetromino/dequantize.hpp>
#include <tetromino/io/safetensors.hpp>
#include <tetromino/metrics.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/thread_executor.hpp>

#include "reference/generators.hpp"

#include <cmath>        // std::fabs
#include <cstddef>      // std::size_t
#include <cstdio>       // std::printf, std::fprintf
#include <exception>    // std::exception
#include <filesystem>   // std::filesystem::path
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <thread>       // std::thread
#include <utility>      // std::move
#include <vector>       // std::vector

namespace {

using namespace tetromino;

constexpr double unknown = -1;
constexpr double tolerance = 0.03;         // dB, model and normal numbers
constexpr double student_tolerance = 0.1;  // dB: heavy tails move with the sample
constexpr std::size_t rows = 4096;
constexpr std::size_t cols = 1024;

/// A recipe and its reference values in dB; `unknown` where there is none.
struct line {
  const char* recipe;
  double model;
  double normal;
  double student_t4;
};

constexpr line lines[] = {
    {"mxfp4-32/floor", 18.66, 18.79, 17.64},
    {"mxfp4-32/round-up", unknown, 18.76, 17.14},
    {"mxfp4-32/even", unknown, 19.03, 17.79},
    {"mxfp4-32/oas", 18.93, 19.03, 17.79},
    {"mxfp4-32/min-error", unknown, 19.05, 17.90},
    {"mxfp4-16/floor", 18.62, 18.58, 17.91},
    {"mxfp4-16/oas", 19.16, 19.17, 18.47},
    {"mxfp4-32/oas/mbs-static", unknown, 19.30, 18.77},
    {"mxfp4-32/oas/mbs-search", 19.93, 19.96, 19.25},
    {"mxfp4-16/oas/mbs-static", 19.39, 19.39, 19.31},
    {"mxfp4-16/oas/mbs-search", 20.12, 20.14, 19.88},
    {"mxfp4-16/oas/mbs-search@64", unknown, 20.55, 20.36},
    {"mxfp4-16/oas/mbs-search@32", unknown, 21.16, 21.02},
    {"nvfp4/amax", 20.46, 20.44, 20.74},
    {"nvfp4/four-over-six", 21.21, 21.21, 21.22},
    {"nvfp4/min-error", unknown, 21.81, 21.64},
    // The rest has no reference: other recipes worth comparing.
    {"mxfp4-32/ceil", unknown, unknown, unknown},
    {"mxfp4-16/min-error", unknown, unknown, unknown},
    {"mxfp4-16/min-error/mbs-search", unknown, unknown, unknown},
    {"mxfp4-16/oas/mbs-search256", unknown, unknown, unknown},
    {"mxfp4-16/min-error/mbs-search@32", unknown, unknown, unknown},
    {"mxfp4-32/min-error/mbs-search256@32", unknown, unknown, unknown},
    {"mxfp4-32/floor/mbs-static@8x2", unknown, unknown, unknown},
    {"mxfp4-32/floor/mbs-search@16x2", unknown, unknown, unknown},
    {"mxfp4-32/floor/mbs-search@8x2", unknown, unknown, unknown},
    {"mxfp4-32/min-error/mbs-search@16x2", unknown, unknown, unknown},
    {"mxfp4-32/min-error/mbs-search@8x2", unknown, unknown, unknown},
    // Rotated: what packing takes from the rotated values.
    {"mxfp4-32/floor/hadamard-32", unknown, unknown, unknown},
    {"mxfp4-32/oas/hadamard-32", unknown, unknown, unknown},
    {"mxfp4-32/oas/hadamard-128", unknown, unknown, unknown},
    {"mxfp4-16/oas/hadamard-16", unknown, unknown, unknown},
    {"mxfp4-16/oas/hadamard-128", unknown, unknown, unknown},
    {"nvfp4/amax/hadamard-16", unknown, unknown, unknown},
    {"nvfp4/amax/hadamard-128", unknown, unknown, unknown},
    {"nvfp4/four-over-six/hadamard-16", unknown, unknown, unknown},
    {"nvfp4/min-error/hadamard-16", unknown, unknown, unknown},
};

/// The expert and attention matrices of the model; the experts of a layer are one batch with one tensor scale.
std::vector<matrix<bfloat16>> load_weights(const std::filesystem::path& path) {
  std::vector<matrix<bfloat16>> out;
  const io::safetensors_file file = io::safetensors_file::open(path);
  for (const io::safetensors_tensor& tensor : file) {
    const std::string_view name = tensor.name();
    const bool is_attention = name.find(".attn.") != std::string_view::npos;
    const bool is_expert =
        name.find(".moe.") != std::string_view::npos && name.find("router") == std::string_view::npos;
    if (!is_attention && !is_expert) continue;
    const std::vector<std::size_t>& shape = tensor.shape();
    matrix<bfloat16> weights(shape.size() == 3 ? shape[0] : 1, shape[shape.size() - 2], shape.back());
    weights.data = tensor.copy_as<bfloat16>();
    out.push_back(std::move(weights));
  }
  return out;
}

matrix<float> sample(std::vector<float> numbers) {
  matrix<float> out(rows, cols);
  out.data = std::move(numbers);
  return out;
}

template <class T>
error_report measure(const recipe& r, const matrix<T>& x) {
  const thread_executor threads(std::thread::hardware_concurrency());
  const auto policy = cpu.on(threads);
  matrix<float> unpacked = dequantize<float>(policy, quantize(policy, x, r));
  if (r.rotation != 0) rotate_back(policy, unpacked, {r.rotation}, unpacked.view());
  return compare(x, unpacked);
}

/// Prints a value beside its reference; returns whether it is near enough.
bool show(double value, double expected, double limit) {
  if (expected == unknown) {
    std::printf("  %7.3f                ", value);
    return true;
  }
  const bool near = std::fabs(value - expected) <= limit;
  std::printf("  %7.3f %6.2f %+.3f %s", value, expected, value - expected, near ? " " : "!");
  return near;
}

int run(const std::filesystem::path& model) {
  const std::vector<matrix<bfloat16>> weights = load_weights(model);
  const matrix<float> normal = sample(reference::normal_sample(1, rows * cols));
  const matrix<float> student = sample(reference::student_t4_sample(1, rows * cols));
  std::printf("QSNR in dB: measured, reference, difference\n");
  std::printf("%-34s %5s  %-23s  %-23s  %s\n", "recipe", "bits", "bundled model", "N(0,1)", "Student-t(4)");
  int outside = 0;
  for (const line& l : lines) {
    const recipe r = recipe::parse(l.recipe);
    error_report of_model;
    for (const auto& w : weights) of_model.add(measure(r, w));
    std::printf("%-34s %5.2f", l.recipe, bits_per_weight(r.format));
    outside += !show(of_model.qsnr(), l.model, tolerance);
    outside += !show(measure(r, normal).qsnr(), l.normal, tolerance);
    outside += !show(measure(r, student).qsnr(), l.student_t4, student_tolerance);
    std::printf("\n");
  }
  std::printf("%d outside the tolerance of %.2f dB (Student-t: %.1f dB)\n", outside, tolerance, student_tolerance);
  return outside == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "examples/data/moe-16x2.safetensors");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
}
