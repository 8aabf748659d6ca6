#pragma once

/// A process for each GPU of one host, without MPI: what programs over NCCL need to start, to meet and to end together.
/// Where mpirun, torchrun or an engine starts the ranks, none of this is needed.

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace gpu_ranks {

/// What the processes share: a barrier, and a place for each of 64 ranks to lay a value out.
struct shared_memory {
  static constexpr std::size_t most_ranks = 64, most_bytes = 4096;
  pthread_barrier_t barrier;
  std::byte values[most_ranks][most_bytes];
};

/// The ranks, as one of them sees them. All of them make the same calls in the same order.
class team {
 public:
  team(shared_memory& shared, std::size_t rank, std::size_t ranks) : shared_(shared), rank_(rank), ranks_(ranks) {}
  [[nodiscard]] std::size_t rank() const { return rank_; }
  [[nodiscard]] std::size_t ranks() const { return ranks_; }
  [[nodiscard]] bool is_first() const { return rank_ == 0; }

  void wait_for_all() const { pthread_barrier_wait(&shared_.barrier); }

  /// The value of each rank, on all ranks.
  template <class T>
  [[nodiscard]] std::vector<T> gather(const T& mine) const {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= shared_memory::most_bytes);
    std::memcpy(shared_.values[rank_], &mine, sizeof(T));
    wait_for_all();
    std::vector<T> all(ranks_);
    for (std::size_t r = 0; r < ranks_; ++r) std::memcpy(&all[r], shared_.values[r], sizeof(T));
    wait_for_all();
    return all;
  }
  /// The first rank's value, on all ranks.
  template <class T>
  [[nodiscard]] T of_first(T value) const {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= shared_memory::most_bytes);
    if (is_first()) std::memcpy(shared_.values[0], &value, sizeof(T));
    wait_for_all();
    std::memcpy(&value, shared_.values[0], sizeof(T));
    wait_for_all();
    return value;
  }
  template <class T>
  [[nodiscard]] T sum(const T& mine) const {
    const std::vector<T> all = gather(mine);
    return std::accumulate(all.begin(), all.end(), T{});
  }
  template <class T>
  [[nodiscard]] T largest(const T& mine) const {
    const std::vector<T> all = gather(mine);
    return *std::max_element(all.begin(), all.end());
  }

 private:
  shared_memory& shared_;
  std::size_t rank_, ranks_;
};

inline constexpr int gave_up = 255;  ///< exit code of a rank whose work threw

/// Runs work(team) in a process for each rank, and waits for them; the largest of what they returned (0 to 254), or
/// `gave_up` where one threw or was ended by a signal: the others, which would wait for it, are ended then. Processes
/// are forked, so the caller must not have used CUDA.
template <class Work>
[[nodiscard]] int run(std::size_t ranks, const Work& work) {
  if (ranks == 0 || ranks > shared_memory::most_ranks) throw std::runtime_error("expected 1 to 64 ranks");
  void* const memory = mmap(nullptr, sizeof(shared_memory), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no shared memory for the ranks");
  auto& shared = *static_cast<shared_memory*>(memory);
  pthread_barrierattr_t between_processes;
  pthread_barrierattr_init(&between_processes);
  pthread_barrierattr_setpshared(&between_processes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&shared.barrier, &between_processes, static_cast<unsigned>(ranks));

  std::fflush(nullptr);
  std::vector<pid_t> processes;
  const auto end_all = [&] {
    for (const pid_t p : processes) kill(p, SIGKILL);
  };
  const pid_t parent = getpid();
  for (std::size_t r = 0; r < ranks; ++r) {
    const pid_t p = fork();
    if (p < 0) {
      end_all();
      throw std::runtime_error("a rank could not be started");
    }
    if (p > 0) {
      processes.push_back(p);
      continue;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);          // no rank outlives the program
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // and what it said is seen, whatever ends it
    int status = gave_up;
    try {
      if (getppid() == parent) status = work(team(shared, r, ranks));
    } catch (const std::exception& e) {
      std::fprintf(stderr, "rank %zu: %s\n", r, e.what());
    }
    std::fflush(nullptr);
    _exit(status);
  }

  int worst = 0;
  for (std::size_t left = ranks; left > 0; --left) {
    int status = 0;
    const pid_t p = wait(&status);
    if (p < 0) throw std::runtime_error("the ranks could not be waited for");
    std::erase(processes, p);
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : gave_up;
    if (code == gave_up && worst != gave_up) end_all();
    worst = std::max(worst, code);
  }
  munmap(memory, sizeof(shared_memory));
  return worst;
}

/// GPUs of this host. They are counted in another process, since run() needs one that has not used CUDA.
[[nodiscard]] inline std::size_t count() {
  return static_cast<std::size_t>(run(1, [](const team&) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
  }));
}

}  // namespace gpu_ranks
