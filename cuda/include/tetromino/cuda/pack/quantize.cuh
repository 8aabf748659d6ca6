#pragma once

#include <tetromino/cuda.hpp>  // stream

#include "amax.cuh"    // set_tensor_scales
#include "decode.cuh"  // unpack
#include "encode.cuh"  // encode
#include "search.cuh"  // search_macro, search_scale
#include "rotate.cuh"  // rotated_chunk, make_rotation
#include "args.cuh"    // row_map
#include "spans.cuh"   // launch_pack_spans
#include "load.cuh"    // load_chunk

#include <tetromino/detail/finite_scales.hpp>  // finite_exponent, finite_scale
#include <tetromino/layout.hpp>                // swizzled_bytes
#include <tetromino/options.hpp>               // quantize_job
#include <tetromino/scaling.hpp>               // mx_exponent

#include <algorithm>    // std::max
#include <bit>          // std::bit_width
#include <cstdint>      // std::uint32_t
#include <type_traits>  // std::is_void_v

/// Packing in one pass over memory: all rules but those that spans.cuh has.
namespace TETROMINO_NAMESPACE::cuda::detail {

enum class pack_rule : std::uint8_t {
  mx,
  mx_min_error,
  mx_macro,
  mx_macro_search,
  nv_amax,
  nv_four_over_six,
  nv_min_error
};

template <pack_rule Rule>
inline constexpr bool is_nv =
    Rule == pack_rule::nv_amax || Rule == pack_rule::nv_four_over_six || Rule == pack_rule::nv_min_error;

template <pack_rule Rule>
inline constexpr bool has_macro = Rule == pack_rule::mx_macro || Rule == pack_rule::mx_macro_search;

/// What the block of one thread's elements decodes with.
struct packed_chunk {
  code_words codes{};
  std::uint32_t scale = 0;
  std::uint32_t macro = 0;
};

/// The E8M0 code and 2^-E of a block, from its largest magnitude times the macro-block factor.
struct mx_scale {
  std::uint32_t code;
  float inverse;

  __device__ mx_scale(float amax, float factor, std::uint32_t carry) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(amax);
    int e;
    if (factor == 1.0f) {
      e = static_cast<int>((bits + carry) >> 23) - 2;
    } else {
      const int power = min(max(static_cast<int>(bits >> 23) - 127, -126), 126);
      const float scaled = __fmul_rn(factor, __fmul_rn(amax, power_of_two(-power)));
      e = power + mx_exponent(scaled, carry) + 127;
    }
    *this = mx_scale(static_cast<std::uint32_t>(min(max(e, 0), 254)));
  }
  __device__ explicit mx_scale(std::uint32_t code_)
      : code(code_), inverse(bit_cast<float>(code_ < 254 ? (254 - code_) << 23 : 0x00400000u)) {}
};

/// Codes of MX elements rounded stochastically, in the very steps of the specification.
template <real T>
[[nodiscard]] __device__ code_words encode_stochastic(const chunk<T>& x, float amax, float factor, std::uint32_t code,
                                                      const uniform_numbers& u, std::uint32_t used) {
  const int power = min(max(static_cast<int>(bit_cast<std::uint32_t>(amax) >> 23) - 127, -126), 126);
  const float to_one = power_of_two(-power), to_scale = power_of_two(power + 127 - static_cast<int>(code));
  std::uint32_t out[2] = {};
  float uniform[16];
  u.draw(uniform);
#pragma unroll
  for (std::uint32_t i = 0; i < chunk_size; ++i) {
    const float y = __fmul_rn(__fmul_rn(factor, __fmul_rn(x.value(i), to_one)), to_scale);
    if (i < used) out[i / 8] |= static_cast<std::uint32_t>(round_stochastic(y, uniform[i]).bits) << (4 * (i % 8));
  }
  return {out[0], out[1]};
}

