#pragma once

#include "../../arch/sm90a.cuh"  // copy_box
#include "../args.cuh"           // matmul_args
#include "../epilogue.cuh"       // write_pair_as
#include "../macro_walk.cuh"     // macro_walk
#include "../weight_tile.cuh"    // coded_tile, e4m3_decoding
#include "sums.cuh"              // lane_sums, stage_ring
#include "warpgroup_output.cuh"  // row_scales

#include <cuda.h>  // CUtensorMap

#include <concepts>  // std::same_as
#include <cstddef>   // std::size_t
#include <cstdint>   // std::uint32_t

/// The product on Hopper for a middling number of rows of x. One warp keeps the copy engine busy with boxes of
/// activations; the others are warpgroups of 64 weight rows each, whose lanes ask for their own codes and scales, and
/// decode them in registers: those are the A operand of the warpgroup's matrix products, activations are the B operand.
/// A stage is 128 columns, two tiles of weights: one multiplies while the other is decoded. The slots of the ring are
/// compile-time constants, since integer instructions are what these kernels have too few of.
///
/// Where there are fewer tiles of the output than multiprocessors, the blocks of a cluster share one: each takes a part
/// of the columns and sends its sums to the block that adds them up.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The shape of a kernel: `Rows` of x and Groups * 64 rows of weights in a tile of the output; stages of 128 columns.
template <class X, weight_kind Kind, int Rows, int Groups, int Stages>
struct medium_rows_shape {
  using element = X;
  static constexpr bool is_e4m3 = std::same_as<X, e4m3>;
  static constexpr int rows = Rows, groups = Groups, stages = Stages;
  static constexpr bool goes_on_early = false;  ///< whether the last turn of the ring prepares for what comes after
  static constexpr int consumers = Groups * 128, threads = consumers + 32;
  static constexpr int sums = Rows / 2;  ///< of a lane
  static constexpr std::uint32_t boxes = sizeof(X), box_bytes = Rows * 128, stage_bytes = boxes * box_bytes;
  static constexpr std::uint32_t lane_scales = weight_tile<Kind>::lane_scales;  ///< bytes, of one tile
  static constexpr std::uint32_t slot_bytes = 2 * 32 * (16 + lane_scales);      ///< of a warp's own ring
  static constexpr std::uint32_t own_at = Stages * stage_bytes;
  static constexpr std::uint32_t barriers_at = own_at + Groups * 4 * Stages * slot_bytes;
  static constexpr std::uint32_t table_at = barriers_at + 256;  ///< of e4m3_decoding, for E4M3
  static constexpr std::uint32_t inbox_at = is_e4m3 ? table_at + e4m3_decoding::table_bytes : barriers_at + 128;
  /// Quads of a lane's sums, which are dealt out among the blocks of a cluster, and how many a block gets at most.
  static constexpr int quads = sums / 4;
  static constexpr std::uint32_t most_parts = 6;  ///< blocks of a cluster
  __host__ __device__ static constexpr std::uint32_t share_of(std::uint32_t parts) {
    return (quads + parts - 1) / parts;
  }
  __host__ __device__ static constexpr std::uint32_t inbox_bytes(std::uint32_t parts) {
    return (parts - 1) * share_of(parts) * consumers * 16;
  }
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices, std::uint32_t parts) {
    return inbox_at + inbox_bytes(parts) + (matrices + 1) * 4;
  }
};

#if TETROMINO_CUDA_HOPPER

/// A lane's way through the columns of 64 weight rows, with its sums. `Macros`: macro blocks that a tile of 64 columns
/// touches; 0 for none, 1 where a macro block is a stage or more.
template <class Shape, class T, weight_kind Kind, int Macros>
struct medium_rows_walk {
  using weights = weight_tile<Kind>;
  using element = typename Shape::element;
  static constexpr int sums = Shape::sums, stages = Shape::stages, steps = tile_steps<element>;
  static constexpr int apart = weights::bytes / 2;  ///< from the middle of a stage's two tiles to where each starts
  static constexpr std::uint32_t all_slots = (1u << stages) - 1;
  static constexpr bool goes_on_early = Shape::goes_on_early;
  const stage_ring<stages> ring;
  const std::uint8_t *codes_from, *scales_from;
  std::uint32_t codes_to, scales_to;
  std::uint32_t entered = 0;          ///< stages that `enter` was told of
  std::uint32_t least_left = stages;  ///< weights are asked for while more stages than this are left
  std::uint32_t parity = 0;           ///< a bit for each slot
  lane_sums<sums> sum;
  macro_walk macros;
  std::uint32_t a[2][steps][4];  ///< A operands of two tiles of weights

