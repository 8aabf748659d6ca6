#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../hadamard.hpp"      // rotate
#include "../../../quantize.hpp"      // try_quantize_to, amax
#include "../../detail/cast.hpp"      // largest_scale_code
#include "../../detail/in_whole.hpp"  // in_whole
#include "../options.hpp"             // pack_options
#include "set_scales.hpp"             // set_scales
#include "slices.hpp"                 // slice_buffers
#include "tasks.hpp"                  // pack_task
#include "window.hpp"                 // stored_window

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t
#include <utility>  // std::move, std::swap
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Memory for packed rows.
inline packed_view<any_format, std::uint8_t> storage_for(const any_format& format, std::size_t rows, std::size_t cols,
                                                         slice_buffers& buffers) {
  const packed_shape shape{format, 1, rows, cols};
  buffers.codes.resize(shape.code_bytes());
  buffers.scales.resize(shape.scale_bytes());
  buffers.macros.resize(shape.macro_bytes());
  return {format, 1, rows, cols, buffers.codes, buffers.scales, buffers.macros, {}};
}

/// Reads the slices of a model and quantizes them as planned. From any thread.
template <class Policy>
class slice_quantizer {
 public:
  slice_quantizer(const Policy& policy, const io::checkpoint& from, const io::pack_plan& plan,
                  const io::pack_options& options)
      : policy_(policy.on({})),  // slices are the unit of parallel work
        from_(from),
        plan_(plan),
        options_(options),
        scales_(from, plan) {}

  [[nodiscard]] const Policy& policy() const noexcept { return policy_; }
  [[nodiscard]] const set_scales& scales() const noexcept { return scales_; }

  /// Looks for the largest magnitude in a slice. `window` holds its rows where they are to be turned, or is null.
  [[nodiscard]] result<void> measure(const pack_task& task, const stored_window* window, slice_buffers& buffers) {
    const io::parameter& p = *planned(task).source;
    if (options_.progress && !options_.progress(0)) return error(errc::io, "stopped");
    if (planned(task).action == action::cast) {
      return visit_packed(from_, p, task.rows, buffers.rows, [&](const packed_view<any_format>& rows) -> result<void> {
        scales_.add(task.parameter, task.rows.matrix, largest_scale_code(rows));
        return {};
      });
    }
    const std::size_t rotation = planned(task).how.rotation;
    return visit(task, window, buffers, [&](const auto& rows) -> result<void> {
      if (rotation == 0) {
        scales_.add(task.parameter, task.rows.matrix, amax(policy_, rows, options_.special));
        return {};
      }
      matrix<float> rotated(rows.rows, rows.cols);
      for (std::size_t r = 0; r < rows.rows; ++r) {
        for (std::size_t k = 0; k < rows.cols; ++k) rotated(r, k) = to_float(rows(r, k));
      }
      rotate(policy_, rotated, {rotation}, rotated.view());
      scales_.add(task.parameter, task.rows.matrix, amax(policy_, rotated, options_.special));
      return {};
    });
  }

  /// Calls f(rows, packed_view) with the values of a slice and what they are packed to. f returns result<void>.
  template <class F>
  [[nodiscard]] result<void> pack(const pack_task& task, const stored_window* window, slice_buffers& buffers,
                                  const F& f) {
    const auto& how = planned(task).how;
    const io::parameter& p = *planned(task).source;
    const bool is_nvfp4 = scales_.has(task.parameter);
    quantize_options options;
    options.special = options_.special;
    const auto scale = is_nvfp4 ? scales_.try_scale(task.parameter, task.rows.matrix) : result<float>(1.0f);
    if (!scale) return scale.error();
    if (is_nvfp4) options.tensor_scales = {&*scale, 1};
    std::vector<float> weights;
    if (plan_.options.inputs != nullptr && !how.error_feedback) {
      auto known = plan_.options.inputs->column_weights(p, task.rows.matrix, how.rotation);
      if (!known) return known.error();
      weights = std::move(*known);
      options.column_weights = weights;
    }
    return visit(task, window, buffers, [&](const auto& rows) -> result<void> {
      packed<> fed;
      packed_view<any_format, std::uint8_t> out = storage_for(how.format, rows.rows, rows.cols, buffers);
      float kept_scale = *scale;
      if (is_nvfp4) out.tensor_scales = {&kept_scale, 1};
      if (how.error_feedback) {
        auto done = feed_back(rows, task, options, buffers);
        if (!done) return done.error();
        fed = std::move(*done);
        out = fed.view();
      } else if (auto done = try_quantize_to(policy_, rows, how, out, options); !done) {
        return in_whole(done.error(), rows, p.matrices, task.rows.matrix, task.rows.first);
      }
      return f(rows, out);
    });
  }

 private:
  using action = io::pack_action;

  [[nodiscard]] const io::planned_parameter& planned(const pack_task& task) const noexcept {
    return plan_.parameters[task.parameter];
  }

  /// Calls f with the values of a task.
  template <class F>
  [[nodiscard]] result<void> visit(const pack_task& task, const stored_window* window, slice_buffers& buffers,
                                   const F& f) {
    const io::parameter& p = *planned(task).source;
    if (window != nullptr) return window->visit(p, task.rows, buffers.rows, f);
    if (!task.as_stored) return io::try_visit_rows(policy_, from_, p, task.rows, buffers.rows, f);
    io::parameter stored = p;
    std::swap(stored.rows, stored.cols);
    stored.kind.is_transposed = false;
    return io::try_visit_rows(policy_, from_, stored, task.rows, buffers.rows, f);
  }

  template <class Rows>
  [[nodiscard]] result<packed<>> feed_back(const Rows& rows, const pack_task& task, const quantize_options& options,
                                           slice_buffers& buffers) const {
    const auto& p = planned(task);
    if (plan_.options.inputs == nullptr) {
      return error(errc::invalid_argument, {"recipe ", p.how.name(), " needs statistics of the weights' inputs"});
    }
    buffers.values.resize(rows.rows * rows.cols);
    for (std::size_t i = 0; i < buffers.values.size(); ++i) buffers.values[i] = to_float(rows.data[i]);
    const matrix_view<const float> values(buffers.values.data(), rows.rows, rows.cols);
    return plan_.options.inputs->feed_back(values, *p.source, task.rows.matrix, p.how, options);
  }

  Policy policy_;
  const io::checkpoint& from_;
  const io::pack_plan& plan_;
  const io::pack_options& options_;
  set_scales scales_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
