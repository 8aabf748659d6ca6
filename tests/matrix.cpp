#include "check.hpp"

#include <tetromino/matrix.hpp>

#include <type_traits>

using namespace tetromino;

TEST_CASE("views find their elements by stride") {
  float data[24];
  for (int i = 0; i < 24; ++i) data[i] = static_cast<float>(i);
  const matrix_view m(data, 2, 3, 5);
  CHECK(m(1, 2) == 7.0f);
  const batch_view<float> b(data, 2, 2, 3, 5, 12);
  CHECK(b.row(1, 1)[2] == 19.0f);
  CHECK(b[1](1, 2) == 19.0f);
  const batch_view<const float> one = m;
  CHECK(one.matrices == 1);
  CHECK(one.row(0, 1) == data + 5);
}

TEST_CASE("views lose constness in no way") {
  STATIC_REQUIRE(std::is_convertible_v<matrix_view<float>, matrix_view<const float>>);
  STATIC_REQUIRE(std::is_convertible_v<matrix_view<float>, batch_view<const float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<matrix_view<const float>, matrix_view<float>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<batch_view<const float>, batch_view<float>>);
  STATIC_REQUIRE(matrix_like<matrix<half>>);
  STATIC_REQUIRE_FALSE(matrix_like<matrix_view<double>>);
}

TEST_CASE("views take 16-bit words, bytes without a type and compilers' own 16-bit floats as what the caller says") {
  const std::uint16_t words[6] = {0x3F80, 0x4000, 0xC040, 0x3C00, 0x4000, 0};
  const matrix_view<const bfloat16> as_bfloat16(words, 1, 3);
  CHECK(static_cast<float>(as_bfloat16(0, 2)) == -3.0f);
  const void* const bytes = words;
  const batch_view<const half> as_half(bytes, 2, 1, 2, 2, 3);
  CHECK(static_cast<float>(as_half[1](0, 0)) == 1.0f);
  CHECK(static_cast<float>(batch_view<const half>(words, 3, 1, 2)[2](0, 0)) == 2.0f);

  float room[4] = {};
  void* const out = room;
  matrix_view<float>(out, 2, 2)(1, 1) = 5.0f;
  CHECK(room[3] == 5.0f);

  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<half>, const std::uint16_t*, int, int>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<half>, const void*, int, int>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<const half>, const float*, int, int>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<const half>, const bfloat16*, int, int>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<const float>, const std::uint16_t*, int, int>);
  CHECK_THROWS_AS(matrix_view<const half>(static_cast<const void*>(reinterpret_cast<const char*>(words) + 1), 1, 1),
                  tetromino_test::precondition_failed);
}

// g++ 12 has it in C++ on x86-64 alone.
#if defined(__FLT16_MAX__) && \
    (defined(__AVX512FP16__) || (!defined(__clang__) && (__GNUC__ >= 13 || defined(__SSE2__))))
TEST_CASE("the compiler's _Float16 is a half, and nothing else") {
  _Float16 x[4] = {};
  matrix_view<half>(x, 2, 2)(1, 0) = half(0.25f);
  CHECK(static_cast<float>(x[2]) == 0.25f);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<bfloat16>, _Float16*, int, int>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<matrix_view<float>, _Float16*, int, int>);
}
#endif

TEST_CASE("a row stride below the number of columns is a caller's bug") {
  float data[8] = {};
  CHECK_THROWS_AS(matrix_view(data, 2, 4, 3), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(batch_view<float>(data, 1, 2, 4, 3, 8), tetromino_test::precondition_failed);
  CHECK_NOTHROW(matrix_view(data, 1, 4, 0));
}
