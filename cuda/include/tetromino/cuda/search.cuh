#pragma once

#include "decode.cuh"  // unpack
#include "encode.cuh"  // difference_to_nearest
#include "rows.cuh"    // pack_args

#include <tetromino/scaling.hpp>  // mx_exponent, macro_factor

#include <cstdint>  // std::uint32_t

/// Packing MX blocks by least squared error: scale_rule::min_error, and searched macro-block bytes. Sixteen lanes share
/// a span (a macro block, or a block): lane j holds the elements j, j + 16, j + 32 ..., which are those that meet in
/// partial sum j of the specified order, so that its additions are a lane's own followed by a butterfly.
namespace tetromino::cuda::detail {

/// Adds the partial sums of sixteen lanes, halves onto halves; every lane gets the sum.
[[nodiscard]] __device__ inline float sum_lanes(float partial) {
#pragma unroll
  for (int n = 8; n > 0; n /= 2) partial = __fadd_rn(partial, __shfl_xor_sync(full_warp, partial, n));
  return partial;
}

/// The elements of a span that one lane holds, N of them, with blocks of `PerBlock` * 16.
template <int N, int PerBlock>
struct lane_span {
  static constexpr int blocks = N / PerBlock;
  float near_one[N];  ///< magnitude times 2^-power of its block, so that no product overflows
  float weight[N];
  std::uint32_t amax[blocks];  ///< float bits
  bool weighted;

  [[nodiscard]] __device__ int power(int b) const { return min(max(static_cast<int>(amax[b] >> 23) - 127, -126), 126); }

  /// The largest magnitude of block b times the factor, in units of 2^power.
  [[nodiscard]] __device__ float scaled_amax(int b, float factor) const {
    return __fmul_rn(factor, __fmul_rn(bit_cast<float>(amax[b]), power_of_two(-power(b))));
  }

  /// `partial` plus this lane's squared errors in block b under scale 2^exponent, in units of 2^unit.
  [[nodiscard]] __device__ float add_errors(int b, float factor, int exponent, int unit, float partial) const {
    const float to_scale = power_of_two(power(b) - exponent);
    const float to_unit = power_of_two(max(exponent - unit, -126));
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) {
      const float y = __fmul_rn(__fmul_rn(factor, near_one[i]), to_scale);
      const float difference = __fmul_rn(difference_to_nearest<true>(y, 1.0f), to_unit);
      float square = __fmul_rn(difference, difference);
      if (weighted) square = __fmul_rn(weight[i], square);
      partial = __fadd_rn(partial, square);
    }
    return partial;
  }

  /// The E8M0 exponent of block b. All lanes of a warp call it together.
  [[nodiscard]] __device__ int exponent(const pack_rules& rules, int b, float factor) const {
    const auto clamped = [](int e) { return min(max(e, -127), 127); };
    const float largest = scaled_amax(b, factor);
    if (!rules.min_error) return clamped(power(b) + mx_exponent(largest, rules.carry));
    const int up = clamped(power(b) + mx_exponent(largest, 0x3FFFFFu));
    int best = 0;
    float least = 0;
    for (int step = 1; step >= -2; --step) {  // the larger scale first: it keeps ties
      const int e = clamped(up + step);
      const float total = __fmul_rn(sum_lanes(add_errors(b, factor, e, e, 0.0f)), power_of_two(2 * (e - up)));
      if (step == 1 || total < least) best = e, least = total;
    }
    return best;
  }

  /// The macro-block byte of least squared error. All lanes of a warp call it together.
  [[nodiscard]] __device__ std::uint32_t search_macro(const pack_rules& rules, std::uint32_t most) const {
    const int unit = min(max(static_cast<int>(most >> 23) - 127, -126), 126);
    std::uint32_t best = 0;
    float least = 0;
    for (std::uint32_t m = 0; m < 256; m += rules.macro_step) {
      const float factor = bit_cast<float>(0x3F800000u | m << 15);
      float partial = 0;
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        const int e = exponent(rules, b, factor);
        if (amax[b] != 0) partial = add_errors(b, factor, e, unit, partial);
      }
      const float total = __fdiv_rn(sum_lanes(partial), __fmul_rn(factor, factor));
      if (m == 0 || total < least) best = m, least = total;
    }
    return most == 0 ? 0 : best;
  }
};

