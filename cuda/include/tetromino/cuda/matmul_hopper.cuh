#pragma once

#include "hopper.cuh"       // wgmma
#include "matmul_args.cuh"  // matmul_args
#include "matmul_tile.cuh"  // coded_tile

#include <cuda.h>  // CUtensorMap

#include <cstdint>  // std::uint32_t

/// The product on Hopper. One warp keeps the copy engine busy: it brings tiles of prepared weights and boxes of
/// activations into a ring of stages in shared memory. The other warps are warpgroups of 64 weight rows each: a lane
/// reads its codes, decodes them in registers, and those are the A operand of the warpgroup's matrix products; the
/// activations are the B operand. So a tile of the output is [weight rows, x rows], with sums in registers.
///
/// Where x has few rows, there are fewer tiles than multiprocessors: then the blocks of a cluster share a tile, each
/// takes a part of the columns, and they add up through each other's shared memory.
namespace tetromino::cuda::detail {

/// The shape of a kernel: `Rows` of x and Groups * 64 rows of weights in a tile; stages of `Tiles` tiles of 64 columns.
template <activation T, weight_kind Kind, int Rows, int Groups, int Tiles, int Stages>
struct hopper_shape {
  static constexpr int rows = Rows, groups = Groups, tiles = Tiles, stages = Stages;
  static constexpr bool is_large = Rows >= 128;
  static constexpr int consumers = Groups * 128;
  static constexpr int threads = consumers + (is_large ? 128 : 32);
  static_assert(!is_large || Groups == 2 || Groups == 3, "registers are shared out for two or three warpgroups");
  static constexpr int sums = Rows / 2;  ///< of a lane
  static constexpr std::uint32_t tile_bytes = 2048 + 4096 / block_of<Kind>;
  static constexpr std::uint32_t box_bytes = Rows * 128;
  static constexpr std::uint32_t weights_at = Tiles * box_bytes;
  static constexpr std::uint32_t stage_bytes = (weights_at + Groups * Tiles * tile_bytes + 1023) / 1024 * 1024;
  static constexpr std::uint32_t barriers_at = Stages * stage_bytes;
  static constexpr std::uint32_t output_at = barriers_at + 256;
  /// What a warpgroup's outputs take on their way to memory: 64 rows of x at a time, padded against bank conflicts.
  static constexpr std::uint32_t staged_row_bytes = 64 * 2 + 16;
  static constexpr std::uint32_t staged_bytes = is_large ? Groups * 64 * staged_row_bytes : 0;
  /// Sums of all lanes, where a cluster shares a tile: they take the place of the stages, which are then done with.
  static constexpr std::uint32_t partial_bytes = consumers * sums * 4;
  static_assert(Rows == 256 || partial_bytes <= Stages * stage_bytes);
  static constexpr std::uint32_t tiles_before_at = output_at + staged_bytes;
  /// Shared memory for `matrices` matrices.
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) {
    return 1024 + tiles_before_at + (matrices + 1) * 4;
  }
};

#if TETROMINO_CUDA_HOPPER

