#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../error.hpp"      // error, result
#include "../../../execution.hpp"  // executor_ref
#include "../rows.hpp"             // row_buffers

#include <atomic>    // std::atomic
#include <cstddef>   // std::size_t
#include <cstdint>   // std::uint8_t
#include <memory>    // std::unique_ptr
#include <mutex>     // std::mutex
#include <optional>  // std::optional
#include <utility>   // std::move
#include <vector>    // std::vector

/// Slices of a model, which threads work on with buffers that are made once.
namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The first error of several threads; work stops once there is one.
class shared_failure {
 public:
  [[nodiscard]] bool is_set() const noexcept { return is_set_.load(std::memory_order_relaxed); }
  void set(const error& e) {
    const std::lock_guard lock(mutex_);
    if (!first_) first_ = e;
    is_set_ = true;
  }
  [[nodiscard]] result<void> outcome() const { return first_ ? result<void>(*first_) : result<void>(); }

 private:
  std::atomic<bool> is_set_{false};
  std::mutex mutex_;
  std::optional<error> first_;
};

/// What a thread needs while it works on a slice.
struct slice_buffers {
  io::row_buffers rows;
  std::vector<std::uint8_t> codes, scales, macros, gathered;
  std::vector<float> values;
};

/// Buffers that threads take and give back, so that no more are made than work at a time.
class buffer_pool {
 public:
  [[nodiscard]] std::unique_ptr<slice_buffers> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<slice_buffers>();
    auto out = std::move(free_.back());
    free_.pop_back();
    return out;
  }
  void give(std::unique_ptr<slice_buffers> buffers) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(buffers));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<slice_buffers>> free_;
};

/// Calls f(i, buffers), which returns result<void>, for i of [0, count) over the executor; the first error comes back.
template <class F>
[[nodiscard]] result<void> for_each_slice(executor_ref executor, std::size_t count, buffer_pool& pool, const F& f) {
  shared_failure failure;
  executor(count, [&](std::size_t i) {
    if (failure.is_set()) return;
    auto buffers = pool.take();
    if (auto done = f(i, *buffers); !done) failure.set(done.error());
    pool.give(std::move(buffers));
  });
  return failure.outcome();
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
