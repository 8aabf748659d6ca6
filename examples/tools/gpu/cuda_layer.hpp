#pragma once

/// Weights of a mixture-of-experts layer on the GPU, made from nothing, and how long work with them takes.

#include "device_array.hpp"
#include "kernels.hpp"

#include <tetromino/cuda.hpp>
#include <tetromino/scaling.hpp>

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

/// The packed and the repacked weights of all experts of one projection.
struct projection {
  tetromino::packed_shape shape;
  tetromino::cuda::repacked_shape repacked_shape;
  device_array<std::uint8_t> codes, scales, macros;
  device_array<std::byte> repacked;

  projection(const tetromino::recipe& r, std::size_t experts, std::size_t rows, std::size_t cols,
             tetromino::cuda::gating_rows gating)
      : shape{r.format, experts, rows, cols},
        repacked_shape{r.format, experts, rows, cols, gating},
        codes(shape.code_bytes()),
        scales(shape.scale_bytes()),
        macros(shape.macro_bytes()),
        repacked(repacked_shape.bytes()) {}

  /// Experts first ... first + count - 1.
  [[nodiscard]] tetromino::packed_view<tetromino::any_format, std::uint8_t> view(std::size_t first,
                                                                                 std::size_t count) const {
    const auto part = [&](const device_array<std::uint8_t>& all) {
      const std::size_t each = all.size / shape.matrices;
      return all.span().subspan(first * each, count * each);
    };
    return {shape.format, count, shape.rows, shape.cols, part(codes), part(scales), part(macros), {}};
  }
  template <tetromino::cuda::repackable T = tetromino::bfloat16>
  [[nodiscard]] tetromino::cuda::repacked_view<T, std::byte> ready() const {
    return {repacked_shape, repacked.span()};
  }

  /// Packs the weights of the experts named, one for each matrix, and repacks them all for activations of type T.
  /// Weights are random, and follow from the expert's number and the seed; `room` is for those of one expert.
  template <tetromino::cuda::repackable T = tetromino::bfloat16>
  void make(const tetromino::cuda::stream& s, const tetromino::recipe& r, std::span<const std::int32_t> experts,
            std::uint64_t seed, float* room) const {
    tetromino::quantize_options options;
    options.rule = r.rule, options.macro = r.macro, options.special = tetromino::special_values::poison;
    for (std::size_t e = 0; e < shape.matrices; ++e) {
      fill(s.handle, room, shape.rows * shape.cols, seed + static_cast<std::uint64_t>(experts[e]),
           1.0f / std::sqrt(static_cast<float>(shape.cols)));
      tetromino::quantize_to(s, tetromino::matrix_view<const float>(room, shape.rows, shape.cols), view(e, 1), options);
    }
    tetromino::repack_to(s, view(0, shape.matrices), ready<T>());
    check(cudaStreamSynchronize(s.handle), "packing");
  }
};

/// Some experts: y = down(silu(gate x) * up x), from 4 bits.
class expert_weights {
 public:
  expert_weights(const tetromino::cuda::stream& s, const tetromino::recipe& r, std::span<const std::int32_t> experts,
                 std::size_t hidden, std::size_t inner)
      : gate_and_up_(r, experts.size(), 2 * inner, hidden, tetromino::cuda::gating_rows::halves),
        down_(r, experts.size(), hidden, inner, tetromino::cuda::gating_rows::none),
        gated_(0) {
    const device_array<float> room(2 * inner * hidden);
    gate_and_up_.make(s, r, experts, 1000, room.data);
    down_.make(s, r, experts, 2000, room.data);
  }

  /// y[pairs, hidden] of x[pairs, hidden]; offsets[experts + 1] say which pairs belong to which expert.
  void operator()(const tetromino::cuda::stream& s, std::span<const tetromino::bfloat16> x,
                  std::span<const std::uint32_t> offsets, std::span<tetromino::bfloat16> y) {
    const std::size_t hidden = down_.shape.rows, inner = down_.shape.cols, pairs = x.size() / hidden;
    gated_.reserve(pairs * inner);
    const tetromino::matrix_view<tetromino::bfloat16> gated(gated_.data, pairs, inner);
    tetromino::grouped_matmul(s, tetromino::matrix_view<const tetromino::bfloat16>(x.data(), pairs, hidden),
                              gate_and_up_.ready(), offsets, gated);
    tetromino::grouped_matmul(s, tetromino::matrix_view<const tetromino::bfloat16>(gated_.data, pairs, inner),
                              down_.ready(), offsets,
                              tetromino::matrix_view<tetromino::bfloat16>(y.data(), pairs, hidden));
  }

 private:
  projection gate_and_up_, down_;
  device_array<tetromino::bfloat16> gated_;
};

/// Milliseconds of f, the median of `times` after two untimed; what `before` queues is not timed.
template <class F, class Before>
double milliseconds(cudaStream_t stream, int times, const F& f, const Before& before) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> all;
  for (int i = 0; i < times + 2; ++i) {
    before();
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    f();
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= 2) all.push_back(ms);
  }
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}
template <class F>
double milliseconds(cudaStream_t stream, const F& f) {
  return milliseconds(stream, 9, f, [] {});
}

/// Milliseconds of one of f(0) ... f(turns - 1), which follow one another in a graph that takes about 2 ms: of three
/// launches, each after a rest of 20 ms, the median. Layers of many tokens back to back reach the GPU's power limit,
/// which lowers the clock, also for what is timed next.
template <class F>
double milliseconds_rested(cudaStream_t stream, std::size_t turns, const F& f) {
  const auto first = [&] { f(std::size_t{0}); };
  const double about = milliseconds(stream, 1, first, [] {});
  const auto calls = static_cast<std::size_t>(std::max(1.0, 2 / about));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (std::size_t i = 0; i < calls; ++i) f(i % turns);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  const auto launch = [&] { check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch"); };
  const double ms = milliseconds(stream, 3, launch, [&] {  // in the stream: what follows is queued meanwhile
    const auto sleep = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
    check(cudaLaunchHostFunc(stream, sleep, nullptr), "cudaLaunchHostFunc");
  });
  check(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return ms / static_cast<double>(calls);
}
