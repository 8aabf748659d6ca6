#pragma once

#include "detail/macros_off.hpp"

/// Attaches the `simd` policy, which is also `automatic`: every verb, with the widest vectors that the translation unit
/// is compiled for. Needs xsimd; without it, `automatic` is `scalar`. tetromino.hpp attaches it to the verbs that it
/// has, and leaves out products.

#include "detail/simd/quantize_on.hpp"  // quantize_on, amax_on, fake_quantize_on, dequantize_on, rotate_on
#include "activations.hpp"              // quantize_int8
#include "dequantize.hpp"               // dequantize
#include "e4m3_activations.hpp"         // quantize_e4m3
#include "hadamard.hpp"                 // rotate
#include "matmul.hpp"                   // matmul
#include "quantize.hpp"                 // quantize

#if TETROMINO_SIMD

#include "detail/simd/activations.hpp"       // simd_int8
#include "detail/simd/e4m3_activations.hpp"  // simd_e4m3
#include "detail/simd/matmul.hpp"            // simd_matmul_kernels

namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA {

template <real T>
result<void> quantize_int8_on(const simd_t& policy, const detail::quantize_int8_job<T>& job) {
  return detail::quantize_int8_cpu<detail::simd_int8>(policy.executor, job);
}
template <real T>
result<void> quantize_e4m3_on(const simd_t& policy, const detail::quantize_e4m3_job<T>& job) {
  return detail::quantize_e4m3_cpu<detail::simd_e4m3>(policy.executor, job);
}
template <class X, real Out>
result<void> matmul_on(const simd_t& policy, const detail::matmul_job<X, Out>& job) {
  detail::matmul_cpu<detail::simd_matmul_kernels>(policy.executor, job);
  return {};
}

}  // namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA

#endif

#include "detail/macros_back.hpp"
