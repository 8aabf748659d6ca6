#pragma once

#include "../execution.hpp"  // executor_ref
#include "float_state.hpp"   // default_float_state

#include <algorithm>  // std::min, std::max
#include <cstddef>    // std::size_t
#include <limits>     // std::numeric_limits

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The least of the values that several threads offer. By what std::atomic is made of: compilers take as long to read
/// <atomic>, which includes how to wait, as all kernels.
class shared_minimum {
 public:
  static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  void offer(std::size_t value) noexcept {
    std::size_t seen = this->value();
    while (value < seen &&
           !__atomic_compare_exchange_n(&value_, &seen, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
  }
  [[nodiscard]] std::size_t value() const noexcept { return __atomic_load_n(&value_, __ATOMIC_SEQ_CST); }

 private:
  std::size_t value_ = none;
};

/// Runs one_row(row) for the rows of a batch, counted through all its matrices, in pieces that are worth a task.
/// Whatever the threads have set, they compute in the usual way meanwhile.
inline void for_each_row(executor_ref executor, std::size_t rows, std::size_t cols, task_ref one_row,
                         std::size_t elements_per_task = 1 << 16) {
  if (cols == 0) return;  // however many rows there are, nothing is in them
  const auto run = [&](std::size_t first, std::size_t last) {
    const default_float_state usual;
    for (std::size_t row = first; row < last; ++row) one_row(row);
  };
  if (!executor.is_parallel()) return run(0, rows);
  const std::size_t piece = std::max<std::size_t>(1, elements_per_task / cols);
  const auto task = [&](std::size_t i) { run(i * piece, std::min(rows, (i + 1) * piece)); };
  executor((rows + piece - 1) / piece, task);
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
