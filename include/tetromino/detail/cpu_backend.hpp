#pragma once

#include "../execution.hpp"  // executor_ref
#include "../options.hpp"    // jobs
#include "row.hpp"           // row_rules

#include <algorithm>  // std::min, std::max
#include <atomic>     // std::atomic
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <limits>     // std::numeric_limits
#include <vector>     // std::vector

namespace tetromino::detail {

/// Rows of a batch, counted through all its matrices, in pieces that are worth a task.
template <class F>
void for_each_row(executor_ref executor, std::size_t rows, std::size_t cols, const F& f) {
  constexpr std::size_t elements_per_task = 1 << 16;
  const std::size_t piece =
      std::max<std::size_t>(1, executor.is_parallel() ? elements_per_task / std::max<std::size_t>(1, cols) : rows);
  const auto task = [&](std::size_t i) {
    const std::size_t last = std::min(rows, (i + 1) * piece);
    for (std::size_t row = i * piece; row < last; ++row) f(row);
  };
  executor((rows + piece - 1) / piece, task);
}

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

/// The error for the first element, in reading order, that special_values::reject refuses.
template <real T>
error rejection(const batch_view<const T>& in, std::size_t position) {
  const std::size_t col = position % in.cols, row = position / in.cols % in.rows, e = position / in.cols / in.rows;
  const float value = to_float(in.row(e, row)[col]);
  const char* what = value != value ? "NaN" : value > 0 ? "+infinity" : "-infinity";
  return error(errc::non_finite,
               text("expected finite values, got ", what, " at ", in.matrices > 1 ? text("matrix ", e, ", ") : "",
                    "row ", row, ", column ", col, "; special_values::poison or saturate would accept it"));
}

/// The largest magnitude of the whole batch (one entry) or of each matrix; values that are not finite count as the
/// special-value policy says.
template <class Kernels, real T>
void amax_cpu(executor_ref executor, const batch_view<const T>& in, special_values special, std::span<float> out) {
  // Magnitudes compare as their bits do, so integers do for an atomic maximum.
  std::vector<std::atomic<std::uint32_t>> largest(out.size());
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    const std::size_t e = row / in.rows;
    const std::uint32_t bits = bit_cast<std::uint32_t>(Kernels::amax(in.row(e, row % in.rows), in.cols, special));
    auto& slot = largest[out.size() == 1 ? 0 : e];
    std::uint32_t seen = slot.load(std::memory_order_relaxed);
    while (bits > seen && !slot.compare_exchange_weak(seen, bits)) {
    }
  });
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = bit_cast<float>(largest[i].load());
}

/// The tensor scales of NVFP4: those given, or from the largest magnitudes.
template <class Kernels, real T>
void set_tensor_scales(executor_ref executor, const batch_view<const T>& in, const quantize_options& options,
                       std::span<float> scales) {
  if (scales.empty()) return;
  if (options.tensor_scales.empty()) {
    amax_cpu<Kernels>(executor, in, options.special, scales);
    for (float& scale : scales) scale = tensor_scale_for(scale, *options.rule);
  } else {
    for (std::size_t i = 0; i < scales.size(); ++i) {
      scales[i] = options.tensor_scales[options.tensor_scales.size() == 1 ? 0 : i];
    }
  }
}

inline row_rules rules_of(const any_format& format, const quantize_options& options) {
  return {format, *options.rule, options.macro, options.rounding, options.special, options.seed};
}

/// Row `row` of all rows of a batch, as input to a row kernel.
template <real T>
input_row<T> input_of(const batch_view<const T>& in, const quantize_options& options, std::size_t row) {
  const std::size_t e = row / in.rows;
  const float* weights = options.column_weights.empty() ? nullptr : options.column_weights.data();
  if (options.column_weights.size() > in.cols) weights += e * in.cols;
  return {in.row(e, row % in.rows), in.cols, weights, options.first_index + row * in.cols};
}

template <class Byte>
packed_row<Byte> packed_row_of(const packed_view<any_format, Byte>& packed, std::size_t row) {
  const std::size_t e = row / packed.rows, r = row % packed.rows;
  return {packed.row_codes(e, r), packed.row_scales(e, r), packed.row_macros(e, r), packed.tensor_scale(e)};
}

/// Packs a job on the CPU with the row kernels of one backend.
template <class Kernels, real T>
result<void> quantize_cpu(executor_ref executor, const quantize_job<T>& job) {
  const auto& in = job.in;
  set_tensor_scales<Kernels>(executor, in, job.options, job.out.tensor_scales);
  const row_rules rules = rules_of(job.out.format, job.options);
  shared_minimum rejected;
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    const std::size_t column =
        Kernels::quantize_row(rules, input_of(in, job.options, row), packed_row_of(job.out, row));
    if (column < in.cols) rejected.offer(row * in.cols + column);
  });
  if (rejected.value() != shared_minimum::none) return rejection(in, rejected.value());
  return {};
}

/// Unpacks a job on the CPU with the row kernels of one backend.
template <class Kernels, real T>
result<void> dequantize_cpu(executor_ref executor, const dequantize_job<T>& job) {
  for_each_row(executor, job.out.matrices * job.out.rows, job.out.cols, [&](std::size_t row) {
    Kernels::dequantize_row(job.in.format, packed_row_of(job.in, row), job.out.cols,
                            job.out.row(row / job.out.rows, row % job.out.rows));
  });
  return {};
}

/// Packs and unpacks on the CPU a piece of a row at a time, so that the packed bytes never leave the cache.
template <class Kernels, real T>
result<void> fake_quantize_cpu(executor_ref executor, const fake_quantize_job<T>& job) {
  constexpr std::size_t piece = 2048;  // a multiple of every macro block
  const auto& in = job.in;
  std::vector<float> tensor_scales;
  if (job.format.scale == scale_type::e4m3) {
    tensor_scales.resize(
        job.options.scope == tensor_scale_scope::batch && job.options.tensor_scales.size() <= 1 ? 1 : in.matrices);
  }
  set_tensor_scales<Kernels>(executor, in, job.options, tensor_scales);
  const row_rules rules = rules_of(job.format, job.options);
  shared_minimum rejected;
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    const std::size_t e = row / in.rows;
    const input_row<T> whole = input_of(in, job.options, row);
    T* out = job.out.row(e, row % in.rows);
    const float tensor_scale = tensor_scales.empty() ? 1.0f : tensor_scales[tensor_scales.size() == 1 ? 0 : e];
    std::uint8_t codes[piece / 2], scales[piece / 16], macros[piece / 32];
    for (std::size_t k = 0; k < in.cols; k += piece) {
      const input_row<T> part{whole.data + k, std::min(piece, in.cols - k),
                              whole.weights == nullptr ? nullptr : whole.weights + k, whole.first_index + k};
      const std::size_t column =
          Kernels::quantize_row(rules, part, packed_row<std::uint8_t>{codes, scales, macros, tensor_scale});
      if (column < part.cols) return rejected.offer(row * in.cols + k + column);
      Kernels::dequantize_row(job.format, packed_row<const std::uint8_t>{codes, scales, macros, tensor_scale},
                              part.cols, out + k);
    }
  });
  if (rejected.value() != shared_minimum::none) return rejection(in, rejected.value());
  return {};
}

}  // namespace tetromino::detail
