/// The CUDA backend routes, groups, permutes and combines as moe/router.hpp and moe/dispatch.hpp do on the CPU.

#include "harness.hpp"

#include <tetromino/cuda/moe.hpp>

#include <algorithm>
#include <utility>

namespace {

using namespace harness;
using tetromino::moe::expert_call;
using tetromino::moe::gating;
using tetromino::moe::router_options;

const tetromino::cuda::stream plain{};

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

/// Whether the last group that is kept and the next one are within rounding of each other, but not the same.
bool groups_are_close(const router_options& options, const float* row, std::size_t experts) {
  const std::size_t size = experts / options.groups;
  std::vector<float> group(options.groups);
  for (std::size_t g = 0; g < options.groups; ++g) {
    std::vector<float> scores(size);
    for (std::size_t e = 0; e < size; ++e) {
      scores[e] = sigmoid(row[g * size + e]) + (options.bias.empty() ? 0 : options.bias[g * size + e]);
    }
    std::sort(scores.rbegin(), scores.rend());
    group[g] = size == 1 ? scores[0] : scores[0] + scores[1];
  }
  std::sort(group.rbegin(), group.rend());
  if (options.groups_kept == options.groups) return false;
  const float gap = group[options.groups_kept - 1] - group[options.groups_kept];
  return gap > 0 && gap <= 1e-6f;
}

/// Routes on both and compares: ids must be equal, but where scores are within rounding of each other.
void check_route(std::size_t tokens, std::size_t experts, const router_options& options, const char* what,
                 const std::vector<float>& logits) {
  const std::size_t k = options.experts_per_token;
  std::vector<std::uint16_t> ids(tokens * k);
  std::vector<float> weights(tokens * k);
  tetromino::moe::route(logits, experts, options, ids, weights);

  const device<float> x(logits);
  const device<float> bias(std::vector<float>(options.bias.begin(), options.bias.end()));
  router_options on_device = options;
  if (!options.bias.empty()) on_device.bias = bias.span();
  const device<std::uint16_t> got_ids(tokens * k);
  const device<float> got_weights(tokens * k);
  require(tetromino::cuda::try_route(plain, x.span(), experts, on_device, got_ids.span(), got_weights.span()), what);
  const auto ids_found = got_ids.values();
  const auto weights_found = got_weights.values();
  long wrong_ids = 0, wrong_weights = 0;
  bool is_same = true;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const float* const row = logits.data() + i / k * experts;
    if (i % k == 0) {
      is_same = std::equal(&ids[i], &ids[i] + k, &ids_found[i]);
      if (!is_same && options.groups > 1 && groups_are_close(options, row, experts)) {
        i += k - 1;
        continue;
      }
    }
    if (ids_found[i] != ids[i]) {
      if (ids_found[i] >= experts || options.rule != gating::sigmoid) {
        ++wrong_ids;
        continue;
      }
      const auto score = [&](std::size_t e) { return sigmoid(row[e]) + (options.bias.empty() ? 0 : options.bias[e]); };
      if (!(std::fabs(score(ids_found[i]) - score(ids[i])) <= 1e-6f)) ++wrong_ids;
      continue;
    }
    if (!is_same) continue;  // another expert's weight is part of the sum
    // both sum in float, the CPU one expert after another
    const float tolerance = 2e-6f + static_cast<float>(experts) * 0x1p-24f;
    if (!(std::fabs(weights_found[i] - weights[i]) <= tolerance * std::fabs(weights[i]) + 1e-30f)) ++wrong_weights;
  }
  expect(wrong_ids == 0, "%s, %zu of %zu experts: %ld wrong ids", what, k, experts, wrong_ids);
  expect(wrong_weights == 0, "%s, %zu of %zu experts: %ld wrong weights", what, k, experts, wrong_weights);
  expect(got_ids.is_intact() && got_weights.is_intact(), "%s: written past the end", what);
}

