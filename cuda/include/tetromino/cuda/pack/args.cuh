#pragma once

#include "../detail/checks.hpp"   // check_pieces
#include "../detail/divider.hpp"  // divider
#include "../detail/values.cuh"   // bit_cast

#include <tetromino/float16.hpp>  // half, bfloat16
#include <tetromino/options.hpp>  // quantize_options
#include <tetromino/scaling.hpp>  // scale_rule, carry_of

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// What the packing kernels are told.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Rows of a batch on the device, cut into chunks. Where they follow each other without gaps, all of them are one row.
struct row_map {
  std::uint32_t chunks_per_row = 0;  ///< a whole number of blocks, or of macro blocks
  std::uint32_t rows = 0;            ///< of all matrices together
  std::uint32_t cols = 0;
  divider by_chunks{};  ///< chunk → row
  divider by_rows{};    ///< row → matrix
  std::size_t row_stride = 0;
  std::size_t matrix_stride = 0;

  /// Where element [row, 0] lies, with row counted through all matrices.
  [[nodiscard]] __device__ std::size_t offset(std::uint32_t row) const {
    const std::uint32_t matrix = by_rows.quotient(row);
    return matrix * matrix_stride + (row - matrix * by_rows.divisor) * row_stride;
  }
};

struct pack_rules {
  [[nodiscard]] __device__ element_rounding rounding() const {
    return stochastic ? element_rounding::stochastic : element_rounding::nearest_even;
  }

  std::uint32_t block, macro_block;
  std::uint32_t macro_shift;    ///< log2 of macro_block
  std::uint32_t fine_elements;  ///< that share a factor of 2 bits; 0 where factors have 8 bits, or there are none
  std::uint32_t carry;          ///< of the closed-form MX rules
  bool min_error;               ///< search each block's exponent instead
  std::uint32_t macro_step;  ///< between the macro bytes that a search tries; 0: from the largest magnitude. Of factors
                             ///< of 2 bits a search tries all
  special_values special;
  tiny_block_scale tiny_blocks;
  bool stochastic;
  std::uint64_t seed;
};

/// A block-Hadamard rotation; size 0 for none.
struct rotation_args {
  std::uint32_t size;
  float scale;
  bool has_signs;
  std::uint64_t seed;
};

/// What the elements of the input are, and of a fake output.
enum class input_type : std::uint8_t { float32, float16, bfloat16 };
template <real T>
inline constexpr input_type input_type_of = input_type::float32;
template <>
inline constexpr input_type input_type_of<half> = input_type::float16;
template <>
inline constexpr input_type input_type_of<bfloat16> = input_type::bfloat16;

/// The elements to pack.
struct pack_input {
  const void* data;
  input_type type;
  std::uint32_t tile_cols;  ///< columns of the output that a thread block takes from a transposed input, else 0
  bool is_aligned;          ///< every row starts at a multiple of 16 bytes
  bool is_flat;             ///< all rows are one, of whole chunks
};

/// Where packed blocks go.
struct pack_output {
  std::uint8_t* codes;
  std::uint8_t* scales;
  std::uint8_t* macros;
  std::uint32_t blocks_per_row, macros_per_row;
  std::size_t swizzled_matrix;  ///< bytes of a matrix's scales in the 128x4 swizzle
  bool is_swizzled;
};

/// Where unpacked elements go in place of packed ones, if anywhere.
struct fake_output {
  void* data;
  row_map rows;
  bool is_aligned;
};

/// Tensor scales of NVFP4: null for other formats.
struct tensor_scale_args {
  const float* data;
  bool per_matrix;
};

/// A column weight, if it is not too small to count.
[[nodiscard]] __device__ inline float counted_weight(float w) {
  return w >= tetromino::detail::least_column_weight ? w : 0.0f;
}

/// Column weights of the errors that a search minimizes, or null.
struct column_weight_args {
  const float* data;
  std::size_t stride;  ///< between matrices
};

struct pack_args {
  pack_input in;
  row_map rows;
  std::size_t chunks;  ///< pieces of work: 16 elements, or a span in pack_spans_kernel
  pack_output out;
  fake_output fake;
  tensor_scale_args tensor_scales;
  column_weight_args weights;
  pack_rules rules;
  rotation_args rotation;
  std::uint64_t* rejected;
  std::uint64_t first_index;
};

/// Cuts the rows of a batch into pieces for one launch.
template <class T>
[[nodiscard]] result<row_map> map_rows(const batch_view<T>& x, std::size_t pieces_per_row) {
  if (auto fits = check_pieces(x.matrices, x.rows, pieces_per_row); !fits) return fits.error();
  row_map out;
  out.chunks_per_row = static_cast<std::uint32_t>(pieces_per_row);
  out.rows = static_cast<std::uint32_t>(x.matrices * x.rows);
  out.cols = static_cast<std::uint32_t>(x.cols);
  out.by_chunks = divider(out.chunks_per_row);
  out.by_rows = divider(static_cast<std::uint32_t>(x.rows));
  out.row_stride = x.row_stride;
  out.matrix_stride = x.matrix_stride;
  return out;
}

/// 2^n for n in [-126, 127].
[[nodiscard]] __device__ inline float power_of_two(int n) {
  return bit_cast<float>(static_cast<std::uint32_t>(n + 127) << 23);
}
/// 2^-n for n in [-127, 127].
[[nodiscard]] __device__ inline float inverse_power_of_two(int n) {
  return n < 127 ? power_of_two(-n) : bit_cast<float>(0x00400000u);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
