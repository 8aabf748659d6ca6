#pragma once

#include "elements.cuh"  // bit_cast
#include "matmul.hpp"    // prepared_shape

#include <algorithm>  // std::max
#include <cstdint>    // std::uint32_t

/// The order of prepared weights, its making and its decoding.
///
/// A tile is 64 rows by 64 columns: four warps of 16 rows; in a warp, lane l = 4 g + t holds of rows g and g + 8, for
/// each step of 16 columns, the columns 2t, 2t + 1, 2t + 8 and 2t + 9, which is what the tensor cores' A operand wants
/// of it. These eight codes are one word, whose bits are spread so that few instructions bring each to where a 16-bit
/// float keeps its sign, the end of its exponent and the start of its fraction.
///   tile    codes [warp 4][lane 32][step 4] words, then scales [g 8][warp 4][block][row g, row g + 8] bytes
///   macros  [macro block][g 8][warp 4][row g, row g + 8] bytes
namespace TETROMINO_NAMESPACE::cuda::detail {

enum class weight_kind : std::uint8_t { mx32, mx16, nv };

template <weight_kind Kind>
inline constexpr int block_of = Kind == weight_kind::mx32 ? 32 : 16;

/// The word of four pairs of codes: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each as a byte.
template <activation T>
[[nodiscard]] __device__ inline std::uint32_t spread_codes(const std::uint32_t (&pair)[4]) {
  // Bits of the word that hold (fraction, low exponent, high exponent, sign) of the first code of each pair; the second
  // code lies 16 bits higher, around the end.
  constexpr int place_for_bfloat16[4][4] = {{0, 1, 2, 9}, {4, 5, 6, 13}, {10, 11, 12, 19}, {14, 7, 8, 15}};
  constexpr int place_for_half[4][4] = {{0, 1, 2, 6}, {7, 8, 9, 13}, {10, 11, 12, 15}, {3, 4, 5, 14}};
  std::uint32_t word = 0;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) {
      const int at = std::same_as<T, half> ? place_for_half[p][bit] : place_for_bfloat16[p][bit];
      word |= (pair[p] >> bit & 1u) << at % 32;
      word |= (pair[p] >> (4 + bit) & 1u) << (at + 16) % 32;
    }
  }
  return word;
}

/// The four pairs of a word as pairs of T, times 2^-126 for bfloat16 and 2^-14 for half.
template <activation T>
__device__ inline void gather_codes(std::uint32_t word, std::uint32_t (&pair)[4]) {
  if constexpr (std::same_as<T, bfloat16>) {
    constexpr std::uint32_t mask = 0x81C081C0u;
    pair[0] = word << 6 & mask;
    pair[1] = word << 2 & mask;
    pair[2] = __funnelshift_r(word, word, 4) & mask;
    pair[3] = (word & 0x81808180u) | (word >> 8 & 0x00400040u);
  } else {
    constexpr std::uint32_t mask = 0x8E008E00u;
    pair[0] = word << 9 & mask;
    pair[1] = word << 2 & mask;
    pair[2] = (word & 0x80008000u) | (word >> 1 & 0x0E000E00u);
    pair[3] = (word << 6 & 0x0E000E00u) | (word << 1 & 0x80008000u);
  }
}

/// How two of the four scale bytes of a word become multipliers for gathered codes: the even ones shifted up by
/// `even_up`, the odd ones by 8 less, then `mask` and `base`. And the power of two that is then missing from all
/// products.
template <activation T, weight_kind Kind>
struct scale_decoding {
  static constexpr bool is_half = std::same_as<T, half>;
  static constexpr bool is_nv = Kind == weight_kind::nv;
  static constexpr int even_up = is_nv ? (is_half ? 7 : 4) : (is_half ? 10 : 7);
  static constexpr std::uint32_t mask =
      is_nv ? (is_half ? 0x7F807F80u : 0x0FF00FF0u) : (is_half ? 0x7C007C00u : 0x7F807F80u);
  static constexpr std::uint32_t base = is_nv && !is_half ? 0x70007000u : 0;
  static constexpr float missing = is_nv ? (is_half ? 0x1p8f : 0x1p9f) : 1.0f;
  /// Stored bytes are one larger than this for an E4M3 exponent of -9, the least.
  static constexpr std::uint32_t e4m3_bias = is_half ? 11 : 10;
};

/// The multipliers of a word of scale bytes (block 0 of row g, of row g + 8, block 1 of row g, of row g + 8): those of
/// a row as a pair of T, block 0 below.
template <activation T, weight_kind Kind>
struct scale_pairs {
  std::uint32_t low, high;  ///< of rows g and g + 8

  __device__ explicit scale_pairs(std::uint32_t word) {
    using rule = scale_decoding<T, Kind>;
    constexpr int odd_up = rule::even_up - 8;
    low = (word << rule::even_up & rule::mask) | rule::base;
    if constexpr (odd_up > 0) {
      high = (word << odd_up & rule::mask) | rule::base;
    } else {
      high = (word >> -odd_up & rule::mask) | rule::base;
    }
  }
};

