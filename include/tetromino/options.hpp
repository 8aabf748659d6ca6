#pragma once

#include "detail/macros_off.hpp"

#include "hadamard.hpp"  // hadamard
#include "matrix.hpp"    // batch_view
#include "packed.hpp"    // packed_view
#include "rounding.hpp"  // element_rounding
#include "scaling.hpp"   // scale_rule, macro_rule

#include <cstdint>   // std::uint64_t
#include <optional>  // std::optional
#include <span>      // std::span

namespace TETROMINO_NAMESPACE {

/// What happens to NaN and infinities in the input.
enum class special_values : std::uint8_t {
  reject,    ///< an error that names the row, the column and the value; the output's contents are then unspecified
  poison,    ///< the block's scale becomes NaN and its codes 0, so all of it decodes to NaN (OCP MX v1.0, sec. 6.3)
  saturate,  ///< an infinity counts as the largest finite value of the input type with its sign, NaN as 0; NVFP4's
             ///< tensor scale is that of the other elements, unless those are all 0
};

/// What scale an NVFP4 block gets where E4M3 would round it to 0: where its largest magnitude is below about 2.2e-6 of
/// that which the tensor scale is made for (3.8e-6 for four_over_six).
enum class tiny_block_scale : std::uint8_t {
  zero,   ///< its elements become 0, as rounding to E4M3 has it
  least,  ///< 2^-9, which keeps some of its elements; what ModelOpt does
};

/// How many tensor scales an NVFP4 batch gets.
enum class tensor_scale_scope : std::uint8_t {
  batch,       ///< one for all matrices together
  per_matrix,  ///< one for each matrix, such as each expert
};

/// Everything that a caller may choose about packing, with the defaults that suit weights.
struct quantize_options {
  /// How block scales are chosen; by default oas for MX formats and amax for NVFP4.
  std::optional<scale_rule> rule{};
  /// How macro-block bytes are chosen, where the format has them.
  macro_rule macro = macro_rule::search;
  element_rounding rounding = element_rounding::nearest_even;
  special_values special = special_values::reject;
  /// Stochastic rounding: the stream, and the position in it of the input's first element. Element [e, r, k] uses
  /// position first_index + (e * rows + r) * cols + k, so slices of whole rows can be packed apart.
  std::uint64_t seed = 0;
  std::uint64_t first_index = 0;
  /// Non-negative weights of the squared errors that min_error, four_over_six and macro-block searches compare, such
  /// as the mean squared activation of each column: [cols], or [matrices, cols]. Empty: all 1. Where they leave all
  /// candidates of a block with the same error (they are 0, or so large that sums overflow), it is searched without.
  /// Weights below 2^-100 count as 0, since of such products some would vanish and others not.
  std::span<const float> column_weights{};
  /// NVFP4 tensor scales to use (decode sense): 1, or one for each matrix. Empty: from the input's largest magnitude.
  std::span<const float> tensor_scales{};
  /// NVFP4: tensor scales that are made get a value which its inverse gives back, for layouts that store the inverse
  /// (compressed-tensors; see layout::invertible). Those given stay as they are.
  bool invertible_tensor_scales = false;
  /// NVFP4: how many tensor scales owning storage gets. Caller-provided storage says it by its size.
  tensor_scale_scope scope = tensor_scale_scope::batch;
  /// NVFP4: what becomes of blocks that are far below the tensor's largest magnitude.
  tiny_block_scale tiny_blocks = tiny_block_scale::zero;
  /// Rotate along K before packing, in the same pass; what is packed is the rotated tensor. Column weights then belong
  /// to the rotated columns. fake_quantize rotates back.
  std::optional<hadamard> rotation{};
};

/// A policy whose backend works in memory that the host may not read, such as cuda::stream: it says so in a member
/// `device_memory`. Calls that would return values or make storage of their own are for the others.
template <class Policy>
concept device_policy = requires {
  requires Policy::device_memory;
};

namespace detail {

inline constexpr float least_column_weight = 0x1p-100f;  ///< smaller ones count as 0

/// What a backend is asked to pack; already checked.
template <real T>
struct quantize_job {
  batch_view<const T> in;
  packed_view<any_format, std::uint8_t> out;
  quantize_options options;  ///< `rule` is set
};

/// What a backend is asked to unpack; already checked.
template <real T>
struct dequantize_job {
  packed_view<any_format> in;
  batch_view<T> out;
};

/// What a backend is asked to round-trip; already checked.
template <real T>
struct fake_quantize_job {
  batch_view<const T> in;
  batch_view<T> out;
  any_format format;
  quantize_options options;  ///< `rule` is set
};

}  // namespace detail
}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