/// The error of an NVFP4 block under an E4M3 scale, in units of the tensor scale.
template <real T>
[[nodiscard]] __device__ float nv_error(const chunk<T>& x, float amax, float tensor_scale, std::uint32_t code,
                                        const float* weights, std::uint32_t used) {
  const float scale = decode_e4m3(code), step = __fmul_rn(tensor_scale, scale);
  const divisor by(step, amax);
  float square[16];
  const auto fill = [&](const auto& quotient) {
#pragma unroll
    for (std::uint32_t i = 0; i < 16; ++i) {
      const float difference = difference_to_nearest<true>(quotient(i), 1.0f);
      square[i] = __fmul_rn(difference, difference);
    }
  };
  if (by.is_plain()) {
    fill([&](std::uint32_t i) { return by.template divide<T>(fabsf(x.value(i))); });
  } else {
    float magnitude[16];
#pragma unroll
    for (std::uint32_t i = 0; i < 16; ++i) magnitude[i] = fabsf(x.value(i));
    divide_slowly(magnitude, step);
    fill([&](std::uint32_t i) { return magnitude[i]; });
  }
  if (weights != nullptr) {
#pragma unroll
    for (std::uint32_t i = 0; i < 16; ++i) {
      if (i < used) square[i] = __fmul_rn(counted_weight(weights[i]), square[i]);
    }
  }
  return __fmul_rn(__fmul_rn(scale, scale), sum_halves(square));
}

/// What an element of magnitude amax alone has of that error, in the same steps.
[[nodiscard]] __device__ inline float nv_clamped_error(float amax, float tensor_scale, std::uint32_t code) {
  const float scale = decode_e4m3(code);
  const float difference = difference_to_nearest<true>(__fdiv_rn(amax, __fmul_rn(tensor_scale, scale)), 1.0f);
  return __fmul_rn(__fmul_rn(scale, scale), __fmul_rn(difference, difference));
}

/// The E4M3 scale of a block with amax > 0.
template <real T, pack_rule Rule>
[[nodiscard]] __device__ std::uint32_t nv_scale(const pack_rules& rules, const chunk<T>& x, float amax,
                                                float tensor_scale, const float* weights, std::uint32_t used) {
  if (tensor_scale == 0.0f) return 0;
  const std::uint32_t lowest = rules.tiny_blocks == tiny_block_scale::least ? 1 : 0;
  const std::uint32_t from_six = max(encode_e4m3(__fdiv_rn(amax, __fmul_rn(6.0f, tensor_scale))), lowest);
  if constexpr (Rule == pack_rule::nv_amax) {
    return from_six;
  } else if constexpr (Rule == pack_rule::nv_four_over_six) {
    const std::uint32_t from_four = max(encode_e4m3(__fdiv_rn(amax, __fmul_rn(4.0f, tensor_scale))), lowest);
    if (from_six == 0) return from_four;
    for (;; weights = nullptr) {  // once more without weights where these do not tell the two apart
      const float six = nv_error(x, amax, tensor_scale, from_six, weights, used);
      const float four = nv_error(x, amax, tensor_scale, from_four, weights, used);
      if (weights == nullptr || four < six || six < four) return four < six ? from_four : from_six;
    }
  } else {
    if (from_six == 0) return 0;
    const std::uint32_t first = from_six > 9 ? from_six - 8 : 1;
    const std::uint32_t last = min(from_six + 8, std::uint32_t{e4m3::max_finite_bits});
    // Rounding is monotone, so that no sum of squares is below what the largest element alone adds to it: under small
    // scales, which clamp that element, mostly more than the whole error of the scale that takes it to 6. Where
    // quotients could be NaN, every scale is looked at.
    float bound = bit_cast<float>(0x7F800000u);
    if (weights == nullptr && __fmul_rn(tensor_scale, decode_e4m3(first)) >= 0x1p-27f &&
        __fmul_rn(tensor_scale, decode_e4m3(last)) <= 0x1p60f && amax < 0x1p100f) {
      bound = nv_error(x, amax, tensor_scale, from_six, nullptr, used);
    }
    for (;; weights = nullptr) {  // once more without weights where these do not tell the scales apart
      std::uint32_t best = 0;
      float least = 0, of_first = 0;
      bool tells_apart = false;
      for (std::uint32_t code = first; code <= last; ++code) {
        if (nv_clamped_error(amax, tensor_scale, code) > bound) continue;
        const float total = nv_error(x, amax, tensor_scale, code, weights, used);
        if (best == 0) of_first = total;
        tells_apart = tells_apart || total < of_first || of_first < total;
        if (best == 0 || total <= least) best = code, least = total;  // the larger scale wins ties
      }
      if (weights == nullptr || tells_apart) return best;
    }
  }
}