/// Brings all stages of a block's tiles into shared memory; a warp does, whose lanes share out the copies.
template <class Shape, class T>
__device__ void produce(const CUtensorMap& x_map, const matmul_args<T>& args, std::uint32_t shared,
                        const std::uint32_t* tiles_before, std::uint32_t first_tile, std::uint32_t tile_step,
                        std::uint32_t part, std::uint32_t parts) {
  const std::uint32_t full = shared + Shape::barriers_at, empty = full + 8 * Shape::stages;
  const std::uint32_t all_stages = args.col_tiles / Shape::tiles;
  const std::uint32_t lane = threadIdx.x % 32;
  std::uint32_t slot = 0, parity = 1;
  for (std::uint32_t number = first_tile;; number += tile_step) {
    const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
    if (tile.rows == 0) break;
    const std::uint32_t row_tile = tile.feature_tile * Shape::groups;
    const std::uint32_t groups = min(static_cast<std::uint32_t>(Shape::groups), args.row_tiles - row_tile);
    const std::uint8_t* weights = args.tiles + (static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile) *
                                                   args.col_tiles * args.tile_bytes;
    const std::size_t group_stride = static_cast<std::size_t>(args.col_tiles) * args.tile_bytes;
    for (std::uint32_t k = all_stages * part / parts; k < all_stages * (part + 1) / parts; ++k) {
      barrier_wait(empty + 8 * slot, parity);
      const std::uint32_t stage = shared + slot * Shape::stage_bytes, barrier = full + 8 * slot;
      constexpr std::uint32_t bytes = Shape::tiles * Shape::tile_bytes;
      if (lane == 0) barrier_expect(barrier, Shape::tiles * Shape::box_bytes + groups * bytes);
      __syncwarp();
      if (lane < groups) {
        copy_bytes(stage + Shape::weights_at + lane * bytes,
                   weights + lane * group_stride + static_cast<std::size_t>(k) * bytes, bytes, barrier);
      }
      if (const std::uint32_t t = 31 - lane; t < Shape::tiles) {
        copy_box(stage + t * Shape::box_bytes, &x_map, static_cast<int>((k * Shape::tiles + t) * 64),
                 static_cast<int>(tile.first_row), barrier);
      }
      if (++slot == Shape::stages) slot = 0, parity ^= 1;
    }
    if (parts > 1) break;
  }
}

/// The sums of one warpgroup for one tile of the output. `Macros`: macro blocks that a tile of 64 columns touches; 0
/// for none, 1 where a macro block is 64 columns or more.
template <class Shape, class T, weight_kind Kind, int Macros>
struct tile_sums {
  static constexpr int sums = Shape::sums;
  float d[sums];
  std::uint32_t a[2][4][4];  ///< A operands of two tiles of weights: one multiplies while the other is decoded

  std::uint32_t codes_at, scales_at;  ///< of this lane in a tile

  __device__ tile_sums() {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    codes_at = warp * 512 + lane * 16;
    scales_at = 2048 + (warp * 8 + lane / 4) * (2 * 64 / block_of<Kind>);
    keep(codes_at), keep(scales_at);
  }

