#pragma once

#include "../../arch/sm90a.cuh"  // cluster_sync
#include "../args.cuh"           // matmul_args
#include "../epilogue.cuh"       // write_pair
#include "../macro_walk.cuh"     // inverse_macro
#include "../weight_tile.cuh"    // coded_tile

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// The product on Hopper for few rows of x, as in decoding, where nothing but the reading of weights should take time.
/// The sixteen warps of a block take turns at the columns of the same 64 rows of weights. Each works alone: it asks for
/// tiles of weights, and for the columns of x that belong to them, before it needs them, and they come into shared
/// memory of its own. At the end the block adds up what its warps have; where there are fewer tiles than
/// multiprocessors, the blocks of a cluster share the columns, and add up by way of the shared memory of the block that
/// owns an output.
///
/// A kernel may start while the one before it in the stream still runs. It waits for that one before it touches
/// anything but its own shared memory; with matmul_options::settled_weights it asks for its first weights before it
/// waits.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// `Rows` of x by 64 rows of weights.
template <weight_kind Kind, int Macros, int Rows>
struct few_rows_shape {
  static constexpr std::uint32_t rows = Rows, warps = 16, threads = 32 * warps;
  static constexpr int eights = Rows / 8;
  static constexpr std::uint32_t ahead = 2;       ///< tiles that a warp has asked for
  static constexpr std::uint32_t most_parts = 4;  ///< blocks of a cluster, which share a tile of the output
  static constexpr std::uint32_t macros_at = weight_tile<Kind>::bytes;
  static constexpr std::uint32_t x_at = (macros_at + 64 * Macros + 127) / 128 * 128;
  static constexpr std::uint32_t stage_bytes = x_at + Rows * 128;
  static constexpr std::uint32_t ring_bytes = ahead * stage_bytes;  ///< of a warp
  static constexpr std::uint32_t sums_at = warps * ring_bytes;
  static constexpr std::uint32_t sums_stride = 64 + 4;  ///< floats of a row of x, against bank conflicts
  static constexpr std::uint32_t loaded_at = sums_at + warps * Rows * sums_stride * 4;
  static constexpr std::uint32_t parts_at = loaded_at + 64 * 8;
  static constexpr std::uint32_t tiles_before_at = parts_at + (32 * Rows + most_parts) * 8;
  static constexpr std::uint32_t shared_bytes(std::uint32_t matrices) { return tiles_before_at + (matrices + 1) * 4; }
};

#if TETROMINO_CUDA_HOPPER

/// One warp's way through the columns of a tile of the output.
template <class Shape, class T, weight_kind Kind, int Macros>
struct few_rows_walk {
  static constexpr int eights = Shape::eights;
  using weights = weight_tile<Kind>;
  static constexpr std::uint32_t scales_at = weights::scales_at, per_lane = 4 * weights::lane_scales;
  static constexpr std::uint32_t scale_lanes = weights::scale_bytes / 16;
  const matmul_args<T>& args;
  std::uint32_t ring;          ///< the warp's part of shared memory
  std::uint32_t first, count;  ///< tiles of 64 columns: the first, and how many; every eighth is the warp's
  std::uint32_t full;          ///< how many of them lie before the last column of x altogether
  std::uint32_t lane, x_to;
  // What the lane copies next: codes, and scales, which the first lanes copy; macro bytes, which the next ones do; and
  // x.
  const std::uint8_t *codes_from, *macros_from;
  int rows_lanes;  ///< eight for each row of x
  const T* x_from;
  float d[4][eights][4];

  __device__ few_rows_walk(const matmul_args<T>& args_, std::uint32_t part, std::uint32_t shared) : args(args_) {
    const std::uint32_t begin = args.weights.col_tiles * part / args.parts,
                        end = args.weights.col_tiles * (part + 1) / args.parts;
    ring = shared + threadIdx.x / 32 * Shape::ring_bytes;
    first = begin + threadIdx.x / 32;
    count = first < end ? (end - first + Shape::warps - 1) / Shape::warps : 0;
    lane = threadIdx.x % 32;
    x_to = Shape::x_at + lane / 8 * 128 + (lane % 8 ^ lane / 8) * 16;
    const std::uint32_t whole = args.x.cols / 64;
    full = first < whole ? (whole - first + Shape::warps - 1) / Shape::warps : 0;
    keep(lane), keep(x_to), keep(full), keep(count);
  }

