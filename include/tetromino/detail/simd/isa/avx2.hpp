#pragma once

#include "../../../config.hpp"  // TETROMINO_VECTOR_BITS

/// What blocks need beyond lanewise arithmetic, on AVX2, with FMA and F16C where there are.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS == 256

#include "../../../float16.hpp"  // half, bfloat16
#include "../../../format.hpp"   // any_format
#include "avx.hpp"               // add_products, split_elements, biased_table
#include "lanes.hpp"             // floats, words
#include "sse2.hpp"              // load_16, store_16

#include <immintrin.h>

#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::is_same_v, std::is_void_v

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

TETROMINO_INLINE __m256 raw(const float_register& a) { return a; }
TETROMINO_INLINE __m256i raw(const word_register& a) { return a; }
TETROMINO_INLINE floats lanes(__m256 low, __m256 high) { return floats(low, high); }
TETROMINO_INLINE words lanes(__m256i low, __m256i high) { return words(low, high); }
TETROMINO_INLINE __m256i load_register(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }

// Input and output ----------------------------------------------------------------------------------------------------

TETROMINO_INLINE words load_halfwords(const void* x) {
  const __m256i all = load_register(x);
  return lanes(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(all)),
               _mm256_cvtepu16_epi32(_mm256_extracti128_si256(all, 1)));
}
TETROMINO_INLINE void store_halfwords(void* out, const words& a) {
  const __m256i packed = _mm256_packus_epi32(raw(a.r[0]), raw(a.r[1]));
  _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xD8));
}
TETROMINO_INLINE floats load(const bfloat16* x) { return widen_bfloat16(load_halfwords(x)); }
TETROMINO_INLINE void store(bfloat16* out, const floats& a) { store_halfwords(out, narrow_bfloat16(a)); }

/// The low byte of each lane, which is at most 255.
TETROMINO_INLINE void store_bytes(std::uint8_t* out, const words& a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(raw(a.r[0]), raw(a.r[1])), 0xD8);
  store_16(out, _mm_packus_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
}
TETROMINO_INLINE words load_bytes(const std::uint8_t* x) {
  const __m128i all = load_16(x);
  return lanes(_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)));
}

#if TETROMINO_HAS_F16C
TETROMINO_INLINE floats load(const half* x) {
  const __m256i all = load_register(x);
  return lanes(_mm256_cvtph_ps(_mm256_castsi256_si128(all)), _mm256_cvtph_ps(_mm256_extracti128_si256(all, 1)));
}
TETROMINO_INLINE void store(half* out, const floats& a) {
  store_16(out, _mm256_cvtps_ph(raw(a.r[0]), _MM_FROUND_TO_NEAREST_INT));
  store_16(out + 8, _mm256_cvtps_ph(raw(a.r[1]), _MM_FROUND_TO_NEAREST_INT));
}
/// The values of 16 codes of E4M3.
TETROMINO_INLINE floats load_e4m3(const std::uint8_t* x) {
  const __m256i halves = e4m3_as_halves(x);
  const auto values = [](__m128i eight) TETROMINO_INLINE_LAMBDA {
    const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(eight), _mm256_set1_ps(256.0f));
    const __m256 magnitude = _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)));
    return _mm256_or_ps(value, _mm256_cmp_ps(magnitude, _mm256_set1_ps(480.0f), _CMP_EQ_OQ));
  };
  return lanes(values(_mm256_castsi256_si128(halves)), values(_mm256_extracti128_si256(halves, 1)));
}
#else
TETROMINO_INLINE floats load(const half* x) { return widen_half(load_halfwords(x)); }
TETROMINO_INLINE void store(half* out, const floats& a) { store_halfwords(out, narrow_half(a)); }
TETROMINO_INLINE floats load_e4m3(const std::uint8_t* x) { return decode_e4m3(load_bytes(x)); }
#endif