/// Packs the sixteen elements of a thread. All lanes of a warp call it together: blocks of 32 and macro blocks lie in
/// neighbouring lanes. `m` is the block's largest magnitude as bits, `used` how many elements exist.
template <real T, pack_rule Rule, std::uint32_t Block, bool Stochastic>
[[nodiscard]] __device__ packed_chunk pack(const pack_rules& rules, const chunk<T>& x, std::uint32_t m, bool poisoned,
                                           float tensor_scale, const float* weights, const uniform_numbers& u,
                                           std::uint32_t used, search_room& room) {
  packed_chunk out;
  const float amax = magnitude_value<T>(m);
  if constexpr (!is_nv<Rule>) {
    float factor = 1.0f;
    if constexpr (Rule == pack_rule::mx_macro) {
      std::uint32_t most = m;
      for (unsigned lanes = Block / 16; lanes < rules.macro_block / 16; lanes *= 2) {
        most = max(most, __shfl_xor_sync(full_warp, most, static_cast<int>(lanes)));
      }
      const float macro_amax = magnitude_value<T>(most);
      if (macro_amax != 0.0f) out.macro = bit_cast<std::uint32_t>(__fdiv_rn(6.0f, macro_amax)) >> 15 & 0xFFu;
    } else if constexpr (Rule == pack_rule::mx_macro_search) {
      out.macro = search_macro<Block>(rules, x, m, room);
    }
    if constexpr (has_macro<Rule>) factor = bit_cast<float>(0x3F800000u | out.macro << 15);
    mx_scale scale(amax, factor, rules.carry);
    if constexpr (Rule == pack_rule::mx_min_error) scale = mx_scale(search_scale<Block>(x, amax));
    if (m != 0) {
      if (amax >= tetromino::detail::safely_finite<T>) {
        const int exponent = static_cast<int>(scale.code) - 127;
        scale = mx_scale(static_cast<std::uint32_t>(
            127 + tetromino::detail::finite_exponent(exponent, amax, factor, rules.rounding(),
                                                     tetromino::detail::overflow_of<T>)));
      }
      out.scale = scale.code;
      if constexpr (Stochastic) {
        out.codes = encode_stochastic(x, amax, factor, scale.code, u, used);
      } else if constexpr (std::same_as<T, bfloat16> && !has_macro<Rule>) {
        out.codes = encode_pairs(x, __byte_perm(bit_cast<std::uint32_t>(scale.inverse), 0, 0x3232));
      } else {
        bool is_done = false;
        if constexpr (sizeof(T) == 2) {
          if (fits_halves<T>(scale.code)) out.codes = encode_halves(x, scale.code, out.macro), is_done = true;
        }
        if (!is_done) out.codes = encode_times(x, __fmul_rn(factor, scale.inverse));  // exact: the factor has nine bits
      }
    }
    if (poisoned) out.scale = e8m0::nan_bits;
  } else if (poisoned) {
    out.scale = e4m3::nan_bits;
  } else if (m != 0) {
    out.scale = nv_scale<T, Rule>(rules, x, amax, tensor_scale, weights, used);
    if (amax >= tetromino::detail::safely_finite<T>) {
      out.scale = tetromino::detail::finite_scale(e4m3::from_bits(static_cast<std::uint8_t>(out.scale)), amax,
                                                  tensor_scale, rules.rounding(), tetromino::detail::overflow_of<T>)
                      .bits;
    }
    const float step = __fmul_rn(tensor_scale, decode_e4m3(out.scale));
    if (step != 0.0f) {
      if constexpr (Stochastic) {
        float uniform[16];
        u.draw(uniform);
#pragma unroll
        for (std::uint32_t i = 0; i < chunk_size; ++i) {
          if (i >= used) continue;
          const auto code = static_cast<std::uint32_t>(round_stochastic(__fdiv_rn(x.value(i), step), uniform[i]).bits);
          (i < 8 ? out.codes.low : out.codes.high) |= code << (4 * (i % 8));
        }
      } else {
        const divisor by(step, amax);
        if (by.is_plain() && by.template has_codes_by_product<T>()) {
          const code_multiplier inverse(by.inverse());
          out.codes = encode_bits(x, [&](int i) { return inverse.code_bits(fabsf(x.value(i))); });
        } else if (by.is_plain()) {
          out.codes = encode(x, [&](int i) { return by.template divide<T>(fabsf(x.value(i))); });
        } else {
          float magnitude[16];
#pragma unroll
          for (std::uint32_t i = 0; i < 16; ++i) magnitude[i] = fabsf(x.value(i));
          divide_slowly(magnitude, step);
          out.codes = encode(x, [&](int i) { return magnitude[i]; });
        }
      }
    }
  }
  return out;
}

