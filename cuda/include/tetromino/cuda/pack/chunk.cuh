#pragma once

#include <tetromino/float16.hpp>  // half, bfloat16
#include <tetromino/matrix.hpp>   // real

#include "../detail/values.cuh"  // pack_pair

#include <cstdint>  // std::uint32_t

/// Sixteen elements at a time, as raw 32-bit words in registers.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Elements per thread in the kernels that pack and unpack: a block of 16, or half of one of 32.
inline constexpr std::uint32_t chunk_size = 16;

template <real T>
inline constexpr std::uint32_t chunk_words = chunk_size * sizeof(T) / 4;

/// The bits of infinity: the least magnitude that is not finite.
template <real T>
inline constexpr std::uint32_t infinity_bits = 0x7F800000u;
template <>
inline constexpr std::uint32_t infinity_bits<half> = 0x7C00u;
template <>
inline constexpr std::uint32_t infinity_bits<bfloat16> = 0x7F80u;

/// Sixteen elements as they lie in memory, two halves or one float in each word.
template <real T>
struct chunk {
  std::uint32_t word[chunk_words<T>];

  /// Reads all sixteen; `from` is aligned to 16 bytes.
  __device__ void load(const T* from) {
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_words<T> / 4; ++i) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i);
      word[4 * i] = four.x, word[4 * i + 1] = four.y, word[4 * i + 2] = four.z, word[4 * i + 3] = four.w;
    }
  }

  /// Reads the first n; the others are zero.
  __device__ void load_some(const T* from, std::uint32_t n) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_size; ++i) word[i] = i < n ? bit_cast<std::uint32_t>(from[i]) : 0;
    } else {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_size; i += 2) {
        const std::uint32_t low = i < n ? from[i].bits : 0, high = i + 1 < n ? from[i + 1].bits : 0;
        word[i / 2] = low | high << 16;
      }
    }
  }

  /// Writes all sixteen; `to` is aligned to 16 bytes.
  __device__ void store(T* to) const {
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_words<T> / 4; ++i) {
      reinterpret_cast<uint4*>(to)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
    }
  }

  /// Writes the first n.
  __device__ void store_some(T* to, std::uint32_t n) const {
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; ++i) {
      if (i < n) to[i] = element(i);
    }
  }

  /// Element i, for i known at compile time.
  [[nodiscard]] __device__ T element(std::uint32_t i) const {
    if constexpr (sizeof(T) == 4) {
      return bit_cast<float>(word[i]);
    } else {
      return T::from_bits(static_cast<std::uint16_t>(i % 2 == 0 ? word[i / 2] : word[i / 2] >> 16));
    }
  }

  [[nodiscard]] __device__ float value(std::uint32_t i) const {
    if constexpr (sizeof(T) == 4) {
      return bit_cast<float>(word[i]);
    } else if constexpr (std::same_as<T, bfloat16>) {
      return bit_cast<float>(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xFFFF0000u);
    } else {
      return __half2float(__ushort_as_half(element(i).bits));
    }
  }

  /// The largest magnitude, as the bits of a T without its sign.
  [[nodiscard]] __device__ std::uint32_t largest() const {
    std::uint32_t most = 0;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_size; ++i) most = max(most, word[i] & 0x7FFFFFFFu);
    } else {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_size / 2; ++i) most = __vmaxu2(most, word[i] & 0x7FFF7FFFu);
      most = max(most & 0xFFFFu, most >> 16);
    }
    return most;
  }

  /// The column of the first element that is not finite; there is one.
  [[nodiscard]] __device__ std::uint32_t first_special() const {
    std::uint32_t first = 0;
#pragma unroll
    for (std::uint32_t i = chunk_size; i-- > 0;) {
      if (is_special(bits(i))) first = i;
    }
    return first;
  }

  /// Replaces what is not finite: infinities by the largest finite value, NaN by 0.
  __device__ void saturate() {
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; ++i) {
      if (is_special(bits(i))) set_bits(i, admitted(bits(i)));
    }
  }

  /// Replaces what is not finite by 0.
  __device__ void clear_special() {
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; ++i) {
      if (is_special(bits(i))) set_bits(i, 0);
    }
  }

  [[nodiscard]] __device__ bool has_infinity() const {
    constexpr std::uint32_t magnitude = sizeof(T) == 4 ? 0x7FFFFFFFu : 0x7FFFu;
    bool found = false;
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; ++i) found = found || (bits(i) & magnitude) == infinity_bits<T>;
    return found;
  }

  __device__ void clear() {
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_words<T>; ++i) word[i] = 0;
  }

 private:
  static __device__ bool is_special(std::uint32_t x) { return (x & infinity_bits<T>) == infinity_bits<T>; }

  /// What saturating makes of bits that are not finite.
  static __device__ std::uint32_t admitted(std::uint32_t x) {
    constexpr std::uint32_t magnitude = sizeof(T) == 4 ? 0x7FFFFFFFu : 0x7FFFu;
    return (x & magnitude) > infinity_bits<T> ? 0 : x - 1;  // the largest finite value precedes infinity
  }

  [[nodiscard]] __device__ std::uint32_t bits(std::uint32_t i) const {
    if constexpr (sizeof(T) == 4) {
      return word[i];
    } else {
      return i % 2 == 0 ? word[i / 2] & 0xFFFFu : word[i / 2] >> 16;
    }
  }
  __device__ void set_bits(std::uint32_t i, std::uint32_t x) {
    if constexpr (sizeof(T) == 4) {
      word[i] = x;
    } else {
      word[i / 2] = i % 2 == 0 ? (word[i / 2] & 0xFFFF0000u) | x : (word[i / 2] & 0xFFFFu) | x << 16;
    }
  }
};

/// The float that a magnitude stands for.
template <real T>
[[nodiscard]] __device__ inline float magnitude_value(std::uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<float>(bits);
  } else if constexpr (std::same_as<T, bfloat16>) {
    return bit_cast<float>(bits << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
