#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"                 // TETROMINO_INLINE
#include "detail/for_each_row.hpp"    // for_each_row
#include "detail/page_allocator.hpp"  // page_allocator
#include "detail/row.hpp"             // packed_row
#include "detail/sizes.hpp"           // check_sizes
#include "error.hpp"                  // error, result
#include "options.hpp"                // device_policy
#include "packed.hpp"                 // packed, packed_view, packed_shape

#include <algorithm>  // std::min, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t
#include <cstring>    // std::memcpy
#include <span>       // std::span
#include <utility>    // std::move
#include <vector>     // std::vector

namespace TETROMINO_NAMESPACE {

/// Sizes of repacked weights: rows go in groups of 16, columns in panels of 32, both rounded up.
struct repacked_shape {
  static constexpr std::size_t group = 16;  ///< rows side by side
  static constexpr std::size_t panel = 32;  ///< columns side by side

  packed_shape linear;

  [[nodiscard]] TETROMINO_ABI constexpr std::size_t groups() const noexcept {
    return (linear.rows + group - 1) / group;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t panels() const noexcept {
    return (linear.cols + panel - 1) / panel;
  }
  /// Of scales and codes, without the macro bytes before some panels.
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t bytes_per_panel() const noexcept {
    return group * (panel / linear.format.block + panel / 2);
  }
  /// A multiple of 64.
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t bytes_per_group() const noexcept {
    return (panels() * bytes_per_panel() + linear.macros_per_row() * group + 63) / 64 * 64;
  }
  [[nodiscard]] TETROMINO_ABI constexpr std::size_t bytes() const noexcept {
    return linear.matrices * groups() * bytes_per_group();
  }
};

/// Repacked weights that somebody else owns; see repacked.
/// - data [matrices, groups, bytes_per_group]: panel after panel of 32 columns, then zeros. A panel is
///   - macros [16], if a macro block begins with its first column: a byte of each of 16 rows
///   - scales [32 / block, 16]
///   - codes [4, 16, 4]: bytes 4 d ... 4 d + 3 of each row, for d = 0 ... 3
struct repacked_view {
  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::span<const std::uint8_t> data{};
  std::span<const float> tensor_scales{};

  [[nodiscard]] TETROMINO_ABI constexpr repacked_shape shape() const noexcept {
    return {{format, matrices, rows, cols}};
  }
};

/// The pages of memory that storage is to have.
enum class memory_pages : std::uint8_t {
  usual,
  huge,  ///< Linux is asked for pages of 2 MiB (madvise) where storage is as large; elsewhere they are the usual ones
};

/// Packed weights in the order in which products on the CPU read them: one stream that has the bytes of 16 rows side by
/// side, so that a vector is loaded as it is used. matmul and grouped_matmul take them in place of packed ones, with
/// the same outcome. It is the faster order for int8 and packed activations, with AVX512_BF16 for bfloat16 ones too;
/// others, float and half, have to undo it as they go and are slower. It takes as many bytes, but that rows are rounded
/// up to 16, columns to 32 and 16 rows to 64 bytes.
struct repacked {
  /// Keeps groups where cache lines begin.
  struct alignas(64) line {
    std::uint8_t bytes[64];
    line() noexcept {}  // leaves them: zeroing would be vector code in a function of std::vector, which objects share
  };

  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::vector<line, detail::page_allocator<line>> data;
  std::vector<float> tensor_scales;

  TETROMINO_ABI repacked() = default;
  /// Of these parts.
  TETROMINO_ABI repacked(const any_format& format_, std::size_t matrices_, std::size_t rows_, std::size_t cols_,
                         std::vector<line, detail::page_allocator<line>> data_, std::vector<float> tensor_scales_)
      : format(format_),
        matrices(matrices_),
        rows(rows_),
        cols(cols_),
        data(std::move(data_)),
        tensor_scales(std::move(tensor_scales_)) {}
  // written out, since what a compiler adds has no tag (see TETROMINO_ABI), and may be too long to inline
  TETROMINO_ABI repacked(const repacked&) = default;
  TETROMINO_ABI repacked(repacked&&) = default;
  TETROMINO_ABI repacked& operator=(const repacked&) = default;
  TETROMINO_ABI repacked& operator=(repacked&&) = default;

  [[nodiscard]] TETROMINO_ABI repacked_shape shape() const noexcept { return {{format, matrices, rows, cols}}; }

