/// How fast the GPU multiplies by the packed weights of a layer's experts, against cuBLAS on bfloat16 weights: a loop
/// of calls, one for each expert that got rows, whose sizes the host knows; and one dense product of the same work.
/// Calls are captured in graphs, and the GPU rests before each timing. A routing is drawn once, but call i of eight
/// gives the rows of expert e to expert (e + i E / 8) mod E: otherwise the cache would hold the few experts that a few
/// tokens choose.
///   cuda_grouped [--contender COMMAND] [--tokens N,N...] [DATA_FOLDER [LAYER...]]
/// Layers: qwen3, deepseek, gpt-oss-20b, gpt-oss-20b-down, gpt-oss-120b, gpt-oss-120b-down; without names, all.

#include "bundled_routing.hpp"
#include "cuda_contender.hpp"
#include "cuda_timing.hpp"

#include <tetromino/cuda.hpp>
#include <tetromino/scaling.hpp>

#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
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
  const std::string path = folder + "/routing-128x8.small.safetensors";
  if (!std::filesystem::exists(path)) return {};
  const tetromino::moe::trace trace = bundled::read_routing(path);
  // One token of each of many requests in decoding, or consecutive tokens of a batch: every 5th token.
  std::vector<std::uint32_t> counts(128, 0);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (const std::uint16_t e : trace.view().experts_of(t * 5, 4)) ++counts[e];
  }
  return counts;
}

struct layer {
  const char* name;
  std::size_t experts, top_k, n, k;
};

/// The first projections (gate and up) of an expert layer of Qwen3-235B-A22B and of DeepSeek-V3, and both of gpt-oss.
constexpr layer layers[] = {
    {"qwen3", 128, 8, 3072, 4096},        {"deepseek", 256, 8, 4096, 7168},
    {"gpt-oss-20b", 32, 4, 5760, 2880},   {"gpt-oss-20b-down", 32, 4, 2880, 2880},
    {"gpt-oss-120b", 128, 4, 5760, 2880}, {"gpt-oss-120b-down", 128, 4, 2880, 2880},
};

constexpr std::size_t turns = 8;  ///< calls that give the rows to other experts each

/// Device memory that ends with its scope.
template <class T>
struct device_array {
  T* data;
  std::size_t size;
  explicit device_array(std::size_t n) : data(timing::allocate<T>(n)), size(n) {}
  device_array(const device_array&) = delete;
  ~device_array() { cudaFree(data); }
  [[nodiscard]] std::span<T> span() const { return {data, size}; }
};

/// Random values of about N(0, 0.5), the same four million over and over.
void fill(const device_array<bfloat16>& to) {
  static const std::vector<bfloat16> values = [] {
    std::vector<bfloat16> out(std::size_t{1} << 22);
    std::uint64_t state = 1;
    for (auto& v : out) {
      float sum = -3;
      for (int i = 0; i < 6; ++i) sum += static_cast<float>(next_random(state)) * 0x1p-31f;
      v = bfloat16(sum);
    }
    return out;
  }();
  for (std::size_t i = 0; i < to.size; i += values.size()) {
    timing::require(cudaMemcpy(to.data + i, values.data(), std::min(values.size(), to.size - i) * sizeof(bfloat16),
                               cudaMemcpyHostToDevice),
                    "cudaMemcpy");
  }
}

/// A layer's experts under one recipe, repacked for activations of type T.
template <class T>
struct packed_experts {
  recipe rule;
  cuda::repacked_shape shape;
  device_array<std::byte> bytes;

  packed_experts(const char* name, const layer& l, const device_array<bfloat16>& dense, const cuda::stream& s)
      : rule(recipe::parse(name)), shape{rule.format, l.experts, l.n, l.k}, bytes(shape.bytes()) {
    const packed_shape linear{rule.format, l.experts, l.n, l.k};
    const device_array<std::uint8_t> codes(linear.code_bytes()), scales(linear.scale_bytes());
    const device_array<std::uint8_t> macros(linear.macro_bytes());
    const device_array<float> tensor_scales(rule.format.scale == scale_type::e4m3 ? 1 : 0);
    const packed_view<any_format, std::uint8_t> view{rule.format,  l.experts,     l.n,           l.k,
                                                     codes.span(), scales.span(), macros.span(), tensor_scales.span()};
    quantize_options options;
    options.rule = rule.rule, options.macro = rule.macro, options.special = special_values::poison;
    quantize_to(s, batch_view<const bfloat16>(dense.data, l.experts, l.n, l.k), view, options);
    repack_to(s, view, weights());
    timing::require(cudaStreamSynchronize(s.handle), "repacking");
  }
  [[nodiscard]] cuda::repacked_view<T, std::byte> weights() const { return {shape, bytes.span()}; }
};

