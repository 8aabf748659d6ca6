/// One mixture-of-experts layer on the GPU from float weights: pack, route, group, multiply (gate and up with SwiGLU,
/// then down), combine. Checks sampled tokens against float64 sums over the unpacked weights, and prints what each step
/// took beside what moving its bytes at the rate of a device copy would take.
///   cuda_moe_layer [deepseek | qwen3 | small]...     shapes like DeepSeek-V3's and Qwen3-235B-A22B's; default: both

#include "gpu/cuda_layer.hpp"

#include <tetromino/cuda/moe.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <span>
#include <string>
#include <vector>

namespace {

namespace tt = tetromino;
using tt::bfloat16;

struct layer {
  std::string name;
  std::size_t hidden, inner, experts;
  tt::moe::router_options router;
};

/// The experts' weights, and the router's.
struct layer_weights {
  projection both, down;
  device_array<float> room;  ///< one expert's unpacked weights
  device_array<float> router;

  layer_weights(const layer& l, const tt::recipe& r, const tt::cuda::stream& s)
      : both(r, l.experts, 2 * l.inner, l.hidden, tt::cuda::gating_rows::halves),
        down(r, l.experts, l.hidden, l.inner, tt::cuda::gating_rows::none),
        room(2 * l.inner * l.hidden),
        router(l.experts * l.hidden) {
    std::vector<std::int32_t> all(l.experts);
    std::iota(all.begin(), all.end(), 0);
    both.make(s, r, all, 1000, room.data);
    down.make(s, r, all, 2000, room.data);
    fill(s.handle, router.data, router.size, 3000, 3.0f / std::sqrt(static_cast<float>(l.hidden)));
  }
};

/// Tokens, who serves them, and what comes out.
struct batch {
  device_array<bfloat16> x, out;
  device_array<std::uint16_t> ids;
  device_array<float> weights;

