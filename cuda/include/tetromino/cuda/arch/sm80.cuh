#pragma once

#include <tetromino/cuda/repacked.hpp>  // activation

#include "../detail/values.cuh"  // as_half_pair

#include <concepts>  // std::same_as
#include <cstdint>   // std::uint32_t

/// Instructions of compute capability 8.0 and later, as functions: copies into shared memory in the background, matrix
/// products of a warp, and 16-bit arithmetic in pairs. (PTX ISA, "Data Movement and Conversion Instructions", "Warp
/// Level Matrix Multiply-Accumulate Instructions")
namespace TETROMINO_NAMESPACE::cuda::detail {

[[nodiscard]] __device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Copies 16 bytes into shared memory.
__device__ inline void copy_16(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
/// Copies 16 bytes into shared memory, of which only the first `bytes` are read and the others become zero.
__device__ inline void copy_16(std::uint32_t to, const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/// Copies 4, 8 or 16 bytes into shared memory; offsets of less than 2048 take no instruction of their own.
template <std::uint32_t Bytes, std::uint32_t ToOffset, int FromOffset>
__device__ inline void copy_at(std::uint32_t to, const void* from) {
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(ToOffset),
                 "n"(FromOffset)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0 + %2], [%1 + %3], %4;" ::"r"(to), "l"(from), "n"(ToOffset),
                 "n"(FromOffset), "n"(Bytes)
                 : "memory");
  }
}
/// Copies 4 or 8 bytes into shared memory.
template <std::uint32_t Bytes>
__device__ inline void copy_small(std::uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Pending` groups of this thread's copies are not done.
template <int Pending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
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

/// An 8x8 matrix of 16-bit values, of whose row l / 4 lane l holds columns 2 (l % 4) and the next one, transposed.
[[nodiscard]] __device__ inline std::uint32_t transpose(std::uint32_t pair) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

/// Words of shared memory, at a multiple of their size together.
__device__ inline void load_shared(std::uint32_t from, std::uint32_t& a) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(from) : "memory");
}
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

}  // namespace TETROMINO_NAMESPACE::cuda::detail
