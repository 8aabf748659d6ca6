#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

#if TETROMINO_SIMD

#include "../../e2m1.hpp"        // e2m1
#include "../../e4m3.hpp"        // e4m3
#include "../../e8m0.hpp"        // e8m0
#include "../../rounding.hpp"    // round_stochastic, philox4x32
#include "../finite_scales.hpp"  // finite_exponent, finite_scale
#include "../row.hpp"            // row_rules, packed_row, input_row, admit
#include "blocks.hpp"            // floats, words, block_amax, encode_e2m1, e2m1_decoder
#include "hadamard.hpp"          // simd_rotation
#include "scales.hpp"            // closed_form_bytes, searched_macros, nvfp4_codes

#include <algorithm>  // std::min, std::max, std::copy_n, std::fill
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Row kernels on vectors, 16 blocks at a time; byte for byte what scalar_kernels give.
struct simd_kernels : simd_rotation {
  /// See scalar_kernels::amax.
  template <real T>
  static float amax(const T* x, std::size_t n, special_values special) {
    constexpr std::size_t span = 32 * blocks_at_once;
    words largest = broadcast(0);
    for (std::size_t k = 0; k < n; k += span) {
      T padded[span];
      const bool whole = n - k >= span;
      if (!whole) pad(x + k, n - k, padded, span);
      words amax = block_amax<32>(whole ? x + k : padded);
      if (any_at_least(amax, infinity)) {
        if (whole) std::copy_n(x + k, span, padded);
        if (special == special_values::saturate) {
          std::replace_if(
              padded, padded + span, [](T v) { return !is_finite(to_float(v)); }, T{});
        } else {
          sanitize<16>(special, padded, span);
        }
        amax = block_amax<32>(padded);
      }
      largest = max(largest, amax);
    }
    std::int32_t lane[lane_count];
    store(lane, group_max(largest, lane_count));
    return detail::bit_cast<float>(lane[0]);
  }

  /// See scalar_kernels::quantize_row.
  template <real T>
  static std::size_t quantize_row(const row_rules& rules, const input_row<T>& in, const packed_row<std::uint8_t>& out) {
    if (rules.format.scale == scale_type::e4m3) return quantize_blocks<16, true>(rules, in, out);
    if (rules.format.block == 16) return quantize_blocks<16, false>(rules, in, out);
    return quantize_blocks<32, false>(rules, in, out);
  }

  /// See scalar_kernels::dequantize_row.
  template <real T>
  static void dequantize_row(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t cols,
                             T* out) {
    if (format.block == 16) return dequantize_blocks<16>(format, in, cols, out);
    return dequantize_blocks<32>(format, in, cols, out);
  }

  /// The same past the caches, for output that they could not hold anyway.
  template <real T>
  static void dequantize_row_past_caches(const any_format& format, const packed_row<const std::uint8_t>& in,
                                         std::size_t cols, T* out) {
    if (format.block == 16) return dequantize_past_caches<16>(format, in, cols, out);
    return dequantize_past_caches<32>(format, in, cols, out);
  }

 private:
  template <std::size_t Block, real T>
  static void dequantize_past_caches(const any_format& format, const packed_row<const std::uint8_t>& in,
                                     std::size_t cols, T* out) {
    constexpr std::size_t span = Block * blocks_at_once, line = 64 / sizeof(T);
    const std::size_t macro = format.macro_block;
    alignas(64) T staged[line + span];
    // staged[0] belongs at an address that is a multiple of 64; the first `begin` elements are not ours.
    std::size_t begin = reinterpret_cast<std::uintptr_t>(out) % 64 / sizeof(T), filled = begin;
    for (std::size_t k = 0; k < cols; k += span) {
      const std::size_t n = std::min(span, cols - k);
      dequantize_blocks<Block>(
          format,
          {in.codes + k / 2, in.scales + k / Block, macro == 0 ? nullptr : in.macros + k / macro, in.tensor_scale}, n,
          staged + filled);
      filled += n;
      std::size_t done = 0;
      if (begin != 0 && filled >= line) {
        out = std::copy(staged + begin, staged + line, out);
        begin = 0;
        done = line;
      }
      for (; done + line <= filled; done += line, out += line) stream_line(out, staged + done);
      if (done != 0) std::copy(staged + done, staged + filled, staged);
      filled -= done;
    }
    std::copy(staged + begin, staged + filled, out);
    end_streaming();
  }

