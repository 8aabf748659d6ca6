#pragma once

#include "hopper.cuh"       // wgmma
#include "matmul_args.cuh"  // matmul_args
#include "matmul_tile.cuh"  // coded_tile

#include <cuda.h>  // CUtensorMap

#include <cstdint>  // std::uint32_t

/// The product on Hopper. One warp keeps the copy engine busy: it brings boxes of activations, and tiles of prepared
/// weights where many rows of x make use of them, into a ring of stages in shared memory. The other warps are
/// warpgroups of 64 weight rows each: a lane reads its codes, decodes them in registers, and those are the A operand of
/// the warpgroup's matrix products; the activations are the B operand. So a tile of the output is [weight rows, x
/// rows], with sums in registers.
///
/// Where x has few rows, there are fewer tiles than multiprocessors: then the blocks of a cluster share a tile, each
/// takes a part of the columns and sends its sums to the block that adds them up.
namespace tetromino::cuda::detail {

/// The shape of a kernel: `Rows` of x and Groups * 64 rows of weights in a tile; stages of 64 columns.
template <activation T, weight_kind Kind, int Rows, int Groups, int Stages>
struct hopper_shape {
  static constexpr int rows = Rows, groups = Groups, stages = Stages;
  static constexpr bool is_large = Rows >= 128;
  static constexpr int consumers = Groups * 128;
  static constexpr int threads = consumers + (is_large ? 128 : 32);
  static_assert(!is_large || Groups == 2 || Groups == 3, "registers are shared out for two or three warpgroups");
  static constexpr int sums = Rows / 2;  ///< of a lane
  static constexpr std::uint32_t tile_bytes = 2048 + 4096 / block_of<Kind>;
  static constexpr std::uint32_t box_bytes = Rows * 128;
  static constexpr std::uint32_t weights_at = box_bytes;
  /// Where tiles are large, the copy engine brings weights too; else each warp asks for its own.
  static constexpr std::uint32_t stage_bytes = (weights_at + (is_large ? Groups * tile_bytes : 0) + 1023) / 1024 * 1024;
  static constexpr std::uint32_t lane_scales = 4 * coded_tile<Kind>::scale_words;
  static constexpr std::uint32_t slot_bytes = 32 * (16 + lane_scales);  ///< of a warp's own ring
  static constexpr std::uint32_t own_at = Stages * stage_bytes;
  static constexpr std::uint32_t barriers_at = own_at + (is_large ? 0 : Groups * 4 * Stages * slot_bytes);
  static constexpr std::uint32_t output_at = barriers_at + 256;
  /// What a warpgroup's outputs take on their way to memory: 64 rows of x at a time, padded against bank conflicts.
  static constexpr std::uint32_t staged_row_bytes = 64 * 2 + 16;
  static constexpr std::uint32_t staged_bytes = is_large ? Groups * 64 * staged_row_bytes : 0;
  /// What the blocks of a cluster that share a tile send each other. It takes the place of the stages, which are then
  /// done with, where there is no room for both.
  static constexpr bool can_share = Rows <= 128, shares_in_stages = is_large;
  static constexpr std::uint32_t inbox_bytes = consumers * sums * 4;
  static_assert(!can_share || !shares_in_stages || inbox_bytes <= Stages * stage_bytes);
  static constexpr std::uint32_t inbox_at = shares_in_stages ? 0 : output_at + staged_bytes;
  static constexpr std::uint32_t tiles_before_at = output_at + staged_bytes + (shares_in_stages ? 0 : inbox_bytes);
  /// Shared memory for `matrices` matrices.
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) {
    return 1024 + tiles_before_at + (matrices + 1) * 4;
  }
};

#if TETROMINO_CUDA_HOPPER

/// What the copies of a tile of the output are made of.
template <class Shape, class T>
struct stage_source {
  std::uint32_t groups;  ///< tiles of weights in a stage
  const std::uint8_t* weights;
  std::size_t group_stride;
  int first_row;

