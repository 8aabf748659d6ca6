#pragma once

#include <tetromino/hadamard.hpp>  // hadamard, rotate_job
#include <tetromino/rounding.hpp>  // philox4x32

#include <tetromino/cuda/stream.hpp>  // stream

#include "chunk.cuh"  // chunk
#include "args.cuh"   // map_rows, rotation_args

#include <algorithm>  // std::max
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t
#include <optional>   // std::optional

/// Block-Hadamard rotations, in the very additions of detail::scalar_rotation: sums and differences at falling
/// distances, between lanes where blocks are longer than a chunk, then one scaling.
namespace TETROMINO_NAMESPACE::cuda::detail {

[[nodiscard]] inline rotation_args make_rotation(const std::optional<hadamard>& rotation) {
  if (!rotation) return {};
  return {static_cast<std::uint32_t>(rotation->size), tetromino::detail::inverse_root(rotation->size),
          rotation->sign_seed.has_value(), rotation->sign_seed.value_or(0)};
}

/// The sign bit that columns [4n, 4n + 4) change.
[[nodiscard]] __device__ inline uint4 sign_flips(const rotation_args& r, std::uint32_t n) {
  const philox_words words = philox4x32(n, r.seed);
  return make_uint4(words.word[0] << 31, words.word[1] << 31, words.word[2] << 31, words.word[3] << 31);
}

/// Sixteen floats of neighbouring columns in each lane; a block of a rotation lies in neighbouring lanes.
struct rotated_chunk {
  float x[chunk_size];

  /// Rotates. All lanes of a warp call it together; `col` is the lane's first column of a row of `cols`.
  __device__ void rotate(const rotation_args& r, std::uint32_t col, std::uint32_t cols) {
    const bool is_whole = col / r.size * r.size + r.size <= cols;  // a tail stays as it is
    rotated_chunk y = *this;
    y.flip(r, col);
    y.add_up(r);
    if (is_whole) *this = y;
  }
  /// The inverse.
  __device__ void revert(const rotation_args& r, std::uint32_t col, std::uint32_t cols) {
    const bool is_whole = col / r.size * r.size + r.size <= cols;
    rotated_chunk y = *this;
    y.add_up(r);
    y.flip(r, col);
    if (is_whole) *this = y;
  }

 private:
  __device__ void flip(const rotation_args& r, std::uint32_t col) {
    if (!r.has_signs) return;
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; i += 4) {
      const uint4 flips = sign_flips(r, (col + i) / 4);
      const std::uint32_t each[4] = {flips.x, flips.y, flips.z, flips.w};
#pragma unroll
      for (std::uint32_t k = 0; k < 4; ++k) x[i + k] = bit_cast<float>(bit_cast<std::uint32_t>(x[i + k]) ^ each[k]);
    }
  }
  __device__ void add_up(const rotation_args& r) {
    for (std::uint32_t lanes = r.size / 32; lanes > 0; lanes /= 2) {
      const bool is_upper = (threadIdx.x & lanes) != 0;
#pragma unroll
      for (float& own : x) {
        const float other = __shfl_xor_sync(full_warp, own, static_cast<int>(lanes));
        own = __fadd_rn(other, is_upper ? -own : own);
      }
    }
#pragma unroll
    for (std::uint32_t half = 8; half > 0; half /= 2) {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_size; ++i) {
        if ((i & half) != 0) continue;
        const float low = x[i], high = x[i + half];
        x[i] = __fadd_rn(low, high), x[i + half] = __fsub_rn(low, high);
      }
    }
#pragma unroll
    for (float& own : x) own = __fmul_rn(own, r.scale);
  }
};

template <real T>
[[nodiscard]] __device__ inline rotated_chunk as_floats(const chunk<T>& from) {
  rotated_chunk out;
#pragma unroll
  for (std::uint32_t i = 0; i < chunk_size; ++i) out.x[i] = from.value(i);
  return out;
}
template <real T>
[[nodiscard]] __device__ inline chunk<T> as_chunk(const rotated_chunk& from) {
  chunk<T> out;
#pragma unroll
  for (std::uint32_t i = 0; i < chunk_size; i += 4 / sizeof(T)) {
    if constexpr (sizeof(T) == 4) {
      out.word[i] = bit_cast<std::uint32_t>(from.x[i]);
    } else {
      out.word[i / 2] = pack_pair<T>(from.x[i], from.x[i + 1]);
    }
  }
  return out;
}