  /// Keeps the compiler from moving uses of the sums to before a wait.
  __device__ void hold() {
#pragma unroll
    for (int i = 0; i < sums; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }

  __device__ void scale(float low, float high) {
#pragma unroll
    for (int i = 0; i < sums; i += 4) d[i] *= low, d[i + 1] *= low, d[i + 2] *= high, d[i + 3] *= high;
  }

  using coded = coded_tile<Kind>;

  /// Reads this lane's part of a tile in shared memory.
  [[nodiscard]] __device__ coded load(std::uint32_t tile) const {
    coded out;
    out.read(tile + codes_at, tile + scales_at);
    return out;
  }

  /// The macro-block factors of the lane's two rows, now and for the next macro block.
  struct macro_walk {
    const std::uint8_t* at;
    std::uint32_t left;  ///< macro blocks after the current one
    macro_pair now{1.0f, 1.0f}, next{1.0f, 1.0f};

    __device__ void start(const std::uint8_t* first, std::uint32_t after) {
      at = first, left = after;
      now = load_macros(at);
      if (left != 0) next = load_macros(at + 64);
    }
    __device__ void advance() {
      now = next;
      at += 64;
      if (--left != 0) next = load_macros(at + 64);
    }
  };

  /// Brings the sums, which are in units of 1 / now, to units of the next macro block.
  __device__ void enter_next(macro_walk& macros) {
    scale(__fdividef(macros.next.low, macros.now.low), __fdividef(macros.next.high, macros.now.high));
    macros.advance();
  }

  /// Multiplies through the stages of columns [first, last), in units of stages.
  __device__ void run(const matmul_args<T>& args, std::uint32_t shared, std::uint32_t group, std::uint32_t first,
                      std::uint32_t last, const std::uint8_t* macro_bytes, std::uint32_t& slot, std::uint32_t& parity) {
    const std::uint32_t full = shared + Shape::barriers_at, empty = full + 8 * Shape::stages;
    const std::uint32_t mine = shared + Shape::weights_at + group * (Shape::tiles * Shape::tile_bytes);
    const std::uint32_t tiles = (last - first) * Shape::tiles;
#pragma unroll
    for (int i = 0; i < sums; ++i) d[i] = 0.0f;
    if (tiles == 0) return;

    macro_walk macros;
    std::uint32_t macro_tiles = 1, until_next = 1;  // tiles of a macro block; those before the next one starts
    if constexpr (Macros != 0) {
      const std::uint32_t tile = first * Shape::tiles;
      macro_tiles = max(args.macro_block / 64, 1u);
      until_next = macro_tiles - tile % macro_tiles;
      const std::uint32_t macro = tile / macro_tiles * Macros;
      macros.start(macro_bytes + macro * 64, args.macros_per_row - 1 - macro);
    }

    barrier_wait(full + 8 * slot, parity);
    {
      const coded first_tile = load(mine + slot * Shape::stage_bytes);
#pragma unroll
      for (int s = 0; s < 4; ++s) first_tile.template decode<T>(s, a[0][s]);
    }
    // One tile: its products, and meanwhile the decoding of the next one, if there is one.
    const auto step = [&]<int Buffer, bool HasNext>() {
      constexpr int b = Buffer;
      constexpr bool ends_stage = Shape::tiles == 1 || b == 1;
      const std::uint32_t this_slot = slot;
      const std::uint32_t box = shared + slot * Shape::stage_bytes + (Shape::tiles == 1 ? 0 : b * Shape::box_bytes);
      if (ends_stage && ++slot == Shape::stages) slot = 0, parity ^= 1;
      coded next;
      if constexpr (HasNext) {
        if constexpr (ends_stage) barrier_wait(full + 8 * slot, parity);
        next = load(mine + slot * Shape::stage_bytes + (ends_stage ? 0 : Shape::tile_bytes));
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (Macros == 2 && s == 2) {
          wgmma_commit();
          wgmma_wait<0>();
          hold();
          enter_next(macros);
        }
        wgmma_fence();
        wgmma<T>(d, a[b][s], swizzled_tile(box, 2u * s));
        if (s == 3) wgmma_commit();
        if constexpr (HasNext) {
          // The tensor cores read operands in registers one product at a time, so that decoding must lie between the
          // products to go on beside them. A branch that the compiler cannot see through keeps it there.
          std::uint32_t yes;
          asm volatile("mov.u32 %0, %1;" : "=r"(yes) : "r"(tiles));
          if (yes != 0) next.template decode<T>(s, a[b ^ 1][s]);
        }
      }
      wgmma_wait<0>();
      hold();
      if constexpr (ends_stage) barrier_arrive(empty + 8 * this_slot);  // each lane, for its own reads
      if constexpr (Macros != 0 && HasNext) {
        if (--until_next == 0) {
          until_next = macro_tiles;
          enter_next(macros);
        }
      }
    };
    std::uint32_t left = tiles;
    for (; left > 2; left -= 2) {
      step.template operator()<0, true>();
      step.template operator()<1, true>();
    }
    if (left == 2) {
      step.template operator()<0, true>();
      step.template operator()<1, false>();
    } else {
      step.template operator()<0, false>();
    }
    constexpr float missing = scale_decoding<T, Kind>::missing;
    if constexpr (Macros != 0) {
      scale(__fdividef(missing, macros.now.low), __fdividef(missing, macros.now.high));
    } else if constexpr (missing != 1.0f) {
      scale(missing, missing);
    }
  }

  /// Writes the tile straight from the lanes: little, or where the output's rows are not aligned.
  __device__ void write(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows) const {
    const std::uint32_t column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < sums; ++i) {
      if (i % 4 >= 2) continue;
      const std::uint32_t m = static_cast<std::uint32_t>(i / 4 * 8 + i % 2) + column;
      if (m < tile.rows) write_pair(args, rows, tile.first_row + m, d[i], d[i + 2]);
    }
  }

