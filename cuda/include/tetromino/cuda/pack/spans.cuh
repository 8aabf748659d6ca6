#pragma once

#include "decode.cuh"  // unpack
#include "encode.cuh"  // difference_to_nearest
#include "rotate.cuh"  // rotated_chunk
#include "args.cuh"    // pack_args
#include "load.cuh"    // chunk_place

#include <tetromino/detail/finite_scales.hpp>  // finite_exponent, finite_fine_exponent
#include <tetromino/scaling.hpp>               // mx_exponent, fine_factor

#include <algorithm>  // std::max
#include <cstddef>    // std::size_t
#include <cstdint>    // std::uint32_t

/// Packing MX blocks by least squared error: scale_rule::min_error, and searched macro-block bytes; and all blocks with
/// factors of 2 bits. Sixteen lanes share a span (a macro block, or a block): lane j holds the elements j, j + 16,
/// j + 32 ..., which are those that meet in partial sum j of the specified order, so that its additions are a lane's
/// own followed by a butterfly.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Adds the partial sums of sixteen lanes, halves onto halves; every lane gets the sum.
[[nodiscard]] __device__ inline float sum_lanes(float partial) {
#pragma unroll
  for (int n = 8; n > 0; n /= 2) partial = __fadd_rn(partial, __shfl_xor_sync(full_warp, partial, n));
  return partial;
}

/// How far the elements of a type decode to finite values: below `safe` under every scale, from `overflow` on not.
struct finite_limits {
  float safe, overflow;

  template <real T>
  [[nodiscard]] __device__ static finite_limits of() {
    return {tetromino::detail::safely_finite<T>, tetromino::detail::overflow_of<T>};
  }
};

/// The elements of a span that one lane holds, N of them, with blocks of `PerBlock` * 16, and how they are packed.
template <int N, int PerBlock>
struct lane_span {
  static constexpr int size = N, per_block = PerBlock, blocks = N / PerBlock;
  float near_one[N];  ///< magnitude times 2^-power of its block, so that no product overflows
  float weight[N];
  std::uint32_t amax[blocks];  ///< float bits
  std::uint32_t macro = 0;
  float factor = 1.0f;

  /// Element i, once the amax of its block is known.
  __device__ void set(int i, float magnitude) {
    near_one[i] = __fmul_rn(magnitude, power_of_two(-power(i / PerBlock)));
  }

  /// Chooses the macro byte; `most` is the largest magnitude of the span. All lanes of a warp call it together.
  __device__ void choose_factors(const pack_rules& rules, std::uint32_t most, bool weighted, const finite_limits&) {
    if (rules.macro_step != 0) {
      macro = weighted ? search_macro<true>(rules, most) : search_macro<false>(rules, most);
    } else if (rules.macro_block != 0 && most != 0) {
      macro = bit_cast<std::uint32_t>(__fdiv_rn(6.0f, bit_cast<float>(most))) >> 15 & 0xFFu;
    }
    factor = bit_cast<float>(0x3F800000u | macro << 15);
  }
  /// The E8M0 exponent of block b, with the factor chosen. All lanes of a warp call it together.
  [[nodiscard]] __device__ int exponent(const pack_rules& rules, int b, bool weighted,
                                        const finite_limits& limits) const {
    const int e = weighted ? exponent<true>(rules, b, factor) : exponent<false>(rules, b, factor);
    const float largest = bit_cast<float>(amax[b]);
    if (largest < limits.safe) return e;
    return tetromino::detail::finite_exponent(e, largest, factor, rules.rounding(), limits.overflow);
  }
  /// The magnitude of element i over its factor and 2^exponent.
  [[nodiscard]] __device__ float quotient(int i, int exponent) const {
    return __fmul_rn(__fmul_rn(factor, near_one[i]), power_of_two(power(i / PerBlock) - exponent));
  }
  /// What element i is unpacked to.
  template <real T>
  [[nodiscard]] __device__ T unpacked(const pack_rules& rules, int, std::uint32_t code, std::uint32_t scale) const {
    return rules.macro_block != 0 ? unpack<T, unpack_rule::mx_macro>({code, 0}, scale, macro, 1.0f).element(0)
                                  : unpack<T, unpack_rule::mx>({code, 0}, scale, 0, 1.0f).element(0);
  }
  /// The byte of factors that begins at column `col`, where this span does.
  [[nodiscard]] __device__ std::uint32_t macro_byte(const pack_rules&, std::uint32_t) const { return macro; }

