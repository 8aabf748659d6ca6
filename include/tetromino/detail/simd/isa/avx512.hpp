#pragma once

#include "../../../config.hpp"  // TETROMINO_VECTOR_BITS

/// What blocks need beyond lanewise arithmetic, on AVX-512 (F, BW, DQ, VL).

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS == 512

#include "../../../float16.hpp"  // half, bfloat16
#include "avx.hpp"               // add_products, split_elements, biased_table
#include "lanes.hpp"             // floats, words
#include "sse2.hpp"              // load_16, store_16

#include <immintrin.h>

#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <cstring>      // std::memcpy
#include <type_traits>  // std::is_same_v

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

TETROMINO_INLINE __m512 raw(const floats& a) { return a.r[0]; }
TETROMINO_INLINE __m512i raw(const words& a) { return a.r[0]; }
TETROMINO_INLINE floats lanes(__m512 a) { return floats(a); }
TETROMINO_INLINE words lanes(__m512i a) { return words(a); }

// Input and output ----------------------------------------------------------------------------------------------------

TETROMINO_INLINE floats load(const half* x) {
  return lanes(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
}
TETROMINO_INLINE floats load(const bfloat16* x) {
  return lanes(_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16)));
}
TETROMINO_INLINE void store(half* out, const floats& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(raw(a), _MM_FROUND_TO_NEAREST_INT));
}
TETROMINO_INLINE void store(bfloat16* out, const floats& a) {
  const __m512i word = _mm512_castps_si512(raw(a));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(raw(a), raw(a), _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(nearest, nan, word, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

/// The low byte of each lane.
TETROMINO_INLINE void store_bytes(std::uint8_t* out, const words& a) { store_16(out, _mm512_cvtepi32_epi8(raw(a))); }
TETROMINO_INLINE words load_bytes(const std::uint8_t* x) { return lanes(_mm512_cvtepu8_epi32(load_16(x))); }

/// Integers from -128 to 127 as bytes: both 16-bit halves of each lane in turn.
TETROMINO_INLINE void store_signed_halves(std::int8_t* out, const words& halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(raw(halves)));
}
/// The same of the lanes of `first`, then of `second`.
TETROMINO_INLINE void store_signed_bytes(std::int8_t* out, const words& first, const words& second) {
  const __m512i halves = _mm512_packs_epi32(raw(first), raw(second));  // quarters of each in turns
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(halves, halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
}

/// Writes a line of 64 bytes, both sides aligned, past the caches; end_streaming() before others may read it.
TETROMINO_INLINE void stream_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
}

/// The values of 16 codes of E4M3.
TETROMINO_INLINE floats load_e4m3(const std::uint8_t* x) {
  const __m512 values = _mm512_mul_ps(_mm512_cvtph_ps(e4m3_as_halves(x)), _mm512_set1_ps(256.0f));
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7FFFFFFF));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_castps_si512(_mm512_set1_ps(480.0f)));
  return lanes(_mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_castps_si512(values), nan, _mm512_set1_epi32(-1))));
}

// Across lanes --------------------------------------------------------------------------------------------------------

/// Lanes 0 ... 7 get a, lanes 8 ... 15 b.
TETROMINO_INLINE floats broadcast_halves(float a, float b) {
  return lanes(_mm512_insertf32x8(_mm512_set1_ps(a), _mm256_set1_ps(b), 1));
}

/// Lane i gets what lane i ^ Distance has.
template <int Distance>
TETROMINO_INLINE words exchange(const words& a) {
  if constexpr (Distance == 1) return lanes(_mm512_shuffle_epi32(raw(a), _MM_PERM_CDAB));
  if constexpr (Distance == 2) return lanes(_mm512_shuffle_epi32(raw(a), _MM_PERM_BADC));
  if constexpr (Distance == 4) return lanes(_mm512_shuffle_i32x4(raw(a), raw(a), 0xB1));
  if constexpr (Distance == 8) return lanes(_mm512_shuffle_i32x4(raw(a), raw(a), 0x4E));
}

