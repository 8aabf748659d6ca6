#pragma once

#include "elements.cuh"  // row_map
#include "launch.hpp"    // check_pieces

#include <tetromino/float16.hpp>  // half, bfloat16
#include <tetromino/options.hpp>  // quantize_options
#include <tetromino/scaling.hpp>  // scale_rule, carry_of

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// What the packing kernels are told.
namespace TETROMINO_NAMESPACE::cuda::detail {

struct pack_rules {
  std::uint32_t block, macro_block;
  std::uint32_t macro_shift;  ///< log2 of macro_block
  std::uint32_t carry;        ///< of the closed-form MX rules
  bool min_error;             ///< search each block's exponent instead
  std::uint32_t macro_step;   ///< between the macro bytes that a search tries; 0: from the largest magnitude
  special_values special;
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

/// What the elements of the input are, and of `pack_args::fake`.
enum class input_type : std::uint8_t { float32, float16, bfloat16 };
template <real T>
inline constexpr input_type input_type_of = input_type::float32;
template <>
inline constexpr input_type input_type_of<half> = input_type::float16;
template <>
inline constexpr input_type input_type_of<bfloat16> = input_type::bfloat16;

struct pack_args {
  const void* in;
  std::uint8_t* codes;
  std::uint8_t* scales;
  std::uint8_t* macros;
  const float* tensor_scales;
  void* fake;  ///< where unpacked elements go, in place of packed ones, or null
  const float* weights;
  std::uint64_t* rejected;
  std::uint64_t first_index;
  row_map rows, fake_rows;
  std::size_t chunks;  ///< pieces of work: 16 elements, or a span in search_kernel
  std::size_t weights_stride, swizzled_matrix;
  std::uint32_t blocks_per_row, macros_per_row;
  std::uint32_t tile_cols;  ///< columns of the output that a thread block takes from a transposed input, else 0
  pack_rules rules;
  rotation_args rotation;
  input_type type;
  bool scale_per_matrix, is_aligned, is_fake_aligned, is_flat, is_swizzled;
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

/// Where the scale of row r, block c lies within its 128x4 swizzled matrix; see layout::swizzled_offset.
[[nodiscard]] __device__ inline std::size_t swizzled_at(std::uint32_t r, std::uint32_t c,
                                                        std::uint32_t scales_per_row) {
  const std::size_t tile = static_cast<std::size_t>(r / 128) * ((scales_per_row + 3) / 4) + c / 4;
  return tile * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4;
}

}  // namespace tetromino::cuda::detail
