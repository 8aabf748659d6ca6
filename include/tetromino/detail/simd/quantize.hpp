#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

#if TETROMINO_SIMD

#include "../../e2m1.hpp"        // e2m1
#include "../../e4m3.hpp"        // e4m3
#include "../../e8m0.hpp"        // e8m0
#include "../../rounding.hpp"    // round_stochastic, philox4x32
#include "../finite_scales.hpp"  // finite_exponent, finite_scale
#include "../row.hpp"            // row_rules, packed_row, input_row, admit
#include "fine.hpp"              // fine_search, spread_eighths, unpack_fine
#include "isa.hpp"               // floats, words, block_amax, encode_e2m1, e2m1_decoder
#include "hadamard.hpp"          // simd_rotation
#include "scales.hpp"            // closed_form_bytes, searched_macros, nvfp4_codes

#include <algorithm>    // std::min, std::max, std::copy_n, std::fill, std::find_if, std::replace_if
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <cstdlib>      // std::abs
#include <type_traits>  // std::is_same_v
#include <utility>      // std::pair

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Row kernels on vectors, 16 blocks at a time; byte for byte what scalar_kernels give. Only what loads and stores
/// elements is compiled for each of their types; what is seldom done works on floats.
struct simd_kernels : simd_rotation {
  /// See scalar_kernels::amax.
  template <real T>
  static float amax(const T* x, std::size_t n, special_values special) {
    constexpr std::size_t span = 32 * blocks_at_once;
    words largest = broadcast(0);
    for (std::size_t k = 0; k < n; k += span) {
      if (n - k >= span) {
        const words amax = amax_of_blocks(32, x + k);
        if (!any_at_least(amax, infinity)) {
          largest = max(largest, amax);
          continue;
        }
      }
      largest = max(largest, amax_of_copy(special, x + k, std::min(span, n - k)));
    }
    std::int32_t lane[lane_count];
    store(lane, group_max(largest, lane_count));
    return detail::bit_cast<float>(lane[0]);
  }

  /// See scalar_kernels::quantize_row.
  template <real T>
  static std::size_t quantize_row(const row_rules& rules, const input_row<T>& in, const packed_row<std::uint8_t>& out) {
    return with_block(rules.format.block, [&]<std::size_t Block>() { return quantize_blocks<Block>(rules, in, out); });
  }

  /// See scalar_kernels::dequantize_row.
  template <real T>
  static void dequantize_row(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t cols,
                             T* out) {
    with_block(format.block, [&]<std::size_t Block>() { dequantize_blocks<Block>(format, in, cols, out); });
  }

