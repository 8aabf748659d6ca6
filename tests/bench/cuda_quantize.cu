/// How fast the GPU packs and unpacks, against a device copy.

#include "cuda_timing.hpp"

#include <tetromino/cuda.hpp>
#include <tetromino/e4m3_activations.hpp>
#include <tetromino/layout.hpp>
#include <tetromino/scaling.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace tetromino;

constexpr std::size_t rows = 32768, cols = 8192;  // 2^28 elements

struct buffers {
  std::uint8_t* codes = timing::allocate<std::uint8_t>(rows * cols / 2);
  std::uint8_t* scales = timing::allocate<std::uint8_t>(rows * cols / 16);
  std::uint8_t* macros = timing::allocate<std::uint8_t>(rows * cols / 32);
  float* tensor_scales = timing::allocate<float>(2);
  float* row_scales = timing::allocate<float>(rows);
};

packed_view<any_format, std::uint8_t> view_of(const buffers& b, const any_format& format) {
  const packed_shape shape{format, 1, rows, cols};
  return {format,
          1,
          rows,
          cols,
          {b.codes, shape.code_bytes()},
          {b.scales, shape.scale_bytes()},
          {b.macros, shape.macro_bytes()},
          {b.tensor_scales, format.scale == scale_type::e4m3 ? 1u : 0u}};
}

double packed_bytes(const any_format& format) {
  return bits_per_weight(format) / 8.0 * static_cast<double>(rows) * static_cast<double>(cols);
}

