#pragma once

#include "../hadamard.hpp"    // scalar_rotation
#include "finite_scales.hpp"  // finite_exponent, finite_scale
#include "row.hpp"            // row_rules, packed_row, input_row

#include <algorithm>  // std::min, std::max, std::clamp, std::transform
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint8_t

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The reference backend: one block at a time, one element at a time, in the words of the specification. Every other
/// backend gives the same bytes.
struct scalar_kernels : scalar_rotation {
  /// The largest magnitude of x[n], leaving out blocks of 16 that are not finite, or where they saturate the elements
  /// that are not.
  template <real T>
  static float amax(const T* x, std::size_t n, special_values special) {
    float largest = 0;
    for (std::size_t k = 0; k < n; k += nvfp4::block) {
      float block = 0;
      bool finite = true;
      for (std::size_t i = k; i < std::min(n, k + nvfp4::block); ++i) {
        const float v = magnitude(to_float(x[i]));
        if (is_finite(v)) {
          block = std::max(block, v);
        } else if (special != special_values::saturate) {
          finite = false;
        }
      }
      if (finite) largest = std::max(largest, block);
    }
    return largest;
  }

  /// Packs one row; returns the column of the first value that the policy rejects, or `cols`.
  template <real T>
  static std::size_t quantize_row(const row_rules& rules, const input_row<T>& in, const packed_row<std::uint8_t>& out) {
    const std::size_t block = rules.format.block;
    const std::size_t span = std::max(block, rules.format.macro_block);  // elements that share something
    for (std::size_t k = 0; k < in.cols; k += span) {
      const std::size_t blocks = (std::min(span, in.cols - k) + block - 1) / block;
      block_values values[max_blocks];
      for (std::size_t b = 0; b < blocks; ++b) {
        const std::size_t rejected = load(rules, in, k + b * block, values[b]);
        if (rejected < in.cols) return rejected;
      }
      const bool is_fine = rules.format.macro_bits == 2;
      std::uint8_t m = 0;
      if (rules.format.macro_block != 0) {
        if (!is_fine) m = macro_byte(rules, values, blocks);
        out.macros[k / span] = m;
      }
      for (std::size_t b = 0; b < blocks; ++b) {
        const std::size_t index = k / block + b;
        std::uint8_t* const codes = out.codes + index * (block / 2);
        const std::uint64_t first = in.first_index + k + b * block;
        if (is_fine) {
          const unsigned bits = pack_fine(rules, values[b], first, codes, out.scales[index]);
          out.macros[k / span] = static_cast<std::uint8_t>(out.macros[k / span] | bits << (b * 8 / (span / block)));
        } else {
          pack(rules, values[b], m, out.tensor_scale, first, codes, out.scales[index]);
        }
      }
    }
    return in.cols;
  }

  /// Unpacks one row of `cols` elements.
  template <real T>
  static void dequantize_row(const any_format& format, const packed_row<const std::uint8_t>& in, std::size_t cols,
                             T* out) {
    for (std::size_t k = 0; k < cols; ++k) {
      const std::uint8_t pair = in.codes[k / 2];
      const float q = e2m1::from_bits(static_cast<std::uint8_t>(k % 2 == 0 ? pair & 15 : pair >> 4)).value();
      const std::uint8_t scale = in.scales[k / format.block];
      float x;
      if (format.scale == scale_type::e4m3) {
        x = q * rounded(in.tensor_scale * e4m3::from_bits(scale).value());
      } else if (format.macro_bits == 2) {
        const unsigned m = fine_bits(in.macros, elements_per_factor(format), k);
        x = q * fine_factor(m) * e8m0::from_bits(scale).value();
      } else if (format.macro_block != 0) {
        x = rounded(q / macro_factor(in.macros[k / format.macro_block])) * e8m0::from_bits(scale).value();
      } else {
        x = q * e8m0::from_bits(scale).value();
      }
      out[k] = from_float<T>(x);
    }
  }

 private:
  static constexpr std::size_t max_blocks = 256 / 16;

