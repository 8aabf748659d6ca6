#pragma once

#include "../../../detail/macros_off.hpp"

#include "../options.hpp"  // pack_options
#include "../plan.hpp"     // pack_plan
#include "slices.hpp"      // slice_buffers
#include "tasks.hpp"       // pack_task
#include "window.hpp"      // stored_window

#include <algorithm>  // std::stable_partition
#include <cstddef>    // std::size_t
#include <span>       // std::span
#include <string>     // std::string
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// What slices of a model need while they are worked on.
struct slice_memory {
  stored_window window;
  buffer_pool buffers;
};

/// Runs slices of a model over an executor.
class slice_runner {
 public:
  slice_runner(executor_ref executor, const io::checkpoint& from, const io::pack_plan& plan,
               const pack_schedule& schedule, const io::pack_options& options, slice_memory& memory)
      : executor_(executor), from_(from), plan_(plan), schedule_(schedule), options_(options), memory_(memory) {}

  /// Calls f(task, window or null, buffers) for all tasks, those that need a window after the others, window by window.
  /// f returns result<void>; the first error comes back, with the name of its tensor.
  template <class F>
  [[nodiscard]] result<void> run_all(std::vector<pack_task>& tasks, const F& f) {
    const auto windows = std::stable_partition(tasks.begin(), tasks.end(),
                                               [this](const pack_task& t) { return !schedule_.needs_window(t); });
    if (auto run = run_tasks({tasks.begin(), windows}, nullptr, f); !run) return run;
    for (auto begin = windows; begin != tasks.end();) {
      const io::parameter& p = *plan_.parameters[begin->parameter].source;
      const std::size_t bytes_per_row = p.cols * bits_per_element(p.values->dtype) / 8;
      io::row_range rows{begin->rows.matrix, begin->rows.first, 0};
      auto end = begin;
      do {
        rows.count += end++->rows.count;
      } while (end != tasks.end() && end->parameter == begin->parameter && end->rows.matrix == begin->rows.matrix &&
               (rows.count + end->rows.count) * bytes_per_row <= options_.window_bytes);
      auto filled = memory_.window.try_fill(executor_, from_, p, rows, options_.slice_bytes);
      if (!filled) return named(filled.error(), *begin);
      if (auto run = run_tasks({begin, end}, &memory_.window, f); !run) return run;
      begin = end;
    }
    return {};
  }

 private:
  template <class F>
  [[nodiscard]] result<void> run_tasks(std::span<const pack_task> tasks, const stored_window* window, const F& f) {
    return for_each_slice(executor_, tasks.size(), memory_.buffers,
                          [&](std::size_t t, slice_buffers& buffers) -> result<void> {
                            auto done = f(tasks[t], window, buffers);
                            return done ? done : result<void>(named(done.error(), tasks[t]));
                          });
  }

  [[nodiscard]] error named(const error& e, const pack_task& task) const {
    const io::parameter& p = *plan_.parameters[task.parameter].source;
    std::string message = e.what();
    if (message.find(p.name) == std::string::npos) message = text("tensor ", printable(p.name), ": ", message);
    return error(e.code(), message);
  }

  executor_ref executor_;
  const io::checkpoint& from_;
  const io::pack_plan& plan_;
  const pack_schedule& schedule_;
  const io::pack_options& options_;
  slice_memory& memory_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
