#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// How 16 blocks side by side get their scales: lane b belongs to block b.

#if TETROMINO_SIMD

#include "../../scaling.hpp"  // carry_of, macro_factor
#include "../row.hpp"         // row_rules
#include "isa.hpp"            // floats, words, snap, sum_each

#include <cstddef>      // std::size_t
#include <cstdint>      // std::int32_t
#include <type_traits>  // std::bool_constant

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

inline constexpr std::size_t blocks_at_once = lane_count;

/// The magnitudes of 16 blocks of `block` elements, and the weights of their squared errors; null: all 1.
struct block_magnitudes {
  const float* x;
  const float* weights;
  std::size_t block;

  /// The same blocks without weights, for searches whose candidates weights leave with the same error.
  [[nodiscard]] TETROMINO_INLINE block_magnitudes without_weights() const { return {x, nullptr, block}; }
};

// Numbers -------------------------------------------------------------------------------------------------------------

TETROMINO_INLINE words clamp(const words& a, std::int32_t least, std::int32_t most) {
  return min(max(a, broadcast(least)), broadcast(most));
}
/// Where a small number that is not negative is zero.
TETROMINO_INLINE flags is_zero(const words& a) { return floats_of(a | broadcast(0x3F800000)) <= broadcast(1.0f); }
/// Where it is not.
TETROMINO_INLINE flags is_set(const words& a) { return broadcast(1.0f) < floats_of(a | broadcast(0x3F800000)); }
/// The exponent field of a magnitude, kept within those whose inverse power of two is a normal float.
TETROMINO_INLINE words exponent_field(const words& magnitude) { return clamp(shift_right<23>(magnitude), 1, 253); }
/// 2^(127 - field) for a field in 0 ... 253; 2^-127 for 254.
TETROMINO_INLINE floats inverse_power(const words& field) {
  return floats_of(max(shift_left<23>(broadcast(254) - field), broadcast(0x00400000)));
}

/// The codes of v >= 0.
TETROMINO_INLINE words encode_e4m3(const floats& v) {
  const floats m = min(v, broadcast(448.0f));
  const words least = bits_of(broadcast(0x1p-6f)), step = max(bits_of(m) & broadcast(0x7F800000), least);
  const words magic = step + broadcast(20 << 23);  // three bits of mantissa survive the sum
  return bits_of(m + floats_of(magic)) - magic + shift_right<20>(step - least);
}
/// The values of codes of E8M0, 0 ... 255.
TETROMINO_INLINE floats decode_e8m0(const words& code) {
  const words value = max(shift_left<23>(code), broadcast(0x00400000));
  return floats_of(value | shift_left<22>(shift_right<8>(code + broadcast(1))));  // 255 is NaN
}

// MX ------------------------------------------------------------------------------------------------------------------

/// The scale bytes that a closed-form rule gives blocks with these largest magnitudes.
TETROMINO_INLINE words closed_form_bytes(const words& amax, std::uint32_t carry) {
  return max(shift_right<23>(amax + broadcast(static_cast<std::int32_t>(carry))), broadcast(2)) - broadcast(2);
}
/// Largest magnitudes, as a power of two's exponent field and what is to be multiplied by it.
struct parted_amax {
  words field;
  floats rest;
};
TETROMINO_INLINE parted_amax part(const words& amax) {
  const words field = exponent_field(amax);
  return {field, floats_of(amax) * inverse_power(field)};
}
/// closed_form_bytes after a multiplication by macro-block factors.
TETROMINO_INLINE words closed_form_bytes(const parted_amax& amax, const floats& factor, std::uint32_t carry) {
  const floats scaled = rounded(factor * amax.rest);
  const words raised = shift_right<23>(bits_of(scaled) + broadcast(static_cast<std::int32_t>(carry)));
  return max(amax.field + raised, broadcast(129)) - broadcast(129);
}

