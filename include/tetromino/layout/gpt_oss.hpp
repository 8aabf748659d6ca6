#pragma once

#include "../detail/macros_off.hpp"

#include "../detail/layout.hpp"  // check_layout_shape
#include "../packed.hpp"         // packed, packed_view, packed_like

#include <algorithm>    // std::copy, std::copy_n
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint32_t
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE::layout {

/// A gpt-oss checkpoint's tensors, MXFP4 with block 32: `*_blocks` u8 [matrices, rows, K / 32, 16] and `*_scales` u8
/// [matrices, rows, K / 32].
struct gpt_oss_view {
  std::span<const std::uint8_t> blocks{};
  std::span<const std::uint8_t> scales{};
};

}  // namespace TETROMINO_NAMESPACE::layout

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

inline result<void> check_gpt_oss(const packed_shape& shape, std::size_t blocks, std::span<const std::uint8_t> scales) {
  constexpr std::string_view name = "gpt-oss";
  if (auto fits = check_layout_shape(name, shape, {mxfp4{}}, 32); !fits) return fits;
  if (auto fits = check_layout_size(name, "blocks", shape.code_bytes(), blocks); !fits) return fits;
  if (auto fits = check_layout_size(name, "scales", shape.scale_bytes(), scales.size()); !fits) return fits;
  return check_layout_scales(name, shape, scales, largest_e8m0);
}

/// Says how two halves and the storage with their rows in turn do not fit together, if they do not.
template <class Half, class Whole>
result<void> check_interleaved(const Half& even, const Half& odd, const Whole& whole) {
  if (auto fits = check_storage(even); !fits) return fits;
  if (auto fits = check_storage(odd); !fits) return fits;
  if (auto fits = check_storage(whole); !fits) return fits;
  const packed_shape half = even.shape();
  packed_shape twice = half;
  twice.rows *= 2;
  const auto shape_of = [](const packed_shape& s) {
    const std::size_t macro = s.format.macro_block;
    return text('[', s.matrices, ", ", s.rows, ", ", s.cols, "] of ", name_of(s.format),
                macro == 0 ? std::string() : text(" with macro blocks of ", macro));
  };
  if (odd.shape() != half || whole.shape() != twice) {
    return layout_error(errc::shape_mismatch, "interleaved rows",
                        text("expected two of one shape and one of twice the rows, got ", shape_of(half), ", ",
                             shape_of(odd.shape()), " and ", shape_of(whole.shape())));
  }
  if (odd.tensor_scales.size() != even.tensor_scales.size() ||
      whole.tensor_scales.size() != even.tensor_scales.size()) {
    return layout_error(errc::shape_mismatch, "interleaved rows",
                        text("expected equally many tensor scales, got ", even.tensor_scales.size(), ", ",
                             odd.tensor_scales.size(), " and ", whole.tensor_scales.size()));
  }
  return {};
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) noexcept {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (bit_cast<std::uint32_t>(a[i]) != bit_cast<std::uint32_t>(b[i])) return false;
  }
  return true;
}

template <class View, class Visit>
void for_each_row_pair(const View& half, const Visit& visit) {
  if (half.codes.empty()) return;
  for (std::size_t e = 0; e < half.matrices; ++e) {
    for (std::size_t r = 0; r < half.rows; ++r) visit(e, r);
  }
}

