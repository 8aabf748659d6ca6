#pragma once

#include "decode.cuh"  // unpack
#include "encode.cuh"  // difference_to_nearest
#include "rotate.cuh"  // rotated_chunk
#include "args.cuh"    // pack_args
#include "load.cuh"    // chunk_place

#include <tetromino/detail/finite_scales.hpp>  // finite_exponent
#include <tetromino/scaling.hpp>               // mx_exponent, macro_factor

#include <cstdint>  // std::uint32_t

/// Packing MX blocks by least squared error: scale_rule::min_error, and searched macro-block bytes. Sixteen lanes share
/// a span (a macro block, or a block): lane j holds the elements j, j + 16, j + 32 ..., which are those that meet in
/// partial sum j of the specified order, so that its additions are a lane's own followed by a butterfly.
namespace TETROMINO_NAMESPACE::cuda::detail {

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

/// Packs one span for every sixteen lanes.
template <real T, int N, int PerBlock>
__global__ void __launch_bounds__(256) pack_spans_kernel(const pack_args args) {
  constexpr std::uint32_t block = PerBlock * 16;
  using span = lane_span<N, PerBlock>;
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

  span x;
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
    macro =
        weighted ? x.template search_macro<true>(args.rules, most) : x.template search_macro<false>(args.rules, most);
  } else if (args.rules.macro_block != 0 && most != 0) {
    macro = bit_cast<std::uint32_t>(__fdiv_rn(6.0f, bit_cast<float>(most))) >> 15 & 0xFFu;
  }
  const float factor = bit_cast<float>(0x3F800000u | macro << 15);
  float safe = tetromino::detail::safely_finite<T>, overflow = tetromino::detail::overflow_of<T>;
  if (is_rotated) safe = tetromino::detail::safely_finite<float>, overflow = tetromino::detail::overflow_of<float>;
  const std::size_t first_block = static_cast<std::size_t>(row) * args.out.blocks_per_row;
  T* const to_fake =
      args.fake.data == nullptr ? nullptr : static_cast<T*>(args.fake.data) + args.fake.rows.offset(row) + col;
  const uniform_numbers u{args.rules.seed, args.first_index + static_cast<std::uint64_t>(row) * args.rows.cols};

#pragma unroll
  for (int b = 0; b < span::blocks; ++b) {
    int e =
        weighted ? x.template exponent<true>(args.rules, b, factor) : x.template exponent<false>(args.rules, b, factor);
    if (const float amax = bit_cast<float>(x.amax[b]); amax >= safe) {
      e = tetromino::detail::finite_exponent(e, amax, factor, args.rules.rounding(), overflow);
    }
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
    const float to_scale = power_of_two(x.power(b) - e);
#pragma unroll
    for (int i = b * PerBlock; i < (b + 1) * PerBlock; ++i) {
      const float y = __fmul_rn(__fmul_rn(factor, x.near_one[i]), to_scale);
      const std::uint32_t k = col + 16 * i + lane, sign = (negative >> i & 1) << 3;
      std::uint32_t code = (code_bits(y) & 7u) | sign;
      if (args.rules.stochastic) code = round_stochastic(sign != 0 ? -y : y, uniform(u.seed, u.first + k)).bits;
      if (x.amax[b] == 0 || k >= args.rows.cols) code = 0;
      if (args.fake.data != nullptr) {
        const auto unpack_as = [&]<class To>(To) {
          return args.rules.macro_block != 0
                     ? unpack<To, unpack_rule::mx_macro>({code, 0}, scale, macro, 1.0f).element(0)
                     : unpack<To, unpack_rule::mx>({code, 0}, scale, 0, 1.0f).element(0);
        };
        if (is_rotated) {
          own[16 * i] = unpack_as(float{});
        } else if (exists && k < args.rows.cols) {
          to_fake[16 * i + lane] = unpack_as(T{});
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
  } else if (exists && lane == 0 && args.rules.macro_block != 0 && col < args.rows.cols) {
    args.out.macros[static_cast<std::size_t>(row) * args.out.macros_per_row + col / args.rules.macro_block] =
        static_cast<std::uint8_t>(macro);
  }
}

template <real T, int N, int PerBlock>
result<void> launch_pack_spans_of(const stream& s, const pack_args& args) {
  pack_spans_kernel<T, N, PerBlock><<<static_cast<unsigned>((args.chunks + 15) / 16), 256, 0, s.handle>>>(args);
  return status_of(cudaGetLastError(), "the launch of pack_spans_kernel");
}

/// Launches the search for spans of `span` elements.
template <real T>
result<void> launch_pack_spans(const stream& s, const pack_args& args, std::size_t span) {
  if (args.rules.block == 16) {
    switch (span) {
      case 16:
        return launch_pack_spans_of<T, 1, 1>(s, args);
      case 32:
        return launch_pack_spans_of<T, 2, 1>(s, args);
      case 64:
        return launch_pack_spans_of<T, 4, 1>(s, args);
      case 128:
        return launch_pack_spans_of<T, 8, 1>(s, args);
      default:
        return launch_pack_spans_of<T, 16, 1>(s, args);
    }
  }
  switch (span) {
    case 32:
      return launch_pack_spans_of<T, 2, 2>(s, args);
    case 64:
      return launch_pack_spans_of<T, 4, 2>(s, args);
    case 128:
      return launch_pack_spans_of<T, 8, 2>(s, args);
    default:
      return launch_pack_spans_of<T, 16, 2>(s, args);
  }
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
