#include "check.hpp"

#include <tetromino/error.hpp>

#include <memory>  // std::unique_ptr

using tetromino::errc;
using tetromino::error;
using tetromino::result;

namespace {

result<int> try_half(int x) {
  if (x % 2 != 0) return error(errc::invalid_argument, tetromino::detail::text("expected an even number, got ", x));
  return x / 2;
}

int half(int x) { return try_half(x).value(); }

result<void> try_even(int x) {
  if (x % 2 != 0) return error(errc::infeasible, "odd");
  return {};
}

}  // namespace

TEST_CASE("a result holds a value or an error") {
  result<int> good = try_half(8);
  REQUIRE(good);
  REQUIRE(good.has_value());
  CHECK(*good == 4);
  CHECK(good.value() == 4);
  good.value() = 5;
  CHECK(*good == 5);

  const result<int> bad = try_half(7);
  REQUIRE(!bad);
  CHECK(bad.error().code() == errc::invalid_argument);
  CHECK(std::string(bad.error().what()) == "expected an even number, got 7");
}

TEST_CASE("value() throws the error that the result holds") {
  CHECK(half(6) == 3);
  REQUIRE_THROWS_AS(half(5), error);
  REQUIRE_THROWS_WITH(half(5), "expected an even number, got 5");
  try {
    (void)half(3);
    FAIL("no error was thrown");
  } catch (const error& e) {
    CHECK(e.code() == errc::invalid_argument);
  }
}

TEST_CASE("a result of nothing is success or an error") {
  CHECK(try_even(2));
  CHECK_NOTHROW(try_even(2).value());
  const result<void> bad = try_even(3);
  REQUIRE(!bad);
  CHECK(bad.error().code() == errc::infeasible);
  CHECK_THROWS_AS(bad.value(), error);
}

TEST_CASE("a result moves what cannot be copied") {
  result<std::unique_ptr<int>> made = std::make_unique<int>(3);
  REQUIRE(made);
  CHECK(**made == 3);
  const std::unique_ptr<int> taken = std::move(made).value();
  CHECK(*taken == 3);
  CHECK(result<std::string>(std::string("abc"))->size() == 3);
}

TEST_CASE("looking at the wrong side of a result is a caller's bug") {
  const result<int> good = try_half(2);
  const result<int> bad = try_half(1);
  CHECK_THROWS_AS(good.error(), tetromino_test::precondition_failed);
  CHECK_THROWS_AS(*bad, tetromino_test::precondition_failed);
  CHECK_THROWS_AS(result<void>{}.error(), tetromino_test::precondition_failed);
}

TEST_CASE("messages join text and numbers") {
  CHECK(tetromino::detail::text("rows ", 3, ", scale ", 0.5, ", ", std::string("x"), std::string_view("y"), 'z') ==
        "rows 3, scale 0.5, xyz");
  CHECK(tetromino::detail::text(std::uint64_t{18446744073709551615ULL}) == "18446744073709551615");
}
