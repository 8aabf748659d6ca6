#pragma once

/// Timing on a GPU: medians of many runs between events, on inputs larger than the cache.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace timing {

inline void require(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s (%s)\n", what, cudaGetErrorName(code), cudaGetErrorString(code));
  std::exit(1);
}

struct measured {
  double median_us = 0;
  double least_us = 0;
  double spread = 0;  ///< (90th percentile - 10th) / median
};

inline measured summary(std::vector<double> us) {
  std::sort(us.begin(), us.end());
  const double median = us[us.size() / 2];
  return {median, us.front(), (us[us.size() * 9 / 10] - us[us.size() / 10]) / median};
}

/// Times f(i), one launch or a few, `runs` times after warming up; i counts the runs, to take turns among inputs.
template <class F>
measured time(cudaStream_t stream, int runs, const F& f) {
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(runs) + 1);
  for (auto& e : events) require(cudaEventCreate(&e), "cudaEventCreate");
  for (int i = 0; i < 3; ++i) f(i);
  require(cudaEventRecord(events[0], stream), "cudaEventRecord");
  for (int i = 0; i < runs; ++i) {
    f(i);
    require(cudaEventRecord(events[static_cast<std::size_t>(i) + 1], stream), "cudaEventRecord");
  }
  require(cudaStreamSynchronize(stream), "a timed kernel");
  std::vector<double> us;
  for (std::size_t i = 0; i < static_cast<std::size_t>(runs); ++i) {
    float ms = 0;
    require(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "cudaEventElapsedTime");
    us.push_back(1e3 * static_cast<double>(ms));
  }
  for (auto& e : events) require(cudaEventDestroy(e), "cudaEventDestroy");
  return summary(us);
}

/// The same for short work: `per_graph` calls of f in a graph, replayed `runs` times; times are for one call.
template <class F>
measured time_graph(cudaStream_t stream, int runs, int per_graph, const F& f) {
  for (int i = 0; i < 3; ++i) f(i);
  require(cudaStreamSynchronize(stream), "a timed kernel");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (int i = 0; i < per_graph; ++i) f(i);
  require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  measured out = time(stream, runs, [&](int) { require(cudaGraphLaunch(exec, stream), "cudaGraphLaunch"); });
  require(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
  require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  out.median_us /= per_graph, out.least_us /= per_graph;
  return out;
}

template <class T>
T* allocate(std::size_t n) {
  T* p = nullptr;
  require(cudaMalloc(reinterpret_cast<void**>(&p), n * sizeof(T)), "cudaMalloc");
  return p;
}

/// What a device copy of `bytes` moves, bytes read plus bytes written, in TB/s.
inline double copy_rate(cudaStream_t stream, std::size_t bytes) {
  auto* from = allocate<std::uint8_t>(bytes);
  auto* to = allocate<std::uint8_t>(bytes);
  require(cudaMemset(from, 1, bytes), "cudaMemset");
  const measured t = time(stream, 20, [&](int) {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
  });
  cudaFree(from);
  cudaFree(to);
  return 2.0 * static_cast<double>(bytes) / t.median_us * 1e-6;
}

/// Ends the program with 77 where there is no device; else prints what a device copy moves, and returns it.
inline double start() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no CUDA device\n");
    std::exit(77);
  }
  const double copy = copy_rate(nullptr, std::size_t{1} << 30);
  std::printf("device copy: %.3f TB/s, bytes read plus written\n", copy);
  return copy;
}

/// One line of a table: the time, and its rate in `bytes` as a share of the copy's.
inline void print_row(const std::string& what, const measured& t, double bytes, double copy) {
  const double rate = bytes / t.median_us * 1e-6;
  std::printf("%-52s %10.1f us  ±%4.1f %%  %6.3f TB/s  %5.1f %% of the copy rate\n", what.c_str(), t.median_us,
              50 * t.spread, rate, 100 * rate / copy);
}

}  // namespace timing
