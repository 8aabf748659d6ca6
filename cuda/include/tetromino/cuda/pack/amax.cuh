#pragma once

#include <tetromino/cuda.hpp>  // stream

#include "../detail/checks.hpp"  // has_aligned_rows, is_dense
#include "rotate.cuh"            // rotated_chunk
#include "load.cuh"              // load_chunk

#include <tetromino/options.hpp>  // quantize_options

#include <algorithm>  // std::min
#include <cstdint>    // std::uint32_t
#include <span>       // std::span

/// Largest magnitudes, and the tensor scales of NVFP4 that come from them.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The largest magnitude of each matrix (blockIdx.y), or of the whole batch as one, into float bits that start at 0.
template <real T>
__global__ void __launch_bounds__(256) amax_kernel(const pack_args args, std::uint32_t* out) {
  constexpr std::uint32_t at_once = sizeof(T) == 4 ? 2 : 4;
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * 256;
  const T* const in = static_cast<const T*>(args.in.data) + blockIdx.y * args.rows.matrix_stride;
  std::uint32_t most = 0;
  for (std::size_t first = static_cast<std::size_t>(blockIdx.x) * 256 + threadIdx.x; first < args.chunks;
       first += stride * at_once) {
    chunk<T> x[at_once];
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      const std::size_t c = first + u * stride;
      if (c >= args.chunks) {
        x[u].clear();
      } else if (args.in.is_flat) {
        x[u].load(in + c * chunk_size);
      } else {
        const auto number = static_cast<std::uint32_t>(c);
        const std::uint32_t row = args.rows.by_chunks.quotient(number);
        const std::uint32_t col = (number - row * args.rows.chunks_per_row) * chunk_size;
        const std::uint32_t used = min(chunk_size, args.rows.cols - col);
        const T* from = in + args.rows.offset(row) + col;
        if (used == chunk_size && args.in.is_aligned) {
          x[u].load(from);
        } else {
          x[u].load_some(from, used);
        }
      }
    }
#pragma unroll
    for (std::uint32_t u = 0; u < at_once; ++u) {
      std::uint32_t m = x[u].largest();
      if (m >= infinity_bits<T> && args.rules.special == special_values::saturate) {
        x[u].clear_special();
        m = x[u].largest();
      }
      if (m < infinity_bits<T>) most = max(most, m);  // others are poisoned blocks of 16
    }
  }
  most = __reduce_max_sync(full_warp, most);
  if (threadIdx.x % 32 == 0 && most != 0) {
    atomicMax(out + blockIdx.y, bit_cast<std::uint32_t>(magnitude_value<T>(most)));
  }
}

/// Tensor scales from those given, or in place from the largest magnitudes.
template <class Count>
__global__ void tensor_scales_kernel(float* scales, Count n, const float* given, bool one_given, scale_rule rule,
                                     bool invertible) {
  for (Count i = threadIdx.x; i < n; i += blockDim.x) {
    scales[i] = given != nullptr ? given[one_given ? 0 : i] : tensor_scale_for(scales[i], rule, invertible);
  }
}

/// Where infinities saturate and all else is 0, the largest magnitude is that of the infinities. Thread blocks go
/// through the rows of a matrix (blockIdx.y), or of all; as soon as one has found an infinity, the others may stop.
template <real T>
__global__ void __launch_bounds__(256) lone_infinities_kernel(const batch_view<const T> x, std::uint32_t* out) {
  std::uint32_t* const to = out + blockIdx.y;
  const std::size_t rows = gridDim.y > 1 ? x.rows : x.matrices * x.rows;
  bool any = false;
  for (std::size_t row = blockIdx.x; row < rows && *static_cast<volatile std::uint32_t*>(to) == 0; row += gridDim.x) {
    const std::size_t e = gridDim.y > 1 ? blockIdx.y : row / x.rows;
    const T* const in = x.data + e * x.matrix_stride + row % x.rows * x.row_stride;
    for (std::size_t c = threadIdx.x; c < x.cols; c += 256) {
      any = any || fabsf(tetromino::detail::to_float(in[c])) > tetromino::detail::largest<float>;
    }
    if (any) atomicMax(to, bit_cast<std::uint32_t>(tetromino::detail::largest<T>));
  }
}

template <real T>
result<void> count_lone_infinities(const stream& s, const batch_view<const T>& x, std::span<float> amax) {
  if (x.matrices == 0 || x.rows == 0) return {};
  const bool per_matrix = amax.size() > 1;
  const std::size_t rows = per_matrix ? x.rows : x.matrices * x.rows;
  const dim3 grid(static_cast<unsigned>(std::min<std::size_t>(rows, 1024)),
                  per_matrix ? static_cast<unsigned>(x.matrices) : 1u);
  lone_infinities_kernel<T><<<grid, 256, 0, s.handle>>>(x, reinterpret_cast<std::uint32_t*>(amax.data()));
  return status_of(cudaGetLastError(), "the launch of lone_infinities_kernel");
}

