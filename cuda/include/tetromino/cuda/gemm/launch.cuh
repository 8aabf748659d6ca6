#pragma once

#include "../detail/checks.hpp"     // is_aligned
#include "../detail/launch.cuh"     // is_hopper_code, launch_overlapping
#include "sm80_any_rows.cuh"        // any_rows_kernel
#include "sm90a/balanced_rows.cuh"  // balanced_rows_kernel
#include "sm90a/few_rows.cuh"       // few_rows_kernel
#include "sm90a/fitted_rows.cuh"    // fitted_rows_kernel
#include "sm90a/many_rows.cuh"      // many_rows_kernel
#include "sm90a/medium_rows.cuh"    // medium_rows_kernel

#include <algorithm>  // std::max, std::min
#include <array>      // std::array
#include <cmath>      // std::ceil, std::sqrt
#include <concepts>   // std::same_as
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t

/// Choosing and launching a product kernel for one kind of weights.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// What the choice of a kernel rests on.
struct device_facts {
  int major = 0;
  int multiprocessors = 0;
};

[[nodiscard]] inline result<device_facts> find_device() {
  device_facts out;
  int device = 0;
  if (auto done = status_of(cudaGetDevice(&device), "cudaGetDevice"); !done) return done.error();
  if (auto done = status_of(cudaDeviceGetAttribute(&out.major, cudaDevAttrComputeCapabilityMajor, device),
                            "cudaDeviceGetAttribute");
      !done) {
    return done.error();
  }
  if (auto done = status_of(cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, device),
                            "cudaDeviceGetAttribute");
      !done) {
    return done.error();
  }
  return out;
}

/// How the copy engine finds boxes of `box_rows` rows by 128 bytes of x.
template <class X>
[[nodiscard]] result<CUtensorMap> map_activations(const matrix_view<const X>& x, std::uint32_t box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return code == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  if (encode == nullptr) return error(errc::device, "CUDA: the driver has no cuTensorMapEncodeTiled");
  constexpr CUtensorMapDataType type = std::same_as<X, half>       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : std::same_as<X, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {x.cols, x.rows};
  const cuuint64_t strides[1] = {x.row_stride * sizeof(X)};
  const cuuint32_t box[2] = {128 / sizeof(X), box_rows};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult code =
      encode(&map, type, 2, const_cast<X*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    return error(errc::device, tetromino::detail::text("CUDA: error ", static_cast<int>(code),
                                                       " from cuTensorMapEncodeTiled for activations [", x.rows, ", ",
                                                       x.cols, "], row stride ", x.row_stride));
  }
  return map;
}

/// Launches the kernel for many rows of x. `row_tiles` is how many tiles of x there can be at most.
template <class Shape, weight_kind Kind, int Macros, class X, class T>
result<void> launch_many_rows(const stream& s, const matrix_view<const X>& x, matmul_args<T> args,
                              std::size_t row_tiles, const device_facts& device) {
  args.feature_tiles = (args.weights.row_tiles + Shape::groups - 1) / Shape::groups;
  const std::size_t tiles = row_tiles * args.feature_tiles;
  const std::size_t blocks = std::min(tiles, static_cast<std::size_t>(device.multiprocessors));
  const std::uint32_t bytes = Shape::shared_bytes(args.x.row_offsets == nullptr ? 0 : args.weights.matrices);
  auto map = map_activations(x, Shape::rows);
  if (!map) return map.error();
  return launch_overlapping(many_rows_kernel<Shape, T, Kind, Macros>, "the launch of many_rows_kernel", s, blocks,
                            Shape::threads, bytes, 1, *map, args);
}

/// How many clusters of `parts` blocks run at a time; 0 where that cannot be found out.
template <class Kernel>
[[nodiscard]] std::size_t clusters_at_once(Kernel* kernel, int threads, std::uint32_t bytes, std::size_t parts) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(parts));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(parts);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return static_cast<std::size_t>(clusters);
}

/// How many blocks of medium_rows_kernel share a tile of the output, where there are at most `tiles`.
template <class Shape, weight_kind Kind, int Macros, class T>
[[nodiscard]] std::size_t medium_rows_parts(const matmul_args<T>& args, std::size_t tiles) {
  constexpr std::size_t most = Shape::most_parts;
  constexpr std::uint32_t most_bytes = 227 * 1024;
  const std::uint32_t matrices = args.x.row_offsets == nullptr ? 0 : args.weights.matrices;
  // Clusters share tiles, if each block still gets a few stages and all of them run at once. What a device has room for
  // depends on how its multiprocessors are grouped, and is asked once: all of them are taken to be alike.
  static const std::array<std::size_t, most + 1> room = [&] {
    std::array<std::size_t, most + 1> out{};
    for (std::size_t parts = 2; parts <= most; ++parts) {
      const std::uint32_t bytes = Shape::shared_bytes(0, static_cast<std::uint32_t>(parts));
      if (bytes <= most_bytes) {
        out[parts] = clusters_at_once(medium_rows_kernel<Shape, T, Kind, Macros>, Shape::threads, bytes, parts);
      }
    }
    return out;
  }();
  std::size_t parts = most;
  while (parts > 1 && (tiles > room[parts] || args.weights.col_tiles < parts * 4 ||
                       Shape::shared_bytes(matrices, static_cast<std::uint32_t>(parts)) > most_bytes)) {
    --parts;
  }
  return parts;
}

