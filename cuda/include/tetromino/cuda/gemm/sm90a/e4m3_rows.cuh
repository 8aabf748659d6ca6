#pragma once

#include "../../arch/sm90a.cuh"  // copy_box
#include "../args.cuh"           // matmul_args
#include "../epilogue.cuh"       // find_rows
#include "../weight_tile.cuh"    // coded_tile, e4m3_decoding
#include "sums.cuh"              // lane_sums, stage_ring
#include "warpgroup_output.cuh"  // row_scales, write_each, write_staged

#include <cuda.h>  // CUtensorMap

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// The product on Hopper of activations in E4M3 over experts. The height of a tile follows, on the device, from the
/// rows of x that its matrix has, by sixteens, and its products have just that width. One warp keeps the copy engine
/// busy with boxes of 16 rows of activations and tiles of weights; the others are warpgroups of 64 weight rows each,
/// whose lanes make E4M3 of their codes in registers: those are the A operand, activations the B operand. A stage is
/// 128 columns, four products.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The shape of a kernel: up to `Rows` of x and Groups * 64 rows of weights in a tile of the output.
template <weight_kind Kind, int Rows, int Groups, int Stages>
struct e4m3_rows_shape {
  static_assert(Groups == 3 || Groups == 4);
  static constexpr int rows = Rows, groups = Groups, stages = Stages;
  static constexpr int consumers = groups * 128;
  static constexpr int registers = Groups == 3 ? 160 : 112;  ///< of a consumer
  static constexpr int threads = consumers + 128;  ///< of the last 128, one warp copies; the rest give registers
  static constexpr int sums = rows / 2;            ///< of a lane
  static constexpr std::uint32_t box_bytes = 16 * 128;
  static constexpr std::uint32_t weights_at = rows / 16 * box_bytes;
  static constexpr std::uint32_t weight_bytes = 2 * weight_tile<Kind>::bytes;  ///< of a warpgroup, in a stage
  static constexpr std::uint32_t stage_bytes = (weights_at + groups * weight_bytes + 1023) / 1024 * 1024;
  static constexpr std::uint32_t barriers_at = stages * stage_bytes;
  static constexpr std::uint32_t output_at = barriers_at + 256;
  static constexpr std::uint32_t table_at = output_at + groups * staged_bytes;
  static constexpr std::uint32_t tiles_before_at = table_at + e4m3_decoding::table_bytes;
  /// Shared memory for `matrices` matrices.
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) { return tiles_before_at + (matrices + 1) * 4; }
};

#if TETROMINO_CUDA_HOPPER

/// The warp that brings the stages of a block's tiles into the ring.
template <class Shape, weight_kind Kind, class T>
struct e4m3_rows_producer {
  const matmul_args<T>& args;
  std::uint32_t shared, count;  ///< stages of a tile
  stage_ring<Shape::stages> ring;

  __device__ e4m3_rows_producer(const matmul_args<T>& args_, std::uint32_t shared_)
      : args(args_), shared(shared_), count(args_.weights.col_tiles / 2), ring{shared_ + Shape::barriers_at} {}

  /// What the copies of a tile are made of.
  struct source {
    std::uint32_t boxes;
    const std::uint8_t* weights;  ///< of this lane's warpgroup
    int first_row;
  };
  [[nodiscard]] __device__ source source_of(const output_tile& tile) const {
    source out;
    const std::uint32_t row_tile = tile.feature_tile * Shape::groups, lane = threadIdx.x % 32;
    out.boxes = (tile.rows + 15) / 16;
    // A warpgroup past the last weight rows gets those: scales are addresses to it, so that it must not read just any.
    out.weights = args.weights.template tiles_of<Kind>(tile.matrix, min(row_tile + lane, args.weights.row_tiles - 1));
    out.first_row = static_cast<int>(tile.first_row);
    return out;
  }
  /// Asks for stage k of weights, a lane for each warpgroup. Its barrier also expects x.
  __device__ void copy_weights(const source& from, std::uint32_t slot, std::uint32_t k) const {
    const std::uint32_t lane = threadIdx.x % 32, stage = shared + slot * Shape::stage_bytes;
    if (lane == 0) {
      barrier_expect(ring.full(slot), from.boxes * Shape::box_bytes + Shape::groups * Shape::weight_bytes);
    }
    __syncwarp();
    if (lane < Shape::groups) {
      copy_bytes(stage + Shape::weights_at + lane * Shape::weight_bytes,
                 from.weights + static_cast<std::size_t>(k) * Shape::weight_bytes, Shape::weight_bytes,
                 ring.full(slot));
    }
  }
  /// Brings all stages of the block's tiles.
  __device__ void run(const CUtensorMap& x_map, const std::uint32_t* tiles_before) {
    const std::uint32_t lane = threadIdx.x % 32;
    std::uint32_t slot = 0, parity = 1;
    for (std::uint32_t tile_number = blockIdx.x;; tile_number += gridDim.x) {
      const output_tile tile = find_fitted_tile(args, tiles_before, tile_number);
      if (tile.rows == 0) return;
      const source from = source_of(tile);
      for (std::uint32_t i = 0; i < count; ++i) {
        barrier_wait(ring.empty(slot), parity);
        copy_weights(from, slot, i);
        if (lane < from.boxes) {
          copy_box(shared + slot * Shape::stage_bytes + lane * Shape::box_bytes, &x_map, static_cast<int>(i * 128),
                   from.first_row + static_cast<int>(lane * 16), ring.full(slot));
        }
        if (++slot == Shape::stages) slot = 0, parity ^= 1;
      }
    }
  }
};

