#pragma once

#include "detail/macros_off.hpp"

/// The same kernels as the `simd` policy, compiled for several instruction sets, with the best one chosen when the
/// program runs: for programs that are built for plain x86-64. Link the target tetromino::cpu.

#include "activations.hpp"              // quantize_int8_on
#include "dequantize.hpp"               // dequantize_on
#include "detail/dispatch/kernels.hpp"  // default_kernels
#include "e4m3_activations.hpp"         // quantize_e4m3_on
#include "hadamard.hpp"                 // rotate_on
#include "matmul.hpp"                   // matmul_on
#include "quantize.hpp"                 // quantize_on

#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE {

/// Runs on the CPU with the widest vectors that it has, or as the environment variable TETROMINO_FORCE_BACKEND says:
/// one of the names that cpu_backends() gives, read once. With any other name, calls report an error.
struct cpu_t {
  executor_ref executor{};
  const detail::cpu_kernels* kernels = nullptr;  ///< null: the best, or as the environment says

  /// The same policy, with its work split over the caller's executor.
  [[nodiscard]] TETROMINO_ABI constexpr cpu_t on(executor_ref e) const noexcept { return {e, kernels}; }

  /// The name of the backend in use. Errors: unknown_name, invalid_argument for what TETROMINO_FORCE_BACKEND says.
  [[nodiscard]] TETROMINO_ABI result<std::string_view> try_backend() const {
    if (kernels != nullptr) return kernels->name;
    const auto& chosen = detail::default_kernels();
    if (!chosen) return chosen.error();
    return (*chosen)->name;
  }
  /// try_backend, throwing its error.
  [[nodiscard]] TETROMINO_ABI std::string_view backend() const { return try_backend().value(); }

  /// The same policy on the backend of that name, whatever the environment says. Errors: unknown_name;
  /// invalid_argument where this CPU or this build lacks it.
  [[nodiscard]] TETROMINO_ABI result<cpu_t> try_with(std::string_view name) const {
    const auto chosen = detail::choose_kernels(std::string(name).c_str());
    if (!chosen) return chosen.error();
    return cpu_t{executor, *chosen};
  }
  /// try_with, throwing its error.
  [[nodiscard]] TETROMINO_ABI cpu_t with(std::string_view name) const { return try_with(name).value(); }
};
inline constexpr cpu_t cpu{};

/// The backends that run on this CPU, from the slowest to the fastest: scalar, then sse2, avx2, avx2_vnni, avx512,
/// avx512_vnni, avx512_bf16 and avx512_amx, or neon and neon_dotprod. The first call that looks asks the operating
/// system for AMX's tiles where the CPU has them, for the whole process and for good: signal handlers' frames get 8 KiB
/// larger. Where it refuses, there is no avx512_amx.
[[nodiscard]] std::vector<std::string_view> cpu_backends();

namespace detail::inline TETROMINO_ISA {

inline result<const cpu_kernels*> kernels_of(const cpu_t& policy) {
  if (policy.kernels != nullptr) return policy.kernels;
  return default_kernels();
}
/// For calls that report no error: where the environment names no backend, the scalar one, which gives the same.
inline const cpu_kernels& kernels_or_scalar(const cpu_t& policy) {
  const auto kernels = kernels_of(policy);
  return kernels ? **kernels : supported_kernels().front();
}

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// The hooks of the policy; see quantize.hpp.
template <real T>
result<void> quantize_on(const cpu_t& policy, const detail::quantize_job<T>& job) {
  const auto kernels = detail::kernels_of(policy);
  if (!kernels) return kernels.error();
  return detail::quantize_with(**kernels, policy.executor, job);
}
template <real T>
result<void> fake_quantize_on(const cpu_t& policy, const detail::fake_quantize_job<T>& job) {
  const auto kernels = detail::kernels_of(policy);
  if (!kernels) return kernels.error();
  return detail::fake_quantize_with(**kernels, policy.executor, job);
}
template <real T>
void amax_on(const cpu_t& policy, const batch_view<const T>& in, special_values special, std::span<float> out) {
  detail::amax_with(detail::kernels_or_scalar(policy), policy.executor, in, special, out);
}
template <real T>
result<void> rotate_on(const cpu_t& policy, const detail::rotate_job<T>& job) {
  detail::rotate_with(detail::kernels_or_scalar(policy), policy.executor, job);
  return {};
}
template <real T>
result<void> dequantize_on(const cpu_t& policy, const detail::dequantize_job<T>& job) {
  const auto kernels = detail::kernels_of(policy);
  if (!kernels) return kernels.error();
  return detail::dequantize_with(**kernels, policy.executor, job);
}
template <real T>
result<void> quantize_int8_on(const cpu_t& policy, const detail::quantize_int8_job<T>& job) {
  const auto kernels = detail::kernels_of(policy);
  if (!kernels) return kernels.error();
  return detail::quantize_int8_with(**kernels, policy.executor, job);
}
template <real T>
result<void> quantize_e4m3_on(const cpu_t& policy, const detail::quantize_e4m3_job<T>& job) {
  const auto kernels = detail::kernels_of(policy);
  if (!kernels) return kernels.error();
  return detail::quantize_e4m3_with(**kernels, policy.executor, job);
}
template <class X, real Out>
result<void> matmul_on(const cpu_t& policy, const detail::matmul_job<X, Out>& job) {
  const auto kernels = detail::kernels_of(policy);
  if (!kernels) return kernels.error();
  detail::multiply_with(**kernels, policy.executor, detail::product_of(job), job.row_offsets);
  return {};
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