/// Launches the kernel for a middling number of rows of x. `row_tiles` is how many tiles of x there can be at most.
template <class X, weight_kind Kind, int Macros, int Rows, int Groups, class Element, class T>
result<void> launch_medium_rows(const stream& s, const matrix_view<const Element>& x, matmul_args<T> args,
                                std::size_t row_tiles, const device_facts& device) {
  using shape = medium_rows_shape<X, Kind, Rows, Groups, 4>;
  args.feature_tiles = (args.weights.row_tiles + Groups - 1) / Groups;
  const std::size_t tiles = row_tiles * args.feature_tiles;
  const std::size_t parts = medium_rows_parts<shape, Kind, Macros>(args, tiles);
  const std::size_t blocks =
      parts > 1 ? tiles * parts : std::min(tiles, static_cast<std::size_t>(device.multiprocessors));
  const std::uint32_t matrices = args.x.row_offsets == nullptr ? 0 : args.weights.matrices;
  const std::uint32_t bytes = shape::shared_bytes(matrices, static_cast<std::uint32_t>(parts));
  auto map = map_activations(x, Rows);
  if (!map) return map.error();
  return launch_overlapping(medium_rows_kernel<shape, T, Kind, Macros>, "the launch of medium_rows_kernel", s, blocks,
                            shape::threads, bytes, parts, *map, args);
}

/// Launches the kernel that gives every multiprocessor as many weight rows. `row_tiles` as for launch_medium_rows.
template <class X, weight_kind Kind, int Macros, int Rows, class Element, class T>
result<void> launch_balanced_rows(const stream& s, const matrix_view<const Element>& x, matmul_args<T> args,
                                  std::size_t row_tiles, const device_facts& device) {
  using shape = balanced_rows_shape<X, Kind, Rows>;
  args.feature_tiles = args.weights.row_tiles;
  const std::size_t blocks = std::min(row_tiles * args.feature_tiles, static_cast<std::size_t>(device.multiprocessors));
  const std::uint32_t bytes = shape::shared_bytes(args.x.row_offsets == nullptr ? 0 : args.weights.matrices);
  auto map = map_activations(x, Rows);
  if (!map) return map.error();
  return launch_overlapping(balanced_rows_kernel<shape, T, Kind, Macros>, "the launch of balanced_rows_kernel", s,
                            blocks, shape::threads, bytes, 1, *map, args);
}

/// How many tiles of `rows` rows of x there can be at most: each matrix but the first can add one that is not full.
template <class T>
[[nodiscard]] std::size_t most_row_tiles(const matmul_args<T>& args, std::size_t rows) {
  const std::size_t all = args.x.rows;
  if (args.x.row_offsets == nullptr) return (all + rows - 1) / rows;
  return std::min(all / rows + std::min<std::size_t>(args.weights.matrices, all), all);
}

/// In how many rounds the multiprocessors take tiles of `rows` rows of x by 128 rows of weights.
template <class T>
[[nodiscard]] std::size_t rounds_of_tiles(const matmul_args<T>& args, std::size_t rows, const device_facts& device) {
  const auto room = static_cast<std::size_t>(device.multiprocessors);
  return (most_row_tiles(args, rows) * ((args.weights.row_tiles + 1) / 2) + room - 1) / room;
}

