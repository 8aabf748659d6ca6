#pragma once

#include "../execution.hpp"  // executor_ref
#include "float_state.hpp"   // default_float_state

#include <algorithm>  // std::min, std::max
#include <atomic>     // std::atomic
#include <cstddef>    // std::size_t
#include <limits>     // std::numeric_limits

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The least of the values that several threads offer.
class shared_minimum {
 public:
  static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  void offer(std::size_t value) noexcept {
    std::size_t seen = value_.load(std::memory_order_relaxed);
    while (value < seen && !value_.compare_exchange_weak(seen, value)) {
    }
  }
  [[nodiscard]] std::size_t value() const noexcept { return value_.load(); }

 private:
  std::atomic<std::size_t> value_{none};
};

/// Rows of a batch, counted through all its matrices, in pieces that are worth a task. Whatever the threads have set,
/// they compute in the usual way meanwhile.
template <class F>
void for_each_row(executor_ref executor, std::size_t rows, std::size_t cols, const F& f,
                  std::size_t elements_per_task = 1 << 16) {
  if (cols == 0) return;  // however many rows there are, nothing is in them
  const std::size_t piece =
      std::max<std::size_t>(1, executor.is_parallel() ? elements_per_task / std::max<std::size_t>(1, cols) : rows);
  const auto task = [&](std::size_t i) {
    const default_float_state usual;
    const std::size_t last = std::min(rows, (i + 1) * piece);
    for (std::size_t row = i * piece; row < last; ++row) f(row);
  };
  executor((rows + piece - 1) / piece, task);
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
