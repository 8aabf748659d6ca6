#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD, TETROMINO_ISA, TETROMINO_INLINE

/// Registers of 128 bits, which every x86-64 CPU has. neon.hpp gives the same names for 64-bit ARM.

#if TETROMINO_SIMD && !defined(__aarch64__)

#include <emmintrin.h>

#include <cstdint>  // std::int8_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

using sixteen_bytes = __m128i;  // or eight halfwords, four words, two halves
using four_floats = __m128;

TETROMINO_INLINE sixteen_bytes load_16(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
TETROMINO_INLINE void store_16(void* out, sixteen_bytes a) { _mm_storeu_si128(static_cast<__m128i*>(out), a); }

/// Stores 16 bytes, both sides aligned, past the caches; end_streaming() before others may read them.
TETROMINO_INLINE void stream_16(void* to, const void* from) {
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_load_si128(static_cast<const __m128i*>(from)));
}
TETROMINO_INLINE void end_streaming() { _mm_sfence(); }

// The low, or the high, 8 bytes of a and of b, in turns.
TETROMINO_INLINE sixteen_bytes low_bytes(sixteen_bytes a, sixteen_bytes b) { return _mm_unpacklo_epi8(a, b); }
TETROMINO_INLINE sixteen_bytes high_bytes(sixteen_bytes a, sixteen_bytes b) { return _mm_unpackhi_epi8(a, b); }
TETROMINO_INLINE sixteen_bytes low_halfwords(sixteen_bytes a, sixteen_bytes b) { return _mm_unpacklo_epi16(a, b); }
TETROMINO_INLINE sixteen_bytes high_halfwords(sixteen_bytes a, sixteen_bytes b) { return _mm_unpackhi_epi16(a, b); }
TETROMINO_INLINE sixteen_bytes low_words(sixteen_bytes a, sixteen_bytes b) { return _mm_unpacklo_epi32(a, b); }
TETROMINO_INLINE sixteen_bytes high_words(sixteen_bytes a, sixteen_bytes b) { return _mm_unpackhi_epi32(a, b); }
TETROMINO_INLINE sixteen_bytes low_halves(sixteen_bytes a, sixteen_bytes b) { return _mm_unpacklo_epi64(a, b); }
TETROMINO_INLINE sixteen_bytes high_halves(sixteen_bytes a, sixteen_bytes b) { return _mm_unpackhi_epi64(a, b); }

/// Lanes 0 and 2 of a, then of b; lanes 1 and 3.
TETROMINO_INLINE four_floats even_lanes(four_floats a, four_floats b) { return _mm_shuffle_ps(a, b, 0x88); }
TETROMINO_INLINE four_floats odd_lanes(four_floats a, four_floats b) { return _mm_shuffle_ps(a, b, 0xDD); }

/// Word i gets what word i ^ Distance has.
template <int Distance>
TETROMINO_INLINE sixteen_bytes exchange_words(sixteen_bytes a) {
  return _mm_shuffle_epi32(a, Distance == 2 ? 0x4E : 0xB1);
}
/// Of words that are 0 or -1, whether all are -1.
TETROMINO_INLINE bool all_words_set(sixteen_bytes a) { return _mm_movemask_ps(_mm_castsi128_ps(a)) == 15; }
TETROMINO_INLINE sixteen_bytes larger_halfwords(sixteen_bytes a, sixteen_bytes b) { return _mm_max_epi16(a, b); }

// Numbers of a, then of b, that fit half their size.
TETROMINO_INLINE sixteen_bytes narrow_words(sixteen_bytes a, sixteen_bytes b) { return _mm_packs_epi32(a, b); }
/// From 0 to 65535: SSE2 packs signed ones only.
TETROMINO_INLINE sixteen_bytes narrow_unsigned_words(sixteen_bytes a, sixteen_bytes b) {
  const auto extended = [](__m128i x) TETROMINO_INLINE_LAMBDA { return _mm_srai_epi32(_mm_slli_epi32(x, 16), 16); };
  return _mm_packs_epi32(extended(a), extended(b));
}
TETROMINO_INLINE sixteen_bytes narrow_halfwords(sixteen_bytes a, sixteen_bytes b) { return _mm_packs_epi16(a, b); }
/// From 0 to 255.
TETROMINO_INLINE sixteen_bytes narrow_unsigned_halfwords(sixteen_bytes a, sixteen_bytes b) {
  return _mm_packus_epi16(a, b);
}

