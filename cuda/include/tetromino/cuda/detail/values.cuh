#pragma once

#include <tetromino/float16.hpp>  // half, bfloat16
#include <tetromino/matrix.hpp>   // real

#include <cuda_bf16.h>  // __nv_bfloat162
#include <cuda_fp16.h>  // __half2

#include <concepts>  // std::same_as
#include <cstddef>   // std::size_t
#include <cstdint>   // std::uint32_t, std::uint64_t

/// What kernels of all rooms share: values as bits, conversions, and where a scale lies.
namespace TETROMINO_NAMESPACE::cuda::detail {

using tetromino::detail::bit_cast;

inline constexpr unsigned full_warp = 0xFFFFFFFFu;

/// Words as the toolkit's pairs and back.
[[nodiscard]] __device__ inline __nv_bfloat162 as_bfloat16_pair(std::uint32_t word) {
  return reinterpret_cast<const __nv_bfloat162&>(word);
}
[[nodiscard]] __device__ inline __half2 as_half_pair(std::uint32_t word) {
  return reinterpret_cast<const __half2&>(word);
}
[[nodiscard]] __device__ inline std::uint32_t as_word(const __nv_bfloat162& pair) {
  return reinterpret_cast<const std::uint32_t&>(pair);
}
[[nodiscard]] __device__ inline std::uint32_t as_word(const __half2& pair) {
  return reinterpret_cast<const std::uint32_t&>(pair);
}

/// Two floats rounded to nearest even, the first in the low half.
template <real T>
[[nodiscard]] __device__ inline std::uint32_t pack_pair(float low, float high) {
  if constexpr (std::same_as<T, bfloat16>) {
    return as_word(__floats2bfloat162_rn(low, high));
  } else {
    return as_word(__floats2half2_rn(low, high));
  }
}

/// A float rounded to nearest even.
template <real T>
[[nodiscard]] __device__ inline T round_to(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::same_as<T, bfloat16>) {
    return T::from_bits(__bfloat16_as_ushort(__float2bfloat16_rn(x)));
  } else {
    return T::from_bits(__half_as_ushort(__float2half_rn(x)));
  }
}

/// Notes the position of a refused value, keeping the first.
__device__ inline void report_rejection(std::uint64_t* rejected, std::uint64_t position) {
  if (rejected != nullptr) atomicMin(reinterpret_cast<unsigned long long*>(rejected), position);
}

/// Where the scale of row r, block c lies within its 128x4 swizzled matrix; see layout::swizzled_offset.
[[nodiscard]] __device__ inline std::size_t swizzled_at(std::uint32_t r, std::uint32_t c,
                                                        std::uint32_t scales_per_row) {
  const std::size_t tile = static_cast<std::size_t>(r / 128) * ((scales_per_row + 3) / 4) + c / 4;
  return tile * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4;
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
