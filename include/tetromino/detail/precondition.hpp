#pragma once

#include "../config.hpp"  // TETROMINO_NAMESPACE, TETROMINO_ISA

#include <cstddef>      // std::size_t
#include <cstdio>       // std::snprintf, std::fprintf, std::fflush
#include <cstdlib>      // std::abort
#include <type_traits>  // std::conditional_t, std::is_floating_point_v

namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA {

/// The values that a precondition looks at, as text: "layer = 7, layers_ = 4". `names` are the expressions as the
/// macro saw them, which have no commas outside of brackets.
struct named_values {
  char text[400];

  template <class... Values>
  explicit named_values([[maybe_unused]] const char* names, const Values&... values) {
    text[0] = '\0';
    (append(names, static_cast<shown<Values>>(values)), ...);
  }

 private:
  int used_ = 0;

  template <class Value>
  using shown = std::conditional_t<std::is_floating_point_v<Value>, double, long long>;

  TETROMINO_COLD void append(const char*& names, double value) {
    char number[32];
    std::snprintf(number, sizeof number, "%.9g", value);
    append(names, number);
  }
  TETROMINO_COLD void append(const char*& names, long long value) {
    char number[32];
    std::snprintf(number, sizeof number, "%lld", value);
    append(names, number);
  }
  TETROMINO_COLD void append(const char*& names, const char* number) {
    while (*names == ' ' || *names == ',') ++names;
    int length = 0;
    for (int depth = 0; names[length] != '\0' && (names[length] != ',' || depth > 0); ++length) {
      depth += names[length] == '(' || names[length] == '[' ? 1 : names[length] == ')' || names[length] == ']' ? -1 : 0;
    }
    const int room = static_cast<int>(sizeof text) - used_;
    const int written = std::snprintf(text + used_, static_cast<std::size_t>(room), "%s%.*s = %s",
                                      used_ == 0 ? "" : ", ", length, names, number);
    used_ = written < room ? used_ + written : static_cast<int>(sizeof text) - 1;
    names += length;
  }
};

/// What a broken precondition does unless the program says otherwise.
[[noreturn]] inline void precondition_failed(const char* message, const char* values, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: tetromino: precondition failed: %s%s%s%s\n", file, line, message,
               *values == '\0' ? "" : " (", values, *values == '\0' ? "" : ")");
  std::fflush(stderr);
  std::abort();
}

}  // namespace TETROMINO_NAMESPACE::detail::inline TETROMINO_ISA
