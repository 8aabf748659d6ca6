#pragma once

#include "../activations.hpp"  // int8_view
#include "../execution.hpp"    // executor_ref
#include "../repacked.hpp"     // repacked_view, panel_at
#include "float_state.hpp"     // default_float_state
#include "row.hpp"             // packed_row

#include <algorithm>  // std::min, std::max
#include <bit>        // std::countr_zero, std::bit_floor
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <limits>     // std::numeric_limits
#include <span>       // std::span

namespace TETROMINO_NAMESPACE::detail {

/// Packed weights in either order. Of repacked ones `codes` is the data; scales and macros are there, too.
struct weights_view : packed_view<any_format> {
  bool is_repacked = false;

  [[nodiscard]] TETROMINO_ABI constexpr repacked_shape repacked_sizes() const noexcept { return {shape()}; }
};
inline namespace TETROMINO_ISA {

template <packed_like Weights>
weights_view as_weights(const Weights& weights) noexcept {
  return {as_packed(weights), false};
}
template <repacked_like Weights>
weights_view as_weights(const Weights& weights) noexcept {
  const repacked_view w = as_repacked(weights);
  return {{w.format, w.matrices, w.rows, w.cols, w.data, {}, {}, w.tensor_scales}, true};
}
inline result<void> check_storage(const weights_view& w) {
  if (!w.is_repacked) return check_storage(static_cast<const packed_view<any_format>&>(w));
  return check_storage(repacked_view{w.format, w.matrices, w.rows, w.cols, w.codes, w.tensor_scales});
}

}  // namespace TETROMINO_ISA

/// What a backend is asked to multiply; already checked. X is one of the views of as_activations.
template <class X, real Out>
struct matmul_job {
  X x;                                         ///< [rows, K], counted through all matrices of a batch
  weights_view weights;                        ///< [E, N, K]
  std::span<const std::uint32_t> row_offsets;  ///< rows row_offsets[e] … row_offsets[e + 1] − 1 meet matrix e
  matrix_view<Out> out;                        ///< [rows, N]
};

/// A piece of a job: rows of activations that meet some rows of one weight matrix.
struct matmul_tile {
  std::size_t matrix;
  std::size_t first_row, last_row;
  std::size_t first_col, last_col;  ///< columns of the output, rows of the weights
};

/// The types of elements, where they are no template parameter: only loading and storing have to know them.
enum class real_type : std::uint8_t { float32, half, bfloat16 };
template <real T>
inline constexpr real_type type_of = std::is_same_v<T, float>  ? real_type::float32
                                     : std::is_same_v<T, half> ? real_type::half
                                                               : real_type::bfloat16;
/// Calls f<T>() for the type.
template <class F>
TETROMINO_INLINE void with_type(real_type type, const F& f) {
  if (type == real_type::float32) return f.template operator()<float>();
  if (type == real_type::half) return f.template operator()<half>();
  f.template operator()<bfloat16>();
}

/// Rows of elements of some type, counted through all matrices of a batch. Void is const for rows that are read.
template <class Void>
struct real_rows {
  template <class T>
  using element = std::conditional_t<std::is_const_v<Void>, const T, T>;

  Void* data;
  real_type type;
  std::size_t rows, row_stride, matrix_stride;  ///< of one matrix, in elements

  template <real T>
  TETROMINO_ABI TETROMINO_INLINE element<T>* row(std::size_t m) const noexcept {
    return static_cast<element<T>*>(data) + m / rows * matrix_stride + m % rows * row_stride;
  }
};

/// Rows of integers with a scale for each block: 8-bit activations, or packed ones.
struct integer_rows {
  bool are_packed;
  int8_view<> int8;
  packed_view<any_format> packed;

