#pragma once

#include "../../../config.hpp"  // TETROMINO_SIMD, TETROMINO_ISA, TETROMINO_INLINE

/// Registers of 128 bits on 64-bit ARM. sse2.hpp gives the same names for x86-64.

#if TETROMINO_SIMD && defined(__aarch64__)

#include <arm_neon.h>

#include <cstdint>  // std::int8_t, std::uint8_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

using sixteen_bytes = uint8x16_t;  // or eight halfwords, four words, two halves
using four_floats = float32x4_t;

TETROMINO_INLINE sixteen_bytes load_16(const void* x) { return vld1q_u8(static_cast<const std::uint8_t*>(x)); }
TETROMINO_INLINE void store_16(void* out, sixteen_bytes a) { vst1q_u8(static_cast<std::uint8_t*>(out), a); }

/// Stores 16 bytes; there is no way past the caches here, so that nothing has to end.
TETROMINO_INLINE void stream_16(void* to, const void* from) { store_16(to, load_16(from)); }
TETROMINO_INLINE void end_streaming() {}

// Halfwords and words of a register.
TETROMINO_INLINE uint16x8_t as_u16(sixteen_bytes a) { return vreinterpretq_u16_u8(a); }
TETROMINO_INLINE uint32x4_t as_u32(sixteen_bytes a) { return vreinterpretq_u32_u8(a); }
TETROMINO_INLINE uint64x2_t as_u64(sixteen_bytes a) { return vreinterpretq_u64_u8(a); }
TETROMINO_INLINE int8x16_t as_s8(sixteen_bytes a) { return vreinterpretq_s8_u8(a); }

// The low, or the high, 8 bytes of a and of b, in turns.
TETROMINO_INLINE sixteen_bytes low_bytes(sixteen_bytes a, sixteen_bytes b) { return vzip1q_u8(a, b); }
TETROMINO_INLINE sixteen_bytes high_bytes(sixteen_bytes a, sixteen_bytes b) { return vzip2q_u8(a, b); }
TETROMINO_INLINE sixteen_bytes low_halfwords(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u16(vzip1q_u16(as_u16(a), as_u16(b)));
}
TETROMINO_INLINE sixteen_bytes high_halfwords(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u16(vzip2q_u16(as_u16(a), as_u16(b)));
}
TETROMINO_INLINE sixteen_bytes low_words(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u32(vzip1q_u32(as_u32(a), as_u32(b)));
}
TETROMINO_INLINE sixteen_bytes high_words(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u32(vzip2q_u32(as_u32(a), as_u32(b)));
}
TETROMINO_INLINE sixteen_bytes low_halves(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u64(vzip1q_u64(as_u64(a), as_u64(b)));
}
TETROMINO_INLINE sixteen_bytes high_halves(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u64(vzip2q_u64(as_u64(a), as_u64(b)));
}

/// Lanes 0 and 2 of a, then of b; lanes 1 and 3.
TETROMINO_INLINE four_floats even_lanes(four_floats a, four_floats b) { return vuzp1q_f32(a, b); }
TETROMINO_INLINE four_floats odd_lanes(four_floats a, four_floats b) { return vuzp2q_f32(a, b); }

/// Word i gets what word i ^ Distance has.
template <int Distance>
TETROMINO_INLINE sixteen_bytes exchange_words(sixteen_bytes a) {
  if constexpr (Distance == 1) return vreinterpretq_u8_u32(vrev64q_u32(as_u32(a)));
  return vextq_u8(a, a, 8);
}
/// Of words that are 0 or -1, whether all are -1.
TETROMINO_INLINE bool all_words_set(sixteen_bytes a) { return vminvq_u32(as_u32(a)) != 0; }
TETROMINO_INLINE sixteen_bytes larger_halfwords(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_s16(vmaxq_s16(vreinterpretq_s16_u8(a), vreinterpretq_s16_u8(b)));
}

// Numbers of a, then of b, that fit half their size: their lower halves.
TETROMINO_INLINE sixteen_bytes narrow_words(sixteen_bytes a, sixteen_bytes b) {
  return vreinterpretq_u8_u16(vuzp1q_u16(as_u16(a), as_u16(b)));
}
TETROMINO_INLINE sixteen_bytes narrow_unsigned_words(sixteen_bytes a, sixteen_bytes b) { return narrow_words(a, b); }
TETROMINO_INLINE sixteen_bytes narrow_halfwords(sixteen_bytes a, sixteen_bytes b) { return vuzp1q_u8(a, b); }
TETROMINO_INLINE sixteen_bytes narrow_unsigned_halfwords(sixteen_bytes a, sixteen_bytes b) {
  return narrow_halfwords(a, b);
}

/// Floats to integers, rounded to nearest even.
TETROMINO_INLINE sixteen_bytes nearest(four_floats x) { return vreinterpretq_u8_s32(vcvtnq_s32_f32(x)); }
/// a b + c, and c - a b, rounded once.
TETROMINO_INLINE four_floats multiply_add(four_floats a, four_floats b, four_floats c) { return vfmaq_f32(c, a, b); }
TETROMINO_INLINE four_floats subtract_product(four_floats c, four_floats a, four_floats b) {
  return vfmsq_f32(c, a, b);
}

