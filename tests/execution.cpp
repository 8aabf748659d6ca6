#include "check.hpp"

#include <tetromino/execution.hpp>
#include <tetromino/thread_executor.hpp>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <stdexcept>
#include <thread>
#include <vector>

// A limit of memory that sanitizers would not start under.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TETROMINO_TEST_CANNOT_LIMIT
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TETROMINO_TEST_CANNOT_LIMIT
#endif
#endif

namespace {

using tetromino::task_ref;
using tetromino::thread_executor;

/// The status with which a child process ends that runs `body`.
template <class Body>
int status_of_child(const Body& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST_CASE("an executor runs each task once, on at most as many threads as it says") {
  for (const unsigned count : {1u, 2u, 5u, 40u}) {
    for (const std::size_t tasks : {0u, 1u, 3u, 1000u}) {
      std::vector<std::atomic<int>> runs(tasks);
      const auto task = [&](std::size_t i) { ++runs[i]; };
      const thread_executor run(count);
      run(tasks, task);
      for (const auto& n : runs) CHECK(n == 1);
    }
  }
  CHECK(thread_executor(0).count() == 1);
}

TEST_CASE("an executor with a count says how many threads it has") {
  const auto silent = [](std::size_t, task_ref) {};
  const thread_executor three(3);
  CHECK(tetromino::executor_ref(three).threads() == 3);
  CHECK(tetromino::executor_ref(silent).threads() == 0);
  CHECK(tetromino::executor_ref().threads() == 0);
}

TEST_CASE("an executor rethrows what a task lets out, when all threads have stopped") {
  const auto task = [](std::size_t i) {
    if (i == 7) throw std::runtime_error("seven");
  };
  CHECK_THROWS_WITH(thread_executor(3)(100, task), "seven");
}

#if !defined(TETROMINO_TEST_CANNOT_LIMIT)
/// Lets this process have only so much more address space than it has.
void limit_memory(std::size_t more) {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const rlimit limit{pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)) + more, RLIM_INFINITY};
  ::setrlimit(RLIMIT_AS, &limit);
}

TEST_CASE("where no more threads can start, those there are do the work") {
  const auto run = [](std::size_t more) {
    return status_of_child([more] {
      std::atomic<int> runs{0};
      const auto task = [&](std::size_t) {
        ++runs;
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      };
      limit_memory(more);
      thread_executor(64)(200, task);
      return runs == 200 ? 0 : 1;
    });
  };
  CHECK(run(0) == 0);                        // none at all
  CHECK(run(std::size_t{30} << 20) == 0);    // a few: each has a stack of some MiB
  CHECK(run(std::size_t{2000} << 20) == 0);  // all
}
#endif

}  // namespace
