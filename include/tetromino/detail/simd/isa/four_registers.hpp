#pragma once

#include "../../../config.hpp"  // TETROMINO_VECTOR_BITS

/// What blocks need beyond lanewise arithmetic, where sixteen lanes are four registers of 128 bits: on SSE2 and NEON.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS == 128

#include "../../../float16.hpp"  // half, bfloat16
#include "lanes.hpp"             // floats, words
#include "neon.hpp"              // sixteen_bytes
#include "sse2.hpp"              // sixteen_bytes

#include <cstddef>      // std::size_t
#include <cstdint>      // std::int8_t, std::int32_t, std::uint8_t, std::uint16_t, std::uint32_t
#include <type_traits>  // std::is_same_v

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

// Sixteen bytes as the lanes of one of four registers, and back.
TETROMINO_INLINE word_register as_words(sixteen_bytes a) { return __builtin_bit_cast(word_register, a); }
TETROMINO_INLINE sixteen_bytes as_bytes(word_register a) { return __builtin_bit_cast(sixteen_bytes, a); }

// Input and output ----------------------------------------------------------------------------------------------------

/// Eight halfwords in each of two registers, in the lanes of words; and sixteen bytes.
TETROMINO_INLINE words spread_halfwords(sixteen_bytes a, sixteen_bytes b) {
  const sixteen_bytes zero{};
  return words(as_words(low_halfwords(a, zero)), as_words(high_halfwords(a, zero)), as_words(low_halfwords(b, zero)),
               as_words(high_halfwords(b, zero)));
}
TETROMINO_INLINE words spread_bytes(sixteen_bytes a) {
  const sixteen_bytes zero{};
  return spread_halfwords(low_bytes(a, zero), high_bytes(a, zero));
}
/// The low bytes of lanes that are at most 255.
TETROMINO_INLINE sixteen_bytes join_bytes(const words& a) {
  return narrow_unsigned_halfwords(narrow_words(as_bytes(a.r[0]), as_bytes(a.r[1])),
                                   narrow_words(as_bytes(a.r[2]), as_bytes(a.r[3])));
}

