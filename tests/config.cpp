#include "check.hpp"

#include <tetromino/config.hpp>
#include <tetromino/version.hpp>

#include <sys/wait.h>  // waitpid
#include <unistd.h>    // fork, _exit

#include <csignal>  // SIGABRT
#include <cstdio>   // std::freopen
#include <fstream>  // std::ifstream
#include <string>   // std::string

namespace {

constexpr int twice(int x, int y) { return x + y; }
constexpr int at_least_one(int x) {
  TETROMINO_EXPECTS(x >= 1, "x is at least one", x, twice(x, x), 0.5f);
  return x;
}

static_assert(at_least_one(3) == 3);  // a precondition that holds costs nothing at compile time

}  // namespace

TEST_CASE("a broken precondition is seen, with its message") {
  CHECK(at_least_one(1) == 1);
  CHECK_THROWS_AS(at_least_one(0), tetromino_test::precondition_failed);
  CHECK_THROWS_WITH(at_least_one(0), tetromino_test::contains("at least one"));
}

TEST_CASE("a broken precondition is seen with its values") {
  CHECK_THROWS_WITH(at_least_one(-3), "x is at least one (x = -3, twice(x, x) = -6, 0.5f = 0.5)");
  const std::string names = "a_name_of_a_hundred_letters" + std::string(500, 'x');
  CHECK(std::string(tetromino::detail::named_values(names.c_str(), 1).text).size() < 400);
}

TEST_CASE("unless the program says otherwise, a broken precondition prints place, message and values, and aborts") {
  const tetromino_test::temporary_directory folder;
  const std::string said = folder / "said";
  const pid_t child = ::fork();
  if (child == 0) {
    if (std::freopen(said.c_str(), "w", stderr) == nullptr) ::_exit(1);
    std::signal(SIGABRT, SIG_DFL);
    tetromino::detail::precondition_failed("a message", "x = 7", "a/header.hpp", 42);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT));
  std::string line;
  std::getline(std::ifstream(said), line);
  CHECK(line == "a/header.hpp:42: tetromino: precondition failed: a message (x = 7)");
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