/// The sums of one warpgroup for its tiles of the output, one after the other.
template <class Shape, weight_kind Kind, class T>
struct e4m3_rows_walk {
  const stage_ring<Shape::stages> ring;
  const std::uint32_t shared, table, count;  ///< the last: stages of a tile
  std::uint32_t codes_at, scales_at;         ///< of this lane in a stage
  std::uint32_t slot = 0, parity = 0;
  lane_sums<Shape::sums> sum;
  std::uint32_t a[4][4];  ///< the A operands of a stage's products: each is decoded anew while others multiply

  __device__ e4m3_rows_walk(const matmul_args<T>& args, std::uint32_t shared_)
      : ring{shared_ + Shape::barriers_at},
        shared(shared_),
        table(shared_ + Shape::table_at),
        count(args.weights.col_tiles / 2) {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const std::uint32_t mine = shared + Shape::weights_at + group * Shape::weight_bytes;
    codes_at = mine + weight_tile<Kind>::codes_of(warp, lane),
    scales_at = mine + weight_tile<Kind>::scales_of(warp, lane);
    keep(codes_at), keep(scales_at);
  }

  /// This lane's part of a stage of weights.
  struct coded_stage {
    coded_tile<Kind> tile[2];
  };
  /// Waits for the stage in the ring's slot, and reads it.
  [[nodiscard]] __device__ coded_stage load() const {
    barrier_wait(ring.full(slot), parity);
    coded_stage out;
#pragma unroll
    for (std::uint32_t i = 0; i < 2; ++i) {
      const std::uint32_t at = slot * Shape::stage_bytes + i * weight_tile<Kind>::bytes;
      out.tile[i].read(codes_at + at, scales_at + at);
    }
    return out;
  }
  [[nodiscard]] __device__ e4m3_decoding::pair_of_rows magnitudes(const coded_stage& coded, int s) const {
    return coded.tile[s / 2].e4m3_magnitudes(s % 2, table);
  }
  __device__ void decode(const coded_stage& coded, int s, const e4m3_decoding::pair_of_rows& of) {
    coded.tile[s / 2].decode_e4m3(s % 2, of, a[s]);
  }

  /// The sums for the first N rows of x.
  template <int N>
  [[nodiscard]] __device__ lane_sums<N / 2>& used() {
    return reinterpret_cast<lane_sums<N / 2>&>(sum);
  }

