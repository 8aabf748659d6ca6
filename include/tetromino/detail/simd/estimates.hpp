#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// Squared errors of 16 blocks side by side, lane b of block b. They differ by rounding from those that the
/// specification adds up in its order; where no two candidates err nearly alike, the least of them is the same.

#if TETROMINO_SIMD

#include "isa.hpp"  // floats, words, snap, load_columns

#include <cstddef>  // std::size_t
#include <cstdint>  // std::int32_t, std::uint8_t

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

inline constexpr std::size_t blocks_at_once = lane_count;

/// 16 blocks of `block` elements, whose signs do not count, and the weights of their squared errors; null: all 1.
struct block_magnitudes {
  const float* x;
  const float* weights;
  std::size_t block;

  /// The same blocks without weights, for searches whose candidates weights leave with the same error.
  [[nodiscard]] TETROMINO_INLINE block_magnitudes without_weights() const { return {x, nullptr, block}; }
};

/// The same, if there are any: lane b of x[i], a magnitude, and of weights[i] belongs to element i of block b.
struct block_columns {
  alignas(64) float x[32][lane_count];
  alignas(64) float weights[32][lane_count];
  std::size_t block;
  bool is_weighted;

  TETROMINO_INLINE explicit block_columns(const block_magnitudes& in)
      : block(in.block), is_weighted(in.weights != nullptr) {
    if (in.x != nullptr) transpose(in.x, block, x);
    if (is_weighted) transpose(in.weights, block, weights);
  }

 private:
  static TETROMINO_OUTLINE void transpose(const float* from, std::size_t block, float (*to)[lane_count]) {
    const std::uint8_t* rows[lane_count];
    for (std::size_t b = 0; b < lane_count; ++b) rows[b] = reinterpret_cast<const std::uint8_t*>(from + b * block);
    for (std::size_t i = 0; i < block; i += 4) {
      const byte_columns four = load_columns(rows, i * sizeof(float));
      for (std::size_t d = 0; d < 4; ++d) store(to[i + d], magnitude(floats_of(four.part[d])));
    }
  }
};

/// What blocks are multiplied by, and the powers of two that the grid of E2M1 is multiplied by.
struct error_candidate {
  floats multiplier, scale;
};

/// The squared errors of blocks for `count` candidates, an even number. Without `Clamped`, products are at most 7
/// scales: then the grid may as well go on, as 7 is as far from 8 as from 6.
template <bool Clamped>
TETROMINO_OUTLINE void estimate_errors(const block_columns& in, const error_candidate* of, std::size_t count,
                                       floats* out) {
  const floats six = broadcast(6.0f);
  const auto difference = [&](const floats& x, const error_candidate& c) TETROMINO_INLINE_LAMBDA {
    const floats y = rounded(x * c.multiplier);
    return y - snap(Clamped ? min(y, c.scale * six) : y, c.scale);
  };
  for (std::size_t n = 0; n < count; n += 2) {
    const error_candidate a = of[n], b = of[n + 1];
    floats first = broadcast(0.0f), second = first;
    if (Clamped && in.is_weighted) {
      for (std::size_t i = 0; i < in.block; ++i) {
        const floats x = load(in.x[i]), w = load(in.weights[i]), da = difference(x, a), db = difference(x, b);
        first = multiply_add(w, rounded(da * da), first);
        second = multiply_add(w, rounded(db * db), second);
      }
    } else {
      for (std::size_t i = 0; i < in.block; ++i) {
        const floats x = load(in.x[i]), da = difference(x, a), db = difference(x, b);
        first = multiply_add(da, da, first);
        second = multiply_add(db, db, second);
      }
    }
    out[n] = first;
    out[n + 1] = second;
  }
}

/// Σ weight (x multiplier)², and with weights more than what underflows in such sums.
TETROMINO_OUTLINE inline floats sum_of_squares(const block_columns& in, const floats& multiplier) {
  floats even = broadcast(0.0f), odd = even;
  const auto add = [&](std::size_t i, floats& sum) TETROMINO_INLINE_LAMBDA {
    const floats y = load(in.x[i]) * multiplier;
    sum = in.is_weighted ? multiply_add(load(in.weights[i]), multiply_add(y, y, broadcast(0x1p-100f)), sum)
                         : multiply_add(y, y, sum);
  };
  for (std::size_t i = 0; i < in.block; i += 2) {
    add(i, even);
    add(i + 1, odd);
  }
  return even + odd;
}

/// The largest weight of each block, as bits.
TETROMINO_OUTLINE inline words largest_weights(const block_columns& in) {
  words largest = broadcast(0);
  for (std::size_t i = 0; i < in.block; ++i) largest = max(largest, bits_of(load(in.weights[i])));
  return largest;
}

/// The candidate of the least estimate so far, and the least of the others', lane by lane.
class least_estimate {
 public:
  TETROMINO_INLINE void offer(const words& candidate, const floats& error) {
    best_ = select(error < least_, candidate, best_);
    second_ = min(second_, floats_of(max(bits_of(least_), bits_of(error))));
    least_ = min(least_, error);
  }
  [[nodiscard]] TETROMINO_INLINE const words& best() const { return best_; }
  [[nodiscard]] TETROMINO_INLINE const floats& least() const { return least_; }
  /// Where the best candidate has the least error of the specification too, and no other has as little. Estimates of
  /// sums of at most 256 squares are within 31 x 2^-23 of those; `slack` allows for differences that are rounded
  /// differently, 2^-90 for what underflowed.
  [[nodiscard]] TETROMINO_INLINE flags is_settled(const floats& slack) const {
    const floats more = least_ * broadcast(1 + 0x1p-17f) + (slack + broadcast(0x1p-90f));
    return (more < second_) & (second_ < broadcast(0x1p120f));
  }

 private:
  words best_ = broadcast(0);
  floats least_ = broadcast(0x1p127f), second_ = least_;
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

#endif
