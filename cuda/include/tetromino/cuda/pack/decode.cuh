#pragma once

#include <tetromino/scaling.hpp>  // fine_factor

#include "chunk.cuh"   // chunk, pack_pair
#include "encode.cuh"  // code_words, decode_e4m3

#include <cstdint>  // std::uint32_t

/// From E2M1 codes to values. A code's three low bits, put where the exponent of a small float type ends and its
/// fraction begins, are the code's value times a power of two, subnormals included: 2^-14 for half, 2^-126 for
/// bfloat16.
namespace TETROMINO_NAMESPACE::cuda::detail {

enum class unpack_rule : std::uint8_t { mx, mx_macro, mx_fine, nv };

/// The factors of 2 bits of a chunk, number `chunk` of a row, from their byte: of the first eight elements in bits 0
/// and 1, of the others in bits 2 and 3. A byte has those of 1 << macro_shift elements.
[[nodiscard]] __device__ inline std::uint32_t fine_bits_of_chunk(std::uint32_t byte, std::uint32_t chunk,
                                                                 std::uint32_t macro_shift) {
  if (macro_shift == 5) return byte >> (chunk % 2 * 4) & 15u;
  return (byte >> (chunk % 4 * 2) & 3u) * 5u;
}

/// Codes 2i and 2i + 1 of a word as two halves, times 2^-14.
[[nodiscard]] __device__ inline std::uint32_t code_pair_as_half(std::uint32_t even, std::uint32_t odd, int i) {
  const std::uint32_t both = __byte_perm(even, odd, 0x4400u + 0x1111u * static_cast<unsigned>(i));
  return ((both << 4) & 0x80008000u) | ((both << 1) & 0x0E000E00u);
}

/// Codes 2i and 2i + 1 of a word as two bfloat16, times 2^-126.
[[nodiscard]] __device__ inline std::uint32_t code_pair_as_bfloat16(std::uint32_t even, std::uint32_t odd, int i) {
  const std::uint32_t both = __byte_perm(even, odd, 0x4400u + 0x1111u * static_cast<unsigned>(i));
  return ((both << 4) & 0x80008000u) | ((both >> 2) & 0x01C001C0u);
}

/// 2^exponent for an E8M0 code below 255.
[[nodiscard]] __device__ inline float e8m0_value(std::uint32_t code) {
  return bit_cast<float>(code == 0 ? 0x00400000u : code << 23);
}

/// Sixteen elements made of codes by a function of each code's value, and of the half that it lies in.
template <real T, class F>
[[nodiscard]] __device__ inline chunk<T> map_codes(const code_words& codes, const F& f) {
  chunk<T> out;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::uint32_t word = h == 0 ? codes.low : codes.high;
    const std::uint32_t even = word & 0x0F0F0F0Fu, odd = word >> 4 & 0x0F0F0F0Fu;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 q = __half22float2(as_half_pair(code_pair_as_half(even, odd, i)));
      const float low = f(q.x * 0x1p14f, h), high = f(q.y * 0x1p14f, h);
      if constexpr (sizeof(T) == 4) {
        out.word[8 * h + 2 * i] = bit_cast<std::uint32_t>(low);
        out.word[8 * h + 2 * i + 1] = bit_cast<std::uint32_t>(high);
      } else {
        out.word[4 * h + i] = pack_pair<T>(low, high);
      }
    }
  }
  return out;
}

/// Sixteen quiet NaN, as converting the scale's NaN on the host gives them.
template <real T>
[[nodiscard]] __device__ inline chunk<T> nan_chunk(bool negative) {
  chunk<T> out;
  const std::uint32_t one = sizeof(T) == 4 ? 0x7FC00000u : std::same_as<T, half> ? 0x7E007E00u : 0x7FC07FC0u;
  const std::uint32_t sign = !negative ? 0u : sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
#pragma unroll
  for (std::uint32_t i = 0; i < chunk_words<T>; ++i) out.word[i] = one | sign;
  return out;
}

/// Sixteen elements from their codes, block scale, macro byte (of mx_fine: fine_bits_of_chunk) and tensor scale.
template <real T, unpack_rule Rule>
[[nodiscard]] __device__ inline chunk<T> unpack(const code_words& codes, std::uint32_t scale, std::uint32_t macro,
                                                float tensor_scale) {
  if constexpr (Rule == unpack_rule::nv) {
    if ((scale & 0x7Fu) == 0x7Fu) return nan_chunk<T>((scale & 0x80u) != 0);
    const float magnitude = decode_e4m3(scale & 0x7Fu);
    const float step = __fmul_rn(tensor_scale, (scale & 0x80u) != 0 ? -magnitude : magnitude);
    return map_codes<T>(codes, [&](float q, int) { return __fmul_rn(q, step); });
  } else {
    if (scale == 0xFFu) return nan_chunk<T>(false);
    const float power = e8m0_value(scale);
    const auto step = [&](int h) {  // exact: a factor has three bits
      return Rule == unpack_rule::mx_fine ? __fmul_rn(power, fine_factor(macro >> (2 * h) & 3u)) : power;
    };
    if constexpr (Rule == unpack_rule::mx_macro) {
      const float f = bit_cast<float>(0x3F800000u | macro << 15);
      const float inverse = __frcp_rn(f);
      return map_codes<T>(codes, [&](float q, int) {
        const float near = __fmul_rn(q, inverse);
        const float excess = __fmaf_rn(near, f, -q);  // this way around, -0 stays -0
        return __fmul_rn(__fmaf_rn(-excess, inverse, near), power);
      });
    } else if constexpr (std::same_as<T, bfloat16>) {
      chunk<T> out;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t step_pair = __byte_perm(bit_cast<std::uint32_t>(step(h)), 0, 0x3232);
        const std::uint32_t word = h == 0 ? codes.low : codes.high;
        const std::uint32_t even = word & 0x0F0F0F0Fu, odd = word >> 4 & 0x0F0F0F0Fu;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto q = __hmul2_rn(as_bfloat16_pair(code_pair_as_bfloat16(even, odd, i)),
                                    as_bfloat16_pair(0x7E807E80u));  // times 2^126
          out.word[4 * h + i] = as_word(__hmul2_rn(q, as_bfloat16_pair(step_pair)));
        }
      }
      return out;
    } else {
      return map_codes<T>(codes, [&](float q, int h) { return __fmul_rn(q, step(h)); });
    }
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