TETROMINO_INLINE bool any_at_least(const words& a, std::int32_t limit) {
  return _mm512_cmpge_epi32_mask(raw(a), _mm512_set1_epi32(limit)) != 0;
}
TETROMINO_INLINE bool all(const flags& a) { return static_cast<__mmask16>(a.r[0]) == 0xFFFF; }
/// Bit i is set where lane i is zero.
TETROMINO_INLINE std::uint32_t zero_lanes(const words& a) { return _mm512_testn_epi32_mask(raw(a), raw(a)); }

/// Four rows of four lanes in each quarter, joined by `op`: lane i of quarter q is the join of quarter q of the i-th.
template <class Op>
TETROMINO_INLINE __m512i join_quarters(const Op& op, __m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = op(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = op(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return op(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
/// Halves joined: the low half from a, the high half from b.
template <class Op>
TETROMINO_INLINE __m512i join_halves(const Op& op, __m512i a, __m512i b) {
  return op(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
}
/// Quarters joined within each half: quarters 0 and 2 from a, 1 and 3 from b.
template <class Op>
TETROMINO_INLINE __m512i join_alternating(const Op& op, __m512i a, __m512i b) {
  const __m512i low = _mm512_mask_permutex_epi64(a, 0xCC, b, 0x44);  // a0 b0 a2 b2
  return op(low, _mm512_mask_permutex_epi64(b, 0x33, a, 0xEE));      // a1 b1 a3 b3
}
/// Lane b is the join of all lanes of get(b), at distances 8, 4, 2, 1.
template <class Op, class Get>
TETROMINO_INLINE __m512i join_each(const Op& op, const Get& get) {
  const auto fourth = [&](std::size_t j) TETROMINO_INLINE_LAMBDA {
    return join_alternating(op, join_halves(op, get(j), get(j + 8)), join_halves(op, get(j + 4), get(j + 12)));
  };
  return join_quarters(op, fourth(0), fourth(1), fourth(2), fourth(3));
}

/// Lane b is the sum of all lanes of get(b), by halves.
template <class Get>
TETROMINO_INLINE floats sum_each(const Get& get) {
  const auto add = [](__m512i a, __m512i b) TETROMINO_INLINE_LAMBDA {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  };
  const auto bits = [&](std::size_t b) TETROMINO_INLINE_LAMBDA { return _mm512_castps_si512(raw(get(b))); };
  return lanes(_mm512_castsi512_ps(join_each(add, bits)));
}

/// The largest magnitude, as bits of a float, of each of 16 consecutive blocks.
template <std::size_t Block>
TETROMINO_INLINE words block_amax(std::size_t /*block*/, const float* x) {
  const auto largest = [](__m512i a, __m512i b) TETROMINO_INLINE_LAMBDA { return _mm512_max_epi32(a, b); };
  const __m512i sign_out = _mm512_set1_epi32(0x7FFFFFFF);
  return lanes(join_each(largest, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const __m512i first = _mm512_and_si512(_mm512_loadu_si512(x + b * Block), sign_out);
    if constexpr (Block == 16) return first;
    return _mm512_max_epi32(first, _mm512_and_si512(_mm512_loadu_si512(x + b * Block + Block / 2), sign_out));
  }));
}
/// The same of 16-bit numbers, which compare as their bits do until the end.
template <std::size_t Block, class T>
  requires(sizeof(T) == 2)
TETROMINO_INLINE words block_amax(std::size_t /*block*/, const T* x) {
  const auto largest = [](__m512i a, __m512i b) TETROMINO_INLINE_LAMBDA { return _mm512_max_epu16(a, b); };
  const auto get = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    return _mm512_and_si512(_mm512_loadu_si512(x + i * 32), _mm512_set1_epi32(0x7FFF7FFF));
  };
  __m512i pairs;  // the join of all even and of all odd elements of a block
  if constexpr (Block == 32) {
    pairs = join_each(largest, get);
  } else {
    // Each register has two blocks: 8 lanes of one, 8 of the next.
    const auto fourth = [&](std::size_t j)
                            TETROMINO_INLINE_LAMBDA { return join_alternating(largest, get(j), get(j + 4)); };
    const __m512i mixed = join_quarters(largest, fourth(0), fourth(1), fourth(2), fourth(3));
    pairs = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), mixed);
  }
  const __m512i one = _mm512_max_epu16(pairs, _mm512_slli_epi32(pairs, 16));  // in the upper half
  if constexpr (std::is_same_v<T, bfloat16>) return lanes(_mm512_and_si512(one, _mm512_set1_epi32(0x7FFF0000)));
  return lanes(_mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(one, 16)))));
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

