#pragma once

#include "../../detail/macros_off.hpp"

#include "../../hadamard.hpp"  // rotate
#include "../../metrics.hpp"   // error_report
#include "../../quantize.hpp"  // try_quantize, amax
#include "cast.hpp"            // cast_rows
#include "config.hpp"          // quantization_config
#include "plan.hpp"            // pack_plan
#include "shards.hpp"          // shard_writer

#include <algorithm>   // std::max, std::min, std::stable_partition
#include <atomic>      // std::atomic
#include <cstddef>     // std::size_t
#include <functional>  // std::function
#include <map>         // std::erase_if
#include <mutex>       // std::mutex
#include <optional>    // std::optional
#include <span>        // std::span
#include <string>      // std::string
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What a caller may choose about packing, besides the plan.
struct pack_options {
  special_values special = special_values::reject;
  /// Text for the metadata of the files, besides that of the source.
  safetensors_metadata metadata{};
  std::size_t shard_bytes = 5'000'000'000;
  /// Bytes of values that a thread works on at a time; a few times as many are in memory.
  std::size_t slice_bytes = 2u << 20;
  /// Bytes of values that all threads share where weights are stored [.., K, outputs].
  std::size_t window_bytes = 32u << 20;
  /// Called from any thread with bytes of the source that are done; an answer of false stops the work.
  std::function<bool(std::size_t)> progress{};
};

/// What packing made of a parameter.
struct packed_parameter {
  error_report errors{};           ///< of the rows that were looked at: one slice in `sampled_one_in`
  std::size_t bits = 0;            ///< stored for it
  std::size_t rounded_blocks = 0;  ///< of a cast: blocks that are not the same values
};

/// What packing made of a model; `parameters` are in the order of the plan.
struct pack_report {
  std::vector<packed_parameter> parameters{};
  std::size_t sampled_one_in = 1;
  std::size_t bytes_read = 0;
  std::size_t bytes_written = 0;
  std::size_t files = 0;
  std::vector<std::string> files_left{};  ///< weights in other forms that lie beside the model and were not copied
};

}  // namespace TETROMINO_NAMESPACE::io

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
struct pack_buffers {
  io::row_buffers rows;
  std::vector<std::uint8_t> codes, scales, macros, gathered;
  std::vector<float> values;
};

/// Buffers that threads take and give back, so that no more are made than work at a time.
class buffer_pool {
 public:
  [[nodiscard]] std::unique_ptr<pack_buffers> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<pack_buffers>();
    auto out = std::move(free_.back());
    free_.pop_back();
    return out;
  }
  void give(std::unique_ptr<pack_buffers> buffers) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(buffers));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<pack_buffers>> free_;
};

/// Tensor scales of the sets: the largest magnitude, or E8M0 code for casts, of each set's matrices.
class set_scales {
 public:
  explicit set_scales(const io::pack_plan& plan) : separate_(plan.options.separate_scales) {
    first_.assign(separate_ ? plan.parameters.size() : plan.sets, 0);
    for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
      const auto& planned = plan.parameters[i];
      if (planned.is_packed()) first_[key(plan, i)] = planned.source->matrices;
    }
    std::size_t total = 0;
    for (auto& first : first_) total += std::exchange(first, total);
    largest_.assign(total, 0.0f);
  }

  void add(const io::pack_plan& plan, std::size_t i, std::size_t matrix, float value) noexcept {
    const std::atomic_ref<float> largest(largest_[first_[key(plan, i)] + matrix]);
    for (float seen = largest.load(); value > seen && !largest.compare_exchange_weak(seen, value);) {
    }
  }
  [[nodiscard]] float of(const io::pack_plan& plan, std::size_t i, std::size_t matrix) const noexcept {
    return largest_[first_[key(plan, i)] + matrix];
  }

 private:
  [[nodiscard]] std::size_t key(const io::pack_plan& plan, std::size_t i) const noexcept {
    return separate_ ? i : plan.parameters[i].source->set;
  }

  bool separate_;
  std::vector<std::size_t> first_;
  std::vector<float> largest_;
};

