#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// Factors of 2 bits, four of which are in a byte: 16 blocks of 32 elements side by side, lane b belongs to block b.

#if TETROMINO_SIMD

#include "../../scaling.hpp"  // carry_of, fine_factor, fine_inverse
#include "../row.hpp"         // row_rules
#include "estimates.hpp"      // block_columns
#include "isa.hpp"            // floats, words, snap
#include "scales.hpp"         // closed_form_bytes, inverse_power

#include <algorithm>  // std::copy_n
#include <cstddef>    // std::size_t
#include <cstdint>    // std::int32_t, std::uint8_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// The bytes of n blocks of a row, the first of which begins a byte, as if each factor were for 8 elements.
inline void factors_of_eight(const std::uint8_t* macros, const any_format& format, std::size_t n, std::uint8_t* out) {
  if (format.macro_block == 32) return static_cast<void>(std::copy_n(macros, n, out));
  for (std::size_t b = 0; b < n; ++b) {
    const unsigned two = macros[b / 2] >> (b % 2 * 4) & 15u;
    out[b] = static_cast<std::uint8_t>((two & 3) * 0x05 | (two >> 2) * 0x50);
  }
}

/// 1 + m / 4.
TETROMINO_INLINE floats fine_factors(const words& m) { return floats_of(shift_left<21>(m) | broadcast(0x3F800000)); }

/// The scales of 16 blocks and the m of their groups of 8 or 16.
struct fine_choice {
  words byte, m[4];
  floats total;  // squared errors, in units of the scale
};

/// How 16 blocks with factors of 2 bits are packed.
class fine_search {
 public:
  /// Of these blocks, which are finite.
  fine_search(const row_rules& rules, const block_magnitudes& in) : rules_(rules), in_(in) {}

  [[nodiscard]] fine_choice choose(const words& amax) const { return choose(amax, in_.is_weighted); }

 private:
  static constexpr std::size_t block = 32;

  [[nodiscard]] fine_choice choose(const words& amax, bool is_weighted) const {
    const auto under = [&](const words& byte) { return factors_under(byte, is_weighted); };
    if (rules_.rule != scale_rule::min_error) return under(closed_form_bytes(amax, carry_of(rules_.rule)));
    const words up = closed_form_bytes(amax, carry_of(scale_rule::round_up));
    fine_choice best{};
    words told = broadcast(0);
    floats least = broadcast(0.0f), first = least;
    for (const std::int32_t step : {1, 0, -1, -2}) {  // the larger scale first: it keeps ties
      const words byte = clamp(up + broadcast(step), 0, 254), twice = byte - up + byte - up;
      const fine_choice choice = under(byte);
      const floats total = choice.total * floats_of(shift_left<23>(twice + broadcast(127)));
      if (step == 1) {
        best = choice;
        least = first = total;
        continue;
      }
      take(total < least, choice, best);
      least = min(total, least);
      told = told_apart(told, total, first);
    }
    const flags is_empty = floats_of(amax) <= broadcast(0.0f);
    const flags settled = is_set(told) | is_empty;
    if (is_weighted && !all(settled)) {
      fine_choice other = choose(amax, false);
      take(settled, best, other);
      best = other;
    }
    best.byte = select(is_empty, broadcast(0), best.byte);
    return best;
  }
  TETROMINO_OUTLINE static void take(const flags& where, const fine_choice& from, fine_choice& to) {
    to.byte = select(where, from.byte, to.byte);
    for (std::size_t g = 0; g < 4; ++g) to.m[g] = select(where, from.m[g], to.m[g]);
  }

  /// The factors that blocks get under these scales.
  TETROMINO_OUTLINE fine_choice factors_under(const words& byte, bool is_weighted) const {
    const std::size_t elements = elements_per_factor(rules_.format), groups = block / elements;
    const floats to_scale = inverse_power(byte);
    fine_choice out{};
    out.byte = byte;
    floats errors[4];
    for (std::size_t g = 0; g < 4; ++g) {
      out.m[g] = broadcast(0);
      errors[g] = broadcast(0.0f);
    }
    for (std::size_t g = 0; g < groups; ++g) {
      alignas(64) float x[16][lane_count];
      words largest = broadcast(0);
      for (std::size_t i = 0; i < elements; ++i) {
        const floats scaled = rounded(load(in_.x[g * elements + i]) * to_scale);
        largest = max(largest, bits_of(scaled));
        store(x[i], scaled);
      }
      choose_group({x, is_weighted ? in_.weights + g * elements : nullptr, elements, floats_of(largest)}, out.m[g],
                   errors[g]);
    }
    out.total = (errors[0] + errors[2]) + (errors[1] + errors[3]);
    return out;
  }

  /// Elements that share a factor, over the scales of their blocks; the weights are null where all are 1.
  struct group {
    const float (*x)[lane_count];
    const float (*weights)[lane_count];
    std::size_t elements;
    floats largest;
  };