/// To integers, rounded to nearest even.
TETROMINO_INLINE words nearest(const floats& x) { return lanes(_mm512_cvtps_epi32(raw(x))); }
/// a b + c, and c - a b, rounded once.
TETROMINO_INLINE floats multiply_add(const floats& a, const floats& b, const floats& c) {
  return lanes(_mm512_fmadd_ps(raw(a), raw(b), raw(c)));
}
TETROMINO_INLINE floats subtract_product(const floats& c, const floats& a, const floats& b) {
  return lanes(_mm512_fnmadd_ps(raw(a), raw(b), raw(c)));
}

// E2M1 ----------------------------------------------------------------------------------------------------------------

/// The codes of y, with the signs of x.
TETROMINO_INLINE words encode_e2m1(const floats& y, const floats& x) {
  // Added to a magnitude, they leave the code, rounded to nearest even, in the low bits of the sum: the steps of the
  // sum are those of E2M1 in [0, 2), [2, 4) and [4, 6], and the offset makes up for the codes below.
  const __m512 magic = _mm512_setr_ps(0x1p22f, 0x1p22f, 0x1p23f + 2, 0x1p23f + 2, 0x1p24f + 8, 0x1p24f + 8, 0x1p24f + 8,
                                      0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512 magnitude = _mm512_range_ps(raw(y), _mm512_set1_ps(6.0f), 0b1010);  // the lesser magnitude
  const __m512 sum = _mm512_add_ps(magnitude, _mm512_permutexvar_ps(_mm512_cvttps_epi32(magnitude), magic));
  const __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(raw(x)), 28);
  return lanes(_mm512_ternarylogic_epi32(_mm512_set1_epi32(7), _mm512_castps_si512(sum), sign, 0xCA));
}

/// y in [0, 6 s] on the grid of E2M1 times the power of two s.
TETROMINO_INLINE floats snap(const floats& y, const floats& s) {
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(raw(y)), _mm512_set1_epi32(0x7F800000));
  const __m512 step = _mm512_castsi512_ps(_mm512_max_epi32(exponent, _mm512_castps_si512(raw(s))));
  const __m512 many = _mm512_set1_ps(0x1p22f);
  return lanes(_mm512_fnmadd_ps(step, many, _mm512_fmadd_ps(step, many, raw(y))));
}

/// Reads 32 elements.
template <class T>
TETROMINO_INLINE floats_pair load_pair(const T* x) {
  if constexpr (is_split<T>) {
    const __m512i both = _mm512_loadu_si512(x);
    return {lanes(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))),
            lanes(_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))))};
  } else {
    return {load(x), load(x + lane_count)};
  }
}

/// Stores the codes of 64 elements that load_pair split.
template <class T>
TETROMINO_INLINE void store_codes(std::uint8_t* out, const words& a0, const words& a1, const words& b0,
                                  const words& b1) {
  __m256i packed;
  if constexpr (is_split<T>) {
    const __m512i a = _mm512_or_si512(raw(a0), _mm512_slli_epi32(raw(a1), 4));
    const __m512i b = _mm512_or_si512(raw(b0), _mm512_slli_epi32(raw(b1), 4));
    const __m512i both = _mm512_packus_epi32(a, b);
    const __m512i bytes = _mm512_packus_epi16(both, both);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    packed = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes));
  } else {
    const __m512i codes =
        _mm512_packus_epi16(_mm512_packus_epi32(raw(a0), raw(a1)), _mm512_packus_epi32(raw(b0), raw(b1)));
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));  // even + 16 odd
    const __m512i bytes = _mm512_packus_epi16(pairs, pairs);
    // Each quarter has two bytes of each input.
    const __m512i order = _mm512_setr_epi32(0x00080000, 0x00180010, 0x00090001, 0x00190011, 0x000A0002, 0x001A0012,
                                            0x000B0003, 0x001B0013, 0, 0, 0, 0, 0, 0, 0, 0);
    packed = _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, bytes));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}

