#pragma once

#include "../../arch/sm90a.cuh"  // copy_box
#include "../args.cuh"           // matmul_args
#include "../epilogue.cuh"       // write_pair_as
#include "../weight_tile.cuh"    // weight_tile, e4m3_decoding
#include "medium_rows.cuh"       // medium_rows_walk
#include "warpgroup_output.cuh"  // row_scales

#include <cuda.h>  // CUtensorMap

#include <concepts>  // std::same_as
#include <cstddef>   // std::size_t
#include <cstdint>   // std::uint32_t

/// The product on Hopper for few rows of x and many weight rows, as over experts in decoding: medium_rows with the
/// work in units of 64 weight rows, of which every block gets as many, up to one. A block takes four at a time, one for
/// each warpgroup; where only one or two are left, the warpgroups share the columns of each between two, which add up
/// by way of shared memory. The first weights of what comes next are asked for while the last stages multiply.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The shape of a kernel: `Rows` of x in a tile of the output; stages of 128 columns, for two halves of all columns.
template <class X, weight_kind Kind, int Rows>
struct balanced_rows_shape {
  using element = X;
  static constexpr bool is_e4m3 = std::same_as<X, e4m3>;
  static constexpr int rows = Rows, groups = 4, stages = 4;
  static constexpr bool goes_on_early = true;
  static constexpr int consumers = groups * 128, threads = consumers + 128;
  static constexpr int sums = Rows / 2, quads = sums / 4;
  static constexpr std::uint32_t boxes = sizeof(X), box_bytes = Rows * 128;
  static constexpr std::uint32_t half_bytes = boxes * box_bytes, stage_bytes = 2 * half_bytes;
  static constexpr std::uint32_t lane_scales = weight_tile<Kind>::lane_scales;  ///< bytes, of one tile
  static constexpr std::uint32_t slot_bytes = 2 * 32 * (16 + lane_scales);      ///< of a warp's own ring
  static constexpr std::uint32_t own_at = stages * stage_bytes;
  static constexpr std::uint32_t barriers_at = own_at + groups * 4 * stages * slot_bytes;
  static constexpr std::uint32_t table_at = barriers_at + 256;  ///< of e4m3_decoding, for E4M3
  /// Sums of the second halves.
  static constexpr std::uint32_t inbox_at = is_e4m3 ? table_at + e4m3_decoding::table_bytes : barriers_at + 128;
  static constexpr std::uint32_t tiles_before_at = inbox_at + 2 * 128 * sums * 4;
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) { return tiles_before_at + (matrices + 1) * 4; }
};

#if TETROMINO_CUDA_HOPPER

/// Up to four units of work with the same rows of x, for the block to do at once.
struct work_pass {
  output_tile tile{};       ///< of the first
  std::uint32_t units = 0;  ///< 0 past the last

  [[nodiscard]] __device__ bool is_halved() const { return units <= 2; }
};

/// The units of 64 weight rows that are a block's: as many as any other's, up to one.
template <std::uint32_t Rows>
struct work_share {
  std::uint32_t next, last;

  template <class T>
  __device__ work_share(const matmul_args<T>& args, const std::uint32_t* tiles_before) {
    const std::uint32_t row_tiles =
        args.x.row_offsets == nullptr ? (args.x.rows + Rows - 1) / Rows : tiles_before[args.weights.matrices];
    const std::uint32_t all = row_tiles * args.feature_tiles, each = all / gridDim.x, over = all % gridDim.x;
    next = each * blockIdx.x + min(blockIdx.x, over);
    last = next + each + (blockIdx.x < over ? 1u : 0u);
  }
  template <class T>
  [[nodiscard]] __device__ work_pass take(const matmul_args<T>& args, const std::uint32_t* tiles_before,
                                          const work_pass& before) {
    work_pass out{};
    if (next == last) return out;
    out.tile = before.tile;
    out.tile.feature_tile += before.units;
    if (before.units == 0 || out.tile.feature_tile == args.feature_tiles) {
      out.tile = find_tile<Rows>(args, tiles_before, next);
    }
    out.units = min(min(last - next, 4u), args.feature_tiles - out.tile.feature_tile);
    next += out.units;
    return out;
  }
};

/// A warpgroup's part in a pass.
struct group_role {
  std::uint32_t unit, first, count, steps;  ///< which unit, which stages of it, and how many stages the block counts
  bool is_idle, is_second;

