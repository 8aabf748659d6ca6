#pragma once

#include "hopper.cuh"       // barrier_wait, copy_box
#include "matmul_tile.cuh"  // coded_tile

#include <cuda.h>  // CUtensorMap

#include <cstdint>  // std::uint32_t

/// The product on Hopper for few rows of x, as in decoding, where nothing but the reading of weights should take time.
/// Four warps of a block keep the copy engine busy (one could not: a stage costs it hundreds of cycles): they bring
/// stages of 128 columns, weights and x, into a ring in shared memory. Each of the other warps multiplies 16 rows of
/// weights by all rows of x; where there are fewer rows than warps, several warps take turns at the stages of the same
/// rows, and where there are fewer tiles than multiprocessors, two blocks share one. They add up in the order of their
/// numbers, by way of the shared memory of the block that owns an output.
///
/// A kernel starts while the one before it in the stream still runs, and waits for that one before it touches anything
/// but its own shared memory; with matmul_options::settled_weights it asks for its first weights before it waits.
namespace tetromino::cuda::detail {

/// `Rows` of x; `Stages` in the ring. How 16 warps share out a tile is chosen at launch: narrow_split.
template <weight_kind Kind, int Macros, int Rows, int Stages>
struct narrow_shape {
  static constexpr int rows = Rows, stages = Stages;
  static constexpr int warps = 16, consumers = 32 * warps, producers = 4, threads = consumers + 32 * producers;
  static constexpr std::uint32_t row_tiles = 4;  ///< of weights in a stage, at most
  static constexpr std::uint32_t tile_bytes = 2048 + 4096 / block_of<Kind>;
  static constexpr std::uint32_t box_bytes = Rows * 128;
  static constexpr std::uint32_t weights_at = 2 * box_bytes;
  static constexpr std::uint32_t macros_at = weights_at + row_tiles * 2 * tile_bytes;
  static constexpr std::uint32_t most_macros = 2 * Macros;  ///< of a row in a stage
  static constexpr std::uint32_t stage_bytes = (macros_at + row_tiles * 64 * most_macros + 1023) / 1024 * 1024;
  static constexpr std::uint32_t barriers_at = Stages * stage_bytes;
  static constexpr std::uint32_t factors_at = barriers_at + 256;
  static constexpr std::uint32_t sums_at = factors_at + warps * 16 * 8;
  static constexpr std::uint32_t tiles_before_at = sums_at + warps * 16 * Rows * 4 + 256;
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
  std::uint32_t row_tile, row_tiles;  ///< the first, and how many
  std::uint32_t macros;               ///< of a row in a stage

  __device__ narrow_source(const matmul_args<T>& args_, const output_tile& tile_) : args(args_), tile(tile_) {
    const std::uint32_t group = tile.feature_tile * args.split.groups;
    row_tile = group / 4;
    row_tiles = min((group + args.split.groups - 1) / 4 + 1, args.row_tiles) - row_tile;
    macros = args.macro_block == 0 ? 0 : max(128 / args.macro_block, 1u);
  }
  [[nodiscard]] __device__ std::uint32_t bytes() const {
    return 2 * Shape::box_bytes + row_tiles * (2 * Shape::tile_bytes + 64 * macros);
  }
  /// Lane r of a warp copies what row tile r has.
  __device__ void copy_weights(std::uint32_t stage, std::uint32_t pair, std::uint32_t barrier) const {
    const std::uint32_t r = threadIdx.x % 32;
    if (r >= row_tiles) return;
    const std::size_t row = static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile + r;
    copy_bytes(stage + Shape::weights_at + r * 2 * Shape::tile_bytes,
               args.tiles + (row * args.col_tiles + pair * 2) * Shape::tile_bytes, 2 * Shape::tile_bytes, barrier);
    if (macros != 0) {
      copy_bytes(stage + Shape::macros_at + r * 64 * macros,
                 args.macros + (row * args.macros_per_row + pair * 128 / args.macro_block) * 64, 64 * macros, barrier);
    }
  }
  /// The last two lanes copy x.
  __device__ void copy_x(const CUtensorMap& x_map, std::uint32_t stage, std::uint32_t pair,
                         std::uint32_t barrier) const {
    const std::uint32_t t = 31 - threadIdx.x % 32;
    if (t > 1) return;
    copy_box(stage + t * Shape::box_bytes, &x_map, static_cast<int>(pair * 128 + t * 64),
             static_cast<int>(tile.first_row), barrier);
  }
};

/// The sums of a warp: d[eight rows of x], rows g and g + 8 of a group of 16 rows of weights.
template <class Shape, class T, weight_kind Kind, int Macros>
struct narrow_sums {
  static constexpr int eights = Shape::rows / 8;
  static constexpr int chains = eights > 1 ? 1 : 2;  ///< of products that do not wait for each other
  float d[eights][4];
  float part[chains][eights][4];  ///< within a macro block; without those, all

