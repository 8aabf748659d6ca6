#pragma once

#include "encode.cuh"  // difference_to_nearest, halves_of
#include "args.cuh"    // pack_rules, power_of_two

#include <tetromino/scaling.hpp>  // mx_exponent

#include <concepts>  // std::same_as
#include <cstdint>   // std::uint32_t

/// MX scales and macro-block bytes of least squared error, for warps that hold sixteen elements in each lane. What all
/// backends share is the order of each sum: sixteen strided partial sums, then halves onto halves. Here errors are
/// first estimated in halves, two elements to an instruction, and only candidates that this does not tell from the
/// least have theirs added up in that order.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// What search_macro shares among the lanes of a warp: magnitudes as pairs of halves, and for each the bits that its
/// steps follow from (half_factor says how), which are at least its block's; then each lane's estimates. Or, to add up
/// errors, for each chunk sixteen magnitudes and the largest of its block, with a gap that spreads chunks over the
/// banks.
struct alignas(16) search_room {
  static constexpr std::uint32_t chunk_floats = chunk_size + 4;
  uint4 pairs[32 * 2];
  union {
    struct {
      uint4 steps[32 * 2];
      std::uint32_t block_step[32];
      float estimates[8 * 32];
    };
    float of[32 * chunk_floats];
  };
};

/// The bits of 2^n, or 0 below the normal floats.
[[nodiscard]] __device__ inline int power_bits(int n) { return n >= -126 ? (n + 127) << 23 : 0; }

/// The exponent of the units in which searches have magnitudes as halves: the largest, with exponent `largest`, is 16
/// to 32 units, or less where numbers of type T end.
template <real T>
[[nodiscard]] __device__ inline int half_exponent(int largest) {
  return max(largest, sizeof(T) == 4 ? -122 : std::same_as<T, half> ? -11 : -108) - 4;
}

/// A factor f = 1 + byte / 256, for pairs of halves.
///
/// A magnitude x times f is rounded to E2M1 by a half whose last bit counts the local step: q = s - (s - x f), with one
/// rounding. Half the power of two that x f begins with is that step, and half the block's scale at least, so s has 2^9
/// times the exponent of either: its bits are those of x, or of block_step() if these are more, plus `up`. Adding bits
/// is multiplying, but for what the fractions of x and f lack to their logarithms, 0 to 0.086 each, of which `up` makes
/// up for half: the exponent is wrong only where x f is within 7 % of a power of two, and this is the nearest value in
/// the steps of either side. s - x f has the last bit of s, unless s is a few steps above a power of two; then it has
/// half of that, but x f is as near to a power of two again.
struct half_factor {
  static constexpr std::uint32_t bias = 88;  // 0.086 x 1024
  std::uint32_t of, up;

  half_factor() = default;
  __device__ explicit half_factor(std::uint32_t byte)
      : of((0x3C00u + 4 * byte) * 0x10001u), up(((9u << 10) + bias + 4 * byte) * 0x10001u) {}

  /// What makes s the last bit of half a block's scale. That is 2^exponent under the bytes up to `last`, and twice that
  /// under those above; they are 16 apart, which makes 64 / 1024 here, so that the sum carries into the exponent just
  /// where the scale grows, and with a fraction of 32 / 1024 at least is not within a few steps of a power of two.
  [[nodiscard]] static __device__ std::uint32_t block_step(int exponent, std::uint32_t last) {
    return static_cast<std::uint32_t>(max((exponent + 16) * 1024 - 32 - static_cast<int>(bias + 4 * last), 0)) *
           0x10001u;
  }

  /// -6 scales of that block.
  [[nodiscard]] __device__ std::uint32_t minus_six(std::uint32_t block_step) const {
    return ((block_step + up) & 0x7C007C00u) + (0x8200u - (7u << 10)) * 0x10001u;
  }