/// Blocks of 256 threads that a multiprocessor holds: of 2048 threads, or 1536. (CUDA Programming Guide, "Technical
/// Specifications per Compute Capability")
#if defined(__CUDA_ARCH__) && ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1100)
inline constexpr unsigned most_blocks_at_once = 6;
#else
inline constexpr unsigned most_blocks_at_once = 8;
#endif

/// Thread blocks that share a multiprocessor: as many as there can be where memory is the limit.
template <class T, pack_rule Rule, bool Stochastic, pack_source Source>
[[nodiscard]] constexpr unsigned blocks_at_once() {
  constexpr bool is_rotated = std::is_void_v<T>;
  if (Stochastic) return 1;
  switch (Rule) {
    case pack_rule::mx:
    case pack_rule::mx_macro:
      return is_rotated ? 5 : Source == pack_source::transposed ? 6 : most_blocks_at_once;
    case pack_rule::nv_amax:
      return is_rotated ? 5 : Source == pack_source::flat ? most_blocks_at_once : 6;
    case pack_rule::mx_min_error:
      return is_rotated ? 4 : 5;
    case pack_rule::mx_macro_search:
      return 4;
    default:
      return 3;
  }
}

/// f.operator()<In>() for the type In of the input: T, or what args.in.type says.
template <class T, class F>
__device__ void with_input_type(const pack_args& args, const F& f) {
  if constexpr (!std::is_void_v<T>) {
    f.template operator()<T>();
  } else if (args.in.type == input_type::float32) {
    f.template operator()<float>();
  } else if (args.in.type == input_type::float16) {
    f.template operator()<half>();
  } else {
    f.template operator()<bfloat16>();
  }
}

