#pragma once

#include "../execution.hpp"  // executor_ref
#include "float_state.hpp"   // default_float_state

#include <algorithm>  // std::min, std::max
#include <cstddef>    // std::size_t

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Rows of a batch, counted through all its matrices, in pieces that are worth a task. Whatever the threads have set,
/// they compute in the usual way meanwhile.
template <class F>
void for_each_row(executor_ref executor, std::size_t rows, std::size_t cols, const F& f) {
  constexpr std::size_t elements_per_task = 1 << 16;
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
