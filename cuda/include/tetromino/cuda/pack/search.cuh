#pragma once

#include "encode.cuh"  // difference_to_nearest
#include "args.cuh"    // pack_rules, power_of_two

#include <tetromino/scaling.hpp>  // mx_exponent

#include <cstdint>  // std::uint32_t

/// MX scales and macro-block bytes of least squared error, for warps that hold sixteen elements in each lane. What all
/// backends share is the order of each sum: sixteen strided partial sums, then halves onto halves.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// What search_macro shares among the lanes of a warp: for each chunk sixteen magnitudes, the largest magnitude of its
/// block, and a gap that spreads chunks over the banks.
struct search_room {
  static constexpr std::uint32_t chunk_floats = chunk_size + 4;
  float of[32 * chunk_floats];
};

/// The bits of 2^n, or 0 below the normal floats.
[[nodiscard]] __device__ inline int power_bits(int n) { return n >= -126 ? (n + 127) << 23 : 0; }

/// One candidate's error over a macro block of `chunks` chunks, divided by the factor's square. Magnitudes are in units
/// of a power of two near the macro block's largest; no scale is below `least_scale`, as float bits in those units.
template <bool Clamped, std::uint32_t Block>
[[nodiscard]] __device__ float macro_error(const float* chunk, std::uint32_t chunks, float factor, std::uint32_t carry,
                                           int least_scale) {
  float partial[16] = {};
  for (std::uint32_t c = 0; c < chunks;
       c += Block / chunk_size, chunk += Block / chunk_size * search_room::chunk_floats) {
    const float largest = __fmul_rn(factor, chunk[chunk_size]);
    const auto carried = static_cast<int>((bit_cast<std::uint32_t>(largest) + carry) & 0x7F800000u);
    const float scale = __int_as_float(max(carried - 0x01000000, least_scale));
#pragma unroll
    for (std::uint32_t i = 0; i < Block; i += 4) {
      const float4 four =
          *reinterpret_cast<const float4*>(chunk + i / chunk_size * search_room::chunk_floats + i % chunk_size);
      const float magnitude[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (std::uint32_t k = 0; k < 4; ++k) {
        const float difference = difference_to_nearest<Clamped>(__fmul_rn(factor, magnitude[k]), scale);
        float& sum = partial[(i + k) % 16];
        sum = __fadd_rn(sum, __fmul_rn(difference, difference));
      }
    }
  }
  return __fdiv_rn(sum_halves(partial), __fmul_rn(factor, factor));
}

/// The macro-block byte of least squared error for the macro block that a lane's chunk belongs to; `m` is the largest
/// magnitude of the lane's block. Each half of the warp takes a macro block at a time, and each lane in it a byte, so
/// that no sum crosses lanes. All lanes of a warp call it together.
template <std::uint32_t Block, real T>
[[nodiscard]] __device__ std::uint32_t search_macro(const pack_rules& rules, const chunk<T>& x, std::uint32_t m,
                                                    search_room& room) {
  const std::uint32_t lane = threadIdx.x % 32, chunks = 1u << (rules.macro_shift - 4);
  std::uint32_t most = m;
  for (std::uint32_t lanes = Block / 16; lanes < chunks; lanes *= 2) {
    most = max(most, __shfl_xor_sync(full_warp, most, static_cast<int>(lanes)));
  }
  const int unit = min(max(static_cast<int>(bit_cast<std::uint32_t>(magnitude_value<T>(most)) >> 23) - 127, -126), 126);
  const float to_unit = power_of_two(-unit);
  float* const own = room.of + lane * search_room::chunk_floats;
  __syncwarp();
#pragma unroll
  for (std::uint32_t i = 0; i < chunk_size; i += 4) {
    *reinterpret_cast<float4*>(own + i) =
        make_float4(__fmul_rn(fabsf(x.value(i)), to_unit), __fmul_rn(fabsf(x.value(i + 1)), to_unit),
                    __fmul_rn(fabsf(x.value(i + 2)), to_unit), __fmul_rn(fabsf(x.value(i + 3)), to_unit));
  }
  own[chunk_size] = __fmul_rn(magnitude_value<T>(m), to_unit);
  __syncwarp();

  std::uint32_t found = 0;
  for (std::uint32_t first = 0; first < 32; first += 2 * chunks) {
    const std::uint32_t at = first + lane / 16 * chunks;
    const float* const macro = room.of + at * search_room::chunk_floats;
    const int least_scale = power_bits(-127 - __shfl_sync(full_warp, unit, static_cast<int>(at)));
    std::uint32_t best = 0;
    float least = 0;
    for (std::uint32_t pass = 0; pass < 256; pass += 16 * rules.macro_step) {
      const std::uint32_t byte = pass + lane % 16 * rules.macro_step;
      const float factor = bit_cast<float>(0x3F800000u | byte << 15);
      const float total = rules.carry == 0 ? macro_error<true, Block>(macro, chunks, factor, 0, least_scale)
                                           : macro_error<false, Block>(macro, chunks, factor, rules.carry, least_scale);
      if (pass == 0 || total < least) best = byte, least = total;
    }
#pragma unroll
    for (int n = 8; n > 0; n /= 2) {
      const float other = __shfl_xor_sync(full_warp, least, n);
      const std::uint32_t other_byte = __shfl_xor_sync(full_warp, best, n);
      if (other < least || (other == least && other_byte < best)) best = other_byte, least = other;
    }
    const std::uint32_t half = lane / chunks % 2;
    const std::uint32_t mine = __shfl_sync(full_warp, best, static_cast<int>(16 * half));
    if (lane / (2 * chunks) == first / (2 * chunks)) found = mine;
  }
  return most == 0 ? 0 : found;
}

/// The E8M0 code of least squared error for a block. All lanes of a warp call it together.
template <std::uint32_t Block, real T>
[[nodiscard]] __device__ std::uint32_t search_scale(const chunk<T>& x, float amax) {
  const auto clamped = [](int e) { return min(max(e, -127), 127); };
  const int power = min(max(static_cast<int>(bit_cast<std::uint32_t>(amax) >> 23) - 127, -126), 126);
  const int up = clamped(power + mx_exponent(__fmul_rn(amax, power_of_two(-power)), 0x3FFFFFu));
  int best = 0;
  float least = 0;
#pragma unroll
  for (int step = 1; step >= -2; --step) {  // the larger scale first: it keeps ties
    const int e = clamped(up + step);
    const float to_scale = inverse_power_of_two(e);
    float partial[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float y = __fmul_rn(fabsf(x.value(i)), to_scale);
      const float difference = step < 0 ? difference_to_nearest<true>(y, 1.0f) : difference_to_nearest<false>(y, 1.0f);
      partial[i] = __fmul_rn(difference, difference);
    }
    if constexpr (Block == 32) {
#pragma unroll
      for (int i = 0; i < 16; ++i) partial[i] = __fadd_rn(partial[i], __shfl_xor_sync(full_warp, partial[i], 1));
    }
    const float total = __fmul_rn(sum_halves(partial), power_of_two(2 * (e - up)));
    if (step == 1 || total < least) best = e, least = total;
  }
  return static_cast<std::uint32_t>(best + 127);
}

}  // namespace TETROMINO_NAMESPACE::cuda::detail
