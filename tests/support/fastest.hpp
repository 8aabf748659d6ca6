#pragma once

/// `fastest`, for tests that compare what a fast backend gives with an oracle: tetromino::cpu, whose kernels are
/// compiled once for all of them; without TETROMINO_TEST_CPU, `automatic`.

#if defined(TETROMINO_TEST_CPU)
#include <tetromino/cpu.hpp>
#else
#include <tetromino/simd.hpp>
#endif

namespace tetromino_test {

#if defined(TETROMINO_TEST_CPU)
inline constexpr tetromino::cpu_t fastest{};
#else
inline constexpr tetromino::automatic_t fastest{};
#endif

}  // namespace tetromino_test