/// Turns codes into values, divided by a factor.
class e2m1_decoder {
 public:
  TETROMINO_INLINE e2m1_decoder()
      : values_(_mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f,
                               -4.0f, -6.0f)) {}
  TETROMINO_INLINE explicit e2m1_decoder(float factor) : e2m1_decoder() {
    values_ = _mm512_div_ps(values_, _mm512_set1_ps(factor));
  }
  /// 32 codes.
  TETROMINO_INLINE floats_pair operator()(const std::uint8_t* codes) const {
    const __m512i all = _mm512_castsi128_si512(load_16(codes));
    const __m512i nibble = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const auto half = [&](int first) TETROMINO_INLINE_LAMBDA {
      const __m512i word =
          _mm512_setr_epi32(first, first, first, first, first, first, first, first, first + 1, first + 1, first + 1,
                            first + 1, first + 1, first + 1, first + 1, first + 1);
      return lanes(_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_permutexvar_epi32(word, all), nibble), values_));
    };
    return {half(0), half(2)};
  }
  /// The same, even ones first.
  TETROMINO_INLINE floats_pair split(const std::uint8_t* codes) const {
    const __m512i pairs = raw(load_bytes(codes));
    return {lanes(_mm512_permutexvar_ps(pairs, values_)),
            lanes(_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), values_))};
  }
  /// split, times the scales of their blocks.
  template <std::size_t Block>
  TETROMINO_INLINE floats_pair scaled(const std::uint8_t* codes, const float* scales) const {
    if constexpr (Block == 32) {
      e2m1_decoder product = *this;
      product.values_ = _mm512_mul_ps(values_, _mm512_set1_ps(scales[0]));
      return product.split(codes);
    }
    if constexpr (Block == 8) {
      const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const floats each = lanes(_mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(_mm_loadu_ps(scales))));
      const floats_pair q = split(codes);
      return {q.first * each, q.second * each};
    }
    const floats both = lanes(_mm512_mask_broadcastss_ps(_mm512_set1_ps(scales[0]), 0xFF00, _mm_load_ss(scales + 1)));
    const floats_pair q = split(codes);
    return {q.first * both, q.second * both};
  }
  /// Where `scaled` puts code i of 32.
  static constexpr std::size_t place(std::size_t i) { return i % 2 * 16 + i / 2; }
  /// 32 elements in that order.
  template <class T>
  static TETROMINO_INLINE floats_pair load_in_place(const T* x) {
    if constexpr (is_split<T>) return load_pair(x);
    const __m512 a = raw(load(x)), b = raw(load(x + lane_count));
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {lanes(_mm512_permutex2var_ps(a, even, b)),
            lanes(_mm512_permutex2var_ps(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b))};
  }

 private:
  __m512 values_;
};

// Products of integers ------------------------------------------------------------------------------------------------

/// 16 bytes of each of 16 rows: lane n of part d has bytes 4 d ... 4 d + 3 of row n.
struct byte_columns {
  words part[4];
};
TETROMINO_INLINE byte_columns load_columns(const std::uint8_t* const* rows, std::size_t offset) {
  const auto quarters = [&](std::size_t first) TETROMINO_INLINE_LAMBDA {  // rows first, first + 4 ...
    const auto row = [&](std::size_t i) TETROMINO_INLINE_LAMBDA { return load_16(rows[first + 4 * i] + offset); };
    __m512i all = _mm512_castsi128_si512(row(0));
    all = _mm512_inserti32x4(all, row(1), 1);
    all = _mm512_inserti32x4(all, row(2), 2);
    return _mm512_inserti32x4(all, row(3), 3);
  };
  const __m512i a = quarters(0), b = quarters(1), c = quarters(2), d = quarters(3);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  return {{lanes(_mm512_unpacklo_epi64(ab_low, cd_low)), lanes(_mm512_unpackhi_epi64(ab_low, cd_low)),
           lanes(_mm512_unpacklo_epi64(ab_high, cd_high)), lanes(_mm512_unpackhi_epi64(ab_high, cd_high))}};
}