  __device__ explicit medium_rows_walk(std::uint32_t shared) : ring{shared + Shape::barriers_at} {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    codes_to = shared + Shape::own_at + warp * (stages * Shape::slot_bytes) + lane * 16;
    scales_to = codes_to + 1024 + lane * (2 * Shape::lane_scales) - lane * 16;
    keep(codes_to), keep(scales_to);
  }
  /// Goes to `count` stages of weights, from stage `first` on.
  __device__ void enter(const matmul_args<T>& args, std::uint32_t matrix, std::uint32_t row_tile, std::uint32_t first,
                        std::uint32_t count) {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    keep(first);
    const std::uint8_t* const at =
        args.weights.template tiles_of<Kind>(matrix, row_tile) + std::size_t{2 * first} * weights::bytes + apart;
    codes_from = at + weights::codes_of(warp, lane);
    scales_from = at + weights::scales_of(warp, lane);
    entered = count;
  }
  /// Asks for the stage of weights that comes into a slot next, if there is one.
  __device__ void ask(int slot, bool exists) {
    if (exists) {
      const std::uint32_t at = static_cast<std::uint32_t>(slot) * Shape::slot_bytes;
      copy_at<16, 0, -apart>(codes_to + at, codes_from);
      copy_at<16, 512, apart>(codes_to + at, codes_from);
      copy_at<Shape::lane_scales, 0, -apart>(scales_to + at, scales_from);
      copy_at<Shape::lane_scales, Shape::lane_scales, apart>(scales_to + at, scales_from);
    }
    codes_from += 2 * weights::bytes, scales_from += 2 * weights::bytes;
    keep(codes_from), keep(scales_from);
    copies_commit();
  }
  /// Asks for those of the first stages that the slots from `first` on have room for.
  __device__ void ask_from(std::uint32_t first) {
#pragma unroll
    for (int i = 0; i < stages; ++i) {
      const auto slot = static_cast<std::uint32_t>(i);
      if (slot >= first) ask(i, slot < entered);
    }
  }

  /// Decodes a tile. Where a wait for all products follows, a branch that the compiler cannot see through keeps it from
  /// going first.
  template <bool WaitFollows>
  __device__ static void decode(const coded_tile<Kind>& tile, std::uint32_t table, std::uint32_t (&operand)[steps][4],
                                std::uint32_t count) {
    std::uint32_t yes = 1;
    if constexpr (WaitFollows) asm volatile("mov.u32 %0, %1;" : "=r"(yes) : "r"(count));
    if (yes != 0) {
#pragma unroll
      for (int i = 0; i < steps; ++i) tile.template decode<element>(i, table, operand[i]);
    }
  }