/// Integers from -128 to 127 as bytes: both 16-bit halves of each lane in turn.
TETROMINO_INLINE void store_signed_halves(std::int8_t* out, const words& halves) {
  const __m256i bytes = _mm256_packs_epi16(raw(halves.r[0]), raw(halves.r[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(bytes, 0xD8));
}
/// The same of the lanes of `first`, then of `second`.
TETROMINO_INLINE void store_signed_bytes(std::int8_t* out, const words& first, const words& second) {
  const __m256i a = _mm256_packs_epi32(raw(first.r[0]), raw(first.r[1]));
  const __m256i b = _mm256_packs_epi32(raw(second.r[0]), raw(second.r[1]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
}

/// Writes a line of 64 bytes, both sides aligned, past the caches; end_streaming() before others may read it.
TETROMINO_INLINE void stream_line(void* to, const void* from) {
  const auto* source = static_cast<const __m256i*>(from);
  auto* target = static_cast<__m256i*>(to);
  _mm256_stream_si256(target, _mm256_load_si256(source));
  _mm256_stream_si256(target + 1, _mm256_load_si256(source + 1));
}

// Across lanes --------------------------------------------------------------------------------------------------------

/// Lanes 0 ... 7 get a, lanes 8 ... 15 b.
TETROMINO_INLINE floats broadcast_halves(float a, float b) { return lanes(_mm256_set1_ps(a), _mm256_set1_ps(b)); }

/// Lane i gets what lane i ^ Distance has.
template <int Distance>
TETROMINO_INLINE words exchange(const words& a) {
  if constexpr (Distance == 8) return words(a.r[1], a.r[0]);
  const auto within = [](__m256i x) TETROMINO_INLINE_LAMBDA {
    if constexpr (Distance == 4) return _mm256_permute2x128_si256(x, x, 0x01);
    return _mm256_shuffle_epi32(x, Distance == 2 ? 0x4E : 0xB1);
  };
  return lanes(within(raw(a.r[0])), within(raw(a.r[1])));
}

TETROMINO_INLINE bool any_at_least(const words& a, std::int32_t limit) {
  const __m256i below = _mm256_set1_epi32(limit - 1);
  return _mm256_movemask_epi8(
             _mm256_or_si256(_mm256_cmpgt_epi32(raw(a.r[0]), below), _mm256_cmpgt_epi32(raw(a.r[1]), below))) != 0;
}
TETROMINO_INLINE bool all(const flags& a) { return xsimd::all(flag_batch(a.r[0]) & flag_batch(a.r[1])); }
/// Bit i is set where lane i is zero.
TETROMINO_INLINE std::uint32_t zero_lanes(const words& a) {
  const auto zeros = [](__m256i x) TETROMINO_INLINE_LAMBDA {
    return static_cast<std::uint32_t>(
        _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_setzero_si256()))));
  };
  return zeros(raw(a.r[0])) | zeros(raw(a.r[1])) << 8;
}

/// Halves joined by `op`: the low half from a, the high half from b.
template <class Op>
TETROMINO_INLINE __m256i join_halves(const Op& op, __m256i a, __m256i b) {
  return op(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
/// Lane b is the join of the eight lanes of get(b), at distances 4, 2, 1; b runs from `first` to first + 7.
template <class Op, class Get>
TETROMINO_INLINE __m256i join_eight(const Op& op, const Get& get, std::size_t first) {
  const auto pair = [&](std::size_t j)
                        TETROMINO_INLINE_LAMBDA { return join_halves(op, get(first + j), get(first + j + 4)); };
  const __m256i a = pair(0), b = pair(1), ab = op(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i c = pair(2), d = pair(3), cd = op(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  return op(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
template <class Op, class Get>
TETROMINO_INLINE words join_each(const Op& op, const Get& get) {
  return lanes(join_eight(op, get, 0), join_eight(op, get, 8));
}

/// Lane b is the sum of all lanes of get(b), by halves.
template <class Get>
TETROMINO_INLINE floats sum_each(const Get& get) {
  const auto add = [](__m256i a, __m256i b) TETROMINO_INLINE_LAMBDA {
    return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  };
  return floats_of(join_each(add, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const floats all = get(b);
    return _mm256_castps_si256(_mm256_add_ps(raw(all.r[0]), raw(all.r[1])));
  }));
}

/// The largest magnitude, as bits of a float, of each of 16 consecutive blocks.
template <std::size_t Block>
TETROMINO_INLINE words block_amax(std::size_t /*block*/, const float* x) {
  const auto largest = [](__m256i a, __m256i b) TETROMINO_INLINE_LAMBDA { return _mm256_max_epi32(a, b); };
  return join_each(largest, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const auto get = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      return _mm256_and_si256(load_register(x + b * Block + i), _mm256_set1_epi32(0x7FFFFFFF));
    };
    const __m256i most = _mm256_max_epi32(get(0), get(8));
    if constexpr (Block == 16) return most;
    return _mm256_max_epi32(most, _mm256_max_epi32(get(16 % Block), get(24 % Block)));
  });
}
/// The same of 16-bit numbers, which compare as their bits do until the end.
template <std::size_t Block, class T>
  requires(sizeof(T) == 2)
TETROMINO_INLINE words block_amax(std::size_t /*block*/, const T* x) {
  const auto largest = [](__m256i a, __m256i b) TETROMINO_INLINE_LAMBDA { return _mm256_max_epu16(a, b); };
  const words pairs = join_each(largest, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const auto get = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      return _mm256_and_si256(load_register(x + b * Block + i), _mm256_set1_epi32(0x7FFF7FFF));
    };
    if constexpr (Block == 16) return get(0);
    return _mm256_max_epu16(get(0), get(16 % Block));
  });
  const words one = max(pairs & broadcast(0xFFFF), shift_right<16>(pairs));
  if constexpr (std::is_same_v<T, bfloat16>) return bits_of(widen_bfloat16(one));
  return bits_of(widen_half(one));
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

/// To integers, rounded to nearest even.
TETROMINO_INLINE words nearest(const floats& x) {
  return lanes(_mm256_cvtps_epi32(raw(x.r[0])), _mm256_cvtps_epi32(raw(x.r[1])));
}
/// a b + c, and c - a b, rounded once where has_fused_products.
#if TETROMINO_HAS_FMA
TETROMINO_INLINE floats multiply_add(const floats& a, const floats& b, const floats& c) {
  return lanes(_mm256_fmadd_ps(raw(a.r[0]), raw(b.r[0]), raw(c.r[0])),
               _mm256_fmadd_ps(raw(a.r[1]), raw(b.r[1]), raw(c.r[1])));
}
TETROMINO_INLINE floats subtract_product(const floats& c, const floats& a, const floats& b) {
  return lanes(_mm256_fnmadd_ps(raw(a.r[0]), raw(b.r[0]), raw(c.r[0])),
               _mm256_fnmadd_ps(raw(a.r[1]), raw(b.r[1]), raw(c.r[1])));
}
#else
TETROMINO_INLINE floats multiply_add(const floats& a, const floats& b, const floats& c) { return a * b + c; }
TETROMINO_INLINE floats subtract_product(const floats& c, const floats& a, const floats& b) { return c - a * b; }
#endif

// E2M1 ----------------------------------------------------------------------------------------------------------------

/// The codes of y, with the signs of x.
TETROMINO_INLINE words encode_e2m1(const floats& y, const floats& x) {
  // Added to a magnitude, they leave the code, rounded to nearest even, in the low bits of the sum: the steps of the
  // sum are those of E2M1 in [0, 2), [2, 4) and [4, 6], and the offset makes up for the codes below.
  const __m256 magic =
      _mm256_setr_ps(0x1p22f, 0x1p22f, 0x1p23f + 2, 0x1p23f + 2, 0x1p24f + 8, 0x1p24f + 8, 0x1p24f + 8, 0);
  const auto encode = [&](__m256 value, __m256 sign_of) TETROMINO_INLINE_LAMBDA {
    const __m256 magnitude = _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), value), _mm256_set1_ps(6.0f));
    const __m256 sum = _mm256_add_ps(magnitude, _mm256_permutevar8x32_ps(magic, _mm256_cvttps_epi32(magnitude)));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(sign_of), 28), _mm256_set1_epi32(8));
    return _mm256_or_si256(_mm256_and_si256(_mm256_castps_si256(sum), _mm256_set1_epi32(7)), sign);
  };
  return lanes(encode(raw(y.r[0]), raw(x.r[0])), encode(raw(y.r[1]), raw(x.r[1])));
}

