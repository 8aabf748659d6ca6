#pragma once

#include "../../../detail/macros_off.hpp"

#include "../../../hadamard.hpp"  // rotate_back
#include "../../../metrics.hpp"   // error_report
#include "../../../quantize.hpp"  // try_quantize
#include "../options.hpp"         // verify_options
#include "packed_model.hpp"       // packed_model
#include "slices.hpp"             // for_each_slice

#include <algorithm>  // std::clamp, std::copy_n, std::min, std::ranges::equal
#include <cmath>      // std::abs
#include <cstddef>    // std::size_t
#include <mutex>      // std::mutex
#include <span>       // std::span
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// Compares all values of a packed model, as its readers decode them, with the original's.
template <class Policy>
class value_check {
 public:
  /// `packs_again`: whether every slice is also packed again, by the recipe that the files name, to the same bytes.
  value_check(const Policy& policy, const packed_model& model, const io::verify_options& options, bool packs_again)
      : executor_(policy.executor),
        policy_(policy.on({})),  // slices are the unit of parallel work
        model_(model),
        original_(model.original()),
        packed_(model.files()),
        found_(model.parameters()),
        options_(options),
        packs_again_(packs_again) {}

  /// The errors of all packed values. Errors: malformed_file with the tensor that is not what it should be.
  [[nodiscard]] result<error_report> run() {
    std::vector<slice> slices;
    for (std::size_t i = 0; i < found_.size(); ++i) {
      const io::parameter& p = *found_[i].source;
      if (found_[i].stored.empty() && p.encoding == io::value_encoding::plain) {
        for (std::size_t at = 0; at < p.values->bytes; at += options_.slice_bytes) slices.push_back({i, {0, at, 0}});
        continue;
      }
      const bool whole = found_[i].how && found_[i].how->error_feedback;
      const std::size_t step = whole ? p.rows : std::clamp<std::size_t>(options_.slice_bytes / (p.cols * 4), 1, p.rows);
      for (std::size_t e = 0; e < p.matrices; ++e) {
        for (std::size_t r = 0; r < p.rows; r += step) slices.push_back({i, {e, r, std::min(step, p.rows - r)}});
      }
    }
    errors_.resize(found_.size());
    auto done = for_each_slice(executor_, slices.size(), pool_, [&](std::size_t s, slice_buffers& buffers) {
      return compare_slice(slices[s], buffers);
    });
    if (!done) return done.error();
    error_report all;
    for (std::size_t i = 0; i < found_.size(); ++i) {
      constexpr double least = 6;  // dB; every recipe is above 12 on weights of any shape
      all.add(errors_[i]);
      if (errors_[i].sum_squared_errors == 0 || errors_[i].qsnr() >= least) continue;
      return model_.wrong_tensor(found_[i].source->name, "what readers decode is not the original: QSNR ",
                                 errors_[i].qsnr(), " dB (another axis, other scales or other weights?)");
    }
    return all;
  }

 private:
  struct slice {
    std::size_t parameter = 0;
    io::row_range rows{};
  };

  [[nodiscard]] result<void> compare_slice(const slice& s, slice_buffers& buffers) {
    const io::parameter& p = *found_[s.parameter].source;
    std::size_t bytes = 0;
    if (found_[s.parameter].stored.empty()) {
      auto same = p.encoding == io::value_encoding::plain ? same_bytes(p, s.rows.first, buffers, bytes)
                                                          : same_decoded(p, s.rows, buffers);
      if (!same) return same;
    } else if (auto done = compare_packed(s, buffers); !done) {
      return done;
    }
    if (bytes == 0) bytes = p.values->bytes / (p.matrices * p.rows) * s.rows.count;
    if (options_.progress && !options_.progress(bytes)) return error(errc::io, "stopped");
    return {};
  }