  [[nodiscard]] __device__ int power(int b) const { return min(max(static_cast<int>(amax[b] >> 23) - 127, -126), 126); }

  /// The largest magnitude of block b times the factor, in units of 2^power.
  [[nodiscard]] __device__ float scaled_amax(int b, float factor) const {
    return __fmul_rn(factor, __fmul_rn(bit_cast<float>(amax[b]), power_of_two(-power(b))));
  }

  /// `partial` plus this lane's squared errors in block b under scale 2^exponent, in units of 2^unit.
  template <bool Weighted>
  [[nodiscard]] __device__ float add_errors(int b, float factor, int exponent, int unit, float partial) const {
    const float to_scale = power_of_two(power(b) - exponent);
    const float to_unit = power_of_two(max(exponent - unit, -126));
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) {
      const float y = __fmul_rn(__fmul_rn(factor, near_one[i]), to_scale);
      const float difference = __fmul_rn(difference_to_nearest<true>(y, 1.0f), to_unit);
      float square = __fmul_rn(difference, difference);
      if constexpr (Weighted) square = __fmul_rn(weight[i], square);
      partial = __fadd_rn(partial, square);
    }
    return partial;
  }

  /// The E8M0 exponent of block b; a search goes without weights where these do not tell the exponents apart. All lanes
  /// of a warp call it together.
  template <bool Weighted>
  [[nodiscard]] __device__ int exponent(const pack_rules& rules, int b, float factor) const {
    const auto clamped = [](int e) { return min(max(e, -127), 127); };
    const float largest = scaled_amax(b, factor);
    if (!rules.min_error) return clamped(power(b) + mx_exponent(largest, rules.carry));
    const int up = clamped(power(b) + mx_exponent(largest, 0x3FFFFFu));
    int best = 0;
    float least = 0, of_first = 0;
    bool tells_apart = false;
    for (int step = 1; step >= -2; --step) {  // the larger scale first: it keeps ties
      const int e = clamped(up + step);
      const float total = __fmul_rn(sum_lanes(add_errors<Weighted>(b, factor, e, e, 0.0f)), power_of_two(2 * (e - up)));
      if (step == 1) of_first = total;
      tells_apart = tells_apart || total < of_first || of_first < total;
      if (step == 1 || total < least) best = e, least = total;
    }
    if constexpr (Weighted) {
      if (__any_sync(full_warp, !tells_apart)) {
        const int plain = exponent<false>(rules, b, factor);
        if (!tells_apart) best = plain;
      }
    }
    return best;
  }

  /// The macro-block byte of least squared error, without weights where these do not tell the bytes apart. All lanes of
  /// a warp call it together.
  template <bool Weighted>
  [[nodiscard]] __device__ std::uint32_t search_macro(const pack_rules& rules, std::uint32_t most) const {
    const int unit = min(max(static_cast<int>(most >> 23) - 127, -126), 126);
    std::uint32_t best = 0;
    float least = 0, of_first = 0;
    bool tells_apart = false;
    for (std::uint32_t m = 0; m < 256; m += rules.macro_step) {
      const float factor = bit_cast<float>(0x3F800000u | m << 15);
      float partial = 0;
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        const int e = exponent<Weighted>(rules, b, factor);
        if (amax[b] != 0) partial = add_errors<Weighted>(b, factor, e, unit, partial);
      }
      const float total = __fdiv_rn(sum_lanes(partial), __fmul_rn(factor, factor));
      if (m == 0) of_first = total;
      tells_apart = tells_apart || total < of_first || of_first < total;
      if (m == 0 || total < least) best = m, least = total;
    }
    if constexpr (Weighted) {
      if (__any_sync(full_warp, !tells_apart)) {
        const std::uint32_t plain = search_macro<false>(rules, most);
        if (!tells_apart) best = plain;
      }
    }
    return most == 0 ? 0 : best;
  }
};

/// A block of 32 elements with factors of 2 bits: lane j holds elements j and j + 16, and the m of their groups of 8 or
/// 16 elements. The same calls as lane_span's.
struct fine_span {
  static constexpr int size = 2, per_block = 2, blocks = 1;
  float magnitude[2];
  float weight[2];
  std::uint32_t amax[1];  ///< float bits
  std::uint32_t m[2] = {};
  int chosen = 0;

