#pragma once

#include "../../detail/macros_off.hpp"

/// Packing the weights of a GGUF file into MXFP4 or NVFP4, as llama.cpp reads them. Opt-in: needs a POSIX system.
///
///   const auto file = io::gguf_file::open("model-f16.gguf");
///   const auto plan = io::plan_gguf(file, {.rules = {{"", recipe::parse("mxfp4-32/min-error")}}});
///   io::pack_gguf(simd.on(threads), file, plan, "model-mxfp4.gguf");

#include "../../dequantize.hpp"          // dequantize_to
#include "../../detail/float_state.hpp"  // default_float_state
#include "../../error.hpp"               // error, result
#include "../../layout.hpp"              // try_to_ggml
#include "../../metrics.hpp"             // compare
#include "../../quantize.hpp"            // try_quantize
#include "../../scaling.hpp"             // recipe, tensor_scale_for
#include "../detail/in_whole.hpp"        // in_whole
#include "../gguf.hpp"                   // gguf_file, gguf_writer
#include "../imatrix.hpp"                // imatrix
#include "../pack_rule.hpp"              // pack_rule, matches
#include "roles.hpp"                     // gguf_kept_because, gguf_scale_applies

#include <algorithm>   // std::any_of, std::min
#include <cmath>       // std::log10
#include <cstddef>     // std::size_t
#include <cstdint>     // std::uint32_t
#include <filesystem>  // std::filesystem::path
#include <functional>  // std::function
#include <limits>      // std::numeric_limits
#include <mutex>       // std::mutex, std::lock_guard
#include <optional>    // std::optional
#include <span>        // std::span
#include <string>      // std::string
#include <utility>     // std::move
#include <vector>      // std::vector

namespace TETROMINO_NAMESPACE::io {

/// What to pack, and how.
struct gguf_options {
  std::vector<pack_rule> rules{};           ///< of those that match a weight, the last counts
  std::vector<std::string> keep{};          ///< patterns with * and ? for names of tensors that stay as they are
  std::vector<std::string> pack{};          ///< patterns for tensors to pack although their role is not known
  const imatrix* column_weights = nullptr;  ///< weighs the errors that searches compare
  special_values special = special_values::reject;
  std::function<bool(std::size_t)> progress{};  ///< called with bytes of the source as they are done; false stops
};

/// What happens to a tensor.
struct gguf_planned {
  const gguf_tensor* source = nullptr;
  bool is_packed = false;
  recipe how{};
  std::string reason{};      ///< why it is kept
  std::string scale_name{};  ///< the tensor of its NVFP4 tensor scales; empty where there is none, and they are 1
  bool is_weighted = false;  ///< whether the importance matrix knows it

  [[nodiscard]] TETROMINO_ABI std::size_t matrices() const noexcept {
    return source->shape().size() == 3 ? source->shape().front() : 1;
  }
  [[nodiscard]] TETROMINO_ABI std::size_t cols() const noexcept { return source->shape().back(); }
  [[nodiscard]] TETROMINO_ABI std::size_t rows() const noexcept {
    return cols() == 0 ? 0 : source->elements() / matrices() / cols();
  }
  [[nodiscard]] TETROMINO_ABI ggml_type type() const noexcept {
    if (!is_packed) return source->type();
    return how.format.scale == scale_type::e4m3 ? ggml_type::NVFP4 : ggml_type::MXFP4;
  }
};

/// What happens to all tensors of a file, in their order.
struct gguf_plan {
  gguf_options options;
  std::vector<gguf_planned> tensors;
};

/// What packing a tensor did to its values, from a sample of its rows.
struct gguf_tensor_report {
  error_report errors;
  double weighted_squares = 0;         ///< of the values, by column weights
  double weighted_squared_errors = 0;  ///< of the errors