#if TETROMINO_HAS_BF16
/// Of each lane's byte j, two codes: their values as bfloat16 in lane j of `pair`.
struct bfloat16_pairs {
  words pair[4];
};
TETROMINO_INLINE bfloat16_pairs value_pairs(const words& codes) {
  // Of an index five bits are heeded, the upper of which is of another code.
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, static_cast<short>(0x8000), static_cast<short>(0xBF00),
      static_cast<short>(0xBF80), static_cast<short>(0xBFC0), static_cast<short>(0xC000), static_cast<short>(0xC040),
      static_cast<short>(0xC080), static_cast<short>(0xC0C0)));
  const auto pair = [&](int j) TETROMINO_INLINE_LAMBDA {
    // Where the bytes begin in 64 bits that are two lanes: a code is in the lower half of an index.
    const std::int64_t first = 8 * j, all = first | (first + 4) << 16 | (first + 32) << 32 | (first + 36) << 48;
    const __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(all), raw(codes));
    return lanes(_mm512_permutexvar_epi16(index, table));
  };
  return {{pair(0), pair(1), pair(2), pair(3)}};
}
/// x are bits of bfloat16: sum + a pair's second value times x[1], and then + its first value times x[0]; each step is
/// rounded once, to nearest even, and denormal numbers that go in or come out count as 0.
TETROMINO_INLINE floats add_pair(const floats& sum, const words& pair, const std::uint16_t* x) {
  std::int32_t both;
  std::memcpy(&both, x, sizeof both);
  const auto as_bfloats = [](__m512i bits) TETROMINO_INLINE_LAMBDA { return bit_cast<__m512bh>(bits); };
  return lanes(_mm512_dpbf16_ps(raw(sum), as_bfloats(raw(pair)), as_bfloats(_mm512_set1_epi32(both))));
}
#endif

/// Products of 128 columns of 16 rows, 64 bytes of codes each, by as many bytes of x (as split_elements orders
/// them): lane n of out[b] is the sum over block b of row n, biased.
template <std::size_t Block>
void multiply_rows(const std::uint8_t* const* rows, std::size_t offset, const std::int8_t* x,
                   words (&out)[128 / Block]) {
  const __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 64);
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i even = _mm512_permutex2var_epi32(low, evens, high);
  const __m512i odd = _mm512_permutex2var_epi32(low, _mm512_or_si512(evens, _mm512_set1_epi32(1)), high);
  const auto row = [&](std::size_t n) TETROMINO_INLINE_LAMBDA {
    const words codes = lanes(_mm512_loadu_si512(rows[n] + offset));
    const __m512i first = raw(biased_values(codes)), second = raw(biased_values(shift_right<4>(codes)));
#if TETROMINO_HAS_VNNI
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first, even), second, odd);
#else
    const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(first, even), _mm512_maddubs_epi16(second, odd));
    return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#endif
  };
  // Quarter q of four[j][h] has one block, or half h of a pair of blocks, of rows 4 j ... 4 j + 3.
  constexpr std::size_t halves = 32 / Block;
  __m512i four[halves][4];
  repeat<4>([&](auto j) TETROMINO_INLINE_LAMBDA {
    const __m512i a = row(4 * j), b = row(4 * j + 1), c = row(4 * j + 2), d = row(4 * j + 3);
    if constexpr (Block == 32) {
      const auto add = [](__m512i p, __m512i q) TETROMINO_INLINE_LAMBDA { return _mm512_add_epi32(p, q); };
      four[0][j] = join_quarters(add, a, b, c, d);
    } else {
      const __m512i ab0 = _mm512_unpacklo_epi32(a, b), cd0 = _mm512_unpacklo_epi32(c, d);
      const __m512i ab1 = _mm512_unpackhi_epi32(a, b), cd1 = _mm512_unpackhi_epi32(c, d);
      four[0][j] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0));
      four[1][j] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1));
    }
  });
  repeat<halves>([&](auto h) TETROMINO_INLINE_LAMBDA {
    const __m512i a = _mm512_shuffle_i32x4(four[h][0], four[h][1], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(four[h][0], four[h][1], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(four[h][2], four[h][3], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(four[h][2], four[h][3], 0xDD);
    out[h] = lanes(_mm512_shuffle_i32x4(a, c, 0x88));
    out[halves + h] = lanes(_mm512_shuffle_i32x4(b, d, 0x88));
    out[2 * halves + h] = lanes(_mm512_shuffle_i32x4(a, c, 0xDD));
    out[3 * halves + h] = lanes(_mm512_shuffle_i32x4(b, d, 0xDD));
  });
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