  __device__ void set(int i, float x) { magnitude[i] = x; }

  __device__ void choose_factors(const pack_rules& rules, std::uint32_t, bool weighted, const finite_limits& limits) {
    const candidate best = weighted ? choose<true>(rules) : choose<false>(rules);
    m[0] = best.m[0], m[1] = best.m[1], chosen = best.exponent;
    const bool is_large = bit_cast<float>(amax[0]) >= limits.safe;
    if (!__any_sync(full_warp, is_large)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float largest = over_group(rules, magnitude[i], [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
      for (std::uint32_t eight = 0; eight < 2; ++eight) {  // group by group, as the exponent falls
        const auto lane = static_cast<int>((threadIdx.x & 16u) + 8 * eight);
        const float of_group = __shfl_sync(full_warp, largest, lane);
        const std::uint32_t group_m = __shfl_sync(full_warp, m[i], lane);
        if (!is_large || (eight == 1 && rules.fine_elements == 16)) continue;
        chosen = tetromino::detail::finite_fine_exponent(chosen, of_group, group_m, rules.rounding(), limits.overflow);
      }
    }
  }
  [[nodiscard]] __device__ int exponent(const pack_rules&, int, bool, const finite_limits&) const { return chosen; }
  [[nodiscard]] __device__ float quotient(int i, int exponent) const {
    return __fmul_rn(__fmul_rn(magnitude[i], inverse_power_of_two(exponent)), fine_inverse(m[i]));
  }
  template <real T>
  [[nodiscard]] __device__ T unpacked(const pack_rules&, int i, std::uint32_t code, std::uint32_t scale) const {
    return unpack<T, unpack_rule::mx_fine>({code, 0}, scale, m[i], 1.0f).element(0);
  }
  /// With the factors of the next block where a byte has those of two: that block is the one of the warp's other lanes,
  /// which all call it together.
  [[nodiscard]] __device__ std::uint32_t macro_byte(const pack_rules& rules, std::uint32_t col) const {
    if (rules.fine_elements == 8) {
      const std::uint32_t own = (m[0] | m[1] << 4) << (threadIdx.x % 16 / 8 * 2);
      return own | __shfl_xor_sync(full_warp, own, 8);
    }
    const std::uint32_t own = (m[0] | m[1] << 2) << (col / 32 % 2 * 4);
    return own | __shfl_xor_sync(full_warp, own, 16);
  }

 private:
  /// Factors under a scale, and the error with them in units of that scale.
  struct candidate {
    int exponent;
    std::uint32_t m[2];
    float total;
  };

  /// Combines what the lanes of a group have, halves onto halves; all of them get the result.
  template <class Combine>
  [[nodiscard]] __device__ static float over_group(const pack_rules& rules, float x, const Combine& combine) {
    if (rules.fine_elements == 16) x = combine(x, __shfl_xor_sync(full_warp, x, 8));
#pragma unroll
    for (int n = 4; n > 0; n /= 2) x = combine(x, __shfl_xor_sync(full_warp, x, n));
    return x;
  }

  /// How far x is from what it decodes to under a factor, both over the block's scale.
  [[nodiscard]] __device__ static float difference(float x, float inverse, float factor) {
    return __fmaf_rn(-nearest_value<true>(__fmul_rn(x, inverse), 1.0f), factor, x);
  }

  /// The m of the group of an element, which is x over the block's scale, and the group's error with it; a search goes
  /// without weights where these do not tell the factors apart. All lanes of a warp call it together.
  template <bool Weighted>
  __device__ static void choose_factor(const pack_rules& rules, float x, float weight, std::uint32_t& best,
                                       float& error) {
    constexpr float factors[4] = {fine_factor(0), fine_factor(1), fine_factor(2), fine_factor(3)};
    constexpr float inverses[4] = {fine_inverse(0), fine_inverse(1), fine_inverse(2), fine_inverse(3)};
    const bool by_largest = rules.macro_step == 0;  // in all threads alike
    const float largest = by_largest ? over_group(rules, x, [](float a, float b) { return fmaxf(a, b); }) : 0.0f;
    float least = 0, of_first = 0;
    bool tells_apart = false;
#pragma unroll
    for (std::uint32_t i = 0; i < 4; ++i) {
      const float off = difference(x, inverses[i], factors[i]);
      float square = __fmul_rn(off, off);
      if constexpr (Weighted) square = __fmul_rn(weight, square);
      const float sum = over_group(rules, square, [](float a, float b) { return __fadd_rn(a, b); });
      const float key = by_largest ? fabsf(difference(largest, inverses[i], factors[i])) : sum;
      if (i == 0) of_first = key;
      tells_apart = tells_apart || key < of_first || of_first < key;
      if (i == 0 || key < least) best = i, least = key, error = sum;
    }
    if constexpr (Weighted) {
      if (!by_largest && __any_sync(full_warp, !tells_apart)) {
        std::uint32_t plain = 0;
        float unused = 0;
        choose_factor<false>(rules, x, weight, plain, unused);
        if (!tells_apart) best = plain;
      }
    }
  }

  template <bool Weighted>
  [[nodiscard]] __device__ candidate under(const pack_rules& rules, int exponent) const {
    candidate out{exponent, {}, 0.0f};
    const float to_scale = inverse_power_of_two(exponent);
    float error[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      choose_factor<Weighted>(rules, __fmul_rn(magnitude[i], to_scale), weight[i], out.m[i], error[i]);
    }
    out.total = __fadd_rn(error[0], error[1]);
    if (rules.fine_elements == 8) out.total = __fadd_rn(out.total, __shfl_xor_sync(full_warp, out.total, 8));
    return out;
  }

  /// The exponent and the factors; a search goes without weights where these do not tell the exponents apart. All lanes
  /// of a warp call it together.
  template <bool Weighted>
  [[nodiscard]] __device__ candidate choose(const pack_rules& rules) const {
    const auto exponent_by = [&](std::uint32_t carry) {
      return min(max(mx_exponent(bit_cast<float>(amax[0]), carry), -127), 127);
    };
    if (!rules.min_error) return under<Weighted>(rules, exponent_by(rules.carry));
    const int up = exponent_by(carry_of(scale_rule::round_up));
    candidate best{};
    float least = 0, of_first = 0;
    bool tells_apart = false;
#pragma unroll 1
    for (int step = 1; step >= -2; --step) {  // the larger scale first: it keeps ties
      const candidate next = under<Weighted>(rules, min(max(up + step, -127), 127));
      const float total = __fmul_rn(next.total, power_of_two(2 * (next.exponent - up)));
      if (step == 1) of_first = total;
      tells_apart = tells_apart || total < of_first || of_first < total;
      if (step == 1 || total < least) best = next, least = total;
    }
    if constexpr (Weighted) {
      if (__any_sync(full_warp, !tells_apart)) {
        const candidate plain = choose<false>(rules);
        if (!tells_apart) best = plain;
      }
    }
    return best;
  }
};

/// Rotates the spans of a thread block in shared memory, or takes them back. All its threads call it together.
template <int N, bool Forward>
__device__ void rotate_spans(const rotation_args& rotation, const row_map& rows, float* shared) {
  __syncthreads();
  const std::uint32_t t = threadIdx.x;
  if (t / 32 * 32 < 16 * N) {  // a chunk for each thread
    float* const own = shared + t % (16 * N) * chunk_size;
    const std::uint32_t piece = blockIdx.x * 16 + t % (16 * N) / N, row = rows.by_chunks.quotient(piece);
    const std::uint32_t col = ((piece - row * rows.chunks_per_row) * N + t % N) * chunk_size;
    rotated_chunk x;
#pragma unroll
    for (std::uint32_t i = 0; i < chunk_size; ++i) x.x[i] = own[i];
    if constexpr (Forward) {
      x.rotate(rotation, col, rows.cols);
    } else {
      x.revert(rotation, col, rows.cols);
    }
    __syncwarp();
    if (t < 16 * N) {
#pragma unroll
      for (std::uint32_t i = 0; i < chunk_size; ++i) own[i] = x.x[i];
    }
  }
  __syncthreads();
}

/// Packs one span for every sixteen lanes; a Span is lane_span or fine_span.
template <real T, class Span>
__global__ void __launch_bounds__(256) pack_spans_kernel(const pack_args args) {
  constexpr int N = Span::size, PerBlock = Span::per_block;
  constexpr std::uint32_t block = PerBlock * 16;
  __shared__ float shared[256 * N];
  const std::size_t number = static_cast<std::size_t>(blockIdx.x) * 16 + threadIdx.x / 16;
  const std::uint32_t lane = threadIdx.x % 16;
  const bool exists = number < args.chunks, is_rotated = args.rotation.size != 0,
             is_transposed = args.in.tile_cols != 0;
  const std::uint32_t piece = exists ? static_cast<std::uint32_t>(number) : 0;
  chunk_place at;
  at.row = args.rows.by_chunks.quotient(piece);
  at.col = (piece - at.row * args.rows.chunks_per_row) * (N * 16);
  at.matrix = args.rows.by_rows.quotient(at.row);
  const std::uint32_t row = at.row, col = at.col, matrix = at.matrix;
  const std::uint32_t in_matrix = row - matrix * args.rows.by_rows.divisor;
  const std::size_t row_step = is_transposed ? 1 : args.rows.row_stride,
                    col_step = is_transposed ? args.rows.row_stride : 1;
  const T* const from =
      static_cast<const T*>(args.in.data) + matrix * args.rows.matrix_stride + in_matrix * row_step + col * col_step;
  float* const own = shared + threadIdx.x / 16 * (16 * N) + lane;  // elements lie 16 apart

  Span x;
  std::uint32_t negative = 0, poisoned = 0;  // a bit for each element, for each block
  float value[N];
  // What the special-value policy makes of element i, from a type with this largest value.
  const auto admit = [&](int i, float largest) {
    if ((bit_cast<std::uint32_t>(value[i]) & 0x7F800000u) != 0x7F800000u) return true;
    if (args.rules.special == special_values::saturate) {
      const bool is_nan = (bit_cast<std::uint32_t>(value[i]) & 0x7FFFFFu) != 0;
      value[i] = is_nan ? 0.0f : copysignf(largest, value[i]);
    }
    return args.rules.special != special_values::reject;
  };
  const auto refuse = [&](int i) {
    const std::uint32_t k = static_cast<std::uint32_t>(16 * i) + lane;
    report_rejection(args.rejected, is_transposed ? at.position<pack_source::transposed>(args, k)
                                                  : at.position<pack_source::rows>(args, k));
  };
  bool is_refused = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const std::uint32_t k = 16 * i + lane;
    const bool here = exists && col + k < args.rows.cols;
    value[i] = here ? tetromino::detail::to_float(from[k * col_step]) : 0.0f;
    x.weight[i] = here && args.weights.data != nullptr
                      ? counted_weight(args.weights.data[matrix * args.weights.stride + col + k])
                      : 1.0f;
    if (!admit(i, tetromino::detail::largest<T>)) refuse(i), is_refused = true;
  }
  if (is_rotated) {
    const bool is_spread = __syncthreads_or(is_refused) != 0;  // a refused value is in all of its block
#pragma unroll
    for (int i = 0; i < N; ++i) own[16 * i] = value[i];
    rotate_spans<N, true>(args.rotation, args.rows, shared);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = own[16 * i];
      if (!admit(i, tetromino::detail::largest<float>) && !is_spread) refuse(i);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) negative |= (bit_cast<std::uint32_t>(value[i]) >> 31) << i;
  const bool weighted = args.weights.data != nullptr;  // in all threads alike
  std::uint32_t most = 0;
#pragma unroll
  for (int b = 0; b < Span::blocks; ++b) {
    std::uint32_t m = 0;
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) m = max(m, bit_cast<std::uint32_t>(value[i]) & 0x7FFFFFFFu);
#pragma unroll
    for (int n = 8; n > 0; n /= 2) m = max(m, __shfl_xor_sync(full_warp, m, n));
    const bool bad = m >= 0x7F800000u;
    if (bad) poisoned |= 1u << b, m = 0;
    x.amax[b] = m;
    most = max(most, m);
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) {
      x.set(i, bad ? 0.0f : fabsf(value[i]));
    }
  }

  const finite_limits limits = is_rotated ? finite_limits::of<float>() : finite_limits::of<T>();
  x.choose_factors(args.rules, most, weighted, limits);
  const std::uint32_t macro = x.macro_byte(args.rules, col);
  const std::size_t first_block = static_cast<std::size_t>(row) * args.out.blocks_per_row;
  T* const to_fake =
      args.fake.data == nullptr ? nullptr : static_cast<T*>(args.fake.data) + args.fake.rows.offset(row) + col;
  const uniform_numbers u{args.rules.seed, args.first_index + static_cast<std::uint64_t>(row) * args.rows.cols};

