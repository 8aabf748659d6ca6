#pragma once

#include "../execution.hpp"  // executor_ref
#include "../hadamard.hpp"   // row_rotation
#include "../options.hpp"    // jobs
#include "float_state.hpp"   // default_float_state
#include "for_each_row.hpp"  // for_each_row, shared_minimum
#include "rejection.hpp"     // rejection_of
#include "row.hpp"           // row_rules, admit

#include <algorithm>  // std::min, std::max, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The error for the first element, in reading order, that special_values::reject refuses.
template <real T>
TETROMINO_COLD error rejection(const batch_view<const T>& in, std::size_t position) {
  const std::size_t col = position % in.cols, row = position / in.cols % in.rows, e = position / in.cols / in.rows;
  return rejection_of(to_float(in.row(e, row)[col]), in.matrices, e, row, col);
}

template <real T>
bool has_infinity(const T* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    if (is_infinite(to_float(x[i]))) return true;
  }
  return false;
}

constexpr std::size_t piece_of_row = 2048;  // a multiple of every macro block and rotation

/// Packs rows with the kernels of one backend, after the rotation that the options may ask for.
template <class Kernels, real T>
class row_packer {
 public:
  row_packer(const any_format& format, const quantize_options& options, std::size_t cols, const Kernels& kernels)
      : kernels_(kernels), rules_{format,          *options.rule,       options.macro, options.rounding,
                                  options.special, options.tiny_blocks, options.seed} {
    if (options.rotation) rotation_ = row_rotation(*options.rotation, cols);
  }

  /// Packs one row, or a piece of it that starts at column `first`, a multiple of piece_of_row; returns the column in
  /// it of the first value that the policy rejects, or `in.cols`.
  std::size_t pack(const input_row<T>& in, std::size_t first, const packed_row<std::uint8_t>& out) const {
    if (!rotation_) return kernels_.quantize_row(rules_, in, out);
    for (std::size_t k = 0; k < in.cols; k += piece_of_row) {
      float rotated[piece_of_row];
      const std::size_t n = std::min(piece_of_row, in.cols - k);
      const std::size_t rejected = rotate(in.data + k, first + k, n, rotated);
      if (rejected < n) return k + rejected;
      const input_row<float> part{rotated, n, in.weights == nullptr ? nullptr : in.weights + k, in.first_index + k};
      const std::size_t macro = rules_.format.macro_block;
      const std::size_t overflowed = kernels_.quantize_row(
          rules_, part,
          packed_row<std::uint8_t>{out.codes + k / 2, out.scales + k / rules_.format.block,
                                   macro == 0 ? out.macros : out.macros + k / macro, out.tensor_scale});
      if (overflowed < n) return k + overflowed;
    }
    return in.cols;
  }

  /// The largest magnitude of a row x[cols] once it is rotated.
  [[nodiscard]] float amax(const T* x, std::size_t cols) const {
    if (!rotation_) return kernels_.amax(x, cols, rules_.special);
    float largest = 0;
    for (std::size_t k = 0; k < cols; k += piece_of_row) {
      float rotated[piece_of_row];
      const std::size_t n = std::min(piece_of_row, cols - k);
      rotate(x + k, k, n, rotated);
      if (rules_.special == special_values::saturate) leave_out_infinities(x + k, k, n, rotated);
      largest = std::max(largest, kernels_.amax(rotated, n, rules_.special));
    }
    return largest;
  }

  /// Takes a piece of an unpacked row back to the columns that it came from.
  template <class Out>
  void restore(const packed_row<const std::uint8_t>& in, std::size_t first, std::size_t n, Out* out) const {
    if (!rotation_) return kernels_.dequantize_row(rules_.format, in, n, out);
    float rotated[piece_of_row];
    kernels_.dequantize_row(rules_.format, in, n, rotated);
    kernels_.revert(rotation_.from(first), rotated, n);
    for (std::size_t i = 0; i < n; ++i) out[i] = from_float<Out>(rotated[i]);
  }

 private:
  /// Zeroes the rotated blocks that infinities have spread over.
  void leave_out_infinities(const T* in, std::size_t first, std::size_t n, float* rotated) const {
    const std::size_t size = rotation_.from(first).size;
    for (std::size_t k = 0; k < n; k += size) {
      const std::size_t end = std::min(n, k + size);
      if (has_infinity(in + k, end - k)) std::fill(rotated + k, rotated + end, 0.0f);
    }
  }