  __device__ stage_source(const matmul_args<T>& args, const output_tile& tile) {
    const std::uint32_t row_tile = tile.feature_tile * Shape::groups, lane = threadIdx.x % 32;
    groups = min(static_cast<std::uint32_t>(Shape::groups), args.row_tiles - row_tile);
    weights = args.tiles + (static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile + min(lane, groups - 1)) *
                               args.col_tiles * Shape::tile_bytes;
    first_row = static_cast<int>(tile.first_row);
  }
  /// A lane for each tile of weights. Its barrier also expects x.
  __device__ void copy_weights(std::uint32_t stage, std::uint32_t k, std::uint32_t barrier) const {
    const std::uint32_t lane = threadIdx.x % 32;
    if (lane == 0) barrier_expect(barrier, Shape::box_bytes + (Shape::is_large ? groups * Shape::tile_bytes : 0));
    __syncwarp();
    if (Shape::is_large && lane < groups) {
      copy_bytes(stage + Shape::weights_at + lane * Shape::tile_bytes,
                 weights + static_cast<std::size_t>(k) * Shape::tile_bytes, Shape::tile_bytes, barrier);
    }
  }
  __device__ void copy_x(const CUtensorMap& x_map, std::uint32_t stage, std::uint32_t k, std::uint32_t barrier) const {
    if (threadIdx.x % 32 == 31) copy_box(stage, &x_map, static_cast<int>(k * 64), first_row, barrier);
  }
};

/// The warp that brings the stages of a block's tiles. Stages are numbered through, and number n lies in slot
/// n % stages.
template <class Shape, class T>
struct stage_producer {
  const matmul_args<T>& args;
  std::uint32_t shared, first, count;
  std::uint32_t early = 0;  ///< stages whose weights were asked for at once
  std::uint32_t slot = 0, parity = 1, number = 0;

  __device__ stage_producer(const matmul_args<T>& args_, std::uint32_t shared_, std::uint32_t part, std::uint32_t parts)
      : args(args_), shared(shared_) {
    first = args.col_tiles * part / parts, count = args.col_tiles * (part + 1) / parts - first;
  }
  [[nodiscard]] __device__ std::uint32_t full(std::uint32_t of_slot) const {
    return shared + Shape::barriers_at + 8 * of_slot;
  }
  /// Asks for the first weights of a tile, as far as the ring has room.
  __device__ void start(const output_tile& tile) {
    const stage_source<Shape, T> source(args, tile);
    early = min(count, static_cast<std::uint32_t>(Shape::stages));
    for (std::uint32_t i = 0; i < early; ++i) {
      source.copy_weights(shared + i * Shape::stage_bytes, first + i, full(i));
    }
  }
  /// Brings the stages of one tile.
  __device__ void run(const CUtensorMap& x_map, const output_tile& tile) {
    const stage_source<Shape, T> source(args, tile);
    for (std::uint32_t i = 0; i < count; ++i, ++number) {
      const std::uint32_t stage = shared + slot * Shape::stage_bytes;
      if (number >= early) {
        barrier_wait(full(slot) + 8 * Shape::stages, parity);
        source.copy_weights(stage, first + i, full(slot));
      }
      source.copy_x(x_map, stage, first + i, full(slot));
      if (++slot == Shape::stages) slot = 0, parity ^= 1;
    }
  }
};

/// The weights that a lane asks for itself, some tiles before it needs them: a ring of its warp's.
template <class Shape, weight_kind Kind>
struct own_weights {
  const std::uint8_t *codes_from, *scales_from;
  std::uint32_t codes_to, scales_to, left, slot;

  /// Asks for the first tiles of `count`.
  template <class T>
  __device__ void start(const matmul_args<T>& args, std::uint32_t shared, const output_tile& tile, std::uint32_t first,
                        std::uint32_t count) {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::uint32_t row_tile = min(tile.feature_tile * Shape::groups + warp / 4, args.row_tiles - 1);
    const std::uint8_t* const at =
        args.tiles + ((static_cast<std::size_t>(tile.matrix) * args.row_tiles + row_tile) * args.col_tiles + first) *
                         Shape::tile_bytes;
    codes_from = at + warp % 4 * 512 + lane * 16;
    scales_from = at + 2048 + (lane / 4 * 4 + warp % 4) * Shape::lane_scales;
    codes_to = shared + Shape::own_at + warp * (Shape::stages * Shape::slot_bytes) + lane * 16;
    scales_to = codes_to + 512 + lane * Shape::lane_scales - lane * 16;
    left = count, slot = 0;
#pragma unroll
    for (std::uint32_t i = 0; i < Shape::stages; ++i) ask(i);
  }
  /// Asks for the next tile, if there is one.
  __device__ void ask(std::uint32_t to_slot) {
    if (left != 0) {
      --left;
      copy_16(codes_to + to_slot * Shape::slot_bytes, codes_from);
      copy_small<Shape::lane_scales>(scales_to + to_slot * Shape::slot_bytes, scales_from);
      codes_from += Shape::tile_bytes, scales_from += Shape::tile_bytes;
    }
    copies_commit();
  }
  [[nodiscard]] __device__ coded_tile<Kind> read() const {
    coded_tile<Kind> out;
    copies_wait<Shape::stages - 1>();
    out.read(codes_to + slot * Shape::slot_bytes, scales_to + slot * Shape::slot_bytes);
    return out;
  }
  /// Asks for another tile in place of the one that was read.
  __device__ void advance() {
    ask(slot);
    if (++slot == Shape::stages) slot = 0;
  }
};