/// f(i) for each 16 elements of block b, which start at i.
template <std::size_t Block, class F>
TETROMINO_INLINE void each_part(std::size_t block, std::size_t b, const F& f) {
  if constexpr (Block == any_size) {
    for (std::size_t i = b * block; i < (b + 1) * block; i += lane_count) f(i);
  } else {
    f(b * Block);
    if constexpr (Block == 32) f(b * Block + lane_count);
  }
}

/// The squared errors of 16 elements, y once scaled, against the grid of E2M1 times s. Without `Clamped`, y is at most
/// 7 s: then the grid may as well go on, as 7 is as far from 8 as from 6.
template <bool Clamped, bool Weighted>
TETROMINO_INLINE floats squared_errors(const block_magnitudes& in, std::size_t i, const floats& y, const floats& s) {
  const floats difference = y - snap(Clamped ? min(y, s * broadcast(6.0f)) : y, s);
  const floats square = rounded(difference * difference);
  if constexpr (Weighted) return rounded(load(in.weights + i) * square);
  return square;
}

/// Where a and b differ, or `told` says so already, 1.
TETROMINO_INLINE words told_apart(const words& told, const floats& a, const floats& b) {
  return select((a < b) | (b < a), broadcast(1), told);
}

/// The squared errors of 16 blocks for some candidates, each block multiplied by what makes its scale 1.
template <bool Weighted, std::size_t Block>
TETROMINO_OUTLINE void scaled_errors(const block_magnitudes& in, std::size_t candidates,
                                     const float (*multiplier)[blocks_at_once], float (*out)[blocks_at_once]) {
  const floats one = broadcast(1.0f);
  for (std::size_t c = 0; c < candidates; ++c) {
    alignas(64) float errors[blocks_at_once][lane_count];
    for (std::size_t b = 0; b < blocks_at_once; ++b) {
      const floats to_scale = broadcast(multiplier[c][b]);
      floats sum = broadcast(0.0f);
      each_part<Block>(in.block, b, [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
        sum = sum + squared_errors<true, Weighted>(in, i, rounded(load(in.x + i) * to_scale), one);
      });
      store(errors[b], sum);
    }
    store(out[c], sum_each([&](std::size_t b) TETROMINO_INLINE_LAMBDA { return load(errors[b]); }));
  }
}

/// The scale bytes of min_error.
TETROMINO_OUTLINE inline words least_error_bytes(const block_magnitudes& in, const words& amax, const floats& factor) {
  const bool is_small = in.block == 16;
  const auto errors_of = in.weights == nullptr ? is_small ? &scaled_errors<false, 16> : &scaled_errors<false, 32>
                         : is_small ? &scaled_errors<true, 16>
                                               : &scaled_errors<true, 32>;
  constexpr std::size_t candidates = 4;
  constexpr std::int32_t steps[candidates] = {1, 0, -1, -2};  // the larger scale first: it keeps ties
  const words up = closed_form_bytes(part(amax), factor, carry_of(scale_rule::round_up));
  alignas(64) float multiplier[candidates][blocks_at_once], errors[candidates][blocks_at_once];
  const auto byte_of = [&](std::size_t c) TETROMINO_INLINE_LAMBDA { return clamp(up + broadcast(steps[c]), 0, 254); };
  for (std::size_t c = 0; c < candidates; ++c) store(multiplier[c], factor * inverse_power(byte_of(c)));
  errors_of(in, candidates, multiplier, errors);

  words best = up, told = broadcast(0);
  floats least = broadcast(1.0f), first = least;
  for (std::size_t c = 0; c < candidates; ++c) {
    const words byte = byte_of(c), twice = byte - up + byte - up;
    const floats total = load(errors[c]) * floats_of(shift_left<23>(twice + broadcast(127)));
    if (c == 0) {
      best = byte;
      least = first = total;
    } else {
      const flags better = total < least;
      best = select(better, byte, best);
      least = select(better, total, least);
      if (in.weights != nullptr) told = told_apart(told, total, first);
    }
  }
  if (in.weights != nullptr) {
    const flags settled = is_set(told) | (floats_of(amax) <= broadcast(0.0f));
    if (!all(settled)) best = select(settled, best, least_error_bytes(in.without_weights(), amax, factor));
  }
  return best;
}