/// Rows of a planned parameter, or bytes of a kept one.
struct pack_task {
  std::size_t parameter = 0;
  io::row_range rows{};
  bool as_stored = false;  ///< of a parameter that is stored [.., K, outputs]: its rows are those that are stored
  std::size_t offset = 0;  ///< of kept bytes
  std::size_t bytes = 0;   ///< of the source
  bool is_sampled = false;
};

/// Rows of a parameter that is stored [.., K, outputs], as they are stored: threads that each read a few rows would
/// read few bytes at a time, so they share what they read.
struct stored_window {
  io::row_range rows{};
  std::vector<std::uint8_t> strips{};
};

template <class Policy>
class packer {
 public:
  packer(const Policy& policy, const io::checkpoint& from, const io::pack_plan& plan, const io::pack_options& options,
         shard_writer& to)
      : executor_(policy.executor),
        policy_(policy.on({})),  // slices are the unit of parallel work
        from_(from),
        plan_(plan),
        options_(options),
        to_(to),
        scales_(plan),
        report_{std::vector<io::packed_parameter>(plan.parameters.size())} {}

  [[nodiscard]] result<io::pack_report> run() {
    choose_samples();
    constexpr std::size_t batch_bytes = 512u << 20;  // what is read twice should still be in the page cache
    std::vector<std::size_t> batch;
    std::size_t bytes = 0;
    for (const auto& members : sets_in_order()) {
      for (const std::size_t i : members) {
        batch.push_back(i);
        bytes += bytes_of(i);
      }
      if (bytes < batch_bytes) continue;
      if (auto done = run_batch(batch); !done) return done.error();
      batch.clear();
      bytes = 0;
    }
    if (auto done = run_batch(batch); !done) return done.error();
    return std::move(report_);
  }

 private:
  using action = io::pack_action;
  static constexpr std::size_t turned_at_once = 512u << 10;  // bytes of rows that a cache holds until they are packed

  [[nodiscard]] const io::planned_parameter& planned(std::size_t i) const noexcept { return plan_.parameters[i]; }
  [[nodiscard]] std::size_t bytes_of(std::size_t i) const noexcept {
    const io::parameter& p = *planned(i).source;
    return p.values->bytes + (p.scales == nullptr ? 0 : p.scales->bytes);
  }

  /// Small models are compared whole, others by a sample.
  void choose_samples() {
    constexpr std::size_t compared_whole = 1u << 27;
    std::size_t elements = 0;
    for (const auto& p : plan_.parameters) elements += p.is_packed() ? p.source->elements() : 0;
    report_.sampled_one_in = elements <= compared_whole ? 1 : 32;
  }

  /// Parameters by set, sets by their first member; what is kept stands alone.
  [[nodiscard]] std::vector<std::vector<std::size_t>> sets_in_order() const {
    std::vector<std::vector<std::size_t>> out;
    std::vector<std::size_t> place(plan_.sets, static_cast<std::size_t>(-1));
    for (std::size_t i = 0; i < plan_.parameters.size(); ++i) {
      std::size_t& at = place[planned(i).source->set];
      if (!planned(i).is_packed() || at == static_cast<std::size_t>(-1)) {
        if (planned(i).is_packed()) at = out.size();
        out.push_back({i});
      } else {
        out[at].push_back(i);
      }
    }
    return out;
  }

  [[nodiscard]] result<void> run_batch(const std::vector<std::size_t>& batch) {
    std::vector<pack_task> measured, all;
    for (const std::size_t i : batch) {
      add_tasks(i, all);
      if (!needs_measure(i)) continue;
      if (is_turned(i) && planned(i).how.rotation == 0) {
        add_strips(i, measured);
      } else {
        add_tasks(i, measured);
      }
    }
    auto run = run_all(measured, [this](const pack_task& t, pack_buffers& b) { return measure(t, b); });
    if (!run) return run;
    for (const std::size_t i : batch) {
      if (auto written = write_scales(i); !written) return written;
    }
    return run_all(all, [this](const pack_task& t, pack_buffers& b) { return work(t, b); });
  }