  /// Signal to noise in dB, by column weights.
  [[nodiscard]] TETROMINO_ABI double weighted_qsnr() const noexcept {
    if (weighted_squared_errors == 0) return std::numeric_limits<double>::infinity();
    return 10.0 * std::log10(weighted_squares / weighted_squared_errors);
  }
};

/// What packing a file did, tensor by tensor in the order of the plan.
using gguf_report = std::vector<gguf_tensor_report>;

inline namespace TETROMINO_ISA {

/// Decides what happens to each tensor of a GGUF file in F32, F16 or BF16. Errors: invalid_argument for recipes that
/// ggml cannot hold, for patterns that match nothing or ask to pack what cannot be, for a part of a split file, and
/// where nothing is to be packed or the importance matrix knows none of it.
[[nodiscard]] result<gguf_plan> try_plan_gguf(const gguf_file& file, gguf_options options);
[[nodiscard]] inline gguf_plan plan_gguf(const gguf_file& file, gguf_options options) {
  return try_plan_gguf(file, std::move(options)).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

inline bool rule_matches(const io::pack_rule& rule, const io::gguf_tensor& tensor) noexcept {
  const bool is_experts = is_gguf_experts(split_gguf_name(tensor.name()).module);
  return is_for(rule, tensor.name(), is_experts, !is_experts);
}

class gguf_planner {
 public:
  gguf_planner(const io::gguf_file& file, io::gguf_options&& options) : file_(file) {
    plan_.options = std::move(options);
    if (const auto* const value = file.metadata().find("general.architecture")) {
      if (const auto name = value->try_as<std::string_view>()) architecture_ = *name;
    }
  }

  [[nodiscard]] result<io::gguf_plan> make() {
    if (auto fits = check_options(); !fits) return fits.error();
    bool some_packed = false, some_weighted = false;
    for (const auto& tensor : file_) {
      auto planned = decide(tensor);
      if (!planned) return planned.error();
      some_packed = some_packed || planned->is_packed;
      some_weighted = some_weighted || planned->is_weighted;
      plan_.tensors.push_back(std::move(*planned));
    }
    if (!some_packed) {
      return bad("expected a weight to pack, found none in ", file_.size(), " tensors");
    }
    if (plan_.options.column_weights != nullptr && !some_weighted) {
      return bad("expected weights that ", plan_.options.column_weights->path(), " knows, found none");
    }
    return std::move(plan_);
  }

 private:
  template <class... Pieces>
  [[nodiscard]] error bad(const Pieces&... what) const {
    return error(errc::invalid_argument, {file_.path(), ": ", what...});
  }

  [[nodiscard]] const io::gguf_options& options() const noexcept { return plan_.options; }

  [[nodiscard]] result<void> check_options() const {
    if (const auto* const count = file_.metadata().find("split.count")) {
      const auto parts = count->try_as<std::uint16_t>();
      if (!parts || *parts > 1) {
        return bad("expected a whole model, found a part of one: llama-gguf-split --merge joins them");
      }
    }
    for (const io::pack_rule& rule : options().rules) {
      const auto& [pattern, how] = rule;
      const bool is_nv = how.format.scale == scale_type::e4m3;
      if (!is_nv && how.format != any_format(mxfp4{})) {
        return bad("expected a recipe of mxfp4-32 or nvfp4 without macro blocks, got ", how.name());
      }
      if (how.rotation != 0) return bad("llama.cpp does not rotate activations, as recipe ", how.name(), " needs");
      if (how.error_feedback) {
        return bad("recipe ", how.name(), " needs statistics of inputs, which an importance matrix is too little for");
      }
      const bool matches =
          std::any_of(file_.begin(), file_.end(), [&](const auto& t) { return rule_matches(rule, t); });
      if (!matches) return unmatched("recipe", pattern, file_.tensors(), name_of);
    }
    if (auto all = all_match("keep", options().keep, file_.tensors(), name_of); !all) return all;
    return all_match("pack", options().pack, file_.tensors(), name_of);
  }
  static std::string_view name_of(const io::gguf_tensor& tensor) noexcept { return tensor.name(); }

  static bool is_plain(io::ggml_type type) noexcept {
    return type == io::ggml_type::F32 || type == io::ggml_type::F16 || type == io::ggml_type::BF16;
  }

  [[nodiscard]] result<io::gguf_planned> decide(const io::gguf_tensor& tensor) const {
    const auto kept = [&](const auto&... why) { return io::gguf_planned{&tensor, false, {}, text(why...)}; };
    if (const auto* pattern = match_of(tensor.name(), options().keep)) return kept("--keep ", *pattern);
    const auto* const asked = match_of(tensor.name(), options().pack);
    const std::string_view reason = gguf_kept_because(tensor.name(), tensor.shape());
    if (asked == nullptr && !reason.empty()) return kept(reason);
    if (!is_plain(tensor.type()) || tensor.elements() == 0 || tensor.shape().size() < 2 || tensor.shape().size() > 3) {
      if (asked == nullptr) return kept("it is ", io::name(tensor.type()), " already");
      return bad("--pack ", *asked, ": expected matrices of F32, F16 or BF16, found ", tensor.name(), ", ",
                 io::name(tensor.type()), ' ', shape_text(tensor.shape()));
    }
    const io::pack_rule* rule = nullptr;
    for (const auto& candidate : options().rules) {
      if (rule_matches(candidate, tensor)) rule = &candidate;
    }
    if (rule == nullptr) return kept("no recipe is for it");
    io::gguf_planned out{&tensor, true, rule->how};
    if (const std::size_t block = io::block_elements(out.type()); out.cols() % block != 0) {
      return kept("K = ", out.cols(), " is not whole blocks of ", block);
    }
    if (out.type() == io::ggml_type::NVFP4) out.scale_name = scale_of(tensor.name());
    const auto* const known = options().column_weights;
    out.is_weighted = known != nullptr && known->contains(tensor.name());
    return out;
  }

  /// "blk.0.attn_q.scale" beside "blk.0.attn_q.weight", where llama.cpp applies it and nothing else has the name.
  [[nodiscard]] std::string scale_of(const std::string& name) const {
    const std::string module = name.substr(0, name.rfind('.'));
    const bool has_bias = file_.find(module + ".bias") != nullptr;
    const bool applies = gguf_scale_applies(architecture_, name, has_bias) && file_.find(module + ".scale") == nullptr;
    return applies ? module + ".scale" : std::string();
  }

  const io::gguf_file& file_;
  std::string_view architecture_;
  io::gguf_plan plan_;
};

/// Packs the weights of a GGUF file, a few slices of rows at a time, into another: `Sink` is a gguf_writer, or stands
/// for one.
template <class Policy, class Sink>
class gguf_packer {
 public:
  gguf_packer(const Policy& policy, const io::gguf_file& file, const io::gguf_plan& plan, Sink& to)
      : executor_(policy.executor), policy_(policy.on({})), file_(file), plan_(plan), to_(to) {}

  [[nodiscard]] result<io::gguf_report> run() {
    for (const auto& planned : plan_.tensors) {
      report_.emplace_back();
      auto done = planned.is_packed ? pack(planned) : copy(planned);
      if (!done) {
        return error(done.error().code(),
                     {file_.path(), ": tensor ", printable(planned.source->name()), ": ", done.error().what()});
      }
    }
    return std::move(report_);
  }

 private:
  static constexpr std::size_t slice_bytes = std::size_t{1} << 20;
  static constexpr std::size_t slices_at_once = 32;
  static constexpr std::size_t sampled = 16;  // one slice in so many is compared with its source

  [[nodiscard]] result<void> done(std::span<const std::uint8_t> bytes, bool is_progress = true) const {
    file_.done_with(bytes);
    if (!is_progress || !plan_.options.progress || plan_.options.progress(bytes.size())) return {};
    return error(errc::io, "stopped");
  }

  [[nodiscard]] result<void> copy(const io::gguf_planned& planned) {
    for (auto rest = planned.source->bytes(); !rest.empty();) {
      const auto piece = rest.first(std::min(rest.size(), slice_bytes * 4));
      if (auto written = to_.try_append(planned.source->name(), piece); !written) return written;
      if (auto go_on = done(piece); !go_on) return go_on;
      rest = rest.subspan(piece.size());
    }
    return {};
  }

  [[nodiscard]] result<void> pack(const io::gguf_planned& planned) {
    switch (planned.source->type()) {
      case io::ggml_type::F32:
        return pack_as<float>(planned);
      case io::ggml_type::F16:
        return pack_as<half>(planned);
      default:
        return pack_as<bfloat16>(planned);
    }
  }

  template <class T>
  [[nodiscard]] result<void> pack_as(const io::gguf_planned& planned) {
    const auto values = planned.source->try_as<T>();
    if (!values) return values.error();
    const std::size_t matrix_values = planned.rows() * planned.cols();
    for (std::size_t e = 0; e < planned.matrices(); ++e) {
      const auto matrix = values->subspan(e * matrix_values, matrix_values);
      if (auto packed = pack_matrix<T>(planned, e, matrix); !packed) return packed;
    }
    return {};
  }

  template <class T>
  static std::span<const std::uint8_t> bytes_of(std::span<const T> values) noexcept {
    return {reinterpret_cast<const std::uint8_t*>(values.data()), values.size_bytes()};
  }

  /// Calls f(index, slice, first_row) for slices of whole rows on all threads, then after(count) for each wave of them.
  template <class T, class F, class After>
  [[nodiscard]] result<void> for_each_slice(const io::gguf_planned& planned, std::span<const T> matrix, const F& f,
                                            const After& after) {
    const std::size_t cols = planned.cols(), rows = planned.rows();
    const std::size_t step = std::clamp<std::size_t>(slice_bytes / (cols * sizeof(T)), 1, rows);
    std::vector<result<void>> results;
    for (std::size_t first = 0; first < rows; first += step * slices_at_once) {
      const std::size_t slices = std::min(slices_at_once, (rows - first + step - 1) / step);
      results.assign(slices, {});
      executor_(slices, [&](std::size_t i) {
        const std::size_t row = first + i * step, count = std::min(step, rows - row);
        results[i] = f(i, batch_view<const T>(matrix.data() + row * cols, 1, count, cols), row);
      });
      for (auto& one : results) {
        if (!one) return one;
      }
      if (auto written = after(slices); !written) return written;
      const std::size_t end = std::min(rows, first + step * slices);
      const auto bytes = bytes_of(matrix.subspan(first * cols, (end - first) * cols));
      if (auto go_on = done(bytes, is_packing_); !go_on) return go_on;
    }
    return {};
  }

  template <class T>
  [[nodiscard]] result<float> tensor_scale(const io::gguf_planned& planned, std::span<const T> matrix) {
    if (planned.scale_name.empty()) return 1.0f;
    float largest = 0;
    std::mutex mutex;
    const auto look = [&](std::size_t, const batch_view<const T>& slice, std::size_t) -> result<void> {
      const float here = amax(policy_, slice, plan_.options.special);
      const std::lock_guard lock(mutex);
      largest = std::max(largest, here);
      return {};
    };
    is_packing_ = false;
    const auto nothing = [](std::size_t) { return result<void>(); };
    if (auto seen = for_each_slice<T>(planned, matrix, look, nothing); !seen) return seen.error();
    const float scale = largest == 0 ? 1.0f : tensor_scale_for(largest, planned.how.rule);
    return scale > 0 ? scale : 1.0f;
  }

  template <class T>
  [[nodiscard]] result<void> pack_matrix(const io::gguf_planned& planned, std::size_t e, std::span<const T> matrix) {
    quantize_options options;
    options.special = plan_.options.special;
    std::vector<float> weights;
    if (planned.is_weighted) {
      const auto* const known = plan_.options.column_weights;
      auto means = known->try_column_weights(planned.source->name(), e, planned.matrices(), planned.cols());
      if (!means) return means.error();
      weights = std::move(*means);
      options.column_weights = weights;
    }
    const auto scale = planned.type() == io::ggml_type::NVFP4 ? tensor_scale<T>(planned, matrix) : result<float>(1.0f);
    if (!scale) return scale.error();
    if (planned.type() == io::ggml_type::NVFP4) options.tensor_scales = {&*scale, 1};
    if (!planned.scale_name.empty()) {
      if (auto done = to_.template try_append_values<float>(planned.scale_name, {&*scale, 1}); !done) return done;
    }
    std::vector<std::vector<std::uint8_t>> blocks(slices_at_once);
    const auto pack_slice = [&](std::size_t i, const batch_view<const T>& slice, std::size_t row) -> result<void> {
      const auto packed = try_quantize(policy_, slice, planned.how, options);
      if (!packed) return in_whole(packed.error(), slice[0], planned.matrices(), e, row);
      auto made = layout::try_to_ggml(*packed);
      if (!made) return made.error();
      blocks[i] = std::move(*made);
      if (i % sampled == 0) look_at(slice, *packed, weights);
      return {};
    };
    const auto write = [&](std::size_t slices) -> result<void> {
      for (std::size_t i = 0; i < slices; ++i) {
        if (auto written = to_.try_append(planned.source->name(), blocks[i]); !written) return written;
      }
      return {};
    };
    is_packing_ = true;
    return for_each_slice<T>(planned, matrix, pack_slice, write);
  }

  template <class T>
  void look_at(const batch_view<const T>& slice, const packed<>& made, std::span<const float> weights) {
    const auto values = dequantize<float>(policy_, made);
    const error_report seen = compare(slice, values);
    double squares = 0, errors = 0;
    for (std::size_t r = 0; r < slice.rows && !weights.empty(); ++r) {
      for (std::size_t k = 0; k < slice.cols; ++k) {
        const double x = static_cast<double>(to_float(slice.row(0, r)[k]));
        const double difference = x - static_cast<double>(values(r, k));
        squares += static_cast<double>(weights[k]) * x * x;
        errors += static_cast<double>(weights[k]) * difference * difference;
      }
    }
    const std::lock_guard lock(report_mutex_);
    report_.back().errors.add(seen);
    report_.back().weighted_squares += squares;
    report_.back().weighted_squared_errors += errors;
  }

  executor_ref executor_;
  Policy policy_;
  const io::gguf_file& file_;
  const io::gguf_plan& plan_;
  Sink& to_;
  bool is_packing_ = true;
  std::mutex report_mutex_;
  io::gguf_report report_;
};

}  // namespace TETROMINO_ISA

inline constexpr std::string_view gguf_recipe_key = "tetromino.recipe";

inline namespace TETROMINO_ISA {

/// llama.cpp's number for the type that most packed values have. (llama.h, enum llama_ftype)
constexpr std::uint32_t gguf_file_type(std::size_t mxfp4_values, std::size_t nvfp4_values) noexcept {
  constexpr std::uint32_t mostly_mxfp4 = 38, mostly_nvfp4 = 39;
  return mxfp4_values >= nvfp4_values ? mostly_mxfp4 : mostly_nvfp4;
}

/// The metadata of the source, with what readers look at where weights are packed, and the recipe.
inline io::gguf_metadata gguf_packed_metadata(const io::gguf_file& file, const io::gguf_plan& plan) {
  constexpr std::uint32_t quantization_version = 2;  // ggml.h
  std::size_t mxfp4_values = 0, nvfp4_values = 0;
  for (const auto& planned : plan.tensors) {
    if (planned.is_packed) {
      (planned.type() == io::ggml_type::MXFP4 ? mxfp4_values : nvfp4_values) += planned.source->elements();
    }
  }
  io::gguf_metadata out = file.metadata();
  out.set("general.file_type", gguf_file_type(mxfp4_values, nvfp4_values));
  out.set("general.quantization_version", quantization_version);
  std::string recipes;
  for (const auto& rule : plan.options.rules) {
    recipes += text(recipes.empty() ? "" : " ", rule.pattern, rule.pattern.empty() ? "" : "=", rule.how.name());
  }
  out.set(gguf_recipe_key, recipes);
  if (const auto* const weights = plan.options.column_weights) {
    out.set("quantize.imatrix.file", std::filesystem::path(weights->path()).filename().string());
    if (!weights->datasets().empty()) out.set("quantize.imatrix.dataset", weights->datasets().front());
    out.set("quantize.imatrix.entries_count", static_cast<std::uint32_t>(weights->size()));
    out.set("quantize.imatrix.chunks_count", static_cast<std::uint32_t>(weights->chunks()));
  }
  return out;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA {

inline result<gguf_plan> try_plan_gguf(const gguf_file& file, gguf_options options) {
  return detail::gguf_planner(file, std::move(options)).make();
}

/// Packs a GGUF file as planned: the same tensors in the same order, weights as MXFP4 or NVFP4 blocks, each tensor of
/// NVFP4 tensor scales behind its weight; all other tensors and keys as they were. Work is split over the policy's
/// executor; a few slices are in memory, whatever the size of the file. `to` has its name once it is whole.
/// Errors: those of the tensors' values and of the files, with the tensor's name.
template <class Policy>
[[nodiscard]] result<gguf_report> try_pack_gguf(const Policy& policy, const gguf_file& file, const gguf_plan& plan,
                                                const std::filesystem::path& to) {
  const detail::default_float_state usual;
  std::vector<gguf_declaration> declarations;
  for (const auto& planned : plan.tensors) {
    declarations.push_back({planned.source->name(), planned.type(), planned.source->shape()});
    if (!planned.scale_name.empty()) declarations.push_back({planned.scale_name, ggml_type::F32, {planned.matrices()}});
  }
  auto writer = gguf_writer::try_create(to, detail::gguf_packed_metadata(file, plan), declarations, &file);
  if (!writer) return writer.error();
  auto report = detail::gguf_packer(policy, file, plan, *writer).run();
  if (!report) return report;
  if (plan.options.progress && !plan.options.progress(0)) return error(errc::io, "stopped");
  if (auto done = writer->try_finish(); !done) return done.error();
  return report;
}

/// try_pack_gguf, throwing its error.
template <class Policy>
gguf_report pack_gguf(const Policy& policy, const gguf_file& file, const gguf_plan& plan,
                      const std::filesystem::path& to) {
  return try_pack_gguf(policy, file, plan, to).value();
}

}  // namespace TETROMINO_NAMESPACE::io::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
