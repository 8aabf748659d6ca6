#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

#if TETROMINO_SIMD

#include "matmul_float.hpp"    // float_matmul
#include "matmul_integer.hpp"  // integer_matmul

#include <cstddef>      // std::size_t
#include <type_traits>  // std::is_same_v, std::remove_const_t, std::remove_pointer_t

TETROMINO_VECTOR_CODE_BEGIN

namespace TETROMINO_NAMESPACE::detail {
inline namespace TETROMINO_ISA {

/// Matrix products on vectors; see float_matmul and integer_matmul.
struct simd_matmul_kernels {
  static constexpr std::size_t tile_rows = 64, tile_cols = 128;

  template <class X, real Out>
  static void multiply(const matmul_job<X, Out>& job, const matmul_tile& tile) {
    using activations = std::remove_const_t<X>;
    constexpr bool are_integers =
        std::is_same_v<activations, int8_view<>> || std::is_same_v<activations, packed_view<any_format>>;
    if constexpr (!are_integers) {
      float_matmul<std::remove_const_t<std::remove_pointer_t<decltype(job.x.data)>>, Out>::multiply(job, tile);
    } else {
      integer_matmul<X, Out>::multiply(job, tile);
    }
  }
};

}  // namespace TETROMINO_ISA
}  // namespace tetromino::detail

TETROMINO_VECTOR_CODE_END

#endif
