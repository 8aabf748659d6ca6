#pragma once

/// The backend that a test in isa/ looks at, `vectors`: with TETROMINO_TEST_CPU that of tetromino::cpu which the
/// environment names in TETROMINO_FORCE_BACKEND, otherwise the vectors that the test itself is compiled for.

#if defined(TETROMINO_TEST_CPU)
#include <tetromino/cpu.hpp>

#include <tetromino/detail/dispatch/jobs.hpp>
#define TETROMINO_TEST_VECTORS 1
#else
#include <tetromino/simd.hpp>
#define TETROMINO_TEST_VECTORS TETROMINO_SIMD
#endif

#if TETROMINO_TEST_VECTORS
namespace tetromino_test {

#if defined(TETROMINO_TEST_CPU)
inline constexpr tetromino::cpu_t vectors{};
inline tetromino::detail::dispatched_rows row_kernels() {
  return {tetromino::detail::kernels_of(vectors).value()->quantize};
}
#else
inline constexpr tetromino::simd_t vectors{};
inline tetromino::detail::simd_kernels row_kernels() { return {}; }
#endif

}  // namespace tetromino_test
#endif