TETROMINO_INLINE words load_halfwords(const void* x) {
  return spread_halfwords(load_16(x), load_16(static_cast<const std::uint8_t*>(x) + 16));
}
TETROMINO_INLINE void store_halfwords(std::uint16_t* out, const words& a) {
  store_16(out, narrow_unsigned_words(as_bytes(a.r[0]), as_bytes(a.r[1])));
  store_16(out + 8, narrow_unsigned_words(as_bytes(a.r[2]), as_bytes(a.r[3])));
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
TETROMINO_INLINE void store_bytes(std::uint8_t* out, const words& a) { store_16(out, join_bytes(a)); }
TETROMINO_INLINE words load_bytes(const std::uint8_t* x) { return spread_bytes(load_16(x)); }
/// The values of 16 codes of E4M3.
TETROMINO_INLINE floats load_e4m3(const std::uint8_t* x) { return decode_e4m3(load_bytes(x)); }

/// Integers from -128 to 127 as bytes: both 16-bit halves of each lane in turn.
TETROMINO_INLINE void store_signed_halves(std::int8_t* out, const words& halves) {
  store_16(out, narrow_halfwords(as_bytes(halves.r[0]), as_bytes(halves.r[1])));
  store_16(out + 16, narrow_halfwords(as_bytes(halves.r[2]), as_bytes(halves.r[3])));
}
/// The same of the lanes of `first`, then of `second`.
TETROMINO_INLINE void store_signed_bytes(std::int8_t* out, const words& first, const words& second) {
  const auto narrow = [](const words& a) TETROMINO_INLINE_LAMBDA {
    return narrow_halfwords(narrow_words(as_bytes(a.r[0]), as_bytes(a.r[1])),
                            narrow_words(as_bytes(a.r[2]), as_bytes(a.r[3])));
  };
  store_16(out, narrow(first));
  store_16(out + 16, narrow(second));
}

/// Writes a line of 64 bytes, both sides aligned, past the caches; end_streaming() before others may read it.
TETROMINO_INLINE void stream_line(void* to, const void* from) {
  for (int i = 0; i < 64; i += 16) stream_16(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

/// To integers, rounded to nearest even.
TETROMINO_INLINE words nearest(const floats& x) {
  return words(as_words(nearest(x.r[0])), as_words(nearest(x.r[1])), as_words(nearest(x.r[2])),
               as_words(nearest(x.r[3])));
}
/// a b + c, and c - a b, rounded once where has_fused_products.
TETROMINO_INLINE floats multiply_add(const floats& a, const floats& b, const floats& c) {
  return by_register<floats>([&](std::size_t i)
                                 TETROMINO_INLINE_LAMBDA { return multiply_add(a.r[i], b.r[i], c.r[i]); });
}
TETROMINO_INLINE floats subtract_product(const floats& c, const floats& a, const floats& b) {
  return by_register<floats>([&](std::size_t i)
                                 TETROMINO_INLINE_LAMBDA { return subtract_product(c.r[i], a.r[i], b.r[i]); });
}

// Across lanes --------------------------------------------------------------------------------------------------------

/// Lanes 0 ... 7 get a, lanes 8 ... 15 b.
TETROMINO_INLINE floats broadcast_halves(float a, float b) {
  const float_register low = all_lanes(a), high = all_lanes(b);
  return floats(low, low, high, high);
}

/// Lane i gets what lane i ^ Distance has.
template <int Distance>
TETROMINO_INLINE words exchange(const words& a) {
  if constexpr (Distance == 8) return words(a.r[2], a.r[3], a.r[0], a.r[1]);
  if constexpr (Distance == 4) return words(a.r[1], a.r[0], a.r[3], a.r[2]);
  if constexpr (Distance < 4) {
    return by_register<words>(
        [&](std::size_t i) TETROMINO_INLINE_LAMBDA { return as_words(exchange_words<Distance>(as_bytes(a.r[i]))); });
  }
}

/// Whether all lanes of a comparison are set.
TETROMINO_INLINE bool all_set(signed_lanes flags) { return all_words_set(__builtin_bit_cast(sixteen_bytes, flags)); }

TETROMINO_INLINE bool any_at_least(const words& a, std::int32_t limit) {
  const word_register most = larger(larger(a.r[0], a.r[1]), larger(a.r[2], a.r[3]));
  return !all_set(lanes_of(most) < limit);
}
TETROMINO_INLINE bool all(const flags& a) {
  const signed_lanes both = (a.r[0] & a.r[1]) & (a.r[2] & a.r[3]);
  return all_set(both);
}
/// Bit i is set where lane i is zero.
TETROMINO_INLINE std::uint32_t zero_lanes(const words& a) {
  const auto is_zero = [](word_register x) TETROMINO_INLINE_LAMBDA { return lanes_of(x) == 0; };
  const signed_lanes zeros = (is_zero(a.r[0]) | is_zero(a.r[1])) | (is_zero(a.r[2]) | is_zero(a.r[3]));
  if (all_set(zeros == 0)) return 0;
  std::int32_t lane[lane_count];
  store(lane, a);
  std::uint32_t out = 0;
  for (std::size_t i = 0; i < lane_count; ++i) out |= static_cast<std::uint32_t>(lane[i] == 0) << i;
  return out;
}

/// Column j of four rows of words, for j = 0 ... 3.
struct four_columns {
  word_register column[4];
};
TETROMINO_INLINE four_columns transpose(word_register a, word_register b, word_register c, word_register d) {
  const sixteen_bytes ab_low = low_words(as_bytes(a), as_bytes(b)), ab_high = high_words(as_bytes(a), as_bytes(b));
  const sixteen_bytes cd_low = low_words(as_bytes(c), as_bytes(d)), cd_high = high_words(as_bytes(c), as_bytes(d));
  return {{as_words(low_halves(ab_low, cd_low)), as_words(high_halves(ab_low, cd_low)),
           as_words(low_halves(ab_high, cd_high)), as_words(high_halves(ab_high, cd_high))}};
}
/// Lane b is the join of the four lanes of get(b), at distances 2 and 1. A loop: written out, it is long to compile.
template <class Op, class Get>
TETROMINO_INLINE words join_each(const Op& op, const Get& get) {
  const auto join_pair = [&](word_register a, word_register b) TETROMINO_INLINE_LAMBDA {
    return as_bytes(op(as_words(low_words(as_bytes(a), as_bytes(b))), as_words(high_words(as_bytes(a), as_bytes(b)))));
  };
  words out;
  for (std::size_t i = 0; i < registers; ++i) {
    const sixteen_bytes ab = join_pair(get(4 * i), get(4 * i + 1)), cd = join_pair(get(4 * i + 2), get(4 * i + 3));
    out.r[i] = op(as_words(low_halves(ab, cd)), as_words(high_halves(ab, cd)));
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
      return as_words(load_16(x + b * block + i)) & all_lanes(0x7FFFFFFF);
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
  const auto largest = [](word_register a, word_register b)
                           TETROMINO_INLINE_LAMBDA { return as_words(larger_halfwords(as_bytes(a), as_bytes(b))); };
  const words pairs = join_each(largest, [&](std::size_t b) TETROMINO_INLINE_LAMBDA {
    const auto get = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      return as_words(load_16(x + b * block + i)) & all_lanes(0x7FFF7FFF);
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
        by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA { return as_words(load_16(x + 8 * i)); });
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
    store_16(out, pair_codes(join_bytes(a0), join_bytes(a1)));
    store_16(out + 16, pair_codes(join_bytes(b0), join_bytes(b1)));
  }
}

/// Turns codes into values, divided by a factor.
class e2m1_decoder {
 public:
  TETROMINO_INLINE e2m1_decoder() = default;
  TETROMINO_INLINE explicit e2m1_decoder(float factor) : factor_(factor) {}
  /// 32 codes.
  TETROMINO_INLINE floats_pair operator()(const std::uint8_t* codes) const {
    const sixteen_bytes pairs = load_16(codes), even = even_codes(pairs), odd = odd_codes(pairs);
    return {values(spread_bytes(low_bytes(even, odd))), values(spread_bytes(high_bytes(even, odd)))};
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
    const floats each =
        Block == 8 ? floats(all_lanes(scales[0]), all_lanes(scales[1]), all_lanes(scales[2]), all_lanes(scales[3]))
                   : broadcast_halves(scales[0], scales[32 / Block - 1]);
    return {q.first * each, q.second * each};
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
    const auto even = [](four_floats p, four_floats q) TETROMINO_INLINE_LAMBDA { return even_lanes(p, q); };
    const auto odd = [](four_floats p, four_floats q) TETROMINO_INLINE_LAMBDA { return odd_lanes(p, q); };
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
    const auto row = [&](std::size_t n) TETROMINO_INLINE_LAMBDA { return as_words(load_16(rows[4 * i + n] + offset)); };
    const four_columns columns = transpose(row(0), row(1), row(2), row(3));
    for (std::size_t d = 0; d < 4; ++d) out.part[d].r[i] = columns.column[d];
  }
  return out;
}

/// Integer products take values as twice themselves plus this.
inline constexpr std::int32_t value_bias = 0;
/// Of each byte's low four bits, a code: twice its value.
TETROMINO_INLINE words biased_values(const words& codes) {
  return by_register<words>([&](std::size_t i)
                                TETROMINO_INLINE_LAMBDA { return as_words(twice_values(as_bytes(codes.r[i]))); });
}
/// sum + Σ of the products in each lane of four bytes of a, b, c and d, by bytes 0 ... 15 of x; all are signed.
TETROMINO_INLINE words add_products(const words& sum, const words& a, const words& b, const words& c, const words& d,
                                    const std::int8_t* x) {
  const product_factors factors(x);
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    return as_words(
        factors.add_to(as_bytes(sum.r[i]), as_bytes(a.r[i]), as_bytes(b.r[i]), as_bytes(c.r[i]), as_bytes(d.r[i])));
  });
}

/// Factors of 2 bits multiply sums of eight columns, of which there is no bias to be taken off.
inline constexpr bool begins_with_fine_offset = false;
inline void store_fine_offsets(const std::int8_t*, const std::int32_t*, std::int32_t*) {}
/// 4 + m of the factors of eight columns each, number D of four in each lane.
template <int D>
TETROMINO_INLINE words fine_multipliers(const words& four) {
  return (shift_right<2 * D>(four) & broadcast(3)) + broadcast(4);
}
/// Of each byte's low four bits, a code: what add_fine_products takes.
TETROMINO_INLINE words fine_values(const words& codes, const words&) { return biased_values(codes); }
/// sum + factor Σ of the products in each lane of four bytes of a and b by bytes 0 ... 7 of x; all are signed.
TETROMINO_INLINE words add_fine_products(const words& sum, const words& a, const words& b, const std::int8_t* x,
                                         const std::int32_t*, const words& factor) {
  const eight_factors eight(x);
  return by_register<words>([&](std::size_t i) TETROMINO_INLINE_LAMBDA {
    return as_words(eight.add_to(as_bytes(sum.r[i]), as_bytes(a.r[i]), as_bytes(b.r[i]), as_bytes(factor.r[i])));
  });
}

/// 32 elements, stored even ones first within each eight, as the codes of a word come; and what takes the bias of the
/// weights off the products with each half of them.
inline void split_elements(const std::int8_t* x, std::int8_t* out, std::int32_t* offsets) {
  for (std::size_t i = 0; i < 32; ++i) out[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = x[i];
  offsets[0] = offsets[1] = 0;
}
/// The same of 32 codes, as twice their values.
inline void split_codes(const std::uint8_t* codes, std::int8_t* out, std::int32_t* offsets) {
  constexpr std::int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  for (std::size_t i = 0; i < 16; ++i) {
    out[i / 4 * 8 + i % 4] = twice[codes[i] & 15];
    out[i / 4 * 8 + i % 4 + 4] = twice[codes[i] >> 4];
  }
  offsets[0] = offsets[1] = 0;
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