#pragma unroll
  for (int b = 0; b < Span::blocks; ++b) {
    const int e = x.exponent(args.rules, b, weighted, limits);
    const std::uint32_t column = col + block * b;
    const bool is_poisoned = (poisoned >> b & 1) != 0;
    std::uint32_t scale = x.amax[b] == 0 ? 0 : static_cast<std::uint32_t>(e + 127);
    if (is_poisoned) scale = e8m0::nan_bits;
    if (exists && args.fake.data == nullptr && lane == 0 && column < args.rows.cols) {
      std::size_t at = first_block + column / block;
      if (args.out.is_swizzled) {
        const std::uint32_t r = row - matrix * args.rows.by_rows.divisor;
        at = matrix * args.out.swizzled_matrix + swizzled_at(r, column / block, args.out.blocks_per_row);
      }
      args.out.scales[at] = static_cast<std::uint8_t>(scale);
    }
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) {
      const float y = x.quotient(i, e);
      const std::uint32_t k = col + 16 * i + lane, sign = (negative >> i & 1) << 3;
      std::uint32_t code = (code_bits(y) & 7u) | sign;
      if (args.rules.stochastic) code = round_stochastic(sign != 0 ? -y : y, uniform(u.seed, u.first + k)).bits;
      if (x.amax[b] == 0 || k >= args.rows.cols) code = 0;
      if (args.fake.data != nullptr) {
        if (is_rotated) {
          own[16 * i] = x.template unpacked<float>(args.rules, i, code, scale);
        } else if (exists && k < args.rows.cols) {
          to_fake[16 * i + lane] = x.template unpacked<T>(args.rules, i, code, scale);
        }
        continue;
      }
      const std::uint32_t pair = code | __shfl_xor_sync(full_warp, code, 1) << 4;
      if (exists && lane % 2 == 0 && column < args.rows.cols) {
        args.out.codes[first_block * (block / 2) + (col + 16 * i + lane) / 2] = static_cast<std::uint8_t>(pair);
      }
    }
  }
  if (args.fake.data != nullptr) {
    if (!is_rotated) return;
    rotate_spans<N, false>(args.rotation, args.rows, shared);
#pragma unroll
    for (std::uint32_t k = 0; k < 16 * N; k += 16) {
      if (exists && col + k + lane < args.rows.cols) to_fake[k + lane] = round_to<T>(own[k]);
    }
  } else if (exists && lane == 0 && args.rules.macro_block != 0 && col % args.rules.macro_block == 0 &&
             col < args.rows.cols) {
    args.out.macros[static_cast<std::size_t>(row) * args.out.macros_per_row + col / args.rules.macro_block] =
        static_cast<std::uint8_t>(macro);
  }
}

