#pragma once

#include "hopper.cuh"       // barrier_wait, copy_box
#include "matmul_tile.cuh"  // coded_tile

#include <cuda.h>  // CUtensorMap

#include <cstdint>  // std::uint32_t

/// The product on Hopper for few rows of x, as in decoding, where nothing but the reading of weights should take time.
/// One thread of a block keeps the copy engine busy: it brings stages of 128 columns, weights and x, into a ring in
/// shared memory. Each warp multiplies its own rows of weights by all rows of x. The blocks of a cluster share a tile:
/// each takes a part of the columns, and they add up through each other's shared memory.
///
/// A kernel starts while the one before it in the stream still runs, and waits for that one before it touches anything
/// but its own shared memory; with matmul_options::settled_weights it asks for its first weights before it waits.
namespace tetromino::cuda::detail {

/// `Rows` of x; `Warps` warps of `Groups` * 16 rows of weights each; `Stages` in the ring; `Blocks` on a
/// multiprocessor.
template <weight_kind Kind, int Macros, int Rows, int Warps, int Groups, int Stages, int Blocks>
struct narrow_shape {
  static constexpr int rows = Rows, warps = Warps, groups = Groups, stages = Stages, blocks = Blocks;
  static constexpr int consumers = 32 * Warps, threads = consumers + 32;
  static constexpr std::uint32_t features = Warps * Groups * 16;  ///< rows of weights
  static constexpr std::uint32_t row_tiles = features / 64;
  static_assert(features % 64 == 0);
  static constexpr std::uint32_t tile_bytes = 2048 + 4096 / block_of<Kind>;
  static constexpr std::uint32_t box_bytes = Rows * 128;
  static constexpr std::uint32_t weights_at = 2 * box_bytes;
  static constexpr std::uint32_t macros_at = weights_at + row_tiles * 2 * tile_bytes;
  static constexpr std::uint32_t most_macros = 2 * Macros;  ///< of a row in a stage
  static constexpr std::uint32_t stage_bytes = (macros_at + row_tiles * 64 * most_macros + 1023) / 1024 * 1024;
  static constexpr std::uint32_t barriers_at = Stages * stage_bytes;
  static constexpr std::uint32_t factors_at = barriers_at + 256;
  static constexpr std::uint32_t sums_at = factors_at + features * 8;
  static constexpr std::uint32_t tiles_before_at = sums_at + features * Rows * 4;
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) {
    return 1024 + tiles_before_at + (matrices + 1) * 4;
  }
};

#if TETROMINO_CUDA_HOPPER

/// What one block's copies of a tile of the output are made of.
template <class Shape, class T>
struct narrow_source {
  const matmul_args<T>& args;
  output_tile tile;
  std::uint32_t row_tile, row_tiles;  ///< the first, and how many exist
  std::uint32_t macros;               ///< of a row in a stage

  __device__ narrow_source(const matmul_args<T>& args_, const output_tile& tile_) : args(args_), tile(tile_) {
    row_tile = tile.feature_tile * Shape::row_tiles;
    row_tiles = min(Shape::row_tiles, args.row_tiles - row_tile);
    macros = args.macro_block == 0 ? 0 : max(128 / args.macro_block, 1u);
  }
  [[nodiscard]] __device__ std::uint32_t bytes() const {
    return 2 * Shape::box_bytes + row_tiles * (2 * Shape::tile_bytes + 64 * macros);
  }
  __device__ void copy_weights(std::uint32_t stage, std::uint32_t pair, std::uint32_t barrier) const {
    const std::size_t first = static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile;
    for (std::uint32_t r = 0; r < row_tiles; ++r) {
      copy_bytes(stage + Shape::weights_at + r * 2 * Shape::tile_bytes,
                 args.tiles + ((first + r) * args.col_tiles + pair * 2) * Shape::tile_bytes, 2 * Shape::tile_bytes,
                 barrier);
      if (macros != 0) {
        copy_bytes(stage + Shape::macros_at + r * 64 * macros,
                   args.macros + ((first + r) * args.macros_per_row + pair * 128 / args.macro_block) * 64, 64 * macros,
                   barrier);
      }
    }
  }
  __device__ void copy_x(const CUtensorMap& x_map, std::uint32_t stage, std::uint32_t pair,
                         std::uint32_t barrier) const {
#pragma unroll
    for (std::uint32_t t = 0; t < 2; ++t) {
      copy_box(stage + t * Shape::box_bytes, &x_map, static_cast<int>(pair * 128 + t * 64),
               static_cast<int>(tile.first_row), barrier);
    }
  }
};