  /// Writes the tile by way of shared memory, 64 rows of x at a time, in whole lines.
  __device__ void write_staged(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows,
                               std::uint32_t first_output, unsigned char* staged, int barrier) const {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
    const bool is_gated = args.gating != gating_rows::none;
    const std::uint32_t features = is_gated ? 32 : 64;
    const std::uint32_t to = shared_address(staged);
#pragma unroll
    for (int part = 0; part < Shape::rows / 64; ++part) {
      if (part * 64 >= static_cast<int>(tile.rows)) break;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {  // of eight rows of x
        const float* const at = d + part * 32 + pair * 8;
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = at[i] * rows.factor[i / 2 % 2] + rows.bias[i / 2 % 2];
        const std::uint32_t row = static_cast<std::uint32_t>(pair) * 16 + lane % 8 + lane / 16 * 8;
        std::uint32_t matrices[4];
        if (is_gated) {
#pragma unroll
          for (int i = 0; i < 8; i += 4) y[i] = silu(y[i]) * y[i + 2], y[i + 1] = silu(y[i + 1]) * y[i + 3];
          matrices[0] = pack_pair<T>(y[0], y[1]), matrices[2] = pack_pair<T>(y[4], y[5]);
          matrices[1] = matrices[0], matrices[3] = matrices[2];  // written twice, to the same place
          store_transposed(to + row * Shape::staged_row_bytes + warp * 16, matrices);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) matrices[i] = pack_pair<T>(y[2 * i], y[2 * i + 1]);
          store_transposed(to + row * Shape::staged_row_bytes + warp * 32 + lane / 8 % 2 * 16, matrices);
        }
      }
      sync_threads(barrier, 128);
      const std::uint32_t pieces = features / 8;  // of a row, 16 bytes each
      for (std::uint32_t i = thread; i < 64 * pieces; i += 128) {
        const std::uint32_t row = i / pieces, piece = i % pieces, m = static_cast<std::uint32_t>(part) * 64 + row;
        if (m >= tile.rows || first_output + piece * 8 >= args.outputs) continue;
        *reinterpret_cast<uint4*>(args.out + (tile.first_row + m) * args.out_stride + first_output + piece * 8) =
            *reinterpret_cast<const uint4*>(staged + row * Shape::staged_row_bytes + piece * 16);
      }
      sync_threads(barrier, 128);
    }
  }
};

#endif