  template <std::size_t Block, real T>
  static void dequantize_blocks(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t cols,
                                T* out) {
    constexpr std::size_t span = Block * blocks_at_once;
    const std::size_t macro = format.macro_block;
    for (std::size_t k = 0; k < cols; k += span) {
      const std::size_t n = std::min(span, cols - k);
      const packed_row<const std::uint8_t> from{in.codes + k / 2, in.scales + k / Block,
                                                macro == 0 ? nullptr : in.macros + k / macro, in.tensor_scale};
      if (n == span) {
        unpack<Block>(format, from, span, out + k);
        continue;
      }
      std::uint8_t codes[span / 2], scales[blocks_at_once], macros[blocks_at_once];
      T x[span];
      const std::size_t blocks = (n + Block - 1) / Block;
      pad(from.codes, blocks * (Block / 2), codes, span / 2);
      pad(from.scales, blocks, scales, blocks_at_once);
      if (macro != 0) pad(from.macros, (n + macro - 1) / macro, macros, blocks_at_once);
      unpack<Block>(format, {codes, scales, macros, in.tensor_scale}, n, x);
      std::copy_n(x, n, out + k);
    }
  }

  /// Unpacks n elements of 16 blocks, rounded up to 32.
  template <std::size_t Block, real T>
  TETROMINO_INLINE static void unpack(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t n,
                                      T* out) {
    const words bytes = load_bytes(in.scales);
    const floats scales =
        format.scale == scale_type::e4m3 ? broadcast(in.tensor_scale) * decode_e4m3(bytes) : decode_e8m0(bytes);
    float scale[blocks_at_once];
    store(scale, scales);
    if (!is_split<T> || any_at_least(bits_of(magnitude(scales)), infinity)) {
      unpack_with<Block>(format, in, n, out, scale, unpack_in_order{});
    } else if (format.scale == scale_type::e8m0 && format.macro_block == 0) {
      unpack_with<Block>(format, in, n, out, scale, unpack_split<false>{});
    } else {
      unpack_with<Block>(format, in, n, out, scale, unpack_split<true>{});
    }
  }

  /// step(out, decode, codes, scale) does 32 elements.
  template <std::size_t Block, real T, class Step>
  TETROMINO_INLINE static void unpack_with(const any_format& format, const packed_row<const std::uint8_t>& in,
                                           std::size_t n, T* out, const float* scale, const Step& step) {
    const std::size_t macro = format.macro_block == 0 ? n : format.macro_block;
    for (std::size_t begin = 0; begin < n; begin += macro) {
      const e2m1_decoder decode =
          format.macro_block == 0 ? e2m1_decoder() : e2m1_decoder(macro_factor(in.macros[begin / macro]));
      for (std::size_t k = begin; k < std::min(n, begin + macro); k += 32) {
        step.template operator()<Block>(out + k, decode, in.codes + k / 2, scale + k / Block);
      }
    }
  }
  struct unpack_in_order {
    template <std::size_t Block, real T>
    TETROMINO_INLINE void operator()(T* out, const e2m1_decoder& decode, const std::uint8_t* codes,
                                     const float* scale) const {
      const floats_pair q = decode(codes);
      store(out, q.first * broadcast(scale[0]));
      store(out + lane_count, q.second * broadcast(scale[lane_count / Block]));
    }
  };
  /// bfloat16, without NaN. An element of a plain MX format times its scale is one already.
  template <bool Rounds>
  struct unpack_split {
    template <std::size_t Block, real T>
    TETROMINO_INLINE void operator()(T* out, const e2m1_decoder& decode, const std::uint8_t* codes,
                                     const float* scale) const {
      const floats_pair q = decode.split(codes), s = spread<bfloat16, Block>(scale);
      const floats even = q.first * s.first, odd = q.second * s.second;
      store_words(out, Rounds ? join_upper_halves(round_bfloat16(even), round_bfloat16(odd))
                              : join_upper_halves(bits_of(even), bits_of(odd)));
    }
  };

  static constexpr std::size_t far_ahead = 4096;  // bytes; hardware looks ahead too, but not as far as this work needs
  static constexpr std::int32_t infinity = 0x7F800000;
  /// The bits of the least magnitude for which a scale may have to be lowered.
  template <real T>
  static constexpr std::int32_t unsafe = detail::bit_cast<std::int32_t>(safely_finite<T>);

  template <class T>
  static void pad(const T* x, std::size_t n, T* out, std::size_t size) {
    std::copy_n(x, n, out);
    std::fill(out + n, out + size, T{});
  }