  /// Sends the products of one tile of weights on their way.
  __device__ void multiply(const std::uint32_t (&by)[steps][4], std::uint32_t stage, int tile) {
    const std::uint32_t box = Shape::is_e4m3 ? stage : stage + tile * Shape::box_bytes;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      if (Macros == 2 && s == 2) {
        wgmma_commit();
        sum.enter_next(macros);
        wgmma_fence();
      }
      const int step = Shape::is_e4m3 ? tile * steps + s : s;
      wgmma<element>(sum.d, by[s], swizzled_tile(box, 2u * static_cast<std::uint32_t>(step)));
    }
    wgmma_commit();
  }

  /// Sums through `count` stages, from stage `first` on. `boxes`: where x lies for the first slot. Where the shape
  /// goes on early, `go_on` enters what comes next when the last turn of the ring begins, and its first weights are
  /// asked for as slots become free. At a wait for all products but the last group, those of the tile before are done,
  /// and its operands can be overwritten.
  template <class GoOn>
  __device__ void run(const matmul_args<T>& args, std::uint32_t boxes, std::uint32_t first, std::uint32_t count,
                      const std::uint8_t* macro_bytes, const GoOn& go_on) {
    sum.clear();
    if (count == 0) {
      if constexpr (goes_on_early) go_on(), ask_from(0);
      return;
    }
    std::uint32_t macro_stages = 1, until_next = 1;  // stages of a macro block; those before the next one starts
    if constexpr (Macros != 0) {
      macro_stages = max(args.weights.macro_block / 128, 1u);
      until_next = macro_stages - first % macro_stages;
      const std::uint32_t macro = Macros == 2 ? first * 4 : first / macro_stages;
      macros.start(macro_bytes + macro * 64, args.weights.macros_per_row - 1 - macro);
    }
    const std::uint32_t table = ring.barriers + (Shape::table_at - Shape::barriers_at);
    std::uint32_t left = count;
    bool is_first = true;
    if constexpr (goes_on_early) least_left = stages;
    for (;;) {
      if constexpr (goes_on_early) {
        if (left <= stages) {
          go_on();
          least_left = left - min(left, entered);
        }
      }
#pragma unroll
      for (int s = 0; s < stages; ++s) {
        if (left == 0) break;
        coded_tile<Kind> tile[2];
        copies_wait<stages - 1>();
        {
          const std::uint32_t at = static_cast<std::uint32_t>(s) * Shape::slot_bytes;
          tile[0].read(codes_to + at, scales_to + at);
          tile[1].read(codes_to + at + 512, scales_to + at + Shape::lane_scales);
        }
        wgmma_wait<1>();
        decode<Macros != 0>(tile[0], table, a[0], count);
        if constexpr (Macros != 0) {
          const macro_pair growth = macros.growth();  // beside the products
          wgmma_wait<0>();
          sum.hold();
          if (!is_first && --until_next == 0) {
            until_next = macro_stages;
            sum.scale(growth);
            macros.advance();
          }
        }
        barrier_wait(ring.full(static_cast<std::uint32_t>(s)), parity >> s & 1u);
        const std::uint32_t box = boxes + static_cast<std::uint32_t>(s) * Shape::stage_bytes;
        multiply(a[0], box, 0);
        wgmma_wait<1>();
        // Nobody but the tensor cores reads x, so that one lane can tell for its warp.
        if (!is_first && threadIdx.x % 32 == 0) barrier_arrive(ring.empty((s + stages - 1) % stages));
#pragma unroll
        for (int i = 0; i < 4; ++i) keep(tile[1].word[i]);
        decode<Macros == 2>(tile[1], table, a[1], count);
        ask(s, left > least_left);
        if constexpr (Macros == 2) sum.enter_next(macros);
        multiply(a[1], box, 1);
        --left;
        is_first = false;
      }
      if (left == 0) break;
      parity ^= all_slots;
    }
    keep(count);
    const std::uint32_t last = (count - 1) % stages;
    parity ^= (2u << last) - 1;
    if constexpr (goes_on_early) ask_from(last + 1);
    wgmma_wait<0>();
    sum.hold();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(last));
    if constexpr (!Shape::is_e4m3) sum.template finish<Macros>(macros, scale_decoding<T, Kind>::missing);
  }
};

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 1)
    medium_rows_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ __align__(1024) unsigned char memory[];
  const std::uint32_t shared = shared_address(memory);
  const std::uint32_t parts = cluster_size(), part = cluster_rank();
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::inbox_at + Shape::inbox_bytes(parts));
  const stage_ring<Shape::stages> ring{shared + Shape::barriers_at};
  const std::uint32_t arrived = ring.barriers + ring.bytes;  // what the other blocks of a cluster send

  if (threadIdx.x == Shape::consumers) {
    prefetch_map(&x_map);
    ring.init(Shape::consumers / 32);
    barrier_init(arrived, 1);
    barrier_init_done();
    if (parts > 1) {
      barrier_expect(arrived, (Shape::quads - part + parts - 1) / parts * (parts - 1) * (Shape::consumers * 16));
    }
  }
  if constexpr (Shape::is_e4m3) fill_decoding_table(memory + Shape::table_at);
  start_next_kernel();
  std::uint32_t number = blockIdx.x / parts;
  const std::uint32_t stages = args.weights.col_tiles / 2;
  const std::uint32_t first = stages * part / parts, count = stages * (part + 1) / parts - first;
  const bool is_consumer = threadIdx.x < Shape::consumers;
  medium_rows_walk<Shape, T, Kind, Macros> walk(shared);
  const auto start = [&](const output_tile& with) {
    const std::uint32_t row_tile = with.feature_tile * Shape::groups + threadIdx.x / 128;
    walk.enter(args, with.matrix, min(row_tile, args.weights.row_tiles - 1), first, count);
    walk.ask_from(0);
  };
  const bool starts_early = args.weights.are_settled && args.x.row_offsets == nullptr;
  output_tile tile{};
  if (starts_early) {
    tile = find_tile<Shape::rows>(args, tiles_before, number);
    if (is_consumer) start(tile);
  }
  __syncthreads();
  wait_for_last_kernel();
  if (args.x.row_offsets != nullptr)
    count_row_tiles<Shape::rows>(args.x.row_offsets, args.weights.matrices, tiles_before);
  if (!starts_early) {
    tile = find_tile<Shape::rows>(args, tiles_before, number);
    if (tile.rows == 0) return;  // all blocks of a cluster do
    if (is_consumer) start(tile);
  }
  if (parts > 1) cluster_arrive();

  if (!is_consumer) {
    std::uint32_t parity = (1u << Shape::stages) - 1;
    while (tile.rows != 0) {
      std::uint32_t slot = 0;
      for (std::uint32_t i = 0; i < count; ++i) {
        barrier_wait(ring.empty(slot), parity >> slot & 1u);
        parity ^= 1u << slot;
        if (threadIdx.x % 32 == 0) {
          const std::uint32_t to = shared + slot * Shape::stage_bytes, column = (first + i) * 128;
          barrier_expect(ring.full(slot), Shape::stage_bytes);
          copy_box(to, &x_map, static_cast<int>(column), static_cast<int>(tile.first_row), ring.full(slot));
          if constexpr (Shape::boxes == 2) {
            copy_box(to + Shape::box_bytes, &x_map, static_cast<int>(column + 64), static_cast<int>(tile.first_row),
                     ring.full(slot));
          }
        }
        if (++slot == Shape::stages) slot = 0;
      }
      if (parts > 1) break;
      number += gridDim.x;
      tile = find_tile<Shape::rows>(args, tiles_before, number);
    }
    if (parts > 1) cluster_wait();
    return;
  }
  const std::uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (;;) {
    const std::uint32_t row_tile = tile.feature_tile * Shape::groups + group;
    const bool is_idle = row_tile >= args.weights.row_tiles;  // a warpgroup past the last weight rows
    const std::uint8_t* macros = nullptr;
    if constexpr (Macros != 0) {
      macros = args.weights.macros_of(tile.matrix, is_idle ? 0 : row_tile) + lane / 4 * 8 + warp * 2;
    }
    [[maybe_unused]] row_scales<Shape::rows> x_scales;
    if constexpr (Shape::is_e4m3) x_scales.load(args, tile);
    walk.run(args, shared, first, count, macros, [] {});
    if constexpr (Shape::is_e4m3) x_scales.apply(walk.sum.d);
    output_tile next{};
    const row_pair rows = find_rows(args, tile.matrix, (is_idle ? 0 : row_tile) * 64 + warp * 16 + lane / 4);
    if (parts == 1) {
      number += gridDim.x;
      next = find_tile<Shape::rows>(args, tiles_before, number);
      if (next.rows != 0) start(next);
    } else {
      // Quads of sums (rows g and g + 8 of the weights, two rows of x) are dealt out among the blocks; each sends them
      // to the one that adds them up.
      cluster_wait();  // until the others have started
      std::uint32_t owner = 0, at = shared + Shape::inbox_at + threadIdx.x * 16;
      keep(owner), keep(at);
      const std::uint32_t sender = Shape::share_of(parts) * (Shape::consumers * 16);
#pragma unroll
      for (int q = 0; q < Shape::quads; ++q) {
        const float* const sum = walk.sum.d + 4 * q;
        if (owner != part) {
          const std::uint32_t place = part < owner ? part : part - 1;
          send_to_rank(at + place * sender, arrived, owner, sum[0], sum[1], sum[2], sum[3]);
        }
        if (++owner == parts) owner = 0, at += Shape::consumers * 16;
      }
      barrier_wait(arrived, 0);
      owner = 0, at = shared + Shape::inbox_at + threadIdx.x * 16;
      keep(owner), keep(at);
#pragma unroll
      for (int q = 0; q < Shape::quads; ++q) {
        float* const sum = walk.sum.d + 4 * q;
        if (owner == part) {
#pragma unroll
          for (std::uint32_t place = 0; place < Shape::most_parts - 1; ++place) {
            if (place < parts - 1) {
              const float4 other = *reinterpret_cast<const float4*>(memory + (at - shared) + place * sender);
              sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
            }
          }
        }
        if (++owner == parts) owner = 0, at += Shape::consumers * 16;
      }
    }
    const auto write = [&]<bool IsGated>() {
      std::uint32_t owner = 0;
      keep(owner);
#pragma unroll
      for (int q = 0; q < Shape::quads; ++q) {
        if (owner == part) {
          const std::uint32_t m = static_cast<std::uint32_t>(8 * q) + lane % 4 * 2;
          const float* const sum = walk.sum.d + 4 * q;
          if (m < tile.rows) write_pair_as<IsGated>(args, rows, tile.first_row + m, sum[0], sum[2]);
          if (m + 1 < tile.rows) write_pair_as<IsGated>(args, rows, tile.first_row + m + 1, sum[1], sum[3]);
        }
        if (++owner == parts) owner = 0;
      }
    };
    if (!is_idle) {  // one branch around all of it, since code that runs once must be short
      if (args.weights.gating != gating_rows::none) {
        write.template operator()<true>();
      } else {
        write.template operator()<false>();
      }
    }
    if (next.rows == 0) return;
    tile = next;
  }
#endif
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