/// Launches the reduction of x to one largest magnitude, or one for each matrix, in device memory.
template <real T>
result<void> amax(const stream& s, const batch_view<const T>& x, special_values special, std::span<float> out) {
  if (auto done = status_of(cudaMemsetAsync(out.data(), 0, out.size_bytes(), s.handle), "cudaMemsetAsync"); !done) {
    return done;
  }
  if (x.matrices == 0 || x.rows == 0 || x.cols == 0) return {};
  const bool per_matrix = out.size() > 1;
  pack_args args{};
  args.in.data = x.data;
  args.rules.special = special;
  args.in.is_aligned = has_aligned_rows(x);
  args.in.is_flat = args.in.is_aligned && x.cols % chunk_size == 0 && (x.rows == 1 || x.row_stride == x.cols) &&
                    (per_matrix || is_dense(x));
  auto rows = map_rows(x, (x.cols + chunk_size - 1) / chunk_size);
  if (!rows && !args.in.is_flat) return rows.error();
  if (rows) args.rows = *rows;
  args.rows.matrix_stride = x.matrix_stride;
  const std::size_t chunks_of_matrix = x.rows * ((x.cols + chunk_size - 1) / chunk_size);
  args.chunks = per_matrix ? chunks_of_matrix : x.matrices * chunks_of_matrix;
  constexpr std::size_t most_blocks = 132 * 16;
  const auto blocks = static_cast<unsigned>(std::min((args.chunks + 1023) / 1024, most_blocks));
  const dim3 grid(blocks, per_matrix ? static_cast<unsigned>(x.matrices) : 1u);
  if (grid.y > 65535) {
    return error(
        errc::shape_mismatch,
        tetromino::detail::text("cuda: expected at most 65535 matrices with a tensor scale each, got ", grid.y));
  }
  amax_kernel<T><<<grid, 256, 0, s.handle>>>(args, reinterpret_cast<std::uint32_t*>(out.data()));
  return status_of(cudaGetLastError(), "the launch of amax_kernel");
}

/// The largest magnitude of each matrix once it is rotated, or of all, into float bits that start at 0.
template <real T, pack_source Source>
__global__ void __launch_bounds__(256) rotated_amax_kernel(const pack_args args, std::uint32_t* out) {
  chunk<T> x;
  __shared__ std::uint32_t load_room[load_words<Source, T>];
  const chunk_place at = load_chunk<Source>(args, load_room, x);
  std::uint32_t m = 0;
  const bool is_left_out =
      any_in_block(args.rotation, args.rules.special == special_values::saturate && x.has_infinity());
  static_cast<void>(admit_chunk<Source, true, overflowed::zero>(args, at, x, m));
  if (is_left_out || m >= infinity_bits<float>) m = 0;  // infinities are all over the block, or it is poisoned
  const std::uint32_t most = __reduce_max_sync(full_warp, m);
  std::uint32_t* const to = out + (args.tensor_scales.per_matrix ? at.matrix : 0);
  if (!args.tensor_scales.per_matrix || __all_sync(full_warp, at.matrix == __shfl_sync(full_warp, at.matrix, 0))) {
    if (threadIdx.x % 32 == 0 && most != 0) atomicMax(to, most);
  } else if (m != 0) {
    atomicMax(to, m);
  }
}

template <real T>
result<void> rotated_amax(const stream& s, const batch_view<const T>& x, pack_source source,
                          const quantize_options& options, std::span<float> out) {
  if (auto done = status_of(cudaMemsetAsync(out.data(), 0, out.size_bytes(), s.handle), "cudaMemsetAsync"); !done) {
    return done;
  }
  if (x.matrices == 0 || x.rows == 0 || x.cols == 0) return {};
  const bool is_transposed = source == pack_source::transposed;
  const batch_view<const T> rows_of = is_transposed ? transposed(x) : x;
  pack_args args{};
  args.in.data = x.data;
  args.rules.special = options.special;
  args.rotation = make_rotation(options.rotation);
  args.in.is_aligned = has_aligned_rows(x);
  args.tensor_scales.per_matrix = out.size() > 1;
  args.in.tile_cols = is_transposed ? 128 : 0;
  auto rows = map_rows(rows_of, pieces_per_row(rows_of.cols, chunk_size, is_transposed ? 128 : args.rotation.size));
  if (!rows) return rows.error();
  args.rows = *rows;
  args.chunks = static_cast<std::size_t>(rows->rows) * rows->chunks_per_row;
  auto* const bits = reinterpret_cast<std::uint32_t*>(out.data());
  if (is_transposed) {
    rotated_amax_kernel<T, pack_source::transposed><<<transposed_blocks(args), 256, 0, s.handle>>>(args, bits);
  } else {
    const auto blocks = static_cast<unsigned>((args.chunks + 255) / 256);
    rotated_amax_kernel<T, pack_source::rows><<<blocks, 256, 0, s.handle>>>(args, bits);
  }
  return status_of(cudaGetLastError(), "the launch of rotated_amax_kernel");
}

/// The tensor scales of NVFP4 on the device: those given, or from the largest magnitudes of x or of its transpose.
template <real T>
result<void> set_tensor_scales(const stream& s, const batch_view<const T>& x, pack_source source,
                               const quantize_options& options, std::span<float> scales) {
  if (options.tensor_scales.empty()) {
    if (auto done =
            options.rotation ? rotated_amax(s, x, source, options, scales) : amax(s, x, options.special, scales);
        !done) {
      return done;
    }
    if (options.special == special_values::saturate) {
      if (auto done = count_lone_infinities(s, x, scales); !done) return done;
    }
  }
  tensor_scales_kernel<<<1, 256, 0, s.handle>>>(scales.data(), static_cast<std::uint32_t>(scales.size()),
                                                options.tensor_scales.data(), options.tensor_scales.size() == 1,
                                                *options.rule, options.invertible_tensor_scales);
  return status_of(cudaGetLastError(), "the launch of tensor_scales_kernel");
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
