#pragma once

#include <tetromino/cuda/block_scaled.hpp>  // block_scaled_job

#include "sm120a_block_scaled.cuh"  // launch_block_scaled, native_mma
#include "../pack/args.cuh"         // swizzled_at

#include <cstdint>  // std::uint8_t, std::uint32_t

/// Operands of block-scaled tensor cores, made on the GPU: once for weights, so that simple kernels do.
namespace TETROMINO_NAMESPACE::cuda::detail {

struct operand_args {
  const std::uint8_t* codes;
  const std::uint8_t* scales;
  const float* tensor_scales;
  std::uint8_t* out_codes;
  std::uint8_t* out_scales;
  float* factors;
  std::uint32_t tensor_scale_step;  ///< 1 where each matrix has its own, otherwise 0
  std::uint32_t matrices, rows;
  std::uint32_t blocks_per_row, out_blocks_per_row;
  std::size_t scale_bytes_per_matrix;
};

/// The codes of a block of `Block` elements.
template <int Block>
struct block_codes {
  uint2 part[Block / 16];

  __device__ explicit block_codes(const std::uint8_t* at) {
#pragma unroll
    for (int i = 0; i < Block / 16; ++i) part[i] = reinterpret_cast<const uint2*>(at)[i];
  }
  [[nodiscard]] __device__ bool has_values() const {
    std::uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < Block / 16; ++i) any |= part[i].x | part[i].y;
    return (any & 0x77777777u) != 0;
  }
};

/// factors[e], as an integer, becomes one more than the largest E8M0 code of a matrix's blocks that are not all zero.
template <int Block>
__global__ void __launch_bounds__(256) top_scale_kernel(const operand_args args) {
  const std::size_t blocks = std::size_t{args.rows} * args.blocks_per_row;
  for (std::uint32_t e = blockIdx.y; e < args.matrices; e += gridDim.y) {
    std::uint32_t top = 0;
    for (std::size_t i = std::size_t{blockIdx.x} * 256 + threadIdx.x; i < blocks; i += std::size_t{gridDim.x} * 256) {
      const std::uint32_t scale = args.scales[e * blocks + i];
      if (scale == 255 || scale < top) continue;
      if (block_codes<Block>(args.codes + (e * blocks + i) * (Block / 2)).has_values()) top = scale + 1;
    }
    top = __reduce_max_sync(0xFFFFFFFFu, top);
    if (threadIdx.x % 32 == 0 && top != 0) atomicMax(reinterpret_cast<unsigned*>(args.factors) + e, top);
  }
}

__device__ inline std::uint32_t shifted_word(std::uint32_t word, unsigned shift) {
  std::uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) {
    out |= std::uint32_t{tetromino::detail::shifted_codes(static_cast<std::uint8_t>(word >> i), shift)} << i;
  }
  return out;
}

/// A thread writes 16 elements of a row and their scale, or 32 with two such pieces. `From`: elements of a block there;
/// `To`: of the operand's; `IsRebased`: E8M0 scales become E4M3.
template <int From, int To, bool IsRebased>
__global__ void __launch_bounds__(256) operand_kernel(const operand_args args) {
  const std::size_t pieces = std::size_t{args.rows} * args.out_blocks_per_row;
  for (std::uint32_t e = blockIdx.y; e < args.matrices; e += gridDim.y) {
    for (std::size_t i = std::size_t{blockIdx.x} * 256 + threadIdx.x; i < pieces; i += std::size_t{gridDim.x} * 256) {
      const auto r = static_cast<std::uint32_t>(i / args.out_blocks_per_row);
      const auto c = static_cast<std::uint32_t>(i % args.out_blocks_per_row);
      const std::uint32_t b = c * To / From;
      auto* const to = reinterpret_cast<uint2*>(args.out_codes + (e * pieces + i) * (To / 2));
      if (b >= args.blocks_per_row) {
#pragma unroll
        for (int part = 0; part < To / 16; ++part) to[part] = uint2{0, 0};
        continue;
      }
      const std::size_t at = (e * std::size_t{args.rows} + r) * args.blocks_per_row + b;
      block_codes<From> codes(args.codes + at * (From / 2));
      std::uint32_t scale = args.scales[at];
      if constexpr (IsRebased) {
        const std::uint32_t top = reinterpret_cast<const unsigned*>(args.factors)[e];
        if (scale == 255) {
          scale = e4m3::nan_bits;
        } else if (!codes.has_values()) {
          scale = 0;
        } else {
          const std::uint32_t below = top - 1 - scale;
          scale = tetromino::detail::rebased_scale(below);
          if (below > tetromino::detail::rebased_range) {
#pragma unroll
            for (uint2& part : codes.part) {
              part.x = shifted_word(part.x, below - tetromino::detail::rebased_range);
              part.y = shifted_word(part.y, below - tetromino::detail::rebased_range);
            }
          }
        }
      }
#pragma unroll
      for (int part = 0; part < To / 16; ++part) to[part] = codes.part[From > To ? c % (From / To) : part];
      args.out_scales[e * args.scale_bytes_per_matrix + swizzled_at(r, c, args.out_blocks_per_row)] =
          static_cast<std::uint8_t>(scale);
    }
  }
}

