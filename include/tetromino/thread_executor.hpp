#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"     // TETROMINO_EXCEPTIONS
#include "execution.hpp"  // task_ref

#include <algorithm>     // std::min
#include <atomic>        // std::atomic
#include <cstddef>       // std::size_t
#include <exception>     // std::exception_ptr
#include <new>           // std::bad_alloc
#include <system_error>  // std::system_error
#include <thread>        // std::thread
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE {

/// A plain executor: `count` std::threads for the length of one call (the calling thread is one of them).
class thread_executor {
 public:
  TETROMINO_ABI explicit thread_executor(unsigned count = std::thread::hardware_concurrency()) noexcept
      : count_(count == 0 ? 1 : count) {}

  [[nodiscard]] TETROMINO_ABI unsigned count() const noexcept { return count_; }

  /// Where the system starts fewer threads, those share the work. Rethrows the first exception that a task let out,
  /// after all threads have stopped.
  TETROMINO_ABI void operator()(std::size_t tasks, task_ref task) const {
    std::atomic<std::size_t> next{0};
#if TETROMINO_EXCEPTIONS
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    const auto work = [&] {
      try {
        for (std::size_t i; !failed.load(std::memory_order_relaxed) && (i = next.fetch_add(1)) < tasks;) task(i);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
#else
    const auto work = [&] {
      for (std::size_t i; (i = next.fetch_add(1)) < tasks;) task(i);
    };
#endif
    std::vector<std::thread> helpers;
    const std::size_t wanted = std::min<std::size_t>(count_, tasks);
#if TETROMINO_EXCEPTIONS
    try {
      helpers.reserve(wanted);
      for (std::size_t t = 1; t < wanted; ++t) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // no thread more: the limit of processes, or of memory
    } catch (const std::bad_alloc&) {
    }
#else
    helpers.reserve(wanted);
    for (std::size_t t = 1; t < wanted; ++t) helpers.emplace_back(work);
#endif
    work();
    for (auto& helper : helpers) helper.join();
#if TETROMINO_EXCEPTIONS
    if (failure) std::rethrow_exception(failure);
#endif
  }

 private:
  unsigned count_;
};

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
