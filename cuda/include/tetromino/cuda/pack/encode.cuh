#pragma once

#include <tetromino/e2m1.hpp>      // e2m1
#include <tetromino/e4m3.hpp>      // e4m3
#include <tetromino/rounding.hpp>  // round_stochastic

#include "chunk.cuh"  // chunk

#include <cuda_fp8.h>  // __nv_cvt_float_to_fp8

#include <cstdint>  // std::uint32_t

/// Rounding to E2M1, sixteen elements at a time. Over the values 0, 0.5 ... 6 the code is a concave function of the
/// magnitude y, made of three straight pieces, so code = min(2y, y + 2, y/2 + 4, 7) rounded to an integer, ties to
/// even. Adding a float whose last bit counts ones does that rounding, and a fused multiply-add does it exactly once.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Sixteen E2M1 codes, element i in nibble i.
struct code_words {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
};

/// The code of magnitude y >= 0 in the last bits of the result, above them the bits of 2^23. Infinity and NaN give 7.
[[nodiscard]] __device__ inline std::uint32_t code_bits(float y) {
  const auto a = __float_as_int(__fmaf_rn(y, 2.0f, 0x1p23f));
  const auto b = __float_as_int(__fadd_rn(y, 0x1p23f + 2.0f));
  const auto c = __float_as_int(__fmaf_rn(y, 0.5f, 0x1p23f + 4.0f));
  return static_cast<std::uint32_t>(min(__vimin3_s32(a, b, c), __float_as_int(0x1p23f + 7.0f)));
}

/// The same for y = x * m, which is rounded but once: m, its double and its half are floats.
struct code_multiplier {
  float one, twice, half;

  __device__ explicit code_multiplier(float m) : one(m), twice(2.0f * m), half(0.5f * m) {}

  [[nodiscard]] __device__ std::uint32_t code_bits(float x) const {
    const auto a = __float_as_int(__fmaf_rn(x, twice, 0x1p23f));
    const auto b = __float_as_int(__fmaf_rn(x, one, 0x1p23f + 2.0f));
    const auto c = __float_as_int(__fmaf_rn(x, half, 0x1p23f + 4.0f));
    return static_cast<std::uint32_t>(min(__vimin3_s32(a, b, c), __float_as_int(0x1p23f + 7.0f)));
  }
};

/// The E2M1 value times `unit`, a power of two, that y >= 0 is rounded to. Unless `Clamped`, y is at most 7 * unit, and
/// may become 8 * unit where 6 * unit is as near.
template <bool Clamped>
[[nodiscard]] __device__ inline float nearest_value(float y, float unit) {
  const float power = fmaxf(bit_cast<float>(bit_cast<std::uint32_t>(y) & 0x7F800000u), unit);
  const float shifted = __fmaf_rn(power, 0x1p22f, y);  // the last bit now counts half of `power`, the local step
  const float nearest = __fmaf_rn(power, -0x1p22f, shifted);
  return Clamped ? fminf(nearest, 6.0f * unit) : nearest;
}
/// The difference between y >= 0 and that value; exact, and of either sign where two are as near.
template <bool Clamped>
[[nodiscard]] __device__ inline float difference_to_nearest(float y, float unit) {
  return __fadd_rn(y, -nearest_value<Clamped>(y, unit));
}

/// Eight codes from code_bits of elements 0 ... 7.
[[nodiscard]] __device__ inline std::uint32_t join_codes(const std::uint32_t (&bits)[8]) {
  // The bits of 2^23, 0x4B000000, remain from the first two terms only; the others shift them out.
  std::uint32_t out = bits[0] - (0x4B000000u + 0xB0000000u);
#pragma unroll
  for (int i = 1; i < 8; ++i) out += bits[i] << (4 * i);
  return out;
}

