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

TEST_CASE("a row stride below the number of columns is a caller's bug") {
  float data[8] = {};
  CHECK_THROWS_AS(matrix_view(data, 2, 4, 3), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(batch_view<float>(data, 1, 2, 4, 3, 8), tetromino_test::precondition_failed);
  CHECK_NOTHROW(matrix_view(data, 1, 4, 0));
}