/// The sums of one warpgroup for one tile of the output. `Macros`: macro blocks that a tile of 64 columns touches; 0
/// for none, 1 where a macro block is 64 columns or more.
template <class Shape, class T, weight_kind Kind, int Macros>
struct tile_sums {
  static constexpr int sums = Shape::sums;
  own_weights<Shape, Kind> own;
  float d[sums];
  std::uint32_t a[2][4][4];  ///< A operands of two tiles of weights: one multiplies while the other is decoded

  std::uint32_t codes_at, scales_at;  ///< of this lane in a tile

  __device__ tile_sums() {
    const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    codes_at = warp * 512 + lane * 16;
    scales_at = 2048 + (lane / 4 * 4 + warp) * (2 * 64 / block_of<Kind>);
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

  /// The macro-block factors of the lane's two rows now, and their bytes in the next macro block.
  struct macro_walk {
    const std::uint8_t* at;
    std::uint32_t left;  ///< macro blocks after the current one
    macro_pair now{1.0f, 1.0f};
    std::uint32_t next = 0;

    __device__ void start(const std::uint8_t* first, std::uint32_t after) {
      at = first, left = after;
      now = macro_factors(load_macro_bytes(at));
      if (left != 0) next = load_macro_bytes(at + 64);
    }
    /// Goes to the next macro block; gives what the factors grow by.
    [[nodiscard]] __device__ macro_pair advance() {
      const macro_pair before = now;
      now = macro_factors(next);
      at += 64;
      if (--left != 0) next = load_macro_bytes(at + 64);
      return {__fdividef(now.low, before.low), __fdividef(now.high, before.high)};
    }
  };

  /// Brings the sums, which are in units of 1 / now, to units of the next macro block.
  __device__ void enter_next(macro_walk& macros) {
    const macro_pair growth = macros.advance();
    wgmma_wait<0>();
    hold();
    scale(growth.low, growth.high);
  }

  /// Stage by stage: decodes it, and sends its products on their way. While they go on, other warpgroups decode.
  template <class Tell>
  __device__ void run_plainly(macro_walk& macros, std::uint32_t macro_tiles, std::uint32_t until_next,
                              std::uint32_t full, std::uint32_t shared, std::uint32_t tiles, std::uint32_t& slot,
                              std::uint32_t& parity, std::uint32_t& last_empty, const Tell& tell) {
    for (std::uint32_t i = 0; i < tiles; ++i) {
      const std::uint32_t at = slot * Shape::stage_bytes;
      const coded tile = own.read();
      wgmma_wait<0>();
      tell();
      last_empty = full + 8 * (Shape::stages + slot);
      if constexpr (Macros != 0) {
        if (i != 0 && --until_next == 0) {
          until_next = macro_tiles;
          enter_next(macros);
        }
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) tile.template decode<T>(s, a[0][s]);
      own.advance();
      barrier_wait(full + 8 * slot, parity);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (Macros == 2 && s == 2) {
          wgmma_commit();
          enter_next(macros);
          wgmma_fence();
        }
        wgmma<T>(d, a[0][s], swizzled_tile(shared + at, 2u * static_cast<std::uint32_t>(s)));
      }
      wgmma_commit();
      if (++slot == Shape::stages) slot = 0, parity ^= 1;
    }
  }

  /// d += a b for the first N rows of x of the tile.
  template <int N>
  __device__ void multiply(const std::uint32_t (&by)[4], std::uint64_t box) {
    wgmma<T>(reinterpret_cast<float(&)[N / 2]>(d), by, box);
  }