  /// Goes to an output tile.
  __device__ void enter(const output_tile& tile) {
    rows_lanes = static_cast<int>(tile.rows) * 8;
    codes_from = args.weights.template tiles_of<Kind>(tile.matrix, tile.feature_tile) +
                 std::size_t{first} * weights::bytes + lane * 16;
    if constexpr (Macros != 0) {
      const std::uint32_t macro = Macros == 2 ? first * 2 : first >> args.weights.macro_shift;
      macros_from = args.weights.macros_of(tile.matrix, tile.feature_tile) + macro * 64 + (lane - scale_lanes) * 16;
    }
  }
  /// Asks for the weights of the warp's next tile.
  __device__ void ask_weights(std::uint32_t stage) {
    const std::uint32_t to = stage + lane * 16;
#pragma unroll
    for (std::uint32_t g = 0; g < 4; ++g) copy_16(to + g * 512, codes_from + g * 512);
    if (lane < scale_lanes) copy_16(to + scales_at, codes_from + scales_at);
    codes_from += Shape::warps * weights::bytes;
    if constexpr (Macros != 0) {
      if (lane >= scale_lanes && lane < scale_lanes + 4 * Macros) copy_16(to + scales_at, macros_from);
      macros_from += Macros == 2 ? Shape::warps * 128 : Shape::warps * 64 >> args.weights.macro_shift;
    }
  }
  /// Asks for the columns of x of the warp's tile i, the next one.
  __device__ void ask_x(std::uint32_t stage, std::uint32_t i) {
    const std::uint32_t to = stage + x_to;
    const T* from = x_from;
    x_from += Shape::warps * 64;
    if (i < full) {
#pragma unroll
      for (std::uint32_t q = 0; q < Shape::rows / 4; ++q) {
        if (static_cast<int>(lane) < rows_lanes - static_cast<int>(q) * 32)
          copy_16((to ^ q % 2 * 64) + q * 512, from + q * 4 * args.x.stride);
      }
      return;
    }
    const std::uint32_t column = (first + i * Shape::warps) * 64 + lane % 8 * 8;
    const std::uint32_t bytes = column < args.x.cols ? min((args.x.cols - column) * 2, 16u) : 0;
    if (bytes == 0) from = args.x.data;
    for (std::uint32_t q = 0; q < Shape::rows / 4; ++q) {  // past the last column x is zero
      if (static_cast<int>(lane) >= rows_lanes - static_cast<int>(q) * 32) break;
      copy_16((to ^ q % 2 * 64) + q * 512, from, bytes);
      if (bytes != 0) from += 4 * args.x.stride;
    }
  }
  __device__ void start_weights() {
#pragma unroll
    for (std::uint32_t i = 0; i < Shape::ahead; ++i) {
      if (i < count) ask_weights(ring + i * Shape::stage_bytes);
    }
  }
  __device__ void start_x(const output_tile& tile) {
    x_from =
        args.x.data + static_cast<std::size_t>(tile.first_row + lane / 8) * args.x.stride + first * 64 + lane % 8 * 8;
#pragma unroll
    for (std::uint32_t i = 0; i < Shape::ahead; ++i) {
      if (i < count) ask_x(ring + i * Shape::stage_bytes, i);
      copies_commit();
    }
  }

  /// Multiplies through all columns.
  __device__ void run() {
#pragma unroll
    for (int i = 0; i < 16 * eights; ++i) d[i / 4 / eights][i / 4 % eights][i % 4] = 0.0f;
    std::uint32_t stage = ring;
    for (std::uint32_t i = 0; i < count; ++i) {
      copies_wait<Shape::ahead - 1>();
      __syncwarp();
      add(stage);
      __syncwarp();
      if (i + Shape::ahead < count) {
        ask_weights(stage);
        ask_x(stage, i + Shape::ahead);
      }
      copies_commit();
      stage = stage == ring + (Shape::ahead - 1) * Shape::stage_bytes ? ring : stage + Shape::stage_bytes;
    }
  }

