#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"               // TETROMINO_INLINE
#include "detail/for_each_row.hpp"  // for_each_row
#include "detail/sizes.hpp"         // check_sizes
#include "error.hpp"                // error, result
#include "options.hpp"              // device_policy
#include "packed.hpp"               // packed, packed_view, packed_shape

#include <algorithm>  // std::min, std::fill_n
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <cstring>    // std::memcpy
#include <span>       // std::span
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE {

/// Sizes of repacked weights: rows go in groups of 16, columns in panels of 32, both rounded up.
struct repacked_shape {
  static constexpr std::size_t group = 16;  ///< rows side by side
  static constexpr std::size_t panel = 32;  ///< columns side by side
  static constexpr std::size_t panel_bytes = group * panel / 2;

  packed_shape linear;

  [[nodiscard]] TETROMINO_ABI constexpr std::size_t groups() const noexcept {
    return (linear.rows + group - 1) / group;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t panels() const noexcept {
    return (linear.cols + panel - 1) / panel;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t code_bytes_per_group() const noexcept {
    return panels() * panel_bytes;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t scale_bytes_per_group() const noexcept {
    return panels() * (panel / linear.format.block) * group;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t macro_bytes_per_group() const noexcept {
    return linear.macros_per_row() * group;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t code_bytes() const noexcept {
    return linear.matrices * groups() * code_bytes_per_group();
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t scale_bytes() const noexcept {
    return linear.matrices * groups() * scale_bytes_per_group();
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t macro_bytes() const noexcept {
    return linear.matrices * groups() * macro_bytes_per_group();
  }
};

/// Repacked weights that somebody else owns; see repacked.
/// - codes [matrices, groups, panels, 4, 16, 4]: bytes 4 d ... 4 d + 3 of each of 16 rows, for d = 0 ... 3
/// - scales [matrices, groups, blocks, 16] and macros [matrices, groups, macros per row, 16]: a byte of each row
struct repacked_view {
  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::span<const std::uint8_t> codes{};
  std::span<const std::uint8_t> scales{};
  std::span<const std::uint8_t> macros{};
  std::span<const float> tensor_scales{};

  [[nodiscard]] TETROMINO_ABI constexpr repacked_shape shape() const noexcept {
    return {{format, matrices, rows, cols}};
  }
};

/// Packed weights in the order in which products on the CPU read them: the bytes of 16 rows side by side, so that a
/// vector is loaded as it is used. matmul and grouped_matmul take them in place of packed ones, with the same outcome.
/// It is the faster order for int8 and packed activations; float, half and bfloat16 ones have to undo it as they go and
/// are slower. It takes as many bytes, but that rows are rounded up to 16 and columns to 32.
struct repacked {
  /// Keeps codes where loads of 64 bytes do not straddle cache lines.
  struct alignas(64) line {
    std::uint8_t bytes[64];
    line() noexcept {}  // leaves them: zeroing would be vector code in a function of std::vector, which objects share
  };

  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::vector<line> codes;
  std::vector<std::uint8_t> scales;
  std::vector<std::uint8_t> macros;
  std::vector<float> tensor_scales;

  [[nodiscard]] TETROMINO_ABI repacked_shape shape() const noexcept { return {{format, matrices, rows, cols}}; }

  /// All bytes of the storage, tensor scales included.
  [[nodiscard]] TETROMINO_ABI std::size_t bytes() const noexcept {
    return codes.size() * sizeof(line) + scales.size() + macros.size() + tensor_scales.size() * sizeof(float);
  }

  [[nodiscard]] TETROMINO_ABI repacked_view view() const noexcept {
    const std::span<const std::uint8_t> bytes(reinterpret_cast<const std::uint8_t*>(codes.data()),
                                              codes.size() * sizeof(line));
    return {format, matrices, rows, cols, bytes, scales, macros, tensor_scales};
  }
};

namespace detail::inline TETROMINO_ISA {

inline repacked_view as_repacked(const repacked_view& view) noexcept { return view; }
inline repacked_view as_repacked(const repacked& storage) noexcept { return storage.view(); }

/// Says which buffer does not fit the shape, if one does not.
inline result<void> check_storage(const repacked_view& view) {
  const repacked_shape shape = view.shape();
  const auto expect = [](const char* buffer, std::size_t expected, std::size_t got) -> result<void> {
    if (expected == got) return {};
    return error(errc::shape_mismatch, text("repacked storage: ", buffer, " needs ", expected, " entries, got ", got));
  };
  if (auto known = check_format(view.format); !known) return known;
  if (auto fits = check_sizes(view.matrices, view.rows, view.cols); !fits) return fits;
  if (auto fits = expect("codes", shape.code_bytes(), view.codes.size()); !fits) return fits;
  if (auto fits = expect("scales", shape.scale_bytes(), view.scales.size()); !fits) return fits;
  if (auto fits = expect("macros", shape.macro_bytes(), view.macros.size()); !fits) return fits;
  const std::size_t tensor_scales = view.tensor_scales.size();
  if (view.format.scale == scale_type::e8m0) return expect("tensor_scales", 0, tensor_scales);
  return tensor_scales == view.matrices ? result<void>{} : expect("tensor_scales", 1, tensor_scales);
}

/// Bytes [n] of a row to or from every sixteenth place.
TETROMINO_INLINE void spread_row(const std::uint8_t* row, std::size_t n, std::uint8_t* out) {
  for (std::size_t i = 0; i < n; ++i) out[i * repacked_shape::group] = row[i];
}
TETROMINO_INLINE void gather_row(const std::uint8_t* in, std::size_t n, std::uint8_t* row) {
  for (std::size_t i = 0; i < n; ++i) row[i] = in[i * repacked_shape::group];
}
/// The same of codes, four bytes at a time. Blocks of 16 and 32 have whole fours.
TETROMINO_INLINE void spread_codes(const std::uint8_t* row, std::size_t n, std::uint8_t* out) {
  for (std::size_t i = 0; i < n; i += 4) std::memcpy(out + i * repacked_shape::group, row + i, 4);
}
TETROMINO_INLINE void gather_codes(const std::uint8_t* in, std::size_t n, std::uint8_t* row) {
  for (std::size_t i = 0; i < n; i += 4) std::memcpy(row + i, in + i * repacked_shape::group, 4);
}

/// Where row r of matrix e begins in each buffer of repacked storage; 0 in an empty one, which may have no address.
struct repacked_place {
  std::size_t codes, scales, macros;
};
TETROMINO_INLINE repacked_place place_of(const repacked_shape& shape, std::size_t e, std::size_t r) {
  if (shape.linear.cols == 0) return {0, 0, 0};
  const std::size_t group = e * shape.groups() + r / repacked_shape::group, lane = r % repacked_shape::group;
  return {group * shape.code_bytes_per_group() + 4 * lane, group * shape.scale_bytes_per_group() + lane,
          shape.linear.format.macro_block == 0 ? 0 : group * shape.macro_bytes_per_group() + lane};
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Anything that can be read as repacked weights.
template <class Storage>
concept repacked_like = requires(const Storage& storage) {
  detail::as_repacked(storage);
};

/// Orders packed weights [matrices, rows, cols] for products on the CPU; see repacked. Errors: shape_mismatch.
template <class Policy, packed_like Weights>
  requires(!device_policy<Policy>)
result<repacked> try_repack(const Policy& policy, const Weights& weights) {
  const packed_view<any_format> w = detail::as_packed(weights);
  if (auto fits = detail::check_storage(w); !fits) return fits.error();
  repacked out;
  out.format = w.format, out.matrices = w.matrices, out.rows = w.rows, out.cols = w.cols;
  const repacked_shape shape = out.shape();
  out.codes.resize(shape.code_bytes() / sizeof(repacked::line));
  // Past the last row and column E8M0 is 1: its code 0 is no normal float, and slow to multiply with.
  out.scales.assign(shape.scale_bytes(), w.format.scale == scale_type::e8m0 ? 127 : 0);
  out.macros.resize(shape.macro_bytes());
  out.tensor_scales.assign(w.tensor_scales.begin(), w.tensor_scales.end());
  auto* codes = reinterpret_cast<std::uint8_t*>(out.codes.data());
  std::fill_n(codes, shape.code_bytes(), std::uint8_t{0});
  // Rows of a group share cache lines, so that a task takes all of them.
  detail::for_each_row(
      policy.executor, w.matrices * shape.groups(), w.cols * repacked_shape::group, [&](std::size_t i) {
        const std::size_t e = i / shape.groups(), first = i % shape.groups() * repacked_shape::group;
        for (std::size_t r = first; r < std::min(w.rows, first + repacked_shape::group); ++r) {
          const detail::repacked_place to = detail::place_of(shape, e, r);
          detail::spread_codes(w.row_codes(e, r), shape.linear.code_bytes_per_row(), codes + to.codes);
          detail::spread_row(w.row_scales(e, r), shape.linear.blocks_per_row(), out.scales.data() + to.scales);
          detail::spread_row(w.row_macros(e, r), shape.linear.macros_per_row(), out.macros.data() + to.macros);
        }
      });
  return out;
}
/// try_repack, throwing its error.
template <class Policy, packed_like Weights>
  requires(!device_policy<Policy>)
[[nodiscard]] repacked repack(const Policy& policy, const Weights& weights) {
  return try_repack(policy, weights).value();
}

/// Orders packed weights for the products of a device, in storage that the caller provides: `out` is what the policy's
/// backend reads, such as a cuda::repacked_view, and says the order. A backend attaches by declaring repack_on for its
/// policy and storage in the policy's namespace. Errors: shape_mismatch; those of the backend.
template <class Policy, packed_like Weights, class Out>
  requires(device_policy<Policy>)
[[nodiscard]] result<void> try_repack_to(const Policy& policy, const Weights& weights, const Out& out) {
  const packed_view<any_format> w = detail::as_packed(weights);
  static_assert(
      requires { repack_on(policy, w, out); },
      "no header that is included puts weights into this storage on this device: it takes a view that can be "
      "written, such as cuda::repacked_view<bfloat16, std::byte>");
  if (auto fits = detail::check_storage(w); !fits) return fits;
  return repack_on(policy, w, out);
}
/// try_repack_to, throwing its error.
template <class Policy, packed_like Weights, class Out>
  requires(device_policy<Policy>)
void repack_to(const Policy& policy, const Weights& weights, const Out& out) {
  try_repack_to(policy, weights, out).value();
}

/// The inverse of repack: the same bytes in the linear layout. Errors: shape_mismatch.
template <class Policy, repacked_like Weights>
  requires(!device_policy<Policy>)
result<packed<any_format>> try_to_packed(const Policy& policy, const Weights& weights) {
  const repacked_view w = detail::as_repacked(weights);
  if (auto fits = detail::check_storage(w); !fits) return fits.error();
  packed<any_format> out(w.format, w.matrices, w.rows, w.cols);
  out.tensor_scales.assign(w.tensor_scales.begin(), w.tensor_scales.end());
  const repacked_shape shape = w.shape();
  const auto to = out.view();
  detail::for_each_row(policy.executor, w.matrices * w.rows, w.cols, [&](std::size_t i) {
    const std::size_t e = i / w.rows, r = i % w.rows;
    const detail::repacked_place from = detail::place_of(shape, e, r);
    detail::gather_codes(w.codes.data() + from.codes, shape.linear.code_bytes_per_row(), to.row_codes(e, r));
    detail::gather_row(w.scales.data() + from.scales, shape.linear.blocks_per_row(), to.row_scales(e, r));
    detail::gather_row(w.macros.data() + from.macros, shape.linear.macros_per_row(), to.row_macros(e, r));
  });
  return out;
}
/// try_to_packed, throwing its error.
template <class Policy, repacked_like Weights>
  requires(!device_policy<Policy>)
[[nodiscard]] packed<any_format> to_packed(const Policy& policy, const Weights& weights) {
  return try_to_packed(policy, weights).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
