/// How fast the GPU routes tokens and moves them to experts and back, against a device copy.

#include "cuda_timing.hpp"

#include <tetromino/cuda/moe.hpp>
#include <tetromino/float16.hpp>

#include <cstdint>
#include <vector>

namespace {

using namespace tetromino;

struct model {
  const char* name;
  std::size_t experts, k, width;
  moe::router_options options;
};

void run(const model& m, std::size_t tokens, double copy) {
  const std::size_t calls = tokens * m.k;
  auto* logits = timing::allocate<float>(tokens * m.experts);
  auto* ids = timing::allocate<std::uint16_t>(calls);
  auto* weights = timing::allocate<float>(calls);
  {
    std::vector<float> host(tokens * m.experts);
    std::uint64_t state = 1;
    for (auto& x : host) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      x = static_cast<float>(state >> 40) * 0x1p-21f - 4.0f;
    }
    timing::require(cudaMemcpy(logits, host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  moe::router_options options = m.options;
  options.experts_per_token = m.k;
  float* bias = nullptr;
  if (options.rule == moe::gating::sigmoid) {
    bias = timing::allocate<float>(m.experts);
    timing::require(cudaMemset(bias, 0, m.experts * sizeof(float)), "cudaMemset");
    options.bias = {bias, m.experts};
  }
  cuda::stream s;
  timing::require(cudaStreamCreate(&s.handle), "cudaStreamCreate");
  const auto row = [&](const char* what, std::size_t n, const timing::measured& t, double bytes) {
    timing::print_row(std::string(m.name) + ", " + std::to_string(n) + " tokens, " + what, t, bytes, copy);
  };

  const auto routed = timing::time_rested(s.handle, [&](int) {
    cuda::route(s, {logits, tokens * m.experts}, m.experts, options, {ids, calls}, {weights, calls});
  });
  row("route", tokens, routed, static_cast<double>(tokens * m.experts * 4 + calls * 6));

  for (const std::size_t rows : {std::size_t{64}, std::size_t{4096}, std::size_t{16384}}) {
    const std::size_t pairs = rows * m.k;
    auto* offsets = timing::allocate<std::uint32_t>(m.experts + 1);
    auto* expert_rows = timing::allocate<std::uint32_t>(pairs);
    auto* pair_of_call = timing::allocate<std::uint32_t>(pairs);
    auto* x = timing::allocate<bfloat16>(rows * m.width);
    auto* y = timing::allocate<bfloat16>(pairs * m.width);
    timing::require(cudaMemset(x, 0x3C, rows * m.width * 2), "cudaMemset");
    const cuda::expert_groups groups{{offsets, m.experts + 1}, {expert_rows, pairs}, {pair_of_call, pairs}, m.k};
    const std::span<const std::uint16_t> slots(ids, pairs);
    const std::span<const bfloat16> from(x, rows * m.width), outputs(y, pairs * m.width);
    const auto grouped = timing::time_rested(s.handle, [&](int) { cuda::group_by_expert(s, slots, 0, groups); });
    std::printf("%-12s %7zu tokens  %-8s %9.1f us\n", m.name, rows, "group", grouped.median_us);
    const double bytes = static_cast<double>((rows + pairs) * m.width * 2);
    const auto permuted = timing::time_rested(s.handle, [&](int) {
      cuda::permute<bfloat16>(s, from, {y, pairs * m.width}, m.width, groups);
    });
    row("permute", rows, permuted, bytes);
    const auto combined = timing::time_rested(s.handle, [&](int) {
      cuda::try_combine<bfloat16>(s, outputs, std::span<const float>(weights, pairs), {x, rows * m.width}, m.width,
                                  groups)
          .value();
    });
    row("combine", rows, combined, bytes);
    for (void* p : {static_cast<void*>(offsets), static_cast<void*>(expert_rows), static_cast<void*>(pair_of_call),
                    static_cast<void*>(x), static_cast<void*>(y)}) {
      cudaFree(p);
    }
  }
  timing::require(cudaStreamDestroy(s.handle), "cudaStreamDestroy");
  cudaFree(logits), cudaFree(ids), cudaFree(weights), cudaFree(bias);
}

}  // namespace

int main() {
  const double copy = timing::start();
  moe::router_options deepseek;
  deepseek.rule = moe::gating::sigmoid, deepseek.groups = 8, deepseek.groups_kept = 4, deepseek.scale = 2.5f;
  moe::router_options gpt_oss;
  gpt_oss.rule = moe::gating::topk_softmax;
  run({"DeepSeek-V3", 256, 8, 7168, deepseek}, std::size_t{1} << 18, copy);
  run({"Qwen3-235B", 128, 8, 4096, {}}, std::size_t{1} << 19, copy);
  run({"gpt-oss-120b", 128, 4, 2880, gpt_oss}, std::size_t{1} << 19, copy);
  return 0;
}