  /// Returns the first column that the policy rejects, or n; other values that are not finite spread over their block.
  std::size_t rotate(const T* in, std::size_t first, std::size_t n, float* out) const {
    std::uint32_t largest = 0;  // of the magnitudes' bits, which order like the magnitudes: NaN above infinity
    for (std::size_t i = 0; i < n; ++i) {
      out[i] = to_float(in[i]);
      largest = std::max(largest, bit_cast<std::uint32_t>(out[i]) & 0x7FFFFFFFu);
    }
    if (largest >= 0x7F800000u) {
      for (std::size_t i = 0; i < n; ++i) {
        out[i] = admit(in[i], rules_.special);
        if (rules_.special == special_values::reject && !is_finite(out[i])) return i;
      }
    }
    kernels_.rotate(rotation_.from(first), out, n);
    return n;
  }

  [[no_unique_address]] Kernels kernels_;
  row_rules rules_;
  row_rotation rotation_;
};

/// The largest magnitude of the whole batch (one entry) or of each matrix; `row_amax(row, cols)` gives a row's.
template <real T, class RowAmax>
void amax_cpu(executor_ref executor, const batch_view<const T>& in, const RowAmax& row_amax, std::span<float> out) {
  // Magnitudes compare as their bits do: the largest has the least complement.
  std::vector<shared_minimum> largest(out.size());
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    const std::size_t e = row / in.rows;
    const std::uint32_t bits = bit_cast<std::uint32_t>(row_amax(in.row(e, row % in.rows), in.cols));
    largest[out.size() == 1 ? 0 : e].offer(shared_minimum::none - bits);
  });
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = bit_cast<float>(static_cast<std::uint32_t>(shared_minimum::none - largest[i].value()));
  }
}

inline bool has_zero(std::span<const float> x) {
  for (const float v : x) {
    if (v == 0) return true;
  }
  return false;
}

/// The tensor scales of NVFP4: those given, or from the largest magnitudes.
template <class Kernels, real T>
void set_tensor_scales(executor_ref executor, const batch_view<const T>& in, const row_packer<Kernels, T>& packer,
                       const quantize_options& options, std::span<float> scales) {
  if (scales.empty()) return;
  const default_float_state usual;
  if (options.tensor_scales.empty()) {
    bool counts_infinities = false;
    const auto row_amax = [&](const T* x, std::size_t cols) {
      return !counts_infinities ? packer.amax(x, cols) : has_infinity(x, cols) ? largest<T> : 0.0f;
    };
    amax_cpu<T>(executor, in, row_amax, scales);
    if (options.special == special_values::saturate && has_zero(scales)) {
      // where infinities saturate and all else is 0, the largest magnitude is that of the infinities
      counts_infinities = true;
      std::vector<float> infinite(scales.size());
      amax_cpu<T>(executor, in, row_amax, {infinite.data(), infinite.size()});
      for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = scales[i] == 0 ? infinite[i] : scales[i];
    }
    for (float& scale : scales) scale = tensor_scale_for(scale, *options.rule, options.invertible_tensor_scales);
  } else {
    for (std::size_t i = 0; i < scales.size(); ++i) {
      scales[i] = options.tensor_scales[options.tensor_scales.size() == 1 ? 0 : i];
    }
  }
}

/// The column weights of a call without those that are too small to count; copied only where there are some.
class counted_weights {
 public:
  explicit counted_weights(std::span<const float> given) : weights_(given) {
    const default_float_state usual;  // or subnormal weights might compare as zeros
    for (std::size_t i = 0; i < given.size(); ++i) {
      if (!(given[i] > 0 && given[i] < least_column_weight)) continue;
      if (copy_.empty()) copy_ = std::vector<float>(given.data(), given.data() + given.size());
      copy_[i] = 0;
    }
    if (!copy_.empty()) weights_ = {copy_.data(), copy_.size()};
  }
  counted_weights(const counted_weights&) = delete;
  counted_weights& operator=(const counted_weights&) = delete;

  /// Those of a matrix of `cols` columns.
  [[nodiscard]] const float* of_matrix(std::size_t e, std::size_t cols) const {
    if (weights_.empty()) return nullptr;
    return weights_.data() + (weights_.size() > cols ? e * cols : 0);
  }

 private:
  std::span<const float> weights_;
  std::vector<float> copy_;
};