/// Reads and packs sixteen elements a thread. T is void if they are to be rotated: they are floats then, whatever the
/// input is.
template <class T, pack_rule Rule, std::uint32_t Block, bool Stochastic, pack_source Source>
__global__ void __launch_bounds__(256, blocks_at_once<T, Rule, Stochastic, Source>())
    pack_kernel(const pack_args args) {
  constexpr bool is_rotated = std::is_void_v<T>;
  using element = std::conditional_t<is_rotated, float, T>;
  chunk_place at;
  chunk<element> y;
  float tensor_scale = 1.0f;
  std::uint32_t m = 0;
  __shared__ std::uint32_t load_room[load_words<Source, T>];
  with_input_type<T>(args, [&]<real In>() {
    chunk<In> x;
    at = load_chunk<Source>(args, load_room, x);
    if constexpr (is_nv<Rule>) {  // volatile: on its way before the elements have come
      asm volatile("ld.global.nc.f32 %0, [%1];"
                   : "=f"(tensor_scale)
                   : "l"(args.tensor_scales.data + (args.tensor_scales.per_matrix ? at.matrix : 0)));
    }
    y = admit_chunk<Source, is_rotated>(args, at, x, m);
  });
  if constexpr (Block == 32) m = max(m, __shfl_xor_sync(full_warp, m, 1));
  const bool poisoned = m >= infinity_bits<element>;
  if (poisoned) {
    y.clear();
    m = 0;
  }

  const float* weights = nullptr;
  if constexpr (Rule == pack_rule::nv_four_over_six || Rule == pack_rule::nv_min_error) {
    if (args.weights.data != nullptr) weights = args.weights.data + at.matrix * args.weights.stride + at.col;
  }
  const std::uint64_t position = static_cast<std::uint64_t>(at.row) * args.rows.cols + at.col;
  __shared__ search_room rooms[Rule == pack_rule::mx_macro_search ? 8 : 1];
  const packed_chunk out = pack<element, Rule, Block, Stochastic>(
      args.rules, y, m, poisoned, tensor_scale, weights, uniform_numbers{args.rules.seed, args.first_index + position},
      at.used, rooms[Rule == pack_rule::mx_macro_search ? threadIdx.x / 32 : 0]);

  if constexpr (Source == pack_source::flat) {
    if (at.used == 0) return;
    reinterpret_cast<uint2*>(args.out.codes)[at.chunk] = make_uint2(out.codes.low, out.codes.high);
    if (Block == 16 || at.chunk % 2 == 0)
      args.out.scales[Block == 16 ? at.chunk : at.chunk / 2] = static_cast<std::uint8_t>(out.scale);
    if constexpr (has_macro<Rule>) {
      const std::uint32_t shift = args.rules.macro_shift - 4;
      if (((at.chunk >> shift) << shift) == at.chunk)
        args.out.macros[at.chunk >> shift] = static_cast<std::uint8_t>(out.macro);
    }
  } else {
    if (args.fake.data != nullptr) {
      constexpr unpack_rule inverse = is_nv<Rule>       ? unpack_rule::nv
                                      : has_macro<Rule> ? unpack_rule::mx_macro
                                                        : unpack_rule::mx;
      const chunk<element> back = unpack<element, inverse>(out.codes, out.scale, out.macro, tensor_scale);
      rotated_chunk rotated;
      if constexpr (is_rotated) {
        rotated = as_floats(back);
        rotated.revert(args.rotation, at.col, args.rows.cols);
      }
      if (at.used == 0) return;
      with_input_type<T>(args, [&]<real In>() {
        chunk<In> x;
        if constexpr (is_rotated) {
          x = as_chunk<In>(rotated);
        } else {
          x = back;
        }
        In* const to = static_cast<In*>(args.fake.data) + args.fake.rows.offset(at.row) + at.col;
        if (at.used == chunk_size && args.fake.is_aligned) {
          x.store(to);
        } else {
          x.store_some(to, at.used);
        }
      });
      return;
    }
    if (!at.is_there || at.col >= args.out.blocks_per_row * Block) return;
    const std::size_t first_block = static_cast<std::size_t>(at.row) * args.out.blocks_per_row;
    *reinterpret_cast<uint2*>(args.out.codes + first_block * (Block / 2) + at.col / 2) =
        make_uint2(out.codes.low, out.codes.high);
    if (at.col % Block == 0) {
      const std::uint32_t block = at.col / Block;
      std::size_t to = first_block + block;
      if (args.out.is_swizzled) {
        const std::uint32_t r = at.row - at.matrix * args.rows.by_rows.divisor;
        to = at.matrix * args.out.swizzled_matrix + swizzled_at(r, block, args.out.blocks_per_row);
      }
      args.out.scales[to] = static_cast<std::uint8_t>(out.scale);
    }
    if constexpr (has_macro<Rule>) {
      if (at.col % args.rules.macro_block == 0) {
        args.out
            .macros[static_cast<std::size_t>(at.row) * args.out.macros_per_row + (at.col >> args.rules.macro_shift)] =
            static_cast<std::uint8_t>(out.macro);
      }
    }
  }
}

