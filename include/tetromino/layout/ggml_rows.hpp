#pragma once

#include "../detail/macros_off.hpp"

#include "../quantize.hpp"  // try_quantize, try_quantize_to, amax
#include "ggml.hpp"         // try_to_ggml, try_ggml_bytes

#include <algorithm>  // std::copy, std::max, std::min, std::replace
#include <atomic>     // std::atomic
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE {

namespace layout {

/// A ggml tensor to pack into: blocks of ggml_bytes(shape), as try_to_ggml describes them. `tensor_scales` receives the
/// decode scales of NVFP4, one for the whole batch or one for each matrix, which ggml keeps in a tensor of their own: 0
/// for what holds zeros alone. Where it is empty and the options give none, blocks are packed for a tensor scale of 1,
/// as stock ggml does.
struct ggml_rows {
  std::span<std::uint8_t> blocks;
  std::span<float> tensor_scales{};
};

}  // namespace layout

namespace detail::inline TETROMINO_ISA {

/// The tensor scales that a batch is packed with: those of the options, or new ones.
template <class Policy, real T>
result<void> set_ggml_scales(const Policy& policy, const batch_view<const T>& in, const any_format& format,
                             const quantize_options& options, std::span<float> scales) {
  if (scales.size() != 1 && scales.size() != in.matrices) {
    return error(errc::shape_mismatch, {"ggml: expected room for 1 tensor scale or ", in.matrices,
                                        " (one for each matrix), got ", scales.size()});
  }
  if (options.tensor_scales.size() > scales.size()) {
    return error(errc::shape_mismatch, "the options give a tensor scale for each matrix, the storage holds one");
  }
  if (!options.tensor_scales.empty()) {
    for (std::size_t e = 0; e < scales.size(); ++e) {
      scales[e] = options.tensor_scales[options.tensor_scales.size() == 1 ? 0 : e];
    }
    return {};
  }
  if (options.rotation || options.special == special_values::saturate) {  // packing alone knows those magnitudes
    packed<any_format> all(format, in.matrices, in.rows, in.cols, scales.size());
    if (auto done = try_quantize_to(policy, in, all.view(), options); !done) return done;
    std::copy(all.tensor_scales.begin(), all.tensor_scales.end(), scales.begin());
    return {};
  }
  const scale_rule rule = options.rule.value_or(default_rule(format));
  for (std::size_t e = 0; e < scales.size(); ++e) {
    const float largest = scales.size() == 1 ? amax(policy, in, options.special) : amax(policy, in[e], options.special);
    scales[e] = tensor_scale_for(largest, rule, options.invertible_tensor_scales);
  }
  return {};
}

/// Rows a few at a time: they are turned to blocks while they are in the cache.
template <class Policy, real T>
result<void> quantize_ggml_rows(const Policy& policy, const batch_view<const T>& in, const any_format& format,
                                const quantize_options& options, std::span<std::uint8_t> blocks) {
  const std::size_t rows_together = std::max<std::size_t>(1, 16384 / std::max<std::size_t>(in.cols, 1));
  const std::size_t row_bytes = ggml_size({format, 1, in.cols});
  const std::size_t parts = in.rows / rows_together + (in.rows % rows_together != 0);
  Policy alone = policy;
  alone.executor = {};
  std::atomic<bool> failed{false};
  const auto part = [&](std::size_t i) {
    if (failed.load(std::memory_order_relaxed)) return;
    const std::size_t e = i / parts, first = i % parts * rows_together;
    const std::size_t count = std::min(rows_together, in.rows - first), at = e * in.rows + first;
    quantize_options own = options;
    own.first_index += at * in.cols;
    if (own.tensor_scales.size() > 1) own.tensor_scales = own.tensor_scales.subspan(e, 1);
    if (own.column_weights.size() > in.cols) own.column_weights = own.column_weights.subspan(e * in.cols, in.cols);
    packed<any_format> some(format, 1, count, in.cols);
    const matrix_view<const T> x(in.row(e, first), count, in.cols, in.row_stride);
    const std::span<std::uint8_t> to = blocks.subspan(at * row_bytes, count * row_bytes);
    if (!try_quantize_to(alone, x, some.view(), own) || !layout::try_to_ggml(some, to)) failed = true;
  };
  policy.executor(in.matrices * parts, part);
  if (!failed) return {};
  const auto all =
      try_quantize(policy, in, format, options);  // once more as one piece, for the error: it names the row
  return all ? layout::try_to_ggml(*all, blocks) : result<void>(all.error());
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Packs x[matrices, rows, cols] straight into the blocks of a ggml tensor, in the way that a recipe names: the bytes
/// of try_to_ggml, without the linear storage between. Errors: those of try_quantize_to and try_to_ggml.
template <class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
result<void> try_quantize_to(const Policy& policy, const Input& x, const named_recipe& way, layout::ggml_rows out,
                             const quantize_options& options = {}) {
  if (!way) return way.error();
  const any_format format = way->format;
  quantize_options settings = options;
  if (auto valid = detail::set_rules(settings, *way); !valid) return valid;
  const auto in = detail::as_batch(x);
  const auto bytes = layout::try_ggml_bytes({format, in.matrices, in.rows, in.cols});
  if (!bytes) return bytes.error();
  if (auto fits = detail::check_sizes(in.matrices, in.rows, in.cols); !fits) return fits;
  if (auto fits = detail::check_layout_size("ggml", "blocks", *bytes, out.blocks.size()); !fits) return fits;
  if (auto valid = detail::check_options(settings, format, in.matrices, in.cols, detail::option_memory::host); !valid) {
    return valid;
  }
  std::vector<float> scales{1.0f};
  if (format.scale == scale_type::e4m3) {
    if (!out.tensor_scales.empty()) {
      if (auto set = detail::set_ggml_scales(policy, in, format, settings, out.tensor_scales); !set) return set;
      scales.assign(out.tensor_scales.begin(), out.tensor_scales.end());
      std::replace(scales.begin(), scales.end(), 0.0f, 1.0f);  // options take none; blocks of zeros are alike under any
      settings.tensor_scales = scales;
    } else if (settings.tensor_scales.empty()) {
      settings.tensor_scales = scales;
    }
  }
  return detail::quantize_ggml_rows(policy, in, format, settings, out.blocks);
}

/// try_quantize_to, throwing its error.
template <class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
void quantize_to(const Policy& policy, const Input& x, const named_recipe& way, layout::ggml_rows out,
                 const quantize_options& options = {}) {
  try_quantize_to(policy, x, way, out, options).value();
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE

#include "../detail/macros_back.hpp"