  __device__ void add(std::uint32_t stage) {
    const std::uint32_t g = lane / 4;
    const std::uint32_t x_at = stage + Shape::x_at + lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;
    std::uint32_t b[eights][2][4];
#pragma unroll
    for (std::uint32_t e = 0; e < eights; ++e) {
      load_matrices(x_at + e * 1024, b[e][0]);
      load_matrices((x_at ^ 64) + e * 1024, b[e][1]);
    }
    std::uint32_t scales[per_lane / 4];
#pragma unroll
    for (std::uint32_t i = 0; i < per_lane / 16; ++i) {
      load_shared(stage + scales_at + g * per_lane + i * 16, scales[4 * i], scales[4 * i + 1], scales[4 * i + 2],
                  scales[4 * i + 3]);
    }
    std::uint32_t macros[Macros == 0 ? 1 : 2 * Macros];
#pragma unroll
    for (int m = 0; m < Macros; ++m)
      load_shared(stage + Shape::macros_at + static_cast<std::uint32_t>(m) * 64 + g * 8, macros[2 * m],
                  macros[2 * m + 1]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {  // of the four groups of 16 rows
      coded_tile<Kind> coded;
      load_shared(stage + lane * 16 + static_cast<std::uint32_t>(w) * 512, coded.word[0], coded.word[1], coded.word[2],
                  coded.word[3]);
#pragma unroll
      for (int i = 0; i < coded.scale_words; ++i) coded.scales[i] = scales[w * coded.scale_words + i];
      float part[eights][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        std::uint32_t a[4];
        coded.template decode<T>(s, a);
        const bool starts = s == 0 || (Macros == 2 && s == 2), ends = s == 3 || (Macros == 2 && s == 1);
#pragma unroll
        for (int e = 0; e < eights; ++e) {
          if (Macros == 0) {
            multiply_add<T>(d[w][e], a, b[e][s / 2][s % 2 * 2], b[e][s / 2][s % 2 * 2 + 1]);
          } else if (starts) {
            multiply<T>(part[e], a, b[e][s / 2][s % 2 * 2], b[e][s / 2][s % 2 * 2 + 1]);
          } else {
            multiply_add<T>(part[e], a, b[e][s / 2][s % 2 * 2], b[e][s / 2][s % 2 * 2 + 1]);
          }
        }
        if (Macros != 0 && ends) {
          const std::uint32_t both = macros[(Macros == 2 ? s / 2 * 2 : 0) + w / 2] >> (w % 2 * 16);
          const float low = inverse_macro(both & 0xFFu), high = inverse_macro(both >> 8 & 0xFFu);
#pragma unroll
          for (int e = 0; e < eights; ++e) {
            d[w][e][0] += part[e][0] * low, d[w][e][1] += part[e][1] * low;
            d[w][e][2] += part[e][2] * high, d[w][e][3] += part[e][3] * high;
          }
        }
      }
    }
  }

  /// Leaves the warp's sums where the block adds them up.
  __device__ void leave(float* sums) const {
    float* const mine = sums + (threadIdx.x / 32 * Shape::rows + lane % 4 * 2) * Shape::sums_stride + lane / 4;
#pragma unroll
    for (int i = 0; i < 16 * eights; ++i) {
      const int w = i / 4 / eights, e = i / 4 % eights, j = i % 4;
      mine[static_cast<std::uint32_t>(e * 8 + j % 2) * Shape::sums_stride + w * 16 + j / 2 * 8] = d[w][e][j];
    }
  }
};

#endif

template <class Shape, class T, weight_kind Kind, int Macros>
__global__ void __launch_bounds__(Shape::threads, 1) few_rows_kernel(const matmul_args<T> args) {
#if TETROMINO_CUDA_HOPPER
  extern __shared__ __align__(1024) unsigned char memory[];
  const std::uint32_t shared = shared_address(memory), parts = args.parts, part = cluster_rank();
  auto* const sums = reinterpret_cast<float*>(memory + Shape::sums_at);
  auto* const loaded = reinterpret_cast<float2*>(memory + Shape::loaded_at);  // factors and biases
  auto* const tiles_before = reinterpret_cast<std::uint32_t*>(memory + Shape::tiles_before_at);
  const std::uint32_t tile_step = gridDim.x / parts;
  std::uint32_t number = blockIdx.x / parts;
  constexpr float missing = scale_decoding<T, Kind>::missing;

  start_next_kernel();
  few_rows_walk<Shape, T, Kind, Macros> walk(args, part, shared);
  const bool starts_early = args.weights.are_settled && args.x.row_offsets == nullptr;
  output_tile tile{};
  if (starts_early) {
    tile = find_tile<Shape::rows>(args, tiles_before, number);
    walk.enter(tile);
    walk.start_weights();
  }
  wait_for_last_kernel();
  if (args.x.row_offsets != nullptr)
    count_row_tiles<Shape::rows>(args.x.row_offsets, args.weights.matrices, tiles_before);
  if (!starts_early) {
    tile = find_tile<Shape::rows>(args, tiles_before, number);
    if (tile.rows == 0) return;  // all blocks of a cluster do
    walk.enter(tile);
    walk.start_weights();
  }
  if (parts > 1) cluster_arrive();
  walk.start_x(tile);
  for (;;) {
    const std::uint32_t row = tile.feature_tile * 64;
    float2 factor{};
    if (threadIdx.x < 64) factor = load_row(args, tile.matrix, row + threadIdx.x);
    walk.run();
    walk.leave(sums);
    if (threadIdx.x < 64) loaded[threadIdx.x] = factor;
    number += tile_step;
    output_tile next{};
    if (parts == 1) next = find_tile<Shape::rows>(args, tiles_before, number);
    if (next.rows != 0) {
      walk.enter(next);
      walk.start_weights();
      walk.start_x(next);
    }
    __syncthreads();
    // Pairs of sums, which a gated output needs both of: rows r and r + 8 of 16, for one row of x.
    const std::uint32_t count = 32 * tile.rows, share = (count + parts - 1) / parts;
    if (parts > 1) cluster_wait();  // until the others have started
    for (std::uint32_t p = threadIdx.x; p < count; p += Shape::threads) {
      const std::uint32_t m = p / 32, r = p % 32 / 8 * 16 + p % 8;
      const float* const from = sums + m * Shape::sums_stride + r;
      float low = 0.0f, high = 0.0f;
#pragma unroll
      for (std::uint32_t w = 0; w < Shape::warps; ++w) {
        low += from[w * Shape::rows * Shape::sums_stride], high += from[w * Shape::rows * Shape::sums_stride + 8];
      }
      if (parts > 1) {
        const std::uint32_t owner = p / share;
        store_to_rank(shared + Shape::parts_at + (part * share + p - owner * share) * 8, owner, low, high);
      } else {
        write_pair(args, pair_rows(args, row + r, loaded[r], loaded[r + 8]), tile.first_row + m, low * missing,
                   high * missing);
      }
    }
    if (parts > 1) {
      __syncwarp();
      cluster_sync();
      const auto* const all = reinterpret_cast<const float2*>(memory + Shape::parts_at);
      for (std::uint32_t i = threadIdx.x; i < share && part * share + i < count; i += Shape::threads) {
        const std::uint32_t p = part * share + i, m = p / 32, r = p % 32 / 8 * 16 + p % 8;
        float low = 0.0f, high = 0.0f;
        for (std::uint32_t from = 0; from < parts; ++from) {
          low += all[from * share + i].x, high += all[from * share + i].y;
        }
        write_pair(args, pair_rows(args, row + r, loaded[r], loaded[r + 8]), tile.first_row + m, low * missing,
                   high * missing);
      }
      break;
    }
    if (next.rows == 0) break;
    __syncthreads();  // nobody needs the sums any more
    tile = next;
  }
#endif
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
