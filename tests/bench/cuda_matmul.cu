/// How fast the GPU multiplies by packed weights, against cuBLAS on bfloat16 weights and a device copy. Weights take
/// turns among copies that together exceed the cache, calls are captured in a graph. The GPU rests before each timing;
/// for 512 rows or more, times in a row, at the power limit, follow.
///   cuda_matmul [quick] [--contender COMMAND]

#include "cuda_contender.hpp"
#include "cuda_timing.hpp"

#include <tetromino/cuda.hpp>
#include <tetromino/scaling.hpp>

#include <cublas_v2.h>

#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace tetromino;

void require(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "%s: cuBLAS status %d\n", what, static_cast<int>(status));
  std::exit(1);
}

/// n values of about N(0, size).
void fill(bfloat16* to, std::size_t n, float size) {
  static const std::vector<float> normals = [] {
    std::vector<float> out(std::size_t{1} << 22);
    std::uint64_t state = 1;
    for (auto& v : out) {
      float sum = -6;
      for (int i = 0; i < 12; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += static_cast<float>(state >> 40) * 0x1p-24f;
      }
      v = sum;
    }
    return out;
  }();
  std::vector<bfloat16> host(normals.size());
  for (std::size_t i = 0; i < host.size(); ++i) host[i] = bfloat16(normals[i] * size);
  for (std::size_t i = 0; i < n; i += host.size()) {
    const std::size_t part = std::min(host.size(), n - i);
    timing::require(cudaMemcpy(to + i, host.data(), part * sizeof(bfloat16), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
}

constexpr std::size_t most_rows = 4096;
const char* const recipes[] = {"mxfp4-32/oas",
                               "mxfp4-16/oas",
                               "nvfp4/amax",
                               "mxfp4-32/oas/mbs-static",
                               "mxfp4-16/oas/mbs-static",
                               "mxfp4-32/floor/mbs-static@8x2"};

/// Copies of a layer's weights, repacked for activations of type T.
template <class T>
struct packed {
  recipe rule;
  cuda::repacked_shape shape;
  std::size_t copies, step;
  std::byte* data;
  [[nodiscard]] cuda::repacked_view<T, std::byte> weights(std::size_t i) const {
    return {shape, {data + i % copies * step, shape.bytes()}};
  }
};

/// One layer's weights [n, k]: copies in bfloat16, and copies repacked under each recipe, to take turns.
struct layer {
  std::size_t n, k, copies = 0;
  bfloat16* dense = nullptr;
  std::vector<packed<bfloat16>> of_recipes{};
  packed<e4m3> for_e4m3{};

  void make(const cuda::stream& s) {
    copies = std::max<std::size_t>(3, (std::size_t{400} << 20) / (n * k * 2));
    dense = timing::allocate<bfloat16>(n * k * copies);
    fill(dense, n * k * copies, 0.02f);
    for (const char* name : recipes) of_recipes.push_back(repacked<bfloat16>(name, s));
    for_e4m3 = repacked<e4m3>(recipes[0], s);
  }
  template <class T>
  [[nodiscard]] packed<T> repacked(const char* name, const cuda::stream& s) const {
    const recipe r = recipe::parse(name);
    const packed_shape shape{r.format, 1, n, k};
    const cuda::repacked_shape order{r.format, 1, n, k};
    const std::size_t step = (order.bytes() + 127) / 128 * 128;
    const std::size_t count = std::max<std::size_t>(3, (std::size_t{300} << 20) / step);
    packed<T> out{r, order, count, step, timing::allocate<std::byte>(step * count)};
    auto* codes = timing::allocate<std::uint8_t>(shape.code_bytes());
    auto* scales = timing::allocate<std::uint8_t>(shape.scale_bytes());
    auto* macros = timing::allocate<std::uint8_t>(shape.macro_bytes() + 1);
    auto* tensor_scales = timing::allocate<float>(1);
    const packed_view<any_format, std::uint8_t> view{r.format,
                                                     1,
                                                     n,
                                                     k,
                                                     {codes, shape.code_bytes()},
                                                     {scales, shape.scale_bytes()},
                                                     {macros, shape.macro_bytes()},
                                                     {tensor_scales, r.format.scale == scale_type::e4m3 ? 1u : 0u}};
    quantize_options options;
    options.rule = r.rule, options.macro = r.macro, options.special = special_values::poison;
    for (std::size_t i = 0; i < count; ++i) {
      quantize_to(s, matrix_view<const bfloat16>(dense + i % copies * n * k, n, k), view, options);
      repack_to(s, view, out.weights(i));
    }
    timing::require(cudaStreamSynchronize(s.handle), "repacking");
    for (void* p : {static_cast<void*>(codes), static_cast<void*>(scales), static_cast<void*>(macros),
                    static_cast<void*>(tensor_scales)}) {
      cudaFree(p);
    }
    return out;
  }
};

/// The activations of a product in E4M3, and room for those of `most_rows`.
struct e4m3_rows {
  std::span<std::uint8_t> values{timing::allocate<std::uint8_t>(most_rows * 7168), most_rows * 7168};
  std::span<float> scales{timing::allocate<float>(most_rows), most_rows};
  [[nodiscard]] e4m3_view<std::uint8_t> view(std::size_t m, std::size_t k) const {
    return {m, k, values.first(m * k), scales.first(m)};  // k is a multiple of 128 here
  }
};

/// Times the products of m rows, cuBLAS and ours in turn. Weights are settled, as they are in decoding.
void run(const layer& l, std::size_t m, double copy, const cuda::stream& s, cublasHandle_t handle, bfloat16* x,
         bfloat16* out, const e4m3_rows& x8, timing::contender& contender) {
  double first_us = 0;
  const std::size_t size = l.n * l.k;
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(size);
  const float one = 1, zero = 0;
  const auto dense_call = [&](int i) {
    const bfloat16* w = l.dense + static_cast<std::size_t>(i) % l.copies * size;
    require(cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(l.n), static_cast<int>(m),
                         static_cast<int>(l.k), &one, w, CUDA_R_16BF, static_cast<int>(l.k), x, CUDA_R_16BF,
                         static_cast<int>(l.k), &zero, out, CUDA_R_16BF, static_cast<int>(l.n), CUBLAS_COMPUTE_32F,
                         CUBLAS_GEMM_DEFAULT),
            "cublasGemmEx");
  };
  cuda::matmul_options options;
  options.settled_weights = true;
  const auto packed_call = [&](const packed<bfloat16>& p, int i) {
    matmul(s, matrix_view<const bfloat16>(x, m, l.k), p.weights(static_cast<std::size_t>(i)),
           matrix_view<bfloat16>(out, m, l.n), options);
  };
  const auto dense = timing::time_rested(s.handle, dense_call);
  std::printf("%5zu x [%zu, %zu]  %-26s %9.2f us ±%4.1f %%  %7.1f TFLOP/s\n", m, l.n, l.k, "cuBLAS bfloat16",
              dense.median_us, 50 * dense.spread, flops / dense.median_us * 1e-6);
  for (const auto& p : l.of_recipes) {
    const auto t = timing::time_rested(s.handle, [&](int i) { packed_call(p, i); });
    if (first_us == 0) first_us = t.median_us;
    const double rate = bits_per_weight(p.rule.format) / 8.0 * static_cast<double>(size) / t.median_us * 1e-6;
    std::printf(
        "%5zu x [%zu, %zu]  %-26s %9.2f us ±%4.1f %%  %7.1f TFLOP/s  %5.2f x cuBLAS  weights %5.3f TB/s, "
        "%4.1f %% of the copy rate\n",
        m, l.n, l.k, p.rule.name().c_str(), t.median_us, 50 * t.spread, flops / t.median_us * 1e-6,
        dense.median_us / t.median_us, rate, 100 * rate / copy);
  }
  // activations in E4M3, where there is Hopper: products alone, and behind the rounding of their rows
  for (const bool rounds : {false, true}) {
    const packed<e4m3>& p = l.for_e4m3;
    const matrix_view<const bfloat16> rows(x, m, l.k);
    const auto view = x8.view(m, l.k);
    quantize_e4m3_to(s, rows, view);
    if (!try_matmul(s, view, p.weights(0), matrix_view<bfloat16>(out, m, l.n))) break;
    const auto t = timing::time_rested(s.handle, [&](int i) {
      if (rounds) quantize_e4m3_to(s, rows, view);
      matmul(s, view, p.weights(static_cast<std::size_t>(i)), matrix_view<bfloat16>(out, m, l.n), options);
    });
    std::printf("%5zu x [%zu, %zu]  %-26s %9.2f us ±%4.1f %%  %7.1f TFLOP/s  %5.2f x cuBLAS\n", m, l.n, l.k,
                rounds ? "e4m3 with rounding" : "e4m3", t.median_us, 50 * t.spread, flops / t.median_us * 1e-6,
                dense.median_us / t.median_us);
  }
  std::ostringstream question;
  question << "dense " << m << ' ' << l.n << ' ' << l.k;
  timing::print_contenders(contender.ask(question.str()), first_us);
  if (m >= 512) {
    const packed<bfloat16>& p = l.of_recipes[0];
    const auto theirs = timing::time_in_a_row(s.handle, dense_call);
    const auto ours = timing::time_in_a_row(s.handle, [&](int i) { packed_call(p, i); });
    std::printf("%5zu x [%zu, %zu]  in a row: cuBLAS %9.2f us, %s %9.2f us = %5.2f x cuBLAS\n", m, l.n, l.k,
                theirs.median_us, p.rule.name().c_str(), ours.median_us, theirs.median_us / ours.median_us);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false;
  std::string command;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "quick") == 0) quick = true;
    if (std::strcmp(argv[i], "--contender") == 0 && i + 1 < argc) command = argv[++i];
  }
  timing::contender contender(command);  // before this process has a CUDA context, which must not be forked
  const double copy = timing::start();
  cuda::stream s;
  timing::require(cudaStreamCreate(&s.handle), "cudaStreamCreate");
  cublasHandle_t handle;
  require(cublasCreate(&handle), "cublasCreate");
  require(cublasSetStream(handle, s.handle), "cublasSetStream");
  void* workspace = timing::allocate<std::uint8_t>(std::size_t{64} << 20);
  require(cublasSetWorkspace(handle, workspace, std::size_t{64} << 20), "cublasSetWorkspace");
  auto* x = timing::allocate<bfloat16>(most_rows * 7168);
  auto* out = timing::allocate<bfloat16>(most_rows * 7168);
  fill(x, most_rows * 7168, 1.0f);
  const e4m3_rows x8;
  const std::vector<std::size_t> rows =
      quick ? std::vector<std::size_t>{1, 8, 16, 32, 64, 128, 512, 4096}
            : std::vector<std::size_t>{1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096};
  layer layers[] = {{7168, 7168}, {4096, 7168}, {7168, 2048}};
  for (layer& l : layers) l.make(s);
  for (const std::size_t m : rows) {
    for (const layer& l : layers) run(l, m, copy, s, handle, x, out, x8, contender);
  }
  return 0;
}
