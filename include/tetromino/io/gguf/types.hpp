#pragma once

#include "../../detail/macros_off.hpp"

#include "../../error.hpp"  // result

#include <array>        // std::array
#include <cstddef>      // std::size_t
#include <cstdint>      // std::uint8_t, std::uint16_t, std::uint32_t
#include <optional>     // std::optional
#include <string_view>  // std::string_view

namespace TETROMINO_NAMESPACE::io {

/// The number type of a GGUF tensor, by ggml's name and number. (ggml.h, enum ggml_type)
enum class ggml_type : std::uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q8_1 = 9,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  Q8_K = 15,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  I8 = 24,
  I16 = 25,
  I32 = 26,
  I64 = 27,
  F64 = 28,
  IQ1_M = 29,
  BF16 = 30,
  TQ1_0 = 34,
  TQ2_0 = 35,
  MXFP4 = 39,  ///< 32 elements under one E8M0 scale
  NVFP4 = 40,  ///< 64 elements under four E4M3 scales; the tensor scale is a tensor of its own
  Q1_0 = 41,
  Q2_0 = 42,
};

}  // namespace TETROMINO_NAMESPACE::io

namespace TETROMINO_NAMESPACE::detail {

struct ggml_fact {
  io::ggml_type type;
  std::string_view name;
  std::uint16_t elements;
  std::uint16_t bytes;
};

inline constexpr std::array<ggml_fact, 35> ggml_facts{{
    {io::ggml_type::F32, "F32", 1, 4},
    {io::ggml_type::F16, "F16", 1, 2},
    {io::ggml_type::Q4_0, "Q4_0", 32, 18},
    {io::ggml_type::Q4_1, "Q4_1", 32, 20},
    {io::ggml_type::Q5_0, "Q5_0", 32, 22},
    {io::ggml_type::Q5_1, "Q5_1", 32, 24},
    {io::ggml_type::Q8_0, "Q8_0", 32, 34},
    {io::ggml_type::Q8_1, "Q8_1", 32, 36},
    {io::ggml_type::Q2_K, "Q2_K", 256, 84},
    {io::ggml_type::Q3_K, "Q3_K", 256, 110},
    {io::ggml_type::Q4_K, "Q4_K", 256, 144},
    {io::ggml_type::Q5_K, "Q5_K", 256, 176},
    {io::ggml_type::Q6_K, "Q6_K", 256, 210},
    {io::ggml_type::Q8_K, "Q8_K", 256, 292},
    {io::ggml_type::IQ2_XXS, "IQ2_XXS", 256, 66},
    {io::ggml_type::IQ2_XS, "IQ2_XS", 256, 74},
    {io::ggml_type::IQ3_XXS, "IQ3_XXS", 256, 98},
    {io::ggml_type::IQ1_S, "IQ1_S", 256, 50},
    {io::ggml_type::IQ4_NL, "IQ4_NL", 32, 18},
    {io::ggml_type::IQ3_S, "IQ3_S", 256, 110},
    {io::ggml_type::IQ2_S, "IQ2_S", 256, 82},
    {io::ggml_type::IQ4_XS, "IQ4_XS", 256, 136},
    {io::ggml_type::I8, "I8", 1, 1},
    {io::ggml_type::I16, "I16", 1, 2},
    {io::ggml_type::I32, "I32", 1, 4},
    {io::ggml_type::I64, "I64", 1, 8},
    {io::ggml_type::F64, "F64", 1, 8},
    {io::ggml_type::IQ1_M, "IQ1_M", 256, 56},
    {io::ggml_type::BF16, "BF16", 1, 2},
    {io::ggml_type::TQ1_0, "TQ1_0", 256, 54},
    {io::ggml_type::TQ2_0, "TQ2_0", 256, 66},
    {io::ggml_type::MXFP4, "MXFP4", 32, 17},
    {io::ggml_type::NVFP4, "NVFP4", 64, 36},
    {io::ggml_type::Q1_0, "Q1_0", 128, 18},
    {io::ggml_type::Q2_0, "Q2_0", 64, 18},
}};

inline namespace TETROMINO_ISA {

/// Null for a number that is no type, which a file may hold.
constexpr const ggml_fact* find_ggml_fact(std::uint32_t number) noexcept {
  for (const auto& fact : ggml_facts) {
    if (static_cast<std::uint32_t>(fact.type) == number) return &fact;
  }
  return nullptr;
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::detail

namespace TETROMINO_NAMESPACE::io {
inline namespace TETROMINO_ISA {

/// The type's name, such as "MXFP4"; plain numbers have the names that io::dtype gives them.
[[nodiscard]] constexpr std::string_view name(ggml_type type) noexcept {
  return detail::find_ggml_fact(static_cast<std::uint32_t>(type))->name;
}

/// How many elements of a row one block holds: 1 for plain numbers.
[[nodiscard]] constexpr std::size_t block_elements(ggml_type type) noexcept {
  return detail::find_ggml_fact(static_cast<std::uint32_t>(type))->elements;
}

/// Bytes of one block.
[[nodiscard]] constexpr std::size_t block_bytes(ggml_type type) noexcept {
  return detail::find_ggml_fact(static_cast<std::uint32_t>(type))->bytes;
}

}  // namespace TETROMINO_ISA

static_assert(name(ggml_type::BF16) == "BF16" && block_elements(ggml_type::MXFP4) == 32 &&
              block_bytes(ggml_type::NVFP4) == 36);

}  // namespace TETROMINO_NAMESPACE::io

#include "../../detail/macros_back.hpp"
