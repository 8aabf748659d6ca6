#pragma once

#include "../../../config.hpp"  // TETROMINO_VECTOR_BITS

/// What blocks need beyond lanewise arithmetic, on SSE2 and NEON.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS == 128

#include "../../../float16.hpp"  // half, bfloat16
#include "lanes.hpp"             // floats, words

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <emmintrin.h>
#endif

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::is_same_v

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

// What SSE2 and NEON spell differently --------------------------------------------------------------------------------

#if defined(__aarch64__)

using byte_register = uint8x16_t;
TETROMINO_INLINE byte_register load_register(const void* x) { return vld1q_u8(static_cast<const std::uint8_t*>(x)); }
TETROMINO_INLINE word_register as_words(byte_register a) { return word_register(vreinterpretq_s32_u8(a)); }
/// Sixteen bytes, or eight halfwords in two registers, each in the lanes of words.
TETROMINO_INLINE words spread_bytes(byte_register a) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(a)), high = vmovl_high_u8(a);
  const auto word = [](uint32x4_t x) TETROMINO_INLINE_LAMBDA { return word_register(vreinterpretq_s32_u32(x)); };
  return words(word(vmovl_u16(vget_low_u16(low))), word(vmovl_high_u16(low)), word(vmovl_u16(vget_low_u16(high))),
               word(vmovl_high_u16(high)));
}
TETROMINO_INLINE words spread_halfwords(byte_register a, byte_register b) {
  const uint16x8_t low = vreinterpretq_u16_u8(a), high = vreinterpretq_u16_u8(b);
  const auto word = [](uint32x4_t x) TETROMINO_INLINE_LAMBDA { return word_register(vreinterpretq_s32_u32(x)); };
  return words(word(vmovl_u16(vget_low_u16(low))), word(vmovl_high_u16(low)), word(vmovl_u16(vget_low_u16(high))),
               word(vmovl_high_u16(high)));
}
TETROMINO_INLINE uint16x8_t join_halfwords(const word_register& a, const word_register& b) {
  return vuzp1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
}
TETROMINO_INLINE byte_register join_bytes(const words& a) {
  return vuzp1q_u8(vreinterpretq_u8_u16(join_halfwords(a.r[0], a.r[1])),
                   vreinterpretq_u8_u16(join_halfwords(a.r[2], a.r[3])));
}
TETROMINO_INLINE void store_register(void* out, byte_register a) { vst1q_u8(static_cast<std::uint8_t*>(out), a); }
TETROMINO_INLINE void store_halfwords(std::uint16_t* out, const words& a) {
  vst1q_u16(out, join_halfwords(a.r[0], a.r[1]));
  vst1q_u16(out + 8, join_halfwords(a.r[2], a.r[3]));
}
/// Two registers of codes, one in each byte, as one register of pairs: even + 16 odd.
TETROMINO_INLINE byte_register pair_codes(byte_register a, byte_register b) {
  const uint8x16_t even = vuzp1q_u8(a, b), odd = vuzp2q_u8(a, b);
  return vorrq_u8(even, vshlq_n_u8(odd, 4));
}
/// The 32 codes in 16 bytes, in order.
TETROMINO_INLINE void part_codes(byte_register pairs, byte_register& first, byte_register& second) {
  const uint8x16_t even = vandq_u8(pairs, vdupq_n_u8(15)), odd = vshrq_n_u8(pairs, 4);
  first = vzip1q_u8(even, odd);
  second = vzip2q_u8(even, odd);
}
TETROMINO_INLINE word_register larger_halfwords(const word_register& a, const word_register& b) {
  return word_register(vreinterpretq_s32_s16(vmaxq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b))));
}
template <int Distance>
TETROMINO_INLINE word_register exchange_within(const word_register& a) {
  if constexpr (Distance == 1) return word_register(vrev64q_s32(a));
  return word_register(vextq_s32(a, a, 2));
}
template <class Op>
TETROMINO_INLINE word_register join_four(const Op& op, word_register a, word_register b, word_register c,
                                         word_register d) {
  const word_register ab = op(word_register(vzip1q_s32(a, b)), word_register(vzip2q_s32(a, b)));
  const word_register cd = op(word_register(vzip1q_s32(c, d)), word_register(vzip2q_s32(c, d)));
  const int64x2_t ab64 = vreinterpretq_s64_s32(ab), cd64 = vreinterpretq_s64_s32(cd);
  return op(word_register(vreinterpretq_s32_s64(vzip1q_s64(ab64, cd64))),
            word_register(vreinterpretq_s32_s64(vzip2q_s64(ab64, cd64))));
}
/// Column j of four rows of words, for j = 0 ... 3.
TETROMINO_INLINE void transpose_four(word_register a, word_register b, word_register c, word_register d,
                                     word_register& c0, word_register& c1, word_register& c2, word_register& c3) {
  const int64x2_t ab_low = vreinterpretq_s64_s32(vzip1q_s32(a, b)), ab_high = vreinterpretq_s64_s32(vzip2q_s32(a, b));
  const int64x2_t cd_low = vreinterpretq_s64_s32(vzip1q_s32(c, d)), cd_high = vreinterpretq_s64_s32(vzip2q_s32(c, d));
  c0 = word_register(vreinterpretq_s32_s64(vzip1q_s64(ab_low, cd_low)));
  c1 = word_register(vreinterpretq_s32_s64(vzip2q_s64(ab_low, cd_low)));
  c2 = word_register(vreinterpretq_s32_s64(vzip1q_s64(ab_high, cd_high)));
  c3 = word_register(vreinterpretq_s32_s64(vzip2q_s64(ab_high, cd_high)));
}
/// Of each byte's low four bits, a code: twice its value.
TETROMINO_INLINE word_register twice_values(const word_register& codes) {
  constexpr std::int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const uint8x16_t low = vandq_u8(vreinterpretq_u8_s32(codes), vdupq_n_u8(15));
  return word_register(vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(twice), low)));
}
/// 16 signed bytes, made ready to be multiplied four at a time.
class product_factors {
 public:
  TETROMINO_INLINE explicit product_factors(const std::int8_t* x) : x_(vld1q_s8(x)) {}
  /// sum + Σ of the products in each lane of four bytes of a, b, c and d by the sixteen.
  TETROMINO_INLINE word_register add_to(const word_register& sum, const word_register& a, const word_register& b,
                                        const word_register& c, const word_register& d) const {
#if TETROMINO_HAS_VNNI
    const int32x4_t two = vdotq_laneq_s32(vdotq_laneq_s32(sum, bytes(a), x_, 0), bytes(b), x_, 1);
    return word_register(vdotq_laneq_s32(vdotq_laneq_s32(two, bytes(c), x_, 2), bytes(d), x_, 3));
#else
    // Products are at most 12 * 128, so that four of them fit 16 bits.
    const int8x16_t x0 = four(0), x1 = four(1), x2 = four(2), x3 = four(3);
    int16x8_t low = vmull_s8(vget_low_s8(bytes(a)), vget_low_s8(x0)), high = vmull_high_s8(bytes(a), x0);
    low = vmlal_s8(low, vget_low_s8(bytes(b)), vget_low_s8(x1)), high = vmlal_high_s8(high, bytes(b), x1);
    low = vmlal_s8(low, vget_low_s8(bytes(c)), vget_low_s8(x2)), high = vmlal_high_s8(high, bytes(c), x2);
    low = vmlal_s8(low, vget_low_s8(bytes(d)), vget_low_s8(x3)), high = vmlal_high_s8(high, bytes(d), x3);
    return word_register(vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
#endif
  }

 private:
  static TETROMINO_INLINE int8x16_t bytes(const word_register& a) { return vreinterpretq_s8_s32(a); }
  TETROMINO_INLINE int8x16_t four(int i) const {
    const int32x4_t all = vreinterpretq_s32_s8(x_);
    return vreinterpretq_s8_s32(i == 0   ? vdupq_laneq_s32(all, 0)
                                : i == 1 ? vdupq_laneq_s32(all, 1)
                                : i == 2 ? vdupq_laneq_s32(all, 2)
                                         : vdupq_laneq_s32(all, 3));
  }

  int8x16_t x_;
};
/// Lanes 0 and 2 of a, then of b; lanes 1 and 3.
TETROMINO_INLINE float_register even_lanes(const float_register& a, const float_register& b) {
  return float_register(vuzp1q_f32(a, b));
}
TETROMINO_INLINE float_register odd_lanes(const float_register& a, const float_register& b) {
  return float_register(vuzp2q_f32(a, b));
}
TETROMINO_INLINE floats multiply_add(const floats& a, const floats& b, const floats& c) {
  return by_register<floats>([&](std::size_t i)
                                 TETROMINO_INLINE_LAMBDA { return float_register(vfmaq_f32(c.r[i], a.r[i], b.r[i])); });
}
/// c - a b, rounded once.
TETROMINO_INLINE floats subtract_product(const floats& c, const floats& a, const floats& b) {
  return by_register<floats>([&](std::size_t i)
                                 TETROMINO_INLINE_LAMBDA { return float_register(vfmsq_f32(c.r[i], a.r[i], b.r[i])); });
}

#else

using byte_register = __m128i;
TETROMINO_INLINE byte_register load_register(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
TETROMINO_INLINE word_register as_words(byte_register a) { return a; }
/// Sixteen bytes, or eight halfwords in two registers, each in the lanes of words.
TETROMINO_INLINE words spread_halfwords(byte_register a, byte_register b) {
  const __m128i zero = _mm_setzero_si128();
  return words(_mm_unpacklo_epi16(a, zero), _mm_unpackhi_epi16(a, zero), _mm_unpacklo_epi16(b, zero),
               _mm_unpackhi_epi16(b, zero));
}
TETROMINO_INLINE words spread_bytes(byte_register a) {
  const __m128i zero = _mm_setzero_si128();
  return spread_halfwords(_mm_unpacklo_epi8(a, zero), _mm_unpackhi_epi8(a, zero));
}
/// Eight lanes that are at most 65535: SSE2 packs signed ones only.
TETROMINO_INLINE __m128i join_halfwords(__m128i a, __m128i b) {
  const auto extended = [](__m128i x) TETROMINO_INLINE_LAMBDA { return _mm_srai_epi32(_mm_slli_epi32(x, 16), 16); };
  return _mm_packs_epi32(extended(a), extended(b));
}
TETROMINO_INLINE byte_register join_bytes(const words& a) {
  return _mm_packus_epi16(_mm_packs_epi32(a.r[0], a.r[1]), _mm_packs_epi32(a.r[2], a.r[3]));
}
TETROMINO_INLINE void store_register(void* out, byte_register a) { _mm_storeu_si128(static_cast<__m128i*>(out), a); }
TETROMINO_INLINE void store_halfwords(std::uint16_t* out, const words& a) {
  store_register(out, join_halfwords(a.r[0], a.r[1]));
  store_register(out + 8, join_halfwords(a.r[2], a.r[3]));
}
/// Two registers of codes, one in each byte, as one register of pairs: even + 16 odd.
TETROMINO_INLINE byte_register pair_codes(byte_register a, byte_register b) {
  const auto pair = [](__m128i x) TETROMINO_INLINE_LAMBDA {
    return _mm_and_si128(_mm_or_si128(x, _mm_srli_epi16(x, 4)), _mm_set1_epi16(0xFF));
  };
  return _mm_packus_epi16(pair(a), pair(b));
}
/// The 32 codes in 16 bytes, in order.
TETROMINO_INLINE void part_codes(byte_register pairs, byte_register& first, byte_register& second) {
  const __m128i low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
  first = _mm_unpacklo_epi8(even, odd);
  second = _mm_unpackhi_epi8(even, odd);
}
TETROMINO_INLINE word_register larger_halfwords(const word_register& a, const word_register& b) {
  return _mm_max_epi16(a, b);
}
template <int Distance>
TETROMINO_INLINE word_register exchange_within(const word_register& a) {
  return _mm_shuffle_epi32(a, Distance == 2 ? 0x4E : 0xB1);
}
template <class Op>
TETROMINO_INLINE word_register join_four(const Op& op, word_register a, word_register b, word_register c,
                                         word_register d) {
  const word_register ab = op(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
  const word_register cd = op(_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
  return op(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
}
/// Column j of four rows of words, for j = 0 ... 3.
TETROMINO_INLINE void transpose_four(word_register a, word_register b, word_register c, word_register d,
                                     word_register& c0, word_register& c1, word_register& c2, word_register& c3) {
  const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
  const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
  c0 = _mm_unpacklo_epi64(ab_low, cd_low);
  c1 = _mm_unpackhi_epi64(ab_low, cd_low);
  c2 = _mm_unpacklo_epi64(ab_high, cd_high);
  c3 = _mm_unpackhi_epi64(ab_high, cd_high);
}
/// Lanes 0 and 2 of a, then of b; lanes 1 and 3.
TETROMINO_INLINE float_register even_lanes(const float_register& a, const float_register& b) {
  return _mm_shuffle_ps(a, b, 0x88);
}
TETROMINO_INLINE float_register odd_lanes(const float_register& a, const float_register& b) {
  return _mm_shuffle_ps(a, b, 0xDD);
}
/// Of each byte's low four bits, a code: twice its value. Without a shuffle of bytes: m + max(m - 4, 0) + 2 max(m - 6,
/// 0) is 0, 1, 2, 3, 4, 6, 8, 12 for m = 0 ... 7.
TETROMINO_INLINE word_register twice_values(const word_register& codes) {
  const __m128i m = _mm_and_si128(codes, _mm_set1_epi8(7)), sign = _mm_and_si128(codes, _mm_set1_epi8(8));
  const __m128i above_6 = _mm_subs_epu8(m, _mm_set1_epi8(6));
  const __m128i twice =
      _mm_add_epi8(_mm_add_epi8(m, _mm_subs_epu8(m, _mm_set1_epi8(4))), _mm_add_epi8(above_6, above_6));
  const __m128i negative = _mm_cmpeq_epi8(sign, _mm_set1_epi8(8));
  return _mm_sub_epi8(_mm_xor_si128(twice, negative), negative);
}
/// 16 signed bytes, made ready to be multiplied four at a time.
class product_factors {
 public:
  TETROMINO_INLINE explicit product_factors(const std::int8_t* x) : x_(load_register(x)) {}
  /// sum + Σ of the products in each lane of four bytes of a, b, c and d by the sixteen.
  TETROMINO_INLINE word_register add_to(const word_register& sum, const word_register& a, const word_register& b,
                                        const word_register& c, const word_register& d) const {
    const __m128i ab =
        _mm_add_epi32(products(a, _mm_shuffle_epi32(x_, 0x00)), products(b, _mm_shuffle_epi32(x_, 0x55)));
    const __m128i cd =
        _mm_add_epi32(products(c, _mm_shuffle_epi32(x_, 0xAA)), products(d, _mm_shuffle_epi32(x_, 0xFF)));
    return _mm_add_epi32(sum, _mm_add_epi32(ab, cd));
  }

 private:
  static TETROMINO_INLINE __m128i products(__m128i a, __m128i x) {
    const auto even = [](__m128i bytes) TETROMINO_INLINE_LAMBDA { return _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 8); };
    const auto odd = [](__m128i bytes) TETROMINO_INLINE_LAMBDA { return _mm_srai_epi16(bytes, 8); };
    return _mm_add_epi32(_mm_madd_epi16(even(a), even(x)), _mm_madd_epi16(odd(a), odd(x)));
  }

  __m128i x_;
};

#endif

// Input and output ----------------------------------------------------------------------------------------------------

TETROMINO_INLINE words load_halfwords(const void* x) {
  return spread_halfwords(load_register(x), load_register(static_cast<const std::uint8_t*>(x) + 16));
}
TETROMINO_INLINE floats load(const bfloat16* x) { return widen_bfloat16(load_halfwords(x)); }
TETROMINO_INLINE floats load(const half* x) { return widen_half(load_halfwords(x)); }
TETROMINO_INLINE void store(bfloat16* out, const floats& a) {
  store_halfwords(reinterpret_cast<std::uint16_t*>(out), narrow_bfloat16(a));
}
TETROMINO_INLINE void store(half* out, const floats& a) {
  store_halfwords(reinterpret_cast<std::uint16_t*>(out), narrow_half(a));
}

/// The low byte of each lane, which is at most 255.
TETROMINO_INLINE void store_bytes(std::uint8_t* out, const words& a) { store_register(out, join_bytes(a)); }
TETROMINO_INLINE words load_bytes(const std::uint8_t* x) { return spread_bytes(load_register(x)); }

/// Writes a line of 64 bytes, both sides aligned, past the caches; end_streaming() before others may read it.
TETROMINO_INLINE void stream_line(void* to, const void* from) {
#if defined(__aarch64__)
  std::memcpy(to, from, 64);
#else
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
  }
#endif
}
TETROMINO_INLINE void end_streaming() {
#if !defined(__aarch64__)
  _mm_sfence();
#endif
}

// Across lanes --------------------------------------------------------------------------------------------------------

/// Lanes 0 ... 7 get a, lanes 8 ... 15 b.
TETROMINO_INLINE floats broadcast_halves(float a, float b) {
  const float_register low = float_batch(a), high = float_batch(b);
  return floats(low, low, high, high);
}

/// Lane i gets what lane i ^ Distance has.
template <int Distance>
TETROMINO_INLINE words exchange(const words& a) {
  if constexpr (Distance == 8) return words(a.r[2], a.r[3], a.r[0], a.r[1]);
  if constexpr (Distance == 4) return words(a.r[1], a.r[0], a.r[3], a.r[2]);
  if constexpr (Distance < 4) {
    return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA { return exchange_within<Distance>(a.r[i]); });
  }
}

TETROMINO_INLINE bool any_at_least(const words& a, std::int32_t limit) {
  const word_batch most = larger(larger(a.r[0], a.r[1]), larger(a.r[2], a.r[3]));
  return xsimd::any(most >= word_batch(limit));
}
TETROMINO_INLINE bool all(const flags& a) {
  const signed_lanes both = (a.r[0] & a.r[1]) & (a.r[2] & a.r[3]);
  return xsimd::all(flag_batch(__builtin_bit_cast(flag_batch::register_type, both)));
}
/// Bit i is set where lane i is zero.
TETROMINO_INLINE std::uint32_t zero_lanes(const words& a) {
  const auto is_zero = [](word_register x) TETROMINO_INLINE_LAMBDA { return lanes_of(x) == 0; };
  const signed_lanes zeros = (is_zero(a.r[0]) | is_zero(a.r[1])) | (is_zero(a.r[2]) | is_zero(a.r[3]));
  const bool some = xsimd::any(flag_batch(__builtin_bit_cast(flag_batch::register_type, zeros)));
  if (!some) return 0;
  std::int32_t lane[lane_count];
  store(lane, a);
  std::uint32_t out = 0;
  for (std::size_t i = 0; i < lane_count; ++i) out |= static_cast<std::uint32_t>(lane[i] == 0) << i;
  return out;
}

/// Lane b is the join of the four lanes of get(b), at distances 2 and 1. A loop: written out, it is long to compile.
template <class Op, class Get>
TETROMINO_INLINE words join_each(const Op& op, const Get& get) {
  words out;
  for (std::size_t i = 0; i < registers; ++i) {
    out.r[i] = join_four(op, get(4 * i), get(4 * i + 1), get(4 * i + 2), get(4 * i + 3));
  }
  return out;
}

/// Lane b is the sum of all lanes of get(b), by halves.
template <class Get>
TETROMINO_INLINE floats sum_each(const Get& get) {
  const auto add = [](word_register a, word_register b)
                       TETROMINO_INLINE_LAMBDA { return bits_of(floats_of(a) + floats_of(b)); };
  return floats_of(join_each(add, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const floats all = get(b);
    return bits_of((all.r[0] + all.r[2]) + (all.r[1] + all.r[3]));
  }));
}

/// The largest magnitude, as bits of a float, of each of 16 consecutive blocks.
template <std::size_t Block>
TETROMINO_INLINE words block_amax(std::size_t block, const float* x) {
  static_assert(Block == any_size);
  const auto largest = [](word_register a, word_register b) TETROMINO_INLINE_LAMBDA { return larger(a, b); };
  return join_each(largest, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const auto get = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      return as_words(load_register(x + b * block + i)) & all_lanes(0x7FFFFFFF);
    };
    word_register most = largest(largest(get(0), get(4)), largest(get(8), get(12)));
    if (block == 32) most = largest(most, largest(largest(get(16), get(20)), largest(get(24), get(28))));
    return most;
  });
}
/// The same of 16-bit numbers, which compare as their bits do until the end.
template <std::size_t Block, class T>
  requires(sizeof(T) == 2)