  /// Makes x[n] finite, as the saturating or the poisoning policy wants it; returns which blocks are poisoned.
  template <std::size_t Block, real T>
  static std::uint32_t sanitize(special_values special, T* x, std::size_t n) {
    std::uint32_t poisoned = 0;
    for (std::size_t k = 0; k < n; k += Block) {
      bool finite = true;
      for (std::size_t i = k; i < k + Block; ++i) {
        if (is_finite(to_float(x[i]))) continue;
        x[i] = from_float<T>(admit(x[i], special));
        finite = finite && is_finite(to_float(x[i]));
      }
      if (finite) continue;
      std::fill(x + k, x + k + Block, T{});
      poisoned |= std::uint32_t{1} << (k / Block % 32);
    }
    return poisoned;
  }

  /// How the elements of 16 blocks become E2M1: times a power of two and a macro-block factor, or over a divisor.
  struct element_scales {
    float multiplier[blocks_at_once];   // MX: f 2^-E. NVFP4: 1 / divisor
    float divisor[blocks_at_once];      // NVFP4
    float factor[blocks_at_once];       // MX: f
    std::int32_t amax[blocks_at_once];  // bits
    std::uint32_t empty;                // blocks whose codes are all 0
    bool quick;                         // NVFP4: quotients can be had from inverses
  };
  /// The first n elements of 16 blocks, all of them finite and with zeros after the n-th, and their scales.
  template <class T>
  struct span_of_blocks {
    const T* x;
    std::size_t n;
    std::uint64_t first_index;
    packed_row<std::uint8_t> out;
    element_scales scales;
  };

  template <std::size_t Block, bool Nvfp4, real T>
  static std::size_t quantize_blocks(const row_rules& rules, const input_row<T>& in,
                                     const packed_row<std::uint8_t>& out) {
    constexpr std::size_t span = Block * blocks_at_once;
    const std::size_t macro = rules.format.macro_block;
    // Scales are chosen one span ahead of the elements: meanwhile the next span comes from memory, and what waits for
    // the scales does not wait for long.
    span_of_blocks<T> spans[2];
    std::size_t next = 0;
    bool is_waiting = false;
    const auto store_waiting = [&] {
      if (is_waiting) store_elements<Block, Nvfp4>(rules, spans[1 - next]);
      is_waiting = false;
    };
    for (std::size_t k = 0; k < in.cols; k += span) {
      const std::size_t n = std::min(span, in.cols - k);
      const std::uint64_t index = in.first_index + k;
      const packed_row<std::uint8_t> to{out.codes + k / 2, out.scales + k / Block,
                                        macro == 0 ? nullptr : out.macros + k / macro, out.tensor_scale};
      const float* weights = in.weights == nullptr ? nullptr : in.weights + k;
      if (n == span) {
        const words amax = block_amax<Block>(in.data + k);
        if (!any_at_least(amax, unsafe<T>)) {
          spans[next].x = in.data + k;
          spans[next].n = span;
          spans[next].first_index = index;
          spans[next].out = to;
          choose_scales<Block, Nvfp4>(rules, weights, amax, spans[next]);
          store_waiting();
          is_waiting = true;
          next = 1 - next;
          continue;
        }
      }
      store_waiting();
      // The tail of a row, or elements that are not finite or so large that the next scale may make them infinite:
      // through copies of everything.
      T x[span];
      float padded_weights[span];
      std::uint8_t codes[span / 2], scales[blocks_at_once], macros[blocks_at_once];
      pad(in.data + k, n, x, span);
      if (weights != nullptr) pad(weights, n, padded_weights, span);
      words amax = block_amax<Block>(x);
      std::uint32_t poisoned = 0;
      if (any_at_least(amax, infinity)) {
        if (rules.special == special_values::reject) {
          while (is_finite(to_float(in.data[k]))) ++k;
          return k;
        }
        poisoned = sanitize<Block>(rules.special, x, span);
        amax = block_amax<Block>(x);
      }
      span_of_blocks<T> padded{x, n, index, {codes, scales, macros, out.tensor_scale}, {}};
      choose_scales<Block, Nvfp4>(rules, weights == nullptr ? nullptr : padded_weights, amax, padded);
      if (any_at_least(amax, unsafe<T>)) keep_finite<Nvfp4>(rules, padded);
      store_elements<Block, Nvfp4>(rules, padded);
      for (std::size_t b = 0; b < blocks_at_once; ++b) {
        if ((poisoned >> b & 1u) != 0) scales[b] = Nvfp4 ? e4m3::nan_bits : e8m0::nan_bits;
      }
      const std::size_t blocks = (n + Block - 1) / Block;
      std::copy_n(codes, blocks * (Block / 2), to.codes);
      std::copy_n(scales, blocks, to.scales);
      if (macro != 0) std::copy_n(macros, (n + macro - 1) / macro, to.macros);
    }
    store_waiting();
    return in.cols;
  }

