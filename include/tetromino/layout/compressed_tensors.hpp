#pragma once

#include "../detail/macros_off.hpp"

#include "../config.hpp"              // TETROMINO_EXPECTS
#include "../detail/float_state.hpp"  // default_float_state
#include "../detail/layout.hpp"       // check_layout_shape
#include "../packed.hpp"              // packed, packed_view, packed_like

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <limits>       // std::numeric_limits
#include <span>         // std::span
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE::layout {

/// A compressed-tensors checkpoint's tensors, MXFP4 with block 32 or NVFP4: `weight_packed` u8 [matrices, rows, K / 2],
/// `weight_scale` [matrices, rows, K / block] (u8 for MXFP4, F8_E4M3 for NVFP4), and for NVFP4 `weight_global_scale`
/// f32, one for all matrices or one for each, in encode sense: values are code * weight_scale / weight_global_scale.
struct compressed_tensors_view {
  std::span<const std::uint8_t> weight_packed{};
  std::span<const std::uint8_t> weight_scale{};
  std::span<const float> weight_global_scale{};
};

}  // namespace TETROMINO_NAMESPACE::layout

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline result<void> check_compressed_tensors(const packed_shape& shape, const layout::compressed_tensors_view& view) {
  constexpr std::string_view name = "compressed-tensors";
  const bool is_mx = is_plain_mxfp4(shape.format);
  if (auto fits = check_layout_shape(name, shape, {mxfp4{}, nvfp4{}}, shape.format.block); !fits) return fits;
  if (auto fits = check_layout_size(name, "weight_packed", shape.code_bytes(), view.weight_packed.size()); !fits) {
    return fits;
  }
  if (auto fits = check_layout_size(name, "weight_scale", shape.scale_bytes(), view.weight_scale.size()); !fits) {
    return fits;
  }
  if (is_mx) {
    if (auto fits = check_layout_scales(name, shape, view.weight_scale, largest_e8m0); !fits) return fits;
  }
  return check_layout_tensor_scales(name, "weight_global_scale", shape, view.weight_global_scale.size());
}

/// The inverse as a float; it is as exact as a float can be.
constexpr float reciprocal(float x) noexcept { return 1.0f / x; }

constexpr bool is_positive_finite(float x) noexcept { return x > 0.0f && x <= std::numeric_limits<float>::max(); }

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

/// Whether a tensor scale survives being stored as its inverse: 1 / (1 / scale) gives it back, bit for bit. About one
/// float in six does not, because floats lie denser on one side of the inverse than on the other.
[[nodiscard]] constexpr bool is_invertible(float scale) noexcept {
  return detail::is_positive_finite(scale) && detail::is_positive_finite(detail::reciprocal(scale)) &&
         detail::reciprocal(detail::reciprocal(scale)) == scale;
}

/// The tensor scale to quantize with when the result is going to be stored as compressed-tensors: `scale` itself if it
/// is invertible, otherwise a neighbour that is. Pre: 2^-126 <= scale <= 2^126.
[[nodiscard]] constexpr float invertible(float scale) {
  TETROMINO_EXPECTS(scale >= 0x1p-126f && scale <= 0x1p126f, "invertible needs a tensor scale from 2^-126 to 2^126",
                    scale);
  return detail::reciprocal(detail::reciprocal(scale));
}

/// Linear storage as the tensors of a compressed-tensors checkpoint, without a copy, except that the inverses of the
/// tensor scales are written to `global_scales`, as many as there are tensor scales. Fails with errc::invalid_argument
/// for another format than mxfp4 or nvfp4 and for a tensor scale that is not `invertible`, errc::shape_mismatch for K
/// that is no multiple of the block, errc::non_finite for a NaN block scale of MXFP4.
template <packed_like Storage>
[[nodiscard]] result<compressed_tensors_view> try_as_compressed_tensors(const Storage& storage,
                                                                        std::span<float> global_scales = {}) {
  const auto in = detail::as_packed(storage);
  const compressed_tensors_view out{in.codes, in.scales, in.tensor_scales};
  if (auto fits = detail::check_compressed_tensors(in.shape(), out); !fits) return fits.error();
  if (auto fits = detail::check_layout_size("compressed-tensors", "global_scales", in.tensor_scales.size(),
                                            global_scales.size());
      !fits) {
    return fits.error();
  }
  const detail::default_float_state usual;
  for (std::size_t i = 0; i < global_scales.size(); ++i) {
    if (!is_invertible(in.tensor_scales[i])) {
      return detail::layout_error(errc::invalid_argument, "compressed-tensors",
                                  detail::text("it stores the inverse of a tensor scale; expected a scale that its "
                                               "inverse gives back (see layout::invertible), got ",
                                               in.tensor_scales[i]));
    }
    global_scales[i] = detail::reciprocal(in.tensor_scales[i]);
  }
  return compressed_tensors_view{in.codes, in.scales, global_scales};
}
template <packed_like Storage>
[[nodiscard]] compressed_tensors_view as_compressed_tensors(const Storage& storage,
                                                            std::span<float> global_scales = {}) {
  return try_as_compressed_tensors(storage, global_scales).value();
}

/// The tensors of a compressed-tensors checkpoint as linear storage [matrices, rows, cols], without a copy, except that
/// the inverses of the global scales are written to `tensor_scales`, as many as there are global scales. These are the
/// decode scales that engines compute when they load such a file. Two neighbouring global scales can have the same
/// inverse: written again, a file keeps all codes, block scales and decoded values, but its global scale may become
/// that neighbour. Fails as `as_compressed_tensors` does, and for tensors of another size.
template <block_format Format>
[[nodiscard]] result<packed_view<Format>> try_from_compressed_tensors(Format format, compressed_tensors_view in,
                                                                      std::size_t matrices, std::size_t rows,
                                                                      std::size_t cols,
                                                                      std::span<float> tensor_scales = {}) {
  constexpr std::string_view name = "compressed-tensors";
  if (auto fits = detail::check_compressed_tensors({any_format(format), matrices, rows, cols}, in); !fits) {
    return fits.error();
  }
  if (auto fits = detail::check_layout_size(name, "tensor_scales", in.weight_global_scale.size(), tensor_scales.size());
      !fits) {
    return fits.error();
  }
  const detail::default_float_state usual;
  for (std::size_t i = 0; i < tensor_scales.size(); ++i) {
    const float global_scale = in.weight_global_scale[i];
    if (!detail::is_positive_finite(global_scale) || !detail::is_positive_finite(detail::reciprocal(global_scale))) {
      return detail::layout_error(
          errc::non_finite, name,
          detail::text("expected a positive, finite weight_global_scale with a finite inverse, got ", global_scale));
    }
    tensor_scales[i] = detail::reciprocal(global_scale);
  }
  return packed_view<Format>{format, matrices, rows, cols, in.weight_packed, in.weight_scale, {}, tensor_scales};
}
template <block_format Format>
[[nodiscard]] packed_view<Format> from_compressed_tensors(Format format, compressed_tensors_view in,
                                                          std::size_t matrices, std::size_t rows, std::size_t cols,
                                                          std::span<float> tensor_scales = {}) {
  return try_from_compressed_tensors(format, in, matrices, rows, cols, tensor_scales).value();
}

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA

#include "../detail/macros_back.hpp"