/// Packs one span for every sixteen lanes.
template <real T, int N, int PerBlock>
__global__ void __launch_bounds__(256) search_kernel(const pack_args<T> args) {
  constexpr std::uint32_t block = PerBlock * 16;
  using span = lane_span<N, PerBlock>;
  const std::size_t number = static_cast<std::size_t>(blockIdx.x) * 16 + threadIdx.x / 16;
  const std::uint32_t lane = threadIdx.x % 16;
  const bool exists = number < args.chunks;
  const std::uint32_t piece = exists ? static_cast<std::uint32_t>(number) : 0;
  const std::uint32_t row = args.rows.by_chunks.quotient(piece);
  const std::uint32_t col = (piece - row * args.rows.chunks_per_row) * (N * 16);
  const std::uint32_t matrix = args.rows.by_rows.quotient(row);
  const T* from = args.in + args.rows.offset(row) + col;

  span x;
  std::uint32_t negative = 0, poisoned = 0;  // a bit for each element, for each block
  float value[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const std::uint32_t k = col + 16 * i + lane;
    const bool here = exists && k < args.rows.cols;
    value[i] = here ? tetromino::detail::to_float(from[16 * i + lane]) : 0.0f;
    x.weight[i] = here && args.weights != nullptr ? args.weights[matrix * args.weights_stride + k] : 1.0f;
    if ((bit_cast<std::uint32_t>(value[i]) & 0x7F800000u) == 0x7F800000u) {
      if (args.rules.special == special_values::saturate) {
        const bool is_nan = (bit_cast<std::uint32_t>(value[i]) & 0x7FFFFFu) != 0;
        value[i] = is_nan ? 0.0f : copysignf(tetromino::detail::largest<T>, value[i]);
      } else if (args.rules.special == special_values::reject) {
        report_rejection(args.rejected, static_cast<std::uint64_t>(row) * args.rows.cols + k);
      }
    }
    negative |= (bit_cast<std::uint32_t>(value[i]) >> 31) << i;
  }
  x.weighted = args.weights != nullptr;
  std::uint32_t most = 0;
#pragma unroll
  for (int b = 0; b < span::blocks; ++b) {
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
      x.near_one[i] = bad ? 0.0f : __fmul_rn(fabsf(value[i]), power_of_two(-x.power(b)));
    }
  }

  std::uint32_t macro = 0;
  if (args.rules.macro_step != 0) {
    macro = x.search_macro(args.rules, most);
  } else if (args.rules.macro_block != 0 && most != 0) {
    macro = bit_cast<std::uint32_t>(__fdiv_rn(6.0f, bit_cast<float>(most))) >> 15 & 0xFFu;
  }
  const float factor = bit_cast<float>(0x3F800000u | macro << 15);
  const std::size_t first_block = static_cast<std::size_t>(row) * args.blocks_per_row;
  const uniform_numbers u{args.rules.seed, args.first_index + static_cast<std::uint64_t>(row) * args.rows.cols};

#pragma unroll
  for (int b = 0; b < span::blocks; ++b) {
    const int e = x.exponent(args.rules, b, factor);
    const std::uint32_t column = col + block * b;
    const bool is_poisoned = (poisoned >> b & 1) != 0;
    std::uint32_t scale = x.amax[b] == 0 ? 0 : static_cast<std::uint32_t>(e + 127);
    if (is_poisoned) scale = e8m0::nan_bits;
    if (exists && args.fake == nullptr && lane == 0 && column < args.rows.cols) {
      std::size_t at = first_block + column / block;
      if (args.is_swizzled) {
        const std::uint32_t r = row - matrix * args.rows.by_rows.divisor;
        at = matrix * args.swizzled_matrix + swizzled_at(r, column / block, args.blocks_per_row);
      }
      args.scales[at] = static_cast<std::uint8_t>(scale);
    }
    const float to_scale = power_of_two(x.power(b) - e);
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) {
      const float y = __fmul_rn(__fmul_rn(factor, x.near_one[i]), to_scale);
      const std::uint32_t k = col + 16 * i + lane, sign = (negative >> i & 1) << 3;
      std::uint32_t code = (code_bits(y) & 7u) | sign;
      if (args.rules.stochastic) code = round_stochastic(sign != 0 ? -y : y, uniform(u.seed, u.first + k)).bits;
      if (x.amax[b] == 0 || k >= args.rows.cols) code = 0;
      if (args.fake != nullptr) {
        if (!exists || k >= args.rows.cols) continue;
        const chunk<T> one = args.rules.macro_block != 0
                                 ? unpack<T, unpack_rule::mx_macro>({code, 0}, scale, macro, 1.0f)
                                 : unpack<T, unpack_rule::mx>({code, 0}, scale, 0, 1.0f);
        args.fake[args.fake_rows.offset(row) + k] = one.element(0);
        continue;
      }
      const std::uint32_t pair = code | __shfl_xor_sync(full_warp, code, 1) << 4;
      if (exists && lane % 2 == 0 && column < args.rows.cols) {
        args.codes[first_block * (block / 2) + (col + 16 * i + lane) / 2] = static_cast<std::uint8_t>(pair);
      }
    }
  }
  if (exists && lane == 0 && args.rules.macro_block != 0 && args.fake == nullptr) {
    args.macros[static_cast<std::size_t>(row) * args.macros_per_row + col / args.rules.macro_block] =
        static_cast<std::uint8_t>(macro);
  }
}

template <real T, int N, int PerBlock>
result<void> launch_search_span(const stream& s, const pack_args<T>& args) {
  search_kernel<T, N, PerBlock><<<static_cast<unsigned>((args.chunks + 15) / 16), 256, 0, s.handle>>>(args);
  return check(cudaGetLastError(), "the launch of search_kernel");
}

/// Launches the search for spans of `span` elements.
template <real T>
result<void> launch_search(const stream& s, const pack_args<T>& args, std::size_t span) {
  if (args.rules.block == 16) {
    switch (span) {
      case 16:
        return launch_search_span<T, 1, 1>(s, args);
      case 32:
        return launch_search_span<T, 2, 1>(s, args);
      case 64:
        return launch_search_span<T, 4, 1>(s, args);
      case 128:
        return launch_search_span<T, 8, 1>(s, args);
      default:
        return launch_search_span<T, 16, 1>(s, args);
    }
  }
  switch (span) {
    case 32:
      return launch_search_span<T, 2, 2>(s, args);
    case 64:
      return launch_search_span<T, 4, 2>(s, args);
    case 128:
      return launch_search_span<T, 8, 2>(s, args);
    default:
      return launch_search_span<T, 16, 2>(s, args);
  }
}

}  // namespace tetromino::cuda::detail