  /// Sums through all columns for the first N rows of x. Two products are a group: while one is on its way, the
  /// operands of the next one are decoded, whose magnitudes were asked for before.
  template <int N>
  __device__ __forceinline__ void run() {
    used<N>().clear();
    if (count == 0) return;
    std::uint32_t last_empty = 0;  // the barrier of the stage before, until it is told
    // Each lane tells for its own reads, as in tile_sums.
    const auto tell = [&] {
      if (last_empty != 0) barrier_arrive(last_empty);
    };
    const auto multiply = [&](int s, std::uint32_t box) {
      wgmma_fence();
      wgmma<e4m3>(used<N>().d, a[s], swizzled_tile(box, 2u * s));
      wgmma<e4m3>(used<N>().d, a[s + 1], swizzled_tile(box, 2u * s + 2));
      wgmma_commit();
      wgmma_wait<1>();
    };
    coded_stage coded = load();
    e4m3_decoding::pair_of_rows of[2];
    const auto look_up = [&](int s) { of[0] = magnitudes(coded, s), of[1] = magnitudes(coded, s + 1); };
    // A branch that the compiler cannot see through keeps the decoding between the products; see tile_sums.
    const auto decode_two = [&](int s) {
      std::uint32_t yes;
      asm volatile("mov.u32 %0, %1;" : "=r"(yes) : "r"(count));
      if (yes != 0) decode(coded, s, of[0]), decode(coded, s + 1, of[1]);
    };
    look_up(0);
    decode_two(0);
    const auto step = [&]<bool HasNext>() {
      const std::uint32_t box = shared + slot * Shape::stage_bytes, this_empty = ring.empty(slot);
      if (++slot == Shape::stages) slot = 0, parity ^= 1;
      look_up(2);
      multiply(0, box);
      tell(), last_empty = this_empty;
      decode_two(2);
      if constexpr (HasNext) {
        coded = load();
        look_up(0);
      }
      multiply(2, box);
      if constexpr (HasNext) decode_two(0);
    };
    for (std::uint32_t left = count; left > 1; --left) step.template operator()<true>();
    step.template operator()<false>();
    wgmma_wait<0>();
    used<N>().hold();
    tell();
  }
  /// The same for at least as many rows of x as the tile has; an instruction takes as long for 16 as for 32.
  template <int N = 32>
  __device__ __forceinline__ void run_fitted(std::uint32_t rows) {
    if constexpr (N < Shape::rows) {
      if (rows > N) return run_fitted<N + 16>(rows);
    }
    run<N>();
  }

  /// Sums and writes all tiles of a block.
  __device__ void run_tiles(const matmul_args<T>& args, const std::uint32_t* tiles_before, unsigned char* output) {
    const std::uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int barrier = 1 + static_cast<int>(group);
    for (std::uint32_t number = blockIdx.x;; number += gridDim.x) {
      const output_tile tile = find_fitted_tile(args, tiles_before, number);
      if (tile.rows == 0) return;
      const std::uint32_t row_tile = tile.feature_tile * Shape::groups + group;
      const bool is_idle = row_tile >= args.weights.row_tiles;  // a warpgroup past the last weight rows
      const row_pair rows = find_rows(args, tile.matrix, (is_idle ? 0 : row_tile) * 64 + warp * 16 + lane / 4);
      row_scales<Shape::rows> x_scales;
      x_scales.load(args, tile);
      run_fitted(tile.rows);
      x_scales.apply(sum.d);
      if (is_idle) continue;
      if (args.out.is_aligned) {
        const std::uint32_t first_output = row_tile * (args.weights.gating == gating_rows::none ? 64 : 32);
        write_staged(args, tile, rows, sum.d, first_output, output + group * staged_bytes, barrier);
      } else {
        write_each(args, tile, rows, sum.d);
      }
    }
  }
};

#endif

template <class Shape, weight_kind Kind, class T>
__global__ void __launch_bounds__(Shape::threads, 1)
    e4m3_rows_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ __align__(1024) unsigned char memory[];
  const std::uint32_t shared = shared_address(memory);
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);

  if (threadIdx.x == Shape::consumers) {
    prefetch_map(&x_map);
    stage_ring<Shape::stages>{shared + Shape::barriers_at}.init(Shape::consumers);
    barrier_init_done();
  }
  fill_decoding_table(memory + Shape::table_at);
  start_next_kernel();
  __syncthreads();
  const bool is_producer = threadIdx.x >= Shape::consumers && threadIdx.x < Shape::consumers + 32;
  wait_for_last_kernel();
  count_row_tiles<Shape::rows>(args.x.row_offsets, args.weights.matrices, tiles_before);
  if (threadIdx.x < Shape::consumers) {
    take_registers<Shape::registers>();
    e4m3_rows_walk<Shape, Kind, T>(args, shared).run_tiles(args, tiles_before, memory + Shape::output_at);
  } else {
    give_registers<32>();
    if (is_producer) e4m3_rows_producer<Shape, Kind, T>(args, shared).run(x_map, tiles_before);
  }
#endif
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