  __device__ group_role(const work_pass& pass, std::uint32_t stages) {
    const std::uint32_t group = threadIdx.x / 128, half = (stages + 1) / 2;
    unit = pass.is_halved() ? group % 2 : group;
    is_idle = unit >= pass.units;
    is_second = pass.is_halved() && group >= 2;
    steps = pass.is_halved() ? half : stages;
    first = is_second ? half : 0;
    count = is_idle ? 0 : is_second ? stages - half : steps;
  }
};

/// A lane's way through its parts of the block's passes.
template <class Shape, class T, weight_kind Kind, int Macros>
struct balanced_rows_walk : medium_rows_walk<Shape, T, Kind, Macros> {
  using medium = medium_rows_walk<Shape, T, Kind, Macros>;
  using medium::medium, medium::ring, medium::parity, medium::sum;

  /// Goes to the weights of a pass.
  __device__ void enter(const matmul_args<T>& args, const work_pass& pass) {
    this->entered = 0;
    if (pass.units == 0) return;
    const group_role role(pass, args.weights.col_tiles / 2);
    if (!role.is_idle) {
      medium::enter(args, pass.tile.matrix, pass.tile.feature_tile + role.unit, role.first, role.count);
    }
  }
  /// Frees the stages of x in [first, last), which are not for this warpgroup.
  __device__ void skip(std::uint32_t first, std::uint32_t last) {
    for (; first < last; ++first) {
      const std::uint32_t slot = first % Shape::stages;
      barrier_wait(ring.full(slot), parity >> slot & 1u);
      parity ^= 1u << slot;
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(slot));
    }
  }

  /// Adds the sums that two warpgroups have of a unit, to those of the first; `of`: which of the two units.
  __device__ void add_halves(unsigned char* inbox, std::uint32_t of, bool is_second) {
    auto* const at = reinterpret_cast<float4*>(inbox) + of * (Shape::quads * 128) + threadIdx.x % 128;
    sync_threads(1 + static_cast<int>(of), 256);  // the sums before have been read
    if (is_second) {
#pragma unroll
      for (int q = 0; q < Shape::quads; ++q)
        at[q * 128] = make_float4(sum.d[4 * q], sum.d[4 * q + 1], sum.d[4 * q + 2], sum.d[4 * q + 3]);
    }
    sync_threads(1 + static_cast<int>(of), 256);
    if (is_second) return;
#pragma unroll
    for (int q = 0; q < Shape::quads; ++q) {
      const float4 other = at[q * 128];
      float* const d = sum.d + 4 * q;
      d[0] += other.x, d[1] += other.y, d[2] += other.z, d[3] += other.w;
    }
  }
  template <bool IsGated>
  __device__ void write(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows) const {
#pragma unroll
    for (int q = 0; q < Shape::quads; ++q) {
      const std::uint32_t m = static_cast<std::uint32_t>(8 * q) + threadIdx.x % 4 * 2;
      const float* const d = sum.d + 4 * q;
      if (m < tile.rows) write_pair_as<IsGated>(args, rows, tile.first_row + m, d[0], d[2]);
      if (m + 1 < tile.rows) write_pair_as<IsGated>(args, rows, tile.first_row + m + 1, d[1], d[3]);
    }
  }
};

