#pragma once

#include "detail/macros_off.hpp"

#include "config.hpp"  // TETROMINO_EXCEPTIONS

#include <cstddef>           // std::size_t
#include <cstdint>           // std::uint8_t
#include <cstdio>            // std::fprintf, std::snprintf
#include <initializer_list>  // std::initializer_list
#include <new>               // placement new
#include <stdexcept>         // std::runtime_error
#include <string>            // std::string
#include <string_view>       // std::string_view
#include <type_traits>       // std::is_arithmetic_v, std::is_copy_constructible_v
#include <utility>           // std::move

namespace TETROMINO_NAMESPACE {

/// What kind of bad data a tetromino::error reports.
enum class errc {
  invalid_argument,  ///< a value outside its range, or a combination that has no meaning
  shape_mismatch,    ///< sizes that do not fit together
  non_finite,        ///< a NaN or an infinity where the policy rejects them
  unknown_name,      ///< a recipe, layout, solver or tensor name that does not exist
  malformed_file,    ///< a file whose contents break its format
  io,                ///< the operating system refused to open, read or write
  infeasible,        ///< a request that no solution can satisfy
  device,            ///< a GPU's runtime refused a call
};

namespace detail::inline TETROMINO_ISA {

/// A string, a character or a number, as part of a message.
class text_piece {
 public:
  text_piece(std::string_view piece) : string_(piece) {}
  text_piece(const std::string& piece) : string_(piece) {}
  text_piece(const char* piece) : string_(piece) {}
  text_piece(const char& piece) : string_(&piece, 1) {}
  template <class Number>
    requires std::is_arithmetic_v<Number> text_piece(Number piece)
        : kind_(std::is_floating_point_v<Number> ? real
                : std::is_signed_v<Number>       ? whole
                                                 : natural) {
      if constexpr (std::is_floating_point_v<Number>) {
        real_ = piece;
      } else if constexpr (std::is_signed_v<Number>) {
        whole_ = piece;
      } else {
        natural_ = piece;
      }
    }
    void append_to(std::string& out) const {
      if (kind_ == string) return static_cast<void>(out.append(string_));
      char digits[32];
      const int length = kind_ == real    ? std::snprintf(digits, sizeof digits, "%.9g", real_)
                         : kind_ == whole ? std::snprintf(digits, sizeof digits, "%lld", whole_)
                                          : std::snprintf(digits, sizeof digits, "%llu", natural_);
      out.append(digits, static_cast<std::size_t>(length));
    }

   private:
    enum : std::uint8_t { string, real, whole, natural } kind_ = string;
    union {
      std::string_view string_;
      double real_;
      long long whole_;
      unsigned long long natural_;
    };
};
TETROMINO_COLD inline std::string joined(std::initializer_list<text_piece> pieces) {
  std::string out;
  for (const text_piece& piece : pieces) piece.append_to(out);
  return out;
}
/// Joins strings and numbers.
template <class... Pieces>
[[nodiscard]] std::string text(const Pieces&... pieces) {
  return joined({text_piece(pieces)...});
}

}  // namespace detail::inline TETROMINO_ISA

/// Bad data: says what was expected and what came. Thrown at the public door, or returned by the `try_` form of a call.
class error : public std::runtime_error {
 public:
  /// The message joins strings and numbers.
  TETROMINO_ABI TETROMINO_COLD error(errc code, std::initializer_list<detail::text_piece> message)
      : std::runtime_error(detail::joined(message)), code_(code) {}
  // not a std::string: for each message in braces, compilers would look through its constructors
  TETROMINO_ABI error(errc code, const detail::text_piece& message) : error(code, {message}) {}
  [[nodiscard]] TETROMINO_ABI errc code() const noexcept { return code_; }

 private:
  errc code_;
};

namespace detail::inline TETROMINO_ISA {

[[noreturn]] TETROMINO_COLD inline void raise(const error& e) {
#if TETROMINO_EXCEPTIONS
  throw e;
#else
  std::fprintf(stderr, "tetromino: %s\n", e.what());
  std::abort();
#endif
}

}  // namespace detail::inline TETROMINO_ISA

template <class T>
class result;

/// Success, or the error that prevented it. `value()` raises the error.
template <>
class [[nodiscard]] result<void> {
 public:
  TETROMINO_ABI result() noexcept {}
  TETROMINO_ABI TETROMINO_COLD result(const tetromino::error& e) noexcept : fails_(true), error_(e) {}