TETROMINO_INLINE words block_amax(std::size_t block, const T* x) {
  static_assert(Block == any_size);
  const auto largest = [](word_register a, word_register b) TETROMINO_INLINE_LAMBDA { return larger_halfwords(a, b); };
  const words pairs = join_each(largest, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const auto get = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      return as_words(load_register(x + b * block + i)) & all_lanes(0x7FFF7FFF);
    };
    word_register most = largest(get(0), get(8));
    if (block == 32) most = largest(most, largest(get(16), get(24)));
    return most;
  });
  const words one = max(pairs & broadcast(0xFFFF), shift_right<16>(pairs));
  if constexpr (std::is_same_v<T, bfloat16>) return bits_of(widen_bfloat16(one));
  return bits_of(widen_half(one));
}

// E2M1 ----------------------------------------------------------------------------------------------------------------

/// y in [0, 6 s] on the grid of E2M1 times the power of two s.
TETROMINO_INLINE floats snap(const floats& y, const floats& s) {
  const words step = max(bits_of(y) & broadcast(0x7F800000), bits_of(s));
  const floats magic = floats_of(step + broadcast(22 << 23));
  return y + magic - magic;
}

/// The codes of y, with the signs of x.
TETROMINO_INLINE words encode_e2m1(const floats& y, const floats& x) {
  const floats m = min(magnitude(y), broadcast(6.0f));
  const words one = bits_of(broadcast(1.0f)), step = max(bits_of(m) & broadcast(0x7F800000), one);
  const words magic = step + broadcast(22 << 23);
  const words steps = bits_of(m + floats_of(magic)) - magic;
  const words sign = shift_right<28>(bits_of(x)) & broadcast(8);
  return (steps + shift_right<22>(step - one)) | sign;
}