/// Floats to integers, rounded to nearest even.
TETROMINO_INLINE sixteen_bytes nearest(four_floats x) { return _mm_cvtps_epi32(x); }
/// a b + c, and c - a b, rounded twice.
TETROMINO_INLINE four_floats multiply_add(four_floats a, four_floats b, four_floats c) { return a * b + c; }
TETROMINO_INLINE four_floats subtract_product(four_floats c, four_floats a, four_floats b) { return c - a * b; }

/// Two registers of codes, one in each byte, as one register of pairs: even + 16 odd.
TETROMINO_INLINE sixteen_bytes pair_codes(sixteen_bytes a, sixteen_bytes b) {
  const auto pair = [](__m128i x) TETROMINO_INLINE_LAMBDA {
    return _mm_and_si128(_mm_or_si128(x, _mm_srli_epi16(x, 4)), _mm_set1_epi16(0xFF));
  };
  return _mm_packus_epi16(pair(a), pair(b));
}
/// The even codes of pairs, and the odd ones, one in each byte.
TETROMINO_INLINE sixteen_bytes even_codes(sixteen_bytes pairs) { return _mm_and_si128(pairs, _mm_set1_epi8(15)); }
TETROMINO_INLINE sixteen_bytes odd_codes(sixteen_bytes pairs) {
  return _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
}
/// Of each byte's low four bits, a code: twice its value. Without a shuffle of bytes: m + max(m - 4, 0) + 2 max(m - 6,
/// 0) is 0, 1, 2, 3, 4, 6, 8, 12 for m = 0 ... 7.
TETROMINO_INLINE sixteen_bytes twice_values(sixteen_bytes codes) {
  const __m128i m = _mm_and_si128(codes, _mm_set1_epi8(7)), sign = _mm_and_si128(codes, _mm_set1_epi8(8));
  const __m128i above_6 = _mm_subs_epu8(m, _mm_set1_epi8(6));
  const __m128i twice =
      _mm_add_epi8(_mm_add_epi8(m, _mm_subs_epu8(m, _mm_set1_epi8(4))), _mm_add_epi8(above_6, above_6));
  const __m128i negative = _mm_cmpeq_epi8(sign, _mm_set1_epi8(8));
  return _mm_sub_epi8(_mm_xor_si128(twice, negative), negative);
}

/// Σ of the products of four signed bytes in each word of a and x.
TETROMINO_INLINE __m128i products(__m128i a, __m128i x) {
  const auto even = [](__m128i bytes) TETROMINO_INLINE_LAMBDA { return _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8); };
  const auto odd = [](__m128i bytes) TETROMINO_INLINE_LAMBDA { return _mm_srai_epi16(bytes, 8); };
  return _mm_add_epi32(_mm_madd_epi16(even(a), even(x)), _mm_madd_epi16(odd(a), odd(x)));
}

/// 16 signed bytes, made ready to be multiplied four at a time.
class product_factors {
 public:
  TETROMINO_INLINE explicit product_factors(const std::int8_t* x) : x_(load_16(x)) {}
  /// sum + Σ of the products in each word of four bytes of a, b, c and d by the sixteen.
  TETROMINO_INLINE sixteen_bytes add_to(sixteen_bytes sum, sixteen_bytes a, sixteen_bytes b, sixteen_bytes c,
                                        sixteen_bytes d) const {
    const __m128i ab =
        _mm_add_epi32(products(a, _mm_shuffle_epi32(x_, 0x00)), products(b, _mm_shuffle_epi32(x_, 0x55)));
    const __m128i cd =
        _mm_add_epi32(products(c, _mm_shuffle_epi32(x_, 0xAA)), products(d, _mm_shuffle_epi32(x_, 0xFF)));
    return _mm_add_epi32(sum, _mm_add_epi32(ab, cd));
  }

 private:
  __m128i x_;
};
/// Eight of them, whose sums of products have a factor.
class eight_factors {
 public:
  TETROMINO_INLINE explicit eight_factors(const std::int8_t* x)
      : x_(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))) {}
  /// sum + factor Σ of the products in each word of four bytes of a and b by the eight; it is less than 2^15.
  TETROMINO_INLINE sixteen_bytes add_to(sixteen_bytes sum, sixteen_bytes a, sixteen_bytes b,
                                        sixteen_bytes factor) const {
    const __m128i ab =
        _mm_add_epi32(products(a, _mm_shuffle_epi32(x_, 0x00)), products(b, _mm_shuffle_epi32(x_, 0x55)));
    return _mm_add_epi32(sum, _mm_madd_epi16(ab, factor));  // ab fits 16 bits
  }

 private:
  __m128i x_;
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