/// Many tokens go to other kernels.
void many_routes() {
  std::uint64_t seed = 100;
  for (const std::size_t experts : {8, 32, 60, 128, 160, 200, 256, 384, 1000}) {
    if (is_short() && experts != 160) continue;
    const std::size_t tokens = experts <= 64 ? 17'001 : 4'099;
    const numbers r{seed++};
    auto logits = generate<float>(tokens * experts, [&](std::size_t i) {
      const float x = r.normal(i) * 2.0f;
      switch (i / experts % 8) {
        case 0:
          return std::round(x) / 2 + 0.25f;  // equal scores, in groups too
        case 1:
          return r.bits(i) % 3 != 0 ? -INFINITY : x;  // masked
        case 2:
          return r.bits(i) % experts < 3 ? x : -INFINITY;  // fewer than are chosen
        case 3:
          return r.bits(i) % 2 == 0 ? 0.0f : -0.0f;  // all equal
        case 4:
          return std::round(x * 16) / 16 - 10;  // negative
        case 5:
          return i % experts / 4 % 8 == 0 ? x : x - 8;  // the best in few lanes
        case 6:
          return i / experts % 16 == 6 ? x * 1e30f : x;  // products of two are infinite
        default:
          return x;
      }
    });
    for (std::size_t i = 0; i < tokens; ++i) {
      if (i % 8 == 1 || i % 8 == 2) logits[i * experts + i % experts] = 1.0f;
    }
    const auto bias = generate<float>(experts, [&](std::size_t i) { return r.normal(i + 99) * 0.1f; });
    for (const std::size_t k : {1, 4, 8, 10}) {
      if (k > experts || (is_short() && k != 8)) continue;
      router_options options;
      options.experts_per_token = k;
      for (const gating rule : {gating::softmax_topk, gating::topk_softmax, gating::sigmoid}) {
        options.rule = rule, options.renormalize = k % 4 == 0;
        check_route(tokens, experts, options, "many", logits);
      }
      for (const std::size_t groups : {1, 2, 3, 5, 8, 16}) {
        if (experts % (4 * groups) != 0) continue;
        options.groups = groups, options.groups_kept = (groups + 1) / 2;
        if (options.groups_kept * (experts / groups) < k) continue;
        options.bias = bias, options.renormalize = true;
        check_route(tokens, experts, options, "many with a bias", logits);
        options.bias = {}, options.renormalize = false;
        if (groups > 1) check_route(tokens, experts, options, "many in groups", logits);
      }
    }
  }
}

