#pragma once

#include "../../arch/sm90a.cuh"  // copy_box
#include "../args.cuh"           // matmul_args
#include "../epilogue.cuh"       // write_pair_as
#include "../macro_walk.cuh"     // macro_walk
#include "sums.cuh"              // lane_sums, stage_ring
#include "../weight_tile.cuh"    // coded_tile

#include <cuda.h>  // CUtensorMap

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// The product on Hopper over experts whose numbers of rows differ: the height of a tile follows, on the device, from
/// the rows of x that its matrix has, by sixteens, and its products have just that width. One warp keeps the copy
/// engine busy with boxes of 16 rows of activations; the others are warpgroups of 64 weight rows each, whose lanes ask
/// for their own codes, scales and macro bytes and decode them in registers: those are the A operand, activations the B
/// operand. A stage is 128 columns. A warpgroup waits for its products before it decodes on; the others hide that.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// The shape of a kernel: up to `Rows` of x, a multiple of 16, in a tile of the output.
template <weight_kind Kind, int Macros, int Rows>
struct fitted_rows_shape {
  static_assert(Rows % 16 == 0 && Rows <= 128);
  static constexpr int rows = Rows, groups = 4, stages = 4;
  static constexpr int consumers = groups * 128;
  static constexpr int threads = consumers + 128;       ///< of the last 128, one warp copies; the rest give registers
  static constexpr int sums = Rows / 2;                 ///< of a lane
  static constexpr std::uint32_t box_bytes = 16 * 128;  ///< 16 rows by 64 columns
  static constexpr std::uint32_t half_stage_bytes = Rows / 16 * box_bytes, stage_bytes = 2 * half_stage_bytes;
  static constexpr std::uint32_t lane_scales = weight_tile<Kind>::lane_scales;  ///< bytes, of one tile
  static constexpr std::uint32_t lane_macros = Macros == 2 ? 16 : Macros * 4;   ///< bytes, of a stage
  static constexpr std::uint32_t macros_at = 2 * 32 * (16 + lane_scales);       ///< in a slot of a warp's own ring
  static constexpr std::uint32_t slot_bytes = macros_at + 32 * lane_macros;
  static constexpr std::uint32_t own_at = stages * stage_bytes;
  static constexpr std::uint32_t barriers_at = own_at + groups * 4 * stages * slot_bytes;
  static constexpr std::uint32_t tiles_before_at = barriers_at + 128;
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) { return tiles_before_at + (matrices + 1) * 4; }
};

#if TETROMINO_CUDA_HOPPER

/// A lane's way through the columns of a tile of the output, with its sums. `Macros`: macro blocks that a tile of 64
/// columns touches; 0 for none, 1 where a macro block is a stage or more.
template <class Shape, class T, weight_kind Kind, int Macros>
struct fitted_rows_walk {
  using weights = weight_tile<Kind>;
  static constexpr std::uint32_t stages = Shape::stages;
  static constexpr int apart = weights::bytes / 2;  ///< from the middle of a stage's two tiles to where each starts
  const stage_ring<stages> ring;
  const std::uint8_t *codes_from, *scales_from, *macros_from;
  std::uint32_t codes_to, scales_to, macros_to;
  std::uint32_t macros_asked, macros_step;  ///< bytes of macro blocks asked for, and those of a stage
  std::uint32_t parity = 0;                 ///< a bit for each slot
  lane_sums<Shape::sums> sum;
  macro_pair now{1.0f, 1.0f};  ///< sums are in units of 1 / these

  __device__ explicit fitted_rows_walk(std::uint32_t shared) : ring{shared + Shape::barriers_at} {}