/// The rows of each expert in each of the turns, as offsets.
struct routing {
  const char* name;
  std::vector<std::vector<std::uint32_t>> offsets{};
  std::size_t active = 0;  ///< experts that get rows

  routing(const char* name_, const std::vector<std::uint32_t>& counts) : name(name_) {
    const std::size_t experts = counts.size();
    for (const std::uint32_t n : counts) active += n != 0;
    for (std::size_t i = 0; i < turns; ++i) {
      std::vector<std::uint32_t> of_turn(experts + 1, 0);
      for (std::size_t e = 0; e < experts; ++e) {
        of_turn[e + 1] = of_turn[e] + counts[(e + experts - i * experts / turns) % experts];
      }
      offsets.push_back(std::move(of_turn));
    }
  }
};

struct setting {
  cuda::stream stream;
  cublasHandle_t blas;
  double copy;
  timing::contender* contender;
};

/// Times one routing: cuBLAS once, then ours under each recipe, then the contender.
void run(const layer& l, const routing& r, const setting& s, const device_array<bfloat16>& dense,
         const std::vector<std::unique_ptr<packed_experts<bfloat16>>>& ours, const packed_experts<e4m3>& ours_e4m3,
         const bfloat16* x, bfloat16* out, const e4m3_view<std::uint8_t>& room) {
  const std::size_t rows = r.offsets[0].back(), size = l.n * l.k;
  const device_array<std::uint32_t> offsets(turns * (l.experts + 1));
  for (std::size_t i = 0; i < turns; ++i) {
    timing::require(cudaMemcpy(offsets.data + i * (l.experts + 1), r.offsets[i].data(), (l.experts + 1) * 4,
                               cudaMemcpyHostToDevice),
                    "cudaMemcpy");
  }
  const float one = 1, zero = 0;
  const auto gemm = [&](const bfloat16* w, std::size_t first, std::size_t m) {
    require(cublasGemmEx(s.blas, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(l.n), static_cast<int>(m),
                         static_cast<int>(l.k), &one, w, CUDA_R_16BF, static_cast<int>(l.k), x + first * l.k,
                         CUDA_R_16BF, static_cast<int>(l.k), &zero, out + first * l.n, CUDA_R_16BF,
                         static_cast<int>(l.n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            "cublasGemmEx");
  };
  const auto loop = timing::time_rested(s.stream.handle, [&](int i) {
    const auto& of_turn = r.offsets[static_cast<std::size_t>(i) % turns];
    for (std::size_t e = 0; e < l.experts; ++e) {
      if (of_turn[e + 1] != of_turn[e]) gemm(dense.data + e * size, of_turn[e], of_turn[e + 1] - of_turn[e]);
    }
  });
  const auto one_product = timing::time_rested(s.stream.handle, [&](int) { gemm(dense.data, 0, rows); });
  double first_us = 0;
  for (const auto& w : ours) {
    const auto t = timing::time_rested(s.stream.handle, [&](int i) {
      const std::size_t turn = static_cast<std::size_t>(i) % turns;
      grouped_matmul(s.stream, matrix_view<const bfloat16>(x, rows, l.k), w->weights(),
                     offsets.span().subspan(turn * (l.experts + 1), l.experts + 1),
                     matrix_view<bfloat16>(out, rows, l.n));
    });
    if (first_us == 0) first_us = t.median_us;
    const double bytes = bits_per_weight(w->rule.format) / 8.0 * static_cast<double>(size * r.active);
    const double flops = 2.0 * static_cast<double>(rows * size);
    std::printf(
        "%-18s %4zu tokens, %-8s %3zu experts  %-24s %9.1f us ±%4.1f %%  loop %9.1f us = %5.2f x  dense %8.1f us = "
        "%4.2f x  %6.1f TFLOP/s  %4.1f %% of the copy rate\n",
        l.name, rows / l.top_k, r.name, r.active, w->rule.name().c_str(), t.median_us, 50 * t.spread, loop.median_us,
        loop.median_us / t.median_us, one_product.median_us, one_product.median_us / t.median_us,
        flops / t.median_us * 1e-6, 100 * bytes / t.median_us * 1e-6 / s.copy);
  }
  // activations in E4M3, where there is Hopper: products alone, and behind the rounding of their rows
  const e4m3_view<std::uint8_t> x8{rows, l.k, room.values.first(rows * room.stride()), room.scales.first(rows)};
  const auto product = [&](std::size_t turn) {
    return try_grouped_matmul(s.stream, x8, ours_e4m3.weights(),
                              offsets.span().subspan(turn * (l.experts + 1), l.experts + 1),
                              matrix_view<bfloat16>(out, rows, l.n));
  };
  for (const bool rounds : {false, true}) {
    const matrix_view<const bfloat16> of(x, rows, l.k);
    quantize_e4m3_to(s.stream, of, x8);
    if (!product(0)) break;
    const auto t = timing::time_rested(s.stream.handle, [&](int i) {
      if (rounds) quantize_e4m3_to(s.stream, of, x8);
      product(static_cast<std::size_t>(i) % turns).value();
    });
    std::printf("%-18s %4zu tokens, %-8s %3zu experts  %-24s %9.1f us ±%4.1f %%  loop %5.2f x  dense %4.2f x\n", l.name,
                rows / l.top_k, r.name, r.active, rounds ? "e4m3 with rounding" : "e4m3", t.median_us, 50 * t.spread,
                loop.median_us / t.median_us, one_product.median_us / t.median_us);
  }
  std::ostringstream question;
  question << "grouped " << l.experts << ' ' << l.n << ' ' << l.k;
  for (const std::uint32_t offset : r.offsets[0]) question << ' ' << offset;
  timing::print_contenders(s.contender->ask(question.str()), first_us);
  std::fflush(stdout);
}

void run(const layer& l, const std::vector<std::size_t>& tokens, const std::string& folder, const setting& s) {
  const std::size_t most = *std::max_element(tokens.begin(), tokens.end()) * l.top_k;
  const device_array<bfloat16> dense(l.n * l.k * l.experts), x(most * l.k), out(most * l.n);
  fill(dense), fill(x);
  const std::size_t stride = (l.k + 127) / 128 * 128;
  const device_array<std::uint8_t> values(most * stride);
  const device_array<float> scales(most);
  const e4m3_view<std::uint8_t> room{most, l.k, values.span(), scales.span()};
  std::vector<std::unique_ptr<packed_experts<bfloat16>>> ours;
  for (const char* name : {"mxfp4-32/oas", "mxfp4-32/oas/mbs-static", "nvfp4/amax", "mxfp4-32/floor/mbs-static@8x2"}) {
    ours.push_back(std::make_unique<packed_experts<bfloat16>>(name, l, dense, s.stream));
  }
  const packed_experts<e4m3> ours_e4m3("mxfp4-32/oas", l, dense, s.stream);
  for (const std::size_t n : tokens) {
    run(l, routing("even", rows_of_experts(n, l.experts, l.top_k, 0.0)), s, dense, ours, ours_e4m3, x.data, out.data,
        room);
    run(l, routing("skewed", rows_of_experts(n, l.experts, l.top_k, 1.0)), s, dense, ours, ours_e4m3, x.data, out.data,
        room);
    if (l.experts != 128 || l.top_k != 8) continue;
    const auto recorded = recorded_rows(folder, n);
    if (!recorded.empty()) run(l, routing("recorded", recorded), s, dense, ours, ours_e4m3, x.data, out.data, room);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string command;
  std::vector<std::size_t> tokens{1, 8, 16, 64, 256, 1024, 4096};
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--contender" && i + 1 < argc) {
      command = argv[++i];
    } else if (word == "--tokens" && i + 1 < argc) {
      tokens.clear();
      std::istringstream list(argv[++i]);
      for (std::string n; std::getline(list, n, ',');) tokens.push_back(std::stoul(n));
    } else {
      words.push_back(word);
    }
  }
  const std::string folder = words.empty() ? "examples/data" : words[0];
  timing::contender contender(command);  // before this process has a CUDA context, which must not be forked
  setting s{};
  s.contender = &contender;
  s.copy = timing::start();
  timing::require(cudaStreamCreate(&s.stream.handle), "cudaStreamCreate");
  require(cublasCreate(&s.blas), "cublasCreate");
  require(cublasSetStream(s.blas, s.stream.handle), "cublasSetStream");
  void* workspace = timing::allocate<std::uint8_t>(std::size_t{64} << 20);
  require(cublasSetWorkspace(s.blas, workspace, std::size_t{64} << 20), "cublasSetWorkspace");
  bool is_known = words.size() < 2;
  for (const layer& l : layers) {
    const bool is_wanted = words.size() < 2 || std::find(words.begin() + 1, words.end(), l.name) != words.end();
    is_known = is_known || is_wanted;
    if (is_wanted) run(l, tokens, folder, s);
  }
  if (!is_known) std::fprintf(stderr, "no such layer; see the head of cuda_grouped.cu\n");
  return is_known ? 0 : 2;
}
