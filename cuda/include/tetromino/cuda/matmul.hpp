#pragma once

#include "launch.hpp"  // is_aligned
#include "stream.hpp"  // stream

#include <tetromino/error.hpp>    // error, result
#include <tetromino/float16.hpp>  // half, bfloat16
#include <tetromino/matrix.hpp>   // matrix_view
#include <tetromino/packed.hpp>   // packed_view

#include <concepts>  // std::same_as
#include <cstddef>   // std::size_t, std::byte
#include <cstdint>   // std::uint32_t
#include <span>      // std::span

/// Activations of 16 bits times packed 4-bit weights (W4A16): weights are decoded in registers on their way into the
/// tensor cores, so that a product reads 4-bit weights from memory and nothing else of their size.
namespace TETROMINO_NAMESPACE::cuda {

/// The activation types of the products.
template <class T>
concept activation = std::same_as<T, half> || std::same_as<T, bfloat16>;

/// How the rows of a gated layer's two projections lie in its weights [2 n, K], where they do: a product with such
/// weights gives silu(gate) * up, [M, n].
enum class gating_rows : std::uint8_t {
  none,         ///< one projection
  halves,       ///< all gate rows, then all up rows
  interleaved,  ///< gate and up rows in turn (gpt-oss)
};

/// Sizes of weights [matrices, rows, cols] in the order in which the products read them: tiles of 64 rows by 64 columns
/// whose codes lie as the tensor cores' lanes want them, each with its block scales; a float for each row; and the
/// macro-block bytes.
struct prepared_shape {
  any_format format{};
  std::size_t matrices = 0;
  std::size_t rows = 0;
  std::size_t cols = 0;
  gating_rows gating = gating_rows::none;

  [[nodiscard]] constexpr std::size_t row_tiles() const noexcept { return (rows + 63) / 64; }
  /// An even number, so that a product can take two tiles at a time.
  [[nodiscard]] constexpr std::size_t col_tiles() const noexcept { return (cols + 127) / 128 * 2; }
  [[nodiscard]] constexpr std::size_t tile_bytes() const noexcept { return 64 * 64 / 2 + 64 * 64 / format.block; }
  /// Columns of a macro block as it is stored: one of 64 columns is two of 32, which spares the products a case.
  [[nodiscard]] constexpr std::size_t stored_macro_block() const noexcept {
    return format.macro_block == 64 ? 32 : static_cast<std::size_t>(format.macro_block);
  }
  [[nodiscard]] constexpr std::size_t macros_per_row() const noexcept {
    const std::size_t macro_block = stored_macro_block();
    return macro_block == 0 ? 0 : (col_tiles() * 64 + macro_block - 1) / macro_block;
  }
  /// Where the row factors and the macro bytes start.
  [[nodiscard]] constexpr std::size_t factors_at() const noexcept {
    return (matrices * row_tiles() * col_tiles() * tile_bytes() + 127) / 128 * 128;
  }
  [[nodiscard]] constexpr std::size_t macros_at() const noexcept {
    return factors_at() + matrices * row_tiles() * 64 * sizeof(float);
  }
  /// Bytes of prepared weights.
  [[nodiscard]] constexpr std::size_t bytes() const noexcept {
    return macros_at() + matrices * row_tiles() * macros_per_row() * 64;
  }
  /// Columns of a product.
  [[nodiscard]] constexpr std::size_t outputs() const noexcept { return gating == gating_rows::none ? rows : rows / 2; }

