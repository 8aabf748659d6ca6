#pragma once

/// What every test includes, before any tetromino header. It is the only test file that names Catch2 (2.13 and 3 both
/// work). Preconditions are checked and throw tetromino_test::precondition_failed, so that a test can see each one
/// fire.

#if defined(TETROMINO_EXPECTS)
#error "include check.hpp before any tetromino header: it decides what a failed precondition does"
#endif

#include <cstdint>       // std::uint64_t
#include <cstdlib>       // std::getenv, std::strtoull
#include <filesystem>    // std::filesystem::path
#include <fstream>       // std::ofstream
#include <random>        // std::random_device
#include <stdexcept>     // std::logic_error
#include <string>        // std::string, std::to_string
#include <system_error>  // std::error_code

#if __has_include(<catch2/catch.hpp>)  // Catch2 2: where both are installed, it needs no library that may not fit
#if defined(TETROMINO_TEST_MAIN)
#define CATCH_CONFIG_RUNNER
#endif
#include <catch2/catch.hpp>
#else
#include <catch2/catch_all.hpp>
using Catch::Approx;
#endif

namespace tetromino_test {

/// Thrown in place of the abort that a broken precondition causes elsewhere.
struct precondition_failed : std::logic_error {
  using std::logic_error::logic_error;
};

/// Where TETROMINO_PRECONDITION_LOG names a file, the places that fired are written to it: tests/preconditions.sh
/// compares them with the headers.
[[noreturn]] inline void fail_precondition(const char* message, const char* values, const char* file, int line) {
  if (const char* log = std::getenv("TETROMINO_PRECONDITION_LOG"); log != nullptr && *log != '\0') {
    std::ofstream(log, std::ios::app) << std::string(file) + ":" + std::to_string(line) + ": " + message + "\n";
  }
  throw precondition_failed(std::string(message) + (*values == '\0' ? "" : std::string(" (") + values + ")"));
}

/// The seed of every random test: TETROMINO_SEED from the environment, or a fixed default. A failing run prints it.
[[nodiscard]] inline std::uint64_t seed() {
  const char* text = std::getenv("TETROMINO_SEED");
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 0) : 0x7e7205eedULL;
}

/// The path of a bundled input, `examples/data/name`.
[[nodiscard]] std::filesystem::path data_file(const std::string& name);

/// A fresh directory that goes away, with its contents, at the end of its scope.
class temporary_directory {
 public:
  temporary_directory() {
    std::random_device entropy;
    do {
      path_ = std::filesystem::temp_directory_path() / ("tetromino-test-" + std::to_string(entropy()));
    } while (!std::filesystem::create_directory(path_));
  }
  temporary_directory(const temporary_directory&) = delete;
  temporary_directory& operator=(const temporary_directory&) = delete;
  ~temporary_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  [[nodiscard]] std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

/// Matches a string that has `part` in it: `REQUIRE_THROWS_WITH(call(), contains("expected 3"))`.
[[nodiscard]] inline auto contains(const std::string& part) {
#if __has_include(<catch2/catch.hpp>)
  return Catch::Matchers::Contains(part);
#else
  return Catch::Matchers::ContainsSubstring(part);
#endif
}

}  // namespace tetromino_test

#define TETROMINO_CHECKED
#define TETROMINO_PRECONDITION_FAILED(message, values) \
  ::tetromino_test::fail_precondition(message, values, __FILE__, __LINE__)