/// y in [0, 6 s] on the grid of E2M1 times the power of two s.
TETROMINO_INLINE floats snap(const floats& y, const floats& s) {
  const words step = max(bits_of(y) & broadcast(0x7F800000), bits_of(s));
#if TETROMINO_HAS_FMA
  return by_register<floats>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    const __m256 many = _mm256_set1_ps(0x1p22f), unit = _mm256_castsi256_ps(raw(step.r[i]));
    return _mm256_fnmadd_ps(unit, many, _mm256_fmadd_ps(unit, many, raw(y.r[i])));
  });
#else
  const floats magic = floats_of(step + broadcast(22 << 23));
  return y + magic - magic;
#endif
}

/// Reads 32 elements.
template <class T>
TETROMINO_INLINE floats_pair load_pair(const T* x) {
  if constexpr (is_split<T>) {
    const words both = lanes(load_register(x), load_register(x + lane_count));
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
    const words a = a0 | shift_left<4>(a1), b = b0 | shift_left<4>(b1);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(raw(a.r[0]), raw(a.r[1])),
                                              _mm256_packus_epi32(raw(b.r[0]), raw(b.r[1])));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(bytes, order));
  } else {
    const auto pairs = [](const words& c0, const words& c1) TETROMINO_INLINE_LAMBDA {
      const __m256i codes = _mm256_packus_epi16(_mm256_packus_epi32(raw(c0.r[0]), raw(c0.r[1])),
                                                _mm256_packus_epi32(raw(c1.r[0]), raw(c1.r[1])));
      return _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));  // even + 16 odd
    };
    const __m256i bytes = _mm256_packus_epi16(pairs(a0, a1), pairs(b0, b1));
    const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    store_16(out, _mm_unpacklo_epi16(low, high));
    store_16(out + 16, _mm_unpackhi_epi16(low, high));
  }
}

