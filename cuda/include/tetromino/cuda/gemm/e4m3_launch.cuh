#pragma once

#include "launch.cuh"           // find_device, launch_many_rows, launch_medium_height, map_activations
#include "sm90a/e4m3_rows.cuh"  // e4m3_rows_kernel

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

/// Choosing and launching a product kernel for activations in E4M3.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Launches the kernel that fits tiles to the rows of x that each expert has.
template <weight_kind Kind, class Shape>
result<void> launch_e4m3_rows(const stream& s, const matrix_view<const std::uint8_t>& x, matmul_args<bfloat16> args,
                              const device_facts& device) {
  args.feature_tiles = (args.weights.row_tiles + Shape::groups - 1) / Shape::groups;
  const std::size_t tiles = most_row_tiles(args, Shape::rows) * args.feature_tiles;
  const std::size_t blocks = std::min(tiles, static_cast<std::size_t>(device.multiprocessors));
  auto map = map_activations(x, 16);
  if (!map) return map.error();
  return launch_overlapping(e4m3_rows_kernel<Shape, Kind, bfloat16>, "the launch of e4m3_rows_kernel", s, blocks,
                            Shape::threads, Shape::shared_bytes(args.weights.matrices), 1, *map, args);
}

template <weight_kind Kind>
result<void> e4m3_matmul_of_kind(const stream& s, const matmul_job<e4m3>& job, const matmul_args<bfloat16>& args) {
  using many = many_rows_shape<e4m3, Kind, 256, 2, 4>;
  auto device = find_device();
  if (!device) return device.error();
  if (device->major != 9) {
    return error(errc::device, {"matmul: activations in E4M3 need Hopper, compute capability 9.0, and this GPU's is ",
                                device->major, ".x; half and bfloat16 multiply on all"});
  }
  auto has_code = is_hopper_code(many_rows_kernel<many, bfloat16, Kind, 0>);
  if (!has_code) return has_code.error();
  if (!*has_code) {
    return error(errc::device, "CUDA: this build has no code for Hopper; add 90a to TETROMINO_CUDA_ARCHITECTURES");
  }
  const matrix_view<const std::uint8_t> x(job.x.values.data(), job.x.rows, job.x.stride());
  if (job.row_offsets == nullptr) {
    if (x.rows <= 64) return launch_medium_height<e4m3, Kind, 0>(s, x, args, x.rows, *device);
    // Tiles of 256 rows take 4/3 of the time of tiles of 128.
    if (rounds_of_tiles(args, 128, *device) * 3 < rounds_of_tiles(args, 256, *device) * 4) {
      return launch_medium_rows<e4m3, Kind, 0, 128, 2>(s, x, args, most_row_tiles(args, 128), *device);
    }
    return launch_many_rows<many, Kind, 0>(s, x, args, most_row_tiles(args, many::rows), *device);
  }
  // Fitted tiles pay from about 12 rows for each matrix on, where a block gets one; without clusters, fewer would leave
  // multiprocessors idle. Those of 96 rows are faster to 64 rows for each, those of 160 from 128 on (on an H200, even
  // and skewed); between, 80 and two deviations more still fit into 96.
  using fitted = e4m3_rows_shape<Kind, 96, 4, 6>;
  using tall = e4m3_rows_shape<Kind, 160, 3, 5>;
  const std::size_t groups = std::min<std::size_t>(args.weights.matrices, x.rows);
  const std::size_t rows = (x.rows + groups - 1) / groups;
  const std::size_t fitted_tiles = groups * ((args.weights.row_tiles + fitted::groups - 1) / fitted::groups);
  const bool is_full = fitted_tiles >= static_cast<std::size_t>(device->multiprocessors);
  if (rows < 12 || (rows <= 64 && !is_full)) {
    return launch_medium_height<e4m3, Kind, 0>(s, x, args, tile_height(job, rows), *device);
  }
  if (rows <= 80) return launch_e4m3_rows<Kind, fitted>(s, x, args, *device);
  return launch_e4m3_rows<Kind, tall>(s, x, args, *device);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
