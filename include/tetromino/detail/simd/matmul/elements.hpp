#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD, TETROMINO_VECTOR_BITS

/// Bytes of activations for integer products.

#if TETROMINO_SIMD

#include "../../../e2m1.hpp"  // e2m1
#include "../isa.hpp"         // value_bias

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int8_t, std::int32_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

// 32 elements, stored even ones first within each eight, as the codes of a word come; and what takes the bias of the
// weights off the products with each half of them: -value_bias times its sum.

#if TETROMINO_VECTOR_BITS >= 256

TETROMINO_INLINE void store_elements(__m256i x, std::int8_t* out, std::int32_t* offsets) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(value_bias), x);
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(-1));
  const __m256i eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4E));
  const __m256i sums = _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, 0xB1));
  offsets[0] = _mm256_cvtsi256_si32(sums);
  offsets[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
}
TETROMINO_INLINE void split_elements(const std::int8_t* x, std::int8_t* out, std::int32_t* offsets) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  store_elements(_mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), order), out, offsets);
}
/// The same of 32 codes, as twice their values.
TETROMINO_INLINE void split_codes(const std::uint8_t* codes, std::int8_t* out, std::int32_t* offsets) {
  const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), low = _mm_set1_epi8(15);
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i even = _mm_shuffle_epi8(twice, _mm_and_si128(pairs, low));
  const __m128i odd = _mm_shuffle_epi8(twice, _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  store_elements(
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi32(even, odd)), _mm_unpackhi_epi32(even, odd), 1),
      out, offsets);
}

#else

static_assert(value_bias == 0);
inline void split_elements(const std::int8_t* x, std::int8_t* out, std::int32_t* offsets) {
  for (std::size_t i = 0; i < 32; ++i) out[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = x[i];
  offsets[0] = offsets[1] = 0;
}
inline void split_codes(const std::uint8_t* codes, std::int8_t* out, std::int32_t* offsets) {
  constexpr std::int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  for (std::size_t i = 0; i < 16; ++i) {
    out[i / 4 * 8 + i % 4] = twice[codes[i] & 15];
    out[i / 4 * 8 + i % 4 + 4] = twice[codes[i] >> 4];
  }
  offsets[0] = offsets[1] = 0;
}

#endif

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