  /// Runs tasks, those that need a window after the others, window by window.
  template <class F>
  [[nodiscard]] result<void> run_all(std::vector<pack_task>& tasks, const F& f) {
    const auto windows =
        std::stable_partition(tasks.begin(), tasks.end(), [this](const pack_task& t) { return !needs_window(t); });
    if (auto run = run_tasks({tasks.begin(), windows}, f); !run) return run;
    for (auto begin = windows; begin != tasks.end();) {
      const io::parameter& p = *planned(begin->parameter).source;
      const std::size_t bytes_per_row = p.cols * bits_per_element(p.values->dtype) / 8;
      window_.rows = {begin->rows.matrix, begin->rows.first, 0};
      auto end = begin;
      do {
        window_.rows.count += end++->rows.count;
      } while (end != tasks.end() && end->parameter == begin->parameter && end->rows.matrix == begin->rows.matrix &&
               (window_.rows.count + end->rows.count) * bytes_per_row <= options_.window_bytes);
      if (auto filled = fill_window(p); !filled) return named(filled.error(), *begin);
      if (auto run = run_tasks({begin, end}, f); !run) return run;
      begin = end;
    }
    return {};
  }

  [[nodiscard]] result<void> fill_window(const io::parameter& p) {
    const std::size_t strip = window_.rows.count * bits_per_element(p.values->dtype) / 8;
    const std::size_t at_once = std::clamp<std::size_t>(options_.slice_bytes / strip, 1, p.cols);
    window_.strips.resize(p.cols * strip);
    shared_failure failure;
    executor_((p.cols + at_once - 1) / at_once, [&](std::size_t t) {
      if (failure.is_set()) return;
      const std::size_t k = t * at_once, count = std::min(at_once, p.cols - k);
      const auto to = std::span(window_.strips).subspan(k * strip, count * strip);
      if (auto read = read_strips(from_, p, window_.rows, k, count, to); !read) failure.set(read.error());
    });
    return failure.outcome();
  }

  template <class F>
  [[nodiscard]] result<void> run_tasks(std::span<const pack_task> tasks, const F& f) {
    shared_failure failure;
    executor_(tasks.size(), [&](std::size_t t) {
      if (failure.is_set()) return;
      auto buffers = pool_.take();
      if (auto done = f(tasks[t], *buffers); !done) failure.set(named(done.error(), tasks[t]));
      pool_.give(std::move(buffers));
    });
    return failure.outcome();
  }

  [[nodiscard]] error named(const error& e, const pack_task& task) const {
    const io::parameter& p = *planned(task.parameter).source;
    std::string message = e.what();
    if (message.find(p.name) == std::string::npos) message = text("tensor ", printable(p.name), ": ", message);
    const bool within = e.code() == errc::non_finite && (task.rows.matrix != 0 || task.rows.first != 0);
    if (within && p.matrices > 1)
      message += text(" (counting from row ", task.rows.first, " of matrix ", task.rows.matrix, ")");
    if (within && p.matrices == 1) message += text(" (counting from row ", task.rows.first, " of ", p.rows, ")");
    return error(e.code(), message);
  }

  void add_tasks(std::size_t i, std::vector<pack_task>& tasks) const {
    const io::parameter& p = *planned(i).source;
    std::size_t slice = std::max<std::size_t>(options_.slice_bytes, 4096);
    if (planned(i).action == action::keep) {
      for (std::size_t offset = 0; offset < p.values->bytes; offset += slice) {
        tasks.push_back({i, {}, false, offset, std::min(slice, p.values->bytes - offset)});
      }
      return;
    }
    const std::size_t bytes_per_value =
        p.encoding == io::value_encoding::plain ? bits_per_element(p.values->dtype) / 8 : 4;
    const bool whole = planned(i).action == action::pack && planned(i).how.error_feedback;
    if (is_turned(i)) slice = std::min(slice, turned_at_once);
    const std::size_t step = whole ? p.rows : std::clamp<std::size_t>(slice / (p.cols * bytes_per_value), 1, p.rows);
    std::size_t number = 0;
    for (std::size_t e = 0; e < p.matrices; ++e) {
      for (std::size_t r = 0; r < p.rows; r += step) {
        const std::size_t rows = std::min(step, p.rows - r);
        const bool is_sampled = number++ % report_.sampled_one_in == 0;
        tasks.push_back({i, {e, r, rows}, false, 0, bytes_of(i) / (p.matrices * p.rows) * rows, is_sampled});
      }
    }
  }