/// Whether the rules are among those that only pack_spans_kernel has: factors of 2 bits; searches that round
/// stochastically, that weigh errors, or that go through exponents for each macro-block byte.
[[nodiscard]] inline bool is_rare(const pack_rules& rules, bool is_nv, bool weighted) {
  const bool is_searched = rules.macro_step != 0 || rules.min_error;
  if (rules.fine_elements != 0) return true;
  return !is_nv && is_searched && (rules.stochastic || weighted || (rules.min_error && rules.macro_block != 0));
}

template <class T, pack_rule Rule, std::uint32_t Block, bool Stochastic>
void launch_pack_from(const stream& s, const pack_args& args) {
  if (args.in.tile_cols != 0) {
    pack_kernel<T, Rule, Block, Stochastic, pack_source::transposed>
        <<<transposed_blocks(args), 256, 0, s.handle>>>(args);
  } else {
    pack_kernel<T, Rule, Block, Stochastic, pack_source::rows>
        <<<static_cast<unsigned>((args.chunks + 255) / 256), 256, 0, s.handle>>>(args);
  }
}

template <class T, pack_rule Rule, std::uint32_t Block>
result<void> launch_pack(const stream& s, const pack_args& args) {
  constexpr bool can_be_flat =
      !std::is_void_v<T> && Rule != pack_rule::nv_four_over_six && Rule != pack_rule::nv_min_error;
  if (args.rules.stochastic) {
    if constexpr (Rule != pack_rule::mx_min_error && Rule != pack_rule::mx_macro_search) {
      launch_pack_from<T, Rule, Block, true>(s, args);
    }
  } else if (args.in.is_flat) {
    if constexpr (can_be_flat) {
      pack_kernel<T, Rule, Block, false, pack_source::flat>
          <<<static_cast<unsigned>((args.chunks + 255) / 256), 256, 0, s.handle>>>(args);
    }
  } else {
    launch_pack_from<T, Rule, Block, false>(s, args);
  }
  return status_of(cudaGetLastError(), "the launch of pack_kernel");
}

template <class T, std::uint32_t Block>
result<void> dispatch_mx(const stream& s, const pack_args& args) {
  if (args.rules.macro_step != 0) return launch_pack<T, pack_rule::mx_macro_search, Block>(s, args);
  if (args.rules.min_error) return launch_pack<T, pack_rule::mx_min_error, Block>(s, args);
  if (args.rules.macro_block != 0) return launch_pack<T, pack_rule::mx_macro, Block>(s, args);
  return launch_pack<T, pack_rule::mx, Block>(s, args);
}

/// Launches the kernel for a rule. T is the type of the input, or void if it is to be rotated.
template <class T>
result<void> dispatch_pack(const stream& s, const pack_args& args, scale_rule rule) {
  if (args.tensor_scales.data != nullptr) {
    if (rule == scale_rule::four_over_six) return launch_pack<T, pack_rule::nv_four_over_six, 16>(s, args);
    if (rule == scale_rule::min_error) return launch_pack<T, pack_rule::nv_min_error, 16>(s, args);
    return launch_pack<T, pack_rule::nv_amax, 16>(s, args);
  }
  return args.rules.block == 16 ? dispatch_mx<T, 16>(s, args) : dispatch_mx<T, 32>(s, args);
}

/// Launches what packs a batch of T: the search for the rare rules, else the kernel for the rule.
template <real T>
result<void> launch_packing(const stream& s, const pack_args& args, scale_rule rule) {
  if (is_rare(args.rules, args.tensor_scales.data != nullptr, args.weights.data != nullptr)) {
    return launch_pack_spans<T>(s, args);
  }
  return args.rotation.size != 0 ? dispatch_pack<void>(s, args, rule) : dispatch_pack<T>(s, args, rule);
}

