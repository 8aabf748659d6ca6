#pragma once

#include "matmul_args.cuh"  // matmul_args

#include <cstdint>  // std::uint32_t

/// What the product kernels do with a tile of weights: decode it in registers, multiply by it.
namespace TETROMINO_NAMESPACE::cuda::detail {

/// d[16, 8] += a[16, 16] b[16, 8].
template <activation T>
__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::same_as<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// d[16, 8] = a[16, 16] b[16, 8].
template <activation T>
__device__ inline void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::same_as<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
        "%10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
        "%10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

/// Two 16-bit floats times one half of another pair.
template <activation T>
[[nodiscard]] __device__ inline std::uint32_t multiply_by(std::uint32_t x, std::uint32_t pair, int half_of_pair) {
  if constexpr (std::same_as<T, bfloat16>) {
    const auto y = as_bfloat16_pair(pair);
    return as_word(__hmul2_rn(as_bfloat16_pair(x), half_of_pair == 0 ? __low2bfloat162(y) : __high2bfloat162(y)));
  } else {
    const auto y = as_half_pair(pair);
    return as_word(__hmul2_rn(as_half_pair(x), half_of_pair == 0 ? __low2half2(y) : __high2half2(y)));
  }
}

/// A lane's part of a tile of weights, still coded: a word of codes for each step of 16 columns, and block scales.
template <weight_kind Kind>
struct coded_tile {
  static constexpr int scale_words = Kind == weight_kind::mx32 ? 1 : 2;
  std::uint32_t word[4];
  std::uint32_t scales[scale_words];

  /// Reads the lane's codes and scales from shared memory.
  __device__ void read(std::uint32_t codes_at, std::uint32_t scales_at) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(codes_at));
    if constexpr (Kind == weight_kind::mx32) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales[0]) : "r"(scales_at));
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(scales[0]), "=r"(scales[1]) : "r"(scales_at));
    }
  }

  /// The same from global memory.
  __device__ void read_global(const std::uint8_t* codes, const std::uint8_t* scales_from) {
    const uint4 words = *reinterpret_cast<const uint4*>(codes);
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
#pragma unroll
    for (int i = 0; i < scale_words; ++i) scales[i] = reinterpret_cast<const std::uint32_t*>(scales_from)[i];
  }

  /// The A operand of step s.
  template <activation T>
  __device__ void decode(int s, std::uint32_t (&a)[4]) const {
    const int block = s * 16 / block_of<Kind>;
    const scale_pairs<T, Kind> scale(scales[block / 2]);
    gather_codes<T>(word[s], a);
    a[0] = multiply_by<T>(a[0], scale.low, block % 2), a[1] = multiply_by<T>(a[1], scale.high, block % 2);
    a[2] = multiply_by<T>(a[2], scale.low, block % 2), a[3] = multiply_by<T>(a[3], scale.high, block % 2);
  }
};

/// Hides from the compiler how a value came about, so that it keeps it in registers in place of computing it again.
template <class Value>
__device__ inline void keep(Value& value) {
  if constexpr (sizeof(Value) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

/// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(std::uint32_t from, std::uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
}

/// Words of shared memory, at a multiple of their size together.
__device__ inline void load_shared(std::uint32_t from, std::uint32_t& a, std::uint32_t& b) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(from) : "memory");
}
__device__ inline void load_shared(std::uint32_t from, std::uint32_t& a, std::uint32_t& b, std::uint32_t& c,
                                   std::uint32_t& d) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(from) : "memory");
}

/// 1 / x to within a unit in the last place.
[[nodiscard]] __device__ inline float quick_reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

/// 1 / (1 + m / 256) for a macro byte.
[[nodiscard]] __device__ inline float inverse_macro(std::uint32_t m) {
  return quick_reciprocal(bit_cast<float>(m * 0x8000u + 0x3F800000u));
}

}  // namespace tetromino::cuda::detail
