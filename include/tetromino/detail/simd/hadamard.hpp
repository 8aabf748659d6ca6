#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// Block-Hadamard rotations on vectors, with the sums of scalar_rotation.

#if TETROMINO_SIMD

#include "../rotation_part.hpp"  // rotation_part
#include "blocks.hpp"            // floats, words, exchange

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int32_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

struct simd_rotation {
  /// See scalar_rotation.
  static void rotate(const rotation_part& part, float* row, std::size_t n) { each_block<true>(part, row, n); }
  static void revert(const rotation_part& part, float* row, std::size_t n) { each_block<false>(part, row, n); }

 private:
  template <bool Forward>
  static void each_block(const rotation_part& part, float* row, std::size_t n) {
    if (part.size == 16) return blocks<1, Forward>(part, row, n);
    if (part.size == 32) return blocks<2, Forward>(part, row, n);
    if (part.size == 64) return blocks<4, Forward>(part, row, n);
    blocks<8, Forward>(part, row, n);
  }

  template <std::size_t Count, bool Forward>
  static void blocks(const rotation_part& part, float* row, std::size_t n) {
    constexpr std::size_t size = Count * lane_count;
    const floats scale = broadcast(part.scale);
    for (std::size_t k = 0; k + size <= n; k += size) {
      const auto flipped = [&](std::size_t i, const floats& x) TETROMINO_INLINE_LAMBDA {
        if (part.signs == nullptr) return x;
        return exclusive_or(x, load(reinterpret_cast<const std::int32_t*>(part.signs + k + i * lane_count)));
      };
      floats x[Count];
      repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA {
        const floats element = load(row + k + i * lane_count);
        x[i] = Forward ? flipped(i, element) : element;
      });
      if constexpr (Count > 4) across<Count, 4>(x);
      if constexpr (Count > 2) across<Count, 2>(x);
      if constexpr (Count > 1) across<Count, 1>(x);
      repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA {
        const floats sum = rounded(within<1>(within<2>(within<4>(within<8>(x[i])))) * scale);
        store(row + k + i * lane_count, Forward ? sum : flipped(i, sum));
      });
    }
  }

  static TETROMINO_INLINE floats exclusive_or(const floats& x, const words& bits) {
    return floats_of(bits_of(x) ^ bits);
  }
  /// Sums and differences of vectors that lie `Distance` apart.
  template <std::size_t Count, std::size_t Distance>
  static TETROMINO_INLINE void across(floats (&x)[Count]) {
    repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA {
      if constexpr ((i & Distance) == 0) {
        const floats a = x[i], b = x[i + Distance];
        x[i] = a + b;
        x[i + Distance] = a - b;
      }
    });
  }
  /// The same of lanes.
  template <int Distance>
  static TETROMINO_INLINE floats within(const floats& x) {
    constexpr std::int32_t minus = -0x7FFFFFFF - 1;
    static constexpr auto negated = [] {
      struct {
        std::int32_t lane[lane_count];
      } out{};
      for (int i = 0; i < static_cast<int>(lane_count); ++i) out.lane[i] = (i & Distance) != 0 ? minus : 0;
      return out;
    }();
    return floats_of(exchange<Distance>(bits_of(x))) + exclusive_or(x, load(negated.lane));
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
