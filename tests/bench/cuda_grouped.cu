/// How fast the GPU multiplies by the packed weights of a layer's experts, against cuBLAS on bfloat16 weights: a loop
/// of calls, one for each expert that got rows, whose sizes the host knows; and one dense product of the same work.
/// Calls are captured in graphs; the weights of all experts together exceed the cache.
///   cuda_grouped [DATA_FOLDER]

#include "cuda_timing.hpp"

#include <tetromino/cuda.hpp>
#include <tetromino/scaling.hpp>

#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace {

using namespace tetromino;

void require(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "%s: cuBLAS status %d\n", what, static_cast<int>(status));
  std::exit(1);
}

std::uint64_t next_random(std::uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

/// Experts of `tokens` tokens, top-k of them for each, none twice for one token: expert e is drawn in proportion to
/// 1 / (1 + e)^skew.
std::vector<std::uint32_t> rows_of_experts(std::size_t tokens, std::size_t experts, std::size_t top_k, double skew) {
  std::vector<double> up_to(experts);
  double sum = 0;
  for (std::size_t e = 0; e < experts; ++e) up_to[e] = sum += std::pow(1.0 + static_cast<double>(e), -skew);
  std::vector<std::uint32_t> counts(experts, 0);
  std::uint64_t state = 7 + tokens;
  for (std::size_t t = 0; t < tokens; ++t) {
    std::vector<std::size_t> chosen;
    while (chosen.size() < top_k) {
      const double u = static_cast<double>(next_random(state)) * 0x1p-31 * sum;
      const auto e = static_cast<std::size_t>(std::upper_bound(up_to.begin(), up_to.end(), u) - up_to.begin());
      if (e >= experts || std::find(chosen.begin(), chosen.end(), e) != chosen.end()) continue;
      chosen.push_back(e);
      ++counts[e];
    }
  }
  return counts;
}

/// What a recorded trace (128 experts, 8 layers, top-8) chose for `tokens` tokens in layer 4; empty without the file.
std::vector<std::uint32_t> recorded_rows(const std::string& folder, std::size_t tokens) {
  std::ifstream file(folder + "/routing-128x8.small.safetensors", std::ios::binary);
  if (!file) return {};
  std::uint64_t header_bytes = 0;
  file.read(reinterpret_cast<char*>(&header_bytes), 8);
  std::string header(header_bytes, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header_bytes));
  const std::size_t at = header.find("data_offsets\":[", header.find("\"experts\""));
  if (at == std::string::npos) return {};
  const std::uint64_t begin = std::strtoull(header.c_str() + at + 15, nullptr, 10);
  // One token of each of many requests in decoding, or consecutive tokens of a batch: every 5th token.
  std::vector<std::uint32_t> counts(128, 0);
  for (std::size_t t = 0; t < tokens; ++t) {
    file.seekg(static_cast<std::streamoff>(8 + header_bytes + begin + (t * 5 * 8 + 4) * 8));
    unsigned char chosen[8];
    file.read(reinterpret_cast<char*>(chosen), 8);
    for (const unsigned char e : chosen) ++counts[e];
  }
  return counts;
}

struct layer {
  const char* name;
  std::size_t experts, n, k;
};

