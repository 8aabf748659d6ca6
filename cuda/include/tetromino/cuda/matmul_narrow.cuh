#pragma once

#include "hopper.cuh"       // cluster_sync
#include "matmul_args.cuh"  // matmul_args

#include <cstdint>  // std::uint32_t

/// The product for few rows of x, as in decoding, where nothing but the reading of weights should take time. A warp
/// holds 16 rows of weights and streams its columns straight into registers, several tiles ahead; the warps of a block
/// share out the columns, read x from shared memory, and add up at the end.
namespace tetromino::cuda::detail {

/// d[16, 8] += a[16, 16] b[16, 8].
template <activation T>
__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::same_as<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Two 16-bit floats times two others.
template <activation T>
[[nodiscard]] __device__ inline std::uint32_t multiply_pairs(std::uint32_t x, std::uint32_t y) {
  if constexpr (std::same_as<T, bfloat16>) {
    return as_word(__hmul2_rn(as_bfloat16_pair(x), as_bfloat16_pair(y)));
  } else {
    return as_word(__hmul2_rn(as_half_pair(x), as_half_pair(y)));
  }
}

/// A lane's part of a tile of weights, still coded: a word of codes for each step of 16 columns, and block scales.
template <weight_kind Kind>
struct coded_tile {
  static constexpr int scale_words = Kind == weight_kind::mx32 ? 1 : 2;
  std::uint32_t word[4];
  std::uint32_t scales[scale_words];