  /// Multiplies the first N rows of x through the stages of columns [first, last), in units of stages. Stage by stage:
  /// its products, and beside them the decoding of the next one. The first product of a stage is on its way before the
  /// wait for those of the stage before.
  template <int N>
  __device__ void run(const matmul_args<T>& args, std::uint32_t shared, std::uint32_t group, std::uint32_t first,
                      std::uint32_t last, const std::uint8_t* macro_bytes, std::uint32_t& slot, std::uint32_t& parity) {
    const std::uint32_t full = shared + Shape::barriers_at, empty = full + 8 * Shape::stages;
    const std::uint32_t mine = shared + Shape::weights_at + group * Shape::tile_bytes;
    const std::uint32_t tiles = last - first;
#pragma unroll
    for (int i = 0; i < sums; ++i) d[i] = 0.0f;
    if (tiles == 0) return;

    macro_walk macros;
    std::uint32_t macro_tiles = 1, until_next = 1;  // tiles of a macro block; those before the next one starts
    if constexpr (Macros != 0) {
      macro_tiles = max(args.macro_block / 64, 1u);
      until_next = macro_tiles - first % macro_tiles;
      const std::uint32_t macro = first / macro_tiles * Macros;
      macros.start(macro_bytes + macro * 64, args.macros_per_row - 1 - macro);
    }

    std::uint32_t last_empty = 0;  // the barrier of the stage before, until it is told
    // Each lane tells for its own reads: racecheck knows what comes before a thread's arrival at an mbarrier, but not
    // that a __syncwarp puts the other lanes' reads there too (seen on a kernel of nothing but such a ring).
    const auto tell = [&] {
      if (last_empty != 0) barrier_arrive(last_empty);
    };
    if constexpr (!Shape::is_large) {
      run_plainly(macros, macro_tiles, until_next, full, shared, tiles, slot, parity, last_empty, tell);
    } else {
      barrier_wait(full + 8 * slot, parity);
      {
        const coded first_tile = load(mine + slot * Shape::stage_bytes);
#pragma unroll
        for (int s = 0; s < 4; ++s) first_tile.template decode<T>(s, a[0][s]);
      }
      const auto step = [&]<int Buffer, bool HasNext>() {
        constexpr int b = Buffer;
        const std::uint32_t box = shared + slot * Shape::stage_bytes, this_empty = empty + 8 * slot;
        if (++slot == Shape::stages) slot = 0, parity ^= 1;
        coded next;
        if constexpr (HasNext) {
          barrier_wait(full + 8 * slot, parity);
          next = load(mine + slot * Shape::stage_bytes);
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          if (Macros == 2 && s == 2) enter_next(macros);
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
            asm volatile("mov.u32 %0, %1;" : "=r"(yes) : "r"(tiles));
            if (yes != 0) next.template decode<T>(s, a[b ^ 1][s]);
          }
        }
        if constexpr (Macros != 0) {
          if (HasNext && --until_next == 0) {
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
    }
    wgmma_wait<0>();
    hold();
    tell();
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

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    for (std::uint32_t i = 0; i < Shape::stages; ++i) {
      barrier_init(shared + Shape::barriers_at + 8 * i, 1);
      barrier_init(shared + Shape::barriers_at + 8 * (Shape::stages + i), Shape::consumers);
    }
    barrier_init_done();
  }
  start_next_kernel();
  __syncthreads();
  const std::uint32_t first_tile = blockIdx.x / parts, tile_step = gridDim.x / parts;
  const bool is_consumer = threadIdx.x < Shape::consumers;
  const bool is_producer = !is_consumer && threadIdx.x < Shape::consumers + 32;
  stage_producer<Shape, T> producer(args, shared, part, parts);
  tile_sums<Shape, T, Kind, Macros> sums;
  const bool starts_early = args.has_settled_weights && args.row_offsets == nullptr;
  const auto start = [&] {
    const output_tile tile = find_tile<Shape::rows>(args, tiles_before, first_tile);
    if (Shape::is_large) {
      if (is_producer) producer.start(tile);
    } else if (is_consumer && tile.rows != 0) {
      sums.own.start(args, shared, tile, producer.first, producer.count);
    }
  };
  if (starts_early) start();
  wait_for_last_kernel();
  if (args.row_offsets != nullptr) count_row_tiles<Shape::rows>(args.row_offsets, args.matrices, tiles_before);
  if (!starts_early && !Shape::is_large) start();
  // Until the other blocks of a cluster have started, or, where sums take the place of stages, are done with those.
  const auto wait_for_others = [] {
    if constexpr (Shape::shares_in_stages) {
      cluster_sync();
    } else {
      cluster_wait();
    }
  };
  if (parts > 1) {
    if (find_tile<Shape::rows>(args, tiles_before, first_tile).rows == 0) return;  // all blocks of a cluster do
    if constexpr (!Shape::shares_in_stages) cluster_arrive();
  }

  if (!is_consumer) {
    if constexpr (Shape::is_large) give_registers<40>();
    for (std::uint32_t number = first_tile; is_producer; number += tile_step) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      producer.run(x_map, tile);
      if (parts > 1) break;
    }
  } else {
    if constexpr (Shape::is_large) take_registers<Shape::groups == 2 ? 232 : 152>();
    const std::uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const std::uint32_t first = args.col_tiles * part / parts, last = args.col_tiles * (part + 1) / parts;
    std::uint32_t slot = 0, parity = 0;
    for (std::uint32_t number = first_tile;; number += tile_step) {
      const output_tile tile = find_tile<Shape::rows>(args, tiles_before, number);
      if (tile.rows == 0) break;
      const std::uint32_t row_tile = tile.feature_tile * Shape::groups + group;
      const bool is_idle = row_tile >= args.row_tiles;  // a warpgroup past the last weight rows
      const std::uint8_t* macros = nullptr;
      if constexpr (Macros != 0) {
        macros = args.macros + (static_cast<std::size_t>(tile.matrix) * args.row_tiles + (is_idle ? 0 : row_tile)) *
                                   args.macros_per_row * 64;
        macros += lane / 4 * 8 + warp * 2;
      }
      const std::uint32_t in_matrix = (is_idle ? 0 : row_tile) * 64 + warp * 16 + lane / 4;
      const row_pair rows = find_rows(args, tile.matrix, in_matrix);
      // A tile that is not half full takes products of half the width.
      if (Shape::is_large && tile.rows * 2 <= Shape::rows) {
        sums.template run<Shape::is_large ? Shape::rows / 2 : Shape::rows>(args, shared, group, first, last, macros,
                                                                           slot, parity);
      } else {
        sums.template run<Shape::rows>(args, shared, group, first, last, macros, slot, parity);
      }
      if (parts > 1) {
        // Pairs of sums (rows g and g + 8 of the weights, one row of x) are dealt out among the blocks; each sends them
        // to the one that adds them up.
        wait_for_others();
#pragma unroll
        for (std::uint32_t i = 0; i < Shape::sums / 2; ++i) {
          const std::uint32_t at = (part * (Shape::sums / 2 / parts) + i / parts) * Shape::consumers + threadIdx.x;
          store_to_rank(shared + Shape::inbox_at + at * 8, i % parts, sums.d[i / 2 * 4 + i % 2],
                        sums.d[i / 2 * 4 + i % 2 + 2]);
        }
        break;
      }
      if constexpr (!Shape::is_large) {
        const output_tile next = find_tile<Shape::rows>(args, tiles_before, number + tile_step);
        if (next.rows != 0) sums.own.start(args, shared, next, first, last - first);
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
    if (!is_consumer) wait_for_others();
    cluster_sync();
    const output_tile tile = find_tile<Shape::rows>(args, tiles_before, first_tile);
    const std::uint32_t row_tile = tile.feature_tile * Shape::groups + threadIdx.x / 128;
    if (!is_consumer || row_tile >= args.row_tiles) return;
    const auto* const inbox = reinterpret_cast<const float2*>(memory + Shape::inbox_at) + threadIdx.x;
    const std::uint32_t row = row_tile * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const row_pair rows = find_rows(args, tile.matrix, row);
    const std::uint32_t share = Shape::sums / 2 / parts;
    for (std::uint32_t j = 0; j < share; ++j) {
      const std::uint32_t i = j * parts + part, m = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (m >= tile.rows) continue;
      float low = 0.0f, high = 0.0f;
      for (std::uint32_t from = 0; from < parts; ++from) {
        const float2 sum = inbox[(from * share + j) * Shape::consumers];
        low += sum.x, high += sum.y;
      }
      write_pair(args, rows, tile.first_row + m, low, high);
    }
  }
#endif
}

}  // namespace tetromino::cuda::detail
