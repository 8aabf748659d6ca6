#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"          // error, result
#include "../detail/file_text.hpp"  // printable
#include "../dtype.hpp"             // detail::plain_integer

#include <algorithm>    // std::find_if
#include <array>        // std::array
#include <concepts>     // std::same_as
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint32_t, std::uint64_t
#include <cstring>      // std::memcpy
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <type_traits>  // std::is_signed_v
#include <utility>      // std::move
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::io {

/// The type of a GGUF metadata value. (ggml's docs/gguf.md)
enum class gguf_type : std::uint32_t {
  uint8,
  int8,
  uint16,
  int16,
  uint32,
  int32,
  float32,
  boolean,
  string,
  array,
  uint64,
  int64,
  float64,
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {

struct gguf_type_fact {
  std::string_view name;
  std::size_t bytes;  ///< 0: it depends
};
inline constexpr std::array<gguf_type_fact, 13> gguf_type_facts{{
    {"uint8", 1},
    {"int8", 1},
    {"uint16", 2},
    {"int16", 2},
    {"uint32", 4},
    {"int32", 4},
    {"float32", 4},
    {"bool", 1},
    {"string", 0},
    {"array", 0},
    {"uint64", 8},
    {"int64", 8},
    {"float64", 8},
}};

inline namespace TETROMINO_ISA {

constexpr const gguf_type_fact& fact_of(io::gguf_type type) noexcept {
  return gguf_type_facts[static_cast<std::size_t>(type)];
}

}  // namespace TETROMINO_ISA

template <class T>
concept gguf_number = plain_integer<T> || std::same_as<T, bool> || std::same_as<T, float> || std::same_as<T, double>;

inline namespace TETROMINO_ISA {

template <class T>
constexpr io::gguf_type gguf_type_of() noexcept {
  if constexpr (std::same_as<T, bool>) {
    return io::gguf_type::boolean;
  } else if constexpr (std::same_as<T, float>) {
    return io::gguf_type::float32;
  } else if constexpr (std::same_as<T, double>) {
    return io::gguf_type::float64;
  } else if constexpr (plain_integer<T>) {
    constexpr bool is_signed = std::is_signed_v<T>;
    return sizeof(T) == 1   ? (is_signed ? io::gguf_type::int8 : io::gguf_type::uint8)
           : sizeof(T) == 2 ? (is_signed ? io::gguf_type::int16 : io::gguf_type::uint16)
           : sizeof(T) == 4 ? (is_signed ? io::gguf_type::int32 : io::gguf_type::uint32)
                            : (is_signed ? io::gguf_type::int64 : io::gguf_type::uint64);
  } else {
    return io::gguf_type::string;
  }
}

template <gguf_number T>
T load_number(const std::uint8_t* from) noexcept {
  if constexpr (std::same_as<T, bool>) {
    return *from != 0;
  } else {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
}

template <gguf_number T>
void append_number(std::vector<std::uint8_t>& out, T value) {
  const std::size_t at = out.size();
  out.resize(at + sizeof value);
  std::memcpy(out.data() + at, &value, sizeof value);
}

inline void append_string(std::vector<std::uint8_t>& out, std::string_view value) {
  append_number(out, std::uint64_t{value.size()});
  out.insert(out.end(), value.begin(), value.end());
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::io {

/// A C++ type that a single metadata value can be read as: bool, the integers, float, double, std::string_view.
template <class T>
concept gguf_element = detail::gguf_number<T> || std::same_as<T, std::string_view>;

/// A value of a GGUF file's metadata: its type, and its bytes as GGUF stores them. One that was read refers to its file
/// and must not outlive it; one that was made from a C++ value owns its bytes.
class gguf_value {
 public:
  template <gguf_element T>
  TETROMINO_ABI gguf_value(T value) : type_(detail::gguf_type_of<T>()) {
    if constexpr (std::same_as<T, std::string_view>) {
      detail::append_string(own_, value);
    } else {
      detail::append_number(own_, value);
    }
  }
  TETROMINO_ABI gguf_value(const std::string& value) : gguf_value(std::string_view(value)) {}
  TETROMINO_ABI gguf_value(const char* value) : gguf_value(std::string_view(value)) {}
  /// An array.
  template <gguf_element T>
  TETROMINO_ABI explicit gguf_value(std::span<const T> values) : type_(gguf_type::array) {
    detail::append_number(own_, static_cast<std::uint32_t>(detail::gguf_type_of<T>()));
    detail::append_number(own_, std::uint64_t{values.size()});
    for (const T& value : values) {
      if constexpr (std::same_as<T, std::string_view>) {
        detail::append_string(own_, value);
      } else {
        detail::append_number(own_, value);
      }
    }
  }
  /// Stored bytes of a value whose type is `type`. Pre: they are whole, as a checked file's are.
  TETROMINO_ABI gguf_value(gguf_type type, std::span<const std::uint8_t> stored) : type_(type), stored_(stored) {}

  [[nodiscard]] TETROMINO_ABI gguf_type type() const noexcept { return type_; }
  /// As they stand in a file, after the type.
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint8_t> bytes() const noexcept {
    return own_.empty() ? stored_ : std::span<const std::uint8_t>(own_);
  }

  /// The value. Fails if the stored type is another one. A string refers to this value's bytes.
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI T as() const {
    return try_as<T>().value();
  }
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI result<T> try_as() const {
    if (type_ != detail::gguf_type_of<T>()) return wrong_type("", detail::gguf_type_of<T>());
    std::span<const std::uint8_t> rest = bytes();
    return next<T>(rest);
  }

  /// The values of an array. Fails if it is none, or if the stored type is another one.
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI std::vector<T> as_array() const {
    return try_as_array<T>().value();
  }
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI result<std::vector<T>> try_as_array() const {
    std::span<const std::uint8_t> rest = bytes();
    if (type_ != gguf_type::array || element_type() != detail::gguf_type_of<T>()) {
      return wrong_type("an array of ", detail::gguf_type_of<T>());
    }
    rest = rest.subspan(4);
    const std::size_t count = next<std::uint64_t>(rest);
    std::vector<T> out;
    out.reserve(count);
    for (std::size_t i = 0; i < count; ++i) out.push_back(next<T>(rest));
    return out;
  }

  /// The same type and the same bytes.
  friend TETROMINO_ABI bool operator==(const gguf_value& a, const gguf_value& b) noexcept {
    const auto left = a.bytes(), right = b.bytes();
    return a.type_ == b.type_ && std::equal(left.begin(), left.end(), right.begin(), right.end());
  }

 private:
  [[nodiscard]] TETROMINO_ABI gguf_type element_type() const noexcept {
    return static_cast<gguf_type>(detail::load_number<std::uint32_t>(bytes().data()));
  }

  [[nodiscard]] TETROMINO_ABI error wrong_type(std::string_view kind, gguf_type expected) const {
    const bool is_array = type_ == gguf_type::array;
    return error(errc::invalid_argument,
                 {"expected ", kind, detail::fact_of(expected).name, ", found ", is_array ? "an array of " : "",
                  detail::fact_of(is_array ? element_type() : type_).name});
  }

  /// Takes one value off the front.
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI static T next(std::span<const std::uint8_t>& rest) noexcept {
    if constexpr (std::same_as<T, std::string_view>) {
      const std::size_t size = next<std::uint64_t>(rest);
      const std::string_view value(reinterpret_cast<const char*>(rest.data()), size);
      rest = rest.subspan(size);
      return value;
    } else {
      const T value = detail::load_number<T>(rest.data());
      rest = rest.subspan(sizeof(T));
      return value;
    }
  }

  gguf_type type_;
  std::vector<std::uint8_t> own_;  // empty: the bytes are those of a file
  std::span<const std::uint8_t> stored_;
};

/// The metadata of a GGUF file: values by key, in the order of the file.
class gguf_metadata {
 public:
  /// A key and its value.
  struct entry {
    std::string key;
    gguf_value value;
  };

  [[nodiscard]] TETROMINO_ABI auto begin() const noexcept { return entries_.begin(); }
  [[nodiscard]] TETROMINO_ABI auto end() const noexcept { return entries_.end(); }
  [[nodiscard]] TETROMINO_ABI std::size_t size() const noexcept { return entries_.size(); }

  /// The value of that key, or null.
  [[nodiscard]] TETROMINO_ABI const gguf_value* find(std::string_view key) const noexcept {
    const auto found = std::find_if(begin(), end(), [&](const entry& e) { return e.key == key; });
    return found == end() ? nullptr : &found->value;
  }

  /// The value of that key as a T. Fails with errc::unknown_name where there is none, and with errc::invalid_argument
  /// where its type is another one.
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI T get(std::string_view key) const {
    return try_get<T>(key).value();
  }
  template <gguf_element T>
  [[nodiscard]] TETROMINO_ABI result<T> try_get(std::string_view key) const {
    const gguf_value* const value = find(key);
    if (value == nullptr) {
      return error(errc::unknown_name, {"expected a key ", detail::printable(key), ", found none"});
    }
    auto out = value->try_as<T>();
    if (!out) return error(out.error().code(), {"key ", detail::printable(key), ": ", out.error().what()});
    return out;
  }

  /// Gives a key a value: in its place if it has one, else at the end.
  TETROMINO_ABI void set(std::string_view key, gguf_value value) {
    const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const entry& e) { return e.key == key; });
    if (found != entries_.end()) {
      found->value = std::move(value);
    } else {
      append(std::string(key), std::move(value));
    }
  }
  /// Adds a key that is not there yet.
  TETROMINO_ABI void append(std::string key, gguf_value value) {
    entries_.push_back({std::move(key), std::move(value)});
  }

 private:
  std::vector<entry> entries_;
};

}  // namespace TETROMINO_NAMESPACE::io

#include "../../detail/macros_back.hpp"
