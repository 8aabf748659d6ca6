/// One mixture-of-experts layer on the GPU from float weights: pack, route, group, multiply (gate and up with SwiGLU,
/// then down), combine. Checks sampled tokens against float64 sums over the unpacked weights, and prints what each step
/// and the layer take in a CUDA graph on a rested GPU, as an engine decodes, beside what moving their bytes at the rate
/// of a device copy would take. Calls in the graph have other experts, in eight turns: else the cache would hold the
/// few that a few tokens choose.
///   cuda_moe_layer [--tokens N,N...] [--weights RECIPE] [--activations bfloat16|e4m3] [LAYER]...
/// Layers have the shapes of DeepSeek-V3 (deepseek), Qwen3-235B-A22B (qwen3), gpt-oss-20b and gpt-oss-120b, by default
/// all of them; or small. Recipes are MXFP4's that need no rotation, by default mxfp4-32/oas/mbs-static. With e4m3, for
/// which they are those of mxfp4-32 without macro blocks, both products read activations in E4M3: tokens are rounded
/// before they are copied to their experts, and what SwiGLU gives again.

#include "gpu/cuda_layer.hpp"

#include <tetromino/cuda/moe.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <utility>
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
  bool for_e4m3;
  projection both, down;
  device_array<float> room;  ///< one expert's unpacked weights
  device_array<float> router;

  layer_weights(const layer& l, const tt::recipe& r, bool for_e4m3_, const tt::cuda::stream& s)
      : for_e4m3(for_e4m3_),
        both(r, l.experts, 2 * l.inner, l.hidden, tt::cuda::gating_rows::halves),
        down(r, l.experts, l.hidden, l.inner, tt::cuda::gating_rows::none),
        room(2 * l.inner * l.hidden),
        router(l.experts * l.hidden) {
    std::vector<std::int32_t> all(l.experts);
    std::iota(all.begin(), all.end(), 0);
    for (const auto& [weights, seed] : {std::pair(&both, 1000u), std::pair(&down, 2000u)}) {
      if (for_e4m3) {
        weights->make<tt::e4m3>(s, r, all, seed, room.data);
      } else {
        weights->make(s, r, all, seed, room.data);
      }
    }
    fill(s.handle, router.data, router.size, 3000, 3.0f / std::sqrt(static_cast<float>(l.hidden)));
  }
};

constexpr std::size_t turns = 8;  // calls of the layer with other experts each

/// How the tokens of one call are routed.
struct routing {
  device_array<float> logits, weights;
  device_array<std::uint16_t> ids;
  device_array<std::uint32_t> offsets, rows, pairs;
  tt::cuda::expert_groups groups;

  /// `logits_` has those of the tokens; expert e takes the place of expert e - shift.
  routing(const layer& l, std::span<const float> logits_, std::size_t shift)
      : logits(moved(logits_, l.experts, shift)),
        weights(logits.size / l.experts * l.router.experts_per_token),
        ids(weights.size),
        offsets(l.experts + 1),
        rows(weights.size),
        pairs(weights.size),
        groups{offsets.span(), rows.span(), pairs.span(), l.router.experts_per_token} {}

 private:
  static std::vector<float> moved(std::span<const float> from, std::size_t experts, std::size_t shift) {
    std::vector<float> out(from.size());
    for (std::size_t i = 0; i < from.size(); i += experts) {
      const auto row = from.subspan(i, experts);
      std::rotate_copy(row.begin(), row.end() - static_cast<std::ptrdiff_t>(shift), row.end(),
                       out.begin() + static_cast<std::ptrdiff_t>(i));
    }
    return out;
  }
};

/// Activations in E4M3.
struct e4m3_array {
  std::size_t cols;
  device_array<std::uint8_t> values;
  device_array<float> scales;