  /// Asks for the first stages of an output tile's weights.
  __device__ void start(const matmul_args<T>& args, std::uint32_t shared, const output_tile& tile,
                        std::uint32_t count) {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::uint32_t row_tile = min(tile.feature_tile * Shape::groups + warp / 4, args.weights.row_tiles - 1);
    const std::uint8_t* const at = args.weights.template tiles_of<Kind>(tile.matrix, row_tile) + apart;
    codes_from = at + weights::codes_of(warp % 4, lane);
    scales_from = at + weights::scales_of(warp % 4, lane);
    codes_to = shared + Shape::own_at + warp * (stages * Shape::slot_bytes) + lane * 16;
    scales_to = codes_to + 1024 + lane * (2 * Shape::lane_scales) - lane * 16;
    keep(codes_to), keep(scales_to);
    if constexpr (Macros != 0) {
      macros_from = args.weights.macros_of(tile.matrix, row_tile) + lane / 4 * 8 + warp % 4 / 2 * 4;
      macros_to =
          shared + Shape::own_at + warp * (stages * Shape::slot_bytes) + Shape::macros_at + lane * Shape::lane_macros;
      macros_asked = 0, macros_step = Macros == 2 ? 256 : 128 >> args.weights.macro_shift;
    }
#pragma unroll
    for (std::uint32_t i = 0; i < stages; ++i) ask(i, i < count);
  }
  /// Asks for the stage of weights that comes into a slot next, if there is one.
  __device__ void ask(std::uint32_t slot, bool exists) {
    if (exists) {
      const std::uint32_t at = slot * Shape::slot_bytes;
      copy_at<16, 0, -apart>(codes_to + at, codes_from);
      copy_at<16, 512, apart>(codes_to + at, codes_from);
      copy_at<Shape::lane_scales, 0, -apart>(scales_to + at, scales_from);
      copy_at<Shape::lane_scales, Shape::lane_scales, apart>(scales_to + at, scales_from);
      if constexpr (Macros != 0) ask_macros(macros_to + at);
    }
    codes_from += 2 * weights::bytes, scales_from += 2 * weights::bytes;
    keep(codes_from), keep(scales_from);
    copies_commit();
  }

  /// Asks for a stage's macro bytes, each lane for those of its two rows and of those 16 below or above.
  __device__ void ask_macros(std::uint32_t to) {
    const std::uint8_t* const from = macros_from + (macros_asked & ~63u);
    copy_at<4, 0, 0>(to, from);
    if constexpr (Macros == 2) {
      copy_at<4, 4, 64>(to, from);
      copy_at<4, 8, 128>(to, from);
      copy_at<4, 12, 192>(to, from);
    }
    macros_asked += macros_step;
  }
  /// The macro-block factors in a word of what was asked for.
  [[nodiscard]] __device__ static macro_pair factors_of(std::uint32_t word) {
    return macro_factors(word >> threadIdx.x / 32 % 2 * 16 & 0xFFFFu);
  }

  /// The sums for the first N rows of x.
  template <int N>
  [[nodiscard]] __device__ lane_sums<N / 2>& used() {
    return reinterpret_cast<lane_sums<N / 2>&>(sum);
  }
  /// Brings the sums to units of 1 / `then`.
  template <int N>
  __device__ void enter(const macro_pair& then) {
    used<N>().scale({then.low * quick_reciprocal(now.low), then.high * quick_reciprocal(now.high)});
    now = then;
  }