  /// All values in the order of the file, where their order is of no matter.
  void add_strips(std::size_t i, std::vector<pack_task>& tasks) const {
    const io::parameter& p = *planned(i).source;
    const std::size_t strip = p.rows * bits_per_element(p.values->dtype) / 8;
    const std::size_t step = std::clamp<std::size_t>(options_.slice_bytes / strip, 1, p.cols);
    for (std::size_t e = 0; e < p.matrices; ++e) {
      for (std::size_t k = 0; k < p.cols; k += step) tasks.push_back({i, {e, k, std::min(step, p.cols - k)}, true});
    }
  }

  /// Whether rows of K are to be made of columns.
  [[nodiscard]] bool is_turned(std::size_t i) const noexcept {
    const io::parameter& p = *planned(i).source;
    return planned(i).action == action::pack && p.kind.is_transposed && p.encoding == io::value_encoding::plain;
  }
  [[nodiscard]] bool needs_window(const pack_task& task) const noexcept {
    return is_turned(task.parameter) && !task.as_stored;
  }

  /// Calls f with the values of a task.
  template <class F>
  [[nodiscard]] result<void> visit(const pack_task& task, pack_buffers& buffers, const F& f) {
    const io::parameter& p = *planned(task.parameter).source;
    if (task.as_stored) {
      io::parameter stored = p;
      std::swap(stored.rows, stored.cols);
      stored.kind.is_transposed = false;
      return io::try_visit_rows(policy_, from_, stored, task.rows, buffers.rows, f);
    }
    if (!needs_window(task)) return io::try_visit_rows(policy_, from_, p, task.rows, buffers.rows, f);
    return with_plain_type(p, [&]<class T>(T) {
      const auto* const strips = reinterpret_cast<const T*>(window_.strips.data());
      const std::size_t column = task.rows.first - window_.rows.first;
      return f(turn_strips(strips + column, window_.rows.count, task.rows.count, p.cols, buffers.rows));
    });
  }

  [[nodiscard]] bool is_nvfp4(std::size_t i) const noexcept {
    return planned(i).is_packed() && planned(i).how.format.scale == scale_type::e4m3;
  }
  /// Whether tensor scales are to be found before anything is packed.
  [[nodiscard]] bool needs_measure(std::size_t i) const noexcept {
    return is_nvfp4(i) && planned(i).action != action::copy;
  }

  [[nodiscard]] result<void> measure(const pack_task& task, pack_buffers& buffers) {
    const io::parameter& p = *planned(task.parameter).source;
    if (options_.progress && !options_.progress(0)) return error(errc::io, "stopped");
    if (planned(task.parameter).action == action::cast) {
      return visit_packed(from_, p, task.rows, buffers.rows, [&](const packed_view<any_format>& rows) -> result<void> {
        scales_.add(plan_, task.parameter, task.rows.matrix, largest_scale_code(rows));
        return {};
      });
    }
    const std::size_t rotation = planned(task.parameter).how.rotation;
    return visit(task, buffers, [&](const auto& rows) -> result<void> {
      if (rotation == 0) {
        scales_.add(plan_, task.parameter, task.rows.matrix, amax(policy_, rows, options_.special));
        return {};
      }
      matrix<float> rotated(rows.rows, rows.cols);
      for (std::size_t r = 0; r < rows.rows; ++r) {
        for (std::size_t k = 0; k < rows.cols; ++k) rotated(r, k) = to_float(rows(r, k));
      }
      rotate(policy_, rotated, {rotation}, rotated.view());
      scales_.add(plan_, task.parameter, task.rows.matrix, amax(policy_, rotated, options_.special));
      return {};
    });
  }

  /// The decode scale of one matrix, as readers of the layout will have it.
  [[nodiscard]] result<float> tensor_scale(std::size_t i, std::size_t matrix) const {
    const io::parameter& p = *planned(i).source;
    float scale = 1.0f;
    if (planned(i).action == action::copy) {
      const auto all = read_floats(from_, *p.tensor_scales);
      if (!all) return all.error();
      scale = (*all)[all->size() == 1 ? 0 : matrix];
      if (p.tensor_scales_divide) scale = 1.0f / scale;
    } else {
      const float largest = scales_.of(plan_, i, matrix);
      if (largest == 0) return 1.0f;
      scale = planned(i).action == action::cast ? std::ldexp(1.0f, static_cast<int>(largest) - 127 - 8)
                                                : tensor_scale_for(largest, planned(i).how.rule);
    }
    return storable_scale(plan_.options.layout, scale);
  }

