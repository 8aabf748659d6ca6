#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// Block-Hadamard rotations on vectors, with the sums of scalar_rotation.

#if TETROMINO_SIMD

#include "../rotation_part.hpp"  // rotation_part
#include "isa.hpp"               // floats, words, exchange

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
  template <bool IsForward>
  static void each_block(const rotation_part& part, float* row, std::size_t n) {
    const auto* const signs = reinterpret_cast<const std::int32_t*>(part.signs);
    const std::int32_t *const before = IsForward ? signs : nullptr, *const after = IsForward ? nullptr : signs;
    if (part.size == 16) return blocks<1>(part, before, after, row, n);
    if (part.size == 32) return blocks<2>(part, before, after, row, n);
    if constexpr (registers > 2) {
      blocks_in_place(part, before, after, row, n);
    } else {
      part.size == 64 ? blocks<4>(part, before, after, row, n) : blocks<8>(part, before, after, row, n);
    }
  }

  /// Blocks of `Count` vectors that fit the registers. Signs are flipped before or after, or not at all (null).
  template <std::size_t Count>
  TETROMINO_OUTLINE static void blocks(const rotation_part& part, const std::int32_t* before, const std::int32_t* after,
                                       float* row, std::size_t n) {
    for (std::size_t k = 0; k + Count * lane_count <= n; k += Count * lane_count) {
      floats x[Count];
      repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA { x[i] = flipped_load(row, before, k + i * lane_count); });
      across<Count>(x);
      repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA { store_within(part, x[i], row, after, k + i * lane_count); });
    }
  }
  /// Blocks of 64 or 128 where they do not fit: register by register as far as vectors meet vectors.
  TETROMINO_OUTLINE static void blocks_in_place(const rotation_part& part, const std::int32_t* before,
                                                const std::int32_t* after, float* row, std::size_t n) {
    for (std::size_t k = 0; k + part.size <= n; k += part.size) {
      if (part.size == 128) across_in_place<8>(row, before, k);
      if (part.size == 64) across_in_place<4>(row, before, k);
      for (std::size_t i = k; i < k + part.size; i += lane_count) store_within(part, load(row + i), row, after, i);
    }
  }
  template <std::size_t Count>
  static TETROMINO_INLINE void across_in_place(float* row, const std::int32_t* signs, std::size_t k) {
    for (std::size_t j = k; j < k + lane_count; j += register_lanes) {
      float_register x[Count];
      repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA {
        x[i] = load_lanes(row + j + i * lane_count);
        if (signs != nullptr) x[i] = floats_of(bits_of(x[i]) ^ load_lanes(signs + j + i * lane_count));
      });
      across<Count>(x);
      repeat<Count>([&](auto i) TETROMINO_INLINE_LAMBDA { store_lanes(row + j + i * lane_count, x[i]); });
    }
  }

  /// Vector row[i ...], with the signs of some of its elements flipped where there are such.
  static TETROMINO_INLINE floats flipped_load(const float* row, const std::int32_t* signs, std::size_t i) {
    const floats x = load(row + i);
    return signs == nullptr ? x : exclusive_or(x, load(signs + i));
  }
  /// Stores what becomes of a vector in itself.
  static TETROMINO_INLINE void store_within(const rotation_part& part, const floats& x, float* row,
                                            const std::int32_t* signs, std::size_t i) {
    const floats sum = rounded(within<1>(within<2>(within<4>(within<8>(x)))) * broadcast(part.scale));
    store(row + i, signs == nullptr ? sum : exclusive_or(sum, load(signs + i)));
  }
  static TETROMINO_INLINE floats exclusive_or(const floats& x, const words& bits) {
    return floats_of(bits_of(x) ^ bits);
  }
  /// Sums and differences of vectors, or registers, that lie 4, 2, 1 apart.
  template <std::size_t Count, class Vector>
  static TETROMINO_INLINE void across(Vector* x) {
    if constexpr (Count == 8) {
      sum_and_difference(x[0], x[4]);
      sum_and_difference(x[1], x[5]);
      sum_and_difference(x[2], x[6]);
      sum_and_difference(x[3], x[7]);
      across<4>(x);
      across<4>(x + 4);
    } else if constexpr (Count == 4) {
      sum_and_difference(x[0], x[2]);
      sum_and_difference(x[1], x[3]);
      sum_and_difference(x[0], x[1]);
      sum_and_difference(x[2], x[3]);
    } else if constexpr (Count == 2) {
      sum_and_difference(x[0], x[1]);
    }
  }
  template <class Vector>
  static TETROMINO_INLINE void sum_and_difference(Vector& a, Vector& b) {
    const Vector sum = a + b;
    b = a - b;
    a = sum;
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