  /// Adds the products of steps [first, last) of a tile with the first N rows of x, and waits for them: products that
  /// went on beside other work would keep the compiler from sharing registers between widths.
  template <int N>
  __device__ void multiply(const std::uint32_t (&by)[4][4], std::uint32_t box, int first, int last) {
    wgmma_fence();
#pragma unroll
    for (int i = first; i < last; ++i) {
      wgmma<T>(used<N>().d, by[i], swizzled_tile(box, 2u * static_cast<std::uint32_t>(i)));
    }
    wgmma_commit();
    wgmma_wait<0>();
    used<N>().hold();
  }
  /// Adds the products of tile t of a stage with the first N rows of x. `macros`: the stage's words of macro bytes.
  template <int N>
  __device__ void add_tile(const coded_tile<Kind>& tile, std::uint32_t box, const std::uint32_t* macros,
                           std::uint32_t t) {
    std::uint32_t a[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) tile.template decode<T>(i, a[i]);
    if constexpr (Macros == 2) {
      enter<N>(factors_of(macros[2 * t]));
      multiply<N>(a, box, 0, 2);
      enter<N>(factors_of(macros[2 * t + 1]));
      multiply<N>(a, box, 2, 4);
    } else {
      if (Macros == 1 && t == 0) enter<N>(factors_of(macros[0]));
      multiply<N>(a, box, 0, 4);
    }
  }
  /// Adds the products of the stage in `slot`, of which `left` are left with it.
  template <int N>
  __device__ void add_stage(std::uint32_t shared, std::uint32_t slot, std::uint32_t left) {
    copies_wait<stages - 1>();
    std::uint32_t macros[4];
    const std::uint32_t macros_of_slot = macros_to + slot * Shape::slot_bytes;
    if constexpr (Macros == 1) load_shared(macros_of_slot, macros[0]);
    if constexpr (Macros == 2) load_shared(macros_of_slot, macros[0], macros[1], macros[2], macros[3]);
#pragma unroll
    for (std::uint32_t t = 0; t < 2; ++t) {
      coded_tile<Kind> tile;
      const std::uint32_t own = slot * Shape::slot_bytes;
      tile.read(codes_to + own + t * 512, scales_to + own + t * Shape::lane_scales);
      if (t == 0) {
        barrier_wait(ring.full(slot), parity >> slot & 1u);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) keep(tile.word[i]);
        ask(slot, left > stages);
      }
      const std::uint32_t box = shared + slot * Shape::stage_bytes + t * Shape::half_stage_bytes;
      add_tile<N>(tile, box, macros, t);
    }
    tell_empty(slot);
    parity ^= 1u << slot;
  }

  /// Sums through `count` stages for the first N rows of x.
  template <int N>
  __device__ void run(std::uint32_t shared, std::uint32_t count) {
    used<N>().clear();
    if constexpr (Macros != 0) now = {1.0f, 1.0f};
    std::uint32_t left = count;
    for (std::uint32_t slot = 0; left != 0; slot = slot + 1 == stages ? 0 : slot + 1) {
      add_stage<N>(shared, slot, left);
      --left;
    }
    constexpr float missing = scale_decoding<T, Kind>::missing;
    if constexpr (Macros != 0) {
      enter<N>({missing, missing});
    } else if constexpr (missing != 1.0f) {
      used<N>().scale({missing, missing});
    }
  }
  /// The same for as many rows of x as the tile has.
  template <int N = 16>
  __device__ void run_fitted(std::uint32_t rows, std::uint32_t shared, std::uint32_t count) {
    if constexpr (N < Shape::rows) {
      if (rows > N) {
        return run_fitted<N + 16>(rows, shared, count);
      }
    }
    run<N>(shared, count);
  }
  /// Tells that a stage of x has been read: by the tensor cores alone, so that one lane can tell for its warp.
  __device__ void tell_empty(std::uint32_t slot) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(slot));
  }
  /// Frees the stages of a tile that has no weights for this warpgroup, and waits for those that it asked for.
  __device__ void skip(std::uint32_t count) {
    std::uint32_t slot = 0;
    for (std::uint32_t i = 0; i < count; ++i) {
      barrier_wait(ring.full(slot), parity >> slot & 1u);
      parity ^= 1u << slot;
      tell_empty(slot);
      if (++slot == stages) slot = 0;
    }
    copies_wait<0>();
  }

  /// Writes the outputs of `tile` where rows of the output are aligned: transposed in registers, so that a lane has two
  /// that follow each other. `column`: the first output of the warp.
  template <bool IsGated>
  __device__ void write_aligned(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows,
                                std::uint32_t column) const {
    const std::uint32_t lane = threadIdx.x % 32;
    column += lane % 4 * 2;
    T* to = args.out.data + static_cast<std::size_t>(tile.first_row + lane / 4) * args.out.stride + column;
    const bool has_low = column < args.out.cols, has_high = column + 8 < args.out.cols;
#pragma unroll
    for (int q = 0; q < Shape::sums / 4; ++q) {
      if (8 * q >= static_cast<int>(tile.rows)) break;
      const bool exists = static_cast<std::uint32_t>(8 * q) + lane / 4 < tile.rows;
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = sum.d[4 * q + i] * rows.factor[i / 2] + rows.bias[i / 2];
      if constexpr (IsGated) {
        const std::uint32_t pair = transpose(pack_pair<T>(silu(y[0]) * y[2], silu(y[1]) * y[3]));
        if (exists && has_low) *reinterpret_cast<std::uint32_t*>(to) = pair;
      } else {
        const std::uint32_t low = transpose(pack_pair<T>(y[0], y[1])), high = transpose(pack_pair<T>(y[2], y[3]));
        if (exists && has_low) *reinterpret_cast<std::uint32_t*>(to) = low;
        if (exists && has_high) *reinterpret_cast<std::uint32_t*>(to + 8) = high;
      }
      to += 8 * args.out.stride;
    }
  }
  /// The same one by one, for any output.
  template <bool IsGated>
  __device__ void write_each(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows) const {
#pragma unroll
    for (int q = 0; q < Shape::sums / 4; ++q) {
      if (8 * q >= static_cast<int>(tile.rows)) break;
      const std::uint32_t m = static_cast<std::uint32_t>(8 * q) + threadIdx.x % 4 * 2;
      const float* const d = sum.d + 4 * q;
      if (m < tile.rows) write_pair_as<IsGated>(args, rows, tile.first_row + m, d[0], d[2]);
      if (m + 1 < tile.rows) write_pair_as<IsGated>(args, rows, tile.first_row + m + 1, d[1], d[3]);
    }
  }
  template <bool IsGated>
  __device__ void write(const matmul_args<T>& args, const output_tile& tile, const row_pair& rows,
                        std::uint32_t row_tile) const {
    if (args.out.is_aligned) {
      const std::uint32_t row = row_tile * 64 + threadIdx.x / 32 % 4 * 16;
      write_aligned<IsGated>(args, tile, rows, IsGated ? row / 2 : row);
    } else {
      write_each<IsGated>(args, tile, rows);
    }
  }

  /// Sums and writes the tiles of a block from `tile` on, whose weights have been asked for.
  __device__ void run_tiles(const matmul_args<T>& args, std::uint32_t shared, const std::uint32_t* tiles_before,
                            output_tile tile, std::uint32_t count) {
    const std::uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    for (std::uint32_t number = blockIdx.x; tile.rows != 0;) {
      const std::uint32_t row_tile = tile.feature_tile * Shape::groups + group;
      const bool is_idle = row_tile >= args.weights.row_tiles;  // a warpgroup past the last weight rows
      if (is_idle) {
        skip(count);
      } else {
        run_fitted(tile.rows, shared, count);
      }
      number += gridDim.x;
      const output_tile next = find_fitted_tile(args, tiles_before, number);
      const row_pair rows = find_rows(args, tile.matrix, (is_idle ? 0 : row_tile) * 64 + warp * 16 + lane / 4);
      if (next.rows != 0) start(args, shared, next, count);
      if (!is_idle) {  // one branch around all of it, since code that runs once must be short
        if (args.weights.gating != gating_rows::none) {
          write<true>(args, tile, rows, row_tile);
        } else {
          write<false>(args, tile, rows, row_tile);
        }
      }
      tile = next;
    }
  }
};