/// The largest of each group of `group` lanes, in all of its lanes.
TETROMINO_OUTLINE inline words group_max(words a, std::size_t group) {
  if (group > 1) a = max(a, exchange<1>(a));
  if (group > 2) a = max(a, exchange<2>(a));
  if (group > 4) a = max(a, exchange<4>(a));
  if (group > 8) a = max(a, exchange<8>(a));
  return a;
}

/// The macro-block bytes of mbs-static for the largest magnitudes of macro blocks.
TETROMINO_INLINE words static_macros(const words& amax) {
  return shift_right<15>(bits_of(broadcast(6.0f) / floats_of(amax))) & broadcast(0xFF);  // infinity has no mantissa
}
TETROMINO_INLINE floats macro_factors(const words& byte) {
  return floats_of(shift_left<15>(byte) | broadcast(0x3F800000));
}

/// The squared errors of blocks [first, last) for 16 candidates, x and the block scales in the same unit.
template <bool Clamped, bool Weighted, std::size_t Block>
TETROMINO_OUTLINE void macro_errors(const block_magnitudes& in, const float* x, std::size_t first, std::size_t last,
                                    const float* factor, const float (*scale)[blocks_at_once],
                                    float (*errors)[lane_count]) {
  for (std::size_t c = 0; c < lane_count; ++c) {
    const floats f = broadcast(factor[c]);
    floats sum = broadcast(0.0f);
    for (std::size_t b = first; b < last; ++b) {
      const floats s = broadcast(scale[c][b]);
      each_part<Block>(in.block, b, [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
        sum = sum + squared_errors<Clamped, Weighted>(in, i, rounded(load(x + i) * f), s);
      });
    }
    store(errors[c], sum);
  }
}

/// The macro-block bytes of a search, in all lanes of a macro block of `group` blocks.
TETROMINO_OUTLINE inline words searched_macros(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                               std::size_t group) {
  // In units of the largest magnitude's power of two, nothing overflows and what underflows has no weight.
  const words unit = exponent_field(group_max(amax, group));
  alignas(64) float x[blocks_at_once * 32];
  alignas(64) float to_unit[blocks_at_once];
  store(to_unit, inverse_power(unit));
  for (std::size_t b = 0; b < blocks_at_once; ++b) {
    each_part<any_size>(in.block, b, [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
      store(x + i, load(in.x + i) * broadcast(to_unit[b]));
    });
  }
  const bool is_weighted = in.weights != nullptr;
  const bool is_clamped = rules.rule == scale_rule::floor || rules.rule == scale_rule::min_error;
  const auto errors_of = with_block(in.block, [&]<std::size_t Block>() {
    if (is_weighted) return is_clamped ? &macro_errors<true, true, Block> : &macro_errors<false, true, Block>;
    return is_clamped ? &macro_errors<true, false, Block> : &macro_errors<false, false, Block>;
  });

  constexpr std::size_t candidates = lane_count;
  const parted_amax parts = part(amax);
  const std::uint32_t carry = carry_of(rules.rule);
  const std::int32_t spacing = rules.macro == macro_rule::search ? 16 : 1;
  std::int32_t best[blocks_at_once] = {};
  float least[blocks_at_once] = {}, of_first[blocks_at_once] = {};
  bool told[blocks_at_once] = {};
  for (std::int32_t first = 0; first < 256; first += spacing * static_cast<std::int32_t>(candidates)) {
    alignas(64) float factor[candidates], scale[candidates][blocks_at_once];
    for (std::size_t c = 0; c < candidates; ++c) {
      factor[c] = macro_factor(static_cast<std::uint8_t>(first + spacing * static_cast<std::int32_t>(c)));
      const floats f = broadcast(factor[c]);
      const words byte =
          rules.rule == scale_rule::min_error ? least_error_bytes(in, amax, f) : closed_form_bytes(parts, f, carry);
      store(scale[c], floats_of(shift_left<23>(max(byte - unit + broadcast(127), broadcast(1)))));
    }
    const floats all_factors = load(factor);
    for (std::size_t begin = 0; begin < blocks_at_once; begin += group) {
      alignas(64) float errors[candidates][lane_count], totals[candidates];
      errors_of(in, x, begin, begin + group, factor, scale, errors);
      store(totals, sum_each([&](std::size_t c) TETROMINO_INLINE_LAMBDA { return load(errors[c]); }) /
                        (all_factors * all_factors));
      for (std::size_t c = 0; c < candidates; ++c) {
        const std::int32_t m = first + spacing * static_cast<std::int32_t>(c);
        if (m == 0 || totals[c] < least[begin]) {
          best[begin] = m;
          least[begin] = totals[c];
        }
      }
      if (!is_weighted) continue;
      if (first == 0) of_first[begin] = totals[0];
      for (const float total : totals) {
        told[begin] = told[begin] || total < of_first[begin] || of_first[begin] < total;
      }
    }
  }
  for (std::size_t b = 0; b < blocks_at_once; ++b) best[b] = best[b / group * group];
  if (!is_weighted) return load(best);
  std::int32_t settled[blocks_at_once], group_amax[blocks_at_once];
  store(group_amax, group_max(amax, group));
  for (std::size_t b = 0; b < blocks_at_once; ++b) settled[b] = told[b / group * group] || group_amax[b] == 0;
  if (all(is_set(load(settled)))) return load(best);
  return select(is_set(load(settled)), load(best), searched_macros(rules, in.without_weights(), amax, group));
}

