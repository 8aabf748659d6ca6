#include "check.hpp"

#include <tetromino/config.hpp>
#include <tetromino/version.hpp>

namespace {

constexpr int at_least_one(int x) {
  TETROMINO_EXPECTS(x >= 1, "x is at least one");
  return x;
}

static_assert(at_least_one(3) == 3);  // a precondition that holds costs nothing at compile time

}  // namespace

TEST_CASE("a broken precondition is seen, with its message") {
  CHECK(at_least_one(1) == 1);
  CHECK_THROWS_AS(at_least_one(0), tetromino_test::precondition_failed);
  CHECK_THROWS_WITH(at_least_one(0), tetromino_test::contains("at least one"));
}

TEST_CASE("a product that goes through rounded() is not fused into the sum that follows") {
  volatile float a = 1.0f + 0x1p-12f;
  const float product = tetromino::detail::rounded(a * a);
  CHECK(product == 1.0f + 0x1p-11f);  // the exact square has a bit at 2^-24, which rounds away
  CHECK(product - (1.0f + 0x1p-11f) == 0.0f);
  static_assert(tetromino::detail::rounded(2.5f) == 2.5f);
}

TEST_CASE("the version is there") {
  CHECK(TETROMINO_VERSION_MAJOR >= 0);
  CHECK(TETROMINO_VERSION_MINOR >= 0);
  CHECK(TETROMINO_VERSION_PATCH >= 0);
}