  /// The block under one scale, and the macro block; 0 where there is none.
  [[nodiscard]] TETROMINO_ABI TETROMINO_INLINE any_format blocks() const noexcept {
    return are_packed ? packed.format : any_format{scale_type::e8m0, int8_view<>::block, 0};
  }
};

/// A job as kernels see it, whatever its types: Rows are real_rows or integer_rows.
template <class Rows>
struct matmul_product {
  Rows x;
  weights_view weights;
  real_rows<void> out;
};
using float_product = matmul_product<real_rows<const void>>;
using integer_product = matmul_product<integer_rows>;

inline namespace TETROMINO_ISA {

/// The rows of a view, as kernels see them.
template <class T>
constexpr auto rows_of(const batch_view<T>& x) noexcept {
  using pointer = std::conditional_t<std::is_const_v<T>, const void, void>;
  return real_rows<pointer>{x.data, type_of<std::remove_const_t<T>>, x.rows, x.row_stride, x.matrix_stride};
}
inline integer_rows rows_of(const int8_view<>& x) noexcept { return {false, x, {}}; }
inline integer_rows rows_of(const packed_view<any_format>& x) noexcept { return {true, {}, x}; }

/// Row m of activations, counted through all matrices of a batch.
struct int8_row {
  const std::int8_t* values;
  const float* scales;
};
TETROMINO_INLINE int8_row activation_row(const int8_view<>& x, std::size_t m) noexcept {
  return {x.values.data() + m * x.cols, x.scales.data() + m * x.blocks_per_row()};
}
TETROMINO_INLINE packed_row<const std::uint8_t> weight_row(const packed_view<any_format>& w, std::size_t e,
                                                           std::size_t r) noexcept {
  return {w.row_codes(e, r), w.row_scales(e, r), w.row_macros(e, r), w.tensor_scale(e)};
}
TETROMINO_INLINE packed_row<const std::uint8_t> activation_row(const packed_view<any_format>& x,
                                                               std::size_t m) noexcept {
  return weight_row(x, m / x.rows, m % x.rows);
}

/// Where the panel of column k, a multiple of 32, of the group of row r of repacked weights begins.
TETROMINO_INLINE const std::uint8_t* panel_of(const weights_view& w, std::size_t e, std::size_t r,
                                              std::size_t k) noexcept {
  return w.codes.data() + group_at(w.repacked_sizes(), e, r) + panel_at(w.format, k);
}

/// Bytes that read_row needs for n columns.
TETROMINO_INLINE std::size_t row_buffer_size(const weights_view& w, std::size_t n) noexcept {
  const packed_shape piece{w.format, 1, 1, n};
  return w.is_repacked ? piece.code_bytes() + piece.scale_bytes() + piece.macro_bytes() : 0;
}
/// Columns k ... k + n - 1 of row r of matrix e as they lie in the linear layout, where k is a multiple of every block;
/// repacked weights are copied into `buffer`.
TETROMINO_INLINE packed_row<const std::uint8_t> read_row(const weights_view& w, std::size_t e, std::size_t r,
                                                         std::size_t k, std::size_t n, std::uint8_t* buffer) noexcept {
  const std::size_t block = k / w.format.block, macro = w.format.macro_block == 0 ? 0 : k / w.format.macro_block;
  if (!w.is_repacked) {
    const packed_row<const std::uint8_t> row = weight_row(w, e, r);
    return {row.codes + k / 2, row.scales + block, row.macros + macro, row.tensor_scale};
  }
  const packed_shape piece{w.format, 1, 1, n};
  std::uint8_t *scales = buffer + piece.code_bytes(), *macros = scales + piece.scale_bytes();
  gather_row(w.format, r, k, n, panel_of(w, e, r, k), {buffer, scales, macros, 1.0f});
  return {buffer, scales, macros, w.tensor_scale(e)};
}

/// The smaller of two block sizes.
constexpr std::size_t common_block(std::size_t a, std::size_t b) noexcept { return std::min(a, b); }

/// How a product is cut into tiles: those of `rows` by `cols` that kernels are made for, smaller ones where few of
/// those would leave threads without work, or one of them would be a large part of it all.
class tiling {
 public:
  /// Powers of two.
  tiling(std::size_t rows, std::size_t cols, std::size_t depth, std::size_t outputs,
         std::span<const std::uint32_t> row_offsets, executor_ref executor)
      : rows_(rows), cols_(cols), outputs_(outputs), row_offsets_(row_offsets) {
    if (!executor.is_parallel()) return;
    std::size_t all = 0;
    for (std::size_t e = 0; e + 1 < row_offsets.size(); ++e) all += rows_of(e) == 0 ? 0 : cost(rows_of(e), outputs);
    // Fewer columns at once prepare the activations more often, so no more tiles than threads, at first; and none with
    // fewer products than take a few microseconds.
    constexpr std::size_t usual_threads = 16, least_work = std::size_t{1} << 19;
    const std::size_t threads = executor.threads() == 0 ? usual_threads : executor.threads();
    most_ = std::max((all + threads - 1) / threads, least_work / std::max<std::size_t>(1, depth));
  }

  [[nodiscard]] std::size_t count() const {
    std::size_t out = 0;
    for (std::size_t e = 0; e + 1 < row_offsets_.size(); ++e) out += tiles_of(e);
    return out;
  }
  /// Tile i of count().
  [[nodiscard]] matmul_tile tile(std::size_t i) const {
    std::size_t e = 0;
    for (std::size_t n; i >= (n = tiles_of(e)); ++e) i -= n;
    const shape s = shape_of(rows_of(e));
    const std::size_t across = parts(outputs_, s.cols);
    const std::size_t row = row_offsets_[e] + i / across * s.rows, col = i % across * s.cols;
    return {e, row, std::min<std::size_t>(row + s.rows, row_offsets_[e + 1]), col, std::min(col + s.cols, outputs_)};
  }

 private:
  struct shape {
    std::size_t rows, cols;
  };

  [[nodiscard]] std::size_t rows_of(std::size_t e) const { return std::size_t{row_offsets_[e + 1]} - row_offsets_[e]; }
  /// In products of one row: reading the weights takes as long as two.
  static constexpr std::size_t cost(std::size_t rows, std::size_t cols) { return (rows + 2) * cols; }
  static constexpr std::size_t parts(std::size_t n, std::size_t size) {
    return (n + size - 1) >> std::countr_zero(size);
  }

  /// The tiles of an expert with so many rows. Few rows have as many more columns. Fewer rows at once read the weights
  /// more often: only where fewer columns are not enough by half.
  [[nodiscard]] shape shape_of(std::size_t rows) const {
    constexpr std::size_t least_rows = 16, least_cols = 32;
    shape s{rows_, cols_ * std::bit_floor(rows_ / std::min(rows, rows_))};
    const auto is_above = [&](std::size_t most) {
      return cost(std::min(rows, s.rows), std::min(s.cols, outputs_)) > most;
    };
    while (s.cols > least_cols && is_above(most_)) s.cols /= 2;
    while (s.rows > least_rows && is_above(2 * most_)) s.rows /= 2;
    return s;
  }
  [[nodiscard]] std::size_t tiles_of(std::size_t e) const {
    const std::size_t rows = rows_of(e);
    if (rows == 0) return 0;
    const shape s = shape_of(rows);
    return parts(rows, s.rows) * parts(outputs_, s.cols);
  }

  std::size_t rows_, cols_, outputs_;
  std::span<const std::uint32_t> row_offsets_;
  std::size_t most_ = std::numeric_limits<std::size_t>::max() / 2;  // the most that a tile may cost
};

/// Multiplies on the CPU, tile by tile, with the kernels of one backend. An output depends on its own row of
/// activations and row of weights alone: kernels must not let the shape of a tile change the order of a sum.
template <class Kernels, class Product>
void multiply_tiles(executor_ref executor, const Product& product, std::span<const std::uint32_t> row_offsets,
                    const Kernels& kernels) {
  const tiling tiles(Kernels::tile_rows, Kernels::tile_cols, product.weights.cols, product.weights.rows, row_offsets,
                     executor);
  const auto task = [&](std::size_t i) {
    const default_float_state usual;
    kernels.multiply(product, tiles.tile(i));
  };
  executor(tiles.count(), task);
}
/// A job as kernels see it.
template <class X, real Out>
auto product_of(const matmul_job<X, Out>& job) {
  return matmul_product<decltype(rows_of(job.x))>{rows_of(job.x), job.weights, rows_of(batch_view<Out>(job.out))};
}
template <class Kernels, class X, real Out>
void matmul_cpu(executor_ref executor, const matmul_job<X, Out>& job) {
  multiply_tiles(executor, product_of(job), job.row_offsets, Kernels{});
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail
