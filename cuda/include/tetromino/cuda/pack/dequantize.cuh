#pragma once

#include <tetromino/cuda.hpp>  // stream

#include "decode.cuh"  // unpack
#include "args.cuh"    // map_rows

#include <tetromino/options.hpp>  // dequantize_job

#include <bit>      // std::bit_width
#include <cstdint>  // std::uint32_t

namespace TETROMINO_NAMESPACE::cuda::detail {

template <real T>
struct unpack_args {
  const std::uint8_t* codes;
  const std::uint8_t* scales;
  const std::uint8_t* macros;
  const float* tensor_scales;
  T* out;
  row_map rows;
  std::size_t chunks;
  std::uint32_t block_shift, macro_shift, blocks_per_row, macros_per_row;  ///< log2 of the blocks' sizes
  bool scale_per_matrix, is_aligned;
  bool is_flat;  ///< all rows are one, of whole chunks
};

template <unpack_rule Rule>
inline constexpr bool reads_macros = Rule == unpack_rule::mx_macro || Rule == unpack_rule::mx_fine;

/// One thread unpacks sixteen elements. `Flat`: all rows are one, of whole chunks.
template <real T, unpack_rule Rule, bool Flat>
__global__ void __launch_bounds__(256) unpack_kernel(const unpack_args<T> args) {
  const std::size_t c = static_cast<std::size_t>(blockIdx.x) * 256 + threadIdx.x;
  if (c >= args.chunks) return;
  std::size_t code_at, scale_at, macro_at = 0, out_at;
  std::uint32_t n = chunk_size, matrix = 0, in_row = static_cast<std::uint32_t>(c);
  if constexpr (Flat) {
    code_at = c * 8, out_at = c * 16;
    scale_at = c >> (args.block_shift - 4);
    if constexpr (reads_macros<Rule>) macro_at = c >> (args.macro_shift - 4);
  } else {
    const auto row = args.rows.by_chunks.quotient(static_cast<std::uint32_t>(c));
    in_row -= row * args.rows.chunks_per_row;
    const std::uint32_t col = in_row * chunk_size;
    const std::size_t first_block = static_cast<std::size_t>(row) * args.blocks_per_row;
    code_at = ((first_block << args.block_shift) + col) / 2;
    scale_at = first_block + (col >> args.block_shift);
    if constexpr (reads_macros<Rule>) {
      macro_at = static_cast<std::size_t>(row) * args.macros_per_row + (col >> args.macro_shift);
    }
    out_at = args.rows.offset(row) + col;
    n = min(chunk_size, args.rows.cols - col);
    if (args.scale_per_matrix) matrix = args.rows.by_rows.quotient(row);
  }
  const uint2 codes = __ldg(reinterpret_cast<const uint2*>(args.codes + code_at));
  const std::uint32_t scale = __ldg(args.scales + scale_at);
  std::uint32_t macro = reads_macros<Rule> ? __ldg(args.macros + macro_at) : 0;
  if constexpr (Rule == unpack_rule::mx_fine) macro = fine_bits_of_chunk(macro, in_row, args.macro_shift);
  const float tensor_scale = Rule == unpack_rule::nv ? __ldg(args.tensor_scales + matrix) : 1.0f;
  const chunk<T> x = unpack<T, Rule>({codes.x, codes.y}, scale, macro, tensor_scale);
  if (Flat || (args.is_aligned && n == chunk_size)) {
    x.store(args.out + out_at);
  } else {
    x.store_some(args.out + out_at, n);
  }
}

/// The same to float, where all rows are one: sixteen floats are four stores, and those of a warp are contiguous only
/// if four neighbouring lanes each take a quarter of one another's chunks.
template <unpack_rule Rule>
__global__ void __launch_bounds__(256) unpack_floats_kernel(const unpack_args<float> args) {
  const std::size_t first = (static_cast<std::size_t>(blockIdx.x) * 256 + threadIdx.x) / 4 * 4;
  const std::uint32_t quarter = threadIdx.x % 4;
  const float tensor_scale = Rule == unpack_rule::nv ? __ldg(args.tensor_scales) : 1.0f;
#pragma unroll
  for (std::uint32_t i = 0; i < 4; ++i) {
    const std::size_t c = first + i;
    if (c >= args.chunks) return;
    const std::uint32_t codes = __ldg(reinterpret_cast<const std::uint16_t*>(args.codes + c * 8) + quarter);
    const std::uint32_t scale = __ldg(args.scales + (c >> (args.block_shift - 4)));
    std::uint32_t macro = reads_macros<Rule> ? __ldg(args.macros + (c >> (args.macro_shift - 4))) : 0;
    if constexpr (Rule == unpack_rule::mx_fine) {
      macro = fine_bits_of_chunk(macro, static_cast<std::uint32_t>(c), args.macro_shift) >> (quarter / 2 * 2);
    }
    const chunk<float> x = unpack<float, Rule>({codes, 0}, scale, macro, tensor_scale);
    reinterpret_cast<uint4*>(args.out + c * chunk_size)[quarter] =
        make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
  }
}

template <real T, unpack_rule Rule>
result<void> launch_unpack(const stream& s, const unpack_args<T>& args) {
  const auto blocks = static_cast<unsigned>((args.chunks + 255) / 256);
  if constexpr (sizeof(T) == 4) {
    if (args.is_flat) {
      unpack_floats_kernel<Rule><<<blocks, 256, 0, s.handle>>>(args);
      return status_of(cudaGetLastError(), "the launch of unpack_floats_kernel");
    }
  }
  if (args.is_flat) {
    unpack_kernel<T, Rule, true><<<blocks, 256, 0, s.handle>>>(args);
  } else {
    unpack_kernel<T, Rule, false><<<blocks, 256, 0, s.handle>>>(args);
  }
  return status_of(cudaGetLastError(), "the launch of unpack_kernel");
}

template <real T>
result<void> dequantize(const stream& s, const tetromino::detail::dequantize_job<T>& job) {
  const packed_shape shape = job.in.shape();
  const auto& out = job.out;
  if (shape.matrices == 0 || shape.rows == 0 || shape.cols == 0) return {};
  if (auto fits = check_packed_pointers(job.in.codes.data()); !fits) return fits;
  const std::size_t span =
      shape.format.macro_block > shape.format.block ? shape.format.macro_block : shape.format.block;
  const bool is_nv = shape.format.scale == scale_type::e4m3;
  const bool scale_per_matrix = is_nv && job.in.tensor_scales.size() > 1;
  const bool is_aligned = has_aligned_rows(out);
  const bool flat = is_dense(out) && is_aligned && shape.cols % span == 0 && !scale_per_matrix;

  unpack_args<T> args{};
  args.codes = job.in.codes.data(), args.scales = job.in.scales.data(), args.macros = job.in.macros.data();
  args.tensor_scales = job.in.tensor_scales.data();
  args.out = out.data;
  args.block_shift = static_cast<std::uint32_t>(std::bit_width(shape.format.block)) - 1;
  args.macro_shift = static_cast<std::uint32_t>(std::bit_width(shape.format.macro_block | 1)) - 1;
  args.blocks_per_row = static_cast<std::uint32_t>(shape.blocks_per_row());
  args.macros_per_row = static_cast<std::uint32_t>(shape.macros_per_row());
  args.scale_per_matrix = scale_per_matrix, args.is_aligned = is_aligned, args.is_flat = flat;
  if (flat) {
    args.chunks = shape.matrices * shape.rows * shape.cols / chunk_size;
  } else {
    auto rows = map_rows(out, (shape.cols + chunk_size - 1) / chunk_size);
    if (!rows) return rows.error();
    args.rows = *rows;
    args.chunks = static_cast<std::size_t>(rows->rows) * rows->chunks_per_row;
  }
  if (is_nv) return launch_unpack<T, unpack_rule::nv>(s, args);
  if (shape.format.macro_bits == 2) return launch_unpack<T, unpack_rule::mx_fine>(s, args);
  if (shape.format.macro_block != 0) return launch_unpack<T, unpack_rule::mx_macro>(s, args);
  return launch_unpack<T, unpack_rule::mx>(s, args);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
