#pragma once

#include <tetromino/cuda/block_scaled.hpp>  // block_scaled_job

#include "../arch/sm120a.cuh"    // native_mma
#include "../arch/sm80.cuh"      // copy_16
#include "../detail/values.cuh"  // round_to

#include <tetromino/detail/block_scaled_fragment.hpp>  // a_fragment_row ...

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint8_t, std::uint32_t

/// The product of block-scaled operands for compute capability 12.x: right and plain. A block of eight warps computes
/// 128 x 128 sums, which needs whole tiles of the 128x4 swizzle; their bytes go to shared memory as they are, and a
/// lane's scales for an instruction are one word of them.
namespace TETROMINO_NAMESPACE::cuda::detail {

struct block_scaled_args {
  const std::uint8_t *x, *x_scales, *w, *w_scales;
  const float *x_factor, *w_factor;  ///< null: 1
  void* out;
  std::size_t out_stride;
  std::uint32_t rows, outputs;
  std::uint32_t row_bytes;      ///< of codes
  std::uint32_t tiles_per_row;  ///< of scales
};

/// 128 columns of 128 rows of both operands. Rows lie 80 bytes apart, so that the words of eight rows are in banks of
/// their own.
template <int ScaleTiles>
struct block_scaled_stage {
  static constexpr std::uint32_t row_words = 20;
  alignas(16) std::uint32_t codes[2][128 * row_words];
  alignas(16) std::uint32_t scales[2][ScaleTiles * 128];
};

template <class Mma, block_scaled_kind Kind, activation T>
__global__ void __launch_bounds__(256) block_scaled_kernel(const block_scaled_args args) {
  using namespace tetromino::detail;
  constexpr bool is_nv = Kind == block_scaled_kind::e4m3_16;
  constexpr std::uint32_t scale_tiles = is_nv ? 2 : 1;
  using stage_type = block_scaled_stage<scale_tiles>;
  __shared__ stage_type stages[2];
  const std::uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::uint32_t row_tile = blockIdx.y, output_tile = blockIdx.x;
  const std::uint32_t chunks = (args.row_bytes + 63) / 64;

  const auto load = [&](std::uint32_t chunk) {
    stage_type& stage = stages[chunk % 2];
#pragma unroll
    for (std::uint32_t operand = 0; operand < 2; ++operand) {
      const std::uint8_t* const codes = operand == 0 ? args.x : args.w;
      const std::uint32_t first = (operand == 0 ? row_tile : output_tile) * 128;
      const std::uint32_t rows = operand == 0 ? args.rows : args.outputs;
#pragma unroll
      for (std::uint32_t i = thread; i < 512; i += 256) {
        const std::uint32_t r = i / 4, byte = chunk * 64 + i % 4 * 16;
        const bool exists = first + r < rows && byte < args.row_bytes;
        const std::uint8_t* const from = exists ? codes + std::size_t{first + r} * args.row_bytes + byte : codes;
        copy_16(shared_address(&stage.codes[operand][r * stage_type::row_words + i % 4 * 4]), from, exists ? 16 : 0);
      }
      const std::uint32_t i = thread - operand * 128;  // the first warps for x, later ones for w
      if (i < scale_tiles * 32) {
        const std::uint8_t* const scales = operand == 0 ? args.x_scales : args.w_scales;
        const std::uint32_t tile = chunk * scale_tiles + i / 32;
        const bool exists = tile < args.tiles_per_row;
        const std::size_t at = (std::size_t{first / 128} * args.tiles_per_row + (exists ? tile : 0)) * 512;
        copy_16(shared_address(&stage.scales[operand][i * 4]), scales + at + i % 32 * 16, exists ? 16 : 0);
      }
    }
    copies_commit();
  };

  // eight warps: two along the rows with 64 each, four along the outputs with 32 each
  const std::uint32_t warp_row = warp % 2 * 64, warp_output = warp / 2 * 32;
  float d[4][4][4] = {};
  load(0);
  for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) {
      load(chunk + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    const stage_type& stage = stages[chunk % 2];
    const auto step = [&](auto step_constant) {
      constexpr std::uint32_t k = decltype(step_constant)::value;  // which 64 of the 128 columns
      const auto word = [&](std::uint32_t operand, std::uint32_t row, std::uint32_t w) {
        return stage.codes[operand][row * stage_type::row_words + k * 8 + w];
      };
      const auto scale = [&](std::uint32_t operand, std::uint32_t row) {
        return stage.scales[operand][(is_nv ? k : 0) * 128 + row % 32 * 4 + row / 32];
      };
      std::uint32_t a[4][4], scale_a[4];
#pragma unroll
      for (std::uint32_t m = 0; m < 4; ++m) {
        const std::uint32_t first = warp_row + m * 16;
#pragma unroll
        for (std::uint32_t i = 0; i < 4; ++i) {
          a[m][i] = word(0, first + a_fragment_row(lane, i), a_fragment_word(lane, i));
        }
        scale_a[m] = scale(0, first + a_scale_row(lane));
      }
#pragma unroll
      for (std::uint32_t n = 0; n < 4; ++n) {
        const std::uint32_t first = warp_output + n * 8;
        const std::uint32_t b[2] = {word(1, first + b_fragment_row(lane), b_fragment_word(lane, 0)),
                                    word(1, first + b_fragment_row(lane), b_fragment_word(lane, 1))};
        const std::uint32_t scale_b = scale(1, first + b_scale_row(lane));
#pragma unroll
        for (std::uint32_t m = 0; m < 4; ++m) {
          Mma::template add<Kind, is_nv ? 0 : static_cast<int>(k) * 2>(d[m][n], a[m], b, scale_a[m], scale_b);
        }
      }
    };
    step(std::integral_constant<std::uint32_t, 0>{});
    step(std::integral_constant<std::uint32_t, 1>{});
    __syncthreads();
  }

  const float factor = (args.x_factor == nullptr ? 1.0f : *args.x_factor) *  //
                       (args.w_factor == nullptr ? 1.0f : *args.w_factor);
#pragma unroll
  for (std::uint32_t m = 0; m < 4; ++m) {
#pragma unroll
    for (std::uint32_t n = 0; n < 4; ++n) {
#pragma unroll
      for (std::uint32_t i = 0; i < 4; ++i) {
        const fragment_place place = sum_fragment(lane, i);
        const std::uint32_t row = row_tile * 128 + warp_row + m * 16 + place.row;
        const std::uint32_t output = output_tile * 128 + warp_output + n * 8 + place.col;
        if (row >= args.rows || output >= args.outputs) continue;
        const std::size_t at = row * args.out_stride + output;
        static_cast<T*>(args.out)[at] = round_to<T>(d[m][n][i] * factor);
      }
    }
  }
}

/// Says so where a kernel's code for this GPU was made from PTX that does not know the instruction.
template <class Kernel>
result<void> check_built_for_120a(Kernel kernel) {
  cudaFuncAttributes attributes{};
  if (auto done = status_of(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes"); !done) return done;
  if (attributes.ptxVersion >= 120) return {};
  return error(errc::device,
               tetromino::detail::text("CUDA: matmul of block-scaled operands was not compiled for this GPU: expected "
                                       "120a among the architectures, got compute_",
                                       attributes.ptxVersion));
}

template <class Mma, block_scaled_kind Kind, activation T>
result<void> launch_block_scaled_kind(const stream& s, const block_scaled_args& args) {
  const auto kernel = block_scaled_kernel<Mma, Kind, T>;
  if constexpr (Mma::is_native) {
    if (auto fits = check_built_for_120a(kernel); !fits) return fits;
  }
  const dim3 grid((args.outputs + 127) / 128, (args.rows + 127) / 128);
  if (grid.y > 65535) return error(errc::shape_mismatch, "block-scaled product: expected at most 8388480 rows");
  kernel<<<grid, 256, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), "block_scaled_kernel");
}

template <class Mma, activation T>
result<void> launch_block_scaled(const stream& s, const block_scaled_job& job, T* out) {
  const block_scaled_shape& x = job.x.shape;
  if (x.rows == 0 || job.w.shape.rows == 0) return {};
  block_scaled_args args{};
  args.x = job.x.codes.data(), args.x_scales = job.x.scales.data();
  args.w = job.w.codes.data(), args.w_scales = job.w.scales.data();
  args.x_factor = job.x.factors.empty() ? nullptr : job.x.factors.data();
  args.w_factor = job.w.factors.empty() ? nullptr : job.w.factors.data();
  args.out = out, args.out_stride = job.out_stride;
  args.rows = static_cast<std::uint32_t>(x.rows), args.outputs = static_cast<std::uint32_t>(job.w.shape.rows);
  args.row_bytes = static_cast<std::uint32_t>(x.code_bytes_per_row());
  args.tiles_per_row = static_cast<std::uint32_t>((x.scales_per_row() + 3) / 4);
  if (x.kind == block_scaled_kind::e4m3_16)
    return launch_block_scaled_kind<Mma, block_scaled_kind::e4m3_16, T>(s, args);
  return launch_block_scaled_kind<Mma, block_scaled_kind::e8m0_32, T>(s, args);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
