#pragma once

#include "../../../config.hpp"  // TETROMINO_VECTOR_BITS

/// What AVX2 and AVX-512 share: above all, products of unsigned bytes with signed ones, for which values of E2M1 are
/// doubled and biased.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS >= 256

#include "sse2.hpp"  // load_16

#include <immintrin.h>

#include <cstdint>  // std::int8_t, std::int32_t, std::uint8_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// 16 codes of E4M3 as halves that stand for 2^-8 of their values, but for NaN, which becomes 480.
TETROMINO_INLINE __m256i e4m3_as_halves(const std::uint8_t* x) {
  const __m256i codes = _mm256_cvtepi8_epi16(load_16(x));
  return _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xBFFF)));
}

/// Integer products take values as twice themselves plus this.
inline constexpr std::int32_t value_bias = 12;
/// For each code: value_bias + twice its value, from 0 to 24.
TETROMINO_INLINE sixteen_bytes biased_table() {
  return _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
}

/// Whether sums of eight products are two halves of a lane that are yet to be added.
inline constexpr bool has_paired_sums = !TETROMINO_HAS_VNNI;
/// What takes the bias off such a sum, where the eight bytes of the other side have this one.
TETROMINO_INLINE std::int32_t fine_offset(std::int32_t sum) {
  return has_paired_sums ? -value_bias * sum & 0xFFFF : -value_bias * sum;
}

TETROMINO_INLINE void store_elements(__m256i x, std::int8_t* out, std::int32_t* offsets) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(value_bias), x);
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(-1));
  const __m256i eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4E));
  const __m256i sums = _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, 0xB1));
  offsets[0] = _mm256_cvtsi256_si32(sums);
  offsets[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
}
/// 32 elements, stored even ones first within each eight, as the codes of a word come; and what takes the bias of the
/// weights off the products with each half of them: -value_bias times its sum.
TETROMINO_INLINE void split_elements(const std::int8_t* x, std::int8_t* out, std::int32_t* offsets) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  store_elements(_mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), order), out, offsets);
}
/// The same of 32 codes, as twice their values.
TETROMINO_INLINE void split_codes(const std::uint8_t* codes, std::int8_t* out, std::int32_t* offsets) {
  const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i pairs = load_16(codes);
  const __m128i even = _mm_shuffle_epi8(twice, even_codes(pairs)), odd = _mm_shuffle_epi8(twice, odd_codes(pairs));
  store_elements(_mm256_inserti128_si256(_mm256_castsi128_si256(low_words(even, odd)), high_words(even, odd), 1), out,
                 offsets);
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