  [[nodiscard]] result<void> write_scales(std::size_t i) {
    if (!is_nvfp4(i)) return {};
    const io::parameter& p = *planned(i).source;
    for (const auto& stored : planned(i).stored) {
      for (std::size_t e = 0; e < stored.matrices; ++e) {
        const auto scale = tensor_scale(i, stored.matrix + e);
        if (!scale) return scale.error();
        const float value = stored_scale(plan_.options.layout, *scale);
        if (auto written = write_float(stored.tensor_scale.name, e, value); !written) return written;
      }
      if (stored.input_scale.name.empty()) continue;
      const auto input = input_scale(p, stored.matrix);
      if (!input) return input.error();
      const float value = stored_scale(plan_.options.layout, storable_scale(plan_.options.layout, *input));
      if (auto written = write_float(stored.input_scale.name, 0, value); !written) return written;
    }
    return {};
  }

  /// The tensor scale of the activations that a weight meets, from statistics or else as the source has it.
  [[nodiscard]] result<float> input_scale(const io::parameter& p, std::size_t matrix) const {
    if (plan_.options.inputs != nullptr) {
      if (const auto amax = plan_.options.inputs->input_amax(p, matrix))
        return *amax > 0 ? *amax / (6.0f * 448.0f) : 1.0f;
    }
    const auto all = read_floats(from_, *p.input_scale);
    if (!all) return all.error();
    const float scale = (*all)[all->size() == 1 ? 0 : matrix];
    return p.tensor_scales_divide ? 1.0f / scale : scale;
  }

  [[nodiscard]] result<void> write_float(const std::string& name, std::size_t index, float value) {
    return to_.try_write(name, index * sizeof value, {reinterpret_cast<const std::uint8_t*>(&value), sizeof value});
  }

  [[nodiscard]] result<void> work(const pack_task& task, pack_buffers& buffers) {
    auto done = planned(task.parameter).action == action::keep     ? keep(task, buffers)
                : planned(task.parameter).action == action::decode ? decode(task, buffers)
                : planned(task.parameter).action == action::pack   ? pack(task, buffers)
                                                                   : move(task, buffers);
    if (!done) return done;
    if (options_.progress && !options_.progress(task.bytes)) return error(errc::io, "stopped");
    return {};
  }

  [[nodiscard]] result<void> keep(const pack_task& task, pack_buffers& buffers) {
    const io::checkpoint_tensor& tensor = *planned(task.parameter).source->values;
    buffers.rows.bytes.resize(task.bytes);
    if (auto read = from_.try_read(tensor, task.offset, buffers.rows.bytes); !read) return read;
    return to_.try_write(tensor.name, task.offset, buffers.rows.bytes);
  }

  /// FP8 and 4-bit values as BF16, under the name that they have without quantization.
  [[nodiscard]] result<void> decode(const pack_task& task, pack_buffers& buffers) {
    const io::parameter& p = *planned(task.parameter).source;
    return io::try_visit_rows(policy_, from_, p, task.rows, buffers.rows, [&](const auto& rows) -> result<void> {
      buffers.gathered.resize(rows.rows * rows.cols * sizeof(bfloat16));
      auto* const out = reinterpret_cast<bfloat16*>(buffers.gathered.data());
      for (std::size_t i = 0; i < rows.rows * rows.cols; ++i) out[i] = bfloat16(to_float(rows.data[i]));
      const std::size_t row = task.rows.matrix * p.rows + task.rows.first;
      return to_.try_write(p.name, row * p.cols * sizeof(bfloat16), buffers.gathered);
    });
  }

