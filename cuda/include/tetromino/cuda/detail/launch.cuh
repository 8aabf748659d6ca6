#pragma once

#include "../stream.hpp"  // stream, status_of

#include <cstddef>  // std::size_t
#include <cstdint>  // std::uint32_t

/// What launches of Hopper's kernels share.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Whether a kernel's code for this device is the one compiled for Hopper, not PTX of an older architecture.
template <class Kernel>
[[nodiscard]] result<bool> is_hopper_code(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  if (auto done = status_of(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes"); !done)
    return done.error();
  return attributes.binaryVersion == 90;
}

/// Launches a kernel that waits for the one before it by itself, in clusters of `parts` blocks.
template <class Kernel, class... Args>
[[nodiscard]] result<void> launch_overlapping(Kernel* kernel, const char* what, const stream& s, std::size_t blocks,
                                              int threads, std::uint32_t bytes, std::size_t parts,
                                              const Args&... args) {
  if (auto done =
          status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                    "cudaFuncSetAttribute");
      !done) {
    return done;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = s.handle;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(parts);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = parts > 1 ? 2 : 1;
  return status_of(cudaLaunchKernelEx(&config, kernel, args...), what);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
