#pragma once

#include "../../detail/macros_off.hpp"

#include "../../io/safetensors.hpp"  // io::safetensors_tensor
#include "number_array.hpp"          // number_array

#include <optional>  // std::optional

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// The numbers of a tensor; nothing if it holds none of these types.
[[nodiscard]] inline std::optional<number_array> numbers_of(const io::safetensors_tensor& t) {
  const auto type = [&]() -> std::optional<number_type> {
    switch (t.dtype()) {
      case io::dtype::U8:
        return number_type::u8;
      case io::dtype::I8:
        return number_type::i8;
      case io::dtype::U16:
        return number_type::u16;
      case io::dtype::I16:
        return number_type::i16;
      case io::dtype::U32:
        return number_type::u32;
      case io::dtype::I32:
        return number_type::i32;
      case io::dtype::U64:
        return number_type::u64;
      case io::dtype::I64:
        return number_type::i64;
      case io::dtype::F32:
        return number_type::f32;
      case io::dtype::F64:
        return number_type::f64;
      default:
        return std::nullopt;
    }
  }();
  if (!type) return std::nullopt;
  return number_array{*type, t.shape(), t.bytes()};
}

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../detail/macros_back.hpp"
