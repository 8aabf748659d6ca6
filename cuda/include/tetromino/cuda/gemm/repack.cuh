#pragma once

#include <tetromino/cuda/repacked.hpp>  // repacked_shape

#include <tetromino/scaling.hpp>  // fine_bits

#include "weight_tile.cuh"  // weight_tile, spread_codes

#include <cstdint>  // std::uint32_t

/// Putting packed weights into the order of weight_tile.cuh: once for each model, so that a simple kernel does.
namespace TETROMINO_NAMESPACE::cuda::detail {

struct repack_args {
  const std::uint8_t* codes;
  const std::uint8_t* scales;
  const std::uint8_t* macros;
  const float* tensor_scales;
  std::uint8_t* tiles;
  float* factors;
  std::uint8_t* macros_out;
  std::uint32_t rows, blocks_per_row, block, row_tiles, col_tiles, macros_in, macros_per_row;
  std::uint32_t macro_repeats;  ///< how often a macro byte is stored
  std::uint32_t fine_elements;  ///< that share a factor, where factors have 2 bits
  gating_rows gating;
  bool scale_per_matrix;
};

/// One thread block repacks 64 rows.
template <repackable T, weight_kind Kind>
__global__ void __launch_bounds__(256) repack_kernel(const repack_args args) {
  constexpr std::uint32_t block = weight_tile<Kind>::block, tile_bytes = weight_tile<Kind>::bytes;
  constexpr bool is_e4m3 = std::same_as<T, e4m3>;
  constexpr std::uint32_t nan_byte =  // decodes to infinity, which times zero codes is NaN; in E4M3 to NaN
      is_e4m3 ? 8 * e4m3_decoding::nan : (Kind == weight_kind::nv ? 248u : (std::same_as<T, half> ? 31u : 255u));
  __shared__ int top[64];  // the largest exponent of a row's scales
  const std::uint32_t matrix = blockIdx.y, first = blockIdx.x * 64;
  const std::size_t matrix_row = static_cast<std::size_t>(matrix) * args.rows;
  const auto scale_of = [&](std::uint32_t row, std::uint32_t b) -> std::uint32_t {
    return args.scales[(matrix_row + row) * args.blocks_per_row + b];
  };
  if (threadIdx.x < 64) top[threadIdx.x] = 0;
  __syncthreads();
  if constexpr (Kind != weight_kind::nv) {
    const std::uint32_t row = source_row(first + threadIdx.x / 4, args.rows, args.gating);
    std::uint32_t most = 0;
    for (std::uint32_t b = threadIdx.x % 4; row < args.rows && b < args.blocks_per_row; b += 4) {
      const std::uint32_t scale = scale_of(row, b);
      if (scale != 0xFFu) most = max(most, scale);
    }
    atomicMax(&top[threadIdx.x / 4], static_cast<int>(most));
    __syncthreads();
  }
  if (threadIdx.x < 64) {
    float factor;
    if constexpr (Kind == weight_kind::nv) {
      factor = args.tensor_scales[args.scale_per_matrix ? matrix : 0];
    } else {
      factor = ldexpf(1.0f, top[threadIdx.x] - (is_e4m3 ? 127 - e4m3_decoding::factor_shift : 128));
    }
    args.factors[(static_cast<std::size_t>(matrix) * args.row_tiles + blockIdx.x) * 64 + threadIdx.x] = factor;
  }

  const auto codes_of = [&](std::uint32_t row, std::uint32_t byte) -> std::uint32_t {  // columns 2 byte, 2 byte + 1
    const std::uint32_t b = byte / (block / 2);
    if (row >= args.rows || b >= args.blocks_per_row) return 0;
    const std::uint32_t scale = scale_of(row, b);
    std::uint32_t codes = args.codes[(matrix_row + row) * args.blocks_per_row * (block / 2) + byte];
    if constexpr (Kind == weight_kind::nv) {
      if ((scale & 0x7Fu) == 0x7Fu || (scale & 0x7Fu) == 0) return 0;
      if ((scale & 0x80u) != 0) codes ^= 0x88u;
    } else {
      if (scale == 0xFFu) return 0;
    }
    return codes;
  };
  std::uint8_t* tile =
      args.tiles + (static_cast<std::size_t>(matrix) * args.row_tiles + blockIdx.x) * args.col_tiles * tile_bytes;
  for (std::uint32_t t = 0; t < args.col_tiles; ++t, tile += tile_bytes) {
    for (std::uint32_t i = threadIdx.x; i < 512; i += 256) {
      const std::uint32_t step = i % 4, lane = i / 4 % 32, warp = i / 128;
      const std::uint32_t row = first + warp * 16 + lane / 4, byte = t * 32 + step * 8 + lane % 4 * (is_e4m3 ? 2 : 1);
      const std::uint32_t second = byte + (is_e4m3 ? 1 : 4);
      const std::uint32_t low = source_row(row, args.rows, args.gating);
      const std::uint32_t high = source_row(row + 8, args.rows, args.gating);
      const std::uint32_t pairs[4] = {codes_of(low, byte), codes_of(high, byte), codes_of(low, second),
                                      codes_of(high, second)};
      reinterpret_cast<std::uint32_t*>(tile)[i] = spread_codes<T>(pairs);
    }
    constexpr std::uint32_t lane_scales = weight_tile<Kind>::lane_scales,
                            per_lane = lane_scales - weight_tile<Kind>::lane_factors;
    if (threadIdx.x < 32 * per_lane) {
      const std::uint32_t i = threadIdx.x % per_lane, of_lane = threadIdx.x / per_lane;
      const std::uint32_t is_high = weight_tile<Kind>::is_fine ? i / 2 : i % 2;
      const std::uint32_t in_tile = of_lane % 4 * 16 + of_lane / 4 + is_high * 8;
      const std::uint32_t b = t * (64 / block) + (weight_tile<Kind>::is_fine ? i % 2 : i / 2);
      const std::uint32_t row = source_row(first + in_tile, args.rows, args.gating);
      std::uint32_t stored = 0;
      if (row < args.rows && b < args.blocks_per_row) {
        const std::uint32_t scale = scale_of(row, b);
        if constexpr (Kind == weight_kind::nv) {
          stored = (scale & 0x7Fu) == 0x7Fu ? nan_byte : stored_e4m3(scale & 0x7Fu, scale_decoding<T, Kind>::e4m3_bias);
        } else if constexpr (is_e4m3) {
          stored = scale == 0xFFu ? nan_byte : e4m3_decoding::stored(static_cast<std::uint32_t>(top[in_tile]) - scale);
        } else {
          constexpr int top_field = std::same_as<T, half> ? 30 : 254;
          stored = scale == 0xFFu
                       ? nan_byte
                       : static_cast<std::uint32_t>(max(top_field + static_cast<int>(scale) - top[in_tile], 0));
        }
      }
      tile[weight_tile<Kind>::scales_at + of_lane * lane_scales + i] = static_cast<std::uint8_t>(stored);
    }
    if constexpr (weight_tile<Kind>::is_fine) {
      if (threadIdx.x < 32) {
        std::uint32_t word = 0;
        for (std::uint32_t i = 0; i < 16; ++i) {
          const std::uint32_t is_high = i / 8, in_tile = threadIdx.x % 4 * 16 + threadIdx.x / 4 + is_high * 8;
          const std::uint32_t row = source_row(first + in_tile, args.rows, args.gating), column = t * 64 + i % 8 * 8;
          if (row >= args.rows || column / (4 * args.fine_elements) >= args.macros_in) continue;
          const std::uint32_t m =
              fine_bits(args.macros + (matrix_row + row) * args.macros_in, args.fine_elements, column);
          word |= fine_decoding<T>::stored(m, i % 8, is_high != 0);
        }
        *reinterpret_cast<std::uint32_t*>(tile + weight_tile<Kind>::scales_at + threadIdx.x * lane_scales + per_lane) =
            word;
      }
    }
  }
  std::uint8_t* macros =
      args.macros_out + (static_cast<std::size_t>(matrix) * args.row_tiles + blockIdx.x) * args.macros_per_row * 64;
  for (std::uint32_t i = threadIdx.x; i < args.macros_per_row * 64; i += 256) {
    const std::uint32_t in_tile = i / 2 % 4 * 16 + i % 2 * 8 + i / 8 % 8;
    const std::uint32_t row = source_row(first + in_tile, args.rows, args.gating), m = i / 64 / args.macro_repeats;
    macros[i] = row < args.rows && m < args.macros_in ? args.macros[(matrix_row + row) * args.macros_in + m] : 0;
  }
}

template <repackable T>
result<void> repack(const stream& s, const packed_view<any_format>& w, const repacked_shape& shape, std::byte* out) {
  if (shape.matrices == 0 || shape.rows == 0 || shape.cols == 0) return {};
  auto* const bytes = reinterpret_cast<std::uint8_t*>(out);
  const packed_shape from = w.shape();
  repack_args args{};
  args.codes = w.codes.data(), args.scales = w.scales.data(), args.macros = w.macros.data();
  args.tensor_scales = w.tensor_scales.data();
  args.tiles = bytes;
  args.factors = reinterpret_cast<float*>(bytes + shape.factors_at());
  args.macros_out = bytes + shape.macros_at();
  args.rows = static_cast<std::uint32_t>(shape.rows);
  args.blocks_per_row = static_cast<std::uint32_t>(from.blocks_per_row());
  args.row_tiles = static_cast<std::uint32_t>(shape.row_tiles());
  args.col_tiles = static_cast<std::uint32_t>(shape.col_tiles());
  args.macros_in = static_cast<std::uint32_t>(from.macros_per_row());
  args.macros_per_row = static_cast<std::uint32_t>(shape.macros_per_row());
  args.macro_repeats = shape.format.macro_block == 64 ? 2 : 1;
  args.fine_elements = static_cast<std::uint32_t>(elements_per_factor(shape.format));
  args.gating = shape.gating;
  args.scale_per_matrix = w.tensor_scales.size() > 1;
  if (shape.matrices > 65535) {
    return error(errc::shape_mismatch,
                 tetromino::detail::text("repack: expected at most 65535 matrices, got ", shape.matrices));
  }
  const dim3 grid(args.row_tiles, static_cast<unsigned>(shape.matrices));
  if constexpr (std::same_as<T, e4m3>) {
    repack_kernel<T, weight_kind::mx32><<<grid, 256, 0, s.handle>>>(args);
  } else if (shape.format.scale == scale_type::e4m3) {
    repack_kernel<T, weight_kind::nv><<<grid, 256, 0, s.handle>>>(args);
  } else if (shape.format.macro_bits == 2) {
    repack_kernel<T, weight_kind::mx32_fine><<<grid, 256, 0, s.handle>>>(args);
  } else if (shape.format.block == 16) {
    repack_kernel<T, weight_kind::mx16><<<grid, 256, 0, s.handle>>>(args);
  } else {
    repack_kernel<T, weight_kind::mx32><<<grid, 256, 0, s.handle>>>(args);
  }
  return status_of(cudaGetLastError(), "the launch of repack_kernel");
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