/// Turns codes into values, divided by a factor.
class e2m1_decoder {
 public:
  TETROMINO_INLINE e2m1_decoder() : values_(_mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f)) {}
  TETROMINO_INLINE explicit e2m1_decoder(float factor) : e2m1_decoder() {
    values_ = _mm256_div_ps(values_, _mm256_set1_ps(factor));
  }
  /// 32 codes.
  TETROMINO_INLINE floats_pair operator()(const std::uint8_t* codes) const {
    const auto eight = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      std::int32_t word;
      std::memcpy(&word, codes + 4 * i, sizeof word);
      return values(_mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)));
    };
    return {lanes(eight(0), eight(1)), lanes(eight(2), eight(3))};
  }
  /// The same, even ones first.
  TETROMINO_INLINE floats_pair split(const std::uint8_t* codes) const {
    const words pairs = load_bytes(codes);
    const auto odd = [&](std::size_t i)
                         TETROMINO_INLINE_LAMBDA { return values(_mm256_srli_epi32(raw(pairs.r[i]), 4)); };
    return {lanes(values(raw(pairs.r[0])), values(raw(pairs.r[1]))), lanes(odd(0), odd(1))};
  }
  /// 32 codes, times the scales of their blocks, in the order of `place`.
  template <std::size_t Block>
  static TETROMINO_INLINE floats_pair scaled(const std::uint8_t* codes, const float* scales) {
    if constexpr (Block == 8) {
      const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scales));
      const __m256 first = _mm256_permute_ps(all, 0x50), second = _mm256_permute_ps(all, 0xFA);
      const floats_pair q = part_halves(look_up<0>(codes));
      const auto times = [&](const floats& v) TETROMINO_INLINE_LAMBDA {
        return lanes(_mm256_mul_ps(raw(v.r[0]), first), _mm256_mul_ps(raw(v.r[1]), second));
      };
      return {times(q.first), times(q.second)};
    }
    const floats both = broadcast_halves(scales[0], scales[32 / Block - 1]);
    const floats_pair q = part_halves(look_up<0>(codes));
    return {q.first * both, q.second * both};
  }
  /// The same bits for scales that are powers of two, from 2^-125 to 2^125, by their `scale_shifts`.
  template <std::size_t Block>
  static TETROMINO_INLINE floats_pair shifted(const std::uint8_t* codes, const std::int32_t* shifts) {
    const words q = look_up<largest_scale - 127>(codes);
    // Shifts are taken off the exponents of two numbers at a time; zeros stay zeros.
    const __m256i a = _mm256_subs_epu16(raw(q.r[0]), _mm256_set1_epi32(shifts[0]));
    const __m256i b = _mm256_subs_epu16(raw(q.r[1]), _mm256_set1_epi32(shifts[32 / Block - 1]));
    return part_halves(lanes(a, b));
  }
  /// Stores what `shifted` takes for 16 codes of E8M0; their signs are set in `misfits` where a scale is out of range.
  static TETROMINO_INLINE void scale_shifts(const std::uint8_t* scales, std::int32_t* out, words& misfits) {
    const words scale = load_bytes(scales), less = broadcast(largest_scale) - scale, shift = shift_left<7>(less);
    misfits = misfits | less | (scale - broadcast(2));
    store(out, shift | shift_left<16>(shift));
  }
  /// Where `scaled` puts code i of 32.
  static constexpr std::size_t place(std::size_t i) { return i / 2 % 2 * 16 + i / 16 * 8 + i % 2 * 4 + i % 16 / 4; }
  /// 32 elements in that order.
  template <class T>
  static TETROMINO_INLINE floats_pair load_in_place(const T* from) {
    const floats a = load(from), b = load(from + lane_count);
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
    const auto joined = [&](const floats& x, auto pick) TETROMINO_INLINE_LAMBDA {
      const __m256 low = _mm256_permute2f128_ps(raw(x.r[0]), raw(x.r[1]), 0x20);
      const __m256 high = _mm256_permute2f128_ps(raw(x.r[0]), raw(x.r[1]), 0x31);
      return _mm256_permutevar8x32_ps(pick(low, high), order);
    };
    const auto first = [](__m256 x, __m256 y) TETROMINO_INLINE_LAMBDA { return _mm256_unpacklo_ps(x, y); };
    const auto second = [](__m256 x, __m256 y) TETROMINO_INLINE_LAMBDA { return _mm256_unpackhi_ps(x, y); };
    return {lanes(joined(a, first), joined(b, first)), lanes(joined(a, second), joined(b, second))};
  }

 private:
  static constexpr int largest_scale = 252;  // for which 6 times the scale is finite

  /// Values times a power of two as bfloat16: those of even bytes of codes in the lower halves of lanes, of odd bytes
  /// in the upper ones; in each register even codes first. Both zeros become 0.
  template <int Exponent>
  static TETROMINO_INLINE words look_up(const std::uint8_t* codes) {
    constexpr auto table = [](int shift) {
      std::array<std::uint8_t, 16> entries{};
      constexpr int values[] = {0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0};
      for (int i = 1; i < 8; ++i) {
        entries[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>((values[i] + Exponent * 128) >> shift);
        entries[static_cast<std::size_t>(i) + 8] =
            static_cast<std::uint8_t>((values[i] + Exponent * 128 + 0x8000) >> shift);
      }
      return entries;
    };
    static constexpr std::array<std::uint8_t, 16> lower = table(0), upper = table(8);
    const auto load_twice = [](const std::uint8_t* x)
                                TETROMINO_INLINE_LAMBDA { return _mm256_broadcastsi128_si256(load_16(x)); };
    const __m256i pairs = _mm256_srlv_epi32(load_twice(codes), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i code = _mm256_and_si256(pairs, _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(load_twice(lower.data()), code);
    const __m256i high = _mm256_shuffle_epi8(load_twice(upper.data()), code);
    return lanes(_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
  }
  static TETROMINO_INLINE floats_pair part_halves(const words& x) {
    return {floats_of(shift_left<16>(x)), floats_of(x & broadcast(static_cast<std::int32_t>(0xFFFF0000u)))};
  }
  /// Of the low four bits of each lane.
  TETROMINO_INLINE __m256 values(__m256i code) const {
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(code, 3), 31));
    return _mm256_or_ps(_mm256_permutevar8x32_ps(values_, code), sign);
  }

  __m256 values_;
};

// Products of integers ------------------------------------------------------------------------------------------------

/// 16 bytes of each of 16 rows: lane n of part d has bytes 4 d ... 4 d + 3 of row n.
struct byte_columns {
  words part[4];
};
TETROMINO_INLINE byte_columns load_columns(const std::uint8_t* const* rows, std::size_t offset) {
  byte_columns out;
  for (std::size_t half = 0; half < 2; ++half) {
    const auto pair = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      const auto row = [&](std::size_t n) TETROMINO_INLINE_LAMBDA { return load_16(rows[8 * half + n] + offset); };
      return _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(i + 4), 1);
    };
    const __m256i a = pair(0), b = pair(1), c = pair(2), d = pair(3);
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    out.part[0].r[half] = _mm256_unpacklo_epi64(ab_low, cd_low);
    out.part[1].r[half] = _mm256_unpackhi_epi64(ab_low, cd_low);
    out.part[2].r[half] = _mm256_unpacklo_epi64(ab_high, cd_high);
    out.part[3].r[half] = _mm256_unpackhi_epi64(ab_high, cd_high);
  }
  return out;
}