  e4m3_array(std::size_t rows, std::size_t cols_)
      : cols(cols_), values(rows * tt::e4m3_view<>{rows, cols}.stride()), scales(rows) {}
  [[nodiscard]] tt::e4m3_view<std::uint8_t> view() const { return {scales.size, cols, values.span(), scales.span()}; }
};

/// Tokens, how they are routed in each turn, and what they become.
struct batch {
  device_array<bfloat16> x, grouped, gated, y, out;
  e4m3_array x8, grouped8, gated8;  ///< without rows where activations stay bfloat16
  std::deque<routing> routings;

  batch(const layer& l, const layer_weights& w, const tt::cuda::stream& s, std::size_t tokens)
      : x(tokens * l.hidden),
        grouped(x.size * l.router.experts_per_token),
        gated(tokens * l.router.experts_per_token * l.inner),
        y(grouped.size),
        out(x.size),
        x8(w.for_e4m3 ? tokens : 0, l.hidden),
        grouped8(x8.scales.size * l.router.experts_per_token, l.hidden),
        gated8(grouped8.scales.size, l.inner) {
    fill(s.handle, x.data, x.size, 4000 + tokens, 1.0f);
    check(cudaStreamSynchronize(s.handle), "fill");
    const device_array<float> logits(tokens * l.experts);
    multiply_slowly(s.handle, x.data, tokens, w.router.data, logits.data, l.experts, l.hidden);
    check(cudaDeviceSynchronize(), "the router's product");
    const std::vector<float> host = logits.host();
    for (std::size_t i = 0; i < turns; ++i) routings.emplace_back(l, host, i * l.experts / turns);
  }
};