  /// The A operand of step s.
  template <activation T>
  __device__ void decode(int s, std::uint32_t (&a)[4]) const {
    const int block = s * 16 / block_of<Kind>;
    const std::uint32_t both = scales[block / 2] >> (block % 2 * 16);
    const std::uint32_t low = scale_pair<T, Kind>(both & 0xFFu), high = scale_pair<T, Kind>(both >> 8 & 0xFFu);
    gather_codes<T>(word[s], a);
    a[0] = multiply_pairs<T>(a[0], low), a[1] = multiply_pairs<T>(a[1], high);
    a[2] = multiply_pairs<T>(a[2], low), a[3] = multiply_pairs<T>(a[3], high);
  }
};

/// Hides from the compiler how a value came about, so that it keeps it in registers in place of computing it again.
template <class Value>
__device__ inline void keep(Value& value) {
  if constexpr (sizeof(Value) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

/// Sixteen bytes that are read once: they need no place in the first cache.
[[nodiscard]] __device__ inline uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// Copies 16 bytes into shared memory without waiting, of which the first `bytes` are read and the others zero.
__device__ inline void copy_async(std::uint32_t to, const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(std::uint32_t from, std::uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
}

/// `Rows` of x, 8 or 16; `Groups` * 16 rows of weights for a block; `Splits` warps share the columns of each group.
template <int Rows, int Groups, int Splits>
struct narrow_shape {
  static constexpr int rows = Rows, groups = Groups, splits = Splits;
  static constexpr int threads = 32 * Groups * Splits;
  static constexpr std::uint32_t sums = Groups * 16 * Rows;
  /// Bytes of shared memory: sums of all splits, `x_rows` rows of x in `tiles` tiles of 64 columns, row tiles.
  static constexpr std::size_t shared_bytes(std::size_t x_rows, std::size_t tiles, std::size_t matrices) {
    return sums * Splits * 4 + x_rows * (tiles * 128 + 16) + (matrices + 1) * 4;
  }
};

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 2)
    narrow_kernel(const matmul_args<T> args, std::uint32_t x_rows, std::uint32_t most_tiles) {
  constexpr std::uint32_t block = block_of<Kind>, tile_bytes = 2048 + 4096 / block;
  constexpr int ahead = 4;                 // tiles of weights on their way
  constexpr int eights = Shape::rows / 8;  // of rows of x
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const sums = reinterpret_cast<float*>(memory);
  unsigned char* const x = memory + Shape::sums * Shape::splits * 4;
  const std::uint32_t x_stride = most_tiles * 128 + 16;
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(x + x_rows * x_stride);
#if TETROMINO_CUDA_HOPPER
  const std::uint32_t parts = cluster_size(), part = cluster_rank();
#else
  const std::uint32_t parts = 1, part = 0;
#endif
  if (args.row_offsets != nullptr) count_row_tiles<Shape::rows>(args.row_offsets, args.matrices, tiles_before);
  const output_tile tile = find_tile<Shape::rows>(args, tiles_before, blockIdx.x / parts);
  if (tile.rows == 0) return;  // all blocks of a cluster do

  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const std::uint32_t group = tile.feature_tile * Shape::groups + warp % Shape::groups;  // of 16 rows
  const std::uint32_t row_tile = group / 4, split = warp / Shape::groups;
  const std::uint32_t block_first = args.col_tiles * part / parts;
  const std::uint32_t block_tiles = args.col_tiles * (part + 1) / parts - block_first;
  const std::uint32_t first = block_tiles * split / Shape::splits;
  const std::uint32_t tiles = row_tile < args.row_tiles ? block_tiles * (split + 1) / Shape::splits - first : 0;

  const std::size_t in_weights = static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile;
  const std::uint8_t* const weights = args.tiles + (in_weights * args.col_tiles + block_first + first) * tile_bytes;
  const std::uint8_t* codes_at = weights + group % 4 * 512 + lane * 16;
  const std::uint8_t* scales_at = weights + 2048 + (group % 4 * 8 + g) * (2 * 64 / block);
  keep(codes_at), keep(scales_at);
  const auto load = [&](std::uint32_t t) {  // tile t from where the warp stands
    coded_tile<Kind> out{};
    const uint4 codes = load_once(codes_at + t * tile_bytes);
    out.word[0] = codes.x, out.word[1] = codes.y, out.word[2] = codes.z, out.word[3] = codes.w;
    if constexpr (Kind == weight_kind::mx32) {
      out.scales[0] = __ldg(reinterpret_cast<const std::uint32_t*>(scales_at + t * tile_bytes));
    } else {
      const uint2 both = __ldg(reinterpret_cast<const uint2*>(scales_at + t * tile_bytes));
      out.scales[0] = both.x, out.scales[1] = both.y;
    }
    return out;
  };
  coded_tile<Kind> coming[ahead];
#pragma unroll
  for (std::uint32_t i = 0; i < ahead; ++i) {
    if (i < tiles) coming[i] = load(i);
  }

  // x, for all warps of the block
  const std::uint32_t pieces = block_tiles * 8;  // of a row, 16 bytes each
  for (std::uint32_t i = threadIdx.x; i < tile.rows * pieces; i += Shape::threads) {
    const std::uint32_t m = i / pieces, piece = i - m * pieces, column = block_first * 64 + piece * 8;
    const std::uint32_t there = column < args.cols ? min(args.cols - column, 8u) * 2 : 0;
    const T* from = args.x + (tile.first_row + m) * args.x_stride + (there != 0 ? column : 0);
    copy_async(static_cast<std::uint32_t>(__cvta_generic_to_shared(x + m * x_stride + piece * 16)), from, there);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  // Rows of x that do not exist repeat the last one: their sums are not written.
  std::uint32_t x_at[eights];
#pragma unroll
  for (std::uint32_t e = 0; e < eights; ++e) {
    x_at[e] = static_cast<std::uint32_t>(__cvta_generic_to_shared(x)) +
              min(e * 8 + lane % 8, tile.rows - 1) * x_stride + first * 128 + lane / 8 * 16;
    keep(x_at[e]);
  }
  std::uint32_t column = (block_first + first) * 64;
  const std::uint8_t* macros = nullptr;
  if constexpr (Macros != 0) macros = args.macros + in_weights * args.macros_per_row * 64 + group % 4 * 16 + g;

  float d[eights][4] = {};
  const auto multiply = [&](const coded_tile<Kind>& weight, std::uint32_t t) {
    float part_sums[eights][4] = {};
    float inverse_low = 1.0f, inverse_high = 1.0f;
#pragma unroll
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
      if constexpr (Macros != 0) {
        if (half_tile == 0 || Macros == 2) {
          const std::uint32_t macro = (column + t * 64 + half_tile * 32) / args.macro_block;
          const macro_pair factor = load_macros(macros + macro * 64);
          inverse_low = __frcp_rn(factor.low), inverse_high = __frcp_rn(factor.high);
        }
      }
      float(&into)[eights][4] = Macros != 0 ? part_sums : d;
      std::uint32_t b[eights][4];
#pragma unroll
      for (int e = 0; e < eights; ++e) load_matrices(x_at[e] + t * 128 + half_tile * 64, b[e]);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        std::uint32_t a[4];
        weight.template decode<T>(half_tile * 2 + s, a);
#pragma unroll
        for (int e = 0; e < eights; ++e) multiply_add<T>(into[e], a, b[e][2 * s], b[e][2 * s + 1]);
      }
      if constexpr (Macros != 0) {
        if (half_tile == 1 || Macros == 2) {
#pragma unroll
          for (int e = 0; e < eights; ++e) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              d[e][i] += part_sums[e][i] * (i < 2 ? inverse_low : inverse_high);
              part_sums[e][i] = 0.0f;
            }
          }
        }
      }
    }
  };
  const auto advance = [&] {
    codes_at += ahead * tile_bytes, scales_at += ahead * tile_bytes;
    column += ahead * 64;
#pragma unroll
    for (int e = 0; e < eights; ++e) x_at[e] += ahead * 128;
  };
  std::uint32_t left = tiles;
  for (; left >= 2 * ahead; left -= ahead) {
#pragma unroll
    for (std::uint32_t i = 0; i < ahead; ++i) {
      multiply(coming[i], i);
      coming[i] = load(i + ahead);
    }
    advance();
  }
#pragma unroll
  for (std::uint32_t i = 0; i < ahead; ++i) {
    if (i < left) multiply(coming[i], i);
    if (i + ahead < left) coming[i] = load(i + ahead);
  }
  advance();
#pragma unroll
  for (std::uint32_t i = 0; i < ahead; ++i) {
    if (i + ahead < left) multiply(coming[i], i);
  }