  TETROMINO_ABI result(const result& other) noexcept {
    if (other.fails_) fail(other.error_);
  }
  TETROMINO_ABI result& operator=(const result& other) noexcept {
    if (fails_ || other.fails_) replace(other);
    return *this;
  }
  TETROMINO_ABI ~result() {
    if (fails_) drop();
  }

  [[nodiscard]] TETROMINO_ABI bool has_value() const noexcept { return !fails_; }
  TETROMINO_ABI explicit operator bool() const noexcept { return has_value(); }
  TETROMINO_ABI void value() const {
    if (fails_) detail::raise(error_);
  }
  [[nodiscard]] TETROMINO_ABI const tetromino::error& error() const {
    TETROMINO_EXPECTS(!has_value(), "result::error() needs a result that holds an error");
    return error_;
  }

 private:
  TETROMINO_ABI TETROMINO_COLD void fail(const tetromino::error& e) noexcept {
    new (&error_) tetromino::error(e);
    fails_ = true;
  }
  TETROMINO_ABI TETROMINO_COLD void drop() noexcept {
    error_.~error();
    fails_ = false;
  }
  TETROMINO_ABI TETROMINO_COLD void replace(const result& other) noexcept {
    if (this == &other) return;
    if (fails_) drop();
    if (other.fails_) fail(other.error_);
  }

  bool fails_ = false;
  union {  // in place of a std::optional: what is done to errors is called, and not a part of each caller
    tetromino::error error_;
  };
};

/// A value, whose move does not throw, or the error that prevented it. `value()` raises the error; `operator*` expects
/// that there is none.
template <class T>
class [[nodiscard]] result {
 public:
  TETROMINO_ABI result(const T& value) requires(std::is_copy_constructible_v<T>) : value_(value) {}
  TETROMINO_ABI result(T&& value) : value_(std::move(value)) {}
  TETROMINO_ABI result(const tetromino::error& e) noexcept : done_(e) {}

  TETROMINO_ABI result(const result& other) requires(std::is_copy_constructible_v<T>) : done_(other.done_) {
    if (has_value()) new (&value_) T(other.value_);
  }
  TETROMINO_ABI result(result&& other) noexcept : done_(other.done_) {
    if (has_value()) new (&value_) T(std::move(other.value_));
  }
  TETROMINO_ABI result& operator=(result other) noexcept {
    this->~result();
    return *new (this) result(std::move(other));
  }
  TETROMINO_ABI ~result() {
    if (has_value()) value_.~T();
  }

  [[nodiscard]] TETROMINO_ABI bool has_value() const noexcept { return done_.has_value(); }
  TETROMINO_ABI explicit operator bool() const noexcept { return has_value(); }
  [[nodiscard]] TETROMINO_ABI const tetromino::error& error() const { return done_.error(); }

  TETROMINO_ABI T& value() & { return done_.value(), value_; }
  TETROMINO_ABI const T& value() const& { return done_.value(), value_; }
  TETROMINO_ABI T&& value() && { return done_.value(), std::move(value_); }

  TETROMINO_ABI T& operator*() & { return expects(), value_; }
  TETROMINO_ABI const T& operator*() const& { return expects(), value_; }
  TETROMINO_ABI T&& operator*() && { return expects(), std::move(value_); }
  TETROMINO_ABI T* operator->() { return &**this; }
  TETROMINO_ABI const T* operator->() const { return &**this; }

 private:
  TETROMINO_ABI void expects() const {
    TETROMINO_EXPECTS(has_value(), "result::operator* needs a result that holds a value");
  }

  result<void> done_;
  union {  // in place of a std::optional, which takes compilers three times as long
    T value_;
  };
};

}  // namespace TETROMINO_NAMESPACE

#include "detail/macros_back.hpp"
