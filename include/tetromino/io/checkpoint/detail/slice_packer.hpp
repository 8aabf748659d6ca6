#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../hadamard.hpp"  // rotate_back
#include "../../../metrics.hpp"   // compare
#include "../options.hpp"         // pack_options
#include "../../detail/cast.hpp"  // cast_rows, settle_nan_blocks
#include "shards.hpp"             // shard_writer
#include "slice_quantizer.hpp"    // slice_quantizer
#include "tasks.hpp"              // pack_task
#include "window.hpp"             // stored_window

#include <algorithm>  // std::copy_n
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <mutex>      // std::mutex
#include <span>       // std::span
#include <string>     // std::string
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Reads a slice, makes of it what the plan says, and writes that to the tensors of the layout. From any thread.
template <class Policy>
class slice_packer {
 public:
  slice_packer(const Policy& policy, const io::checkpoint& from, const io::pack_plan& plan,
               const io::pack_options& options, shard_writer& to)
      : from_(from),
        plan_(plan),
        options_(options),
        to_(to),
        slices_(policy, from, plan, options),
        parameters_(plan.parameters.size()) {}

  [[nodiscard]] const set_scales& scales() const noexcept { return slices_.scales(); }
  [[nodiscard]] std::vector<io::packed_parameter> take_report() { return std::move(parameters_); }

  /// Looks for the largest magnitude in a slice. `window` holds its rows where they are to be turned, or is null.
  [[nodiscard]] result<void> measure(const pack_task& task, const stored_window* window, slice_buffers& buffers) {
    return slices_.measure(task, window, buffers);
  }

  /// Writes the scales of a parameter that stand once for each matrix.
  [[nodiscard]] result<void> write_scales(std::size_t i) {
    if (!scales().has(i)) return {};
    const auto layout = plan_.options.layout;
    for (const auto& stored : plan_.parameters[i].stored) {
      for (std::size_t e = 0; e < stored.matrices; ++e) {
        const auto scale = scales().try_scale(i, stored.matrix + e);
        if (!scale) return scale.error();
        if (auto done = write_float(stored.tensor_scale.name, e, stored_scale(layout, *scale)); !done) return done;
      }
      if (stored.input_scale.name.empty()) continue;
      const auto input = scales().try_input_scale(i, stored.matrix);
      if (!input) return input.error();
      if (auto done = write_float(stored.input_scale.name, 0, stored_scale(layout, *input)); !done) return done;
    }
    return {};
  }

  /// Does all of the work on a slice. `window` as for measure.
  [[nodiscard]] result<void> work(const pack_task& task, const stored_window* window, slice_buffers& buffers) {
    auto done = planned(task).action == action::keep     ? keep(task, buffers)
                : planned(task).action == action::decode ? decode(task, buffers)
                : planned(task).action == action::pack   ? pack(task, window, buffers)
                                                         : move(task, buffers);
    if (!done) return done;
    if (options_.progress && !options_.progress(task.bytes)) return error(errc::io, "stopped");
    return {};
  }

 private:
  using action = io::pack_action;

  [[nodiscard]] const io::planned_parameter& planned(const pack_task& task) const noexcept {
    return plan_.parameters[task.parameter];
  }

  [[nodiscard]] result<void> write_float(const std::string& name, std::size_t index, float value) {
    return to_.try_write(name, index * sizeof value, {reinterpret_cast<const std::uint8_t*>(&value), sizeof value});
  }

  [[nodiscard]] result<void> keep(const pack_task& task, slice_buffers& buffers) {
    const io::checkpoint_tensor& tensor = *planned(task).source->values;
    buffers.rows.bytes.resize(task.bytes);
    if (auto read = from_.try_read(tensor, task.offset, buffers.rows.bytes); !read) return read;
    return to_.try_write(tensor.name, task.offset, buffers.rows.bytes);
  }

  /// FP8 and 4-bit values as BF16, under the name that they have without quantization.
  [[nodiscard]] result<void> decode(const pack_task& task, slice_buffers& buffers) {
    const io::parameter& p = *planned(task).source;
    return io::try_visit_rows(slices_.policy(), from_, p, task.rows, buffers.rows,
                              [&](const auto& rows) -> result<void> {
                                buffers.gathered.resize(rows.rows * rows.cols * sizeof(bfloat16));
                                auto* const out = reinterpret_cast<bfloat16*>(buffers.gathered.data());
                                for (std::size_t i = 0; i < rows.rows * rows.cols; ++i)
                                  out[i] = bfloat16(to_float(rows.data[i]));
                                const std::size_t row = task.rows.matrix * p.rows + task.rows.first;
                                return to_.try_write(p.name, row * p.cols * sizeof(bfloat16), buffers.gathered);
                              });
  }