/// How far sampled tokens are from sums in float64, of the unpacked weights of the experts that were chosen.
double relative_error(const layer& l, const tt::cuda::stream& s, const layer_weights& w, const batch& b,
                      const routing& r) {
  const std::size_t k = l.router.experts_per_token, tokens = r.ids.size / k;
  const auto chosen = r.ids.host();
  const auto shares = r.weights.host();
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

/// Checks and times the layer with so many tokens.
bool run(const layer& l, const tt::cuda::stream& s, const layer_weights& w, std::size_t tokens, double copy_rate) {
  const std::size_t calls = tokens * l.router.experts_per_token;
  const batch b(l, w, s, tokens);
  const tt::matrix_view<const bfloat16> x(b.x.data, tokens, l.hidden), grouped(b.grouped.data, calls, l.hidden);
  const tt::matrix_view<const bfloat16> gated(b.gated.data, calls, l.inner);
  const tt::matrix_view<bfloat16> gated_out(b.gated.data, calls, l.inner), y(b.y.data, calls, l.hidden);
  const auto route = [&](const routing& r) {
    tt::cuda::route(s, r.logits.span(), l.experts, l.router, r.ids.span(), r.weights.span());
  };
  const auto group = [&](const routing& r) {
    tt::cuda::group_by_expert(s, std::span<const std::uint16_t>(r.ids.span()), 0, r.groups);
  };
  const auto round_tokens = [&](const routing&) { tt::quantize_e4m3_to(s, x, b.x8.view()); };
  const auto permute = [&](const routing& r) {
    if (!w.for_e4m3) {
      tt::cuda::permute<bfloat16>(s, b.x.span(), b.grouped.span(), l.hidden, r.groups);
      return;
    }
    const auto words = [](const e4m3_array& a) {  // permute copies bits: four codes at a time
      return std::span<float>(reinterpret_cast<float*>(a.values.data), a.values.size / 4);
    };
    tt::cuda::permute<float>(s, words(b.x8), words(b.grouped8), b.x8.view().stride() / 4, r.groups);
    tt::cuda::permute<float>(s, b.x8.scales.span(), b.grouped8.scales.span(), 1, r.groups);
  };
  const auto multiply_in = [&](const routing& r) {
    if (w.for_e4m3) {
      tt::grouped_matmul(s, b.grouped8.view(), w.both.ready<tt::e4m3>(), r.offsets.span(), gated_out);
    } else {
      tt::grouped_matmul(s, grouped, w.both.ready(), r.offsets.span(), gated_out);
    }
  };
  const auto round_gated = [&](const routing&) { tt::quantize_e4m3_to(s, gated, b.gated8.view()); };
  const auto multiply_out = [&](const routing& r) {
    if (w.for_e4m3) {
      tt::grouped_matmul(s, b.gated8.view(), w.down.ready<tt::e4m3>(), r.offsets.span(), y);
    } else {
      tt::grouped_matmul(s, gated, w.down.ready(), r.offsets.span(), y);
    }
  };
  const auto combine = [&](const routing& r) {
    tt::cuda::combine<bfloat16>(s, b.y.span(), r.weights.span(), b.out.span(), l.hidden, r.groups);
  };
  const auto all = [&](const routing& r) {
    route(r), group(r);
    if (w.for_e4m3) round_tokens(r);
    permute(r), multiply_in(r);
    if (w.for_e4m3) round_gated(r);
    multiply_out(r), combine(r);
  };

  check(cudaMemset(b.out.data, 0xFF, b.out.size * sizeof(bfloat16)), "cudaMemset");
  for (const routing& r : b.routings) all(r);
  check(cudaStreamSynchronize(s.handle), "the layer");
  const double relative = relative_error(l, s, w, b, b.routings.back());
  // Three roundings to bfloat16 lie between, or two to E4M3, 2.6e-2 each; NaN does not pass.
  const bool agrees = relative <= (w.for_e4m3 ? 6e-2 : 1e-2);

  std::vector<bool> used(l.experts, false);
  for (const std::uint16_t e : b.routings.front().ids.host()) used[e] = true;
  const auto active = static_cast<double>(std::count(used.begin(), used.end(), true));
  std::printf(" %4zu tokens, %3.0f experts: relative error %.1e %s\n", tokens, active, relative,
              agrees ? "" : "TOO LARGE");
  const double bytes_per_weight = tt::bits_per_weight(w.both.shape.format) / 8, d_calls = static_cast<double>(calls);
  const auto hidden = static_cast<double>(l.hidden), inner = static_cast<double>(l.inner);
  const double weights = inner * hidden;   // of one projection of one expert
  const double each = w.for_e4m3 ? 1 : 2;  // bytes of an activation that a product reads; those of outputs are 2
  const double moved = d_calls * hidden + static_cast<double>(tokens) * hidden;
  const double in_bytes = 2 * active * bytes_per_weight * weights + d_calls * (each * hidden + 2 * inner);
  const double out_bytes = active * bytes_per_weight * weights + d_calls * (each * inner + 2 * hidden);
  const double rounded = w.for_e4m3 ? 3 * (static_cast<double>(tokens) * hidden + d_calls * inner) : 0;
  const double flops = 2 * d_calls * weights;
  const auto line = [&](const char* step, const auto& f, double bytes, double step_flops) {
    const double ms = milliseconds_rested(s.handle, b.routings.size(), [&](std::size_t i) { f(b.routings[i]); });
    std::printf("   %-14s %9.1f us   ceiling %8.1f us %s", step, 1e3 * ms, bytes / copy_rate * 1e-6,
                step_flops == 0 ? "\n" : "");
    if (step_flops != 0) std::printf("  %6.1f TFLOP/s\n", step_flops / ms * 1e-9);
  };
  line("route", route, 4.0 * static_cast<double>(tokens * l.experts), 0);
  line("group", group, 10 * d_calls, 0);
  if (w.for_e4m3) line("round tokens", round_tokens, 3 * static_cast<double>(tokens) * hidden, 0);
  line("permute", permute, each * moved, 0);
  line("gate, up", multiply_in, in_bytes, 2 * flops);
  if (w.for_e4m3) line("round gated", round_gated, 3 * d_calls * inner, 0);
  line("down", multiply_out, out_bytes, flops);
  line("combine", combine, 2 * moved, 0);
  line("all", all, in_bytes + out_bytes + (each + 2) * d_calls * hidden + rounded, 3 * flops);
  return agrees;
}

}  // namespace