/// Reads 32 elements.
template <class T>
TETROMINO_INLINE floats_pair load_pair(const T* x) {
  if constexpr (is_split<T>) {
    const words both =
        by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA { return as_words(load_register(x + 8 * i)); });
    return {floats_of(shift_left<16>(both)), floats_of(both & broadcast(static_cast<std::int32_t>(0xFFFF0000u)))};
  } else {
    return {load(x), load(x + lane_count)};
  }
}

/// Stores the codes of 64 elements that load_pair split.
template <class T>
TETROMINO_INLINE void store_codes(std::uint8_t* out, const words& a0, const words& a1, const words& b0,
                                  const words& b1) {
  if constexpr (is_split<T>) {
    store_bytes(out, a0 | shift_left<4>(a1));
    store_bytes(out + 16, b0 | shift_left<4>(b1));
  } else {
    store_register(out, pair_codes(join_bytes(a0), join_bytes(a1)));
    store_register(out + 16, pair_codes(join_bytes(b0), join_bytes(b1)));
  }
}

/// Turns codes into values, divided by a factor.
class e2m1_decoder {
 public:
  TETROMINO_INLINE e2m1_decoder() = default;
  TETROMINO_INLINE explicit e2m1_decoder(float factor) : factor_(factor) {}
  /// 32 codes.
  TETROMINO_INLINE floats_pair operator()(const std::uint8_t* codes) const {
    byte_register first, second;
    part_codes(load_register(codes), first, second);
    return {values(spread_bytes(first)), values(spread_bytes(second))};
  }
  /// The same, even ones first.
  TETROMINO_INLINE floats_pair split(const std::uint8_t* codes) const {
    const words pairs = load_bytes(codes);
    return {values(pairs & broadcast(15)), values(shift_right<4>(pairs))};
  }
  /// split, times the scales of their blocks.
  template <std::size_t Block>
  TETROMINO_INLINE floats_pair scaled(const std::uint8_t* codes, const float* scales) const {
    const floats_pair q = split(codes);
    const floats both = broadcast_halves(scales[0], scales[32 / Block - 1]);
    return {q.first * both, q.second * both};
  }
  /// Where `scaled` puts code i of 32.
  static constexpr std::size_t place(std::size_t i) { return i % 2 * 16 + i / 2; }
  /// 32 elements in that order.
  template <class T>
  static TETROMINO_INLINE floats_pair load_in_place(const T* x) {
    if constexpr (is_split<T>) return load_pair(x);
    const floats a = load(x), b = load(x + lane_count);
    const auto pick = [&](auto of) TETROMINO_INLINE_LAMBDA {
      return floats(of(a.r[0], a.r[1]), of(a.r[2], a.r[3]), of(b.r[0], b.r[1]), of(b.r[2], b.r[3]));
    };
    const auto even = [](const float_register& p, const float_register& q)
                          TETROMINO_INLINE_LAMBDA { return even_lanes(p, q); };
    const auto odd = [](const float_register& p, const float_register& q)
                         TETROMINO_INLINE_LAMBDA { return odd_lanes(p, q); };
    return {pick(even), pick(odd)};
  }

