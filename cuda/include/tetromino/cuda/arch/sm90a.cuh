#pragma once

#include <tetromino/e4m3.hpp>     // e4m3
#include <tetromino/float16.hpp>  // half, bfloat16

#include "sm80.cuh"  // shared_address

#include <concepts>  // std::same_as
#include <cstdint>   // std::uint32_t, std::uint64_t

/// Hopper's own instructions, as functions: warpgroup matrix products, the bulk copy engine, and its barriers. (PTX
/// ISA, "Asynchronous Warpgroup Level Matrix Instructions", "Data Movement and Conversion Instructions")
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Whether this translation unit's device code may use what only sm_90a has.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "the kernels for Hopper need the target sm_90a, as in -gencode arch=compute_90a,code=sm_90a"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TETROMINO_CUDA_HOPPER 1
#else
#define TETROMINO_CUDA_HOPPER 0
#endif

#if TETROMINO_CUDA_HOPPER

// clang-format off
#define TETROMINO_REGISTERS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TETROMINO_REGISTERS_8(d, i) TETROMINO_REGISTERS_4(d, i), TETROMINO_REGISTERS_4(d, i + 4)
#define TETROMINO_REGISTERS_12(d, i) TETROMINO_REGISTERS_8(d, i), TETROMINO_REGISTERS_4(d, i + 8)
#define TETROMINO_REGISTERS_16(d, i) TETROMINO_REGISTERS_8(d, i), TETROMINO_REGISTERS_8(d, i + 8)
#define TETROMINO_REGISTERS_24(d, i) TETROMINO_REGISTERS_16(d, i), TETROMINO_REGISTERS_8(d, i + 16)
#define TETROMINO_REGISTERS_32(d, i) TETROMINO_REGISTERS_16(d, i), TETROMINO_REGISTERS_16(d, i + 16)
#define TETROMINO_REGISTERS_40(d, i) TETROMINO_REGISTERS_32(d, i), TETROMINO_REGISTERS_8(d, i + 32)
#define TETROMINO_REGISTERS_48(d, i) TETROMINO_REGISTERS_32(d, i), TETROMINO_REGISTERS_16(d, i + 32)
#define TETROMINO_REGISTERS_56(d, i) TETROMINO_REGISTERS_48(d, i), TETROMINO_REGISTERS_8(d, i + 48)
#define TETROMINO_REGISTERS_64(d, i) TETROMINO_REGISTERS_32(d, i), TETROMINO_REGISTERS_32(d, i + 32)
#define TETROMINO_REGISTERS_72(d, i) TETROMINO_REGISTERS_64(d, i), TETROMINO_REGISTERS_8(d, i + 64)
#define TETROMINO_REGISTERS_80(d, i) TETROMINO_REGISTERS_64(d, i), TETROMINO_REGISTERS_16(d, i + 64)
#define TETROMINO_REGISTERS_128(d, i) TETROMINO_REGISTERS_64(d, i), TETROMINO_REGISTERS_64(d, i + 64)

#define TETROMINO_NUMBERS_4 "%0, %1, %2, %3"
#define TETROMINO_NUMBERS_8 TETROMINO_NUMBERS_4 ", " "%4, %5, %6, %7"
#define TETROMINO_NUMBERS_12 TETROMINO_NUMBERS_8 ", " "%8, %9, %10, %11"
#define TETROMINO_NUMBERS_16 TETROMINO_NUMBERS_12 ", " "%12, %13, %14, %15"
#define TETROMINO_NUMBERS_24 TETROMINO_NUMBERS_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define TETROMINO_NUMBERS_32 TETROMINO_NUMBERS_24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define TETROMINO_NUMBERS_40 TETROMINO_NUMBERS_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define TETROMINO_NUMBERS_48 TETROMINO_NUMBERS_40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define TETROMINO_NUMBERS_56 TETROMINO_NUMBERS_48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define TETROMINO_NUMBERS_64 TETROMINO_NUMBERS_56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define TETROMINO_NUMBERS_72 TETROMINO_NUMBERS_64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define TETROMINO_NUMBERS_80 TETROMINO_NUMBERS_72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define TETROMINO_NUMBERS_128 TETROMINO_NUMBERS_64 ", " "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

