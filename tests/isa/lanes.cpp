#include "check.hpp"

/// What the kernels of the simd backend do in one vector. This file is built once for each instruction set.

#include <tetromino/simd.hpp>

#include "reference/generators.hpp"

#include <bit>          // std::bit_cast
#include <cmath>        // std::ldexp
#include <string_view>  // std::string_view

#if !TETROMINO_SIMD
TEST_CASE("the simd backend exists") { WARN("xsimd was not found: there is nothing to test"); }
#else

// Each set has what the one list names. (Only instances of tetromino::cpu look otherwise.)
template struct tetromino::detail::checked_set<tetromino::detail::this_set>;

TEST_CASE("the vectors are those that this build asks for") {
  const std::string_view isa = tetromino::simd.isa();
#if defined(__AVX512BW__)
  CHECK(isa.substr(0, 6) == "avx512");
#elif defined(__AVX2__)
  CHECK(isa.substr(0, 4) == "avx2");
#elif defined(__x86_64__)
  CHECK(isa == "sse2");
#elif defined(__aarch64__)
  CHECK(isa.substr(0, 4) == "neon");
#endif
}

TEST_CASE("quotients for codes lie on the right side of every midpoint") {
  constexpr std::size_t lanes = tetromino::detail::lane_count;
  const std::size_t step = 1 + 2 * (tetromino_test::seed() % 40 + 20);  // a part of all mantissas, another by seed
  std::size_t wrong = 0;
  for (std::uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += static_cast<std::uint32_t>(step)) {
    const float d = std::bit_cast<float>(0x3F800000u | mantissa);
    for (const float midpoint : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f}) {
      float x[lanes], q[lanes];
      for (std::uint32_t i = 0; i < lanes; ++i) {
        x[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(midpoint * d) + i - 8);
      }
      using tetromino::detail::broadcast;
      tetromino::detail::store(q, tetromino::detail::quotient_for_code(tetromino::detail::load(x), broadcast(d),
                                                                       broadcast(1.0f) / broadcast(d)));
      for (std::size_t i = 0; i < lanes; ++i) {
        const float exact = x[i] / d;
        wrong += (exact < midpoint) != (q[i] < midpoint) || (exact > midpoint) != (q[i] > midpoint);
      }
    }
  }
  CHECK(wrong == 0);
}

#endif