  /// The sums of the squares of x f - q for four pairs of magnitudes; q is at most -`lowest` if `Clamped`.
  template <bool Clamped>
  [[nodiscard]] __device__ __half2 squares(const uint4& x, const uint4& steps, std::uint32_t lowest) const {
    const auto difference = [&](std::uint32_t pair, std::uint32_t step) {
      const __half2 y = as_half_pair(pair), shifted = as_half_pair(step + up);
      __half2 minus_nearest = __hsub2(__hfma2(__hneg2(y), as_half_pair(of), shifted), shifted);
      if constexpr (Clamped) minus_nearest = __hmax2(minus_nearest, as_half_pair(lowest));
      return __hfma2(y, as_half_pair(of), minus_nearest);
    };
    const __half2 a = difference(x.x, steps.x), b = difference(x.y, steps.y), c = difference(x.z, steps.z),
                  d = difference(x.w, steps.w);
    return __hfma2(d, d, __hfma2(c, c, __hfma2(b, b, __hmul2(a, a))));
  }
};

/// Estimates the errors of `Count` candidates, bytes `first`, `first` + 16 ..., over chunks `begin`, `begin` + `stride`
/// ... If `Clamped`, no value is above 6 scales where `is_clamped`; else no element is above 7, which is as far from 8.
///
/// An estimate is within 7 x 2^-11 + 2^-16 times the error of these halves, and 2^-15: differences (twice, as they are
/// squared), squares, and four sums on the way of each are rounded to 11 bits, and what is below the normal halves has
/// no square above 2^-26.
template <bool Clamped, int Count>
__device__ void estimate_errors(const search_room& room, std::uint32_t begin, std::uint32_t end, std::uint32_t stride,
                                bool is_clamped, std::uint32_t first, float (&errors)[Count]) {
  half_factor factors[Count];
#pragma unroll
  for (int i = 0; i < Count; ++i) factors[i] = half_factor(first + 16 * i), errors[i] = 0;
#pragma unroll 2
  for (std::uint32_t chunk = begin; chunk < end; chunk += stride) {
    const uint4 x[2] = {room.pairs[2 * chunk], room.pairs[2 * chunk + 1]};
    const uint4 steps[2] = {room.steps[2 * chunk], room.steps[2 * chunk + 1]};
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const std::uint32_t lowest = Clamped && is_clamped ? factors[i].minus_six(room.block_step[chunk]) : 0xFC00FC00u;
      const float2 both = __half22float2(__hadd2(factors[i].template squares<Clamped>(x[0], steps[0], lowest),
                                                 factors[i].template squares<Clamped>(x[1], steps[1], lowest)));
      errors[i] += both.x + both.y;
    }
  }
}

/// The macro-block byte of the least error that was added up, and that error.
struct least_error {
  std::uint32_t byte = 0;
  float error = bit_cast<float>(0x7F800000u);
};

/// The first of some candidates, bytes `first`, `first` + 16 ... with a bit for each.
[[nodiscard]] __device__ inline std::uint32_t first_byte(std::uint32_t first, std::uint32_t candidates) {
  return first + 16 * (static_cast<std::uint32_t>(__ffs(static_cast<int>(candidates))) - 1);
}

/// Adds up the errors of a lane's macro block under some candidates, in the order specified, divided by the factors'
/// squares: sixteen lanes do it for a candidate, each one of the partial sums. The room has magnitudes in units of
/// 2^unit, near the macro block's largest. All lanes of a warp call it together.
template <std::uint32_t Block, bool Usual>
[[nodiscard]] __device__ least_error add_errors(least_error best, const search_room& room, std::uint32_t of_macro,
                                                std::uint32_t first, std::uint32_t candidates, std::uint32_t carry,
                                                int unit) {
  constexpr std::uint32_t size = search_room::chunk_floats;
  const std::uint32_t lane = threadIdx.x % 32, chunks = Usual ? 8 : of_macro;
  std::uint32_t open = __ballot_sync(full_warp, candidates != 0);
  while (open != 0) {
    const int at = __ffs(static_cast<int>(open)) - 1;
    open &= ~(((1u << chunks) - 1) << at);
    const int least_scale = power_bits(-127 - __shfl_sync(full_warp, unit, at));
    for (std::uint32_t left = __shfl_sync(full_warp, candidates, at); left != 0;) {  // two at a time: a half warp each
      const std::uint32_t rest = left & (left - 1);
      const std::uint32_t bytes[2] = {first_byte(first, left), first_byte(first, rest == 0 ? left : rest)};
      const float factor = bit_cast<float>(0x3F800000u | (lane < 16 ? bytes[0] : bytes[1]) << 15);
      const float* const macro = room.of + at * size;
      float sum = 0;
#pragma unroll(Usual ? 8 : 1)
      for (std::uint32_t c = 0; c < chunks; c += Block / chunk_size) {
        const float largest = __fmul_rn(factor, macro[c * size + chunk_size]);
        const auto carried = static_cast<int>((bit_cast<std::uint32_t>(largest) + carry) & 0x7F800000u);
        const float scale = __int_as_float(max(carried - 0x01000000, least_scale));
#pragma unroll
        for (std::uint32_t i = c; i < c + Block / chunk_size; ++i) {
          const float y = __fmul_rn(factor, macro[i * size + lane % 16]);
          const float difference = difference_to_nearest<!Usual>(y, scale);
          sum = __fadd_rn(sum, __fmul_rn(difference, difference));
        }
      }
#pragma unroll
      for (int n = 8; n > 0; n /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(full_warp, sum, n));
      sum = __fdiv_rn(sum, __fmul_rn(factor, factor));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float of = __shfl_sync(full_warp, sum, 16 * i);
        const bool is_less = of < best.error || (of == best.error && bytes[i] < best.byte);  // the smaller keeps ties
        if ((lane ^ static_cast<std::uint32_t>(at)) < chunks && is_less) best = {bytes[i], of};
      }
      left = rest & (rest - 1);
    }
  }
  return best;
}

