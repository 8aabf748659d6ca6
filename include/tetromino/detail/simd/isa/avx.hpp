#pragma once

#include "../../../config.hpp"  // TETROMINO_VECTOR_BITS

/// What AVX2 and AVX-512 share: above all, products of unsigned bytes with signed ones, for which values of E2M1 are
/// doubled and biased.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS >= 256

#include "lanes.hpp"  // words, by_register
#include "sse2.hpp"   // load_16

#include <immintrin.h>

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int8_t, std::int32_t, std::uint8_t
#include <cstring>  // std::memcpy

TETROMINO_VECTOR_CODE_BEGIN

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

/// Four bytes in each lane of a register.
TETROMINO_INLINE word_register four_bytes(const void* from) {
  std::int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
#if TETROMINO_VECTOR_BITS == 512
  return _mm512_set1_epi32(bytes);
#else
  return _mm256_set1_epi32(bytes);
#endif
}
/// Σ of the products of pairs of 16 bits in each lane.
TETROMINO_INLINE word_register multiply_pairs(word_register a, word_register b) {
#if TETROMINO_VECTOR_BITS == 512
  return _mm512_madd_epi16(a, b);
#else
  return _mm256_madd_epi16(a, b);
#endif
}
#if TETROMINO_HAS_VNNI
/// sum + Σ of the products of four unsigned bytes of a and signed ones of b in each lane.
TETROMINO_INLINE word_register add_four_products(word_register sum, word_register a, word_register b) {
#if TETROMINO_VECTOR_BITS == 512
  return _mm512_dpbusd_epi32(sum, a, b);
#else
  return _mm256_dpbusd_avx_epi32(sum, a, b);
#endif
}
#else
/// The sum of the products of each pair of unsigned bytes of a and signed ones of b, of 16 bits.
TETROMINO_INLINE word_register multiply_bytes(word_register a, word_register b) {
#if TETROMINO_VECTOR_BITS == 512
  return _mm512_maddubs_epi16(a, b);
#else
  return _mm256_maddubs_epi16(a, b);
#endif
}
/// Sums of 16 bits.
TETROMINO_INLINE word_register add_pairs(word_register a, word_register b) {
#if TETROMINO_VECTOR_BITS == 512
  return _mm512_add_epi16(a, b);
#else
  return _mm256_add_epi16(a, b);
#endif
}
#endif

/// Of each byte's low four bits, a code: value_bias + twice its value, from 0 to 24.
TETROMINO_INLINE words biased_values(const words& codes) {
#if TETROMINO_VECTOR_BITS == 512
  const __m512i table = _mm512_broadcast_i32x4(biased_table());
#if TETROMINO_HAS_VNNI
  return words(_mm512_permutexvar_epi8(codes.r[0], table));  // heeds six bits, of which the upper two pick a copy
#else
  return words(_mm512_shuffle_epi8(table, _mm512_and_si512(codes.r[0], _mm512_set1_epi8(15))));
#endif
#else
  const __m256i table = _mm256_broadcastsi128_si256(biased_table());
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    return _mm256_shuffle_epi8(table, _mm256_and_si256(codes.r[i], _mm256_set1_epi8(15)));
  });
#endif
}
/// sum + Σ of the products in each lane of four bytes of a, b, c and d, biased values, by bytes 0 ... 15 of x, signed.
TETROMINO_INLINE words add_products(const words& sum, const words& a, const words& b, const words& c, const words& d,
                                    const std::int8_t* x) {
  const word_register x0 = four_bytes(x), x1 = four_bytes(x + 4), x2 = four_bytes(x + 8), x3 = four_bytes(x + 12);
#if TETROMINO_HAS_VNNI
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    const word_register two = add_four_products(add_four_products(sum.r[i], a.r[i], x0), b.r[i], x1);
    return add_four_products(add_four_products(two, c.r[i], x2), d.r[i], x3);
  });
#else
  // Pairs of products are at most 2 * 24 * 128, so that four of them fit 16 bits.
  const words one = broadcast(0x00010001);
  const words products = by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    const word_register ab = add_pairs(multiply_bytes(a.r[i], x0), multiply_bytes(b.r[i], x1));
    const word_register cd = add_pairs(multiply_bytes(c.r[i], x2), multiply_bytes(d.r[i], x3));
    return multiply_pairs(add_pairs(ab, cd), one.r[i]);
  });
  return sum + products;
#endif
}