  /// The same past the caches, for output that they could not hold anyway.
  template <real T>
  static void dequantize_row_past_caches(const any_format& format, const packed_row<const std::uint8_t>& in,
                                         std::size_t cols, T* out) {
    constexpr std::size_t span = 32 * blocks_at_once, line = 64 / sizeof(T);
    const std::size_t macro = format.macro_block;
    alignas(64) T staged[line + span];
    // staged[0] belongs at an address that is a multiple of 64; the first `begin` elements are not ours.
    std::size_t begin = reinterpret_cast<std::uintptr_t>(out) % 64 / sizeof(T), filled = begin;
    for (std::size_t k = 0; k < cols; k += span) {
      const std::size_t n = std::min(span, cols - k);
      dequantize_row(format,
                     {in.codes + k / 2, in.scales + k / format.block, macro == 0 ? nullptr : in.macros + k / macro,
                      in.tensor_scale},
                     n, staged + filled);
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

 private:
  template <std::size_t Block, real T>
  TETROMINO_OUTLINE static void dequantize_blocks(const any_format& format, const packed_row<const std::uint8_t>& in,
                                                  std::size_t cols, T* out) {
    const std::size_t block = size_of<Block>(format.block), span = block * blocks_at_once, macro = format.macro_block;
    for (std::size_t k = 0; k < cols; k += span) {
      const std::size_t n = std::min(span, cols - k);
      const bool whole = n == span;
      packed_row<const std::uint8_t> from{in.codes + k / 2, in.scales + block_at<Block>(block, k),
                                          macro == 0 ? nullptr : in.macros + k / macro, in.tensor_scale};
      if ((Block != any_size || sizeof(T) == 2) && whole) {  // a loop of known length
        unpack<Block>(format, from, span, out + k);
        continue;
      }
      std::uint8_t codes[16 * blocks_at_once], scales[blocks_at_once], macros[blocks_at_once];
      T x[32 * blocks_at_once];
      if (!whole) {
        const std::size_t blocks = (n + block - 1) / block;
        pad(from.codes, blocks * (block / 2), codes, span / 2);
        pad(from.scales, blocks, scales, blocks_at_once);
        if (macro != 0) pad(from.macros, (n + macro - 1) / macro, macros, blocks_at_once);
        from = {codes, scales, macros, in.tensor_scale};
      }
      unpack<Block>(format, from, n, whole ? out + k : x);
      if (!whole) std::copy_n(x, n, out + k);
    }
  }

  /// Unpacks n elements of 16 blocks, rounded up to 32.
  template <std::size_t Block, real T>
  TETROMINO_INLINE static void unpack(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t n,
                                      T* out) {
    if (format.macro_bits == 2) return unpack_fine(format, in.codes, in.scales, in.macros, n, out);
    const words bytes = load_bytes(in.scales);
    const floats scales =
        format.scale == scale_type::e4m3 ? broadcast(in.tensor_scale) * decode_e4m3(bytes) : decode_e8m0(bytes);
    alignas(64) float scale[blocks_at_once];
    store(scale, scales);
    if constexpr (!is_split<T>) {
      unpack_with<Block>(format, in, n, out, scale, unpack_in_order{});
    } else if (any_at_least(bits_of(magnitude(scales)), infinity)) {
      unpack_with<Block>(format, in, n, out, scale, unpack_in_order{});
    } else if (format.scale == scale_type::e8m0 && format.macro_block == 0) {
      unpack_with<Block>(format, in, n, out, scale, unpack_split<false>{});
    } else {
      unpack_with<Block>(format, in, n, out, scale, unpack_split<true>{});
    }
  }

  /// step(block size, out, decode, codes, scale) does 32 elements.
  template <std::size_t Block, real T, class Step>
  TETROMINO_INLINE static void unpack_with(const any_format& format, const packed_row<const std::uint8_t>& in,
                                           std::size_t n, T* out, const float* scale, const Step& step) {
    const std::size_t block = size_of<Block>(format.block), macro = format.macro_block == 0 ? n : format.macro_block;
    for (std::size_t begin = 0; begin < n; begin += macro) {
      const e2m1_decoder decode =
          format.macro_block == 0 ? e2m1_decoder() : e2m1_decoder(macro_factor(in.macros[begin / macro]));
      for (std::size_t k = begin; k < std::min(n, begin + macro); k += 32) {
        step.template operator()<Block>(block, out + k, decode, in.codes + k / 2, scale + block_at<Block>(block, k));
      }
    }
  }
  struct unpack_in_order {
    template <std::size_t Block, real T>
    TETROMINO_INLINE void operator()(std::size_t block, T* out, const e2m1_decoder& decode, const std::uint8_t* codes,
                                     const float* scale) const {
      const floats_pair q = decode(codes), s = spread<float, Block>(block, scale);
      store(out, q.first * s.first);
      store(out + lane_count, q.second * s.second);
    }
  };
  /// bfloat16, without NaN. An element of a plain MX format times its scale is one already.
  template <bool Rounds>
  struct unpack_split {
    template <std::size_t Block, real T>
    TETROMINO_INLINE void operator()(std::size_t block, T* out, const e2m1_decoder& decode, const std::uint8_t* codes,
                                     const float* scale) const {
      const floats_pair q = decode.split(codes), s = spread<bfloat16, Block>(block, scale);
      const floats even = q.first * s.first, odd = q.second * s.second;
      store_words(out, Rounds ? join_upper_halves(round_bfloat16(even), round_bfloat16(odd))
                              : join_upper_halves(bits_of(even), bits_of(odd)));
    }
  };

  static constexpr std::size_t far_ahead = 8192;  // bytes; hardware looks ahead too, but not as far as this work needs
  static constexpr std::int32_t infinity = 0x7F800000;
  /// What elements' type means for their values, and the bits of the least magnitude for which a scale may have to be
  /// lowered.
  struct type_limits {
    float largest, overflow;
    std::int32_t unsafe;
  };
  template <real T>
  static constexpr type_limits limits_of{largest<T>, overflow_of<T>, detail::bit_cast<std::int32_t>(safely_finite<T>)};

  template <class T>
  static void pad(const T* x, std::size_t n, T* out, std::size_t size) {
    std::copy_n(x, n, out);
    std::fill(out + n, out + size, T{});
  }
  template <real T>
  static void pad_floats(const T* x, std::size_t n, float* out, std::size_t size) {
    std::size_t i = 0;
    for (; i + lane_count <= n; i += lane_count) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = to_float(x[i]);
    std::fill(out + n, out + size, 0.0f);
  }

  /// The largest magnitudes of 16 blocks, as bits.
  template <std::size_t Block, real T>
  TETROMINO_OUTLINE static words amax_of_blocks(std::size_t block, const T* x) {
    return block_amax<Block>(block, x);
  }
  template <real T>
  static words amax_of_blocks(std::size_t block, const T* x) {
    return with_block(block, [&]<std::size_t Block>() { return amax_of_blocks<Block>(block, x); });
  }

  /// The same of 16 blocks of 32 elements, or of the n that exist, without those that tensor scales are not made for:
  /// what is not finite under `saturate`, else 16 elements with such a one.
  template <real T>
  TETROMINO_OUTLINE static words amax_of_copy(special_values special, const T* x, std::size_t n) {
    float padded[32 * blocks_at_once];
    pad_floats(x, n, padded, 32 * blocks_at_once);
    return amax_of_span(special, padded);
  }
  TETROMINO_OUTLINE static words amax_of_span(special_values special, float* x) {
    constexpr std::size_t span = 32 * blocks_at_once;
    const words amax = amax_of_blocks(32, x);
    if (!any_at_least(amax, infinity)) return amax;
    if (special == special_values::saturate) {
      std::replace_if(
          x, x + span, [](float v) { return !is_finite(v); }, 0.0f);
    } else {
      sanitize(special, 0.0f, 16, x, span);
    }
    return amax_of_blocks(32, x);
  }
  /// Makes x[n] finite, as the saturating or the poisoning policy wants it; returns which blocks are poisoned.
  TETROMINO_COLD static std::uint32_t sanitize(special_values special, float largest, std::size_t block, float* x,
                                               std::size_t n) {
    std::uint32_t poisoned = 0;
    for (std::size_t k = 0; k < n; k += block) {
      bool finite = true;
      for (std::size_t i = k; i < k + block; ++i) {
        if (is_finite(x[i])) continue;
        x[i] = admit(x[i], special, largest);
        finite = finite && is_finite(x[i]);
      }
      if (finite) continue;
      std::fill(x + k, x + k + block, 0.0f);
      poisoned |= std::uint32_t{1} << (k / block % 32);
    }
    return poisoned;
  }

  /// What is done to elements: NVFP4 divides, by inverses where quotients can be had from those; factors of 2 bits
  /// multiply eight elements each.
  enum class rescaling : std::uint8_t { multiply, multiply_by_inverse, divide, multiply_eighths };
  /// How the elements of 16 blocks become E2M1: times a power of two and a macro-block factor, or over a divisor.
  struct element_scales {
    alignas(64) float multiplier[blocks_at_once];  // MX: f 2^-E. NVFP4: 1 / divisor
    float divisor[blocks_at_once];                 // NVFP4
    alignas(64) float factor[blocks_at_once];      // MX: f
    alignas(64) float eighths[4][blocks_at_once];  // factors of 2 bits: 1 / f 2^-E
    std::int32_t amax[blocks_at_once];             // bits
    std::uint32_t empty;                           // blocks whose codes are all 0
    rescaling how;
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

  template <std::size_t Block, real T>
  TETROMINO_OUTLINE static std::size_t quantize_blocks(const row_rules& rules, const input_row<T>& in,
                                                       const packed_row<std::uint8_t>& out) {
    const std::size_t block = size_of<Block>(rules.format.block), span = block * blocks_at_once;
    const std::size_t macro = rules.format.macro_block;
    // Scales are chosen one span ahead of the elements: meanwhile the next span comes from memory, and what waits for
    // the scales does not wait for long.
    span_of_blocks<T> spans[2];
    std::size_t next = 0;
    bool is_waiting = false;
    const auto store_waiting = [&] {
      if (is_waiting) store_elements<Block>(rules, spans[1 - next]);
      is_waiting = false;
    };
    for (std::size_t k = 0; k < in.cols; k += span) {
      const std::size_t n = std::min(span, in.cols - k);
      const input_row<T> part{in.data + k, n, in.weights == nullptr ? nullptr : in.weights + k, in.first_index + k};
      const packed_row<std::uint8_t> to{out.codes + k / 2, out.scales + block_at<Block>(block, k),
                                        macro == 0 ? nullptr : out.macros + k / macro, out.tensor_scale};
      if (n == span) {
        const words amax = amax_of_blocks<Block>(block, part.data);
        if (!any_at_least(amax, limits_of<T>.unsafe)) {
          spans[next].x = part.data;
          spans[next].n = span;
          spans[next].first_index = part.first_index;
          spans[next].out = to;
          choose_scales(rules, part.weights, amax, spans[next]);
          store_waiting();
          is_waiting = true;
          next = 1 - next;
          continue;
        }
      }
      store_waiting();
      const std::size_t rejected = quantize_copy<Block>(rules, part, to);
      if (rejected < n) return k + rejected;
    }
    store_waiting();
    return in.cols;
  }

  /// The tail of a row, or 16 blocks with elements that are not finite or so large that the next scale may make them
  /// infinite: through copies of everything.
  template <std::size_t Block, real T>
  TETROMINO_OUTLINE static std::size_t quantize_copy(const row_rules& rules, const input_row<T>& in,
                                                     const packed_row<std::uint8_t>& out) {
    float x[32 * blocks_at_once];
    pad_floats(in.data, in.cols, x, size_of<Block>(rules.format.block) * blocks_at_once);
    return quantize_padded<Block>(rules, {x, in.cols, in.weights, in.first_index}, limits_of<T>, out);
  }
  /// The first n elements of 16 blocks, with zeros behind them, which may be changed.
  struct padded_row {
    float* x;
    std::size_t n;
    const float* weights;
    std::uint64_t first_index;
  };
  template <std::size_t Block>
  TETROMINO_OUTLINE static std::size_t quantize_padded(const row_rules& rules, const padded_row& in,
                                                       const type_limits& limits, const packed_row<std::uint8_t>& out) {
    const std::size_t block = size_of<Block>(rules.format.block), span = block * blocks_at_once;
    const std::size_t macro = rules.format.macro_block, n = in.n;
    float* const x = in.x;
    float weights[32 * blocks_at_once];
    std::uint8_t codes[16 * blocks_at_once], scales[blocks_at_once], macros[blocks_at_once];
    if (in.weights != nullptr) pad(in.weights, n, weights, span);
    words amax = amax_of_blocks<Block>(block, x);
    std::uint32_t poisoned = 0;
    if (any_at_least(amax, infinity)) {
      if (rules.special == special_values::reject) {
        return static_cast<std::size_t>(std::find_if(x, x + n, [](float v) { return !is_finite(v); }) - x);
      }
      poisoned = sanitize(rules.special, limits.largest, block, x, span);
      amax = amax_of_blocks<Block>(block, x);
    }
    span_of_blocks<float> padded{x, n, in.first_index, {codes, scales, macros, out.tensor_scale}, {}};
    choose_scales(rules, in.weights == nullptr ? nullptr : weights, amax, padded);
    if (any_at_least(amax, limits.unsafe)) {
      rules.format.macro_bits == 2 ? keep_fine_finite(rules, limits, x, padded.out, padded.scales)
                                   : keep_finite(rules, limits, padded.out, padded.scales);
    }
    store_elements<Block>(rules, padded);
    for (std::size_t b = 0; b < blocks_at_once; ++b) {
      if ((poisoned >> b & 1u) != 0) scales[b] = is_nvfp4(rules) ? e4m3::nan_bits : e8m0::nan_bits;
    }
    const std::size_t blocks = (n + block - 1) / block;
    std::copy_n(codes, blocks * (block / 2), out.codes);
    std::copy_n(scales, blocks, out.scales);
    if (macro != 0) std::copy_n(macros, (n + macro - 1) / macro, out.macros);
    return n;
  }

  static bool is_nvfp4(const row_rules& rules) { return rules.format.scale == scale_type::e4m3; }

  template <class T>
  static void choose_scales(const row_rules& rules, const float* weights, const words& amax, span_of_blocks<T>& span) {
    const bool compares = is_nvfp4(rules)
                              ? rules.rule != scale_rule::amax
                              : rules.rule == scale_rule::min_error ||
                                    (rules.format.macro_block != 0 && rules.macro != macro_rule::from_amax) ||
                                    rules.format.macro_bits == 2;
    const auto choose = is_nvfp4(rules) ? &choose_nvfp4 : rules.format.macro_bits == 2 ? &choose_fine : &choose_mx;
    store(span.scales.amax, amax);
    if (!compares) return choose(rules, {nullptr, nullptr, rules.format.block}, amax, span.out, span.scales);
    if constexpr (std::is_same_v<T, float>) {
      choose(rules, {span.x, weights, rules.format.block}, amax, span.out, span.scales);
    } else {
      alignas(64) float x[32 * blocks_at_once];
      for (std::size_t i = 0; i < rules.format.block * blocks_at_once; i += lane_count) store(x + i, load(span.x + i));
      choose(rules, {x, weights, rules.format.block}, amax, span.out, span.scales);
    }
  }

  TETROMINO_OUTLINE static void choose_nvfp4(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                             const packed_row<std::uint8_t>& out, element_scales& scales) {
    const words code = nvfp4_codes(rules, in, amax, out.tensor_scale);
    const floats divisor = broadcast(out.tensor_scale) * decode_e4m3(code);
    scales.empty = zero_lanes(amax) | zero_lanes(bits_of(divisor));
    const floats usable = select(is_zero(code), broadcast(1.0f), divisor), inverse = broadcast(1.0f) / usable;
    scales.how = has_quick_quotients(amax, usable, inverse) ? rescaling::multiply_by_inverse : rescaling::divide;
    store(scales.divisor, usable);
    store(scales.multiplier, inverse);
    store_bytes(out.scales, code);
  }

  TETROMINO_OUTLINE static void choose_mx(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                          const packed_row<std::uint8_t>& out, element_scales& scales) {
    const std::size_t macro = rules.format.macro_block;
    floats factor = broadcast(1.0f);
    const block_columns columns(in);
    if (macro != 0) {
      const std::size_t group = block_at<any_size>(in.block, macro);
      const words m = rules.macro == macro_rule::from_amax ? static_macros(group_max(amax, group))
                                                           : searched_macros(rules, in, columns, amax, group);
      std::int32_t lane[lane_count];
      store(lane, m);
      for (std::size_t i = 0; i * group < lane_count; ++i) out.macros[i] = static_cast<std::uint8_t>(lane[i * group]);
      factor = macro_factors(m);
    }
    words byte;
    if (rules.rule == scale_rule::min_error) {
      byte = select(floats_of(amax) <= broadcast(0.0f), broadcast(0), least_error_bytes(in, columns, amax, factor));
    } else if (macro == 0) {
      byte = closed_form_bytes(amax, carry_of(rules.rule));
    } else {
      byte = closed_form_bytes(part(amax), factor, carry_of(rules.rule));
    }
    scales.empty = zero_lanes(amax);
    scales.how = rescaling::multiply;
    store(scales.factor, factor);
    store(scales.multiplier, factor * inverse_power(byte));
    store_bytes(out.scales, byte);
  }

  TETROMINO_OUTLINE static void choose_fine(const row_rules& rules, const block_magnitudes& in, const words& amax,
                                            const packed_row<std::uint8_t>& out, element_scales& scales) {
    const fine_choice choice = fine_search(rules, in).choose(amax);
    const bool are_eighths = rules.format.macro_block == 32;
    for (std::size_t j = 0; j < 4; ++j) {
      const floats factor = fine_factors(choice.m[are_eighths ? j : j / 2]);
      store(scales.eighths[j], broadcast(1.0f) / factor * inverse_power(choice.byte));
    }
    scales.empty = zero_lanes(amax);
    scales.how = rescaling::multiply_eighths;
    store_bytes(out.scales, choice.byte);
    store_factors(rules.format, choice.m, out.macros);
  }
  /// keep_finite for factors of 2 bits. The elements x of such blocks get smaller by 2^-8, since inverses of the
  /// largest scales are no normal floats; stochastic rounding does without those.
  TETROMINO_COLD static void keep_fine_finite(const row_rules& rules, const type_limits& limits, float* x,
                                              const packed_row<std::uint8_t>& out, element_scales& scales) {
    const std::size_t elements = elements_per_factor(rules.format);
    for (std::size_t b = 0; b < blocks_at_once; ++b) {
      if (scales.amax[b] < limits.unsafe) continue;
      int exponent = out.scales[b] - 127;
      for (std::size_t k = 32 * b; k < 32 * (b + 1); k += elements) {
        float largest = 0;
        for (std::size_t i = k; i < k + elements; ++i) largest = std::max(largest, std::abs(x[i]));
        exponent = finite_fine_exponent(exponent, largest, fine_bits(out.macros, elements, k), rules.rounding,
                                        limits.overflow);
      }
      out.scales[b] = e8m0::from_exponent(exponent).bits;
      if (rules.rounding == element_rounding::stochastic) continue;
      for (std::size_t i = 32 * b; i < 32 * (b + 1); ++i) x[i] *= 0x1p-8f;
      for (std::size_t j = 0; j < 4; ++j) {
        scales.eighths[j][b] =
            fine_inverse(fine_bits(out.macros, elements, 32 * b + 8 * j)) * normal_power(8 - exponent);
      }
    }
  }

  /// Lowers the scales under which elements would decode to infinities.
  TETROMINO_COLD static void keep_finite(const row_rules& rules, const type_limits& limits,
                                         const packed_row<std::uint8_t>& out, element_scales& scales) {
    for (std::size_t b = 0; b < blocks_at_once; ++b) {
      if (scales.amax[b] < limits.unsafe) continue;
      const float amax = detail::bit_cast<float>(scales.amax[b]);
      std::uint8_t& byte = out.scales[b];
      if (is_nvfp4(rules)) {
        byte = finite_scale(e4m3::from_bits(byte), amax, out.tensor_scale, rules.rounding, limits.overflow).bits;
        if (byte == 0) continue;
        scales.divisor[b] = detail::rounded(out.tensor_scale * e4m3::from_bits(byte).value());
        scales.how = rescaling::divide;
      } else {
        const int exponent = finite_exponent(byte - 127, amax, scales.factor[b], rules.rounding, limits.overflow);
        byte = e8m0::from_exponent(exponent).bits;
        scales.multiplier[b] = scales.factor[b] * e8m0::from_exponent(-exponent).value();
      }
    }
  }

  template <std::size_t Block, class T>
  TETROMINO_OUTLINE static void store_elements(const row_rules& rules, const span_of_blocks<T>& span) {
    const std::size_t block = size_of<Block>(rules.format.block);
    const element_scales& scales = span.scales;
    if (rules.rounding == element_rounding::stochastic || scales.how == rescaling::multiply_eighths) {
      float x[32 * blocks_at_once];
      for (std::size_t i = 0; i < block * blocks_at_once; i += lane_count) store(x + i, load(span.x + i));
      const bool is_nearest = rules.rounding == element_rounding::nearest_even;
      is_nearest ? store_eighths(x, span.n, span.out.codes, scales)
                 : store_stochastic(rules, x, span.n, span.first_index, span.out, scales);
    } else if constexpr (Block == any_size) {
      store_nearest<Block>(block, span, scales.how);
    } else if constexpr (Block == 32) {
      store_nearest<Block>(block, span, rescaling::multiply);
    } else if (scales.how == rescaling::multiply) {
      store_nearest<Block>(block, span, rescaling::multiply);
    } else if (scales.how == rescaling::multiply_by_inverse) {
      store_nearest<Block>(block, span, rescaling::multiply_by_inverse);
    } else {
      store_nearest<Block>(block, span, rescaling::divide);
    }
    for (std::size_t b = 0; b < blocks_at_once && scales.empty >> b != 0; ++b) {
      if ((scales.empty >> b & 1u) != 0 && b * block < span.n)
        std::fill_n(span.out.codes + b * (block / 2), block / 2, std::uint8_t{0});
    }
  }

  /// The scales of the elements that load_pair gives, when the first of them belongs to the block of scale[0].
  template <class T, std::size_t Block>
  TETROMINO_INLINE static floats_pair spread([[maybe_unused]] std::size_t block, const float* scale) {
    if constexpr (Block == 32) {
      const floats one = broadcast(scale[0]);
      return {one, one};
    }
    const float second = scale[Block == any_size && block == 32 ? 0 : 1];
    if constexpr (is_split<T>) {
      const floats halves = broadcast_halves(scale[0], second);
      return {halves, halves};
    }
    return {broadcast(scale[0]), broadcast(second)};
  }

  /// A pair of elements, the first of them in block b, as E2M1 takes them.
  template <std::size_t Block, class T>
  TETROMINO_INLINE static floats_pair rescale(std::size_t block, const span_of_blocks<T>& span, rescaling how,
                                              const floats_pair& v, std::size_t b) {
    const float *divisor = span.scales.divisor + b, *multiplier = span.scales.multiplier + b;
    if (how == rescaling::multiply) {
      const floats_pair m = spread<T, Block>(block, multiplier);
      return {v.first * m.first, v.second * m.second};
    }
    const floats_pair d = spread<T, Block>(block, divisor);
    if (has_fused_products && how == rescaling::multiply_by_inverse) {
      const floats_pair i = spread<T, Block>(block, multiplier);
      return {quotient_for_code(v.first, d.first, i.first), quotient_for_code(v.second, d.second, i.second)};
    }
    return {v.first / d.first, v.second / d.second};
  }

  /// Stores the codes of elements, 64 at a time.
  template <std::size_t Block, class T>
  TETROMINO_INLINE static void store_nearest(std::size_t block, const span_of_blocks<T>& span, rescaling how) {
    std::uint8_t* const codes = span.out.codes;
    for (std::size_t k = 0; k < span.n; k += 64) {
      const floats_pair a = load_pair(span.x + k), b = load_pair(span.x + k + 32);
      for (std::size_t i = 0; i < 64 * sizeof(T); i += 64) prefetch_to_l2(span.x + k, far_ahead + i);
      const floats_pair ya = rescale<Block>(block, span, how, a, block_at<Block>(block, k));
      const floats_pair yb = rescale<Block>(block, span, how, b, block_at<Block>(block, k + 32));
      store_codes<T>(codes + k / 2, encode_e2m1(ya.first, a.first), encode_e2m1(ya.second, a.second),
                     encode_e2m1(yb.first, b.first), encode_e2m1(yb.second, b.second));
    }
  }

  /// Element i of 16 blocks with factors of 2 bits, as E2M1 takes it.
  static float fine_element(const any_format& format, const packed_row<std::uint8_t>& out, std::size_t i, float x) {
    const float scaled = x * e8m0::from_exponent(127 - out.scales[i / 32]).value();
    return detail::rounded(scaled * fine_inverse(fine_bits(out.macros, elements_per_factor(format), i)));
  }

  /// The same with factors of 2 bits.
  TETROMINO_OUTLINE static void store_eighths(const float* x, std::size_t n, std::uint8_t* codes,
                                              const element_scales& scales) {
    for (std::size_t k = 0; k < n; k += 64) {
      const auto encode = [&](std::size_t i) TETROMINO_INLINE_LAMBDA {
        const floats_pair v = load_pair(x + i), m = spread_eighths(scales.eighths, i / 32);
        return std::pair(encode_e2m1(v.first * m.first, v.first), encode_e2m1(v.second * m.second, v.second));
      };
      const auto a = encode(k), b = encode(k + 32);
      store_codes<float>(codes + k / 2, a.first, a.second, b.first, b.second);
    }
  }

  /// The same with stochastic rounding, where tiny y matter: in the two steps of the reference.
  TETROMINO_OUTLINE static void store_stochastic(const row_rules& rules, const float* x, std::size_t n,
                                                 std::uint64_t first_index, const packed_row<std::uint8_t>& out,
                                                 const element_scales& scales) {
    const std::size_t block = rules.format.block;
    float to_one[blocks_at_once], to_scale[blocks_at_once];
    const words field = exponent_field(load(scales.amax));
    store(to_one, inverse_power(field));
    store(to_scale, floats_of(shift_left<23>(field - load_bytes(out.scales) + broadcast(127))));
    std::fill_n(out.codes, block * blocks_at_once / 2, std::uint8_t{0});
    philox_words random{};
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint64_t index = first_index + i;
      if (i == 0 || index % 4 == 0) random = philox4x32(index / 4, rules.seed);
      const std::size_t b = block_at<any_size>(block, i);
      const float y = rules.format.macro_bits == 2 ? fine_element(rules.format, out, i, x[i])
                      : is_nvfp4(rules)            ? x[i] / scales.divisor[b]
                                        : detail::rounded(scales.factor[b] * (x[i] * to_one[b])) * to_scale[b];
      const unsigned code = round_stochastic(y, uniform(random, index)).bits;
      out.codes[i / 2] = static_cast<std::uint8_t>(out.codes[i / 2] | code << (i % 2 * 4));
    }
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