/// The macro-block byte of least squared error for the macro block that a lane's chunk belongs to; `m` is the largest
/// magnitude of the lane's block. All lanes of a warp call it together.
template <std::uint32_t Block, bool Usual, real T>
[[nodiscard]] __device__ std::uint32_t search_macro_of(const pack_rules& rules, const chunk<T>& x, std::uint32_t m,
                                                       search_room& room) {
  const std::uint32_t lane = threadIdx.x % 32, chunks = Usual ? 8 : 1u << (rules.macro_shift - 4);
  const auto over_macro = [&](auto value, const auto& combine) {
    for (std::uint32_t n = 1; n < chunks; n *= 2) {
      value = combine(value, __shfl_xor_sync(full_warp, value, static_cast<int>(n)));
    }
    return value;
  };
  const auto factor_of = [](std::uint32_t byte) { return bit_cast<float>(0x3F800000u | byte << 15); };
  const std::uint32_t most = over_macro(m, [](std::uint32_t a, std::uint32_t b) { return max(a, b); });
  const int power = static_cast<int>(bit_cast<std::uint32_t>(magnitude_value<T>(most)) >> 23) - 127;
  const int unit = min(max(power, -126), 126);
  const float to_unit = power_of_two(-unit), largest = __fmul_rn(magnitude_value<T>(m), to_unit);

  const int half_unit = half_exponent<T>(power);
  uint4 mine[2];
  float squares = 0;
  __syncwarp();
#pragma unroll
  for (std::uint32_t i = 0; i < 8; i += 4) {
    std::uint32_t pair[4];
#pragma unroll
    for (std::uint32_t k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == 2) {
        pair[k] = halves_of<T>(x.word[i + k] & 0x7FFF7FFFu, half_unit);
      } else {
        const float a = __fmul_rn(fabsf(x.value(2 * (i + k))), power_of_two(-half_unit));
        const float b = __fmul_rn(fabsf(x.value(2 * (i + k) + 1)), power_of_two(-half_unit));
        pair[k] = pack_pair<half>(a, b);
        squares = __fmaf_rn(b, b, __fmaf_rn(a, a, squares));
      }
    }
    room.pairs[2 * lane + i / 4] = mine[i / 4] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
  // Rounding floats to halves moves the root of an error by 2^-11 of the root of this sum at most: no distance to the
  // nearest of some values changes by more than its element does.
  float slack = 0;
  if constexpr (sizeof(T) == 4) {
    slack = 0x1.1p-10f * sqrtf(over_macro(squares, [](float a, float b) { return a + b; }));
  }

  least_error best;
  float least = bit_cast<float>(0x7F800000u);
  const std::uint32_t passes = Usual ? 1 : 16 / rules.macro_step;
#pragma unroll 1
  for (std::uint32_t first = 0; first < passes; ++first) {
    float last = factor_of(first);  // the last factor under which the block has the scale that it has under this one
    const std::uint32_t carried = (bit_cast<std::uint32_t>(__fmul_rn(last, largest)) + rules.carry) >> 23;
    const float next = bit_cast<float>(((carried + 1) << 23) - rules.carry);
#pragma unroll
    for (float step = 0.5f; step > 0.05f; step *= 0.5f) {
      if (__fmul_rn(last + step, largest) < next) last += step;
    }
    int exponent = static_cast<int>(carried) - 129;
    if (exponent < -127 - unit) exponent = -127 - unit, last = factor_of(first + 240);
    const std::uint32_t block_step =
        half_factor::block_step(exponent + unit - half_unit, bit_cast<std::uint32_t>(last) >> 15 & 0xFFu);
    __syncwarp();
#pragma unroll
    for (std::uint32_t i = 0; i < 2; ++i) {
      const uint4 four = Usual ? mine[i] : room.pairs[2 * lane + i];
      const auto at_least = [&](std::uint32_t pair) {
        return as_word(__hmax2(as_half_pair(pair), as_half_pair(block_step)));
      };
      room.steps[2 * lane + i] = make_uint4(at_least(four.x), at_least(four.y), at_least(four.z), at_least(four.w));
    }
    if constexpr (!Usual) room.block_step[lane] = block_step;
    __syncwarp();
    const std::uint32_t own = lane & (chunks - 1), at = lane - own;
    const auto over_square = [&](float error, std::uint32_t byte) {
      return __fdividef(error, factor_of(byte) * factor_of(byte));
    };
    float two[2];  // the usual estimates, which stay in registers
    if constexpr (Usual) {
      float four[4];  // of four candidates over every other chunk
      estimate_errors<false>(room, at + own % 2, at + chunks, 2, false, own / 2 * 64, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] += __shfl_xor_sync(full_warp, four[i], 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) two[i] = over_square(own % 2 == 0 ? four[i] : four[i + 2], 32 * own + 16 * i);
    } else {
      for (std::uint32_t i = own; i < 16; i += chunks) {
        float one[1];
        estimate_errors<true>(room, at, at + chunks, 1, rules.carry == 0, first + 16 * i, one);
        room.estimates[i / chunks * 32 + lane] = over_square(one[0], first + 16 * i);
      }
    }
    const auto for_each_estimate = [&](const auto& f) {
      if constexpr (Usual) {
        f(2 * own, two[0]), f(2 * own + 1, two[1]);
      } else {
        for (std::uint32_t i = own; i < 16; i += chunks) f(i, room.estimates[i / chunks * 32 + lane]);
      }
    };
    for_each_estimate([&](std::uint32_t, float error) { least = fminf(least, error); });
    least = over_macro(least, [](float a, float b) { return fminf(a, b); });

    float bound = least + 0x1p-14f;
    if constexpr (sizeof(T) == 4) bound = (sqrtf(bound) + slack) * (sqrtf(bound) + slack);
    bound = 0x1.01dp0f * bound + 0x1p-14f;
    std::uint32_t left = 0;  // candidates that may have the least error, a bit for each
    for_each_estimate([&](std::uint32_t i, float error) { left |= (error <= bound ? 1u : 0u) << i; });
    left = over_macro(left, [](std::uint32_t a, std::uint32_t b) { return a | b; });
    if (most == 0) left = 1;
    const bool is_open = passes > 1 ? left != 0 : (left & (left - 1)) != 0;
    if (!is_open && left != 0) best.byte = first_byte(first, left);
    if (!__any_sync(full_warp, is_open)) continue;

    __syncwarp();
    float* const magnitudes = room.of + lane * search_room::chunk_floats;
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; i += 4) {
      *reinterpret_cast<float4*>(magnitudes + i) =
          make_float4(__fmul_rn(fabsf(x.value(i)), to_unit), __fmul_rn(fabsf(x.value(i + 1)), to_unit),
                      __fmul_rn(fabsf(x.value(i + 2)), to_unit), __fmul_rn(fabsf(x.value(i + 3)), to_unit));
    }
    magnitudes[chunk_size] = largest;
    __syncwarp();
    best = add_errors<Block, Usual>(best, room, chunks, first, is_open ? left : 0, rules.carry, unit);
  }
  return best.byte;
}