  template <std::size_t Block, bool Nvfp4, class T>
  static void choose_scales(const row_rules& rules, const float* weights, const words& amax, span_of_blocks<T>& span) {
    const bool compares = Nvfp4 ? rules.rule != scale_rule::amax
                                : rules.rule == scale_rule::min_error ||
                                      (rules.format.macro_block != 0 && rules.macro != macro_rule::from_amax);
    store(span.scales.amax, amax);
    if (!compares) {
      return choose_scales<Nvfp4>(rules, block_magnitudes<Block, false>{}, amax, span.out, span.scales);
    }
    alignas(64) float x[Block * blocks_at_once];
    for (std::size_t i = 0; i < Block * blocks_at_once; i += lane_count) store(x + i, magnitude(load(span.x + i)));
    if (weights == nullptr) {
      choose_scales<Nvfp4>(rules, block_magnitudes<Block, false>{x, nullptr}, amax, span.out, span.scales);
    } else {
      choose_scales<Nvfp4>(rules, block_magnitudes<Block, true>{x, weights}, amax, span.out, span.scales);
    }
  }

  template <bool Nvfp4, std::size_t Block, bool Weighted>
  static void choose_scales(const row_rules& rules, const block_magnitudes<Block, Weighted>& in, const words& amax,
                            const packed_row<std::uint8_t>& out, element_scales& scales) {
    if constexpr (Nvfp4) {
      const words code = nvfp4_codes(rules, in, amax, out.tensor_scale);
      const floats divisor = broadcast(out.tensor_scale) * decode_e4m3(code);
      scales.empty = zero_lanes(amax) | zero_lanes(bits_of(divisor));
      const floats usable = select(is_zero(code), broadcast(1.0f), divisor), inverse = broadcast(1.0f) / usable;
      scales.quick = has_quick_quotients(amax, usable, inverse);
      store(scales.divisor, usable);
      store(scales.multiplier, inverse);
      store_bytes(out.scales, code);
    } else {
      const std::size_t macro = rules.format.macro_block;
      floats factor = broadcast(1.0f);
      if (macro != 0) {
        const std::size_t group = macro / Block;
        const words m = rules.macro == macro_rule::from_amax ? static_macros(group_max(amax, group))
                                                             : searched_macros(rules, in, amax, group);
        std::int32_t lane[lane_count];
        store(lane, m);
        for (std::size_t i = 0; i * group < lane_count; ++i) out.macros[i] = static_cast<std::uint8_t>(lane[i * group]);
        factor = macro_factors(m);
      }
      words byte;
      if (rules.rule == scale_rule::min_error) {
        byte = select(floats_of(amax) <= broadcast(0.0f), broadcast(0), least_error_bytes(in, amax, factor));
      } else if (macro == 0) {
        byte = closed_form_bytes(amax, carry_of(rules.rule));
      } else {
        byte = closed_form_bytes(amax, factor, carry_of(rules.rule));
      }
      scales.empty = zero_lanes(amax);
      store(scales.factor, factor);
      store(scales.multiplier, factor * inverse_power(byte));
      store_bytes(out.scales, byte);
    }
  }

  /// Lowers the scales under which elements would decode to infinities.
  template <bool Nvfp4, class T>
  static void keep_finite(const row_rules& rules, span_of_blocks<T>& span) {
    element_scales& scales = span.scales;
    for (std::size_t b = 0; b < blocks_at_once; ++b) {
      if (scales.amax[b] < unsafe<T>) continue;
      const float amax = detail::bit_cast<float>(scales.amax[b]);
      std::uint8_t& byte = span.out.scales[b];
      if constexpr (Nvfp4) {
        byte = finite_scale(e4m3::from_bits(byte), amax, span.out.tensor_scale, rules.rounding, overflow_of<T>).bits;
        if (byte == 0) continue;
        scales.divisor[b] = detail::rounded(span.out.tensor_scale * e4m3::from_bits(byte).value());
        scales.quick = false;
      } else {
        const int exponent = finite_exponent(byte - 127, amax, scales.factor[b], rules.rounding, overflow_of<T>);
        byte = e8m0::from_exponent(exponent).bits;
        scales.multiplier[b] = scales.factor[b] * e8m0::from_exponent(-exponent).value();
      }
    }
  }

