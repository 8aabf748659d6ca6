#pragma once

#include "../../../config.hpp"  // TETROMINO_HAS_AMX

/// Products of bytes by AMX's tiles of 16 rows of up to 64 bytes, beside what AVX-512 provides.

#if TETROMINO_SIMD && TETROMINO_VECTOR_BITS == 512 && TETROMINO_HAS_AMX

#include "../../tile_permission.hpp"  // ask_for_tiles
#include "avx512.hpp"                 // raw, lanes

#include <immintrin.h>

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int8_t, std::int32_t, std::uint8_t, std::uint16_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// While it lives, this thread's tiles have the sizes for products of one block: one instruction at either end, and
/// once in a thread's life a trap, in which the operating system makes room for tiles.
///
/// The instructions are written out: with g++ 12's intrinsics compilers do not know that loads read memory.
class byte_tiles {
 public:
  /// Whether there are tiles: the operating system is asked once.
  static bool are_allowed() {
    static const bool granted = ask_for_tiles();
    return granted;
  }

  /// For blocks of `block` columns: 16 or 32.
  explicit byte_tiles(std::size_t block) {
    shapes all;
    for (int i = 0; i < 2; ++i) {
      all.set(sums + i, 16, 64);
      all.set(left + i, 16, block);
      all.set(right + i, block / 4, 64);
    }
    asm volatile("ldtilecfg %0" : : "m"(all));
  }
  ~byte_tiles() { asm volatile("tilerelease"); }
  byte_tiles(const byte_tiles&) = delete;
  byte_tiles& operator=(const byte_tiles&) = delete;

  /// Of each byte's low four bits, a code: twice its value.
  static TETROMINO_INLINE words values(const words& codes) {
    const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    return lanes(_mm512_permutexvar_epi8(raw(codes), _mm512_broadcast_i32x4(twice)));  // heeds six bits
  }

  /// Sums number I, 0 or 1: [16][16] of a block of x[16][stride] by one of w[block / 4][16][4], which has four columns
  /// of each output side by side.
  template <int I>
  static TETROMINO_INLINE void multiply(const std::int8_t* x, std::size_t stride, const std::int8_t* w) {
    asm volatile(
        "{tileloadd (%[w],%[line],1), %%tmm%c[right]|tileloadd tmm%c[right], [%[w]+%[line]*1]}\n\t"
        "{tileloadd (%[x],%[stride],1), %%tmm%c[left]|tileloadd tmm%c[left], [%[x]+%[stride]*1]}\n\t"
        "{tilezero %%tmm%c[sums]|tilezero tmm%c[sums]}\n\t"
        "{tdpbssd %%tmm%c[right], %%tmm%c[left], %%tmm%c[sums]|tdpbssd tmm%c[sums], tmm%c[left], tmm%c[right]}"
        :
        : [x] "r"(x), [stride] "r"(stride), [w] "r"(w), [line] "r"(std::size_t{64}), [sums] "i"(sums + I),
          [left] "i"(left + I), [right] "i"(right + I)
        : "memory");
  }
  /// Stores sums number I.
  template <int I>
  static TETROMINO_INLINE void store(std::int32_t (*out)[16]) {
    asm volatile("{tilestored %%tmm%c[sums], (%[out],%[line],1)|tilestored [%[out]+%[line]*1], tmm%c[sums]}"
                 :
                 : [out] "r"(out), [line] "r"(sizeof *out), [sums] "i"(sums + I)
                 : "memory");
  }

 private:
  static constexpr int sums = 0, left = 2, right = 4;  // numbers of tiles

  /// What ldtilecfg reads.
  struct alignas(64) shapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, std::size_t row_count, std::size_t bytes) {
      rows[tile] = static_cast<std::uint8_t>(row_count);
      row_bytes[tile] = static_cast<std::uint16_t>(bytes);
    }
  };
};
/// Says to templates which tiles there are.
byte_tiles tiles_of(const words&);

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
