#pragma once

#include "../../arch/sm90a.cuh"  // wgmma
#include "../macro_walk.cuh"     // macro_walk

#include <cstdint>  // std::uint32_t

/// What the kernels for warpgroups share: a lane's sums, and the ring of stages in shared memory that a warp fills and
/// the warpgroups empty.
namespace TETROMINO_NAMESPACE::cuda::detail {

#if TETROMINO_CUDA_HOPPER

/// A lane's sums for 64 rows of weights by 2 Count rows of x: of every four, two rows of x for row g of the weights,
/// then the same two for row g + 8.
template <int Count>
struct lane_sums {
  float d[Count];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < Count; ++i) d[i] = 0.0f;
  }
  /// Keeps the compiler from moving uses of the sums to before a wait.
  __device__ void hold() {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }
  __device__ void scale(const macro_pair& by) {
#pragma unroll
    for (int i = 0; i < Count; i += 4) d[i] *= by.low, d[i + 1] *= by.low, d[i + 2] *= by.high, d[i + 3] *= by.high;
  }
  /// Waits for all products, and brings the sums to units of the next macro block.
  __device__ void enter_next(macro_walk& macros) {
    const macro_pair growth = macros.growth();
    wgmma_wait<0>();
    hold();
    scale(growth);
    macros.advance();
  }
  /// Brings finished sums to units of 1; `Macros` is 0 where weights have no macro blocks.
  template <int Macros>
  __device__ void finish(const macro_walk& macros, float missing) {
    if constexpr (Macros != 0) {
      scale(macros.finish(missing));
    } else {
      if (missing != 1.0f) scale({missing, missing});
    }
  }
};

/// The barriers of a ring: stage n lies in slot n % Stages, is full when the copies into it are done, and empty when
/// all who read it have told so.
template <int Stages>
struct stage_ring {
  static constexpr std::uint32_t bytes = 16 * Stages;
  std::uint32_t barriers;

  [[nodiscard]] __device__ std::uint32_t full(std::uint32_t slot) const { return barriers + 8 * slot; }
  [[nodiscard]] __device__ std::uint32_t empty(std::uint32_t slot) const { return barriers + 8 * (Stages + slot); }
  /// One thread does it; `readers` tell each slot empty.
  __device__ void init(std::uint32_t readers) const {
    for (std::uint32_t i = 0; i < Stages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), readers);
    }
  }
};

#endif

}  // namespace TETROMINO_NAMESPACE::cuda::detail