  friend constexpr bool operator==(const prepared_shape&, const prepared_shape&) = default;
};

/// Weights in that order, for activations of type T, in device memory that somebody else owns.
template <activation T>
struct prepared_weights {
  prepared_shape shape{};
  std::span<std::byte> data{};
};

/// What a product does with its sums.
struct matmul_options {
  /// Added to each output before anything else, in device memory: [matrices, rows] of the weights. Empty: nothing.
  std::span<const float> bias{};
  /// Whether nothing that may still run in the stream writes the weights: then a product of one matrix starts to read
  /// them while the kernel before it ends. (CUDA Programming Guide, "Programmatic Dependent Launch")
  bool settled_weights = false;
};

namespace detail {

struct matmul_job_base {
  prepared_shape shape;
  const std::byte* weights;
  const std::uint32_t* row_offsets;  ///< device memory [matrices + 1], or null for one matrix
  std::size_t row_count;
  matmul_options options;
  bool portable;  ///< the kernel for every GPU, also where there is a faster one
};

template <activation T>
struct matmul_job : matmul_job_base {
  matrix_view<const T> x;
  matrix_view<T> out;
};

template <activation T>
result<void> prepare(const stream& s, const packed_view<any_format>& w, const prepared_shape& shape, std::byte* out);
template <activation T>
result<void> matmul(const stream& s, const matmul_job<T>& job);

template <activation T>
[[nodiscard]] result<void> check_product(const prepared_weights<T>& w, const matrix_view<const T>& x,
                                         const matrix_view<T>& out, const matmul_options& options) {
  using tetromino::detail::text;
  if (x.cols != w.shape.cols) {
    return error(errc::shape_mismatch,
                 text("matmul: the activations have ", x.cols, " columns, the weights ", w.shape.cols));
  }
  if (out.rows != x.rows || out.cols != w.shape.outputs()) {
    return error(errc::shape_mismatch, text("matmul: the product is [", x.rows, ", ", w.shape.outputs(),
                                            "], the output [", out.rows, ", ", out.cols, "]"));
  }
  if (w.data.size() != w.shape.bytes() || !is_aligned(w.data.data(), 128)) {
    return error(errc::shape_mismatch, text("matmul: prepared weights need ", w.shape.bytes(),
                                            " bytes at a multiple of 128, got ", w.data.size()));
  }
  if (const std::size_t n = options.bias.size(); n != 0 && n != w.shape.matrices * w.shape.rows) {
    return error(errc::shape_mismatch, text("matmul: the bias needs ", w.shape.matrices * w.shape.rows,
                                            " entries, one for each row of the weights, got ", n));
  }
  if (x.rows >= std::size_t{1} << 31 || w.shape.rows >= std::size_t{1} << 31 || x.cols >= std::size_t{1} << 31) {
    return error(errc::shape_mismatch, "matmul: expected fewer than 2^31 rows and columns");
  }
  return {};
}

}  // namespace detail

/// Puts packed weights [matrices, rows, cols] of any format into the order that products with activations of type T
/// read; once, when a model is loaded. out.shape says the gating, and has the format and the sizes of `w`.
///
/// With bfloat16 activations nothing is rounded. With half, a block whose scale is more than 2^24 below the largest of
/// its row loses low bits, which are below 2^-24 of the row's largest weight. Errors: shape_mismatch; device.
template <activation T, packed_like Packed>
[[nodiscard]] result<void> try_prepare(const stream& s, const Packed& w, const prepared_weights<T>& out) {
  using tetromino::detail::text;
  const packed_view<any_format> from = tetromino::detail::as_packed(w);
  if (auto fits = tetromino::detail::check_storage(from); !fits) return fits;
  const prepared_shape& shape = out.shape;
  if (!(shape.format == from.format) || shape.matrices != from.matrices || shape.rows != from.rows ||
      shape.cols != from.cols) {
    return error(errc::shape_mismatch, text("prepare: the weights are [", from.matrices, ", ", from.rows, ", ",
                                            from.cols, "], the prepared shape says [", shape.matrices, ", ", shape.rows,
                                            ", ", shape.cols, "], or another format"));
  }
  if (shape.gating != gating_rows::none && shape.rows % 2 != 0) {
    return error(errc::shape_mismatch, text("prepare: gate and up rows come in pairs, got ", shape.rows, " rows"));
  }
  if (out.data.size() != shape.bytes() || !detail::is_aligned(out.data.data(), 128)) {
    return error(errc::shape_mismatch, text("prepare: the prepared weights need ", shape.bytes(),
                                            " bytes at a multiple of 128, got ", out.data.size()));
  }
  return detail::prepare<T>(s, from, shape, out.data.data());
}

/// out[m, n] = Σ_k x[m, k] · w[n, k], for one matrix of weights; or silu(gate) · up, as the weights were prepared. Sums
/// run in float, in an order that depends on the shapes and the GPU alone, so that results repeat; a macro-block factor
/// multiplies partial sums. Errors: shape_mismatch; device.
template <activation T>
[[nodiscard]] result<void> try_matmul(const stream& s, matrix_view<const T> x, const prepared_weights<T>& w,
                                      matrix_view<T> out, const matmul_options& options = {}) {
  if (auto fits = detail::check_product(w, x, out, options); !fits) return fits;
  if (w.shape.matrices != 1) {
    return error(errc::shape_mismatch, tetromino::detail::text("matmul: expected one weight matrix, got ",
                                                               w.shape.matrices, "; grouped_matmul takes a batch"));
  }
  return detail::matmul(s, detail::matmul_job<T>{{w.shape, w.data.data(), nullptr, x.rows, options, false}, x, out});
}

/// The same for the rows of experts: row m of x belongs to the expert e with row_offsets[e] <= m < row_offsets[e + 1].
/// `row_offsets` is device memory, matrices + 1 entries that ascend from 0 to x.rows, and is not looked at before the
/// launch. Errors: shape_mismatch; device.
template <activation T>
[[nodiscard]] result<void> try_grouped_matmul(const stream& s, matrix_view<const T> x, const prepared_weights<T>& w,
                                              std::span<const std::uint32_t> row_offsets, matrix_view<T> out,
                                              const matmul_options& options = {}) {
  if (auto fits = detail::check_product(w, x, out, options); !fits) return fits;
  if (row_offsets.size() != w.shape.matrices + 1) {
    return error(errc::shape_mismatch, tetromino::detail::text("matmul: expected ", w.shape.matrices + 1,
                                                               " row offsets, got ", row_offsets.size()));
  }
  return detail::matmul(
      s, detail::matmul_job<T>{{w.shape, w.data.data(), row_offsets.data(), x.rows, options, false}, x, out});
}

/// try_prepare, throwing its error.
template <activation T, packed_like Packed>
void prepare(const stream& s, const Packed& w, const prepared_weights<T>& out) {
  try_prepare(s, w, out).value();
}
/// try_matmul, throwing its error.
template <activation T>
void matmul(const stream& s, matrix_view<const T> x, const prepared_weights<T>& w, matrix_view<T> out,
            const matmul_options& options = {}) {
  try_matmul(s, x, w, out, options).value();
}
/// try_grouped_matmul, throwing its error.
template <activation T>
void grouped_matmul(const stream& s, matrix_view<const T> x, const prepared_weights<T>& w,
                    std::span<const std::uint32_t> row_offsets, matrix_view<T> out,
                    const matmul_options& options = {}) {
  try_grouped_matmul(s, x, w, row_offsets, out, options).value();
}

}  // namespace tetromino::cuda
