#pragma once

/// A slot for other libraries in the tables of cuda_matmul and cuda_grouped, so that ratios come from one run:
///
///     bench_cuda_grouped --contender "python3 contenders.py"
///
/// The command is started once, on the same GPU, and asked for each cell of the table after ours has been timed, with
/// one line on its standard input:
///
///     dense M N K               x [M, K] by weights [N, K]
///     grouped E N K offset ...  rows offset[e] ... offset[e + 1] - 1 of x by weights [e, N, K]; E + 1 offsets
///
/// It answers `name microseconds` for each way that it has, a line each, and then an empty line; it may answer with the
/// empty line alone. Such a program, with what PyPI has, is
///
///     import statistics, sys, time, torch
///     def replayed(call, calls, turns):          # as cuda_timing.hpp: calls that take turns, in a graph
///         for i in range(turns): call(i)
///         torch.cuda.synchronize()
///         graph = torch.cuda.CUDAGraph()
///         with torch.cuda.graph(graph):
///             for i in range(calls): call(i % turns)
///         graph.replay()
///         times = []
///         for _ in range(3):
///             torch.cuda.synchronize(); time.sleep(0.02)
///             a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
///             torch.cuda._sleep(500_000)         # 0.3 ms, in which the host queues the rest
///             a.record(); graph.replay(); b.record(); b.synchronize()
///             times.append(1e3 * a.elapsed_time(b) / calls)
///         return statistics.median(times)
///     def microseconds(call, turns):             # about 2 ms in a graph
///         return replayed(call, max(1, int(2000 / replayed(call, turns, turns))), turns)
///     for line in sys.stdin:
///         kind, *numbers = line.split()
///         for name, call, turns in ways(kind, [int(n) for n in numbers]):
///             print(name, microseconds(call, turns))
///         print(flush=True)
///
/// where ways() makes the weights of a shape once and keeps them. For what is fair:
/// - Dense weights are copied until they exceed 300 MiB, and calls take turns among the copies. Experts take turns too:
///   call i of eight gives the rows of expert e to expert (e + i E / 8) mod E, as here.
/// - The GPU rests for 20 ms before each replay, and a replay takes about 2 ms: products of many rows in a row reach
///   the power limit, and would slow what is timed next. What keeps the GPU busy before, as trying configurations does,
///   is followed by a rest of 160 ms.
/// - Compare outputs with float sums over the same packed weights before times: a wrong layout can be fast.
/// - Rows come to us grouped by expert. What gathers rows by itself (Marlin, Humming's `indexed`, triton_kernels with
///   gather) does more; sorting tokens by expert is outside for all.
///
/// Where the others are:
/// - Humming: wheel humming-kernels 0.1.20, which compiles each kernel at its first call, in about 2 s;
///   `get_heuristics_config` tells which kernel a shape gets. bfloat16 by MXFP4 or NVFP4; over experts `indexed`
///   (vLLM's choice) and `grouped_contiguous`. E4M3 activations in groups of 128 are a row of their own. As vLLM does,
///   pad N to a multiple of 256 and K to one of 128: without that, 2880 x 2880 has no configuration.
/// - triton_kernels: in the wheel vllm 0.24.0, `matmul_ogs` with its Hopper layout of values and scales; the best of
///   num_warps 4 and 8, and of split_k as chosen and 1 (over experts 1).
/// - Marlin: in the wheel vllm 0.24.0, `marlin_gemm` and `moe_wna16_marlin_gemm`, sums in float, the block size by the
///   rule of vLLM, which rounds the hidden size of gpt-oss up to a multiple of 256 and its inner size to one of 128.
///
/// As shipped, none of them uses programmatic dependent launch on Hopper; ours do, which is worth 1 to 2 us a call.

#include "cuda_timing.hpp"  // require

#include <sys/wait.h>  // waitpid
#include <unistd.h>    // pipe, fork, execl

#include <csignal>   // std::signal
#include <cstdio>    // fdopen
#include <cstdlib>   // std::exit
#include <iostream>  // std::cerr
#include <sstream>   // std::istringstream
#include <string>    // std::string
#include <utility>   // std::pair
#include <vector>    // std::vector

namespace timing {

/// The program that --contender names, or none.
class contender {
 public:
  explicit contender(const std::string& command) {
    if (command.empty()) return;
    std::signal(SIGPIPE, SIG_IGN);  // an end of the other program is said in words
    int to[2], from[2];
    if (pipe(to) != 0 || pipe(from) != 0) fail("pipe");
    child_ = fork();
    if (child_ < 0) fail("fork");
    if (child_ == 0) {
      dup2(to[0], 0), dup2(from[1], 1);
      for (const int end : {to[0], to[1], from[0], from[1]}) close(end);
      execl("/bin/sh", "sh", "-c", command.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    close(to[0]), close(from[1]);
    questions_ = fdopen(to[1], "w"), answers_ = fdopen(from[0], "r");
  }
  contender(const contender&) = delete;
  ~contender() {
    if (questions_ == nullptr) return;
    std::fclose(questions_), std::fclose(answers_);
    waitpid(child_, nullptr, 0);
  }

  /// What it answers to one line: names, and microseconds.
  [[nodiscard]] std::vector<std::pair<std::string, double>> ask(const std::string& line) {
    std::vector<std::pair<std::string, double>> out;
    if (questions_ == nullptr) return out;
    std::fputs((line + "\n").c_str(), questions_);
    std::fflush(questions_);
    char text[512];
    while (std::fgets(text, sizeof text, answers_) != nullptr) {
      if (text[0] == '\n') return out;
      std::istringstream words(text);
      std::pair<std::string, double> one;
      if (!(words >> one.first >> one.second)) fail("an answer that is no name and time");
      out.push_back(one);
    }
    fail("its end in the middle of an answer");
  }

 private:
  [[noreturn]] static void fail(const char* what) {
    std::cerr << "the contender: " << what << "\n";
    std::exit(1);
  }
  pid_t child_ = 0;
  std::FILE* questions_ = nullptr;
  std::FILE* answers_ = nullptr;
};

/// One line for each answer, beside our time.
inline void print_contenders(const std::vector<std::pair<std::string, double>>& all, double ours_us) {
  for (const auto& [name, us] : all) std::printf("    %-32s %9.2f us = %5.2f x ours\n", name.c_str(), us, us / ours_us);
}

}  // namespace timing