/// Factors of 2 bits of rows of weights, for multiply_rows; those of each eight columns are in a lane.
class fine_rows {
 public:
  /// Of the columns where the bytes of rows begin, with what store_fine_offsets stores for them.
  fine_rows(const any_format& format, const std::uint8_t* const* bytes, const std::int32_t* offsets)
      : bytes_(bytes), offsets_(offsets), is_of_eight_(format.macro_block == 32) {
    const __m256i eight = _mm256_setr_epi16(1 << 14, 1 << 14, 1 << 12, 1 << 12, 1 << 10, 1 << 10, 1 << 8, 1 << 8,
                                            1 << 6, 1 << 6, 1 << 4, 1 << 4, 1 << 2, 1 << 2, 1, 1);
    const __m256i sixteen = _mm256_setr_epi16(1 << 14, 1 << 14, 1 << 14, 1 << 14, 1 << 12, 1 << 12, 1 << 12, 1 << 12,
                                              1 << 10, 1 << 10, 1 << 10, 1 << 10, 1 << 8, 1 << 8, 1 << 8, 1 << 8);
    shifts_ = is_of_eight_ ? eight : sixteen;
  }
  /// What takes the bias off sums of eight columns, number `part` of 64 on, as pairs of 16 bits.
  [[nodiscard]] TETROMINO_INLINE __m256i offset(std::size_t part) const {
    return _mm256_and_si256(load_register(offsets_ + 8 * part), _mm256_set1_epi32(0xFFFF));
  }
  /// 4 + m of the same columns of row n.
  [[nodiscard]] TETROMINO_INLINE __m256i of(std::size_t n, std::size_t part) const {
    std::uint16_t two = 0;
    if (is_of_eight_) {
      std::memcpy(&two, bytes_[n] + 2 * part, sizeof two);
    } else {
      two = bytes_[n][part];
    }
    const __m256i shifted = _mm256_mullo_epi16(_mm256_set1_epi16(static_cast<short>(two)), shifts_);
    return _mm256_add_epi16(_mm256_srli_epi16(shifted, 14), _mm256_set1_epi16(4));
  }