  [[nodiscard]] result<void> pack(const pack_task& task, pack_buffers& buffers) {
    const auto& how = planned(task.parameter).how;
    const io::parameter& p = *planned(task.parameter).source;
    quantize_options options;
    options.special = options_.special;
    const auto scale = is_nvfp4(task.parameter) ? tensor_scale(task.parameter, task.rows.matrix) : result<float>(1.0f);
    if (!scale) return scale.error();
    if (is_nvfp4(task.parameter)) options.tensor_scales = {&*scale, 1};
    std::vector<float> weights;
    if (plan_.options.inputs != nullptr && !how.error_feedback) {
      auto known = plan_.options.inputs->column_weights(p, task.rows.matrix, how.rotation);
      if (!known) return known.error();
      weights = std::move(*known);
      options.column_weights = weights;
    }
    return visit(task, buffers, [&](const auto& rows) -> result<void> {
      packed<> fed;
      packed_view<any_format, std::uint8_t> out = storage(how.format, rows.rows, rows.cols, buffers);
      float kept_scale = *scale;
      if (is_nvfp4(task.parameter)) out.tensor_scales = {&kept_scale, 1};
      if (how.error_feedback) {
        auto done = feed_back(rows, task, options, buffers);
        if (!done) return done.error();
        fed = std::move(*done);
        out = fed.view();
      } else if (auto done = try_quantize_to(policy_, rows, how, out, options); !done) {
        return done;
      }
      if (task.is_sampled) look_at(task.parameter, rows, out, buffers);
      return write(task, out, buffers);
    });
  }

  template <class Rows>
  [[nodiscard]] result<packed<>> feed_back(const Rows& rows, const pack_task& task, const quantize_options& options,
                                           pack_buffers& buffers) const {
    const auto& p = planned(task.parameter);
    if (plan_.options.inputs == nullptr) {
      return error(errc::invalid_argument, text("recipe ", p.how.name(), " needs statistics of the weights' inputs"));
    }
    buffers.values.resize(rows.rows * rows.cols);
    for (std::size_t i = 0; i < buffers.values.size(); ++i) buffers.values[i] = to_float(rows.data[i]);
    const matrix_view<const float> values(buffers.values.data(), rows.rows, rows.cols);
    return plan_.options.inputs->feed_back(values, *p.source, task.rows.matrix, p.how, options);
  }

  static packed_view<any_format, std::uint8_t> storage(const any_format& format, std::size_t rows, std::size_t cols,
                                                       pack_buffers& buffers) {
    const packed_shape shape{format, 1, rows, cols};
    buffers.codes.resize(shape.code_bytes());
    buffers.scales.resize(shape.scale_bytes());
    buffers.macros.resize(shape.macro_bytes());
    return {format, 1, rows, cols, buffers.codes, buffers.scales, buffers.macros, {}};
  }

  /// Codes that stay, or change their scales alone.
  [[nodiscard]] result<void> move(const pack_task& task, pack_buffers& buffers) {
    const io::parameter& p = *planned(task.parameter).source;
    return visit_packed(from_, p, task.rows, buffers.rows, [&](const packed_view<any_format>& rows) -> result<void> {
      packed_view<any_format, std::uint8_t> out =
          storage(planned(task.parameter).how.format, rows.rows, rows.cols, buffers);
      if (planned(task.parameter).action == action::copy) {
        std::copy(rows.codes.begin(), rows.codes.end(), out.codes.begin());
        std::copy(rows.scales.begin(), rows.scales.end(), out.scales.begin());
      } else {
        const auto top = static_cast<std::uint8_t>(scales_.of(plan_, task.parameter, task.rows.matrix));
        if (top == 0xFF && options_.special == special_values::reject) {
          return error(errc::non_finite, "expected finite block scales, got NaN");
        }
        const std::size_t rounded = cast_rows(rows, top, out);
        const std::lock_guard lock(report_mutex_);
        report_.parameters[task.parameter].rounded_blocks += rounded;
      }
      return write(task, out, buffers);
    });
  }

  template <class Rows>
  void look_at(std::size_t i, const Rows& rows, const packed_view<any_format, std::uint8_t>& out,
               pack_buffers& buffers) {
    buffers.values.resize(rows.rows * rows.cols);
    const batch_view<float> values(buffers.values.data(), 1, rows.rows, rows.cols);
    dequantize_to(policy_, packed_view<any_format>(out), values);
    if (planned(i).how.rotation != 0) rotate_back(policy_, values, {planned(i).how.rotation}, values);
    const error_report seen = compare(rows, values);
    const std::lock_guard lock(report_mutex_);
    report_.parameters[i].errors.add(seen);
  }

