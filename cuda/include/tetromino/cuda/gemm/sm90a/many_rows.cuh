#pragma once

#include "../../arch/sm90a.cuh"  // copy_box
#include "../args.cuh"           // matmul_args
#include "../macro_walk.cuh"     // macro_walk
#include "../weight_tile.cuh"    // coded_tile
#include "sums.cuh"              // lane_sums, stage_ring
#include "warpgroup_output.cuh"  // row_scales, write_each, write_staged

#include <cuda.h>  // CUtensorMap

#include <concepts>  // std::same_as
#include <cstdint>   // std::uint32_t

/// The product on Hopper for many rows of x. One warp keeps the copy engine busy: it brings boxes of activations and
/// tiles of weights into a ring of stages in shared memory. The other warps are warpgroups of 64 weight rows
/// each: a lane reads its codes, decodes them in registers, and those are the A operand of the warpgroup's matrix
/// products; the activations are the B operand. So a tile of the output is [weight rows, x rows], with sums in
/// registers. Activations are of 16 bits, or in E4M3, and the weights are decoded to what they are.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The shape of a kernel: `Rows` of x, which is of type X, and Groups * 64 rows of weights in a tile; stages of 128
/// bytes of each row of x.
template <class X, weight_kind Kind, int Rows, int Groups, int Stages>
struct many_rows_shape {
  using element = X;
  static constexpr bool is_e4m3 = std::same_as<X, e4m3>;
  static constexpr int tiles = is_e4m3 ? 2 : 1;  ///< of weights, of a warpgroup in a stage
  static constexpr int rows = Rows, groups = Groups, stages = Stages;
  static constexpr int consumers = Groups * 128, threads = consumers + 128;
  static_assert(Groups == 2, "registers are shared out for two warpgroups");
  static constexpr int sums = Rows / 2;                                            ///< of a lane
  static constexpr std::uint32_t weight_bytes = tiles * weight_tile<Kind>::bytes;  ///< of a warpgroup, in a stage
  static constexpr std::uint32_t box_bytes = Rows * 128;
  static constexpr std::uint32_t weights_at = box_bytes;
  static constexpr std::uint32_t stage_bytes = (weights_at + Groups * weight_bytes + 1023) / 1024 * 1024;
  static constexpr std::uint32_t barriers_at = Stages * stage_bytes;
  static constexpr std::uint32_t output_at = barriers_at + 256;
  static constexpr std::uint32_t table_at = output_at + Groups * staged_bytes;  ///< of e4m3_decoding, for E4M3
  static constexpr std::uint32_t tiles_before_at = table_at + (is_e4m3 ? e4m3_decoding::table_bytes : 0);
  /// Shared memory for `matrices` matrices.
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) {
    return 1024 + tiles_before_at + (matrices + 1) * 4;
  }
};

#if TETROMINO_CUDA_HOPPER

/// What the copies of a tile of the output are made of.
template <class Shape, class T, weight_kind Kind>
struct stage_source {
  const std::uint8_t* weights;  ///< of this lane's warpgroup
  int first_row;

  __device__ stage_source(const matmul_args<T>& args, const output_tile& tile) {
    const std::uint32_t row_tile = tile.feature_tile * Shape::groups, lane = threadIdx.x % 32;
    // A warpgroup past the last weight rows gets those: for E4M3 it must not take just any bytes for scales, which are
    // addresses to it.
    weights = args.weights.template tiles_of<Kind>(tile.matrix, min(row_tile + lane, args.weights.row_tiles - 1));
    first_row = static_cast<int>(tile.first_row);
  }
  /// A lane for each warpgroup. Its barrier also expects x.
  __device__ void copy_weights(std::uint32_t stage, std::uint32_t k, std::uint32_t barrier) const {
    const std::uint32_t lane = threadIdx.x % 32;
    if (lane == 0) barrier_expect(barrier, Shape::box_bytes + Shape::groups * Shape::weight_bytes);
    __syncwarp();
    if (lane < Shape::groups) {
      copy_bytes(stage + Shape::weights_at + lane * Shape::weight_bytes,
                 weights + static_cast<std::size_t>(k) * Shape::weight_bytes, Shape::weight_bytes, barrier);
    }
  }
  __device__ void copy_x(const CUtensorMap& x_map, std::uint32_t stage, std::uint32_t k, std::uint32_t barrier) const {
    if (threadIdx.x % 32 == 31) copy_box(stage, &x_map, static_cast<int>(k * Shape::tiles * 64), first_row, barrier);
  }
};

/// The warp that brings the stages of a block's tiles. Stages are numbered through, and number n lies in slot
/// n % stages.
template <class Shape, class T, weight_kind Kind>
struct stage_producer {
  const matmul_args<T>& args;
  std::uint32_t shared;
  stage_ring<Shape::stages> ring;
  std::uint32_t early = 0;  ///< stages whose weights were asked for at once
  std::uint32_t slot = 0, parity = 1, number = 0;