  [[nodiscard]] result<void> same_bytes(const io::parameter& p, std::size_t at, slice_buffers& buffers,
                                        std::size_t& bytes) const {
    bytes = std::min(options_.slice_bytes, p.values->bytes - at);
    buffers.rows.bytes.resize(bytes);
    buffers.gathered.resize(bytes);
    if (auto read = original_.try_read(*p.values, at, buffers.rows.bytes); !read) return read;
    if (auto read = packed_.try_read(*packed_.find(p.name), at, buffers.gathered); !read) return read;
    if (buffers.rows.bytes == buffers.gathered) return {};
    return model_.wrong_tensor(p.name, "it was kept, but differs from the original");
  }

  [[nodiscard]] result<void> same_decoded(const io::parameter& p, const io::row_range& rows,
                                          slice_buffers& buffers) const {
    return io::try_visit_rows(policy_, original_, p, rows, buffers.rows, [&](const auto& values) -> result<void> {
      const std::size_t count = values.rows * values.cols;
      buffers.gathered.resize(count * sizeof(bfloat16));
      const std::size_t at = (rows.matrix * p.rows + rows.first) * p.cols * sizeof(bfloat16);
      if (auto read = packed_.try_read(*packed_.find(p.name), at, buffers.gathered); !read) return read;
      const auto* const stored = reinterpret_cast<const bfloat16*>(buffers.gathered.data());
      for (std::size_t i = 0; i < count; ++i) {
        if (stored[i] == bfloat16(to_float(values.data[i]))) continue;
        return model_.wrong_tensor(p.name, "it was decoded, but differs from the original's values");
      }
      return {};
    });
  }

  /// Gathers packed rows from the tensors that hold them.
  [[nodiscard]] result<float> read_packed(const found_parameter& one, const io::row_range& range,
                                          slice_buffers& buffers) const {
    const packed_shape shape{one.format, 1, range.count, one.source->cols};
    buffers.codes.resize(shape.code_bytes());
    buffers.scales.resize(shape.scale_bytes());
    buffers.macros.resize(shape.macro_bytes());
    float tensor_scale = 1.0f;
    for (std::size_t i = 0; i < one.stored.size(); ++i) {
      const io::stored_weight& stored = one.stored[i];
      const auto part = rows_within(stored, range);
      if (part.count == 0) continue;
      const auto get = [&](const io::tensor_declaration& tensor, std::size_t per_row, std::vector<std::uint8_t>& to) {
        if (tensor.name.empty()) return result<void>();
        buffers.gathered.resize(part.count * per_row);
        auto read = packed_.try_read(*packed_.find(tensor.name), part.at * per_row, buffers.gathered);
        if (!read) return read;
        for (std::size_t r = 0; r < part.count; ++r) {
          std::copy_n(buffers.gathered.data() + r * per_row, per_row,
                      to.data() + (part.first - range.first + r * stored.row_step) * per_row);
        }
        return read;
      };
      if (auto done = get(stored.codes, shape.code_bytes_per_row(), buffers.codes); !done) return done.error();
      if (auto done = get(stored.scales, shape.blocks_per_row(), buffers.scales); !done) return done.error();
      if (auto done = get(stored.macros, shape.macros_per_row(), buffers.macros); !done) return done.error();
      const auto& scales = one.tensor_scales[i];
      if (!scales.empty()) tensor_scale = scales[scales.size() == 1 ? 0 : range.matrix - stored.matrix];
    }
    return tensor_scale;
  }

  [[nodiscard]] result<void> compare_packed(const slice& s, slice_buffers& buffers) {
    const found_parameter& one = found_[s.parameter];
    const auto scale = read_packed(one, s.rows, buffers);
    if (!scale) return scale.error();
    const bool is_nvfp4 = one.format.scale == scale_type::e4m3;
    const packed_view<any_format> stored{one.format,     1,
                                         s.rows.count,   one.source->cols,
                                         buffers.codes,  buffers.scales,
                                         buffers.macros, {&*scale, is_nvfp4 ? 1u : 0u}};
    buffers.values.resize(s.rows.count * one.source->cols);
    const batch_view<float> values(buffers.values.data(), 1, s.rows.count, one.source->cols);
    if (auto done = try_dequantize_to(policy_, stored, values); !done) return done;
    const std::size_t rotation = one.how ? one.how->rotation : 0;
    if (rotation != 0) rotate_back(policy_, values, {rotation}, values);
    std::vector<float> decoded(buffers.values);
    return io::try_visit_rows(
        policy_, original_, *one.source, s.rows, buffers.rows, [&](const auto& rows) -> result<void> {
          error_report seen;
          if (auto done = add_errors(one, rows, decoded, s.rows, seen); !done) return done;
          {
            const std::lock_guard lock(mutex_);
            errors_[s.parameter].add(seen);
          }
          return packs_again_ && one.how ? pack_again(one, rows, s.rows, stored, *scale) : result<void>();
        });
  }