/// Brings the boxes of x of a block's passes; a warp does it.
template <class Shape, class T>
__device__ inline void bring_balanced_rows(const CUtensorMap& x_map, const matmul_args<T>& args, std::uint32_t shared,
                                           const std::uint32_t* tiles_before, work_share<Shape::rows> share,
                                           work_pass pass) {
  const stage_ring<Shape::stages> ring{shared + Shape::barriers_at};
  const std::uint32_t stages = args.weights.col_tiles / 2, half = (stages + 1) / 2;
  std::uint32_t parity = (1u << Shape::stages) - 1;
  while (pass.units != 0) {
    const std::uint32_t steps = pass.is_halved() ? half : stages;
    const int row = static_cast<int>(pass.tile.first_row);
    std::uint32_t slot = 0;
    for (std::uint32_t i = 0; i < steps; ++i) {
      barrier_wait(ring.empty(slot), parity >> slot & 1u);
      parity ^= 1u << slot;
      if (threadIdx.x % 32 == 0) {
        const std::uint32_t to = shared + slot * Shape::stage_bytes;
        const bool has_second = pass.is_halved() && half + i < stages;
        barrier_expect(ring.full(slot), has_second ? Shape::stage_bytes : Shape::half_bytes);
        const auto bring = [&](std::uint32_t at, std::uint32_t stage) {
          copy_box(at, &x_map, static_cast<int>(stage * 128), row, ring.full(slot));
          if constexpr (Shape::boxes == 2) {
            copy_box(at + Shape::box_bytes, &x_map, static_cast<int>(stage * 128 + 64), row, ring.full(slot));
          }
        };
        bring(to, i);
        if (has_second) bring(to + Shape::half_bytes, half + i);
      }
      if (++slot == Shape::stages) slot = 0;
    }
    pass = share.take(args, tiles_before, pass);
  }
}

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 1)
    balanced_rows_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ __align__(1024) unsigned char memory[];
  const std::uint32_t shared = shared_address(memory);
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);

  if (threadIdx.x == Shape::consumers) {
    prefetch_map(&x_map);
    stage_ring<Shape::stages>{shared + Shape::barriers_at}.init(Shape::consumers / 32);
    barrier_init_done();
  }
  if constexpr (Shape::is_e4m3) fill_decoding_table(memory + Shape::table_at);
  start_next_kernel();
  __syncthreads();
  const bool is_consumer = threadIdx.x < Shape::consumers;
  const bool starts_early = args.weights.are_settled && args.x.row_offsets == nullptr;
  if (!starts_early) wait_for_last_kernel();
  if (args.x.row_offsets != nullptr)
    count_row_tiles<Shape::rows>(args.x.row_offsets, args.weights.matrices, tiles_before);

  work_share<Shape::rows> share(args, tiles_before);
  work_pass pass = share.take(args, tiles_before, work_pass{});
  if (pass.units == 0) return;
  static_assert(Shape::consumers * 112 + 128 * 32 <= Shape::threads * 96);  // or they would wait for registers
  if (!is_consumer) {
    give_registers<32>();
    if (starts_early) wait_for_last_kernel();
    if (threadIdx.x < Shape::consumers + 32) {
      bring_balanced_rows<Shape>(x_map, args, shared, tiles_before, share, pass);
    }
    return;
  }
  take_registers<112>();
  balanced_rows_walk<Shape, T, Kind, Macros> walk(shared);
  walk.enter(args, pass);
  walk.ask_from(0);
  if (starts_early) wait_for_last_kernel();
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, stages = args.weights.col_tiles / 2;
  for (;;) {
    const group_role role(pass, stages);
    const std::uint32_t row_tile = pass.tile.feature_tile + (role.is_idle ? 0 : role.unit);
    const std::uint32_t row = row_tile * 64 + warp * 16 + lane / 4;
    work_pass next{};
    float2 low{}, high{};  // factors and biases
    [[maybe_unused]] row_scales<Shape::rows> x_scales;
    const auto go_on = [&] {
      low = load_row(args, pass.tile.matrix, row), high = load_row(args, pass.tile.matrix, row + 8);
      if constexpr (Shape::is_e4m3) x_scales.load(args, pass.tile);
      next = share.take(args, tiles_before, pass);
      walk.enter(args, next);
    };
    const std::uint8_t* macros = nullptr;
    if constexpr (Macros != 0) {
      macros = args.weights.macros_of(pass.tile.matrix, row_tile) + lane / 4 * 8 + warp * 2;
    }
    walk.run(args, __shfl_sync(full_warp, shared + (role.is_second ? Shape::half_bytes : 0), 0), role.first, role.count,
             macros, go_on);
    if constexpr (Shape::is_e4m3) x_scales.apply(walk.sum.d);
    walk.skip(role.count, role.steps);
    if (!role.is_idle) {
      if (pass.is_halved()) walk.add_halves(memory + Shape::inbox_at, role.unit, role.is_second);
      if (!role.is_second) {  // one branch around all of it, since code that runs once must be short
        const row_pair rows = pair_rows(args, row, low, high);
        if (args.weights.gating != gating_rows::none) {
          walk.template write<true>(args, pass.tile, rows);
        } else {
          walk.template write<false>(args, pass.tile, rows);
        }
      }
    }
    if (next.units == 0) return;
    pass = next;
  }
#endif
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