template <class T>
void run(const char* type, double copy, const buffers& b) {
  const std::size_t n = rows * cols;
  auto* x = timing::allocate<T>(n);
  auto* unpacked = timing::allocate<T>(n);
  {
    std::vector<T> host(std::size_t{1} << 22);
    std::uint64_t state = 1;
    for (auto& v : host) {
      float sum = -6;
      for (int i = 0; i < 12; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += static_cast<float>(state >> 40) * 0x1p-24f;
      }
      v = detail::from_float<T>(sum * 0.02f);
    }
    for (std::size_t i = 0; i < n; i += host.size()) {
      timing::require(cudaMemcpy(x + i, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
  }
  const float given = 0.12f / (6.0f * 448.0f);
  timing::require(cudaMemcpy(b.tensor_scales + 1, &given, sizeof given, cudaMemcpyHostToDevice), "cudaMemcpy");
  cuda::stream s;
  timing::require(cudaStreamCreate(&s.handle), "cudaStreamCreate");

  const auto row = [&](const std::string& what, const timing::measured& t, double bytes) {
    timing::print_row(std::string(type) + " " + what, t, bytes, copy);
  };
  const double in_bytes = static_cast<double>(n * sizeof(T));
  const batch_view<const T> in(x, 1, rows, cols);
  for (const char* name : {"mxfp4-32/floor",
                           "mxfp4-32/ceil",
                           "mxfp4-32/round-up",
                           "mxfp4-32/even",
                           "mxfp4-32/oas",
                           "mxfp4-16/oas",
                           "mxfp4-32/oas/mbs-static",
                           "mxfp4-16/oas/mbs-static",
                           "nvfp4/amax",
                           "nvfp4/four-over-six",
                           "nvfp4/min-error",
                           "mxfp4-32/min-error",
                           "mxfp4-32/oas/mbs-search",
                           "mxfp4-16/oas/mbs-search",
                           "mxfp4-32/oas/hadamard-32",
                           "mxfp4-32/oas/hadamard-128",
                           "nvfp4/amax/hadamard-16",
                           "mxfp4-32/floor/mbs-static@8x2",
                           "mxfp4-32/floor/mbs-search@8x2",
                           "mxfp4-32/min-error/mbs-search@8x2",
                           "mxfp4-32/min-error/mbs-search@16x2"}) {
    const recipe r = recipe::parse(name);
    const auto out = view_of(b, r.format);
    quantize_options options;
    options.rule = r.rule, options.macro = r.macro, options.special = special_values::poison;
    const bool is_nv = r.format.scale == scale_type::e4m3;
    if (is_nv) options.tensor_scales = {b.tensor_scales + 1, 1};
    if (r.rotation != 0) options.rotation = hadamard{r.rotation};
    const bool slow = r.rule == scale_rule::min_error || (r.format.macro_block != 0 && r.macro == macro_rule::search);
    const auto t = timing::time(s.handle, slow ? 5 : 20, [&](int) { quantize_to(s, in, out, options); });
    row(std::string("-> ") + name + (is_nv ? ", tensor scale given" : ""), t, in_bytes + packed_bytes(r.format));
    if (std::string(name) == "nvfp4/amax") {
      options.tensor_scales = {};
      const auto both = timing::time(s.handle, 20, [&](int) { quantize_to(s, in, out, options); });
      row("-> nvfp4/amax, two passes", both, 2 * in_bytes + packed_bytes(r.format));
      const auto one = timing::time(s.handle, 20, [&](int) {
        cuda::amax_to(s, in, std::span<float>(b.tensor_scales, 1), special_values::poison);
      });
      row("tensor amax", one, in_bytes);
    }
    if (std::string(name) == "mxfp4-32/oas" || std::string(name) == "nvfp4/amax") {
      auto plan = options;
      if (is_nv) plan.tensor_scales = {b.tensor_scales + 1, 1};
      auto tiled = out;
      tiled.scales = {b.scales, layout::swizzled_bytes(1, rows, out.shape().blocks_per_row())};
      const auto swizzled = timing::time(s.handle, 20, [&](int) { cuda::quantize_swizzled_to(s, in, tiled, plan); });
      row(std::string("-> ") + name + ", 128x4 scales", swizzled, in_bytes + packed_bytes(r.format));
      auto columns = out;
      columns.rows = cols, columns.cols = rows;
      const auto transposed =
          timing::time(s.handle, 20, [&](int) { cuda::quantize_transposed_to(s, in, columns, plan); });
      row(std::string("-> ") + name + ", transposed", transposed, in_bytes + packed_bytes(r.format));
    }
    if (r.rotation != 0) {
      options.rotation->sign_seed = 1;
      const auto with_signs = timing::time(s.handle, 20, [&](int) { quantize_to(s, in, out, options); });
      row(std::string("-> ") + name + ", signs", with_signs, in_bytes + packed_bytes(r.format));
      const auto alone = timing::time(
          s.handle, 20, [&](int) { rotate(s, in, hadamard{r.rotation}, batch_view<T>(unpacked, 1, rows, cols)); });
      row("rotated by " + std::to_string(r.rotation), alone, 2 * in_bytes);
      continue;
    }
    if (std::string(name) == "mxfp4-32/oas") {
      options.rounding = element_rounding::stochastic;
      const auto st = timing::time(s.handle, 10, [&](int) { quantize_to(s, in, out, options); });
      row("-> mxfp4-32/oas, stochastic", st, in_bytes + packed_bytes(r.format));
    }
    if (slow) continue;
    const auto back =
        timing::time(s.handle, 20, [&](int) { dequantize_to(s, out, batch_view<T>(unpacked, 1, rows, cols)); });
    row(std::string("   ") + name + " ->", back, in_bytes + packed_bytes(r.format));
  }
  auto* const bytes = reinterpret_cast<std::uint8_t*>(unpacked);
  for (const auto& shape : {std::pair{rows, cols}, std::pair{std::size_t{4096}, std::size_t{7168}}}) {
    const std::size_t m = shape.first, k = shape.second, size = m * k;  // whole stages: a byte for each element
    const auto t = timing::time(s.handle, 20, [&](int i) {
      const std::size_t first = static_cast<std::size_t>(i) % (n / size) * size;
      quantize_e4m3_to(s, matrix_view<const T>(x + first, m, k),
                       e4m3_view<std::uint8_t>{m, k, {bytes + first, size}, {b.row_scales, m}});
    });
    row("-> e4m3 " + std::to_string(m) + " x " + std::to_string(k), t,
        static_cast<double>(size * (sizeof(T) + 1) + m * sizeof(float)));
  }
  timing::require(cudaStreamDestroy(s.handle), "cudaStreamDestroy");
  cudaFree(x);
  cudaFree(unpacked);
}

}  // namespace

int main() {
  const double copy = timing::start();
  const buffers b;
  run<bfloat16>("bfloat16", copy, b);
  run<half>("half", copy, b);
  run<float>("float", copy, b);
  return 0;
}