  // sums [split][group][pair of rows g, g + 8][row of x] of pairs
#pragma unroll
  for (std::uint32_t e = 0; e < eights; ++e) {
#pragma unroll
    for (std::uint32_t i = 0; i < 2; ++i) {
      const std::uint32_t pair = (warp % Shape::groups * 8 + g) * Shape::rows + e * 8 + lane % 4 * 2 + i;
      reinterpret_cast<float2*>(sums + split * Shape::sums)[pair] = make_float2(d[e][i], d[e][i + 2]);
    }
  }
  __syncthreads();
  constexpr std::uint32_t pairs = Shape::sums / 2;
  constexpr float missing = scale_decoding<T, Kind>::missing;
  const auto finish = [&](std::uint32_t pair, float low, float high) {
    const std::uint32_t m = pair % Shape::rows, row = pair / Shape::rows;
    const std::uint32_t g16 = tile.feature_tile * Shape::groups + row / 8;
    if (m >= tile.rows || g16 / 4 >= args.row_tiles) return;
    write_pair(args, find_rows(args, tile.matrix, g16 * 16 + row % 8), tile.first_row + m, low * missing,
               high * missing);
  };
  for (std::uint32_t pair = threadIdx.x; pair < pairs; pair += Shape::threads) {
    float low = 0, high = 0;
#pragma unroll
    for (std::uint32_t s = 0; s < Shape::splits; ++s) {
      const float2 v = reinterpret_cast<const float2*>(sums + s * Shape::sums)[pair];
      low += v.x, high += v.y;
    }
    if (parts == 1) {
      finish(pair, low, high);
    } else {
      reinterpret_cast<float2*>(sums)[pair] = make_float2(low, high);
    }
  }
#if TETROMINO_CUDA_HOPPER
  if (parts > 1) {
    cluster_sync();
    for (std::uint32_t pair = pairs * part / parts + threadIdx.x; pair < pairs * (part + 1) / parts;
         pair += Shape::threads) {
      const std::uint32_t at = shared_address(sums) + pair * 8;
      const pair_sum sum = sum_of_ranks(at, at + 4, parts);
      finish(pair, sum.low, sum.high);
    }
    cluster_sync();  // nobody leaves while another reads
  }
#endif
}

}  // namespace tetromino::cuda::detail