// NVFP4 ---------------------------------------------------------------------------------------------------------------

/// x / divisor, correctly rounded; `inverse` is 1 / divisor.
template <bool Quick>
TETROMINO_INLINE floats quotient(const floats& x, const floats& divisor, [[maybe_unused]] const floats& inverse) {
  if constexpr (Quick && has_fused_products) {
    // Two corrections by the exact remainder. After the first the quotient is within one unit in the last place, from
    // where the second gives the correctly rounded one. (Markstein: Computation of elementary functions on the IBM RISC
    // System/6000 processor; 1990)
    const floats q0 = x * inverse;
    const floats q1 = multiply_add(subtract_product(x, q0, divisor), inverse, q0);
    return multiply_add(subtract_product(x, q1, divisor), inverse, q1);
  }
  return x / divisor;
}
/// The same for E2M1 codes alone: one correction, after which the outcome lies on the quotient's side of each midpoint
/// between values of E2M1. (All mantissas of the divisor were tried, with the floats around each midpoint times it.)
TETROMINO_INLINE floats quotient_for_code(const floats& x, const floats& divisor, const floats& inverse) {
  if constexpr (!has_fused_products) return x / divisor;
  const floats q0 = x * inverse;
  return multiply_add(subtract_product(x, q0, divisor), inverse, q0);
}
/// Whether quotients of magnitudes up to amax can be had from inverses: nothing overflows, and elements so small that
/// their remainder underflows have a quotient whose square is zero.
TETROMINO_INLINE bool has_quick_quotients(const words& amax, const floats& divisor, const floats& inverse) {
  return has_fused_products && all((broadcast(0x1p-25f) <= divisor) & (divisor <= broadcast(0x1p100f)) &
                                   (floats_of(amax) * inverse <= broadcast(0x1p60f)));
}