  __device__ void start() {
#pragma unroll
    for (int i = 0; i < eights * 4; ++i) d[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int i = 0; i < chains * eights * 4; ++i) part[i / 4 / eights][i / 4 % eights][i % 4] = 0.0f;
  }
  __device__ void finish() {
    if constexpr (Macros == 0) {
#pragma unroll
      for (int i = 0; i < chains * eights * 4; ++i) {
        d[i / 4 % eights][i % 4] += part[i / 4 / eights][i / 4 % eights][i % 4];
      }
    }
  }

  /// Adds the products of a stage, 128 columns; `group` of the stage's 16.
  __device__ void add_stage(std::uint32_t stage, std::uint32_t group, std::uint32_t macro_block) {
    const std::uint32_t lane = threadIdx.x % 32, g = lane / 4;
    const std::uint32_t x_at = stage + lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;
    const std::uint32_t tiles = stage + Shape::weights_at + group / 4 * 2 * Shape::tile_bytes;
    const std::uint32_t codes_at = tiles + group % 4 * 512 + lane * 16;
    const std::uint32_t scales_at = tiles + 2048 + (group % 4 * 8 + g) * (128 / block_of<Kind>);
#pragma unroll
    for (std::uint32_t t = 0; t < 2; ++t) {
      coded_tile<Kind> coded;
      coded.read(codes_at + t * Shape::tile_bytes, scales_at + t * Shape::tile_bytes);
#pragma unroll
      for (std::uint32_t half = 0; half < 2; ++half) {
        std::uint32_t b[eights][4];
#pragma unroll
        for (std::uint32_t e = 0; e < eights; ++e) {
          load_matrices((x_at ^ (half * 64)) + t * Shape::box_bytes + e * 1024, b[e]);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          std::uint32_t a[4];
          coded.template decode<T>(static_cast<int>(half) * 2 + s, a);
#pragma unroll
          for (int e = 0; e < eights; ++e) {
            multiply_add<T>(part[s % chains][e], a, b[e][2 * s], b[e][2 * s + 1]);
          }
        }
        if constexpr (Macros == 2) fold(stage, group, t * 2 + half, 4);
      }
      if (Macros == 1 && (t == 1 || macro_block == 64)) {
        if (macro_block == 64) {
          fold(stage, group, t, 2);
        } else {
          fold(stage, group, 0, 1);
        }
      }
    }
  }