/// Checks what the CUDA backend alone asks of options.
[[nodiscard]] inline result<void> check_options(const stream& s, const quantize_options& options) {
  if (options.special == special_values::reject && s.rejected == nullptr) {
    return error(errc::invalid_argument,
                 "cuda: special_values::reject needs stream::reporting(), since a launch cannot wait for what the data "
                 "holds; or choose poison or saturate");
  }
  return {};
}

/// What all packing kernels are told about a batch: `source` flat if nothing but the input's own layout stands in the
/// way of taking all rows as one; transposed if x is a transposed() input.
template <real T>
result<pack_args> make_args(const stream& s, const batch_view<const T>& x, const any_format& format,
                            const quantize_options& options, std::size_t tensor_scale_count, pack_source source) {
  pack_args args{};
  pack_rules& rules = args.rules;
  rules.block = static_cast<std::uint32_t>(format.block);
  rules.macro_block = static_cast<std::uint32_t>(format.macro_block);
  rules.macro_shift = static_cast<std::uint32_t>(std::bit_width(format.macro_block | 1)) - 1;
  rules.fine_elements = format.macro_bits == 2 ? static_cast<std::uint32_t>(elements_per_factor(format)) : 0;
  rules.carry = carry_of(*options.rule);
  rules.min_error = *options.rule == scale_rule::min_error;
  if (format.macro_block != 0 && options.macro != macro_rule::from_amax) {
    rules.macro_step = options.macro == macro_rule::search ? 16 : 1;
  }
  rules.special = options.special;
  rules.tiny_blocks = options.tiny_blocks;
  rules.stochastic = options.rounding == element_rounding::stochastic;
  rules.seed = options.seed;

  const packed_shape shape{format, x.matrices, x.rows, x.cols};
  const std::size_t span = std::max(format.block, format.macro_block);
  const bool is_nv = format.scale == scale_type::e4m3;
  const bool is_whole = is_rare(rules, is_nv, !options.column_weights.empty());  // spans are not cut into chunks
  args.in.data = x.data;
  args.in.type = input_type_of<T>;
  args.weights.data = options.column_weights.empty() ? nullptr : options.column_weights.data();
  args.weights.stride = options.column_weights.size() > x.cols ? x.cols : 0;
  args.rejected = s.rejected;
  args.first_index = options.first_index;
  args.out.blocks_per_row = static_cast<std::uint32_t>(shape.blocks_per_row());
  args.out.macros_per_row = static_cast<std::uint32_t>(shape.macros_per_row());
  args.tensor_scales.per_matrix = tensor_scale_count > 1;
  args.in.is_aligned = has_aligned_rows(x);
  args.rotation = make_rotation(options.rotation);
  args.in.is_flat = source == pack_source::flat && !is_whole && !rules.stochastic && !options.rotation &&
                    (!is_nv || *options.rule == scale_rule::amax) && args.in.is_aligned && is_dense(x) &&
                    x.cols % span == 0 && !args.tensor_scales.per_matrix;
  if (args.in.is_flat) {
    args.chunks = x.matrices * x.rows * x.cols / chunk_size;
    return args;
  }
  if (source == pack_source::transposed)
    args.in.tile_cols = static_cast<std::uint32_t>(std::max<std::size_t>(128, span));
  const std::size_t together = std::max({span, std::size_t{args.rotation.size}, std::size_t{args.in.tile_cols}});
  auto rows = map_rows(x, pieces_per_row(x.cols, is_whole ? span_size(rules) : chunk_size, together));
  if (!rows) return rows.error();
  args.rows = *rows;
  args.chunks = static_cast<std::size_t>(rows->rows) * rows->chunks_per_row;
  return args;
}