 private:
  const std::uint8_t* const* bytes_;
  const std::int32_t* offsets_;
  bool is_of_eight_;
  __m256i shifts_;
};

/// Says to templates that there are such factors.
TETROMINO_INLINE fine_rows factors_of_rows(const words&, const any_format& format, const std::uint8_t* const* bytes,
                                           const std::int32_t* offsets) {
  return {format, bytes, offsets};
}

/// Products of 128 columns of 16 rows, 64 bytes of codes each, by as many bytes of x (as split_elements orders them):
/// lane n of out[b] is the sum over block b of row n, biased, or by factors of 2 bits, and then not biased.
template <std::size_t Block, class Factors = void>
void multiply_rows(const std::uint8_t* const* rows, std::size_t offset, const std::int8_t* x, words (&out)[128 / Block],
                   [[maybe_unused]] const Factors* factors = nullptr) {
  constexpr bool is_fine = !std::is_void_v<Factors>;
  const __m256i one = _mm256_set1_epi16(1);
  repeat<2>([&](auto part) TETROMINO_INLINE_LAMBDA {
    const __m256 low = _mm256_castsi256_ps(load_register(x + 64 * part)),
                 high = _mm256_castsi256_ps(load_register(x + 64 * part + 32));
    const __m256i even = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)), 0xD8);
    const __m256i odd = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xDD)), 0xD8);
    const __m256i table = _mm256_broadcastsi128_si256(biased_table());
    // Two sums of 16 bits in each lane, of four products each: at most 4 * 24 * 128, so that two of them fit.
    const auto row = [&](std::size_t n) TETROMINO_INLINE_LAMBDA {
      const __m256i codes = load_register(rows[n] + offset + 32 * part), mask = _mm256_set1_epi8(15);
      const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask));
      const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask));
      const __m256i a = _mm256_maddubs_epi16(first, even), b = _mm256_maddubs_epi16(second, odd);
      if constexpr (is_fine) {
        const __m256i exact = _mm256_add_epi16(_mm256_add_epi16(a, factors->offset(part)), b);
        return _mm256_madd_epi16(exact, factors->of(n, part));
      }
      return _mm256_add_epi16(a, b);
    };
    const auto join_pairs = [&](__m256i a, __m256i b) TETROMINO_INLINE_LAMBDA {
      return is_fine ? _mm256_add_epi32(a, b) : _mm256_madd_epi16(_mm256_add_epi16(a, b), one);
    };
    // Each part of four[j][h] has one block, or part h of a pair of blocks, of rows 4 j ... 4 j + 3.
    constexpr std::size_t halves = 32 / Block;
    __m256i four[halves][4];
    repeat<4>([&](auto j) TETROMINO_INLINE_LAMBDA {
      const __m256i a = row(4 * j), b = row(4 * j + 1), c = row(4 * j + 2), d = row(4 * j + 3);
      const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
      const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
      if constexpr (Block == 32) {
        const __m256i ab = join_pairs(ab0, ab1), cd = join_pairs(cd0, cd1);
        four[0][j] = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
      } else {
        const auto join = [&](__m256i ab, __m256i cd) TETROMINO_INLINE_LAMBDA {
          return join_pairs(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
        };
        four[0][j] = join(ab0, cd0);
        four[1][j] = join(ab1, cd1);
      }
    });
    repeat<halves>([&](auto h) TETROMINO_INLINE_LAMBDA {
      const __m256i* f = four[h];
      out[2 * halves * part + h] =
          lanes(_mm256_permute2x128_si256(f[0], f[1], 0x20), _mm256_permute2x128_si256(f[2], f[3], 0x20));
      out[2 * halves * part + halves + h] =
          lanes(_mm256_permute2x128_si256(f[0], f[1], 0x31), _mm256_permute2x128_si256(f[2], f[3], 0x31));
    });
  });
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