  template <std::size_t Block, bool Nvfp4, class T>
  static void store_elements(const row_rules& rules, const span_of_blocks<T>& span) {
    const element_scales& scales = span.scales;
    if (rules.rounding == element_rounding::stochastic) {
      store_stochastic<Block, Nvfp4>(rules, span);
    } else if constexpr (!Nvfp4) {
      store_nearest<Block>(span, [&](const floats_pair& v, std::size_t b) TETROMINO_INLINE_LAMBDA {
        const floats_pair m = spread<T, Block>(scales.multiplier + b);
        return floats_pair{v.first * m.first, v.second * m.second};
      });
    } else if (scales.quick) {
      store_nearest<Block>(span, [&](const floats_pair& v, std::size_t b) TETROMINO_INLINE_LAMBDA {
        const floats_pair d = spread<T, Block>(scales.divisor + b), i = spread<T, Block>(scales.multiplier + b);
        return floats_pair{quotient_for_code(v.first, d.first, i.first),
                           quotient_for_code(v.second, d.second, i.second)};
      });
    } else {
      store_nearest<Block>(span, [&](const floats_pair& v, std::size_t b) TETROMINO_INLINE_LAMBDA {
        const floats_pair d = spread<T, Block>(scales.divisor + b);
        return floats_pair{v.first / d.first, v.second / d.second};
      });
    }
    for (std::size_t b = 0; b < blocks_at_once && scales.empty >> b != 0; ++b) {
      if ((scales.empty >> b & 1u) != 0 && b * Block < span.n)
        std::fill_n(span.out.codes + b * (Block / 2), Block / 2, std::uint8_t{0});
    }
  }

  /// The scales of the elements that load_pair gives, when the first of them belongs to the block of scale[0].
  template <class T, std::size_t Block>
  TETROMINO_INLINE static floats_pair spread(const float* scale) {
    if constexpr (Block == 32) {
      const floats one = broadcast(scale[0]);
      return {one, one};
    } else if constexpr (is_split<T>) {
      const floats halves = broadcast_halves(scale[0], scale[1]);
      return {halves, halves};
    } else {
      return {broadcast(scale[0]), broadcast(scale[1])};
    }
  }

  /// Stores the codes of y = rescale(pair of x, its first block), 64 at a time.
  template <std::size_t Block, class T, class Rescale>
  TETROMINO_INLINE static void store_nearest(const span_of_blocks<T>& span, const Rescale& rescale) {
    std::uint8_t* const codes = span.out.codes;
    for (std::size_t k = 0; k < span.n; k += 64) {
      const floats_pair a = load_pair(span.x + k), b = load_pair(span.x + k + 32);
      for (std::size_t i = 0; i < 64 * sizeof(T); i += 64) prefetch(span.x + k, far_ahead + i);
      const floats_pair ya = rescale(a, k / Block), yb = rescale(b, (k + 32) / Block);
      store_codes<T>(codes + k / 2, encode_e2m1(ya.first, a.first), encode_e2m1(ya.second, a.second),
                     encode_e2m1(yb.first, b.first), encode_e2m1(yb.second, b.second));
    }
  }

  /// The same with stochastic rounding, where tiny y matter: in the two steps of the reference.
  template <std::size_t Block, bool Nvfp4, class T>
  static void store_stochastic(const row_rules& rules, const span_of_blocks<T>& span) {
    const auto& [x, n, first_index, out, scales] = span;
    float to_one[blocks_at_once], to_scale[blocks_at_once];
    const words field = exponent_field(load(scales.amax));
    store(to_one, inverse_power(field));
    store(to_scale, floats_of(shift_left<23>(field - load_bytes(out.scales) + broadcast(127))));
    std::fill_n(out.codes, Block * blocks_at_once / 2, std::uint8_t{0});
    philox_words random{};
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint64_t index = first_index + i;
      if (i == 0 || index % 4 == 0) random = philox4x32(index / 4, rules.seed);
      const std::size_t b = i / Block;
      float y = to_float(x[i]);
      if constexpr (Nvfp4) {
        y = y / scales.divisor[b];
      } else {
        y = detail::rounded(scales.factor[b] * (y * to_one[b])) * to_scale[b];
      }
      const unsigned code = round_stochastic(y, uniform(random, index)).bits;
      out.codes[i / 2] = static_cast<std::uint8_t>(out.codes[i / 2] | code << (i % 2 * 4));
    }
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