/// Two registers of codes, one in each byte, as one register of pairs: even + 16 odd.
TETROMINO_INLINE sixteen_bytes pair_codes(sixteen_bytes a, sixteen_bytes b) {
  return vorrq_u8(vuzp1q_u8(a, b), vshlq_n_u8(vuzp2q_u8(a, b), 4));
}
/// The even codes of pairs, and the odd ones, one in each byte.
TETROMINO_INLINE sixteen_bytes even_codes(sixteen_bytes pairs) { return vandq_u8(pairs, vdupq_n_u8(15)); }
TETROMINO_INLINE sixteen_bytes odd_codes(sixteen_bytes pairs) { return vshrq_n_u8(pairs, 4); }
/// Of each byte's low four bits, a code: twice its value.
TETROMINO_INLINE sixteen_bytes twice_values(sixteen_bytes codes) {
  constexpr std::int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return vreinterpretq_u8_s8(vqtbl1q_s8(vld1q_s8(twice), even_codes(codes)));
}

/// 16 signed bytes, made ready to be multiplied four at a time.
class product_factors {
 public:
  TETROMINO_INLINE explicit product_factors(const std::int8_t* x) : x_(vld1q_s8(x)) {}
  /// sum + Σ of the products in each word of four bytes of a, b, c and d by the sixteen.
  TETROMINO_INLINE sixteen_bytes add_to(sixteen_bytes sum, sixteen_bytes a, sixteen_bytes b, sixteen_bytes c,
                                        sixteen_bytes d) const {
    const int32x4_t before = vreinterpretq_s32_u8(sum);
#if TETROMINO_HAS_VNNI
    const int32x4_t two = vdotq_laneq_s32(vdotq_laneq_s32(before, as_s8(a), x_, 0), as_s8(b), x_, 1);
    return vreinterpretq_u8_s32(vdotq_laneq_s32(vdotq_laneq_s32(two, as_s8(c), x_, 2), as_s8(d), x_, 3));
#else
    // Products are at most 12 * 128, so that four of them fit 16 bits.
    const int8x16_t x0 = four<0>(), x1 = four<1>(), x2 = four<2>(), x3 = four<3>();
    int16x8_t low = vmull_s8(vget_low_s8(as_s8(a)), vget_low_s8(x0)), high = vmull_high_s8(as_s8(a), x0);
    low = vmlal_s8(low, vget_low_s8(as_s8(b)), vget_low_s8(x1)), high = vmlal_high_s8(high, as_s8(b), x1);
    low = vmlal_s8(low, vget_low_s8(as_s8(c)), vget_low_s8(x2)), high = vmlal_high_s8(high, as_s8(c), x2);
    low = vmlal_s8(low, vget_low_s8(as_s8(d)), vget_low_s8(x3)), high = vmlal_high_s8(high, as_s8(d), x3);
    return vreinterpretq_u8_s32(vaddq_s32(before, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
#endif
  }

 private:
  template <int I>
  TETROMINO_INLINE int8x16_t four() const {
    return vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x_), I));
  }

  int8x16_t x_;
};
/// Eight of them, whose sums of products have a factor.
class eight_factors {
 public:
  TETROMINO_INLINE explicit eight_factors(const std::int8_t* x) : x_(vld1_s8(x)) {}
  /// sum + factor Σ of the products in each word of four bytes of a and b by the eight.
  TETROMINO_INLINE sixteen_bytes add_to(sixteen_bytes sum, sixteen_bytes a, sixteen_bytes b,
                                        sixteen_bytes factor) const {
#if TETROMINO_HAS_VNNI
    const int32x4_t ab = vdotq_lane_s32(vdotq_lane_s32(vdupq_n_s32(0), as_s8(a), x_, 0), as_s8(b), x_, 1);
#else
    // Products are at most 12 * 128, so that two of them fit 16 bits.
    const int8x16_t x0 = four<0>(), x1 = four<1>();
    int16x8_t low = vmull_s8(vget_low_s8(as_s8(a)), vget_low_s8(x0)), high = vmull_high_s8(as_s8(a), x0);
    low = vmlal_s8(low, vget_low_s8(as_s8(b)), vget_low_s8(x1)), high = vmlal_high_s8(high, as_s8(b), x1);
    const int32x4_t ab = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
    const int32x4_t before = vreinterpretq_s32_u8(sum);
    return vreinterpretq_u8_s32(vmlaq_s32(before, ab, vreinterpretq_s32_u8(factor)));
  }

 private:
  template <int I>
  TETROMINO_INLINE int8x16_t four() const {
    return vreinterpretq_s8_s32(vdupq_lane_s32(vreinterpret_s32_s8(x_), I));
  }

  int8x8_t x_;
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
