#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../dequantize.hpp"  // dequantize_to
#include "../../../hadamard.hpp"    // rotate_back
#include "../../../detail/row.hpp"  // is_finite
#include "../options.hpp"           // pack_options
#include "slice_quantizer.hpp"      // slice_quantizer
#include "slice_runner.hpp"         // slice_runner
#include "tasks.hpp"                // pack_schedule

#include <algorithm>  // std::clamp, std::min
#include <cstddef>    // std::size_t
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Squares of what is packed, and of what packing errs: of products with the inputs that statistics describe, or
/// without statistics of the weights.
struct packed_squares {
  double signal = 0, noise = 0;
};

/// Rows [first, first + count) of one matrix.
inline packed_view<any_format> some_rows(const packed_view<any_format>& p, std::size_t first, std::size_t count) {
  const packed_shape before{p.format, 1, first, p.cols}, some{p.format, 1, count, p.cols};
  return {p.format,
          1,
          count,
          p.cols,
          p.codes.subspan(before.code_bytes(), some.code_bytes()),
          p.scales.subspan(before.scale_bytes(), some.scale_bytes()),
          p.macros.subspan(before.macro_bytes(), some.macro_bytes()),
          p.tensor_scales};
}

/// Measures what a plan loses of its weights, without writing anything.
template <class Policy>
class loss_meter {
 public:
  /// `memory` may serve other meters too, one at a time.
  loss_meter(const Policy& policy, const io::checkpoint& from, const io::pack_plan& plan,
             const io::pack_options& options, slice_memory& memory)
      : plan_(plan),
        schedule_(plan, options),
        runner_(policy.executor, from, plan, schedule_, options, memory),
        slices_(policy, from, plan, options),
        batches_(schedule_.batches()) {}

  [[nodiscard]] std::size_t batches() const noexcept { return batches_.size(); }

  /// Measures the parameters of a batch that `wanted` names and that are packed: squares [parameters]. A signal that is
  /// known already stays, since it is the same for all plans of a model; where codes stay there is no noise.
  [[nodiscard]] result<void> run(std::size_t batch, const std::vector<bool>& wanted, std::vector<double>& signal_of,
                                 std::vector<double>& noise_of) {
    signals_ = signal_of;
    std::vector<pack_task> measured, all;
    rows_.assign(plan_.parameters.size(), {});
    for (const std::size_t i : batches_[batch]) {
      const auto& planned = plan_.parameters[i];
      if (!wanted[i] || planned.action != io::pack_action::pack) continue;
      const io::parameter& p = *planned.source;
      schedule_.add_tasks(i, all, has_inputs());
      rows_[i].resize(p.matrices * (has_inputs() ? 1 : p.rows));
      if (slices_.scales().needs_measure(i)) schedule_.add_measuring_tasks(i, measured);
    }
    auto run = runner_.run_all(measured, [this](const pack_task& t, const stored_window* window, slice_buffers& b) {
      return slices_.measure(t, window, b);
    });
    if (!run) return run;
    run = runner_.run_all(all, [this](const pack_task& t, const stored_window* window, slice_buffers& b) {
      return slices_.pack(t, window, b, [&](const auto& rows, const auto& out) { return look_at(t, rows, out, b); });
    });
    if (!run) return run;
    for (const std::size_t i : batches_[batch]) {
      packed_squares whole;
      for (const packed_squares& row : rows_[i]) {
        whole.signal += row.signal;
        whole.noise += row.noise;
      }
      if (!rows_[i].empty() && signal_of[i] == 0) signal_of[i] = whole.signal;
      noise_of[i] += whole.noise;
    }
    return {};
  }

 private:
  [[nodiscard]] bool has_inputs() const noexcept { return plan_.options.inputs != nullptr; }

  template <class Rows>
  [[nodiscard]] result<void> look_at(const pack_task& task, const Rows& rows,
                                     const packed_view<any_format, std::uint8_t>& out, slice_buffers& buffers) {
    const io::parameter& p = *plan_.parameters[task.parameter].source;
    if (!has_inputs()) {
      constexpr std::size_t decoded_at_once = 1u << 14;  // so that threads need little memory beside their slices
      const std::size_t step = std::clamp<std::size_t>(decoded_at_once / rows.cols, 1, rows.rows);
      packed_squares* const to = rows_[task.parameter].data() + task.rows.matrix * p.rows + task.rows.first;
      for (std::size_t r = 0; r < rows.rows; r += step) {
        const std::size_t count = std::min(step, rows.rows - r);
        add_rows(rows, r, decode(task, some_rows(out, r, count), buffers), to);
      }
      return {};
    }
    decode(task, out, buffers);
    const auto squares_of = [&](const auto& value_at) -> result<double> {
      for (std::size_t i = 0; i < buffers.values.size(); ++i) buffers.values[i] = finite(value_at(i));
      return plan_.options.inputs->squared_products(
          matrix_view<const float>(buffers.values.data(), rows.rows, rows.cols), p, task.rows.matrix);
    };
    const auto noise = squares_of([&](std::size_t i) { return to_float(rows.data[i]) - buffers.values[i]; });
    if (!noise) return noise.error();
    packed_squares& whole = rows_[task.parameter][task.rows.matrix];
    whole.noise = *noise;
    if (signals_[task.parameter] > 0) return {};
    const auto signal = squares_of([&](std::size_t i) { return to_float(rows.data[i]); });
    if (!signal) return signal.error();
    whole.signal = *signal;
    return {};
  }

  /// Values as readers of packed rows have them, in buffers.values.
  batch_view<float> decode(const pack_task& task, const packed_view<any_format>& from, slice_buffers& buffers) const {
    buffers.values.resize(from.rows * from.cols);
    const batch_view<float> values(buffers.values.data(), 1, from.rows, from.cols);
    dequantize_to(slices_.policy(), from, values);
    const std::size_t rotation = plan_.parameters[task.parameter].how.rotation;
    if (rotation != 0) rotate_back(slices_.policy(), values, {rotation}, values);
    return values;
  }

  /// What is not finite is lost by every recipe.
  static float finite(float x) noexcept { return is_finite(x) ? x : 0.0f; }

  /// Row by row, so that sums do not depend on how rows are cut into slices.
  template <class Rows>
  static void add_rows(const Rows& rows, std::size_t first, const batch_view<float>& decoded, packed_squares* to) {
    for (std::size_t r = 0; r < decoded.rows; ++r) {
      packed_squares& sums = to[first + r];
      for (std::size_t k = 0; k < rows.cols; ++k) {
        const float x = to_float(rows(first + r, k));
        const auto value = static_cast<double>(finite(x)),
                   e = static_cast<double>(finite(x - decoded.data[r * rows.cols + k]));
        sums.signal += value * value;
        sums.noise += e * e;
      }
    }
  }

  const io::pack_plan& plan_;
  pack_schedule schedule_;
  slice_runner runner_;
  slice_quantizer<Policy> slices_;
  std::vector<std::vector<std::size_t>> batches_;
  std::vector<double> signals_;  // [parameters], as before the batch
  // of the batch: [parameters][matrices x rows], or with statistics [parameters][matrices]
  std::vector<std::vector<packed_squares>> rows_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
