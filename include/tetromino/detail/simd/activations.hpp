#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD, TETROMINO_VECTOR_BITS

/// 8-bit activations on vectors, 16 blocks at a time; byte for byte what scalar_int8 gives.

#if TETROMINO_SIMD

#include "../../matrix.hpp"  // real
#include "isa.hpp"           // floats, words, block_amax, load_pair

#include <algorithm>  // std::copy_n, std::fill, std::find_if, std::min
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int8_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

// To integers, rounded to nearest even; and integers from -128 to 127 as bytes: those of `first`, then of `second`, or
// those of 16-bit halves of lanes.

#if TETROMINO_VECTOR_BITS == 512

TETROMINO_INLINE words nearest(const floats& x) { return lanes(_mm512_cvtps_epi32(raw(x))); }
TETROMINO_INLINE void store_signed_bytes(std::int8_t* out, const words& first, const words& second) {
  const __m512i halves = _mm512_packs_epi32(raw(first), raw(second));  // quarters of each in turns
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(halves, halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
}
TETROMINO_INLINE void store_signed_halves(std::int8_t* out, const words& halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(raw(halves)));
}

#elif TETROMINO_VECTOR_BITS == 256

TETROMINO_INLINE words nearest(const floats& x) {
  return lanes(_mm256_cvtps_epi32(raw(x.r[0])), _mm256_cvtps_epi32(raw(x.r[1])));
}
TETROMINO_INLINE void store_signed_bytes(std::int8_t* out, const words& first, const words& second) {
  const __m256i a = _mm256_packs_epi32(raw(first.r[0]), raw(first.r[1]));
  const __m256i b = _mm256_packs_epi32(raw(second.r[0]), raw(second.r[1]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
}
TETROMINO_INLINE void store_signed_halves(std::int8_t* out, const words& halves) {
  const __m256i bytes = _mm256_packs_epi16(raw(halves.r[0]), raw(halves.r[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(bytes, 0xD8));
}

#else

#if defined(__aarch64__)
TETROMINO_INLINE word_register nearest(const float_register& x) { return word_register(vcvtnq_s32_f32(x)); }
TETROMINO_INLINE word_register pack_words(const word_register& a, const word_register& b) {
  return word_register(vreinterpretq_s32_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
}
TETROMINO_INLINE byte_register pack_halves(const word_register& a, const word_register& b) {
  return vuzp1q_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b));
}
#else
TETROMINO_INLINE word_register nearest(const float_register& x) { return _mm_cvtps_epi32(x); }
TETROMINO_INLINE word_register pack_words(const word_register& a, const word_register& b) {
  return _mm_packs_epi32(a, b);
}
TETROMINO_INLINE byte_register pack_halves(const word_register& a, const word_register& b) {
  return _mm_packs_epi16(a, b);
}
#endif
TETROMINO_INLINE words nearest(const floats& x) {
  return words(nearest(x.r[0]), nearest(x.r[1]), nearest(x.r[2]), nearest(x.r[3]));
}
TETROMINO_INLINE void store_signed_halves(std::int8_t* out, const words& halves) {
  store_register(out, pack_halves(halves.r[0], halves.r[1]));
  store_register(out + 16, pack_halves(halves.r[2], halves.r[3]));
}
TETROMINO_INLINE void store_signed_bytes(std::int8_t* out, const words& first, const words& second) {
  store_signed_halves(out, words(pack_words(first.r[0], first.r[1]), pack_words(first.r[2], first.r[3]),
                                 pack_words(second.r[0], second.r[1]), pack_words(second.r[2], second.r[3])));
}

#endif

struct simd_int8 {
  /// See scalar_int8.
  template <real T>
  static std::size_t quantize_int8_row(const T* x, std::size_t cols, std::int8_t* values, float* scales) {
    const std::size_t blocks = (cols + block - 1) / block;
    for (std::size_t b = 0; b < blocks; b += lane_count) {
      // The last 16 blocks of a row overlap those before, where there are any: they come out the same again.
      if (blocks - b < lane_count && blocks > lane_count) b = blocks - lane_count;
      const std::size_t k = b * block, n = std::min(span, cols - k);
      const std::size_t rejected = n == span ? round_blocks(x + k, lane_count, values + k, scales + b)
                                             : round_some(x + k, n, values + k, scales + b);
      if (rejected < lane_count) return b + rejected;
    }
    return blocks;
  }

 private:
  static constexpr std::size_t block = 32, span = block * lane_count;

  /// Rounds x[n] of at most 16 blocks, the last of which may be short.
  template <real T>
  static std::size_t round_some(const T* x, std::size_t n, std::int8_t* values, float* scales) {
    T padded[span];
    std::int8_t bytes[span];
    float scale[lane_count];
    std::copy_n(x, n, padded);
    std::fill(padded + n, padded + span, T{});
    const std::size_t blocks = (n + block - 1) / block, rejected = round_blocks(padded, blocks, bytes, scale);
    std::copy_n(bytes, n, values);
    std::copy_n(scale, blocks, scales);
    return rejected;
  }

  /// Rounds the first `used` of 16 blocks, and writes all 16 scales; returns the first that is not finite, or 16.
  template <real T>
  static std::size_t round_blocks(const T* x, std::size_t used, std::int8_t* values, float* scales) {
    constexpr std::size_t known_size = registers > 2 ? any_size : block;
    const words bits = block_amax<known_size>(block, x);
    if (any_at_least(bits, infinity)) return first_at_least(bits, infinity);
    const floats amax = floats_of(bits), zero = broadcast(0.0f), largest = broadcast(127.0f);
    const flags tiny = amax < broadcast(0x1p-120f);
    float inverse[lane_count];
    store(inverse, select(tiny, zero, largest / amax));
    store(scales, select(tiny, zero, amax / largest));
    for (std::size_t b = 0; b < used; ++b) {
      const floats factor = broadcast(inverse[b]);
      const floats_pair y = load_pair(x + b * block);
      const words first = nearest(y.first * factor), second = nearest(y.second * factor);
      if constexpr (is_split<T>) {
        store_signed_halves(values + b * block, (first & broadcast(0xFFFF)) | shift_left<16>(second));
      } else {
        store_signed_bytes(values + b * block, first, second);
      }
    }
    return lane_count;
  }

  static constexpr std::int32_t infinity = 0x7F800000;
  static std::size_t first_at_least(const words& a, std::int32_t limit) {
    std::int32_t lane[lane_count];
    store(lane, a);
    return static_cast<std::size_t>(std::find_if(lane, lane + lane_count, [&](auto l) { return l >= limit; }) - lane);
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
