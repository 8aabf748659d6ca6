#pragma once

#include "detail/macros_off.hpp"

#include "detail/cpu_backend.hpp"      // quantize_cpu
#include "detail/explain.hpp"          // why_nothing_is_packed
#include "detail/float_state.hpp"      // default_float_state
#include "detail/scalar_quantize.hpp"  // scalar_kernels
#include "detail/sizes.hpp"            // check_sizes
#include "execution.hpp"               // scalar_t, attached
#include "options.hpp"                 // quantize_options

#include <algorithm>    // std::max
#include <cstdint>      // std::uint8_t
#include <span>         // std::span, std::data
#include <type_traits>  // std::is_const_v, std::remove_cvref_t
#include <utility>      // std::declval, std::move

namespace TETROMINO_NAMESPACE {

namespace detail::inline TETROMINO_ISA {

template <class Policy, class T>
concept has_quantize_on = requires(const Policy& policy, const quantize_job<T>& job) {
  { quantize_on(policy, job) } -> std::same_as<result<void>>;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The hooks of the scalar backend. A backend attaches by declaring quantize_on, amax_on, dequantize_on and
/// fake_quantize_on for its policy in the policy's namespace; the calls below check sizes and options first.
template <real T>
result<void> quantize_on(const scalar_t& policy, const detail::quantize_job<T>& job) {
  return detail::quantize_cpu<detail::scalar_kernels>(policy.executor, job);
}
template <real T>
result<void> fake_quantize_on(const scalar_t& policy, const detail::fake_quantize_job<T>& job) {
  return detail::fake_quantize_cpu<detail::scalar_kernels>(policy.executor, job);
}
template <real T>
void amax_on(const scalar_t& policy, const batch_view<const T>& in, special_values special, std::span<float> out) {
  const auto row_amax = [&](const T* x, std::size_t cols) { return detail::scalar_kernels::amax(x, cols, special); };
  detail::amax_cpu<T>(policy.executor, in, row_amax, out);
}

/// A policy whose backend can pack elements of type T.
template <class Policy, class T>
concept can_quantize = real<T> && detail::attached<Policy, detail::has_quantize_on<Policy, T>>::value;

}  // namespace TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

/// Where the numbers lie that options point to.
enum class option_memory : std::uint8_t { host, device };
template <class Policy>
inline constexpr option_memory memory_of = device_policy<Policy> ? option_memory::device : option_memory::host;

/// Checks the options against a batch of this shape and format, and the values that they point to where the host can
/// read those; sets the rule.
inline result<void> check_options(quantize_options& options, const any_format& format, std::size_t matrices,
                                  std::size_t cols, option_memory memory) {
  const default_float_state usual;
  if (auto known = check_format(format); !known) return known;
  if (!options.rule) options.rule = default_rule(format);
  if (options.rotation) {
    if (auto valid = check_rotation(*options.rotation); !valid) return valid;
  }
  if (!has_rule(format.scale, *options.rule)) {
    return error(errc::invalid_argument, {name_of(format), " has no scale rule \"", name_of(*options.rule), "\""});
  }
  if (!has_rule(format, options.macro)) {
    return error(errc::invalid_argument, {name_of(format), " with factors of 2 bits has no rule \"mbs-search256\""});
  }
  if (const std::size_t n = options.column_weights.size(); n != 0 && n != cols && n != matrices * cols) {
    return error(errc::shape_mismatch, {"column_weights needs ", cols, " entries (one for each column) or ",
                                        matrices * cols, " (for each matrix and column), got ", n});
  }
  for (std::size_t i = 0; memory == option_memory::host && i < options.column_weights.size(); ++i) {
    if (!(options.column_weights[i] >= 0.0f && options.column_weights[i] <= largest<float>)) {
      return error(errc::invalid_argument, {"column_weights[", i, "]: expected a finite weight of at least 0, got ",
                                            options.column_weights[i]});
    }
  }
  if (options.tensor_scales.empty()) return {};
  if (format.scale != scale_type::e4m3) {
    return error(errc::invalid_argument, {name_of(format), " has no tensor scales, but the options give some"});
  }
  if (const std::size_t n = options.tensor_scales.size(); n != 1 && n != matrices) {
    return error(errc::shape_mismatch,
                 {"tensor_scales needs 1 entry or ", matrices, " (one for each matrix), got ", n});
  }
  for (std::size_t i = 0; memory == option_memory::host && i < options.tensor_scales.size(); ++i) {
    const float scale = options.tensor_scales[i];
    if (!(scale > 0.0f && scale <= largest<float>)) {
      return error(errc::invalid_argument, {"expected a positive, finite tensor scale, got ", scale});
    }
  }
  return {};
}

/// Checks a job to pack x[matrices, rows, cols] into `out`, and sets the rule.
inline result<void> check_job(std::size_t matrices, std::size_t rows, std::size_t cols,
                              const packed_view<any_format, std::uint8_t>& out, quantize_options& options,
                              option_memory memory) {
  if (auto fits = check_storage(out); !fits) return fits;
  if (auto fits = check_shape(out.shape(), matrices, rows, cols); !fits) return fits;
  if (auto valid = check_options(options, out.format, matrices, cols, memory); !valid) return valid;
  if (options.tensor_scales.size() > 1 && out.tensor_scales.size() == 1) {
    return error(errc::shape_mismatch, "the options give a tensor scale for each matrix, the storage holds one");
  }
  return {};
}

/// Storage for x[matrices, rows, cols], packed with these options; checks them, and sets the rule.
inline result<packed<any_format>> storage_for(std::size_t matrices, std::size_t rows, std::size_t cols,
                                              const any_format& format, quantize_options& options) {
  if (auto known = check_format(format); !known) return known.error();
  if (auto fits = check_sizes(matrices, rows, cols); !fits) return fits.error();
  if (auto valid = check_options(options, format, matrices, cols, option_memory::host); !valid) return valid.error();
  const bool per_matrix = options.scope == tensor_scale_scope::per_matrix || options.tensor_scales.size() > 1;
  return packed<any_format>(format, matrices, rows, cols, per_matrix ? matrices : 1);
}

/// Packs a batch into storage of its own.
template <class Policy, real T>
result<packed<any_format>> quantize_batch(const Policy& policy, const batch_view<const T>& in, const any_format& format,
                                          const quantize_options& options) {
  quantize_job<T> job{in, {}, options};
  auto out = storage_for(in.matrices, in.rows, in.cols, format, job.options);
  if (!out) return out;
  job.out = out->view();
  if (auto done = quantize_on(policy, job); !done) return done.error();
  return out;
}
/// Packed storage whose format is known to the compiler.
template <block_format Format>
packed<Format> with_format(packed<any_format>&& from, const Format& format) {
  packed<Format> out;
  out.format = format;
  out.matrices = from.matrices;
  out.rows = from.rows;
  out.cols = from.cols;
  out.codes.swap(from.codes);
  out.scales.swap(from.scales);
  out.macros.swap(from.macros);
  out.tensor_scales.swap(from.tensor_scales);
  return out;
}

/// Gives options the rules that a recipe names. A rotation given with signs stays, if it is of the recipe's size.
TETROMINO_COLD inline result<void> set_rules(quantize_options& options, const recipe& r) {
  if (r.error_feedback) {
    return error(errc::invalid_argument, {"recipe ", r.name(), " needs calibration: pack with gptq() instead"});
  }
  options.rule = r.rule;
  options.macro = r.macro;
  if (options.rotation && options.rotation->size != r.rotation) {
    return error(errc::invalid_argument, {"recipe ", r.name(), " rotates blocks of ", r.rotation,
                                          " columns, the options blocks of ", options.rotation->size});
  }
  if (r.rotation != 0 && !options.rotation) options.rotation = hadamard{r.rotation};
  return {};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The largest magnitude of x[matrices, rows, cols], from which tensor_scale_for makes an NVFP4 tensor scale: for those
/// who pack a tensor slice by slice. Blocks of 16 that hold NaN or an infinity are left out, unless special_values is
/// saturate.
template <class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
[[nodiscard]] float amax(const Policy& policy, const Input& x, special_values special = special_values::reject) {
  float largest = 0;
  amax_on(policy, detail::as_batch(x), special, std::span<float>(&largest, 1));
  return largest;
}

/// The same over matrices that lie apart, such as experts in allocations of their own that shall share a tensor scale.
template <class Policy, class Inputs, class Input = std::remove_cvref_t<decltype(*std::data(std::declval<Inputs>()))>>
  requires(matrix_like<Input>&& can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
[[nodiscard]] float amax(const Policy& policy, const Inputs& xs, special_values special = special_values::reject) {
  float largest = 0;
  for (const Input& x : xs) largest = std::max(largest, amax(policy, x, special));
  return largest;
}

/// Packs x[matrices, rows, cols] into `out`, storage of the same shape that the caller provides: codes, scales, macro
/// bytes and tensor scales in the linear layout of packed_shape. Any cols; the last block may be short.
/// Errors: shape_mismatch; invalid_argument for options that do not fit; non_finite under special_values::reject.
/// (OCP MX v1.0, sec. 6.3; NVFP4; arXiv 2603.08713)
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
result<void> try_quantize_to(const Policy& policy, const Input& x, packed_view<Format, std::uint8_t> out,
                             const quantize_options& options = {}) {
  detail::quantize_job<element_of<Input>> job{detail::as_batch(x), out, options};
  if (auto valid =
          detail::check_job(job.in.matrices, job.in.rows, job.in.cols, job.out, job.options, detail::memory_of<Policy>);
      !valid) {
    return valid;
  }
  return quantize_on(policy, job);
}

/// Packs x[matrices, rows, cols] into `out` in the way that a recipe names; the recipe's rules replace those of the
/// options. Errors: as above, and invalid_argument where `out` has another format than the recipe.
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
result<void> try_quantize_to(const Policy& policy, const Input& x, const named_recipe& way,
                             packed_view<Format, std::uint8_t> out, const quantize_options& options = {}) {
  if (!way) return way.error();
  const recipe& r = *way;
  if (any_format(out.format) != r.format) {
    return error(
        errc::invalid_argument,
        {"recipe ", r.name(), " needs storage of its format, got ", name_of(any_format(out.format)),
         " with macro block ", any_format(out.format).macro_block, " of ", any_format(out.format).macro_bits, " bits"});
  }
  quantize_options settings = options;
  if (auto valid = detail::set_rules(settings, r); !valid) return valid;
  return try_quantize_to(policy, x, out, settings);
}

/// Packs x[matrices, rows, cols] into storage of its own, in a format known at run time.
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
result<packed<Format>> try_quantize(const Policy& policy, const Input& x, const Format& format,
                                    const quantize_options& options = {}) {
  auto out = detail::quantize_batch(policy, detail::as_batch(x), format, options);
  if constexpr (std::same_as<Format, any_format>) {
    return out;
  } else {
    if (!out) return out.error();
    return detail::with_format(*std::move(out), format);
  }
}

/// Packs x[matrices, rows, cols] in the way that a recipe names; the recipe's rules replace those of the options.
template <class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
result<packed<any_format>> try_quantize(const Policy& policy, const Input& x, const named_recipe& way,
                                        const quantize_options& options = {}) {
  if (!way) return way.error();
  const recipe& r = *way;
  quantize_options settings = options;
  if (auto valid = detail::set_rules(settings, r); !valid) return valid.error();
  return try_quantize(policy, x, r.format, settings);
}

/// Packs x[matrices, rows, cols] into blocks of a format: `quantize<mxfp4>(simd, weights)`.
template <block_format Format, class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
result<packed<Format>> try_quantize(const Policy& policy, const Input& x, const quantize_options& options = {}) {
  return try_quantize(policy, x, Format{}, options);
}

/// try_quantize_to, throwing its error.
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
void quantize_to(const Policy& policy, const Input& x, packed_view<Format, std::uint8_t> out,
                 const quantize_options& options = {}) {
  try_quantize_to(policy, x, out, options).value();
}

/// try_quantize_to with a recipe, throwing its error.
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
void quantize_to(const Policy& policy, const Input& x, const named_recipe& way, packed_view<Format, std::uint8_t> out,
                 const quantize_options& options = {}) {
  try_quantize_to(policy, x, way, out, options).value();
}

/// try_quantize, throwing its error.
template <block_format Format, class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
[[nodiscard]] packed<Format> quantize(const Policy& policy, const Input& x, const quantize_options& options = {}) {
  return try_quantize(policy, x, Format{}, options).value();
}

/// try_quantize with a recipe, throwing its error.
template <class Policy, matrix_like Input>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
[[nodiscard]] packed<any_format> quantize(const Policy& policy, const Input& x, const named_recipe& way,
                                          const quantize_options& options = {}) {
  return try_quantize(policy, x, way, options).value();
}

/// Packs x[matrices, rows, cols] and unpacks it again into `out` of the same shape and type, in one pass over memory
/// (two for NVFP4 without given tensor scales): what a model sees of a recipe. `out` may be x itself.
/// Errors: as try_quantize_to.
template <class Policy, matrix_like Input, class Output>
  requires(can_quantize<Policy, element_of<Input>>)
result<void> try_fake_quantize(const Policy& policy, const Input& x, const named_recipe& way, const Output& out,
                               const quantize_options& options = {}) {
  if (!way) return way.error();
  const recipe& r = *way;
  using T = element_of<Input>;
  static_assert(!std::is_const_v<std::remove_pointer_t<decltype(out.data)>>,
                "fake_quantize writes: its output cannot be const");
  const auto in = detail::as_batch(x);
  const batch_view<T> to(out);
  if (auto fits = detail::check_same_shape(in, to); !fits) return fits;
  if (auto fits = detail::check_sizes(in.matrices, in.rows, in.cols); !fits) return fits;
  detail::fake_quantize_job<T> job{in, to, r.format, options};
  if (auto valid = detail::set_rules(job.options, r); !valid) return valid;
  if (auto valid = detail::check_options(job.options, r.format, in.matrices, in.cols, detail::memory_of<Policy>);
      !valid) {
    return valid;
  }
  return fake_quantize_on(policy, job);
}

/// try_fake_quantize, throwing its error.
template <class Policy, matrix_like Input, class Output>
  requires(can_quantize<Policy, element_of<Input>>)
void fake_quantize(const Policy& policy, const Input& x, const named_recipe& way, const Output& out,
                   const quantize_options& options = {}) {
  try_fake_quantize(policy, x, way, out, options).value();
}

/// The same into storage that owns its bytes, of the same shape.
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
result<void> try_quantize_to(const Policy& policy, const Input& x, packed<Format>& out,
                             const quantize_options& options = {}) {
  return try_quantize_to(policy, x, out.view(), options);
}
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
void quantize_to(const Policy& policy, const Input& x, packed<Format>& out, const quantize_options& options = {}) {
  try_quantize_to(policy, x, out.view(), options).value();
}
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
result<void> try_quantize_to(const Policy& policy, const Input& x, const named_recipe& way, packed<Format>& out,
                             const quantize_options& options = {}) {
  return try_quantize_to(policy, x, way, out.view(), options);
}
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>>)
void quantize_to(const Policy& policy, const Input& x, const named_recipe& way, packed<Format>& out,
                 const quantize_options& options = {}) {
  try_quantize_to(policy, x, way, out.view(), options).value();
}

/// try_quantize in a format known at run time, throwing its error.
template <class Policy, matrix_like Input, block_format Format>
  requires(can_quantize<Policy, element_of<Input>> && !device_policy<Policy>)
[[nodiscard]] packed<Format> quantize(const Policy& policy, const Input& x, const Format& format,
                                      const quantize_options& options = {}) {
  return try_quantize(policy, x, format, options).value();
}

}  // namespace TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

template <class Policy, class Input>
concept packs = matrix_like<Input> && can_quantize<Policy, element_of<Input>>;
template <class... Args>
inline constexpr bool starts_well = false;
template <class Policy, class Input, class... Rest>
inline constexpr bool starts_well<Policy, Input, Rest...> = packs<Policy, Input>;

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Calls that cannot be, and why: see detail/explain.hpp.
template <block_format Format, class... Args>
  requires(!detail::starts_well<Args...>)
detail::why_nothing_is_packed<Args...> quantize(const Args&...);
template <block_format Format, class... Args>
  requires(!detail::starts_well<Args...>)
detail::why_nothing_is_packed<Args...> try_quantize(const Args&...);
template <class Policy, class... Args>
  requires(!block_format<Policy> && !detail::starts_well<Policy, Args...>)
detail::why_nothing_is_packed<Policy, Args...> quantize(const Policy&, const Args&...);
template <class Policy, class... Args>
  requires(!block_format<Policy> && !detail::starts_well<Policy, Args...>)
detail::why_nothing_is_packed<Policy, Args...> try_quantize(const Policy&, const Args&...);
template <class Policy, class... Args>
  requires(!detail::starts_well<Policy, Args...>)
detail::why_nothing_is_packed<Policy, Args...> quantize_to(const Policy&, const Args&...);
template <class Policy, class... Args>
  requires(!detail::starts_well<Policy, Args...>)
detail::why_nothing_is_packed<Policy, Args...> try_quantize_to(const Policy&, const Args&...);
template <class Policy, matrix_like Input, block_format Format>
auto quantize_to(const Policy&, const Input&, packed_view<Format>, const quantize_options& = {}) {
  static_assert(detail::never<Format>, "packing writes: its storage is packed, or packed_view<..., std::uint8_t>");
}
template <class Policy, matrix_like Input, block_format Format>
auto try_quantize_to(const Policy&, const Input&, packed_view<Format>, const quantize_options& = {}) {
  static_assert(detail::never<Format>, "packing writes: its storage is packed, or packed_view<..., std::uint8_t>");
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