/// Launches a kernel for tiles of `Rows` rows of x, at most 64. Up to 32 rows tiles of three times 64 weight rows are
/// for clusters to share, or for the multiprocessors to do at once where most of those have three to do in any case;
/// else every multiprocessor gets as many weight rows.
template <class X, weight_kind Kind, int Macros, int Rows, class Element, class T>
result<void> launch_low_tiles(const stream& s, const matrix_view<const Element>& x, const matmul_args<T>& args,
                              const device_facts& device) {
  const std::size_t row_tiles = most_row_tiles(args, Rows);
  if constexpr (Rows <= (Macros == 0 ? 32 : Macros == 1 ? 24 : 16)) {  // others would spill registers
    using shape = medium_rows_shape<X, Kind, Rows, 3, 4>;
    const auto room = static_cast<std::size_t>(device.multiprocessors);
    const std::size_t tiles = row_tiles * ((args.weights.row_tiles + 2) / 3);
    const bool is_one_round = tiles <= room && row_tiles * args.weights.row_tiles > 2 * room;
    if (!is_one_round && medium_rows_parts<shape, Kind, Macros>(args, tiles) <= 1) {
      return launch_balanced_rows<X, Kind, Macros, Rows>(s, x, args, row_tiles, device);
    }
  }
  return launch_medium_rows<X, Kind, Macros, Rows, 3>(s, x, args, row_tiles, device);
}

/// Launches a kernel for tiles with room for `height` rows of x, which is at most 64.
template <class X, weight_kind Kind, int Macros, class Element, class T>
result<void> launch_medium_height(const stream& s, const matrix_view<const Element>& x, const matmul_args<T>& args,
                                  std::size_t height, const device_facts& device) {
  if constexpr (std::same_as<X, e4m3>) {  // activations of 16 bits have few_rows_kernel
    if (height <= 8) return launch_low_tiles<X, Kind, Macros, 8>(s, x, args, device);
  }
  if (height <= 16) return launch_low_tiles<X, Kind, Macros, 16>(s, x, args, device);
  if (height <= 24) return launch_low_tiles<X, Kind, Macros, 24>(s, x, args, device);
  if (height <= 32) return launch_low_tiles<X, Kind, Macros, 32>(s, x, args, device);
  if (height <= 48) return launch_low_tiles<X, Kind, Macros, 48>(s, x, args, device);
  return launch_low_tiles<X, Kind, Macros, 64>(s, x, args, device);
}

/// Launches the kernel that fits tiles to the rows of x that each expert has.
template <activation T, weight_kind Kind, int Macros, class Shape>
result<void> launch_fitted_rows(const stream& s, const matmul_job<T>& job, matmul_args<T> args, std::size_t row_tiles,
                                const device_facts& device) {
  args.feature_tiles = (args.weights.row_tiles + Shape::groups - 1) / Shape::groups;
  const std::size_t blocks = std::min(row_tiles * args.feature_tiles, static_cast<std::size_t>(device.multiprocessors));
  auto map = map_activations(job.x, 16);
  if (!map) return map.error();
  return launch_overlapping(fitted_rows_kernel<Shape, T, Kind, Macros>, "the launch of fitted_rows_kernel", s, blocks,
                            Shape::threads, Shape::shared_bytes(args.weights.matrices), 1, *map, args);
}

/// Launches the kernel for a few rows of x.
template <activation T, weight_kind Kind, int Macros, int Rows>
result<void> launch_few_rows(const stream& s, const matmul_job<T>& job, matmul_args<T> args, std::size_t row_tiles,
                             const device_facts& device) {
  using shape = few_rows_shape<Kind, Macros, Rows>;
  const auto room = static_cast<std::size_t>(device.multiprocessors);
  args.feature_tiles = args.weights.row_tiles;
  const std::size_t tiles = row_tiles * args.feature_tiles;
  // Where not even half the room is taken, clusters share tiles, if each warp still has something to do.
  std::size_t parts = 1;
  while (parts < shape::most_parts && tiles * parts * 2 <= room && args.weights.col_tiles >= parts * 2 * 8) parts *= 2;
  args.parts = static_cast<std::uint32_t>(parts);
  const std::size_t blocks = parts > 1 ? tiles * parts : std::min(tiles, room);
  const std::uint32_t bytes = shape::shared_bytes(job.row_offsets == nullptr ? 0 : args.weights.matrices);
  return launch_overlapping(few_rows_kernel<shape, T, Kind, Macros>, "the launch of few_rows_kernel", s, blocks,
                            static_cast<int>(shape::threads), bytes, parts, args);
}

/// Rows of x that a tile should have room for, where each matrix gets `rows` on average and tiles are not fitted.
/// Experts differ from the average by about its root, and one that needs a second tile has its weights read and decoded
/// twice; so up to 32 rows the tile has room for two deviations more. (Poisson counts; measured on an H200 at 1 to 256
/// tokens, even and skewed: 1.15 x on average.) Tiles of 8 rows split columns among 16 warps, which pays for experts
/// where there are many columns and so few rows.
[[nodiscard]] inline std::size_t tile_height(const matmul_job_base& job, std::size_t rows) {
  if (job.row_offsets == nullptr || rows > 32) return rows;
  if (rows <= 3 && job.shape.cols >= 6144) return 8;
  const auto mean = static_cast<double>(rows);
  return std::max<std::size_t>(16, static_cast<std::size_t>(std::ceil(mean + 2 * std::sqrt(mean))));
}