/// The factors: those of NVFP4, or what top_scale_kernel found as the float that it stands for.
template <bool IsRebased>
__global__ void __launch_bounds__(256) factor_kernel(const operand_args args) {
  for (std::uint32_t e = blockIdx.x * 256 + threadIdx.x; e < args.matrices; e += gridDim.x * 256) {
    if constexpr (IsRebased) {
      const std::uint32_t top = reinterpret_cast<const unsigned*>(args.factors)[e];
      args.factors[e] = tetromino::detail::rebased_factor(top == 0 ? 135 : top - 1);
    } else {
      args.factors[e] = args.tensor_scales[std::size_t{e} * args.tensor_scale_step];
    }
  }
}

template <class Float>
__global__ void multiply_factors_kernel(const Float* x, const Float* w, Float* out) {
  out[0] = (x == nullptr ? Float{1} : *x) * (w == nullptr ? Float{1} : *w);
  out[1] = 0;
}

template <class Float>
result<void> multiply_factors(const stream& s, const Float* x, const Float* w, Float* out) {
  multiply_factors_kernel<<<1, 1, 0, s.handle>>>(x, w, out);
  return status_of(cudaGetLastError(), "multiply_factors_kernel");
}

template <class Byte>
result<void> repack_block_scaled(const stream& s, const packed_view<any_format, Byte>& from,
                                 const block_scaled_view<std::uint8_t, float>& to) {
  const packed_shape shape = from.shape();
  if (auto fits = check_packed_pointers(from.codes.data()); !fits) return fits;
  if (auto fits = check_packed_pointers(to.codes.data()); !fits) return fits;
  if (auto fits = check_pieces(shape.matrices, shape.rows, to.shape.padded_cols() / 16); !fits) return fits;
  if (shape.matrices == 0) return {};
  if (auto done = status_of(cudaMemsetAsync(to.scales.data(), 0, to.scales.size(), s.handle), "cudaMemsetAsync");
      !done) {
    return done;
  }
  const bool is_nv = from.format.scale == scale_type::e4m3;
  const bool is_rebased = !is_nv && to.shape.kind == block_scaled_kind::e4m3_16;
  operand_args args{};
  args.codes = from.codes.data(), args.scales = from.scales.data();
  args.tensor_scales = from.tensor_scales.data();
  args.tensor_scale_step = from.tensor_scales.size() > 1 ? 1 : 0;
  args.out_codes = to.codes.data(), args.out_scales = to.scales.data(), args.factors = to.factors.data();
  args.matrices = static_cast<std::uint32_t>(shape.matrices), args.rows = static_cast<std::uint32_t>(shape.rows);
  args.blocks_per_row = static_cast<std::uint32_t>(shape.blocks_per_row());
  args.out_blocks_per_row = static_cast<std::uint32_t>(to.shape.scales_per_row());
  args.scale_bytes_per_matrix = to.shape.scale_bytes_per_matrix();
  const auto grid = [&](std::size_t threads) {
    return dim3(static_cast<unsigned>(threads == 0         ? 1
                                      : threads < 1u << 20 ? (threads + 255) / 256
                                                           : 4096),
                args.matrices < 65535 ? args.matrices : 65535);
  };
  const dim3 pieces = grid(shape.rows * to.shape.scales_per_row());
  const bool is_block_16 = from.format.block == 16;
  if (is_rebased) {
    if (auto done =
            status_of(cudaMemsetAsync(to.factors.data(), 0, to.factors.size_bytes(), s.handle), "cudaMemsetAsync");
        !done) {
      return done;
    }
    const dim3 blocks = grid(shape.rows * shape.blocks_per_row());
    if (is_block_16) {
      top_scale_kernel<16><<<blocks, 256, 0, s.handle>>>(args);
      operand_kernel<16, 16, true><<<pieces, 256, 0, s.handle>>>(args);
    } else {
      top_scale_kernel<32><<<blocks, 256, 0, s.handle>>>(args);
      operand_kernel<32, 16, true><<<pieces, 256, 0, s.handle>>>(args);
    }
    factor_kernel<true><<<(args.matrices + 255) / 256, 256, 0, s.handle>>>(args);
  } else if (is_nv) {
    operand_kernel<16, 16, false><<<pieces, 256, 0, s.handle>>>(args);
    factor_kernel<false><<<(args.matrices + 255) / 256, 256, 0, s.handle>>>(args);
  } else {
    operand_kernel<32, 32, false><<<pieces, 256, 0, s.handle>>>(args);
  }
  return status_of(cudaGetLastError(), "operand_kernel");
}

template <activation T>
result<void> multiply_block_scaled(const stream& s, const block_scaled_job& job, T* out) {
  return launch_block_scaled<native_mma>(s, job, out);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