  /// All bytes of the storage, tensor scales included.
  [[nodiscard]] TETROMINO_ABI std::size_t bytes() const noexcept {
    return data.size() * sizeof(line) + tensor_scales.size() * sizeof(float);
  }

  [[nodiscard]] TETROMINO_ABI repacked_view view() const noexcept {
    const std::span<const std::uint8_t> bytes(reinterpret_cast<const std::uint8_t*>(data.data()),
                                              data.size() * sizeof(line));
    return {format, matrices, rows, cols, bytes, tensor_scales};
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
    return error(errc::shape_mismatch, {"repacked storage: ", buffer, " needs ", expected, " entries, got ", got});
  };
  if (auto known = check_format(view.format); !known) return known;
  if (auto fits = check_sizes(view.matrices, view.rows, view.cols); !fits) return fits;
  if (auto fits = expect("data", shape.bytes(), view.data.size()); !fits) return fits;
  const std::size_t tensor_scales = view.tensor_scales.size();
  if (view.format.scale == scale_type::e8m0) return expect("tensor_scales", 0, tensor_scales);
  return tensor_scales == view.matrices ? result<void>{} : expect("tensor_scales", 1, tensor_scales);
}

/// Where the group that has row r of matrix e begins.
TETROMINO_INLINE std::size_t group_at(const repacked_shape& shape, std::size_t e, std::size_t r) {
  return (e * shape.groups() + r / repacked_shape::group) * shape.bytes_per_group();
}
/// Whether a macro block begins with column k.
TETROMINO_INLINE bool begins_macro_block(const any_format& format, std::size_t k) {
  return format.macro_block != 0 && (k & (format.macro_block - 1)) == 0;
}
/// Where the panel of column k, a multiple of 32, begins in its group.
TETROMINO_INLINE std::size_t panel_at(const any_format& format, std::size_t k) {
  const std::size_t macros = format.macro_block == 0 ? 0 : (k + format.macro_block - 1) / format.macro_block;
  return k / repacked_shape::panel * repacked_shape{{format, 1, 1, 0}}.bytes_per_panel() +
         macros * repacked_shape::group;
}

/// The parts of a panel; `macros` is null where no macro block begins.
template <class Byte>
struct panel_parts {
  Byte *macros, *scales, *codes;

