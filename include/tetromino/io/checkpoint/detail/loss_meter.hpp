#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../dequantize.hpp"  // dequantize_to
#include "../../../hadamard.hpp"    // rotate_back
#include "../../../detail/row.hpp"  // is_finite
#include "../options.hpp"           // pack_options
#include "slice_quantizer.hpp"      // slice_quantizer
#include "slice_runner.hpp"         // slice_runner
#include "tasks.hpp"                // pack_schedule

#include <cstddef>  // std::size_t
#include <utility>  // std::move
#include <vector>   // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Squares of what is packed, and of what packing errs: of products with the inputs that statistics describe, or
/// without statistics of the weights.
struct packed_squares {
  double signal = 0, noise = 0;
};

/// Measures what a plan loses of its weights, without writing anything.
template <class Policy>
class loss_meter {
 public:
  loss_meter(const Policy& policy, const io::checkpoint& from, const io::pack_plan& plan,
             const io::pack_options& options)
      : plan_(plan),
        schedule_(plan, options),
        runner_(policy.executor, from, plan, schedule_, options),
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
    const auto& planned = plan_.parameters[task.parameter];
    const io::parameter& p = *planned.source;
    buffers.values.resize(rows.rows * rows.cols);
    const batch_view<float> values(buffers.values.data(), 1, rows.rows, rows.cols);
    dequantize_to(slices_.policy(), packed_view<any_format>(out), values);
    if (planned.how.rotation != 0) rotate_back(slices_.policy(), values, {planned.how.rotation}, values);
    if (!has_inputs()) {
      add_rows(rows, values, rows_[task.parameter].data() + task.rows.matrix * p.rows + task.rows.first);
      return {};
    }
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

  /// What is not finite is lost by every recipe.
  static float finite(float x) noexcept { return is_finite(x) ? x : 0.0f; }

  /// Row by row, so that sums do not depend on how rows are cut into slices.
  template <class Rows>
  static void add_rows(const Rows& rows, const batch_view<float>& decoded, packed_squares* to) {
    for (std::size_t r = 0; r < rows.rows; ++r) {
      for (std::size_t k = 0; k < rows.cols; ++k) {
        const float x = to_float(rows(r, k));
        const auto value = static_cast<double>(finite(x)),
                   e = static_cast<double>(finite(x - decoded.data[r * rows.cols + k]));
        to[r].signal += value * value;
        to[r].noise += e * e;
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