  /// One block as floats, padded with zeros.
  struct block_values {
    float x[32];
    float weight[32];  // of each squared error
    float amax;        // largest magnitude
    float safe;        // below it, no scale makes its type overflow
    float overflow;    // from here on, its type is infinite
    std::size_t size;  // elements in a whole block
    std::size_t used;  // elements that exist
    bool poisoned;
    bool weighted;
  };

  /// A sum of squared errors in the order that all backends share: 16 strided partial sums, then halves.
  class error_sum {
   public:
    void add(std::size_t i, float difference, const block_values& block) {
      const float square = rounded(difference * difference);
      partial_[i % 16] += block.weighted ? rounded(block.weight[i] * square) : square;
    }
    [[nodiscard]] float total() const {
      float half[16];
      std::copy(partial_, partial_ + 16, half);
      for (std::size_t n = 8; n > 0; n /= 2) {
        for (std::size_t i = 0; i < n; ++i) half[i] += half[i + n];
      }
      return half[0];
    }

   private:
    float partial_[16] = {};
  };

  /// The candidate of least error; a search can tell its candidates apart if not all of them err alike.
  enum class ties { first_wins, last_wins };
  template <ties Ties>
  class least_error {
   public:
    void offer(int candidate, float total) {
      if (!any_) first_ = total;
      tells_apart_ = tells_apart_ || total < first_ || first_ < total;
      if (!any_ || total < least_ || (Ties == ties::last_wins && total == least_)) best_ = candidate, least_ = total;
      any_ = true;
    }
    [[nodiscard]] int best() const { return best_; }
    [[nodiscard]] bool tells_apart() const { return tells_apart_; }

   private:
    int best_ = 0;
    float first_ = 0, least_ = 0;
    bool any_ = false, tells_apart_ = false;
  };

  static block_values without_weights(block_values block) {
    block.weighted = false;
    return block;
  }

  static float magnitude(float x) { return detail::bit_cast<float>(detail::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu); }

  /// 2^n for n in [-149, 127], and 0 below.
  static float power_of_two(int n) {
    if (n >= -126) return detail::bit_cast<float>(static_cast<std::uint32_t>(n + 127) << 23);
    return n >= -149 ? detail::bit_cast<float>(1u << (n + 149)) : 0.0f;
  }

  /// floor(log2 a) for normal a, kept within the exponents whose inverse is a normal float.
  static int binary_exponent(float a) {
    return std::clamp(static_cast<int>(detail::bit_cast<std::uint32_t>(a) >> 23) - 127, -126, 126);
  }

  /// Reads the block at column k; returns the first rejected column, or `cols`.
  template <real T>
  static std::size_t load(const row_rules& rules, const input_row<T>& in, std::size_t k, block_values& block) {
    block.size = rules.format.block;
    block.used = std::min(block.size, in.cols - k);
    block.amax = 0;
    block.safe = safely_finite<T>;
    block.overflow = overflow_of<T>;
    block.poisoned = false;
    block.weighted = in.weights != nullptr;
    for (std::size_t i = 0; i < block.size; ++i) {
      const bool exists = i < block.used;
      block.x[i] = exists ? admit(in.data[k + i], rules.special) : 0.0f;
      block.weight[i] = exists && block.weighted ? in.weights[k + i] : 1.0f;
      if (is_finite(block.x[i])) {
        block.amax = std::max(block.amax, magnitude(block.x[i]));
      } else if (rules.special == special_values::reject) {
        return k + i;
      } else {
        block.poisoned = true;
      }
    }
    if (block.poisoned) {
      std::fill(block.x, block.x + block.size, 0.0f);
      block.amax = 0;
    }
    return in.cols;
  }

  /// A block times a macro-block factor, brought near 1 by the power of two 2^-exponent so that nothing overflows.
  struct scaled_block {
    float g[32];
    float amax;
    int exponent;
  };
  static scaled_block scale_by(const block_values& block, float factor) {
    scaled_block out{};
    out.exponent = binary_exponent(block.amax);
    for (std::size_t i = 0; i < block.size; ++i) {
      out.g[i] = rounded(factor * (block.x[i] * power_of_two(-out.exponent)));
      out.amax = std::max(out.amax, magnitude(out.g[i]));
    }
    return out;
  }