/// The signs of elements 8h ... 8h + 7 of a chunk, in bits 3, 7 ... 31.
template <real T>
[[nodiscard]] __device__ inline std::uint32_t sign_bits(const chunk<T>& x, int h) {
  std::uint32_t even, odd;  // the top bytes of elements 0, 2, 4, 6 and of 1, 3, 5, 7
  if constexpr (sizeof(T) == 4) {
    const std::uint32_t* w = x.word + 8 * h;
    even = __byte_perm(__byte_perm(w[0], w[2], 0x0073), __byte_perm(w[4], w[6], 0x0073), 0x5410);
    odd = __byte_perm(__byte_perm(w[1], w[3], 0x0073), __byte_perm(w[5], w[7], 0x0073), 0x5410);
  } else {
    const std::uint32_t* w = x.word + 4 * h;
    const std::uint32_t first = __byte_perm(w[0], w[1], 0x7531), last = __byte_perm(w[2], w[3], 0x7531);
    even = __byte_perm(first, last, 0x6420), odd = __byte_perm(first, last, 0x7531);
  }
  return (even & 0x80808080u) >> 4 | (odd & 0x80808080u);
}

/// Codes with the signs of x from their code_bits, which the function gives for i known at compile time.
template <real T, class Bits>
[[nodiscard]] __device__ inline code_words encode_bits(const chunk<T>& x, const Bits& bits_of) {
  std::uint32_t out[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    std::uint32_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bits[i] = bits_of(8 * h + i);
    out[h] = join_codes(bits) | sign_bits(x, h);
  }
  return {out[0], out[1]};
}

/// The codes of magnitudes y, with the signs of x. The function gives y(i) for i known at compile time.
template <real T, class Magnitude>
[[nodiscard]] __device__ inline code_words encode(const chunk<T>& x, const Magnitude& y) {
  return encode_bits(x, [&](int i) { return code_bits(y(i)); });
}

/// The codes of x * m for a multiplier of which no product with a 16-bit input needs rounding.
template <real T>
[[nodiscard]] __device__ inline code_words encode_times(const chunk<T>& x, float m) {
  if (sizeof(T) == 4 || m > 0x1p126f) return encode(x, [&](int i) { return __fmul_rn(fabsf(x.value(i)), m); });
  const code_multiplier by(m);
  return encode_bits(x, [&](int i) { return by.code_bits(fabsf(x.value(i))); });
}

/// Eight codes with the signs of x, from the pairs of half h of a chunk with a code in each low byte.
template <real T>
[[nodiscard]] __device__ inline std::uint32_t join_pairs(const chunk<T>& x, const std::uint32_t (&pair)[4], int h) {
  const std::uint32_t first = __byte_perm(pair[0], pair[1], 0x6420), last = __byte_perm(pair[2], pair[3], 0x6420);
  const std::uint32_t even = __byte_perm(first, last, 0x6420), odd = __byte_perm(first, last, 0x7531);
  return even | odd << 4 | sign_bits(x, h);
}

/// The codes of x * multiplier for bfloat16 and a power of two, two elements in each instruction: bfloat16 has just the
/// bits that the same additions need, with 128 in place of 2^23.
[[nodiscard]] __device__ inline code_words encode_pairs(const chunk<bfloat16>& x, std::uint32_t multiplier_pair) {
  std::uint32_t out[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    std::uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto y = __hmul2_rn(as_bfloat16_pair(x.word[4 * h + i] & 0x7FFF7FFFu), as_bfloat16_pair(multiplier_pair));
      const auto a = __hfma2(y, as_bfloat16_pair(0x40004000u), as_bfloat16_pair(0x43004300u));  // 2y + 128
      const auto b = __hadd2_rn(y, as_bfloat16_pair(0x43024302u));                              // y + 130
      const auto c = __hfma2(y, as_bfloat16_pair(0x3F003F00u), as_bfloat16_pair(0x43044304u));  // y/2 + 132
      r[i] = as_word(__hmin2(__hmin2(__hmin2(a, b), c), as_bfloat16_pair(0x43074307u)));
    }
    out[h] = join_pairs(x, r, h);
  }
  return {out[0], out[1]};
}