int main(int argc, char** argv) try {
  tt::moe::router_options grouped_sigmoid, best_8, best_4;
  grouped_sigmoid.rule = tt::moe::gating::sigmoid, grouped_sigmoid.experts_per_token = 8;
  grouped_sigmoid.groups = 8, grouped_sigmoid.groups_kept = 4, grouped_sigmoid.scale = 2.5f;
  best_8.experts_per_token = 8, best_4.experts_per_token = 4;
  const std::vector<layer> layers = {
      {"deepseek", 7168, 2048, 256, grouped_sigmoid},
      {"qwen3", 4096, 1536, 128, best_8},
      {"gpt-oss-20b", 2880, 2880, 32, best_4},
      {"gpt-oss-120b", 2880, 2880, 128, best_4},
      {"small", 1024, 512, 32, best_8},
  };
  std::vector<std::string> names;
  std::vector<std::size_t> tokens{1, 4, 16, 64, 256, 1024, 4096};
  tt::recipe recipe = tt::recipe::parse("mxfp4-32/oas/mbs-static");
  std::string activations = "bfloat16";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--tokens" && i + 1 < argc) {
      tokens.clear();
      std::istringstream list(argv[++i]);
      for (std::string n; std::getline(list, n, ',');) tokens.push_back(std::strtoull(n.c_str(), nullptr, 10));
    } else if (word == "--weights" && i + 1 < argc) {
      recipe = tt::recipe::parse(argv[++i]);
    } else if (word == "--activations" && i + 1 < argc) {
      activations = argv[++i];
    } else {
      names.push_back(word);
    }
  }
  if (std::count(tokens.begin(), tokens.end(), std::size_t{0}) != 0) {
    std::fprintf(stderr, "--tokens: expected numbers of tokens from 1 on\n");
    return 2;
  }
  if (recipe.format.scale != tt::scale_type::e8m0 || recipe.rotation != 0 || recipe.error_feedback) {
    std::fprintf(stderr, "--weights: expected MXFP4 without rotation and gptq, got %s\n", recipe.name().c_str());
    return 2;
  }
  const bool is_e4m3 = activations == "e4m3";
  if (!is_e4m3 && activations != "bfloat16") {
    std::fprintf(stderr, "--activations: expected bfloat16 or e4m3, got %s\n", activations.c_str());
    return 2;
  }
  if (is_e4m3 && (recipe.format.block != 32 || recipe.format.macro_block != 0)) {
    std::fprintf(stderr, "--activations e4m3: expected --weights of mxfp4-32 without macro blocks, got %s\n",
                 recipe.name().c_str());
    return 2;
  }
  if (names.empty()) names = {"deepseek", "qwen3", "gpt-oss-20b", "gpt-oss-120b"};
  std::vector<layer> wanted;
  for (const std::string& name : names) {
    const auto found = std::find_if(layers.begin(), layers.end(), [&](const layer& l) { return l.name == name; });
    if (found == layers.end()) {
      std::fprintf(stderr, "no layer '%s': expected deepseek, qwen3, gpt-oss-20b, gpt-oss-120b or small\n",
                   name.c_str());
      return 2;
    }
    wanted.push_back(*found);
  }

  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }

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
  for (const layer& l : wanted) {
    std::printf("%s: hidden %zu, inner %zu, %zu experts, top-%zu, %s weights, %s activations\n", l.name.c_str(),
                l.hidden, l.inner, l.experts, l.router.experts_per_token, recipe.name().c_str(), activations.c_str());
    const layer_weights w(l, recipe, is_e4m3, s);
    for (const std::size_t n : tokens) good = run(l, s, w, n, copy_rate) && good;
  }
  return good ? 0 : 1;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