/// The stored byte of an E4M3 scale below NaN, without its sign: five exponent bits and three of fraction, so that no
/// scale is subnormal. Zero scales have zero codes.
[[nodiscard]] __device__ inline std::uint32_t stored_e4m3(std::uint32_t bits, std::uint32_t bias) {
  const std::uint32_t exponent = bits >> 3 & 15u, fraction = bits & 7u;
  if (exponent != 0) return (exponent + 3 + bias) << 3 | fraction;
  if (fraction == 0) return 0;
  const std::uint32_t power = 31 - static_cast<std::uint32_t>(__clz(static_cast<int>(fraction)));
  return (power + 1 + bias) << 3 | (fraction << (3 - power) & 7u);
}

struct prepare_args {
  const std::uint8_t* codes;
  const std::uint8_t* scales;
  const std::uint8_t* macros;
  const float* tensor_scales;
  std::uint8_t* tiles;
  float* factors;
  std::uint8_t* macros_out;
  std::uint32_t rows, blocks_per_row, block, row_tiles, col_tiles, macros_in, macros_per_row;
  std::uint32_t macro_repeats;  ///< how often a macro byte is stored
  gating_rows gating;
  bool scale_per_matrix;
};

/// Which row of the weights a row of the tiles is.
[[nodiscard]] __device__ inline std::uint32_t source_row(std::uint32_t row, std::uint32_t rows, gating_rows gating) {
  if (gating == gating_rows::none) return row;
  const std::uint32_t output = row / 16 * 8 + row % 8, is_up = row / 8 % 2;
  if (output >= rows / 2) return rows;
  return gating == gating_rows::halves ? is_up * (rows / 2) + output : 2 * output + is_up;
}

/// One thread block prepares 64 rows.
template <activation T, weight_kind Kind>
__global__ void __launch_bounds__(256) prepare_kernel(const prepare_args args) {
  constexpr std::uint32_t block = block_of<Kind>, tile_bytes = 2048 + 4096 / block;
  constexpr std::uint32_t nan_byte =  // decodes to infinity, which times zero codes is NaN
      Kind == weight_kind::nv ? 248u : (std::same_as<T, half> ? 31u : 255u);
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
      factor = ldexpf(1.0f, top[threadIdx.x] - 128);
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
      const std::uint32_t row = first + warp * 16 + lane / 4, byte = t * 32 + step * 8 + lane % 4;
      const std::uint32_t low = source_row(row, args.rows, args.gating);
      const std::uint32_t high = source_row(row + 8, args.rows, args.gating);
      const std::uint32_t pairs[4] = {codes_of(low, byte), codes_of(high, byte), codes_of(low, byte + 4),
                                      codes_of(high, byte + 4)};
      reinterpret_cast<std::uint32_t*>(tile)[i] = spread_codes<T>(pairs);
    }
    if (threadIdx.x < 4096 / block) {
      constexpr std::uint32_t per_lane = 2 * 64 / block;
      const std::uint32_t i = threadIdx.x, warp = i / per_lane % 4, g = i / (4 * per_lane);
      const std::uint32_t in_tile = warp * 16 + g + i % 2 * 8, b = t * (64 / block) + i % per_lane / 2;
      const std::uint32_t row = source_row(first + in_tile, args.rows, args.gating);
      std::uint32_t stored = 0;
      if (row < args.rows && b < args.blocks_per_row) {
        const std::uint32_t scale = scale_of(row, b);
        if constexpr (Kind == weight_kind::nv) {
          stored = (scale & 0x7Fu) == 0x7Fu ? nan_byte : stored_e4m3(scale & 0x7Fu, scale_decoding<T, Kind>::e4m3_bias);
        } else {
          constexpr int top_field = std::same_as<T, half> ? 30 : 254;
          stored = scale == 0xFFu
                       ? nan_byte
                       : static_cast<std::uint32_t>(max(top_field + static_cast<int>(scale) - top[in_tile], 0));
        }
      }
      tile[2048 + i] = static_cast<std::uint8_t>(stored);
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

template <activation T>
result<void> prepare(const stream& s, const packed_view<any_format>& w, const prepared_shape& shape, std::byte* out) {
  if (shape.matrices == 0 || shape.rows == 0 || shape.cols == 0) return {};
  auto* const bytes = reinterpret_cast<std::uint8_t*>(out);
  const packed_shape from = w.shape();
  prepare_args args{};
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
  args.gating = shape.gating;
  args.scale_per_matrix = w.tensor_scales.size() > 1;
  if (shape.matrices > 65535) {
    return error(errc::shape_mismatch,
                 tetromino::detail::text("prepare: expected at most 65535 matrices, got ", shape.matrices));
  }
  const dim3 grid(args.row_tiles, static_cast<unsigned>(shape.matrices));
  if (shape.format.scale == scale_type::e4m3) {
    prepare_kernel<T, weight_kind::nv><<<grid, 256, 0, s.handle>>>(args);
  } else if (shape.format.block == 16) {
    prepare_kernel<T, weight_kind::mx16><<<grid, 256, 0, s.handle>>>(args);
  } else {
    prepare_kernel<T, weight_kind::mx32><<<grid, 256, 0, s.handle>>>(args);
  }
  return check(cudaGetLastError(), "the launch of prepare_kernel");
}

}  // namespace tetromino::cuda::detail