/// d[64, N] += a[64, K] b[K, N]: a in registers, b in shared memory under a descriptor; 32 bytes of each row in K.
#define TETROMINO_WGMMA_OF(N, K, count, a0, a1, a2, a3, desc, type, tail)                                      \
  __device__ inline void wgmma_##type(float (&d)[count], const std::uint32_t (&a)[4], std::uint64_t b) {      \
    asm volatile(                                                                                             \
        "{.reg .pred p; setp.eq.u32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32." #type "." #type \
        " {" TETROMINO_NUMBERS_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #desc ", p, 1, 1" tail ";}" \
        : TETROMINO_REGISTERS_##count(d, 0)                                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }
#define TETROMINO_WGMMA(N, count, a0, a1, a2, a3, desc, type) \
  TETROMINO_WGMMA_OF(N, 16, count, a0, a1, a2, a3, desc, type, ", 0")
#define TETROMINO_WGMMA_E4M3(N, count, a0, a1, a2, a3, desc) \
  TETROMINO_WGMMA_OF(N, 32, count, a0, a1, a2, a3, desc, e4m3, "")
TETROMINO_WGMMA(8, 4, 4, 5, 6, 7, 8, bf16)
TETROMINO_WGMMA(8, 4, 4, 5, 6, 7, 8, f16)
TETROMINO_WGMMA(16, 8, 8, 9, 10, 11, 12, bf16)
TETROMINO_WGMMA(16, 8, 8, 9, 10, 11, 12, f16)
TETROMINO_WGMMA(24, 12, 12, 13, 14, 15, 16, bf16)
TETROMINO_WGMMA(24, 12, 12, 13, 14, 15, 16, f16)
TETROMINO_WGMMA(32, 16, 16, 17, 18, 19, 20, bf16)
TETROMINO_WGMMA(32, 16, 16, 17, 18, 19, 20, f16)
TETROMINO_WGMMA(48, 24, 24, 25, 26, 27, 28, bf16)
TETROMINO_WGMMA(48, 24, 24, 25, 26, 27, 28, f16)
TETROMINO_WGMMA(64, 32, 32, 33, 34, 35, 36, bf16)
TETROMINO_WGMMA(64, 32, 32, 33, 34, 35, 36, f16)
TETROMINO_WGMMA(80, 40, 40, 41, 42, 43, 44, bf16)
TETROMINO_WGMMA(80, 40, 40, 41, 42, 43, 44, f16)
TETROMINO_WGMMA(96, 48, 48, 49, 50, 51, 52, bf16)
TETROMINO_WGMMA(96, 48, 48, 49, 50, 51, 52, f16)
TETROMINO_WGMMA(112, 56, 56, 57, 58, 59, 60, bf16)
TETROMINO_WGMMA(112, 56, 56, 57, 58, 59, 60, f16)
TETROMINO_WGMMA(128, 64, 64, 65, 66, 67, 68, bf16)
TETROMINO_WGMMA(128, 64, 64, 65, 66, 67, 68, f16)
TETROMINO_WGMMA(256, 128, 128, 129, 130, 131, 132, bf16)
TETROMINO_WGMMA(256, 128, 128, 129, 130, 131, 132, f16)
TETROMINO_WGMMA_E4M3(8, 4, 4, 5, 6, 7, 8)
TETROMINO_WGMMA_E4M3(16, 8, 8, 9, 10, 11, 12)
TETROMINO_WGMMA_E4M3(24, 12, 12, 13, 14, 15, 16)
TETROMINO_WGMMA_E4M3(32, 16, 16, 17, 18, 19, 20)
TETROMINO_WGMMA_E4M3(48, 24, 24, 25, 26, 27, 28)
TETROMINO_WGMMA_E4M3(64, 32, 32, 33, 34, 35, 36)
TETROMINO_WGMMA_E4M3(80, 40, 40, 41, 42, 43, 44)
TETROMINO_WGMMA_E4M3(96, 48, 48, 49, 50, 51, 52)
TETROMINO_WGMMA_E4M3(112, 56, 56, 57, 58, 59, 60)
TETROMINO_WGMMA_E4M3(128, 64, 64, 65, 66, 67, 68)
TETROMINO_WGMMA_E4M3(144, 72, 72, 73, 74, 75, 76)
TETROMINO_WGMMA_E4M3(160, 80, 80, 81, 82, 83, 84)
TETROMINO_WGMMA_E4M3(256, 128, 128, 129, 130, 131, 132)
#undef TETROMINO_WGMMA_E4M3
#undef TETROMINO_WGMMA
#undef TETROMINO_WGMMA_OF
// clang-format on

/// d += a b, for activations of type T.
template <class T, int Count>
__device__ inline void wgmma(float (&d)[Count], const std::uint32_t (&a)[4], std::uint64_t b) {
  if constexpr (std::same_as<T, bfloat16>) {
    wgmma_bf16(d, a, b);
  } else if constexpr (std::same_as<T, e4m3>) {
    wgmma_e4m3(d, a, b);
  } else {
    wgmma_f16(d, a, b);
  }
}

/// Orders register writes before the products that read them.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `Pending` groups are not done.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Describes rows of 128 bytes under the 128-byte swizzle, in a tile that starts at a multiple of 1024 bytes; `offset`
/// counts units of 16 bytes from there.
[[nodiscard]] __device__ inline std::uint64_t swizzled_tile(std::uint32_t shared, std::uint32_t offset) {
  std::uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"((shared >> 4) + 0x10000u + offset), "r"(0x40000040u));
  return descriptor;
}

__device__ inline void barrier_init(std::uint32_t barrier, std::uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
/// Makes initialised barriers visible to the copy engine, and to the other blocks of a cluster.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{.reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra WAIT;}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

/// Copies a box of a tensor map, from column x and row y on, into shared memory.
__device__ inline void copy_box(std::uint32_t to, const void* map, int x, int y, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
/// Copies bytes, a multiple of 16 at a multiple of 16, into shared memory.
__device__ inline void copy_bytes(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ inline void prefetch_map(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/// Stores four 8x8 matrices of 16-bit values, each transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void store_transposed(std::uint32_t to, const std::uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

/// Waits for the `threads` threads that share a numbered barrier.
__device__ inline void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

[[nodiscard]] __device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
[[nodiscard]] __device__ inline std::uint32_t cluster_size() {
  std::uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
/// Waits for all threads of a cluster; what they wrote to shared memory is then visible to it.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// The two halves of cluster_sync, without the order of memory.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
/// Loads a word from the shared memory of a block of the cluster, at an address of this block's.
[[nodiscard]] __device__ inline std::uint32_t load_from_rank(std::uint32_t shared, std::uint32_t rank) {
  std::uint32_t word;
  asm volatile("{.reg .u32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.u32 %0, [there];}"
               : "=r"(word)
               : "r"(shared), "r"(rank)
               : "memory");
  return word;
}
/// Stores two floats in the shared memory of another block of the cluster, at an address of this block's.
__device__ inline void store_to_rank(std::uint32_t shared, std::uint32_t rank, float x, float y) {
  asm volatile(
      "{.reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.v2.f32 [there], {%2, %3};}" ::"r"(
          shared),
      "r"(rank), "f"(x), "f"(y)
      : "memory");
}
/// Sends four floats to the shared memory of another block of the cluster, and tells a barrier there that 16 bytes have
/// come; both at addresses of this block's.
__device__ inline void send_to_rank(std::uint32_t shared, std::uint32_t barrier, std::uint32_t rank, float a, float b,
                                    float c, float d) {
  asm volatile(
      "{.reg .u32 there, told; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 told, %1, %2; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [told];}" ::"r"(shared),
      "r"(barrier), "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}
/// Lets the next kernel of the stream start, if it was launched so that it may, where there is room.
__device__ inline void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
/// Waits until the kernel before this one in the stream has ended and what it wrote can be read.
__device__ inline void wait_for_last_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <int Registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

#endif

}  // namespace TETROMINO_NAMESPACE::cuda::detail