 private:
  TETROMINO_INLINE floats values(const words& code) const {
    const words m = code & broadcast(7), sign = shift_left<28>(code & broadcast(8));
    // Codes 2 ... 7 are floats with one bit of mantissa; for 0 and 1, double and drop the leading one.
    const floats normal = floats_of(shift_left<22>(m) + broadcast(0x3F000000));
    const floats subnormal = normal + normal - broadcast(1.0f);
    const floats value = floats_of(bits_of(select(normal < broadcast(1.0f), subnormal, normal)) | sign);
    return factor_ == 1.0f ? value : value / broadcast(factor_);
  }

  float factor_ = 1.0f;
};

// Products of integers ------------------------------------------------------------------------------------------------

/// 16 bytes of each of 16 rows: lane n of part d has bytes 4 d ... 4 d + 3 of row n.
struct byte_columns {
  words part[4];
};
TETROMINO_INLINE byte_columns load_columns(const std::uint8_t* const* rows, std::size_t offset) {
  byte_columns out;
  for (std::size_t i = 0; i < registers; ++i) {
    const auto row = [&](std::size_t n)
                         TETROMINO_INLINE_LAMBDA { return as_words(load_register(rows[4 * i + n] + offset)); };
    transpose_four(row(0), row(1), row(2), row(3), out.part[0].r[i], out.part[1].r[i], out.part[2].r[i],
                   out.part[3].r[i]);
  }
  return out;
}

/// Integer products take values as twice themselves plus this.
inline constexpr std::int32_t value_bias = 0;
/// Of each byte's low four bits, a code: twice its value.
TETROMINO_INLINE words biased_values(const words& codes) {
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA { return twice_values(codes.r[i]); });
}
/// sum + Σ of the products in each lane of four bytes of a, b, c and d, by bytes 0 ... 15 of x; all are signed.
TETROMINO_INLINE words add_products(const words& sum, const words& a, const words& b, const words& c, const words& d,
                                    const std::int8_t* x) {
  const product_factors factors(x);
  return by_register<words>(
      [&](std::size_t i) TETROMINO_INLINE_LAMBDA { return factors.add_to(sum.r[i], a.r[i], b.r[i], c.r[i], d.r[i]); });
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