/// The squared errors of 16 blocks over their divisors.
template <bool Quick, bool Weighted>
floats divided_errors(const block_magnitudes& in, const float* divisors, const float* inverses) {
  const floats one = broadcast(1.0f);
  alignas(64) float errors[blocks_at_once][lane_count];
  for (std::size_t b = 0; b < blocks_at_once; ++b) {
    const floats y = rounded(quotient<Quick>(load(in.x + 16 * b), broadcast(divisors[b]), broadcast(inverses[b])));
    store(errors[b], squared_errors<true, Weighted>(in, 16 * b, y, one));
  }
  return sum_each([&](std::size_t b) TETROMINO_INLINE_LAMBDA { return load(errors[b]); });
}
/// The errors of 16 blocks under these scales, in units of the tensor scale.
TETROMINO_OUTLINE inline floats nvfp4_errors(const block_magnitudes& in, const words& amax, const words& code,
                                             float tensor_scale) {
  const floats scale = decode_e4m3(code), divisor = broadcast(tensor_scale) * scale;
  const floats inverse = broadcast(1.0f) / divisor;
  alignas(64) float divisors[blocks_at_once], inverses[blocks_at_once];
  store(divisors, divisor);
  store(inverses, inverse);
  const auto errors = [&](auto is_quick) {
    return in.weights == nullptr ? divided_errors<is_quick, false>(in, divisors, inverses)
                                 : divided_errors<is_quick, true>(in, divisors, inverses);
  };
  return rounded(scale * scale) * (has_quick_quotients(amax, divisor, inverse)
                                       ? errors(std::bool_constant<has_fused_products>{})
                                       : errors(std::false_type{}));
}

/// The scale codes under which the largest magnitudes become `largest_value`.
TETROMINO_INLINE words nvfp4_codes(const row_rules& rules, const words& amax, float tensor_scale, float largest_value) {
  const floats a = floats_of(amax);
  const words code = encode_e4m3(a / broadcast(largest_value * tensor_scale));
  if (rules.tiny_blocks == tiny_block_scale::zero) return code;
  return select(a <= broadcast(0.0f), code, max(code, broadcast(1)));
}
/// The scale codes of 16 blocks by the rules that compare errors; from_six are those by the rule amax.
TETROMINO_OUTLINE inline words searched_codes(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                              float tensor_scale, const words& from_six) {
  const flags none = is_zero(from_six);
  const bool is_weighted = in.weights != nullptr;
  words told = broadcast(0);
  words best = broadcast(0);
  if (rules.rule == scale_rule::four_over_six) {
    const words for_six = max(from_six, broadcast(1));  // without a scale, nothing is compared
    const words from_four = nvfp4_codes(rules, amax, tensor_scale, 4.0f);
    const floats six = nvfp4_errors(in, amax, for_six, tensor_scale);
    const floats four = nvfp4_errors(in, amax, max(from_four, broadcast(1)), tensor_scale);
    if (is_weighted) told = told_apart(told, four, six);
    best = select((four < six) | none, from_four, from_six);
  } else {
    floats least = broadcast(0.0f), first = broadcast(0.0f);
    for (std::int32_t step = -8; step <= 8; ++step) {
      const words wanted = from_six + broadcast(step), code = clamp(wanted, 1, e4m3::max_finite_bits);
      const floats error = nvfp4_errors(in, amax, code, tensor_scale);
      const flags exists = is_zero(max(wanted - code, code - wanted));
      const flags better = exists & (is_zero(best) | (error <= least));  // the larger scale wins ties
      if (is_weighted) {
        first = select(exists & is_zero(best), error, first);
        told = select(exists, told_apart(told, error, first), told);
      }
      best = select(better, code, best);
      least = select(better, error, least);
    }
    best = select(none, broadcast(0), best);
  }
  if (!is_weighted) return best;
  // Where weights leave all candidates of a block with the same error, what a search without them gives.
  const flags settled = is_set(told) | none;
  if (all(settled)) return best;
  return select(settled, best, searched_codes(rules, in.without_weights(), amax, tensor_scale, from_six));
}
/// The scale codes of 16 blocks. `in` is for the rules that compare errors.
TETROMINO_INLINE words nvfp4_codes(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                   float tensor_scale) {
  if (tensor_scale == 0) return broadcast(0);
  const words from_six = nvfp4_codes(rules, amax, tensor_scale, 6.0f);
  if (rules.rule == scale_rule::amax) return from_six;
  // in memory, where the rule amax needs none
  const words first = from_six;  // NOLINT(performance-unnecessary-copy-initialization)
  return searched_codes(rules, in, amax, tensor_scale, first);
}

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