template <real T, class Span>
result<void> launch_pack_spans_of(const stream& s, const pack_args& args) {
  pack_spans_kernel<T, Span><<<static_cast<unsigned>((args.chunks + 15) / 16), 256, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), "the launch of pack_spans_kernel");
}

/// Elements of a span: those that share anything; but of factors of 2 bits, those of two blocks can share a byte.
[[nodiscard]] inline std::size_t span_size(const pack_rules& rules) {
  return rules.fine_elements != 0 ? rules.block : std::max(rules.block, rules.macro_block);
}

/// Launches the kernel for spans.
template <real T>
result<void> launch_pack_spans(const stream& s, const pack_args& args) {
  if (args.rules.fine_elements != 0) return launch_pack_spans_of<T, fine_span>(s, args);
  const std::size_t span = span_size(args.rules);
  if (args.rules.block == 16) {
    switch (span) {
      case 16:
        return launch_pack_spans_of<T, lane_span<1, 1>>(s, args);
      case 32:
        return launch_pack_spans_of<T, lane_span<2, 1>>(s, args);
      case 64:
        return launch_pack_spans_of<T, lane_span<4, 1>>(s, args);
      case 128:
        return launch_pack_spans_of<T, lane_span<8, 1>>(s, args);
      default:
        return launch_pack_spans_of<T, lane_span<16, 1>>(s, args);
    }
  }
  switch (span) {
    case 32:
      return launch_pack_spans_of<T, lane_span<2, 2>>(s, args);
    case 64:
      return launch_pack_spans_of<T, lane_span<4, 2>>(s, args);
    case 128:
      return launch_pack_spans_of<T, lane_span<8, 2>>(s, args);
    default:
      return launch_pack_spans_of<T, lane_span<16, 2>>(s, args);
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
