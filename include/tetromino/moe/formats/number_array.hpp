#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"  // text
#include "../trace.hpp"     // no_expert

#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::int64_t …
#include <cstring>      // std::memcpy
#include <limits>       // std::numeric_limits
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <type_traits>  // std::is_floating_point_v, std::is_unsigned_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// What a file keeps numbers as.
enum class number_type : std::uint8_t { u8, i8, u16, i16, u32, i32, u64, i64, f32, f64 };

[[nodiscard]] inline std::size_t bytes_of(number_type t) {
  constexpr std::array<std::uint8_t, 10> bytes{1, 1, 2, 2, 4, 4, 8, 8, 4, 8};
  return bytes[static_cast<std::size_t>(t)];
}

/// Numbers in a file, little-endian and row-major, at any address.
struct number_array {
  number_type type = number_type::u8;
  std::vector<std::size_t> shape;
  std::span<const std::uint8_t> bytes;

  [[nodiscard]] std::size_t size() const { return bytes.size() / bytes_of(type); }

  /// Calls each(value) with the number's own type until it returns false.
  template <class Each>
  void for_each(const Each& each) const {
    switch (type) {
      case number_type::u8:
        return read<std::uint8_t>(each);
      case number_type::i8:
        return read<std::int8_t>(each);
      case number_type::u16:
        return read<std::uint16_t>(each);
      case number_type::i16:
        return read<std::int16_t>(each);
      case number_type::u32:
        return read<std::uint32_t>(each);
      case number_type::i32:
        return read<std::int32_t>(each);
      case number_type::u64:
        return read<std::uint64_t>(each);
      case number_type::i64:
        return read<std::int64_t>(each);
      case number_type::f32:
        return read<float>(each);
      case number_type::f64:
        return read<double>(each);
    }
  }

 private:
  template <class T, class Each>
  void read(const Each& each) const {
    for (std::size_t i = 0; i + sizeof(T) <= bytes.size(); i += sizeof(T)) {
      T value;
      std::memcpy(&value, bytes.data() + i, sizeof value);
      if (!each(value)) return;
    }
  }
};

/// An expert's id as engines write it, −1 for nobody; false if it is none.
template <class T>
[[nodiscard]] bool to_expert_id(T value, std::uint16_t& out) {
  if constexpr (std::is_floating_point_v<T>) {
    return false;
  } else {
    if constexpr (sizeof(T) > 1) {
      if (value == static_cast<T>(-1)) {
        out = no_expert;
        return true;
      }
    }
    if constexpr (!std::is_unsigned_v<T>) {
      if (value == -1) {
        out = no_expert;
        return true;
      }
      if (value < 0) return false;
    }
    if constexpr (sizeof(T) > 1) {
      if (static_cast<std::uint64_t>(value) >= no_expert) return false;
    }
    out = static_cast<std::uint16_t>(value);
    return true;
  }
}

/// Appends all numbers as ids of experts; says what is wrong, or nothing.
[[nodiscard]] inline std::string append_ids(const number_array& from, std::vector<std::uint16_t>& to) {
  std::string problem;
  from.for_each([&](auto value) {
    std::uint16_t id = 0;
    if (to_expert_id(value, id)) {
      to.push_back(id);
      return true;
    }
    problem = std::is_floating_point_v<decltype(value)>
                  ? std::string("expected ids as integers, found floating-point numbers")
                  : text("expected ids from 0 to 65534, or -1 for nobody, got ", value);
    return false;
  });
  return problem;
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
