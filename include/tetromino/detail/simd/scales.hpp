#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// How 16 blocks side by side get their scales: lane b belongs to block b.

#if TETROMINO_SIMD

#include "../../scaling.hpp"  // carry_of, macro_factor
#include "../row.hpp"         // row_rules
#include "estimates.hpp"      // block_columns, estimated_errors, least_estimate
#include "isa.hpp"            // floats, words, snap, sum_each

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int32_t, std::uint32_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

// Numbers -------------------------------------------------------------------------------------------------------------

TETROMINO_INLINE words clamp(const words& a, std::int32_t least, std::int32_t most) {
  return min(max(a, broadcast(least)), broadcast(most));
}
/// Where a small number that is not negative is zero.
TETROMINO_INLINE flags is_zero(const words& a) { return floats_of(a | broadcast(0x3F800000)) <= broadcast(1.0f); }
/// 1 where a flag is set.
TETROMINO_INLINE words ones_of(const flags& a) { return select(a, broadcast(1), broadcast(0)); }
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
/// The values of codes of E4M3 from 1 to 126.
TETROMINO_INLINE floats scale_value(const words& code) {
  const words mantissa = shift_left<20>(code);
  const floats normal = floats_of(mantissa + broadcast(120 << 23));
  return select(normal < broadcast(0x1p-6f), floats_of(mantissa + broadcast(121 << 23)) - broadcast(0x1p-6f), normal);
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

// The errors of the specification are summed up in its order: lane by lane, then by halves. They decide where estimates
// are too close to tell: not for blocks that are `decided`, 1, which get any outcome.

/// Adds the squared errors of block b, once multiplied by m, against the grid of E2M1 times s.
TETROMINO_OUTLINE inline void add_errors(const block_magnitudes& in, std::size_t b, const floats& m, const floats& s,
                                         float* sums) {
  floats sum = load(sums);
  for (std::size_t i = b * in.block; i < (b + 1) * in.block; i += lane_count) {
    const floats y = rounded(magnitude(load(in.x + i)) * m), difference = y - snap(min(y, s * broadcast(6.0f)), s);
    const floats square = rounded(difference * difference);
    sum = sum + (in.weights == nullptr ? square : rounded(load(in.weights + i) * square));
  }
  store(sums, sum);
}
/// Lane b is the sum of all lanes of block b.
TETROMINO_OUTLINE inline floats sums_of(const float (&errors)[blocks_at_once][lane_count]) {
  return sum_each([&](std::size_t b) TETROMINO_INLINE_LAMBDA { return load(errors[b]); });
}

/// Where a and b differ, or `told` says so already, 1.
TETROMINO_INLINE words told_apart(const words& told, const floats& a, const floats& b) {
  return select((a < b) | (b < a), broadcast(1), told);
}

/// The squared errors of 16 blocks, each multiplied by what makes its scale 1.
TETROMINO_OUTLINE inline floats scaled_errors(const block_magnitudes& in, const floats& multiplier,
                                              const words& decided) {
  const std::uint32_t open = zero_lanes(decided);
  alignas(64) float to_scale[blocks_at_once], errors[blocks_at_once][lane_count] = {};
  store(to_scale, multiplier);
  for (std::size_t b = 0; b < blocks_at_once; ++b) {
    if ((open >> b & 1u) == 0) continue;
    add_errors(in, b, broadcast(to_scale[b]), broadcast(1.0f), errors[b]);
  }
  return sums_of(errors);
}

/// The scale bytes that min_error compares: `round_up`'s and its neighbours.
TETROMINO_INLINE words near_byte(const words& up, std::int32_t step) { return clamp(up + broadcast(step), 0, 254); }
/// An error in units of `byte`'s scale, in those of `up`'s.
TETROMINO_INLINE floats in_units_of(const words& up, const words& byte, const floats& error) {
  const words twice = byte - up + byte - up;
  return error * floats_of(shift_left<23>(twice + broadcast(127)));
}

/// The scale bytes of min_error, by the errors of the specification.
TETROMINO_COLD inline words exact_least_error_bytes(const block_magnitudes& in, const words& decided, const words& up,
                                                    const floats& factor) {
  words best = up, told = decided;
  floats least = broadcast(1.0f), first = least;
  for (std::int32_t step = 1; step >= -2; --step) {  // the larger scale first: it keeps ties
    const words byte = near_byte(up, step);
    const floats total = in_units_of(up, byte, scaled_errors(in, factor * inverse_power(byte), decided));
    if (step == 1) {
      best = byte;
      least = first = total;
    } else {
      const flags better = total < least;
      best = select(better, byte, best);
      least = select(better, total, least);
      if (in.weights != nullptr) told = told_apart(told, total, first);
    }
  }
  if (in.weights == nullptr || all(is_set(told))) return best;
  return select(is_set(told), best, exact_least_error_bytes(in.without_weights(), told, up, factor));
}

/// Whether each block that is not zero, once multiplied, has an element among its first 16 that is far from whole
/// numbers and below 2: under a scale of 2 it errs by 1/100 more than under 1, and no element errs by less.
TETROMINO_OUTLINE inline bool all_lose_by_doubling(const block_columns& in, const floats& multiplier,
                                                   const words& amax) {
  const floats many = broadcast(0x1.8p23f);  // its sums are whole
  words most = select(floats_of(amax) <= broadcast(0.0f), bits_of(many), broadcast(0));
  for (std::size_t i = 0; i < 16; ++i) {
    const floats y = min(rounded(load(in.x[i]) * multiplier), broadcast(2.0f)), off = y - (y + many - many);
    most = max(most, bits_of(off * off));
  }
  return all(broadcast(0.07f) < floats_of(most));
}
/// Whether each block errs by its largest element alone, 6 `scale` at most, by more than `least`.
TETROMINO_INLINE bool all_lose_by_largest(const floats& largest, const floats& scale, const floats& least) {
  const floats off = largest - scale * broadcast(6.0f);
  return all(least * broadcast(1.01f) + largest * largest * broadcast(0x1p-20f) < off * off);
}

/// The scale bytes of min_error.
TETROMINO_OUTLINE inline words least_error_bytes(const block_magnitudes& in, const block_columns& columns,
                                                 const words& amax, const floats& factor) {
  const words up = closed_form_bytes(part(amax), factor, carry_of(scale_rule::round_up));
  const floats multiplier = factor * inverse_power(up);
  const flags is_empty = floats_of(amax) <= broadcast(0.0f);
  least_estimate search;
  const auto offer = [&](std::int32_t step, std::int32_t next) {
    const words bytes[2] = {near_byte(up, step), near_byte(up, next)};
    const floats one = broadcast(1.0f);
    const error_candidate candidates[2] = {{factor * inverse_power(bytes[0]), one},
                                           {factor * inverse_power(bytes[1]), one}};
    floats errors[2];
    estimate_errors<true>(columns, candidates, 2, errors);
    for (std::size_t i = 0; i < 2; ++i) search.offer(bytes[i], in_units_of(up, bytes[i], errors[i]));
  };
  offer(0, -1);
  const floats largest = select(is_empty, broadcast(6.0f), floats_of(amax) * multiplier);
  const bool loses = in.weights == nullptr && all_lose_by_largest(largest, broadcast(0.25f), search.least()) &&
                     all_lose_by_doubling(columns, multiplier, amax);
  if (!loses) offer(-2, 1);
  const flags settled = search.is_settled(broadcast(0.0f)) | is_empty;
  if (all(settled)) return search.best();
  return select(settled, search.best(), exact_least_error_bytes(in, ones_of(settled), up, factor));
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

/// The macro-block bytes of a search by the errors of the specification, in all lanes of a macro block of `group`
/// blocks; `byte_of` has the scale bytes under a factor.
template <class Bytes>
TETROMINO_COLD words exact_searched_macros(const row_rules& rules, const block_magnitudes& in, const words& decided,
                                           const words& amax, std::size_t group, const Bytes& byte_of) {
  // In units of the largest magnitude's power of two, nothing overflows and what underflows has no weight.
  const words unit = exponent_field(group_max(amax, group));
  alignas(64) float x[blocks_at_once * 32];
  alignas(64) float to_unit[blocks_at_once];
  store(to_unit, inverse_power(unit));
  for (std::size_t i = 0; i < blocks_at_once * in.block; i += lane_count) {
    store(x + i, load(in.x + i) * broadcast(to_unit[i / in.block]));
  }
  const block_magnitudes scaled{x, in.weights, in.block};
  const std::int32_t spacing = rules.macro == macro_rule::search ? 16 : 1;
  const std::uint32_t open = zero_lanes(decided);
  std::int32_t best[blocks_at_once] = {}, told[blocks_at_once];
  store(told, decided);
  float least[blocks_at_once] = {}, of_first[blocks_at_once] = {};
  for (std::int32_t m = 0; m < 256; m += spacing) {
    const float factor = macro_factor(static_cast<std::uint8_t>(m));
    alignas(64) float scale[blocks_at_once], errors[blocks_at_once][lane_count] = {}, totals[blocks_at_once];
    const words byte = byte_of(in, decided, broadcast(factor));
    store(scale, floats_of(shift_left<23>(max(byte - unit + broadcast(127), broadcast(1)))));
    for (std::size_t begin = 0; begin < blocks_at_once; begin += group) {
      if ((open >> begin & 1u) == 0) continue;
      for (std::size_t b = begin; b < begin + group; ++b) {
        add_errors(scaled, b, broadcast(factor), broadcast(scale[b]), errors[begin]);
      }
    }
    store(totals, sums_of(errors) / broadcast(factor * factor));
    for (std::size_t begin = 0; begin < blocks_at_once; begin += group) {
      const float total = totals[begin];
      if (m == 0) of_first[begin] = total;
      if (m == 0 || total < least[begin]) {
        best[begin] = m;
        least[begin] = total;
      }
      told[begin] |= static_cast<std::int32_t>(total < of_first[begin] || of_first[begin] < total);
    }
  }
  for (std::size_t b = 0; b < blocks_at_once; ++b) {
    best[b] = best[b / group * group];
    told[b] = told[b / group * group];
  }
  if (in.weights == nullptr) return load(best);
  const words settled = load(told);
  if (all(is_set(settled))) return load(best);
  return select(is_set(settled), load(best),
                exact_searched_macros(rules, in.without_weights(), settled, amax, group, byte_of));
}

/// The sum of each group of `group` lanes, in all of its lanes.
TETROMINO_INLINE floats group_sum(floats a, std::size_t group) {
  if (group > 1) a = a + floats_of(exchange<1>(bits_of(a)));
  if (group > 2) a = a + floats_of(exchange<2>(bits_of(a)));
  if (group > 4) a = a + floats_of(exchange<4>(bits_of(a)));
  if (group > 8) a = a + floats_of(exchange<8>(bits_of(a)));
  return a;
}

/// The macro-block bytes of a search, in all lanes of a macro block of `group` blocks.
TETROMINO_OUTLINE inline words searched_macros(const row_rules& rules, const block_magnitudes& in,
                                               const block_columns& columns, const words& amax, std::size_t group) {
  const words largest_amax = group_max(amax, group), unit = exponent_field(largest_amax);
  const flags is_empty = floats_of(largest_amax) <= broadcast(0.0f);
  const floats to_unit = inverse_power(unit),
               largest = select(floats_of(amax) <= broadcast(0.0f), floats_of(largest_amax), floats_of(amax));
  const bool is_min_error = rules.rule == scale_rule::min_error, is_weighted = in.weights != nullptr;
  const std::uint32_t carry = carry_of(is_min_error ? scale_rule::round_up : rules.rule);
  const std::int32_t spacing = rules.macro == macro_rule::search ? 16 : 1;
  const parted_amax parts = part(amax);
  // closed_form_bytes as exponents of scales in that unit, the least of which is that of byte 0
  const words offset = parts.field - unit - broadcast(2), lowest = max(broadcast(127) - unit, broadcast(1));
  const bool is_clamped = is_weighted || is_min_error || rules.rule == scale_rule::floor;
  const auto estimate = is_clamped ? &estimate_errors<true> : &estimate_errors<false>;
  constexpr std::size_t at_once = 16;  // candidates: none has to wait for another's outcome
  least_estimate search;
  for (std::int32_t first = 0; first < 256; first += spacing * static_cast<std::int32_t>(at_once)) {
    float factors[at_once];
    words exponents[at_once];
    error_candidate candidates[at_once];
    floats errors[at_once];
    for (std::size_t i = 0; i < at_once; ++i) {
      factors[i] = macro_factor(static_cast<std::uint8_t>(first + spacing * static_cast<std::int32_t>(i)));
      const floats factor = broadcast(factors[i]), scaled = rounded(factor * parts.rest);
      const words raised = shift_right<23>(bits_of(scaled) + broadcast(static_cast<std::int32_t>(carry)));
      exponents[i] = max(raised + offset, lowest);
      candidates[i] = {factor * to_unit, floats_of(shift_left<23>(exponents[i]))};
    }
    estimate(columns, candidates, at_once, errors);
    // The scale of min_error is one of four, the largest of which errs by as much as the next one at least.
    for (std::int32_t steps = 1; is_min_error && steps <= 2; ++steps) {
      bool loses = steps == 2 && !is_weighted;
      for (std::size_t i = 0; i < at_once; ++i) {
        error_candidate& c = candidates[i];
        c.scale = floats_of(shift_left<23>(max(exponents[i] - broadcast(steps), lowest)));
        loses = loses && all_lose_by_largest(largest * c.multiplier, c.scale, errors[i]);
      }
      if (loses) break;
      floats others[at_once];
      estimate(columns, candidates, at_once, others);
      for (std::size_t i = 0; i < at_once; ++i) errors[i] = min(errors[i], others[i]);
    }
    for (std::size_t i = 0; i < at_once; ++i) {
      search.offer(broadcast(first + spacing * static_cast<std::int32_t>(i)),
                   group_sum(errors[i], group) * broadcast(1 / (factors[i] * factors[i])));
    }
  }
  // Under weights so large that errors over a block's own scale overflow, min_error does not heed them.
  const flags overflows =
      broadcast(0x1p100f) <=
      floats_of(is_weighted && is_min_error ? group_max(largest_weights(columns), group) : broadcast(0));
  const flags settled = (search.is_settled(select(overflows, broadcast(0x1p127f), broadcast(0.0f)))) | is_empty;
  if (all(settled)) return search.best();
  const auto byte_of = [&](const block_magnitudes& blocks, const words& decided, const floats& factor) {
    const words byte = closed_form_bytes(parts, factor, carry);
    return is_min_error ? exact_least_error_bytes(blocks, decided, byte, factor) : byte;
  };
  return select(settled, search.best(), exact_searched_macros(rules, in, ones_of(settled), amax, group, byte_of));
}

// NVFP4 ---------------------------------------------------------------------------------------------------------------

/// x / divisor, near enough for its code of E2M1; `inverse` is 1 / divisor. After one correction by the exact remainder
/// it lies on the quotient's side of each midpoint between values of E2M1. (All mantissas of the divisor were tried,
/// with the floats around each midpoint times it.)
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

/// The errors of 16 blocks under these scales, in units of the tensor scale, as the specification adds them up.
TETROMINO_OUTLINE inline floats nvfp4_errors(const block_magnitudes& in, const words& code, float tensor_scale,
                                             const words& decided) {
  const floats scale = decode_e4m3(code);
  const std::uint32_t open = zero_lanes(decided);
  alignas(64) float divisors[blocks_at_once], errors[blocks_at_once][lane_count] = {}, over[16 * blocks_at_once];
  store(divisors, broadcast(tensor_scale) * scale);
  for (std::size_t b = 0; b < blocks_at_once; ++b) {
    if ((open >> b & 1u) == 0) continue;
    store(over + 16 * b, load(in.x + 16 * b) / broadcast(divisors[b]));
    add_errors({over, in.weights, 16}, b, broadcast(1.0f), broadcast(1.0f), errors[b]);
  }
  return rounded(scale * scale) * sums_of(errors);
}

/// The scale codes under which the largest magnitudes become `largest_value`.
TETROMINO_INLINE words nvfp4_codes(const row_rules& rules, const words& amax, float tensor_scale, float largest_value) {
  const floats a = floats_of(amax);
  const words code = encode_e4m3(a / broadcast(largest_value * tensor_scale));
  if (rules.tiny_blocks == tiny_block_scale::zero) return code;
  return select(a <= broadcast(0.0f), code, max(code, broadcast(1)));
}
/// The scale codes of 16 blocks by the rules that compare errors, by those of the specification; from_six are those by
/// the rule amax, from_four those for the largest magnitudes to become 4.
TETROMINO_COLD inline words exact_searched_codes(const row_rules& rules, const block_magnitudes& in,
                                                 const words& decided, float tensor_scale, const words& from_six,
                                                 const words& from_four) {
  const bool is_weighted = in.weights != nullptr;
  words told = decided, best = broadcast(0);
  if (rules.rule == scale_rule::four_over_six) {
    const floats six = nvfp4_errors(in, max(from_six, broadcast(1)), tensor_scale, decided);
    const floats four = nvfp4_errors(in, max(from_four, broadcast(1)), tensor_scale, decided);
    if (is_weighted) told = told_apart(told, four, six);
    best = select(four < six, from_four, from_six);
  } else {
    floats least = broadcast(0.0f), first = broadcast(0.0f);
    for (std::int32_t step = -8; step <= 8; ++step) {
      const words wanted = from_six + broadcast(step), code = clamp(wanted, 1, e4m3::max_finite_bits);
      const floats error = nvfp4_errors(in, code, tensor_scale, decided);
      const flags exists = is_zero(max(wanted - code, code - wanted));
      const flags better = exists & (is_zero(best) | (error <= least));  // the larger scale wins ties
      if (is_weighted) {
        first = select(exists & is_zero(best), error, first);
        told = select(exists, told_apart(told, error, first), told);
      }
      best = select(better, code, best);
      least = select(better, error, least);
    }
  }
  // Where weights leave all candidates of a block with the same error, what a search without them gives.
  if (!is_weighted || all(is_set(told))) return best;
  return select(is_set(told), best,
                exact_searched_codes(rules, in.without_weights(), told, tensor_scale, from_six, from_four));
}

/// The scale codes of 16 blocks by the rules that compare errors.
TETROMINO_OUTLINE inline words searched_codes(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                              float tensor_scale, const words& from_six) {
  const flags none = is_zero(from_six);
  const words from_four = nvfp4_codes(rules, amax, tensor_scale, 4.0f);
  const floats one = broadcast(1.0f), tensor = broadcast(tensor_scale);
  const bool is_min_error = rules.rule == scale_rule::min_error;
  // without a scale, nothing is compared
  const auto decided_by = [&](const flags& settled, const words& best) {
    const words code =
        all(settled) ? best
                     : select(settled, best,
                              exact_searched_codes(rules, in, ones_of(settled), tensor_scale, from_six, from_four));
    return select(none, is_min_error ? broadcast(0) : from_four, code);
  };
  const floats least_scale = scale_value(clamp(from_six - broadcast(8), 1, e4m3::max_finite_bits));
  const floats least_divisor = tensor * least_scale, inverse = one / least_divisor;
  if (!all((broadcast(0x1p-60f) <= least_divisor) & (least_divisor <= broadcast(0x1p60f)) &
           (floats_of(amax) * inverse <= broadcast(0x1p20f)))) {
    return decided_by(none, from_six);
  }
  // Then a product with an inverse is within 3 x 2^-24 of the quotient, and so are differences from the grid; roots of
  // sums of their squares differ by no more than that share of the root of the sum of the quotients' squares. Twice
  // that, squared, over what the margin of is_settled leaves of 2^-17:
  const block_columns columns(in);
  const floats largest = floats_of(amax) / tensor;
  const floats slack = sum_of_squares(columns, inverse) * least_scale * least_scale * broadcast(0x1p-24f);
  least_estimate search;
  constexpr std::size_t at_once = 10;
  const auto offer = [&](const words* wanted, std::size_t count) {  // leaving out codes that there are not
    words codes[at_once];
    error_candidate candidates[at_once];
    floats scales[at_once], errors[at_once];
    for (std::size_t i = 0; i < count; ++i) {
      codes[i] = clamp(wanted[i], 1, e4m3::max_finite_bits);
      scales[i] = scale_value(codes[i]);
      candidates[i] = {one / (tensor * scales[i]), one};
    }
    estimate_errors<true>(columns, candidates, count, errors);
    for (std::size_t i = 0; i < count; ++i) {
      const flags exists = is_zero(max(wanted[i] - codes[i], codes[i] - wanted[i]));
      search.offer(codes[i], select(exists, scales[i] * scales[i] * errors[i], broadcast(0x1p126f)));
    }
  };
  if (is_min_error) {
    words wanted[at_once];
    for (std::size_t i = 0; i < at_once; ++i) wanted[i] = from_six + broadcast(static_cast<std::int32_t>(i) - 1);
    offer(wanted, 10);
    // Under smaller scales, the largest elements alone may err by more, and by more the smaller the scale is.
    const floats clear = select(none, broadcast(0x1p60f), largest);
    wanted[7] = broadcast(0);
    for (std::size_t i = 0; i < 7; ++i) wanted[i] = from_six - broadcast(static_cast<std::int32_t>(i) + 2);
    for (std::size_t i = 0; i < 8; i += 2) {
      const floats scale = scale_value(clamp(wanted[i], 1, e4m3::max_finite_bits));
      if (in.weights == nullptr && all_lose_by_largest(clear, scale, search.least())) break;
      offer(wanted + i, 2);
    }
  } else {
    const words wanted[2] = {max(from_six, broadcast(1)), max(from_four, broadcast(1))};
    offer(wanted, 2);
  }
  return decided_by(search.is_settled(slack) | none, search.best());
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

TETROMINO_VECTOR_CODE_END

#endif