/// Whether encode_halves can take a block with this E8M0 code: near 1, all its elements are halves, but for those too
/// small to matter.
template <real T>
[[nodiscard]] __device__ inline bool fits_halves(std::uint32_t scale) {
  return std::same_as<T, bfloat16> ? scale > 15 : scale - 113 < 28;
}

/// Magnitudes of 16 bits times 2^-exponent, as halves; bfloat16 needs an exponent of -112 at least, and what is below
/// the normal halves counts as the least of these; halves themselves need one of -15 at least.
template <real T>
[[nodiscard]] __device__ inline std::uint32_t halves_of(std::uint32_t magnitudes, int exponent) {
  if constexpr (std::same_as<T, bfloat16>) {  // three more bits of fraction
    const auto field = static_cast<std::uint32_t>(exponent + 112);
    return __vmaxu2(magnitudes, (field + 1) * 0x00800080u) * 8 - field * 0x04000400u;
  } else {
    return as_word(
        __hmul2_rn(as_half_pair(magnitudes), as_half_pair(static_cast<std::uint32_t>(15 - exponent) * 0x04000400u)));
  }
}

/// The codes of x * factor / 2^E for 16-bit inputs, E = scale - 127, two elements in each instruction: what bfloat16
/// does above for powers of two, a half does for a factor 1 + m / 256, with 1024 in place of 2^23.
template <real T>
[[nodiscard]] __device__ inline code_words encode_halves(const chunk<T>& x, std::uint32_t scale, std::uint32_t macro) {
  const std::uint32_t one = (0x3C00u + (macro << 2)) * 0x10001u, twice = one + 0x04000400u, half_ = one - 0x04000400u;
  std::uint32_t out[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    std::uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto y = as_half_pair(halves_of<T>(x.word[4 * h + i] & 0x7FFF7FFFu, static_cast<int>(scale) - 127));
      const auto a = __hfma2(y, as_half_pair(twice), as_half_pair(0x64006400u));  // 2y + 1024
      const auto b = __hfma2(y, as_half_pair(one), as_half_pair(0x64026402u));    // y + 1026
      const auto c = __hfma2(y, as_half_pair(half_), as_half_pair(0x64046404u));  // y/2 + 1028
      r[i] = as_word(__hmin2(__hmin2(__hmin2(a, b), c), as_half_pair(0x64076407u)));
    }
    out[h] = join_pairs(x, r, h);
  }
  return {out[0], out[1]};
}

/// 1 / d for a normal d whose reciprocal is normal, correctly rounded: the hardware's estimate, corrected once.
[[nodiscard]] __device__ inline float reciprocal(float d) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(d));
  return __fmaf_rn(__fmaf_rn(-d, estimate, 1.0f), estimate, estimate);
}

/// Division of many magnitudes by one positive divisor, correctly rounded: a reciprocal, and corrections by the exact
/// remainder. (Markstein: "Computation of elementary functions on the IBM RISC System/6000 processor", 1990)
class divisor {
 public:
  /// For magnitudes up to `largest`.
  __device__ divisor(float d, float largest)
      : d_(d), reciprocal_(reciprocal(d)), is_plain_(d >= 0x1p-27f && d <= 0x1p60f && largest < 0x1p100f) {}

  /// x / d for magnitudes x of type T, where is_plain(). One correction is enough for the eight or eleven bits of a
  /// 16-bit input.
  template <real T>
  [[nodiscard]] __device__ float divide(float x) const {
    float q = corrected(x, __fmul_rn(x, reciprocal_));
    if constexpr (sizeof(T) == 4) q = corrected(x, q);
    return q;
  }