/// Whether `one` holds in any lane of the same block of a rotation. All lanes of a warp call it together.
[[nodiscard]] __device__ inline bool any_in_block(const rotation_args& r, bool one) {
  const std::uint32_t lanes = r.size / 16, first = threadIdx.x % 32 / lanes * lanes;
  return (__ballot_sync(full_warp, one) >> first & ((1u << lanes) - 1)) != 0;
}

template <real T>
struct rotate_args {
  const T* in;
  T* out;
  row_map rows, out_rows;
  std::size_t chunks;
  rotation_args rotation;
  bool is_aligned, is_out_aligned;
};

/// Rotates sixteen elements a thread.
template <real T, bool Forward>
__global__ void __launch_bounds__(256) rotate_kernel(const rotate_args<T> args) {
  const std::size_t c = static_cast<std::size_t>(blockIdx.x) * 256 + threadIdx.x;
  const bool exists = c < args.chunks;
  const auto number = exists ? static_cast<std::uint32_t>(c) : 0u;
  const std::uint32_t row = args.rows.by_chunks.quotient(number);
  const std::uint32_t col = (number - row * args.rows.chunks_per_row) * chunk_size;
  const std::uint32_t used = exists && col < args.rows.cols ? min(chunk_size, args.rows.cols - col) : 0;
  const T* const from = args.in + args.rows.offset(row) + col;
  chunk<T> x;
  if (used == chunk_size && args.is_aligned) {
    x.load(from);
  } else {
    x.load_some(from, used);
  }
  rotated_chunk y = as_floats(x);
  if constexpr (Forward) {
    y.rotate(args.rotation, col, args.rows.cols);
  } else {
    y.revert(args.rotation, col, args.rows.cols);
  }
  x = as_chunk<T>(y);
  T* const to = args.out + args.out_rows.offset(row) + col;
  if (used == chunk_size && args.is_out_aligned) {
    x.store(to);
  } else {
    x.store_some(to, used);
  }
}

/// How many pieces of `piece` columns a row of `cols` is cut into, so that no block of a rotation lies in two rows'
/// worth of lanes.
[[nodiscard]] inline std::size_t pieces_per_row(std::size_t cols, std::size_t piece, std::size_t rotation_size) {
  const std::size_t whole = std::max(piece, rotation_size);
  return (cols + whole - 1) / whole * (whole / piece);
}

template <real T>
result<void> rotate(const stream& s, const tetromino::detail::rotate_job<T>& job) {
  const auto& x = job.in;
  if (x.matrices == 0 || x.rows == 0 || x.cols == 0) return {};
  rotate_args<T> args{};
  args.in = x.data, args.out = job.out.data;
  args.rotation = make_rotation(job.rotation);
  const std::size_t pieces = pieces_per_row(x.cols, chunk_size, job.rotation.size);
  auto rows = map_rows(x, pieces);
  if (!rows) return rows.error();
  auto out_rows = map_rows(job.out, pieces);
  if (!out_rows) return out_rows.error();
  args.rows = *rows, args.out_rows = *out_rows;
  args.chunks = static_cast<std::size_t>(rows->rows) * pieces;
  args.is_aligned = has_aligned_rows(x), args.is_out_aligned = has_aligned_rows(job.out);
  const auto blocks = static_cast<unsigned>((args.chunks + 255) / 256);
  if (job.forward) {
    rotate_kernel<T, true><<<blocks, 256, 0, s.handle>>>(args);
  } else {
    rotate_kernel<T, false><<<blocks, 256, 0, s.handle>>>(args);
  }
  return status_of(cudaGetLastError(), "the launch of rotate_kernel");
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