  __device__ stage_producer(const matmul_args<T>& args_, std::uint32_t shared_)
      : args(args_), shared(shared_), ring{shared + Shape::barriers_at} {}
  /// Asks for the first weights of a tile, as far as the ring has room.
  __device__ void start(const output_tile& tile) {
    const stage_source<Shape, T, Kind> source(args, tile);
    early = min(args.weights.col_tiles / Shape::tiles, static_cast<std::uint32_t>(Shape::stages));
    for (std::uint32_t i = 0; i < early; ++i) {
      source.copy_weights(shared + i * Shape::stage_bytes, i, ring.full(i));
    }
  }
  /// Brings the stages of one tile.
  __device__ void run(const CUtensorMap& x_map, const output_tile& tile) {
    const stage_source<Shape, T, Kind> source(args, tile);
    for (std::uint32_t i = 0; i < args.weights.col_tiles / Shape::tiles; ++i, ++number) {
      const std::uint32_t stage = shared + slot * Shape::stage_bytes;
      if (number >= early) {
        barrier_wait(ring.empty(slot), parity);
        source.copy_weights(stage, i, ring.full(slot));
      }
      source.copy_x(x_map, stage, i, ring.full(slot));
      if (++slot == Shape::stages) slot = 0, parity ^= 1;
    }
  }
};

/// The sums of one warpgroup for one tile of the output. `Macros`: macro blocks that a tile of 64 columns touches; 0
/// for none, 1 where a macro block is 64 columns or more.
template <class Shape, class T, weight_kind Kind, int Macros>
struct tile_sums {
  static constexpr int sums = Shape::sums;
  lane_sums<sums> sum;
  std::uint32_t a[2][4][4];  ///< A operands of two stages: one multiplies while the other is decoded

  std::uint32_t codes_at, scales_at;  ///< of this lane in a tile

  __device__ tile_sums() {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    codes_at = weight_tile<Kind>::codes_of(warp, lane), scales_at = weight_tile<Kind>::scales_of(warp, lane);
    keep(codes_at), keep(scales_at);
  }

  /// This lane's part of a stage of weights.
  struct coded_stage {
    coded_tile<Kind> tile[Shape::tiles];

    /// The A operand of step s; `table`: that of e4m3_decoding, in shared memory.
    __device__ void decode(int s, std::uint32_t table, std::uint32_t (&to)[4]) const {
      constexpr int steps = tile_steps<typename Shape::element>;
      tile[s / steps].template decode<typename Shape::element>(s % steps, table, to);
    }
  };
  /// Reads it in shared memory.
  [[nodiscard]] __device__ coded_stage load(std::uint32_t stage) const {
    coded_stage out;
#pragma unroll
    for (std::uint32_t i = 0; i < Shape::tiles; ++i) {
      const std::uint32_t tile = stage + i * weight_tile<Kind>::bytes;
      out.tile[i].read(tile + codes_at, tile + scales_at);
    }
    return out;
  }

  /// d += a b for the first N rows of x of the tile.
  template <int N>
  __device__ void multiply(const std::uint32_t (&by)[4], std::uint64_t box) {
    wgmma<typename Shape::element>(reinterpret_cast<float(&)[N / 2]>(sum.d), by, box);
  }