  /// d += part / (the factors of macro block `index` of the stage's `count`).
  __device__ void fold(std::uint32_t stage, std::uint32_t group, std::uint32_t index, std::uint32_t count) {
    const std::uint32_t g = threadIdx.x % 32 / 4;
    const std::uint32_t at = stage + Shape::macros_at + (group / 4 * count + index) * 64 + group % 4 * 16 + g;
    const float low = inverse_macro(load_byte(at)), high = inverse_macro(load_byte(at + 8));
#pragma unroll
    for (int c = 0; c < chains; ++c) {
#pragma unroll
      for (int e = 0; e < eights; ++e) {
        float(&from)[4] = part[c][e];
        d[e][0] += from[0] * low, d[e][1] += from[1] * low;
        d[e][2] += from[2] * high, d[e][3] += from[3] * high;
        from[0] = from[1] = from[2] = from[3] = 0.0f;
      }
    }
  }
};

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 1)
    narrow_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ unsigned char unaligned[];
  // The same offset in all blocks of a cluster, since they have the same shared memory.
  unsigned char* const memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const std::uint32_t shared = shared_address(memory);
  const std::uint32_t full = shared + Shape::barriers_at, empty = full + 8 * Shape::stages;
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);
  auto* const factors = reinterpret_cast<float2*>(memory + Shape::factors_at);  // and biases
  const std::uint32_t sums_at = shared + Shape::sums_at;
  const auto* const sums = reinterpret_cast<const float2*>(memory + Shape::sums_at);
  constexpr float missing = scale_decoding<T, Kind>::missing;
  const std::uint32_t parts = args.split.parts, phases = args.split.phases, groups = args.split.groups;
  const std::uint32_t part = cluster_rank();
  const std::uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const std::uint32_t first_tile = blockIdx.x / parts, tile_step = gridDim.x / parts;
  const std::uint32_t all_stages = args.col_tiles / 2;
  const std::uint32_t first = all_stages * part / parts, count = all_stages * (part + 1) / parts - first;
  const bool is_producer = warp >= Shape::warps, adds_up = parts * phases > 1;

  if (threadIdx.x == Shape::consumers) {
    prefetch_map(&x_map);
    for (std::uint32_t i = 0; i < Shape::stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, groups);
    }
    barrier_init_done();
  }
  start_next_kernel();
  __syncthreads();
  // Weights of the first tile, as far as the ring has room, before the kernel before this one has ended.
  const std::uint32_t producer = warp - Shape::warps;  // each takes its turn at the stages
  std::uint32_t early = 0;
  if (is_producer && args.has_settled_weights && args.row_offsets == nullptr) {
    const narrow_source<Shape, T> source(args, find_tile<Shape::rows>(args, tiles_before, first_tile));
    early = min(count, static_cast<std::uint32_t>(Shape::stages));
    for (std::uint32_t i = producer; i < early; i += Shape::producers) {
      if (lane == 0) barrier_expect(full + 8 * i, source.bytes());
      __syncwarp();
      source.copy_weights(shared + i * Shape::stage_bytes, first + i, full + 8 * i);
    }
  }
  wait_for_last_kernel();
  if (args.row_offsets != nullptr) count_row_tiles<Shape::rows>(args.row_offsets, args.matrices, tiles_before);
  if (adds_up) {
    if (find_tile<Shape::rows>(args, tiles_before, first_tile).rows == 0) return;  // all blocks of a cluster do
    cluster_arrive();
  }

  // Stages are numbered through; number n lies in slot n % stages.
  std::uint32_t base = 0;
  if (is_producer) {
    for (std::uint32_t number = first_tile;; number += tile_step, base += count) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const narrow_source<Shape, T> source(args, tile);
      for (std::uint32_t i = producer; i < count; i += Shape::producers) {
        const std::uint32_t slot = (base + i) % Shape::stages, parity = (base + i) / Shape::stages % 2 ^ 1;
        const std::uint32_t stage = shared + slot * Shape::stage_bytes, barrier = full + 8 * slot;
        if (base + i >= early) {
          barrier_wait(empty + 8 * slot, parity);
          if (lane == 0) barrier_expect(barrier, source.bytes());
          __syncwarp();
          source.copy_weights(stage, first + i, barrier);
        }
        source.copy_x(x_map, stage, first + i, barrier);
      }
      if (adds_up) break;
    }
    __syncwarp();
    if (adds_up) cluster_wait();
  } else {
    const std::uint32_t phase = warp / groups, mine = warp - phase * groups;  // of the tile's groups of 16 rows
    narrow_sums<Shape, T, Kind, Macros> own;
    for (std::uint32_t number = first_tile; phase < phases; number += tile_step, base += count) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const std::uint32_t first_group = tile.feature_tile * groups, row = (first_group + mine) * 16;
      if (phase == 0 && lane < 16) factors[mine * 16 + lane] = load_row(args, tile.matrix, row + lane);
      own.start();
      for (std::uint32_t i = phase; i < count; i += phases) {
        const std::uint32_t slot = (base + i) % Shape::stages;
        barrier_wait(full + 8 * slot, (base + i) / Shape::stages % 2);
        own.add_stage(shared + slot * Shape::stage_bytes, first_group % 4 + mine, args.macro_block);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
      }
      own.finish();
      __syncwarp();
      if (adds_up) break;
#pragma unroll
      for (std::uint32_t i = 0; i < Shape::rows / 4; ++i) {
        const std::uint32_t m = i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (m < tile.rows) {
          write_loaded(args, factors + mine * 16 + g, row + g, tile.first_row + m, own.d[i / 2][i % 2] * missing,
                       own.d[i / 2][i % 2 + 2] * missing);
        }
      }
      __syncwarp();
    }
    if (adds_up) cluster_wait();  // until the others have started
    if (adds_up && phase < phases) {
      // Pairs of sums are dealt out among the blocks: each sends those of its parts to the block that adds them up.
      const std::uint32_t share = (groups * 8 * Shape::rows + parts - 1) / parts;
#pragma unroll
      for (std::uint32_t i = 0; i < Shape::rows / 4; ++i) {
        const std::uint32_t m = i / 2 * 8 + lane % 4 * 2 + i % 2;
        const std::uint32_t index = (mine * 8 + g) * Shape::rows + m, owner = index / share;
        store_to_rank(sums_at + ((part * phases + phase) * share + index - owner * share) * 8, owner,
                      own.d[i / 2][i % 2], own.d[i / 2][i % 2 + 2]);
      }
    }
  }
  if (adds_up) {  // one tile for each cluster
    __syncwarp();
    cluster_sync();
    const output_tile tile = find_tile<Shape::rows>(args, tiles_before, first_tile);
    const std::uint32_t all = groups * 8 * Shape::rows, share = (all + parts - 1) / parts;
    for (std::uint32_t i = threadIdx.x; i < share && part * share + i < all; i += Shape::threads) {
      const std::uint32_t p = part * share + i, m = p % Shape::rows;
      const std::uint32_t row = p / Shape::rows / 8 * 16 + p / Shape::rows % 8;
      if (m >= tile.rows) continue;
      float low = 0.0f, high = 0.0f;
      for (std::uint32_t r = 0; r < parts * phases; ++r) {
        const float2 sum = sums[r * share + i];
        low += sum.x, high += sum.y;
      }
      write_loaded(args, factors + row, tile.feature_tile * groups * 16 + row, tile.first_row + m, low * missing,
                   high * missing);
    }
  }
#endif
}

}  // namespace tetromino::cuda::detail
