#pragma once

#include "../detail/macros_off.hpp"

#include "../float16.hpp"  // half, bfloat16

#include <array>        // std::array
#include <concepts>     // std::same_as, std::convertible_to
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t
#include <optional>     // std::optional
#include <string_view>  // std::string_view
#include <type_traits>  // std::is_signed_v

namespace TETROMINO_NAMESPACE::io {

/// The number type of a stored tensor, by its name in safetensors files. A type never needs less alignment than the
/// types listed before it. (safetensors 0.8)
enum class dtype : std::uint8_t {
  BOOL,
  F4,       ///< E2M1, two to a byte
  F6_E2M3,  ///< four to three bytes
  F6_E3M2,  ///< four to three bytes
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  F8_E4M3FNUZ,
  F8_E5M2FNUZ,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,  ///< two F32: real and imaginary part
  F64,
  I64,
  U64,
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {

struct dtype_fact {
  io::dtype type;
  std::string_view name;
  std::uint8_t bits;
  std::uint8_t alignment;
};

inline constexpr std::array<dtype_fact, 22> dtype_facts{{
    {io::dtype::BOOL, "BOOL", 8, 1},
    {io::dtype::F4, "F4", 4, 1},
    {io::dtype::F6_E2M3, "F6_E2M3", 6, 1},
    {io::dtype::F6_E3M2, "F6_E3M2", 6, 1},
    {io::dtype::U8, "U8", 8, 1},
    {io::dtype::I8, "I8", 8, 1},
    {io::dtype::F8_E5M2, "F8_E5M2", 8, 1},
    {io::dtype::F8_E4M3, "F8_E4M3", 8, 1},
    {io::dtype::F8_E8M0, "F8_E8M0", 8, 1},
    {io::dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8, 1},
    {io::dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8, 1},
    {io::dtype::I16, "I16", 16, 2},
    {io::dtype::U16, "U16", 16, 2},
    {io::dtype::F16, "F16", 16, 2},
    {io::dtype::BF16, "BF16", 16, 2},
    {io::dtype::I32, "I32", 32, 4},
    {io::dtype::U32, "U32", 32, 4},
    {io::dtype::F32, "F32", 32, 4},
    {io::dtype::C64, "C64", 64, 4},
    {io::dtype::F64, "F64", 64, 8},
    {io::dtype::I64, "I64", 64, 8},
    {io::dtype::U64, "U64", 64, 8},
}};

inline namespace TETROMINO_ISA {

constexpr bool dtype_facts_are_in_order() {
  for (std::size_t i = 0; i < dtype_facts.size(); ++i) {
    if (dtype_facts[i].type != static_cast<io::dtype>(i)) return false;
    if (i > 0 && dtype_facts[i].alignment < dtype_facts[i - 1].alignment) return false;
  }
  return true;
}

}  // namespace TETROMINO_ISA

static_assert(dtype_facts_are_in_order());

/// The integer types of the language, characters and bool left out.
template <class T>
concept plain_integer = std::same_as<T, signed char> || std::same_as<T, unsigned char> || std::same_as<T, short> ||
    std::same_as<T, unsigned short> || std::same_as<T, int> || std::same_as<T, unsigned int> || std::same_as<T, long> ||
    std::same_as<T, unsigned long> || std::same_as<T, long long> || std::same_as<T, unsigned long long>;

inline namespace TETROMINO_ISA {

template <plain_integer T>
constexpr io::dtype integer_dtype() noexcept {
  constexpr bool is_signed = std::is_signed_v<T>;
  switch (sizeof(T)) {
    case 1:
      return is_signed ? io::dtype::I8 : io::dtype::U8;
    case 2:
      return is_signed ? io::dtype::I16 : io::dtype::U16;
    case 4:
      return is_signed ? io::dtype::I32 : io::dtype::U32;
    default:
      return is_signed ? io::dtype::I64 : io::dtype::U64;
  }
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::io {
inline namespace TETROMINO_ISA {

/// The type's name in safetensors headers, such as "BF16".
[[nodiscard]] constexpr std::string_view name(dtype type) noexcept {
  return detail::dtype_facts[static_cast<std::size_t>(type)].name;
}

/// The type called `name` in safetensors headers; empty if there is none.
[[nodiscard]] constexpr std::optional<dtype> dtype_named(std::string_view name) noexcept {
  for (const auto& fact : detail::dtype_facts) {
    if (fact.name == name) return fact.type;
  }
  return std::nullopt;
}

/// Bits that one element takes: 4, 6, or a multiple of 8.
[[nodiscard]] constexpr std::size_t bits_per_element(dtype type) noexcept {
  return detail::dtype_facts[static_cast<std::size_t>(type)].bits;
}

/// The byte boundary that a tensor of this type should begin at, for readers that use it in place.
[[nodiscard]] constexpr std::size_t alignment(dtype type) noexcept {
  return detail::dtype_facts[static_cast<std::size_t>(type)].alignment;
}

}  // namespace TETROMINO_ISA

/// Which stored type a C++ type reads: `dtype_of<float>::value == dtype::F32`. Defined for the integers, float, double,
/// half and bfloat16; specialise it for a type of your own that is laid out as a stored type. There is none for bool,
/// since a stored byte may be neither 0 nor 1: read BOOL and the FP8 types through `bytes()`.
template <class T>
struct dtype_of {};
template <detail::plain_integer T>
struct dtype_of<T> {
  static constexpr dtype value = detail::integer_dtype<T>();
};
template <>
struct dtype_of<float> {
  static constexpr dtype value = dtype::F32;
};
template <>
struct dtype_of<double> {
  static constexpr dtype value = dtype::F64;
};
template <>
struct dtype_of<half> {
  static constexpr dtype value = dtype::F16;
};
template <>
struct dtype_of<bfloat16> {
  static constexpr dtype value = dtype::BF16;
};

/// A C++ type that tensors can be read as.
template <class T>
concept tensor_element = std::is_trivially_copyable_v<T> && requires {
  { dtype_of<T>::value } -> std::convertible_to<dtype>;
};

static_assert(dtype_of<std::int8_t>::value == dtype::I8 && dtype_of<std::uint64_t>::value == dtype::U64);
static_assert(dtype_named("F8_E8M0") == dtype::F8_E8M0 && !dtype_named("f32") && name(dtype::U64) == "U64");
static_assert(tensor_element<bfloat16> && !tensor_element<bool> && !tensor_element<char>);

}  // namespace TETROMINO_NAMESPACE::io

#include "../detail/macros_back.hpp"
