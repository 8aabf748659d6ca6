#pragma once

#include "launch.cuh"           // find_device, launch_many_rows, map_activations
#include "sm90a/e4m3_rows.cuh"  // e4m3_rows_kernel

#include <algorithm>  // std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

/// Choosing and launching a product kernel for activations in E4M3.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Launches the kernel that fits tiles to the rows of x that each expert has.
template <weight_kind Kind>
result<void> launch_e4m3_rows(const stream& s, const matrix_view<const std::uint8_t>& x, matmul_args<bfloat16> args,
                              const device_facts& device) {
  using shape = e4m3_rows_shape<Kind>;
  args.feature_tiles = (args.weights.row_tiles + shape::groups - 1) / shape::groups;
  // Each expert but the first can add one tile that is not full.
  const std::size_t row_tiles =
      std::min(x.rows / shape::rows + std::min<std::size_t>(args.weights.matrices, x.rows), x.rows);
  const std::size_t blocks = std::min(row_tiles * args.feature_tiles, static_cast<std::size_t>(device.multiprocessors));
  auto map = map_activations(x, 16);
  if (!map) return map.error();
  return launch_overlapping(e4m3_rows_kernel<shape, Kind, bfloat16>, "the launch of e4m3_rows_kernel", s, blocks,
                            shape::threads, shape::shared_bytes(args.weights.matrices), 1, *map, args);
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
  if (job.row_offsets != nullptr) return launch_e4m3_rows<Kind>(s, x, args, *device);
  return launch_many_rows<many, Kind, 0>(s, x, args, (x.rows + many::rows - 1) / many::rows, *device);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