#if TETROMINO_VECTOR_BITS == 512 && TETROMINO_HAS_VNNI
/// What fine values have in place of value_bias: they are 8 q f plus this.
inline constexpr std::int32_t fine_bias = 84;
/// Whether sums begin with the first fine offset of a block; else each eight columns have their own.
inline constexpr bool begins_with_fine_offset = true;
/// For m and each code: fine_bias + 2 q (4 + m), from 0 to 168.
struct fine_table {
  std::uint8_t of[64];
};
inline constexpr fine_table fine_bytes = [] {
  constexpr std::int32_t twice[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  fine_table out{};
  for (std::int32_t i = 0; i < 64; ++i) {
    const std::int32_t magnitude = twice[i % 8] * (4 + i / 16);
    out.of[i] = static_cast<std::uint8_t>(fine_bias + (i % 16 < 8 ? magnitude : -magnitude));
  }
  return out;
}();
/// What takes the bias off the products with 32 bytes, of which `offsets` take value_bias off: of each eight that a
/// block begins with.
TETROMINO_INLINE void store_fine_offsets(const std::int8_t*, const std::int32_t* offsets, std::int32_t* out) {
  static_assert(fine_bias % value_bias == 0);
  out[0] = fine_bias / value_bias * offsets[0];
  out[2] = fine_bias / value_bias * offsets[1];
}
/// The m of eight columns each, number D of four in each lane: in bits 4 and 5 of each byte, with others around them.
template <int D>
TETROMINO_INLINE words fine_multipliers(const words& four) {
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  const words each(_mm512_shuffle_epi8(four.r[0], first));
  if constexpr (D < 2) return shift_left<4 - 2 * D>(each);
  return D == 2 ? each : shift_right<2>(each);
}
/// Of each byte's low four bits, a code, and a factor: what add_fine_products takes.
TETROMINO_INLINE words fine_values(const words& codes, const words& factor) {
  const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x30), factor.r[0], codes.r[0], 0xCA);
  return words(_mm512_permutexvar_epi8(index, _mm512_loadu_si512(fine_bytes.of)));
}
/// sum + Σ of the products in each lane of four bytes of a and b by bytes 0 ... 7 of x, signed.
TETROMINO_INLINE words add_fine_products(const words& sum, const words& a, const words& b, const std::int8_t* x,
                                         const std::int32_t*, const words&) {
  return words(add_four_products(add_four_products(sum.r[0], a.r[0], four_bytes(x)), b.r[0], four_bytes(x + 4)));
}
#else
inline constexpr bool begins_with_fine_offset = false;
/// Whether sums of eight products are two halves of a lane that are yet to be added.
inline constexpr bool has_paired_sums = !TETROMINO_HAS_VNNI;
/// What takes the bias off the sums of products with each eight of 32 bytes.
TETROMINO_INLINE void store_fine_offsets(const std::int8_t* x, const std::int32_t*, std::int32_t* out) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i fours =
      _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(value_bias), all), _mm256_set1_epi16(-1));
  const __m256i eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xB1));
  const __m256i first = _mm256_permutevar8x32_epi32(eights, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  const __m128i offsets = _mm_and_si128(_mm256_castsi256_si128(first), _mm_set1_epi32(has_paired_sums ? 0xFFFF : -1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), offsets);
}
/// 4 + m of the factors of eight columns each, number D of four in each lane: as add_fine_products takes them.
template <int D>
TETROMINO_INLINE words fine_multipliers(const words& four) {
  const words all = shift_right<2 * D>(has_paired_sums ? four | shift_left<16>(four) : four);
  return (all & broadcast(has_paired_sums ? 0x00030003 : 3)) + broadcast(has_paired_sums ? 0x00040004 : 4);
}
/// Of each byte's low four bits, a code: what add_fine_products takes.
TETROMINO_INLINE words fine_values(const words& codes, const words&) { return biased_values(codes); }
/// sum + factor Σ of the products in each lane of four bytes of a and b by bytes 0 ... 7 of x, signed; `offset`, one of
/// those that store_fine_offsets stores, takes off the bias.
TETROMINO_INLINE words add_fine_products(const words& sum, const words& a, const words& b, const std::int8_t* x,
                                         const std::int32_t* offset, const words& factor) {
  const word_register x0 = four_bytes(x), x1 = four_bytes(x + 4), bias = four_bytes(offset);
  const words products = by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
  // Sums of eight products, and halves of those with the offset, fit 16 bits.
#if TETROMINO_HAS_VNNI
    const word_register exact = add_four_products(add_four_products(bias, a.r[i], x0), b.r[i], x1);
#else
    const word_register exact = add_pairs(add_pairs(multiply_bytes(a.r[i], x0), bias), multiply_bytes(b.r[i], x1));
#endif
    return multiply_pairs(exact, factor.r[i]);
  });
  return sum + products;
}
#endif

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

TETROMINO_VECTOR_CODE_END

#endif
