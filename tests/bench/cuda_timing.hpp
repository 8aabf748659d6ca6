#pragma once

/// Timing on a GPU: medians of runs between events, on inputs larger than the cache.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
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

/// Times f(i), one launch or a few, `runs` times after warming up; i counts the runs, to take turns among inputs. What
/// `before` queues is not timed.
template <class F, class Before>
measured time(cudaStream_t stream, int runs, const F& f, const Before& before) {
  std::vector<cudaEvent_t> events(2 * static_cast<std::size_t>(runs));
  for (auto& e : events) require(cudaEventCreate(&e), "cudaEventCreate");
  for (int i = 0; i < 3; ++i) f(i);
  for (int i = 0; i < runs; ++i) {
    before();
    require(cudaEventRecord(events[2 * static_cast<std::size_t>(i)], stream), "cudaEventRecord");
    f(i);
    require(cudaEventRecord(events[2 * static_cast<std::size_t>(i) + 1], stream), "cudaEventRecord");
  }
  require(cudaStreamSynchronize(stream), "a timed kernel");
  std::vector<double> us;
  for (std::size_t i = 0; i < events.size(); i += 2) {
    float ms = 0;
    require(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "cudaEventElapsedTime");
    us.push_back(1e3 * static_cast<double>(ms));
  }
  for (auto& e : events) require(cudaEventDestroy(e), "cudaEventDestroy");
  return summary(us);
}
template <class F>
measured time(cudaStream_t stream, int runs, const F& f) {
  return time(stream, runs, f, [] {});
}

/// Lets the GPU rest for 20 ms. What is queued behind that starts without waiting for the host.
inline void rest(cudaStream_t stream) {
  const auto sleep = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  require(cudaLaunchHostFunc(stream, sleep, nullptr), "cudaLaunchHostFunc");
}

/// Calls f(0), f(1), ... in a graph that takes about 2 ms.
class graph_of_calls {
 public:
  template <class F>
  graph_of_calls(cudaStream_t stream, const F& f)
      : stream_(stream), calls_(std::max(1, static_cast<int>(2000 / time(stream, 3, f).median_us))) {
    cudaGraph_t graph;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (int i = 0; i < calls_; ++i) f(i);
    require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&exec_, graph, 0), "cudaGraphInstantiate");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  graph_of_calls(const graph_of_calls&) = delete;
  ~graph_of_calls() { cudaGraphExecDestroy(exec_); }

  void launch() const { require(cudaGraphLaunch(exec_, stream_), "cudaGraphLaunch"); }
  /// One call's share of the time of a launch.
  [[nodiscard]] measured of_a_call(const measured& all) const {
    return {all.median_us / calls_, all.least_us / calls_, all.spread};
  }

 private:
  cudaStream_t stream_;
  int calls_;
  cudaGraphExec_t exec_ = nullptr;
};

/// The time of one of f(0), f(1), ... on a rested GPU: calls in a graph of about 2 ms, three times, each behind a rest.
/// Products of many rows in a row reach the power limit, which slows what is timed next too.
template <class F>
measured time_rested(cudaStream_t stream, const F& f) {
  const graph_of_calls calls(stream, f);
  const auto launch = [&](int) { calls.launch(); };
  return calls.of_a_call(time(stream, 3, launch, [&] { rest(stream); }));
}

/// The same of calls that go on at the power limit: in 0.1 s after 0.2 s. Then the GPU cools, for what is timed next.
template <class F>
measured time_in_a_row(cudaStream_t stream, const F& f) {
  const graph_of_calls calls(stream, f);
  for (int i = 0; i < 100; ++i) calls.launch();
  const measured all = time(stream, 50, [&](int) { calls.launch(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(160));  // the clock needs more than one rest to come back
  return calls.of_a_call(all);
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