  /// Values that were finite must decode to finite ones; others do not count.
  template <class Rows>
  [[nodiscard]] result<void> add_errors(const found_parameter& one, const Rows& rows, const std::vector<float>& decoded,
                                        const io::row_range& range, error_report& seen) const {
    for (std::size_t r = 0; r < rows.rows; ++r) {
      error_report row;
      bool all_finite = true, decodes = true;
      for (std::size_t k = 0; k < rows.cols; ++k) {
        const float value = to_float(rows(r, k)), back = decoded[r * rows.cols + k];
        all_finite = all_finite && is_finite(value);
        decodes = decodes && is_finite(back);
        if (!is_finite(value) || !is_finite(back)) continue;
        const double difference = std::abs(static_cast<double>(value) - static_cast<double>(back));
        ++row.count;
        row.sum_squares += static_cast<double>(value) * static_cast<double>(value);
        row.sum_squared_errors += difference * difference;
        row.sum_abs_errors += difference;
        row.keep_largest(difference);
      }
      if (all_finite && !decodes) {
        return model_.wrong_tensor(one.source->name, "row ", range.first + r, " of matrix ", range.matrix,
                                   " decodes to NaN or infinity");
      }
      seen.add(row);
    }
    return {};
  }

  /// What the recipe makes of the original has the same bytes.
  template <class Rows>
  [[nodiscard]] result<void> pack_again(const found_parameter& one, const Rows& rows, const io::row_range& range,
                                        const packed_view<any_format>& stored, float scale) const {
    const io::parameter& p = *one.source;
    if (p.encoding == io::value_encoding::mxfp4 || p.encoding == io::value_encoding::nvfp4) return {};  // values decide
    quantize_options options;
    const bool is_nvfp4 = one.format.scale == scale_type::e4m3;
    if (is_nvfp4) options.tensor_scales = {&scale, 1};
    if (const auto special = packed_.metadata().find("tetromino.special"); special != packed_.metadata().end()) {
      options.special = special->second == "poison" ? special_values::poison : special_values::saturate;
    }
    std::vector<float> weights;
    result<packed<>> again = packed<>();
    if (one.how->error_feedback) {
      std::vector<float> floats(rows.rows * rows.cols);
      for (std::size_t i = 0; i < floats.size(); ++i) floats[i] = to_float(rows.data[i]);
      again = options_.inputs->feed_back(matrix_view<const float>(floats.data(), rows.rows, rows.cols), p, range.matrix,
                                         *one.how, options);
    } else {
      if (options_.inputs != nullptr) {
        auto known = options_.inputs->column_weights(p, range.matrix, one.how->rotation);
        if (!known) return known.error();
        weights = std::move(*known);
        options.column_weights = weights;
      }
      again = try_quantize(policy_, rows, *one.how, options);
    }
    if (!again) return again.error();
    if (std::ranges::equal(again->codes, stored.codes) && std::ranges::equal(again->scales, stored.scales) &&
        std::ranges::equal(again->macros, stored.macros)) {
      return {};
    }
    return model_.wrong_tensor(p.name, "rows ", range.first, " to ", range.first + range.count - 1, " of matrix ",
                               range.matrix, " do not hold what ", one.how->name(), " makes of the original");
  }

  executor_ref executor_;
  Policy policy_;
  const packed_model& model_;
  const io::checkpoint& original_;
  const io::checkpoint& packed_;
  const std::vector<found_parameter>& found_;
  const io::verify_options& options_;
  bool packs_again_;
  std::vector<error_report> errors_;
  buffer_pool pool_;
  std::mutex mutex_;
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"