/// The same for all macro blocks and rules, and at once for the usual ones.
template <std::uint32_t Block, real T>
[[nodiscard]] __device__ std::uint32_t search_macro(const pack_rules& rules, const chunk<T>& x, std::uint32_t m,
                                                    search_room& room) {
  return rules.macro_block == 128 && rules.macro_step == 16 && rules.carry != 0
             ? search_macro_of<Block, true>(rules, x, m, room)
             : search_macro_of<Block, false>(rules, x, m, room);
}

/// The exponent of least squared error for a block out of four, the largest up + 1. All lanes of a warp call it
/// together.
template <std::uint32_t Block, real T>
[[nodiscard]] __device__ int search_scale_exactly(const chunk<T>& x, int up) {
  int best = 0;
  float least = 0;
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
  for (int step = 1; step >= -2; --step) {  // the larger scale first: it keeps ties
    const int e = min(max(up + step, -127), 127);
    const float to_scale = inverse_power_of_two(e);
    float partial[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float y = __fmul_rn(fabsf(x.value(i)), to_scale);
      const bool is_unclamped = sizeof(T) == 4 && step >= 0;  // known where the loop is unrolled
      const float difference =
          is_unclamped ? difference_to_nearest<false>(y, 1.0f) : difference_to_nearest<true>(y, 1.0f);
      partial[i] = __fmul_rn(difference, difference);
    }
    if constexpr (Block == 32) {
#pragma unroll
      for (int i = 0; i < 16; ++i) partial[i] = __fadd_rn(partial[i], __shfl_xor_sync(full_warp, partial[i], 1));
    }
    const float total = __fmul_rn(sum_halves(partial), power_of_two(2 * (e - up)));
    if (step == 1 || total < least) best = e, least = total;
  }
  return best;
}