/// As many rows of x as a fitted tile has registers for.
[[nodiscard]] constexpr int most_fitted_rows(weight_kind kind, int macros) {
  if (kind == weight_kind::nv || macros == 2) return 80;
  return kind == weight_kind::mx32 && macros == 0 ? 128 : 96;
}

/// Average numbers of rows that tiles are fitted to; measured on an H200, even and skewed. Fewer do better with tiles
/// of one height, which decode while they multiply: up to 64 rows an instruction of a warpgroup takes as long as
/// for 16. Around the least number equal loads lose what skewed ones win two to three times over; which it has, the
/// host does not know. Where macro-block factors make all wait for products, it pays from fewer rows on. More rows than
/// the most do better with taller tiles, which decode each weight for more of them.
struct fitted_range {
  std::size_t least, most;
};
[[nodiscard]] constexpr fitted_range fitted_rows_range(weight_kind kind, int macros) {
  if (macros == 2) return {1, 512};
  if (macros == 1) return {16, 384};
  return {32, kind == weight_kind::mx32 ? std::size_t{512} : std::size_t{128}};
}

template <activation T, weight_kind Kind, int Macros>
result<void> matmul_of_kind(const stream& s, const matmul_job<T>& job, const matmul_args<T>& args) {
  auto device = find_device();
  if (!device) return device.error();
  const auto row_tiles = [&](std::size_t rows) { return most_row_tiles(args, rows); };
  const bool is_aligned_x = is_aligned(job.x.data, 16) && job.x.row_stride % 8 == 0;
  // About how many rows of x a matrix gets.
  const std::size_t groups =
      job.row_offsets == nullptr ? 1 : std::min<std::size_t>(args.weights.matrices, job.row_count);
  const std::size_t rows = (job.row_count + groups - 1) / groups;
  if (device->major == 9 && is_aligned_x && !job.portable) {
    using many = many_rows_shape<T, Kind, 256, 2, 5>;
    auto has_code = is_hopper_code(many_rows_kernel<many, T, Kind, Macros>);
    if (!has_code) return has_code.error();
    if (!*has_code) {
      return error(errc::device, "CUDA: this build has no code for Hopper; add 90a to TETROMINO_CUDA_ARCHITECTURES");
    }
    const std::size_t height = tile_height(job, rows);
    using fitted = fitted_rows_shape<Kind, Macros, most_fitted_rows(Kind, Macros)>;
    constexpr fitted_range range = fitted_rows_range(Kind, Macros);
    const std::size_t fitted_tiles = std::max(groups, job.row_count / fitted::rows) *
                                     ((args.weights.row_tiles + fitted::groups - 1) / fitted::groups);
    if (job.row_offsets != nullptr && rows >= range.least && rows <= range.most && height > 8 &&
        fitted_tiles >= static_cast<std::size_t>(device->multiprocessors)) {
      return launch_fitted_rows<T, Kind, Macros, fitted>(s, job, args, row_tiles(fitted::rows), *device);
    }
    if (height <= 8) return launch_few_rows<T, Kind, Macros, 8>(s, job, args, row_tiles(8), *device);
    if (height <= 64) return launch_medium_height<T, Kind, Macros>(s, job.x, args, height, *device);
    // Tiles of 256 rows take at least 7/4 of the time of tiles of 128.
    const auto rounds = [&](std::size_t of_rows) { return rounds_of_tiles(args, of_rows, *device); };
    const bool is_uneven = job.row_offsets != nullptr && rows <= 384;  // tiles of 256 would often be half empty
    if (is_uneven || rounds(128) * 4 < rounds(256) * 7) {
      return launch_medium_rows<T, Kind, Macros, 128, 2>(s, job.x, args, row_tiles(128), *device);
    }
    return launch_many_rows<many, Kind, Macros>(s, job.x, args, row_tiles(256), *device);
  }
  matmul_args<T> plain = args;
  plain.feature_tiles = args.weights.row_tiles;
  const std::size_t blocks = row_tiles(any_rows_tile) * plain.feature_tiles;
  if (blocks >= std::size_t{1} << 31) {
    return error(errc::shape_mismatch,
                 tetromino::detail::text("matmul: ", blocks, " tiles are too many for one launch"));
  }
  const std::size_t bytes = (args.weights.matrices + 1) * sizeof(std::uint32_t);
  any_rows_kernel<T, Kind, Macros != 0><<<static_cast<unsigned>(blocks), 128, bytes, s.handle>>>(plain);
  return status_of(cudaGetLastError(), "the launch of any_rows_kernel");
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