/// The sums of a warp: d[group][eight rows of x], rows g and g + 8 of the weights.
template <class Shape, class T, weight_kind Kind, int Macros>
struct narrow_sums {
  static constexpr int groups = Shape::groups, eights = Shape::rows / 8;
  float d[groups][eights][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < groups * eights * 4; ++i) d[i / 4 / eights][i / 4 % eights][i % 4] = 0.0f;
  }

  /// Adds the products of a stage, [features, 128] by [rows, 128].
  __device__ void add_stage(std::uint32_t stage, std::uint32_t macro_block) {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const std::uint32_t x_at = lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;
    float part[groups][eights][4];
#pragma unroll
    for (std::uint32_t t = 0; t < 2; ++t) {
      coded_tile<Kind> coded[groups];
#pragma unroll
      for (std::uint32_t j = 0; j < groups; ++j) {
        const std::uint32_t group = warp * groups + j;
        const std::uint32_t tile = stage + Shape::weights_at + (group / 4 * 2 + t) * Shape::tile_bytes;
        coded[j].read(tile + group % 4 * 512 + lane * 16, tile + 2048 + (group % 4 * 8 + g) * (128 / block_of<Kind>));
      }
#pragma unroll
      for (std::uint32_t half = 0; half < 2; ++half) {
        if (Macros != 0 && (Macros == 2 || half == 0)) {
          if (Macros == 2 || t == 0 || macro_block == 64) {
#pragma unroll
            for (int i = 0; i < groups * eights * 4; ++i) part[i / 4 / eights][i / 4 % eights][i % 4] = 0.0f;
          }
        }
        std::uint32_t b[eights][4];
#pragma unroll
        for (std::uint32_t e = 0; e < eights; ++e) {
          load_matrices(stage + t * Shape::box_bytes + e * 1024 + (x_at ^ (half * 64)), b[e]);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
          for (int j = 0; j < groups; ++j) {
            std::uint32_t a[4];
            coded[j].template decode<T>(static_cast<int>(half) * 2 + s, a);
#pragma unroll
            for (int e = 0; e < eights; ++e) {
              multiply_add<T>(Macros != 0 ? part[j][e] : d[j][e], a, b[e][2 * s], b[e][2 * s + 1]);
            }
          }
        }
        if (Macros == 2) {
          fold(part, stage, t * 2 + half, 4);
        } else if (Macros == 1 && half == 1) {
          if (macro_block == 64) {
            fold(part, stage, t, 2);
          } else if (t == 1) {
            fold(part, stage, 0, 1);
          }
        }
      }
    }
  }

  /// d += part / (the factors of macro block `index` of the stage's `count`).
  __device__ void fold(const float (&part)[groups][eights][4], std::uint32_t stage, std::uint32_t index,
                       std::uint32_t count) {
    const std::uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (std::uint32_t j = 0; j < groups; ++j) {
      const std::uint32_t group = warp * groups + j;
      const std::uint32_t at = stage + Shape::macros_at + (group / 4 * count + index) * 64 + group % 4 * 16 + g;
      const float low = inverse_macro(load_byte(at)), high = inverse_macro(load_byte(at + 8));
#pragma unroll
      for (int e = 0; e < eights; ++e) {
        d[j][e][0] += part[j][e][0] * low, d[j][e][1] += part[j][e][1] * low;
        d[j][e][2] += part[j][e][2] * high, d[j][e][3] += part[j][e][3] * high;
      }
    }
  }
};

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks)
    narrow_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ unsigned char unaligned[];
  // The same offset in all blocks of a cluster, since they have the same shared memory.
  unsigned char* const memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const std::uint32_t shared = shared_address(memory);
  const std::uint32_t full = shared + Shape::barriers_at, empty = full + 8 * Shape::stages;
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);
  auto* const factors = reinterpret_cast<float2*>(memory + Shape::factors_at);  // and biases
  auto* const sums = reinterpret_cast<float2*>(memory + Shape::sums_at);
  const std::uint32_t parts = cluster_size(), part = cluster_rank();
  const std::uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  constexpr float missing = scale_decoding<T, Kind>::missing;
  const std::uint32_t first_tile = blockIdx.x / parts, tile_step = gridDim.x / parts;
  const std::uint32_t all_pairs = args.col_tiles / 2;
  const std::uint32_t first = all_pairs * part / parts, last = all_pairs * (part + 1) / parts;
  const bool is_producer = threadIdx.x == Shape::consumers;

  if (is_producer) {
    prefetch_map(&x_map);
    for (std::uint32_t i = 0; i < Shape::stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, Shape::warps);
    }
    barrier_init_done();
  }
  start_next_kernel();
  // Weights of the first tile, as far as the ring has room, before the kernel before this one has ended.
  std::uint32_t early = 0;
  if (is_producer && args.has_settled_weights && args.row_offsets == nullptr) {
    const narrow_source<Shape, T> source(args, find_tile<Shape::rows>(args, tiles_before, first_tile));
    early = min(last - first, static_cast<std::uint32_t>(Shape::stages));
    for (std::uint32_t i = 0; i < early; ++i) {
      barrier_expect(full + 8 * i, source.bytes());
      source.copy_weights(shared + i * Shape::stage_bytes, first + i, full + 8 * i);
    }
  }
  wait_for_last_kernel();
  if (args.row_offsets != nullptr) {
    count_row_tiles<Shape::rows>(args.row_offsets, args.matrices, tiles_before);
  } else {
    __syncthreads();
  }

  if (is_producer) {
    std::uint32_t slot = 0, parity = 1;
    for (std::uint32_t number = first_tile;; number += tile_step) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const narrow_source<Shape, T> source(args, tile);
      for (std::uint32_t pair = first; pair < last; ++pair) {
        const std::uint32_t stage = shared + slot * Shape::stage_bytes, barrier = full + 8 * slot;
        if (early != 0) {
          --early;
        } else {
          barrier_wait(empty + 8 * slot, parity);
          barrier_expect(barrier, source.bytes());
          source.copy_weights(stage, pair, barrier);
        }
        source.copy_x(x_map, stage, pair, barrier);
        if (++slot == Shape::stages) slot = 0, parity ^= 1;
      }
      if (parts > 1) break;
    }
  }
  if (threadIdx.x < Shape::consumers) {
    std::uint32_t slot = 0, parity = 0;
    narrow_sums<Shape, T, Kind, Macros> mine;
    for (std::uint32_t number = first_tile;; number += tile_step) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const std::uint32_t first_row = tile.feature_tile * Shape::features;
      for (std::uint32_t i = lane; i < Shape::groups * 16; i += 32) {
        const std::uint32_t in_block = warp * (Shape::groups * 16) + i;
        factors[in_block] = load_row(args, tile.matrix, first_row + in_block);
      }
      mine.clear();
      for (std::uint32_t pair = first; pair < last; ++pair) {
        barrier_wait(full + 8 * slot, parity);
        mine.add_stage(shared + slot * Shape::stage_bytes, args.macro_block);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
        if (++slot == Shape::stages) slot = 0, parity ^= 1;
      }
      __syncwarp();
#pragma unroll
      for (std::uint32_t j = 0; j < Shape::groups; ++j) {
        const std::uint32_t group = warp * Shape::groups + j;
#pragma unroll
        for (std::uint32_t e = 0; e < Shape::rows / 8; ++e) {
#pragma unroll
          for (std::uint32_t i = 0; i < 2; ++i) {
            const std::uint32_t m = e * 8 + lane % 4 * 2 + i;
            if (parts > 1) {
              sums[(group * 8 + g) * Shape::rows + m] = make_float2(mine.d[j][e][i], mine.d[j][e][i + 2]);
            } else if (m < tile.rows) {
              write_loaded(args, factors + group * 16 + g, first_row + group * 16 + g, tile.first_row + m,
                           mine.d[j][e][i] * missing, mine.d[j][e][i + 2] * missing);
            }
          }
        }
      }
      if (parts > 1) break;
      __syncwarp();
    }
  }
  if (parts > 1) {  // one tile for each cluster
    __syncwarp();
    cluster_sync();
    const output_tile tile = find_tile<Shape::rows>(args, tiles_before, first_tile);
    constexpr std::uint32_t pairs = Shape::features / 2 * Shape::rows;
    for (std::uint32_t p = pairs * part / parts + threadIdx.x; p < pairs * (part + 1) / parts; p += Shape::threads) {
      const std::uint32_t m = p % Shape::rows, row = p / Shape::rows / 8 * 16 + p / Shape::rows % 8;
      if (m >= tile.rows) continue;
      const std::uint32_t at = shared + Shape::sums_at + p * 8;
      const pair_sum sum = sum_of_ranks(at, at + 4, parts);
      write_loaded(args, factors + row, tile.feature_tile * Shape::features + row, tile.first_row + m,
                   sum.low * missing, sum.high * missing);
    }
    cluster_sync();  // nobody leaves while another reads
  }
#endif
}

}  // namespace tetromino::cuda::detail