/// The E8M0 code of least squared error for a block. All lanes of a warp call it together.
///
/// Elements of 16 bits are first rounded as halves, where their differences are exact, and four squares at a time added
/// up: that is within 2^-9 of their sum, but for 2^-19, so that another exponent than the least is out of the question
/// where it errs by 2^-7 more.
template <std::uint32_t Block, real T>
[[nodiscard]] __device__ std::uint32_t search_scale(const chunk<T>& x, float amax) {
  const int exponent = static_cast<int>(bit_cast<std::uint32_t>(amax) >> 23) - 127;
  const int power = min(max(exponent, -126), 126);
  const int up = min(max(power + mx_exponent(__fmul_rn(amax, power_of_two(-power)), 0x3FFFFFu), -127), 127);
  if constexpr (sizeof(T) == 4) {
    return static_cast<std::uint32_t>(search_scale_exactly<Block>(x, up) + 127);
  } else {
    const int half_unit = half_exponent<T>(exponent);
    std::uint32_t pair[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) pair[i] = halves_of<T>(x.word[i] & 0x7FFF7FFFu, half_unit);
    int best = up;
    float least = bit_cast<float>(0x7F800000u), second = least;
#pragma unroll
    for (int step = 1; step >= -2; --step) {
      // As in half_factor, for a factor of 1: 2^9 more than an element, and 768 scales at least. 6 scales are 1.5 x
      // 2^2.
      const std::uint32_t scale = static_cast<std::uint32_t>(max(up + step - half_unit + 15, 0)) * 0x04000400u;
      __half2 sums[2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const __half2 y = as_half_pair(pair[i]);
        const __half2 shifted = __hmax2(as_half_pair(pair[i] + 0x24002400u), as_half_pair(scale + 0x26002600u));
        __half2 minus_nearest = __hsub2(__hsub2(shifted, y), shifted);
        if (step < 0) minus_nearest = __hmax2(minus_nearest, as_half_pair(scale + 0x8A008A00u));
        const __half2 difference = __hadd2(y, minus_nearest);
        sums[i / 4] = i % 4 == 0 ? __hmul2(difference, difference) : __hfma2(difference, difference, sums[i / 4]);
      }
      const float2 a = __half22float2(sums[0]), b = __half22float2(sums[1]);
      float total = (a.x + a.y) + (b.x + b.y);
      if constexpr (Block == 32) total += __shfl_xor_sync(full_warp, total, 1);
      if (total < least) best = up + step;
      second = fminf(second, fmaxf(least, total));
      least = fminf(least, total);
    }
    const bool is_open = amax != 0.0f && (second <= 0x1.02p0f * least + 0x1p-12f || up < -125 || up > 126);
    if (__any_sync(full_warp, is_open)) {
      const int exact = search_scale_exactly<Block>(x, up);
      if (is_open) best = exact;
    }
    return static_cast<std::uint32_t>(best + 127);
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