  batch(const layer& l, std::size_t tokens)
      : x(tokens * l.hidden),
        out(tokens * l.hidden),
        ids(tokens * l.router.experts_per_token),
        weights(tokens * l.router.experts_per_token) {}
};

/// How far sampled tokens are from sums in float64, of the unpacked weights of the experts that were chosen.
double relative_error(const layer& l, const tt::cuda::stream& s, const layer_weights& w, const batch& b,
                      std::size_t tokens) {
  const std::size_t k = l.router.experts_per_token;
  const auto chosen = b.ids.host();
  const auto shares = b.weights.host();
  const auto got = b.out.host();
  const device_array<double> sums(2 * l.inner), gated(l.inner), output(l.hidden);
  double error = 0, energy = 0;
  for (const std::size_t t : {std::size_t{0}, tokens / 2, tokens - 1}) {
    std::vector<double> expected(l.hidden, 0.0);
    for (std::size_t i = 0; i < k; ++i) {
      const std::size_t e = chosen[t * k + i];
      tt::dequantize_to(s, w.both.view(e, 1), tt::matrix_view<float>(w.room.data, 2 * l.inner, l.hidden));
      check(cudaStreamSynchronize(s.handle), "unpacking");
      multiply_slowly(s.handle, b.x.data + t * l.hidden, 1, w.room.data, sums.data, 2 * l.inner, l.hidden);
      gate_slowly(s.handle, sums.data, gated.data, l.inner);
      check(cudaDeviceSynchronize(), "the reference");
      tt::dequantize_to(s, w.down.view(e, 1), tt::matrix_view<float>(w.room.data, l.hidden, l.inner));
      check(cudaStreamSynchronize(s.handle), "unpacking");
      multiply_slowly(s.handle, gated.data, 1, w.room.data, output.data, l.hidden, l.inner);
      check(cudaDeviceSynchronize(), "the reference");
      const auto part = output.host();
      for (std::size_t n = 0; n < l.hidden; ++n) expected[n] += static_cast<double>(shares[t * k + i]) * part[n];
    }
    for (std::size_t n = 0; n < l.hidden; ++n) {
      const double d = static_cast<double>(got[t * l.hidden + n]) - expected[n];
      error += d * d, energy += expected[n] * expected[n];
    }
  }
  return std::sqrt(error / energy);
}

bool run(const layer& l, const tt::cuda::stream& s, double copy_rate) {
  const tt::recipe r = tt::recipe::parse("mxfp4-32/oas/mbs-static");
  const std::size_t k = l.router.experts_per_token, most_tokens = 4096;
  std::printf("%s: hidden %zu, inner %zu, %zu experts, top-%zu, %s weights\n", l.name.c_str(), l.hidden, l.inner,
              l.experts, k, r.name().c_str());
  const layer_weights w(l, r, s);

  bool good = true;
  for (const std::size_t tokens : {std::size_t{16}, std::size_t{256}, most_tokens}) {
    const std::size_t calls = tokens * k;
    const batch b(l, tokens);
    const device_array<bfloat16> grouped(calls * l.hidden), h(calls * l.inner), y(calls * l.hidden);
    const device_array<float> logits(tokens * l.experts);
    const device_array<std::uint32_t> offsets(l.experts + 1), rows(calls), pairs(calls);
    fill(s.handle, b.x.data, b.x.size, 4000 + tokens, 1.0f);
    check(cudaStreamSynchronize(s.handle), "fill");
    multiply_slowly(s.handle, b.x.data, tokens, w.router.data, logits.data, l.experts, l.hidden);
    check(cudaDeviceSynchronize(), "the router's product");

    tt::cuda::expert_groups groups;
    groups.expert_offsets = offsets.span(), groups.expert_rows = rows.span(), groups.pair_of_call = pairs.span();
    groups.calls_per_row = k;
    const auto matrix = [](const device_array<bfloat16>& a, std::size_t m, std::size_t n) {
      return tt::matrix_view<const bfloat16>(a.data, m, n);
    };
    const auto route = [&] { tt::cuda::route(s, logits.span(), l.experts, l.router, b.ids.span(), b.weights.span()); };
    const auto group = [&] { tt::cuda::group_by_expert(s, std::span<const std::uint16_t>(b.ids.span()), 0, groups); };
    const auto permute = [&] { tt::cuda::permute<bfloat16>(s, b.x.span(), grouped.span(), l.hidden, groups); };
    const auto multiply_in = [&] {
      tt::grouped_matmul(s, matrix(grouped, calls, l.hidden), w.both.ready(), offsets.span(),
                         tt::matrix_view<bfloat16>(h.data, calls, l.inner));
    };
    const auto multiply_out = [&] {
      tt::grouped_matmul(s, matrix(h, calls, l.inner), w.down.ready(), offsets.span(),
                         tt::matrix_view<bfloat16>(y.data, calls, l.hidden));
    };
    const auto combine = [&] {
      tt::cuda::combine<bfloat16>(s, y.span(), b.weights.span(), b.out.span(), l.hidden, groups);
    };
    check(cudaMemset(b.out.data, 0xFF, b.out.size * sizeof(bfloat16)), "cudaMemset");
    const auto layer_once = [&] { route(), group(), permute(), multiply_in(), multiply_out(), combine(); };
    layer_once();
    check(cudaStreamSynchronize(s.handle), "the layer");

    const double relative = relative_error(l, s, w, b, tokens);
    const bool agrees = relative <= 1e-2;  // three roundings to bfloat16 lie between; NaN does not pass
    good = good && agrees;

    std::vector<bool> used(l.experts, false);
    for (const std::uint16_t e : b.ids.host()) used[e] = true;
    const auto active = static_cast<double>(std::count(used.begin(), used.end(), true));
    const double bits = tt::bits_per_weight(r.format) / 8, d_calls = static_cast<double>(calls);
    const auto row = [](std::size_t n) { return 2.0 * static_cast<double>(n); };
    const double in_bytes =
        active * bits * static_cast<double>(2 * l.inner * l.hidden) + d_calls * row(l.hidden + l.inner);
    const double out_bytes =
        active * bits * static_cast<double>(l.inner * l.hidden) + d_calls * row(l.hidden + l.inner);
    std::printf(" %4zu tokens, %3.0f experts: relative error %.1e %s\n", tokens, active, relative,
                agrees ? "" : "TOO LARGE");
    const auto line = [&](const char* step, double ms, double bytes, double flops) {
      std::printf("   %-14s %9.1f us   ceiling %8.1f us %s", step, 1e3 * ms, bytes / copy_rate * 1e-6,
                  flops == 0 ? "\n" : "");
      if (flops != 0) std::printf("  %6.1f TFLOP/s\n", flops / ms * 1e-9);
    };
    const double flops = 2 * d_calls * static_cast<double>(l.inner * l.hidden);
    line("route", milliseconds(s.handle, route), 4.0 * static_cast<double>(tokens * l.experts), 0);
    line("group", milliseconds(s.handle, group), 10 * d_calls, 0);
    line("permute", milliseconds(s.handle, permute),
         d_calls * row(l.hidden) + static_cast<double>(tokens) * row(l.hidden), 0);
    line("gate, up", milliseconds(s.handle, multiply_in), in_bytes, 2 * flops);
    line("down", milliseconds(s.handle, multiply_out), out_bytes, flops);
    line("combine", milliseconds(s.handle, combine),
         d_calls * row(l.hidden) + static_cast<double>(tokens) * row(l.hidden), 0);
    line("all", milliseconds(s.handle, layer_once), in_bytes + out_bytes + 2 * d_calls * row(l.hidden), 3 * flops);
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) try {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  tt::moe::router_options grouped_sigmoid, softmax;
  grouped_sigmoid.rule = tt::moe::gating::sigmoid, grouped_sigmoid.experts_per_token = 8;
  grouped_sigmoid.groups = 8, grouped_sigmoid.groups_kept = 4, grouped_sigmoid.scale = 2.5f;
  softmax.experts_per_token = 8;
  const std::vector<layer> layers = {{"deepseek", 7168, 2048, 256, grouped_sigmoid},
                                     {"qwen3", 4096, 1536, 128, softmax},
                                     {"small", 1024, 512, 32, softmax}};
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) names = {"deepseek", "qwen3"};

  tt::cuda::stream s;
  check(cudaStreamCreate(&s.handle), "cudaStreamCreate");
  double copy_rate = 0;  // bytes read plus written, in GB/ms
  {
    const device_array<std::uint8_t> from(std::size_t{1} << 30), to(std::size_t{1} << 30);
    check(cudaMemset(from.data, 1, from.size), "cudaMemset");
    copy_rate = 2.0 * static_cast<double>(from.size) * 1e-9 / milliseconds(s.handle, [&] {
                  check(cudaMemcpyAsync(to.data, from.data, from.size, cudaMemcpyDeviceToDevice, s.handle), "the copy");
                });
  }
  std::printf("a device copy moves %.2f TB/s; ceilings are bytes at that rate\n", copy_rate);
  bool good = true;
  for (const std::string& name : names) {
    const auto found = std::find_if(layers.begin(), layers.end(), [&](const layer& l) { return l.name == name; });
    if (found == layers.end()) {
      std::fprintf(stderr, "no layer '%s': expected deepseek, qwen3 or small\n", name.c_str());
      return 2;
    }
    good = run(*found, s, copy_rate) && good;
  }
  return good ? 0 : 1;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