  [[nodiscard]] result<void> pack(const pack_task& task, const stored_window* window, slice_buffers& buffers) {
    return slices_.pack(task, window, buffers, [&](const auto& rows, const auto& out) {
      if (task.is_sampled) look_at(task, rows, out, buffers);
      return write(task, out, buffers);
    });
  }

  /// Codes that stay, or change their scales alone.
  [[nodiscard]] result<void> move(const pack_task& task, slice_buffers& buffers) {
    const io::parameter& p = *planned(task).source;
    return visit_packed(from_, p, task.rows, buffers.rows, [&](const packed_view<any_format>& rows) -> result<void> {
      packed_view<any_format, std::uint8_t> out = storage_for(planned(task).how.format, rows.rows, rows.cols, buffers);
      if (planned(task).action == action::copy) {
        std::copy(rows.codes.begin(), rows.codes.end(), out.codes.begin());
        std::copy(rows.scales.begin(), rows.scales.end(), out.scales.begin());
      } else {
        const auto top = static_cast<std::uint8_t>(scales().largest_of(task.parameter, task.rows.matrix));
        const std::size_t rounded = cast_rows(rows, top, out);
        const std::lock_guard lock(mutex_);
        parameters_[task.parameter].rounded_blocks += rounded;
      }
      if (const std::size_t bad = settle_nan_blocks(out, options_.special); bad != out.scales.size()) {
        const std::size_t per_row = out.shape().blocks_per_row();
        return error(errc::non_finite, {"expected finite block scales, got NaN at ",
                                        p.matrices > 1 ? text("matrix ", task.rows.matrix, ", ") : "", "row ",
                                        task.rows.first + bad / per_row, ", block ", bad % per_row});
      }
      return write(task, out, buffers);
    });
  }

  template <class Rows>
  void look_at(const pack_task& task, const Rows& rows, const packed_view<any_format, std::uint8_t>& out,
               slice_buffers& buffers) {
    buffers.values.resize(rows.rows * rows.cols);
    const batch_view<float> values(buffers.values.data(), 1, rows.rows, rows.cols);
    dequantize_to(slices_.policy(), packed_view<any_format>(out), values);
    if (planned(task).how.rotation != 0) rotate_back(slices_.policy(), values, {planned(task).how.rotation}, values);
    const error_report seen = compare(rows, values);
    const std::lock_guard lock(mutex_);
    parameters_[task.parameter].errors.add(seen);
  }

  /// Writes packed rows to the tensors that the layout has for them.
  [[nodiscard]] result<void> write(const pack_task& task, const packed_view<any_format, std::uint8_t>& rows,
                                   slice_buffers& buffers) {
    const packed_shape shape = rows.shape();
    for (const auto& stored : planned(task).stored) {
      const rows_of_stored part_of = rows_within(stored, task.rows);
      if (part_of.count == 0) continue;
      const auto put = [&](const io::tensor_declaration& part, std::span<const std::uint8_t> bytes,
                           std::size_t per_row) -> result<void> {
        if (part.name.empty()) return {};
        bytes = bytes.subspan((part_of.first - task.rows.first) * per_row);
        if (stored.row_step > 1) {
          buffers.gathered.resize(part_of.count * per_row);
          for (std::size_t r = 0; r < part_of.count; ++r) {
            std::copy_n(bytes.data() + r * stored.row_step * per_row, per_row, buffers.gathered.data() + r * per_row);
          }
          bytes = buffers.gathered;
        }
        return to_.try_write(part.name, part_of.at * per_row, bytes.first(part_of.count * per_row));
      };
      if (auto done = put(stored.codes, rows.codes, shape.code_bytes_per_row()); !done) return done;
      if (auto done = put(stored.scales, rows.scales, shape.blocks_per_row()); !done) return done;
      if (auto done = put(stored.macros, rows.macros, shape.macros_per_row()); !done) return done;
    }
    return {};
  }

  const io::checkpoint& from_;
  const io::pack_plan& plan_;
  const io::pack_options& options_;
  shard_writer& to_;
  slice_quantizer<Policy> slices_;
  std::mutex mutex_;
  std::vector<io::packed_parameter> parameters_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
