#pragma once

#include <tetromino/block_scaled.hpp>  // block_scaled_kind

#include <cstdint>  // std::uint32_t

/// The product of block-scaled operands of compute capability 12.x. (PTX ISA 9.0, "Warp Level Matrix
/// Multiply-Accumulate Instructions", .block_scale)
namespace TETROMINO_NAMESPACE::cuda::detail {

/// Adds a 16 x 8 x 64 product to a warp's sums. `Byte`: where in the words of E8M0 scales the two of these columns are.
struct native_mma {
  static constexpr bool is_native = true;
  template <block_scaled_kind Kind, int Byte>
  static __device__ void add([[maybe_unused]] float (&d)[4], [[maybe_unused]] const std::uint32_t (&a)[4],
                             [[maybe_unused]] const std::uint32_t (&b)[2], [[maybe_unused]] std::uint32_t scale_a,
                             [[maybe_unused]] std::uint32_t scale_b) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL) || \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH_FAMILY_SPECIFIC__ == 1200)
    if constexpr (Kind == block_scaled_kind::e4m3_16) {
      static_assert(Byte == 0);
      asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {0, 0}, %11, {0, 0};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b));
    } else {
      asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {%12, 0}, %11, {%12, 0};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b), "n"(Byte));
    }
#else
    __trap();  // never launched: see launch_block_scaled
#endif
  }
};

}  // namespace TETROMINO_NAMESPACE::cuda::detail