template <real T>
result<void> quantize(const stream& s, const tetromino::detail::quantize_job<T>& job, scale_order order) {
  const auto& x = job.in;
  if (auto fits = check_options(s, job.options); !fits) return fits;
  if (auto fits = check_packed_pointers(job.out.codes.data()); !fits) return fits;
  const bool is_nv = job.out.format.scale == scale_type::e4m3;
  if (is_nv) {
    if (auto done = set_tensor_scales(s, x, pack_source::rows, job.options, job.out.tensor_scales); !done) return done;
  }
  if (x.matrices == 0 || x.rows == 0 || x.cols == 0) return {};
  auto args = make_args(s, x, job.out.format, job.options, job.out.tensor_scales.size(),
                        order == scale_order::swizzled ? pack_source::rows : pack_source::flat);
  if (!args) return args.error();
  args->out.codes = job.out.codes.data(), args->out.scales = job.out.scales.data(),
  args->out.macros = job.out.macros.data();
  if (is_nv) args->tensor_scales.data = job.out.tensor_scales.data();
  if (order == scale_order::swizzled) {
    args->out.is_swizzled = true;
    args->out.swizzled_matrix = layout::swizzled_bytes(1, x.rows, job.out.shape().blocks_per_row());
  }
  return launch_packing<T>(s, *args, *job.options.rule);
}

/// Packs the transpose of job.in: job.out is [matrices, cols, rows] of it.
template <real T>
result<void> quantize_transposed(const stream& s, const tetromino::detail::quantize_job<T>& job) {
  const auto& x = job.in;
  if (auto fits = check_options(s, job.options); !fits) return fits;
  if (auto fits = check_packed_pointers(job.out.codes.data()); !fits) return fits;
  const bool is_nv = job.out.format.scale == scale_type::e4m3;
  if (is_nv) {
    if (auto done = set_tensor_scales(s, x, pack_source::transposed, job.options, job.out.tensor_scales); !done)
      return done;
  }
  if (x.matrices == 0 || x.rows == 0 || x.cols == 0) return {};
  auto args =
      make_args(s, transposed(x), job.out.format, job.options, job.out.tensor_scales.size(), pack_source::transposed);
  if (!args) return args.error();
  args->out.codes = job.out.codes.data(), args->out.scales = job.out.scales.data(),
  args->out.macros = job.out.macros.data();
  if (is_nv) args->tensor_scales.data = job.out.tensor_scales.data();
  return launch_packing<T>(s, *args, *job.options.rule);
}

template <real T>
result<void> fake_quantize(const stream& s, const tetromino::detail::fake_quantize_job<T>& job) {
  const auto& x = job.in;
  if (auto fits = check_options(s, job.options); !fits) return fits;
  std::span<float> tensor_scales{};
  if (job.format.scale == scale_type::e4m3) {
    const std::size_t bytes = fake_quantize_workspace_bytes(job.format, x.matrices, job.options);
    if (s.workspace.size() < bytes || !is_aligned(s.workspace.data(), alignof(float))) {
      return error(errc::shape_mismatch,
                   tetromino::detail::text("cuda: fake_quantize needs ", bytes,
                                           " aligned bytes of stream::with_workspace(), got ", s.workspace.size()));
    }
    tensor_scales = {reinterpret_cast<float*>(s.workspace.data()), bytes / sizeof(float)};
    if (auto done = set_tensor_scales(s, x, pack_source::rows, job.options, tensor_scales); !done) return done;
  }
  if (x.matrices == 0 || x.rows == 0 || x.cols == 0) return {};
  auto args = make_args(s, x, job.format, job.options, tensor_scales.size(), pack_source::rows);
  if (!args) return args.error();
  auto fake_rows = map_rows(job.out, args->rows.chunks_per_row);
  if (!fake_rows) return fake_rows.error();
  args->fake.data = job.out.data;
  args->fake.rows = *fake_rows;
  args->fake.is_aligned = has_aligned_rows(job.out);
  if (!tensor_scales.empty()) args->tensor_scales.data = tensor_scales.data();
  return launch_packing<T>(s, *args, *job.options.rule);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