  /// Writes packed rows to the tensors that the layout has for them.
  [[nodiscard]] result<void> write(const pack_task& task, const packed_view<any_format, std::uint8_t>& rows,
                                   pack_buffers& buffers) {
    const packed_shape shape = rows.shape();
    for (const auto& stored : planned(task.parameter).stored) {
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

  executor_ref executor_;
  Policy policy_;
  const io::checkpoint& from_;
  const io::pack_plan& plan_;
  const io::pack_options& options_;
  shard_writer& to_;
  set_scales scales_;
  stored_window window_;
  buffer_pool pool_;
  std::mutex report_mutex_;
  io::pack_report report_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The metadata of one file: that of the source, what was asked for, and for the linear layout, whose shapes do not say
/// it, the shape [matrices, rows, K] and the recipe of each packed weight in it.
class file_metadata {
 public:
  file_metadata(const io::checkpoint& from, const io::pack_plan& plan, const io::pack_options& options)
      : common_(from.metadata()) {
    std::erase_if(common_, [](const auto& entry) {  // what the source was packed with, if it was
      return entry.first.starts_with("tetromino.") || entry.first == "quantization_config";
    });
    common_["format"] = "pt";
    common_["tetromino.layout"] = std::string(io::name(plan.options.layout));
    const auto& rules = plan.options.rules;
    if (rules.size() == 1 && rules.front().pattern.empty()) {
      common_["tetromino.recipe"] = rules.front().how.name();
    } else {
      ordered_json all = ordered_json::array();
      for (const auto& rule : rules) all.push_back({{"weights", rule.pattern}, {"recipe", rule.how.name()}});
      common_["tetromino.recipes"] = all.dump();
    }
    if (options.special == special_values::poison) common_["tetromino.special"] = "poison";
    if (options.special == special_values::saturate) common_["tetromino.special"] = "saturate";
    for (const auto& [key, value] : options.metadata) common_[key] = value;
    if (const auto config = quantization_config(plan); !config.is_null() && from.is_single_file()) {
      common_["quantization_config"] = config.dump();
    }
    if (plan.options.layout != io::checkpoint_layout::linear) return;
    for (const auto& planned : plan.parameters) {
      if (!planned.is_packed()) continue;
      shapes_[planned.stored.front().codes.name] = {
          planned.source->name,
          {{"shape", planned.source->shape.size() == 3
                         ? ordered_json{planned.source->matrices, planned.source->rows, planned.source->cols}
                         : ordered_json{planned.source->rows, planned.source->cols}},
           {"recipe", planned.how.name()}}};
    }
  }

  [[nodiscard]] io::safetensors_metadata of(std::span<const shard_writer::declared> tensors) const {
    io::safetensors_metadata out = common_;
    if (shapes_.empty()) return out;
    ordered_json weights = ordered_json::object();
    for (const auto& one : tensors) {
      if (const auto found = shapes_.find(one.tensor.name); found != shapes_.end()) {
        weights[found->second.first] = found->second.second;
      }
    }
    out["tetromino.weights"] = weights.dump();
    return out;
  }

 private:
  io::safetensors_metadata common_;
  std::unordered_map<std::string, std::pair<std::string, ordered_json>> shapes_;  // by the tensor of the codes
};

/// All tensors that will be written, in the order of the source.
inline std::vector<shard_writer::declared> declared_tensors(const io::pack_plan& plan) {
  std::vector<shard_writer::declared> out;
  std::size_t group = 0;
  for (const auto& planned : plan.parameters) {
    const io::parameter& p = *planned.source;
    if (planned.action == io::pack_action::keep) {
      out.push_back({{p.name, p.values->dtype, p.values->shape}, group++});
    } else if (planned.action == io::pack_action::decode) {
      out.push_back({{p.name, io::dtype::BF16, p.shape}, group++});
    }
    for (const auto& stored : planned.stored) {
      for (const auto* part : stored.parts()) out.push_back({*part, group});
      ++group;
    }
  }
  return out;
}

/// config.json with what readers of the layout need, and what else belongs beside the weights.
inline result<std::vector<std::string>> write_beside(const io::checkpoint& from, const io::pack_plan& plan,
                                                     const std::filesystem::path& folder) {
  std::vector<std::string> left;
  if (!from.is_single_file()) {
    auto copied = copy_other_files(from.folder(), folder, from);
    if (!copied) return copied;
    left = std::move(*copied);
  }
  ordered_json config = ordered_json::object();
  const auto path = from.folder() / "config.json";
  if (!from.config().is_null()) {
    auto again = read_json<ordered_json>(path);  // for the order of its keys
    if (!again) return again.error();
    config = std::move(**again);
    if (!config.is_object()) return error(errc::malformed_file, path.string() + ": expected a JSON object");
  }
  config.erase("quantization_config");
  config.erase("compression_config");
  if (auto quantization = quantization_config(plan); !quantization.is_null()) {
    config["quantization_config"] = std::move(quantization);
  }
  if (auto written = write_text(folder / "config.json", config.dump(2) + "\n"); !written) return written.error();
  if (plan.options.layout == io::checkpoint_layout::modelopt) {
    auto written = write_text(folder / "hf_quant_config.json", modelopt_file(plan).dump(2) + "\n");
    if (!written) return written.error();
  }
  return left;
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

/// Packs a model as planned. `to` becomes a directory that readers of the layout open, with config.json and the other
/// files of the model; or a single file, if its name ends with .safetensors. Work is split over the policy's executor;
/// each thread has a few slices in memory, whatever the size of the model. Nothing has its final name before all of it
/// is whole. Errors: those of the tensors' values and files, with their names; io, if `to` exists and is no empty
/// directory, leads to a file of the source, or cannot be written, or if progress says to stop.
template <class Policy>
[[nodiscard]] result<pack_report> try_pack(const Policy& policy, const checkpoint& from, const pack_plan& plan,
                                           const std::filesystem::path& to, const pack_options& options = {}) {
  const detail::default_float_state usual;
  const bool is_file = to.extension() == ".safetensors";
  for (std::size_t i = 0; i < from.file_count(); ++i) {
    if (detail::identity_of(to) != from.identity(i)) continue;
    return error(errc::invalid_argument,
                 detail::text(to.string(), ": expected another file than the one being read, ", from.file(i).string()));
  }
  if (!from.is_single_file() && detail::is_within(to, from.folder())) {
    return error(errc::invalid_argument,
                 detail::text(to.string(), ": expected a place outside of the model being read"));
  }
  std::optional<detail::pending_directory> folder;
  if (!is_file) {
    auto created = detail::pending_directory::try_create(to);
    if (!created) return created.error();
    folder.emplace(std::move(*created));
  }
  const detail::file_metadata metadata(from, plan, options);
  auto writer =
      detail::shard_writer::try_create(is_file ? to : folder->temporary(), is_file, detail::declared_tensors(plan),
                                       options.shard_bytes, [&](const auto& tensors) { return metadata.of(tensors); });
  if (!writer) return writer.error();
  auto report = detail::packer(policy, from, plan, options, *writer).run();
  if (!report) return report;
  if (auto same = from.try_unchanged(); !same) return same.error();
  if (auto done = writer->try_finish(); !done) return done.error();
  report->bytes_written = writer->total_bytes();
  report->files = writer->shard_count();
  for (const auto& tensor : from.tensors()) report->bytes_read += tensor.bytes;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const auto& planned = plan.parameters[i];
    std::size_t bits = planned.is_packed() ? 0 : 8 * planned.source->values->bytes;
    if (planned.action == pack_action::decode) bits = 16 * planned.source->elements();
    for (const auto& stored : planned.stored) {
      for (const auto* part : stored.parts()) bits += 8 * detail::tensor_bytes(part->dtype, part->shape).value();
    }
    report->parameters[i].bits = bits;
  }
  if (folder) {
    auto left = detail::write_beside(from, plan, folder->temporary());
    if (!left) return left.error();
    report->files_left = std::move(*left);
    if (auto done = folder->try_commit(); !done) return done.error();
  }
  return report;
}

/// try_pack, throwing its error.
template <class Policy>
pack_report pack(const Policy& policy, const checkpoint& from, const pack_plan& plan, const std::filesystem::path& to,
                 const pack_options& options = {}) {
  return try_pack(policy, from, plan, to, options).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
