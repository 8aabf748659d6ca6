#pragma once

#include "../../config.hpp"  // TETROMINO_SIMD

/// The hooks of the `simd` policy for all that works on rows; see quantize.hpp. What only multiplies is in simd.hpp.

#if TETROMINO_SIMD

#include "../../execution.hpp"  // simd_t
#include "../../hadamard.hpp"   // rotate_cpu
#include "../cpu_backend.hpp"   // quantize_cpu
#include "quantize.hpp"         // simd_kernels

#include <cstddef>  // std::size_t
#include <span>     // std::span

namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA {

template <real T>
result<void> quantize_on(const simd_t& policy, const detail::quantize_job<T>& job) {
  return detail::quantize_cpu<detail::simd_kernels>(policy.executor, job);
}
template <real T>
result<void> fake_quantize_on(const simd_t& policy, const detail::fake_quantize_job<T>& job) {
  return detail::fake_quantize_cpu<detail::simd_kernels>(policy.executor, job);
}
template <real T>
void amax_on(const simd_t& policy, const batch_view<const T>& in, special_values special, std::span<float> out) {
  const auto row_amax = [&](const T* x, std::size_t cols) { return detail::simd_kernels::amax(x, cols, special); };
  detail::amax_cpu<T>(policy.executor, in, row_amax, out);
}
template <real T>
result<void> dequantize_on(const simd_t& policy, const detail::dequantize_job<T>& job) {
  return detail::dequantize_cpu<detail::simd_kernels>(policy.executor, job);
}
template <real T>
result<void> rotate_on(const simd_t& policy, const detail::rotate_job<T>& job) {
  detail::rotate_cpu<detail::simd_rotation>(policy.executor, job);
  return {};
}

}  // namespace TETROMINO_NAMESPACE::inline TETROMINO_ISA

#endif