/// Row `row` of all rows of a batch, as input to a row kernel.
template <real T>
input_row<T> input_of(const batch_view<const T>& in, const quantize_options& options, const counted_weights& counted,
                      std::size_t row) {
  const std::size_t e = row / in.rows;
  const float* weights = counted.of_matrix(e, in.cols);
  return {in.row(e, row % in.rows), in.cols, weights, options.first_index + row * in.cols};
}

template <class Byte>
packed_row<Byte> packed_row_of(const packed_view<any_format, Byte>& packed, std::size_t row) {
  const std::size_t e = row / packed.rows, r = row % packed.rows;
  return {packed.row_codes(e, r), packed.row_scales(e, r), packed.row_macros(e, r), packed.tensor_scale(e)};
}

/// Packs a job on the CPU with the row kernels of one backend.
template <class Kernels, real T>
result<void> quantize_cpu(executor_ref executor, const quantize_job<T>& job, const Kernels& kernels = {}) {
  const auto& in = job.in;
  const row_packer<Kernels, T> packer(job.out.format, job.options, in.cols, kernels);
  set_tensor_scales(executor, in, packer, job.options, job.out.tensor_scales);
  const counted_weights weights(job.options.column_weights);
  shared_minimum rejected;
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    const std::size_t column = packer.pack(input_of(in, job.options, weights, row), 0, packed_row_of(job.out, row));
    if (column < in.cols) rejected.offer(row * in.cols + column);
  });
  if (rejected.value() != shared_minimum::none) return rejection(in, rejected.value());
  return {};
}

/// Unpacks a job on the CPU with the row kernels of one backend.
template <class Kernels, real T>
result<void> dequantize_cpu(executor_ref executor, const dequantize_job<T>& job, const Kernels& kernels = {}) {
  constexpr std::size_t past_caches = std::size_t{64} << 20;  // bytes of output that few caches hold until it is read
  const std::size_t rows = job.out.matrices * job.out.rows;
  const bool is_large = rows * job.out.cols * sizeof(T) >= past_caches;
  for_each_row(executor, rows, job.out.cols, [&](std::size_t row) {
    const auto packed = packed_row_of(job.in, row);
    T* out = job.out.row(row / job.out.rows, row % job.out.rows);
    if constexpr (requires { kernels.dequantize_row_past_caches(job.in.format, packed, job.out.cols, out); }) {
      if (is_large) return kernels.dequantize_row_past_caches(job.in.format, packed, job.out.cols, out);
    }
    kernels.dequantize_row(job.in.format, packed, job.out.cols, out);
  });
  return {};
}

/// Packs and unpacks on the CPU a piece of a row at a time, so that the packed bytes never leave the cache.
template <class Kernels, real T>
result<void> fake_quantize_cpu(executor_ref executor, const fake_quantize_job<T>& job, const Kernels& kernels = {}) {
  const auto& in = job.in;
  const row_packer<Kernels, T> packer(job.format, job.options, in.cols, kernels);
  std::vector<float> tensor_scales;
  if (job.format.scale == scale_type::e4m3) {
    const bool one = job.options.scope == tensor_scale_scope::batch && job.options.tensor_scales.size() <= 1;
    tensor_scales = std::vector<float>(one ? 1 : in.matrices);
  }
  set_tensor_scales(executor, in, packer, job.options, {tensor_scales.data(), tensor_scales.size()});
  const counted_weights weights(job.options.column_weights);
  shared_minimum rejected;
  for_each_row(executor, in.matrices * in.rows, in.cols, [&](std::size_t row) {
    const std::size_t e = row / in.rows;
    const input_row<T> whole = input_of(in, job.options, weights, row);
    T* out = job.out.row(e, row % in.rows);
    const float tensor_scale = tensor_scales.empty() ? 1.0f : tensor_scales[tensor_scales.size() == 1 ? 0 : e];
    std::uint8_t codes[piece_of_row / 2], scales[piece_of_row / 16], macros[piece_of_row / 32];
    for (std::size_t k = 0; k < in.cols; k += piece_of_row) {
      const input_row<T> part{whole.data + k, std::min(piece_of_row, in.cols - k),
                              whole.weights == nullptr ? nullptr : whole.weights + k, whole.first_index + k};
      const std::size_t column = packer.pack(part, k, {codes, scales, macros, tensor_scale});
      if (column < part.cols) return rejected.offer(row * in.cols + k + column);
      packer.restore({codes, scales, macros, tensor_scale}, k, part.cols, out + k);
    }
  });
  if (rejected.value() != shared_minimum::none) return rejection(in, rejected.value());
  return {};
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