template <class Shape, class T, weight_kind Kind, int Macros, int BlocksPerMultiprocessor>
__global__ void __launch_bounds__(Shape::threads, BlocksPerMultiprocessor)
    hopper_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ unsigned char unaligned[];
  // The same offset in all blocks of a cluster, since they have the same shared memory.
  unsigned char* const memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const std::uint32_t shared = shared_address(memory);
  const std::uint32_t parts = cluster_size(), part = cluster_rank();
  unsigned char* const output = memory + Shape::output_at;
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);
  constexpr int all_groups = 7;  // the barrier of all consumers

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    for (std::uint32_t i = 0; i < Shape::stages; ++i) {
      barrier_init(shared + Shape::barriers_at + 8 * i, 1);
      barrier_init(shared + Shape::barriers_at + 8 * (Shape::stages + i), Shape::consumers);
    }
    barrier_init_done();
  }
  start_next_kernel();
  wait_for_last_kernel();
  if (args.row_offsets != nullptr) {
    count_row_tiles<Shape::rows>(args.row_offsets, args.matrices, tiles_before);
  } else {
    __syncthreads();
  }

  const std::uint32_t first_tile = blockIdx.x / parts, tile_step = gridDim.x / parts;
  if (threadIdx.x >= Shape::consumers) {
    if constexpr (Shape::is_large) give_registers<40>();
    if (threadIdx.x < Shape::consumers + 32) {
      produce<Shape>(x_map, args, shared, tiles_before, first_tile, tile_step, part, parts);
    }
  } else {
    if constexpr (Shape::is_large) take_registers<Shape::groups == 2 ? 232 : 152>();
    const std::uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const std::uint32_t all_stages = args.col_tiles / Shape::tiles;
    const std::uint32_t first = all_stages * part / parts, last = all_stages * (part + 1) / parts;
    std::uint32_t slot = 0, parity = 0;
    tile_sums<Shape, T, Kind, Macros> sums;
    for (std::uint32_t number = first_tile;; number += tile_step) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const std::uint32_t row_tile = tile.feature_tile * Shape::groups + group;
      const bool is_idle = row_tile >= args.row_tiles;  // a warpgroup past the last weight rows
      const std::uint8_t* macros = nullptr;
      if constexpr (Macros != 0) {
        macros = args.macros + (static_cast<std::size_t>(tile.matrix) * args.row_tiles + (is_idle ? 0 : row_tile)) *
                                   args.macros_per_row * 64;
        macros += warp * 16 + lane / 4;
      }
      const std::uint32_t in_matrix = (is_idle ? 0 : row_tile) * 64 + warp * 16 + lane / 4;
      const row_pair rows = find_rows(args, tile.matrix, in_matrix);
      sums.run(args, shared, group, first, last, macros, slot, parity);
      if (parts > 1) {
        sync_threads(all_groups, Shape::consumers);
        auto* const mine = reinterpret_cast<float*>(memory) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < Shape::sums; ++i) mine[i * Shape::consumers] = sums.d[i];
        break;
      }
      if (is_idle) continue;
      if (Shape::is_large && args.is_out_aligned) {
        const std::uint32_t first_output = row_tile * (args.gating == gating_rows::none ? 64 : 32);
        sums.write_staged(args, tile, rows, first_output, output + group * (64 * Shape::staged_row_bytes),
                          1 + static_cast<int>(group));
      } else {
        sums.write(args, tile, rows);
      }
    }
  }

  if (parts > 1) {  // one tile for each cluster
    __syncwarp();
    cluster_sync();
    const output_tile tile = find_tile<Shape::rows>(args, tiles_before, first_tile);
    if (threadIdx.x < Shape::consumers && tile.rows != 0) {
      // Lanes' pairs of sums (rows g and g + 8 of the weights, one row of x) are dealt out among the blocks.
      constexpr std::uint32_t pairs = Shape::consumers * Shape::sums / 2;
      const std::uint32_t end = pairs * (part + 1) / parts;
      for (std::uint32_t p = pairs * part / parts + threadIdx.x; p < end; p += Shape::consumers) {
        const std::uint32_t thread = p % Shape::consumers, i = p / Shape::consumers, index = i / 2 * 4 + i % 2;
        const std::uint32_t m = index / 4 * 8 + thread % 4 * 2 + index % 2;
        const std::uint32_t row_tile = tile.feature_tile * Shape::groups + thread / 128;
        if (m >= tile.rows || row_tile >= args.row_tiles) continue;
        const std::uint32_t at = shared + (index * Shape::consumers + thread) * 4;
        const std::uint32_t row = row_tile * 64 + thread / 32 % 4 * 16 + thread % 32 / 4;
        const row_pair rows = find_rows(args, tile.matrix, row);
        const pair_sum sum = sum_of_ranks(at, at + 2 * Shape::consumers * 4, parts);
        write_pair(args, rows, tile.first_row + m, sum.low, sum.high);
      }
    }
    cluster_sync();  // nobody leaves while another reads
  }
#endif
}

}  // namespace tetromino::cuda::detail