/// Brings the boxes of x of a block's tiles from `tile` on; a warp does it.
template <class Shape, class T>
__device__ inline void bring_fitted_rows(const CUtensorMap& x_map, const matmul_args<T>& args, std::uint32_t shared,
                                         const std::uint32_t* tiles_before, output_tile tile, std::uint32_t count) {
  const stage_ring<Shape::stages> ring{shared + Shape::barriers_at};
  std::uint32_t parity = (1u << Shape::stages) - 1;
  for (std::uint32_t number = blockIdx.x; tile.rows != 0;) {
    const std::uint32_t boxes = (tile.rows + 15) / 16;
    std::uint32_t slot = 0;
    for (std::uint32_t i = 0; i < count; ++i) {
      barrier_wait(ring.empty(slot), parity >> slot & 1u);
      parity ^= 1u << slot;
      if (threadIdx.x % 32 == 0) {
        const std::uint32_t to = shared + slot * Shape::stage_bytes, column = i * 128;
        barrier_expect(ring.full(slot), boxes * (2 * Shape::box_bytes));
        for (std::uint32_t b = 0; b < boxes; ++b) {
          const std::uint32_t at = to + b * Shape::box_bytes;
          const int row = static_cast<int>(tile.first_row + 16 * b);
          copy_box(at, &x_map, static_cast<int>(column), row, ring.full(slot));
          copy_box(at + Shape::half_stage_bytes, &x_map, static_cast<int>(column + 64), row, ring.full(slot));
        }
      }
      if (++slot == Shape::stages) slot = 0;
    }
    number += gridDim.x;
    tile = find_fitted_tile(args, tiles_before, number);
  }
}

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 1)
    fitted_rows_kernel(const __grid_constant__ CUtensorMap x_map, const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ __align__(1024) unsigned char memory[];
  const std::uint32_t shared = shared_address(memory);
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);

  if (threadIdx.x == Shape::consumers) {
    prefetch_map(&x_map);
    stage_ring<Shape::stages>{shared + Shape::barriers_at}.init(Shape::consumers / 32);
    barrier_init_done();
  }
  start_next_kernel();
  __syncthreads();
  wait_for_last_kernel();
  count_row_tiles<Shape::rows>(args.x.row_offsets, args.weights.matrices, tiles_before);
  const std::uint32_t count = args.weights.col_tiles / 2;
  const output_tile tile = find_fitted_tile(args, tiles_before, blockIdx.x);
  if (tile.rows == 0) return;
  if (threadIdx.x < Shape::consumers) {
    take_registers<112>();
    fitted_rows_walk<Shape, T, Kind, Macros> walk(shared);
    walk.start(args, shared, tile, count);
    walk.run_tiles(args, shared, tiles_before, tile, count);
  } else {
    give_registers<32>();
    if (threadIdx.x < Shape::consumers + 32) {
      bring_fitted_rows<Shape>(x_map, args, shared, tiles_before, tile, count);
    }
  }
#endif
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