  /// Whether the E2M1 codes of all quotients of T follow from products with the reciprocal: none is within a few units
  /// in the last place of where the code changes, which is an odd number up to 7 times a power of two. Such a quotient
  /// would be a number of as few bits as T has times d.
  template <real T>
  [[nodiscard]] __device__ bool has_codes_by_product() const {
    if constexpr (sizeof(T) == 4) {
      return false;
    } else {
      constexpr std::uint32_t below = (std::same_as<T, half> ? 1u << 13 : 1u << 16) - 1;  // bits that T lacks
      std::uint32_t nearest = below;
#pragma unroll
      for (int odd = 1; odd <= 7; odd += 2) {
        nearest = min(nearest, bit_cast<std::uint32_t>(__fmul_rn(d_, static_cast<float>(odd))) + 8 & below);
      }
      return nearest > 16;
    }
  }
  [[nodiscard]] __device__ float inverse() const { return reciprocal_; }

  /// Whether no quotient overflows, and remainders are exact, but for quotients too small to have a square.
  [[nodiscard]] __device__ bool is_plain() const { return is_plain_; }

 private:
  [[nodiscard]] __device__ float corrected(float x, float q) const {
    return __fmaf_rn(__fmaf_rn(-q, d_, x), reciprocal_, q);
  }

  float d_, reciprocal_;
  bool is_plain_;
};

/// Divides sixteen magnitudes where no divisor is_plain(): rare, and so kept small and out of the way.
__device__ __noinline__ inline void divide_slowly(float* magnitude, float d) {
#pragma unroll 1
  for (int i = 0; i < 16; ++i) magnitude[i] = __fdiv_rn(magnitude[i], d);
}

/// e4m3::encode for x >= 0, by the hardware where it has the conversion.
[[nodiscard]] __device__ inline std::uint8_t encode_e4m3(float x) {
#if __CUDA_ARCH__ >= 890
  return static_cast<std::uint8_t>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3));
#else
  return e4m3::encode(x).bits;
#endif
}

/// Two floats as E4M3, to nearest even, saturating, each with its sign; the first in the low byte.
[[nodiscard]] __device__ inline std::uint32_t encode_e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#else
  return e4m3::encode(low).bits | static_cast<std::uint32_t>(e4m3::encode(high).bits) << 8;
#endif
}

/// The value of a non-negative, finite E4M3 code: its bits are those of a half, times 2^8.
[[nodiscard]] __device__ inline float decode_e4m3(std::uint32_t code) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(code << 7))) * 0x1p8f;
}

/// Sums sixteen squares as error sums are specified: halves onto halves. Written out, since nvcc keeps an array that
/// nested loops index in memory.
[[nodiscard]] __device__ inline float sum_halves(const float (&square)[16]) {
  float eight[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) eight[i] = __fadd_rn(square[i], square[i + 8]);
  const float first = __fadd_rn(__fadd_rn(eight[0], eight[4]), __fadd_rn(eight[2], eight[6]));
  return __fadd_rn(first, __fadd_rn(__fadd_rn(eight[1], eight[5]), __fadd_rn(eight[3], eight[7])));
}

/// Sixteen uniform numbers of a stream from position `first` on. Four positions share a counter, so that a chunk needs
/// four draws where it starts at a multiple of four, and five elsewhere.
struct uniform_numbers {
  std::uint64_t seed;
  std::uint64_t first;

  __device__ void draw(float (&out)[16]) const {
    const auto offset = static_cast<std::uint32_t>(first % 4);
    philox_words now = philox4x32(first / 4, seed);
#pragma unroll
    for (std::uint32_t four = 0; four < 4; ++four) {
      philox_words next = now;
      if (four < 3 || offset != 0) next = philox4x32(first / 4 + four + 1, seed);
#pragma unroll
      for (std::uint32_t i = 0; i < 4; ++i) {
        // word i + offset of the eight in `now` and `next`, without an index known at run time only
        std::uint32_t word = now.word[i];
#pragma unroll
        for (std::uint32_t o = 1; o < 4; ++o) {
          if (offset == o) word = i + o < 4 ? now.word[(i + o) % 4] : next.word[(i + o) % 4];
        }
        out[4 * four + i] = static_cast<float>(word >> 8) * 0x1p-24f;
      }
      now = next;
    }
  }
};

}  // namespace TETROMINO_NAMESPACE::cuda::detail