void routes() {
  const std::size_t tokens = is_short() ? 37 : 3001;
  std::uint64_t seed = 1;
  for (const std::size_t experts : {1, 5, 16, 32, 60, 64, 96, 128, 160, 256, 384, 512, 1000}) {
    const numbers r{seed++};
    auto logits = generate<float>(tokens * experts, [&](std::size_t i) { return r.normal(i) * 2.0f; });
    auto ties = generate<float>(tokens * experts, [&](std::size_t i) { return std::round(r.normal(i) * 2.0f) / 2.0f; });
    for (std::size_t i = 0; i < ties.size(); i += 3) ties[i] = i % 2 == 0 ? 0.0f : -0.0f;
    auto masked = logits;
    for (std::size_t i = 0; i < masked.size(); ++i) {
      if (i % experts != 0 && r.bits(i) % 3 != 0) masked[i] = -INFINITY;
    }
    const auto bias = generate<float>(experts, [&](std::size_t i) { return r.normal(i + 99) * 0.1f; });
    for (const std::size_t wanted : {1, 2, 6, 8, 32}) {
      router_options options;
      options.experts_per_token = std::min(wanted, experts);
      for (const gating rule : {gating::softmax_topk, gating::topk_softmax, gating::sigmoid}) {
        options.rule = rule;
        options.renormalize = seed % 2 == 0;
        options.scale = rule == gating::sigmoid ? 2.5f : 1.0f;
        check_route(tokens, experts, options, "random", logits);
        check_route(tokens, experts, options, "ties", ties);
        check_route(tokens, experts, options, "masked", masked);
      }
      options.renormalize = true;
      options.bias = bias;
      for (const std::size_t groups : {1, 2, 4, 8, 16, 40}) {
        if (experts % groups != 0) continue;
        options.groups = groups, options.groups_kept = std::max<std::size_t>(1, groups / 2);
        if (options.groups_kept * (experts / groups) < options.experts_per_token) continue;
        check_route(tokens, experts, options, "groups", logits);
      }
    }
  }
  many_routes();
  // what the CPU refuses
  const std::size_t experts = 128, k = 8;
  router_options options;
  options.experts_per_token = k;
  for (const std::size_t rows : {4, 4'099}) {
    auto report = tetromino::cuda::rejections::create();
    const auto stream = plain.reporting(report);
    std::vector<float> logits(rows * experts, 1.0f);
    for (std::size_t row = 0; row < rows; ++row) {
      float* const x = logits.data() + row * experts;
      if (row % 4 == 1) x[70] = row % 8 == 1 ? NAN : -NAN, x[71] = INFINITY;
      if (row % 4 == 2) std::fill(x, x + experts, -INFINITY);
    }
    const device<float> x(logits);
    const device<std::uint16_t> ids(rows * k);
    const device<float> weights(rows * k);
    require(tetromino::cuda::try_route(stream, x.span(), experts, options, ids.span(), weights.span()), "route");
    const auto found = report.try_check(stream, tetromino::batch_view<const float>(x.data(), 1, rows, experts));
    expect(!found && std::string(found.error().what()).find("row 1, column 70") != std::string::npos,
           "a refused logit is reported, got %s", found ? "nothing" : found.error().what());
    const auto id = ids.values();
    const auto w = weights.values();
    long wrong = 0;
    for (std::size_t i = 0; i < w.size(); ++i) {
      const bool is_refused = i / k % 4 == 1 || i / k % 4 == 2;
      wrong += id[i] != i % k || (is_refused ? !std::isnan(w[i]) : w[i] != 0.125f);
    }
    expect(wrong == 0, "refused tokens of %zu weigh NaN: %ld are wrong", rows, wrong);
  }
  const device<float> x(std::vector<float>(4 * experts, 1.0f));
  options.experts_per_token = 33;
  const device<std::uint16_t> many(4 * 33);
  const device<float> many_weights(4 * 33);
  expect(!tetromino::cuda::try_route(plain, x.span(), experts, options, many.span(), many_weights.span()),
         "33 experts per token are too many");
}

/// A bias that is not finite is refused for every token by each kernel, and nothing else is written; a scale is refused
/// before a launch; scores so small that a float cannot hold their sum's inverse still weigh what they should.
void odd_biases_and_scales() {
  for (const auto& [tokens, experts] :
       {std::pair<std::size_t, std::size_t>{37, 64}, {17'001, 16}, {17'001, 64}, {4'099, 128}, {4'099, 1000}}) {
    if (is_short() && tokens > 5000) continue;
    router_options options;
    options.rule = gating::sigmoid;
    options.experts_per_token = 4;
    const std::size_t k = options.experts_per_token;
    const device<float> x(std::vector<float>(tokens * experts, 1.0f));
    for (const float odd : {NAN, -NAN, INFINITY, -INFINITY}) {
      std::vector<float> values(experts, 0.0f);
      values[experts - 1] = values[experts / 2] = odd;
      const device<float> bias(values);
      options.bias = bias.span();
      const device<std::uint16_t> ids(tokens * k);
      const device<float> weights(tokens * k);
      auto report = tetromino::cuda::rejections::create();
      const auto stream = plain.reporting(report);
      require(tetromino::cuda::try_route(stream, x.span(), experts, options, ids.span(), weights.span()), "route");
      const auto found = report.try_check(stream, tetromino::batch_view<const float>(x.data(), 1, tokens, experts));
      const std::string where = "row 0, column " + std::to_string(experts / 2);
      expect(!found && std::string(found.error().what()).find(where) != std::string::npos,
             "a bias of %g is reported, got %s", static_cast<double>(odd), found ? "nothing" : found.error().what());
      const auto id = ids.values();
      const auto w = weights.values();
      long wrong = 0;
      for (std::size_t i = 0; i < w.size(); ++i) wrong += id[i] != i % k || !std::isnan(w[i]);
      expect(wrong == 0, "a bias of %g, %zu tokens, %zu experts: %ld wrong", static_cast<double>(odd), tokens, experts,
             wrong);
      expect(ids.is_intact() && weights.is_intact(), "written past the end");
    }
    options.bias = {};
    const device<std::uint16_t> ids(tokens * k);
    const device<float> weights(tokens * k);
    const device<float> tiny(std::vector<float>(tokens * experts, -86.0f));
    options.scale = 100.0f;
    require(tetromino::cuda::try_route(plain, tiny.span(), experts, options, ids.span(), weights.span()), "route");
    long wrong = 0;
    for (const float w : weights.values()) wrong += !(std::fabs(w - 25.0f) <= 1e-3f);
    expect(wrong == 0, "tiny scores, %zu tokens, %zu experts: %ld wrong weights", tokens, experts, wrong);
    options.scale = NAN;
    const auto refused = tetromino::cuda::try_route(plain, x.span(), experts, options, ids.span(), weights.span());
    expect(!refused && refused.error().code() == tetromino::errc::non_finite, "a scale of NaN is refused");
  }
}

/// A captured call of each router kernel gives what a plain call gives, each time it is replayed.
void captured_routes() {
  for (const auto& [tokens, experts] : {std::pair<std::size_t, std::size_t>{50, 64}, {20'000, 64}, {5'000, 128}}) {
    if (is_short() && tokens > 50) continue;
    const std::size_t k = 4;
    const numbers r{tokens};
    const device<float> logits(generate<float>(tokens * experts, [&](std::size_t i) { return r.normal(i); }));
    const device<std::uint16_t> ids(tokens * k), captured_ids(tokens * k);
    const device<float> weights(tokens * k), captured_weights(tokens * k);
    router_options options;
    options.experts_per_token = k;
    require(tetromino::cuda::try_route(plain, logits.span(), experts, options, ids.span(), weights.span()), "route");
    require(cudaDeviceSynchronize(), "routing");
    cudaStream_t handle;
    require(cudaStreamCreate(&handle), "cudaStreamCreate");
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    require(cudaStreamBeginCapture(handle, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    require(tetromino::cuda::try_route(tetromino::cuda::stream(handle), logits.span(), experts, options,
                                       captured_ids.span(), captured_weights.span()),
            "captured route");
    require(cudaStreamEndCapture(handle, &graph), "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    for (int replay = 0; replay < 2; ++replay) {
      require(cudaMemsetAsync(captured_ids.data(), 0xA5, tokens * k * sizeof(std::uint16_t), handle),
              "cudaMemsetAsync");
      require(cudaMemsetAsync(captured_weights.data(), 0xA5, tokens * k * sizeof(float), handle), "cudaMemsetAsync");
      require(cudaGraphLaunch(exec, handle), "cudaGraphLaunch");
      require(cudaStreamSynchronize(handle), "a captured router");
      expect(first_difference(ids.values(), captured_ids.values()) < 0, "captured ids of %zu tokens", tokens);
      expect(first_difference(weights.values(), captured_weights.values()) < 0, "captured weights of %zu tokens",
             tokens);
    }
    require(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
    require(cudaStreamDestroy(handle), "cudaStreamDestroy");
  }
}

template <class T>
void moves(std::size_t rows, std::size_t k, std::size_t slots, std::size_t width, bool captured) {
  const numbers r{rows * 31 + width};
  std::vector<expert_call> calls(rows * k);
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const bool is_called = i % k == 0 || r.bits(i) % 5 != 0;
    const std::size_t slot = r.bits(i + 1000000) % (r.bits(i / k) % 3 == 0 ? std::min<std::size_t>(slots, 3) : slots);
    calls[i] = {is_called ? static_cast<std::uint32_t>(slot) : tetromino::moe::no_slot, r.uniform(i)};
  }
  tetromino::moe::dispatch_plan plan(1, k);
  plan.plan_send(calls, std::vector<std::uint32_t>(slots, 0));
  plan.plan_receive(plan.send_counts());
  std::copy(plan.send_calls().begin(), plan.send_calls().end(), plan.receive_calls().begin());
  plan.group_by_expert(0, slots);
  const std::size_t pairs = plan.expert_rows().size();

  const auto values =
      generate<T>(rows * width, [&](std::size_t i) { return tetromino::detail::from_float<T>(r.normal(i)); });
  std::vector<T> moved(pairs * width);
  tetromino::moe::gather_rows<T>(plan.expert_rows(), values, moved, width);
  std::vector<float> outputs(moved.size()), sums(rows * width);
  for (std::size_t i = 0; i < moved.size(); ++i) outputs[i] = tetromino::detail::to_float(moved[i]);
  plan.add_expert_outputs(outputs, sums, width);
  std::vector<T> combined(sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) combined[i] = tetromino::detail::from_float<T>(sums[i]);

  const device<expert_call> on_device(std::span<const expert_call>(plan.receive_calls()));
  const device<std::uint32_t> offsets(slots + 1), expert_rows(rows * k), pair_of_call(rows * k);
  const tetromino::cuda::expert_groups groups{offsets, expert_rows, pair_of_call, k};
  const device<T> x(values), to(moved.size()), out(sums.size());
  cudaStream_t handle;
  require(cudaStreamCreate(&handle), "cudaStreamCreate");
  const tetromino::cuda::stream s(handle);
  const auto all = [&] {
    const std::span<const expert_call> device_calls = on_device.span();
    require(tetromino::cuda::try_group_by_expert(s, device_calls, 0, groups), "group");
    require(tetromino::cuda::try_permute<T>(s, x.span(), to.span(), width, groups), "permute");
    require(tetromino::cuda::try_combine<T>(s, to.span(), device_calls, out.span(), width, groups), "combine");
  };
  if (captured) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    require(cudaStreamBeginCapture(handle, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    all();
    require(cudaStreamEndCapture(handle, &graph), "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    require(cudaGraphLaunch(exec, handle), "cudaGraphLaunch");
    require(cudaStreamSynchronize(handle), "a captured graph");
    require(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  } else {
    all();
    require(cudaStreamSynchronize(handle), "moving rows");
  }
  const char* const where = "rows %zu, k %zu, slots %zu, width %zu: %s";
  auto rows_found = expert_rows.values();
  rows_found.resize(pairs);
  expect(first_difference(plan.expert_offsets(), offsets.values()) < 0, where, rows, k, slots, width, "offsets");
  expect(first_difference(plan.expert_rows(), rows_found) < 0, where, rows, k, slots, width, "expert rows");
  expect(first_difference(moved, to.values()) < 0, where, rows, k, slots, width, "permuted rows");
  expect(first_difference(combined, out.values()) < 0, where, rows, k, slots, width, "combined rows");
  expect(
      offsets.is_intact() && expert_rows.is_intact() && pair_of_call.is_intact() && to.is_intact() && out.is_intact(),
      where, rows, k, slots, width, "written past the end");
  require(cudaStreamDestroy(handle), "cudaStreamDestroy");
}

template <class T>
void all_moves() {
  // from 1024 rows on, a thread moves several pieces of a row at a time, also where the last of them is not there
  moves<T>(1030, 8, 40, 1032, false);
  moves<T>(1024, 9, 12, 24, false);
  moves<T>(1025, 40, 60, 72, false);  // more calls than a word has bits
  moves<T>(1031, 3, 7, 7, false);
  for (const std::size_t rows : {1, 3, 64, 700}) {
    if (is_short() && rows > 64) continue;
    for (const std::size_t width : {64, 7, 136, 2880}) {
      moves<T>(rows, 8, 128, width, false);
      moves<T>(rows, 1, 5, width, true);
      moves<T>(rows, 10, 256, width, true);
    }
  }
  if (!is_short()) moves<T>(5000, 8, 256, 7168, false);
}

/// Ids of the router are slots, and their weights lie apart.
void ids_as_calls() {
  const std::size_t rows = 300, k = 6, slots = 40, width = 72;
  const numbers r{5};
  const auto ids = generate<std::uint16_t>(rows * k, [&](std::size_t i) {
    return static_cast<std::uint16_t>(r.bits(i) % (slots + 3));  // three experts live elsewhere
  });
  const auto weights = generate<float>(rows * k, [&](std::size_t i) { return r.uniform(i + 7); });
  const auto values = generate<float>(rows * width, [&](std::size_t i) { return r.normal(i); });
  std::vector<float> expected(rows * width, 0.0f);
  for (std::size_t i = 0; i < rows * k; ++i) {
    if (ids[i] >= slots) continue;
    for (std::size_t c = 0; c < width; ++c) {
      const volatile float product = weights[i] * values[i / k * width + c];
      expected[i / k * width + c] += product;
    }
  }
  const device<std::uint16_t> calls(ids);
  const device<float> w(weights), x(values), to(rows * k * width), out(rows * width);
  const device<std::uint32_t> offsets(slots + 1), expert_rows(rows * k), pair_of_call(rows * k);
  const tetromino::cuda::expert_groups groups{offsets, expert_rows, pair_of_call, k};
  const std::span<const std::uint16_t> slot_ids = calls.span();
  const std::span<const float> call_weights = w.span();
  require(tetromino::cuda::try_group_by_expert(plain, slot_ids, 0, groups), "group");
  require(tetromino::cuda::try_permute<float>(plain, x.span(), to.span(), width, groups), "permute");
  require(tetromino::cuda::try_combine<float>(plain, to.span(), call_weights, out.span(), width, groups), "combine");
  expect(first_difference(expected, out.values()) < 0, "ids as calls");

  // padding rows: nobody's calls get no pair, and rows of nobody add up to zero
  auto padded = ids;
  for (std::size_t i = 0; i < padded.size(); ++i) {
    if (i / k % 3 == 0 || i % 7 == 0) padded[i] = tetromino::moe::no_expert;
  }
  const device<std::uint16_t> padded_calls(padded);
  const std::span<const std::uint16_t> padded_ids = padded_calls.span();
  require(tetromino::cuda::try_group_by_expert(plain, padded_ids, 0, groups), "group");
  require(tetromino::cuda::try_permute<float>(plain, x.span(), to.span(), width, groups), "permute");
  require(tetromino::cuda::try_combine<float>(plain, to.span(), call_weights, out.span(), width, groups), "combine");
  const auto padded_pairs = pair_of_call.values();
  const auto padded_out = out.values();
  long wrong_pairs = 0;
  for (std::size_t i = 0; i < padded.size(); ++i) {
    wrong_pairs += (padded[i] < slots) != (padded_pairs[i] != tetromino::moe::no_slot);
    if (i / k % 3 == 0) wrong_pairs += padded_out[i / k * width] != 0.0f;
  }
  expect(wrong_pairs == 0, "calls for nobody: %ld are wrong", wrong_pairs);
  // ... also where slots go up to the last id that is one
  const device<std::uint32_t> most_offsets(65'536), all_offsets(65'537);
  const tetromino::cuda::expert_groups most{most_offsets, expert_rows, pair_of_call, k};
  require(tetromino::cuda::try_group_by_expert(plain, padded_ids, 0, most), "group");
  const auto served =
      std::count_if(padded.begin(), padded.end(), [](auto e) { return e != tetromino::moe::no_expert; });
  expect(most_offsets.values().back() == static_cast<std::uint32_t>(served), "65535 slots: a pair for each call");
  const tetromino::cuda::expert_groups beyond{all_offsets, expert_rows, pair_of_call, k};
  const auto one_slot_more = tetromino::cuda::try_group_by_expert(plain, padded_ids, 0, beyond);
  expect(!one_slot_more && one_slot_more.error().code() == tetromino::errc::shape_mismatch, "65536 slots are too many");

  const tetromino::cuda::expert_groups wrong{offsets, expert_rows, pair_of_call, 7};
  const auto refused = tetromino::cuda::try_group_by_expert(plain, slot_ids, 0, wrong);
  expect(!refused && refused.error().code() == tetromino::errc::shape_mismatch, "7 calls per row do not divide 1800");
}

/// Ids grouped in one pass of a loop: numbers of calls around what a warp and a block look at together, around where
/// clusters of blocks begin, and more than a block remembers; ids at any address, slots that start past the first
/// expert, as many slots as clusters take and one more, and every call for the same expert.
void groups_of_ids() {
  const numbers r{11};
  for (const std::size_t calls : {0,    1,    255,   256,   257,   1023,  1024,  4095,   4096,   4097,  8191,
                                  8192, 8193, 16383, 16384, 16385, 20001, 65536, 131072, 131073, 300000}) {
    if (is_short() && calls > 8193) continue;
    for (const std::size_t kind : {0, 1, 2, 3, 4}) {
      if (is_short() && kind > 2) continue;
      const std::size_t before = kind == 1;  // elements in front of the ids, so that they are not aligned
      const std::size_t slots = kind == 2   ? 512
                                : kind == 3 ? 513
                                : kind == 4 ? 132 + calls % 2
                                            : 96,
                        experts = slots * 4 / 3;
      const std::size_t first_slot = calls % 3, most = kind == 4 ? 1 : 4;  // one call in `most` is for expert 7
      const auto ids = generate<std::uint16_t>(calls + before, [&](std::size_t i) {
        return static_cast<std::uint16_t>(r.bits(i) % most == 0 ? 7 : r.bits(i + calls) % experts);
      });
      std::vector<std::uint32_t> offsets(slots + 1, 0), rows(calls, 0xA5A5A5A5), pairs(calls, tetromino::moe::no_slot);
      std::uint32_t pair = 0;
      std::vector<std::vector<std::uint32_t>> calls_of(slots);
      for (std::size_t i = 0; i < calls; ++i) {
        const std::size_t s = ids[before + i] - first_slot;  // below first_slot it wraps
        if (s < slots) calls_of[s].push_back(static_cast<std::uint32_t>(i));
      }
      const std::size_t k = calls % 8 == 0 ? 8 : 1;
      for (std::size_t s = 0; s < slots; ++s) {
        for (const std::uint32_t i : calls_of[s]) {
          rows[pair] = static_cast<std::uint32_t>(i / k);
          pairs[i] = pair++;
        }
        offsets[s + 1] = pair;
      }
      const device<std::uint16_t> on_device(ids);
      const device<std::uint32_t> got_offsets(slots + 1), got_rows(calls), got_pairs(calls);
      const tetromino::cuda::expert_groups groups{got_offsets, got_rows, got_pairs, k};
      require(tetromino::cuda::try_group_by_expert(
                  plain, std::span<const std::uint16_t>(on_device.span().subspan(before)), first_slot, groups),
              "group");
      expect(got_offsets.values() == offsets && got_rows.values() == rows && got_pairs.values() == pairs,
             "%zu ids, kind %zu, grouped from slot %zu on", calls, kind, first_slot);
      expect(got_rows.is_intact() && got_pairs.is_intact() && got_offsets.is_intact(), "written past the end");
    }
  }
}

/// Expert calls at multiples of 16 bytes and between them, around what a warp looks at together.
void groups_of_calls() {
  const numbers r{12};
  for (const std::size_t calls : {1, 255, 256, 1025, 4097, 8195, 16390, 70'001}) {
    if (is_short() && calls > 10'000) continue;
    for (const std::size_t before : {0, 1}) {
      const std::size_t first_slot = 3, slots = 20;
      const auto list = generate<expert_call>(calls + before, [&](std::size_t i) {
        return expert_call{r.bits(i) % 5 == 0 ? tetromino::moe::no_slot : static_cast<std::uint32_t>(r.bits(i) % 30),
                           1};
      });
      std::vector<std::uint32_t> offsets(slots + 1, 0), pairs(calls, tetromino::moe::no_slot);
      std::uint32_t pair = 0;
      for (std::size_t s = 0; s < slots; ++s) {
        for (std::size_t i = 0; i < calls; ++i) {
          if (list[before + i].slot == first_slot + s) pairs[i] = pair++;
        }
        offsets[s + 1] = pair;
      }
      const device<expert_call> on_device(list);
      const device<std::uint32_t> got_offsets(slots + 1), got_rows(calls), got_pairs(calls);
      const tetromino::cuda::expert_groups groups{got_offsets, got_rows, got_pairs, 1};
      require(tetromino::cuda::try_group_by_expert(
                  plain, std::span<const expert_call>(on_device.span().subspan(before)), first_slot, groups),
              "group");
      expect(got_offsets.values() == offsets && got_pairs.values() == pairs, "%zu calls, %zu in front", calls, before);
    }
  }
}

/// A hop planned on the GPU: what goes to whom, the send buffer and the sums of answers are those of
/// moe::dispatch_plan.
void plans(std::size_t rows, std::size_t k, std::size_t ranks, tetromino::moe::row_copies copies) {
  const std::size_t experts = 24, slots = 30, width = 24;
  const numbers r{rows * 7 + k};
  std::vector<std::uint32_t> slot_of_expert(experts), rank_of_slot(slots);
  for (std::size_t e = 0; e < experts; ++e) slot_of_expert[e] = static_cast<std::uint32_t>((e * 7 + 3) % slots);
  for (std::size_t s = 0; s < slots; ++s) rank_of_slot[s] = static_cast<std::uint32_t>(s * ranks / slots);
  const auto ids = generate<std::uint16_t>(rows * k, [&](std::size_t i) {
    return static_cast<std::uint16_t>(r.bits(i) % 9 == 0 ? 0xFFFF : r.bits(i + 5) % experts);
  });
  const auto weights = generate<float>(rows * k, [&](std::size_t i) { return r.uniform(i + 7); });
  const auto values = generate<float>(rows * width, [&](std::size_t i) { return r.normal(i); });
  std::vector<expert_call> calls(rows * k);
  for (std::size_t i = 0; i < calls.size(); ++i) {
    if (ids[i] != 0xFFFF) calls[i] = {slot_of_expert[ids[i]], weights[i]};
  }
  tetromino::moe::dispatch_plan plan(ranks, k);
  plan.plan_send(calls, rank_of_slot, copies);
  std::vector<float> sent(plan.sent() * width), sums(rows * width);
  tetromino::moe::gather_rows<float>(plan.send_rows(), values, sent, width);
  plan.add_copies(sent, sums, width);

  const device<std::uint16_t> ids_there(ids), ranks_there(rows * k);
  const device<float> weights_there(weights), x(values), to(sent.size()), out(sums.size());
  const device<float> ones(std::vector<float>(rows * k, 1.0f));
  const device<std::uint32_t> slots_there(slot_of_expert), rank_table(rank_of_slot);
  const device<expert_call> calls_there(rows * k);
  const device<std::uint32_t> offsets(ranks + 1), sent_rows(rows * k), position_of_call(rows * k);
  const tetromino::cuda::expert_groups groups{offsets, sent_rows, position_of_call, k};
  const tetromino::cuda::call_tables tables{slots_there.span(), rank_table.span()};
  const std::span<const float> call_weights = weights_there.span();
  require(tetromino::cuda::try_plan_copies(plain, ids_there.span(), call_weights, tables, copies, k, calls_there.span(),
                                           ranks_there.span()),
          "plan_copies");
  const std::span<const std::uint16_t> rank_of_call = ranks_there.span();
  require(tetromino::cuda::try_group_by_expert(plain, rank_of_call, 0, groups), "group");
  require(tetromino::cuda::try_permute<float>(plain, x.span(), to.span(), width, groups), "permute");
  const std::span<const float> one_each = ones.span();
  require(tetromino::cuda::try_combine<float>(plain, to.span(), one_each, out.span(), width, groups), "combine");

  std::vector<std::uint32_t> expected_offsets(plan.send_offsets().begin(), plan.send_offsets().end());
  expected_offsets.push_back(static_cast<std::uint32_t>(plan.sent()));
  auto rows_found = sent_rows.values();
  rows_found.resize(plan.sent());
  const char* const where = "%zu rows of %zu calls to %zu ranks, copies %d: %s";
  const int kind = static_cast<int>(copies);
  expect(first_difference(calls, calls_there.values()) < 0, where, rows, k, ranks, kind, "calls");
  expect(offsets.values() == expected_offsets, where, rows, k, ranks, kind, "offsets");
  expect(first_difference(plan.send_rows(), rows_found) < 0, where, rows, k, ranks, kind, "rows sent");
  expect(first_difference(sent, to.values()) < 0, where, rows, k, ranks, kind, "send buffer");
  expect(first_difference(sums, out.values()) < 0, where, rows, k, ranks, kind, "sums of answers");
  expect(calls_there.is_intact() && ranks_there.is_intact(), where, rows, k, ranks, kind, "written past the end");

  // no weights: 1 for all
  require(tetromino::cuda::try_plan_copies(plain, ids_there.span(), {}, tables, copies, k, calls_there.span(),
                                           ranks_there.span()),
          "plan_copies");
  for (auto& c : calls) c.weight = c.slot == tetromino::moe::no_slot ? 0.0f : 1.0f;
  expect(first_difference(calls, calls_there.values()) < 0, where, rows, k, ranks, kind, "calls that weigh 1");
  const auto refused = tetromino::cuda::try_plan_copies(plain, ids_there.span(), call_weights.first(1), tables, copies,
                                                        k, calls_there.span(), ranks_there.span());
  expect(!refused && refused.error().code() == tetromino::errc::shape_mismatch, "one weight for %zu calls", rows * k);
}
void all_plans() {
  using enum tetromino::moe::row_copies;
  for (const std::size_t rows : {2, 64, 1000}) {
    for (const std::size_t ranks : {1, 3, 8}) {
      for (const std::size_t k : {1, 8}) plans(rows, k, ranks, per_rank), plans(rows, k, ranks, per_expert);
    }
  }
}

}  // namespace

int main() {
  need_device();
  routes();
  odd_biases_and_scales();
  captured_routes();
  all_moves<float>();
  all_moves<bfloat16>();
  all_moves<half>();
  ids_as_calls();
  groups_of_ids();
  groups_of_calls();
  all_plans();
  return finish("moe");
}