  /// Adds the errors of packing with block scale 2^exponent, in units of 2^unit.
  static void add_errors(const block_values& block, const scaled_block& scaled, int exponent, int unit,
                         error_sum& sum) {
    const float to_scale = power_of_two(scaled.exponent - exponent);
    const float to_unit = power_of_two(std::max(exponent - unit, -126));
    for (std::size_t i = 0; i < block.size; ++i) {
      const float y = scaled.g[i] * to_scale;
      sum.add(i, (y - e2m1::encode(y).value()) * to_unit, block);
    }
  }

  /// The block's E8M0 exponent.
  static int block_exponent(const row_rules& rules, const block_values& block, const scaled_block& scaled) {
    const auto clamped = [](int e) { return std::clamp(e, e8m0::min_exponent, e8m0::max_exponent); };
    if (rules.rule != scale_rule::min_error) {
      return clamped(scaled.exponent + mx_exponent(scaled.amax, carry_of(rules.rule)));
    }
    const int up = clamped(scaled.exponent + mx_exponent(scaled.amax, carry_of(scale_rule::round_up)));
    least_error<ties::first_wins> search;
    for (const int step : {1, 0, -1, -2}) {  // the larger scale first: it keeps ties
      const int exponent = clamped(up + step);
      error_sum sum;
      add_errors(block, scaled, exponent, exponent, sum);
      search.offer(exponent, sum.total() * power_of_two(2 * (exponent - up)));
    }
    if (block.weighted && !search.tells_apart()) return block_exponent(rules, without_weights(block), scaled);
    return search.best();
  }

  /// The macro-block byte of up to 256 elements.
  static std::uint8_t macro_byte(const row_rules& rules, const block_values* values, std::size_t blocks) {
    float amax = 0;
    for (std::size_t b = 0; b < blocks; ++b) amax = std::max(amax, values[b].amax);
    if (rules.macro == macro_rule::from_amax || amax == 0) return macro_from_amax(amax);

    const int unit = binary_exponent(amax);
    const int step = rules.macro == macro_rule::search ? 16 : 1;
    least_error<ties::first_wins> search;
    for (int m = 0; m < 256; m += step) {
      const float factor = macro_factor(static_cast<std::uint8_t>(m));
      error_sum sum;
      for (std::size_t b = 0; b < blocks; ++b) {
        if (values[b].amax == 0) continue;
        const scaled_block scaled = scale_by(values[b], factor);
        add_errors(values[b], scaled, block_exponent(rules, values[b], scaled), unit, sum);
      }
      search.offer(m, sum.total() / (factor * factor));
    }
    if (values[0].weighted && !search.tells_apart()) {
      block_values plain[max_blocks];
      std::transform(values, values + blocks, plain, without_weights);
      return macro_byte(rules, plain, blocks);
    }
    return static_cast<std::uint8_t>(search.best());
  }

  /// The error of an NVFP4 block under an E4M3 scale, in units of the tensor scale.
  static float nvfp4_error(const block_values& block, e4m3 scale, float tensor_scale) {
    const float divisor = rounded(tensor_scale * scale.value());
    error_sum sum;
    for (std::size_t i = 0; i < block.size; ++i) {
      const float y = block.x[i] / divisor;
      sum.add(i, y - e2m1::encode(y).value(), block);
    }
    return rounded(scale.value() * scale.value()) * sum.total();
  }

