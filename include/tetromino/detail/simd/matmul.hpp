#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

#if TETROMINO_SIMD

#include "matmul/bfloat16.hpp"  // bfloat16_matmul
#include "matmul/float.hpp"     // float_matmul
#include "matmul/integer.hpp"   // integer_matmul

#include <cstddef>  // std::size_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Matrix products on vectors; see float_matmul, bfloat16_matmul and integer_matmul.
struct simd_matmul_kernels {
  static constexpr std::size_t tile_rows = tile_sums::most_rows, tile_cols = tile_sums::most_cols;

  static void multiply(const float_product& product, const matmul_tile& tile) { multiply_floats<words>(product, tile); }
  static void multiply(const integer_product& product, const matmul_tile& tile) {
    integer_matmul::multiply(product, tile);
  }

 private:
  template <class Words>
  static void multiply_floats(const float_product& product, const matmul_tile& tile) {
    if constexpr (multiplies_bfloat16<Words>) {
      const bool is_fine = product.weights.format.macro_bits == 2;  // whose factors are applied to floats
      if (product.x.type == real_type::bfloat16 && !is_fine) return bfloat16_matmul<Words>::multiply(product, tile);
    }
    float_matmul::multiply(product, tile);
  }
};

}  // namespace TETROMINO_ISA
}  // namespace TETROMINO_NAMESPACE::detail

TETROMINO_VECTOR_CODE_END

#endif
