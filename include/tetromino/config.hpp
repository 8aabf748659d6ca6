#pragma once

/// The only header that asks the compiler anything. Everything else uses the names defined here.

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "tetromino needs C++20 (pass -std=c++20 or newer)"
#endif

#include <cstdlib>      // std::abort
#include <cstdio>       // std::fputs
#include <type_traits>  // std::is_constant_evaluated

/// Marks a function that CUDA device code may call too. Expands to nothing outside nvcc.
#if defined(__CUDACC__)
#define TETROMINO_HD __host__ __device__
#else
#define TETROMINO_HD
#endif

/// 1 while device code is being compiled, 0 on the host.
#if defined(__CUDA_ARCH__)
#define TETROMINO_DEVICE_CODE 1
#else
#define TETROMINO_DEVICE_CODE 0
#endif

/// 1 when exceptions are enabled. Without them an unhandled tetromino::error prints its message and aborts;
/// use the `try_` forms, which return a tetromino::result instead.
#if defined(__cpp_exceptions)
#define TETROMINO_EXCEPTIONS 1
#else
#define TETROMINO_EXCEPTIONS 0
#endif

/// 1 where the `simd` backend is available: its one dependency, xsimd, is found. Define it to 0 to do without.
#if !defined(TETROMINO_SIMD)
#if defined(__has_include) && __has_include(<xsimd/xsimd.hpp>) && !defined(__CUDACC__)
#define TETROMINO_SIMD 1
#else
#define TETROMINO_SIMD 0
#endif
#endif

/// What happens when a caller breaks a precondition (a bug in the caller, not bad data). Define it before the first
/// include to do something else: the tests throw.
#if !defined(TETROMINO_PRECONDITION_FAILED)
#define TETROMINO_PRECONDITION_FAILED(message) \
  (std::fputs("tetromino: precondition failed: " message "\n", stderr), std::abort())
#endif

/// States a precondition of a public call: checked in debug builds, or whenever TETROMINO_CHECKED is defined.
#if (!defined(NDEBUG) || defined(TETROMINO_CHECKED)) && !TETROMINO_DEVICE_CODE
#define TETROMINO_EXPECTS(condition, message) \
  ((condition) ? static_cast<void>(0) : static_cast<void>(TETROMINO_PRECONDITION_FAILED(message)))
#else
#define TETROMINO_EXPECTS(condition, message) static_cast<void>(0)
#endif

namespace tetromino::detail {

/// std::bit_cast for device code too.
template <class To, class From>
[[nodiscard]] TETROMINO_HD constexpr To bit_cast(const From& from) noexcept {
  return __builtin_bit_cast(To, from);
}

/// Hands back `x` as the rounded float that it is. Compilers may contract a product into a following addition
/// (fused multiply-add), which would change results between instruction sets; where the specification counts on two
/// roundings, the product goes through here.
TETROMINO_HD constexpr float rounded(float x) noexcept {
#if TETROMINO_DEVICE_CODE
  return __fadd_rn(x, -0.0f);
#else
  if (!std::is_constant_evaluated()) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__)) && defined(__SSE__)
    asm("" : "+x"(x));
#elif defined(__GNUC__) && defined(__aarch64__)
    asm("" : "+w"(x));
#else
    volatile float kept = x;
    x = kept;
#endif
  }
  return x;
#endif
}

}  // namespace tetromino::detail