  /// The block's E4M3 scale; 0 where the block is zero, or tiny and to be zero.
  static e4m3 block_scale(const row_rules& rules, const block_values& block, float tensor_scale) {
    if (block.amax == 0 || tensor_scale == 0) return e4m3();
    const auto encode = [&](float scale) {
      const e4m3 code = e4m3::encode(scale);
      return code.bits == 0 && rules.tiny_blocks == tiny_block_scale::least ? e4m3::from_bits(1) : code;
    };
    const e4m3 from_six = encode(block.amax / (6.0f * tensor_scale));
    if (rules.rule == scale_rule::four_over_six) {
      const e4m3 from_four = encode(block.amax / (4.0f * tensor_scale));
      if (from_six.bits == 0) return from_four;
      least_error<ties::first_wins> search;
      for (const e4m3 scale : {from_six, from_four}) {
        search.offer(scale.bits, nvfp4_error(block, scale, tensor_scale));
      }
      return chosen(rules, block, tensor_scale, search);
    }
    if (rules.rule == scale_rule::amax || from_six.bits == 0) return from_six;
    least_error<ties::last_wins> search;  // the larger scale wins ties
    const int last = std::min<int>(from_six.bits + 8, e4m3::max_finite_bits);
    for (int code = std::max(from_six.bits - 8, 1); code <= last; ++code) {
      const e4m3 scale = e4m3::from_bits(static_cast<std::uint8_t>(code));
      search.offer(code, nvfp4_error(block, scale, tensor_scale));
    }
    return chosen(rules, block, tensor_scale, search);
  }
  template <class Search>
  static e4m3 chosen(const row_rules& rules, const block_values& block, float tensor_scale, const Search& search) {
    if (block.weighted && !search.tells_apart()) return block_scale(rules, without_weights(block), tensor_scale);
    return e4m3::from_bits(static_cast<std::uint8_t>(search.best()));
  }

  /// How a block is packed with factors of 2 bits: the exponent of its scale, and the m of each of its groups.
  struct fine_choice {
    int exponent = e8m0::min_exponent;
    unsigned m[4] = {};
    float total = 0;  // of the weighted squared errors, in units of 2^exponent
  };

  /// x 2^-exponent, as it is rounded under a factor.
  static float fine_element(float scaled, unsigned m) { return rounded(scaled * fine_inverse(m)); }

  /// The error of a group of elements that begins at `first`.
  static float fine_error(const block_values& block, std::size_t first, std::size_t elements, int exponent,
                          unsigned m) {
    error_sum sum;
    for (std::size_t i = first; i < first + elements; ++i) {
      const float scaled = block.x[i] * power_of_two(-exponent);
      sum.add(i, scaled - e2m1::encode(fine_element(scaled, m)).value() * fine_factor(m), block);
    }
    return sum.total();
  }

  /// The m of that group.
  static unsigned fine_bits_of(const row_rules& rules, const block_values& block, std::size_t first,
                               std::size_t elements, int exponent) {
    least_error<ties::first_wins> search;
    float largest = 0;
    for (std::size_t i = first; i < first + elements; ++i) largest = std::max(largest, magnitude(block.x[i]));
    const float scaled = largest * power_of_two(-exponent);
    for (unsigned m = 0; m < 4; ++m) {
      search.offer(static_cast<int>(m),
                   rules.macro == macro_rule::from_amax
                       ? magnitude(scaled - e2m1::encode(fine_element(scaled, m)).value() * fine_factor(m))
                       : fine_error(block, first, elements, exponent, m));
    }
    if (block.weighted && rules.macro != macro_rule::from_amax && !search.tells_apart()) {
      return fine_bits_of(rules, without_weights(block), first, elements, exponent);
    }
    return static_cast<unsigned>(search.best());
  }

  /// The factors of a block under an exponent, and its error with them.
  static fine_choice fine_factors(const row_rules& rules, const block_values& block, int exponent) {
    const std::size_t elements = elements_per_factor(rules.format), groups = block.size / elements;
    fine_choice out{exponent, {}, 0};
    float errors[4] = {};
    for (std::size_t g = 0; g < groups; ++g) {
      out.m[g] = fine_bits_of(rules, block, g * elements, elements, exponent);
      errors[g] = fine_error(block, g * elements, elements, exponent, out.m[g]);
    }
    out.total = (errors[0] + errors[2]) + (errors[1] + errors[3]);
    return out;
  }