  /// The m of a group, and its error.
  TETROMINO_OUTLINE void choose_group(const group& in, words& best, floats& error) const {
    const bool by_largest = rules_.macro == macro_rule::from_amax;
    words told = broadcast(0);
    floats least = broadcast(0.0f), first = least;
    for (std::int32_t m = 0; m < 4; ++m) {
      const floats sum = squared_error(in, m);
      const floats key = by_largest ? magnitude(difference(in.largest, m)) : sum;
      if (m == 0) {
        best = broadcast(0);
        error = sum;
        least = first = key;
      } else {
        const flags better = key < least;
        best = select(better, broadcast(m), best);
        error = select(better, sum, error);
        least = select(better, key, least);
      }
      told = told_apart(told, key, first);
    }
    // Where weights leave all factors of a group with the same error, what a search without them gives.
    const flags settled = is_set(told);
    if (in.weights == nullptr || by_largest || all(settled)) return;
    words plain;
    floats unused;
    choose_group({in.x, nullptr, in.elements, in.largest}, plain, unused);
    best = select(settled, best, plain);
  }

  /// How far an element is from what it decodes to, both over the block's scale.
  static TETROMINO_INLINE floats difference(const floats& x, std::int32_t m) {
    const floats y = rounded(x * broadcast(fine_inverse(static_cast<unsigned>(m))));
    const floats q = snap(min(y, broadcast(6.0f)), broadcast(1.0f));
    return x - q * broadcast(fine_factor(static_cast<unsigned>(m)));
  }
  /// Summed up by halves.
  static TETROMINO_OUTLINE floats squared_error(const group& in, std::int32_t m) {
    alignas(64) float square[16][lane_count];
    for (std::size_t i = 0; i < in.elements; ++i) {
      const floats off = difference(load(in.x[i]), m), squared = rounded(off * off);
      store(square[i], in.weights == nullptr ? squared : rounded(load(in.weights[i]) * squared));
    }
    for (std::size_t n = in.elements / 2; n > 0; n /= 2) {
      for (std::size_t i = 0; i < n; ++i) store(square[i], load(square[i]) + load(square[i + n]));
    }
    return load(square[0]);
  }

  const row_rules& rules_;
  block_columns in_;
};

/// Stores the bytes of factors of 16 blocks.
TETROMINO_INLINE void store_factors(const any_format& format, const words (&m)[4], std::uint8_t* macros) {
  if (format.macro_block == 32) {
    return store_bytes(macros, m[0] | shift_left<2>(m[1]) | shift_left<4>(m[2]) | shift_left<6>(m[3]));
  }
  std::int32_t two[lane_count];
  store(two, m[0] | shift_left<2>(m[1]));
  for (std::size_t i = 0; i < lane_count / 2; ++i) {
    macros[i] = static_cast<std::uint8_t>(two[2 * i] | two[2 * i + 1] << 4);
  }
}

/// What each eight elements of 16 blocks are unpacked with: their factor times the scale of their block.
struct fine_scales {
  alignas(64) float of[4][blocks_at_once];

  fine_scales(const any_format& format, const std::uint8_t* scales, const std::uint8_t* macros) {
    alignas(64) std::uint8_t bytes[blocks_at_once];
    factors_of_eight(macros, format, blocks_at_once, bytes);
    words factors = load_bytes(bytes);
    const floats scale = decode_e8m0(load_bytes(scales));
    for (float* const eighth : {of[0], of[1], of[2], of[3]}) {
      store(eighth, fine_factors(factors & broadcast(3)) * scale);
      factors = shift_right<2>(factors);
    }
  }
};

/// What 32 elements in order are multiplied by, when each eight of block b have one of of[0][b] ... of[3][b].
TETROMINO_INLINE floats_pair spread_eighths(const float (*of)[blocks_at_once], std::size_t b) {
  return {broadcast_halves(of[0][b], of[1][b]), broadcast_halves(of[2][b], of[3][b])};
}

/// Unpacks n elements of at most 16 blocks, rounded up to 32.
TETROMINO_OUTLINE inline void unpack_fine(const any_format& format, const std::uint8_t* codes,
                                          const std::uint8_t* scales, const std::uint8_t* macros, std::size_t n,
                                          float* out) {
  const fine_scales scale(format, scales, macros);
  const e2m1_decoder decode;
  for (std::size_t k = 0; k < n; k += 32) {
    const floats_pair s = spread_eighths(scale.of, k / 32), q = decode(codes + k / 2);
    store(out + k, q.first * s.first);
    store(out + k + lane_count, q.second * s.second);
  }
}
template <class T>
void unpack_fine(const any_format& format, const std::uint8_t* codes, const std::uint8_t* scales,
                 const std::uint8_t* macros, std::size_t n, T* out) {
  float x[32 * blocks_at_once];
  unpack_fine(format, codes, scales, macros, n, x);
  for (std::size_t i = 0; i < n; i += lane_count) store(out + i, load(x + i));
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
