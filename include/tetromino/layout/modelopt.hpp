#pragma once

#include "../detail/macros_off.hpp"

#include "../detail/layout.hpp"  // check_layout_shape
#include "../packed.hpp"         // packed, packed_view, packed_like

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <span>         // std::span
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE::layout {

/// A ModelOpt checkpoint's tensors, NVFP4: `weight` u8 [matrices, rows, K / 2], `weight_scale` F8_E4M3 [matrices, rows,
/// K / 16] and `weight_scale_2` f32, one for all matrices or one for each, in decode sense: values are
/// code * weight_scale * weight_scale_2.
struct modelopt_view {
  std::span<const std::uint8_t> weight{};
  std::span<const std::uint8_t> weight_scale{};
  std::span<const float> weight_scale_2{};
};

}  // namespace TETROMINO_NAMESPACE::layout

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline result<void> check_modelopt(const packed_shape& shape, const layout::modelopt_view& view) {
  constexpr std::string_view name = "modelopt";
  if (auto fits = check_layout_shape(name, shape, {nvfp4{}}, 16); !fits) return fits;
  if (auto fits = check_layout_size(name, "weight", shape.code_bytes(), view.weight.size()); !fits) return fits;
  if (auto fits = check_layout_size(name, "weight_scale", shape.scale_bytes(), view.weight_scale.size()); !fits) {
    return fits;
  }
  return check_layout_tensor_scales(name, "weight_scale_2", shape, view.weight_scale_2.size());
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

/// Linear storage as the tensors of a ModelOpt checkpoint, without a copy. Fails with errc::invalid_argument for
/// another format than nvfp4, errc::shape_mismatch for K that is no multiple of 16.
template <packed_like Storage>
[[nodiscard]] result<modelopt_view> try_as_modelopt(const Storage& storage) {
  const auto in = detail::as_packed(storage);
  const modelopt_view out{in.codes, in.scales, in.tensor_scales};
  if (auto fits = detail::check_modelopt(in.shape(), out); !fits) return fits.error();
  return out;
}
template <packed_like Storage>
[[nodiscard]] modelopt_view as_modelopt(const Storage& storage) {
  return try_as_modelopt(storage).value();
}

/// The tensors of a ModelOpt checkpoint as linear storage [matrices, rows, cols], without a copy. Fails as
/// `as_modelopt` does, and for tensors of another size.
[[nodiscard]] inline result<packed_view<nvfp4>> try_from_modelopt(modelopt_view in, std::size_t matrices,
                                                                  std::size_t rows, std::size_t cols) {
  if (auto fits = detail::check_modelopt({nvfp4{}, matrices, rows, cols}, in); !fits) return fits.error();
  return packed_view<nvfp4>{nvfp4{}, matrices, rows, cols, in.weight, in.weight_scale, {}, in.weight_scale_2};
}
[[nodiscard]] inline packed_view<nvfp4> from_modelopt(modelopt_view in, std::size_t matrices, std::size_t rows,
                                                      std::size_t cols) {
  return try_from_modelopt(in, matrices, rows, cols).value();
}

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA

#include "../detail/macros_back.hpp"