  static fine_choice choose_fine(const row_rules& rules, const block_values& block) {
    const auto exponent_by = [&](scale_rule rule) {
      return std::clamp(mx_exponent(block.amax, carry_of(rule)), e8m0::min_exponent, e8m0::max_exponent);
    };
    if (rules.rule != scale_rule::min_error) return fine_factors(rules, block, exponent_by(rules.rule));
    const int up = exponent_by(scale_rule::round_up);
    least_error<ties::first_wins> search;
    for (const int step : {1, 0, -1, -2}) {  // the larger scale first: it keeps ties
      const int exponent = std::clamp(up + step, e8m0::min_exponent, e8m0::max_exponent);
      search.offer(exponent, fine_factors(rules, block, exponent).total * power_of_two(2 * (exponent - up)));
    }
    if (block.weighted && !search.tells_apart()) return choose_fine(rules, without_weights(block));
    return fine_factors(rules, block, search.best());
  }

  /// pack() with factors of 2 bits; returns those of the block, the first in the low bits.
  static unsigned pack_fine(const row_rules& rules, const block_values& block, std::uint64_t first_index,
                            std::uint8_t* codes, std::uint8_t& scale_byte) {
    const std::size_t elements = elements_per_factor(rules.format), groups = block.size / elements;
    float y[32] = {};
    unsigned bits = 0;
    scale_byte = block.poisoned ? e8m0::nan_bits : std::uint8_t{0};
    if (block.amax != 0) {
      fine_choice chosen = choose_fine(rules, block);
      for (std::size_t g = 0; g < groups && block.amax >= block.safe; ++g) {
        float largest = 0;
        for (std::size_t i = 0; i < elements; ++i) largest = std::max(largest, magnitude(block.x[g * elements + i]));
        chosen.exponent = finite_fine_exponent(chosen.exponent, largest, chosen.m[g], rules.rounding, block.overflow);
      }
      scale_byte = e8m0::from_exponent(chosen.exponent).bits;
      for (std::size_t i = 0; i < block.size; ++i) {
        y[i] = fine_element(block.x[i] * power_of_two(-chosen.exponent), chosen.m[i / elements]);
      }
      for (std::size_t g = 0; g < groups; ++g) bits |= chosen.m[g] << (2 * g);
    }
    store_codes(rules, block, y, first_index, codes);
    return bits;
  }

  /// Chooses the block's scale and rounds its elements.
  static void pack(const row_rules& rules, const block_values& block, std::uint8_t m, float tensor_scale,
                   std::uint64_t first_index, std::uint8_t* codes, std::uint8_t& scale_byte) {
    float y[32] = {};
    scale_byte = 0;
    if (block.poisoned) {
      scale_byte = rules.format.scale == scale_type::e4m3 ? e4m3::nan_bits : e8m0::nan_bits;
    } else if (block.amax != 0 && rules.format.scale == scale_type::e8m0) {
      const scaled_block scaled = scale_by(block, macro_factor(m));
      int exponent = block_exponent(rules, block, scaled);
      if (block.amax >= block.safe) {
        exponent = finite_exponent(exponent, block.amax, macro_factor(m), rules.rounding, block.overflow);
      }
      scale_byte = e8m0::from_exponent(exponent).bits;
      for (std::size_t i = 0; i < block.size; ++i) y[i] = scaled.g[i] * power_of_two(scaled.exponent - exponent);
    } else if (block.amax != 0) {
      e4m3 scale = block_scale(rules, block, tensor_scale);
      if (block.amax >= block.safe)
        scale = finite_scale(scale, block.amax, tensor_scale, rules.rounding, block.overflow);
      scale_byte = scale.bits;
      if (scale.bits != 0) {
        const float divisor = rounded(tensor_scale * scale.value());
        for (std::size_t i = 0; i < block.size && divisor != 0; ++i) y[i] = block.x[i] / divisor;
      }
    }
    store_codes(rules, block, y, first_index, codes);
  }

  /// Rounds elements y to codes.
  static void store_codes(const row_rules& rules, const block_values& block, const float* y, std::uint64_t first_index,
                          std::uint8_t* codes) {
    for (std::size_t i = 0; i < block.size; i += 2) {
      const auto code = [&](std::size_t j) -> unsigned {
        if (rules.rounding == element_rounding::nearest_even || j >= block.used) return e2m1::encode(y[j]).bits;
        return round_stochastic(y[j], uniform(rules.seed, first_index + j)).bits;
      };
      codes[i / 2] = static_cast<std::uint8_t>(code(i) | code(i + 1) << 4);
    }
  }
};

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