template <class From, class To>
void copy_packed_row(const From& from, std::size_t from_e, std::size_t from_r, const To& to, std::size_t to_e,
                     std::size_t to_r) {
  const packed_shape shape = from.shape();
  std::copy_n(from.row_codes(from_e, from_r), shape.code_bytes_per_row(), to.row_codes(to_e, to_r));
  std::copy_n(from.row_scales(from_e, from_r), shape.blocks_per_row(), to.row_scales(to_e, to_r));
  std::copy_n(from.row_macros(from_e, from_r), shape.macros_per_row(), to.row_macros(to_e, to_r));
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA

namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA {

/// Linear storage as the tensors of a gpt-oss checkpoint, without a copy. Fails with errc::invalid_argument for another
/// format than mxfp4, errc::shape_mismatch for K that is no multiple of 32, errc::non_finite for a NaN block scale.
template <packed_like Storage>
[[nodiscard]] result<gpt_oss_view> try_as_gpt_oss(const Storage& storage) {
  const auto in = detail::as_packed(storage);
  if (auto fits = detail::check_gpt_oss(in.shape(), in.codes.size(), in.scales); !fits) return fits.error();
  return gpt_oss_view{in.codes, in.scales};
}
template <packed_like Storage>
[[nodiscard]] gpt_oss_view as_gpt_oss(const Storage& storage) {
  return try_as_gpt_oss(storage).value();
}

/// The tensors of a gpt-oss checkpoint as linear storage [matrices, rows, cols], without a copy. Fails as `as_gpt_oss`
/// does, and for tensors of another size.
[[nodiscard]] inline result<packed_view<mxfp4>> try_from_gpt_oss(gpt_oss_view in, std::size_t matrices,
                                                                 std::size_t rows, std::size_t cols) {
  const packed_shape shape{mxfp4{}, matrices, rows, cols};
  if (auto fits = detail::check_gpt_oss(shape, in.blocks.size(), in.scales); !fits) return fits.error();
  return packed_view<mxfp4>{mxfp4{}, matrices, rows, cols, in.blocks, in.scales};
}
[[nodiscard]] inline packed_view<mxfp4> from_gpt_oss(gpt_oss_view in, std::size_t matrices, std::size_t rows,
                                                     std::size_t cols) {
  return try_from_gpt_oss(in, matrices, rows, cols).value();
}

/// Takes rows in turn from two equally shaped [matrices, rows, cols] into one [matrices, 2 * rows, cols]: row 2r is row
/// r of `even`, row 2r + 1 is row r of `odd`. So gpt-oss stores gate (even) and up (odd) projections as one. Any
/// format; NVFP4 needs the same tensor scales on both sides. Fails with errc::shape_mismatch or errc::invalid_argument.
template <packed_like Even, packed_like Odd>
[[nodiscard]] result<void> try_interleave_rows(const Even& even, const Odd& odd,
                                               packed_view<any_format, std::uint8_t> out) {
  const auto first = detail::as_packed(even), second = detail::as_packed(odd);
  if (auto fits = detail::check_interleaved(first, second, out); !fits) return fits;
  if (!detail::same_bits(first.tensor_scales, second.tensor_scales)) {
    return detail::layout_error(errc::invalid_argument, "interleaved rows",
                                "expected the same tensor scales for both halves, got different ones");
  }
  std::copy(first.tensor_scales.begin(), first.tensor_scales.end(), out.tensor_scales.begin());
  detail::for_each_row_pair(first, [&](std::size_t e, std::size_t r) {
    detail::copy_packed_row(first, e, r, out, e, 2 * r);
    detail::copy_packed_row(second, e, r, out, e, 2 * r + 1);
  });
  return {};
}
template <packed_like Even, packed_like Odd>
void interleave_rows(const Even& even, const Odd& odd, packed_view<any_format, std::uint8_t> out) {
  try_interleave_rows(even, odd, out).value();
}

/// The other way: rows 0, 2, 4 ... of [matrices, 2 * rows, cols] to `even`, rows 1, 3, 5 ... to `odd`. Fails with
/// errc::shape_mismatch or errc::invalid_argument.
template <packed_like Storage>
[[nodiscard]] result<void> try_deinterleave_rows(const Storage& storage, packed_view<any_format, std::uint8_t> even,
                                                 packed_view<any_format, std::uint8_t> odd) {
  const auto in = detail::as_packed(storage);
  if (auto fits = detail::check_interleaved(even, odd, in); !fits) return fits;
  std::copy(in.tensor_scales.begin(), in.tensor_scales.end(), even.tensor_scales.begin());
  std::copy(in.tensor_scales.begin(), in.tensor_scales.end(), odd.tensor_scales.begin());
  detail::for_each_row_pair(even, [&](std::size_t e, std::size_t r) {
    detail::copy_packed_row(in, e, 2 * r, even, e, r);
    detail::copy_packed_row(in, e, 2 * r + 1, odd, e, r);
  });
  return {};
}
template <packed_like Storage>
void deinterleave_rows(const Storage& storage, packed_view<any_format, std::uint8_t> even,
                       packed_view<any_format, std::uint8_t> odd) {
  try_deinterleave_rows(storage, even, odd).value();
}

}  // namespace TETROMINO_NAMESPACE::layout::inline TETROMINO_ISA

#include "../detail/macros_back.hpp"