  /// Where the next panel begins.
  [[nodiscard]] TETROMINO_ABI Byte* end() const noexcept {
    return codes + repacked_shape::group * repacked_shape::panel / 2;
  }
};
/// Those of the panel of column k, which begins at `panel`.
template <class Byte>
TETROMINO_INLINE panel_parts<Byte> parts_of(const any_format& format, std::size_t k, Byte* panel) {
  constexpr std::size_t group = repacked_shape::group;
  Byte* const scales = panel + (begins_macro_block(format, k) ? group : 0);
  return {scales == panel ? nullptr : panel, scales, scales + (format.block == 16 ? 2 * group : group)};
}

/// Calls copy(repacked bytes, linear bytes, count) for n columns of `rows`, which are `lane` and those after it of a
/// group and begin with column k at `panel`.
template <class Byte, class Linear, class Copy>
TETROMINO_INLINE void each_part(const any_format& format, std::size_t lane, std::size_t k, std::size_t n, Byte* panel,
                                std::span<const packed_row<Linear>> rows, const Copy& copy) {
  constexpr std::size_t group = repacked_shape::group, cols = repacked_shape::panel;
  const std::size_t all_blocks = (n + format.block - 1) / format.block, per_panel = cols / format.block;
  for (std::size_t first = 0, macro = 0; first < all_blocks; first += per_panel) {
    const panel_parts<Byte> parts = parts_of(format, k + first * format.block, panel);
    const std::size_t blocks = std::min(per_panel, all_blocks - first), bytes = blocks * format.block / 2;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const std::size_t l = lane + r;
      const packed_row<Linear>& row = rows[r];
      if (parts.macros != nullptr) copy(parts.macros + l, row.macros + macro, 1);
      for (std::size_t b = 0; b < blocks; ++b) copy(parts.scales + b * group + l, row.scales + first + b, 1);
      Linear* const codes = row.codes + first * format.block / 2;
      // Blocks of 16 and 32 have whole fours.
      copy(parts.codes + 4 * l, codes, 4);
      copy(parts.codes + 4 * (group + l), codes + 4, 4);
      if (bytes == 8) continue;
      copy(parts.codes + 4 * (2 * group + l), codes + 8, 4);
      copy(parts.codes + 4 * (3 * group + l), codes + 12, 4);
    }
    macro += parts.macros != nullptr;
    panel = parts.end();
  }
}
/// n columns of row r in the linear layout, which begin with column k at `panel` in its group.
TETROMINO_INLINE void gather_row(const any_format& format, std::size_t r, std::size_t k, std::size_t n,
                                 const std::uint8_t* panel, const packed_row<std::uint8_t>& out) {
  each_part(format, r % repacked_shape::group, k, n, panel, std::span(&out, 1),
            [](const std::uint8_t* there, std::uint8_t* here, std::size_t count)
                TETROMINO_INLINE_LAMBDA { std::memcpy(here, there, count); });
}

/// What a group has past the last row and column: zeros, under scales of 1 where those are E8M0, whose code 0 is no
/// normal float and slow to multiply with.
inline void clear_group(const repacked_shape& shape, std::uint8_t* group) {
  std::uint8_t* const end = group + shape.bytes_per_group();
  std::fill(group, end, std::uint8_t{0});
  if (shape.linear.format.scale != scale_type::e8m0) return;
  for (std::size_t k = 0; k < shape.linear.cols; k += repacked_shape::panel) {
    const auto parts = parts_of(shape.linear.format, k, group);
    std::fill(parts.scales, parts.codes, std::uint8_t{127});
    group = parts.end();
  }
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Anything that can be read as repacked weights.
template <class Storage>
concept repacked_like = requires(const Storage& storage) {
  detail::as_repacked(storage);
};

/// Orders packed weights [matrices, rows, cols] for products on the CPU; see repacked. Weights that caches do not hold
/// are read faster from huge pages; memory_pages::usual does without. Errors: shape_mismatch.
template <class Policy, packed_like Weights>
  requires(!device_policy<Policy>)
result<repacked> try_repack(const Policy& policy, const Weights& weights, memory_pages pages = memory_pages::huge) {
  const packed_view<any_format> w = detail::as_packed(weights);
  if (auto fits = detail::check_storage(w); !fits) return fits.error();
  const repacked_shape shape{w.shape()};
  constexpr std::size_t group = repacked_shape::group;
  // of its size at once: resize would hold code that moves lines, which objects share
  decltype(repacked::data) lines(shape.bytes() / sizeof(repacked::line),
                                 detail::page_allocator<repacked::line>(pages == memory_pages::huge));
  repacked out(w.format, w.matrices, w.rows, w.cols, std::move(lines),
               {w.tensor_scales.begin(), w.tensor_scales.end()});
  auto* const data = reinterpret_cast<std::uint8_t*>(out.data.data());
  // A task takes all rows of a group, which share cache lines.
  detail::for_each_row(policy.executor, w.matrices * shape.groups(), w.cols * group, [&](std::size_t i) {
    const std::size_t e = i / shape.groups(), first = i % shape.groups() * group,
                      last = std::min(w.rows, first + group);
    std::uint8_t* const to = data + i * shape.bytes_per_group();
    if (last - first < group || w.cols % repacked_shape::panel != 0) {
      detail::clear_group(shape, to);
    } else {
      std::fill(to + detail::panel_at(w.format, w.cols), to + shape.bytes_per_group(), std::uint8_t{0});
    }
    detail::packed_row<const std::uint8_t> rows[group];
    for (std::size_t r = first; r < last; ++r) {
      rows[r - first] = {w.row_codes(e, r), w.row_scales(e, r), w.row_macros(e, r), 1.0f};
    }
    detail::each_part(w.format, 0, 0, w.cols, to,
                      std::span<const detail::packed_row<const std::uint8_t>>(rows, last - first),
                      [](std::uint8_t* there, const std::uint8_t* here, std::size_t count)
                          TETROMINO_INLINE_LAMBDA { std::memcpy(there, here, count); });
  });
  return out;
}
/// try_repack, throwing its error.
template <class Policy, packed_like Weights>
  requires(!device_policy<Policy>)
[[nodiscard]] repacked repack(const Policy& policy, const Weights& weights, memory_pages pages = memory_pages::huge) {
  return try_repack(policy, weights, pages).value();
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
    detail::gather_row(w.format, r, 0, w.cols, w.data.data() + detail::group_at(shape, e, r),
                       {to.row_codes(e, r), to.row_scales(e, r), to.row_macros(e, r), 1.0f});
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