void run(const layer& l, const std::string& folder, const cuda::stream& s, cublasHandle_t handle, double copy) {
  const std::size_t size = l.n * l.k, most = 4096 * 8;
  auto* dense = timing::allocate<bfloat16>(size * l.experts);
  auto* x = timing::allocate<bfloat16>(most * l.k);
  auto* out = timing::allocate<bfloat16>(most * l.n);
  {
    std::vector<bfloat16> host(std::size_t{1} << 22);
    std::uint64_t state = 1;
    for (auto& v : host) {
      float sum = -3;
      for (int i = 0; i < 6; ++i) sum += static_cast<float>(next_random(state)) * 0x1p-31f;
      v = bfloat16::encode(sum);
    }
    for (bfloat16* to : {dense, x}) {
      const std::size_t n = to == dense ? size * l.experts : most * l.k;
      for (std::size_t i = 0; i < n; i += host.size()) {
        timing::require(cudaMemcpy(to + i, host.data(), std::min(host.size(), n - i) * 2, cudaMemcpyHostToDevice),
                        "cudaMemcpy");
      }
    }
  }
  auto* offsets = timing::allocate<std::uint32_t>(l.experts + 1);
  for (const char* name : {"mxfp4-32/oas", "mxfp4-32/oas/mbs-static", "nvfp4/amax"}) {
    const recipe r = recipe::parse(name);
    const packed_shape shape{r.format, l.experts, l.n, l.k};
    const cuda::repacked_shape repacked_shape{r.format, l.experts, l.n, l.k};
    auto* codes = timing::allocate<std::uint8_t>(shape.code_bytes());
    auto* scales = timing::allocate<std::uint8_t>(shape.scale_bytes());
    auto* macros = timing::allocate<std::uint8_t>(shape.macro_bytes() + 1);
    auto* tensor_scales = timing::allocate<float>(1);
    auto* repacked = timing::allocate<std::byte>(repacked_shape.bytes());
    const packed_view<any_format, std::uint8_t> view{r.format,
                                                     l.experts,
                                                     l.n,
                                                     l.k,
                                                     {codes, shape.code_bytes()},
                                                     {scales, shape.scale_bytes()},
                                                     {macros, shape.macro_bytes()},
                                                     {tensor_scales, r.format.scale == scale_type::e4m3 ? 1u : 0u}};
    quantize_options options;
    options.rule = r.rule, options.macro = r.macro, options.special = special_values::poison;
    quantize_to(s, batch_view<const bfloat16>(dense, l.experts, l.n, l.k), view, options);
    const cuda::repacked_view<bfloat16, std::byte> weights{repacked_shape, {repacked, repacked_shape.bytes()}};
    repack_to(s, view, weights);
    timing::require(cudaStreamSynchronize(s.handle), "repacking");
    for (const std::size_t tokens : {1, 8, 16, 64, 256, 1024, 4096}) {
      for (const char* routing : {"even", "skewed", "recorded"}) {
        const auto counts = routing[0] == 'r'
                                ? (l.experts == 128 ? recorded_rows(folder, tokens) : std::vector<std::uint32_t>{})
                                : rows_of_experts(tokens, l.experts, 8, routing[0] == 's' ? 1.0 : 0.0);
        if (counts.empty()) continue;
        std::vector<std::uint32_t> host_offsets(l.experts + 1, 0);
        std::size_t active = 0;
        for (std::size_t e = 0; e < l.experts; ++e) {
          host_offsets[e + 1] = host_offsets[e] + counts[e];
          active += counts[e] != 0;
        }
        timing::require(cudaMemcpy(offsets, host_offsets.data(), host_offsets.size() * 4, cudaMemcpyHostToDevice),
                        "cudaMemcpy");
        const std::size_t rows = tokens * 8;
        const float one = 1, zero = 0;
        const auto gemm = [&](const bfloat16* w, std::size_t first, std::size_t m) {
          require(cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(l.n), static_cast<int>(m),
                               static_cast<int>(l.k), &one, w, CUDA_R_16BF, static_cast<int>(l.k), x + first * l.k,
                               CUDA_R_16BF, static_cast<int>(l.k), &zero, out + first * l.n, CUDA_R_16BF,
                               static_cast<int>(l.n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                  "cublasGemmEx");
        };
        const auto loop = timing::time_graph(s.handle, 3, 1, [&](int) {
          for (std::size_t e = 0; e < l.experts; ++e) {
            if (counts[e] != 0) gemm(dense + e * size, host_offsets[e], counts[e]);
          }
        });
        const auto one_product = timing::time_graph(s.handle, 3, 1, [&](int) { gemm(dense, 0, rows); });
        const auto t = timing::time_graph(s.handle, 5, 2, [&](int) {
          grouped_matmul(s, matrix_view<const bfloat16>(x, rows, l.k), weights, {offsets, l.experts + 1},
                         matrix_view<bfloat16>(out, rows, l.n));
        });
        const double bytes = bits_per_weight(r.format) / 8.0 * static_cast<double>(size * active);
        const double flops = 2.0 * static_cast<double>(rows * size);
        std::printf(
            "%-14s %4zu tokens, %-8s %3zu experts  %-24s %9.1f us ±%4.1f %%  loop %9.1f us = %5.2f x  dense %8.1f us = "
            "%4.2f x  %6.1f TFLOP/s  %4.1f %% of the copy rate\n",
            l.name, tokens, routing, active, name, t.median_us, 50 * t.spread, loop.median_us,
            loop.median_us / t.median_us, one_product.median_us, one_product.median_us / t.median_us,
            flops / t.median_us * 1e-6, 100 * bytes / t.median_us * 1e-6 / copy);
        std::fflush(stdout);
      }
    }
    for (void* p : {static_cast<void*>(codes), static_cast<void*>(scales), static_cast<void*>(macros),
                    static_cast<void*>(tensor_scales), static_cast<void*>(repacked)}) {
      cudaFree(p);
    }
  }
  for (void* p :
       {static_cast<void*>(dense), static_cast<void*>(x), static_cast<void*>(out), static_cast<void*>(offsets)}) {
    cudaFree(p);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  cuda::stream s;
  timing::require(cudaStreamCreate(&s.handle), "cudaStreamCreate");
  const double copy = timing::copy_rate(s.handle, std::size_t{1} << 30);
  std::printf("device copy: %.3f TB/s, bytes read plus written\n", copy);
  cublasHandle_t handle;
  require(cublasCreate(&handle), "cublasCreate");
  require(cublasSetStream(handle, s.handle), "cublasSetStream");
  void* workspace = timing::allocate<std::uint8_t>(std::size_t{64} << 20);
  require(cublasSetWorkspace(handle, workspace, std::size_t{64} << 20), "cublasSetWorkspace");
  const std::string folder = argc > 1 ? argv[1] : "examples/data";
  // The first projections (gate and up) of one expert layer of Qwen3-235B-A22B, and of DeepSeek-V3.
  for (const layer& l : {layer{"3072 x 4096", 128, 3072, 4096}, layer{"4096 x 7168", 256, 4096, 7168}}) {
    run(l, folder, s, handle, copy);
  }
  return 0;
}