  /// Multiplies the first N rows of x through all columns. Stage by stage: its products, and beside them the decoding
  /// of the next one. The first product of a stage is on its way before the wait for those of the stage before.
  template <int N>
  __device__ void run(const matmul_args<T>& args, std::uint32_t shared, std::uint32_t group,
                      const std::uint8_t* macro_bytes, std::uint32_t& slot, std::uint32_t& parity) {
    const stage_ring<Shape::stages> ring{shared + Shape::barriers_at};
    const std::uint32_t mine = shared + Shape::weights_at + group * Shape::weight_bytes;
    const std::uint32_t table = shared + Shape::table_at;
    const std::uint32_t count = args.weights.col_tiles / Shape::tiles;
    sum.clear();
    if (count == 0) return;

    macro_walk macros;
    std::uint32_t macro_tiles = 1, until_next = 1;  // tiles of a macro block; those before the next one starts
    if constexpr (Macros != 0) {
      macro_tiles = max(args.weights.macro_block / 64, 1u);
      until_next = macro_tiles;
      macros.start(macro_bytes, args.weights.macros_per_row - 1);
    }

    std::uint32_t last_empty = 0;  // the barrier of the stage before, until it is told
    // Each lane tells for its own reads: racecheck knows what comes before a thread's arrival at an mbarrier, but not
    // that a __syncwarp puts the other lanes' reads there too (seen on a kernel of nothing but such a ring).
    const auto tell = [&] {
      if (last_empty != 0) barrier_arrive(last_empty);
    };
    barrier_wait(ring.full(slot), parity);
    {
      const coded_stage first = load(mine + slot * Shape::stage_bytes);
#pragma unroll
      for (int s = 0; s < 4; ++s) first.decode(s, table, a[0][s]);
    }
    const auto step = [&]<int Buffer, bool HasNext>() {
      constexpr int b = Buffer;
      const std::uint32_t box = shared + slot * Shape::stage_bytes, this_empty = ring.empty(slot);
      if (++slot == Shape::stages) slot = 0, parity ^= 1;
      coded_stage next;
      if constexpr (HasNext) {
        barrier_wait(ring.full(slot), parity);
        next = load(mine + slot * Shape::stage_bytes);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (Macros == 2 && s == 2) sum.enter_next(macros);
        wgmma_fence();
        multiply<N>(a[b][s], swizzled_tile(box, 2u * s));
        wgmma_commit();
        if (s == 0) {
          wgmma_wait<1>();
          tell();
          last_empty = this_empty;
        }
        if constexpr (HasNext) {
          // The tensor cores read operands in registers one product at a time, so that decoding must lie between the
          // products to go on beside them. A branch that the compiler cannot see through keeps it there.
          std::uint32_t yes;
          asm volatile("mov.u32 %0, %1;" : "=r"(yes) : "r"(count));
          if (yes != 0) next.decode(s, table, a[b ^ 1][s]);
        }
      }
      if constexpr (Macros != 0) {
        if (HasNext && --until_next == 0) {
          until_next = macro_tiles;
          sum.enter_next(macros);
        }
      }
    };
    std::uint32_t left = count;
    for (; left > 2; left -= 2) {
      step.template operator()<0, true>();
      step.template operator()<1, true>();
    }
    if (Shape::tiles == 1 || left == 2) {  // there is an even number of tiles
      step.template operator()<0, true>();
      step.template operator()<1, false>();
    } else {
      step.template operator()<0, false>();
    }
    wgmma_wait<0>();
    sum.hold();
    tell();
    if constexpr (!Shape::is_e4m3) sum.template finish<Macros>(macros, scale_decoding<T, Kind>::missing);
  }
};

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 1)
    many_rows_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ unsigned char unaligned[];
  unsigned char* const memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const std::uint32_t shared = shared_address(memory);
  unsigned char* const output = memory + Shape::output_at;
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    stage_ring<Shape::stages>{shared + Shape::barriers_at}.init(Shape::consumers);
    barrier_init_done();
  }
  if constexpr (Shape::is_e4m3) fill_decoding_table(memory + Shape::table_at);
  start_next_kernel();
  __syncthreads();
  const bool is_consumer = threadIdx.x < Shape::consumers;
  const bool is_producer = !is_consumer && threadIdx.x < Shape::consumers + 32;
  stage_producer<Shape, T, Kind> producer(args, shared);
  if (is_producer && args.weights.are_settled && args.x.row_offsets == nullptr) {
    producer.start(find_tile<Shape::rows>(args, tiles_before, blockIdx.x));
  }
  wait_for_last_kernel();
  if (args.x.row_offsets != nullptr)
    count_row_tiles<Shape::rows>(args.x.row_offsets, args.weights.matrices, tiles_before);

  if (!is_consumer) {
    give_registers<40>();
    for (std::uint32_t number = blockIdx.x; is_producer; number += gridDim.x) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      producer.run(x_map, tile);
    }
  } else {
    take_registers<232>();
    const std::uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    tile_sums<Shape, T, Kind, Macros> sums;
    std::uint32_t slot = 0, parity = 0;
    for (std::uint32_t number = blockIdx.x;; number += gridDim.x) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const std::uint32_t row_tile = tile.feature_tile * Shape::groups + group;
      const bool is_idle = row_tile >= args.weights.row_tiles;  // a warpgroup past the last weight rows
      const std::uint8_t* macros = nullptr;
      if constexpr (Macros != 0) {
        macros = args.weights.macros_of(tile.matrix, is_idle ? 0 : row_tile) + lane / 4 * 8 + warp * 2;
      }
      const std::uint32_t in_matrix = (is_idle ? 0 : row_tile) * 64 + warp * 16 + lane / 4;
      const row_pair rows = find_rows(args, tile.matrix, in_matrix);
      [[maybe_unused]] row_scales<Shape::rows> x_scales;
      if constexpr (Shape::is_e4m3) x_scales.load(args, tile);
      // A tile that is not half full takes products of half the width.
      if (tile.rows * 2 <= Shape::rows) {
        sums.template run<Shape::rows / 2>(args, shared, group, macros, slot, parity);
      } else {
        sums.template run<Shape::rows>(args, shared, group, macros, slot, parity);
      }
      if constexpr (Shape::is_e4m3) x_scales.apply(sums.sum.d);
      if (is_idle) continue;
      if (args.out.is_aligned) {
        const std::uint32_t first_output = row_tile * (args.weights.gating == gating_rows::none ? 64 : 32);
        write_staged(args, tile, rows, sums.sum.d, first_output, output + group * staged_bytes,
                     1 + static_cast<int>(group));
      } else {
        write_each(args, tile, rows, sums.sum.d);
      }
    }
  }
#endif
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
